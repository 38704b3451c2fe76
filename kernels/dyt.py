"""Dynamic tanh on the GPU: one pass forward, one pass backward with sums over rows that repeat bit for bit."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, multiprocessors, tanh
from effkit.norm.dyt import batched, gradients


@triton.jit
def _row_offsets(rows, inner, stride_outer, stride_inner):
    """Where rows start: row n lies at (n // inner, n % inner). With inner == 1 it compiles to a single product."""
    return rows // inner * stride_outer + rows % inner * stride_inner


@triton.jit
def _load_channels(ptr, channels, C, default):
    """Channels of a parameter in float32, `default` where there is none."""
    if ptr is None:
        values = tl.full(channels.shape, default, tl.float32)
    else:
        values = tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    return values


# One program owns BLOCK_N rows x BLOCK_C channels: it reads x once and writes y once. Neighbouring programs take
# neighbouring channels of the same rows, so that memory is walked in order; the tile is a few 16-byte loads a thread.
@triton.jit(do_not_specialize=["N"])
def _dynamic_tanh_fwd(
    x_ptr, alpha_ptr, weight_ptr, bias_ptr, y_ptr, inner, stride_outer, stride_inner, N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    block = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = _load_channels(weight_ptr, channels, C, 1.0)
    bias = _load_channels(bias_ptr, channels, C, 0.0)
    ok = (rows < N)[:, None] & (channels < C)[None, :]
    at = _row_offsets(rows, inner, stride_outer, stride_inner)[:, None] + channels[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    y = weight[None, :] * tanh(alpha * x) + bias[None, :]
    tl.store(y_ptr + rows[:, None] * C + channels[None, :], cast(y, y_ptr.dtype.element_ty), mask=ok)


# One program owns a stripe of rows x BLOCK_C channels. It reads x and dy once, writes dx, and keeps three sums over its
# rows tile-shaped in registers; only at the end does it fold them and write one float32 row of each to partials
# [3, stripes, C]. The second stage adds the stripes in a fixed order: no atomics, the same bits every time.
@triton.jit(do_not_specialize=["N", "stripe", "n_stripes"])
def _dynamic_tanh_bwd(
    dy_ptr, x_ptr, alpha_ptr, weight_ptr, dx_ptr, partials_ptr,
    dy_inner, stride_dy_outer, stride_dy_inner, x_inner, stride_x_outer, stride_x_inner, N, C, stripe, n_stripes,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    own = (tl.program_id(0) // n_tiles).to(tl.int64)
    channels = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = _load_channels(weight_ptr, channels, C, 1.0)
    sum_alpha = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_weight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(own * stripe, tl.minimum(own * stripe + stripe, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        ok = (rows < N)[:, None] & (channels < C)[None, :]
        x_at = _row_offsets(rows, x_inner, stride_x_outer, stride_x_inner)[:, None] + channels[None, :]
        dy_at = _row_offsets(rows, dy_inner, stride_dy_outer, stride_dy_inner)[:, None] + channels[None, :]
        x = tl.load(x_ptr + x_at, mask=ok, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        dy = tl.load(dy_ptr + dy_at, mask=ok, other=0.0).to(tl.float32)
        t = tanh(alpha * x)
        through = dy * weight[None, :] * (1 - t * t)
        dx = cast(alpha * through, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * C + channels[None, :], dx, mask=ok)
        sum_alpha += through * x
        sum_weight += dy * t
        sum_bias += dy
    partials_ptr += own * C + channels
    tl.store(partials_ptr, tl.sum(sum_alpha, 0), mask=channels < C)
    partials_ptr += n_stripes.to(tl.int64) * C
    tl.store(partials_ptr, tl.sum(sum_weight, 0), mask=channels < C)
    partials_ptr += n_stripes.to(tl.int64) * C
    tl.store(partials_ptr, tl.sum(sum_bias, 0), mask=channels < C)


class Tile(NamedTuple):
    """Rows and channels of one program's step."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)


def _table(elements: int, num_warps: int) -> dict[tuple[int, int, int], Tile]:
    """(architecture, channels up to, bytes of an element) -> tile."""
    keys = itertools.product((80, 90, 100), _WIDTHS, (2, 4))
    return {(arch, width, size): Tile(elements // width, width, num_warps) for arch, width, size in keys}


_FWD = _table(4096, 4)  # 32 elements a thread: parameters are loaded once for several rows
_BWD = _table(2048, 4)  # 16: three sums and two inputs are alive
_STRIPES = 4  # programs of the backward for each multiprocessor, about what its registers hold at a time


def _tile(table: dict[tuple[int, int, int], Tile], x: Tensor) -> Tile:
    width = min(max(triton.next_power_of_2(x.shape[-1]), _WIDTHS[0]), _WIDTHS[-1])
    if INTERPRET:
        return Tile(16, width, 8)  # few programs, yet several tiles at the sizes of tests
    return table[architecture(x.device), width, x.element_size()]


def _with_output(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with adjacent channels (a copy only where they are not) and an empty tensor laid out like it, without gaps."""
    y = torch.empty_like(x)
    if x.stride(-1) == 1 and y.stride(-1) == 1:
        return x, y
    x = x.contiguous()
    return x, torch.empty_like(x)


def _rows(x: Tensor, dense: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x and the (inner, stride_outer, stride_inner) of its rows, in the order in which `dense` has them in memory.

    Two strides describe any transposition and slice that occurs in a model; more axes than that are copied.
    """
    axes: list[tuple[int, int]] = []  # (length, stride), merged where one stride serves both
    for axis in sorted(range(x.ndim - 1), key=dense.stride, reverse=True):
        size, stride = x.shape[axis], x.stride(axis)
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        elif size > 1:
            axes.append((size, stride))
    if len(axes) > 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return _rows(torch.empty_like(dense).copy_(x), dense)
    (_, stride_outer), (inner, stride_inner) = [*axes, (1, 0), (1, 0)][:2]
    return x, (inner, stride_outer, stride_inner)


def _forward(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x, y = _with_output(x)
    if y.numel():
        N, C = y.numel() // y.shape[-1], y.shape[-1]
        x, strides = _rows(x, y)
        tile = _tile(_FWD, x)
        grid = (triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(C, tile.BLOCK_C),)
        with torch.cuda.device_of(x):
            _dynamic_tanh_fwd[grid](x, alpha, _packed(weight), _packed(bias), y, *strides, N, C, **tile._asdict())
    return y


def _backward(dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    x, dx = _with_output(x)
    C = x.shape[-1]
    if not dx.numel():
        return dx, x.new_zeros(3, C, dtype=torch.float32)
    N = dx.numel() // C
    (x, x_strides), (dy, dy_strides) = _rows(x, dx), _rows(dy, dx)
    tile = _tile(_BWD, x)
    n_tiles = triton.cdiv(C, tile.BLOCK_C)
    stripes = max(1, _STRIPES * multiprocessors(x.device) // n_tiles)
    stripe = triton.cdiv(triton.cdiv(N, stripes), tile.BLOCK_N) * tile.BLOCK_N
    stripes = triton.cdiv(N, stripe)
    partials = x.new_empty(3, stripes, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _dynamic_tanh_bwd[(stripes * n_tiles,)](
            dy, x, alpha, _packed(weight), dx, partials, *dy_strides, *x_strides, N, C, stripe, stripes,
            **tile._asdict(),
        )  # fmt: skip
    return dx, partials.sum(1)


def _packed(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _fake_forward(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _with_output(x)[1]


def _fake_backward(dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return _with_output(x)[1], x.new_empty(3, x.shape[-1], dtype=torch.float32)


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define("dynamic_tanh_forward(Tensor x, Tensor alpha, Tensor? weight, Tensor? bias) -> Tensor")
_library.define("dynamic_tanh_backward(Tensor dy, Tensor x, Tensor alpha, Tensor? weight) -> (Tensor, Tensor)")
for _name, _run, _fake in (
    ("dynamic_tanh_forward", _forward, _fake_forward),
    ("dynamic_tanh_backward", _backward, _fake_backward),
):
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(_name, _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


class _DynamicTanh(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.ops.effkit.dynamic_tanh_forward(x, alpha, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(torch.ops.effkit.dynamic_tanh_backward, dy, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_DynamicTanh.apply, info.batch_size, in_dims, inputs)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The kernels behind effkit.norm.dynamic_tanh, which documents and has checked the arguments."""
    return _DynamicTanh.apply(x, alpha, weight, bias)


def aot_specs() -> list[AotSpec]:
    """Both kernels for wide and narrow rows, with and without parameters, rows at one stride and at two."""
    variants = [
        (1024, "bf16", True, True),
        (1024, "fp32", True, True),
        (1024, "bf16", True, False),
        (64, "bf16", False, True),
    ]
    kernels = [(_dynamic_tanh_fwd, _FWD), (_dynamic_tanh_bwd, _BWD)]
    return [
        _spec(kernel, table, arch, *variant)
        for arch in (80, 90, 100)
        for variant in variants
        for kernel, table in kernels
    ]


def _spec(
    kernel: Any, table: dict[tuple[int, int, int], Tile], arch: int, width: int, dtype: str, affine: bool, flat: bool
) -> AotSpec:
    tile = table[arch, width, {"bf16": 2, "fp32": 4}[dtype]]
    pointers = {"alpha_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "partials_ptr": "*fp32"}
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    constants: dict[str, Any] = {"BLOCK_N": tile.BLOCK_N, "BLOCK_C": tile.BLOCK_C}
    if flat:
        constants |= dict.fromkeys(("inner", "x_inner", "dy_inner"), 1)
    if not affine:
        constants |= {"weight_ptr": None, "bias_ptr": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    name = f"{kernel.__name__[1:]} C={width} {dtype}{'' if affine else ' bare'}{'' if flat else ' sliced'}"
    return AotSpec(name, kernel, types | pointers, constants, tile.num_warps, 1, arch)
