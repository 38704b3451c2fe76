"""SingLoRA: the change is A A^T, grows with the optimizer's steps and with nothing else, and is LoRA when exported."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import effkit
from effkit.peft import (
    SingLoRA,
    SingLoRAConfig,
    activate,
    adapters_of,
    advance_ramp,
    disabled,
    lora_linear,
    merge,
    set_scale,
    singlora_linear,
    unmerge,
)
from effkit.peft.engine import adapted_layers
from effkit.quant import NF4Config
from effkit.testing import assert_equivalent

ALL = dict(target_modules="all-linear", rank=3)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def stack(ramp_steps=10, **fields):
    """Layers of three shapes with SingLoRA: square, wide out, wide in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    effkit.apply(model, SingLoRAConfig(ramp_steps=ramp_steps, target_modules="0|2|4", **{"rank": 3, **fields}))
    return model


def steps(model, name="default"):
    """The step of the ramp, the same in all layers."""
    (found,) = {int(part.steps) for part in adapters_of(model, name).values()}
    return found


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, optimizer, rounds=1, passes=1, wrap=lambda model, x: model(x)):
    """Rounds of training with gradients of several passes each."""
    generator = torch.Generator().manual_seed(3)
    for _round in range(rounds):
        for _pass in range(passes):
            wrap(model, torch.randn(5, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class TestOp:
    @pytest.mark.parametrize(("K", "M"), [(12, 12), (12, 20), (20, 12)])
    def test_is_a_block_of_the_product(self, K, M):
        """Against the dense layer with W + s (A A^T)[:M, :K], the paper's two cases in one."""
        g = torch.Generator().manual_seed(0)
        inputs = dict(x=(2, 7, K), factor=(max(K, M), 3), weight=(M, K), bias=(M,))
        tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in inputs.items()}
        scale = torch.tensor(0.75)

        def adapted(x, factor, weight, bias):
            return singlora_linear(x, factor, scale, weight, bias)

        def dense(x, factor, weight, bias):
            return nn.functional.linear(x, weight + scale * (factor @ factor.T)[:M, :K], bias)

        assert_equivalent(adapted, dense, tensors)

    def test_keeps_what_lora_keeps(self):
        """Bytes for the backward pass: x and the inner product, of which the parameter is no part."""
        x, weight = torch.randn(9, 24), torch.randn(20, 24)
        factor = torch.randn(24, 3, requires_grad=True)
        kept, known = {}, {tensor.untyped_storage().data_ptr() for tensor in (factor, weight)}

        def pack(tensor):
            if tensor.ndim and tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            singlora_linear(x.requires_grad_(), factor, torch.tensor(0.5), weight)
        assert sum(kept.values()) == x.nbytes + 9 * 3 * 4

    def test_scale_zero_is_the_bare_layer(self):
        x, weight, factor = torch.randn(9, 24), torch.randn(20, 24), torch.randn(24, 3)
        assert torch.equal(singlora_linear(x, factor, torch.zeros(()), weight), nn.functional.linear(x, weight))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                dict(factor=torch.zeros(20, 3)),
                ValueError,
                r"factor has shape \[20, 3\], expected \[24, R\]",
            ),
            (dict(scale=torch.zeros((), requires_grad=True)), ValueError, "scale asks for a gradient"),
            (dict(base=torch.zeros(9, 20)), ValueError, "weight and base are both given"),
            (dict(factor=torch.zeros(24)), ValueError, r"factor has shape \[24\], expected \[P, R\]"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        tensors = dict(
            x=torch.zeros(9, 24), factor=torch.zeros(24, 3), scale=torch.ones(()), weight=torch.zeros(20, 24)
        )
        with pytest.raises(error, match=message):
            singlora_linear(**{**tensors, **change})


class TestRamp:
    def test_counts_optimizer_steps(self):
        """t = steps while evaluating, steps + 1 while training: u grows by 1 / T a step up to 1."""
        model = stack(ramp_steps=4, alpha=6)
        optimizer, part = torch.optim.AdamW(trained(model)), model[0].adapters["default"]
        for done, (evaluated, training) in enumerate([(0, 0.5), (0.5, 1), (1, 1.5), (1.5, 2), (2, 2), (2, 2)]):
            assert steps(model) == done
            assert float(part.eval().gain()) == evaluated and float(part.train().gain()) == training
            train(model, optimizer)

    def test_starts_as_the_model_was_and_learns_at_once(self, make, ids):
        """u(0) = 0 is the base bit for bit in eval mode; the very first step has a gradient."""
        model = make("llama")
        before = logits(model, ids)
        effkit.apply(model, SingLoRAConfig(**ALL))
        assert torch.equal(logits(model, ids), before)
        model.train()(ids, labels=ids).loss.backward()
        assert all(parameter.grad.any() for parameter in trained(model))

    def test_not_by_passes(self):
        """Gradient accumulation and activation checkpointing give the same ramp and the same parameters."""
        found = []
        for wrap in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
            model = stack()
            train(model, torch.optim.SGD(trained(model), 0.1), rounds=3, passes=4, wrap=wrap)
            assert steps(model) == 3
            found.append(model.state_dict())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_accumulated_equals_one_batch(self):
        """Four passes of a quarter are one pass of all: the ramp does not tell them apart."""
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

        def after(pieces):
            def run(x):
                model = stack().to(x.dtype)
                optimizer = torch.optim.SGD(trained(model), 0.5)
                for _ in range(3):
                    for piece in x.chunk(pieces):
                        (model(piece).square().sum() / x.numel()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                assert steps(model) == 3
                return [parameter.detach() for parameter in trained(model)]

            return run

        assert_equivalent(after(4), after(1), (x,), grads=False)

    def test_only_of_optimizers_that_hold_it(self):
        model, other = stack(), nn.Linear(3, 3)
        bystander = torch.optim.SGD(other.parameters(), 0.1)
        bystander.step()
        assert steps(model) == 0
        both = torch.optim.SGD([{"params": other.parameters()}, {"params": trained(model)}], 0.1)
        both.step()
        assert steps(model) == 1
        for part in adapters_of(model, "default").values():  # as sharding does
            part.singlora_A = nn.Parameter(part.singlora_A.detach().clone())
        both.step()
        assert steps(model) == 1
        torch.optim.SGD(trained(model), 0.1).step()
        assert steps(model) == 2

    def test_of_any_optimizer_that_calls_another(self):
        """Two torch optimizers inside each other are one step."""

        class Outer(torch.optim.Optimizer):
            def __init__(self, inner):
                super().__init__(inner.param_groups, {})
                self.inner = inner

            def step(self, closure=None):
                return self.inner.step(closure)

        model = stack()
        outer = Outer(torch.optim.SGD(trained(model), 0.1))
        train(model, outer, rounds=3)
        assert steps(model) == 3
        train(model, outer.inner, rounds=2)
        assert steps(model) == 5

    def test_a_step_that_fails_does_not_count(self):
        model = stack()
        optimizer = torch.optim.SGD(trained(model), 0.1)

        def closure():
            raise KeyError("no batch")

        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert steps(model) == 0
        train(model, optimizer)
        assert steps(model) == 1

    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_a_grad_scaler_leaves_out(self, fused):
        """A fused optimizer is called all the same and leaves the step out by itself."""
        model = stack()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(trained(model), 0.1, fused=fused)
        for factor, expected in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
            before = [parameter.detach().clone() for parameter in trained(model)]
            scaler.scale(model(torch.ones(2, 12)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            changed = any(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
            assert steps(model) == expected and changed == (factor == 1)

    def test_by_hand(self):
        """For loops that update parameters themselves."""
        model = stack()
        for _ in range(2):
            model(torch.randn(3, 12)).sum().backward()
            with torch.no_grad():
                for parameter in trained(model):
                    parameter -= 0.1 * parameter.grad
            advance_ramp(model)
        advance_ramp(model, 5)
        assert steps(model) == 7
        with pytest.raises(ValueError, match="steps is 0, expected an integer of at least 1"):
            advance_ramp(model, 0)
        with pytest.raises(ValueError, match="there is no SingLoRA in the model, Linear"):
            advance_ramp(nn.Linear(2, 2))

    def test_of_the_adapter_that_is_on(self):
        """What is off and what is frozen stands still."""
        model = stack()
        effkit.apply(model, SingLoRAConfig(rank=2, name="second", target_modules="0|2"))
        everything = [p for p in model.parameters() if p.ndim == 2]
        for parameter in everything:
            parameter.requires_grad_()
        optimizer = torch.optim.SGD(everything, 0.1)
        train(model, optimizer)
        assert (steps(model), steps(model, "second")) == (0, 1)
        activate(model, "default", "second")
        train(model, optimizer)
        advance_ramp(model)
        assert (steps(model), steps(model, "second")) == (2, 3)
        for part in adapters_of(model, "second").values():
            part.singlora_A.requires_grad_(False)
        train(model, optimizer)
        assert (steps(model), steps(model, "second")) == (3, 3)

    def test_of_copies(self):
        """Copies and what comes out of a pickle count for themselves, and nothing keeps them alive."""
        model = stack()
        train(model, torch.optim.SGD(trained(model), 0.1), rounds=2)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            train(other, torch.optim.SGD(trained(other), 0.1))
            assert (steps(model), steps(other)) == (2, 3)
        from effkit.peft.singlora import _RAMPS

        gc.collect()
        before = len(_RAMPS.adapters)
        del other, model
        gc.collect()
        assert len(_RAMPS.adapters) == before - 6

    def test_is_saved(self, make, ids, tmp_path):
        """In state dicts and by effkit.save; a resumed run goes on where it was."""
        model = make("llama")
        effkit.apply(model, SingLoRAConfig(ramp_steps=20, **ALL))
        advance_ramp(model, 7)
        expected = logits(model, ids)
        effkit.save(model, tmp_path)
        loaded = effkit.load(tmp_path)
        assert steps(loaded) == 7 and torch.equal(logits(loaded, ids), expected)
        other = make("llama")
        effkit.apply(other, SingLoRAConfig(ramp_steps=20, seed=1, **ALL))
        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        stream.seek(0)
        other.load_state_dict(torch.load(stream))
        assert steps(other) == 7 and torch.equal(logits(other, ids), expected)

    def test_is_an_integer_on_every_path(self):
        """2^24 steps and more are exact, also of a model in half precision."""
        model = stack(ramp_steps=2**26).to(torch.bfloat16)
        advance_ramp(model, 2**25)
        part = model[0].adapters["default"].eval()
        assert part.steps.dtype == torch.int64 and part.gain().dtype == torch.float32 and float(part.gain()) == 0.5


def test_trained_values(make):
    """R max(K, M) a layer: half of LoRA on square layers."""
    model = make("llama")
    change = effkit.apply(model, SingLoRAConfig(**ALL))
    layers = adapted_layers(model).values()
    assert sum(p.numel() for p in trained(model)) == sum(3 * max(x.in_features, x.out_features) for x in layers)
    square = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert square.singlora_A.numel() == 3 * (32 + 32) // 2
    change.undo()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_switched_off_and_merged(make, ids, kind):
    model = make(kind).double()
    before = logits(model, ids)
    effkit.apply(model, SingLoRAConfig(alpha=-6, **ALL))
    advance_ramp(model, 1000)
    after = logits(model, ids)
    assert not torch.equal(after, before)
    with disabled(model):
        assert torch.equal(logits(model, ids), before)
    set_scale(model, 0.0)
    assert torch.equal(logits(model, ids), before)
    set_scale(model, 1.0)
    merge(model)
    path = "model.layers.1.mlp.up_proj" if kind == "llama" else "transformer.h.1.mlp.c_proj"
    merged = copy.deepcopy(model.get_submodule(path))
    unmerge(model)
    layer = model.get_submodule(path)
    x = torch.randn(3, 32 if kind == "llama" else 128, dtype=torch.float64)
    assert_equivalent(lambda x: in_dtype(layer, x), lambda x: in_dtype(merged, x), (x,))
    assert torch.equal(logits(model, ids), after)


def in_dtype(layer, x):
    """The layer in the dtype of x."""
    return copy.deepcopy(layer).to(x.dtype)(x)


def test_exported_as_lora():
    """factors() are what lora_linear takes, u(t) in the scale."""
    model = stack(alpha=5).double().eval()
    advance_ramp(model, 4)
    for place in (0, 2, 4):
        layer = model[place]
        a, b, scale = (part.detach() for part in layer.adapters["default"].factors())
        assert a.shape == (3, layer.in_features) and b.shape == (layer.out_features, 3)
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

        def as_lora(x, layer=layer, a=a, b=b, scale=scale):
            weight, bias = layer.weight.detach().to(x.dtype), layer.bias.detach().to(x.dtype)
            return lora_linear(x, a.to(x.dtype), b.to(x.dtype), scale, weight, bias)

        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        assert_equivalent(lambda x, layer=layer: in_dtype(layer, x), as_lora, (x,))


def test_beside_four_bits(make):
    """The quantised weight stays; the parameter is in float32, the product in bfloat16."""
    model = make("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    effkit.apply(model, NF4Config(block_size=32), SingLoRAConfig(**ALL))
    advance_ramp(model, 1000)
    layer = model.model.layers[1].mlp.down_proj
    factor, weight = layer.adapters["default"].singlora_A.detach(), layer.dequantize().weight.detach()
    assert factor.dtype == torch.float32

    def reference(x):
        change = factor[:64].to(x.dtype) @ factor.T.to(x.dtype)
        return nn.functional.linear(x, weight.to(x.dtype)) + nn.functional.linear(x, change)

    assert_equivalent(layer, reference, (torch.randn(3, 128, dtype=torch.bfloat16),))


def change_of(model):
    """The change of a square layer's weight."""
    a, b, scale = model[0].adapters["default"].factors()
    return (scale * (b @ a)).detach()


def test_square_changes_are_positive_semi_definite():
    """The limit of the method: symmetric, and no eigenvalue of the other sign than alpha's."""
    for alpha in (6, -6):
        model = stack(ramp_steps=1, alpha=alpha).double()
        train(model.float(), torch.optim.AdamW(trained(model), 0.05), rounds=20)
        change = change_of(model.double())
        assert torch.equal(change, change.T)
        values = torch.linalg.eigvalsh(change * alpha)
        # Nine of twelve are zero but for rounding, which the three others dwarf.
        assert (values[-3:] > 0).all() and values[:9].abs().max() * 1e6 < values[-3]


def trained_change(optimizer):
    """fn(data, turn): the change after ten steps from A turn, for any orthogonal turn of the inner features."""

    def run(data, turn):
        model = stack().to(data.dtype)
        with torch.no_grad():
            factor = model[0].adapters["default"].singlora_A
            factor.copy_(factor @ turn)
        steps = optimizer([model[0].adapters["default"].singlora_A])
        for _ in range(10):
            model(data).square().mean().backward()
            steps.step()
            steps.zero_grad()
        return change_of(model)

    return run


def invariance(optimizer):
    g = torch.Generator().manual_seed(4)
    data = torch.randn(6, 12, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64)).Q
    run = trained_change(optimizer)

    def still(data, turn):
        return run(data, torch.eye(3, dtype=turn.dtype))

    assert_equivalent(run, still, (data, turn), grads=False)


def test_training_does_not_depend_on_a_turn_of_the_factor():
    """A and A Q make the same change at the start, and under SGD, with momentum too, ever after."""
    invariance(lambda parameters: torch.optim.SGD(parameters, 0.5))
    invariance(lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9))


def test_but_under_adam_it_does():
    """Steps scaled value by value do not turn with the factor."""
    with pytest.raises(AssertionError, match="WRONG"):
        invariance(lambda parameters: torch.optim.AdamW(parameters, 0.05))


def test_start_values():
    """Uniform within 1 / sqrt(longer side), each layer its own, the same from the same seed; restarted at step 0."""
    model, again, other = stack(), stack(), stack(seed=1)
    for place in (0, 2, 4):
        mine, same, different = (m[place].adapters["default"].singlora_A for m in (model, again, other))
        assert torch.equal(mine, same) and not torch.equal(mine, different)
        assert mine.abs().max() <= len(mine) ** -0.5 and mine.abs().max() > 0.8 * len(mine) ** -0.5
    assert not torch.equal(model[2].adapters["default"].singlora_A, model[4].adapters["default"].singlora_A)
    advance_ramp(model)
    model[0].adapters["default"].reset_parameters()
    assert int(model[0].adapters["default"].steps) == 0


def test_compiled_without_breaks_or_recompilation():
    """As the ramp grows, and as the adapter is turned off and on."""
    model = stack().train()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 12)
    for names in (["default"], [], ["default"]):
        activate(model, *names)
        assert_equivalent(compiled, lambda x: in_dtype(model, x), (x,), grads=False)
        for part in adapters_of(model, "default").values():
            part.steps += 4
    assert counter.frame_count == 1


def test_dropout_is_for_training():
    model = stack(dropout=0.5)
    advance_ramp(model, 10)
    x = torch.randn(5, 12)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(rank=0), ValueError, "SingLoRAConfig: rank is 0, expected an integer of at least 1"),
        (dict(ramp_steps=0), ValueError, "ramp_steps is 0"),
        (dict(alpha="2"), TypeError, "alpha is '2', expected a number or None"),
        (dict(dropout=-0.1), ValueError, "dropout is -0.1, expected 0 <= dropout < 1"),
    ],
)
def test_wrong_configs(fields, error, message):
    with pytest.raises(error, match=message):
        SingLoRAConfig(**fields)


def test_embeddings_are_refused(make):
    with pytest.raises(TypeError, match=r"model.embed_tokens is Embedding, expected nn.Linear"):
        effkit.apply(make("llama"), SingLoRAConfig(target_modules=("embed_tokens",)))
    assert SingLoRA(4, 3, rank=2).extra_repr() == "4, 3, rank=2, scale=1, ramp_steps=1000, dropout=0"
