"""transformers' Trainer with adapted models: the code of docs/adapter_training.md, and what that page says of it.

Trainer needs accelerate, which other tests do without: this file runs as a program of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PEERS = Path(sys.prefix) / "peers"
PAGE = Path(__file__).parents[2] / "docs" / "adapter_training.md"


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "accelerate").exists(), reason="accelerate is not installed; scripts/test does it")
def test_trains_resumes_and_checkpoints(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


def same(one: Any, other: Any) -> bool:
    """Whether two trainings have had the same losses and ended with the same weights, bit for bit."""
    first, second = weights(one), weights(other)
    assert losses(one) and first and first.keys() == second.keys()
    return losses(one) == losses(other) and all(torch.equal(first[name], second[name]) for name in first)


def trainer_with(page: dict[str, Any], *configs: Any, folder: str, checkpointing: bool = False) -> Any:
    """The page's Trainer with another adapter."""
    import effkit
    from effkit import zoo

    model = zoo.load_model()
    effkit.apply(model, *configs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return page["trainer_of"](model, folder)


def others(page: dict[str, Any]) -> None:
    """Whole checkpoints bring back what other adapters have beside their parameters, and weights in four bits."""
    from effkit.peft import LoRAConfig, SingLoRAConfig, VeRAConfig, adapters_of
    from effkit.quant import NF4Config

    targets = dict(target_modules=("q_proj", "down_proj"))
    for name, configs in {
        "SingLoRA": (SingLoRAConfig(rank=4, ramp_steps=10, **targets),),
        "VeRA": (VeRAConfig(**targets),),
        "QLoRA": (NF4Config(), LoRAConfig(rank=4, **targets)),
    }.items():
        whole, resumed = (trainer_with(page, *configs, folder=name) for _ in range(2))
        whole.train()
        resumed.train(resume_from_checkpoint=f"{name}/checkpoint-2")
        assert same(whole, resumed)
        if name == "SingLoRA":  # steps of the optimizer, of which each had two passes
            for each in (whole, resumed):
                assert {int(part.steps) for part in adapters_of(each.model, "default").values()} == {4}


def checkpointing(page: dict[str, Any]) -> None:
    """Activation checkpointing is not seen in what is learnt, dropout included."""
    from effkit.peft import LoRAConfig

    config = LoRAConfig(rank=4, dropout=0.1, target_modules=("q_proj", "down_proj"))
    trainers = []
    for on in (False, True):  # a Trainer seeds the generators when it is made
        trainers.append(trainer_with(page, config, folder=f"checkpointing {on}", checkpointing=on))
        trainers[-1].train()
    assert same(*trainers)


def main() -> None:
    code = "\n".join(re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    page: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), page)
    trainer, again, small, rest = (page[name] for name in ("trainer", "again", "small", "rest"))
    assert len(losses(trainer)) == 4
    assert same(trainer, again) and same(trainer, small)
    assert same(small, rest)
    stored = sorted(path.name for path in Path("small/checkpoint-2").iterdir())
    assert "adapter_model.safetensors" in stored and "model.safetensors" not in stored
    checkpointing(page)
    others(page)


if __name__ == "__main__":
    main()
