"""What sliding_window_attention and LongformerAttention promise beyond equality on the ledger's cases."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from effkit.attention import LongformerAttention, SlidingWindowConfig, sliding_window_attention, softmax_attention
from effkit.change import ChangeConfig
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
# A kernel may compute with the NaN of padding as long as nothing of it is kept; the interpreter's numpy remarks on it.
nan_is_expected = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(b: int, hq: int, hkv: int, t: int, d: int = 16) -> tuple[Tensor, ...]:
    return draw(b, hq, t, d), draw(b, hkv, t, d, seed=1), draw(b, hkv, t, d, seed=2)


def tensors(options: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(x) if isinstance(x, list) else x for name, x in options.items()}


def of_qkv(backend: str, **options: Any) -> Any:
    return lambda q, k, v: sliding_window_attention(q, k, v, **tensors(options), backend=backend)


def with_grads(fn: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    torch.where(out.isfinite(), out, 0.0).square().sum().backward()
    return [out, *(x.grad for x in leaves)]


SIDES = dict(causal=False)
MASKS = [
    dict(window=3),
    dict(window=2, **SIDES),
    dict(window=3, sink_tokens=2),
    dict(window=3, sink_tokens=2, key_starts=[0, 4], key_lengths=[11, 9]),
    dict(window=1, global_tokens=[[0, 5], [7, -1]], **SIDES),
    dict(window=2, dilation=3, global_tokens=[[0, 5], [7, -1]], **SIDES),
    dict(window=3, dilation=2),
    dict(window=2, sink_tokens=1, global_tokens=[[4, 9], [10, 3]], key_starts=[1, 0], key_lengths=[11, 10]),
]


@backends
@pytest.mark.parametrize("options", MASKS)
def test_who_sees_whom(backend: str, options: dict[str, Any]) -> None:
    """The mask by plain loops: with one-hot values the output is the row of weights."""
    b, t = 2, 11
    q, k, _ = qkv(b, 1, 1, t)
    v = torch.eye(t, 16).expand(b, 1, t, 16)
    weights = of_qkv(backend, **options)(q, k, v)[:, 0, :, :t]
    window, d = options["window"], options.get("dilation", 1)
    for row in range(b):
        start, length = options.get("key_starts", [0, 0])[row], options.get("key_lengths", [t, t])[row]
        tokens = set(options.get("global_tokens", [[], []])[row]) & set(range(start, length))
        for i, j in itertools.product(range(t), range(t)):
            steps, off = divmod(i - j, d)
            reach = range(window) if options.get("causal", True) else range(-window, window + 1)
            sees = (off == 0 and steps in reach) or j - start in range(options.get("sink_tokens", 0))
            sees |= i in tokens or j in tokens
            sees &= start <= j < length and (j <= i or not options.get("causal", True))
            assert (weights[row, 0 + i, j] > 0) == sees, (row, i, j)


@backends
def test_how_keys_are_counted(backend: str) -> None:
    """A causal window of 1 and a symmetric one of 0 are the token itself."""
    q, k, v = qkv(1, 2, 2, 9)
    assert torch.equal(of_qkv(backend, window=1)(q, k, v), v)
    assert torch.equal(of_qkv(backend, window=0, causal=False)(q, k, v), v)


@backends
def test_collapses_to_dense_attention(backend: str) -> None:
    q, k, v = qkv(2, 4, 2, 20)
    causal = lambda q, k, v: softmax_attention(q, k, v, causal=True, backend="reference")  # noqa: E731
    both = lambda q, k, v: softmax_attention(q, k, v, backend="reference")  # noqa: E731
    assert_equivalent(of_qkv(backend, window=20), causal, (q, k, v))
    assert_equivalent(of_qkv(backend, window=1, sink_tokens=20), causal, (q, k, v))
    assert_equivalent(of_qkv(backend, window=19, causal=False), both, (q, k, v))
    everyone = torch.ones(2, 20, dtype=torch.bool)
    assert_equivalent(of_qkv(backend, window=0, causal=False, global_tokens=everyone), both, (q, k, v))


@backends
def test_equals_softmax_attention_with_a_window(backend: str) -> None:
    q, k, v = qkv(2, 4, 2, 30)
    windowed = lambda q, k, v: softmax_attention(q, k, v, causal=True, window=7, backend="reference")  # noqa: E731
    assert_equivalent(of_qkv(backend, window=7), windowed, (q, k, v))
    assert_equivalent(of_qkv(backend, window=7, dilation=(1, 1)), windowed, (q, k, v))


@backends
def test_dilation_is_a_window_within_each_residue_class(backend: str) -> None:
    q, k, v = qkv(1, 2, 2, 21)

    def by_class(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for r in range(4):
            out[:, :, r::4] = softmax_attention(
                *(x[:, :, r::4] for x in (q, k, v)), causal=True, window=3, backend="reference"
            )
        return out

    assert_equivalent(of_qkv(backend, window=3, dilation=4), by_class, (q, k, v))


@backends
def test_flags_are_positions(backend: str) -> None:
    """Order, repetition and -1 mean nothing; a row without global tokens is a plain window."""
    q, k, v = qkv(2, 2, 1, 12)
    flags = torch.zeros(2, 12, dtype=torch.bool)
    flags[0, [2, 7]] = True
    options = dict(window=2, causal=False)
    by_flags = of_qkv("reference", **options, global_tokens=flags)
    assert_equivalent(of_qkv(backend, **options, global_tokens=[[7, 2, 7], [-1, -1, -1]]), by_flags, (q, k, v))
    assert_equivalent(of_qkv(backend, **options, global_tokens=flags), by_flags, (q, k, v))
    plain = of_qkv("reference", **options)
    assert_equivalent(of_qkv(backend, **options, global_tokens=flags & False), plain, (q, k, v))


@backends
@pytest.mark.parametrize("options", [dict(window=3, sink_tokens=2), dict(window=2, causal=False)])
def test_packed_equals_separate(backend: str, options: dict[str, Any]) -> None:
    q, k, v = qkv(1, 4, 2, 40)
    bounds = [0, 7, 7, 8, 40]

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = of_qkv("reference", **options)
        parts = [run(*(x[:, :, a:b] for x in (q, k, v))) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, 2)

    assert_equivalent(of_qkv(backend, cu_seqlens=bounds, **options), separate, (q, k, v))


@backends
def test_sinks_one_token_at_a_time(backend: str) -> None:
    """Each step over the keys that a cache of two sinks and a window keeps."""
    q, k, v = qkv(1, 4, 2, 9)
    options = dict(window=3, sink_tokens=2)

    def stepwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = []
        for t in range(9):
            kept = [j for j in range(t + 1) if j < 2 or j > t - 3]
            steps.append(of_qkv(backend, **options)(q[:, :, t : t + 1], k[:, :, kept], v[:, :, kept]))
        return torch.cat(steps, 2)

    assert_equivalent(stepwise, of_qkv("reference", **options), (q, k, v), grads=False)


@nan_is_expected
@backends
@pytest.mark.parametrize(
    "options",
    [
        dict(window=3, sink_tokens=2, key_starts=[0, 3], key_lengths=[8, 12]),
        dict(window=2, causal=False, key_lengths=[8, 12], key_starts=[0, 3], global_tokens=[[0, 9], [5, 1]]),
        dict(window=2, causal=False, dilation=2, key_lengths=[8, 12], key_starts=[0, 3]),
    ],
)
def test_padding_may_hold_anything(backend: str, options: dict[str, Any]) -> None:
    q, k, v = qkv(2, 4, 2, 12)
    clean = with_grads(of_qkv(backend, **options), q, k, v)
    for row, where in ((0, slice(8, 12)), (1, slice(0, 3))):
        k[row, :, where], v[row, :, where] = math.nan, math.inf
        assert not clean[2][row, :, where].any() and not clean[3][row, :, where].any()
    for before, after in zip(clean, with_grads(of_qkv(backend, **options), q, k, v), strict=True):
        assert torch.equal(before, after)


@nan_is_expected
@backends
@pytest.mark.parametrize(
    "options", [dict(window=3, sink_tokens=2), dict(window=2, causal=False, global_tokens=[[1, 6, 10]])]
)
def test_tokens_past_the_packed_sequences_may_hold_anything(backend: str, options: dict[str, Any]) -> None:
    q, k, v = qkv(1, 2, 1, 12)
    run = of_qkv(backend, cu_seqlens=[0, 4, 9], **options)
    clean = with_grads(run, q, k, v)
    for x in (q, k, v):
        x[:, :, 9:] = math.nan
    for before, after in zip(clean, with_grads(run, q, k, v), strict=True):
        assert torch.equal(before, after)
        assert not after[:, :, 9:].any()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes (views do not count)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


FORMS = [
    dict(window=64, sink_tokens=4),
    dict(window=32, causal=False),
    dict(window=32, causal=False, global_tokens=[[0, 1000, 1999]]),
    dict(window=16, causal=False, dilation=3),
]


@pytest.mark.parametrize("options", FORMS)
def test_memory_is_linear_in_length(options: dict[str, Any]) -> None:
    """Nothing as large as T x T is ever made, and twice the length needs at most twice as much."""
    largest = []
    for t in (2048, 4096):
        with LargestTensor() as seen:
            with_grads(of_qkv("torch", **options), *qkv(1, 1, 1, t))
        largest.append(seen.largest)
    assert largest[1] <= 2 * largest[0] and largest[1] <= 4096 * 128


@backends
@pytest.mark.parametrize("kind", ["flags", "positions"])
def test_global_tokens_compile_into_one_graph(backend: str, kind: str) -> None:
    q, k, v = qkv(2, 2, 1, 12)
    given = torch.tensor([[0, 9], [5, -1]])
    if kind == "flags":
        given = torch.arange(12)[None] == given.amax(1, keepdim=True)
    run = of_qkv(backend, window=2, causal=False, global_tokens=given)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_equivalent(compiled, of_qkv("reference", window=2, causal=False, global_tokens=given), (q, k, v))


@backends
def test_function_transforms(backend: str) -> None:
    q, k, v = qkv(3, 2, 1, 9)
    fn = of_qkv(backend, window=3, sink_tokens=2)
    one = lambda q, k, v: fn(q[None], k[None], v[None])[0]  # noqa: E731
    reference = of_qkv("reference", window=3, sink_tokens=2)
    assert_equivalent(torch.func.vmap(one), reference, (q, k, v), grads=False)
    grads = torch.func.grad(lambda q: fn(q, k, v).square().sum())(q)
    expected = torch.autograd.grad(fn(leaf := q.clone().requires_grad_(), k, v).square().sum(), leaf)[0]
    assert torch.equal(grads, expected)


def test_second_derivatives() -> None:
    """Of the torch path, where torch's fused kernel (for windows over everything) is not taken."""
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 2, 1, 5, d=3))
    fn = of_qkv("torch", window=1, causal=False, global_tokens=[[4]])
    assert torch.autograd.gradgradcheck(fn, (q, k, v))


def test_autocast_casts_mixed_inputs() -> None:
    q, k, v = qkv(1, 2, 1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sliding_window_attention(q, k, v.bfloat16(), window=3, sink_tokens=1)
    cast = sliding_window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=3, sink_tokens=1)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, cast)


WRONG = [
    (dict(window=0), ValueError, "window is 0, expected an int >= 1"),
    (dict(window=-1, **SIDES), ValueError, "window is -1, expected an int >= 0"),
    (dict(window=2.5), ValueError, r"window is 2\.5"),
    (dict(window=True), ValueError, "window is True"),
    (dict(window=3, sink_tokens=-1), ValueError, "sink_tokens is -1, expected an int >= 0"),
    (dict(window=3, dilation=0), ValueError, "dilation is 0, expected an int >= 1"),
    (dict(window=3, dilation=(1, 2, 3)), ValueError, r"dilation is \(1, 2, 3\), expected one number for each of Hkv=2"),
    (dict(window=3, dilation=2, cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens"),
    (dict(window=3, global_tokens=torch.zeros(2, 9)), TypeError, r"global_tokens is torch\.float32, expected bool"),
    (dict(window=3, global_tokens=torch.zeros(2, 8).bool()), ValueError, "global_tokens has 8 flags a row"),
    (dict(window=3, global_tokens=torch.tensor([[9], [0]])), ValueError, "global_tokens holds 9, expected"),
    (dict(window=3, global_tokens=torch.zeros(1, 9).bool()), ValueError, r"global_tokens has shape \[1, 9\]"),
    (dict(window=3, key_lengths=torch.tensor([1, 10])), ValueError, "sliding_window_attention: key_lengths is"),
    (dict(window=3, query_offset=torch.tensor([0, 0]), **SIDES), ValueError, "query_offset is given with causal=False"),
    (dict(window=3, backend="cuda"), ValueError, "backend is 'cuda', choices"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = qkv(2, 4, 2, 9)
    with pytest.raises(error, match=message):
        sliding_window_attention(q, k, v, **options)


@pytest.mark.parametrize("options", [SIDES, dict(dilation=2), dict(global_tokens=torch.zeros(2, 1, dtype=torch.long))])
def test_queries_and_keys_that_differ_in_number(options: dict[str, Any]) -> None:
    q, k, v = qkv(2, 4, 2, 9)
    with pytest.raises(ValueError, match=r"T=5 and S=9 differ, but .* needs T = S"):
        sliding_window_attention(q[:, :, :5], k, v, window=3, **options)


class Compute(nn.Module):
    """A computation with a layer as a module, so that it becomes a function of the layer's parameters."""

    def __init__(self, layer: nn.Module, compute: Any) -> None:
        super().__init__()
        self.layer, self.compute = layer, compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.layer, x)


class TestLongformerAttention:
    """The layer; tests/peers compares it with transformers' own."""

    def layer(self, **options: Any) -> LongformerAttention:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LongformerAttention(16, 2, 3, **options)

    def test_global_projections_start_as_the_local_ones(self) -> None:
        """Then rows of global tokens are what the op makes of them."""
        is_global = torch.zeros(2, 20, dtype=torch.bool)
        is_global[0, [0, 13]] = True

        def of_the_op(layer: LongformerAttention, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(2, (2, 8)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
            o = sliding_window_attention(q, k, v, window=3, causal=False, global_tokens=is_global, backend="reference")
            return layer.out_proj(o.transpose(1, 2).flatten(2))

        self.assert_same(self.layer(), lambda layer, x: layer(x, global_tokens=is_global), of_the_op, grads=False)

    def test_global_projections_make_the_rows_of_global_tokens_alone(self) -> None:
        layer, x, is_global = self.layer(), draw(1, 20, 16), torch.arange(20)[None] == 13
        before = layer(x, global_tokens=is_global)
        torch.nn.init.zeros_(layer.value_global.weight)
        after = layer(x, global_tokens=is_global)
        assert torch.equal(before[~is_global], after[~is_global])
        assert not torch.equal(before[is_global], after[is_global])

    def test_padding(self) -> None:
        """A padded row is what it is alone; positions are as good as flags."""
        tokens, lengths, flags = torch.tensor([[0], [4]]), torch.tensor([20, 13]), torch.arange(13)[None] == 4
        self.assert_same(
            self.layer(dilation=(1, 2)),
            lambda layer, x: layer(x, global_tokens=tokens, key_lengths=lengths)[1, :13],
            lambda layer, x: layer(x[1:, :13], global_tokens=flags)[0],
        )

    def assert_same(self, layer: LongformerAttention, mine: Any, reference: Any, grads: bool = True) -> None:
        """mine(layer, x) is reference(layer, x), and so are the gradients by x and every weight."""

        def of(compute: Any) -> Any:
            return lambda x, **weights: functional_call(Compute(layer, compute), weights, (x,))

        weights = {f"layer.{name}": value.detach() for name, value in layer.named_parameters()}
        # A key bias moves all scores of a query alike: its gradient is zero, and computed, noise.
        wanted = tuple(name for name in ("x", *weights) if ".key" not in name or "bias" not in name)
        inputs = {"x": draw(2, 20, 16), **weights}
        assert_equivalent(of(mine), of(reference), inputs, grads=wanted if grads else False)

    def test_every_projection_learns(self) -> None:
        layer, x = self.layer(), draw(1, 12, 16)
        layer(x, global_tokens=torch.tensor([[2]])).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())

    def test_wrong_sizes(self) -> None:
        with pytest.raises(ValueError, match="num_heads is 3, expected a divisor of hidden_size=16"):
            LongformerAttention(16, 3, 4)
        with pytest.raises(ValueError, match="window is -1"):
            LongformerAttention(16, 2, -1)


def test_config() -> None:
    config = SlidingWindowConfig(window=8, sink_tokens=2, layers=(0, -1))
    assert ChangeConfig.from_dict(config.to_dict()) == config
    for options, message in (
        (dict(window=0), "window is 0"),
        (dict(window=2, sink_tokens=-1), "sink_tokens is -1"),
        (dict(window=2, layers=()), r"layers is \(\)"),
        (dict(window=2, layers=(True,)), r"layers is \(True,\)"),
        (dict(window=2, backend="gpu"), "backend is 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            SlidingWindowConfig(**options)
