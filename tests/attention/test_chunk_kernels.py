"""What the chunk kernels do beyond the equality that the ledger's cases check."""

from functools import partial

import pytest
import torch
from torch import Tensor

from effkit.attention import ssd
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

pytestmark = pytest.mark.interpreter
if not INTERPRET:
    pytest.skip("kernels on a CPU need TRITON_INTERPRET=1", allow_module_level=True)

kernels = partial(ssd, backend="triton")
reference = partial(ssd, backend="reference")


def inputs(B: int, H: int, T: int, D: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    return dict(q=q, k=k, v=v, g=-torch.rand(B, H, T, generator=generator))


@pytest.mark.parametrize("T", [110, 128])
def test_chunks_in_segments_pass_the_memory_on(T: int) -> None:
    """One head: its chunks are shared out to several programs, the last of which may get fewer."""
    tensors = inputs(1, 1, T)
    tensors["initial_state"] = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    options = dict(chunk_size=16, return_state=True)
    assert_equivalent(partial(kernels, **options), partial(reference, **options), tensors)


@pytest.mark.parametrize("T", [15, 40])
def test_a_factor_of_zero_forgets_everything(T: int) -> None:
    tensors = inputs(1, 2, T)
    tensors["g"][:, :, 10] = -torch.inf
    assert_equivalent(kernels, reference, tensors)
    other = {**tensors, "v": torch.cat((tensors["v"][:, :, :10] + 1, tensors["v"][:, :, 10:]), 2)}
    assert torch.equal(kernels(**tensors)[:, :, 10:], kernels(**other)[:, :, 10:])


@pytest.mark.parametrize("T", [5, 40])
def test_function_transforms(T: int) -> None:
    """vmap over examples equals a batch; per-example gradients are those of each example alone."""
    tensors = inputs(3, 2, T)
    one = lambda *x: kernels(*(y[None] for y in x))[0]  # noqa: E731
    each = tuple(tensors.values())
    assert torch.equal(torch.func.vmap(one)(*each), kernels(*each))
    loss = lambda *x: one(*x).square().sum()  # noqa: E731
    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*each)
    leaves = [x.clone().requires_grad_() for x in each]
    expected = torch.autograd.grad(kernels(*leaves).square().sum(), leaves)
    for found, wanted in zip(mapped, expected, strict=True):
        assert torch.equal(found, wanted)


def test_second_derivatives_are_refused() -> None:
    leaves = {name: x.requires_grad_() for name, x in inputs(1, 1, 20).items()}
    grads = torch.autograd.grad(kernels(**leaves).square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(x.sum() for x in grads).backward()


def test_the_same_tensor_twice() -> None:
    x = inputs(1, 2, 33)
    tied = lambda q, g: kernels(q, q, q, g)  # noqa: E731
    assert_equivalent(tied, lambda q, g: reference(q, q, q, g), dict(q=x["q"], g=x["g"]))


@pytest.mark.parametrize("T", [7, 33])
def test_a_gradient_of_the_state_alone(T: int) -> None:
    """What follows a prefix sends its gradient through the state, with no cotangent for the outputs."""

    def memory(call: partial[Tensor], **tensors: Tensor) -> Tensor:
        return call(**tensors, return_state=True)[1].memory

    assert_equivalent(partial(memory, kernels), partial(memory, reference), inputs(1, 2, T))
