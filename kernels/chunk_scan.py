"""The scalar-gated recurrence in chunks: memories between chunks, outputs and gradients within them, and decoding.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

Within a chunk of C tokens, c the sums of g from its start and S the memory before it:

    o_i = scale * (exp(c_i) q_i S + sum_{j <= i} exp(c_i - c_j) (q_i k_j) v_j)
    S_next = exp(c_last) S + sum_j exp(c_last - c_j) k_j v_j^T

The gradient G of a memory runs backwards in the same form,

    G_before = exp(c_last) G + scale * sum_i exp(c_i) q_i do_i^T

and dq, dk and dv are each a product within the chunk plus one with S or G.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._recurrent import RecurrentState, next_position
from effkit.attention.retnet import spread
from effkit.kernels._chunk_tiles import (
    LENGTHS,
    WIDTHS,
    ChunkTable,
    Tile,
    across,
    build,
    chunk_decay,
    chunk_rows,
    decay_build,
    from_start,
    load_block,
    pick,
    row_products,
    store_block,
    store_row,
    summary,
    to_end,
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
    n_segments,
    strides,
    sum_heads,
)


@triton.jit
def _locate(
    segments, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Which batch row and head, segment of chunks and tile of the memory this program owns: (b, h, segment, k, v)."""
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles = tl.cdiv(K, BLOCK_K) * tiles_v
    tile = tl.program_id(0) % tiles
    segment = tl.program_id(0) // tiles % segments
    bh = (tl.program_id(0) // tiles // segments).to(tl.int64)
    return bh // H, bh % H, segment, tile // tiles_v * BLOCK_K, tile % tiles_v * BLOCK_V


@triton.jit
def _advance(
    memory, a_ptr, b_ptr, c_ptr, rows_ptr, stride_at, stride_bt, n, T, k, v, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Take a tile of the memory past chunk n; in reverse its gradient, from behind the chunk to before it."""
    start = tl.cast(n, tl.int64) * C
    a = load_block(a_ptr + start * stride_at + k, stride_at, 1, T - start, K - k, C, BLOCK_K)
    b = load_block(b_ptr + start * stride_bt + v, stride_bt, 1, T - start, V - v, C, BLOCK_V)
    if rows_ptr is not None:
        i = tl.arange(0, C)
        memory += scale * summary(a, b, tl.load(rows_ptr + start + i, mask=i < T - start, other=0.0))
    elif c_ptr is None:
        memory += scale * summary(a, b, None)
    else:
        chunk_ptr = c_ptr + 2 * start
        if REVERSE:
            weight = from_start(chunk_ptr, C)
        else:
            weight = to_end(chunk_ptr, C)
        memory = across(chunk_ptr, C) * memory + scale * summary(a, b, weight)
    return memory


# One program owns a tile of one head's memory and one segment of chunks: it reads their keys and values (in reverse:
# queries and cotangents) and writes what the segment adds to the memory, and by how much it lets an earlier one decay.
@triton.jit(do_not_specialize=LENGTHS)
def _chunk_segments(
    a_ptr, b_ptr, c_ptr, rows_ptr, ends_ptr, factors_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    T, N, H, a_group, b_group, segments, length, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, segment, k, v = _locate(segments, H, K, V, BLOCK_K, BLOCK_V)
    a_ptr += b * stride_ab + h // a_group * stride_ah
    b_ptr += b * stride_bb + h // b_group * stride_bh
    if c_ptr is not None:
        c_ptr += (b * H + h) * N * 2 * C
    if rows_ptr is not None:
        rows_ptr += (b * H + h) * T
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    first = segment * length
    stop = tl.minimum(first + length, N)
    for m in range(first, stop):
        n = m
        if REVERSE:
            n = N - 1 - m
        memory = _advance(
            memory, a_ptr, b_ptr, c_ptr, rows_ptr, stride_at, stride_bt, n, T, k, v, scale,
            K, V, C, BLOCK_K, BLOCK_V, REVERSE,
        )  # fmt: skip
    at = (b * H + h) * segments + segment
    store_block(ends_ptr + at * K * V + k * V + v, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
    if factors_ptr is not None:
        total = tl.zeros([64], tl.float32)
        for m in range(first, stop, 64):
            chunks = m + tl.arange(0, 64)
            last_ptrs = c_ptr + tl.where(REVERSE, N - 1 - chunks, chunks).to(tl.int64) * 2 * C + C - 1
            total += tl.load(last_ptrs, mask=chunks < stop, other=0.0)
            total += tl.load(last_ptrs + C, mask=chunks < stop, other=0.0)
        tl.store(factors_ptr + at, tl.exp(tl.sum(total)), mask=k + v == 0)


# One program owns a tile of one head's memory and one segment of chunks. It adds up what the segments before its own
# left behind, then goes from chunk to chunk, and writes the memory before each (in reverse: the gradient of the memory
# behind each); the last segment also writes what is left in the end. The tile is square, as a product reads
# BLOCK_K + BLOCK_V columns, and as large as leaves the accumulator in registers.
@triton.jit(do_not_specialize=LENGTHS)
def _chunk_memories(
    a_ptr, b_ptr, c_ptr, rows_ptr, first_ptr, ends_ptr, factors_ptr, memories_ptr, last_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    T, N, H, a_group, b_group, segments, length, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, segment, k, v = _locate(segments, H, K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    a_ptr += b * stride_ab + h // a_group * stride_ah
    b_ptr += b * stride_bb + h // b_group * stride_bh
    tile = k * V + v
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + bh * K * V + tile, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
    if ends_ptr is not None:
        for earlier in range(0, segment):
            at = bh * segments + earlier
            if factors_ptr is not None:
                memory *= tl.load(factors_ptr + at)
            memory += load_block(ends_ptr + at * K * V + tile, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
    if c_ptr is not None:
        c_ptr += bh * N * 2 * C
    if rows_ptr is not None:
        rows_ptr += bh * T
    first = segment * length
    for m in range(first, tl.minimum(first + length, N)):
        n = m
        if REVERSE:
            n = N - 1 - m
        store_block(memories_ptr + (bh * N + n) * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
        memory = _advance(
            memory, a_ptr, b_ptr, c_ptr, rows_ptr, stride_at, stride_bt, n, T, k, v, scale,
            K, V, C, BLOCK_K, BLOCK_V, REVERSE,
        )  # fmt: skip
    if segment == segments - 1:
        store_block(last_ptr + bh * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a chunk of one head: it makes the C x C scores once, and from them and the memory before the chunk
# writes the outputs, BLOCK_V columns at a time.
@triton.jit(do_not_specialize=LENGTHS)
def _chunk_output(
    q_ptr, k_ptr, v_ptr, c_ptr, memories_ptr, o_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    T, N, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = _locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    n_rows = T - start
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    o_ptr += b * stride_ob + h * stride_oh + start * stride_ot
    from_memory = tl.full([C], scale, tl.float32)
    if c_ptr is not None:
        c_ptr += at * 2 * C
        from_memory *= from_start(c_ptr, C)
    scores = row_products(q_ptr, k_ptr, stride_qt, stride_kt, n_rows, K, C, BLOCK_K)
    weights = cast(scale * weighted(scores, c_ptr, C, KEYS_FIRST=False), q_ptr.dtype.element_ty)
    write_rows(
        o_ptr, weights, v_ptr, from_memory, q_ptr, memories_ptr + at * K * V, None, None, None,
        stride_ot, stride_vt, stride_qt, V, 1, 0, n_rows, K, V, C, BLOCK_K, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _overlap(x_ptr, y_ptr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """The sum of the products of two memories, element by element."""
    products = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for k in range(0, K, BLOCK_K):
        for v in range(0, V, BLOCK_V):
            x = load_block(x_ptr + k * V + v, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            y = load_block(y_ptr + k * V + v, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            products += x.to(tl.float32) * y.to(tl.float32)
    return tl.sum(products)


@triton.jit
def _query_gradient(
    dq_ptr, dg_ptr, q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memory_ptr,
    stride_dqt, stride_qt, stride_kt, stride_vt, stride_dot, n_rows, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq of a chunk, and what the gates decay of what its queries read of the memory before it."""
    from_memory = tl.full([C], scale, tl.float32)
    if c_ptr is not None:
        from_memory *= from_start(c_ptr, C)
    dpairs = row_products(do_ptr, v_ptr, stride_dot, stride_vt, n_rows, V, C, BLOCK_V)  # [queries, keys]
    weights = cast(scale * weighted(dpairs, c_ptr, C, KEYS_FIRST=False), k_ptr.dtype.element_ty)
    read = write_rows(
        dq_ptr, weights, k_ptr, from_memory, do_ptr, memory_ptr, q_ptr, None, None,
        stride_dqt, stride_kt, stride_dot, 1, V, stride_qt, n_rows, V, K, C, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    if c_ptr is not None:
        store_row(dg_ptr, tl.cumsum(read, 0, reverse=True), n_rows, C)


@triton.jit
def _key_gradient(
    dk_ptr, dg_ptr, q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memory_ptr, dmemory_ptr,
    stride_dkt, stride_qt, stride_kt, stride_vt, stride_dot, n_rows, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk of a chunk, and what its gates decay between its pairs and of the memory behind it."""
    dpairs = row_products(v_ptr, do_ptr, stride_vt, stride_dot, n_rows, V, C, BLOCK_V)  # [keys, queries]
    weights = scale * weighted(dpairs, c_ptr, C, KEYS_FIRST=True)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if c_ptr is None:
        into_memory = tl.full([C], 1.0, tl.float32)
        write_rows(
            dk_ptr, cast(weights, dtype), q_ptr, into_memory, v_ptr, dmemory_ptr, None, None, None,
            stride_dkt, stride_qt, stride_vt, 1, V, 0, n_rows, V, K, C, BLOCK_V, BLOCK_K,
        )  # fmt: skip
    else:
        i = tl.arange(0, C)
        pairs = row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K)
        pairs = tl.where(i[:, None] < i[None, :], pairs * weights, 0.0)
        dg = tl.cumsum(tl.sum(pairs, 0) - tl.sum(pairs, 1), 0, reverse=True)
        written = write_rows(
            dk_ptr, cast(weights, dtype), q_ptr, to_end(c_ptr, C), v_ptr, dmemory_ptr, k_ptr, None, None,
            stride_dkt, stride_qt, stride_vt, 1, V, stride_kt, n_rows, V, K, C, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        dg += tl.cumsum(written, 0) - written
        dg += across(c_ptr, C) * _overlap(memory_ptr, dmemory_ptr, K, V, BLOCK_K, BLOCK_V)
        store_row(dg_ptr, dg, n_rows, C)


@triton.jit
def _value_gradient(
    dv_ptr, q_ptr, k_ptr, do_ptr, c_ptr, dmemory_ptr,
    stride_dvt, stride_qt, stride_kt, stride_dot, n_rows, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv of a chunk."""
    into_memory = tl.full([C], 1.0, tl.float32)
    if c_ptr is not None:
        into_memory = to_end(c_ptr, C)
    pairs = row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K)  # [keys, queries]
    weights = cast(scale * weighted(pairs, c_ptr, C, KEYS_FIRST=True), do_ptr.dtype.element_ty)
    write_rows(
        dv_ptr, weights, do_ptr, into_memory, k_ptr, dmemory_ptr, None, None, None,
        stride_dvt, stride_dot, stride_kt, V, 1, 0, n_rows, K, V, C, BLOCK_K, BLOCK_V,
    )  # fmt: skip


# Three programs share a chunk of one head and run side by side, so that one finds in the cache what another read: the
# first writes dq, the second dk, the third dv. Each holds one accumulator; a product that is needed transposed is made
# from its operands.
#
# The gates need no products of their own. A factor exp(c_i) sits on q_i and exp(-c_j) on k_j, so what a gate at t adds
# to all pairs j < t <= i is the sum over i >= t of (row sum - column sum) of pairs * their gradients, without the
# diagonal, which no gate touches; likewise it decays what queries i >= t read of the memory before the chunk, what keys
# j < t add to the memory behind it, and the one memory within the other. The part of the queries and the rest go to
# dg [2, B, H, T].
@triton.jit(do_not_specialize=LENGTHS)
def _chunk_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memories_ptr, dmemories_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt, stride_dg,
    T, N, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, place, _, _ = _locate(3 * N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    n = place // 3
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    n_rows = T - start
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    do_ptr += b * stride_dob + h * stride_doh + start * stride_dot
    memories_ptr += at * K * V
    dmemories_ptr += at * K * V
    if c_ptr is not None:
        c_ptr += at * 2 * C
        dg_ptr += (b * H + h) * T + start
    if place % 3 == 0:
        _query_gradient(
            dq_ptr + b * stride_dqb + h * stride_dqh + start * stride_dqt, dg_ptr,
            q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memories_ptr,
            stride_dqt, stride_qt, stride_kt, stride_vt, stride_dot, n_rows, scale, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    elif place % 3 == 1:
        if c_ptr is not None:
            dg_ptr += stride_dg
        _key_gradient(
            dk_ptr + b * stride_dkb + h * stride_dkh + start * stride_dkt, dg_ptr,
            q_ptr, k_ptr, v_ptr, do_ptr, c_ptr, memories_ptr, dmemories_ptr,
            stride_dkt, stride_qt, stride_kt, stride_vt, stride_dot, n_rows, scale, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    else:
        _value_gradient(
            dv_ptr + b * stride_dvb + h * stride_dvh + start * stride_dvt,
            q_ptr, k_ptr, do_ptr, c_ptr, dmemories_ptr,
            stride_dvt, stride_qt, stride_kt, stride_dot, n_rows, scale, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip


# One program owns BLOCK_V columns of one head's memory: it reads them once, takes the tokens one by one, and writes
# them once. With a sum of keys (linear attention) it divides by what the query finds there. All keys of a column are in
# the program, so that an output needs no other; the tile fills its registers.
@triton.jit(do_not_specialize=LENGTHS)
def _recurrence(
    q_ptr, k_ptr, v_ptr, g_ptr, first_ptr, o_ptr, last_ptr, first_sum_ptr, last_sum_ptr, inverse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot,
    T, H, q_group, k_group, v_group, scale, eps,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = _locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * K * V + v
    rows = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    q_ptr += b * stride_qb + h // q_group * stride_qh + rows
    k_ptr += b * stride_kb + h // k_group * stride_kh + rows
    v_ptr += b * stride_vb + h // v_group * stride_vh + v + columns
    o_ptr += b * stride_ob + h * stride_oh + v + columns
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + at, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    key_sum = tl.zeros([BLOCK_K], tl.float32)
    if first_sum_ptr is not None:
        key_sum = tl.load(first_sum_ptr + (b * H + h) * K + rows, mask=rows < K, other=0.0)
    for t in range(T):
        if g_ptr is not None:
            memory *= tl.exp(tl.load(g_ptr + b * stride_gb + h * stride_gh + t * stride_gt).to(tl.float32))
        q = tl.load(q_ptr + t * stride_qt, mask=rows < K, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t * stride_kt, mask=rows < K, other=0.0).to(tl.float32)
        values = tl.load(v_ptr + t * stride_vt, mask=columns < V - v, other=0.0).to(tl.float32)
        memory += k[:, None] * values[None, :]
        o = scale * tl.sum(q[:, None] * memory, 0)
        if last_sum_ptr is not None:
            key_sum += k
            inverse = 1 / (scale * tl.sum(q * key_sum) + eps)
            o *= inverse
            tl.store(inverse_ptr + (b * H + h) * T + t, inverse, mask=v == 0)
        tl.store(o_ptr + t * stride_ot, cast(o, o_ptr.dtype.element_ty), mask=columns < V - v)
    store_block(last_ptr + at, V, K, V - v, memory, BLOCK_K, BLOCK_V)
    if last_sum_ptr is not None:
        tl.store(last_sum_ptr + (b * H + h) * K + rows, key_sum, mask=(rows < K) & (v == 0))


_COLUMN_ELEMENTS = 4096  # of the memory that one program of the recurrence holds


def _table(half: Tile, single: Tile, others: ChunkTable | None = None) -> dict[tuple[int, int, int], Tile]:
    """The same tile for all architectures and widths, by element size, but for the others."""
    keys = itertools.product((80, 90, 100), WIDTHS, (2, 4))
    return {key: half if key[2] == 2 else single for key in keys} | dict(others or {})


# Tiles per (architecture, head width, bytes of an element), the width the next of 64, 128, 256; never by length or
# batch, so one build serves every call. Chosen as the largest that compile without spills, not timed on a device.
# float32 multiplies without matrix instructions, in small tiles.
MEMORIES = _table(
    Tile(64, 64, 4, 3), Tile(32, 32, 4, 1),
    {(100, width, size): tile for width in WIDTHS for size, tile in ((2, Tile(64, 64, 8, 3)), (4, Tile(32, 32, 8, 1)))},
)  # fmt: skip
OUTPUT = _table(Tile(64, 64, 4, 2), Tile(32, 32, 8, 1))
GRADIENTS = _table(Tile(64, 64, 4, 2), Tile(16, 16, 8, 1), {(80, 256, 2): Tile(64, 64, 8, 2)})


def n_chunks(T: int, chunk_size: int) -> int:
    """Of those whose memories the forward pass leaves for the backward pass."""
    return 0 if T < SHORT else triton.cdiv(T, chunk_rows(T, chunk_size))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, memories, last = _fake_forward(q, k, v, g, first, scale, chunk_size)
    first = None if first is None else first.float().contiguous()
    if not o.numel():
        return o, memories, last.zero_() if first is None else last.copy_(first)
    if q.shape[2] < SHORT:
        recur(q, k, v, g, first, o, last, scale)
        return o, memories, last
    C = chunk_rows(q.shape[2], chunk_size)
    c = None if g is None else chunk_decay(g, C)
    fill_memories(k, v, c, first, memories, last, 1.0, C, reverse=False)
    tile = pick(OUTPUT, q, v)
    B, H, T, V = o.shape
    N = memories.shape[2]
    with torch.cuda.device_of(q):
        _chunk_output[B * H * N,](
            q, k, v, c, memories, o, *strides(q, k, v, o), T, N, H, *groups(H, q, k, v), scale,
            K=q.shape[3], V=V, C=C, **tile._asdict(),
        )  # fmt: skip
    return o, memories, last


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    o = empty_output(q, k, v)
    N = n_chunks(q.shape[2], chunk_size)
    return o, empty_memory(q, v, o.shape[1], N, dtype=q.dtype), empty_memory(q, v, o.shape[1])


def recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, o: Tensor, last: Tensor, scale: float,
    first_sum: Tensor | None = None, last_sum: Tensor | None = None, inverse: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """Fill o and last, token by token; with last_sum also that and the factors r that linear attention divides by."""
    B, H, T, V = o.shape
    block_k = max(16, triton.next_power_of_2(q.shape[3]))
    block_v = min(max(16, _COLUMN_ELEMENTS // block_k), max(16, triton.next_power_of_2(V)))
    gate_strides = (0, 0, 0) if g is None else g.stride()
    with torch.cuda.device_of(q):
        _recurrence[B * H * triton.cdiv(V, block_v),](
            q, k, v, g, first, o, last, first_sum, last_sum, inverse, *strides(q, k, v), *gate_strides, *strides(o),
            T, H, *groups(H, q, k, v), scale, eps,
            K=q.shape[3], V=V, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip


def fill_memories(
    a: Tensor, b: Tensor, c: Tensor | None, first: Tensor | None, memories: Tensor, last: Tensor, scale: float, C: int,
    *, reverse: bool, rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill memories [B, H, N, K, V], before each chunk, and last; in reverse the gradients behind each, and before all.

    rows [B, H, T] are factors of the rows of b, where there are no gates. Where the heads alone would leave most of the
    device idle, the chunks are cut into segments that run side by side: one more pass over a and b finds what each
    leaves behind.
    """
    B, H, N, K, V = memories.shape
    tile = pick(MEMORIES, a, b)
    programs = B * H * triton.cdiv(K, tile.BLOCK_K) * triton.cdiv(V, tile.BLOCK_V)
    length = triton.cdiv(N, n_segments(N, programs, a.device))
    segments = triton.cdiv(N, length)
    shared = dict(
        T=a.shape[2], N=N, H=H, a_group=H // a.shape[1], b_group=H // b.shape[1], segments=segments, length=length,
        scale=scale, K=K, V=V, C=C, REVERSE=reverse, **tile._asdict(),
    )  # fmt: skip
    ends = factors = None
    with torch.cuda.device_of(a):
        if segments > 1:
            ends = last.new_empty(B, H, segments, K, V)
            factors = None if c is None else last.new_empty(B, H, segments)
            _chunk_segments[programs * segments,](a, b, c, rows, ends, factors, *strides(a, b), **shared)
        _chunk_memories[programs * segments,](
            a, b, c, rows, first, ends, factors, memories, last, *strides(a, b), **shared
        )  # fmt: skip


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None,
    memories: Tensor, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    dq, dk, dv, dg, dfirst = _fake_backward(do, dlast, q, k, v, g, first, memories, scale, chunk_size)
    dlast = None if dlast is None else dlast.float().contiguous()
    B, H, T, V = do.shape
    if not do.numel():
        return dq, dk, dv, dg, dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
    dg_parts = dg.new_empty(2, *dg.shape)
    C = chunk_rows(T, chunk_size)
    c = None if g is None else chunk_decay(g, C)
    if T < SHORT:
        memories = first_chunk(first, dfirst, q.dtype)
    N = memories.shape[2]
    dmemories = torch.empty_like(memories)
    fill_memories(q, do, c, dlast, dmemories, dfirst, scale, C, reverse=True)
    each = [for_each_head(dx, H) for dx in (dq, dk, dv)]
    tile = pick(GRADIENTS, q, v)
    with torch.cuda.device_of(q):
        _chunk_gradients[3 * B * H * N,](
            q, k, v, do, c, memories, dmemories, *each, dg_parts, *strides(q, k, v, do, *each), dg.numel(),
            T, N, H, *groups(H, q, k, v), scale, K=q.shape[3], V=V, C=C, **tile._asdict(),
        )  # fmt: skip
    for dx, heads in zip((dq, dk, dv), each, strict=True):
        sum_heads(dx, heads)
    return dq, dk, dv, torch.sum(dg_parts, 0, out=dg), dfirst


def first_chunk(first: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """What lies before the only chunk of a few tokens [B, H, 1, ...]: first, or zeros."""
    before = torch.zeros_like(like) if first is None else first
    return before[:, :, None].to(dtype).contiguous()


def _fake_backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None,
    memories: Tensor, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    dg = do.new_empty(do.shape[:3] if g is not None else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, empty_memory(q, v, do.shape[1])


_OPTIONS = "float scale, int chunk_size"
_forward_op = define(
    "ssd_forward",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? first",
    _OPTIONS,
    "Tensor o, Tensor memories, Tensor last",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "ssd_backward",
    "Tensor do, Tensor? dlast, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? first, Tensor memories",
    _OPTIONS,
    "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dfirst",
    _backward,
    _fake_backward,
)


class _SSD(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, scale: float, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(q, k, v, g, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, first, memories = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        dq, dk, dv, dg, dfirst = _SSDBackward.apply(
            do, dlast, q, k, v, g, first, memories, ctx.scale, ctx.chunk_size
        )  # fmt: skip
        dg = None if g is None else dg.to(g.dtype)
        return dq, dk, dv, dg, None if first is None else dfirst.to(first.dtype), None, None


class _SSDBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None,
        memories: Tensor, scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(do, dlast, q, k, v, g, first, memories, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of ssd have no second derivative; backend="reference" has')


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.ssd, which documents and has checked the arguments; g None: no decay."""
    first = None if initial_state is None else initial_state.memory
    o, _, last = _SSD.apply(*distinct(q, k, v, g, first), scale, chunk_size)
    return o, RecurrentState(last, next_position(q, initial_state))


def retention(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor, **options: Any) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.retention: ssd with the same decay at every step."""
    return ssd(q, k, v, spread(decay, q), **options)


_GATES = ("g_ptr", "c_ptr", "factors_ptr", "dg_ptr")
_DIVISION = ("rows_ptr", "first_sum_ptr", "last_sum_ptr", "inverse_ptr")
_FLOAT32 = (*_GATES, *_DIVISION, "first_ptr", "ends_ptr", "last_ptr")
_ABSENT = {"gated": _DIVISION, "plain": _DIVISION + _GATES, "divided": _GATES}


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    half = [(64, "bf16", "gated"), (128, "bf16", "gated"), (256, "bf16", "plain")]
    single = [(64, "fp32", "gated"), (256, "fp32", "gated")]  # 90 compiles float32 as 80 does
    for arch, builds in (80, half + single), (90, half), (100, half + single):
        for width, dtype, variant in builds:
            key = arch, width, 2 if dtype == "bf16" else 4
            build = functools.partial(_build, arch=arch, width=width, dtype=dtype, variant=variant)
            yield build(_chunk_memories, tile=MEMORIES[key], REVERSE=width == 128)
            yield build(_chunk_output, tile=OUTPUT[key])
            yield build(_chunk_gradients, tile=GRADIENTS[key])
        for variant in ("gated", "divided"):
            build = functools.partial(_build, arch=arch, width=128, dtype="bf16", variant=variant)
            column = Tile(128, _COLUMN_ELEMENTS // 128, 4, 1)
            yield build(_chunk_segments, tile=MEMORIES[arch, 128, 2], REVERSE=variant == "divided")
            yield build(_recurrence, tile=column, products=False)
        yield decay_build(arch)


def _build(kernel: Any, *, variant: str, **options: Any) -> AotSpec:
    return build(kernel, variant=variant, float32=_FLOAT32, absent=_ABSENT[variant], **options)
