"""The tile arithmetic of softmax attention: who sees whom, which tiles matter, the online softmax, the launch.

Rows are queries; rows and keys are counted from the start of their tensor. A row's position is row + shift. It sees the
keys of [key_lo, key_hi) that do not lie after its position (causal), nor `window` or more before it (windowed).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, LOG2E, Tile, TileTable, architecture, cast, dot, tanh

# Lengths change from call to call; a build for "multiple of 16" and another for "1" would buy nothing.
LENGTHS = ["T", "S", "n_blocks", "n_sequences", "n_tiles", "n_splits", "heads", "group", "window"]


@triton.jit
def locate(sequence_ptr, cu_seqlens_ptr, n_blocks, heads, BLOCK: tl.constexpr):
    """Which batch row, head and block of rows (or keys) this program owns: (b, sequence, head, block).

    Packed: sequence n takes the blocks from cu_seqlens[n] // BLOCK + n on, always enough for its tokens; the blocks it
    does not need lie behind its end.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks % heads).to(tl.int64)
    b = (pid // n_blocks // heads).to(tl.int64)
    n = b
    if sequence_ptr is not None:
        n = tl.load(sequence_ptr + block)
        block = tl.maximum(block - tl.load(cu_seqlens_ptr + n) // BLOCK - n, 0)
    return b, n, head, block


@triton.jit
def clamped(ptr, i, default, high):
    """ptr[i] within [0, high], so that no bad length leads outside a tensor; default where there is no ptr."""
    value = default
    if ptr is not None:
        value = tl.minimum(tl.maximum(tl.load(ptr + i).to(tl.int32), 0), high)
    return value


@triton.jit
def segment(key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, sequences, n, T, S):
    """The rows of sequence n, the keys they may see and the shift: (row_lo, row_hi, key_lo, key_hi, shift).

    Packed: sequence number `sequences` is the rest behind the last token; its rows see no key.
    """
    if cu_seqlens_ptr is not None:
        rest = n == sequences
        row_lo = clamped(cu_seqlens_ptr, n, 0, T)
        row_hi = tl.where(rest, T, clamped(cu_seqlens_ptr, tl.minimum(n + 1, sequences), T, T))
        key_lo, key_hi, shift = tl.where(rest, T, row_lo), row_hi, 0
    else:
        row_lo, row_hi = 0, T
        key_lo, key_hi = clamped(key_starts_ptr, n, 0, S), clamped(key_lengths_ptr, n, S, S)
        shift = S - T
    if query_offset_ptr is not None:
        shift = tl.load(query_offset_ptr + n).to(tl.int32)
    return row_lo, row_hi, key_lo, key_hi, shift


@triton.jit
def load_tile(ptr, stride, start, stop, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [start, start + ROWS) of a matrix as [ROWS, COLUMNS]; zero from row `stop` and column WIDTH on."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    return tl.load(ptrs, mask=(start + rows < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, stride, start, stop, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of load_tile: x rounded to the matrix's dtype."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (start + rows < stop)[:, None] & (columns < WIDTH)[None, :]
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def scores(products, scale, softcap):
    """Products q.k to scores in units of log2, so that exp2 serves; scaled after the product, which keeps its bits."""
    if softcap is None:
        score = products * (scale * LOG2E)
    else:
        score = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    return score


@triton.jit
def through_softcap(grad, score, softcap):
    """The gradient of a score taken back through the cap: d tanh = 1 - tanh^2."""
    if softcap is not None:
        capped = score / (softcap * LOG2E)
        grad *= 1 - capped * capped
    return grad


@triton.jit
def in_band(position, keys, window, CAUSAL: tl.constexpr):
    """Whether a key lies where a causal, perhaps windowed, query at `position` looks."""
    visible = keys == keys
    if CAUSAL:
        visible = keys <= position
    if window is not None:
        visible &= keys > position - window
    return visible


@triton.jit
def key_range(first, last, key_lo, key_hi, window, CAUSAL: tl.constexpr):
    """For queries at positions first..last: the keys [lo, hi) that some see and [all_lo, all_hi) that all see."""
    lo, hi, all_lo, all_hi = key_lo, key_hi, key_lo, key_hi
    if CAUSAL:
        hi = tl.minimum(key_hi, last + 1)
        all_hi = tl.minimum(key_hi, first + 1)
    if window is not None:
        lo = tl.maximum(key_lo, first - window + 1)
        all_lo = tl.maximum(key_lo, last - window + 1)
    return lo, hi, all_lo, all_hi


@triton.jit
def row_range(first, last, row_lo, row_hi, shift, window, CAUSAL: tl.constexpr):
    """For keys first..last: the rows [lo, hi) that see some of them and [all_lo, all_hi) that see them all."""
    lo, hi, all_lo, all_hi = row_lo, row_hi, row_lo, row_hi
    if CAUSAL:
        lo = tl.maximum(row_lo, first - shift)
        all_lo = tl.maximum(row_lo, last - shift)
    if window is not None:
        hi = tl.minimum(row_hi, last - shift + window)
        all_hi = tl.minimum(row_hi, first - shift + window)
    return lo, tl.where(first <= last, hi, lo), all_lo, all_hi


@triton.jit
def three_parts(lo, hi, all_lo, all_hi, BLOCK: tl.constexpr):
    """Cut [lo, hi) into tiles: those before `a` and from `b` on need a mask, those between lie in [all_lo, all_hi)."""
    a = tl.minimum(hi, lo + tl.cdiv(tl.maximum(all_lo - lo, 0), BLOCK) * BLOCK)
    b = a + tl.maximum(tl.minimum(all_hi, hi) - a, 0) // BLOCK * BLOCK
    return a, b


@triton.jit
def sweep(
    acc, peak, total, q, position, k_ptr, v_ptr, stride_ks, stride_vs, start, stop, hi, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles of [start, stop): acc and total are relative to peak, the top score so far."""
    for n in range(start, stop, BLOCK_N):
        k = load_tile(k_ptr, stride_ks, n, hi, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_ptr, stride_vs, n, hi, BLOCK_N, DV, BLOCK_DV)
        s = scores(dot(q, tl.trans(k)), scale, softcap)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(in_band(position[:, None], keys, window, CAUSAL) & (keys < hi), s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        base = higher
        if MASKED:  # a row may have seen nothing yet, and -inf - -inf is no number
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(cast(p, v.dtype), v, acc * shrink[:, None])
        peak = higher
    return acc, peak, total


@triton.jit
def attend(
    q, position, sink, k_ptr, v_ptr, stride_ks, stride_vs, lo, hi, all_lo, all_hi, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a query tile over keys [lo, hi): (output [BLOCK_M, BLOCK_DV], lse in log2 [BLOCK_M]).

    sink is a score that joins the denominator as if it had been seen first; None or -inf is no sink.
    """
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sink is not None:
        peak = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    a, b = three_parts(lo, hi, all_lo, all_hi, BLOCK_N)
    if window is not None:
        acc, peak, total = sweep(
            acc, peak, total, q, position, k_ptr, v_ptr, stride_ks, stride_vs, lo, a, hi, scale, softcap, window,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
        )  # fmt: skip
    acc, peak, total = sweep(
        acc, peak, total, q, position, k_ptr, v_ptr, stride_ks, stride_vs, a, b, hi, scale, softcap, window,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=False,
    )  # fmt: skip
    acc, peak, total = sweep(
        acc, peak, total, q, position, k_ptr, v_ptr, stride_ks, stride_vs, b, hi, hi, scale, softcap, window,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
    )  # fmt: skip
    total = tl.where(peak == float("-inf"), 1.0, total)  # a row that saw nothing: 0 / 1
    return acc * (1 / total)[:, None], peak + tl.log2(total)


def unit_vector(x: Tensor | None) -> Tensor | None:
    """A small tensor that kernels read without strides."""
    return None if x is None else x.contiguous()


class Mask(NamedTuple):
    """What decides who sees whom, and how a product becomes a score; the tail of both operators' schemas."""

    key_starts: Tensor | None
    key_lengths: Tensor | None
    query_offset: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    window: int | None
    scale: float
    softcap: float | None

    def arguments(self) -> dict[str, Any]:
        """The kernel arguments of the same meaning."""
        tensors = {f"{name}_ptr": unit_vector(x) for name, x in zip(self._fields[:4], self[:4], strict=True)}
        # Wider than any tensor is as good as unlimited, and leaves position - window within int32.
        window = None if self.window is None else min(self.window, 2**30)
        return tensors | {"CAUSAL": self.causal, "window": window, "scale": self.scale, "softcap": self.softcap}


def widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head widths and the powers of two, at least a matrix instruction's 16, that hold them."""
    D, DV = q.shape[-1], v.shape[-1]
    return {
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
    }


def blocks(length: int, block: int, batch: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """How blocks of a tensor's rows go over the grid. Packed: found on the device, so that nothing waits for it."""
    if cu_seqlens is None:
        return {"n_blocks": triton.cdiv(length, block), "n_sequences": batch, "sequence_ptr": None}
    n = cu_seqlens.numel() - 1
    first = cu_seqlens // block + torch.arange(n + 1, device=cu_seqlens.device)
    slots = torch.arange(length // block + n + 1, device=cu_seqlens.device)
    sequence = torch.searchsorted(first, slots, right=True, out_int32=True) - 1
    return {"n_blocks": slots.numel(), "n_sequences": n, "sequence_ptr": sequence}


def pick(table: TileTable, q: Tensor, v: Tensor, interpreted: Tile) -> Tile:
    """The tile for this device, element size and head width, the next of 64, 128 and 256."""
    if INTERPRET:
        return interpreted
    width = max(64, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    return table[architecture(q.device), width, q.element_size()]
