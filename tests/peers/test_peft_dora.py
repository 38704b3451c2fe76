"""DoRA and (IA)^3 layer by layer against peft's, outputs and every gradient: peft's are judged by ours in float64.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effkit.peft import dora_linear, dora_norm, ia3_linear
from effkit.testing import assert_equivalent

PEERS = Path(sys.prefix) / "peers"


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_layers_are_those_of_peft() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def peft_layer(config: dict[str, Any], weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """peft's layer around a dense one."""
    import peft

    dense = nn.Linear(weight.shape[1], weight.shape[0])
    dense.weight, dense.bias = nn.Parameter(weight), nn.Parameter(bias)
    return peft.inject_adapter_in_model(
        getattr(peft, config.pop("kind"))(**config, target_modules=["0"]), nn.Sequential(dense)
    )[0]


def called(layer: Any, x: torch.Tensor, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """The layer as a function of its parameters."""
    return torch.func.functional_call(layer, trained, (x,))


def dora() -> None:
    weight, bias, x = drawn(20, 24, seed=0), drawn(20, seed=1), drawn(3, 7, 24, seed=2)
    a, b = drawn(5, 24, seed=3), drawn(20, 5, seed=4)
    config = dict(kind="LoraConfig", r=5, lora_alpha=3.5, use_dora=True)
    layer, scale = peft_layer(config, weight, bias), torch.tensor(0.7)
    magnitude = dora_norm(weight, a, b, scale) * (1 + 0.2 * drawn(20, seed=5))

    def theirs(x: Any, a: Any, b: Any, magnitude: Any) -> torch.Tensor:
        names = "lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"
        return called(layer, x, dict(zip(names, (a, b, magnitude), strict=True)))

    def ours(x: Any, a: Any, b: Any, magnitude: Any) -> torch.Tensor:
        w = weight.to(x.dtype)
        norm = dora_norm(w, a, b, scale)
        return dora_linear(x, a, b, scale, magnitude, norm, w, bias.to(x.dtype))

    assert_equivalent(theirs, ours, (x, a, b, magnitude))


def ia3(feedforward: bool) -> None:
    weight, bias, x = drawn(20, 24, seed=0), drawn(20, seed=1), drawn(3, 7, 24, seed=2)
    vector = 1 + drawn(*((1, 24) if feedforward else (20, 1)), seed=3) / 2
    config = dict(kind="IA3Config", feedforward_modules=["0"] if feedforward else [])
    layer = peft_layer(config, weight, bias)

    def theirs(x: Any, vector: Any) -> torch.Tensor:
        return called(layer, x, {"ia3_l.default": vector})

    def ours(x: Any, vector: Any) -> torch.Tensor:
        return ia3_linear(x, vector, weight.to(x.dtype), bias.to(x.dtype), feedforward=feedforward)

    assert_equivalent(theirs, ours, (x, vector))


def dora_starts_from_the_same_lengths() -> None:
    weight, bias = drawn(20, 24, seed=0), drawn(20, seed=1)
    layer = peft_layer(dict(kind="LoraConfig", r=5, use_dora=True), weight, bias)
    lengths = layer.lora_magnitude_vector["default"].weight.detach()
    a, b = drawn(5, 24, seed=2), torch.zeros(20, 5)
    same = dora_norm(weight, a, b, torch.tensor(1.0))
    assert_equivalent(lambda w: lengths, lambda w: F.normalize(w).mul(w).sum(1), (weight,), grads=False)
    assert_equivalent(lambda w: same, lambda w: F.normalize(w).mul(w).sum(1), (weight,), grads=False)


if __name__ == "__main__":
    dora()
    dora_starts_from_the_same_lengths()
    for scaled in (False, True):
        ia3(scaled)
