"""Product of two FP8 matrices: one byte an element on every device, the tensor cores' own FP8 where there is one.

    y = (a_scale * a) (b_scale * b)^T + bias        Micikevicius et al., arXiv 2209.05433, section 3.2

A scale that is the same along K multiplies a finished sum. Scales of blocks of 128 (DeepSeek-V3, arXiv 2412.19437,
section 3.3.2) multiply the sums of their blocks, which are added in float32; 128 is also how long the sums of Hopper's
FP8 units, of about 14 bits, can be trusted.

Cost: 2 N M K operations, at the FP8 rate of the device, or at that of float16 where codes must be decoded first; one
byte for each element of a and b.

When not to use it: for a few rows (decoding) the weight is all that is read, and `linear_fp8` reads as little of it
without rounding the activations. Below compute capability 8.9 it saves memory and no time. On a CPU it is a product of
decoded codes in float32: for its result, not for its speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.ops import Case, Op, register
from effkit.quant.fp8 import FORMATS, decode_fp8_torch, to_fp8_codes

BLOCK = 128  # elements along K, and rows of a weight, that share a scale


def matmul_fp8_reference(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_format: str = "e4m3",
    b_format: str = "e4m3",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The equation, in the dtype of the scales."""
    y = decoded(a, a_scale, a_format, a_scale.dtype) @ decoded(b, b_scale, b_format, b_scale.dtype).mT
    if bias is not None:
        y = y + bias
    return y.to(dtype)


def matmul_fp8_torch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_format: str = "e4m3",
    b_format: str = "e4m3",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """torch._scaled_mm where it runs; elsewhere decoded codes, some rows of b at a time."""
    if _scaled_mm_runs(a, a_scale, b, b_scale, a_format, b_format):
        return scaled_mm(a, a_scale, b, b_scale, bias, a_format=a_format, b_format=b_format, dtype=dtype)
    wide = decoded(a, a_scale, a_format, a_scale.dtype)
    with torch.autocast(a.device.type, enabled=False):
        y = torch.cat([wide @ rows.mT for rows in decoded_tiles(b, b_scale, b_format, b_scale.dtype)], dim=-1)
    return (y if bias is None else y + bias).to(dtype)


def matmul_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_format: str = "e4m3",
    b_format: str = "e4m3",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The product of two matrices in FP8, summed in float32.

        y = (a_scale * a) (b_scale * b)^T + bias        arXiv 2209.05433

    a [*N, K]             activations: float8_e4m3fn, float8_e5m2, or uint8 codes of `a_format`
    a_scale [*S]          float32, multiplies on decoding: one for all, one for each row [*N, 1], or one for each block
                          of 128 along K [*N, ceil(K / 128)]; `encode_fp8` makes each
    b [M, K]              a weight [out, in], likewise
    b_scale [*R]          likewise; blocks may have 128 rows as well: [ceil(M / 128), ceil(K / 128)]
    bias [M]              added before rounding
    a_format, b_format    "e4m3" or "e5m2": what uint8 codes are; a float8 tensor says so itself
    dtype                 of the result; None is that of the bias, else float32
    backend               "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, M]. No gradient: `linear_fp8` and `FP8Linear` have theirs. Raises ValueError or TypeError for
    arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    a, a_format = checked_codes("matmul_fp8", "a", a, a_format)
    b, b_format = checked_codes("matmul_fp8", "b", b, b_format)
    MATMUL_FP8.check(a=a, a_scale=a_scale, b=b, b_scale=b_scale, bias=bias)
    rows = math.prod(a.shape[:-1])
    if a.ndim != 2 and a_scale.numel() != 1:  # a matrix is looked at below
        choices = [*a.shape[:-1], 1], [*a.shape[:-1], -(-a.shape[-1] // BLOCK)]
        if list(a_scale.shape) not in choices:
            raise ValueError(
                f"matmul_fp8: a_scale has shape {list(a_scale.shape)}, choices for a of shape {list(a.shape)}: [], "
                + ", ".join(map(str, choices))
            )
    a_scale = checked_scale("matmul_fp8", "a_scale", a_scale, (rows, a.shape[-1]), a.device)
    b_scale = checked_scale("matmul_fp8", "b_scale", b_scale, tuple(b.shape), a.device)
    for name, tensor in (("b", b), ("bias", bias)):
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"matmul_fp8: {name} is on {tensor.device}, expected {a.device} as a")
    dtype = dtype or (a_scale.dtype if bias is None else bias.dtype)
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"matmul_fp8: dtype is {dtype}, choices: {', '.join(map(str, DTYPES))}")
    y = MATMUL_FP8.run(
        backend,
        a=a.reshape(rows, a.shape[-1]),
        a_scale=a_scale,
        b=b,
        b_scale=b_scale,
        bias=None if bias is None else bias.detach(),
        a_format=a_format,
        b_format=b_format,
        dtype=dtype,
    )
    return y.reshape(*a.shape[:-1], b.shape[0])


class Spread(NamedTuple):
    """What the scales of a matrix are scales of, in the words of `decode_fp8`."""

    granularity: str
    block: tuple[int, int] | None = None


def spread_of(scale: Tensor, shape: tuple[int, ...], what: str = "scale") -> Spread:
    """How scales, [] or [rows, blocks], spread over a matrix of this shape; ValueError where they fit in no way."""
    rows, blocks = shape[0], -(-shape[1] // BLOCK)
    ways = {
        (-(-rows // BLOCK), blocks): Spread("block", (BLOCK, BLOCK)),
        (rows, blocks): Spread("block", (1, BLOCK)),
        (rows, 1): Spread("row"),
        (): Spread("tensor"),
    }
    if tuple(scale.shape) not in ways:
        raise ValueError(
            f"{what} has shape {list(scale.shape)}, choices for a matrix of shape {list(shape)}: [], "
            + ", ".join(str(list(way)) for way in list(ways)[-2::-1])
        )
    return ways[tuple(scale.shape)]


def decoded(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The matrix that codes and scales stand for."""
    granularity, block = spread_of(scale, tuple(codes.shape))
    return decode_fp8_torch(codes, scale, granularity=granularity, format=format, block=block, dtype=dtype)


def decoded_tiles(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype, axis: int = 0) -> Iterator[Tensor]:
    """The same some rows (or columns) at a time, so that what is decoded stays in the processor's cache."""
    granularity, block = spread_of(scale, tuple(codes.shape))
    length, size = codes.shape[axis], tile_size(codes, axis)
    step = block[axis] if block else 1 if scale.ndim and axis == 0 else 0  # along the axis, how far a scale reaches
    for start in range(0, max(length, 1), size):
        part = scale.narrow(axis, start // step, -(-min(size, length - start) // step)) if step else scale
        tile = codes.narrow(axis, start, min(size, length - start))
        yield decode_fp8_torch(tile, part, granularity=granularity, format=format, block=block, dtype=dtype)


def tile_size(codes: Tensor, axis: int = 0) -> int:
    """How many rows (or columns) are decoded at a time: a multiple of a block's, all but on a CPU and uncompiled."""
    if torch.compiler.is_compiling() or codes.device.type != "cpu":
        return max(1, codes.shape[axis])
    return BLOCK * max(1, _TILE // (BLOCK * max(1, codes.shape[1 - axis])))


_TILE = 1 << 18  # elements of a weight that are decoded at a time


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    a_format: str = "e4m3",
    b_format: str = "e4m3",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """matmul_fp8 by torch._scaled_mm, with scales of the tensors or of rows.

    It wants K and M in multiples of 16. With scales of rows it writes bfloat16 only, and adds no bias of another dtype
    than its result: for the rest it writes bare sums in float32, which are scaled and rounded here. It sums with full
    precision, which is its default: its fast way keeps about 14 bits.
    """
    M = b.shape[0]
    a, b = _padded(a, 16, axis=1), _padded(_padded(b, 16, axis=1), 16, axis=0)
    operands = a.view(FORMATS[a_format].dtype), b.view(FORMATS[b_format].dtype).t()
    if a_scale.ndim or b_scale.ndim:
        a_scale, b_scale = a_scale.expand(len(a), 1), _padded(b_scale.expand(M, 1), 16, axis=0).t()
    if dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype):
        bias = None if bias is None else _padded(bias, 16, axis=0)
        a_scale, b_scale = a_scale.contiguous(), b_scale.contiguous()
        return torch._scaled_mm(*operands, a_scale, b_scale, bias=bias, out_dtype=dtype)[:, :M]
    one = torch.ones((), device=a.device)
    sums = torch._scaled_mm(*operands, one, one, out_dtype=torch.float32)
    y = (sums * a_scale * b_scale)[:, :M]
    return (y if bias is None else y + bias).to(dtype)


def _padded(x: Tensor, multiple: int, axis: int) -> Tensor:
    """x without gaps in memory, filled up with zeros along an axis."""
    missing = -x.shape[axis] % multiple
    pad = [0] * (2 * (x.ndim - 1 - axis)) + [0, missing]
    return F.pad(x, pad) if missing else x.contiguous()


def _scaled_mm_runs(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, a_format: str, b_format: str, **_: Any
) -> str | None:
    """Why torch._scaled_mm is the way to go, or None: on CUDA from compute capability 8.9 on, but not for blocks."""
    if not (a.is_cuda and has_fp8_products(a.device) and a.numel() and b.numel()):
        return None
    shapes = (a, a_scale), (b, b_scale)
    blocks = any(spread_of(scale, tuple(codes.shape)).granularity == "block" for codes, scale in shapes)
    return None if blocks or a_format == b_format == "e5m2" else "torch._scaled_mm computes the same faster"


def has_fp8_products(device: torch.device) -> bool:
    """Whether the tensor cores of a CUDA device multiply FP8."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) >= (8, 9)


def checked_codes(op: str, name: str, codes: Tensor, format: str) -> tuple[Tensor, str]:
    """Codes as uint8, and their format: that of a float8 dtype, else the one given."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"{op}: {name} is {type(codes).__name__}, expected a tensor")
    if format not in FORMATS:
        raise ValueError(f"{op}: {name} has format {format!r}, choices: {', '.join(map(repr, FORMATS))}")
    formats = {known.dtype: key for key, known in FORMATS.items()}
    if codes.dtype not in (torch.uint8, *formats):
        choices = ", ".join(map(str, (torch.uint8, *formats)))
        raise TypeError(f"{op}: {name} has dtype {codes.dtype}, choices: {choices}")
    return codes.detach().view(torch.uint8), formats.get(codes.dtype, format)


def checked_scale(op: str, name: str, scale: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Scales as [] or [rows, blocks], which fit a matrix of this shape."""
    if scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {scale.dtype}, expected torch.float32")
    if scale.device != device:
        raise ValueError(f"{op}: {name} is on {scale.device}, expected {device}")
    flat = scale.detach()
    flat = flat.reshape(()) if flat.numel() == 1 else flat.reshape(math.prod(flat.shape[:-1]), flat.shape[-1])
    spread_of(flat, shape, f"{op}: {name}")
    return flat


def _supports(a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, **_: Any) -> str | None:
    """Why the kernel cannot run, or None."""
    wide = torch.float64 in (a_scale.dtype, b_scale.dtype, dtype)
    return "float64 has no kernel, which sums in float32" if wide else None


def codes_of_normal(value: Tensor) -> Tensor:
    """Codes of drawn values, up to the largest of both formats' first 112 and down to zero."""
    return to_fp8_codes((value**3).float(), "e4m3")


def scales_of_normal(value: Tensor) -> Tensor:
    """Scales of drawn values, a few binades apart, so small that float16 holds the products."""
    return (value.exp() / 64).float()


def _work(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]) * sizes["M"] * sizes["K"]


def _results(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]) * sizes["M"]


def _bytes(case: Case) -> int:
    """Codes and scales."""
    sizes: Any = case.sizes
    scales = math.prod(sizes["*S"]) + math.prod(sizes["*R"])
    return (math.prod(sizes["*N"]) + sizes["M"]) * sizes["K"] + 4 * scales


def _case(name: str, n: tuple[int, ...], m: int, k: int, a: str = "tensor", b: str = "tensor", **options: Any) -> Case:
    """A case whose scales are those of "tensor", "row", "1x128" or "128x128"."""
    fields = {key: options.pop(key) for key in ("given", "layout", "large") if key in options}
    across, down = -(-k // BLOCK), -(-m // BLOCK)
    shapes = {"tensor": (), "row": (*n, 1), "1x128": (*n, across)}
    weights = {"tensor": (), "row": (m, 1), "1x128": (m, across), "128x128": (down, across)}
    return Case(name, {"*N": n, "M": m, "K": k, "*S": shapes[a], "*R": weights[b]}, options, **fields)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GRADIENT: dict[str, Any] = {"a_format": "e5m2"}

MATMUL_FP8 = register(
    Op(
        name="matmul_fp8",
        area="quant",
        summary="product of two FP8 matrices with scales of tensors, rows or blocks",
        paper="https://arxiv.org/abs/2209.05433",
        shapes="a [*N, K], a_scale [*S], b [M, K], b_scale [*R], bias [M]? -> y [*N, M]",
        function=matmul_fp8,
        reference=matmul_fp8_reference,
        torch=matmul_fp8_torch,
        triton="effkit.kernels.fp8_linear:matmul_fp8",
        supports=_supports,
        prefer_torch=_scaled_mm_runs,
        cases=(
            _case("one", (1,), 1, 1, given=("bias",)),
            _case("no rows", (0,), 8, 16, "row", "row", given=("bias",)),
            _case("nothing to sum", (3,), 5, 0, "1x128", "128x128", given=("bias",)),
            _case("vector", (), 65, 129, given=("bias",)),
            _case("tensor", (2, 3, 5), 67, 130, given=("bias",)),
            _case("rows", (37,), 70, 131, "row", "row", given=("bias",)),
            _case("rows and tensor", (19,), 130, 64, "row", given=("bias",)),
            _case("blocks", (3, 13), 257, 300, "1x128", "128x128", given=("bias",)),
            _case("blocks of both rows", (70,), 33, 259, "1x128", "1x128", given=("bias",), **_GRADIENT),
            _case("rows and blocks", (5,), 129, 385, "row", "128x128"),
            _case("gradients", (33,), 65, 127, given=("bias",), **_GRADIENT),
            _case("gradients of both", (33,), 64, 128, "row", "row", a_format="e5m2", b_format="e5m2"),
            _case("long sum", (9,), 150, 2100, "1x128", "128x128", given=("bias",)),
            _case("transposed", (3, 5), 33, 48, given=("bias",), layout="transposed"),
            _case("model", (4096,), 4096, 4096, "1x128", "128x128", given=("bias",), large=True),
            _case("model, rows", (4096,), 4096, 4096, "row", "row", given=("bias",), large=True),
        ),
        bench=(
            _case("512 x 1k x 1k", (512,), 1024, 1024, given=("bias",)),
            _case("blocks 512 x 1k x 1k", (512,), 1024, 1024, "1x128", "128x128", given=("bias",)),
            _case("4k x 4k x 4k", (4096,), 4096, 4096, given=("bias",), large=True),
            _case("rows 4k x 4k x 4k", (4096,), 4096, 4096, "row", "row", given=("bias",), large=True),
            _case("blocks 4k x 4k x 4k", (4096,), 4096, 4096, "1x128", "128x128", given=("bias",), large=True),
            _case("8k x 8k x 8k", (8192,), 8192, 8192, given=("bias",), large=True),
            _case("blocks 8k x 8k x 8k", (8192,), 8192, 8192, "1x128", "128x128", given=("bias",), large=True),
        ),
        rivals={"dense": "effkit.rivals:dense_of_fp8", "scaled_mm": "effkit.rivals:torch_scaled_mm"},
        grads=(),
        flops=lambda case: 2 * _work(case),
        traffic=_results,
        other_bytes=_bytes,
        draw={
            "a": codes_of_normal,
            "a_scale": scales_of_normal,
            "b": codes_of_normal,
            "b_scale": scales_of_normal,
        },
    )
)
