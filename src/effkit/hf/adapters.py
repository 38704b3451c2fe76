"""What transformers must know of adapters that have become part of a model's weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from effkit.hf.quantizers import say
from effkit.quant.config import quantized_weights


def say_merged(model: PreTrainedModel) -> None:
    """Makes a model's config true again: an output head that has come apart from its embeddings, no quantised layers."""
    inputs: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and inputs is not None and head.weight is not inputs.weight:
        model.config.tie_word_embeddings = False
    if getattr(model.config, "quantization_config", None) is not None:
        if not any(quantized_weights(module) for module in model.modules()):
            say(model, None)
