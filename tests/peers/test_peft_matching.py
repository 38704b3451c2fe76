"""Which layers a config adapts, and with which rank and scale: the same as in peft, over configs and models.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import effkit
from effkit.peft import IA3Config, LoRA, LoRAConfig, LoRAEmbedding, VeRAConfig, adapters_of
from effkit.peft.adapter import TrainedCopy
from effkit.peft.ia3 import USUAL_FEEDFORWARD

PEERS = Path(sys.prefix) / "peers"


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_the_same_layers() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Experts(nn.Module):
    """Names that are parts of others, numbers behind numbers, layers outside of any list."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.xq_proj = nn.Linear(4, 4)
        self.emb = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(self.block() for _ in range(12))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    @staticmethod
    def block() -> nn.Module:
        experts = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "w1": nn.Linear(4, 4)}) for _ in range(3))
        return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "my_q_proj": nn.Linear(4, 4), "experts": experts})


def models() -> dict[str, Any]:
    """Makers of models."""
    import transformers as hf

    small = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=3)
    gpt2 = dict(vocab_size=11, n_embd=8, n_layer=3, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    t5 = dict(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, pad_token_id=0)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**small)),
        "llama classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**small, pad_token_id=0)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**small, pad_token_id=0)),
        "experts": Experts,
    }


CHOICES: dict[str, dict[str, Any]] = {
    "usual": {},
    "usual but": {"exclude_modules": ["q_proj", "query"]},
    "ends": {"target_modules": ["q_proj", "c_attn", "query", "q"]},
    "ends with a parent": {"target_modules": ["self_attn.q_proj", "mlp.c_proj", "output.dense", "0.q_proj"]},
    "no end": {"target_modules": ["proj", "c_att", "ery"]},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "q_proj", "transformer.h.1.attn.c_attn"]},
    "expression": {"target_modules": r".*\.[12]\..*(q_proj|c_attn|query|SelfAttention\.q)"},
    "expression, part": {"target_modules": r"q_proj|attn"},
    "all linear": {"target_modules": "all-linear"},
    "ALL LINEAR": {"target_modules": "ALL-Linear"},
    "all linear but": {"target_modules": "all-linear", "exclude_modules": r".*(q_proj|mlp.*|dense)"},
    "all linear but ends": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "w1", "key", "c_fc", "k"]},
    "a layer": {"target_modules": ["q_proj", "c_attn", "query", "q"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "c_attn", "query", "q"], "layers_to_transform": [0, 2, 11]},
    "layers, pattern": {
        "target_modules": ["q_proj", "c_attn", "query", "q"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["experts", "layers", "h"],
    },
    "experts of": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "experts"},
    "layer and whole name": {
        "target_modules": ["q_proj", "model.layers.2.mlp.up_proj", "layers.3.q_proj"],
        "layers_to_transform": [0],
    },
    "no layer": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [99]},
    "saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "score", "classifier", "head"]},
    "saved end": {
        "target_modules": ["q_proj", "c_attn", "query", "q"],
        "modules_to_save": ["norm", "ln_f", "LayerNorm"],
    },
    "saved parent": {
        "target_modules": ["q_proj", "c_proj", "dense", "o"],
        "modules_to_save": ["mlp", "output", "head"],
    },
    "saved part of a name": {
        "target_modules": ["c_attn", "query", "w1"],
        "modules_to_save": ["_proj", "y", "e_k", "o"],
    },
    "embeddings": {"target_modules": ["embed_tokens", "wte", "word_embeddings", "shared", "emb", "q_proj"]},
    "excluded all": {"target_modules": ["q_proj", "c_attn"], "exclude_modules": ["q_proj", "c_attn"]},
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "c_attn", "c_proj", "query"],
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5, "attn.c_proj": 2, "^q_proj": 7, r"query": 1},
        "alpha_pattern": {r".*\.0\..*": 16, "q_proj": 6, "h.1.mlp.c_proj": 5},
    },
    "stabilised ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj|c_fc|key": 4}, "use_rslora": True},
    "head": {"target_modules": ["lm_head", "classifier", "score", "q_proj"]},
}


def theirs(model: nn.Module, kind: str, choice: dict[str, Any]) -> Any:
    """What peft adapts: {name: (rank, scale)}, or "saved"; None where it refuses."""
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    task = "SEQ_CLS" if "Classification" in type(model).__name__ else None
    options = dict(r=2, lora_alpha=3) if kind == "LORA" else {}
    config = getattr(peft, {"LORA": "LoraConfig", "VERA": "VeraConfig", "IA3": "IA3Config"}[kind])
    try:
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind](model, config(**options, **choice, task_type=task), "default")
    except (ValueError, TypeError):
        return None
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[name] = "saved"
        elif isinstance(module, LoraLayer):
            found[name] = module.r["default"], module.scaling["default"]
        elif isinstance(module, BaseTunerLayer):
            found[name] = getattr(module, "is_feedforward", None)
    return found


def mine(model: nn.Module, kind: str, choice: dict[str, Any]) -> Any:
    """What effkit adapts."""
    choice = dict(choice)
    if kind == "LORA":
        config: Any = LoRAConfig(rank=2, alpha=3, rank_stabilized=choice.pop("use_rslora", False), **choice)
    else:
        config = {"VERA": VeRAConfig, "IA3": IA3Config}[kind](**choice)
    try:
        effkit.apply(model, config)
    except ValueError:
        return None
    found: dict[str, Any] = {}
    for name, part in adapters_of(model, "default").items():
        if isinstance(part, TrainedCopy):
            found[name] = "saved"
        elif isinstance(part, LoRA | LoRAEmbedding):
            found[name] = config.rank_of(name), part.scale
        else:
            found[name] = getattr(part, "feedforward", None)
    return found


def cases(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind of adapter, name of the choice, fields) for this model."""
    paths = [name for name, _ in model.named_modules()]
    for name, choice in CHOICES.items():
        # A name that no module ends with is an error here, and nothing in peft.
        saved = [end for end in choice.get("modules_to_save", ()) if any(path.endswith(end) for path in paths)]
        yield "LORA", name, {**choice, "modules_to_save": saved}
    for kind in ("VERA", "IA3"):
        for name in ("usual", "all linear"):
            yield kind, name, CHOICES[name]


def main() -> None:
    from peft.utils import constants

    warnings.filterwarnings("ignore", module="peft")
    different = []
    for name, make in models().items():
        for kind, choice, fields in cases(make()):
            expected, found = theirs(make(), kind, fields), mine(make(), kind, fields)
            if found != expected:
                only = [dict(a.items() - b.items()) for a, b in ((expected, found), (found, expected))]
                different.append(f"{name}, {kind}, {choice}\n  theirs: {only[0]}\n  mine: {only[1]}")
    for word, ours in {
        "LORA_TARGET": LoRAConfig.usual_targets,
        "VERA_TARGET": VeRAConfig.usual_targets,
        "IA3_TARGET": IA3Config.usual_targets,
        "IA3_FEEDFORWARD": USUAL_FEEDFORWARD,
    }.items():
        table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{word}_MODULES_MAPPING")
        for kind in table.keys() | ours.keys():
            if set(table.get(kind, ())) != set(ours.get(kind, ())):
                different.append(f"{word}, {kind}\n  theirs: {table.get(kind)}\n  mine: {ours.get(kind)}")
    assert not different, "\n".join(different)


if __name__ == "__main__":
    main()
