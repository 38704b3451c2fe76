"""What knows transformers. Importing it registers exact attention under the name "effkit", and the quantisers.

model.set_attn_implementation("effkit"), or from_pretrained(path, attn_implementation="effkit");
from_pretrained(path, quantization_config=effkit.hf.NF4QuantizationConfig()).
"""

from effkit.hf.attention import attention_forward
from effkit.hf.bitsandbytes import (
    bitsandbytes_state_dict,
    load_bitsandbytes,
    load_bitsandbytes_state_dict,
    save_bitsandbytes,
)
from effkit.hf.mask import MaskSpec, make_mask
from effkit.hf.quantizers import FP8QuantizationConfig, NF4QuantizationConfig

__all__ = [
    "FP8QuantizationConfig",
    "MaskSpec",
    "NF4QuantizationConfig",
    "attention_forward",
    "bitsandbytes_state_dict",
    "load_bitsandbytes",
    "load_bitsandbytes_state_dict",
    "make_mask",
    "save_bitsandbytes",
]
