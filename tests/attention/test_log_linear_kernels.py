"""What the kernels of log-linear attention do beyond the equality that the ledger's cases check."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.attention import LogLinearState, log_linear_attention, log_linear_gated_delta_rule
from effkit.attention._fenwick import past_blocks
from effkit.ops import INTERPRET, get_op
from effkit.testing import assert_equivalent

pytestmark = pytest.mark.interpreter
if not INTERPRET:
    pytest.skip("kernels on a CPU need TRITON_INTERPRET=1", allow_module_level=True)

kernels = partial(log_linear_attention, backend="triton", chunk_size=16)
reference = partial(log_linear_attention, backend="reference")


def inputs(B: int, H: int, T: int, L: int, D: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in "qkv")
    g, level_scales = -torch.rand(B, H, T, generator=generator), torch.rand(B, H, T, L, generator=generator)
    return dict(q=q, k=k, v=v, g=g, level_scales=level_scales)


def memory_at(positions: tuple[int, ...], L: int, D: int = 16) -> Tensor:
    """A memory [B, 1, L, D, D] for rows that have read so many tokens: blocks where these have some, else zeros."""
    memory = torch.randn(len(positions), 1, L, D, D, generator=torch.Generator().manual_seed(L))
    for row, position in zip(memory, positions, strict=True):
        row[:, [level for level in range(L) if level not in past_blocks(position - 1)]] = 0
    return memory


@pytest.mark.parametrize("T", [1, 5, 40])
def test_rows_far_along(T: int) -> None:
    """Few chunks join blocks of many levels when they pass a large power of two; decoding takes no chunks."""
    positions = (0, 16, 1023, 3 * 2**20 - 20)
    tensors = inputs(len(positions), 1, T, L=23) | dict(memory=memory_at(positions, L=23))

    def go_on(call: Any, memory: Tensor, **tensors: Tensor) -> Any:
        return call(**tensors, initial_state=LogLinearState(memory, torch.tensor(positions)), return_state=True)

    assert_equivalent(
        partial(go_on, kernels), partial(go_on, reference), tensors, grads=("q", "k", "v", "g", "level_scales")
    )


@pytest.mark.parametrize("position", [5, 16, 30, 48])
def test_gradient_of_the_state_before(position: int) -> None:
    """Of the blocks that there are: of the empty ones it has no meaning."""
    tensors = inputs(1, 1, 21, L=8) | dict(memory=memory_at((position,), L=8))
    used = sorted(past_blocks(position - 1))

    def go_on(call: Any, memory: Tensor, **tensors: Tensor) -> Any:
        blocks = torch.zeros_like(memory).index_copy(2, torch.tensor(used), memory[:, :, used])
        return call(**tensors, initial_state=LogLinearState(blocks, torch.tensor([position])), return_state=True)

    assert_equivalent(partial(go_on, kernels), partial(go_on, reference), tensors)


@pytest.mark.parametrize("at", [1, 15, 16, 17, 31])
def test_gradients_through_a_cut(at: int) -> None:
    def cut(**tensors: Tensor) -> Any:
        first, state = kernels(**{name: x[:, :, :at] for name, x in tensors.items()}, return_state=True)
        rest = {name: x[:, :, at:] for name, x in tensors.items()}
        rest_o, state = kernels(**rest, initial_state=state, return_state=True)
        return torch.cat((first, rest_o), 2), state

    assert_equivalent(cut, partial(reference, return_state=True), inputs(1, 1, 32, L=6))


def test_a_gradient_of_the_state_alone() -> None:
    """What follows a prefix sends its gradient through the state, with no cotangent for the outputs."""

    def memory(call: Any, **tensors: Tensor) -> Tensor:
        return call(**tensors, return_state=True)[1].memory

    assert_equivalent(partial(memory, kernels), partial(memory, reference), inputs(1, 2, 40, L=7))


@pytest.mark.parametrize("T", [1, 20])
def test_nothing_looks_right_past_the_last_level(T: int) -> None:
    """On a device nobody reads the position on the host before the kernels run."""
    tensors = inputs(2, 1, T, L=6)
    state = LogLinearState(torch.zeros(2, 1, 6, 16, 16), torch.tensor([12, 31]))
    o, _ = get_op("log_linear_attention").implementation("triton")(
        **tensors, initial_state=state, scale=1.0, chunk_size=16
    )
    beyond = state.position[:, None] + torch.arange(T) >= 32
    assert torch.equal(o.isnan().all(-1)[:, 0], beyond) and torch.equal(o.isnan().any(-1)[:, 0], beyond)


def test_function_transforms() -> None:
    """vmap over examples equals a batch; per-example gradients are those of each example alone."""
    one = lambda *x: kernels(*(y[None] for y in x))[0]  # noqa: E731
    each = tuple(inputs(2, 1, 20, L=6).values())
    assert torch.equal(torch.func.vmap(one)(*each), kernels(*each))
    loss = lambda *x: one(*x).square().sum()  # noqa: E731
    mapped = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(5))))(*each)
    leaves = [x.clone().requires_grad_() for x in each]
    expected = torch.autograd.grad(kernels(*leaves).square().sum(), leaves)
    for found, wanted in zip(mapped, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_a_step_of_the_delta_rule(qk_l2norm: bool) -> None:
    positions = (0, 16, 1023, 3 * 2**20 - 20)
    tensors = inputs(len(positions), 1, 1, L=23) | dict(memory=memory_at(positions, L=23))
    tensors |= dict(k=torch.nn.functional.normalize(tensors["k"], dim=-1), beta=tensors["g"].exp())

    def step(backend: str, memory: Tensor, **tensors: Tensor) -> Any:
        return log_linear_gated_delta_rule(
            **tensors,
            initial_state=LogLinearState(memory, torch.tensor(positions)),
            return_state=True,
            qk_l2norm=qk_l2norm,
            backend=backend,
        )

    assert_equivalent(partial(step, "triton"), partial(step, "reference"), tensors, grads=False)


def test_second_derivatives_of_the_delta_rule_are_refused() -> None:
    tensors = inputs(1, 1, 32, L=6)
    tensors |= dict(k=torch.nn.functional.normalize(tensors["k"], dim=-1), beta=tensors["g"].exp())
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    o = log_linear_gated_delta_rule(**leaves, chunk_size=16, backend="triton")
    grads = torch.autograd.grad(o.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(x.sum() for x in grads).backward()


def test_second_derivatives_are_refused() -> None:
    leaves = [x.requires_grad_() for x in inputs(1, 1, 5, L=4).values()]
    grads = torch.autograd.grad(kernels(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(x.sum() for x in grads).backward()


def test_the_same_tensor_twice() -> None:
    x = inputs(1, 1, 20, L=6)
    tied = lambda call: lambda q, g, level_scales: call(q, q, q, g, level_scales)  # noqa: E731
    assert_equivalent(tied(kernels), tied(reference), dict(q=x["q"], g=x["g"], level_scales=x["level_scales"]))
