"""Codes, scales and values bit for bit against bitsandbytes, and where it differs, how.

bitsandbytes works in a process of its own, which this file is the program of: once imported, transformers would find it
in other tests. It leaves its results in a file.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.quant import code_table, codebook, decode_4bit, decode_kbit, encode_4bit, encode_kbit, quantize_nf4
from effkit.quant.four_bit import TABLES, decode_scales
from effkit.quant.kbit import BLOCK_SIZES
from effkit.testing import DTYPES

PEERS = Path(sys.prefix) / "peers"
TYPES = ("nf4", "fp4")
every_case = pytest.mark.parametrize(
    "name", ["normal", "heavy", "odd", "one", "rows", "equal", "large", "small", "nan"]
)

pytestmark = pytest.mark.skipif(
    not (PEERS / "bitsandbytes").exists(), reason="bitsandbytes is not installed; scripts/test installs it"
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spoilt = draw(4, 4096)
    spoilt[1, 1000], spoilt[2, 7], spoilt[3, 99] = math.nan, math.inf, -math.inf
    return {
        "normal": draw(16, 1024),  # rows of whole blocks: its CPU code reads wrong scales for others
        "heavy": draw(37, 262) / draw(37, 262),
        "odd": draw(7, 1187),
        "one": draw(1),
        "rows": draw(5, 3, 1041),
        "equal": torch.cat((torch.zeros(4096), torch.ones(4096), torch.full((4096,), -3.0))),
        "large": draw(4100) * 1e4,
        "small": draw(4100) * 1e-4,
        "nan": spoilt,
    }


def options() -> list[tuple[str, int, torch.dtype]]:
    return list(itertools.product(TYPES, BLOCK_SIZES, DTYPES))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What bitsandbytes makes of it all."""
    file = tmp_path_factory.mktemp("bitsandbytes") / "results.pt"
    # It compiles some of its paths, for each shape anew; their values are the same without.
    settings = {"PYTHONPATH": str(PEERS), "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    environment = {**os.environ, **settings}
    done = subprocess.run([sys.executable, __file__, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(file)


def bits(x: Tensor) -> Tensor:
    """Numbers as integers, all NaN alike, and the zeros: its CPU code has two for FP4."""
    x = torch.where(x.isnan(), torch.nan, torch.where(x == 0, 0.0, x))
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def codes_of(packed: Tensor) -> Tensor:
    return torch.stack((packed >> 4, packed & 15), 1).flatten()


class TestFourBits:
    @every_case
    def test_nf4_codes(self, theirs: dict[str, Any], name: str) -> None:
        for block_size, dtype in itertools.product(BLOCK_SIZES, DTYPES):
            packed, absmax = encode_4bit(tensors()[name].to(dtype), block_size=block_size)
            their_packed, their_absmax, _ = theirs[f"{name} nf4 {block_size} {dtype}"]
            assert torch.equal(packed, their_packed) and torch.equal(bits(absmax), bits(their_absmax))

    @every_case
    def test_fp4_codes(self, theirs: dict[str, Any], name: str) -> None:
        """On a CPU it has two zeros, and at a tie below 0 it takes the larger magnitude."""
        for block_size, dtype in itertools.product(BLOCK_SIZES, DTYPES):
            x = tensors()[name].to(dtype)
            packed, absmax = encode_4bit(x, block_size=block_size, quant_type="fp4")
            their_packed, their_absmax, _ = theirs[f"{name} fp4 {block_size} {dtype}"]
            assert torch.equal(bits(absmax), bits(their_absmax))
            mine, other = codes_of(packed)[: x.numel()], codes_of(their_packed)[: x.numel()]
            other = torch.where(other == 8, 0, other)
            z = x.float().flatten() * (1 / absmax).repeat_interleave(block_size)[: x.numel()]
            tie = torch.isin(z, -torch.tensor(TABLES["fp4 thresholds"][7:]))
            assert torch.equal(mine[~tie], other[~tie])
            table = code_table("fp4")
            assert torch.equal(table[mine[tie].int()].abs() < table[other[tie].int()].abs(), tie[tie])

    def test_fp4_tie(self, theirs: dict[str, Any]) -> None:
        """0.0859375 is a threshold: the smaller magnitude here on both sides of 0, as on their GPUs."""
        packed, _ = encode_4bit(TIE, quant_type="fp4")
        assert packed.tolist() == [0x19, 0x39] and theirs["tie"].tolist() == [0x1E, 0x3E]

    @every_case
    @pytest.mark.parametrize("quant_type", TYPES)
    def test_values(self, theirs: dict[str, Any], name: str, quant_type: str) -> None:
        """Their codes and scales, read here."""
        for block_size, dtype in itertools.product(BLOCK_SIZES, DTYPES):
            packed, absmax, y = theirs[f"{name} {quant_type} {block_size} {dtype}"]
            mine = decode_4bit(
                packed, absmax, shape=tuple(y.shape), dtype=dtype, block_size=block_size, quant_type=quant_type
            )
            assert torch.equal(bits(mine), bits(y))

    def test_below_the_normal_numbers(self, theirs: dict[str, Any]) -> None:
        """They divide by 1e-38 there and keep a scale that a processor may flush to 0; here the block is 0."""
        packed, absmax, y = theirs["subnormal"]
        assert absmax[0] == torch.tensor(2.0**-128) and not torch.equal(packed[:32], packed[32:])
        mine, scales = encode_4bit(torch.cat((torch.full((64,), 2.0**-128), torch.zeros(64))))
        assert mine.tolist() == [0x77] * 64 and scales.tolist() == [0.0, 0.0]
        assert torch.equal(decode_4bit(packed, absmax, shape=(128,)), y.flatten())


class TestDoubleQuantisation:
    @pytest.mark.parametrize("name", ["normal", "heavy", "odd", "rows", "large", "small"])
    def test_reading_is_exact(self, theirs: dict[str, Any], name: str) -> None:
        _, codes, nested_absmax, offset, scales, _ = theirs[f"{name} nested"]
        assert torch.equal(decode_scales(codes, nested_absmax, offset), scales)

    @pytest.mark.parametrize("name", ["normal", "heavy", "odd", "rows", "large", "small"])
    def test_writing_differs_by_a_code_at_most(self, theirs: dict[str, Any], name: str) -> None:
        """They round by a table of 65536 bins, which misses the nearest code now and then."""
        packed, codes, nested_absmax, offset, _, _ = theirs[f"{name} nested"]
        q = quantize_nf4(tensors()[name], double_quant=True)
        assert q.nested is not None
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.nested.offset, offset) and torch.equal(q.nested.absmax, nested_absmax)
        assert (q.absmax.int() - codes.int()).abs().max() <= 1

    @pytest.mark.parametrize("name", ["normal", "odd", "rows"])
    def test_values(self, theirs: dict[str, Any], name: str) -> None:
        packed, _, _, _, scales, y = theirs[f"{name} nested"]
        assert torch.equal(decode_4bit(packed, scales, shape=tuple(y.shape)), y)


class TestEightBits:
    def test_the_map(self, theirs: dict[str, Any]) -> None:
        assert torch.equal(codebook("dynamic", 8), theirs["map"])

    @pytest.mark.parametrize("name", ["normal", "odd", "rows"])  # heavy tails leave more in the dense part of the map
    def test_blocks(self, theirs: dict[str, Any], name: str) -> None:
        codes, absmax, y = theirs[f"{name} 8 bits"]
        mine, scales = encode_kbit(tensors()[name], theirs["map"], block_size=256)
        assert torch.equal(scales, absmax) and (mine.int() - codes.int()).abs().max() <= 1
        assert torch.equal(decode_kbit(codes, absmax, theirs["map"], block_size=256), y)


TIE = torch.tensor([0.0859375, -0.0859375, 1.0, -0.0859375])


def main(file: str) -> None:
    from bitsandbytes import functional as bnb

    results: dict[str, Any] = {"map": bnb.create_dynamic_map()}
    for (name, x), (quant_type, block_size, dtype) in itertools.product(tensors().items(), options()):
        packed, state = bnb.quantize_4bit(x.to(dtype), blocksize=block_size, quant_type=quant_type)
        y = bnb.dequantize_4bit(packed, state).view(x.shape)
        results[f"{name} {quant_type} {block_size} {dtype}"] = packed.flatten(), state.absmax, y
    results["tie"] = bnb.quantize_4bit(TIE, blocksize=64, quant_type="fp4")[0].flatten()
    packed, state = bnb.quantize_4bit(
        torch.cat((torch.full((64,), 2.0**-128), torch.zeros(64))), blocksize=64, quant_type="nf4"
    )
    results["subnormal"] = packed.flatten(), state.absmax, bnb.dequantize_4bit(packed, state)
    for name, x in tensors().items():
        packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        y = bnb.dequantize_4bit(packed, state).view(x.shape)
        results[f"{name} nested"] = packed.flatten(), state.absmax, state.state2.absmax, state.offset, scales, y
        codes, state = bnb.quantize_blockwise(x, blocksize=256)
        results[f"{name} 8 bits"] = codes, state.absmax, bnb.dequantize_blockwise(codes, state)
    torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
