"""What softmax_attention promises beyond equality with its reference on the ledger's cases."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import effkit
from effkit.attention import softmax_attention
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
# A kernel may compute with the NaN of padding as long as nothing of it is kept; the interpreter's numpy remarks on it.
nan_is_expected = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(b: int, hq: int, hkv: int, t: int, s: int, d: int) -> tuple[Tensor, ...]:
    return draw(b, hq, t, d), draw(b, hkv, s, d, seed=1), draw(b, hkv, s, d, seed=2)


def with_grads(fn: Any, *inputs: Tensor) -> list[Tensor]:
    """Outputs and gradients of a sum of squares of the finite outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(torch.where(o.isfinite(), o, 0.0).square().sum() for o in outputs).backward()
    return [*outputs, *(x.grad for x in leaves)]


@backends
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=True),
        dict(causal=True, window=3),
        dict(causal=True, window=4, key_lengths=[9, 5], key_starts=[0, 2], query_offset=[2, -1]),
        dict(key_lengths=[0, 9], key_starts=[0, 4]),
    ],
)
def test_who_sees_whom(backend: str, options: dict[str, Any]) -> None:
    """The mask by plain loops: with one-hot values the output is the row of weights."""
    b, t, s = 2, 6, 9
    q, k = draw(b, 1, t, 16), draw(b, 1, s, 16, seed=1)
    v = torch.eye(s, 16).expand(b, 1, s, 16)
    tensors = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in options.items()}
    weights = softmax_attention(q, k, v, **tensors, backend=backend)[:, 0, :, :s]
    for row in range(b):
        start, length = options.get("key_starts", [0, 0])[row], options.get("key_lengths", [s, s])[row]
        offset = options.get("query_offset", [s - t, s - t])[row]
        for i in range(t):
            for j in range(s):
                sees = start <= j < length
                sees &= not options.get("causal") or j <= i + offset
                sees &= "window" not in options or i + offset - j < options["window"]
                assert (weights[row, i, j] > 0) == sees, (row, i, j)


@backends
def test_window_counts_its_own_key(backend: str) -> None:
    q, k, v = qkv(1, 1, 1, 5, 5, 16)
    assert torch.equal(softmax_attention(q, k, v, causal=True, window=1, backend=backend), v)


@backends
def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    q, k, v = qkv(2, 2, 1, 7, 3, 16)
    o, lse, dq, _, _ = with_grads(
        lambda q, k, v: softmax_attention(q, k, v, causal=True, return_lse=True, backend=backend), q, k, v
    )
    assert not o[:, :, :4].any() and (lse[:, :, :4] == -math.inf).all() and not dq[:, :, :4].any()
    assert o[:, :, 4:].all() and dq[:, :, 5:].any()


@nan_is_expected
@backends
@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (dict(key_lengths=[5, 0]), [(0, slice(5, 9)), (1, slice(0, 9))]),
        (dict(key_starts=[3, 9], causal=True), [(0, slice(0, 3)), (1, slice(0, 9))]),
    ],
)
def test_padding_may_hold_anything(backend: str, options: dict[str, Any], gone: list[Any]) -> None:
    q, k, v = qkv(2, 4, 2, 9, 9, 16)
    options = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in options.items()}
    run = lambda q, k, v: softmax_attention(q, k, v, **options, return_lse=True, backend=backend)  # noqa: E731
    clean = with_grads(run, q, k, v)
    for row, where in gone:
        k[row, :, where] = math.nan
        v[row, :, where] = math.inf
    for before, after in zip(clean, with_grads(run, q, k, v), strict=True):
        assert torch.equal(before, after)
    for row, where in gone:
        assert not clean[3][row, :, where].any() and not clean[4][row, :, where].any()


@nan_is_expected
@backends
def test_tokens_past_the_packed_sequences_may_hold_anything(backend: str) -> None:
    q, k, v = qkv(1, 2, 1, 12, 12, 16)
    cu_seqlens = torch.tensor([0, 4, 9])
    run = lambda q, k, v: softmax_attention(q, k, v, causal=True, cu_seqlens=cu_seqlens, backend=backend)  # noqa: E731
    clean = with_grads(run, q, k, v)
    for x in (q, k, v):
        x[:, :, 9:] = math.nan
    for before, after in zip(clean, with_grads(run, q, k, v), strict=True):
        assert torch.equal(before, after)
        assert not after[:, :, 9:].any()


@backends
@pytest.mark.parametrize("window", [None, 5])
def test_packed_equals_separate(backend: str, window: int | None) -> None:
    q, k, v = qkv(1, 4, 2, 40, 40, 16)
    bounds = [0, 7, 7, 8, 40]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(
            q, k, v, causal=True, window=window, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend=backend
        )

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            softmax_attention(*(x[:, :, a:b] for x in (q, k, v)), causal=True, window=window, backend="reference")
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, 2)

    assert_equivalent(packed, separate, (q, k, v))


@backends
def test_parts_of_the_keys_combine_by_lse(backend: str) -> None:
    """softmax over all keys = the parts weighted by exp(lse - logsumexp of the lse), gradients through lse included."""
    q, k, v = qkv(2, 4, 2, 5, 30, 16)

    def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            softmax_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, backend=backend)
            for a, b in [(0, 4), (4, 21), (21, 30)]
        ]
        weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
        return sum(w[..., None].to(o.dtype) * o for w, (o, _) in zip(weights, parts, strict=True))

    assert_equivalent(in_parts, lambda q, k, v: softmax_attention(q, k, v, backend="reference"), (q, k, v))


@backends
def test_one_token_at_a_time_equals_all_at_once(backend: str) -> None:
    q, k, v = qkv(1, 4, 2, 20, 20, 16)

    def stepwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = [
            softmax_attention(
                q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], causal=True, window=6, backend=backend
            )
            for t in range(20)
        ]
        return torch.cat(steps, 2)

    whole = lambda q, k, v: softmax_attention(q, k, v, causal=True, window=6, backend="reference")  # noqa: E731
    assert_equivalent(stepwise, whole, (q, k, v))


@backends
def test_grouped_equals_repeated_heads(backend: str) -> None:
    q, k, v = qkv(1, 6, 2, 9, 9, 16)
    grouped = lambda q, k, v: softmax_attention(q, k, v, causal=True, backend=backend)  # noqa: E731

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(
            q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), causal=True, backend="reference"
        )

    assert_equivalent(grouped, repeated, (q, k, v))


@backends
def test_collapses(backend: str) -> None:
    q, k, v = qkv(1, 2, 2, 20, 20, 16)
    run = lambda **kw: lambda q, k, v: softmax_attention(q, k, v, causal=True, backend=backend, **kw)  # noqa: E731
    plain = lambda q, k, v: softmax_attention(q, k, v, causal=True, backend="reference")  # noqa: E731
    assert_equivalent(run(window=20), plain, (q, k, v))
    assert_equivalent(run(sinks=torch.full((2,), -1e9)), plain, (q, k, v))
    assert_equivalent(run(cu_seqlens=torch.tensor([0, 20])), plain, (q, k, v))
    assert_equivalent(run(query_offset=torch.tensor([0])), plain, (q, k, v))


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


def largest_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> int:
    with LargestTensor() as seen:
        with_grads(lambda q, k, v: softmax_attention(q, k, v, causal=True, backend="torch", **options), q, k, v)
    return seen.largest


def test_memory_of_a_window_is_linear_in_length() -> None:
    """Nothing as large as T x T is ever made, and twice the length needs at most twice as much."""
    small, large = (largest_of(*qkv(1, 1, 1, t, t, 16), window=64) for t in (2048, 4096))
    assert large <= 2 * small and large <= 4096 * 128


@pytest.mark.parametrize("options", [dict(), dict(window=100), dict(softcap=5.0, return_lse=True)])
def test_key_heads_are_never_repeated(options: dict[str, Any]) -> None:
    """With 16 query heads on one key head, nothing as large as 16 copies of a long k is made."""
    q, k, v = qkv(1, 16, 1, 1, 65536, 16)
    assert largest_of(q, k, v, **options) <= 2 * k.numel()


def test_second_derivatives() -> None:
    """Of the blocked torch path; torch's fused kernel, which takes plain calls, has none."""
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 2, 1, 4, 4, 3))
    fn = lambda q, k, v: softmax_attention(q, k, v, causal=True, window=3, softcap=2.0, return_lse=True)  # noqa: E731
    assert torch.autograd.gradgradcheck(fn, (q, k, v))


@backends
def test_function_transforms(backend: str) -> None:
    q, k, v = qkv(3, 2, 1, 9, 9, 16)
    fn = lambda q, k, v: softmax_attention(q, k, v, causal=True, window=4, softcap=3.0, backend=backend)  # noqa: E731
    one = lambda q, k, v: fn(q[None], k[None], v[None])[0]  # noqa: E731
    reference = lambda q, k, v: softmax_attention(  # noqa: E731
        q, k, v, causal=True, window=4, softcap=3.0, backend="reference"
    )
    assert_equivalent(torch.func.vmap(one), reference, (q, k, v), grads=False)
    grads = torch.func.grad(lambda q: fn(q, k, v).square().sum())(q)
    expected = torch.autograd.grad(fn(leaf := q.clone().requires_grad_(), k, v).square().sum(), leaf)[0]
    assert torch.equal(grads, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_autocast_casts_mixed_inputs_and_nothing_else(window: int | None) -> None:
    q, k, v = qkv(1, 2, 1, 9, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = softmax_attention(q, k, v.bfloat16(), causal=True, window=window)
    cast = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, window=window)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, cast)


WRONG = [
    (dict(window=0, causal=True), ValueError, "window is 0"),
    (dict(window=2.5, causal=True), ValueError, r"window is 2\.5"),
    (dict(window=3), ValueError, "window=3 needs causal=True"),
    (dict(scale=math.nan), ValueError, "scale is nan"),
    (dict(softcap=0.0), ValueError, r"softcap is 0\.0"),
    (dict(backend="cuda"), ValueError, "backend is 'cuda', choices: 'reference', 'torch', 'triton'"),
    (dict(cu_seqlens=torch.tensor([0.0, 9.0])), TypeError, "cu_seqlens is torch.float32, expected"),
    (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens .* B=2"),
    (dict(key_lengths=torch.tensor([1, 10])), ValueError, r"key_lengths is \[1, 10\], expected values from 0 to S=9"),
    (dict(key_lengths=[1, 9]), TypeError, "key_lengths is list"),
    (dict(key_starts=torch.tensor([1])), ValueError, r"key_starts has shape \[1\], expected \[B\] with B=2 from q"),
    (dict(sinks=torch.zeros(3)), ValueError, r"sinks has shape \[3\], expected \[Hq\] with Hq=4 from q"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = qkv(2, 4, 2, 9, 9, 16)
    with pytest.raises(error, match=message):
        softmax_attention(q, k, v, **options)


def test_wrong_tensors() -> None:
    q, k, v = qkv(2, 4, 3, 9, 9, 16)
    with pytest.raises(ValueError, match="q has Hq=4 heads, expected a multiple of the Hkv=3 heads"):
        softmax_attention(q, k, v)
    with pytest.raises(ValueError, match=r"k has shape \[2, 3, 9, 8\], expected \[B, Hkv, S, D\] with D=16 from q"):
        softmax_attention(q, k[..., :8], v)
    with pytest.raises(TypeError, match=r"q, k, v are torch\.float32, torch\.float32, torch\.float64"):
        softmax_attention(q[:, :3], k, v.double())
    packed = torch.tensor([0, 5, 3])
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 5, 3\], expected 0 = first"):
        softmax_attention(q[:1, :3], k[:1], v[:1], cu_seqlens=packed)


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    q, k, v = qkv(1, 1, 1, 2, 2, 16)
    with pytest.raises(
        effkit.BackendUnavailable, match=r"backend='triton' cannot run here.*choices: 'reference', 'torch'"
    ):
        softmax_attention(q, k, v, backend="triton")


def test_the_choice_is_explained_and_can_be_set() -> None:
    q, k, v = qkv(1, 1, 1, 2, 2, 16)
    (choice,) = effkit.explain(softmax_attention, q, k, v)
    assert (choice.op, choice.backend) == ("softmax_attention", "torch") and choice.reason
    with effkit.use_backend("reference"):
        (choice,) = effkit.explain(softmax_attention, q, k, v)
    assert choice.backend == "reference"
    with pytest.raises(ValueError, match="backend is 'gpu'"), effkit.use_backend("gpu"):
        pass
