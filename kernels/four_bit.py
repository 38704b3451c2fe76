"""Four-bit codes on the GPU: encoding and decoding, one pass each over what is read and written."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, cast
from effkit.kernels._fp8 import magnitude
from effkit.quant.four_bit import TABLES, code_table

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _rank(z, t):
    """How many of 15 ascending thresholds z lies beyond, by halves. NaN lies beyond all."""
    b3 = ~(z <= t[7])
    b2 = ~(z <= tl.where(b3, t[11], t[3]))
    b1 = ~(z <= tl.where(b3, tl.where(b2, t[13], t[9]), tl.where(b2, t[5], t[1])))
    upper = tl.where(b2, tl.where(b1, t[14], t[12]), tl.where(b1, t[10], t[8]))
    lower = tl.where(b2, tl.where(b1, t[6], t[4]), tl.where(b1, t[2], t[0]))
    b0 = ~(z <= tl.where(b3, upper, lower))
    return tl.where(b3, 8, 0) | tl.where(b2, 4, 0) | tl.where(b1, 2, 0) | tl.where(b0, 1, 0)


# One program owns ROWS blocks: it reads them once, and writes their scales and half a byte for each value. Values are
# loaded as they lie, in wide loads; neighbours meet in one byte by splitting a last axis of 2, within a thread.
@triton.jit
def _encode_4bit(
    x_ptr, packed_ptr, absmax_ptr, n, n_bytes,
    THRESHOLDS: tl.constexpr, ORDER: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)  # [ROWS, BLOCK_SIZE]
    absmax = tl.max(magnitude(x), 1).to(tl.float32, bitcast=True)
    nothing = absmax < _TINY
    tl.store(absmax_ptr + block, tl.where(nothing, 0.0, absmax), mask=block * BLOCK_SIZE < n)
    inverse = tl.where(nothing, 0.0, tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.where(nothing, 1.0, absmax)))
    codes = _rank(x * inverse[:, None], THRESHOLDS)
    if ORDER is not None:  # the codes of the ranks, four bits each
        codes = ((ORDER >> (codes * 4).to(tl.int64)) & 15).to(tl.int32)
    first, second = tl.split(tl.reshape(codes, [ROWS, HALF, 2]))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + byte, ((first << 4) | second).to(tl.uint8), mask=byte < n_bytes)


# One program owns ROWS blocks: it reads their bytes and scales and writes their values, which are laid out in order
# before they are stored. The table is looked up in registers and shared memory.
@triton.jit
def _decode_4bit(
    packed_ptr, absmax_ptr, table_ptr, y_ptr, n, n_bytes, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed_ptr + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pair >> 4, pair & 15), [ROWS * BLOCK_SIZE])
    values = tl.gather(tl.load(table_ptr + tl.arange(0, 16)), codes, 0)
    absmax = tl.load(absmax_ptr + block, mask=block * BLOCK_SIZE < n, other=0.0)
    y = cast(tl.reshape(values, [ROWS, BLOCK_SIZE]) * absmax[:, None], y_ptr.dtype.element_ty)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(y_ptr + at, y, mask=at < n)


_VALUES = 2048  # of a program: 16 a thread, two to four wide loads


def _rows(block_size: int) -> int:
    return max(1, _VALUES // block_size)


@functools.cache
def _search(quant_type: str) -> dict[str, Any]:
    """Thresholds and order of codes as constants of the kernel. Fewer than 15 thresholds are followed by infinity."""
    thresholds, order = TABLES[f"{quant_type} thresholds"], TABLES[f"{quant_type} order"]
    missing = 15 - len(thresholds)
    codes = order + order[-1:] * missing
    in_order = codes == tuple(range(16))
    packed = sum(code << 4 * rank for rank, code in enumerate(codes))
    return {"THRESHOLDS": thresholds + (math.inf,) * missing, "ORDER": None if in_order else packed}


def _encode(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    x, n = x.contiguous(), x.numel()
    packed, absmax = _fake_encode(x, block_size, quant_type)
    if n:
        rows = _rows(block_size)
        with torch.cuda.device_of(x):
            _encode_4bit[(triton.cdiv(len(absmax), rows),)](
                x, packed, absmax, n, len(packed), **_search(quant_type), BLOCK_SIZE=block_size, ROWS=rows, num_warps=4
            )
    return packed, absmax


def _decode(
    packed: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype, block_size: int, quant_type: str
) -> Tensor:
    y = _fake_decode(packed, absmax, shape, dtype, block_size, quant_type)
    if y.numel():
        rows = _rows(block_size)
        table = code_table(quant_type, packed.device)
        with torch.cuda.device_of(packed):
            _decode_4bit[(triton.cdiv(len(absmax), rows),)](
                packed.contiguous(), absmax.contiguous(), table, y, y.numel(), len(packed),
                BLOCK_SIZE=block_size, ROWS=rows, num_warps=4,
            )  # fmt: skip
    return y


def _fake_encode(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


def _fake_decode(
    packed: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype, block_size: int, quant_type: str
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define("encode_4bit(Tensor x, int block_size, str quant_type) -> (Tensor, Tensor)")
_library.define(
    "decode_4bit(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype, int block_size, str quant_type)"
    " -> Tensor"
)
for _name, _run, _fake in (("encode_4bit", _encode, _fake_encode), ("decode_4bit", _decode, _fake_decode)):
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(_name, _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


def encode_4bit(x: Tensor, *, block_size: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """The kernel behind effkit.quant.encode_4bit, which documents and has checked the arguments."""
    return torch.ops.effkit.encode_4bit(x, block_size, quant_type)


def decode_4bit(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """The kernel behind effkit.quant.decode_4bit, which documents and has checked the arguments."""
    return torch.ops.effkit.decode_4bit(packed, absmax, shape, dtype, block_size, quant_type)


def aot_specs() -> list[AotSpec]:
    """Both kernels: the smallest, the usual and the largest block, ordered and other codes, narrow and wide values."""
    specs = []
    for arch, block_size, dtype in itertools.product((80, 90, 100), (32, 64, 4096), ("bf16", "fp32")):
        sizes = {"BLOCK_SIZE": block_size, "ROWS": _rows(block_size)}
        pointers = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "n": "i32", "n_bytes": "i32"}
        decoding = pointers | {"table_ptr": "*fp32", "y_ptr": f"*{dtype}"}
        name = f"{block_size} {dtype}"
        specs.append(AotSpec(f"decode_4bit {name}", _decode_4bit, decoding, sizes, 4, 1, arch))
        for quant_type in (
            ("nf4", "fp4") if block_size == 64 else ("nf4",)
        ):  # int4 has other constants than nf4, no more
            constants = sizes | _search(quant_type)
            encoding = pointers | {"x_ptr": f"*{dtype}"}
            specs.append(AotSpec(f"encode_4bit {quant_type} {name}", _encode_4bit, encoding, constants, 4, 1, arch))
    return specs
