"""Fewer bits for weights, activations and optimizer moments."""

from effkit.quant.config import DequantizeConfig, FP8Config, NF4Config, quantization_report
from effkit.quant.four_bit import (
    QUANT_TYPES,
    NestedScales,
    Quantized4bit,
    code_table,
    decode_4bit,
    dequantize_nf4,
    encode_4bit,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
)
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
from effkit.quant.fp8_adamw import AdamWFP8, adamw_fp8_step
from effkit.quant.fp8_linear import FP8Linear, linear_fp8
from effkit.quant.fp8_matmul import matmul_fp8
from effkit.quant.fp8_swiglu import SmoothSwiGLU, encode_smooth_fp8, merge_smooth_scales, smooth_swiglu
from effkit.quant.fp8_training import RECIPES, DelayedScaling, FP8Recipe, synchronize_amax, update_fp8_scales
from effkit.quant.kbit import (
    QuantizedKbit,
    bits_per_parameter,
    codebook,
    decode_kbit,
    dequantize_kbit,
    encode_kbit,
    quantize_kbit,
)
from effkit.quant.nf4_linear import NF4Linear, linear_4bit

__all__ = [
    "FORMATS",
    "QUANT_TYPES",
    "RECIPES",
    "AdamWFP8",
    "DelayedScaling",
    "DequantizeConfig",
    "FP8Config",
    "FP8Linear",
    "FP8Recipe",
    "NF4Config",
    "NF4Linear",
    "NestedScales",
    "Quantized4bit",
    "QuantizedFP8",
    "QuantizedKbit",
    "SmoothSwiGLU",
    "adamw_fp8_step",
    "bits_per_parameter",
    "code_table",
    "codebook",
    "decode_4bit",
    "decode_fp8",
    "decode_kbit",
    "dequantize_fp8",
    "dequantize_kbit",
    "dequantize_nf4",
    "encode_4bit",
    "encode_fp8",
    "encode_kbit",
    "encode_smooth_fp8",
    "fp8_scale",
    "from_fp8_codes",
    "linear_4bit",
    "linear_fp8",
    "matmul_fp8",
    "merge_smooth_scales",
    "quantization_report",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_int4",
    "quantize_kbit",
    "quantize_nf4",
    "smooth_swiglu",
    "synchronize_amax",
    "to_fp8_codes",
    "update_fp8_scales",
]
