"""The delta rules in chunks: the triangular system of each, memories between them, their gradients, and decoding.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * q_t S_t

Within a chunk of C tokens, c the sums of g from its start, D_ij = exp(c_i - c_j), S the memory before it:

    A = (I + M)^-1           M_ij = beta_i D_ij (k_i k_j) for j < i
    writes = A diag(beta) V                     erasures = A diag(beta exp c) K
    values = writes - erasures S                what the tokens add to the memory, given what they find there
    o, S_next = those of the scalar-gated recurrence with these values (`chunk_scan`)

and backwards, with dvalues and the gradient G of S_next from that recurrence:

    X = A^T dvalues          dv = diag(beta) X        dM = -X values^T below the diagonal
    dk = from M, and -diag(beta exp c) X S^T          dbeta and dg likewise
    G_before = exp(c_last) G + scale * (diag(exp c) Q)^T do - erasures^T dvalues

Everything but the inputs is made again in the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._recurrent import RecurrentState, next_position
from effkit.attention.deltanet import l2_normalize
from effkit.kernels import chunk_scan
from effkit.kernels._chunk_tiles import (
    LENGTHS,
    WIDTHS,
    ChunkTable,
    Tile,
    across,
    build,
    chunk_decay,
    chunk_rows,
    from_start,
    load_block,
    pick,
    row_products,
    store_block,
    store_row,
    through_memory,
    to_end,
    weighted,
)
from effkit.kernels._common import AotSpec, cast, distinct, dot, unit_stride
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
from effkit.kernels.chunk_scan import _key_gradient as key_gradient
from effkit.kernels.chunk_scan import _locate as locate
from effkit.kernels.chunk_scan import _query_gradient as query_gradient


@triton.jit
def _diagonal(m, C: tl.constexpr, B: tl.constexpr):
    """The blocks on the diagonal of m [C, C], [C // B, B, B]."""
    n: tl.constexpr = C // B
    own = tl.arange(0, n)[:, None, None, None] == tl.arange(0, n)[None, None, :, None]
    return tl.sum(tl.where(own, tl.reshape(m, [n, B, n, B]), 0.0), 2)


@triton.jit
def _invert_16(m):
    """(I + m)^-1 of strictly lower m [n, 16, 16], from blocks of 2 by doubling as in _double, with masks for blocks."""
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    x = tl.where(i == j, 1.0, tl.where((i == j + 1) & (j % 2 == 0), -m, 0.0))
    for level in tl.static_range(1, 4):
        below = tl.where(((i >> level) == (j >> level) + 1) & ((j >> level) % 2 == 0), m, 0.0)
        x -= dot(dot(x, below), x)
    return x


@triton.jit
def _double(x, m, C: tl.constexpr, B: tl.constexpr):
    """Inverses x [2 n, B, B] of the diagonal blocks of I + m to those of blocks twice as large, [n, 2 B, 2 B].

    The inverse of [[a, 0], [m, b]] is [[a^-1, 0], [-b^-1 m a^-1, b^-1]].
    """
    n: tl.constexpr = C // (2 * B)
    quarters = tl.reshape(_diagonal(m, C, 2 * B), [n, 2, B, 2, B])
    _, lower = tl.split(tl.permute(quarters, [0, 2, 3, 4, 1]))
    below, _ = tl.split(tl.permute(lower, [0, 1, 3, 2]))  # [n, B, B]
    upper_left, lower_right = tl.split(tl.permute(tl.reshape(x, [n, 2, B, B]), [0, 2, 3, 1]))
    lower_left = -dot(dot(lower_right, below), upper_left)
    upper = tl.reshape(tl.permute(tl.join(upper_left, tl.zeros_like(upper_left)), [0, 1, 3, 2]), [n, B, 2 * B])
    lower = tl.reshape(tl.permute(tl.join(lower_left, lower_right), [0, 1, 3, 2]), [n, B, 2 * B])
    return tl.reshape(tl.permute(tl.join(upper, lower), [0, 3, 1, 2]), [n, 2 * B, 2 * B])


@triton.jit
def _invert(m, C: tl.constexpr):
    """(I + m)^-1 of strictly lower m [C, C], in float32: blocks of 16, doubled until they are one."""
    x = _invert_16(_diagonal(m, C, 16))
    if C >= 32:
        x = _double(x, m, C, 16)
    if C >= 64:
        x = _double(x, m, C, 32)
    return tl.reshape(x, [C, C])


@triton.jit
def _below(pairs, c_ptr, C: tl.constexpr):
    """D_ij times pairs (i, j) for j < i, else 0."""
    i = tl.arange(0, C)
    return tl.where(i[:, None] > i[None, :], weighted(pairs, c_ptr, C, KEYS_FIRST=False), 0.0)


@triton.jit
def _solved(inverse, strength, x, C: tl.constexpr):
    """inverse diag(strength) x, in float32. The ones on the diagonal of the inverse leave their rows of x unrounded."""
    i = tl.arange(0, C)
    below = tl.where(i[:, None] > i[None, :], inverse * strength[None, :], 0.0)
    return dot(cast(below, x.dtype), x, strength[:, None] * x.to(tl.float32))


# One program owns a chunk of one head: it reads its keys twice and its values once, and writes its writes and erasures,
# and, for the backward pass, the inverse below its diagonal of ones. Writes stay in float32: what is added to the
# memory is rounded once, later.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_system(
    k_ptr, v_ptr, beta_ptr, c_ptr, writes_ptr, erasures_ptr, below_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    T, N, H, k_group, v_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    row = (b * H + h) * T + start
    n_rows = T - start
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    i = tl.arange(0, C)
    beta = tl.load(beta_ptr + row + i, mask=i < n_rows, other=0.0)
    strength = beta
    if c_ptr is not None:
        c_ptr += at * 2 * C
        strength *= from_start(c_ptr, C)
    similarities = row_products(k_ptr, k_ptr, stride_kt, stride_kt, n_rows, K, C, BLOCK_K)
    inverse = _invert(beta[:, None] * _below(similarities, c_ptr, C), C)
    if below_ptr is not None:
        store_block(below_ptr + at * C * C, C, C, C, tl.where(i[:, None] > i[None, :], inverse, 0.0), C, C)
    for v in range(0, V, BLOCK_V):
        values = load_block(v_ptr + v, stride_vt, 1, n_rows, V - v, C, BLOCK_V)
        store_block(writes_ptr + row * V + v, V, n_rows, V - v, _solved(inverse, beta, values, C), C, BLOCK_V)
    for k in range(0, K, BLOCK_K):
        keys = load_block(k_ptr + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
        store_block(erasures_ptr + row * K + k, K, n_rows, K - k, _solved(inverse, strength, keys, C), C, BLOCK_K)


# One program owns BLOCK_V columns of one head's memory, with all their keys, since what a token finds under its key
# takes them all. It goes from chunk to chunk, and writes the memory before each, the values, and what is left.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_memories(
    k_ptr, c_ptr, values_ptr, erasures_ptr, first_ptr, memories_ptr, last_ptr,
    stride_kb, stride_kh, stride_kt, T, N, H, k_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    k_ptr += b * stride_kb + h // k_group * stride_kh
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + bh * K * V + v, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    for n in range(N):
        start = tl.cast(n, tl.int64) * C
        row = bh * T + start
        n_rows = T - start
        store_block(memories_ptr + (bh * N + n) * K * V + v, V, K, V - v, memory, BLOCK_K, BLOCK_V)
        writes = load_block(values_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        erasures = load_block(erasures_ptr + row * K, K, 1, n_rows, K, C, BLOCK_K)
        keys = load_block(k_ptr + start * stride_kt, stride_kt, 1, n_rows, K, C, BLOCK_K)
        values = writes - dot(erasures, cast(memory, dtype))
        store_block(values_ptr + row * V + v, V, n_rows, V - v, values, C, BLOCK_V)
        if c_ptr is not None:
            chunk_ptr = c_ptr + (bh * N + n) * 2 * C
            memory *= across(chunk_ptr, C)
            values *= to_end(chunk_ptr, C)[:, None]
        memory = dot(tl.trans(keys), values, memory)
    store_block(last_ptr + bh * K * V + v, V, K, V - v, memory, BLOCK_K, BLOCK_V)


# One program owns a chunk of one head and BLOCK_V columns: what their outputs within the chunk say of the values.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_from_outputs(
    q_ptr, k_ptr, c_ptr, do_ptr, dvalues_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_dob, stride_doh, stride_dot,
    T, N, H, q_group, k_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, v = locate(N, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    start = tl.cast(n, tl.int64) * C
    n_rows = T - start
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    if c_ptr is not None:
        c_ptr += ((b * H + h) * N + n) * 2 * C
    pairs = row_products(k_ptr, q_ptr, stride_kt, stride_qt, n_rows, K, C, BLOCK_K)  # [keys, queries]
    pairs = scale * weighted(pairs, c_ptr, C, KEYS_FIRST=True)
    do = load_block(do_ptr + b * stride_dob + h * stride_doh + start * stride_dot + v, stride_dot, 1, n_rows, V - v,
                    C, BLOCK_V)  # fmt: skip
    dvalues_ptr += ((b * H + h) * T + start) * V + v
    store_block(dvalues_ptr, V, n_rows, V - v, dot(cast(pairs, do.dtype), do), C, BLOCK_V)


# One program owns BLOCK_V columns of one head's memory, with all their keys: the gradient of the memory from behind the
# last chunk to before the first, written behind each chunk and before all, and its part of the gradient of the values.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_dmemories(
    q_ptr, k_ptr, c_ptr, do_ptr, erasures_ptr, dvalues_ptr, dlast_ptr, dmemories_ptr, dfirst_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_dob, stride_doh, stride_dot,
    T, N, H, q_group, k_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    q_ptr += b * stride_qb + h // q_group * stride_qh
    k_ptr += b * stride_kb + h // k_group * stride_kh
    do_ptr += b * stride_dob + h * stride_doh + v
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    dmemory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if dlast_ptr is not None:
        dmemory = load_block(dlast_ptr + bh * K * V + v, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    for m in range(N):
        n = N - 1 - m
        start = tl.cast(n, tl.int64) * C
        row = bh * T + start
        n_rows = T - start
        store_block(dmemories_ptr + (bh * N + n) * K * V + v, V, K, V - v, dmemory, BLOCK_K, BLOCK_V)
        keys = load_block(k_ptr + start * stride_kt, stride_kt, 1, n_rows, K, C, BLOCK_K)
        queries = load_block(q_ptr + start * stride_qt, stride_qt, 1, n_rows, K, C, BLOCK_K)
        erasures = load_block(erasures_ptr + row * K, K, 1, n_rows, K, C, BLOCK_K)
        do = scale * load_block(do_ptr + start * stride_dot, stride_dot, 1, n_rows, V - v, C, BLOCK_V).to(tl.float32)
        dvalues = dot(keys, cast(dmemory, dtype))
        if c_ptr is not None:
            chunk_ptr = c_ptr + (bh * N + n) * 2 * C
            dmemory *= across(chunk_ptr, C)
            dvalues *= to_end(chunk_ptr, C)[:, None]
            do *= from_start(chunk_ptr, C)[:, None]
        dvalues += load_block(dvalues_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        store_block(dvalues_ptr + row * V + v, V, n_rows, V - v, dvalues, C, BLOCK_V)
        dmemory = dot(tl.trans(queries), cast(do, dtype), dmemory)
        dmemory = dot(tl.trans(erasures), cast(-dvalues, dtype), dmemory)
    store_block(dfirst_ptr + bh * K * V + v, V, K, V - v, dmemory, BLOCK_K, BLOCK_V)


# One program owns a chunk of one head. It takes the gradient of the values back through the inverse, to X, and from
# there to v and to M. With E = D o dM below the diagonal it writes
#
#     dv = diag(beta) X          dbeta = rows of X o V + rows of E o K K^T          pairs = diag(beta) E
#
# Gate t decays the pairs j < t <= i of M: it gets the sums over i >= t of (row sum - column sum) of pairs o K K^T.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_value_gradients(
    k_ptr, v_ptr, beta_ptr, c_ptr, values_ptr, below_ptr, dvalues_ptr, x_ptr, pairs_ptr, dv_ptr, dbeta_ptr, dg_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_dvb, stride_dvh, stride_dvt,
    T, N, H, k_group, v_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    row = (b * H + h) * T + start
    n_rows = T - start
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    dv_ptr += b * stride_dvb + h * stride_dvh + start * stride_dvt
    i = tl.arange(0, C)
    beta = tl.load(beta_ptr + row + i, mask=i < n_rows, other=0.0)
    if c_ptr is not None:
        c_ptr += at * 2 * C
    below = load_block(below_ptr + at * C * C, C, 1, C, C, C, C)
    dbeta = tl.zeros([C], tl.float32)
    dm = tl.zeros([C, C], tl.float32)
    for v in range(0, V, BLOCK_V):
        dvalues = load_block(dvalues_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        x = dot(tl.trans(below), cast(dvalues, below.dtype), dvalues)
        store_block(x_ptr + row * V + v, V, n_rows, V - v, x, C, BLOCK_V)
        store_block(dv_ptr + v, stride_dvt, n_rows, V - v, beta[:, None] * x, C, BLOCK_V)
        dbeta += tl.sum(x * load_block(v_ptr + v, stride_vt, 1, n_rows, V - v, C, BLOCK_V).to(tl.float32), 1)
        values = load_block(values_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        dm = dot(cast(-x, below.dtype), tl.trans(values), dm)
    dm = _below(dm, c_ptr, C)
    store_block(pairs_ptr + at * C * C, C, C, C, beta[:, None] * dm, C, C)
    dm *= row_products(k_ptr, k_ptr, stride_kt, stride_kt, n_rows, K, C, BLOCK_K)
    rows = tl.sum(dm, 1)
    store_row(dbeta_ptr + row, dbeta + rows, n_rows, C)
    if c_ptr is not None:
        dg = tl.cumsum(beta * rows - tl.sum(beta[:, None] * dm, 0), 0, reverse=True)
        store_row(dg_ptr + row, dg, n_rows, C)


# Two programs share a chunk of one head: the first writes dq, the second what outputs and memories say of k, both as in
# the scalar-gated recurrence, of values in place of v.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_output_gradients(
    q_ptr, k_ptr, values_ptr, do_ptr, c_ptr, memories_ptr, dmemories_ptr, dq_ptr, dk_ptr, dg_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt, stride_dg,
    T, N, H, q_group, k_group, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, place, _, _ = locate(2 * N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    n = place // 2
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    row = (b * H + h) * T + start
    n_rows = T - start
    q_ptr += b * stride_qb + h // q_group * stride_qh + start * stride_qt
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    do_ptr += b * stride_dob + h * stride_doh + start * stride_dot
    values_ptr += row * V
    memories_ptr += at * K * V
    dmemories_ptr += at * K * V
    if c_ptr is not None:
        c_ptr += at * 2 * C
        dg_ptr += row
    if place % 2 == 0:
        query_gradient(
            dq_ptr + b * stride_dqb + h * stride_dqh + start * stride_dqt, dg_ptr,
            q_ptr, k_ptr, values_ptr, do_ptr, c_ptr, memories_ptr,
            stride_dqt, stride_qt, stride_kt, V, stride_dot, n_rows, scale, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    else:
        if c_ptr is not None:
            dg_ptr += stride_dg
        key_gradient(
            dk_ptr + row * K, dg_ptr, q_ptr, k_ptr, values_ptr, do_ptr, c_ptr, memories_ptr, dmemories_ptr,
            K, stride_qt, stride_kt, V, stride_dot, n_rows, scale, K, V, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip


# One program owns a chunk of one head. With F = diag(exp c) X S^T, the gradient of what keys erase, it completes
#
#     dk = (pairs + pairs^T) K - diag(beta) F          dbeta = -rows of F o K
#
# and dg, where gate t decays what erasures i >= t find: the sums over i >= t of beta times these rows.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_key_gradients(
    k_ptr, beta_ptr, c_ptr, x_ptr, pairs_ptr, memories_ptr, dk_sum_ptr, dk_ptr, dbeta_ptr, dg_ptr,
    stride_kb, stride_kh, stride_kt, stride_dkb, stride_dkh, stride_dkt,
    T, N, H, k_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    row = (b * H + h) * T + start
    n_rows = T - start
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    dk_ptr += b * stride_dkb + h * stride_dkh + start * stride_dkt
    memories_ptr += at * K * V
    i = tl.arange(0, C)
    beta = tl.load(beta_ptr + row + i, mask=i < n_rows, other=0.0)
    decay = tl.full([C], 1.0, tl.float32)
    if c_ptr is not None:
        decay = from_start(c_ptr + at * 2 * C, C)
    pairs = load_block(pairs_ptr + at * C * C, C, 1, C, C, C, C)
    found = tl.zeros([C], tl.float32)
    for k in range(0, K, BLOCK_K):
        keys = load_block(k_ptr + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
        erased = decay[:, None] * through_memory(
            x_ptr + row * V, V, n_rows, memories_ptr + k * V, 1, V, K - k, V, C, BLOCK_V, BLOCK_K
        )  # fmt: skip
        found += tl.sum(erased * keys.to(tl.float32), 1)
        dk = load_block(dk_sum_ptr + row * K + k, K, 1, n_rows, K - k, C, BLOCK_K) - beta[:, None] * erased
        dk = dot(tl.trans(pairs), keys, dot(pairs, keys, dk))
        store_block(dk_ptr + k, stride_dkt, n_rows, K - k, dk, C, BLOCK_K)
    dbeta = tl.load(dbeta_ptr + row + i, mask=i < n_rows, other=0.0)
    store_row(dbeta_ptr + row, dbeta - found, n_rows, C)
    if c_ptr is not None:
        store_row(dg_ptr + row, tl.cumsum(-beta * found, 0, reverse=True), n_rows, C)


# One program owns BLOCK_V columns of one head's memory: it reads them once, takes the tokens one by one, and writes
# them once. All keys of a column are in the program, so that an output needs no other; the tile fills its registers.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_recurrence(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, first_ptr, o_ptr, last_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot,
    T, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
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
    for t in range(T):
        if g_ptr is not None:
            memory *= tl.exp(tl.load(g_ptr + b * stride_gb + h * stride_gh + t * stride_gt).to(tl.float32))
        q = tl.load(q_ptr + t * stride_qt, mask=rows < K, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t * stride_kt, mask=rows < K, other=0.0).to(tl.float32)
        values = tl.load(v_ptr + t * stride_vt, mask=columns < V - v, other=0.0).to(tl.float32)
        error = values - tl.sum(k[:, None] * memory, 0)
        memory += k[:, None] * (tl.load(beta_ptr + (b * H + h) * T + t) * error)[None, :]
        o = scale * tl.sum(q[:, None] * memory, 0)
        tl.store(o_ptr + t * stride_ot, cast(o, o_ptr.dtype.element_ty), mask=columns < V - v)
    store_block(last_ptr + at, V, K, V - v, memory, BLOCK_K, BLOCK_V)


_COLUMN_ELEMENTS = 4096  # of the memory that one program of the recurrence holds

# The largest tiles that compile without spills, not timed on a device; those for 80 fit into the 99 KiB of its smaller
# relatives. Where a program holds all keys of a head, few columns of values leave more programs to run side by side.
_EVERY = tuple(itertools.product((80, 90, 100), WIDTHS))
SYSTEM: ChunkTable = {(*key, 2): Tile(64, 64, 4, 2) for key in _EVERY} | {
    (*key, 4): Tile(32, 32, 8, 1) for key in _EVERY
}
FROM_OUTPUTS: ChunkTable = dict(SYSTEM)
VALUE_GRADIENTS: ChunkTable = dict(SYSTEM)
KEY_GRADIENTS: ChunkTable = dict(SYSTEM)
OUTPUT: ChunkTable = {(*key, 2): Tile(64, 64, 8, 2) for key in _EVERY} | {
    (*key, 4): Tile(32, 32, 8, 1) for key in _EVERY
}
OUTPUT_GRADIENTS: ChunkTable = (
    {(*key, 2): Tile(64, 64, 8, 2) for key in _EVERY}
    | {(80, width, 2): Tile(64, 32, 8, 1) for width in WIDTHS}
    | {(*key, 4): Tile(16, 16, 8, 1) for key in _EVERY}
)
_COLUMNS = {(arch, width, 4): Tile(width, 16, 8, 1) for arch, width in _EVERY} | {
    (arch, width, 2): Tile(width, 32, 4, 2) for arch, width in _EVERY
}
MEMORIES: ChunkTable = _COLUMNS | {(arch, 256, 2): Tile(256, 32, 8, 2) for arch in (80, 90, 100)}
DMEMORIES: ChunkTable = _COLUMNS | {
    (80, 128, 2): Tile(128, 32, 8, 2),
    (80, 256, 2): Tile(256, 32, 8, 1),
    (90, 256, 2): Tile(256, 32, 8, 1),
    (100, 256, 2): Tile(256, 16, 8, 2),
}


def _whole(tile: Tile, q: Tensor) -> Tile:
    """The tile with all keys of a head."""
    return tile._replace(BLOCK_K=max(16, triton.next_power_of_2(q.shape[3])))


class _Chunks:
    """The inputs of one call as the kernels take them, and the launches that both passes share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float,
        chunk_size: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.beta = unit_stride(q), unit_stride(k), unit_stride(v), beta.float().contiguous()
        self.first = None if first is None else first.float().contiguous()
        self.scale, self.C = scale, chunk_rows(q.shape[2], chunk_size)
        self.B, self.H, self.T = beta.shape
        self.K, self.V, self.N = q.shape[3], v.shape[3], triton.cdiv(self.T, self.C)
        self.c = None if g is None else chunk_decay(g, self.C)
        self.sizes = dict(T=self.T, N=self.N, H=self.H, K=self.K, V=self.V, C=self.C)
        self.programs = self.B * self.H * self.N

    def rows(self, width: int) -> Tensor:
        """Scratch for each token of each head."""
        return self.k.new_empty(self.B, self.H, self.T, width)

    def solve(self, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """writes and erasures; fills the inverse below its diagonal."""
        writes, erasures = self.rows(self.V).float(), self.rows(self.K)
        k_group, v_group = groups(self.H, self.k, self.v)
        _delta_system[self.programs,](
            self.k, self.v, self.beta, self.c, writes, erasures, below, *strides(self.k, self.v),
            k_group=k_group, v_group=v_group, **self.sizes, **pick(SYSTEM, self.q, self.v)._asdict(),
        )  # fmt: skip
        return writes, erasures

    def remember(self, values: Tensor, erasures: Tensor, last: Tensor) -> Tensor:
        """The memory before each chunk; fills last, and makes values of writes, in place."""
        memories = empty_memory(self.q, self.v, self.H, self.N, dtype=self.k.dtype)
        tile = _whole(pick(MEMORIES, self.q, self.v), self.q)
        _delta_memories[self.B * self.H * triton.cdiv(self.V, tile.BLOCK_V),](
            self.k, self.c, values, erasures, self.first, memories, last, *strides(self.k),
            k_group=self.H // self.k.shape[1], **self.sizes, **tile._asdict(),
        )  # fmt: skip
        return memories


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    o, last = _fake_forward(q, k, v, g, beta, first, scale, chunk_size)
    if not o.numel():
        return o, last.zero_() if first is None else last.copy_(first)
    with torch.cuda.device_of(q):
        if q.shape[2] < SHORT:
            _recur(q, k, v, g, beta, first, o, last, scale)
            return o, last
        call = _Chunks(q, k, v, g, beta, first, scale, chunk_size)
        values, erasures = call.solve(None)
        memories = call.remember(values, erasures, last)
        tile = pick(OUTPUT, q, v)
        chunk_scan._chunk_output[call.programs,](
            call.q, call.k, values, call.c, memories, o, *strides(call.q, call.k, values, o),
            q_group=call.H // q.shape[1], k_group=call.H // k.shape[1], v_group=1, scale=scale,
            **call.sizes, **tile._asdict(),
        )  # fmt: skip
    return o, last


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return empty_output(q, k, v), empty_memory(q, v, beta.shape[1])


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, o: Tensor, last: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Fill o and last, token by token."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    B, H, T, V = o.shape
    block_k = max(16, triton.next_power_of_2(q.shape[3]))
    block_v = min(max(16, _COLUMN_ELEMENTS // block_k), max(16, triton.next_power_of_2(V)))
    _delta_recurrence[B * H * triton.cdiv(V, block_v),](
        q, k, v, g, beta.float().contiguous(), None if first is None else first.float().contiguous(), o, last,
        *strides(q, k, v), *((0, 0, 0) if g is None else g.stride()), *strides(o),
        T, H, *groups(H, q, k, v), scale, K=q.shape[3], V=V, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
    first: Tensor | None, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _fake_backward(do, dlast, q, k, v, g, beta, first, scale, chunk_size)
    dq, dk, dv, dg, dbeta, dfirst = grads
    if not do.numel():
        dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
        return grads
    do, dlast = unit_stride(do), None if dlast is None else dlast.float().contiguous()
    call = _Chunks(q, k, v, g, beta, first, scale, chunk_size)
    q, k, v, c, sizes = call.q, call.k, call.v, call.c, call.sizes
    q_group, k_group, v_group = groups(call.H, q, k, v)
    of_heads = [for_each_head(dx, call.H) for dx in (dq, dk, dv)]
    with torch.cuda.device_of(q):
        below = k.new_empty(call.B, call.H, call.N, call.C, call.C)
        values, erasures = call.solve(below)
        memories = call.remember(values, erasures, torch.empty_like(dfirst))

        dvalues, dmemories = call.rows(call.V).float(), torch.empty_like(memories)
        tile = pick(FROM_OUTPUTS, q, v)
        _delta_from_outputs[call.programs * triton.cdiv(call.V, tile.BLOCK_V),](
            q, k, c, do, dvalues, *strides(q, k, do),
            q_group=q_group, k_group=k_group, scale=scale, **sizes, **tile._asdict(),
        )  # fmt: skip
        tile = _whole(pick(DMEMORIES, q, v), q)
        _delta_dmemories[call.B * call.H * triton.cdiv(call.V, tile.BLOCK_V),](
            q, k, c, do, erasures, dvalues, dlast, dmemories, dfirst, *strides(q, k, do),
            q_group=q_group, k_group=k_group, scale=scale, **sizes, **tile._asdict(),
        )  # fmt: skip

        dk_sum = call.rows(call.K).float()
        dg_parts = dg.new_empty(4, *dg.shape)
        _delta_output_gradients[2 * call.programs,](
            q, k, values, do, c, memories, dmemories, of_heads[0], dk_sum, dg_parts,
            *strides(q, k, do, of_heads[0]), dg.numel(), q_group=q_group, k_group=k_group, scale=scale,
            **sizes, **pick(OUTPUT_GRADIENTS, q, v)._asdict(),
        )  # fmt: skip
        x, pairs = call.rows(call.V), torch.empty_like(below)
        _delta_value_gradients[call.programs,](
            k, v, call.beta, c, values, below, dvalues, x, pairs, of_heads[2], dbeta, dg_parts[2],
            *strides(k, v, of_heads[2]), k_group=k_group, v_group=v_group,
            **sizes, **pick(VALUE_GRADIENTS, q, v)._asdict(),
        )  # fmt: skip
        _delta_key_gradients[call.programs,](
            k, call.beta, c, x, pairs, memories, dk_sum, of_heads[1], dbeta, dg_parts[3], *strides(k, of_heads[1]),
            k_group=k_group, **sizes, **pick(KEY_GRADIENTS, q, v)._asdict(),
        )  # fmt: skip
    for dx, each in zip((dq, dk, dv), of_heads, strict=True):
        sum_heads(dx, each)
    torch.sum(dg_parts, 0, out=dg)
    return grads


def _fake_backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
    first: Tensor | None, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    dbeta = do.new_empty(beta.shape, dtype=torch.float32)
    dg = do.new_empty(do.shape[:3] if g is not None else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, dbeta, empty_memory(q, v, beta.shape[1])


_OPTIONS = "float scale, int chunk_size"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? first"
_forward_op = define("delta_rule_forward", _INPUTS, _OPTIONS, "Tensor o, Tensor last", _forward, _fake_forward)
_backward_op = define(
    "delta_rule_backward",
    f"Tensor do, Tensor? dlast, {_INPUTS}",
    _OPTIONS,
    "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dfirst",
    _backward,
    _fake_backward,
)


class _DeltaRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward_op(q, k, v, g, beta, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, beta, first = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        dq, dk, dv, dg, dbeta, dfirst = _DeltaRuleBackward.apply(
            do, dlast, q, k, v, g, beta, first, ctx.scale, ctx.chunk_size
        )  # fmt: skip
        dg = None if g is None else dg.to(g.dtype)
        return dq, dk, dv, dg, dbeta.to(beta.dtype), None if first is None else dfirst.to(first.dtype), None, None


class _DeltaRuleBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
        first: Tensor | None, scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(do, dlast, q, k, v, g, beta, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of the delta rules have no second derivative; backend="reference" has')


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.gated_delta_rule, which documents and has checked the arguments."""
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    first = None if initial_state is None else initial_state.memory
    o, last = _DeltaRule.apply(*distinct(q, k, v, g, beta, first), scale, chunk_size)
    return o, RecurrentState(last, next_position(q, initial_state))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.delta_rule: the same without gates."""
    return gated_delta_rule(
        q, k, v, None, beta, initial_state=initial_state, scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size
    )


_FLOAT32 = (
    "beta_ptr", "writes_ptr", "values_ptr", "first_ptr", "last_ptr", "dvalues_ptr", "dlast_ptr", "dfirst_ptr",
    "dk_sum_ptr", "dbeta_ptr", "dg_ptr", "g_ptr",
)  # fmt: skip
_GATES = ("c_ptr", "g_ptr", "dg_ptr")


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    kernels = (
        (_delta_system, SYSTEM),
        (_delta_memories, MEMORIES),
        (_delta_from_outputs, FROM_OUTPUTS),
        (_delta_dmemories, DMEMORIES),
        (_delta_output_gradients, OUTPUT_GRADIENTS),
        (_delta_value_gradients, VALUE_GRADIENTS),
        (_delta_key_gradients, KEY_GRADIENTS),
    )
    half = [(64, "bf16", "plain"), (128, "bf16", "gated"), (256, "bf16", "gated")]
    # float32 has the same tiles and the same instructions everywhere: one architecture speaks for all.
    for arch, builds in (80, [*half, (64, "fp32", "gated")]), (90, half), (100, half):
        for width, dtype, variant in builds:
            key = arch, width, 2 if dtype == "bf16" else 4
            absent = _GATES if variant == "plain" else ()
            for kernel, table in kernels:
                yield build(kernel, arch, table[key], width, dtype, variant, float32=_FLOAT32, absent=absent)
            output, tile = chunk_scan._chunk_output, OUTPUT[key]
            yield build(output, arch, tile, width, dtype, f"{variant}-values", float32=("v_ptr",), absent=absent)
        column = Tile(128, _COLUMN_ELEMENTS // 128, 4, 1)
        yield build(_delta_recurrence, arch, column, 128, "bf16", "gated", float32=_FLOAT32, products=False)
