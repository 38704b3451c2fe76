"""Adapters under what trains models: compilers, accumulation, checkpointing, autocast, copies."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import effkit
from effkit.change import ChangeConfig
from effkit.peft import (
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    SingLoRAConfig,
    VeRAConfig,
    activate,
    disabled,
    set_scale,
    set_trainable,
)
from effkit.quant import NF4Config
from effkit.testing import assert_equivalent

CONFIGS = [
    LoRAConfig(rank=3, alpha=6, target_modules="all-linear"),
    LoRAConfig(rank=3, target_modules="all-linear", dropout=0.25, update_bias=True, bias="lora_only"),
    LoRAConfig(rank=3, target_modules="all-linear", train_a=False),
    SingLoRAConfig(rank=3, target_modules="all-linear", ramp_steps=4, alpha=30),
    VeRAConfig(rank=5, target_modules="all-linear", d_initial=1.0),
    DoRAConfig(rank=3, target_modules="all-linear"),
    IA3Config(target_modules="all-linear", feedforward_modules=("down_proj", "2")),
]
NAMES = ["lora", "lora, dropout, biases", "lora-fa", "singlora", "vera", "dora", "ia3"]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def adapted(model: nn.Module, *configs: ChangeConfig) -> nn.Module:
    """The model in training mode with adapters whose values are all other than what they start from."""
    for config in configs:
        effkit.apply(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Of token ids for a language model, of features for any other."""
    if batch.is_floating_point():
        return model(batch.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))).square().mean()
    return model(batch, labels=batch).loss


def a_pass(model: nn.Module, batch: Tensor, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    """The loss and the gradients of all that is trained; random numbers are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        loss = loss_of(model, batch)
        between()
        if loss.requires_grad:  # eager code does not call adapters that are off
            loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model)]
    model.zero_grad()
    return [loss.detach(), *gradients]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_outcome(
    got: list[Tensor],
    model: nn.Module,
    outcome: Callable[[nn.Module], list[Tensor]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Judges what was computed in this dtype against the equations on a copy of the model."""

    def reference(like: Tensor) -> list[Tensor]:
        with effkit.use_backend("reference"):
            expected = outcome(copy.deepcopy(model).to(like.dtype))
        exact = like.dtype == torch.float64
        return expected if exact else [part.to(own.dtype) for part, own in zip(expected, got, strict=True)]

    assert_equivalent(lambda like: got, reference, (torch.zeros((), dtype=dtype),), grads=False)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@contextmanager
def no_second_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@each_config
def test_one_compilation_for_all_switches(config):
    """One graph computes as eager code does, through switches, scales, steps of an optimizer and of a ramp."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    model = adapted(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with no_second_compilation():
        for change in (
            lambda: None,
            lambda: set_scale(model, 0.5),
            lambda: activate(model),
            lambda: activate(model, "default"),
            lambda: take_step(optimizer),
            lambda: take_step(optimizer),
        ):
            change()
            assert_outcome(a_pass(compiled, x), model, functools.partial(a_pass, batch=x))
        with disabled(model):
            assert_outcome(a_pass(compiled, x), model, functools.partial(a_pass, batch=x))
        assert_outcome(a_pass(compiled, x), model, functools.partial(a_pass, batch=x))


def test_one_compilation_for_several_adapters(make, ids):
    """Which of three adapters of different kinds are on, one or two or none, does not matter to a graph."""
    configs = [replace(CONFIGS[i], name=NAMES[i], target_modules=("q_proj", "down_proj")) for i in (0, 3, 4)]
    model = adapted(make("llama", num_hidden_layers=1, use_cache=False), *configs)
    set_trainable(model, "lora", "singlora", "vera")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with no_second_compilation():
        for names in (["vera"], ["lora"], ["singlora", "lora"], [], ["vera", "singlora", "lora"]):
            activate(model, *names)
            assert_outcome(a_pass(compiled, ids), model, functools.partial(a_pass, batch=ids))


@pytest.mark.slow
def test_compiled_by_inductor():
    """Forward and backward beside a layer in four bits are those of eager code."""
    model = nn.Sequential(nn.Linear(64, 40))
    model = adapted(model, NF4Config(), LoRAConfig(rank=3, target_modules="all-linear"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(model, fullgraph=True)
    with no_second_compilation():
        for factor in (1.0, 0.5):
            set_scale(model, factor)
            assert_outcome(a_pass(compiled, x), model, functools.partial(a_pass, batch=x))


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """A step of some size in some direction."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.detach().sign()
    optimizer.step()
    optimizer.zero_grad()


@each_config
def test_accumulated_gradients_are_those_of_one_batch(make, config):
    """Steps on one batch of four rows, and on four batches of one: a ramp counts steps, not passes."""
    ids = torch.randint(1, 96, (4, 7), generator=torch.Generator().manual_seed(2))
    model = adapted(make("llama"), replace(config, dropout=0.0) if hasattr(config, "dropout") else config)

    def steps(model: nn.Module, parts: int) -> list[Tensor]:
        optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.5)
        losses = []
        for _ in range(3):
            for part in ids.chunk(parts):
                loss = model(part, labels=part).loss / parts
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return [torch.stack(losses).view(3, parts).sum(1), *(parameter.detach() for parameter in trained(model))]

    assert_outcome(steps(copy.deepcopy(model), 4), model, functools.partial(steps, parts=1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the pass without adapters
@pytest.mark.parametrize("reentrant", [False, True], ids=["recorded", "reentrant"])
@each_config
def test_checkpointing_changes_no_bit(make, ids, config, reentrant):
    """Activations are computed again, masks of dropout among them; a pass without adapters may come in between."""
    model = adapted(make("llama"), config)

    def reference_model() -> None:
        with disabled(model), torch.no_grad():
            model(ids)

    expected = a_pass(model, ids)
    assert_same(a_pass(model, ids, reference_model), expected)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(a_pass(model, ids, reference_model), expected)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("config", [CONFIGS[1], replace(CONFIGS[4], dropout=0.25)], ids=["lora", "vera"])
def test_compiled_and_checkpointed_with_dropout(config):
    """A graph that computes activations again draws the masks of eager code, both times."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    model = adapted(Checkpointed(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_outcome(a_pass(compiled, x), nn.Sequential(*model), functools.partial(a_pass, batch=x))


def test_reentrant_checkpointing_needs_an_input_that_asks_for_a_gradient():
    """torch warns, and there is no gradient: adapters cannot help it, inputs that ask for one do."""
    layer = adapted(nn.Sequential(nn.Linear(6, 5)), LoRAConfig(rank=2, target_modules=("0",)))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(layer(x).sum(), trained(layer))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not checkpoint(layer, x, use_reentrant=True).requires_grad
    assert_same(torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), trained(layer)), expected)
    checkpoint(layer, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert_same([parameter.grad for parameter in trained(layer)], expected)


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@each_config
def test_autocast_is_a_pass_of_half_precision(config, four_bits):
    """The same bits as for an input in half precision; parameters stay in float32, and so do their gradients."""
    model = adapted(nn.Sequential(nn.Linear(64, 40)), *[NF4Config()] * four_bits, config)
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(3))

    def outcome(x: Tensor, enabled: bool) -> list[Tensor]:
        with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled):
            torch.manual_seed(7)
            y = model(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained(model))]

    got = outcome(x, True)
    assert_same(got, outcome(x.bfloat16(), False))
    assert [part.dtype for part in got] == [torch.bfloat16] + [torch.float32] * len(trained(model))


@pytest.mark.parametrize(
    ("config", "kept"),
    [(CONFIGS[0], 64 + 3), (CONFIGS[1], 64 + 3), (CONFIGS[2], 3), (CONFIGS[3], 64 + 3), (CONFIGS[4], 5)],
    ids=NAMES[:5],
)
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
def test_autocast_keeps_half_the_bytes(config, kept, four_bits):
    """For the backward pass of a layer: x and A x in half precision, neither a copy in float32 nor a dense weight."""
    config = replace(config, bias="none", update_bias=False) if isinstance(config, LoRAConfig) else config
    model = adapted(nn.Sequential(nn.Linear(64, 40)), *[NF4Config()] * four_bits, config)
    x = torch.randn(11, 64, requires_grad=True)
    first: dict[int, Tensor] = {}
    second: dict[int, Tensor] = {}
    for found in (first, second):  # what the first keeps is there as the second begins: new is what only that has
        hooks = saved_tensors_hooks(functools.partial(note, found), lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert sum(tensor.untyped_storage().nbytes() for key, tensor in second.items() if key not in first) == 22 * kept


def note(found: dict[int, Tensor], tensor: Tensor) -> Tensor:
    """Enters a tensor that is kept for the backward pass, unless it is a number, under the place of its memory."""
    if tensor.ndim:
        found[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


@each_config
def test_a_copy_is_trained_alone(make, ids, config):
    model = adapted(make("llama"), config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    twin = copy.deepcopy(model)
    expected = a_pass(model, ids)
    assert_same(a_pass(twin, ids), expected)
    take_step(torch.optim.SGD(trained(twin), lr=0.1))
    assert_same([parameter.detach() for parameter in model.parameters()], before)
    with disabled(twin):
        assert_same(a_pass(model, ids), expected)


@each_config
def test_a_model_without_values_is_loaded(make, ids, config):
    """A skeleton on the meta device, as for sharded training: values come from a state dict, gates by themselves."""
    model = adapted(make("llama"), config)
    expected = a_pass(model, ids)
    with torch.device("meta"):
        skeleton = make("llama").train()
    effkit.apply(skeleton, config)
    positions = copy.deepcopy(model.model.rotary_emb)  # no state dict holds them
    skeleton.to_empty(device="cpu").load_state_dict(model.state_dict())
    skeleton.model.rotary_emb = positions
    assert_same(a_pass(skeleton, ids), expected)
