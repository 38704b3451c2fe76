"""The gradients of the delta rules in chunks: five kernels, no sum shared by two programs. See `_delta_chunks`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._chunk_tiles import (
    LENGTHS,
    WIDTHS,
    ChunkTable,
    Tile,
    across,
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
from effkit.kernels._common import cast, dot, unit_stride
from effkit.kernels._delta_chunks import EVERY, MEMORIES, PRODUCTS, Chunks, begin, below_diagonal, in_tiles, whole
from effkit.kernels._recurrent_ops import empty_memory, for_each_head, groups, strides, sum_heads
from effkit.kernels.chunk_scan import _key_gradient as key_gradient
from effkit.kernels.chunk_scan import _locate as locate
from effkit.kernels.chunk_scan import _query_gradient as query_gradient


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
    do_ptr += b * stride_dob + h * stride_doh + start * stride_dot + v
    do = load_block(do_ptr, stride_dot, 1, n_rows, V - v, C, BLOCK_V)
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


# The same where the gradient of the memory of all keys does not fit into registers: it stays in dfirst_ptr.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_dmemories_in_tiles(
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
    dfirst_ptr += bh * K * V + v
    begin(dlast_ptr, dfirst_ptr, bh * K * V + v, V - v, K, V, BLOCK_K, BLOCK_V)
    for m in range(N):
        n = N - 1 - m
        start = tl.cast(n, tl.int64) * C
        row = bh * T + start
        n_rows = T - start
        dmemory_ptr = dmemories_ptr + (bh * N + n) * K * V + v
        dvalues = tl.zeros([C, BLOCK_V], tl.float32)
        for k in range(0, K, BLOCK_K):
            dmemory = load_block(dfirst_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            store_block(dmemory_ptr + k * V, V, K - k, V - v, dmemory, BLOCK_K, BLOCK_V)
            keys = load_block(k_ptr + start * stride_kt + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
            dvalues = dot(keys, dmemory, dvalues)
        do = scale * load_block(do_ptr + start * stride_dot, stride_dot, 1, n_rows, V - v, C, BLOCK_V)
        decay = 1.0
        if c_ptr is not None:
            chunk_ptr = c_ptr + (bh * N + n) * 2 * C
            decay = across(chunk_ptr, C)
            dvalues *= to_end(chunk_ptr, C)[:, None]
            do *= from_start(chunk_ptr, C)[:, None]
        dvalues += load_block(dvalues_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        store_block(dvalues_ptr + row * V + v, V, n_rows, V - v, dvalues, C, BLOCK_V)
        tl.debug_barrier()  # all have read what is written next
        for k in range(0, K, BLOCK_K):
            dmemory = decay * load_block(dfirst_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            queries = load_block(q_ptr + start * stride_qt + k, stride_qt, 1, n_rows, K - k, C, BLOCK_K)
            dmemory = dot(tl.trans(queries), do, dmemory)
            erasures = load_block(erasures_ptr + row * K + k, K, 1, n_rows, K - k, C, BLOCK_K)
            dmemory = dot(tl.trans(erasures), -dvalues, dmemory)
            tl.debug_barrier()
            store_block(dfirst_ptr + k * V, V, K - k, V - v, dmemory, BLOCK_K, BLOCK_V)
        tl.debug_barrier()  # the next chunk may read what another thread of the program wrote


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
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    dbeta = tl.zeros([C], tl.float32)
    dm = tl.zeros([C, C], tl.float32)
    for v in range(0, V, BLOCK_V):
        dvalues = load_block(dvalues_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        x = dot(tl.trans(below), cast(dvalues, dtype), dvalues)
        store_block(x_ptr + row * V + v, V, n_rows, V - v, x, C, BLOCK_V)
        store_block(dv_ptr + v, stride_dvt, n_rows, V - v, beta[:, None] * x, C, BLOCK_V)
        dbeta += tl.sum(x * load_block(v_ptr + v, stride_vt, 1, n_rows, V - v, C, BLOCK_V).to(tl.float32), 1)
        values = load_block(values_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        dm = dot(cast(-x, dtype), tl.trans(values), dm)
    dm = below_diagonal(dm, c_ptr, C)
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


# Tiles: see PRODUCTS in _delta_chunks.
FROM_OUTPUTS = VALUE_GRADIENTS = KEY_GRADIENTS = PRODUCTS
DMEMORIES: ChunkTable = {
    **MEMORIES,
    (80, 128, 2): Tile(128, 32, 8, 2),
    (80, 256, 2): Tile(256, 32, 8, 1),
    (90, 256, 2): Tile(256, 32, 8, 1),
    (100, 256, 2): Tile(256, 16, 8, 2),
}
OUTPUT_GRADIENTS: ChunkTable = (
    {(*key, 2): Tile(64, 64, 8, 2) for key in EVERY}
    | {(80, width, 2): Tile(64, 32, 8, 1) for width in WIDTHS}
    | {(*key, 4): Tile(16, 16, 8, 1) for key in EVERY}
)


def backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
    first: Tensor | None, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = empty_gradients(do, dlast, q, k, v, g, beta, first, scale, chunk_size)
    dq, dk, dv, dg, dbeta, dfirst = grads
    if not do.numel():
        dfirst.zero_() if dlast is None else dfirst.copy_(dlast)
        return grads
    do, dlast = unit_stride(do), None if dlast is None else dlast.float().contiguous()
    call = Chunks(q, k, v, g, beta, first, scale, chunk_size)
    q, k, v, c, sizes = call.q, call.k, call.v, call.c, call.sizes
    q_group, k_group, v_group = groups(call.H, q, k, v)
    of_heads = [for_each_head(dx, call.H) for dx in (dq, dk, dv)]
    with torch.cuda.device_of(q):
        below = k.new_empty(call.B, call.H, call.N, call.C, call.C, dtype=torch.float32)
        values, erasures = call.solve(below)
        memories = call.remember(values, erasures, torch.empty_like(dfirst))

        dvalues, dmemories = call.rows(call.V, torch.float32), torch.empty_like(memories)
        tile = pick(FROM_OUTPUTS, q, v)
        _delta_from_outputs[call.programs * triton.cdiv(call.V, tile.BLOCK_V),](
            q, k, c, do, dvalues, *strides(q, k, do),
            q_group=q_group, k_group=k_group, scale=scale, **sizes, **tile._asdict(),
        )  # fmt: skip
        tile = whole(pick(DMEMORIES, q, v), q)
        kernel = _delta_dmemories_in_tiles if in_tiles(q) else _delta_dmemories
        kernel[call.B * call.H * triton.cdiv(call.V, tile.BLOCK_V),](
            q, k, c, do, erasures, dvalues, dlast, dmemories, dfirst, *strides(q, k, do),
            q_group=q_group, k_group=k_group, scale=scale, **sizes, **tile._asdict(),
        )  # fmt: skip

        dk_sum = call.rows(call.K, torch.float32)
        dg_parts = dg.new_empty(4, *dg.shape)
        _delta_output_gradients[2 * call.programs,](
            q, k, values, do, c, memories, dmemories, of_heads[0], dk_sum, dg_parts,
            *strides(q, k, do, of_heads[0]), dg.numel(), q_group=q_group, k_group=k_group, scale=scale,
            **sizes, **pick(OUTPUT_GRADIENTS, q, v)._asdict(),
        )  # fmt: skip
        x, pairs = call.rows(call.V), torch.empty_like(below, dtype=k.dtype)
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


def empty_gradients(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
    first: Tensor | None, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(unit_stride(x)) for x in (q, k, v))
    dbeta = do.new_empty(beta.shape, dtype=torch.float32)
    dg = do.new_empty(do.shape[:3] if g is not None else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, dbeta, empty_memory(q, v, beta.shape[1])
