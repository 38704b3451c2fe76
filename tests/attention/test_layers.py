"""The layers around the recurrent ops: the short convolution, Mamba2, MultiScaleRetention and LinearAttention."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention import ShortConvolution
from effkit.testing import assert_equivalent


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def convolution(kernel_size: int = 4, **changes: Any) -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(6, kernel_size, **changes)


def inputs(module: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    """Tensors and the module's parameters by name, for the judge: gradients of all of them are compared."""
    return {**tensors, **{name.replace(".", "/"): p.detach() for name, p in module.named_parameters()}}


def called(module: nn.Module, named: dict[str, Tensor], *names: str, **more: Any) -> Any:
    """module(x, **) with the parameters among `named`, in their dtype."""
    parameters = {name.replace("/", "."): x for name, x in named.items() if name not in ("x", *names)}
    given = {name: named[name] for name in names if name in named}
    return torch.func.functional_call(module, parameters, (named["x"],), {**given, **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel_size", "activation", "bias"), [(4, "silu", False), (3, None, True), (1, None, False)])
def test_convolution_equals_conv1d(kernel_size: int, activation: str | None, bias: bool, dtype: torch.dtype) -> None:
    module = convolution(kernel_size, activation=activation, bias=bias)

    def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.conv1d(F.pad(x.mT, (kernel_size - 1, 0)), weight, bias, groups=6).mT
        return y if activation is None else F.silu(y)

    named = {name: value.to(dtype) for name, value in inputs(module, x=draw(2, 9, 6)).items()}
    assert_equivalent(lambda **named: called(module, named)[0], expected, named)


@pytest.mark.parametrize("kernel_size", [1, 4])
@pytest.mark.parametrize("cuts", [(0,), (1,), (3,), (4,), (5,), (9,), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_convolution_continues_from_its_state(kernel_size: int, cuts: tuple[int, ...]) -> None:
    module = convolution(kernel_size)

    def in_parts(x: Tensor, state: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        for part in x.tensor_split(cuts, dim=1):
            y, state = called(module, dict(named, x=part, state=state), "state")
            outs.append(y)
        return torch.cat(outs, 1), state

    named = inputs(module, x=draw(2, 9, 6), state=draw(2, kernel_size - 1, 6, seed=1))
    assert_equivalent(in_parts, lambda **named: called(module, named, "state"), named)


@pytest.mark.parametrize("bounds", [(0, 1, 1, 6, 8), (0, 9), (0, 0), (0,)])
def test_packed_convolution_equals_separate_ones(bounds: tuple[int, ...]) -> None:
    module, sequences = convolution(bias=True), len(bounds) - 1

    def packed(**named: Tensor) -> tuple[Tensor, Tensor]:
        return called(module, named, "state", cu_seqlens=torch.tensor(bounds))

    def separate(x: Tensor, state: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        outs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            y, last = called(module, dict(named, x=x[:, begin:end], state=state[n : n + 1]), "state")
            outs.append(y)
            states.append(last)
        rest = torch.zeros_like(x[:, bounds[-1] :])
        return torch.cat((*outs, rest), 1), torch.cat((*states, state[:0]))

    assert_equivalent(packed, separate, inputs(module, x=draw(1, 9, 6), state=draw(sequences, 3, 6, seed=1)))


def test_nothing_behind_the_last_packed_token_matters_to_a_convolution() -> None:
    module, x, cu_seqlens = convolution(bias=True), draw(1, 9, 6), torch.tensor([0, 2, 6])
    results = []
    for rest in (torch.nan, torch.inf, 1.0):
        given = torch.cat((x[:, :6], torch.full((1, 3, 6), rest)), dim=1).requires_grad_()
        y, state = module(given, cu_seqlens=cu_seqlens)
        results.append(
            (y, state, *torch.autograd.grad([y.sum() + state.square().sum()], [given, *module.parameters()]))
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert not results[0][0][:, 6:].any() and not results[0][2][:, 6:].any()


def test_convolution_starts_as_conv1d_and_takes_its_weights() -> None:
    module, conv = convolution(bias=True), nn.Conv1d(6, 6, 4, groups=6)
    conv.load_state_dict(module.state_dict(), strict=True)
    assert module.weight.abs().max() <= 0.5 and module.weight.std() > 0.2
    assert ShortConvolution(6, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_convolution_refuses_what_does_not_fit() -> None:
    module, x = convolution(), draw(2, 9, 6)
    for bad in (dict(channels=0), dict(kernel_size=0), dict(activation="relu")):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            ShortConvolution(**{**dict(channels=6), **bad})
    for given, message in (
        (dict(x=x[..., :5]), r"weight has shape \[6, 1, 4\]"),
        (dict(x=x, state=draw(2, 4, 6)), r"state has shape \[2, 4, 6\], expected \[2, 3, 6\]"),
        (dict(x=x, state=draw(1, 3, 6)), r"state has shape \[1, 3, 6\], expected \[2, 3, 6\]"),
        (dict(x=x, cu_seqlens=torch.tensor([0, 9])), "packed sequences need B=1"),
        (dict(x=x[:1], cu_seqlens=torch.tensor([0, 12])), r"cu_seqlens is \[0, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**given)
