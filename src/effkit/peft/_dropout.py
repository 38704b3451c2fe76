"""Dropout whose mask is a function of a seed, a row and a column: recomputed wherever it is needed, kept nowhere.

    x_d = keep * x / (1 - p)        keep[t, k] = number(seed, t, k) >= p        Srivastava et al., JMLR 15 (2014)

number is one of two halves of a 32-bit hash of (seed, t, k // 2), a uniform integer of 16 bits: p is rounded to a
multiple of 2^-16, and what is kept is divided by exactly the probability of being kept. Rows and columns are hashed on
their own before they meet, so that no index overflows, and so that any piece of the mask costs its own size. Kernels
compute the same bits (effkit/kernels/_dropout.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STEPS = 1 << 16  # values that the hash tells apart


def drop_below(dropout: float) -> int:
    """The signed 16-bit number below which the hash drops an element."""
    return min(round(dropout * STEPS), STEPS - 1) - STEPS // 2


def keep_probability(dropout: float) -> float:
    """The probability with which an element is kept, exactly."""
    return (STEPS // 2 - drop_below(dropout)) / STEPS


def dropped_reference(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """x [*N, K] after dropout: element by element, as a compiler can fuse it. No seed, no dropout."""
    if seed is None or not dropout:
        return x
    rows = torch.arange(x.shape[:-1].numel(), dtype=torch.int32, device=x.device)
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    pair = _mix((_row_keys(seed, rows)[:, None] + _key(columns >> 1)).to(torch.int32))  # [T, K]
    number = pair << (1 - (columns & 1)) * 16 >> 16  # the low half where the column is even, else the high one
    keep = (number >= drop_below(dropout)).view(x.shape)
    return x * keep.to(x.dtype) / keep_probability(dropout)


def dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """The same bits from masks made in pieces. Not differentiable."""
    if seed is None or not dropout:
        return x
    y = x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    rows = x.reshape(y.shape)
    for piece, keep in keep_pieces(len(y), y.shape[1], x.dtype, seed, dropout):
        torch.mul(rows[piece], keep, out=y[piece])
    return y.div_(keep_probability(dropout)).view(x.shape)


def keep_pieces(T: int, K: int, dtype: torch.dtype, seed: Tensor, dropout: float) -> Iterator[tuple[slice, Tensor]]:
    """The mask [T, K] a few rows at a time: which rows, and 1 or 0 in this dtype for each element.

    The pieces share memory, which may be written over: each is done with before the next is asked for.
    """
    device = seed.device
    rows = _row_keys(seed, torch.arange(T, device=device)).to(torch.int32)
    columns = _key(torch.arange((K + 1) // 2, device=device)).to(torch.int32)
    size = max(1, _PIECE * torch.get_num_threads() // max(1, K)) if device.type == "cpu" else max(1, T)
    pair = torch.empty(min(size, T), len(columns), dtype=torch.int32, device=device)
    spare, keep = torch.empty_like(pair), torch.empty(len(pair), K, dtype=dtype, device=device)
    for start in range(0, T, size):
        piece = slice(start, min(start + size, T))
        n = piece.stop - piece.start
        torch.add(rows[piece, None], columns, out=pair[:n])
        numbers = _mix_(pair[:n], spare[:n]).view(torch.int16)[:, :K]  # low half first, as columns come
        torch.ge(numbers, drop_below(dropout), out=keep[:n])
        yield piece, keep[:n]


_PIECE = 1 << 17  # elements a thread: mask and what it is multiplied with stay in the processor's cache


def _row_keys(seed: Tensor, rows: Tensor) -> Tensor:
    """32 bits for each row that depend on all 64 of the seed."""
    seed = seed.to(torch.int64)
    return _key(_key(_key((seed & _BITS) + _START) + (seed >> 32)) + rows)


def _key(number: Tensor) -> Tensor:
    """`_mix` of the low 32 bits of a number, in an int64, which its products do not overflow.

    In the C++ that a compiler makes of this none may overflow whose factors it knows: a constant seed, places.
    """
    h = number.to(torch.int64) & _BITS
    h = (h ^ h >> 16) * _FACTORS[0] & _BITS
    h = (h ^ h >> 15) * _FACTORS[1] & _BITS
    return h ^ h >> 16


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32 bits in which each bit of h reaches each bit of the result (Wellons' lowbias32).

    Shifts of an int32 copy its sign; the mask takes the copies away.
    """
    h = (h ^ (h >> 16 & 0xFFFF)) * _FACTORS[0]
    h = (h ^ (h >> 15 & 0x1FFFF)) * _FACTORS[1]
    return h ^ (h >> 16 & 0xFFFF)


def _mix_(h: Tensor, spare: Tensor) -> Tensor:
    """`_mix` in place."""
    for shift, factor in ((16, _FACTORS[0]), (15, _FACTORS[1]), (16, None)):
        torch.bitwise_right_shift(h, shift, out=spare)
        h.bitwise_xor_(spare.bitwise_and_((1 << 32 - shift) - 1))
        if factor is not None:
            h.mul_(factor)
    return h


_BITS = (1 << 32) - 1
_START = 0x1E3779B9  # any but 0, which is mixed to 0: rows of seed 0 would have the keys of columns
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # as signed integers
