"""What knows transformers. Importing it registers exact attention under the name "effkit".

model.set_attn_implementation("effkit"), or from_pretrained(path, attn_implementation="effkit").
"""

from effkit.hf.attention import attention_forward
from effkit.hf.mask import MaskSpec, make_mask

__all__ = ["MaskSpec", "attention_forward", "make_mask"]
