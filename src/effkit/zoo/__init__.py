"""A small trained language model and real text, for the demo and the tests of quality; nothing is downloaded.

    from effkit import zoo
    model, batches = zoo.load_model(), zoo.heldout_batches()
    zoo.bits_per_byte(model, batches)

The model is a byte-level Llama of 4.5 million parameters (zoo/train.py trained it). The text is the Python standard
library of the interpreter that runs this: 22 modules are held out, the model never saw them. It has not read syntax
trees either, kind="tree", which `adapt` trains adapters on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from effkit.zoo.adaptation import Adaptation, adapt
from effkit.zoo.measure import (
    bits_per_byte,
    cache_bytes_per_token,
    distill,
    heal,
    heldout_batches,
    saved_bytes,
    training_batches,
)
from effkit.zoo.text import HELD_OUT, stdlib_files, stdlib_text
from effkit.zoo.train import CONTEXT, END

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODEL = Path(__file__).parent / "model"

__all__ = [
    "CONTEXT",
    "END",
    "HELD_OUT",
    "MODEL",
    "Adaptation",
    "adapt",
    "bits_per_byte",
    "cache_bytes_per_token",
    "distill",
    "heal",
    "heldout_batches",
    "load_model",
    "load_tokenizer",
    "saved_bytes",
    "stdlib_files",
    "stdlib_text",
    "training_batches",
]


def load_model(dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> PreTrainedModel:
    """The trained model, in eval mode on the CPU; the same as AutoModelForCausalLM.from_pretrained(zoo.MODEL).

    The stored weights are bfloat16; float32 (the default) is what can be trained and measured without rounding.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation=attn_implementation)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: ids 0 to 255 are the bytes of the UTF-8 text, END (256) ends documents and pads on the left.

    The same as AutoTokenizer.from_pretrained(zoo.MODEL). As always in transformers, the text of a
    special token stands for it: "<|end|>" encodes to END.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MODEL)
