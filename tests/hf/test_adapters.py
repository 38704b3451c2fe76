"""Adapters under transformers: what a merged model's config says, generation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import effkit
from effkit.peft import LoRAConfig, disabled, merge_and_unload

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
IDS = torch.arange(1, 15).view(2, 7)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def llama(**options: Any) -> Any:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, **options)).eval())


def llava(**options: Any) -> Any:
    """A model with its text model's config inside its own."""
    sight = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=sight, text_config=LlamaConfig(**SIZES, **options), image_token_index=95)
    return seeded(lambda: LlavaForConditionalGeneration(config).eval())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("make", [llama, llava])
@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens"])
def test_a_head_that_left_its_embeddings(make, adapted, tmp_path):
    """Merging changes one of two tied weights: the config says so at each of its levels, or they were tied again."""
    model = make(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    effkit.apply(model, LoRAConfig(rank=3, target_modules=(adapted, "q_proj"), init="random"))
    merge_and_unload(model)
    merged = logits(model)
    assert not torch.equal(merged, logits(make(tie_word_embeddings=True)))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), merged) and again.config.tie_word_embeddings is False


def test_generation_with_and_without():
    """generate() runs through adapted layers, with a cache, as one pass does; switched off they are not there."""
    model, plain = llama(), llama()
    effkit.apply(model, LoRAConfig(rank=3, target_modules="all-linear", init="random"))
    options = dict(max_new_tokens=8, do_sample=False)
    found = model.generate(IDS, **options)
    for length in range(IDS.shape[1], found.shape[1]):
        with torch.no_grad():
            assert torch.equal(model(found[:, :length]).logits[:, -1].argmax(-1), found[:, length])
    with disabled(model):
        assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
