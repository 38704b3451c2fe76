"""What transformers must know of adapters that have become part of a model's weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from effkit.hf.quantizers import say
from effkit.quant.config import quantized_weights


def say_merged(model: PreTrainedModel) -> None:
    """Makes a model's config true again: the head may have left the embeddings, quantised layers be gone."""
    inputs: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and inputs is not None and head.weight is not inputs.weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):  # either would tie them again
            config.tie_word_embeddings = False
    quantized = any(quantized_weights(module) for module in model.modules())
    if not quantized and getattr(model.config, "quantization_config", None) is not None:
        say(model, None)
