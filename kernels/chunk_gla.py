"""Gated linear attention in chunks: memories between chunks, outputs and gradients within them, and decoding.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

Within a chunk of C tokens, c the sums of g from its start and S the memory before it:

    o_i = scale * (q_i exp(c_i)) S + sum_{j <= i} A_ij v_j        A_ij = scale * sum_d q_i k_j exp(c_i - c_j)
    S_next = diag(exp(c_last)) S + sum_j (k_j exp(c_last - c_j)) v_j^T

exp(c_i - c_j) depends on the channel, so A is no single product. Let bit m be the highest in which i and j differ: i is
in the later half of a block of 2^(m+1) tokens, j in the earlier one. With b the last row of the earlier half, c_b lies
between c_j and c_i, and exp(c_i - c_b) and exp(c_b - c_j) scale the rows of one product that serves all pairs of that
level. The gradients take the same way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._recurrent import RecurrentState, next_position
from effkit.kernels._chunk_tiles import LENGTHS, ChunkTable, Tile, chunk_rows, load_block, pick, store_block
from effkit.kernels._common import LOG2E, AotSpec, cast, distinct, dot, unit_stride
from effkit.kernels._recurrent_ops import (
    SHORT,
    define,
    empty_memory,
    empty_output,
    for_each_head,
    groups,
    n_segments,
    strides,
    sum_heads,
)


@triton.jit
def _locate(blocks, H, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which batch row, head, block and first column this program owns: (b, h, block, column)."""
    tiles = tl.cdiv(WIDTH, BLOCK)
    column = tl.program_id(0) % tiles * BLOCK
    block = (tl.program_id(0) // tiles % blocks).to(tl.int64)
    bh = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    return bh // H, bh % H, block, column


# One program owns BLOCK_K channels of one chunk: it reads their gates once and writes the sums from the chunk's start,
# in units of log2. Rows behind the last token repeat its sum. A float32 sum of strong gates has an error of 1e-4, which
# shows in the difference between two weak neighbours: lost in the rounding of half-precision tensors, but not of
# float32 ones, for which what the rounding takes follows in a second part.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_decay(
    g_ptr, c_ptr, stride_gb, stride_gh, stride_gt, stride_gk, T, N, H,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, n, k = _locate(N, H, K, BLOCK_K)
    g_ptr += b * stride_gb + h * stride_gh + n * C * stride_gt + k * stride_gk
    g = load_block(g_ptr, stride_gt, stride_gk, T - n * C, K - k, C, BLOCK_K).to(tl.float32)
    g = tl.where(g < -110.0, -110.0, g)  # a factor of 0 as well; sums with -inf would have no differences
    c = tl.cumsum(g.to(tl.float64) * LOG2E, 0)
    hi = c.to(tl.float32)
    c_ptr += ((b * H + h) * N + n) * PARTS * C * K + k
    store_block(c_ptr, K, C, K - k, hi, C, BLOCK_K)
    if PARTS == 2:
        store_block(c_ptr + C * K, K, C, K - k, (c - hi.to(tl.float64)).to(tl.float32), C, BLOCK_K)


@triton.jit
def _sums(c_ptr, rows, channels, n_channels, K: tl.constexpr):
    """Sums of the gates at these rows and channels, one of them with a last axis of 1 or both."""
    return tl.load(c_ptr + rows * K + channels, mask=channels < n_channels, other=0.0)


@triton.jit
def _between(c_ptr, later, earlier, channels, n_channels, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """The log-decay from one row of a chunk to a later one, in units of log2; earlier None: from before the chunk."""
    exponent = _sums(c_ptr, later, channels, n_channels, K)
    if earlier is not None:
        exponent -= _sums(c_ptr, earlier, channels, n_channels, K)
    if PARTS == 2:
        exponent += _sums(c_ptr + C * K, later, channels, n_channels, K)
        if earlier is not None:
            exponent -= _sums(c_ptr + C * K, earlier, channels, n_channels, K)
    return exponent


@triton.jit
def _to_border(
    c_ptr, level, n_channels, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The decay between each token and the border in the middle of its block of 2^(level + 1) tokens, [C, BLOCK_K]."""
    rows = tl.arange(0, C)[:, None]
    border = (rows >> (level + 1) << (level + 1)) + (1 << level) - 1
    exponent = _between(c_ptr, rows, border, tl.arange(0, BLOCK_K)[None, :], n_channels, K, C, PARTS)
    return tl.exp2(tl.where(rows > border, 1.0, -1.0) * exponent)


@triton.jit
def _from_start(c_ptr, n_channels, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The decay from before the chunk to each token, [C, BLOCK_K]."""
    rows, channels = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_K)[None, :]
    return tl.exp2(_between(c_ptr, rows, None, channels, n_channels, K, C, PARTS))


@triton.jit
def _to_end(c_ptr, n_channels, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The decay from each token to the end of the chunk, [C, BLOCK_K]."""
    rows, channels = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_K)[None, :]
    return tl.exp2(_between(c_ptr, C - 1, rows, channels, n_channels, K, C, PARTS))


@triton.jit
def _across(c_ptr, channels, n_channels, K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """The decay from before the chunk to its end, of these channels."""
    return tl.exp2(_between(c_ptr, C - 1, None, channels, n_channels, K, C, PARTS))


@triton.jit
def _meet(level, C: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Whether query i and key j < i meet at this level: [i, j], or [j, i] with KEYS_FIRST.

    They do where they lie in neighbouring blocks of 2^level tokens, j's being the even one: one comparison a pair.
    """
    block = tl.arange(0, C) >> level
    behind = tl.where(block % 2 == 0, block + 1, -1)
    if KEYS_FIRST:
        met = behind[:, None] == block[None, :]
    else:
        met = block[:, None] == behind[None, :]
    return met


@triton.jit
def _advance(
    memory, a_ptr, b_ptr, c_ptr, stride_at, stride_bt, n_rows, n_keys, n_values, scale,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Take a tile of the memory past a chunk; in reverse its gradient, from behind the chunk to before it.

    EXACT: what rounding takes from the decayed keys joins in a second product. It would be the same for all values.
    """
    a = load_block(a_ptr, 1, stride_at, n_keys, n_rows, BLOCK_K, C)  # channels first: no product needs it turned
    b = load_block(b_ptr, stride_bt, 1, n_rows, n_values, C, BLOCK_V)
    channels, rows = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, C)[None, :]
    if REVERSE:
        exponent = _between(c_ptr, rows, None, channels, n_keys, K, C, PARTS)
    else:
        exponent = _between(c_ptr, C - 1, rows, channels, n_keys, K, C, PARTS)
    a = a.to(tl.float32) * (tl.exp2(exponent) * scale)
    rounded = cast(a, b.dtype)
    memory = dot(rounded, b, memory * _across(c_ptr, channels, n_keys, K, C, PARTS))
    if EXACT:
        memory = dot(cast(a - rounded.to(tl.float32), b.dtype), b, memory)
    return memory


@triton.jit
def _locate_tile(segments, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Which batch row, head, segment of chunks and tile of the memory this program owns: (b, h, segment, k, v)."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    b, h, block, v = _locate(segments * tiles_k, H, V, BLOCK_V)
    return b, h, block // tiles_k, block % tiles_k * BLOCK_K, v


@triton.jit
def _at(m, N, REVERSE: tl.constexpr):
    """The chunk that is the m-th on the way."""
    n = tl.cast(m, tl.int64)
    if REVERSE:
        n = N - 1 - n
    return n


# One program owns a tile of one head's memory and one segment of chunks: it reads their keys and values (in reverse:
# queries and cotangents) and writes what the segment adds to the memory, and by how much each channel decays in it.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_segments(
    a_ptr, b_ptr, c_ptr, ends_ptr, factors_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    T, N, H, a_group, b_group, segments, length, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, segment, k, v = _locate_tile(segments, H, K, V, BLOCK_K, BLOCK_V)
    a_ptr += b * stride_ab + h // a_group * stride_ah + k
    b_ptr += b * stride_bb + h // b_group * stride_bh + v
    c_ptr += (b * H + h) * N * PARTS * C * K + k
    channels = tl.arange(0, BLOCK_K)
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    factor = tl.full([BLOCK_K], 1.0, tl.float32)
    for m in range(segment * length, tl.minimum((segment + 1) * length, N)):
        n = _at(m, N, REVERSE)
        chunk_ptr = c_ptr + n * PARTS * C * K
        memory = _advance(
            memory, a_ptr + n * C * stride_at, b_ptr + n * C * stride_bt, chunk_ptr,
            stride_at, stride_bt, T - n * C, K - k, V - v, scale, K, C, PARTS, REVERSE, EXACT, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        factor *= _across(chunk_ptr, channels, K - k, K, C, PARTS)
    at = (b * H + h) * segments + segment
    store_block(ends_ptr + (at * K + k) * V + v, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
    tl.store(factors_ptr + at * K + k + channels, factor, mask=(channels < K - k) & (v == 0))


# One program owns a tile of one head's memory and one segment of chunks. It adds up what the segments before its own
# left behind, then goes from chunk to chunk: it reads their keys and values and writes the memory before each. In
# reverse it reads queries and cotangents, and writes the gradient of the memory behind each chunk. The last segment
# also writes what is left in the end.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_memories(
    a_ptr, b_ptr, c_ptr, first_ptr, ends_ptr, factors_ptr, memories_ptr, last_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    T, N, H, a_group, b_group, segments, length, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, segment, k, v = _locate_tile(segments, H, K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    a_ptr += b * stride_ab + h // a_group * stride_ah + k
    b_ptr += b * stride_bb + h // b_group * stride_bh + v
    c_ptr += bh * N * PARTS * C * K + k
    tile = k * V + v
    channels = tl.arange(0, BLOCK_K)
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + bh * K * V + tile, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
    if ends_ptr is not None:
        for earlier in range(0, segment):
            at = bh * segments + earlier
            factor = tl.load(factors_ptr + at * K + k + channels, mask=channels < K - k, other=0.0)
            memory *= factor[:, None]
            memory += load_block(ends_ptr + at * K * V + tile, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
    for m in range(segment * length, tl.minimum((segment + 1) * length, N)):
        n = _at(m, N, REVERSE)
        store_block(memories_ptr + (bh * N + n) * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
        memory = _advance(
            memory, a_ptr + n * C * stride_at, b_ptr + n * C * stride_bt, c_ptr + n * PARTS * C * K,
            stride_at, stride_bt, T - n * C, K - k, V - v, scale, K, C, PARTS, REVERSE, EXACT, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    if segment == segments - 1:
        store_block(last_ptr + bh * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a chunk of one head and BLOCK_V of its outputs: it makes the C x C weights from queries and keys, a
# tile of channels at a time, and takes the values and the memory before the chunk through them. In reverse queries and
# keys change places, and the cotangents and the gradient of the memory behind the chunk give dv. The weights are made
# once for each tile of outputs, so BLOCK_V is wide; BLOCK_K is what the registers leave.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_output(
    a_ptr, b_ptr, x_ptr, c_ptr, memories_ptr, y_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt,
    T, N, H, a_group, b_group, x_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    batch, h, n, v = _locate(N, H, V, BLOCK_V)
    start = n * C
    n_rows = T - start
    a_ptr += batch * stride_ab + h // a_group * stride_ah + start * stride_at
    b_ptr += batch * stride_bb + h // b_group * stride_bh + start * stride_bt
    x_ptr += batch * stride_xb + h // x_group * stride_xh + start * stride_xt + v
    y_ptr += batch * stride_yb + h * stride_yh + start * stride_yt + v
    at = (batch * H + h) * N + n
    c_ptr += at * PARTS * C * K
    memories_ptr += at * K * V + v
    rows = tl.arange(0, C)
    weights = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    y = tl.zeros([C, BLOCK_V], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_block(a_ptr + k, stride_at, 1, n_rows, K - k, C, BLOCK_K)
        b = load_block(b_ptr + k, stride_bt, 1, n_rows, K - k, C, BLOCK_K)
        memory = load_block(memories_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
        own += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        for level in range(LEVELS):
            decay = _to_border(c_ptr + k, level, K - k, K, C, PARTS, BLOCK_K)
            products = dot(cast(a.to(tl.float32) * decay, a.dtype), tl.trans(cast(b.to(tl.float32) * decay, b.dtype)))
            weights += tl.where(_meet(level, C, REVERSE), products, 0.0)
        if REVERSE:  # the gradient of the memory has the scale in it
            decay = _to_end(c_ptr + k, K - k, K, C, PARTS, BLOCK_K)
        else:
            decay = _from_start(c_ptr + k, K - k, K, C, PARTS, BLOCK_K) * scale
        y = dot(cast(a.to(tl.float32) * decay, a.dtype), cast(memory.to(tl.float32), a.dtype), y)
    x = load_block(x_ptr, stride_xt, 1, n_rows, V - v, C, BLOCK_V)
    weights += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
    y = dot(cast(weights * scale, x.dtype), x, y)
    store_block(y_ptr, stride_yt, n_rows, V - v, y, C, BLOCK_V)


@triton.jit
def _gradients_from_values(
    v_ptr, do_ptr, memories_ptr, dmemories_ptr, stride_vt, stride_dot, n_rows, n_keys,
    V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """All that is a sum over values: do S^T, v dS^T, <S, dS> of each channel, do v^T, v do^T and do . v."""
    read = tl.zeros([C, BLOCK_K], tl.float32)
    written = tl.zeros([C, BLOCK_K], tl.float32)
    kept = tl.zeros([BLOCK_K], tl.float32)
    dweights = tl.zeros([C, C], tl.float32)
    dweights_t = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for w in range(0, V, BLOCK_V):
        v = load_block(v_ptr + w, stride_vt, 1, n_rows, V - w, C, BLOCK_V)
        do = load_block(do_ptr + w, stride_dot, 1, n_rows, V - w, C, BLOCK_V)
        memory = load_block(memories_ptr + w, 1, V, V - w, n_keys, BLOCK_V, BLOCK_K)
        dmemory = load_block(dmemories_ptr + w, 1, V, V - w, n_keys, BLOCK_V, BLOCK_K)
        read = dot(do, cast(memory, do.dtype), read)
        written = dot(v, cast(dmemory, v.dtype), written)
        kept += tl.sum(memory * dmemory, 0)
        dweights = dot(do, tl.trans(v), dweights)
        dweights_t = dot(v, tl.trans(do), dweights_t)
        own += tl.sum(do.to(tl.float32) * v.to(tl.float32), 1)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    return read, written, kept, cast(dweights, dtype), cast(dweights_t, dtype), own


# One program owns a chunk of one head and BLOCK_K of its channels, for which it writes dq, dk and dg. It multiplies
# values and cotangents to the gradients of the C x C weights, both ways around, so that no product is turned, and takes
# them back through the levels. dg_t is what passes from before t to t or behind it: what t and later tokens read from
# the memory before the chunk, what earlier ones write into the memory behind it, what goes through, and of the pairs
# within the chunk the sum over i >= t of q_i dq_i - k_i dk_i, where pairs behind t cancel. A token's product with
# itself passes no gate, and joins dq and dk last.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memories_ptr, dmemories_ptr, dq_ptr, dk_ptr, dg_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt,
    stride_dgb, stride_dgh, stride_dgt,
    T, N, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, column = _locate(N, H, K, BLOCK_K)
    start = n * C
    n_rows, n_keys = T - start, K - column
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt + column
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt + column
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    do_ptr += b * stride_dob + h * stride_doh + start * stride_dot
    at = (b * H + h) * N + n
    c_ptr += at * PARTS * C * K + column
    memories_ptr += (at * K + column) * V
    dmemories_ptr += (at * K + column) * V
    dq, dk, kept, dweights, dweights_t, own = _gradients_from_values(
        v_ptr, do_ptr, memories_ptr, dmemories_ptr, stride_vt, stride_dot, n_rows, n_keys, V, C, BLOCK_K, BLOCK_V
    )
    q = load_block(q_ptr, stride_qt, 1, n_rows, n_keys, C, BLOCK_K)
    k = load_block(k_ptr, stride_kt, 1, n_rows, n_keys, C, BLOCK_K)
    dq *= _from_start(c_ptr, n_keys, K, C, PARTS, BLOCK_K)
    dk *= _to_end(c_ptr, n_keys, K, C, PARTS, BLOCK_K)
    written = k.to(tl.float32) * dk
    kept *= _across(c_ptr, tl.arange(0, BLOCK_K), n_keys, K, C, PARTS)
    dg = tl.cumsum(written, 0) - written + kept[None, :]
    for level in range(LEVELS):
        decay = _to_border(c_ptr, level, n_keys, K, C, PARTS, BLOCK_K)
        d = tl.where(_meet(level, C, KEYS_FIRST=False), dweights, 0.0)
        dq += decay * dot(d, cast(k.to(tl.float32) * decay, d.dtype))
        d = tl.where(_meet(level, C, KEYS_FIRST=True), dweights_t, 0.0)
        dk += decay * dot(d, cast(q.to(tl.float32) * (decay * scale), d.dtype))
    scaled_q, wide_k = q.to(tl.float32) * scale, k.to(tl.float32)
    dg += tl.cumsum(scaled_q * dq - (wide_k * dk - written), 0, reverse=True)
    dq = (dq + own[:, None] * wide_k) * scale
    dk += own[:, None] * scaled_q
    dq_ptr += b * stride_dqb + h * stride_dqh + start * stride_dqt + column
    dk_ptr += b * stride_dkb + h * stride_dkh + start * stride_dkt + column
    dg_ptr += b * stride_dgb + h * stride_dgh + start * stride_dgt + column
    store_block(dq_ptr, stride_dqt, n_rows, n_keys, dq, C, BLOCK_K)
    store_block(dk_ptr, stride_dkt, n_rows, n_keys, dk, C, BLOCK_K)
    store_block(dg_ptr, stride_dgt, n_rows, n_keys, dg, C, BLOCK_K)


# Few tokens, one after the other. One program owns BLOCK_V columns of one head's memory: it reads them once, keeps them
# while the tokens pass, and writes them once. It holds all keys of a column, so that an output needs no other program.
@triton.jit(do_not_specialize=LENGTHS)
def _gla_recurrence(
    q_ptr, k_ptr, v_ptr, g_ptr, first_ptr, o_ptr, last_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_gk, stride_ob, stride_oh, stride_ot,
    T, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, v = _locate(1, H, V, BLOCK_V)
    q_ptr += b * stride_qb + h // q_group * stride_qh
    k_ptr += b * stride_kb + h // k_group * stride_kh
    v_ptr += b * stride_vb + h // v_group * stride_vh + v
    g_ptr += b * stride_gb + h * stride_gh
    o_ptr += b * stride_ob + h * stride_oh + v
    at = (b * H + h) * K * V + v
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + at, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    for t in range(0, T):
        q = load_block(q_ptr + t * stride_qt, 1, 0, K, 1, BLOCK_K, 1).to(tl.float32)  # [BLOCK_K, 1]
        k = load_block(k_ptr + t * stride_kt, 1, 0, K, 1, BLOCK_K, 1).to(tl.float32)
        g = load_block(g_ptr + t * stride_gt, stride_gk, 0, K, 1, BLOCK_K, 1).to(tl.float32)
        values = load_block(v_ptr + t * stride_vt, 0, 1, 1, V - v, 1, BLOCK_V).to(tl.float32)  # [1, BLOCK_V]
        memory = memory * tl.exp(g) + k * values
        o = tl.sum(memory * (q * scale), 0)[None, :]
        store_block(o_ptr + t * stride_ot, 0, 1, V - v, o, 1, BLOCK_V)
    store_block(last_ptr + at, V, K, V - v, memory, BLOCK_K, BLOCK_V)


_COLUMN_ELEMENTS = 4096  # of the memory that one program of the recurrence holds
_DECAY_CHANNELS = 64


def _table(half: dict[int, Tile], single: Tile) -> ChunkTable:
    """Tiles by architecture for half precision, and one for float32, the same at all widths."""
    return {
        (arch, width, size): half[arch] if size == 2 else single
        for arch in (80, 90, 100)
        for width in (64, 128, 256)
        for size in (2, 4)
    }


# Chosen as the largest that compile without spills, not timed on a device. Channels are what costs registers: of each
# tile of them the decays, queries, keys and their decayed forms are alive at a time.
MEMORIES = _table(dict.fromkeys((80, 90, 100), Tile(64, 64, 4, 2)), Tile(32, 32, 4, 1))
OUTPUT = _table(
    {80: Tile(32, 64, 8, 2), 90: Tile(32, 128, 8, 2), 100: Tile(32, 128, 8, 2)}, Tile(32, 32, 8, 1)
)  # fmt: skip
GRADIENTS = _table(
    {80: Tile(16, 64, 8, 2), 90: Tile(32, 64, 8, 2), 100: Tile(32, 64, 8, 2)}, Tile(16, 32, 8, 1)
)  # fmt: skip


def _decay_sums(q: Tensor, g: Tensor, chunk_size: int) -> Tensor:
    """Sums of log-decays g [B, H, T, K] from the start of each chunk: [B, H, N, 1 or 2 parts, C, K]."""
    B, H, T, K = g.shape
    C = chunk_rows(T, chunk_size)
    c = g.new_empty(B, H, triton.cdiv(T, C), 2 if q.dtype == torch.float32 else 1, C, K, dtype=torch.float32)
    block = min(_DECAY_CHANNELS, max(16, triton.next_power_of_2(K)))
    _gla_decay[B * H * c.shape[2] * triton.cdiv(K, block),](
        g, c, *g.stride(), T, c.shape[2], H, K=K, C=C, PARTS=c.shape[3], BLOCK_K=block, num_warps=4
    )  # fmt: skip
    return c


def _chunk(c: Tensor) -> dict[str, int]:
    """The tokens of a chunk and the parts of its sums."""
    return {"C": c.shape[4], "PARTS": c.shape[3]}


def _levels(c: Tensor) -> dict[str, int]:
    """How often a chunk can be halved."""
    return {"LEVELS": c.shape[4].bit_length() - 1}


def _scan(
    a: Tensor, b: Tensor, c: Tensor, first: Tensor | None, last: Tensor, scale: float, dtype: torch.dtype,
    *, reverse: bool,
) -> Tensor:  # fmt: skip
    """The memories before each chunk, [B, H, N, K, V], and into last; in reverse the gradients behind each.

    Where the heads alone would leave most of the device idle, the chunks are cut into segments that run side by side:
    one more pass over a and b finds what each leaves behind.
    """
    B, H, N, _, _, K = c.shape
    V = b.shape[3]
    memories = c.new_empty(B, H, N, K, V, dtype=dtype)
    tile = pick(MEMORIES, a, b)
    programs = B * H * triton.cdiv(K, tile.BLOCK_K) * triton.cdiv(V, tile.BLOCK_V)
    length = triton.cdiv(N, n_segments(N, programs, a.device))
    segments = triton.cdiv(N, length)
    shared = dict(
        T=a.shape[2], N=N, H=H, a_group=H // a.shape[1], b_group=H // b.shape[1], segments=segments, length=length,
        scale=scale, K=K, V=V, REVERSE=reverse, EXACT=dtype != a.dtype, **_chunk(c), **tile._asdict(),
    )  # fmt: skip
    ends = factors = None
    if segments > 1:
        ends = last.new_empty(B, H, segments, K, V)
        factors = last.new_empty(B, H, segments, K)
        _gla_segments[programs * segments,](a, b, c, ends, factors, *strides(a, b), **shared)
    _gla_memories[programs * segments,](
        a, b, c, first, ends, factors, memories, last, *strides(a, b), **shared
    )  # fmt: skip
    return memories


def _output(
    a: Tensor, b: Tensor, x: Tensor, c: Tensor, memories: Tensor, y: Tensor, scale: float, *, reverse: bool
) -> None:
    """Fill y [B, H, T, V] with o, or in reverse with dv."""
    B, H, N, K, V = memories.shape
    tile = pick(OUTPUT, a, x)
    _gla_output[B * H * N * triton.cdiv(V, tile.BLOCK_V),](
        a, b, x, c, memories, y, *strides(a, b, x, y), a.shape[2], N, H, *groups(H, a, b, x), scale,
        K=K, V=V, REVERSE=reverse, **_chunk(c), **_levels(c), **tile._asdict(),
    )  # fmt: skip


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, o: Tensor, last: Tensor, scale: float
) -> None:
    """Fill o and last, token by token."""
    B, H, T, V = o.shape
    block_k = max(16, triton.next_power_of_2(q.shape[3]))
    block_v = min(max(16, _COLUMN_ELEMENTS // block_k), max(16, triton.next_power_of_2(V)))
    _gla_recurrence[B * H * triton.cdiv(V, block_v),](
        q, k, v, g, first, o, last, *strides(q, k, v), *g.stride(), *strides(o), T, H, *groups(H, q, k, v), scale,
        K=q.shape[3], V=V, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, last = _fake_forward(q, k, v, g, first, scale, chunk_size)
    first = None if first is None else first.float().contiguous()
    if not o.numel():
        return o, last.zero_() if first is None else last.copy_(first)
    with torch.cuda.device_of(q):
        if q.shape[2] < SHORT:
            _recur(q, k, v, g, first, o, last, scale)
        else:
            c = _decay_sums(q, g, chunk_size)
            memories = _scan(k, v, c, first, last, 1.0, q.dtype, reverse=False)
            _output(q, k, v, c, memories, o, scale, reverse=False)
    return o, last


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    o = empty_output(q, k, v)
    return o, empty_memory(q, v, o.shape[1])


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None,
    scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The memories are made anew instead of kept, and in full float32: dg has sums of their products over all values,
    on which half precision leaves too much error.
    """
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    dq, dk, dv, dg, dfirst = _fake_backward(do, dlast, q, k, v, g, first, scale, chunk_size)
    first, dlast = (None if x is None else x.float().contiguous() for x in (first, dlast))
    if not do.numel():
        return dq, dk, dv, dg, dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
    (B, H, T, V), K = do.shape, q.shape[3]
    each = [for_each_head(dx, H) for dx in (dq, dk, dv)]
    tile = pick(GRADIENTS, q, v)
    with torch.cuda.device_of(q):
        c = _decay_sums(q, g, chunk_size)
        memories = _scan(k, v, c, first, torch.empty_like(dfirst), 1.0, torch.float32, reverse=False)
        dmemories = _scan(q, do, c, dlast, dfirst, scale, torch.float32, reverse=True)
        _output(k, q, do, c, dmemories, each[2], scale, reverse=True)
        _gla_gradients[B * H * c.shape[2] * triton.cdiv(K, tile.BLOCK_K),](
            q, k, v, do, c, memories, dmemories, *each[:2], dg, *strides(q, k, v, do, *each[:2], dg),
            T, c.shape[2], H, *groups(H, q, k, v), scale, K=K, V=V, **_chunk(c), **_levels(c), **tile._asdict(),
        )  # fmt: skip
    for dx, heads in zip((dq, dk, dv), each, strict=True):
        sum_heads(dx, heads)
    return dq, dk, dv, dg, dfirst


def _fake_backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None,
    scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    return dq, dk, dv, g.new_empty(g.shape), empty_memory(q, v, do.shape[1])


_OPTIONS = "float scale, int chunk_size"
_forward_op = define(
    "gated_linear_attention_forward",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? first",
    _OPTIONS,
    "Tensor o, Tensor last",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "gated_linear_attention_backward",
    "Tensor do, Tensor? dlast, Tensor q, Tensor k, Tensor v, Tensor g, Tensor? first",
    _OPTIONS,
    "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dfirst",
    _backward,
    _fake_backward,
)


class _GatedLinearAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, scale: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(q, k, v, g, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, first = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        *grads, dfirst = _GatedLinearAttentionBackward.apply(do, dlast, q, k, v, g, first, ctx.scale, ctx.chunk_size)
        return *grads, None if first is None else dfirst.to(first.dtype), None, None


class _GatedLinearAttentionBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None,
        scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(do, dlast, q, k, v, g, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            'the kernels of gated_linear_attention have no second derivative; backend="reference" has'
        )


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.gated_linear_attention, which documents and has checked the arguments."""
    first = None if initial_state is None else initial_state.memory
    o, last = _GatedLinearAttention.apply(*distinct(q, k, v, g, first), scale, chunk_size)
    return o, RecurrentState(last, next_position(q, initial_state))


_FLOAT32_POINTERS = (
    "c_ptr", "first_ptr", "last_ptr", "ends_ptr", "factors_ptr", "g_ptr", "dg_ptr", "dmemories_ptr",
)  # fmt: skip


def _spec(kernel: Any, tile: Tile, arch: int, width: int, dtype: str, pass_: str = "", **constants: Any) -> AotSpec:
    """One build, for keys and values of one width in chunks of 64; the backward pass has memories in float32."""
    parts = 2 if dtype == "fp32" else 1
    known = {"K": width, "V": width, "C": 64, "PARTS": parts, "LEVELS": 6, **tile._asdict(), **constants}
    known["BLOCK_V"] = min(tile.BLOCK_V, width)
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    known |= {name: None for name in ("ends_ptr", "factors_ptr") if width == 64 and kernel is _gla_memories}
    known["EXACT"] = pass_ != "" and dtype != "fp32"
    known = {name: value for name, value in known.items() if name in kernel.arg_names}
    wide = _FLOAT32_POINTERS if pass_ == "" else (*_FLOAT32_POINTERS, "memories_ptr")
    types |= {name: "*fp32" if name in wide else f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    name = "-".join([kernel.__name__.lstrip("_"), str(width), dtype, *([pass_] if pass_ else [])])
    products = kernel in (_gla_segments, _gla_memories, _gla_output, _gla_gradients)
    needs = ("wgmma",) if arch == 90 and dtype == "bf16" and products else ()
    return AotSpec(name, kernel, types, known, tile.num_warps, tile.num_stages, arch, needs)


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    half = [(64, "bf16"), (128, "bf16"), (256, "bf16")]
    # float32 has the same tiles and the same instructions everywhere: one architecture speaks for all.
    for arch, builds in (80, [*half, (64, "fp32")]), (90, half), (100, half):
        for width, dtype in builds:
            key = arch, width, 2 if dtype == "bf16" else 4
            yield _spec(_gla_memories, MEMORIES[key], arch, width, dtype, REVERSE=False)
            yield _spec(_gla_memories, MEMORIES[key], arch, width, dtype, "again", REVERSE=False)
            yield _spec(_gla_memories, MEMORIES[key], arch, width, dtype, "backward", REVERSE=True)
            yield _spec(_gla_segments, MEMORIES[key], arch, width, dtype, "backward", REVERSE=True)
            yield _spec(_gla_output, OUTPUT[key], arch, width, dtype, REVERSE=False)
            yield _spec(_gla_output, OUTPUT[key], arch, width, dtype, "backward", REVERSE=True)
            yield _spec(_gla_gradients, GRADIENTS[key], arch, width, dtype, "backward")
        yield _spec(_gla_decay, Tile(_DECAY_CHANNELS, 0, 4, 1), arch, 128, "bf16")
        yield _spec(_gla_recurrence, Tile(128, _COLUMN_ELEMENTS // 128, 4, 1), arch, 128, "bf16")
