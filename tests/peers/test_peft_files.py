"""Adapters between effkit and peft, in both directions: the models compute the same, with gradients.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import effkit
from effkit.peft import LoRAConfig, SingLoRAConfig, VeRAConfig, advance_ramp, load_adapter, save_adapter
from effkit.peft.dora import DoRAConfig
from effkit.peft.ia3 import IA3Config
from effkit.testing import assert_equivalent

PEERS = Path(sys.prefix) / "peers"
MODELS = ("llama", "gpt2")
LINEAR = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
IDS = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_each_reads_what_the_other_writes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build(kind: str) -> Any:
    """A tiny model with biases where the kind can have them, always the same."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=16, **drop))
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
        config = LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def judge(mine: nn.Module, theirs: nn.Module) -> None:
    """Logits times a factor, so that there is something to differentiate."""
    models = {
        (who, dtype): copy.deepcopy(model).to(dtype)
        for who, model in (("mine", mine), ("theirs", theirs))
        for dtype in (torch.float32, torch.float64)
    }

    def logits(who: str) -> Callable[[Tensor], Tensor]:
        return lambda factor: factor * models[who, factor.dtype](input_ids=IDS).logits

    assert_equivalent(logits("mine"), logits("theirs"), (torch.linspace(0.5, 1.5, 61),))


@torch.no_grad()
def same(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a(input_ids=IDS).logits, b(input_ids=IDS).logits)


def scatter(parameters: Any) -> None:
    """Values unlike any that training starts from."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)


def of_peft(kind: str) -> dict[str, Any]:
    """Configs of peft."""
    from peft import IA3Config, LoraConfig, VeraConfig

    names = list(LINEAR[kind])
    common = dict(target_modules=names, r=4, lora_alpha=6)
    both = dict(rank_pattern={names[-1]: 2, names[0]: 3}, alpha_pattern={rf".*0\..*{names[0]}": 9, "v_proj": 2})
    norm, layers = ("norm", "layers") if kind == "llama" else ("ln_f", "h")
    return {
        "plain": LoraConfig(**common),
        "everywhere": LoraConfig(target_modules="all-linear", r=3, lora_alpha=5, lora_dropout=0.1),
        "stabilised, patterns": LoraConfig(**common, **both, use_rslora=True),
        "layer 1": LoraConfig(**common, layers_to_transform=[1], layers_pattern=layers),
        "expression": LoraConfig(target_modules=rf".*1\..*({'|'.join(names)})", exclude_modules=names[:1]),
        "bias of B": LoraConfig(**common, lora_bias=True),
        "biases": LoraConfig(**common, bias="lora_only"),
        "all biases, head and norm": LoraConfig(**common, modules_to_save=["lm_head", norm], bias="all"),
        "embedding": LoraConfig(target_modules=[EMBEDDING[kind], *names], r=3),
        "task, gaussian": LoraConfig(**common, task_type="CAUSAL_LM", init_lora_weights="gaussian"),
        "DoRA": LoraConfig(**common, use_dora=True),
        "VeRA": VeraConfig(target_modules=names, r=5),
        "VeRA by key, biases": VeraConfig(
            target_modules=names, r=5, save_projection=False, projection_prng_key=3, bias="vera_only"
        ),
        "(IA)^3": IA3Config(target_modules=names, feedforward_modules=names[-1:]),
        "usual (IA)^3": IA3Config(exclude_modules=r".*0\..*"),
    }


def of_effkit(kind: str) -> dict[str, Any]:
    """Configs of effkit, some of which say what peft's cannot, or says otherwise."""
    names = LINEAR[kind]
    overlapping = {names[-1]: 2, r".*1\..*": 3}  # in a file the second comes first
    return {
        "usual": LoRAConfig(rank=4, alpha=6),
        "overlapping patterns": LoRAConfig(target_modules=names, rank_pattern=overlapping, alpha_pattern=overlapping),
        "alpha from ranks": LoRAConfig(target_modules="all-linear", rank_pattern=overlapping, rank_stabilized=True),
        "LoRA-FA": LoRAConfig(target_modules=names, train_a=False, bias="all", update_bias=True),
        "head": LoRAConfig(target_modules="all-linear", modules_to_save=("lm_head",), init="random"),
        "DoRA": DoRAConfig(target_modules=names, rank=3, alpha=7),
        "SingLoRA": SingLoRAConfig(target_modules=names, rank=3, alpha=5, ramp_steps=10),
        "SingLoRA everywhere": SingLoRAConfig(target_modules="all-linear", rank=2, ramp_steps=2, bias="lora_only"),
        "VeRA but for some": VeRAConfig(target_modules=names, exclude_modules=r".*1\..*", rank=5),
        "(IA)^3 of layer 1": IA3Config(target_modules=names, feedforward_modules=names[-1:], layers_to_transform=(1,)),
        "usual (IA)^3": IA3Config(),
    }


def they_write(kind: str, config: Any, folder: Path) -> None:
    """peft writes, effkit reads and writes again, peft reads that."""
    from peft import get_peft_model

    theirs = get_peft_model(build(kind), config).eval()
    scatter(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder / "theirs")
    mine = build(kind)
    load_adapter(mine, folder / "theirs", "mine")
    judge(mine, theirs)
    save_adapter(mine, folder / "mine")
    assert same(read_by_peft(kind, folder / "mine"), theirs)


def we_write(kind: str, config: Any, folder: Path) -> None:
    """effkit writes, both read; VeRA also as LoRA."""
    mine = build(kind)
    effkit.apply(mine, config)
    scatter(p for p in mine.parameters() if p.requires_grad)
    if isinstance(config, SingLoRAConfig):
        advance_ramp(mine, 3)
    save_adapter(mine, folder / "mine")
    judge(mine, read_by_peft(kind, folder / "mine"))
    again = build(kind)
    load_adapter(again, folder / "mine")
    assert isinstance(config, SingLoRAConfig) or same(again, mine)
    if isinstance(config, VeRAConfig):
        save_adapter(mine, folder / "lora", as_lora=True)
        judge(mine, read_by_peft(kind, folder / "lora"))


def names_of_folders(folder: Path) -> None:
    """peft's folder of an adapter that has a name; transformers' own verb reads what effkit wrote."""
    from peft import get_peft_model

    theirs = get_peft_model(build("llama"), of_peft("llama")["plain"], "lora_A").eval()
    scatter(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    mine = build("llama")
    load_adapter(mine, folder / "lora_A")
    judge(mine, theirs)
    save_adapter(mine, folder / "mine")
    again = build("llama")
    again.load_adapter(folder / "mine")
    assert same(again.eval(), theirs)


def read_by_peft(kind: str, folder: Path) -> Any:
    """A model with the adapter of a folder, every tensor of which has found its place."""
    from peft import PeftModel, set_peft_model_state_dict

    model = PeftModel.from_pretrained(build(kind), folder)
    assert not set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors")).unexpected_keys
    return model.eval()


def main() -> None:
    warnings.filterwarnings("ignore", module="peft")
    warnings.filterwarnings("error", message="Found missing adapter keys")
    with tempfile.TemporaryDirectory() as folder:
        names_of_folders(Path(folder))
    for kind in MODELS:
        for write, configs in ((they_write, of_peft(kind)), (we_write, of_effkit(kind))):
            for name, config in configs.items():
                print(kind, write.__name__, name)
                with tempfile.TemporaryDirectory() as folder:
                    write(kind, config, Path(folder))


if __name__ == "__main__":
    main()
