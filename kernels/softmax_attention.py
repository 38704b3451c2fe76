"""Softmax attention on the GPU: online-softmax forward, deterministic backward, one operator each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, LN2, LOG2E, Tile, TileTable, architecture, cast, dot
from effkit.kernels._softmax_tiles import (
    attend,
    in_band,
    key_range,
    load_tile,
    locate,
    row_range,
    scores,
    segment,
    store_tile,
    three_parts,
    through_softcap,
)
from effkit.kernels.softmax_decode import SHORT, decode

# Lengths change from call to call; a build for "multiple of 16" and another for "1" would buy nothing.
_LENGTHS = ["T", "S", "n_blocks", "n_sequences", "heads", "group", "window"]


# One program owns BLOCK_M rows of one query head: it reads them once, sweeps the keys that some row sees, and writes their
# outputs and lse. The lse stays in units of log2: the backward then subtracts the very scores that made it, and a row that
# looks at one key alone gets its probability 1 exactly. Rows set the reuse of every key tile, so BLOCK_M is as tall as the accumulator's registers allow.
@triton.jit(do_not_specialize=_LENGTHS)
def _softmax_attention_fwd(
    q_ptr, k_ptr, v_ptr, sinks_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot,
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
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sink = tl.where((cu_seqlens_ptr is not None) & (n == n_sequences), float("-inf"), sink)
    first = start + shift
    last = tl.minimum(start + BLOCK_M, row_hi) - 1 + shift
    lo, hi, all_lo, all_hi = key_range(first, last, key_lo, key_hi, window, CAUSAL)
    o, lse = attend(
        q, first + tl.arange(0, BLOCK_M), sink, k_ptr + b * stride_kb + head // group * stride_kh,
        v_ptr + b * stride_vb + head // group * stride_vh, stride_ks, stride_vs, lo, hi, all_lo, all_hi,
        scale, softcap, window, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL,
    )  # fmt: skip
    store_tile(o_ptr + b * stride_ob + head * stride_oh, stride_ot, start, row_hi, o, BLOCK_M, DV, BLOCK_DV)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (b * heads + head) * T + rows, lse, mask=rows < row_hi)


# One program owns BLOCK_M rows of one query head and writes their delta = sum_d do o - dlse: the one number a row needs, next
# to its lse, for the gradient of its scores.
@triton.jit(do_not_specialize=_LENGTHS)
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


# One program owns BLOCK_M rows of one query head and writes their dq, sweeping the keys as the forward does. A kernel of its
# own, so that no two programs add to the same dq: the result repeats bit for bit.
@triton.jit(do_not_specialize=_LENGTHS)
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
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the row tiles of [start, stop) to dk and dv. Scores are built keys by rows: no accumulator is ever transposed."""
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
        dv = dot(cast(p, do.dtype), do, dv)
        ds = p * (dot(v, tl.trans(do)) - delta[None, :])
        dk = dot(cast(through_softcap(ds, s, softcap), q.dtype), q, dk)
    return dk, dv


# One program owns BLOCK_N keys of one kv head and writes their dk and dv: it reads them once and sweeps the rows that see some
# of them, one query head of the group after the other, so that shared heads are summed in a fixed order. Two accumulators are
# alive at once; that bounds BLOCK_N.
@triton.jit(do_not_specialize=_LENGTHS)
def _softmax_attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, sequence_ptr, n_blocks, n_sequences,
    T, S, heads, group, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    for g in range(group):
        query_head = head * group + g
        q_head_ptr = q_ptr + b * stride_qb + query_head * stride_qh
        do_head_ptr = do_ptr + b * stride_dob + query_head * stride_doh
        at = (b * heads + query_head) * T
        dk, dv = _sweep_dkv(
            dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot, lo, x, hi,
            shift, scale, softcap, window, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
        )  # fmt: skip
        # Rows from hi on have probability 0 by their lse: without a window no mask is needed from x on.
        unmasked_stop = hi
        if window is not None:
            unmasked_stop = y
        dk, dv = _sweep_dkv(
            dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot, x,
            unmasked_stop, hi, shift, scale, softcap, window, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=False,
        )  # fmt: skip
        if window is not None:
            dk, dv = _sweep_dkv(
                dk, dv, k, v, keys, alive, q_head_ptr, do_head_ptr, lse_ptr, delta_ptr, at, stride_qt, stride_dot, y, hi,
                hi, shift, scale, softcap, window, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, CAUSAL, MASKED=True,
            )  # fmt: skip
    # Keys that are not alive may hold NaN, and 0 * NaN stays in their own rows: those gradients are 0.
    dk = tl.where(alive[:, None], dk * scale, 0.0)
    dv = tl.where(alive[:, None], dv, 0.0)
    store_tile(dk_ptr + b * stride_dkb + head * stride_dkh, stride_dks, start, own_hi, dk, BLOCK_N, D, BLOCK_D)
    store_tile(dv_ptr + b * stride_dvb + head * stride_dvh, stride_dvs, start, own_hi, dv, BLOCK_N, DV, BLOCK_DV)


# Tiles per (architecture, head width, bytes of an element), the width the next of 64, 128, 256. Never by length or batch: one
# build serves every call.
_FWD: TileTable = {}
_BWD_DQ: TileTable = {}
_BWD_DKV: TileTable = {}
_DELTA_ROWS = 64


def _packed(x: Tensor | None) -> Tensor | None:
    """A small vector that kernels read without a stride."""
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
        tensors = {f"{name}_ptr": _packed(x) for name, x in zip(self._fields[:4], self[:4], strict=True)}
        # Wider than any tensor is as good as unlimited, and leaves position - window within int32.
        window = None if self.window is None else min(self.window, 2**30)
        return tensors | {"CAUSAL": self.causal, "window": window, "scale": self.scale, "softcap": self.softcap}


def _tile(table: TileTable, q: Tensor, v: Tensor) -> Tile:
    if INTERPRET:
        return Tile(64, 64, 4, 1)  # few programs, yet several tiles at the lengths of tests
    width = max(64, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    return table[architecture(q.device), width, q.element_size()]


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head widths and the powers of two, at least a matrix instruction's 16, that hold them."""
    D, DV = q.shape[-1], v.shape[-1]
    return {
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
    }


def _blocks(length: int, block: int, batch: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """How blocks of a tensor's rows go over the grid. Packed: worked out on the device, so that nothing waits for it."""
    if cu_seqlens is None:
        return {"n_blocks": triton.cdiv(length, block), "n_sequences": batch, "sequence_ptr": None}
    n = cu_seqlens.numel() - 1
    first = cu_seqlens // block + torch.arange(n + 1, device=cu_seqlens.device)
    slots = torch.arange(length // block + n + 1, device=cu_seqlens.device)
    sequence = torch.searchsorted(first, slots, right=True, out_int32=True) - 1
    return {"n_blocks": slots.numel(), "n_sequences": n, "sequence_ptr": sequence}


def _unit_stride(x: Tensor) -> Tensor:
    """x with adjacent elements along the head width: a tile's load is slow without. Other strides stay as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, T, DV] laid out as [B, T, H, DV], so that joining the heads afterwards costs no copy, and lse [B, H, T]."""
    B, H, T, _ = q.shape
    o = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
    return o, q.new_empty(B, H, T, dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, sinks, mask = _unit_stride(q), _unit_stride(k), _unit_stride(v), _packed(sinks), Mask(*options)
    o, lse = _empty_output(q, v)
    B, H, T, _ = q.shape
    if lse.numel() == 0:
        return o, lse
    sizes = {"T": T, "S": k.shape[2], "heads": H, "group": H // k.shape[1]} | _widths(q, v)
    with torch.cuda.device_of(q):
        if T < SHORT and mask.cu_seqlens is None:
            decode(q, k, v, sinks, o, lse, mask.arguments() | sizes)
            return o, lse
        tile = _tile(_FWD, q, v)
        blocks = _blocks(T, tile.BLOCK_M, B, mask.cu_seqlens)
        _softmax_attention_fwd[blocks["n_blocks"] * H * B,](
            q, k, v, sinks, o, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
            **mask.arguments(), **sizes, **blocks, **tile._asdict(),
        )  # fmt: skip
    return o, lse


def _backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, q, k, v, mask = _unit_stride(do), _unit_stride(q), _unit_stride(k), _unit_stride(v), Mask(*options)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    B, H, T, _ = q.shape
    S = k.shape[2]
    widths = _widths(q, v)
    arguments = mask.arguments() | widths | {"T": T, "S": S, "heads": H, "group": H // max(k.shape[1], 1)}
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    with torch.cuda.device_of(q):
        if lse.numel():
            n_blocks = triton.cdiv(T, _DELTA_ROWS)
            _softmax_attention_bwd_delta[n_blocks * H * B,](
                o, do, _packed(dlse), delta, *o.stride()[:3], *do.stride()[:3],
                T, n_blocks, H, DV=widths["DV"], BLOCK_DV=widths["BLOCK_DV"], BLOCK_M=_DELTA_ROWS,
            )  # fmt: skip
            tile = _tile(_BWD_DQ, q, v)
            blocks = _blocks(T, tile.BLOCK_M, B, mask.cu_seqlens)
            _softmax_attention_bwd_dq[blocks["n_blocks"] * H * B,](
                q, k, v, do, lse, delta, dq, *inputs, *dq.stride()[:3], **arguments, **blocks, **tile._asdict()
            )
        if k.shape[:3].numel():
            tile = _tile(_BWD_DKV, q, v)
            blocks = _blocks(S, tile.BLOCK_N, B, mask.cu_seqlens)
            _softmax_attention_bwd_dkv[blocks["n_blocks"] * k.shape[1] * B,](
                q, k, v, do, lse, delta, dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3],
                **arguments, **blocks, **tile._asdict(),
            )  # fmt: skip
    return dq, dk, dv, delta


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q, v)


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)


def _fold_heads(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A mapped x joined with its heads, [B, H, ...] -> [B, size H, ...] or [H] -> [size H]; grouping survives that."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if x.ndim == 2 else x.movedim(0, 1).flatten(1, 2)


def _vmap(run: Callable[..., tuple[Tensor, ...]], n_heads: int) -> Callable[..., tuple[Any, Any]]:
    """The batching rule of an operator whose first n_heads arguments have heads."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(dim is not None for dim in in_dims[n_heads:]):
            raise ValueError("softmax_attention cannot be vmapped over key_starts, key_lengths, query_offset or cu_seqlens")
        size = info.batch_size
        folded = [_fold_heads(x, dim, size) for x, dim in zip(args[:n_heads], in_dims, strict=False)]
        outputs = run(*folded, *args[n_heads:])
        return tuple(x.unflatten(1, (size, -1)) for x in outputs), (1,) * len(outputs)

    return rule


_MASK_SCHEMA = (
    "Tensor? key_starts, Tensor? key_lengths, Tensor? query_offset, Tensor? cu_seqlens, "
    "bool causal, int? window, float scale, float? softcap"
)
_library = torch.library.Library("effkit", "FRAGMENT")


def _define(name: str, tensors: str, outputs: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(f"{name}({tensors}, {_MASK_SCHEMA}) -> ({outputs})")
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(name, run, "CPU" if INTERPRET else "CUDA")
    op = getattr(torch.ops.effkit, name).default
    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_vmap(op, _vmap(op, tensors.count("Tensor")), lib=_library)
    return op


_forward_op = _define(
    "softmax_attention_forward",
    "Tensor q, Tensor k, Tensor v, Tensor? sinks",
    "Tensor o, Tensor lse",
    _forward,
    _fake_forward,
)
_backward_op = _define(
    "softmax_attention_backward",
    "Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse",
    "Tensor dq, Tensor dk, Tensor dv, Tensor delta",
    _backward,
    _fake_backward,
)


# torch.compile tells a forward with a context from one without by its number of parameters: none of them may be a *args.
class _SoftmaxAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
        key_starts: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward_op(
            q, k, v, sinks, key_starts, key_lengths, query_offset, cu_seqlens, causal, window, scale, softcap
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, *options = inputs
        tensors, ctx.scalars = options[:4], options[4:]
        ctx.save_for_backward(q, k, v, sinks, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, o, lse, *tensors = ctx.saved_tensors
        dq, dk, dv, delta = _SoftmaxAttentionBackward.apply(do, dlse, q, k, v, o, lse, *tensors, *ctx.scalars)
        return dq, dk, dv, _sinks_gradient(sinks, lse, delta), *[None] * 8


class _SoftmaxAttentionBackward(torch.autograd.Function):
    """A function of its own so that a second derivative is refused: the bare operator's would be zero without a word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
        key_starts: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(
            do, dlse, q, k, v, o, lse, key_starts, key_lengths, query_offset, cu_seqlens, causal, window, scale, softcap
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of softmax_attention have no second derivative; backend="reference" has')


def _sinks_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """db_h = -sum_bi e^(b_h - lse) delta. Where lse is -inf, behind the last packed token, no sink was seen."""
    if sinks is None:
        return None
    probability = torch.exp2(sinks.float()[:, None] * LOG2E.value - lse)
    return -torch.where(lse > float("-inf"), probability * delta, 0.0).sum((0, 2)).to(sinks.dtype)


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a repeated one (shared keys and values) as a view: torch.compile refuses a Function that gets one twice."""
    return [
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)
    ]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The kernels behind effkit.attention.softmax_attention, which documents and has checked the arguments."""
    tensors = _distinct(q, k, v, sinks, key_starts, key_lengths, query_offset, cu_seqlens)
    o, lse = _SoftmaxAttention.apply(*tensors, causal, window, scale, softcap)
    return (o, lse * LN2.value) if return_lse else o
