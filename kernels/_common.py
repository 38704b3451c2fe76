"""What several kernels share: products and rounding that hold in the interpreter, tile tables, ahead-of-time builds."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Read when the kernels below are decorated, as Triton itself does: setting the variable later changes nothing.
INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to nearest even."""
    if INTERPRET:  # which truncates float32 to bfloat16
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _product(a, b, acc):
    if INTERPRET:
        # The interpreter multiplies bfloat16 as bit patterns, and sums in an order that depends on the shape. The order
        # of a compiled kernel does not: a score is the same as q k and as k q. Sums in float64 keep that so here.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        if acc is not None:
            product += acc
    else:
        product = tl.dot(a, b, acc, input_precision="ieee")
    return product


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b, summed in float32. float32 operands keep their bits ("ieee"), which costs the tensor cores.

    One float32 operand beside a narrower one is the sum of two of that dtype: twice the bits for a second product.
    """
    if a.dtype == b.dtype:
        product = _product(a, b, acc)
    elif a.dtype == tl.float32:
        head = cast(a, b.dtype)
        product = _product(cast(a - head.to(tl.float32), b.dtype), b, _product(head, b, acc))
    else:
        head = cast(b, a.dtype)
        product = _product(a, cast(b - head.to(tl.float32), a.dtype), _product(a, head, acc))
    return product


@triton.jit
def tanh(x):
    """tanh of float32 to a few units in the last place. Near 0, where the exponentials cancel, a series takes over."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, near, tl.where(x < 0, -far, far))


def unit_stride(x: Tensor) -> Tensor:
    """x with adjacent elements along the head width: a tile's load is slow without. Other strides stay as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a repeated one (keys that are the values) as a view: torch.compile refuses to pass it twice."""
    return [x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)]


class Tile(NamedTuple):
    """The shape of one program's work; the names are those of the launch options."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (architecture, head width, bytes of an element) -> tile
TileTable = Mapping[tuple[int, int, int], Tile]


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest table entry that the device can run.

    Devices of compute capability 8.6, 8.9 and 12.x have 99 KiB of shared memory; the entries for 80 fit into that.
    """
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, roughly. The interpreter runs one; it gets a few, so that work is split."""
    return 4 if INTERPRET.value else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class AotSpec:
    """One build of a kernel that is compiled and inspected without a GPU.

    signature holds the Triton type of each run-time argument, constants the value of every other one; needs names
    instructions that the PTX must contain.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    arch: int
    needs: tuple[str, ...] = ()


class Build(NamedTuple):
    """What the assembler reports: registers, bytes of stack and local memory (spills) a thread, and shared bytes."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


def compile_ahead(spec: AotSpec) -> Build:
    """Compile for an architecture that need not be present. Not under the interpreter, which compiles nothing."""
    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constants else spec.signature[name] for name in names}
    # A launch finds pointers and strides to be multiples of 16; without that loads compile to scalars.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] in "*i" and not spec.kernel.params[i].do_not_specialize
    }
    built = triton.compile(
        ASTSource(spec.kernel, signature, dict(spec.constants), divisible),
        target=GPUTarget("cuda", spec.arch, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"(\w+):(\d+)", usage))
    registers, stack, local = (int(counts[key]) for key in ("REG", "STACK", "LOCAL"))
    return Build(registers, stack, local, built.metadata.shared, built.asm["ptx"])
