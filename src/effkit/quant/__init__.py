"""Fewer bits for weights, activations and optimizer moments."""

from effkit.quant.smooth_swiglu import merge_smooth_scales, smooth_swiglu

__all__ = ["merge_smooth_scales", "smooth_swiglu"]
