"""The gradients of softmax attention: three kernels, no sum shared by two programs, results that repeat bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import LOG2E, Tile, TileTable, cast, dot, unit_stride
from effkit.kernels._softmax_tiles import (
    LENGTHS,
    Mask,
    blocks,
    in_band,
    key_range,
    load_tile,
    locate,
    pick,
    row_range,
    scores,
    segment,
    store_tile,
    three_parts,
    through_softcap,
    unit_vector,
    widths,
)


# One program owns BLOCK_M rows of one query head and writes their delta = sum_d do o - dlse: all that a row needs, next
# to its lse, for the gradient of its scores. It streams memory; short tiles stay in registers at every width.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_bwd_delta(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot,
    T, n_blocks, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b, _, head, block = locate(None, None, n_blocks, heads, BLOCK_M)
    start = block * BLOCK_M
    o = load_tile(o_ptr + b * stride_ob + head * stride_oh, stride_ot, start, T, BLOCK_M, DV, BLOCK_DV)
    do = load_tile(do_ptr + b * stride_dob + head * stride_doh, stride_dot, start, T, BLOCK_M, DV, BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = start + tl.arange(0, BLOCK_M)
    at = (b * heads + head) * T + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < T, other=0.0) * LOG2E  # lse is in units of log2
    tl.store(delta_ptr + at, delta, mask=rows < T)


@triton.jit
def _row_statistics(lse_ptr, delta_ptr, at, start, stop, ROWS: tl.constexpr):
    """lse and delta of rows [start, stop); outside, lse = inf makes every probability 0."""
    rows = start + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + at + rows, mask=rows < stop, other=float("inf"))
    return lse, tl.load(delta_ptr + at + rows, mask=rows < stop, other=0.0)


@triton.jit
def _sweep_dq(
    dq, q, do, lse, delta, position, k_ptr, v_ptr, stride_ks, stride_vs, start, stop, hi, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the key tiles of [start, stop) to dq: dq_i += sum_j p_ij (do_i v_j - delta_i) k_j."""
    for n in range(start, stop, BLOCK_N):
        k = load_tile(k_ptr, stride_ks, n, hi, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_ptr, stride_vs, n, hi, BLOCK_N, DV, BLOCK_DV)
        s = scores(dot(q, tl.trans(k)), scale, softcap)  # [BLOCK_M, BLOCK_N]
        exponent = s - lse[:, None]
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)[None, :]
            visible = in_band(position[:, None], keys, window, CAUSAL) & (keys < hi)
            exponent = tl.where(visible, exponent, float("-inf"))
        ds = tl.exp2(exponent) * (dot(do, tl.trans(v)) - delta[:, None])
        dq = dot(cast(through_softcap(ds, s, softcap), k.dtype), k, dq)
    return dq


# One program owns BLOCK_M rows of one query head: it reads them with their cotangents, sweeps the keys as the forward
# does, and writes dq. A kernel of its own, so that no two programs add to the same dq. The tile is the forward's,
# smaller where the second row operand needs the registers.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, sequence_ptr, n_blocks, n_sequences,
    T, S, heads, group, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, n, head, block = locate(sequence_ptr, cu_seqlens_ptr, n_blocks, heads, BLOCK_M)
    row_lo, row_hi, key_lo, key_hi, shift = segment(
        key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, n_sequences, n, T, S
    )
    start = row_lo + block * BLOCK_M
    if start >= row_hi:
        return
    q = load_tile(q_ptr + b * stride_qb + head * stride_qh, stride_qt, start, row_hi, BLOCK_M, D, BLOCK_D)
    do = load_tile(do_ptr + b * stride_dob + head * stride_doh, stride_dot, start, row_hi, BLOCK_M, DV, BLOCK_DV)
    lse, delta = _row_statistics(lse_ptr, delta_ptr, (b * heads + head) * T, start, row_hi, BLOCK_M)
    k_ptr += b * stride_kb + head // group * stride_kh
    v_ptr += b * stride_vb + head // group * stride_vh
    first = start + shift
    last = tl.minimum(start + BLOCK_M, row_hi) - 1 + shift
    position = first + tl.arange(0, BLOCK_M)
    lo, hi, all_lo, all_hi = key_range(first, last, key_lo, key_hi, window, CAUSAL)
    x, y = three_parts(lo, hi, all_lo, all_hi, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if window is not None:
        dq = _sweep_dq(
            dq, q, do, lse, delta, position, k_ptr, v_ptr, stride_ks, stride_vs, lo, x, hi, scale, softcap, window,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
        )  # fmt: skip
    dq = _sweep_dq(
        dq, q, do, lse, delta, position, k_ptr, v_ptr, stride_ks, stride_vs, x, y, hi, scale, softcap, window,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=False,
    )  # fmt: skip
    dq = _sweep_dq(
        dq, q, do, lse, delta, position, k_ptr, v_ptr, stride_ks, stride_vs, y, hi, hi, scale, softcap, window,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
    )  # fmt: skip
    store_tile(dq_ptr + b * stride_dqb + head * stride_dqh, stride_dqt, start, row_hi, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def _sweep_dkv(
    dk, dv, k, v, keys, alive, q_ptr, do_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot, start, stop, hi,
    shift, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the row tiles of [start, stop) to dk and dv. Scores are built keys by rows: no accumulator is transposed."""
    for t in range(start, stop, BLOCK_M):
        q = load_tile(q_ptr, stride_qt, t, hi, BLOCK_M, D, BLOCK_D)
        do = load_tile(do_ptr, stride_dot, t, hi, BLOCK_M, DV, BLOCK_DV)
        lse, delta = _row_statistics(lse_ptr, delta_ptr, at, t, hi, BLOCK_M)
        s = scores(dot(k, tl.trans(q)), scale, softcap)  # [BLOCK_N, BLOCK_M]
        exponent = s - lse[None, :]
        if MASKED:
            position = t + shift + tl.arange(0, BLOCK_M)[None, :]
            visible = in_band(position, keys[:, None], window, CAUSAL) & alive[:, None]
            exponent = tl.where(visible, exponent, float("-inf"))
        p = tl.exp2(exponent)
        if WANT_DV:
            dv = dot(cast(p, do.dtype), do, dv)
        if WANT_DK:
            ds = p * (dot(v, tl.trans(do)) - delta[None, :])
            dk = dot(cast(through_softcap(ds, s, softcap), q.dtype), q, dk)
    return dk, dv


# One program owns BLOCK_N keys of one kv head: it reads them once, sweeps the rows that see some of them, one query
# head of the group after the other, so that shared heads are summed in a fixed order, and writes dk and dv, or one of
# them. Two accumulators of BLOCK_N rows are alive at once; they bound the tile, and passing rows get its short side.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, sequence_ptr, n_blocks, n_sequences,
    T, S, heads, group, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, n, head, block = locate(sequence_ptr, cu_seqlens_ptr, n_blocks, heads // group, BLOCK_N)
    row_lo, row_hi, key_lo, key_hi, shift = segment(
        key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, n_sequences, n, T, S
    )
    own_lo, own_hi = 0, S
    if cu_seqlens_ptr is not None:
        own_lo, own_hi = row_lo, row_hi
    start = own_lo + block * BLOCK_N
    if start >= own_hi:
        return
    k = load_tile(k_ptr + b * stride_kb + head * stride_kh, stride_ks, start, own_hi, BLOCK_N, D, BLOCK_D)
    v = load_tile(v_ptr + b * stride_vb + head * stride_vh, stride_vs, start, own_hi, BLOCK_N, DV, BLOCK_DV)
    keys = start + tl.arange(0, BLOCK_N)
    alive = (keys >= key_lo) & (keys < key_hi)
    first = tl.maximum(start, key_lo)
    last = tl.minimum(start + BLOCK_N, key_hi) - 1
    lo, hi, all_lo, all_hi = row_range(first, last, row_lo, row_hi, shift, window, CAUSAL)
    if last - first < BLOCK_N - 1:  # some keys of the tile are not alive: no row sees them all
        all_lo = hi
    x, y = three_parts(lo, hi, all_lo, all_hi, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Rows from hi on have probability 0 by their lse: without a window no mask is needed from x on.
    unmasked_stop = hi
    if window is not None:
        unmasked_stop = y
    for g in range(group):
        query_head = head * group + g
        q_head_ptr = q_ptr + b * stride_qb + query_head * stride_qh
        do_head_ptr = do_ptr + b * stride_dob + query_head * stride_doh
        at = (b * heads + query_head) * T
        dk, dv = _sweep_dkv(
            dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot,
            lo, x, hi, shift, scale, softcap, window,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, WANT_DK, WANT_DV, MASKED=True,
        )  # fmt: skip
        dk, dv = _sweep_dkv(
            dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot,
            x, unmasked_stop, hi, shift, scale, softcap, window,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, WANT_DK, WANT_DV, MASKED=False,
        )  # fmt: skip
        if window is not None:
            dk, dv = _sweep_dkv(
                dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot,
                y, hi, hi, shift, scale, softcap, window,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, WANT_DK, WANT_DV, MASKED=True,
            )  # fmt: skip
    # Keys that are not alive may hold NaN, and 0 * NaN stays in their own rows: those gradients are 0.
    if WANT_DK:
        dk = tl.where(alive[:, None], dk * scale, 0.0)
        store_tile(dk_ptr + b * stride_dkb + head * stride_dkh, stride_dks, start, own_hi, dk, BLOCK_N, D, BLOCK_D)
    if WANT_DV:
        dv = tl.where(alive[:, None], dv, 0.0)
        store_tile(dv_ptr + b * stride_dvb + head * stride_dvh, stride_dvs, start, own_hi, dv, BLOCK_N, DV, BLOCK_DV)


# Tiles per (architecture, head width, bytes of an element); see _FWD in softmax_attention.
DQ: TileTable = {
    (80, 64, 2): Tile(128, 64, 8, 2), (80, 128, 2): Tile(64, 64, 8, 2), (80, 256, 2): Tile(32, 32, 8, 1),
    (80, 64, 4): Tile(32, 32, 4, 1), (80, 128, 4): Tile(32, 16, 8, 1), (80, 256, 4): Tile(16, 16, 8, 1),
    (90, 64, 2): Tile(128, 64, 8, 2), (90, 128, 2): Tile(128, 64, 8, 2), (90, 256, 2): Tile(128, 32, 8, 2),
    (90, 64, 4): Tile(32, 32, 4, 1), (90, 128, 4): Tile(32, 16, 8, 1), (90, 256, 4): Tile(16, 16, 8, 1),
    (100, 64, 2): Tile(128, 64, 8, 2), (100, 128, 2): Tile(64, 64, 4, 2), (100, 256, 2): Tile(128, 32, 8, 2),
    (100, 64, 4): Tile(32, 32, 4, 1), (100, 128, 4): Tile(32, 16, 8, 1), (100, 256, 4): Tile(16, 16, 8, 1),
}  # fmt: skip
DKV: TileTable = {
    (80, 64, 2): Tile(64, 32, 4, 2), (80, 128, 2): Tile(32, 64, 8, 2), (80, 256, 2): Tile(32, 64, 8, 1),
    (80, 64, 4): Tile(32, 32, 8, 1), (80, 128, 4): Tile(32, 32, 8, 1), (80, 256, 4): Tile(16, 16, 8, 1),
    (90, 64, 2): Tile(64, 128, 8, 1), (90, 128, 2): Tile(16, 128, 8, 2), (90, 256, 2): Tile(16, 64, 8, 2),
    (90, 64, 4): Tile(32, 32, 8, 1), (90, 128, 4): Tile(32, 32, 8, 1), (90, 256, 4): Tile(16, 16, 8, 1),
    (100, 64, 2): Tile(64, 128, 8, 1), (100, 128, 2): Tile(32, 128, 8, 1), (100, 256, 2): Tile(32, 32, 4, 1),
    (100, 64, 4): Tile(32, 32, 8, 1), (100, 128, 4): Tile(32, 32, 8, 1), (100, 256, 4): Tile(16, 16, 8, 1),
}  # fmt: skip
DELTA_ROWS = 16
_INTERPRETED = Tile(64, 64, 4, 1)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, q, k, v, mask = unit_stride(do), unit_stride(q), unit_stride(k), unit_stride(v), Mask(*options)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    B, H, T, _ = q.shape
    S = k.shape[2]
    sizes = widths(q, v)
    arguments = mask.arguments() | sizes | {"T": T, "S": S, "heads": H, "group": H // max(k.shape[1], 1)}
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    with torch.cuda.device_of(q):
        if lse.numel():
            n_blocks = triton.cdiv(T, DELTA_ROWS)
            _softmax_attention_bwd_delta[n_blocks * H * B,](
                o, do, unit_vector(dlse), delta, *o.stride()[:3], *do.stride()[:3],
                T, n_blocks, H, DV=sizes["DV"], BLOCK_DV=sizes["BLOCK_DV"], BLOCK_M=DELTA_ROWS,
            )  # fmt: skip
            tile = pick(DQ, q, v, _INTERPRETED)
            grid = blocks(T, tile.BLOCK_M, B, mask.cu_seqlens)
            _softmax_attention_bwd_dq[grid["n_blocks"] * H * B,](
                q, k, v, do, lse, delta, dq, *inputs, *dq.stride()[:3], **arguments, **grid, **tile._asdict()
            )
        if k.shape[:3].numel():
            tile = pick(DKV, q, v, _INTERPRETED)
            grid = blocks(S, tile.BLOCK_N, B, mask.cu_seqlens)
            for want in dkv_passes(sizes, q.element_size()):
                _softmax_attention_bwd_dkv[grid["n_blocks"] * k.shape[1] * B,](
                    q, k, v, do, lse, delta, dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3],
                    **arguments, **grid, **want, **tile._asdict(),
                )  # fmt: skip
    return dq, dk, dv, delta


def dkv_passes(sizes: dict[str, int], element_size: int) -> list[dict[str, bool]]:
    """dk and dv in one pass, or one each where a key and its value are too wide for the registers to hold both."""
    if (sizes["BLOCK_D"] + sizes["BLOCK_DV"]) * element_size <= 512:
        return [{"WANT_DK": True, "WANT_DV": True}]
    return [{"WANT_DK": True, "WANT_DV": False}, {"WANT_DK": False, "WANT_DV": True}]
