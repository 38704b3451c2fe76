"""(IA)^3: what is kept, vectors of zero, which targets are feed-forward, layers of every kind."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import effkit
from effkit.peft import IA3Config, adapters_of, disabled, ia3_linear, merge, set_scale, unmerge
from effkit.peft.ia3 import USUAL_FEEDFORWARD, USUAL_IA3_TARGETS, ia3_linear_reference
from effkit.quant import FP8Config, NF4Config
from effkit.testing import assert_equivalent

CHOSEN = dict(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(dtype=torch.float32, feedforward=False):
    """A dense layer with a vector around one."""
    tensors = dict(x=drawn(2, 9, 24, dtype=dtype), weight=drawn(20, 24, seed=1, dtype=dtype))
    tensors |= dict(bias=drawn(20, seed=2, dtype=dtype), feedforward=feedforward)
    shape = (1, 24) if feedforward else (20, 1)
    return {**tensors, "vector": 1 + drawn(*shape, seed=3, dtype=dtype).tanh() / 2}


def disturb(model, name="default"):
    """Vectors as after some training."""
    for i, part in enumerate(adapters_of(model, name).values()):
        part.ia3_l.data += 0.3 * drawn(*part.ia3_l.shape, seed=i)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def kept(tensors):
    """Storages that a forward pass keeps beside weight and vector: their bytes, by address; and the result."""
    frozen = {tensors[name].untyped_storage().data_ptr() for name in ("weight", "vector")}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ia3_linear(**tensors)
    return storages, y


class TestOp:
    @pytest.mark.parametrize("feedforward", [False, True])
    def test_is_a_layer_with_scaled_rows_or_columns(self, feedforward):
        def merged(x, weight, bias, vector):
            bias = bias if feedforward else bias * vector.flatten()
            return F.linear(x, weight * vector, bias)

        for dtype in (torch.float64, torch.bfloat16):
            tensors = arguments(dtype, feedforward)
            del tensors["feedforward"]

            def scaled(**tensors):
                return ia3_linear(**tensors, feedforward=feedforward)

            assert_equivalent(scaled, merged, tensors)

    @pytest.mark.parametrize("feedforward", [False, True])
    def test_ones_are_the_bare_layer_bit_for_bit(self, feedforward):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = arguments(dtype, feedforward)
            tensors["vector"] = torch.ones_like(tensors["vector"])
            assert torch.equal(ia3_linear(**tensors), F.linear(tensors["x"], tensors["weight"], tensors["bias"]))

    def test_keeps_the_result_or_what_went_in(self):
        tensors = arguments(torch.bfloat16)
        tensors |= {"x": tensors["x"].requires_grad_(), "vector": tensors["vector"].float().requires_grad_()}
        storages, y = kept(tensors)
        assert storages == {y.untyped_storage().data_ptr(): y.nbytes}
        tensors |= arguments(torch.bfloat16, feedforward=True)
        tensors |= {"x": tensors["x"].requires_grad_(), "vector": tensors["vector"].float().requires_grad_()}
        storages, _ = kept(tensors)
        assert storages == {tensors["x"].untyped_storage().data_ptr(): tensors["x"].nbytes}
        assert not kept({**tensors, "vector": tensors["vector"].detach()})[0]

    def test_a_result_changed_in_place_is_found_out(self):
        tensors = arguments()
        tensors["vector"].requires_grad_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ia3_linear(**tensors).relu_().sum().backward()

    def test_factors_of_zero_come_into_being_during_training(self):
        """Whether the result may be divided by the vector is asked again after each change of it."""
        tensors = arguments(torch.float64)
        del tensors["feedforward"]
        vector = tensors["vector"].requires_grad_()
        optimizer = torch.optim.SGD([vector], lr=1.0)
        for _ in range(2):
            assert_equivalent(ia3_linear, ia3_linear_reference, tensors)
            optimizer.zero_grad()
            (0.5 * vector[::3] ** 2).sum().backward()  # whose step makes every third factor zero
            optimizer.step()
        assert (vector == 0).sum() == 7

    def test_has_second_derivatives(self):
        tensors = arguments(torch.float64)
        leaves = [tensors[name].requires_grad_() for name in ("x", "vector")]

        def scaled(x, vector):
            return ia3_linear(**{**tensors, "x": x, "vector": vector})

        assert torch.autograd.gradgradcheck(scaled, leaves, fast_mode=True)

    def test_functional_transforms(self):
        """Per-example gradients by vmap, of a vector with a zero, equal those of one example at a time."""
        tensors = arguments(torch.float64)
        tensors["vector"][3] = 0

        def loss(vector, x):
            return ia3_linear(**{**tensors, "vector": vector, "x": x}).square().sum()

        def each(vector, x):
            return torch.func.vmap(torch.func.grad(loss), (None, 0))(vector, x)

        def one_by_one(vector, x):
            return torch.stack([torch.func.grad(loss)(vector, row) for row in x])

        assert_equivalent(each, one_by_one, (tensors["vector"], tensors["x"]), grads=False)

    def test_autocast(self):
        tensors = arguments()
        vector = tensors["vector"].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = ia3_linear(**tensors)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and vector.grad.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(vector=torch.ones(1, 20)), ValueError, r"vector has shape \[1, 20\], expected \[20, 1\] with"),
            (dict(feedforward=True), ValueError, r"vector has shape \[20, 1\], expected \[1, 24\] with"),
            (dict(weight=None), ValueError, "bias is given without weight"),
            (dict(vector=torch.ones(20, 1, dtype=torch.int64)), TypeError, "vector has dtype torch.int64, choices"),
            (dict(vector=torch.ones(20, 1, device="meta")), ValueError, "vector is on meta, expected cpu as x"),
            (dict(backend="triton"), effkit.ops.BackendUnavailable, "choices: 'reference', 'torch'"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        with pytest.raises(error, match=message):
            ia3_linear(**{**arguments(), **change})


@pytest.mark.parametrize(("kind", "trained"), [("llama", 2 * (16 + 16 + 48)), ("gpt2", 2 * (96 + 128))])
def test_in_a_model_with_its_usual_targets(make, ids, kind, trained):
    """M numbers for a scaled output, K for a feed-forward layer; it starts as the model was."""
    model = make(kind)
    before, names = logits(model, ids), set(model.state_dict())
    change = effkit.apply(model, IA3Config())
    assert torch.equal(logits(model, ids), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    parts = adapters_of(model, "default")
    assert {path.rpartition(".")[2] for path, part in parts.items() if part.feedforward} == {
        "down_proj" if kind == "llama" else "c_proj"
    }
    after = logits(disturb(model), ids)
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
    model = make("llama", hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True)
    if quantized is not None:
        effkit.apply(model, quantized)
    effkit.apply(model, IA3Config(**CHOSEN))
    disturb(model)
    set_scale(model, strength)
    layers = {path: model.get_submodule(path) for path in adapters_of(model, "default")}
    inputs = {path: drawn(5, layer.in_features) for path, layer in layers.items()}
    found = {path: layer(inputs[path]).detach() for path, layer in layers.items()}
    merge(model)
    for path, x in inputs.items():
        weight, bias = (p.detach() for p in model.get_submodule(path).parameters())
        expected = found[path]

        def dense(x, weight=weight, bias=bias):
            return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

        assert_equivalent(lambda x, expected=expected: expected, dense, (x,), grads=False)


def test_compiled_code_is_compiled_once(make, ids):
    model = make("llama", num_hidden_layers=1)
    effkit.apply(model, IA3Config())
    disturb(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        on = compiled(ids).logits
        with disabled(model):
            assert torch.equal(compiled(ids).logits, logits(model, ids))
        set_scale(model, 0.5)
        assert not torch.equal(compiled(ids).logits, on)
    assert counter.frame_count == 1


def test_which_targets_are_feedforward():
    """Ends of names, without a dot before them as in peft; an expression speaks of whole names."""

    def parts(**fields):
        model = nn.ModuleDict({"wo": nn.Linear(4, 6), "two": nn.Linear(4, 6), "k": nn.Linear(4, 6)})
        effkit.apply(model, IA3Config(target_modules=("wo", "two", "k"), **fields))
        return {path for path, part in adapters_of(model, "default").items() if part.ia3_l.shape == (1, 4)}

    assert parts(feedforward_modules=("wo",)) == {"wo", "two"}
    assert parts(feedforward_modules="wo") == {"wo"}
    assert parts(feedforward_modules=()) == set()
    assert parts(feedforward_modules={"k"}) == {"k"}


def test_usual_targets():
    assert USUAL_IA3_TARGETS.keys() == USUAL_FEEDFORWARD.keys()
    assert USUAL_IA3_TARGETS["llama"] == ("k_proj", "v_proj", "down_proj")
    assert USUAL_IA3_TARGETS["t5"] == ("k", "v", "wo") and USUAL_FEEDFORWARD["t5"] == ("wo",)
    assert USUAL_IA3_TARGETS["mt5"] == ("k", "v", "wi_1") and USUAL_FEEDFORWARD["mt5"] == ()
    assert USUAL_IA3_TARGETS["gpt2"] == ("c_attn", "mlp.c_proj")
    assert all(set(names) <= set(USUAL_IA3_TARGETS[kind]) for kind, names in USUAL_FEEDFORWARD.items())


def test_saved_and_loaded(make, ids, tmp_path):
    model = make("gpt2")
    effkit.apply(model, IA3Config())
    expected = logits(disturb(model), ids)
    effkit.save(model, tmp_path)
    assert torch.equal(logits(effkit.load(tmp_path), ids), expected)


def test_refusals(make):
    with pytest.raises(
        ValueError, match="feedforward_modules is None and there is no usual choice for model type None"
    ):
        effkit.apply(nn.Sequential(nn.Linear(2, 2)), IA3Config(target_modules=("0",)))
    with pytest.raises(ValueError, match=r"feedforward_modules has \['wo'\], which target_modules \('k',\) has not"):
        IA3Config(target_modules=("k",), feedforward_modules=("wo",))
    with pytest.raises(ValueError, match="IA3Config: bias is 'all', choices: 'none'"):
        IA3Config(bias="all")
    with pytest.raises(TypeError, match="feedforward_modules is 3"):
        IA3Config(feedforward_modules=3)
    with pytest.raises(TypeError, match="is Embedding, expected"):
        effkit.apply(make("llama"), IA3Config(target_modules=("embed_tokens",)))
