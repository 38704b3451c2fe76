"""VeRA: the projections of the key, what is kept and trained, and that layers of any kind and size share one pair."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import effkit
from effkit.peft import (
    LoRAConfig,
    SingLoRAConfig,
    VeRA,
    VeRAConfig,
    activate,
    adapters_of,
    disabled,
    load_adapter,
    lora_linear,
    merge,
    save_adapter,
    unmerge,
    vera_linear,
)
from effkit.peft.vera import Projections, vera_linear_reference
from effkit.quant import NF4Config
from effkit.testing import assert_equivalent

SEVEN = dict(target_modules="all-linear", rank=6)


def randomize(model, name="default"):
    """Vectors as after some training."""
    generator = torch.Generator().manual_seed(2)
    for part in adapters_of(model, name).values():
        for vector in (part.vera_lambda_d, part.vera_lambda_b):
            vector.data.copy_(torch.randn(vector.shape, generator=generator) / 3)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def projections(model, name="default"):
    """The pair that all layers share."""
    (shared,) = {id(part.projections): part.projections for part in adapters_of(model, name).values()}.values()
    return shared


def layer_inputs(dtype=torch.float32):
    """The arguments of a dense layer with a VeRA, all random."""
    g = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, 9, 24), a=(7, 24), b=(20, 7), lambda_d=(7,), lambda_b=(20,), weight=(20, 24), bias=(20,))
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


class TestProjections:
    def test_are_those_of_peft(self):
        """The values of peft for key 0: A first, then B, from one generator in float32."""
        drawn = Projections(4, 8, 6, 0)
        first = [f"{value:.7f}" for value in (*drawn.vera_A[0, :4].tolist(), *drawn.vera_B[0].tolist())]
        assert first[:4] == ["-0.0064838", "0.4645738", "-0.7127780", "-0.6373419"]
        assert first[4:] == ["-0.7938547", "-0.5637903", "-0.8556564", "-1.1470484"]

    def test_depend_on_the_four_numbers_alone(self):
        small = Projections(4, 8, 6, 5)
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = Projections(4, 8, 6, 5, device="cpu")
        torch.set_default_dtype(torch.float32)
        assert torch.equal(small.vera_A, again.vera_A) and torch.equal(small.vera_B, again.vera_B)
        taller = Projections(4, 8, 9, 5)  # more rows of B are drawn after all others
        assert torch.equal(small.vera_A, taller.vera_A) and torch.equal(small.vera_B, taller.vera_B[:6])
        for other in (Projections(4, 9, 6, 5), Projections(4, 8, 6, 6), Projections(5, 8, 6, 5)):
            assert not torch.equal(small.vera_B, other.vera_B[:, :4])
        assert not torch.equal(small.vera_A, Projections(4, 9, 6, 5).vera_A[:, :8])

    def test_stay_in_float32_and_come_back_from_meta(self):
        drawn = Projections(4, 8, 6)
        before = drawn.vera_A.clone()
        assert drawn.half().vera_A.dtype == drawn.double().vera_B.dtype == torch.float32
        drawn.to("meta").to_empty(device="cpu")
        assert torch.equal(drawn.vera_A, before)
        with torch.device("meta"):
            built = Projections(4, 8, 6)
        assert built.vera_A.is_meta and torch.equal(built.to_empty(device="cpu").vera_A, before)

    def test_casts_are_kept_and_renewed(self):
        drawn, cpu = Projections(4, 8, 6), torch.device("cpu")
        first, second = drawn.cast(cpu, torch.bfloat16), drawn.cast(cpu, torch.bfloat16)
        assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(first, second, strict=True))
        assert drawn.cast(cpu, torch.float32)[0] is drawn.vera_A
        drawn.vera_A.mul_(2)
        assert torch.equal(drawn.cast(cpu, torch.bfloat16)[0], 2 * first[0])
        drawn.vera_B = torch.ones(6, 4)
        assert torch.equal(drawn.cast(cpu, torch.bfloat16)[1], torch.ones(6, 4, dtype=torch.bfloat16))
        # No copies in copies and pickles.
        assert not copy.deepcopy(drawn)._casts and drawn._casts


class TestOp:
    def test_is_a_dense_layer(self):
        """Against the one product with W + diag(lambda_b) B diag(lambda_d) A."""

        def dense(x, a, b, lambda_d, lambda_b, weight, bias):
            weight = weight + (lambda_b[:, None] * b) @ (lambda_d[:, None] * a)
            return nn.functional.linear(x, weight, bias)

        trained = ("x", "lambda_d", "lambda_b", "bias")
        for dtype in (torch.float64, torch.bfloat16):
            assert_equivalent(vera_linear, dense, layer_inputs(dtype), trained)

    def test_keeps_the_inner_product_alone(self):
        """Bytes kept for the backward pass beside what was passed in: R / K of x, with dropout as without."""
        tensors = layer_inputs(torch.bfloat16)
        tensors |= {name: tensors[name].float() for name in ("lambda_d", "lambda_b")}
        for name in ("x", "lambda_d", "lambda_b", "bias"):
            tensors[name].requires_grad_()
        passed_in = {t.untyped_storage().data_ptr() for name, t in tensors.items() if name != "x"}

        def kept(**options):
            storages = {}

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in passed_in and tensor.ndim:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = vera_linear(**{**tensors, **options})
            y.sum().backward()
            return sum(storages.values())

        x = tensors["x"]
        floor = 7 * x.nbytes // 24
        assert kept() == floor
        assert kept(dropout=0.5, seed=torch.tensor(3)) == floor
        base = nn.functional.linear(x, tensors["weight"]).detach()
        assert kept(weight=None, bias=None, base=base) == floor
        assert kept(weight=tensors["weight"].requires_grad_()) == floor + x.nbytes
        tensors["weight"].requires_grad_(False)
        frozen = {name: tensors[name].detach() for name in ("lambda_d", "lambda_b")}
        assert kept(**frozen) == 0

    def test_zeros_are_the_bare_layer(self):
        tensors = layer_inputs()
        bare = nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
        for name in ("lambda_b", "lambda_d"):
            assert torch.equal(vera_linear(**{**tensors, name: torch.zeros_like(tensors[name])}), bare)
        assert torch.equal(vera_linear(**tensors, gate=torch.zeros(())), bare)

    def test_gradients_come_in_each_dtype_and_only_where_asked(self):
        tensors = layer_inputs(torch.bfloat16)
        vectors = {name: tensors[name].float().requires_grad_() for name in ("lambda_d", "lambda_b")}
        y = vera_linear(**{**tensors, **vectors})
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and all(v.grad.dtype == torch.float32 for v in vectors.values())
        assert all(tensors[name].grad is None for name in ("x", "a", "b", "weight", "bias"))

    def test_second_derivatives_are_for_the_reference(self):
        tensors = layer_inputs(torch.float64)
        x = tensors["x"].requires_grad_()
        (dx,) = torch.autograd.grad(vera_linear(**tensors).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
        (dx,) = torch.autograd.grad(vera_linear_reference(**tensors).square().sum(), x, create_graph=True)
        dx.sum().backward()

    def test_functional_transforms(self):
        """Per-example gradients by vmap equal those of one example at a time."""
        tensors = layer_inputs(torch.float64)

        def loss(lambda_b, x):
            return vera_linear(**{**tensors, "lambda_b": lambda_b, "x": x}).square().sum()

        def each(lambda_b, x):
            return torch.func.vmap(torch.func.grad(loss), (None, 0))(lambda_b, x)

        def one_by_one(lambda_b, x):
            return torch.stack([torch.func.grad(loss)(lambda_b, row) for row in x])

        assert_equivalent(each, one_by_one, (tensors["lambda_b"], tensors["x"]), grads=False)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(lambda_b=torch.zeros(19)), ValueError, r"lambda_b has shape \[19\], expected \[M\] with M=20 from b"),
            (dict(a=torch.zeros(7, 24, requires_grad=True)), ValueError, "a asks for a gradient, but projections are"),
            (dict(base=torch.zeros(2, 9, 20)), ValueError, "weight and base are both given"),
            (dict(dropout=0.1), ValueError, "seed None"),
            (dict(lambda_d=torch.zeros(7, dtype=torch.int64)), TypeError, "lambda_d has dtype torch.int64"),
            (dict(backend="triton"), effkit.ops.BackendUnavailable, "choices: 'reference', 'torch'"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        with pytest.raises(error, match=message):
            vera_linear(**{**layer_inputs(), **change})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_a_model(make, ids, kind):
    """It starts as the model was; R + M values a layer are trained, of layers of all shapes with one pair."""
    model = make(kind)
    before, names = logits(model, ids), set(model.state_dict())
    change = effkit.apply(model, VeRAConfig(**SEVEN))
    assert torch.equal(logits(model, ids), before)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    layers = [(path, model.get_submodule(path)) for path in change.matched]
    outputs = [layer.nf if kind == "gpt2" else layer.out_features for _, layer in layers]
    assert sum(trained.values()) == sum(6 + M for M in outputs)
    # Neither projections nor gates are in files.
    assert set(model.state_dict()) - names == set(trained)
    shared = projections(model)
    assert shared.vera_A.shape == (6, 128 if kind == "gpt2" else 48) and len(shared.vera_B) == max(outputs)
    assert not torch.equal(logits(randomize(model), ids), before)
    with disabled(model):
        assert torch.equal(logits(model, ids), before)
    change.undo()
    assert torch.equal(logits(model, ids), before) and set(model.state_dict()) == names


def test_merged_and_exported_as_lora(make, ids):
    """The merged layer, and LoRA with the factors, compute what the adapter does."""
    model = make("llama").double()
    effkit.apply(model, VeRAConfig(**SEVEN))
    layer = randomize(model).model.layers[0].mlp.down_proj
    a, b, scale = (part.detach() for part in layer.adapters["default"].factors())
    x = torch.randn(3, 48, dtype=torch.float64)

    def adapted(x):
        return vera_in(layer, x)

    def as_lora(x):
        return lora_linear(x, a.to(x.dtype), b.to(x.dtype), scale, layer.weight.detach().to(x.dtype))

    assert_equivalent(adapted, as_lora, (x,))
    merge(model)
    dense = model.model.layers[0].mlp.down_proj.weight.detach()
    assert_equivalent(adapted, lambda x: nn.functional.linear(x, dense.to(x.dtype)), (x,))
    unmerge(model)


def vera_in(layer, x):
    """The adapted layer in the dtype of x."""
    return copy.deepcopy(layer).to(x.dtype)(x)


def test_beside_four_bits(make, ids):
    """On a quantised base, whose weight is never changed, in half precision and with float32 vectors."""
    model = make("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    effkit.apply(model, NF4Config(block_size=32), VeRAConfig(**SEVEN))
    layer = randomize(model).model.layers[1].self_attn.v_proj
    assert layer.adapters["default"].vera_lambda_b.dtype == torch.float32
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    a, b, _ = (part.detach() for part in layer.adapters["default"].factors())
    weight = layer.dequantize().weight.detach()

    def reference(x):
        return nn.functional.linear(x, weight.to(x.dtype)) + (x @ a.T.to(x.dtype)) @ b.T.to(x.dtype)

    assert_equivalent(layer, reference, (x,))
    assert len(projections(model)._casts) == 2


def test_a_second_adapter_shares_or_has_its_own(make, ids):
    """Of smaller rank, too. Models of other sizes share values where in_features and out_features say so."""
    model, sizes = make("llama"), dict(in_features=64, out_features=96)
    effkit.apply(model, VeRAConfig(rank=8, target_modules=("q_proj",), **sizes))
    effkit.apply(model, VeRAConfig(rank=8, target_modules=("down_proj",), name="second", **sizes))
    effkit.apply(model, VeRAConfig(rank=4, target_modules=("q_proj",), name="third", **sizes))
    assert projections(model, "second") is projections(model)
    assert projections(model, "third").vera_A.shape == (4, 64)
    for names in (["default"], ["third"], ["default", "second", "third"]):
        activate(model, *names)
        assert logits(randomize(model, names[-1]), ids).isfinite().all()
    moved = copy.deepcopy(model)
    assert projections(moved) is projections(moved, "second") is not projections(model)
    wider = make("llama", hidden_size=64)
    effkit.apply(wider, VeRAConfig(rank=8, target_modules=("k_proj",), **sizes))
    assert torch.equal(projections(wider).vera_B, projections(model).vera_B)


def test_larger_layers_than_the_projections_are_refused(make):
    model = make("llama")
    message = r"model.layers.0.mlp.down_proj: a layer from 48 to 32 features, .* in_features up to 40"
    with pytest.raises(ValueError, match=message):
        effkit.apply(model, VeRAConfig(rank=4, in_features=40, target_modules=("q_proj", "down_proj")))
    assert not any("adapters" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="VeRA: a layer from 9 to 4 features"):
        VeRA(9, 4, projections=Projections(2, 8, 8))


def test_embeddings_are_refused(make):
    with pytest.raises(TypeError, match=r"model.embed_tokens is Embedding, expected nn.Linear"):
        effkit.apply(make("llama"), VeRAConfig(target_modules=("embed_tokens",)))


def test_saved_and_loaded(make, ids, tmp_path):
    """The files hold the vectors; the projections are drawn again."""
    model = make("llama")
    effkit.apply(model, VeRAConfig(projection_prng_key=7, **SEVEN))
    expected = logits(randomize(model), ids)
    effkit.save(model, tmp_path)
    assert torch.equal(logits(effkit.load(tmp_path), ids), expected)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(logits(torch.load(stream, weights_only=False), ids), expected)


@pytest.mark.parametrize("sizes", [{}, dict(in_features=64, out_features=99)])
def test_adapter_files_without_projections(make, ids, tmp_path, sizes):
    """They are drawn again; where the layers do not tell their sizes they are in the file all the same."""
    model = make("llama")
    effkit.apply(model, VeRAConfig(save_projection=False, **SEVEN, **sizes))
    expected = logits(randomize(model), ids)
    save_adapter(model, tmp_path)
    assert ("base_model.vera_A" in load_file(tmp_path / "adapter_model.safetensors")) == bool(sizes)
    other = make("llama")
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, ids), expected)


def test_layers_keep_the_inner_product_alone():
    """Of a layer in half precision whose x has a gradient: R / K of x, beside projections that all layers share."""
    model = nn.Sequential(nn.Linear(48, 20), nn.Linear(20, 48)).bfloat16()
    effkit.apply(model, VeRAConfig(rank=6, target_modules=("0", "1")))
    layer, x = randomize(model)[0], torch.randn(9, 48, dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    shared = [kept.value for kept in projections(model)._casts.values()]
    known, found = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *shared)}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.ndim and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(found.values()) == 6 * x.nbytes // 48


@pytest.mark.parametrize("kind", [LoRAConfig, SingLoRAConfig, VeRAConfig])
def test_results_may_be_changed_in_place(kind):
    """Activations that work in place, and residual sums, come right after adapted layers."""

    def gradient(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace))
        effkit.apply(model, kind(rank=3, target_modules=("0",)))
        x = torch.ones(2, 5, 16, requires_grad=True)
        model(x).sum().backward()
        return x.grad

    assert torch.equal(gradient(False), gradient(True))


def test_dropout_is_for_training_and_repeats_under_checkpointing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    effkit.apply(model, VeRAConfig(rank=4, dropout=0.5, target_modules=("0",)))
    layer, x = randomize(model)[0], torch.randn(5, 16)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))
    vector, found = layer.adapters["default"].vera_lambda_b, []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        found.append(torch.autograd.grad(y.square().sum(), vector)[0])
    assert torch.equal(*found)


def test_compiled_without_breaks_or_recompilation(make, ids):
    """On, off, on again, and vectors of other values: one graph."""
    model = make("llama")
    effkit.apply(model, VeRAConfig(**SEVEN))
    randomize(model)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for names in (["default"], [], ["default"]):
        activate(model, *names)
        assert_equivalent(compiled, lambda x: vera_in(layer, x), (x,), grads=False)
    assert counter.frame_count == 1


def test_autocast_computes_in_half_precision():
    model = nn.Sequential(nn.Linear(16, 24))
    effkit.apply(model, VeRAConfig(rank=4, target_modules=("0",)))
    layer, x = randomize(model)[0], torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for name, vector in layer.adapters["default"].named_parameters():
        half.adapters["default"].get_parameter(name).data = vector.data
    assert y.dtype == torch.bfloat16 and torch.equal(y, half(x.to(torch.bfloat16)))
    y.float().sum().backward()
    assert layer.adapters["default"].vera_lambda_d.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "VeRAConfig: rank is 0, expected an integer of at least 1"),
        (dict(in_features=-1), "in_features is -1"),
        (dict(projection_prng_key=-3), "projection_prng_key is -3"),
        (dict(dropout=1.0), r"dropout is 1.0, expected 0 <= dropout < 1"),
    ],
)
def test_wrong_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        VeRAConfig(**fields)
