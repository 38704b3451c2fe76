"""Several LoRA layers of one input in one pass: the same results and gradients, and who shares with whom."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import effkit
from effkit.peft import LoRAConfig, activate, disabled, lora_projections, set_scale
from effkit.peft.low_rank import lora_linear_reference
from effkit.testing import assert_equivalent

SHARED = "one pass for"


def inputs(dtype=torch.float32, widths=(33, 17, 8), ranks=(4, 0, 3), K=24):
    draw = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(2, 5, K, generator=draw, dtype=torch.float64)}
    for i, (M, R) in enumerate(zip(widths, ranks, strict=True)):
        for name, shape in dict(a=(R, K), b=(M, R), weight=(M, K), bias=(M,)).items():
            tensors[f"{name}{i}"] = torch.randn(shape, generator=draw, dtype=torch.float64)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def in_lists(tensors):
    count = len(tensors) // 4
    scale = [torch.tensor(s) for s in (2.0, 0.5, 1.25)][:count]
    a, b, weight, bias = ([tensors[f"{name}{i}"] for i in range(count)] for name in ("a", "b", "weight", "bias"))
    bias[-1] = None
    return a, b, scale, weight, bias


def together(**tensors):
    return lora_projections(tensors["x"], *in_lists(tensors))


def each(**tensors):
    return tuple(lora_linear_reference(tensors["x"], *layer) for layer in zip(*in_lists(tensors), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_layers_one_by_one(dtype):
    tensors = inputs(dtype)
    wanted = tuple(name for name in tensors if name not in ("bias2",))  # the last layer has none
    assert_equivalent(together, each, tensors, grads=wanted)


def test_float64_gradients():
    tensors = inputs(torch.float64, (5, 3), (2, 1), 4)
    names = [name for name in tensors if name != "bias1"]
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: together(**{**tensors, **dict(zip(names, values, strict=True))}), leaves
    )


def test_gradients_of_each_sample():
    tensors = inputs()
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("x", "a0")}

    def samples(call, x, a0):
        def loss(a0, x):
            return sum(y.square().sum() for y in call(x=x, a0=a0, **rest))

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(a0, x)

    given = (tensors["x"].double(), tensors["a0"].double())
    rest = {name: tensor.double() for name, tensor in rest.items()}
    assert_equivalent(lambda *x: samples(together, *x), lambda *x: samples(each, *x), given, grads=False)


def test_backward_under_autocast():
    """As without: the forward pass has chosen the dtypes."""
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    total, wanted = sum(y.square().sum() for y in together(**tensors)), (tensors["x"], tensors["a0"], tensors["b2"])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, wanted, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(total, wanted)))


def test_a_result_nobody_uses():
    tensors = inputs()
    assert_equivalent(
        lambda **given: together(**given)[0],
        lambda **given: each(**given)[0],
        tensors,
        grads=("x", "a0", "b0", "weight0"),
    )
    unused = [tensors[name].requires_grad_() for name in ("a2", "b2", "weight2")]
    assert all(g is None or not g.any() for g in torch.autograd.grad(
        together(**tensors)[0].sum(), unused, allow_unused=True))  # fmt: skip


def test_keeps_x_once_and_what_has_the_rank():
    tensors = inputs()
    for name in tensors:
        tensors[name].requires_grad_(name[0] in "xab" and name[:4] != "bias")
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        together(**tensors)
    own = sum(
        t.untyped_storage().nbytes() for n, t in tensors.items() if n[0] in "ab" and n[:4] != "bias" and t.numel()
    )
    own += sum(tensors[f"weight{i}"].nbytes for i in range(3)) + 3 * 4
    T, ranks = 10, 4 + 0 + 3
    assert sum(saved.values()) == own + tensors["x"].nbytes + 4 * T * ranks


def test_wrong_input():
    x, (a, b, scale, weight, bias) = inputs()["x"], in_lists(inputs())
    with pytest.raises(ValueError, match=r"'b': 2.*expected the same number of each"):
        lora_projections(x, a, b[:2], scale, weight, bias)


def reasons(call, *args):
    return [choice.reason for choice in effkit.explain(call, *args)]


def test_layers_of_a_model_share(make, ids):
    """q, k, v share a pass, gate and up another: results and gradients are those of separate layers, judged."""
    model = make("llama")
    targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj")
    effkit.apply(model, LoRAConfig(rank=3, target_modules=targets, init="random"))
    shared = [reason for reason in reasons(model, ids) if reason.startswith(SHARED)]
    assert len(shared) == 2 * 5 and shared.count(f"{SHARED} 3 layers with the same input") == 6
    factors = {name.replace(".", "_"): p for name, p in model.named_parameters() if p.requires_grad}
    names = {name.replace(".", "_"): name for name, p in model.named_parameters() if p.requires_grad}

    def call(backend):
        def run(**given):
            in_dtype = copy.deepcopy(model).to(next(iter(given.values())).dtype)
            with effkit.use_backend(backend):
                values = {names[name]: value for name, value in given.items()}
                return torch.func.functional_call(in_dtype, values, (ids,)).logits

        return run

    assert_equivalent(call("torch"), call("reference"), {name: p.detach() for name, p in factors.items()})
    assert not any(reason.startswith(SHARED) for reason in reasons(lambda: call("reference")(**factors)))


def test_who_does_not_share(make, ids):
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=2, dropout=0.5, init="random", target_modules=("q_proj", "v_proj")))
    assert len([r for r in reasons(model, ids) if r.startswith(SHARED)]) == 4
    assert not any(r.startswith(SHARED) for r in reasons(model.train(), ids))  # each drops for itself
    effkit.apply(model.eval(), LoRAConfig(rank=2, name="second", target_modules=("q_proj", "v_proj")))
    activate(model, "default", "second")
    assert not any(r.startswith(SHARED) for r in reasons(model, ids))
    with disabled(model):
        assert reasons(model, ids) == []
    effkit.apply(model, LoRAConfig(name="third", target_modules=("o_proj",)))
    assert not any(r.startswith(SHARED) for r in reasons(model, ids))


class Cross(nn.Module):
    """q of one input, k and v of another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, memory):
        return self.q_proj(x) + self.k_proj(memory) + self.v_proj(memory)


def test_siblings_that_are_not_called_together_part():
    model = Cross()
    effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
    x, memory = torch.randn(3, 8), torch.randn(3, 8)
    with effkit.use_backend("reference"):
        expected = model(x, memory)
    assert_equivalent(lambda x: model(x, memory), lambda x: expected.to(x.dtype), {"x": x}, grads=False)
    assert not model.q_proj.siblings.together and model.q_proj.siblings._held[2] == {}
    assert not any(r.startswith(SHARED) for r in reasons(model, x, memory))
    # Two siblings that are never called: given up after the second time.
    model = Cross()
    effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
    for together in (True, True, False):
        model.q_proj(torch.randn(3, 8))
        assert model.q_proj.siblings.together is together
    copied = copy.deepcopy(model)
    assert copied.k_proj.siblings.layers[1] is copied.k_proj


def test_an_input_changed_in_between():
    model = Cross()
    effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
    x = torch.randn(3, 8)
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1)
        after = model.k_proj(x)
        with effkit.use_backend("reference"):
            expected = model.k_proj(x)
    assert_equivalent(lambda x: after, lambda x: expected.to(x.dtype), {"x": x}, grads=False)


def test_layers_changed_in_between():
    """A sibling that is disabled, scaled or trained after the first one was called computes with what it is by then."""

    def stepped(model):
        with torch.no_grad():
            model.k_proj.adapters["default"].lora_B.add_(1)

    for change in (activate, lambda model: set_scale(model, 0.5), stepped):
        model = Cross()
        effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
        x = torch.randn(3, 8)
        model.q_proj(x)
        change(model)
        assert model.q_proj.siblings._held[0] is x  # there is something to hand out
        after = model.k_proj(x)
        with effkit.use_backend("reference"):
            expected = model.k_proj(x).detach()
        assert_equivalent(lambda x, y=after: y, lambda x, y=expected: y.to(x.dtype), {"x": x}, grads=False)
        assert model.q_proj.siblings.together


def test_a_copy_of_one_layer_computes_alone():
    """As torch.nn.DataParallel has them."""
    model = Cross()
    effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
    x, alone = torch.randn(3, 8), copy.copy(model.q_proj)
    assert_equivalent(lambda x: alone(x), lambda x: copy.deepcopy(alone).to(x.dtype)(x), {"x": x}, grads=False)
    assert model.q_proj.siblings._held[2] == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(make, ids, reentrant):
    model = make("llama").train()
    effkit.apply(model, LoRAConfig(rank=2, target_modules="all-linear", init="random"))
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, 32, requires_grad=True)
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    mlp(x).sum().backward()
    expected = [p.grad for p in parameters]
    mlp.zero_grad()
    checkpoint(mlp, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    assert mlp.gate_proj.siblings.together
