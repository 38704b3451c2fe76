"""Batches whose rows have adapters of their own: logits, gradients and generated tokens are those of peft.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.peft import adapter_rows, load_adapter
from effkit.testing import assert_equivalent

PEERS = Path(sys.prefix) / "peers"
IDS = torch.randint(1, 61, (5, 6), generator=torch.Generator().manual_seed(1))
ROWS = ["wide", "__base__", "narrow", "wide", "some"]


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_rows_are_those_of_peft() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build() -> Any:
    """A tiny model, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()


def of_peft() -> Any:
    """Three adapters that differ in rank, scale and layers, with values unlike any that training starts from."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(target_modules="all-linear", r=5, lora_alpha=9), "wide")
    model.add_adapter("narrow", LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=3))
    model.add_adapter("some", LoraConfig(target_modules=["v_proj"], r=4, use_rslora=True))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return model.eval()


def main() -> None:
    warnings.filterwarnings("ignore", module="peft")
    theirs, mine = of_peft(), build()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for name in ("wide", "narrow", "some"):
            load_adapter(mine, Path(folder) / name, name)
    names = [None if row == "__base__" else row for row in ROWS]
    exact = {"mine": copy.deepcopy(mine).double(), "theirs": copy.deepcopy(theirs).double()}

    def judged(factor: Tensor) -> Tensor:
        model = exact["mine"] if factor.dtype == torch.float64 else mine
        with adapter_rows(model, names):
            return model(inputs_embeds=factor * model.get_input_embeddings()(IDS)).logits

    def truth(factor: Tensor) -> Tensor:
        model = exact["theirs"] if factor.dtype == torch.float64 else theirs
        return model(inputs_embeds=factor * model.get_input_embeddings()(IDS), adapter_names=ROWS).logits

    assert_equivalent(judged, truth, (torch.linspace(0.5, 1.5, 32),))
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with adapter_rows(mine, names):
        tokens = mine.generate(IDS, **options)
    assert torch.equal(tokens, theirs.generate(input_ids=IDS, adapter_names=ROWS, **options))


if __name__ == "__main__":
    main()
