"""Adapters: a few trained parameters beside frozen ones, at the memory they need and in peft's file format."""

from effkit.peft.adapter import Adapter, AdapterConfig
from effkit.peft.dora import DoRA, DoRAConfig, dora_linear, dora_norm
from effkit.peft.engine import (
    activate,
    active_adapters,
    adapter_names,
    adapters_of,
    delete_adapter,
    disabled,
    set_scale,
    set_trainable,
)
from effkit.peft.files import load_adapter, save_adapter
from effkit.peft.grouped import adapter_rows, grouped_lora
from effkit.peft.ia3 import IA3, IA3Config, ia3_linear
from effkit.peft.loftq import LoftQ, apply_loftq, loftq_factors
from effkit.peft.lora import LoRA, LoRAConfig, LoRAEmbedding
from effkit.peft.lora_plus import lora_plus_optimizer, lora_plus_param_groups
from effkit.peft.low_rank import lora_linear
from effkit.peft.merging import MergeConfig, MergeReport, is_merged, merge, merge_and_unload, unmerge
from effkit.peft.projections import lora_projections
from effkit.peft.singlora import SingLoRA, SingLoRAConfig, advance_ramp, singlora_linear
from effkit.peft.vera import VeRA, VeRAConfig, vera_linear

__all__ = [
    "IA3",
    "Adapter",
    "AdapterConfig",
    "DoRA",
    "DoRAConfig",
    "IA3Config",
    "LoRA",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoftQ",
    "MergeConfig",
    "MergeReport",
    "SingLoRA",
    "SingLoRAConfig",
    "VeRA",
    "VeRAConfig",
    "activate",
    "active_adapters",
    "adapter_names",
    "adapter_rows",
    "adapters_of",
    "advance_ramp",
    "apply_loftq",
    "delete_adapter",
    "disabled",
    "dora_linear",
    "dora_norm",
    "grouped_lora",
    "ia3_linear",
    "is_merged",
    "load_adapter",
    "loftq_factors",
    "lora_linear",
    "lora_plus_optimizer",
    "lora_plus_param_groups",
    "lora_projections",
    "merge",
    "merge_and_unload",
    "save_adapter",
    "set_scale",
    "set_trainable",
    "singlora_linear",
    "unmerge",
    "vera_linear",
]
