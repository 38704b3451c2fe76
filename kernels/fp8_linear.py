"""Products with FP8 matrices on the GPU: inputs plain or in FP8, scales of tensors, of rows, of blocks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, dot, multiprocessors, unit_stride
from effkit.kernels._fp8 import from_fp8
from effkit.norm.dyt import batched
from effkit.quant.fp8 import DECODE_FP8, FORMATS
from effkit.quant.fp8_linear import gradients, keep
from effkit.quant.fp8_matmul import BLOCK as _BLOCK
from effkit.quant.fp8_matmul import has_fp8_products, spread_of

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _tile(ptr, rows, n_rows, stride, k, K):
    """[rows, k] of a row-major matrix, zero outside of it; the code of zero is 0 as well."""
    ok = (rows < n_rows)[:, None] & (k < K)[None, :]
    zero: tl.constexpr = 0 if ptr.dtype.element_ty == tl.uint8 else 0.0
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + k[None, :], mask=ok, other=zero)


@triton.jit
def _scales(ptr, first, rows, n_rows, stride, block, ROWS: tl.constexpr):
    """The scales of rows in a block of K: one for each where ROWS is 1, else the one that all rows of a tile share.

    ROWS is how many neighbouring rows share a scale, None all of them; a tile lies within those of one scale.
    """
    if ROWS is None:
        scales = tl.load(ptr + block)
    elif ROWS == 1:
        scales = tl.load(ptr + rows.to(tl.int64) * stride + block, mask=rows < n_rows, other=0.0)
    else:
        scales = tl.load(ptr + (first // ROWS).to(tl.int64) * stride + block)
    return scales


@triton.jit
def _scaled(
    product, w_scale_ptr, x_scale_ptr, m0, m, n0, n, M, N, stride_ws, stride_xs, w_block, x_block,
    W_ROWS: tl.constexpr, X_ROWS: tl.constexpr,
):  # fmt: skip
    """Products of rows m of w and rows n of x times their scales; a plain x has none."""
    scale = _scales(w_scale_ptr, m0, m, M, stride_ws, w_block, W_ROWS)
    if W_ROWS == 1:
        product *= scale[:, None]
        scale = 1.0
    if x_scale_ptr is not None:
        scale *= _scales(x_scale_ptr, n0, n, N, stride_xs, x_block, X_ROWS)
        if X_ROWS == 1:
            scale = scale[None, :]
    return product * scale


@triton.jit
def _store(y_ptr, bias_ptr, y, m, n, M, N):
    """y [m, n] + bias as rows n of the result [N, M]."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    at = n.to(tl.int64)[None, :] * M + m[:, None]
    tl.store(y_ptr + at, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first rows of w and x whose product is a tile of the result: eight tiles of w share the x that they read."""
    n_m, n_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (8 * n_n) * 8
    height = tl.minimum(n_m - first, 8)
    within = tile % (8 * n_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


# One program owns BLOCK_M rows of w x BLOCK_N rows of x and a share of K. It computes w x^T and not x w^T: a decoded w
# then goes from registers into the product (the first operand of wgmma may), and one token costs 16 columns instead of
# 64 rows. Each step is a product of its own, added in float32: Hopper's FP8 units keep about 14 bits of a sum, which
# steps of 128 hide, and the scales of blocks are applied there. Codes are exact in the dtype of x, so nothing is
# rounded before the sum. With one share the result is finished here, with several their sums go to y [SPLITS, N, M].
@triton.jit(do_not_specialize=["N"])
def _matmul_fp8_fwd(
    w_ptr, w_scale_ptr, x_ptr, x_scale_ptr, bias_ptr, y_ptr,
    stride_w, stride_ws, stride_x, stride_xs, M, N, K,
    W_MANTISSA: tl.constexpr, W_ROWS: tl.constexpr, W_BLOCKS: tl.constexpr,
    X_MANTISSA: tl.constexpr, X_ROWS: tl.constexpr, X_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m0, n0 = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    if SPLITS > 1:
        share = tl.cdiv(steps, SPLITS)
        first = tl.program_id(1) * share
        steps = tl.minimum(first + share, steps)
        y_ptr += tl.program_id(1).to(tl.int64) * N * M
    else:
        first = 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first, steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w = _tile(w_ptr, m, M, stride_w, k, K)
        x = _tile(x_ptr, n, N, stride_x, k, K)
        if w.dtype == tl.uint8:
            if x.dtype == tl.uint8:
                x = from_fp8(x, X_MANTISSA).to(tl.float16)
            product = dot(from_fp8(w, W_MANTISSA).to(x.dtype), x.T)
        else:
            product = tl.dot(w, x.T)
        if W_BLOCKS or X_BLOCKS:
            block = step * BLOCK_K // BLOCK
            product = _scaled(
                product, w_scale_ptr, x_scale_ptr, m0, m, n0, n, M, N, stride_ws, stride_xs,
                block if W_BLOCKS else 0, block if X_BLOCKS else 0, W_ROWS, X_ROWS,
            )  # fmt: skip
        acc += product
    if not (W_BLOCKS or X_BLOCKS):
        acc = _scaled(
            acc, w_scale_ptr, x_scale_ptr, m0, m, n0, n, M, N, stride_ws, stride_xs, 0, 0, W_ROWS, X_ROWS
        )  # fmt: skip
    _store(y_ptr, bias_ptr, acc, m, n, M, N)


# One program owns a tile of the result: it adds the shares in their order, so that results repeat bit for bit.
@triton.jit(do_not_specialize=["N"])
def _matmul_fp8_sum(
    shares_ptr, bias_ptr, y_ptr, M, N, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    m0, n0 = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    at = n.to(tl.int64)[None, :] * M + m[:, None]
    ok = (m < M)[:, None] & (n < N)[None, :]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(SPLITS):
        y += tl.load(shares_ptr + at, mask=ok, other=0.0)
        shares_ptr += tl.cast(N, tl.int64) * M
    _store(y_ptr, bias_ptr, y, m, n, M, N)


class Tile(NamedTuple):
    """The shape of one program's work; the names are those of the launch options."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (architecture, what is multiplied, few rows of x) -> tile; few are at most 16. "fp8" is the tensor cores' own FP8,
# where "half" decodes to float16 or bfloat16. Chosen as the largest that compile without spills, not timed on a device.
# Those for 80 fit into the 99 KiB of its smaller relatives, of which 8.9 and 12.x have FP8 products.
_TILES = {
    (80, "half", True): Tile(64, 16, 128, 4, 3), (80, "half", False): Tile(128, 64, 64, 8, 3),
    (80, "fp32", True): Tile(32, 16, 64, 4, 2), (80, "fp32", False): Tile(32, 32, 32, 4, 2),
    (80, "fp8", True): Tile(64, 16, 128, 4, 4), (80, "fp8", False): Tile(128, 64, 128, 8, 3),
    (90, "half", True): Tile(64, 16, 128, 4, 4), (90, "half", False): Tile(128, 128, 64, 8, 3),
    (90, "fp32", True): Tile(32, 16, 64, 4, 2), (90, "fp32", False): Tile(32, 32, 32, 4, 2),
    (90, "fp8", True): Tile(64, 16, 128, 4, 4), (90, "fp8", False): Tile(64, 128, 128, 4, 4),
    (100, "half", True): Tile(64, 16, 128, 4, 4), (100, "half", False): Tile(128, 128, 64, 8, 3),
    (100, "fp32", True): Tile(32, 16, 64, 4, 2), (100, "fp32", False): Tile(32, 32, 32, 4, 2),
    (100, "fp8", True): Tile(64, 16, 128, 4, 4), (100, "fp8", False): Tile(128, 128, 128, 8, 3),
}  # fmt: skip
_FEW = 16
_INTERPRETED = Tile(64, 32, 128, 4, 1)  # few programs, yet several tiles at the sizes of tests


def _kind(x: Tensor, native: bool) -> str:
    return "fp8" if native else "fp32" if x.dtype == torch.float32 else "half"


def _tile_for(x: Tensor, native: bool) -> Tile:
    if INTERPRET:
        return _INTERPRETED
    return _TILES[architecture(x.device), _kind(x, native), len(x) <= _FEW]


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """Shares of K: as many as fill the device, a power of two with at least two steps for each."""
    splits = 1
    while tiles * splits < multiprocessors(device) and steps >= 4 * splits:
        splits *= 2
    return splits


def _scale_options(scale: Tensor | None, codes: Tensor, name: str) -> dict[str, Any]:
    """How a kernel finds the scale of a row and a block of K."""
    if scale is None:
        return {f"stride_{name}s": 0, f"{name.upper()}_ROWS": None, f"{name.upper()}_BLOCKS": False}
    granularity, block = spread_of(scale, tuple(codes.shape))
    rows = {"tensor": None, "row": 1, "block": block and block[0]}[granularity]
    stride = scale.stride(0) if scale.ndim else 0
    return {f"stride_{name}s": stride, f"{name.upper()}_ROWS": rows, f"{name.upper()}_BLOCKS": granularity == "block"}


def _multiply(
    x: Tensor,
    x_scale: Tensor | None,
    x_format: str,
    w: Tensor,
    w_scale: Tensor,
    w_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x [N, K] times w [M, K], each codes in uint8 with scales [] or [rows, blocks], or a plain x without."""
    (N, K), M = x.shape, w.shape[0]
    y = x.new_empty(N, M, dtype=dtype)
    if y.numel() == 0:
        return y
    x, w, w_scale = unit_stride(x), unit_stride(w), w_scale.contiguous()
    x_scale = None if x_scale is None else x_scale.contiguous()
    scales = _scale_options(w_scale, w, "w") | _scale_options(x_scale, x, "x")
    native = x_scale is not None and not INTERPRET and has_fp8_products(x.device)
    if native:
        x, w = x.view(FORMATS[x_format].dtype), w.view(FORMATS[w_format].dtype)
    tile = _tile_for(x, native)
    tiles = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
    splits = _splits(tiles, triton.cdiv(K, tile.BLOCK_K), x.device)
    sums = y if splits == 1 else x.new_empty(splits, N, M, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _matmul_fp8_fwd[(tiles, splits)](
            w, w_scale, x, x_scale, bias if splits == 1 else None, sums,
            stride_w=w.stride(0), stride_x=x.stride(0), M=M, N=N, K=K, **scales,
            W_MANTISSA=FORMATS[w_format].mantissa, X_MANTISSA=FORMATS[x_format].mantissa,
            SPLITS=splits, **tile._asdict(),
        )  # fmt: skip
        if splits > 1:
            part = {key: tile._asdict()[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps")}
            _matmul_fp8_sum[(tiles,)](sums, bias, y, M, N, SPLITS=splits, **part)
    return y


def _fake(x: Tensor, x_scale: Tensor | None, x_format: str, w: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=others[-1])


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define(
    "multiply_fp8(Tensor x, Tensor? x_scale, str x_format, Tensor w, Tensor w_scale, str w_format, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)
# The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
_library.impl("multiply_fp8", _multiply, "CPU" if INTERPRET else "CUDA")
torch.library.register_fake("effkit::multiply_fp8", _fake, lib=_library)


def matmul_fp8(
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
    """The kernel behind effkit.quant.matmul_fp8, which documents and has checked the arguments."""
    return torch.ops.effkit.multiply_fp8(a, a_scale, a_format, b, b_scale, b_format, bias, dtype)


def linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, format: str = "e4m3"
) -> Tensor:
    """The kernels behind effkit.quant.linear_fp8, which documents and has checked the arguments."""
    return _LinearFP8.apply(x, weight, weight_scale, bias, format)


def _decoded(weight: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> tuple[Tensor]:
    """The weight in one piece."""
    granularity, block = spread_of(scale, tuple(weight.shape))
    decode = DECODE_FP8.implementation("triton")
    return (decode(weight, scale, granularity=granularity, format=format, block=block, dtype=dtype),)


# Rows of x from which on decoding the weight first costs less than decoding it in each tile of the product.
_FUSED = 256


class _LinearFP8(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
        tokens = math.prod(x.shape[:-1])
        if tokens > _FUSED:
            (dense,) = _decoded(weight, scale, format, x.dtype)
            return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
        rows = x.reshape(tokens, x.shape[-1])
        y = torch.ops.effkit.multiply_fp8(rows, None, format, weight, scale, format, bias, x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(ctx, *inputs[1:5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, dy, _decoded)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_LinearFP8.apply, info.batch_size, in_dims, inputs)


class _Build(NamedTuple):
    """What is compiled ahead of time: plain inputs, or codes; few rows or many; what scales are of."""

    x: str
    few: bool
    w_rows: int | None
    x_rows: int | None = None
    splits: int = 1

    def name(self, native: bool) -> str:
        scales = {None: "tensor", 1: "rows", _BLOCK: "blocks"}
        x = "fp8" if native else self.x
        shares = " shares" if self.splits > 1 else ""
        return f"matmul_fp8_fwd {x} {'few' if self.few else 'many'} {scales[self.w_rows]}{shares}"


_BUILDS = (
    _Build("bf16", True, _BLOCK),
    _Build("bf16", True, 1, splits=4),
    _Build("bf16", False, _BLOCK),
    _Build("fp16", False, None),
    _Build("fp32", True, _BLOCK, splits=4),
    _Build("fp32", False, 1),
    _Build("e4m3", True, _BLOCK, 1, splits=4),
    _Build("e4m3", False, _BLOCK, 1),
    _Build("e5m2", False, 1, 1),
    _Build("e5m2", False, None),
)


def aot_specs() -> list[AotSpec]:
    """Inputs of each dtype and codes, decoded on sm_80 and as they are from sm_90 on, with all kinds of scales."""
    sums = [_sum_spec(arch) for arch in (80, 90, 100)]
    return [_spec(arch, build) for arch in (80, 90, 100) for build in _BUILDS] + sums


def _spec(arch: int, build: _Build) -> AotSpec:
    codes = build.x in FORMATS
    native = codes and arch >= 90
    kind = "fp8" if native else "fp32" if build.x == "fp32" else "half"
    tile = _TILES[arch, kind, build.few]._asdict()
    fp8 = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
    pointers = {
        "w_ptr": fp8["e4m3"] if native else "*u8",
        "x_ptr": (fp8[build.x] if native else "*u8") if codes else f"*{build.x}",
        "y_ptr": "*fp32" if build.splits > 1 or build.x == "fp32" else "*fp16" if build.x == "fp16" else "*bf16",
        "bias_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "x_scale_ptr": "*fp32",
    }
    constants: dict[str, Any] = {
        "W_MANTISSA": 3, "W_ROWS": build.w_rows, "W_BLOCKS": build.w_rows == _BLOCK,
        "X_MANTISSA": 2 if build.x == "e5m2" else 3, "X_ROWS": build.x_rows,
        "X_BLOCKS": codes and build.w_rows == _BLOCK, "SPLITS": build.splits,
    }  # fmt: skip
    constants |= {name: tile.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants |= {} if codes else {"x_scale_ptr": None}
    constants |= {} if build.splits == 1 else {"bias_ptr": None}
    types = dict.fromkeys(_matmul_fp8_fwd.arg_names, "i32") | pointers
    needs = ("wgmma",) if arch == 90 and kind != "fp32" else ()
    return AotSpec(build.name(native), _matmul_fp8_fwd, types, constants, arch=arch, needs=needs, **tile)


def _sum_spec(arch: int) -> AotSpec:
    tile = _TILES[arch, "half", True]._asdict()
    constants = {"SPLITS": 4, "BLOCK_M": tile["BLOCK_M"], "BLOCK_N": tile["BLOCK_N"]}
    types = {"shares_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "N": "i32"}
    return AotSpec("matmul_fp8_sum", _matmul_fp8_sum, types, constants, tile["num_warps"], tile["num_stages"], arch)
