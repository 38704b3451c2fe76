"""FP8 against those who cast by other means: ml_dtypes' own arithmetic, transformers' block checkpoints."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.quant import FORMATS, dequantize_fp8, from_fp8_codes, quantize_fp8, to_fp8_codes


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("format", "name"), [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_cast_of_ml_dtypes(format: str, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs, largest = getattr(ml_dtypes, name), FORMATS[format].max
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat((bits.to(torch.int32).view(torch.float32), draw(200_000), 1e-3 * draw(200_000)))
    x = x[x.isfinite()].clamp(-largest, largest)  # ml_dtypes does not saturate
    assert torch.equal(to_fp8_codes(x, format), torch.from_numpy(x.numpy().astype(theirs).view("uint8")))
    codes = torch.arange(256).to(torch.uint8)
    values = torch.from_numpy(codes.numpy().view(theirs).astype("float32"))
    assert torch.equal(from_fp8_codes(codes, format).nan_to_num(7.0), values.nan_to_num(7.0))


class TestTransformers:
    """The conversions with which transformers writes and reads FP8 checkpoints."""

    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def quantizer(self, scale_fmt: str) -> Any:
        return SimpleNamespace(
            quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_fmt),
        )

    @pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
    def test_they_read_what_is_written_here(self, shape: tuple[int, ...]) -> None:
        q = quantize_fp8(draw(*shape), "block")
        theirs = self.fp8.Fp8Dequantize(self.quantizer("float"))._dequantize_one(q.codes, q.scale, torch.bfloat16)
        assert torch.equal(dequantize_fp8(q, dtype=torch.bfloat16), theirs)

    @pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
    def test_equal_codes_where_scales_are_powers_of_two(self, shape: tuple[int, ...]) -> None:
        """Elsewhere their scale is the reciprocal of a reciprocal, off by a unit in the last place now and then."""
        x = draw(*shape) ** 3
        q = quantize_fp8(x, "block", power_of_two=True)
        theirs = self.fp8.Fp8Quantize(self.quantizer("ue8m0"))._quantize_one("linear.weight", x)
        assert torch.equal(q.scale, theirs["linear.weight_scale_inv"].float())
        assert torch.equal(q.codes.view(torch.uint8), theirs["linear.weight"].view(torch.uint8))
