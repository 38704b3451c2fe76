"""FP8 codes and scales on the GPU: one pass where a program holds all elements of a scale, two where it cannot."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, cast, multiprocessors
from effkit.kernels._fp8 import fp8_scale, from_fp8, magnitude, to_fp8
from effkit.quant.fp8 import FORMATS, Grid, grid_of

_RUNTIME = ["R", "across", "tiles", "pieces"]


@triton.jit
def _tile(
    R, C, width, across, tiles, pieces, BLOCK_ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """What this program owns of x [B, R, C]: matrix, rows, columns, which of them are there, and the rows' scales.

    A tile lies in one block of columns, all of it or a piece; its rows are those of one block, or single ones that have
    a scale each (BLOCK_ROWS 1).
    """
    STEP: tl.constexpr = TILE_R if BLOCK_ROWS == 1 else BLOCK_ROWS
    pid = tl.program_id(0)
    piece = (pid % pieces).to(tl.int64)
    group = (pid // pieces % across).to(tl.int64)
    tile = (pid // pieces // across % tiles).to(tl.int64)
    b = (pid // pieces // across // tiles).to(tl.int64)
    row_in_tile, column_in_group = tl.arange(0, TILE_R), piece * TILE_C + tl.arange(0, TILE_C)
    rows, columns = tile * STEP + row_in_tile, group * width + column_in_group
    live = (rows < R) & (row_in_tile < STEP)
    ok = live[:, None] & ((column_in_group < width) & (columns < C))[None, :]
    scale_at = (b * tl.cdiv(R, BLOCK_ROWS) + rows // BLOCK_ROWS) * across + group
    return b, rows, columns, live, ok, scale_at


# One program owns a tile of x: whole rows of a block of columns, or one block of 128 x 128. It reads x once, finds its
# scales (or reads them where they are given, and then a tile may be a piece of what shares one), and writes codes and
# scales. A tile has up to 32 elements a thread, all in registers.
@triton.jit(do_not_specialize=_RUNTIME)
def _encode_fp8(
    x_ptr, given_ptr, codes_ptr, scale_ptr, amax_floor, stride_xb, stride_xr, stride_xc,
    R, C, width, across, tiles, pieces,
    BLOCK_ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    MANTISSA: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    b, rows, columns, live, ok, scale_at = _tile(R, C, width, across, tiles, pieces, BLOCK_ROWS, TILE_R, TILE_C)
    x_at = x_ptr + b * stride_xb + (rows * stride_xr)[:, None] + (columns * stride_xc)[None, :]
    x = tl.load(x_at, mask=ok, other=0.0).to(tl.float32)  # [TILE_R, TILE_C]
    if given_ptr is None:
        amax = tl.max(magnitude(x), 1)
        if BLOCK_ROWS > 1:
            amax = tl.max(amax, 0) + tl.zeros([TILE_R], tl.int32)
        scale = fp8_scale(amax, amax_floor, MANTISSA, POWER_OF_TWO)
        tl.store(scale_ptr + scale_at, scale, mask=live & (rows % BLOCK_ROWS == 0))
    else:
        scale = tl.load(given_ptr + scale_at, mask=live, other=1.0)
    codes = to_fp8(x * tl.div_rn(1.0, scale)[:, None], MANTISSA)
    tl.store(codes_ptr + ((b * R + rows) * C)[:, None] + columns[None, :], codes, mask=ok)


# One program owns the same tile of codes as above: it reads them once, with a scale for each row, and writes y.
@triton.jit(do_not_specialize=_RUNTIME)
def _decode_fp8(
    codes_ptr, scale_ptr, y_ptr, stride_cb, stride_cr, stride_cc,
    R, C, width, across, tiles, pieces,
    BLOCK_ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    b, rows, columns, live, ok, scale_at = _tile(R, C, width, across, tiles, pieces, BLOCK_ROWS, TILE_R, TILE_C)
    codes_at = codes_ptr + b * stride_cb + (rows * stride_cr)[:, None] + (columns * stride_cc)[None, :]
    codes = tl.load(codes_at, mask=ok, other=0)  # [TILE_R, TILE_C]
    scale = tl.load(scale_ptr + scale_at, mask=live, other=1.0)
    y = from_fp8(codes, MANTISSA) * scale[:, None]
    tl.store(y_ptr + ((b * R + rows) * C)[:, None] + columns[None, :], cast(y, y_ptr.dtype.element_ty), mask=ok)


# One program owns a stripe of a row that is too long for one program (a whole tensor is such a row). It reads it once
# and writes the largest magnitude to amax [R, stripes]. A maximum is the same in any order; no atomics all the same.
@triton.jit(do_not_specialize=["steps", "stripes"])
def _stripe_amax(x_ptr, amax_ptr, stride_xr, stride_xc, C, steps, stripes, TILE: tl.constexpr):
    row = (tl.program_id(0) // stripes).to(tl.int64)
    own = (tl.program_id(0) % stripes).to(tl.int64)
    amax = tl.zeros([TILE], tl.int32)
    for step in range(own * steps, own * steps + steps):
        columns = step * TILE + tl.arange(0, TILE)
        x = tl.load(x_ptr + row * stride_xr + columns * stride_xc, mask=columns < C, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, magnitude(x))
    tl.store(amax_ptr + row * stripes + own, tl.max(amax, 0))


# One program owns a row of amax: it reads its stripes and writes the scale.
@triton.jit(do_not_specialize=["stripes"])
def _row_scale(
    amax_ptr, scale_ptr, stripes, amax_floor, TILE: tl.constexpr, MANTISSA: tl.constexpr, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, TILE)
    amax = tl.max(tl.load(amax_ptr + row * stripes + own, mask=own < stripes, other=0), 0)
    tl.store(scale_ptr + row, fp8_scale(amax, amax_floor, MANTISSA, POWER_OF_TWO))


class Tile(NamedTuple):
    """Rows and columns of one program; the names are those of the launch options."""

    TILE_R: int
    TILE_C: int
    num_warps: int


# Rows longer than this take two passes. The interpreter takes small tiles, so that small tensors have several.
_LONGEST = 256 if INTERPRET else 16384
_ELEMENTS = 2048 if INTERPRET else 4096
_STEP = 256 if INTERPRET else 4096  # elements of a step of the first pass
_STRIPES = 4  # programs of the first pass for each multiprocessor


def _tile_of(grid: Grid) -> Tile:
    """As many single rows as make 32 elements a thread of 4 warps, or a block."""
    rows, columns = (triton.next_power_of_2(size) for size in grid.block)
    if rows == 1:
        columns = min(columns, _LONGEST) if grid.blocks[1] == 1 else columns
        rows = max(1, _ELEMENTS // columns)
    return Tile(rows, columns, max(4, rows * columns // 1024))


def _flat(x: Tensor, granularity: str, block: list[int] | None) -> tuple[Tensor, Grid]:
    """x as [B, R, C]. Blocks of single rows that fill contiguous rows become rows themselves, one scale each."""
    grid = grid_of(tuple(x.shape), granularity, (block[0], block[1]) if block else None)
    (batch, rows, width), (height, columns), (_, across), scale = grid
    if height == 1 and across > 1 and width % columns == 0 and x.is_contiguous():
        grid = Grid((batch, rows * across, columns), (1, columns), (rows * across, 1), scale)
    return x.reshape(grid.view), grid


def _run(kernel: Any, x: Tensor, grid: Grid, *first: Any, **constants: Any) -> None:
    """Runs a kernel over all tiles of x [B, R, C]: with the arguments `first`, then the strides and sizes."""
    (batch, rows, columns), (height, width), (down, across), _ = grid
    tile = _tile_of(grid)
    tiles = triton.cdiv(rows, tile.TILE_R) if height == 1 else down
    pieces = triton.cdiv(width, tile.TILE_C)
    if programs := batch * tiles * across * pieces:
        sizes = (*x.stride(), rows, columns, width, across, tiles, pieces)
        with torch.cuda.device_of(x):
            kernel[(programs,)](*first, *sizes, BLOCK_ROWS=height, **tile._asdict(), **constants)


def _encode(
    x: Tensor, granularity: str, format: str, block: list[int] | None, power_of_two: bool, amax_floor: float
) -> tuple[Tensor, Tensor]:
    tiles, grid = _flat(x, granularity, block)
    codes, scale = _like(x, torch.uint8), x.new_empty(grid.scale, dtype=torch.float32)
    constants = dict(MANTISSA=FORMATS[format].mantissa, POWER_OF_TWO=power_of_two)
    given = None
    if grid.block[1] > _LONGEST and grid.blocks[1] == 1 and x.numel():
        _scale_of_rows(tiles[0], scale, amax_floor, **constants)
        given = scale
    _run(_encode_fp8, tiles, grid, tiles, given, codes, scale, amax_floor, **constants)
    return codes, scale


def _scale_of_rows(x: Tensor, scale: Tensor, amax_floor: float, **constants: Any) -> None:
    """The scales of long rows, x [R, C]: in two stages, that few rows keep all multiprocessors busy, too."""
    rows, columns = x.shape
    steps = triton.cdiv(columns, _STEP)
    stripes = min(steps, 1024, triton.cdiv(_STRIPES * multiprocessors(x.device), rows))
    amax = x.new_empty((rows, stripes), dtype=torch.int32)
    with torch.cuda.device_of(x):
        _stripe_amax[(rows * stripes,)](
            x, amax, *x.stride(), columns, triton.cdiv(steps, stripes), stripes, TILE=_STEP, num_warps=4
        )
        _row_scale[(rows,)](amax, scale, stripes, amax_floor, TILE=1024, num_warps=4, **constants)


def _encode_with(x: Tensor, scale: Tensor, granularity: str, format: str, block: list[int] | None) -> Tensor:
    tiles, grid = _flat(x, granularity, block)
    codes, given = _like(x, torch.uint8), scale.contiguous()
    constants = dict(MANTISSA=FORMATS[format].mantissa, POWER_OF_TWO=False)
    _run(_encode_fp8, tiles, grid, tiles, given, codes, given, 0.0, **constants)
    return codes


def _decode(
    codes: Tensor, scale: Tensor, granularity: str, format: str, block: list[int] | None, dtype: torch.dtype
) -> Tensor:
    tiles, grid = _flat(codes, granularity, block)
    y = _like(codes, dtype)
    _run(_decode_fp8, tiles, grid, tiles, scale.contiguous(), y, MANTISSA=FORMATS[format].mantissa)
    return y


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_encode(
    x: Tensor, granularity: str, format: str, block: list[int] | None, power_of_two: bool, amax_floor: float
) -> tuple[Tensor, Tensor]:
    scale = grid_of(tuple(x.shape), granularity, (block[0], block[1]) if block else None).scale
    return _like(x, torch.uint8), x.new_empty(scale, dtype=torch.float32)


_library = torch.library.Library("effkit", "FRAGMENT")
_how = "str granularity, str format, int[]? block"
for _name, _arguments, _result, _run_it, _fake in (
    ("encode_fp8", f"Tensor x, {_how}, bool power_of_two, float amax_floor", "(Tensor, Tensor)", _encode, _fake_encode),
    ("encode_fp8_with", f"Tensor x, Tensor scale, {_how}", "Tensor", _encode_with, lambda x, *_: _like(x, torch.uint8)),
    ("decode_fp8", f"Tensor codes, Tensor scale, {_how}, ScalarType dtype", "Tensor", _decode,
     lambda codes, *how: _like(codes, how[-1])),
):  # fmt: skip
    _library.define(f"{_name}({_arguments}) -> {_result}")
    _library.impl(_name, _run_it, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


def encode_fp8(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The kernels behind effkit.quant.encode_fp8, which documents and has checked the arguments."""
    if scale is None:
        return torch.ops.effkit.encode_fp8(x, granularity, format, block, power_of_two, amax_floor)
    return torch.ops.effkit.encode_fp8_with(x, scale, granularity, format, block), scale


def decode_fp8(
    codes: Tensor,
    scale: Tensor,
    *,
    granularity: str = "tensor",
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The kernel behind effkit.quant.decode_fp8, which documents and has checked the arguments."""
    return torch.ops.effkit.decode_fp8(codes, scale, granularity, format, block, dtype)


def _types(kernel: Any, x: str, y: str) -> dict[str, str]:
    """The Triton types of a kernel's arguments: x and y are those of the elements it reads and writes."""
    own = dict(x_ptr=x, codes_ptr="u8", y_ptr=y, amax_ptr="i32")
    pointers = {name: f"*{own.get(name, 'fp32')}" for name in kernel.arg_names if name.endswith("_ptr")}
    return {name: pointers.get(name, "fp32" if name == "amax_floor" else "i32") for name in kernel.arg_names}


def _spec(kernel: Any, name: str, arch: int, tile: Tile | None, dtype: str, constants: dict[str, Any]) -> AotSpec:
    """One build; strides of 1 are constants, as at a launch."""
    ones = {name: 1 for name in kernel.arg_names if name in ("stride_xc", "stride_cc")}
    sides = {} if tile is None else {"TILE_R": tile.TILE_R, "TILE_C": tile.TILE_C}
    return AotSpec(
        name=f"{name} {dtype}",
        kernel=kernel,
        signature=_types(kernel, dtype, dtype),
        constants={**ones, **sides, **constants},
        num_warps=4 if tile is None else tile.num_warps,
        num_stages=3,
        arch=arch,
    )


_AOT_TILES = {
    "1 x 128": (1, Tile(32, 128, 4)),
    "row": (1, Tile(1, 16384, 16)),
    "128 x 128": (128, Tile(128, 128, 16)),
}


def aot_specs() -> list[AotSpec]:
    """Every kernel in both formats, for elements of two and four bytes."""
    specs = []
    for arch, dtype in itertools.product((80, 90, 100), ("bf16", "fp32")):
        specs.append(_spec(_stripe_amax, "stripe_amax", arch, None, dtype, {"TILE": _STEP}))
        for name, format in FORMATS.items():
            to = {"MANTISSA": format.mantissa}
            for blocks, (height, tile) in _AOT_TILES.items():
                how = {"BLOCK_ROWS": height, **to}
                computed = {**how, "POWER_OF_TWO": False, "given_ptr": None}
                specs.append(_spec(_encode_fp8, f"encode {name} {blocks}", arch, tile, dtype, computed))
                specs.append(_spec(_decode_fp8, f"decode {name} {blocks}", arch, tile, dtype, how))
            how = {"BLOCK_ROWS": 1, "POWER_OF_TWO": False, **to}
            specs.append(_spec(_encode_fp8, f"encode {name} with scales", arch, _AOT_TILES["row"][1], dtype, how))
    for arch, (name, format) in itertools.product((80, 90, 100), FORMATS.items()):
        constants = {"TILE": 1024, "POWER_OF_TWO": True, "MANTISSA": format.mantissa}
        specs.append(_spec(_row_scale, f"row_scale {name}", arch, None, "fp32", constants))
    return specs
