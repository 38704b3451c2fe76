"""Softmax attention of a few queries over many keys: grouped heads share a tile, the keys are split over programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import LOG2E, Tile, TileTable, cast, multiprocessors
from effkit.kernels._softmax_tiles import LENGTHS, attend, key_range, pick, segment

# Fewer queries than this come here: a tile of rows of one head would be mostly padding.
SHORT = 16


# One program owns up to BLOCK_M rows of one kv head and one split of their keys. A row is a pair (query, head of the
# group), so that the whole group reads a key once, and one query per head still fills a tile of a matrix instruction.
# It writes the output and lse of its split alone.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_decode(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, n_tiles, n_splits,
    T, S, heads, group, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % n_splits
    tile = pid // n_splits % n_tiles
    kv_head = (pid // n_splits // n_tiles % (heads // group)).to(tl.int64)
    b = (pid // n_splits // n_tiles // (heads // group)).to(tl.int64)
    _, _, key_lo, key_hi, shift = segment(key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, 0, b, T, S)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < T * group
    t = row // group
    head = kv_head * group + row % group
    columns = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + b * stride_qb + (head * stride_qh + t * stride_qt)[:, None] + columns[None, :],
        mask=live[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    first = tile * BLOCK_M // group + shift
    last = tl.minimum((tile + 1) * BLOCK_M, T * group) - 1
    lo, hi, all_lo, all_hi = key_range(first, last // group + shift, key_lo, key_hi, window, CAUSAL)
    share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), n_splits), BLOCK_N) * BLOCK_N
    lo += split * share
    hi = tl.minimum(hi, lo + share)
    o, lse = attend(
        q, t + shift, None, k_ptr + b * stride_kb + kv_head * stride_kh, v_ptr + b * stride_vb + kv_head * stride_vh,
        stride_ks, stride_vs, lo, hi, all_lo, all_hi,
        scale, softcap, window, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL,
    )  # fmt: skip
    at = ((b * heads + head) * T + t) * n_splits + split
    columns = tl.arange(0, BLOCK_DV)
    tl.store(part_ptr + at[:, None] * DV + columns[None, :], o, mask=live[:, None] & (columns < DV)[None, :])
    tl.store(part_lse_ptr + at, lse, mask=live)


# One program owns one query of one head: it reads what the splits found, weighs them by their lse, lets the sink join
# the denominator, and writes the output and lse. Splits come in blocks, in order: any number of them, one result.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_combine(
    part_ptr, part_lse_ptr, sinks_ptr, o_ptr, lse_ptr, stride_ob, stride_oh, stride_ot, T, heads, n_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = row % T
    head = row // T % heads
    b = row // T // heads
    columns = tl.arange(0, BLOCK_DV)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if sinks_ptr is not None:
        peak = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total += 1
    for s in range(0, n_splits, BLOCK_SPLITS):
        splits = s + tl.arange(0, BLOCK_SPLITS)
        live = splits < n_splits
        part_lse = tl.load(part_lse_ptr + row * n_splits + splits, mask=live, other=float("-inf"))
        part = tl.load(
            part_ptr + (row * n_splits + splits)[:, None] * DV + columns[None, :],
            mask=live[:, None] & (columns < DV)[None, :],
            other=0.0,
        )
        higher = tl.maximum(peak, tl.max(part_lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(part_lse - base)
        shrink = tl.exp2(peak - base)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = higher
    total = tl.where(peak == float("-inf"), 1.0, total)
    out_ptr = o_ptr + b * stride_ob + head * stride_oh + t * stride_ot
    tl.store(out_ptr + columns, cast(acc / total, o_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + row, peak + tl.log2(total))


# BLOCK_M is the most rows a tile takes; it shrinks to the next power of two that holds the rows there are.
DECODE: TileTable = {
    (80, 64, 2): Tile(64, 64, 4, 3), (80, 128, 2): Tile(64, 64, 4, 2), (80, 256, 2): Tile(32, 32, 4, 2),
    (80, 64, 4): Tile(32, 32, 4, 1), (80, 128, 4): Tile(32, 32, 8, 1), (80, 256, 4): Tile(16, 16, 8, 1),
    (90, 64, 2): Tile(64, 64, 4, 3), (90, 128, 2): Tile(64, 64, 4, 2), (90, 256, 2): Tile(32, 32, 4, 2),
    (90, 64, 4): Tile(32, 32, 4, 1), (90, 128, 4): Tile(32, 32, 8, 1), (90, 256, 4): Tile(16, 16, 8, 1),
    (100, 64, 2): Tile(64, 64, 4, 3), (100, 128, 2): Tile(64, 64, 4, 2), (100, 256, 2): Tile(32, 32, 4, 2),
    (100, 64, 4): Tile(32, 32, 4, 1), (100, 128, 4): Tile(32, 32, 8, 1), (100, 256, 4): Tile(16, 16, 8, 1),
}  # fmt: skip
_INTERPRETED = Tile(64, 16, 4, 1)  # several splits of several tiles at the lengths of tests
SPLITS_AT_ONCE = 16


def decode(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor, lse: Tensor, arguments: dict[str, Any]
) -> None:
    """Fill o and lse. As many splits as keep the device busy, while a split still has a few tiles of keys."""
    tile = pick(DECODE, q, v, _INTERPRETED)
    B, H, T, S = *q.shape[:3], k.shape[2]
    heads_kv = k.shape[1]
    rows = T * arguments["group"]
    block = min(tile.BLOCK_M, max(16, triton.next_power_of_2(rows)))
    n_tiles = triton.cdiv(rows, block)
    programs = B * heads_kv * n_tiles
    n_splits = max(1, min(triton.cdiv(2 * multiprocessors(q.device), programs), triton.cdiv(S, 4 * tile.BLOCK_N)))
    part = q.new_empty(B, H, T, n_splits, v.shape[-1], dtype=torch.float32)
    part_lse = q.new_empty(B, H, T, n_splits, dtype=torch.float32)
    _softmax_attention_decode[programs * n_splits,](
        q, k, v, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        n_tiles=n_tiles, n_splits=n_splits, **arguments, **tile._replace(BLOCK_M=block)._asdict(),
    )  # fmt: skip
    _softmax_attention_combine[B * H * T,](
        part, part_lse, sinks, o, lse, *o.stride()[:3], T, H, n_splits,
        DV=arguments["DV"], BLOCK_DV=arguments["BLOCK_DV"], BLOCK_SPLITS=SPLITS_AT_ONCE,
    )  # fmt: skip
