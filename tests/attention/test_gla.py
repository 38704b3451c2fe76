"""What gated linear attention promises beyond equality with its reference, and its layer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import effkit
from effkit.attention import GatedLinearAttention, gated_linear_attention, linear_attention, ssd
from effkit.attention.gla import halve
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def tensors(T: int = 70, H: int = 2, K: int = 16, gain: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, H, T, width, generator=generator) for width in (K, K, 24, K))
    return dict(q=q, k=k, v=v, g=-gain * g.abs())


def op(backend: str, **options: Any) -> Any:
    return lambda **inputs: gated_linear_attention(**inputs, backend=backend, **options)


@backends
@pytest.mark.parametrize("gain", [0.0, 1.0, 10.0])
def test_weights_are_sums_over_channels(backend: str, gain: float) -> None:
    """The masked form, all pairs at once: each channel of a product decays by its own gates in between."""

    def pairs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        later = torch.ones(70, 70, dtype=torch.bool).tril()
        between = torch.stack(
            [(later[:, j, None] * g * (torch.arange(70) > j)[:, None]).cumsum(2) for j in range(70)], 3
        )
        weights = torch.einsum("bhik,bhjk,bhijk->bhij", q, k, between.exp()) * later
        return weights @ v / 4

    assert_equivalent(op(backend), pairs, tensors(gain=gain))


@backends
def test_one_gate_for_all_channels_is_ssd(backend: str) -> None:
    inputs = tensors(gain=0.3)
    inputs["g"] = inputs["g"][..., 0]

    def spread(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return gated_linear_attention(q, k, v, g[..., None].expand_as(k), scale=0.5, backend=backend)

    assert_equivalent(spread, lambda **x: ssd(**x, scale=0.5, backend="reference"), inputs)


@backends
def test_without_decay_it_is_unnormalised_linear_attention(backend: str) -> None:
    def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map="identity", normalize=False, scale=0.25, backend="reference")

    assert_equivalent(op(backend), linear, tensors(gain=0.0), grads=("q", "k", "v"))


@backends
def test_channels_are_memories_of_their_own(backend: str) -> None:
    """The sum over the channels of attention with one channel each, with gates as different as can be."""
    inputs = tensors(K=16)
    inputs["g"] *= torch.logspace(-3, 1.3, 16)

    def apart(**inputs: Tensor) -> Tensor:
        one = lambda d: {name: x if name == "v" else x[..., d : d + 1] for name, x in inputs.items()}  # noqa: E731
        return sum(gated_linear_attention(**one(d), scale=0.25, backend="reference") for d in range(16))

    assert_equivalent(op(backend), apart, inputs)


@backends
@pytest.mark.parametrize("at", [1, 15, 16, 40, 64])
def test_a_closed_gate_starts_anew(backend: str, at: int) -> None:
    """A gate of -inf at t forgets all before t, in values and gradients, and leaves what follows as precise as ever."""
    inputs = tensors(gain=0.1)
    inputs["g"][:, :, at] = -math.inf

    def two_sequences(**inputs: Tensor) -> Tensor:
        halves = ({name: x[:, :, part] for name, x in inputs.items()} for part in (slice(0, at), slice(at, None)))
        return torch.cat([gated_linear_attention(**half, backend="reference") for half in halves], dim=2)

    assert_equivalent(op(backend, chunk_size=32), two_sequences, inputs)


@backends
def test_strong_gates_leave_their_neighbours_all_bits(backend: str) -> None:
    """Of 64 tokens all gates but the last four are strong: what the last four see is that of four tokens alone."""
    inputs = tensors(T=64, gain=1e-3)
    inputs["g"][:, :, :61] = -105.0  # factors of 0 whose running sums have few bits left
    seen = gated_linear_attention(**inputs, backend=backend)[:, :, 60:]
    alone = lambda **x: gated_linear_attention(**x, backend="reference")  # noqa: E731
    assert_equivalent(lambda **_: seen, alone, {name: x[:, :, 60:] for name, x in inputs.items()}, grads=False)


@backends
def test_a_zero_that_was_rounded_up_is_taken_as_it_is(backend: str) -> None:
    inputs = tensors(gain=0.0)
    inputs["g"] += 9e-4
    assert_equivalent(op(backend), op("reference"), inputs)


@pytest.mark.parametrize("chunk_size", [16, 32] if INTERPRET else [1, 2, 16, 128])
@backends
def test_chunks_change_rounding_only(backend: str, chunk_size: int) -> None:
    assert_equivalent(op(backend, chunk_size=chunk_size), op("reference"), tensors(H=1))


def test_halves_meet_at_borders_that_lie_between() -> None:
    """The exponents of a chunk are sums of gates, of which none is positive; weights see no later token."""
    inputs = tensors(T=8, K=3)
    weights, since, left = halve(inputs["q"], inputs["k"], inputs["g"])
    assert (since <= 0).all() and (left <= 0).all() and not weights.triu(1).any()
    assert_equivalent(lambda g: halve(g, g, g)[1], lambda g: g.cumsum(2), (inputs["g"],))
    assert_equivalent(lambda g: halve(g, g, g)[2], lambda g: g.sum(2, keepdim=True) - g.cumsum(2), (inputs["g"],))


def test_second_derivatives() -> None:
    inputs = {name: x[:, :1, :5, :3].double().requires_grad_() for name, x in tensors().items()}
    assert torch.autograd.gradgradcheck(lambda *x: gated_linear_attention(*x), tuple(inputs.values()))


@pytest.mark.interpreter
@pytest.mark.parametrize("T", [3, 20])
def test_kernels_refuse_second_derivatives(T: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors(T).items()}
    o = gated_linear_attention(**inputs, backend="triton")
    (dq,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="gated_linear_attention have no second derivative"):
        dq.sum().backward()


@pytest.mark.interpreter
def test_what_the_kernels_have_not_is_named() -> None:
    inputs = tensors(20)
    for change, message in (
        (dict(chunk_size=128), "chunk_size is 128, the kernels have 16, 32, 64"),
        (dict(v=torch.zeros(1, 2, 20, 300)), "widths 16 and 300"),
        ({name: x.double() for name, x in inputs.items()}, "float64 has no kernel"),
    ):
        with pytest.raises(effkit.BackendUnavailable, match=message):
            gated_linear_attention(**{**inputs, **change}, backend="triton")


@backends
def test_only_the_state_may_be_asked_for(backend: str) -> None:
    """Gradients of the memory alone: no cotangent of the outputs."""

    def memory(backend: str) -> Any:
        return lambda **x: gated_linear_attention(**x, return_state=True, backend=backend)[1].memory

    assert_equivalent(memory(backend), memory("reference"), tensors(20), grads=("k", "v", "g"))


@backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(g=torch.zeros(1, 2, 70)), r"g has shape \[1, 2, 70\], expected \[B, H, T, K\]"),
        (dict(g=torch.zeros(1, 2, 70, 24)), "g has shape .* with K=16 from q"),
        (dict(g=torch.zeros(1, 1, 70, 16)), "H=1 heads have a gate or state, expected H=2"),
        (dict(g=torch.full((1, 2, 70, 16), 0.5)), r"g reaches 0\.5, expected log-decays <= 0"),
    ],
)
def test_wrong_gates(backend: str, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**{**tensors(), **change}, backend=backend)


class TestLayer:
    """GatedLinearAttention; cuts, packing, compile and dtypes are in test_layers.py."""

    def make(self, **changes: Any) -> GatedLinearAttention:
        torch.manual_seed(0)
        return GatedLinearAttention(12, 2, gate_low_rank=3, expand_v=2.0, **changes)

    def test_is_the_recurrence_of_the_paper(self) -> None:
        module = self.make()
        named = {name.replace(".", "/"): p.detach() for name, p in module.named_parameters()}
        generator = torch.Generator().manual_seed(1)

        def layer(x: Tensor, **named: Tensor) -> Tensor:
            parameters = {name.replace("/", "."): p for name, p in named.items()}
            return torch.func.functional_call(module, parameters, (x,))

        def expected(x: Tensor, **p: Tensor) -> Tensor:
            q, k, v = (F.linear(x, p[f"{name}_proj/weight"]).unflatten(2, (2, -1)) for name in "qkv")
            logits = F.linear(F.linear(x, p["gk_proj/0/weight"]), p["gk_proj/1/weight"], p["gk_proj/1/bias"])
            alpha = (logits.sigmoid() ** (1 / 16)).unflatten(2, (2, -1))
            S, outs = x.new_zeros(2, 2, 3, 12), []
            for t in range(x.shape[1]):
                S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
                outs.append((q[:, t, :, None, :] / math.sqrt(3) @ S)[:, :, 0])
            o = torch.stack(outs, 1)
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["g_norm/weight"]
            return F.linear(o.flatten(2) * F.silu(F.linear(x, p["g_proj/weight"])), p["o_proj/weight"])

        assert_equivalent(layer, expected, {"x": torch.randn(2, 21, 12, generator=generator), **named})

    def test_untrained_gates_are_slow(self) -> None:
        """Every channel keeps most of its memory for a dozen tokens."""
        gates = F.logsigmoid(self.make().gk_proj(torch.randn(100, 12, generator=torch.Generator().manual_seed(0)))) / 16
        assert gates.mean().exp() > 0.93

    def test_wrong_sizes(self) -> None:
        for change, message in (
            (dict(expand_k=0.3), r"expand_k \* hidden_size is 3, expected a multiple of num_heads=2"),
            (dict(expand_v=0.1), r"expand_v \* hidden_size is 1, expected a multiple"),
            (dict(gate_low_rank=0), "gate_low_rank is 0"),
            (dict(gate_normalizer=0.0), r"gate_normalizer 0\.0"),
            (dict(chunk_size=48), "chunk_size is 48"),
        ):
            with pytest.raises(ValueError, match=message):
                GatedLinearAttention(12, 2, **change)
