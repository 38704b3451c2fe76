"""peft's LoRA layer, judged as an implementation of the reference: output and gradients of x and both factors.

This file runs as a program of its own: once imported, peft would be found by transformers in other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effkit import rivals
from effkit.peft.low_rank import lora_linear_reference
from effkit.testing import DTYPES, assert_equivalent

PEERS = Path(sys.prefix) / "peers"


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "peft").exists(), reason="peft is not installed; scripts/test does it")
def test_layer_of_peft_is_the_reference() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def judge(dtype: torch.dtype, biased: bool) -> None:
    """Factors in float32 beside a layer of any dtype, as peft has them: x goes to float32 and comes back."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, 5, 32), a=(4, 32), b=(24, 4), weight=(24, 32), bias=(24,))
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs = {"x": drawn["x"].to(dtype), "a": drawn["a"], "b": drawn["b"]}
    scale = torch.tensor(0.5)

    def dense(like: Tensor) -> dict[str, Tensor | None]:
        weight, bias = (drawn[name].to(dtype).to(like.dtype) for name in ("weight", "bias"))
        return dict(weight=weight, bias=bias if biased else None)

    assert_equivalent(
        lambda x, a, b: rivals.peft_lora_linear(x=x, a=a, b=b, scale=scale, **dense(x)),
        lambda x, a, b: lora_linear_reference(x, a, b, scale, **dense(x)),
        inputs,
    )


if __name__ == "__main__":
    for dtype in DTYPES:
        judge(dtype, biased=True)
        judge(dtype, biased=False)
