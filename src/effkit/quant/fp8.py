"""FP8: one byte an element, a float of its own with 4 + 3 or 5 + 2 bits, and one float32 scale for many elements.

    s = max |x| / fmax        q = round_fp8(clamp(x (1 / s), -fmax, fmax))        x ~ q s

Formats: Micikevicius et al., arXiv 2209.05433, table 1. e4m3 reaches 448 with 8 values between powers of two, e5m2
57344 with 4; below 2^-6 and 2^-14 the steps stay at 2^-9 and 2^-16. Rounding is to nearest, ties to even. What is
beyond fmax saturates, infinities too; NaN becomes 0x7F. Scales are taken over a tensor, over rows, or over blocks:
128 x 128 of a weight and 1 x 128 of activations are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2).

Cost: four operations an element; encoding reads x (twice where one scale has more elements than a program holds) and
writes one byte, decoding the other way round.

When not to use it, and what is known to lose:
* Finer scales buy little: a float absorbs outliers by its own exponent. On Gaussian data all granularities are within a
  decibel. One channel 3000 times as large costs the others less than that with a single scale, while int8 loses them.
  Beyond that, and for heavy tails, finer scales are worth their bytes.
* e5m2 has one bit of precision less, which is 6 dB: it is for gradients, whose range is wide and whose errors average.
* An infinity or NaN among the elements of a scale leaves that scale at 1, as Transformer Engine does: NaN stays to be
  seen, but finite neighbours beyond fmax saturate.
* Blocks of 128 x 128 on the gradients of activations diverged in DeepSeek's 16B model (appendix B.2): rows or 1 x 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.ops import Case, Op, register


class Format(NamedTuple):
    """A float of eight bits: 1 sign, 7 - M exponent and M mantissa bits."""

    dtype: torch.dtype
    mantissa: int
    bias: int
    max: float


FORMATS = {"e4m3": Format(torch.float8_e4m3fn, 3, 7, 448.0), "e5m2": Format(torch.float8_e5m2, 2, 15, 57344.0)}
GRANULARITIES = ("tensor", "row", "block")


class Grid(NamedTuple):
    """Where scales apply: x as [B, R, C], cut along R and C into `blocks` of `block` elements, one scale each."""

    view: tuple[int, int, int]
    block: tuple[int, int]
    blocks: tuple[int, int]
    scale: tuple[int, ...]


def encode_fp8_reference(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Block after block: the scale from the largest magnitude, then the nearest of the format's values."""
    grid = grid_of(tuple(x.shape), granularity, block)
    wide, (rows, columns) = x.float().reshape(grid.view), grid.block
    codes = torch.zeros(grid.view, dtype=torch.uint8, device=x.device)
    scales = (
        torch.ones(grid.view[0], *grid.blocks, device=x.device) if scale is None else scale.reshape(-1, *grid.blocks)
    )
    for b in range(grid.view[0]):
        for i in range(grid.blocks[0]):
            for j in range(grid.blocks[1]):
                place = b, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                if scale is None and wide[place].numel():
                    scales[b, i, j] = _scale_of(wide[place], FORMATS[format].max, power_of_two, amax_floor)
                codes[place] = _nearest(wide[place] * (1 / scales[b, i, j]), format)
    return codes.reshape(x.shape), scales.reshape(grid.scale)


def _scale_of(x: Tensor, fmax: float, power_of_two: bool, amax_floor: float) -> Tensor:
    """The scale of these elements."""
    amax = x.abs().amax().clamp(min=amax_floor)
    if amax == 0 or not amax.isfinite():
        return torch.ones_like(amax)
    scale = (amax / torch.full_like(amax, fmax)).clamp(min=2.0**-126)  # by a number, a GPU multiplies
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa in [1/2, 1)
    return 2.0 ** (exponent - (mantissa == 0.5).int()) if power_of_two else scale


def decode_fp8_reference(
    codes: Tensor,
    scale: Tensor,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of each code times the scale of its block."""
    grid = grid_of(tuple(codes.shape), granularity, block)
    values = fp8_values(format).to(codes.device)[codes.long()].reshape(grid.view)
    scales = scale.reshape(grid.view[0], *grid.blocks)
    for axis in (1, 2):
        scales = scales.repeat_interleave(grid.block[axis - 1], axis).narrow(axis, 0, grid.view[axis])
    return (values * scales).to(dtype).reshape(codes.shape)


def fp8_values(format: str) -> Tensor:
    """float32 [256]: what each code stands for, by the definition of the format (a table of the paper)."""
    bits, bias = FORMATS[format].mantissa, FORMATS[format].bias
    values = []
    for code in range(128):
        exponent, fraction = code >> bits, (code & (1 << bits) - 1) / (1 << bits)
        values.append(math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))
    values[_LAST[format] + 1 :] = [math.nan] * (127 - _LAST[format])
    if format == "e5m2":
        values[_LAST[format] + 1] = math.inf
    positive = torch.tensor(values, dtype=torch.float32)
    return torch.cat((positive, -positive))


_LAST = {"e4m3": 0x7E, "e5m2": 0x7B}  # the code of fmax


def _nearest(v: Tensor, format: str) -> Tensor:
    """The code of the nearest value: the number of midpoints between neighbours that |v| has passed; ties to even."""
    values = fp8_values(format)[: _LAST[format] + 1].double().to(v.device)
    middle = (values[1:] + values[:-1]) / 2  # exact in float64
    size = v.double().abs().unsqueeze(-1)
    below_is_even = torch.arange(len(middle), device=v.device) % 2 == 0
    code = torch.where(below_is_even, size > middle, size >= middle).sum(-1)
    code = torch.where(v.signbit(), code + 128, code)
    return torch.where(v.isnan(), 0x7F, code).to(torch.uint8)


def encode_fp8_torch(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Many blocks at once; ragged edges are filled with zeros, which no maximum of magnitudes can see."""
    grid = grid_of(tuple(x.shape), granularity, block)
    tiles = _cut(x, grid)
    if scale is None:
        scale = fp8_scale(_largest(tiles), format, power_of_two=power_of_two, amax_floor=amax_floor).reshape(grid.scale)
    codes = _by_block(lambda x, inverse: _to_codes(x * inverse, format), tiles, 1 / scale, grid, torch.uint8)
    return codes.reshape(x.shape), scale


def decode_fp8_torch(
    codes: Tensor,
    scale: Tensor,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Many blocks at once."""
    grid = grid_of(tuple(codes.shape), granularity, block)
    y = _by_block(lambda q, scale: from_fp8_codes(q, format) * scale, _cut(codes, grid), scale, grid, dtype)
    return y.reshape(codes.shape)


def encode_fp8(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_floor: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a tensor: what `quantize_fp8` wraps.

        s = max |x| / fmax        q = round_fp8(clamp(x (1 / s), -fmax, fmax))        arXiv 2209.05433

    x [*N]         float16, bfloat16 or float32, any strides
    scale [*G]     float32: use these scales (delayed scaling, a checkpoint's); from 2^-126 on. None computes them
    granularity    what shares a scale: "tensor", scale []; "row", the last axis, scale [..., 1]; "block", a scale whose
                   last two axes are those of x divided by `block`, rounded up
    format         "e4m3" (fmax 448) or "e5m2" (fmax 57344)
    block          rows and columns of a block; None is (128, 128), as weights are stored by DeepSeek and transformers.
                   Activations take (1, 128): a token must not depend on its neighbours
    power_of_two   round scales up to a power of two, so that dividing by them is exact
    amax_floor     max |x| is taken as at least this; DeepSeek's kernels use 1e-4. 0.0 keeps tensors of small values
    backend        "reference", "torch", "triton" or None for the fastest that can

    Returns codes uint8 [*N] and scale float32 [*G], which multiplies on decoding. A scale is at least 2^-126; it is 1
    where all its elements are 0 or one is not finite. Infinities become +-fmax, NaN becomes 0x7F. No gradient.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    ENCODE_FP8.check(x=x, scale=scale)
    if x.dtype not in _DTYPES:
        raise TypeError(f"encode_fp8: x has dtype {x.dtype}, choices: {', '.join(map(str, _DTYPES))}")
    block = _checked("encode_fp8", "x", x, scale, granularity, format, block)
    if not 0 <= amax_floor < math.inf:
        raise ValueError(f"encode_fp8: amax_floor is {amax_floor!r}, expected a finite number from 0 on")
    if scale is not None and (power_of_two or amax_floor):
        raise ValueError("encode_fp8: power_of_two and amax_floor are about computing scales, but scale is given")
    return ENCODE_FP8.run(
        backend,
        x=x.detach(),
        scale=None if scale is None else scale.detach(),
        granularity=granularity,
        format=format,
        block=block,
        power_of_two=power_of_two,
        amax_floor=float(amax_floor),
    )


def decode_fp8(
    codes: Tensor,
    scale: Tensor,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The tensor that bytes and scales stand for: float32 products, rounded once to dtype.

        y = value(q) s        arXiv 2209.05433

    codes [*N]     uint8, any strides
    scale [*G]     float32, of the shape that `encode_fp8` gives
    granularity, format, block, backend    as in `encode_fp8`
    dtype          float16, bfloat16 or float32

    Returns y [*N]. NaN codes give NaN, those of infinity in e5m2 infinity. No gradient. Raises ValueError or TypeError
    for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    DECODE_FP8.check(codes=codes, scale=scale)
    if codes.dtype != torch.uint8:
        raise TypeError(f"decode_fp8: codes has dtype {codes.dtype}, expected torch.uint8")
    if dtype not in _DTYPES:
        raise TypeError(f"decode_fp8: dtype is {dtype}, choices: {', '.join(map(str, _DTYPES))}")
    block = _checked("decode_fp8", "codes", codes, scale, granularity, format, block)
    return DECODE_FP8.run(
        backend, codes=codes, scale=scale.detach(), granularity=granularity, format=format, block=block, dtype=dtype
    )


@dataclass(frozen=True)
class QuantizedFP8:
    """A tensor in FP8: x ~ codes * scale.

    codes          float8_e4m3fn or float8_e5m2, of the tensor's shape
    scale          float32: [] for "tensor", [*N, 1] for "row", the last two axes divided by `block` for "block"
    granularity    "tensor", "row" or "block"
    format         "e4m3" or "e5m2"
    dtype          that of the tensor, and of what `dequantize_fp8` gives back
    block          rows and columns of a block, None unless granularity is "block"
    """

    codes: Tensor
    scale: Tensor
    granularity: str
    format: str
    dtype: torch.dtype
    block: tuple[int, int] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes


def quantize_fp8(
    x: Tensor,
    granularity: str = "tensor",
    format: str = "e4m3",
    *,
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_floor: float = 0.0,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> QuantizedFP8:
    """A tensor in FP8; the arguments, and what happens to zeros, infinities and NaN, are those of `encode_fp8`.

    Returns QuantizedFP8, whose codes have torch's own float8 dtype.
    """
    codes, scale = encode_fp8(
        x,
        scale,
        granularity=granularity,
        format=format,
        block=block,
        power_of_two=power_of_two,
        amax_floor=amax_floor,
        backend=backend,
    )
    block = _checked_block("quantize_fp8", block) if granularity == "block" else None
    return QuantizedFP8(codes.view(FORMATS[format].dtype), scale, granularity, format, x.dtype, block)


def dequantize_fp8(q: QuantizedFP8, *, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """The tensor that q stands for, in `dtype` or in that which it had."""
    if not isinstance(q, QuantizedFP8):
        raise TypeError(f"dequantize_fp8: q is {type(q).__name__}, expected QuantizedFP8, as of quantize_fp8")
    expected = FORMATS[_checked_format("dequantize_fp8", q.format)].dtype
    if q.codes.dtype != expected:
        raise TypeError(f"dequantize_fp8: codes has dtype {q.codes.dtype}, expected {expected} of {q.format!r}")
    return decode_fp8(
        q.codes.view(torch.uint8),
        q.scale,
        granularity=q.granularity,
        format=q.format,
        block=q.block,
        dtype=dtype or q.dtype,
        backend=backend,
    )


def fp8_scale(amax: Tensor, format: str = "e4m3", *, power_of_two: bool = False, amax_floor: float = 0.0) -> Tensor:
    """The scale for a largest magnitude, element by element, in float32: amax / fmax, as `encode_fp8` says."""
    floored = amax.float().clamp(min=amax_floor)
    # Divided by a tensor: on a GPU torch multiplies by the rounded reciprocal of a number. 1 / scale stays finite.
    scale = (floored / torch.full_like(floored, FORMATS[format].max)).clamp(min=2.0**-126)
    if power_of_two:  # a mantissa that is not 0 carries into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) >> 23 << 23).view(torch.float32)
    return torch.where((floored > 0) & floored.isfinite(), scale, 1.0)


def to_fp8_codes(v: Tensor, format: str = "e4m3") -> Tensor:
    """The bare cast: float32 to uint8, nearest even, saturating, NaN to 0x7F.

    torch's own cast does the rounding where it runs as written. What it does beyond fmax depends on version and device,
    hence the clamp; it keeps the sign of NaN. A compiler has its own way with it and fails on GPUs without FP8, so that
    under torch.compile the same is done in integers.
    """
    return _to_codes(v.clone(), format)


def _to_codes(v: Tensor, format: str) -> Tensor:
    """The same of a temporary, which it uses up."""
    if torch.compiler.is_compiling():
        return _to_codes_in_integers(v, format)
    largest = FORMATS[format].max
    return v.clamp_(-largest, largest).nan_to_num_(nan=math.nan).to(FORMATS[format].dtype).view(torch.uint8)


def _to_codes_in_integers(v: Tensor, format: str) -> Tensor:
    """The cast on the bits of float32."""
    _, mantissa, bias, largest = FORMATS[format]
    cut, least = 23 - mantissa, 2.0 ** (1 - bias)
    size = v.abs().clamp(max=largest)
    bits = size.view(torch.int32)
    normal = ((bits + (1 << cut - 1) - 1 + (bits >> cut & 1)) >> cut) - (127 - bias << mantissa)
    # Next to 2^23 steps the float32 unit in the last place is one step: the addition rounds, to nearest even.
    exponent = 1 - bias + 23 - mantissa
    subnormal = (size + 2.0**exponent).view(torch.int32) - (127 + exponent << 23)
    codes = torch.where(size < least, subnormal, normal) | (v.view(torch.int32) >> 24 & 0x80)
    return torch.where(v.isnan(), 0x7F, codes).to(torch.uint8)


def from_fp8_codes(codes: Tensor, format: str = "e4m3", dtype: torch.dtype = torch.float32) -> Tensor:
    """The bare cast back: uint8 to a float dtype, exactly.

    e5m2 is the upper byte of float16. The bits of e4m3 in the place of those of float16 have an exponent 8 too small,
    and reach float32 as its normal numbers: flushing denormals cannot touch them. Only NaN, seven ones, carries into
    an eighth bit, which makes it a NaN of float16.
    """
    if format == "e5m2":
        return (codes.to(torch.int16) << 8).view(torch.float16).to(dtype)
    wide = codes.to(torch.int16)
    size = wide & 0x7F
    bits = (wide & 0x80) << 8 | (size | (size + 1 & 0x80)) << 7
    return (bits.view(torch.float16).float() * 2.0**8).to(dtype)


def grid_of(shape: tuple[int, ...], granularity: str, block: tuple[int, int] | None = None) -> Grid:
    """Where the scales of a tensor of this shape apply."""
    size = math.prod(shape)
    if granularity == "tensor":
        return Grid((1, 1, size), (1, max(size, 1)), (1, 1), ())
    lead, width = shape[:-1], shape[-1]
    if granularity == "row":
        rows = math.prod(lead)
        return Grid((1, rows, width), (1, max(width, 1)), (rows, 1), (*lead, 1))
    rows, columns = block or _BLOCK
    across = -(-width // columns)
    if rows == 1:
        return Grid((1, math.prod(lead), width), (1, columns), (math.prod(lead), across), (*lead, across))
    down = -(-shape[-2] // rows)
    view = math.prod(shape[:-2]), shape[-2], width
    return Grid(view, (rows, columns), (down, across), (*shape[:-2], down, across))


def _cut(x: Tensor, grid: Grid) -> Tensor:
    """x as [B, blocks down, rows, blocks across, columns], filled up with zeros."""
    (rows, columns), (down, across) = grid.block, grid.blocks
    missing = down * rows - grid.view[1], across * columns - grid.view[2]
    x = x.reshape(grid.view)
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x.reshape(grid.view[0], down, rows, across, columns)


def _largest(tiles: Tensor) -> Tensor:
    """max |x| of each block. In float32 two reductions cost less than the magnitudes as a tensor of their own."""
    if tiles.dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.maximum(tiles.amax(4).amax(2), -tiles.amin(4).amin(2))
    return tiles.abs().amax(4).amax(2)


def _by_block(
    fn: Callable[[Tensor, Tensor], Tensor], tiles: Tensor, scale: Tensor, grid: Grid, dtype: torch.dtype
) -> Tensor:
    """fn(tiles, scale) joined again; on a CPU a few blocks at a time, so that temporaries stay in its cache."""
    scale = scale.reshape(grid.view[0], grid.blocks[0], 1, grid.blocks[1], 1)
    if tiles.device.type != "cpu" or torch.compiler.is_compiling():
        return _joined(fn(tiles, scale).to(dtype), grid)
    out = torch.empty_like(tiles, dtype=dtype, memory_format=torch.contiguous_format)
    for source, factor, target in zip(*(_pieces(tensor, tiles) for tensor in (tiles, scale, out)), strict=True):
        target.copy_(fn(source, factor))
    return _joined(out, grid)


def _pieces(tensor: Tensor, tiles: Tensor) -> list[Tensor]:
    """A tensor that broadcasts with the tiles, cut as they are into pieces of about _PIECE elements."""
    axis = next((axis for axis in (0, 1, 4) if tiles.shape[axis] > 1), 0)
    step = max(1, _PIECE * torch.get_num_threads() * tiles.shape[axis] // max(1, tiles.numel()))
    count = -(-tiles.shape[axis] // step)
    return [tensor] * count if tensor.shape[axis] == 1 else list(tensor.split(step, axis))


def _joined(tiles: Tensor, grid: Grid) -> Tensor:
    """What `_cut` cut, without what it filled up."""
    (rows, columns), (down, across) = grid.block, grid.blocks
    left = grid.view[2] - (across - 1) * columns
    if torch.compiler.is_compiling() and across > 1 and left < columns:
        # The last block apart: on a CPU torch 2.13 compiles a loop over columns that indexes by column // 128 into one
        # over whole blocks, and forgets what is left over.
        head = tiles[:, :, :, :-1].reshape(grid.view[0], down * rows, (across - 1) * columns)
        tail = tiles[:, :, :, -1, :left].reshape(grid.view[0], down * rows, left)
        return torch.cat((head, tail), -1)[:, : grid.view[1]].contiguous()
    whole = tiles.reshape(grid.view[0], down * rows, across * columns)
    return whole[:, : grid.view[1], : grid.view[2]].contiguous()


def _checked(
    op: str, name: str, x: Tensor, scale: Tensor | None, granularity: str, format: str, block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Checks what encoding and decoding share; returns the block, None unless granularity is "block"."""
    _checked_format(op, format)
    if granularity not in GRANULARITIES:
        raise ValueError(f"{op}: granularity is {granularity!r}, choices: {', '.join(map(repr, GRANULARITIES))}")
    if block is not None and granularity != "block":
        raise ValueError(f"{op}: block is {block!r}, but granularity is {granularity!r}")
    if granularity == "block":
        block = _checked_block(op, block)
    least = {"tensor": 0, "row": 1, "block": 1 if block is None or block[0] == 1 else 2}[granularity]
    if x.ndim < least:
        what = f"granularity {granularity!r}" + (f" of {list(block)}" if block else "")
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, but {what} needs at least {least} axes")
    if scale is not None:
        expected = grid_of(tuple(x.shape), granularity, block).scale
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"{op}: scale has shape {list(scale.shape)}, expected {list(expected)} for {name} of shape "
                f"{list(x.shape)} and granularity {granularity!r}" + (f" of {list(block)}" if block else "")
            )
        if scale.dtype != torch.float32:
            raise TypeError(f"{op}: scale has dtype {scale.dtype}, expected torch.float32")
        if scale.device != x.device:
            raise ValueError(f"{op}: scale is on {scale.device}, expected {x.device} as {name}")
    return block


def _checked_format(op: str, format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"{op}: format is {format!r}, choices: {', '.join(map(repr, FORMATS))}")
    return format


def _checked_block(op: str, block: tuple[int, int] | None) -> tuple[int, int]:
    if block is None:
        return _BLOCK
    sizes = tuple(block) if isinstance(block, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{op}: block is {block!r}, expected rows and columns, for example (128, 128) or (1, 128)")
    return sizes


def _supports(block: tuple[int, int] | None, **arguments: Any) -> str | None:
    """Why the kernel cannot run, or None."""
    if block is not None and _power_of_two(block[0]) * _power_of_two(block[1]) > _MOST:
        return f"a block of {list(block)} is more than the {_MOST} elements that a program holds"
    return None


def _power_of_two(size: int) -> int:
    """The next one from size on."""
    power = 1
    while power < size:
        power *= 2
    return power


def _elements(case: Case) -> int:
    return math.prod(case.sizes["*N"])  # type: ignore[arg-type]


def _scales(case: Case) -> int:
    grid = grid_of(case.sizes["*N"], case.options.get("granularity", "tensor"), case.options.get("block"))  # type: ignore[arg-type]
    return math.prod(grid.scale)


def _all_scales(value: Tensor) -> Tensor:
    """Values from 1e-10 to 1e3: every exponent of both formats, and what rounds to 0."""
    return value**5


def _finite_codes(value: Tensor) -> Tensor:
    """Codes of both signs that are finite in both formats."""
    return ((value.abs() * 1000).long() % 0x7C + 0x80 * (value < 0)).to(torch.uint8)


def _halves(value: Tensor) -> Tensor:
    """Integers, of which e4m3 has every second, fourth or eighth from 16 on: many lie halfway."""
    return (64 * value).round()


def _ones(value: Tensor) -> Tensor:
    return torch.ones(value.shape)


def _strange(value: Tensor) -> Tensor:
    """Zeros of both signs, denormals, and infinities and NaN among ordinary values."""
    spoilt = value[2].clone()
    spoilt[1, ::50], spoilt[2, ::50], spoilt[3, ::90], spoilt[4, 200] = math.inf, math.nan, -math.nan, -math.inf
    return torch.stack((value[0] * 0, value[1] * 1e-41, spoilt))


def _case(name: str, shape: tuple[int, ...], given: bool = False, **fields: Any) -> Case:
    """A case on a tensor of this shape; the axes of its scale follow from the options."""
    layout = {key: fields.pop(key) for key in ("layout", "gain", "large", "draw") if key in fields}
    scale = grid_of(shape, fields.get("granularity", "tensor"), fields.get("block")).scale
    return Case(name, {"*N": shape, "*G": scale}, fields, given=("scale",) if given else (), **layout)


_BLOCK = (128, 128)
_PIECE = 1 << 17  # elements a thread, half a megabyte of float32
_MOST = 16384  # elements of a block in a kernel, its sides rounded up to powers of two
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WEIGHT: dict[str, Any] = {"granularity": "block"}
_ACTIVATIONS: dict[str, Any] = {"granularity": "block", "block": (1, 128)}
_ROWS: dict[str, Any] = {"granularity": "row"}
_SHAPES: tuple[Case, ...] = (
    _case("no axis", ()),
    _case("empty", (0,)),
    _case("tensor", (3, 5, 67)),
    _case("tensor, e5m2", (67, 65), format="e5m2"),
    _case("no rows", (0, 130), **_ROWS),
    _case("no channels", (3, 0), **_ROWS),
    _case("rows", (7, 129), **_ROWS),
    _case("rows, e5m2", (2, 5, 63), format="e5m2", **_ROWS),
    _case("long rows", (3, 2111), **_ROWS),
    _case("rows, transposed", (3, 5, 33), layout="transposed", **_ROWS),
    _case("activations", (2, 5, 257), **_ACTIVATIONS),
    _case("activations, strided", (5, 130), layout="strided", format="e5m2", **_ACTIVATIONS),
    _case("weight", (130, 257), **_WEIGHT),
    _case("weights", (2, 128, 129), format="e5m2", **_WEIGHT),
    _case("small blocks", (2, 7, 13), granularity="block", block=(3, 5)),
    _case("wide blocks", (3, 650), granularity="block", block=(1, 300)),
    _case("no blocks", (3, 0), **_WEIGHT),
)

ENCODE_FP8 = register(
    Op(
        name="encode_fp8",
        area="quant",
        summary="FP8 codes and scales of a tensor, over all of it, rows or blocks",
        paper="https://arxiv.org/abs/2209.05433",
        shapes="x [*N], scale [*G]? -> codes [*N], scale [*G]",
        function=encode_fp8,
        reference=encode_fp8_reference,
        torch=encode_fp8_torch,
        triton="effkit.kernels.fp8:encode_fp8",
        supports=_supports,
        exact=True,
        cases=(
            *_SHAPES,
            _case("powers of two", (5, 257), power_of_two=True, **_ACTIVATIONS),
            _case("strange values", (3, 5, 257), draw={"x": _strange}, **_ACTIVATIONS),
            _case("strange values, e5m2", (3, 5, 257), draw={"x": _strange}, format="e5m2", **_ACTIVATIONS),
            _case("ties", (9, 130), given=True, draw={"x": _halves, "scale": _ones}, **_ROWS),
            _case("given scales", (130, 3), given=True, **_WEIGHT),
            _case("large values", (9, 65), gain={"x": 60.0}, **_ROWS),
            _case("small values", (9, 130), amax_floor=1e-4, gain={"x": 1e-7}, **_ACTIVATIONS),
            _case("longer rows", (64, 16400), large=True, **_ROWS),
            _case("long tensor", (4097, 1025), large=True),
        ),
        bench=(
            _case("tensor 1k x 4k", (1024, 4096)),
            _case("activations 1k x 4k", (1024, 4096), **_ACTIVATIONS),
            _case("weight 1k x 4k", (1024, 4096), **_WEIGHT),
            _case("tensor 8k x 8k", (8192, 8192), large=True),
            _case("rows 8k x 8k", (8192, 8192), large=True, **_ROWS),
            _case("activations 8k x 8k", (8192, 8192), large=True, **_ACTIVATIONS),
            _case("weight 8k x 8k", (8192, 8192), large=True, **_WEIGHT),
        ),
        grads=(),
        flops=lambda case: 4 * _elements(case),
        traffic=_elements,
        other_bytes=lambda case: _elements(case) + 4 * _scales(case),
        rivals={"eager": "effkit.rivals:fp8_encode_eager", "compiled": "effkit.rivals:fp8_encode_compiled"},
        draw={"x": _all_scales, "scale": lambda value: value.abs().exp().float()},
    )
)

DECODE_FP8 = register(
    Op(
        name="decode_fp8",
        area="quant",
        summary="the tensor that FP8 codes and scales stand for",
        paper="https://arxiv.org/abs/2209.05433",
        shapes="codes [*N], scale [*G] -> y [*N]",
        function=decode_fp8,
        reference=decode_fp8_reference,
        torch=decode_fp8_torch,
        triton="effkit.kernels.fp8:decode_fp8",
        supports=_supports,
        exact=True,
        cases=(
            *_SHAPES,
            _case("to bfloat16", (5, 257), dtype=torch.bfloat16, **_ACTIVATIONS),
            _case("to float16", (9, 65), dtype=torch.float16, gain={}, **_ROWS),
            _case("long tensor", (4097, 1025), dtype=torch.bfloat16, large=True),
        ),
        bench=(
            _case("16 weights of 512 x 512", (16, 512, 512), dtype=torch.bfloat16, **_WEIGHT),
            _case("16 weights of 2k x 2k", (16, 2048, 2048), dtype=torch.bfloat16, large=True, **_WEIGHT),
            _case("activations 32 x 2k x 2k", (32, 2048, 2048), dtype=torch.bfloat16, large=True, **_ACTIVATIONS),
        ),
        grads=(),
        flops=_elements,
        traffic=lambda case: 0,
        other_bytes=lambda case: (
            (1 + case.options.get("dtype", torch.float32).itemsize) * _elements(case) + 4 * _scales(case)
        ),
        rivals={"eager": "effkit.rivals:fp8_decode_eager", "compiled": "effkit.rivals:fp8_decode_compiled"},
        draw={
            "codes": _finite_codes,
            "scale": lambda value: value.abs().exp().float(),
        },
    )
)
