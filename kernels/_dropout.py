"""The mask of effkit.peft._dropout in kernels: the same bits from a seed, a row and a column, for any tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(h):
    """A bijection of 32 bits (Wellons' lowbias32); h is uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """32 bits for each row, from all 64 of the seed."""
    seed = tl.load(seed_ptr).to(tl.int64)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(mix(low + 0x1E3779B9) + high) + rows.to(tl.uint32))


@triton.jit
def keep_mask(keys, start, drop_below, BLOCK_K: tl.constexpr):
    """What is kept of rows with these keys and BLOCK_K columns from an even one on, [rows, BLOCK_K].

    One hash serves two columns: its halves are laid side by side.
    """
    pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
    both = mix(keys[:, None] + mix(pairs.to(tl.uint32))[None, :]).to(tl.int32, bitcast=True)
    numbers = tl.join(both << 16 >> 16, both >> 16)  # signed halves, [rows, BLOCK_K / 2, 2]
    return tl.reshape(numbers, [keys.shape[0], BLOCK_K]) >= drop_below


@triton.jit
def dropped(x, keys, start, drop_below):
    """x [rows, columns] with zeros where the mask drops, not divided by anything. Without keys all of it.

    A product, as in torch: what is not a number stays so. It is exact, so that any rounding of float32 does.
    """
    if keys is not None:
        keep = keep_mask(keys, start, drop_below, x.shape[1])
        x = (x.to(tl.float32) * keep.to(tl.float32)).to(x.dtype)
    return x
