"""Log-linear attention: blocks of the past as a tree over chunks, outputs and gradients within chunks, and decoding.

    o_t = scale * sum_{s <= t} level_scales[t, bit_length(t XOR s)] exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s

Let `position` tokens have been read before the call, and chunks be aligned to all tokens, so that the first one may
lack its beginning. Chunk n of the call is number a = base + n of the sequence. What its tokens see of the past are the
blocks of the set bits of a: bit l stands for the 2^l chunks before (a >> l) << l. One such block ends before each
chunk, of 2^l chunks where l is the lowest set bit of the chunk's number, and its sum

    X = sum_s exp(g_{s+1} + ... + g_end) k_s v_s^T          end: the last token of the block

is made as in a Fenwick tree, level by level, in place. Likewise the gradient of X is a sum over the 2^l chunks that
follow the block, and what chunk a is in are blocks for its clear bits. So no pass over the chunks is serial, and both
ways read log2(T / C) / 2 blocks for a chunk on average. There are places for M = CARRIED + N - 1 of them:

    bit                         of a block from an earlier call, for each set bit of position; as if its last token were
                                the last that was read
    CARRIED + end - 1           of the block that ends before chunk `end` of the call, 1 <= end < N
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._fenwick import LogLinearState
from effkit.attention._recurrent import next_position
from effkit.kernels._chunk_tiles import (
    LENGTHS,
    WIDTHS,
    ChunkTable,
    Tile,
    across,
    build,
    chunk_rows,
    from_start,
    load_block,
    pick,
    row_products,
    store_block,
    summary,
    through_memory,
    to_end,
    weighted,
)
from effkit.kernels._common import AotSpec, cast, distinct, dot, unit_stride
from effkit.kernels._recurrent_ops import (
    define,
    empty_memory,
    empty_output,
    for_each_head,
    sum_heads,
)

COUNTS = [*LENGTHS, "L", "LEVELS", "M", "CARRIED", "level", "stop", "parts", "part"]


@triton.jit
def _locate(parts, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Which batch row and head, part of it and tile of a matrix this program owns: (b, h, part, k, v)."""
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles = tl.cdiv(K, BLOCK_K) * tiles_v
    tile = tl.program_id(0) % tiles
    part = (tl.program_id(0) // tiles % parts).to(tl.int64)
    bh = (tl.program_id(0) // tiles // parts).to(tl.int64)
    return bh // H, bh % H, part, tile // tiles_v * BLOCK_K, tile % tiles_v * BLOCK_V


@triton.jit
def _read_before(position_ptr, b):
    """How many tokens of this row were read before the call, int64."""
    position = b * 0
    if position_ptr is not None:
        position = tl.load(position_ptr + b)
    return position


@triton.jit
def _frame(position, n, T, C: tl.constexpr):
    """Of chunk n: its first token in the call, how many tokens of the call it has, and the place of the first in it."""
    place = tl.maximum(position % C - n * C, 0)
    start = n * C - position % C + place
    return start, tl.minimum(T - start, C - place), place


@triton.jit
def _edge(position, n, C: tl.constexpr):
    """Where the past of chunk n ends, counted in tokens of the sequence; its set bits are the blocks that n sees."""
    return tl.maximum((position // C + n) * C, position)


@triton.jit
def bit_length(x):
    """The number of binary digits of 0 <= x < 2^24, or of a power of two: the exponent of x as float32."""
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _levels(edge, bit, place, C: tl.constexpr, LOG_C: tl.constexpr):
    """At which level the tokens of a chunk see the block that ends before `edge` at its set bit, [C]."""
    within = bit_length((place + tl.arange(0, C)) ^ ((((edge >> bit) - 1) << bit) % C))
    return tl.where(bit < LOG_C, within, bit + 1)


@triton.jit
def _end(edge, bit, position, C: tl.constexpr):
    """Before which chunk of the call the block of this set bit of `edge` ends; 0 if an earlier call has it."""
    return tl.maximum(((edge >> bit) << bit) // C - position // C, 0)


@triton.jit
def _place(end, bit, CARRIED):
    """Where this block is."""
    return tl.where(end > 0, CARRIED + end - 1, bit)


@triton.jit
def _between(until_ptr, begin, end):
    """The decay from before chunk `begin` to before chunk `end`. float64: the sums are as long as the sequence."""
    return tl.exp((tl.load(until_ptr + end) - tl.load(until_ptr + begin)).to(tl.float32))


@triton.jit
def _rest(x, rounded):
    """What rounding took from float32 x, in the same dtype: rounded + rest is as good as x."""
    return cast(x - rounded.to(tl.float32), rounded.dtype)


@triton.jit
def _block(k, v, weight):
    """sum_j weight_j k_j v_j^T of a chunk, to the last bits: a block of few tokens has no errors that cancel."""
    weighted_v = v.to(tl.float32) * weight[:, None]
    high = cast(weighted_v, v.dtype)
    block = dot(tl.trans(k), high)
    if v.dtype != tl.float32:
        block = dot(tl.trans(k), _rest(weighted_v, high), block)
    return block


@triton.jit
def _scales(scales_ptr, stride_t, stride_l, n_rows, level, L, C: tl.constexpr):
    """The scales of a chunk's tokens at a level, or at a level for each of them, [C]."""
    rows = tl.arange(0, C)
    at = scales_ptr + rows * stride_t + level * stride_l
    return tl.load(at, mask=(rows < n_rows) & (level < L), other=0.0).to(tl.float32)


@triton.jit
def _scaled(
    scores, scales_ptr, stride_t, stride_l, n_rows, place, L, C: tl.constexpr, LOG_C: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """scores of (query i, key j), or (j, i) with KEYS_FIRST, times the scale of query i at the level of j."""
    i = tl.arange(0, C)
    apart = (place + i)[:, None] ^ (place + i)[None, :]
    factor = tl.zeros([C, C], tl.float32)
    for level in tl.static_range(LOG_C + 1):
        mask = (i < n_rows) & (level < L)
        own = tl.load(scales_ptr + i * stride_t + level * stride_l, mask=mask, other=0.0).to(tl.float32)
        if KEYS_FIRST:
            own = own[None, :]
        else:
            own = own[:, None]
        factor = tl.where(apart >= (1 << level) // 2, own, factor)
    return scores * factor


# One program owns a chunk of one head: it reads its gates and writes their sums, as _chunk_tiles describes them, and
# their total. It streams memory.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_decay(
    g_ptr, position_ptr, c_ptr, until_ptr, stride_gb, stride_gh, stride_gt, T, N, H, C: tl.constexpr
):  # fmt: skip
    b, h, n, _, _ = _locate(N, H, 1, 1, 1, 1)
    start, n_rows, _ = _frame(_read_before(position_ptr, b), n, T, C)
    i = tl.arange(0, C)
    g_ptr += b * stride_gb + h * stride_gh + start * stride_gt
    g = tl.load(g_ptr + i * stride_gt, mask=i < n_rows, other=0.0).to(tl.float32)
    c = tl.cumsum(tl.where(g < -1000.0, -1000.0, g).to(tl.float64), 0)  # a factor of 0 as well, and no -inf - -inf
    hi = c.to(tl.float32)
    c_ptr += ((b * H + h) * N + n) * 2 * C + i
    tl.store(c_ptr, hi)
    tl.store(c_ptr + C, (c - hi.to(tl.float64)).to(tl.float32))
    until_ptr += (b * H + h) * (N + 1)
    tl.store(until_ptr + n + 1, tl.sum(tl.where(i == C - 1, c, 0.0), 0))
    tl.store(until_ptr, tl.zeros([], tl.float64), mask=n == 0)


# One program owns a tile of one block of the state: it writes it to the place that the block has in the tree. The
# blocks below the lowest set bit of the position become one there, as they do before a token joins.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_carry(
    first_ptr, position_ptr, blocks_ptr, H, L, M, CARRIED,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, bit, k, v = _locate(CARRIED, H, K, V, BLOCK_K, BLOCK_V)
    position = tl.load(position_ptr + b)
    if (position >> bit) & 1 == 0:
        return
    lowest = (position & ((1 << bit) - 1)) == 0
    tile = k * V + v
    first_ptr += (b * H + h) * L * K * V + tile
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for level in range(tl.where(lowest, 0, bit + 1), tl.where(lowest, bit + 1, bit + 2)):
        memory += load_block(first_ptr + level * K * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
    store_block(blocks_ptr + ((b * H + h) * M + bit) * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a tile of a single chunk's block: it reads the chunk's keys and values once. What the state holds of
# the first chunk joins its block.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_leaves(
    k_ptr, v_ptr, c_ptr, position_ptr, blocks_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T, N, H, k_group, v_group, M, CARRIED,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, k, v = _locate(N - 1, H, K, V, BLOCK_K, BLOCK_V)
    position = _read_before(position_ptr, b)
    start, n_rows, _ = _frame(position, n, T, C)
    tile = k * V + v
    blocks_ptr += (b * H + h) * M * K * V + tile
    c_ptr += ((b * H + h) * N + n) * 2 * C
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt + k
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt + v
    keys = load_block(k_ptr, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
    values = load_block(v_ptr, stride_vt, 1, n_rows, V - v, C, BLOCK_V)
    memory = _block(keys, values, to_end(c_ptr, C))
    if position_ptr is not None:
        for bit in range(0, LOG_C):
            if (n == 0) & ((position >> bit) & 1 == 1):
                held = load_block(blocks_ptr + bit * K * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                memory += across(c_ptr, C) * held
    store_block(blocks_ptr + (CARRIED + n) * K * V, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a tile of the block of 2^(level + 1) chunks that ends before chunk `end`. Its second half, which ends
# there too, has its place; the first half is added to it. Where a level has no more than one such block the program
# goes on to the next level.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_join(
    until_ptr, position_ptr, blocks_ptr, N, H, M, CARRIED, level, stop, parts,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, part, k, v = _locate(parts, H, K, V, BLOCK_K, BLOCK_V)
    base = _read_before(position_ptr, b) // C
    until_ptr += (b * H + h) * (N + 1)
    blocks_ptr += (b * H + h) * M * K * V + k * V + v
    for own_level in range(level, stop):
        end = (((base >> (own_level + 1)) + 1 + part) << (own_level + 1)) - base
        if end < N:
            half = tl.maximum(end - (tl.full([], 1, tl.int64) << own_level), 0)
            first_ptr = blocks_ptr + _place(half, LOG_C + own_level, CARRIED) * K * V
            second_ptr = blocks_ptr + (CARRIED + end - 1) * K * V
            first = load_block(first_ptr, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            second = load_block(second_ptr, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            memory = _between(until_ptr, half, end) * first + second
            tl.debug_barrier()  # the next level may read what another thread of the program writes
            store_block(second_ptr, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
            tl.debug_barrier()


# One program owns a chunk of one head and BLOCK_V of its outputs: the product within the chunk, and one with each block
# that it sees. The C x C scores are made once for each such tile, so BLOCK_V is as wide as the registers allow.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_output(
    q_ptr, k_ptr, v_ptr, scales_ptr, c_ptr, until_ptr, position_ptr, blocks_ptr, o_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sb, stride_sh, stride_st, stride_sl, stride_ob, stride_oh, stride_ot,
    T, N, H, q_group, k_group, v_group, L, LEVELS, M, CARRIED, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, v = _locate(N, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    start, n_rows, place = _frame(position, n, T, C)
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt + v
    scales_ptr += b * stride_sb + h * stride_sh + start * stride_st
    o_ptr += b * stride_ob + h * stride_oh + start * stride_ot + v
    c_ptr += (bh * N + n) * 2 * C
    until_ptr += bh * (N + 1)
    blocks_ptr += bh * M * K * V + v

    scores = weighted(row_products(q_ptr, k_ptr, stride_qt, stride_kt, n_rows, K, C, BLOCK_K), c_ptr, C, False)
    scores = _scaled(scores, scales_ptr, stride_st, stride_sl, n_rows, place, L, C, LOG_C, KEYS_FIRST=False)
    values = load_block(v_ptr, stride_vt, 1, n_rows, V - v, C, BLOCK_V)
    high = cast(scores, values.dtype)
    o = dot(high, values)
    if values.dtype != tl.float32:  # one weight may be most of an output
        o = dot(_rest(scores, high), values, o)
    edge = _edge(position, n, C)
    first_bit = LOG_C
    if position_ptr is not None:
        first_bit = 0
    for bit in range(first_bit, LOG_C + LEVELS):
        if (edge >> bit) & 1 == 1:
            end = _end(edge, bit, position, C)
            block_ptr = blocks_ptr + _place(end, bit, CARRIED) * K * V
            seen_at = _levels(edge, bit, place, C, LOG_C)
            own = _scales(scales_ptr, stride_st, stride_sl, n_rows, seen_at, L, C)
            weight = own * from_start(c_ptr, C) * _between(until_ptr, end, n)
            o += weight[:, None] * through_memory(
                q_ptr, stride_qt, n_rows, block_ptr, V, 1, V - v, K, C, BLOCK_K, BLOCK_V
            )
    beyond = position + start + tl.arange(0, C) >> (L - 1) > 0  # positions are not read on the host: nobody checked
    o = tl.where(beyond[:, None], float("nan"), scale * o)
    store_block(o_ptr, stride_ot, n_rows, V - v, o, C, BLOCK_V)


# One program owns a tile of one level of the state behind the last token: a block of the tree, or for the low levels
# the tokens of the last chunk that the last token sees at that level.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_state(
    k_ptr, v_ptr, c_ptr, until_ptr, position_ptr, blocks_ptr, last_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T, N, H, k_group, v_group, L, M, CARRIED,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, level, k, v = _locate(L, H, K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    last = position + T - 1
    n = last // C - position // C
    start, n_rows, place = _frame(position, n, T, C)
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt + k
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt + v
    c_ptr += (bh * N + n) * 2 * C
    until_ptr += bh * (N + 1)
    tile = k * V + v
    blocks_ptr += bh * M * K * V + tile
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if level > LOG_C:
        bit = level - 1
        if (last >> bit) & 1 == 1:
            end = _end(last, bit, position, C)
            blocks_ptr += _place(end, bit, CARRIED) * K * V
            held = load_block(blocks_ptr, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            memory += _between(until_ptr, end, N) * held
    else:
        belongs = bit_length((place + tl.arange(0, C)) ^ (last % C)) == level
        keys = load_block(k_ptr, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
        values = load_block(v_ptr, stride_vt, 1, n_rows, V - v, C, BLOCK_V)
        memory += _block(keys, values, tl.where(belongs, to_end(c_ptr, C), 0.0))
        if position_ptr is not None:
            for i in range(0, LOG_C):
                begun = (((position >> i) - 1) << i) % C
                if (n == 0) & ((position >> i) & 1 == 1) & (bit_length(begun ^ (last % C)) == level):
                    held = load_block(blocks_ptr + i * K * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                    memory += across(c_ptr, C) * held
    store_block(last_ptr + (bh * L + level) * K * V + tile, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a tile of the gradient of one block: it reads the queries and cotangents of the chunks that see the
# block, and the gradient of the state if that holds it. The largest blocks come first, as their programs take longest.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_adjoints(
    q_ptr, do_ptr, scales_ptr, c_ptr, until_ptr, position_ptr, dlast_ptr, adjoints_ptr,
    stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_sl,
    T, N, H, q_group, L, M, CARRIED, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, part, k, v = _locate(M, H, K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    base = position // C
    last = position + T - 1
    at = M - 1 - part
    # The block ends before `edge` at its set bit: tokens from there on see it.
    bit, edge = at, position
    if at >= CARRIED:
        edge = (base + at - CARRIED + 1) * C
        bit = (bit_length(edge & -edge) - 1).to(tl.int64)
    if (edge >> bit) & 1 == 0:
        return
    first = _end(edge, bit, position, C)
    beyond = tl.minimum((((edge >> bit) + 1) << bit) - 1, last) // C - base + 1
    if first >= beyond:
        return
    q_ptr += b * stride_qb + h // q_group * stride_qh + k
    do_ptr += b * stride_ob + h * stride_oh + v
    scales_ptr += b * stride_sb + h * stride_sh
    c_ptr += bh * N * 2 * C
    until_ptr += bh * (N + 1)
    tile = k * V + v
    gradient = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for n in range(first, beyond):
        start, n_rows, place = _frame(position, n, T, C)
        weight = _scales(
            scales_ptr + start * stride_st, stride_st, stride_sl, n_rows, _levels(edge, bit, place, C, LOG_C), L, C
        ) * (from_start(c_ptr + n * 2 * C, C) * _between(until_ptr, first, n))  # fmt: skip
        queries = load_block(q_ptr + start * stride_qt, stride_qt, 1, n_rows, K - k, C, BLOCK_K)
        cotangents = load_block(do_ptr + start * stride_ot, stride_ot, 1, n_rows, V - v, C, BLOCK_V)
        gradient += summary(queries, cotangents, scale * weight)
    if dlast_ptr is not None:
        if last // C - base + 1 == beyond:
            kept_at = tl.where(bit < LOG_C, bit_length((((edge >> bit) - 1) << bit) % C ^ (last % C)), bit + 1)
            held = load_block(dlast_ptr + (bh * L + kept_at) * K * V + tile, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            gradient += _between(until_ptr, first, N) * held
    store_block(adjoints_ptr + (bh * (M + LOG_C + 1) + at) * K * V + tile, V, K - k, V - v, gradient, BLOCK_K, BLOCK_V)


@triton.jit
def _sink(sink, position, n, T, LEVELS, M, CARRIED, C: tl.constexpr):
    """Where the tokens of chunk n are kept: whether at all, before which chunk that ends, the place of its gradient.

    The first LEVELS sinks are blocks that are seen later, the others the low levels of the state behind the last chunk.
    """
    base = position // C
    last = (position + T - 1) // C - base
    in_block = sink < LEVELS
    level = tl.where(in_block, sink, 0)
    end = ((((base + n) >> level) + 1) << level) - base
    exists = tl.where(in_block, ((base + n) >> level & 1 == 0) & (end <= last), n == last)
    return exists, tl.where(in_block, end, n + 1), tl.where(in_block, CARRIED + end - 1, M + sink - LEVELS)


@triton.jit
def _kept(sink, end, position, n, place, T, c_ptr, until_ptr, LEVELS, C: tl.constexpr):
    """How much of each token of chunk n a sink has at its end, [C]."""
    belongs = bit_length((place + tl.arange(0, C)) ^ ((position + T - 1) % C)) == sink - LEVELS
    weight = to_end(c_ptr, C) * _between(until_ptr, n + 1, end)
    return tl.where((sink < LEVELS) | belongs, weight, 0.0)


# The gates need no products of their own. A factor exp(c_i) sits on q_i and exp(-c_j) on k_j, so what a gate at t adds
# to all pairs j < t <= i of a chunk is the sum over i >= t of (row sum - column sum) of pairs * their gradients, less
# the diagonal, which no gate touches; likewise it decays what queries i >= t read of the past, and what keys j < t add
# to blocks that are seen later. The next two kernels leave these sums behind, float32 [3, B, H, T]: of rows and reads,
# of columns, of what was added; and moved, for each level what the chunk reads from it or adds to it.


# One program owns a chunk of one head: it reads the chunk with its cotangents and the blocks that it sees, and writes
# dq and the gradients of its scales.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_query_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, scales_ptr, c_ptr, until_ptr, position_ptr, blocks_ptr,
    dq_ptr, ds_ptr, sums_ptr, moved_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_sl, stride_dqb, stride_dqh, stride_dqt,
    T, N, H, q_group, k_group, v_group, L, LEVELS, M, CARRIED, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = _locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    start, n_rows, place = _frame(position, n, T, C)
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    do_ptr += b * stride_ob + h * stride_oh + start * stride_ot
    scales_ptr += b * stride_sb + h * stride_sh + start * stride_st
    dq_ptr += b * stride_dqb + h * stride_dqh + start * stride_dqt
    c_ptr += (bh * N + n) * 2 * C
    until_ptr += bh * (N + 1)
    blocks_ptr += bh * M * K * V
    i = tl.arange(0, C)
    levels = tl.arange(0, BLOCK_L)

    weights = weighted(row_products(do_ptr, v_ptr, stride_ot, stride_vt, n_rows, V, C, BLOCK_V), c_ptr, C, False)
    pairs = weights * row_products(q_ptr, k_ptr, stride_qt, stride_kt, n_rows, K, C, BLOCK_K)
    apart = (place + i)[:, None] ^ (place + i)[None, :]
    dscales = tl.zeros([C, BLOCK_L], tl.float32)
    for within in tl.static_range(LOG_C + 1):
        here = tl.sum(tl.where((apart >= (1 << within) // 2) & (apart < (1 << within)), pairs, 0.0), 1)
        dscales += tl.where(levels[None, :] == within, here[:, None], 0.0)
    weights = _scaled(weights, scales_ptr, stride_st, stride_sl, n_rows, place, L, C, LOG_C, False)
    weights = cast(scale * weights, do_ptr.dtype.element_ty)
    edge = _edge(position, n, C)
    first_bit = LOG_C
    if position_ptr is not None:
        first_bit = 0
    for k in range(0, K, BLOCK_K):
        q = load_block(q_ptr + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K)
        dq = dot(weights, load_block(k_ptr + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K))
        for bit in range(first_bit, LOG_C + LEVELS):
            if (edge >> bit) & 1 == 1:
                end = _end(edge, bit, position, C)
                block_ptr = blocks_ptr + _place(end, bit, CARRIED) * K * V + k * V
                seen_at = _levels(edge, bit, place, C, LOG_C)
                own = scale * _scales(scales_ptr, stride_st, stride_sl, n_rows, seen_at, L, C)
                decay = from_start(c_ptr, C) * _between(until_ptr, end, n)
                through = decay[:, None] * through_memory(
                    do_ptr, stride_ot, n_rows, block_ptr, 1, V, K - k, V, C, BLOCK_V, BLOCK_K
                )
                products = tl.sum(q.to(tl.float32) * through, 1)
                dscales += tl.where(levels[None, :] == seen_at[:, None], products[:, None], 0.0)
                dq += own[:, None] * through
        store_block(dq_ptr + k, stride_dqt, n_rows, K - k, dq, C, BLOCK_K)
    dscales *= scale
    store_block(ds_ptr + (bh * T + start) * L, L, n_rows, L, dscales, C, BLOCK_L)
    reads = dscales * load_block(scales_ptr, stride_st, stride_sl, n_rows, L, C, BLOCK_L).to(tl.float32)
    tl.store(sums_ptr + bh * T + start + i, tl.sum(tl.where(levels[None, :] > 0, reads, 0.0), 1), mask=i < n_rows)
    block_level = (levels - LOG_C - 1).to(tl.int64)
    sees = (block_level >= 0) & (block_level < LEVELS) & (edge >> (levels - 1).to(tl.int64) & 1 == 1)
    moved_ptr += (bh * (N + 1) + n) * LEVELS
    tl.store(moved_ptr + LEVELS + block_level, tl.sum(reads, 0).to(tl.float64), mask=sees)
    tl.store(moved_ptr + levels, tl.zeros([BLOCK_L], tl.float64), mask=(levels < LEVELS) & (n == 0))


# One program owns a chunk of one head: it reads the chunk with its cotangents and the gradients of the blocks that it
# is in, and writes dk.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_key_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, scales_ptr, c_ptr, until_ptr, position_ptr, adjoints_ptr, kept_ptr,
    dk_ptr, sums_ptr, moved_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_sl, stride_dkb, stride_dkh, stride_dkt,
    T, N, H, q_group, k_group, v_group, L, LEVELS, M, CARRIED, part, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = _locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    start, n_rows, place = _frame(position, n, T, C)
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    do_ptr += b * stride_ob + h * stride_oh + start * stride_ot
    scales_ptr += b * stride_sb + h * stride_sh + start * stride_st
    dk_ptr += b * stride_dkb + h * stride_dkh + start * stride_dkt
    c_ptr += (bh * N + n) * 2 * C
    until_ptr += bh * (N + 1)
    adjoints_ptr += bh * (M + LOG_C + 1) * K * V
    i = tl.arange(0, C)
    levels = tl.arange(0, BLOCK_L)

    weights = weighted(row_products(v_ptr, do_ptr, stride_vt, stride_ot, n_rows, V, C, BLOCK_V), c_ptr, C, True)
    weights = scale * _scaled(weights, scales_ptr, stride_st, stride_sl, n_rows, place, L, C, LOG_C, True)
    pairs = weights * row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K)
    columns = tl.sum(tl.where(i[:, None] < i[None, :], pairs, 0.0), 1)
    weights = cast(weights, do_ptr.dtype.element_ty)
    added = tl.zeros([C, BLOCK_L], tl.float32)
    sinks = LEVELS
    if kept_ptr is not None:
        sinks += tl.minimum(L, LOG_C + 1)
    for k in range(0, K, BLOCK_K):
        keys = load_block(k_ptr + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
        dk = dot(weights, load_block(q_ptr + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K))
        for sink in range(sinks):
            exists, end, at = _sink(sink, position, n, T, LEVELS, M, CARRIED, C)
            if exists:
                weight = _kept(sink, end, position, n, place, T, c_ptr, until_ptr, LEVELS, C)
                through = weight[:, None] * through_memory(
                    v_ptr, stride_vt, n_rows, adjoints_ptr + at * K * V + k * V, 1, V, K - k, V, C, BLOCK_V, BLOCK_K
                )
                products = tl.sum(keys.to(tl.float32) * through, 1)
                added += tl.where(levels[None, :] == sink, products[:, None], 0.0)
                dk += through
        store_block(dk_ptr + k, stride_dkt, n_rows, K - k, dk, C, BLOCK_K)
    sums_ptr += bh * T + start + i
    tl.store(sums_ptr + part, columns, mask=i < n_rows)
    tl.store(sums_ptr + 2 * tl.cast(part, tl.int64), tl.sum(added, 1), mask=i < n_rows)
    is_in = ((position // C + n) >> levels.to(tl.int64)) & 1 == 0
    moved_ptr += (bh * (N + 1) + n + 1) * LEVELS + levels
    tl.store(moved_ptr, tl.sum(added, 0).to(tl.float64), mask=(levels < LEVELS) & is_in)


# One program owns a chunk of one head and BLOCK_V columns of dv: as _log_linear_output, with the gradients of blocks.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_value_gradients(
    q_ptr, k_ptr, do_ptr, scales_ptr, c_ptr, until_ptr, position_ptr, adjoints_ptr, kept_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_ob, stride_oh, stride_ot,
    stride_sb, stride_sh, stride_st, stride_sl, stride_dvb, stride_dvh, stride_dvt,
    T, N, H, q_group, k_group, L, LEVELS, M, CARRIED, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, v = _locate(N, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    start, n_rows, place = _frame(position, n, T, C)
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    do_ptr += b * stride_ob + h * stride_oh + start * stride_ot + v
    scales_ptr += b * stride_sb + h * stride_sh + start * stride_st
    dv_ptr += b * stride_dvb + h * stride_dvh + start * stride_dvt + v
    c_ptr += (bh * N + n) * 2 * C
    until_ptr += bh * (N + 1)
    adjoints_ptr += bh * (M + LOG_C + 1) * K * V + v
    pairs = weighted(row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K), c_ptr, C, True)
    pairs = scale * _scaled(pairs, scales_ptr, stride_st, stride_sl, n_rows, place, L, C, LOG_C, True)
    cotangents = load_block(do_ptr, stride_ot, 1, n_rows, V - v, C, BLOCK_V)
    dv = dot(cast(pairs, cotangents.dtype), cotangents)
    sinks = LEVELS
    if kept_ptr is not None:
        sinks += tl.minimum(L, LOG_C + 1)
    for sink in range(sinks):
        exists, end, at = _sink(sink, position, n, T, LEVELS, M, CARRIED, C)
        if exists:
            weight = _kept(sink, end, position, n, place, T, c_ptr, until_ptr, LEVELS, C)
            dv += weight[:, None] * through_memory(
                k_ptr, stride_kt, n_rows, adjoints_ptr + at * K * V, V, 1, V - v, K, C, BLOCK_K, BLOCK_V
            )
    store_block(dv_ptr, stride_dvt, n_rows, V - v, dv, C, BLOCK_V)


# One program owns a chunk of one head: it sums up the gradients of its gates. They also decay what passes the whole
# chunk, which follows from the sums of moved over the chunks before each: at each level the chunk lies either in a
# block that is seen later, and what chunks before it have in that block passes it, or among those that see the block
# before, and what chunks after it read passes it. What an earlier call has in a block is all that is read of it less
# what this call has.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_gates(
    sums_ptr, moved_ptr, kept_ptr, position_ptr, dg_ptr, T, N, H, L, LEVELS, part,
    C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = _locate(N, H, 1, 1, 1, 1)
    bh = b * H + h
    position = _read_before(position_ptr, b)
    base = position // C
    start, n_rows, place = _frame(position, n, T, C)
    i = tl.arange(0, C)
    sums_ptr += bh * T + start + i
    rows = tl.load(sums_ptr, mask=i < n_rows, other=0.0)
    columns = tl.load(sums_ptr + part, mask=i < n_rows, other=0.0)
    added = tl.load(sums_ptr + 2 * tl.cast(part, tl.int64), mask=i < n_rows, other=0.0)
    dg = tl.cumsum(rows - columns, 0, reverse=True) + tl.cumsum(added, 0) - added

    level = tl.arange(0, BLOCK_L).to(tl.int64)
    block = (base + n) >> level
    sees = block & 1 == 1
    begin = (block << level) - base  # of the chunk's own block
    end = begin + (1 << level)
    behind = tl.where(sees, end, end + (1 << level))  # the chunks that see the block
    kept = tl.zeros([BLOCK_L], tl.float32)
    last = (position + T - 1) // C
    if kept_ptr is not None:
        kept_ptr += bh * L + level
        kept += tl.load(kept_ptr + LOG_C + 1, mask=(level < LEVELS) & (last >> level == block | 1), other=0.0)
        # What the state had of this very chunk and still has.
        held = tl.sum(tl.load(kept_ptr, mask=level < tl.minimum(L, LOG_C + 1), other=0.0), 0) - tl.sum(added, 0)
        dg += tl.where((last == base) & (place > 0), held, 0.0)
    moved_ptr += bh * (N + 1) * LEVELS + level
    before = tl.load(moved_ptr + tl.maximum(begin, 0) * LEVELS, mask=level < LEVELS, other=0.0)
    here = tl.load(moved_ptr + n * LEVELS, mask=level < LEVELS, other=0.0)
    after = tl.load(moved_ptr + (n + 1) * LEVELS, mask=level < LEVELS, other=0.0)
    halfway = tl.load(moved_ptr + tl.minimum(end, N) * LEVELS, mask=level < LEVELS, other=0.0)
    all_read = tl.load(moved_ptr + tl.minimum(behind, N) * LEVELS, mask=level < LEVELS, other=0.0) + kept
    older = (begin + base) * C < position
    added_before = tl.where(older, (all_read - halfway) - (halfway - here), here - before)
    dg += tl.sum(tl.where(sees, all_read - after, added_before), 0).to(tl.float32)
    tl.store(dg_ptr + bh * T + start + i, dg, mask=i < n_rows)


# One program owns a tile of one level of the gradient of the state that the call began with: that of its block, or of
# the one that it became part of, and those of the blocks that this is part of later.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_carried(
    until_ptr, position_ptr, adjoints_ptr, dfirst_ptr, T, N, H, L, LEVELS, M, CARRIED,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, own_level, k, v = _locate(L, H, K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    position = tl.load(position_ptr + b)
    tile = k * V + v
    until_ptr += bh * (N + 1)
    adjoints_ptr += bh * (M + LOG_C + 1) * K * V + tile
    # The set bit of the position to which the level belongs now; -1 for a level without tokens.
    lowest = bit_length(position & -position) - 1
    bit = tl.where(own_level <= lowest, lowest, own_level - 1)
    bit = tl.where((own_level == lowest + 1) | ((position >> tl.maximum(bit, 0)) & 1 == 0), -1, bit)
    gradient = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if bit >= 0:
        gradient += load_block(adjoints_ptr + bit * K * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V).to(tl.float32)
        for level in range(tl.maximum(bit - LOG_C + 1, 0), LEVELS):
            exists, end, at = _sink(level, position, 0, T, LEVELS, M, CARRIED, C)
            if exists:
                held = load_block(adjoints_ptr + at * K * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                gradient += _between(until_ptr, 0, end) * held.to(tl.float32)
    store_block(dfirst_ptr + (bh * L + own_level) * K * V + tile, V, K - k, V - v, gradient, BLOCK_K, BLOCK_V)


# One program owns BLOCK_V columns of one head's blocks and a single token: it reads each block once and writes it once.
# All keys of a column are in the program, so that an output needs no other; the tile fills its registers. With beta it
# is a step of the delta rule, before which each block loses what it holds for the key.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_step(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, scales_ptr, position_ptr, first_ptr, o_ptr, last_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, stride_betab, stride_betah,
    stride_sb, stride_sh, stride_sl, stride_ob, stride_oh,
    H, q_group, k_group, v_group, L, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = _locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    rows = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    position = tl.load(position_ptr + b)
    lowest = position & -position  # the size of the block that this token finds made of those before it
    q = tl.load(q_ptr + b * stride_qb + h // q_group * stride_qh + rows, mask=rows < K, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * stride_kb + h // k_group * stride_kh + rows, mask=rows < K, other=0.0).to(tl.float32)
    v_ptr += b * stride_vb + h // v_group * stride_vh + v + columns
    values = tl.load(v_ptr, mask=columns < V - v, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(g_ptr + b * stride_gb + h * stride_gh).to(tl.float32))
    new = k
    if beta_ptr is not None:
        new = k * tl.load(beta_ptr + b * stride_betab + h * stride_betah).to(tl.float32)
    scales_ptr += b * stride_sb + h * stride_sh
    at = (b * H + h) * L * K * V + v
    joined = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    o = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for level in range(L):
        size = tl.full([], 1, tl.int64) << level
        memory = load_block(first_ptr + at + level * K * V, V, 1, K, V - v, BLOCK_K, BLOCK_V).to(tl.float32)
        joined += tl.where(size <= lowest, memory, 0.0)
        memory = tl.where(size <= lowest, 0.0, tl.where(size == 2 * lowest, joined, memory)) * decay
        if beta_ptr is not None:
            memory -= new[:, None] * tl.sum(k[:, None] * memory, 0)[None, :]
        memory = tl.where(level == 0, new[:, None] * values[None, :], memory)
        o += tl.load(scales_ptr + level * stride_sl).to(tl.float32) * memory
        store_block(last_ptr + at + level * K * V, V, K, V - v, memory, BLOCK_K, BLOCK_V)
    o = scale * tl.sum(q[:, None] * o, 0)
    o = tl.where(position >> (L - 1) > 0, float("nan"), o)  # the position is not read on the host: nobody checked
    o_ptr += b * stride_ob + h * stride_oh + v + columns
    tl.store(o_ptr, cast(o, o_ptr.dtype.element_ty), mask=columns < V - v)


# Chosen as the largest that compile without spills, not timed on a device.
_EVERY = tuple((arch, width) for arch in (80, 90, 100) for width in WIDTHS)
BLOCKS: ChunkTable = {(*key, 2): Tile(64, 64, 4, 2) for key in _EVERY} | {
    (*key, 4): Tile(32, 32, 4, 1) for key in _EVERY
}
OUTPUT: ChunkTable = (
    {(*key, 2): Tile(64, 64, 4, 2) for key in _EVERY}
    | {(*key, 4): Tile(32, 32, 8, 1) for key in _EVERY}
    | {(80, 256, 2): Tile(64, 64, 8, 2)}
)
GRADIENTS: ChunkTable = (
    {(*key, 2): Tile(32 if key[1] == 64 else 64, 64, 8, 2) for key in _EVERY}
    | {(*key, 4): Tile(32, 16, 8, 1) for key in _EVERY}
    | {(80, 64, 4): Tile(16, 32, 4, 1), (80, 256, 2): Tile(32, 64, 8, 2)}
)
_COLUMN_ELEMENTS = 4096  # of a block that one program of a decoding step holds


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor, position: Tensor | None, scale: float, chunk_size: int
) -> dict[str, Any]:  # fmt: skip
    """Where the call stands, and what the kernels take besides tensors."""
    B, H, T, L = level_scales.shape
    C = chunk_rows(T, chunk_size)
    log_c = C.bit_length() - 1
    # Where a continued sequence stands in its chunk is known on the device alone.
    N = triton.cdiv(T, C) if position is None else triton.cdiv(T - 1, C) + 1
    carried = 0 if position is None else L - 1
    return dict(
        T=T, N=N, H=H, L=L, LEVELS=(N - 1).bit_length() if position is None else max(0, L - 1 - log_c),
        CARRIED=carried, M=carried + N - 1, scale=scale, part=B * H * T, K=k.shape[3], V=v.shape[3], C=C, LOG_C=log_c,
        BLOCK_L=triton.next_power_of_2(L), position_ptr=position,
        q_group=H // q.shape[1], k_group=H // k.shape[1], v_group=H // v.shape[1],
    )  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    """stride_xb, stride_xh, ... for each tensor x."""
    return {
        f"stride_{name}{axis}": step
        for name, x in tensors.items()
        for axis, step in zip("bhtl", x.stride(), strict=False)
    }


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Run a kernel with those of the arguments that it knows: they have one name in all of them."""
    if programs:
        known = {*kernel.arg_names, "num_warps", "num_stages"}
        kernel[programs,](**{name: value for name, value in arguments.items() if name in known})


def _tiles(table: ChunkTable, arguments: dict[str, Any], q: Tensor, v: Tensor) -> tuple[dict[str, Any], int, int]:
    """The arguments with a tile of the table, and how many tiles the heads have: of matrices, and of columns of v."""
    tile = pick(table, q, v)
    columns = v.shape[0] * arguments["H"] * triton.cdiv(arguments["V"], tile.BLOCK_V)
    return arguments | tile._asdict(), columns * triton.cdiv(arguments["K"], tile.BLOCK_K), columns


def _build_tree(arguments: dict[str, Any], k: Tensor, v: Tensor, g: Tensor, first: Tensor | None) -> dict[str, Any]:
    """The arguments with the sums of gates, within chunks and over them, and the blocks [B, H, M, K, V]."""
    arguments, tiles, _ = _tiles(BLOCKS, arguments, k, v)
    B, H, N, LEVELS = len(k), *(arguments[name] for name in ("H", "N", "LEVELS"))
    c = g.new_empty(B, H, N, 2, arguments["C"], dtype=torch.float32)
    until = g.new_empty(B, H, N + 1, dtype=torch.float64)
    blocks = empty_memory(k, v, H, arguments["M"])  # float32: sums of sums, and the state is made of them
    arguments |= dict(g_ptr=g, c_ptr=c, until_ptr=until, blocks_ptr=blocks, first_ptr=first) | _strides(g=g)
    _launch(_log_linear_decay, B * H * N, arguments)
    arguments["until_ptr"] = until.cumsum(-1)
    if first is not None:
        _launch(_log_linear_carry, tiles * arguments["CARRIED"], arguments)
    _launch(_log_linear_leaves, tiles * (N - 1), arguments)
    several = min((N - 1).bit_length(), LEVELS) - 1  # levels that may join more than one block
    for level, stop in [*((level, level + 1) for level in range(several)), (max(0, several), LEVELS - 1)]:
        parts = (N - 1 >> level + 1) + 1
        if level < stop:
            _launch(_log_linear_join, tiles * parts, arguments | dict(level=level, stop=stop, parts=parts))
    return arguments


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, first: Tensor | None, position: Tensor | None,
    scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, last = _fake_forward(q, k, v, g, level_scales, first, position, scale, chunk_size)
    first = None if first is None else first.float().contiguous()
    if not o.numel():
        return o, last.zero_() if first is None else last.copy_(first)
    if q.shape[2] == 1 and first is not None:
        decode(q, k, v, g, None, level_scales, first, position, scale, o, last)
        return o, last
    arguments = _sizes(q, k, v, level_scales, position, scale, chunk_size)
    arguments |= dict(q_ptr=q, k_ptr=k, v_ptr=v, scales_ptr=level_scales, o_ptr=o, last_ptr=last)
    arguments |= _strides(q=q, k=k, v=v, s=level_scales, o=o)
    with torch.cuda.device_of(q):
        arguments = _build_tree(arguments, k, v, g, first)
        arguments, tiles, columns = _tiles(OUTPUT, arguments, q, v)
        _launch(_log_linear_output, columns * arguments["N"], arguments)
        _launch(_log_linear_state, tiles * arguments["L"], arguments)
    return o, last


def decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, level_scales: Tensor, first: Tensor,
    position: Tensor | None, scale: float, o: Tensor, last: Tensor,
) -> None:  # fmt: skip
    """Fill o [B, H, 1, V] and the memory after a single token; with beta by the delta rule."""
    arguments = _sizes(q, k, v, level_scales, position, scale, 16) | dict(q_ptr=q, k_ptr=k, v_ptr=v, g_ptr=g)
    arguments |= dict(scales_ptr=level_scales, first_ptr=first, o_ptr=o, last_ptr=last, beta_ptr=beta)
    arguments |= _strides(q=q, k=k, v=v, g=g, s=level_scales, o=o, beta=g if beta is None else beta)
    block_k = max(16, triton.next_power_of_2(q.shape[3]))
    block_v = min(max(16, _COLUMN_ELEMENTS // block_k), max(16, triton.next_power_of_2(v.shape[3])))
    arguments |= Tile(block_k, block_v, 4, 1)._asdict()
    with torch.cuda.device_of(q):
        _launch(_log_linear_step, len(q) * arguments["H"] * triton.cdiv(v.shape[3], block_v), arguments)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, first: Tensor | None, position: Tensor | None,
    scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_output(q, k, v), empty_memory(q, v, level_scales.shape[1], level_scales.shape[3])


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor,
    first: Tensor | None, position: Tensor | None, last: Tensor, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = unit_stride(do), unit_stride(q), unit_stride(k), unit_stride(v)
    found = _fake_backward(do, dlast, q, k, v, g, level_scales, first, position, last, scale, chunk_size)
    dq, dk, dv, dg, dscales, dfirst = found
    dlast = None if dlast is None else dlast.float().contiguous()
    first = None if first is None else first.float().contiguous()
    if not do.numel():
        dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
        return found
    B, H, T, _ = do.shape
    each = [for_each_head(dx, H) for dx in (dq, dk, dv)]
    arguments = _sizes(q, k, v, level_scales, position, scale, chunk_size)
    arguments |= dict(q_ptr=q, k_ptr=k, v_ptr=v, scales_ptr=level_scales, do_ptr=do, dlast_ptr=dlast, kept_ptr=None)
    arguments |= dict(dq_ptr=each[0], dk_ptr=each[1], dv_ptr=each[2], dg_ptr=dg, ds_ptr=dscales, dfirst_ptr=dfirst)
    arguments |= _strides(q=q, k=k, v=v, s=level_scales, o=do, dq=each[0], dk=each[1], dv=each[2])
    N, M, L, LEVELS = (arguments[name] for name in ("N", "M", "L", "LEVELS"))
    low = arguments["LOG_C"] + 1  # the levels of the state that a single chunk adds to: the last chunk reads these
    adjoints = empty_memory(q, v, H, M + low, dtype=q.dtype)
    if dlast is not None:
        adjoints[:, :, M : M + min(low, L)] = dlast[:, :, :low]
        arguments["kept_ptr"] = (last * dlast).sum((-1, -2))
    moved = do.new_empty(B, H, N + 1, LEVELS, dtype=torch.float64)
    arguments |= dict(adjoints_ptr=adjoints, sums_ptr=dg.new_empty(3, B, H, T), moved_ptr=moved)
    with torch.cuda.device_of(q):
        arguments = _build_tree(arguments, k, v, g, first)
        arguments, tiles, _ = _tiles(OUTPUT, arguments, q, v)
        _launch(_log_linear_adjoints, tiles * M, arguments)
        arguments, tiles, columns = _tiles(GRADIENTS, arguments, q, v)
        _launch(_log_linear_query_gradients, B * H * N, arguments)
        _launch(_log_linear_key_gradients, B * H * N, arguments)
        _launch(_log_linear_value_gradients, columns * N, arguments)
        _launch(_log_linear_gates, B * H * N, arguments | dict(moved_ptr=moved.cumsum(2)))
        if first is None:
            dfirst.zero_()
        else:
            _launch(_log_linear_carried, tiles * L, arguments)
    for dx, heads in zip((dq, dk, dv), each, strict=True):
        sum_heads(dx, heads)
    return found


def _fake_backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor,
    first: Tensor | None, position: Tensor | None, last: Tensor, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    dg, dscales = (x.new_empty(x.shape, dtype=torch.float32) for x in (g, level_scales))
    return dq, dk, dv, dg, dscales, torch.empty_like(last)


_OPTIONS = "Tensor? position, float scale, int chunk_size"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor level_scales, Tensor? first"
_forward_op = define(
    "log_linear_forward",
    _TENSORS,
    _OPTIONS,
    "Tensor o, Tensor last",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "log_linear_backward",
    f"Tensor do, Tensor? dlast, {_TENSORS}, Tensor? position, Tensor last",
    "float scale, int chunk_size",
    "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dlevel_scales, Tensor dfirst",
    _backward,
    _fake_backward,
)


class _LogLinearAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, first: Tensor | None,
        position: Tensor | None, scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward_op(q, k, v, g, level_scales, first, position, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, level_scales, first, position, last = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        dq, dk, dv, dg, dscales, dfirst = _LogLinearAttentionBackward.apply(
            do, dlast, q, k, v, g, level_scales, first, position, last, ctx.scale, ctx.chunk_size
        )
        dfirst = None if first is None else dfirst.to(first.dtype)
        return dq, dk, dv, dg.to(g.dtype), dscales.to(level_scales.dtype), dfirst, None, None, None


class _LogLinearAttentionBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor,
        first: Tensor | None, position: Tensor | None, last: Tensor, scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(do, dlast, q, k, v, g, level_scales, first, position, last, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            'the kernels of log_linear_attention have no second derivative; backend="reference" has'
        )


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, LogLinearState]:
    """The kernels behind effkit.attention.log_linear_attention, which documents and has checked the arguments."""
    first, position = (None, None) if initial_state is None else initial_state
    tensors = distinct(q, k, v, g, level_scales, first)
    o, last = _LogLinearAttention.apply(*tensors, position, scale, chunk_size)
    return o, LogLinearState(last, next_position(q, initial_state))


_FLOAT32 = (
    "blocks_ptr",
    "first_ptr",
    "last_ptr",
    "dlast_ptr",
    "dfirst_ptr",
    "kept_ptr",
    "sums_ptr",
    "dg_ptr",
    "ds_ptr",
    "g_ptr",
    "beta_ptr",
)
_OTHER = {"until_ptr": "*fp64", "moved_ptr": "*fp64", "position_ptr": "*i64", "scales_ptr": "*fp32"}
_STATE = ("position_ptr", "dlast_ptr", "kept_ptr")


def _build(kernel: Any, arch: int, tile: Tile, width: int, dtype: str, state: bool, products: bool = True) -> AotSpec:
    spec = build(
        kernel, arch, tile, width, dtype, "continued" if state else "whole", float32=_FLOAT32,
        absent=() if state else _STATE, products=products, LOG_C=6, BLOCK_L=16,
    )  # fmt: skip
    return replace(spec, signature=spec.signature | {name: t for name, t in _OTHER.items() if name in spec.signature})


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    products = (
        (_log_linear_leaves, BLOCKS), (_log_linear_output, OUTPUT), (_log_linear_adjoints, OUTPUT),
        (_log_linear_query_gradients, GRADIENTS), (_log_linear_key_gradients, GRADIENTS),
        (_log_linear_value_gradients, GRADIENTS),
    )  # fmt: skip
    others = (
        (_log_linear_decay, BLOCKS), (_log_linear_carry, BLOCKS), (_log_linear_join, BLOCKS),
        (_log_linear_state, OUTPUT), (_log_linear_carried, GRADIENTS), (_log_linear_gates, GRADIENTS),
    )  # fmt: skip
    half = [(64, "bf16", True), (128, "bf16", False), (256, "bf16", True)]
    wide = (256, "fp32", True)
    for arch, builds in (80, [half[0], half[2], wide]), (90, [*half, wide]), (100, [half[0], half[2], wide]):
        for width, dtype, state in builds:
            for kernel, table in products:
                yield _build(kernel, arch, table[arch, width, 2 if dtype == "bf16" else 4], width, dtype, state)
        for kernel, table in others:
            yield _build(kernel, arch, table[arch, 128, 2], 128, "bf16", True, products=False)
        yield _build(
            _log_linear_step, arch, Tile(128, _COLUMN_ELEMENTS // 128, 4, 1), 128, "bf16", True, products=False
        )
