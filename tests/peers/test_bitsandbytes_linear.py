"""The 4-bit linear against bitsandbytes' matmul_4bit, on weights that bitsandbytes has quantised.

This file runs as a program of its own: once imported, bitsandbytes would be found by transformers in other tests.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.quant import NF4Linear, linear_4bit
from effkit.testing import DTYPES, assert_equivalent

PEERS = Path(sys.prefix) / "peers"
WEIGHTS = [("nf4", 64, False), ("nf4", 64, True), ("nf4", 32, True), ("fp4", 128, False)]


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "bitsandbytes").exists(), reason="bitsandbytes is not installed; scripts/test does it")
def test_equals_matmul_4bit() -> None:
    """Outputs and gradients of x: bitsandbytes is judged as another implementation of the reference."""
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def judge(matmul_4bit: Any, weight: Tensor, packed: Tensor, state: Any, dtype: torch.dtype) -> None:
    """One weight of theirs in the product of both."""
    rows, options = len(weight), dict(block_size=state.blocksize, quant_type=state.quant_type)
    nested = (state.state2.absmax, state.offset) if state.nested else (None, None)
    ours = (packed.view(rows, -1), state.absmax.view(rows, -1))
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, weight.shape[1]), (rows,)))

    def theirs(x: Tensor, bias: Tensor) -> Tensor:
        return matmul_4bit(x, packed, state, bias=bias)

    def reference(x: Tensor, bias: Tensor) -> Tensor:
        return linear_4bit(x, *ours, bias, *nested, **options, backend="reference")

    assert_equivalent(theirs, reference, inputs)
    assert_equivalent(lambda x, bias: linear_4bit(x, *ours, bias, *nested, **options), reference, inputs)


def main() -> None:
    import bitsandbytes
    from bitsandbytes import functional as bnb

    weight = torch.randn(67, 256, generator=torch.Generator().manual_seed(0)) / 16
    for quant_type, block_size, double_quant in WEIGHTS:
        for dtype in DTYPES:
            packed, state = bnb.quantize_4bit(
                weight.to(dtype), blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
            )
            judge(bitsandbytes.matmul_4bit, weight, packed, state, dtype)

    dense = torch.nn.Linear(256, 64)
    layer = bitsandbytes.nn.Linear4bit(256, 64, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(dense.state_dict())
    layer.to("cpu")
    mine = NF4Linear.from_module(dense)
    assert torch.equal(mine.weight.flatten(), layer.weight.flatten())
    assert torch.equal(mine.weight_absmax.flatten(), layer.weight.quant_state.absmax)


if __name__ == "__main__":
    main()
