"""DoRA: the lengths of rows and when they are computed, what is kept, lengths of zero, layers of every kind."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import effkit
from effkit.peft import (
    DoRA,
    DoRAConfig,
    LoRAConfig,
    activate,
    adapters_of,
    disabled,
    dora_linear,
    dora_norm,
    merge,
    set_scale,
    unmerge,
)
from effkit.peft.dora import dora_linear_reference, dora_norm_reference
from effkit.quant import FP8Config, NF4Config
from effkit.testing import assert_equivalent

ALL = dict(target_modules="all-linear", rank=3, alpha=5)
SHAPES = dict(x=(2, 9, 24), a=(5, 24), b=(20, 5), magnitude=(20,), weight=(20, 24), bias=(20,))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(dtype=torch.float32, **changed):
    """A dense layer with a DoRA: random factors, lengths a tenth beside those of the rows."""
    tensors = {name: drawn(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    tensors["scale"] = torch.tensor(0.7)
    tensors["norm"] = dora_norm(tensors["weight"], tensors["a"], tensors["b"], tensors["scale"])
    tensors["magnitude"] = (tensors["norm"] * (1 + 0.1 * tensors["magnitude"])).to(dtype)
    return {**tensors, **changed}


def disturb(model, name="default"):
    """Factors and lengths as after some training."""
    for i, part in enumerate(adapters_of(model, name).values()):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1 * drawn(*parameter.shape, seed=i, dtype=parameter.dtype))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def kept(tensors, **options):
    """Bytes that a forward pass keeps beside the parameters passed in, each storage once."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    parameters = {t.untyped_storage().data_ptr() for name, t in tensors.items() if name not in ("x", "base")}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.ndim:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = dora_linear(**tensors, **options)
    y.sum().backward()
    return sum(storages.values())


class TestLengths:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_are_those_of_the_rows(self, dtype):
        weight, a, b = drawn(65, 33, dtype=dtype), drawn(4, 33, seed=1), drawn(65, 4, seed=2)
        lengths = dora_norm(weight, a, b, torch.tensor(0.5))
        assert lengths.dtype == (dtype if dtype == torch.float64 else torch.float32)
        wide = weight.to(lengths.dtype)
        assert_equivalent(dora_norm, dora_norm_reference, (wide, a, b, torch.tensor(0.5)), grads=False)
        assert torch.equal(dora_norm(wide, a, b, torch.tensor(0.5)), lengths)

    def test_of_many_pieces(self):
        args = drawn(300, 4099), drawn(2, 4099, seed=1), drawn(300, 2, seed=2), torch.tensor(0.5)
        assert_equivalent(dora_norm, dora_norm_reference, args, grads=False)

    def test_of_rows_that_the_update_all_but_removes(self):
        """The expanded square loses all digits here; the sum itself does not."""
        a, b = drawn(4, 33, seed=1), drawn(8, 4, seed=2)
        weight = -(b @ a) * 1.0001
        args = weight, a, b, torch.tensor(1.0)
        rounding = b.abs() @ a.abs()  # the size of what cancels
        error = (dora_norm(*args) - dora_norm_reference(*(t.double() for t in args))).abs()
        assert (error <= 8 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(rounding, dim=1)).all()

    def test_autocast_does_not_round_them(self):
        args = drawn(8, 33), drawn(4, 33, seed=1), drawn(8, 4, seed=2), torch.tensor(1.0)
        torch._dynamo.reset()
        compiled = torch.compile(dora_norm, backend="eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside, in_graph = dora_norm(*args), compiled(*args)
        assert torch.equal(inside, dora_norm(*args)) and not inside.requires_grad
        assert_equivalent(lambda *args: in_graph, dora_norm_reference, args, grads=False)

    def test_are_a_constant_in_the_backward_pass(self):
        norm = arguments()["norm"].requires_grad_()
        dora_linear(**arguments(norm=norm, x=drawn(3, 24).requires_grad_())).sum().backward()
        assert norm.grad is None


class TestWhenLengthsAreComputed:
    @pytest.fixture
    def counted(self, monkeypatch):
        """A layer with a DoRA, and the list that each computation of lengths makes longer."""
        calls = []

        def count(*args):
            calls.append(None)
            return dora_norm(*args)

        monkeypatch.setattr("effkit.peft.dora.dora_norm", count)
        layer = nn.Sequential(nn.Linear(24, 20))
        effkit.apply(layer, DoRAConfig(rank=3, init="random", target_modules=("0",)))
        calls.clear()
        return layer, layer[0].adapters["default"], calls

    def fresh(self, layer, part):
        """Whether the layer goes by the lengths that its rows have now."""
        weight = layer[0].weight.detach()
        return torch.equal(part.norm(layer[0]), dora_norm(weight, part.lora_A, part.lora_B, part.gain))

    def test_once_while_nothing_changes(self, counted):
        layer, _, calls = counted
        for _ in range(3):
            layer(torch.ones(2, 24))
        with disabled(layer):
            layer(torch.ones(2, 24))
        assert len(calls) <= 2  # measured, and once since the adapter was switched on

    def test_anew_after_every_change(self, counted):
        layer, part, _ = counted
        optimizer = torch.optim.SGD([part.lora_B], lr=0.1)
        other = {name: 2 * value for name, value in layer.state_dict().items()}

        def hidden():  # as FSDP gathers parameters that an optimizer has changed
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(part.lora_A):
                part.lora_A.mul_(2)
            optimizer.step()

        def train():
            layer(torch.ones(2, 24)).sum().backward()
            optimizer.step()

        def replace():
            part.lora_A = nn.Parameter(part.lora_A.detach() + 1)

        def data():
            layer[0].weight.data = layer[0].weight.data * 2

        for change in (train, hidden, replace, data, layer.double, lambda: layer.load_state_dict(other)):
            layer(torch.ones(2, 24, dtype=layer[0].weight.dtype))
            change()
            assert self.fresh(layer, part), change

    def test_writing_through_data_is_not_seen_before_a_step(self, counted):
        """torch does not count it: a limit that the page names."""
        layer, part, _ = counted
        layer(torch.ones(2, 24))
        part.lora_A.data.mul_(2)
        assert not self.fresh(layer, part)
        torch.optim.SGD([part.lora_B], lr=0.1).step()
        assert self.fresh(layer, part)

    def test_copies_have_their_own(self, counted):
        layer, part, _ = counted
        part.norm(layer[0])
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        for other in (copy.deepcopy(layer), torch.load(stored, weights_only=False)):
            with torch.no_grad():
                other[0].adapters["default"].lora_A.mul_(3)
            assert self.fresh(other, other[0].adapters["default"]) and self.fresh(layer, part)

    def test_in_inference_mode_and_then_with_gradients(self, counted):
        layer, part, _ = counted
        with torch.inference_mode():
            layer(torch.ones(2, 24))
        layer(torch.ones(2, 24)).sum().backward()
        assert part.lora_magnitude_vector.grad is not None

    def test_are_of_the_whole_update_at_any_strength(self, counted):
        layer, part, _ = counted
        before = part.norm(layer[0]).clone()
        set_scale(layer, 0.3)
        assert torch.equal(part.norm(layer[0]), before)


class TestOp:
    def test_is_a_dense_layer(self):
        """Against the one product with the stretched sum of W and the update."""

        def dense(x, a, b, magnitude, weight, bias, scale, norm):
            direction = (weight + scale * (b @ a)) / norm[:, None]
            return F.linear(x, magnitude[:, None] * direction, bias).to(x.dtype)

        trained = ("x", "a", "b", "magnitude", "bias")
        for dtype in (torch.float64, torch.bfloat16):
            assert_equivalent(dora_linear, dense, arguments(dtype, norm=arguments()["norm"].to(dtype)), trained)

    def test_the_start_is_the_base_bit_for_bit(self):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = arguments(dtype)
            bare = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
            norm = tensors["norm"]
            start = {**tensors, "b": torch.zeros_like(tensors["b"]), "magnitude": norm}
            seed = torch.tensor(5)
            assert torch.equal(dora_linear(**start), bare)
            assert torch.equal(dora_linear(**start, dropout=0.4, seed=seed), bare)
            assert torch.equal(dora_linear(**tensors, gate=torch.zeros(())), bare)
            none = {**tensors, "a": tensors["a"][:0], "b": tensors["b"][:, :0], "magnitude": norm}
            assert torch.equal(dora_linear(**none), bare)
            beside = {**start, "weight": None, "base": bare}
            assert torch.equal(dora_linear(**beside), bare)

    def test_small_changes_of_length_are_not_rounded_away(self):
        """g is 1.002, which bfloat16 has not; results at the upper end of a power of two still move."""
        tensors = arguments(torch.bfloat16)
        tensors |= {"b": torch.zeros_like(tensors["b"]), "magnitude": tensors["norm"] * 1.002}
        bare = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert not torch.equal(dora_linear(**tensors), bare)

    def test_keeps_x_the_inner_product_and_y(self):
        tensors = arguments(torch.bfloat16)
        tensors |= {name: tensors[name].float() for name in ("a", "b", "magnitude")}
        for name in ("x", "a", "b", "magnitude", "bias"):
            tensors[name].requires_grad_()
        x = tensors["x"].nbytes
        inner, y = 5 * x // 24, 20 * x // 24
        assert kept(tensors) == x + inner + y
        assert kept(tensors, dropout=0.3, seed=torch.tensor(1)) == x + inner  # y plays no part
        frozen = {name: tensors[name].detach() for name in ("a", "magnitude")}
        assert kept(tensors | frozen) == inner  # LoRA-FA keeps neither x nor y
        base = F.linear(tensors["x"], tensors["weight"]).detach()
        assert kept(tensors | {"weight": None, "bias": None, "base": base}) == x + inner + y

    def test_a_result_changed_in_place_is_found_out(self):
        tensors = arguments()
        tensors["magnitude"].requires_grad_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            dora_linear(**tensors).relu_().sum().backward()

    def test_lengths_of_zero_come_into_being_during_training(self):
        """The answer to whether y tells enough is not kept longer than the lengths: in place, replaced, gated."""
        tensors = arguments(torch.float64)
        lengths = tensors["magnitude"].requires_grad_()
        trained = ("x", "a", "b", "magnitude", "bias")
        for step in range(3):
            assert_equivalent(dora_linear, dora_linear_reference, tensors, trained)
            dora_linear(**tensors).sum().backward()
            assert lengths.grad.isfinite().all()
            with torch.no_grad():
                lengths[step] = 0.0
                lengths[step + 3] *= -1
        gate = torch.tensor(2.0, dtype=torch.float64)  # beyond one, g = 1/2 removes a column
        halved = {**tensors, "magnitude": tensors["norm"] / 2, "gate": gate}
        assert_equivalent(dora_linear, dora_linear_reference, halved, trained)

    def test_masks_of_both_passes_are_the_same(self):
        tensors = arguments(torch.float64, dropout=0.4, seed=torch.tensor(77))
        x, options = tensors.pop("x"), tensors
        assert torch.autograd.gradcheck(lambda x: dora_linear(x, **options), x.requires_grad_(), fast_mode=True)
        assert not torch.equal(dora_linear(x, **options), dora_linear(x, **{**options, "seed": torch.tensor(78)}))

    def test_autocast(self):
        tensors = arguments()
        with torch.autocast("cpu", torch.bfloat16):
            y = dora_linear(**{**tensors, "magnitude": tensors["magnitude"].requires_grad_()})
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and tensors["magnitude"].grad.dtype == torch.float32

    def test_second_derivatives_are_for_the_reference(self):
        tensors = arguments(torch.float64)
        x = tensors["x"].requires_grad_()
        (dx,) = torch.autograd.grad(dora_linear(**tensors).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
        (dx,) = torch.autograd.grad(dora_linear_reference(**tensors).square().sum(), x, create_graph=True)
        dx.sum().backward()

    def test_functional_transforms(self):
        """Per-example gradients by vmap equal those of one example at a time; so do several lengths at once."""
        tensors = arguments(torch.float64)

        def loss(magnitude, x):
            return dora_linear(**{**tensors, "magnitude": magnitude, "x": x}).square().sum()

        def each(magnitude, x):
            return torch.func.vmap(torch.func.grad(loss), (0, 0))(magnitude, x)

        def one_by_one(magnitude, x):
            return torch.stack([torch.func.grad(loss)(*pair) for pair in zip(magnitude, x, strict=True)])

        lengths = torch.stack((tensors["magnitude"], 0 * tensors["magnitude"]))
        assert_equivalent(each, one_by_one, (lengths, tensors["x"]), grads=False)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(magnitude=torch.zeros(19)), ValueError, r"magnitude has shape \[19\], expected \[M\] with M=20"),
            (dict(base=torch.zeros(2, 9, 20)), ValueError, "weight and base are both given"),
            (dict(dropout=0.1), ValueError, "seed None"),
            (
                dict(weight=None, base=torch.zeros(2, 9, 20), dropout=0.1, seed=torch.tensor(1)),
                ValueError,
                "dropout is 0.1 beside base, which is of all of x",
            ),
            (dict(scale=torch.ones((), requires_grad=True)), ValueError, "scale asks for a gradient"),
            (dict(norm=torch.zeros(20, dtype=torch.int64)), TypeError, "norm has dtype torch.int64"),
            (dict(backend="triton"), effkit.ops.BackendUnavailable, "choices: 'reference', 'torch'"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        with pytest.raises(error, match=message):
            dora_linear(**arguments(**change))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_a_model(make, ids, kind):
    """It starts as the model was, R (K + M) + M values a layer are trained, and undo leaves nothing."""
    model = make(kind)
    before, names = logits(model, ids), set(model.state_dict())
    change = effkit.apply(model, DoRAConfig(**ALL))
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model.train(), ids), before)
    merge(model)
    assert torch.equal(logits(model, ids), before)
    unmerge(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    shapes = [tuple(model.get_submodule(path).weight.shape) for path in change.matched]
    outputs = [shape[kind == "gpt2"] for shape in shapes]
    assert sum(trained.values()) == sum(3 * sum(shape) for shape in shapes) + sum(outputs)
    assert set(model.state_dict()) - names == set(trained)
    after = logits(disturb(model).eval(), ids)
    assert not torch.equal(after, before)
    with disabled(model):
        assert torch.equal(logits(model, ids), before)
    merge(model)
    unmerge(model)
    assert torch.equal(logits(model, ids), after)
    change.undo()
    assert torch.equal(logits(model, ids), before) and set(model.state_dict()) == names


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("quantized", [None, NF4Config(block_size=32), FP8Config()], ids=["dense", "nf4", "fp8"])
def test_merged_is_what_the_layer_computes(make, ids, quantized, strength):
    model = make("llama", hidden_size=64, intermediate_size=128, attention_bias=True)
    if quantized is not None:
        effkit.apply(model, quantized)
    before = logits(model, ids)
    effkit.apply(model, DoRAConfig(**ALL))
    assert torch.equal(logits(model, ids), before) and torch.equal(logits(model.train(), ids), before)
    layer = disturb(model).eval().model.layers[0].self_attn.k_proj
    set_scale(model, strength)
    x = drawn(5, 64)
    adapted = layer(x).detach()
    merge(model)
    dense = model.model.layers[0].self_attn.k_proj
    assert isinstance(dense, nn.Linear) and dense.weight.dtype == torch.float32
    assert_equivalent(lambda x: adapted, lambda x: F.linear(x, *(p.detach().to(x.dtype) for p in dense.parameters())),
                      (x,), grads=False)  # fmt: skip


def test_dropout_beside_a_quantized_layer():
    """The change sees x after dropout, the layer all of x."""
    model = nn.Sequential(nn.Linear(64, 32))
    effkit.apply(model, NF4Config(block_size=32), DoRAConfig(rank=3, dropout=0.5, target_modules=("0",)))
    layer = disturb(model).train()[0]
    part = layer.adapters["default"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mask = F.dropout(torch.ones(7, 64), 0.5)
        torch.manual_seed(3)
        found = layer(drawn(7, 64)).detach()
    weight, bias = layer.dequantize().weight.detach(), layer.bias.detach()

    def expected(x):
        weight_, bias_, a, b, m = (
            t.detach().to(x.dtype) for t in (weight, bias, part.lora_A, part.lora_B, part.lora_magnitude_vector)
        )
        ratio = m / dora_norm_reference(weight_, a, b, torch.ones((), dtype=x.dtype))
        seen = x * mask.to(x.dtype)
        change = (ratio - 1) * F.linear(seen, weight_) + ratio * F.linear(F.linear(seen, a), b)
        return F.linear(x, weight_, bias_) + change

    assert_equivalent(lambda x: found, expected, (drawn(7, 64),), grads=False)


def test_lengths_stay_wide_where_the_factors_do_not(make):
    model = make("llama").to(torch.bfloat16)
    effkit.apply(model, DoRAConfig(**ALL, dtype="bfloat16"))
    part = next(iter(adapters_of(model, "default").values()))
    assert part.lora_A.dtype == torch.bfloat16 and part.lora_magnitude_vector.dtype == torch.float32


def test_compiled_code_is_compiled_once(make, ids):
    model = make("llama", num_hidden_layers=1)
    effkit.apply(model, DoRAConfig(**ALL))
    disturb(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        on = compiled(ids).logits
        with disabled(model):
            assert torch.equal(compiled(ids).logits, logits(model, ids))
        set_scale(model, 0.5)
        half = compiled(ids).logits
        disturb(model)
        assert not torch.equal(compiled(ids).logits, half) and not torch.equal(half, on)
    assert counter.frame_count == 1


def test_saved_and_loaded(make, ids, tmp_path):
    model = make("llama")
    effkit.apply(model, DoRAConfig(**ALL))
    expected = logits(disturb(model), ids)
    effkit.save(model, tmp_path)
    assert torch.equal(logits(effkit.load(tmp_path), ids), expected)


def test_refusals(make):
    model = make("llama")
    with pytest.raises(TypeError, match=r"DoRAConfig: model\.embed_tokens is Embedding, expected nn\.Linear"):
        effkit.apply(model, DoRAConfig(target_modules=("embed_tokens",)))
    with pytest.raises(ValueError, match="update_bias is True, but DoRA has no bias of the update"):
        DoRAConfig(update_bias=True)
    with pytest.raises(ValueError, match="update_bias is True"):
        DoRA(4, 4, rank=2, update_bias=True)
    effkit.apply(model, DoRAConfig(**ALL), LoRAConfig(**ALL, name="other"))
    with pytest.raises(ValueError, match="'default', DoRA, works alone only"):
        activate(model, "default", "other")
    with pytest.raises(TypeError, match="DoRA has no factors"):
        next(iter(adapters_of(model, "default").values())).factors()
