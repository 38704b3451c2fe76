"""What the k-bit family promises beyond equality with its reference on the ledger's cases."""

import hashlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.quant import (
    bits_per_parameter,
    code_table,
    codebook,
    decode_kbit,
    dequantize_kbit,
    encode_4bit,
    encode_kbit,
    quantize_kbit,
    quantize_nf4,
)
from effkit.quant.kbit import BITS, DTYPES, KINDS, midpoints

every_kind = pytest.mark.parametrize("kind", KINDS)
every_width = pytest.mark.parametrize("bits", BITS)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestCodebooks:
    @every_kind
    @every_width
    def test_ascending_within_one_and_reaching_it(self, kind: str, bits: int) -> None:
        entries = codebook(kind, bits)
        assert entries.dtype == torch.float32 and (entries.diff() > 0).all()
        assert len(entries) == 2**bits - (kind == "float")  # whose zeros are one
        assert entries[-1] == 1 and (kind == "int" or entries.abs().max() == 1)

    @every_width
    def test_int_is_even(self, bits: int) -> None:
        half = 2 ** (bits - 1)
        assert torch.equal(codebook("int", bits), torch.arange(-half, half) / (half - 1))

    def test_int4_is_that_of_the_four_bit_type(self) -> None:
        assert torch.equal(codebook("int", 4), code_table("int4"))

    @pytest.mark.parametrize(
        ("bits", "exponent_bits", "magnitudes"),
        [
            (3, 2, [0, 1, 2, 4]),
            (4, 2, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
            (4, 3, [0, 1, 2, 4, 8, 16, 32, 64]),
            (4, 1, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
            (5, 3, [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]),
        ],
    )
    def test_floats(self, bits: int, exponent_bits: int, magnitudes: list[float]) -> None:
        upper = torch.tensor(magnitudes) / magnitudes[-1]
        entries = codebook("float", bits, exponent_bits=exponent_bits)
        assert torch.equal(entries, torch.cat((-upper[1:].flip(0), upper)))

    @pytest.mark.parametrize(("bits", "exponent_bits"), [(3, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4)])
    def test_exponents_take_half_of_the_bits(self, bits: int, exponent_bits: int) -> None:
        assert torch.equal(codebook("float", bits), codebook("float", bits, exponent_bits=exponent_bits))

    def test_eight_bit_floats_are_those_of_torch(self) -> None:
        """e5m2 without its infinities: torch decodes the same values, in other units."""
        values = torch.arange(0x7C, dtype=torch.uint8).view(torch.float8_e5m2).double()
        ours = codebook("float", 8, exponent_bits=5)
        # Without infinities there is one more exponent at the top.
        assert torch.equal(ours[127 : 127 + 0x7C], (values / (7 * 2.0**14)).float())

    def test_dynamic(self) -> None:
        entries = codebook("dynamic", 8)
        assert hashlib.sha256(entries.numpy().tobytes()).hexdigest()[:16] == "e732639a65f497b4"
        assert entries[127] == 0 and entries[254] < 1 and torch.equal(entries[:127], -entries[128:255].flip(0))

    @every_width
    def test_dynamic_halves_its_entries_with_each_power_of_ten(self, bits: int) -> None:
        positive = codebook("dynamic", bits)
        positive = positive[(positive > 0) & (positive < 1)]
        counts = [int(((positive > 10.0**-i / 10) & (positive < 10.0**-i)).sum()) for i in range(bits - 1)]
        assert counts == [2 ** (bits - 2 - i) for i in range(bits - 1)]

    @every_width
    def test_quantiles_are_hit_equally_often(self, bits: int) -> None:
        """By what they are the medians of: each bin between the edges holds one of 2^bits equal parts."""
        entries = codebook("quantile", bits).double()
        outermost = torch.special.ndtri(torch.tensor(1 - 0.5 / 2**bits, dtype=torch.float64))
        shares = torch.special.ndtr(entries * outermost).diff() * 2**bits
        assert torch.equal((shares * 2**12).round(), torch.full((2**bits - 1,), 2.0**12).double())  # of float32 entries

    def test_quantiles_of_data(self) -> None:
        data = draw(1000).exp()
        entries = codebook("quantile", 3, data=data)
        order = data.double().sort().values
        assert torch.equal(entries, (order[[62, 187, 312, 437, 562, 687, 812, 937]] / order[937]).float())
        assert torch.equal(codebook("quantile", 3, data=2 * data.view(10, 100)), entries)

    def test_each_call_makes_its_own(self) -> None:
        codebook("int", 3).zero_()
        assert codebook("int", 3)[-1] == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(kind="nf", bits=4), r"kind is 'nf', choices: \('int', 'float', 'dynamic', 'quantile'\)"),
            (dict(kind="int", bits=2), r"bits is 2, choices: \(3, 4, 5, 6, 7, 8\)"),
            (dict(kind="int", bits=True), "bits is True, choices"),
            (dict(kind="int", bits=4, exponent_bits=2), "exponent_bits is 2, expected 1 to bits - 1, for kind 'float'"),
            (dict(kind="float", bits=4, exponent_bits=4), "exponent_bits is 4"),
            (dict(kind="float", bits=4, exponent_bits=0), "exponent_bits is 0"),
            (dict(kind="int", bits=4, data=torch.ones(3)), "data is given, expected for kind 'quantile' alone"),
            (dict(kind="quantile", bits=4, data=torch.zeros(3)), "finite and not all zero"),
            (dict(kind="quantile", bits=4, data=torch.tensor([1.0, math.inf])), "finite and not all zero"),
        ],
    )
    def test_errors(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            codebook(**arguments)


class TestQuantising:
    @backends
    @pytest.mark.parametrize("quant_type", ["nf4", "int4"])
    def test_a_four_bit_table_gives_the_four_bit_codes(self, backend: str, quant_type: str) -> None:
        x = draw(37, 67)
        codes, scales = encode_kbit(x, code_table(quant_type), backend=backend)
        packed, absmax = encode_4bit(x, quant_type=quant_type)
        pairs = torch.stack((packed >> 4, packed & 15), 1).flatten()
        assert torch.equal(codes.flatten(), pairs[: x.numel()]) and torch.equal(scales, absmax)
        mine = decode_kbit(codes, scales, code_table(quant_type), backend=backend)
        assert torch.equal(quantize_nf4(x).scales(), absmax) and mine.shape == x.shape

    @backends
    @every_kind
    @every_width
    def test_every_entry_comes_back_as_itself(self, backend: str, kind: str, bits: int) -> None:
        entries = codebook(kind, bits)
        entries = entries[entries.abs() <= 1]
        x = torch.cat((entries, torch.ones(1)))
        q = quantize_kbit(x, kind, bits, 512, backend=backend)
        assert torch.equal(dequantize_kbit(q, backend=backend), x)

    @backends
    def test_the_nearest_entry(self, backend: str) -> None:
        """With eighths, whose midpoints are exact: the smallest distance, at a tie the lower entry."""
        entries = torch.arange(-8.0, 9.0) / 8
        x = torch.cat((torch.arange(-64.0, 65.0) / 64, torch.ones(1)))
        codes, _ = encode_kbit(x, entries, block_size=256, backend=backend)
        assert torch.equal(codes.long(), (x[:, None] - entries).abs().argmin(1))  # argmin takes the first of equals

    @backends
    def test_strange_values(self, backend: str) -> None:
        entries = codebook("dynamic", 8)
        x = torch.cat((draw(32), torch.full((32,), 2.0**-130), draw(32, seed=1), torch.zeros(32)))
        x[3], x[70] = math.nan, math.inf
        codes, absmax = encode_kbit(x, entries, block_size=32, backend=backend)
        assert absmax.isnan().tolist() == [True, False, False, False] and absmax[1:].tolist() == [0.0, math.inf, 0.0]
        assert set(codes[:32].tolist()) == {255} and set(codes[32:64].tolist()) == set(codes[96:].tolist()) == {127}
        y = decode_kbit(codes, absmax, entries, block_size=32, backend=backend)
        assert y[:32].isnan().all() and torch.equal(y[96:], torch.zeros(32)) and torch.equal(y[32:64], torch.zeros(32))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        q = quantize_kbit(draw(5, 67).to(dtype), "int", 8)
        assert dequantize_kbit(q).dtype == dtype and dequantize_kbit(q, dtype=torch.float32).dtype == torch.float32
        assert torch.equal(dequantize_kbit(q, dtype=torch.float32).to(dtype), dequantize_kbit(q))

    def test_more_bits_less_noise(self) -> None:
        """A bit more makes the even steps less than half as wide: more than 6.02 dB, which it comes down to."""
        x = draw(256, 256)
        noise = [float((dequantize_kbit(quantize_kbit(x, "int", bits)) - x).square().mean()) for bits in BITS]
        gains = [10 * math.log10(a / b) for a, b in itertools.pairwise(noise)]
        assert min(gains) > 20 * math.log10(2) and gains == sorted(gains, reverse=True)

    def test_at_four_bits_quantiles_and_floats_beat_integers(self) -> None:
        """The paper's finding in small, on normal values in blocks of 64."""
        x = draw(256, 256)
        noise = {kind: float((dequantize_kbit(quantize_kbit(x, kind, 4)) - x).square().mean()) for kind in KINDS}
        assert noise["quantile"] < noise["int"] and noise["float"] < noise["int"]

    def test_small_blocks_help(self) -> None:
        x = draw(256, 256)
        noise = [
            float((dequantize_kbit(quantize_kbit(x, "float", 4, size)) - x).square().mean()) for size in (64, 512, 4096)
        ]
        assert noise == sorted(noise)

    def test_bits_per_parameter(self) -> None:
        assert [bits_per_parameter(bits) for bits in BITS] == [bits + 0.5 for bits in BITS]
        assert bits_per_parameter(8, 32) == 9.0 and bits_per_parameter(3, 128, double_quant=True) == 3.0634765625

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("int",), ValueError, "bits is None beside data_type 'int'"),
            ((torch.zeros(4), 2), ValueError, "bits is 2, expected None beside a codebook"),
            ((torch.tensor([1.0, -1.0]),), ValueError, r"data_type is \[1.0, -1.0\], expected ascending values"),
            ((torch.zeros(4, dtype=torch.float64),), TypeError, "codebook has dtype torch.float64"),
            ((torch.zeros(257),), ValueError, "codebook has 257 entries, expected 1 to 256"),
            ((torch.zeros(0),), ValueError, "codebook has 0 entries"),
            (("int", 4, 48), ValueError, "block_size is 48, choices: 32, 64"),
        ],
    )
    def test_errors(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            quantize_kbit(torch.ones(64), *arguments)

    def test_codes_and_scales_that_do_not_fit(self) -> None:
        codes, absmax = encode_kbit(torch.ones(65), codebook("int", 4))
        with pytest.raises(ValueError, match=r"absmax has shape \[1\], expected \[2\], one for each 64 of 65 elements"):
            decode_kbit(codes, absmax[:1], codebook("int", 4))
        with pytest.raises(TypeError, match=r"codes has dtype torch\.int32, expected torch.uint8"):
            decode_kbit(codes.int(), absmax, codebook("int", 4))
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64, choices"):
            encode_kbit(torch.ones(65).double(), codebook("int", 4))

    def test_midpoints_are_rounded_to_float32(self) -> None:
        entries = codebook("quantile", 5)
        exact = (entries[:-1].double() + entries[1:].double()) / 2
        assert torch.equal(midpoints(entries), exact.float())
