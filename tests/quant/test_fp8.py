"""What FP8 promises beyond equality with its reference on the ledger's cases."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.ops import INTERPRET, BackendUnavailable
from effkit.quant import (
    FORMATS,
    decode_fp8,
    dequantize_fp8,
    encode_fp8,
    fp8_scale,
    from_fp8_codes,
    quantize_fp8,
    to_fp8_codes,
)
from effkit.quant.fp8 import _nearest, _to_codes_in_integers, fp8_values

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
formats = pytest.mark.parametrize("format", list(FORMATS))
ACTIVATIONS: dict[str, Any] = {"granularity": "block", "block": (1, 128)}
WEIGHT: dict[str, Any] = {"granularity": "block"}
ROW: dict[str, Any] = {"granularity": "row"}
GRANULARITIES: dict[str, dict[str, Any]] = {"tensor": {}, "row": ROW, "1 x 128": ACTIVATIONS, "128 x 128": WEIGHT}
granularities = pytest.mark.parametrize("how", GRANULARITIES.values(), ids=GRANULARITIES)
ALL_CODES = torch.arange(256).to(torch.uint8)
ONE = torch.ones(())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of float16 or bfloat16."""
    return torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)


def torch_cast(v: Tensor, format: str) -> Tensor:
    """torch's own cast of clamped values, NaN without its sign."""
    largest = FORMATS[format].max
    codes = v.float().clamp(-largest, largest).to(FORMATS[format].dtype).view(torch.uint8)
    return torch.where(v.isnan(), 0x7F, codes)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit but for the sign of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def sqnr(x: Tensor, y: Tensor) -> float:
    """dB of signal over error."""
    x, error = x.double(), x.double() - y.double()
    return float(10 * torch.log10(x.square().sum() / error.square().sum()))


def round_trip(x: Tensor, **how: Any) -> Tensor:
    codes, scale = encode_fp8(x, **how)
    kept = {name: how[name] for name in ("granularity", "format", "block", "backend") if name in how}
    return decode_fp8(codes, scale, **kept)


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


GOLDEN = {
    "e4m3": (
        [448, 464, 465, 1e9, -1e9, 2**-6, 2**-9, 2**-10, 1.5 * 2**-9, 2.5 * 2**-9, 0.9375 * 2**-6, 17, 18, 19, -0.0,
         math.inf, -math.inf, math.nan, -math.nan],
        "7E 7E 7E 7E FE 08 01 00 02 02 08 58 59 5A 80 7E FE 7F 7F",
    ),
    "e5m2": (
        [57344, 61439, 61440, 1e9, 2**-14, 2**-16, 2**-17, 1.5 * 2**-16, 1.125, 1.375, -0.0, math.inf, -math.inf,
         math.nan, -math.nan],
        "7B 7B 7B 7B 04 01 00 02 3C 3E 80 7B FB 7F 7F",
    ),
}  # fmt: skip


class TestTheCast:
    """One byte for a float32: nearest, ties to even, saturating."""

    @backends
    @formats
    def test_golden_vector(self, backend: str, format: str) -> None:
        values, codes = GOLDEN[format]
        expected = torch.tensor(list(bytes.fromhex(codes)), dtype=torch.uint8)
        assert torch.equal(encode_fp8(torch.tensor(values), ONE, format=format, backend=backend)[0], expected)

    @backends
    @formats
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, on some NaN
    def test_every_half_is_cast_as_torch_does(self, backend: str, format: str, dtype: torch.dtype) -> None:
        x = every(dtype)
        assert torch.equal(encode_fp8(x, ONE, format=format, backend=backend)[0], torch_cast(x, format))

    @backends
    @formats
    def test_every_midpoint_in_float32(self, backend: str, format: str) -> None:
        """A midpoint of two neighbours goes to the even one, the float32 next to it to the nearer one."""
        values = fp8_values(format)[:128]
        values = values[values.isfinite()]
        middle = (values[1:] + values[:-1]) / 2
        lower = torch.arange(len(middle)).to(torch.uint8)
        for x, code in (
            (middle, lower + lower % 2),
            (torch.nextafter(middle, ONE * 0), lower),
            (torch.nextafter(middle, ONE * 1e9), lower + 1),
        ):
            for sign in (0, 0x80):
                got = encode_fp8(-x if sign else x, ONE, format=format, backend=backend)[0]
                assert torch.equal(got, code + sign)

    @formats
    def test_integers_round_as_the_definition(self, format: str) -> None:
        """What torch.compile and the kernels do, in float32: random bits, all exponents and NaN among them."""
        bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(1))
        x = bits.to(torch.int32).view(torch.float32)
        around = x.sign() * x.abs().clamp(1e-7, 1e6)  # most random exponents are far beyond the format
        for v in (x, around, draw(20_000)):
            expected = _nearest(v, format)
            assert torch.equal(_to_codes_in_integers(v, format), expected)
            assert torch.equal(to_fp8_codes(v, format), expected)

    @formats
    def test_compiling_is_not_interrupted(self, format: str) -> None:
        """A number read from a tensor interrupts it, but not with fullgraph=True, which captures such numbers."""
        torch._dynamo.reset()
        assert torch._dynamo.explain(to_fp8_codes)(draw(8), format).graph_break_count == 0

    @backends
    @formats
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_every_code_is_read_as_torch_does(self, backend: str, format: str, dtype: torch.dtype) -> None:
        expected = ALL_CODES.view(FORMATS[format].dtype).to(dtype)
        assert same(decode_fp8(ALL_CODES, ONE, format=format, dtype=dtype, backend=backend), expected)
        assert same(from_fp8_codes(ALL_CODES, format, dtype), expected)
        assert same(fp8_values(format).to(dtype), expected)

    @backends
    @formats
    def test_codes_come_back(self, backend: str, format: str) -> None:
        finite = ALL_CODES[fp8_values(format).isfinite()]
        values = decode_fp8(finite, ONE, format=format, backend=backend)
        assert torch.equal(encode_fp8(values, ONE, format=format, backend=backend)[0], finite)

    @formats
    def test_flushing_denormals_changes_nothing(self, format: str, flushed_denormals: None) -> None:
        """Codes without an exponent are ordinary numbers in float32, and no step on the way is a denormal."""
        if INTERPRET:
            return
        assert same(decode_fp8(ALL_CODES, ONE, format=format, backend="torch"), fp8_values(format))
        finite = ALL_CODES[fp8_values(format).isfinite()]
        values = fp8_values(format)[finite.long()]
        assert torch.equal(encode_fp8(values, ONE, format=format, backend="torch")[0], finite)
        assert torch.equal(_to_codes_in_integers(values, format), finite)


class TestScales:
    """What one float32 for many elements is."""

    @backends
    @formats
    @granularities
    def test_largest_magnitude_becomes_the_largest_code(self, backend: str, format: str, how: dict[str, Any]) -> None:
        x = draw(130, 129)
        codes, scale = encode_fp8(x, format=format, backend=backend, **how)
        largest = {"e4m3": 0x7E, "e5m2": 0x7B}[format]
        assert int((codes & 0x7F).max()) == largest
        assert int(((codes & 0x7F) == largest).sum()) >= scale.numel()  # each scale has reached it
        assert torch.equal(scale.amax(), x.abs().amax() / FORMATS[format].max)

    @backends
    @granularities
    def test_shapes_of_scales(self, backend: str, how: dict[str, Any]) -> None:
        name = next(name for name, value in GRANULARITIES.items() if value is how)
        expected = {"tensor": (), "row": (2, 5, 1), "1 x 128": (2, 5, 3), "128 x 128": (2, 1, 3)}[name]
        codes, scale = encode_fp8(draw(2, 5, 257), backend=backend, **how)
        assert codes.shape == (2, 5, 257) and scale.shape == expected
        assert codes.dtype == torch.uint8 and scale.dtype == torch.float32

    @backends
    @pytest.mark.parametrize(
        ("values", "scale"),
        [
            ([0.0, -0.0], 1.0),
            ([1.0, math.nan], 1.0),
            ([1.0, math.inf], 1.0),
            ([-math.inf, math.nan], 1.0),
            ([448.0, 1.0], 1.0),
            ([896.0, 1.0], 2.0),
            ([1e-44, 0.0], 2.0**-126),  # a denormal: 1 / scale has to stay finite
            ([3.4e38, 0.0], float(torch.tensor(3.4e38) / 448)),
        ],
        ids=str,
    )
    def test_awkward_magnitudes(self, backend: str, values: list[float], scale: float) -> None:
        for how in ({}, ROW, ACTIVATIONS, WEIGHT):
            _, found = encode_fp8(torch.tensor([values]), backend=backend, **how)
            assert found.item() == scale
        assert fp8_scale(torch.tensor(values).abs().amax()).item() == scale

    @backends
    def test_zero_stays_zero_and_nan_stays_nan(self, backend: str) -> None:
        x = torch.tensor([[0.0, -0.0, 0.0], [2.0, math.nan, -1.0], [math.inf, -5.0, 1000.0]])
        y = round_trip(x, backend=backend, **ROW)
        assert torch.equal(y[0], x[0]) and y[0].signbit().tolist() == [False, True, False]
        assert same(y[1], torch.tensor([2.0, math.nan, -1.0]))
        assert torch.equal(y[2], torch.tensor([448.0, -5.0, 448.0]))  # saturated, as documented

    @backends
    @formats
    @granularities
    def test_powers_of_two(self, backend: str, format: str, how: dict[str, Any]) -> None:
        """The least power of two that does not overflow; dividing by it is exact, so no element is rounded twice."""
        x = draw(130, 40) ** 5
        codes, scale = encode_fp8(x, format=format, power_of_two=True, backend=backend, **how)
        _, exact = encode_fp8(x, format=format, backend=backend, **how)
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        assert (scale >= exact).all() and (scale / 2 < exact).all()
        y = decode_fp8(codes, scale, format=format, backend=backend, **how)
        step = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1 - FORMATS[format].mantissa)
        least = decode_fp8(torch.ones_like(codes), scale, format=format, backend=backend, **how)
        assert ((y.double() - x.double()).abs() <= torch.maximum(step, least).double() / 2).all()

    @backends
    def test_a_power_that_is_met_stays(self, backend: str) -> None:
        x = torch.tensor([[448.0], [449.0], [447.0], [0.0]])
        scale = encode_fp8(x, power_of_two=True, backend=backend, **ROW)[1]
        assert scale.flatten().tolist() == [1.0, 2.0, 1.0, 1.0]

    @backends
    @granularities
    def test_scaling_by_a_power_of_two_scales_the_scale(self, backend: str, how: dict[str, Any]) -> None:
        x = draw(130, 129)
        codes, scale = encode_fp8(x, backend=backend, **how)
        more, larger = encode_fp8(x * 2**20, backend=backend, **how)
        assert torch.equal(more, codes) and torch.equal(larger, scale * 2**20)

    @backends
    def test_floor_of_the_magnitude(self, backend: str) -> None:
        """With 1e-4 as DeepSeek's kernels have it: small blocks lose precision, blocks of zeros have a small scale."""
        x = torch.tensor([[1.0], [1e-6], [0.0], [math.nan]])
        floor = float(torch.tensor(1e-4) / 448)
        scale = encode_fp8(x, amax_floor=1e-4, backend=backend, **ROW)[1].flatten()
        assert scale.tolist() == [float(torch.tensor(1.0) / 448), floor, floor, 1.0]

    @backends
    @granularities
    def test_given_scales_are_used_as_they_are(self, backend: str, how: dict[str, Any]) -> None:
        x = draw(130, 129)
        codes, scale = encode_fp8(x, backend=backend, **how)
        again, kept = encode_fp8(x, scale, backend=backend, **how)
        assert torch.equal(again, codes) and torch.equal(kept, scale)
        halved = encode_fp8(x, scale / 2, backend=backend, **how)[0]  # the upper half of the range saturates
        assert int((halved & 0x7F).max()) == 0x7E and (halved & 0x7F >= codes & 0x7F).all()

    @backends
    def test_scales_of_any_strides(self, backend: str) -> None:
        x = draw(5, 257)
        codes, scale = encode_fp8(x, backend=backend, **ACTIVATIONS)
        strided = torch.stack((scale, scale * 0), -1)[..., 0]
        assert torch.equal(encode_fp8(x, strided, backend=backend, **ACTIVATIONS)[0], codes)
        y = decode_fp8(codes, scale, backend=backend, **ACTIVATIONS)
        assert torch.equal(decode_fp8(codes, strided, backend=backend, **ACTIVATIONS), y)


class TestBlocks:
    """Which elements share a scale."""

    @backends
    @pytest.mark.parametrize("shape", [(130, 257), (576, 1), (1, 576), (127, 129)], ids=str)
    def test_ragged_edges_are_as_if_filled_with_zeros(self, backend: str, shape: tuple[int, int]) -> None:
        x = draw(*shape)
        rows, columns = (-(-size // 128) * 128 for size in shape)
        padded = torch.zeros(rows, columns)
        padded[: shape[0], : shape[1]] = x
        codes, scale = encode_fp8(x, backend=backend, **WEIGHT)
        more, same_scale = encode_fp8(padded, backend=backend, **WEIGHT)
        assert torch.equal(scale, same_scale) and torch.equal(codes, more[: shape[0], : shape[1]])

    @backends
    def test_a_block_sees_its_own_elements_alone(self, backend: str) -> None:
        x = draw(257, 300)
        codes, scale = encode_fp8(x, backend=backend, **WEIGHT)
        for i, j in ((0, 0), (1, 2), (2, 1)):
            place = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            alone, own = encode_fp8(x[place], backend=backend)
            assert torch.equal(codes[place], alone) and torch.equal(scale[i, j], own)

    @backends
    def test_weights_transpose(self, backend: str) -> None:
        """Square blocks: the transposed weight of a backward pass has the transposed codes and scales."""
        x = draw(130, 257)
        codes, scale = encode_fp8(x, backend=backend, **WEIGHT)
        turned, turned_scale = encode_fp8(x.T, backend=backend, **WEIGHT)
        assert torch.equal(turned, codes.T) and torch.equal(turned_scale, scale.T)

    @backends
    @pytest.mark.parametrize("how", [ROW, ACTIVATIONS], ids=["row", "1 x 128"])
    def test_a_token_does_not_depend_on_its_neighbours(self, backend: str, how: dict[str, Any]) -> None:
        x = draw(7, 300)
        codes, scale = encode_fp8(x, backend=backend, **how)
        spoilt = x.clone()
        spoilt[[0, 1, 2, 4, 5, 6]] = math.nan
        alone, own = encode_fp8(spoilt, backend=backend, **how)
        assert torch.equal(alone[3], codes[3]) and torch.equal(own[3], scale[3])

    @backends
    def test_granularities_agree_where_they_mean_the_same(self, backend: str) -> None:
        x = draw(1, 100)
        expected = encode_fp8(x, backend=backend)[0]
        for how in (ROW, ACTIVATIONS, WEIGHT, {"granularity": "block", "block": (1, 100)}):
            assert torch.equal(encode_fp8(x, backend=backend, **how)[0], expected)

    @backends
    @granularities
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.transpose(0, 1),
            lambda x: x[:, ::2],
            lambda x: x[..., ::2],
            lambda x: x.transpose(-1, -2),
            lambda x: x[:1].expand(3, -1, -1),
            lambda x: x[:, 1:, 3:131],
        ],
        ids=["transposed", "stepped rows", "stepped columns", "matrices transposed", "expanded", "slice"],
    )
    def test_any_strides(self, backend: str, how: dict[str, Any], view: Any) -> None:
        x = view(draw(3, 6, 140))
        codes, scale = encode_fp8(x, backend=backend, **how)
        expected, its_scale = encode_fp8(x.contiguous(), backend=backend, **how)
        assert torch.equal(codes, expected) and torch.equal(scale, its_scale)
        spread = view(torch.zeros(3, 6, 140, dtype=torch.uint8)).copy_(codes) if x.is_contiguous() else codes
        again = decode_fp8(spread, scale, backend=backend, **how)
        assert torch.equal(again, decode_fp8(codes, scale, backend=backend, **how))

    @backends
    def test_a_checkpoint_of_576_columns(self, backend: str) -> None:
        """`weight` [N, K] with `weight_scale_inv` [ceil(N / 128), ceil(K / 128)], as DeepSeek's files have them."""
        codes = torch.randint(0, 127, (192, 576), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        scale = draw(2, 5).exp()
        y = decode_fp8(codes, scale, backend=backend, **WEIGHT)
        values = codes.view(torch.float8_e4m3fn).float()
        whole = scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :576]
        assert torch.equal(y, values * whole)


@pytest.mark.skipif(INTERPRET, reason="quality does not depend on the backend, whose codes are equal")
class TestQuality:
    """What formats and granularities are worth, as orderings: all codes are equal on all backends."""

    gaussian = draw(256, 512)
    heavy = draw(256, 512, seed=1) / draw(256, 512, seed=2).square().add(draw(256, 512, seed=3).square()).sqrt()

    def of(self, x: Tensor, **how: Any) -> float:
        return sqnr(x, round_trip(x, **how))

    def test_a_bit_of_precision_is_six_decibels(self) -> None:
        """Half the step is a quarter of the error's power: 6.02 dB."""
        for how in GRANULARITIES.values():
            gain = self.of(self.gaussian, **how) - self.of(self.gaussian, format="e5m2", **how)
            assert round(gain) == 6

    def test_finer_scales_are_better_for_heavy_tails(self) -> None:
        tensor, rows, activations = (self.of(self.heavy, **how) for how in ({}, ROW, ACTIVATIONS))
        assert tensor < rows < activations

    def test_finer_scales_hardly_matter_for_gaussians(self) -> None:
        found = [round(self.of(self.gaussian, **how)) for how in GRANULARITIES.values()]
        assert max(found) - min(found) <= 1

    def test_powers_of_two_are_nearly_free(self) -> None:
        """The relative step of a float hardly depends on its exponent. What is lost is that each maximum was exact."""
        exact, powers = self.of(self.gaussian), self.of(self.gaussian, power_of_two=True)
        assert round(exact) - round(powers) <= 1
        assert self.of(self.heavy, **ACTIVATIONS) > self.of(self.heavy, power_of_two=True, **ACTIVATIONS)

    @pytest.mark.parametrize("how", [{}, ROW], ids=["tensor", "row"])
    def test_an_outlier_channel_is_absorbed_by_the_exponent(self, how: dict[str, Any]) -> None:
        """The other channels, with one 3000 times larger: e4m3 as good as without it, int8 has lost them all."""
        x = self.gaussian.clone()
        x[:, 7] *= 3000
        others = torch.arange(512) != 7
        step = x.abs().amax() / 127
        int8 = (x / step).round() * step
        alone = sqnr(self.gaussian[:, others], round_trip(self.gaussian, **how)[:, others])
        fp8 = sqnr(x[:, others], round_trip(x, **how)[:, others])
        assert round(alone) - round(fp8) <= 1
        assert sqnr(x[:, others], int8[:, others]) < 1
        assert sqnr(x, int8) > alone  # over all channels nothing of that shows

    def test_larger_outliers_need_finer_scales(self) -> None:
        others = torch.arange(512) != 7
        quality: dict[float, list[float]] = {}
        for ratio in (1e4, 3e4, 1e5):
            x = self.gaussian.clone()
            x[:, 7] *= ratio
            ways = ({}, ROW, ACTIVATIONS)
            quality[ratio] = [sqnr(x[:, others], round_trip(x, **how)[:, others]) for how in ways]
            assert quality[ratio] == sorted(quality[ratio])
        for coarse, fine in ((1e4, 3e4), (3e4, 1e5)):
            assert all(a > b for a, b in zip(quality[coarse], quality[fine], strict=True))

    def test_blocks_without_the_outlier_do_not_notice_it(self) -> None:
        x = self.gaussian.clone()
        x[:, 7] *= 1e5
        assert torch.equal(round_trip(x, **ACTIVATIONS)[:, 128:], round_trip(self.gaussian, **ACTIVATIONS)[:, 128:])


class TestTheObject:
    """QuantizedFP8: codes in torch's own dtypes, and what is needed to read them."""

    @backends
    @formats
    @granularities
    def test_round_trip(self, backend: str, format: str, how: dict[str, Any]) -> None:
        x = draw(2, 9, 129).bfloat16()
        q = quantize_fp8(x, how.get("granularity", "tensor"), format, block=how.get("block"), backend=backend)
        codes, scale = encode_fp8(x, format=format, backend=backend, **how)
        assert q.codes.dtype == FORMATS[format].dtype and torch.equal(q.codes.view(torch.uint8), codes)
        assert torch.equal(q.scale, scale) and q.shape == x.shape and q.dtype == x.dtype
        assert q.nbytes == x.numel() + 4 * scale.numel()
        y = dequantize_fp8(q, backend=backend)
        assert y.dtype == x.dtype
        wide = dequantize_fp8(q, dtype=torch.float32, backend=backend)
        assert torch.equal(wide.bfloat16(), y)  # rounded once, at the end
        assert torch.equal(wide, decode_fp8(codes, scale, format=format, backend=backend, **how))

    def test_block_is_remembered(self) -> None:
        assert quantize_fp8(draw(5, 7), "block").block == (128, 128)
        assert quantize_fp8(draw(5, 7), "block", block=(1, 128)).block == (1, 128)
        assert quantize_fp8(draw(5, 7), "row").block is None

    @backends
    def test_no_gradient(self, backend: str) -> None:
        x = draw(5, 7).requires_grad_()
        q = quantize_fp8(x, "row", backend=backend)
        assert not q.scale.requires_grad and not dequantize_fp8(q, backend=backend).requires_grad

    def test_codes_of_another_format(self) -> None:
        q = quantize_fp8(draw(5, 7))
        object.__setattr__(q, "format", "e5m2")
        with pytest.raises(TypeError, match=r"codes has dtype torch.float8_e4m3fn, expected torch.float8_e5m2"):
            dequantize_fp8(q)
        with pytest.raises(TypeError, match="q is Tensor, expected QuantizedFP8"):
            dequantize_fp8(draw(3))


X = torch.zeros(3, 5)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: encode_fp8(X.double()), TypeError, r"x has dtype torch.float64, choices: torch.float16"),
            (lambda: encode_fp8(X.int()), TypeError, "x has dtype torch.int32"),
            (lambda: encode_fp8(X.to(torch.float8_e4m3fn)), TypeError, "x has dtype torch.float8_e4m3fn"),
            (lambda: encode_fp8(None), TypeError, "x is None"),
            (lambda: encode_fp8(X, format="e3m4"), ValueError, "format is 'e3m4', choices: 'e4m3', 'e5m2'"),
            (lambda: quantize_fp8(X, "channel"), ValueError, "granularity is 'channel', choices: 'tensor', 'row'"),
            (lambda: encode_fp8(X, block=(1, 2)), ValueError, r"block is \(1, 2\), but granularity is 'tensor'"),
            (
                lambda: encode_fp8(X, **WEIGHT, block=(128,)),
                ValueError,
                r"block is \(128,\), expected rows and columns",
            ),
            (lambda: encode_fp8(X, **WEIGHT, block=(0, 4)), ValueError, r"block is \(0, 4\), expected"),
            (
                lambda: encode_fp8(X[0], **WEIGHT),
                ValueError,
                r"x has shape \[5\], .*\[128, 128\] needs at least 2 axes",
            ),
            (lambda: encode_fp8(X, **WEIGHT, block=128), ValueError, "block is 128, expected rows and columns"),
            (lambda: encode_fp8(X, **WEIGHT, block=()), ValueError, r"block is \(\), expected"),
            (lambda: encode_fp8(X[0, 0], **ROW), ValueError, "'row' needs at least 1 axes"),
            (lambda: encode_fp8(X, amax_floor=-1.0), ValueError, "amax_floor is -1.0, expected a finite number"),
            (lambda: encode_fp8(X, amax_floor=math.nan), ValueError, "amax_floor is nan"),
            (lambda: encode_fp8(X, ONE, power_of_two=True), ValueError, "but scale is given"),
            (
                lambda: encode_fp8(X, torch.ones(3, 5), **ROW),
                ValueError,
                r"scale has shape \[3, 5\], expected \[3, 1\]",
            ),
            (lambda: encode_fp8(X, ONE.double()), TypeError, "scale has dtype torch.float64, expected torch.float32"),
            (lambda: encode_fp8(X, ONE.to("meta")), ValueError, "scale is on meta, expected cpu as x"),
            (lambda: decode_fp8(X, ONE), TypeError, "codes has dtype torch.float32, expected torch.uint8"),
            (lambda: decode_fp8(X.byte(), ONE, dtype=torch.float64), TypeError, "dtype is torch.float64, choices"),
            (lambda: decode_fp8(X.byte(), torch.ones(2, 2), **WEIGHT), ValueError, r"expected \[1, 1\] for codes"),
        ],
    )
    def test_names_argument_value_and_choices(self, call: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call()

    @pytest.mark.skipif(not INTERPRET, reason="elsewhere another reason comes first")
    @pytest.mark.interpreter
    def test_blocks_that_no_program_holds(self) -> None:
        how = {"granularity": "block", "block": (256, 129)}
        with pytest.raises(BackendUnavailable, match=r"a block of \[256, 129\] is more than the 16384 elements"):
            encode_fp8(X, backend="triton", **how)
        assert torch.equal(encode_fp8(X, **how)[0], X.byte())


def test_public_examples_use_dtype_maxima_of_torch() -> None:
    for format in FORMATS.values():
        assert format.max == torch.finfo(format.dtype).max
