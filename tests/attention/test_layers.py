"""The layers around the recurrent ops: the short convolution, Mamba2, MultiScaleRetention and LinearAttention."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    HedgehogFeatureMap,
    LinearAttention,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    Mamba2,
    MultiScaleRetention,
    ShortConvolution,
)
from effkit.testing import assert_equivalent, flat_tensors

# name -> a layer of width 12; chunks of 16, so that 37 tokens are three of them
LAYERS: dict[str, Any] = {
    "Mamba2": lambda **made: Mamba2(12, state_size=5, head_dim=4, n_groups=2, chunk_size=16, **made),
    "LogLinearGatedDeltaNet": lambda **made: LogLinearGatedDeltaNet(
        12, 1, num_v_heads=2, max_length=64, head_dim=5, head_v_dim=3, chunk_size=16, **made
    ),
    "LogLinearMamba2": lambda **made: LogLinearMamba2(
        12, max_length=64, state_size=5, head_dim=4, n_groups=2, chunk_size=16, **made
    ),
    "MultiScaleRetention": lambda **made: MultiScaleRetention(12, 3, chunk_size=16, **made),
    "GatedLinearAttention": lambda **made: GatedLinearAttention(12, 2, gate_low_rank=3, chunk_size=16, **made),
    "DeltaNet": lambda **made: DeltaNet(12, 2, expand_v=2.0, chunk_size=16, **made),
    "GatedDeltaNet": lambda **made: GatedDeltaNet(
        12, 2, num_v_heads=4, head_dim=5, head_v_dim=3, allow_neg_eigval=True, chunk_size=16, **made
    ),
    "LinearAttention": lambda **made: LinearAttention(12, 4, 2, chunk_size=16, **made),
    "LinearAttention, hedgehog": lambda **made: LinearAttention(
        12, 2, 1, feature_map="hedgehog", rope_theta=100.0, bias=True, chunk_size=16, **made
    ),
    "LinearAttention, unnormalised": lambda **made: LinearAttention(
        12, 2, feature_map=torch.tanh, normalize=False, head_dim=4, chunk_size=16, **made
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def convolution(kernel_size: int = 4, **changes: Any) -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(6, kernel_size, **changes)


def layer(name: str, **made: Any) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](**made)


def rows(state: Any, index: slice) -> Any:
    """Rows of a state, however its tuples are nested."""
    if isinstance(state, tuple):
        parts = [rows(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return None if state is None else state[index]


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


@each_layer
@pytest.mark.parametrize("cuts", [(1,), (15, 16), (17, 37), (0, 30, 31, 32, 33)])
def test_layer_continues_from_its_state(name: str, cuts: tuple[int, ...]) -> None:
    module = layer(name)

    def in_parts(x: Tensor, **named: Tensor) -> tuple[Any, ...]:
        outs, state = [], None
        for part in x.tensor_split(cuts, dim=1):
            y, state = called(module, dict(named, x=part), state=state, return_state=True)
            outs.append(y)
        return torch.cat(outs, 1), state

    whole = inputs(module, x=draw(2, 37, 12))
    assert_equivalent(in_parts, lambda **named: called(module, named, return_state=True), whole)


@each_layer
def test_packed_layer_equals_separate_calls(name: str) -> None:
    module, bounds = layer(name), (0, 1, 1, 20, 37)
    before = torch.tensor([0, 3, 4, 4, 9])  # sequences that have read 3, 1, 0 and 5 tokens
    _, first = module(draw(1, 9, 12, seed=1), return_state=True, cu_seqlens=before)

    def packed(**named: Tensor) -> Any:
        return called(module, named, state=first, return_state=True, cu_seqlens=torch.tensor(bounds))

    def separate(x: Tensor, **named: Tensor) -> tuple[Any, ...]:
        outs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            own = rows(first, slice(n, n + 1))
            y, state = called(module, dict(named, x=x[:, begin:end]), state=own, return_state=True)
            outs.append(y)
            states.append(tuple(flat_tensors(state)))
        return torch.cat(outs, 1), tuple(map(torch.cat, zip(*states, strict=True)))

    assert_equivalent(packed, separate, inputs(module, x=draw(1, 37, 12)))


@each_layer
def test_nothing_behind_the_last_packed_token_matters_to_a_layer(name: str) -> None:
    module, x, cu_seqlens = layer(name), draw(1, 37, 12), torch.tensor([0, 2, 20])
    results = []
    for rest in (torch.nan, 1.0):
        given = torch.cat((x[:, :20], torch.full((1, 17, 12), rest)), dim=1).requires_grad_()
        y, state = module(given, return_state=True, cu_seqlens=cu_seqlens)
        loss = sum(part.square().sum() for part in flat_tensors((y[:, :20], state)) if part.requires_grad)
        results.append((*torch.autograd.grad(loss, [given, *module.parameters()]), y[:, :20], *flat_tensors(state)))
    assert all(map(torch.equal, *results)) and not results[0][0][:, 20:].any()


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, dict(return_state=True)) for name in LAYERS), ("Mamba2", dict(cu_seqlens=torch.tensor([0, 2, 20])))],
    ids=[*LAYERS, "packed"],
)
def test_layer_compiles_without_breaks(name: str, more: dict[str, Any]) -> None:
    module = layer(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda **named: called(module, named, **more), fullgraph=True, backend="aot_eager")
    assert_equivalent(compiled, lambda **named: called(module, named, **more), inputs(module, x=draw(1, 21, 12)))


@each_layer
def test_layer_takes_device_dtype_and_odd_sizes(name: str) -> None:
    half, x = layer(name, dtype=torch.bfloat16), draw(2, 37, 12)
    y, state = half(x.bfloat16(), return_state=True)
    assert y.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert y.isfinite().all() and {part.dtype for part in flat_tensors(state)} <= {
        torch.float32,
        torch.bfloat16,
        torch.int64,
    }
    assert all(p.device.type == "meta" for p in layer(name, device="meta").parameters())
    module = layer(name)
    for batch, tokens in ((0, 3), (2, 0)):
        assert module(draw(batch, tokens, 12)).shape == (batch, tokens, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def test_mamba2_is_the_recurrence_of_the_paper() -> None:
    """Token by token, as it stands there: h = exp(A dt) h + dt B u, y = C h + D u."""
    module = layer("Mamba2")

    def expected(x: Tensor, **named: Tensor) -> Tensor:
        p = {name.replace("/", "."): value for name, value in named.items()}
        z, u, dt = F.linear(x, p["in_proj.weight"]).split((24, 24 + 2 * 2 * 5, 6), dim=-1)
        u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=44).mT)
        u, B, C = u.split((24, 10, 10), dim=-1)
        u, B, C = u.unflatten(2, (6, 4)), B.unflatten(2, (2, 5)), C.unflatten(2, (2, 5))
        B, C = (part.repeat_interleave(3, dim=2) for part in (B, C))  # two groups of three heads
        dt = F.softplus(dt + p["dt_bias"])
        h, outs = x.new_zeros(len(x), 6, 5, 4), []
        for t in range(x.shape[1]):
            decay = torch.exp(-torch.exp(p["A_log"]) * dt[:, t])
            h = decay[..., None, None] * h + (dt[:, t, :, None] * B[:, t])[..., None] * u[:, t, :, None]
            outs.append((C[:, t, :, :, None] * h).sum(2) + p["D"][:, None] * u[:, t])
        y = (torch.stack(outs, 1).flatten(2) * F.silu(z)).unflatten(2, (2, 12))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return F.linear(y.flatten(2) * p["norm.weight"], p["out_proj.weight"])

    assert_equivalent(lambda **named: called(module, named), expected, inputs(module, x=draw(2, 21, 12)))


def test_mamba2_starts_with_steps_and_decays_in_range() -> None:
    module = Mamba2(256, head_dim=2)
    step, rate = F.softplus(module.dt_bias), module.A_log.exp()
    assert 0.0009 < step.min() < 0.002 and 0.05 < step.max() < 0.11
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16.1


def test_retention_layer_is_the_parallel_form_of_the_paper() -> None:
    """Rotation by complex numbers, the matrix of decays, GroupNorm of each head, the swish gate."""
    module = layer("MultiScaleRetention")

    def expected(x: Tensor, **named: Tensor) -> Tensor:
        p = {name.replace("/", "."): value for name, value in named.items()}
        q, k, v = (heads(F.linear(x, p[f"{name}_proj.weight"]), 3) for name in "qkv")
        t = torch.arange(x.shape[1])
        angle = t[:, None] * 10000.0 ** (-torch.arange(2) / 2)

        def turned(part: Tensor) -> Tensor:
            wide = part.double()
            return torch.complex(wide[..., :2], wide[..., 2:]) * torch.polar(torch.ones(1).double(), angle.double())

        scores = (turned(q) @ turned(k).mH).real.to(x.dtype) / 2
        gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
        D = (gamma[:, None, None] ** (t[:, None] - t).clamp_min(0)).tril().to(x.dtype)
        o = (scores * D) @ v
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        o = o.transpose(1, 2).flatten(2) * p["g_norm.weight"] + p["g_norm.bias"]
        return F.linear(F.silu(F.linear(x, p["g_proj.weight"])) * o, p["o_proj.weight"])

    assert_equivalent(lambda **named: called(module, named), expected, inputs(module, x=draw(2, 21, 12)))


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_layer_is_its_dense_form(causal: bool) -> None:
    torch.manual_seed(0)
    module = LinearAttention(12, 4, 2, causal=causal, bias=True)

    def expected(x: Tensor, **named: Tensor) -> Tensor:
        p = {name.replace("/", "."): value for name, value in named.items()}
        q, k, v = (
            heads(F.linear(x, p[f"{name}_proj.weight"], p[f"{name}_proj.bias"]), count)
            for name, count in (("q", 4), ("k", 2), ("v", 2))
        )
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        weights = weights.tril() if causal else weights
        o = weights @ v / weights.sum(-1, keepdim=True)
        return F.linear(o.transpose(1, 2).flatten(2), p["o_proj.weight"], p["o_proj.bias"])

    assert_equivalent(lambda **named: called(module, named), expected, inputs(module, x=draw(2, 21, 12)))


def test_keys_past_their_lengths_are_not_seen_by_the_layer() -> None:
    torch.manual_seed(0)
    module, lengths = LinearAttention(12, 4, causal=False, feature_map="softmax"), (9, 4)

    def padded(**named: Tensor) -> tuple[Tensor, ...]:
        y = called(module, named, key_lengths=torch.tensor(lengths))
        return tuple(row[:length] for row, length in zip(y, lengths, strict=True))

    def separate(x: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        rows = zip(x, lengths, strict=True)
        return tuple(called(module, dict(named, x=row[None, :length]))[0] for row, length in rows)

    assert_equivalent(padded, separate, inputs(module, x=draw(2, 9, 12)))


def test_hedgehog_starts_as_the_fixed_map_and_learns_a_map_a_head() -> None:
    phi, x = HedgehogFeatureMap(2, 3), draw(1, 2, 5, 3)
    assert torch.equal(phi(x), torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1))
    weight = draw(2, 3, 3, seed=1)

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.einsum("bhtd,hed->bhte", x, weight)
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)

    assert_equivalent(
        lambda x, weight: torch.func.functional_call(phi, dict(weight=weight), (x,)), expected, (x, weight)
    )
    names = dict(layer("LinearAttention, hedgehog").named_parameters())
    assert names["q_map.weight"].shape == (2, 6, 6) and names["k_map.weight"].shape == (1, 6, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba2(12, head_dim=5), "head_dim is 5, expected a divisor of .* 24"),
        (lambda: Mamba2(12, head_dim=4, n_groups=4), "n_groups is 4, expected a divisor of the 6 heads"),
        (lambda: Mamba2(12, head_dim=4, chunk_size=48), "chunk_size is 48"),
        (lambda: MultiScaleRetention(12, 4), "expand_k .* is 12, expected a multiple of 8"),
        (lambda: MultiScaleRetention(12, 3, expand_v=0.9), "expand_v .* is 10, expected a multiple of 3"),
        (lambda: DeltaNet(12, 5), "expand_k .* is 12, expected a multiple of num_heads=5"),
        (lambda: DeltaNet(12, 2, chunk_size=48), "chunk_size is 48"),
        (lambda: GatedDeltaNet(12, 4, num_v_heads=6), "num_v_heads is 6, expected a multiple of num_heads=4"),
        (lambda: GatedDeltaNet(12, 4, head_dim=-1), "head_dim is -1"),
        (lambda: LinearAttention(12, 5), "hidden_size is 12, expected a multiple of num_heads=5"),
        (lambda: LinearAttention(12, 4, 3), "num_kv_heads is 3, expected a divisor of num_heads=4"),
        (lambda: LinearAttention(12, 4, rope_theta=1e4), "head_dim is 3, .* even"),
        (lambda: LinearAttention(12, 4, feature_map="gelu"), "feature_map is 'gelu', choices: .*elu"),
        (lambda: LinearAttention(12, 4, feature_map="softmax"), "needs causal=False"),
    ],
)
def test_layer_refuses_sizes_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["Mamba2", "MultiScaleRetention", "GatedLinearAttention", "GatedDeltaNet", "LinearAttention"]
)
def test_layer_on_kernels(name: str) -> None:
    """Views as projections leave them, a state, one more token."""

    def two_calls(backend: str, x: Tensor, **named: Tensor) -> tuple[Any, ...]:
        module = layer(name, backend=backend)
        first, state = called(module, dict(named, x=x[:, :20]), return_state=True)
        return first, called(module, dict(named, x=x[:, 20:]), state=state, return_state=True)

    given = inputs(layer(name), x=draw(1, 21, 12))
    assert_equivalent(lambda **named: two_calls("triton", **named), lambda **named: two_calls("torch", **named), given)
