"""Linear attention with its division, in chunks: sums of values and of weights, and the gradient of their quotient.

    o_i = r_i (scale q_i S + scale sum_{j <= i} (q_i k_j) v_j)        S, z the sums of k v^T and of k before the chunk
    r_i = 1 / (scale q_i z + scale sum_{j <= i} q_i k_j + eps)

The memories S come from the kernels of ssd, without decay. With delta_i = do_i o_i the gradient of a weight is

    d(q_i k_j) = scale r_i (do_i v_j - delta_i)

in which much cancels (for the first token everything): the difference is taken before r_i is applied and rounded.
The gradients of S and z behind a chunk are sums from the end, of scale r_i q_i do_i^T and -scale r_i delta_i q_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._recurrent import RecurrentState, next_position
from effkit.attention.linear import linear_attention_torch
from effkit.kernels import chunk_scan as scan
from effkit.kernels._chunk_tiles import (
    LENGTHS,
    Tile,
    build,
    chunk_rows,
    load_block,
    pick,
    row_products,
    store_row,
    through_memory,
    weighted,
    write_rows,
)
from effkit.kernels._common import AotSpec, cast, distinct, unit_stride
from effkit.kernels._recurrent_ops import (
    SHORT,
    define,
    empty_memory,
    empty_output,
    for_each_head,
    groups,
    strides,
    sum_heads,
)


@triton.jit
def _load_row(ptr, n, C: tl.constexpr):
    """The first n of [C], zeros behind them."""
    i = tl.arange(0, C)
    return tl.load(ptr + i, mask=i < n, other=0.0)


@triton.jit
def _locate(parts, N, H):
    """Which batch row and head, chunk and part of its work this program owns: (b, h, n, part)."""
    part = tl.program_id(0) % parts
    n = tl.program_id(0) // parts % N
    bh = (tl.program_id(0) // parts // N).to(tl.int64)
    return bh // H, bh % H, n.to(tl.int64), part


# One program owns a chunk of one head and sums its keys.
@triton.jit(do_not_specialize=LENGTHS)
def _linear_sums(
    k_ptr, sums_ptr, stride_kb, stride_kh, stride_kt, T, N, H, k_group,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, n, _ = _locate(1, N, H)
    k_ptr += b * stride_kb + h // k_group * stride_kh + n * C * stride_kt
    for k in range(0, K, BLOCK_K):
        keys = load_block(k_ptr + k, stride_kt, 1, T - n * C, K - k, C, BLOCK_K).to(tl.float32)
        store_row(sums_ptr + ((b * H + h) * N + n) * K + k, tl.sum(keys, 0), K - k, BLOCK_K)


# One program owns a chunk of one head: it writes delta, and sums the queries, each times -scale r delta. delta is do o;
# but o is rounded, and what delta is subtracted from consists of the very terms that are added up here.
@triton.jit(do_not_specialize=LENGTHS)
def _linear_delta(
    q_ptr, k_ptr, v_ptr, do_ptr, inverse_ptr, memories_ptr, delta_ptr, dsums_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot,
    T, N, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _ = _locate(1, N, H)
    at = (b * H + h) * N + n
    n_rows = T - n * C
    q_ptr += b * stride_qb + h // q_group * stride_qh + n * C * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + n * C * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + n * C * stride_vt
    do_ptr += b * stride_dob + h * stride_doh + n * C * stride_dot
    scores = row_products(q_ptr, k_ptr, stride_qt, stride_kt, n_rows, K, C, BLOCK_K)
    dscores = row_products(do_ptr, v_ptr, stride_dot, stride_vt, n_rows, V, C, BLOCK_V)
    delta = tl.sum(weighted(scores * dscores, None, C, KEYS_FIRST=False), 1)
    for k in range(0, K, BLOCK_K):
        q = load_block(q_ptr + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K).to(tl.float32)
        delta += tl.sum(q * through_memory(
            do_ptr, stride_dot, n_rows, memories_ptr + (at * K + k) * V, 1, V, K - k, V, C, BLOCK_V, BLOCK_K
        ), 1)  # fmt: skip
    rows = (b * H + h) * T + n * C
    inverse = scale * _load_row(inverse_ptr + rows, n_rows, C)
    delta *= inverse
    store_row(delta_ptr + rows, delta, n_rows, C)
    for k in range(0, K, BLOCK_K):
        q = load_block(q_ptr + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K).to(tl.float32)
        store_row(dsums_ptr + at * K + k, tl.sum(q * (-delta * inverse)[:, None], 0), K - k, BLOCK_K)


# One program owns BLOCK_K columns of one head: it turns the sums of chunks into the sum of all before each chunk (in
# reverse: behind each), from that of the tokens before the first, and writes the sum of all.
@triton.jit(do_not_specialize=LENGTHS)
def _linear_running(
    sums_ptr, first_ptr, last_ptr, N, K: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(K, BLOCK_K)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BLOCK_K
    before = tl.zeros([BLOCK_K], tl.float32)
    if first_ptr is not None:
        before = _load_row(first_ptr + head * K + k, K - k, BLOCK_K)
    columns = k + tl.arange(0, BLOCK_K)[None, :]
    for m in range(0, N, BLOCK_N):
        place = m + tl.arange(0, BLOCK_N)[:, None]
        n = place
        if REVERSE:
            n = N - 1 - place
        ptrs = sums_ptr + (head * N + n) * K + columns
        mask = (place < N) & (columns < K)
        x = tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, before[None, :] + (tl.cumsum(x, 0) - x), mask=mask)
        before += tl.sum(x, 0)
    store_row(last_ptr + head * K + k, before, K - k, BLOCK_K)


# One program owns a chunk of one head: it makes the C x C scores once, sums them with what the chunk's queries find in
# the normalizer before it, and writes the outputs, BLOCK_V columns at a time, and r.
@triton.jit(do_not_specialize=LENGTHS)
def _linear_output(
    q_ptr, k_ptr, v_ptr, memories_ptr, sums_ptr, o_ptr, inverse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    T, N, H, q_group, k_group, v_group, scale, eps,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _ = _locate(1, N, H)
    at = (b * H + h) * N + n
    n_rows = T - n * C
    q_ptr += b * stride_qb + h // q_group * stride_qh + n * C * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + n * C * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + n * C * stride_vt
    o_ptr += b * stride_ob + h * stride_oh + n * C * stride_ot
    weights = weighted(row_products(q_ptr, k_ptr, stride_qt, stride_kt, n_rows, K, C, BLOCK_K), None, C, False)
    total = tl.sum(weights, 1)
    for k in range(0, K, BLOCK_K):
        q = load_block(q_ptr + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K).to(tl.float32)
        total += tl.sum(q * _load_row(sums_ptr + at * K + k, K - k, BLOCK_K)[None, :], 1)
    # Rows behind the last token have no keys: with eps=0 theirs would be a division by zero.
    inverse = 1 / tl.where(tl.arange(0, C) < n_rows, scale * total + eps, 1.0)
    store_row(inverse_ptr + (b * H + h) * T + n * C, inverse, n_rows, C)
    inverse *= scale
    write_rows(
        o_ptr, cast(inverse[:, None] * weights, v_ptr.dtype.element_ty), v_ptr, inverse, q_ptr,
        memories_ptr + at * K * V, None, None, None,
        stride_ot, stride_vt, stride_qt, V, 1, 0, n_rows, K, V, C, BLOCK_K, BLOCK_V,
    )  # fmt: skip


# As in ssd, three programs share a chunk of one head and write dq, dk and dv. Positive keys point the same way, and
# what they have in common cancels in dq: the gradients of its scores stay in float32.
@triton.jit(do_not_specialize=LENGTHS)
def _linear_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, inverse_ptr, delta_ptr, memories_ptr, sums_ptr, dmemories_ptr, dsums_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, N, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, part = _locate(3, N, H)
    at = (b * H + h) * N + n
    n_rows = T - n * C
    q_ptr += b * stride_qb + h // q_group * stride_qh + n * C * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + n * C * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + n * C * stride_vt
    do_ptr += b * stride_dob + h * stride_doh + n * C * stride_dot
    rows = (b * H + h) * T + n * C
    inverse = scale * _load_row(inverse_ptr + rows, n_rows, C)
    delta = _load_row(delta_ptr + rows, n_rows, C)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if part == 0:
        dscores = row_products(do_ptr, v_ptr, stride_dot, stride_vt, n_rows, V, C, BLOCK_V)  # [queries, keys]
        dscores = weighted((dscores - delta[:, None]) * inverse[:, None], None, C, KEYS_FIRST=False)
        write_rows(
            dq_ptr + b * stride_dqb + h * stride_dqh + n * C * stride_dqt, dscores, k_ptr, inverse, do_ptr,
            memories_ptr + at * K * V, None, -delta * inverse, sums_ptr + at * K,
            stride_dqt, stride_kt, stride_dot, 1, V, 0, n_rows, V, K, C, BLOCK_V, BLOCK_K,
        )  # fmt: skip
    elif part == 1:
        dscores = row_products(v_ptr, do_ptr, stride_vt, stride_dot, n_rows, V, C, BLOCK_V)  # [keys, queries]
        dscores = weighted((dscores - delta[None, :]) * inverse[None, :], None, C, KEYS_FIRST=True)
        ones = tl.full([C], 1.0, tl.float32)
        write_rows(
            dk_ptr + b * stride_dkb + h * stride_dkh + n * C * stride_dkt, cast(dscores, dtype), q_ptr, ones, v_ptr,
            dmemories_ptr + at * K * V, None, ones, dsums_ptr + at * K,
            stride_dkt, stride_qt, stride_vt, 1, V, 0, n_rows, V, K, C, BLOCK_V, BLOCK_K,
        )  # fmt: skip
    else:
        scores = row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K)  # [keys, queries]
        scores = weighted(scores * inverse[None, :], None, C, KEYS_FIRST=True)
        ones = tl.full([C], 1.0, tl.float32)
        write_rows(
            dv_ptr + b * stride_dvb + h * stride_dvh + n * C * stride_dvt, cast(scores, dtype), do_ptr, ones, k_ptr,
            dmemories_ptr + at * K * V, None, None, None,
            stride_dvt, stride_dot, stride_kt, V, 1, 0, n_rows, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip


_BLOCK_N, _BLOCK_K = 64, 16  # of the running sums: enough programs for a narrow head


def _run_up(sums: Tensor, first: Tensor | None, last: Tensor, *, reverse: bool) -> None:
    """The sums of chunks [B, H, N, K] become those before each (in reverse: behind each), from first on to last."""
    B, H, N, K = sums.shape
    _linear_running[B * H * triton.cdiv(K, _BLOCK_K),](
        sums, first, last, N, K=K, REVERSE=reverse, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=4
    )


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, first_sum: Tensor | None,
    scale: float, chunk_size: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, inverse, memories, sums, last, last_sum = _fake_forward(q, k, v, first, first_sum, scale, chunk_size, eps)
    first, first_sum = _wide(first), _wide(first_sum)
    B, H, T, V = o.shape
    N, K = memories.shape[2:4]
    if not o.numel():
        last.zero_() if first is None else last.copy_(first)
        last_sum.zero_() if first_sum is None else last_sum.copy_(first_sum)
    elif T < SHORT:
        scan.recur(q, k, v, None, first, o, last, scale, first_sum, last_sum, inverse, eps)
    else:
        C = chunk_rows(T, chunk_size)
        tile = pick(scan.OUTPUT, q, v)
        with torch.cuda.device_of(q):
            scan.fill_memories(k, v, None, first, memories, last, 1.0, C, reverse=False)
            _linear_sums[B * H * N,](
                k, sums, *strides(k), T, N, H, *groups(H, k), K=K, C=C, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps
            )
            _run_up(sums, first_sum, last_sum, reverse=False)
            _linear_output[B * H * N,](
                q, k, v, memories, sums, o, inverse, *strides(q, k, v, o), T, N, H, *groups(H, q, k, v), scale, eps,
                K=K, V=V, C=C, **tile._asdict(),
            )  # fmt: skip
    return o, inverse, memories, sums, last, last_sum


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, first_sum: Tensor | None,
    scale: float, chunk_size: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    o = empty_output(q, k, v)
    B, H, T, _ = o.shape
    N = scan.n_chunks(T, chunk_size)
    memories, last = empty_memory(q, v, H, N, dtype=q.dtype), empty_memory(q, v, H)
    sums, last_sum = last.new_empty(B, H, N, q.shape[3]), last.new_empty(B, H, q.shape[3])
    return o, last.new_empty(B, H, T), memories, sums, last, last_sum


def _backward(
    do: Tensor, dlast: Tensor | None, dlast_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None, first_sum: Tensor | None, inverse: Tensor, memories: Tensor, sums: Tensor,
    scale: float, chunk_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    dq, dk, dv, dfirst, dfirst_sum = _fake_backward(
        do, dlast, dlast_sum, q, k, v, first, first_sum, inverse, memories, sums, scale, chunk_size
    )
    dlast, dlast_sum = _wide(dlast), _wide(dlast_sum)
    B, H, T, V = do.shape
    if not do.numel():
        dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
        dfirst_sum.zero_() if dlast_sum is None else dfirst_sum.copy_(dlast_sum)
        return dq, dk, dv, dfirst, dfirst_sum
    if T < SHORT:
        memories, sums = scan.first_chunk(first, dfirst, q.dtype), scan.first_chunk(first_sum, dfirst_sum, sums.dtype)
    N, K = memories.shape[2:4]
    C = chunk_rows(T, chunk_size)
    delta, dmemories, dsums = (torch.empty_like(x) for x in (inverse, memories, sums))
    each = [for_each_head(dx, H) for dx in (dq, dk, dv)]
    tile = pick(scan.GRADIENTS, q, v)
    with torch.cuda.device_of(q):
        scan.fill_memories(q, do, None, dlast, dmemories, dfirst, scale, C, reverse=True, rows=inverse)
        _linear_delta[B * H * N,](
            q, k, v, do, inverse, memories, delta, dsums, *strides(q, k, v, do), T, N, H, *groups(H, q, k, v), scale,
            K=K, V=V, C=C, **tile._asdict(),
        )  # fmt: skip
        _run_up(dsums, dlast_sum, dfirst_sum, reverse=True)
        _linear_gradients[3 * B * H * N,](
            q, k, v, do, inverse, delta, memories, sums, dmemories, dsums, *each, *strides(q, k, v, do, *each),
            T, N, H, *groups(H, q, k, v), scale, K=K, V=V, C=C, **tile._asdict(),
        )  # fmt: skip
    for dx, heads in zip((dq, dk, dv), each, strict=True):
        sum_heads(dx, heads)
    return dq, dk, dv, dfirst, dfirst_sum


def _fake_backward(
    do: Tensor, dlast: Tensor | None, dlast_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None, first_sum: Tensor | None, inverse: Tensor, memories: Tensor, sums: Tensor,
    scale: float, chunk_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    dfirst = empty_memory(q, v, do.shape[1])
    return dq, dk, dv, dfirst, dfirst.new_empty(dfirst.shape[:3])


_OPTIONS = "float scale, int chunk_size"
_forward_op = define(
    "linear_attention_forward",
    "Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? first_sum",
    f"{_OPTIONS}, float eps",
    "Tensor o, Tensor inverse, Tensor memories, Tensor sums, Tensor last, Tensor last_sum",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "linear_attention_backward",
    "Tensor do, Tensor? dlast, Tensor? dlast_sum, Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? first_sum, "
    "Tensor inverse, Tensor memories, Tensor sums",
    _OPTIONS,
    "Tensor dq, Tensor dk, Tensor dv, Tensor dfirst, Tensor dfirst_sum",
    _backward,
    _fake_backward,
)


class _LinearAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, first_sum: Tensor | None,
        scale: float, chunk_size: int, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return _forward_op(q, k, v, first, first_sum, scale, chunk_size, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.chunk_size, _ = inputs
        ctx.mark_non_differentiable(*output[1:4])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:4])

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, _inverse: None, _memories: None, _sums: None,
        dlast: Tensor | None, dlast_sum: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        q, k, v, first, first_sum, *saved = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        dq, dk, dv, dfirst, dfirst_sum = _LinearAttentionBackward.apply(
            do, dlast, dlast_sum, q, k, v, first, first_sum, *saved, ctx.scale, ctx.chunk_size
        )
        dfirst = None if first is None else dfirst.to(first.dtype)
        dfirst_sum = None if first_sum is None else dfirst_sum.to(first_sum.dtype)
        return dq, dk, dv, dfirst, dfirst_sum, None, None, None


class _LinearAttentionBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, dlast_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        first: Tensor | None, first_sum: Tensor | None, inverse: Tensor, memories: Tensor, sums: Tensor,
        scale: float, chunk_size: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return _backward_op(do, dlast, dlast_sum, q, k, v, first, first_sum, inverse, memories, sums, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of linear_attention have no second derivative; backend="reference" has')


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.linear_attention, which documents and has checked the arguments.

    Sums over all tokens are plain matrix products. Sums of positive features leave the range of float16, which is
    therefore taken as float32.
    """
    options: Any = dict(initial_state=initial_state, scale=scale, chunk_size=chunk_size)
    if not causal:
        return linear_attention_torch(q, k, v, causal=causal, normalize=normalize, eps=eps, **options)
    if not normalize:
        return scan.ssd(q, k, v, None, **options)
    dtype = v.dtype
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    first = first_sum = None
    if initial_state is not None:
        first, _, first_sum = initial_state
    tensors = distinct(q, k, v, first, first_sum)
    o, _, _, _, last, last_sum = _LinearAttention.apply(*tensors, scale, chunk_size, eps)
    return o.to(dtype), RecurrentState(last, next_position(q, initial_state), last_sum)


_TABLES = {_linear_output: scan.OUTPUT, _linear_delta: scan.GRADIENTS, _linear_gradients: scan.GRADIENTS}
_FLOAT32 = ("inverse_ptr", "delta_ptr", "sums_ptr", "dsums_ptr", "first_ptr", "last_ptr", "rows_ptr")


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    for arch in (80, 90, 100):
        for width, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp32"))[: 4 if arch == 80 else 3]:
            key = arch, width, 2 if dtype == "bf16" else 4
            for kernel, table in _TABLES.items():
                yield build(kernel, arch, table[key], width, dtype, "causal", float32=_FLOAT32)
        shared: Any = dict(float32=_FLOAT32, products=False)
        yield build(_linear_sums, arch, scan.OUTPUT[arch, 128, 2], 128, "bf16", "keys", **shared)
        columns = Tile(_BLOCK_K, 0, 4, 1)
        for reverse in (False, True):
            variant = "reverse" if reverse else "forward"
            yield build(
                _linear_running, arch, columns, 128, "fp32", variant, BLOCK_N=_BLOCK_N, REVERSE=reverse, **shared
            )
