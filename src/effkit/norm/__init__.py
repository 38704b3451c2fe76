"""Norms, and what takes their place."""

from effkit.norm.dyt import DyT, DyTConfig, dynamic_tanh

__all__ = ["DyT", "DyTConfig", "dynamic_tanh"]
