"""4-bit linear on the GPU: for a few tokens the weight is decoded on its way into the product, for many before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, dot, multiprocessors
from effkit.norm.dyt import batched
from effkit.quant.four_bit import code_table, dynamic_map
from effkit.quant.nf4_linear import gradients, product

# More tokens than this decode the weight once and leave the product to cuBLAS.
MANY = 64


@triton.jit
def _scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, ok):
    """Scales of the blocks with these numbers. Double-quantised ones are bytes, with a scale for 256 of them."""
    if nested_absmax_ptr is None:
        scale = tl.load(absmax_ptr + block, mask=ok, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=ok, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // 256, mask=ok, other=0.0)
        scale = tl.load(map_ptr + code) * nested + tl.load(nested_offset_ptr)
    return scale


@triton.jit
def _decoded(codes, scale, table, dtype: tl.constexpr):
    """Values [BLOCK_M, blocks * half] of codes [BLOCK_M, blocks, half], rounded to dtype as a dense weight would be.

    The table [16] is in registers and shared memory. As a load it would be pipelined, each value copied on its own.
    """
    flat = tl.reshape(codes.to(tl.int32), [codes.shape[0] * codes.shape[1] * codes.shape[2]])
    value = tl.reshape(tl.gather(table, flat, 0), codes.shape) * scale[:, :, None]
    return tl.reshape(cast(value, dtype), [codes.shape[0], codes.shape[1] * codes.shape[2]])


# One program owns BLOCK_M rows of the weight, a share of its columns, and all tokens, of which there are few: it reads
# its part of the weight once. It writes y.T of its share, [BLOCK_M, BLOCK_N]: with the weight as the left operand a
# tile of 64 rows fills a wgmma however few tokens there are. A byte holds columns 2 j (high) and 2 j + 1 (low), which
# are never interleaved: the product is the sum of one over even and one over odd columns.
@triton.jit(do_not_specialize=["N", "n_splits"])
def _linear_4bit_fwd(
    x_ptr, weight_ptr, absmax_ptr, bias_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr, out_ptr,
    stride_xn, N, M, K, n_splits,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = min(BLOCK_SIZE, BLOCK_K)  # columns that share a scale
    split = tl.program_id(0) % n_splits
    rows = (tl.program_id(0) // n_splits).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    starts = tl.arange(0, BLOCK_K // WIDTH) * WIDTH  # first column of each block
    pairs = starts[:, None] // 2 + tl.arange(0, WIDTH // 2)[None, :]  # [blocks, half]
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), n_splits) * BLOCK_K
    weight_ptr += (rows * (K // 2))[:, None, None]
    table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        ok = (rows < M)[:, None] & (k + starts < K)[None, :]
        block = (rows * (K // BLOCK_SIZE))[:, None] + ((k + starts) // BLOCK_SIZE)[None, :]
        scale = _scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, block, ok)  # [BLOCK_M, blocks]
        packed_ok = (rows < M)[:, None, None] & (k // 2 + pairs < K // 2)[None, :, :]
        packed = tl.load(weight_ptr + (k // 2 + pairs)[None, :, :], mask=packed_ok, other=0)
        x_ok = (tokens < N)[:, None] & (k + columns < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None].to(tl.int64) * stride_xn + (k + columns)[None, :], mask=x_ok, other=0.0)
        even, odd = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_K // 2, 2]))
        acc = dot(_decoded(packed >> 4, scale, table, x.dtype), tl.trans(even), acc)
        acc = dot(_decoded(packed & 15, scale, table, x.dtype), tl.trans(odd), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    at = (split * N + tokens).to(tl.int64)[None, :] * M + rows[:, None]
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (tokens < N)[None, :])


# One program owns BLOCK elements of y: it adds what the splits found, in order, and the bias.
@triton.jit(do_not_specialize=["N", "n_splits"])
def _linear_4bit_combine(part_ptr, bias_ptr, y_ptr, N, M, n_splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = N.to(tl.int64) * M
    ok = at < size
    part_ptr += at
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_splits):
        total += tl.load(part_ptr, mask=ok, other=0.0)
        part_ptr += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % M, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, cast(total, y_ptr.dtype.element_ty), mask=ok)


class Tile(NamedTuple):
    """Rows and columns of the weight in one step."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (architecture, tokens up to, bytes of an element) -> tile. float32 has no tensor cores: smaller tiles, or registers
# run out. Not timed on a device.
FEW = 16
TILES = {
    (arch, tokens, size): tile
    for arch, half in ((80, Tile(64, 64, 4, 4)), (90, Tile(64, 128, 4, 3)), (100, Tile(64, 128, 4, 3)))
    for size, tile in ((2, half), (4, Tile(32, 64, 4, 2)))
    for tokens in (FEW, MANY)
}
_INTERPRETED = Tile(64, 128, 4, 1)  # several rows of tiles and several splits at the sizes of tests
_COMBINED = 1024


def _forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    quant_type: str,
) -> Tensor:
    M, K = weight.shape[0], x.shape[-1]
    y = _empty(x, weight)
    N = x.shape[:-1].numel()
    if not y.numel():
        return y
    x = x.reshape(N, K)
    x = x if x.stride(-1) == 1 else x.contiguous()
    few = FEW if N <= FEW else MANY
    tile = _INTERPRETED if INTERPRET else TILES[architecture(x.device), few, x.element_size()]
    n_tiles = triton.cdiv(M, tile.BLOCK_M)
    # Four programs a multiprocessor, with two or three steps in flight each, to cover the latency of memory; a share
    # of fewer than four steps would be mostly the filling of that pipeline.
    n_splits = max(1, min(4 * multiprocessors(x.device) // n_tiles, triton.cdiv(K, 4 * tile.BLOCK_K)))
    out = y if n_splits == 1 else x.new_empty(n_splits, N, M, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _linear_4bit_fwd[(n_tiles * n_splits,)](
            x, weight.contiguous(), absmax.contiguous(), bias if n_splits == 1 else None, nested_absmax, nested_offset,
            code_table(quant_type).to(x.device), dynamic_map().to(x.device), out, x.stride(0), N, M, K, n_splits,
            BLOCK_SIZE=block_size, BLOCK_N=max(16, triton.next_power_of_2(N)), **tile._asdict(),
        )  # fmt: skip
        if n_splits > 1:
            grid = (triton.cdiv(N * M, _COMBINED),)
            _linear_4bit_combine[grid](out, bias, y, N, M, n_splits, BLOCK=_COMBINED, num_warps=4)
    return y


def _empty(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define(
    "linear_4bit_forward(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, Tensor? nested_absmax, "
    "Tensor? nested_offset, int block_size, str quant_type) -> Tensor"
)
_library.impl("linear_4bit_forward", _forward, "CPU" if INTERPRET else "CUDA")
torch.library.register_fake("effkit::linear_4bit_forward", _empty, lib=_library)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        block_size: int,
        quant_type: str,
        backend: str,
    ) -> Tensor:
        return torch.ops.effkit.linear_4bit_forward(
            x, weight, absmax, bias, nested_absmax, nested_offset, block_size, quant_type
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, absmax, bias, nested_absmax, nested_offset, *ctx.options = inputs
        ctx.save_for_backward(weight, absmax, nested_absmax, nested_offset)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, dy)[:9]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_Linear4bit.apply, info.batch_size, in_dims, inputs)


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    *,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """The kernels behind effkit.quant.linear_4bit, which documents and has checked the arguments."""
    few = x.shape[:-1].numel() <= MANY
    call = _Linear4bit.apply if few else product
    return call(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, quant_type, "triton")


def aot_specs() -> list[AotSpec]:
    """The fused product in each dtype, for one tile of tokens and for the most, small blocks, both kinds of scales."""
    fused = [
        _spec(arch, dtype, tokens, nested, block_size)
        for arch in (80, 90, 100)
        for dtype, tokens, nested, block_size in (
            ("bf16", 16, False, 64), ("bf16", 64, True, 32), ("fp16", 32, False, 256),
            ("fp32", 16, False, 64), ("fp32", 64, True, 64),
        )
    ]  # fmt: skip
    combine = [
        AotSpec(
            name=f"linear_4bit_combine {dtype}",
            kernel=_linear_4bit_combine,
            signature={"part_ptr": "*fp32", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            | dict.fromkeys(("N", "M", "n_splits"), "i32"),
            constants={"BLOCK": _COMBINED},
            num_warps=4,
            num_stages=1,
            arch=arch,
        )
        for arch in (80, 90, 100)
        for dtype in ("bf16", "fp32")
    ]
    return fused + combine


def _spec(arch: int, dtype: str, tokens: int, nested: bool, block_size: int) -> AotSpec:
    tile = TILES[arch, FEW if tokens <= FEW else MANY, {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]]
    names = _linear_4bit_fwd.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    types |= dict(x_ptr=f"*{dtype}", weight_ptr="*u8", bias_ptr=f"*{dtype}", absmax_ptr="*u8" if nested else "*fp32")
    constants: dict[str, Any] = {"BLOCK_M": tile.BLOCK_M, "BLOCK_K": tile.BLOCK_K}
    constants |= {"BLOCK_SIZE": block_size, "BLOCK_N": tokens}
    if not nested:  # one split, which writes y with its bias; else many, which write float32
        types["out_ptr"] = f"*{dtype}"
        constants |= {"nested_absmax_ptr": None, "nested_offset_ptr": None}
    return AotSpec(
        name=f"linear_4bit_fwd {dtype} {tokens} tokens, blocks of {block_size}{', double quantised' if nested else ''}",
        kernel=_linear_4bit_fwd,
        signature=types,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
        needs=("wgmma",) if arch == 90 and dtype != "fp32" else (),
    )
