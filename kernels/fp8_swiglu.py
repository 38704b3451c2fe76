"""Smooth-SwiGLU on the GPU: silu(gate) * up with the maximum of each channel in one pass, its gradients in another."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, LOG2E, AotSpec, architecture, cast, multiprocessors
from effkit.kernels._fp8 import magnitude, to_fp8
from effkit.quant.fp8 import FORMATS
from effkit.quant.fp8_swiglu import PEAK, batched, swiglu_gradients


@triton.jit
def _sigmoid(x):
    e = tl.exp2(tl.abs(x) * -LOG2E)  # at most 1
    return tl.where(x < 0, e, 1.0) / (1 + e)


# One program owns a stripe of rows x BLOCK_C channels. It reads gate and up once, writes h, and keeps the largest |h|
# at each place of its tile in registers; at the end it folds them to one row of partials [stripes, C], as integers, so
# that NaN is larger than everything. Whoever makes codes reads h again: half of what gate and up are.
@triton.jit(do_not_specialize=["N", "stripe"])
def _smooth_swiglu_fwd(
    gate_ptr, up_ptr, h_ptr, partials_ptr, stride_gate, stride_up, N, C, stripe,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    own = (tl.program_id(0) // n_tiles).to(tl.int64)
    channels = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    for start in range(own * stripe, tl.minimum(own * stripe + stripe, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        ok = (rows < N)[:, None] & (channels < C)[None, :]
        gate = tl.load(gate_ptr + rows[:, None] * stride_gate + channels[None, :], mask=ok, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows[:, None] * stride_up + channels[None, :], mask=ok, other=0.0).to(tl.float32)
        h = cast(gate * _sigmoid(gate) * up, h_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_C]
        tl.store(h_ptr + rows[:, None] * C + channels[None, :], h, mask=ok)
        largest = tl.maximum(largest, magnitude(h.to(tl.float32)))
    tl.store(partials_ptr + own * C + channels, tl.max(largest, 0), mask=channels < C)


# One program folds BLOCK_C channels of partials [stripes, C] and turns each maximum into a power of two, on bits: the
# exponent field of 2 ** ceil(log2 amax) is that of amax, one more where the mantissa is not zero.
@triton.jit(do_not_specialize=["n_stripes"])
def _smooth_scale(partials_ptr, scale_ptr, n_stripes, C, BLOCK_C: tl.constexpr):
    channels = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    amax = tl.zeros([BLOCK_C], tl.int32)
    for stripe in range(n_stripes):
        amax = tl.maximum(amax, tl.load(partials_ptr + stripe * C + channels, mask=channels < C, other=0))
    ceiling = (amax + 0x7FFFFF) >> 23
    bits = tl.maximum(254 - ceiling, 1) << 23
    bits = tl.where((amax == 0) | (amax >= 0x7F800000), 127 << 23, bits)
    tl.store(scale_ptr + channels, bits.to(tl.float32, bitcast=True), mask=channels < C)


# One program owns the gradients of BLOCK_N rows x BLOCK_C channels: it reads dh, gate and up once and writes both.
@triton.jit(do_not_specialize=["N"])
def _smooth_swiglu_bwd(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dh, stride_gate, stride_up, N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < N)[:, None] & (channels < C)[None, :]
    dh = tl.load(dh_ptr + rows[:, None] * stride_dh + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows[:, None] * stride_gate + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * stride_up + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    at = rows[:, None] * C + channels[None, :]
    tl.store(dgate_ptr + at, cast(dgate, dgate_ptr.dtype.element_ty), mask=ok)
    tl.store(dup_ptr + at, cast(dh * (gate * sigmoid), dup_ptr.dtype.element_ty), mask=ok)


# One program owns BLOCK_N rows x BLOCK_C channels: it reads h and the scales of its channels and writes codes.
@triton.jit(do_not_specialize=["N"])
def _encode_smooth_fp8(
    h_ptr, scale_ptr, codes_ptr, stride_h, N, C, peak,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < N)[:, None] & (channels < C)[None, :]
    scale = tl.load(scale_ptr + channels, mask=channels < C, other=1.0)
    h = tl.load(h_ptr + rows[:, None] * stride_h + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    codes = to_fp8(h * scale[None, :] * peak, MANTISSA)  # [BLOCK_N, BLOCK_C]
    tl.store(codes_ptr + rows[:, None] * C + channels[None, :], codes, mask=ok)


class Tile(NamedTuple):
    """Rows and channels of one program's step."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


_WIDTHS = (16, 32, 64, 128, 256, 512)
# (architecture, channels up to, bytes of an element) -> tile; 16 elements a thread, two 16-byte loads of each input
_TILES = {
    (arch, width, size): Tile(2048 // width, width, 4)
    for arch, width, size in itertools.product((80, 90, 100), _WIDTHS, (2, 4))
}
_FOLD = 128  # channels that one program of the second stage folds
_STRIPES = 8  # programs of the first stage for each multiprocessor


def _tile(x: Tensor) -> Tile:
    width = min(max(triton.next_power_of_2(x.shape[-1]), _WIDTHS[0]), _WIDTHS[-1])
    if INTERPRET:
        return Tile(16, min(width, 64), 4)  # few programs, yet several tiles at the sizes of tests
    return _TILES[architecture(x.device), width, x.element_size()]


def _rows(x: Tensor) -> Tensor:
    """x as [rows, C] with adjacent channels; the halves of one projection stay where they are."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    h, scale = _fake_forward(gate, up)
    if not h.numel():
        return h, scale.fill_(1.0)
    gate, up = _rows(gate), _rows(up)
    N, C = gate.shape
    tile = _tile(gate)
    n_tiles = triton.cdiv(C, tile.BLOCK_C)
    stripes = max(1, _STRIPES * multiprocessors(gate.device) // n_tiles)
    stripe = triton.cdiv(triton.cdiv(N, stripes), tile.BLOCK_N) * tile.BLOCK_N
    stripes = triton.cdiv(N, stripe)
    partials = gate.new_empty(stripes, C, dtype=torch.int32)
    with torch.cuda.device_of(gate):
        _smooth_swiglu_fwd[(stripes * n_tiles,)](
            gate, up, h, partials, gate.stride(0), up.stride(0), N, C, stripe, **tile._asdict()
        )
        _smooth_scale[(triton.cdiv(C, _FOLD),)](partials, scale, stripes, C, BLOCK_C=_FOLD, num_warps=4)
    return h, scale


def _backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _fake_backward(dh, gate, up)
    if dgate.numel():
        dh, gate, up = map(_rows, (dh, gate, up))
        N, C = gate.shape
        tile = _tile(gate)
        grid = (triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(C, tile.BLOCK_C),)
        with torch.cuda.device_of(gate):
            _smooth_swiglu_bwd[grid](
                dh, gate, up, dgate, dup, dh.stride(0), gate.stride(0), up.stride(0), N, C, **tile._asdict()
            )
    return dgate, dup


def _encode(h: Tensor, channel_scale: Tensor, format: str) -> Tensor:
    codes = _fake_encode(h, channel_scale, format)
    if codes.numel():
        h = _rows(h)
        N, C = h.shape
        tile = _tile(h)
        grid = (triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(C, tile.BLOCK_C),)
        with torch.cuda.device_of(h):
            _encode_smooth_fp8[grid](
                h, channel_scale.contiguous(), codes, h.stride(0), N, C, PEAK[format],
                MANTISSA=FORMATS[format].mantissa, **tile._asdict(),
            )  # fmt: skip
    return codes


def _fake_encode(h: Tensor, channel_scale: Tensor, format: str) -> Tensor:
    return h.new_empty(h.shape, dtype=torch.uint8)


def _fake_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[-1], dtype=torch.float32)


def _fake_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define("smooth_swiglu_forward(Tensor gate, Tensor up) -> (Tensor, Tensor)")
_library.define("smooth_swiglu_backward(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)")
_library.define("encode_smooth_fp8(Tensor h, Tensor channel_scale, str format) -> Tensor")
for _name, _run, _fake in (
    ("smooth_swiglu_forward", _forward, _fake_forward),
    ("smooth_swiglu_backward", _backward, _fake_backward),
    ("encode_smooth_fp8", _encode, _fake_encode),
):
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(_name, _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


class _SmoothSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.effkit.smooth_swiglu_forward(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dh: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return swiglu_gradients(dh, *ctx.saved_tensors)
        return torch.ops.effkit.smooth_swiglu_backward(dh, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return batched(_SmoothSwiGLU.apply, info.batch_size, in_dims, inputs)


def smooth_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels behind effkit.quant.smooth_swiglu, which documents and has checked the arguments."""
    return _SmoothSwiGLU.apply(gate, up)


def encode_smooth_fp8(h: Tensor, channel_scale: Tensor, *, format: str) -> tuple[Tensor, Tensor]:
    """The kernel behind effkit.quant.encode_smooth_fp8, which documents and has checked the arguments."""
    codes = torch.ops.effkit.encode_smooth_fp8(h, channel_scale, format)
    return codes, torch.full((), 1 / PEAK[format], device=h.device)


def aot_specs() -> list[AotSpec]:
    """All kernels, for wide and narrow rows, both widths of elements and both formats."""
    variants = [(512, "bf16"), (512, "fp32"), (64, "bf16")]
    specs = []
    for arch in (80, 90, 100):
        for width, dtype in variants:
            specs += [_spec(kernel, arch, width, dtype) for kernel in (_smooth_swiglu_fwd, _smooth_swiglu_bwd)]
            specs += [_spec(_encode_smooth_fp8, arch, width, dtype, MANTISSA=mantissa) for mantissa in (3, 2)]
        types = {"partials_ptr": "*i32", "scale_ptr": "*fp32", "n_stripes": "i32", "C": "i32"}
        specs.append(AotSpec("smooth_scale", _smooth_scale, types, {"BLOCK_C": _FOLD}, 4, 1, arch))
    return specs


def _spec(kernel: Any, arch: int, width: int, dtype: str, **constants: int) -> AotSpec:
    tile = _TILES[arch, width, {"bf16": 2, "fp32": 4}[dtype]]
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {"partials_ptr": "*i32", "scale_ptr": "*fp32", "codes_ptr": "*u8", "peak": "fp32"}
    name = " ".join([kernel.__name__[1:], f"C={width}", dtype, *map(str, constants.values())])
    constants |= {"BLOCK_N": tile.BLOCK_N, "BLOCK_C": tile.BLOCK_C}
    return AotSpec(name, kernel, types, constants, tile.num_warps, 1, arch)
