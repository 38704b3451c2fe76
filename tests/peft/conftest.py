"""Tiny random models for the tests of adapters."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def _llama(**options: Any) -> Any:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, "pad_token_id": 0, **options}))


def _gpt2(**options: Any) -> Any:
    sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options}))


@pytest.fixture
def make():
    """make("llama" or "gpt2", **fields of its config): a model with random weights, always the same, in eval mode."""

    def build(kind: str, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {"llama": _llama, "gpt2": _gpt2}[kind](**options).eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 7]."""
    return torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))
