"""Adapters: a few trained parameters beside frozen ones, at the memory they need and in peft's file format."""

from effkit.peft.grouped import grouped_lora
from effkit.peft.low_rank import lora_linear

__all__ = ["grouped_lora", "lora_linear"]
