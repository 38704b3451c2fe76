"""Exact attention in plain torch whose memory does not grow with T x S: blocks of query rows against their keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effkit.attention._mask import Mask


class BlockAttention(torch.autograd.Function):
    """Attention by blocks of query rows: scores of one block exist at a time, in forward and in backward.

    A block folds the query heads of one key head into its rows, so that keys are read once and never repeated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        key_starts: Tensor | None,
        query_offset: Tensor | None,
        causal: bool,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        mask = Mask.of(q, k, causal, window, key_lengths, cu_seqlens, key_starts, query_offset)
        queries, keys, values = mask.blank_padding(q, k, v)
        outs, lses = [], []
        for row, end in _row_blocks(q, k, window):
            lo, hi = mask.key_range(row, end, k.shape[2])
            scores = _scores(queries, keys, mask, (row, end, lo, hi), scale, softcap)[0]
            top = scores.amax(3, keepdim=True) if hi > lo else scores.new_full((*scores.shape[:3], 1), -math.inf)
            if sinks is not None:
                sink = _per_row(sinks, scores, end - row)
                top = torch.maximum(top, sink)
            top = top.clamp_min(torch.finfo(scores.dtype).min)  # rows that see nothing: exp(-inf - finite) = 0
            weights = torch.exp(scores - top)
            total = weights.sum(3, keepdim=True)
            if sinks is not None:
                total = total + torch.exp(sink - top)
            out = weights @ values[:, :, lo:hi].to(scores.dtype) / total.clamp_min(torch.finfo(scores.dtype).tiny)
            lse = torch.where(total > 0, top + total.log(), -math.inf)
            outs.append(unfold(out, q.shape[1]).to(q.dtype))
            lses.append(unfold(lse, q.shape[1])[..., 0])
        if not outs:
            return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=wide_dtype(q.dtype))
        return torch.cat(outs, 2), torch.cat(lses, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:8], *output)
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, key_lengths, cu_seqlens, key_starts, query_offset, out, lse = ctx.saved_tensors
        causal, window, scale, softcap = ctx.options
        mask = Mask.of(q, k, causal, window, key_lengths, cu_seqlens, key_starts, query_offset)
        queries, keys, values = mask.blank_padding(q, k, v)
        wide = wide_dtype(q.dtype)
        delta = (d_out.to(wide) * out.to(wide)).sum(3) - d_lse  # [B, Hq, T]
        finite = torch.where(lse == -math.inf, 0.0, lse)
        dq = []
        dk = torch.zeros_like(k, dtype=wide)
        dv = torch.zeros_like(v, dtype=wide)
        for row, end in _row_blocks(q, k, window):
            lo, hi = mask.key_range(row, end, k.shape[2])
            scores, slope = _scores(queries, keys, mask, (row, end, lo, hi), scale, softcap)
            weights = torch.exp(scores - fold(finite[:, :, row:end, None], k.shape[1]))
            d_block = fold(d_out[:, :, row:end].to(wide), k.shape[1])
            d_weights = d_block @ values[:, :, lo:hi].to(wide).mT
            d_scores = weights * (d_weights - fold(delta[:, :, row:end, None], k.shape[1])) * scale
            if slope is not None:
                d_scores = d_scores * slope
            dq.append(unfold(d_scores @ keys[:, :, lo:hi].to(wide), q.shape[1]))
            dk[:, :, lo:hi] += d_scores.mT @ fold(queries[:, :, row:end].to(wide), k.shape[1])
            dv[:, :, lo:hi] += weights.mT @ d_block
        d_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.to(wide)[:, None] - lse)  # each row's weight on its sink
            d_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
        d_q = torch.cat(dq, 2).to(q.dtype) if dq else torch.zeros_like(q)
        return (d_q, dk.to(k.dtype), dv.to(v.dtype), d_sinks, *[None] * 8)


def _scores(
    q: Tensor, k: Tensor, mask: Mask, block: tuple[int, int, int, int], scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, Hkv, G * rows, keys] of a block, and the slope of its softcap (None without one)."""
    row, end, lo, hi = block
    wide = wide_dtype(q.dtype)
    scores = fold(q[:, :, row:end].to(wide), k.shape[1]) @ k[:, :, lo:hi].to(wide).mT * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    if mask.cuts(row, end, lo, hi):
        hidden = ~mask.visible(row, end, lo, hi)
        group = q.shape[1] // k.shape[1]
        folded = scores.unflatten(2, (group, end - row)).masked_fill(hidden[:, :, None], -math.inf)
        scores = folded.flatten(2, 3)
    return scores, slope


def _row_blocks(q: Tensor, k: Tensor, window: int | None) -> list[tuple[int, int]]:
    """Ranges of query rows, of a size that keeps one block's scores in a few megabytes."""
    rows = q.shape[2]
    seen = k.shape[2] if window is None else min(k.shape[2], 2 * window)
    size = max(16, min(128, _BLOCK_SCORES // max(1, q.shape[0] * q.shape[1] * seen)))
    return [(row, min(row + size, rows)) for row in range(0, rows, size)]


_BLOCK_SCORES = 1 << 21


def fold(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, rows, n] -> [B, Hkv, G * rows, n]."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).flatten(2, 3)


def unfold(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, G * rows, n] -> [B, Hq, rows, n]."""
    group = heads // x.shape[1]
    return x.unflatten(2, (group, x.shape[2] // group)).flatten(1, 2)


def _per_row(sinks: Tensor, scores: Tensor, rows: int) -> Tensor:
    """sinks [Hq] -> [1, Hkv, G * rows, 1], beside the rows of a folded block."""
    heads = scores.shape[1]
    return sinks.to(scores.dtype).view(1, heads, -1, 1).repeat_interleave(rows, dim=2)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
