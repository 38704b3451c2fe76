"""FP8 inside kernels, in integers: the same bits on every architecture and in the interpreter, which casts wrongly.

MANTISSA names the format: 3 bits are e4m3, 2 are e5m2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_fp8(MANTISSA: tl.constexpr):
    """The largest finite value of the format."""
    return 448.0 if MANTISSA == 3 else 57344.0


@triton.jit
def to_fp8(v, MANTISSA: tl.constexpr):
    """float32 v to codes (uint8): nearest even, saturating, NaN to 0x7F."""
    CUT: tl.constexpr = 23 - MANTISSA
    LEAST: tl.constexpr = 2.0**-6 if MANTISSA == 3 else 2.0**-14  # the smallest normal value
    OFFSET: tl.constexpr = 120 << 3 if MANTISSA == 3 else 112 << 2  # between the exponents of float32 and the format
    # A float32 next to this has the unit in the last place of a subnormal code: adding rounds to it, to nearest even.
    STEPS: tl.constexpr = 2.0**14 if MANTISSA == 3 else 2.0**7
    STEPS_BITS: tl.constexpr = 0x46800000 if MANTISSA == 3 else 0x43000000
    size = tl.minimum(tl.abs(v), largest_fp8(MANTISSA))
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1)) >> CUT) - OFFSET
    subnormal = (size + STEPS).to(tl.int32, bitcast=True) - STEPS_BITS
    codes = tl.where(size < LEAST, subnormal, normal) | ((v.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return tl.where(v != v, 0x7F, codes).to(tl.uint8)


@triton.jit
def from_fp8(codes, MANTISSA: tl.constexpr):
    """Codes (uint8) to float32, exactly.

    e5m2 is the upper byte of float16. The bits of e4m3 in the place of those of float16 have an exponent 8 too small.
    """
    wide = codes.to(tl.int16)
    if MANTISSA == 3:
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        value = (wide << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((wide & 0x7F) > (0x7E if MANTISSA == 3 else 0x7C), float("nan"), value)


@triton.jit
def magnitude(x):
    """|x| of float32 as an integer, ordered alike, infinity next to last and NaN last: a maximum loses neither."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fp8_scale(amax, amax_floor, MANTISSA: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale for a largest magnitude, which comes as `magnitude` gives it."""
    floored = tl.maximum(amax.to(tl.float32, bitcast=True), amax_floor)
    scale = tl.maximum(tl.div_rn(floored, largest_fp8(MANTISSA)), 2.0**-126)
    if POWER_OF_TWO:
        scale = (((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
    return tl.where((floored > 0.0) & (amax < 0x7F800000), scale, 1.0)
