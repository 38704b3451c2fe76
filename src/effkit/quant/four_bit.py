"""Four bits for a weight: NF4, FP4 and INT4 in blocks that share a scale, and double quantisation of the scales.

    a_g = max |x_i| over block g
    code_i = how many of 15 thresholds x_i / a_g lies beyond, the midpoints of a table of 16 values
    x_i ~ table[code_i] a_g

Dettmers et al., QLoRA, arXiv 2305.14314, sections 2 and 3. NF4's table has the quantiles of a normal distribution, of
which each is hit about as often as any other, and an exact zero; FP4 is bitsandbytes' own format of sign, two bits of
exponent and one of mantissa, not the E2M1 of OCP; INT4 is evenly spaced. Double quantisation stores the scales, less
their mean, in 8 bits with one float32 scale for 256 of them (the dynamic map of `effkit.quant.kbit`).

Codes, scales and values are those of bitsandbytes bit for bit; docs/encode_4bit.md lists the strange values for which
its backends differ among themselves. Blocks run over the flattened tensor and ignore its rows.

Cost: 4.5 bits a value (4.127 with double quantisation) instead of 16. Encoding reads x once and compares each value
with 15 thresholds, or with 4 by halves; decoding reads half a byte and writes a value.

When not to use it: for activations, whose outliers spoil their whole block, and for values that are far from normal. A
normal weight in blocks of 64 keeps 20.7 dB of signal over noise: leave a model's most sensitive layers alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkit.ops import Case, Op, register
from effkit.quant.kbit import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    check_codes,
    check_input,
    codebook,
    decode_kbit_torch,
    encode_kbit_torch,
    in_blocks,
    midpoints,
    normalised,
)

QUANT_TYPES = ("nf4", "fp4", "int4")


def encode_4bit_reference(x: Tensor, *, block_size: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """The definition: how many thresholds a value goes beyond. FP4 compares magnitudes and keeps the sign apart."""
    z, absmax = normalised(x, block_size)
    table = code_table(quant_type, x.device)
    if quant_type == "fp4":
        magnitudes, order = table[:8].sort()
        beyond = ~(z.abs()[..., None] <= midpoints(magnitudes))
        codes = order[beyond.sum(-1)]
        codes = torch.where((z < 0) & (codes > 0), codes + 8, codes)
    else:
        beyond = ~(z[..., None] <= midpoints(table))  # so that NaN goes beyond all
        codes = beyond.sum(-1)
    pairs = codes.flatten()[: x.numel() + x.numel() % 2].view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8), absmax


def encode_4bit_torch(x: Tensor, *, block_size: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """The thresholds one after the other, for a few values at a time, so that these stay in the processor's cache."""
    parts = [_encode(part, block_size, quant_type) for part in x.reshape(-1).split(_tile(x))]
    if len(parts) == 1:
        return parts[0]
    packed, absmax = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(absmax)


def encode_4bit(
    x: Tensor, *, block_size: int = 64, quant_type: str = "nf4", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of four bits, two to a byte, and the scales of their blocks.

    x [*N]       float32, float16 or bfloat16, any shape and strides; it is read row by row, n values in all
    block_size   consecutive values that share a scale: a power of two from 32 to 4096; the last block may be shorter
    quant_type   "nf4", "fp4" or "int4"
    backend      "reference", "torch", "triton" or None for the fastest that can

    Returns packed uint8 [ceil(n / 2)], the earlier value of a pair in the high half, behind an odd n the code of 0; and
    absmax float32 [ceil(n / block_size)]. A value is multiplied by 1 / absmax in float32; one that lies on a threshold
    takes the lower code (FP4: the smaller magnitude). A block below the normal numbers, absmax < 2^-126, counts as
    zero. A NaN makes its absmax NaN and with it the whole block; an infinity leaves NaN and infinities of its block.
    Raises TypeError for other dtypes, ValueError for other options. arXiv 2305.14314.
    """
    ENCODE_4BIT.check(x=x)
    check_input("encode_4bit", x, block_size)
    _check_quant_type("encode_4bit", quant_type)
    return ENCODE_4BIT.run(backend, x=x.detach(), block_size=block_size, quant_type=quant_type)


def decode_4bit_reference(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """The definition."""
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: math.prod(shape)]
    values = in_blocks(code_table(quant_type, packed.device)[codes.long()], block_size)
    return (values * absmax[:, None]).flatten()[: math.prod(shape)].view(shape).to(dtype)


def decode_4bit_torch(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """A look-up for each byte in a table of pairs, a few bytes at a time, so that these stay in the processor's cache.

    Under torch.compile a choice between constants instead: it becomes vector code, look-ups do not.
    """
    n = math.prod(shape)
    if torch.compiler.is_compiling():
        # A block cut short stands apart: on a CPU torch 2.13 compiles what indexes by n // size into a loop over whole
        # blocks, and forgets what is left over.
        half, whole = block_size // 2, n // block_size
        rest = absmax[whole:].expand(len(packed) - whole * half)
        scales = torch.cat((absmax[:whole, None].expand(whole, half).flatten(), rest))
        first, second = (_chosen(codes, quant_type) * scales for codes in (packed.int() >> 4, packed.int()))
        return _in_turns(first, second, dtype)[:n].view(shape)
    pairs, whole = _constant(f"{quant_type} pairs", packed.device), n // block_size
    y = torch.empty(n, dtype=dtype, device=packed.device)
    tile = max(1, _tile(packed) // block_size)
    blocks = (
        packed[: whole * block_size // 2].split(tile * block_size // 2),
        absmax[:whole, None].split(tile),
        y[: whole * block_size].view(whole, block_size).split(tile),
    )
    for codes, scales, values in zip(*blocks, strict=True):
        found = pairs.index_select(0, codes.int()).view(torch.float32).view(values.shape)
        if dtype == torch.float32:
            torch.mul(found, scales, out=values)
        else:
            values.copy_(found.mul_(scales))
    if whole * block_size < n:  # a block cut short
        found = pairs.index_select(0, packed[whole * block_size // 2 :].int()).view(torch.float32)
        y[whole * block_size :] = found[: n % block_size] * absmax[whole]
    return y.view(shape)


def decode_4bit(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    quant_type: str = "nf4",
    backend: str | None = None,
) -> Tensor:
    """The values that codes of four bits and scales stand for: table[code] * absmax in float32, rounded once.

    packed [P]   uint8, as `encode_4bit` makes it
    absmax [G]   float32, one for each block
    shape        of the result; n values in all, P = ceil(n / 2), G = ceil(n / block_size)
    dtype        of the result: float32, float16 or bfloat16
    block_size   consecutive values that share a scale: a power of two from 32 to 4096
    quant_type   "nf4", "fp4" or "int4"
    backend      "reference", "torch", "triton" or None for the fastest that can

    Returns y of the shape. Raises TypeError or ValueError for arguments that do not fit. arXiv 2305.14314.
    """
    DECODE_4BIT.check(packed=packed, absmax=absmax)
    shape = tuple(shape)
    elements = math.prod(shape)
    check_codes("decode_4bit", "packed", packed, absmax, elements, dtype, block_size)
    _check_quant_type("decode_4bit", quant_type)
    if len(packed) != (elements + 1) // 2:
        raise ValueError(
            f"decode_4bit: packed has shape {list(packed.shape)}, expected [{(elements + 1) // 2}], half of the "
            f"{elements} elements of shape {list(shape)}"
        )
    return DECODE_4BIT.run(
        backend, packed=packed, absmax=absmax, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
    )


@dataclass(frozen=True, eq=False)
class NestedScales:
    """What 8-bit scales need to be read: absmax float32 [ceil(blocks / 256)] and offset float32 []."""

    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Quantized4bit:
    """A tensor in four bits.

    packed      uint8 [ceil(n / 2)]
    absmax      float32 [ceil(n / block_size)], or uint8 under double quantisation
    shape       of the tensor, and its dtype
    nested      how to read uint8 scales, else None
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    quant_type: str
    nested: NestedScales | None = None

    def scales(self) -> Tensor:
        """The scales of the blocks in float32, [ceil(n / block_size)]."""
        if self.nested is None:
            return self.absmax
        return decode_scales(self.absmax, self.nested.absmax, self.nested.offset)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        nested = () if self.nested is None else (self.nested.absmax, self.nested.offset)
        return sum(tensor.nbytes for tensor in (self.packed, self.absmax, *nested))


def quantize_nf4(
    x: Tensor, block_size: int = 64, double_quant: bool = False, *, backend: str | None = None
) -> Quantized4bit:
    """x [*N] in NF4 (arXiv 2305.14314). double_quant stores the scales in 8 bits; it never changes a code.

    For dtypes, block sizes and strange values see `encode_4bit`.
    """
    return _quantize("nf4", x, block_size, double_quant, backend)


def quantize_fp4(
    x: Tensor, block_size: int = 64, double_quant: bool = False, *, backend: str | None = None
) -> Quantized4bit:
    """x [*N] in bitsandbytes' FP4; see `quantize_nf4`."""
    return _quantize("fp4", x, block_size, double_quant, backend)


def quantize_int4(
    x: Tensor, block_size: int = 64, double_quant: bool = False, *, backend: str | None = None
) -> Quantized4bit:
    """x [*N] in symmetric four-bit integers, value (code - 8) / 7; see `quantize_nf4`."""
    return _quantize("int4", x, block_size, double_quant, backend)


def dequantize_nf4(q: Quantized4bit, *, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """The values of a tensor in four bits, whichever type, in the dtype it had or in another."""
    return decode_4bit(
        q.packed,
        q.scales(),
        shape=q.shape,
        dtype=dtype or q.dtype,
        block_size=q.block_size,
        quant_type=q.quant_type,
        backend=backend,
    )


def encode_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """absmax float32 [G] as uint8 [G], and how to read it: double quantisation.

    The mean is subtracted, so that both signs of the map are used. One NaN or infinite scale spoils it, and so all.
    """
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    codes, nested = encode_kbit_torch(absmax - offset, dynamic_map(absmax.device), block_size=NESTED_BLOCK)
    return codes, NestedScales(nested, offset)


def decode_scales(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """float32 scales from codes uint8 [G], nested_absmax float32 [ceil(G / 256)] and nested_offset float32 []."""
    differences = decode_kbit_torch(codes, nested_absmax, dynamic_map(codes.device), block_size=NESTED_BLOCK)
    return differences + nested_offset


def code_table(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [16]: the value of each code, in units of its block's largest magnitude. Not to be written to."""
    _check_quant_type("code_table", quant_type)
    return _constant(quant_type, torch.device(device))


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256]: the value of each code of an 8-bit scale. Not to be written to."""
    return _constant("dynamic", torch.device(device))


def _quantize(quant_type: str, x: Tensor, block_size: int, double_quant: bool, backend: str | None) -> Quantized4bit:
    if not isinstance(double_quant, bool):
        raise TypeError(f"quantize_{quant_type}: double_quant is {double_quant!r}, expected True or False")
    packed, absmax = encode_4bit(x, block_size=block_size, quant_type=quant_type, backend=backend)
    scales, nested = encode_scales(absmax) if double_quant else (absmax, None)
    return Quantized4bit(packed, scales, tuple(x.shape), x.dtype, block_size, quant_type, nested)


def _check_quant_type(op: str, quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{op}: quant_type is {quant_type!r}, choices: {', '.join(map(repr, QUANT_TYPES))}")


def _encode(values: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of values [n], which begin with a block."""
    z, absmax = normalised(values, block_size)
    thresholds = TABLES[f"{quant_type} thresholds"]
    within = torch.zeros_like(z)
    reached = torch.empty_like(z)
    for threshold in thresholds:  # counted in float32, since only comparisons with a result of that dtype are fast
        within += torch.le(z, threshold, out=reached)
    ranks = (len(thresholds) - within).flatten()[: len(values) + len(values) % 2].view(-1, 2)
    packed = torch.add(ranks[:, 1], ranks[:, 0], alpha=16).int()
    if quant_type == "fp4":  # whose codes do not ascend
        packed = _constant("fp4 bytes", values.device)[packed]
    return packed.to(torch.uint8), absmax


def _chosen(codes: Tensor, quant_type: str) -> Tensor:
    """The values of codes, the four lower bits of integers, chosen bit by bit."""
    choices: list[Any] = list(TABLES[quant_type])
    for bit in (1, 2, 4, 8):
        choices = [torch.where((codes & bit) != 0, b, a) for a, b in zip(choices[::2], choices[1::2], strict=True)]
    return choices[0]


def _in_turns(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """first[0], second[0], first[1], ... in dtype.

    A pair is written as one integer of twice the width, the first value in its lower half, which comes first in memory:
    that becomes vector code, single values at every other place do not.
    """
    if dtype == torch.float32:
        low, high = first.view(torch.int32).long(), second.view(torch.int32).long()
        return (high << 32 | low & 0xFFFFFFFF).view(dtype)
    if dtype == torch.bfloat16:
        low, high = _bfloat16_bits(first), _bfloat16_bits(second)
        return (high & -65536 | low >> 16 & 0xFFFF).view(dtype)
    return torch.stack((first, second), 1).flatten().to(dtype)


def _bfloat16_bits(values: Tensor) -> Tensor:
    """float32 values rounded to nearest even, as int32: bfloat16 in the upper half, the lower one to be cut off."""
    bits = values.view(torch.int32)  # values == values, since isnan does not become vector code
    return torch.where(values == values, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)


def _tile(x: Tensor) -> int:
    """How many values to take at a time: on a CPU some that fit its cache, in whole blocks, elsewhere all at once."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, 2 * x.numel()) * BLOCK_SIZES[-1]
    return _TILE * torch.get_num_threads()


def _constant(name: str, device: torch.device) -> Tensor:
    """A table on a device, made once; torch.compile makes it a part of its graph instead."""
    return _make(name, device) if torch.compiler.is_compiling() else _made(name, device)


def _make(name: str, device: torch.device) -> Tensor:
    values = TABLES[name]
    if name.endswith("pairs"):  # 256 times the values of a byte's two codes, eight bytes that are moved as one
        return torch.tensor(values, dtype=torch.float32, device=device).view(torch.float64).flatten()
    return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.uint8, device=device)


@functools.cache
def _made(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a table first asked for in that mode were of no use outside of it
        return _make(name, device)


def _ascending(quant_type: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Thresholds between the values in ascending order, and the code of each rank: how many thresholds lie below.

    FP4 has two zeros, of which the positive one is taken, and its negative ties go up to the smaller magnitude: a value
    is beyond the number in front of the midpoint.
    """
    table = torch.tensor(TABLES[quant_type], dtype=torch.float32, device="cpu")
    values, order = table.sort(stable=True)
    if quant_type == "fp4":
        once = order != 8
        values, order = values[once], order[once]
    thresholds = midpoints(values)
    if quant_type == "fp4":
        thresholds = torch.where(thresholds < 0, thresholds.nextafter(thresholds.new_tensor(-1.0)), thresholds)
    return tuple(thresholds.tolist()), tuple(order.tolist())


# What `_constant` puts on a device, by name: values of codes, and what is derived from them.
_FP4_MAGNITUDES = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES: dict[str, tuple[Any, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*_FP4_MAGNITUDES, 0.0, *(-x for x in _FP4_MAGNITUDES[1:])),
    "int4": tuple((code - 8) / 7 for code in range(16)),
    "dynamic": tuple(codebook("dynamic", 8).tolist()),
}  # fmt: skip
for _type in QUANT_TYPES:
    TABLES[f"{_type} thresholds"], TABLES[f"{_type} order"] = _ascending(_type)
    TABLES[f"{_type} pairs"] = tuple(itertools.product(TABLES[_type], repeat=2))
# The byte of two codes for the byte of two ranks.
TABLES["fp4 bytes"] = tuple(16 * a + b for a, b in itertools.product((*TABLES["fp4 order"], 0), repeat=2))
_TILE = 1 << 17  # values a thread; half a megabyte of float32


def _elements(case: Case) -> int:
    shape: Any = case.options["shape"] if "shape" in case.options else case.sizes["*N"]
    return math.prod(shape)


def _packed_bytes(case: Case) -> float:
    return _elements(case) / 2 + 4 * math.ceil(_elements(case) / case.options.get("block_size", 64))


def _output_size(case: Case) -> int:
    dtype: torch.dtype = case.options.get("dtype", torch.float32)
    return dtype.itemsize


def _ties(value: Tensor) -> Tensor:
    """Rows of 64 with the thresholds of all types beside a largest magnitude of 1."""
    both = [sign * t for sign in (-1, 1) for t in TABLES["fp4 thresholds"][7:]]
    row = [1.0, *TABLES["nf4 thresholds"], *TABLES["int4 thresholds"][1:], *both]
    return torch.tensor(row + [0.0] * (64 - len(row)), dtype=torch.float64).expand(value.shape)


def _bytes(value: Tensor) -> Tensor:
    """Normal values as bytes that are all equally likely."""
    return (torch.special.ndtr(value) * 256).clamp(0, 255).to(torch.uint8)


def _case(name: str, shape: tuple[int, ...], large: bool = False, **options: Any) -> Case:
    """A case of decoding: sizes from the shape."""
    n = math.prod(shape)
    sizes = {"P": (n + 1) // 2, "G": -(-n // options.get("block_size", 64))}
    return Case(name, sizes, {"shape": shape, **options}, large=large)


_ENCODE_CASES = (
    Case("one", {"*N": (1,)}),
    Case("no element", {"*N": (0,)}),
    Case("no element of several axes", {"*N": (3, 0, 5)}),
    Case("a number", {"*N": ()}),
    Case("two", {"*N": (2,)}),
    Case("odd", {"*N": (7, 13)}),
    Case("a block", {"*N": (64,)}),
    Case("one past a block", {"*N": (65,)}),
    Case("rows that blocks straddle", {"*N": (5, 3, 41)}),
    Case("small blocks", {"*N": (37, 67)}, {"block_size": 32}),
    Case("blocks of 256", {"*N": (9, 131)}, {"block_size": 256}),
    Case("large blocks", {"*N": (3, 4099)}, {"block_size": 4096}),
    Case("many blocks", {"*N": (67, 130)}),
    Case("fp4", {"*N": (67, 67)}, {"quant_type": "fp4"}),
    Case("int4", {"*N": (67, 67)}, {"quant_type": "int4"}),
    Case("fp4, zeros", {"*N": (130,)}, {"quant_type": "fp4"}, gain={"x": 0.0}),
    Case("ties", {"*N": (3, 64)}, draw={"x": _ties}),
    Case("fp4, ties", {"*N": (3, 64)}, {"quant_type": "fp4"}, draw={"x": _ties}),
    Case("int4, ties", {"*N": (3, 64)}, {"quant_type": "int4"}, draw={"x": _ties}),
    Case("zeros", {"*N": (67,)}, gain={"x": 0.0}),
    Case("below the normal numbers", {"*N": (130,)}, gain={"x": 1e-39}),
    Case("strided", {"*N": (7, 33)}, layout="strided"),
    Case("transposed", {"*N": (3, 5, 33)}, layout="transposed"),
    Case("a layer", {"*N": (4096, 4096)}, large=True),
)
_DECODE_CASES = (
    _case("one", (1,)),
    _case("no element", (0,)),
    _case("no element of several axes", (3, 0, 5)),
    _case("a number", ()),
    _case("odd", (7, 13)),
    _case("a block", (64,)),
    _case("one past a block", (65,)),
    _case("rows that blocks straddle", (5, 3, 41)),
    _case("small blocks", (37, 67), block_size=32),
    _case("large blocks", (3, 4099), block_size=4096),
    _case("bfloat16", (67, 130), dtype=torch.bfloat16),
    _case("float16", (67, 130), dtype=torch.float16),
    _case("fp4", (67, 67), quant_type="fp4"),
    _case("int4", (67, 67), quant_type="int4", dtype=torch.bfloat16),
    _case("blocks of 1024", (67, 67), block_size=1024, dtype=torch.float16),
    _case("a layer", (4096, 4096), large=True, dtype=torch.bfloat16),
)
_ENCODE_BENCH = (
    Case("1024 x 4096", {"*N": (1024, 4096)}),
    Case("4096 x 4096", {"*N": (4096, 4096)}),
    Case("8k x 28k", {"*N": (8192, 28672)}, large=True),
)
_DECODE_BENCH = (
    _case("1024 x 4096", (1024, 4096)),
    _case("4096 x 4096", (4096, 4096)),
    _case("4096 x 4096, bf16", (4096, 4096), dtype=torch.bfloat16),
    _case("8k x 28k, bf16", (8192, 28672), large=True, dtype=torch.bfloat16),
)

ENCODE_4BIT = register(
    Op(
        name="encode_4bit",
        area="quant",
        summary="four bits a value in blocks that share a scale: NF4 (QLoRA), FP4, INT4",
        paper="https://arxiv.org/abs/2305.14314",
        shapes="x [*N] -> packed [P], absmax [G]",
        function=encode_4bit,
        reference=encode_4bit_reference,
        torch=encode_4bit_torch,
        triton="effkit.kernels.four_bit:encode_4bit",
        cases=_ENCODE_CASES,
        bench=_ENCODE_BENCH,
        rivals={"bitsandbytes": "effkit.rivals:bitsandbytes_encode_4bit"},
        grads=(),
        exact=True,
        flops=lambda case: 17 * _elements(case),  # the largest magnitude, a product, 15 comparisons
        traffic=_elements,
        other_bytes=_packed_bytes,
    )
)
DECODE_4BIT = register(
    Op(
        name="decode_4bit",
        area="quant",
        summary="the values of four-bit codes",
        paper="https://arxiv.org/abs/2305.14314",
        shapes="packed [P], absmax [G] -> y [*N]",
        function=decode_4bit,
        reference=decode_4bit_reference,
        torch=decode_4bit_torch,
        triton="effkit.kernels.four_bit:decode_4bit",
        cases=_DECODE_CASES,
        bench=_DECODE_BENCH,
        rivals={
            "bitsandbytes": "effkit.rivals:bitsandbytes_decode_4bit",
            "compiled": "effkit.rivals:decode_4bit_compiled",
        },
        grads=(),
        exact=True,
        flops=_elements,
        traffic=lambda case: 0,
        other_bytes=lambda case: (
            _packed_bytes(case) + _elements(case) * case.options.get("dtype", torch.float32).itemsize
        ),
        draw={"packed": _bytes, "absmax": lambda value: value.abs().float()},
    )
)
