"""What four-bit quantisation promises beyond equality with its reference on the ledger's cases."""

import hashlib
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.ops import INTERPRET
from effkit.quant import (
    QUANT_TYPES,
    Quantized4bit,
    bits_per_parameter,
    code_table,
    decode_4bit,
    dequantize_nf4,
    encode_4bit,
    four_bit,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
)
from effkit.quant.four_bit import TABLES, decode_scales, dynamic_map
from effkit.quant.kbit import BLOCK_SIZES, midpoints
from effkit.testing import DTYPES

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize("quant_type", QUANT_TYPES)
QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4, "int4": quantize_int4}
ZERO = {"nf4": 7, "fp4": 0, "int4": 8}  # the code of 0
TOP = {"nf4": 15, "fp4": 3, "int4": 15}  # the code of 1, which is that of NaN too
strange = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(packed: Tensor) -> list[int]:
    return torch.stack((packed >> 4, packed & 15), 1).flatten().tolist()


def hex_of(values: Any) -> str:
    return " ".join(f"{bits & 0xFFFFFFFF:08x}" for bits in torch.tensor(values).view(torch.int32).tolist())


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]


class TestTheTables:
    def test_nf4_has_the_quantiles_of_a_normal_distribution(self) -> None:
        """Eight of the upper half, seven of the lower and 0, in units of the outermost: to the last bit."""
        outermost = 0.9677083
        upper = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float32)[:-1].double())
        lower = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float32)[:-1].double())
        values = torch.cat((upper, lower, torch.zeros(1))).float().sort().values
        assert torch.equal(code_table("nf4"), values / values.max())

    def test_nf4_bits(self) -> None:
        assert hex_of(TABLES["nf4"]) == (
            "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
            "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
        )
        assert hex_of(TABLES["nf4 thresholds"]) == (
            "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
            "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
        )

    def test_fp4_is_a_sign_and_a_magnitude_in_twelfths(self) -> None:
        table = code_table("fp4")
        assert torch.equal(table[:8], torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12)
        assert torch.equal(table[9:], -table[1:8]) and table[8] == 0 and not table[8].signbit()

    def test_int4_is_even_and_symmetric(self) -> None:
        assert torch.equal(code_table("int4"), torch.arange(-8.0, 8.0) / 7)

    @every_type
    def test_order_and_thresholds_belong_together(self, quant_type: str) -> None:
        """FP4's negative thresholds stand one number further out, so that ties go to the smaller magnitude."""
        values = code_table(quant_type)[list(TABLES[f"{quant_type} order"])]
        assert (values.diff() > 0).all()
        thresholds = torch.tensor(TABLES[f"{quant_type} thresholds"])
        moved = (thresholds < 0) & (quant_type == "fp4")
        assert torch.equal(torch.where(moved, thresholds.nextafter(torch.zeros(())), thresholds), midpoints(values))

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="quant_type is 'nf3', choices: 'nf4', 'fp4', 'int4'"):
            code_table("nf3")


class TestGoldenVectors:
    x = (((torch.arange(256) * 37) % 101) - 50).float().view(4, 64) / 50

    @backends
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nf4(self, backend: str, dtype: torch.dtype) -> None:
        q = quantize_nf4(self.x, backend=backend)
        assert q.absmax.tolist() == [1, 1, 1, 1]
        assert bytes(q.packed[:16].tolist()).hex() == "04c16e29f3b05d17e29f3c05d18e2af4"
        assert digest(q.packed) == "21786e1c1cd80ff7"
        y = dequantize_nf4(q, backend=backend).double()
        assert (round(float(y.sum()), 10), round(float((y - self.x).square().sum()), 10)) == (
            -1.8655172437,
            0.741913881,
        )
        assert torch.equal(dequantize_nf4(q, dtype=dtype, backend=backend), y.to(dtype))

    @backends
    def test_fp4(self, backend: str) -> None:
        packed, _ = encode_4bit(self.x, quant_type="fp4", backend=backend)
        assert bytes(packed[:16].tolist()).hex() == "bf5a92a63c4be5a02d63c4be2a12d73f"
        assert digest(packed) == "440829e87d57f542"

    def test_dynamic_map(self) -> None:
        assert digest(dynamic_map()) == "e732639a65f497b4"


@strange
class TestStrangeValues:
    """One contract on every backend; where it differs from bitsandbytes, docs/encode_4bit.md says so."""

    @backends
    @every_type
    @pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-127, -(2.0**-149)])
    def test_a_block_below_the_normal_numbers_is_zero(self, backend: str, quant_type: str, value: float) -> None:
        packed, absmax = encode_4bit(torch.full((64,), value), quant_type=quant_type, backend=backend)
        assert codes_of(packed) == [ZERO[quant_type]] * 64 and absmax.tolist() == [0.0]
        y = decode_4bit(packed, absmax, shape=(64,), quant_type=quant_type, backend=backend)
        assert torch.equal(y, torch.zeros(64)) and not y.signbit().any()

    @backends
    @every_type
    @pytest.mark.parametrize("value", [2.0**-126, torch.finfo(torch.float32).max])
    def test_the_smallest_and_the_largest_scale(self, backend: str, quant_type: str, value: float) -> None:
        q = QUANTIZE[quant_type](torch.tensor([value, 0.0, -value]), backend=backend)
        assert q.absmax.tolist() == [value] and dequantize_nf4(q, backend=backend).tolist() == [value, 0.0, -value]

    @backends
    @every_type
    def test_nan_is_loud_within_its_block(self, backend: str, quant_type: str) -> None:
        x = draw(3, 64)
        x[1, 17] = math.nan
        packed, absmax = encode_4bit(x, quant_type=quant_type, backend=backend)
        assert absmax.isnan().tolist() == [False, True, False]
        assert codes_of(packed)[64:128] == [TOP[quant_type]] * 64
        y = decode_4bit(packed, absmax, shape=(3, 64), quant_type=quant_type, backend=backend)
        assert y.isnan().all(1).tolist() == [False, True, False] and y[::2].isfinite().all()

    @backends
    @every_type
    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_infinity_is_loud_within_its_block(self, backend: str, quant_type: str, value: float) -> None:
        """Its sign is lost, as 0 * inf has none."""
        x = draw(3, 64)
        x[1, 17] = value
        packed, absmax = encode_4bit(x, quant_type=quant_type, backend=backend)
        assert absmax[1] == math.inf
        expected = [ZERO[quant_type]] * 64
        expected[17] = TOP[quant_type]
        assert codes_of(packed)[64:128] == expected
        y = decode_4bit(packed, absmax, shape=(3, 64), quant_type=quant_type, backend=backend)
        assert y[1, 17] == math.inf and y[1].isnan().sum() == 63 and y[::2].isfinite().all()

    @backends
    @every_type
    def test_a_tie_takes_the_lower_code(self, backend: str, quant_type: str) -> None:
        """FP4: the smaller magnitude, on both sides of 0. Next to the tie the nearer one is taken."""
        table = code_table(quant_type)[list(TABLES[f"{quant_type} order"])]
        lower, upper, ties = table[:-1], table[1:], midpoints(table)
        if quant_type == "int4":  # whose lowest entry is out of reach
            lower, upper, ties = lower[1:], upper[1:], ties[1:]
        at_tie = torch.where((ties < 0) & (quant_type == "fp4"), upper, lower)
        below, above = ties.nextafter(-torch.ones(())), ties.nextafter(torch.ones(()))
        for x, expected in ((below, lower), (ties, at_tie), (above, upper)):
            q = QUANTIZE[quant_type](torch.cat((x, torch.ones(1))), backend=backend)
            assert torch.equal(dequantize_nf4(q, backend=backend)[:-1], expected)

    @backends
    def test_fp4_has_one_zero(self, backend: str) -> None:
        """bitsandbytes also writes code 8, which is -0 on a GPU. It can be read."""
        tiny = torch.tensor([0.0, -0.0, 0.0026, -0.0026, 1.0, 0.0])
        packed, _ = encode_4bit(tiny, quant_type="fp4", backend=backend)
        assert codes_of(packed) == [0, 0, 0, 0, 3, 0]
        y = decode_4bit(
            torch.tensor([0x88], dtype=torch.uint8), torch.ones(1), shape=(2,), quant_type="fp4", backend=backend
        )
        assert y.tolist() == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="of the torch path")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_code_gives_the_same_bits() -> None:
    """Compiled in earnest, since decoding takes another way there: odd numbers, NaN, infinities, ties of rounding."""

    def both(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        decoded = (decode_4bit(packed, scales, shape=(37, 67), dtype=dtype) for dtype in DTYPES)
        return *encode_4bit(x, quant_type="fp4"), *decoded

    x = draw(37, 67)
    packed, _ = encode_4bit(x)
    scales = torch.cat((torch.tensor([math.nan, math.inf, 3.39e38, 1e5, 1.0, 1e-6, 1e-39]), draw(32).abs()))
    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    for mine, plain in zip(compiled(x, packed, scales), both(x, packed, scales), strict=True):
        nan = plain.isnan()
        assert torch.equal(mine.isnan(), nan) and torch.equal(mine[~nan], plain[~nan])


class TestBlocks:
    @backends
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (63,), (7, 13), (2, 3, 41)])
    def test_shapes(self, backend: str, shape: tuple[int, ...]) -> None:
        x = draw(*shape)
        q = quantize_nf4(x, 32, backend=backend)
        assert q.packed.shape == ((x.numel() + 1) // 2,) and q.absmax.shape == (-(-x.numel() // 32),)
        assert dequantize_nf4(q, backend=backend).shape == shape

    @backends
    @every_type
    def test_behind_an_odd_number_is_the_code_of_zero(self, backend: str, quant_type: str) -> None:
        packed, _ = encode_4bit(draw(7, 13), quant_type=quant_type, backend=backend)
        assert codes_of(packed)[91:] == [ZERO[quant_type]]

    @backends
    def test_the_earlier_value_is_in_the_high_half(self, backend: str) -> None:
        packed, _ = encode_4bit(torch.tensor([-1.0, 1.0]), backend=backend)
        assert packed.tolist() == [0x0F]

    @backends
    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_blocks_run_over_rows_and_know_nothing_of_each_other(self, backend: str, block_size: int) -> None:
        x = draw(3, 67) if block_size < 256 else draw(3, 2741)
        q = quantize_nf4(x, block_size, backend=backend)
        y = dequantize_nf4(q, backend=backend).flatten()
        for number, block in enumerate(x.flatten().split(block_size)):
            alone = quantize_nf4(block, block_size, backend=backend)
            assert torch.equal(alone.absmax, q.absmax[number : number + 1])
            at = number * block_size
            assert torch.equal(dequantize_nf4(alone, backend=backend), y[at : at + len(block)])
            if number == 3:
                break

    @backends
    @every_type
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_quantising_again_changes_nothing(self, backend: str, quant_type: str, dtype: torch.dtype) -> None:
        """The values of a code come back as that code. In 16 bits a scale must be a number of 16 bits for that."""
        quantize = QUANTIZE[quant_type]
        once = quantize(draw(5, 64).to(dtype), backend=backend)
        again = quantize(dequantize_nf4(once, backend=backend), backend=backend)
        assert torch.equal(again.packed, once.packed) and torch.equal(again.absmax, once.absmax)

    def test_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The torch path takes a few values at a time: whole tiles, and a rest that ends within a block and a byte."""
        if INTERPRET:
            pytest.skip("of the torch path")
        x = draw(3 * 4096 * torch.get_num_threads() + 99)
        whole = {name: quantize(x) for name, quantize in QUANTIZE.items()}
        monkeypatch.setattr(four_bit, "_TILE", 4096)
        for name, quantize in QUANTIZE.items():
            q = quantize(x)
            assert torch.equal(q.packed, whole[name].packed) and torch.equal(q.absmax, whole[name].absmax)
            assert torch.equal(dequantize_nf4(q), dequantize_nf4(q, backend="reference"))
            half = dict(dtype=torch.float16)
            assert torch.equal(dequantize_nf4(q, **half), dequantize_nf4(q, **half, backend="reference"))

    @backends
    def test_no_gradient(self, backend: str) -> None:
        q = quantize_nf4(draw(2, 64).requires_grad_(), double_quant=True, backend=backend)
        assert not any(x.requires_grad for x in (q.packed, q.absmax, q.scales(), dequantize_nf4(q, backend=backend)))


# Mean absolute and mean relative error of randn by block size: bitsandbytes, tests/test_functional.py.
PUBLISHED = {
    "nf4": {
        32: (0.067746, 0.189726), 64: (0.072798, 0.203339), 128: (0.076831, 0.215237), 256: (0.080337, 0.226105),
        512: (0.083547, 0.236079), 1024: (0.086610, 0.245370), 2048: (0.089592, 0.254163), 4096: (0.092547, 0.262473),
    },
    "fp4": {
        32: (0.088925, 0.242443), 64: (0.096543, 0.260125), 128: (0.102969, 0.275817), 256: (0.108684, 0.289831),
        512: (0.114115, 0.302881), 1024: (0.119333, 0.315000), 2048: (0.124556, 0.326607), 4096: (0.129536, 0.337169),
    },
}  # fmt: skip
# Signal over noise of NF4 on a normal distribution in dB.
SQNR = {32: 21.18, 64: 20.72, 128: 20.39, 256: 20.12, 512: 19.88, 1024: 19.66, 2048: 19.43, 4096: 19.19}


def sigmas_apart(sample: Tensor, block_size: int, published: float) -> float:
    """The mean of a sample against a published one, in standard errors: blocks are independent, values are not."""
    means = sample.double().view(-1, block_size).mean(1)
    return float((means.mean() - published).abs() / (means.std() / math.sqrt(len(means))))


def sqnr(x: Tensor, y: Tensor) -> float:
    return float(10 * (x.square().mean() / (x - y).square().mean()).log10())


@pytest.mark.skipif(INTERPRET, reason="statistics of codes that the ledger has judged")
class TestQuality:
    @pytest.mark.parametrize("quant_type", PUBLISHED)
    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_errors_are_those_of_bitsandbytes(self, quant_type: str, block_size: int) -> None:
        """Within the seven standard errors that it grants itself."""
        x = draw(1024, 1024)
        error = (dequantize_nf4(QUANTIZE[quant_type](x, block_size)) - x).abs()
        absolute, relative = PUBLISHED[quant_type][block_size]
        assert sigmas_apart(error, block_size, absolute) < 7
        assert sigmas_apart(error / (x.abs() + 1e-8), block_size, relative) < 7

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_signal_over_noise(self, block_size: int) -> None:
        x = draw(1024, 1024)
        noise = (dequantize_nf4(quantize_nf4(x, block_size)) - x).square()
        assert sigmas_apart(noise, block_size, 10 ** (-SQNR[block_size] / 10)) < 7

    def test_nf4_is_best_on_normal_values_and_worst_on_uniform_ones(self) -> None:
        """QLoRA's table 2 in small; and what its table costs where values are not normal."""
        for x, best in ((draw(512, 128), "nf4"), (draw(512, 128).erf(), "int4")):
            quality = {name: sqnr(x, dequantize_nf4(quantize(x))) for name, quantize in QUANTIZE.items()}
            assert max(quality, key=quality.__getitem__) == best
        assert quality["fp4"] < quality["int4"]


class TestDoubleQuantisation:
    @backends
    @every_type
    def test_codes_never_change(self, backend: str, quant_type: str) -> None:
        x = draw(37, 130)
        plain, double = (QUANTIZE[quant_type](x, 32, nested, backend=backend) for nested in (False, True))
        assert torch.equal(plain.packed, double.packed)
        assert double.absmax.dtype == torch.uint8 and plain.nested is None and double.nested is not None
        assert double.nested.absmax.shape == (1,) and double.nested.offset.shape == ()

    def test_scales_are_read_as_they_are_written(self) -> None:
        """map[code] * absmax of 256 + offset, in this order and in float32."""
        x = draw(300, 64) * draw(300, 1, seed=1).exp()
        plain, double = quantize_nf4(x), quantize_nf4(x, double_quant=True)
        assert double.nested is not None and double.nested.absmax.shape == (2,)
        assert torch.equal(double.nested.offset, plain.absmax.mean())
        spread = double.nested.absmax.repeat_interleave(256)[:300]
        assert torch.equal(double.scales(), dynamic_map()[double.absmax.long()] * spread + double.nested.offset)
        assert torch.equal(spread[:256], (plain.absmax - double.nested.offset)[:256].abs().amax().expand(256))

    def test_each_scale_is_the_nearest_of_the_map(self) -> None:
        absmax = quantize_nf4(draw(256, 64)).absmax
        codes, nested = four_bit.encode_scales(absmax)
        table = dynamic_map().double() * nested.absmax.double() + nested.offset.double()
        distance = (table - absmax.double()[:, None]).abs()
        chosen = distance.gather(1, codes[:, None].long())[:, 0]
        # A midpoint is a number of float32, and so are z and absmax - offset: ties within their rounding may fall
        # either way.
        assert (chosen <= distance.amin(1) + 2**-22 * nested.absmax).all()

    def test_memory(self) -> None:
        """Bits a value; the offset is the one number that does not shrink with it."""
        x = draw(256, 256)
        plain, double = quantize_nf4(x), quantize_nf4(x, double_quant=True)
        assert 8 * plain.nbytes / x.numel() == bits_per_parameter(4) == 4.5
        assert 8 * (double.nbytes - 4) / x.numel() == bits_per_parameter(4, double_quant=True) == 4.126953125
        assert [bits_per_parameter(4, size) for size in (32, 128, 256)] == [5.0, 4.25, 4.125]

    def test_equal_scales_and_none(self) -> None:
        for x in (torch.ones(3, 64), torch.zeros(130), draw(0), draw(64)):
            q = quantize_nf4(x, double_quant=True)
            assert torch.equal(q.scales(), quantize_nf4(x).absmax)

    @strange
    def test_a_strange_scale_spoils_all(self) -> None:
        """Loud: the mean of the scales is NaN or infinite, and nothing can be read."""
        x = draw(3, 64)
        x[1, 17] = math.nan
        assert dequantize_nf4(quantize_nf4(x, double_quant=True)).isnan().all()
        x[1, 17] = math.inf
        assert not dequantize_nf4(quantize_nf4(x, double_quant=True)).isfinite().any()

    def test_quality_hardly_suffers(self) -> None:
        """About a fiftieth of a decibel at most: a code's error is a hundred times that of its scale."""
        x = draw(512, 512)
        plain, double = (sqnr(x, dequantize_nf4(quantize_nf4(x, double_quant=nested))) for nested in (False, True))
        assert plain - 0.02 < double

    def test_decode_scales_alone(self) -> None:
        q = quantize_nf4(draw(64, 64), double_quant=True)
        assert q.nested is not None
        assert torch.equal(decode_scales(q.absmax, q.nested.absmax, q.nested.offset), q.scales())


class TestBadInput:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=rf"encode_4bit: x has dtype {dtype}, choices: torch.float32"):
            quantize_nf4(torch.zeros(64).to(dtype))
        packed, absmax = encode_4bit(torch.zeros(64))
        with pytest.raises(TypeError, match=rf"decode_4bit: dtype is {dtype}, choices: torch.float32"):
            decode_4bit(packed, absmax, shape=(64,), dtype=dtype)

    @pytest.mark.parametrize("block_size", [0, 16, 48, 8192, -64])
    def test_block_sizes(self, block_size: int) -> None:
        with pytest.raises(ValueError, match=f"block_size is {block_size}, choices: 32, 64, .*4096"):
            quantize_nf4(torch.zeros(64), block_size)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(quant_type="af4"), ValueError, "quant_type is 'af4', choices: 'nf4', 'fp4', 'int4'"),
            (dict(shape=(2, 63)), ValueError, r"packed has shape \[64\], expected \[63\], half of the 126 elements"),
            (dict(shape=(3, 64)), ValueError, r"absmax has shape \[2\], expected \[3\], one for each 64 of 192"),
            (dict(block_size=128), ValueError, r"absmax has shape \[2\], expected \[1\]"),
            (dict(absmax=torch.zeros(2, dtype=torch.uint8)), TypeError, "absmax has dtype torch.uint8, expected"),
            (dict(packed=torch.zeros(64)), TypeError, "packed has dtype torch.float32, expected torch.uint8"),
            (dict(packed=torch.zeros(64, 1, dtype=torch.uint8)), ValueError, r"packed has shape \[64, 1\]"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )  # fmt: skip
    def test_decoding(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        packed, absmax = encode_4bit(torch.zeros(2, 64))
        with pytest.raises(error, match=message):
            decode_4bit(**{"packed": packed, "absmax": absmax, "shape": (2, 64), **change})

    def test_arguments_of_another_type(self) -> None:
        with pytest.raises(TypeError, match="x is list, expected a tensor"):
            quantize_nf4([0.0])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="quantize_fp4: double_quant is 'no', expected True or False"):
            quantize_fp4(draw(64), double_quant="no")  # type: ignore[arg-type]

    def test_frozen(self) -> None:
        q = quantize_nf4(torch.zeros(64))
        assert isinstance(q, Quantized4bit) and q != quantize_nf4(torch.zeros(64))  # compared by identity
        with pytest.raises(AttributeError):
            q.block_size = 32  # type: ignore[misc]
