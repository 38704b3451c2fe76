"""What transformers must know of adapters that have become part of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from effkit.hf.quantizers import Quantizer, say
from effkit.quant.config import quantized_weights, weight_shapes


def say_merged(model: PreTrainedModel, merged: Sequence[str]) -> None:
    """Makes a model's config true again: the head may have left the embeddings, some or all quantised layers be gone.

    merged: the names of the layers into which adapters have gone.
    """
    inputs: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and inputs is not None and head.weight is not inputs.weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):  # either would tie them again
            config.tie_word_embeddings = False
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Quantizer):
        return
    if any(quantized_weights(module) for module in model.modules()):
        quantizer.leave_dense(model, [name for name in merged if weight_shapes(model.get_submodule(name))])
    else:
        say(model, None)
