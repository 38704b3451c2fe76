"""Fewer bits for weights, activations and optimizer moments."""

from effkit.quant.fp8 import (
    FORMATS,
    QuantizedFP8,
    decode_fp8,
    dequantize_fp8,
    encode_fp8,
    fp8_scale,
    from_fp8_codes,
    quantize_fp8,
    to_fp8_codes,
)
from effkit.quant.smooth_swiglu import merge_smooth_scales, smooth_swiglu

__all__ = [
    "FORMATS",
    "QuantizedFP8",
    "decode_fp8",
    "dequantize_fp8",
    "encode_fp8",
    "fp8_scale",
    "from_fp8_codes",
    "merge_smooth_scales",
    "quantize_fp8",
    "smooth_swiglu",
    "to_fp8_codes",
]
