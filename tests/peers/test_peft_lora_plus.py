"""The groups of LoRA+ against peft's on the same adapted models: equal but for what docs/lora_plus.md says.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PEERS = Path(sys.prefix) / "peers"
LR, RATIO, EMBEDDING, DECAY = 1e-3, 16, 1e-5, 0.1
# Ours: the rate and the decay that peft gives instead.
DIFFERENT = {
    "bias": (LR * RATIO, 0.0),
    "norm": (LR * RATIO, DECAY),  # RMSNorm is not among the layers whose weights do not decay there
    "lambda_d": (LR * RATIO, DECAY),
    "magnitude": (LR * RATIO, DECAY),
}


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_groups_are_those_of_peft() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, tie_word_embeddings=False))


def settings(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every trained parameter by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def renamed(name: str) -> str:
    """peft's name of a parameter without what is about peft alone."""
    name = name.removeprefix("base_model.model.").removesuffix(".weight")
    for path in (".modules_to_save.default", ".base_layer"):
        name = name.replace(path, "")
    return name.replace(".default", "")


def ours(name: str) -> str:
    return name.replace(".adapters.default", "").replace(".copy", "").removesuffix(".weight")


def kind(name: str) -> str:
    """What is different about a parameter."""
    parts = {"lambda_d": "lambda_d", "magnitude": "magnitude", "norm": "norm", "bias": "bias"}
    return next((value for key, value in parts.items() if key in name), "")


def main() -> None:
    import peft
    from peft.optimizers import create_loraplus_optimizer

    import effkit
    from effkit.peft import DoRAConfig, LoRAConfig, VeRAConfig, lora_plus_optimizer

    targets = ("q_proj", "embed_tokens")
    saved = ("lm_head", "norm")
    pairs = [
        (
            LoRAConfig(rank=2, target_modules=targets, bias="lora_only", modules_to_save=saved),
            peft.LoraConfig(r=2, target_modules=[*targets], bias="lora_only", modules_to_save=[*saved]),
        ),
        (
            DoRAConfig(rank=2, target_modules=("q_proj",)),
            peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        ),
        (VeRAConfig(rank=2, target_modules=("q_proj",)), peft.VeraConfig(r=2, target_modules=["q_proj"])),
    ]
    seen = set()
    for config, theirs in pairs:
        here, there = model(), peft.get_peft_model(model(), theirs)
        effkit.apply(here, config)
        mine = lora_plus_optimizer(here, torch.optim.AdamW, LR, RATIO, embedding_lr=EMBEDDING, weight_decay=DECAY)
        options = dict(loraplus_weight_decay=DECAY, loraplus_lr_embedding=EMBEDDING)
        other = create_loraplus_optimizer(there, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **options)
        found = {ours(name): value for name, value in settings(here, mine).items()}
        expected = {renamed(name): value for name, value in settings(there, other).items()}
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        for name, value in found.items():
            if kind(name):
                assert expected[name] == DIFFERENT[kind(name)] != value, (name, expected[name], value)
                seen.add(kind(name))
            else:
                assert value == expected[name], (name, value, expected[name])
    assert seen == {*DIFFERENT}


if __name__ == "__main__":
    main()
