"""Block quantisation to 3 to 8 bits with any codebook: the family in which data types are compared at equal bits.

    a_g = max |x_i| over block g,  c_i = the entry of the codebook nearest to x_i / a_g,  x_i ~ codebook[c_i] a_g

Dettmers & Zettlemoyer, The case for 4-bit precision: k-bit inference scaling laws, arXiv 2212.09720, section 2: "int",
"float", "dynamic" and "quantile" codebooks with values in [-1, 1], here ascending, so that a code is a rank. The 8-bit
dynamic map (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861) also stores the scales under double
quantisation in `effkit.quant.four_bit`.

Cost: a binary search for each element. A code takes a byte whatever its bits, since this is for studies: it shows what
a data type loses, not what it saves; `bits_per_parameter` says what a packed format would take. There is no kernel.

When not to use it: to run a model. The paper's result: 4 bits are the best use of a given memory for nearly every
model; at 3 bits quality breaks, and from 6 bits on neither data type nor block size matters. At 4 bits small blocks
help, and quantile and float types do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.ops import Case, Op, register

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (3, 4, 5, 6, 7, 8)


def encode_kbit_reference(x: Tensor, codebook: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """The definition: a code counts the midpoints between neighbouring entries that z goes beyond."""
    z, absmax = normalised(x, block_size)
    beyond = ~(z[..., None] <= midpoints(codebook))  # so that NaN goes beyond all
    return beyond.sum(-1).flatten()[: x.numel()].to(torch.uint8).view(x.shape), absmax


def encode_kbit_torch(x: Tensor, codebook: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """A binary search for each element."""
    z, absmax = normalised(x, block_size)
    codes = torch.bucketize(z.flatten()[: x.numel()], midpoints(codebook), out_int32=True)
    return codes.to(torch.uint8).view(x.shape), absmax


def encode_kbit(
    x: Tensor, codebook: Tensor, *, block_size: int = 64, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The codes and scales of blocks of consecutive elements, row by row.

    x [*N]        float32, float16 or bfloat16
    codebook [C]  float32, ascending, 1 to 256 values in [-1, 1]
    block_size    elements that share a scale: a power of two from 32 to 4096; the last block may be shorter
    backend       "reference", "torch" or None for the latter

    Returns codes uint8 [*N] and absmax float32 [G], G = ceil(n / block_size). z = x * (1 / absmax) in float32; a tie
    between two entries takes the lower one. A block with absmax below 2^-126 counts as zero. A NaN makes absmax NaN,
    and with it the whole block; an infinity makes absmax infinite. arXiv 2212.09720, section 2.
    """
    ENCODE_KBIT.check(x=x, codebook=codebook)
    check_input("encode_kbit", x, block_size)
    _check_codebook("encode_kbit", codebook)
    return ENCODE_KBIT.run(backend, x=x, codebook=codebook, block_size=block_size)


def decode_kbit_reference(
    codes: Tensor, absmax: Tensor, codebook: Tensor, *, dtype: torch.dtype = torch.float32, block_size: int = 64
) -> Tensor:
    """Block by block."""
    blocks = codes.flatten().long().split(block_size)
    values = [codebook[block] * scale for block, scale in zip(blocks, absmax.unbind(), strict=codes.numel() > 0)]
    return torch.cat([absmax[:0], *values]).view(codes.shape).to(dtype)


def decode_kbit_torch(
    codes: Tensor, absmax: Tensor, codebook: Tensor, *, dtype: torch.dtype = torch.float32, block_size: int = 64
) -> Tensor:
    """One look-up for all, and a scale for each.

    A block cut short stands apart: on a CPU torch 2.13 compiles what indexes by n // block_size into a loop over whole
    blocks, and forgets what is left over.
    """
    n, whole = codes.numel(), codes.numel() // block_size
    scales = (absmax[:whole, None].expand(whole, block_size).flatten(), absmax[whole:].expand(n - whole * block_size))
    values = codebook.index_select(0, codes.flatten().int()) * torch.cat(scales)
    return values.view(codes.shape).to(dtype)


def decode_kbit(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    backend: str | None = None,
) -> Tensor:
    """The values that codes and scales stand for: codebook[code] * absmax in float32, rounded once.

    codes [*N]    uint8, each below C
    absmax [G]    float32, G = ceil(n / block_size)
    codebook [C]  float32, 1 to 256 values
    dtype         of the result: float32, float16 or bfloat16
    block_size    elements that share a scale: a power of two from 32 to 4096
    backend       "reference", "torch" or None for the latter

    Returns y [*N].
    """
    DECODE_KBIT.check(codes=codes, absmax=absmax, codebook=codebook)
    check_codes("decode_kbit", "codes", codes, absmax, codes.numel(), dtype, block_size)
    _check_codebook("decode_kbit", codebook)
    return DECODE_KBIT.run(backend, codes=codes, absmax=absmax, codebook=codebook, dtype=dtype, block_size=block_size)


@dataclass(frozen=True, eq=False)
class QuantizedKbit:
    """A tensor in codes of 3 to 8 bits, a byte each: `dequantize_kbit` brings it back."""

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    dtype: torch.dtype
    block_size: int


def quantize_kbit(
    x: Tensor, data_type: str | Tensor, bits: int | None = None, block_size: int = 64, *, backend: str | None = None
) -> QuantizedKbit:
    """x [*N] in codes of a kind of codebook, "int", "float", "dynamic" or "quantile", or of one of your own.

    data_type   a kind, or the codebook itself: float32, ascending, 1 to 256 values in [-1, 1]
    bits        3 to 8 beside a kind, None beside a codebook
    block_size  elements that share a scale: a power of two from 32 to 4096

    For the rest see `encode_kbit` and `codebook`.
    """
    if isinstance(data_type, str):
        if bits is None:
            raise ValueError(f"quantize_kbit: bits is None beside data_type {data_type!r}, choices: {BITS}")
        entries = codebook(data_type, bits).to(x.device)
    elif bits is not None:
        raise ValueError(f"quantize_kbit: bits is {bits!r}, expected None beside a codebook")
    else:
        entries = data_type
    codes, absmax = encode_kbit(x, entries, block_size=block_size, backend=backend)
    if not bool((entries[1:] >= entries[:-1]).all()):
        raise ValueError(f"quantize_kbit: data_type is {entries.tolist()}, expected ascending values")
    return QuantizedKbit(codes, absmax, entries, x.dtype, block_size)


def dequantize_kbit(q: QuantizedKbit, *, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """The values of a quantised tensor, in the dtype it had or in another."""
    options: dict[str, Any] = {"dtype": dtype or q.dtype, "block_size": q.block_size, "backend": backend}
    return decode_kbit(q.codes, q.absmax, q.codebook, **options)


def codebook(kind: str, bits: int, *, exponent_bits: int | None = None, data: Tensor | None = None) -> Tensor:
    """The entries of a data type of 3 to 8 bits: float32, ascending, the largest magnitude 1.

    "int"       evenly spaced and symmetric; the one more below -1 is never taken. At 4 bits that of `quantize_int4`
    "float"     sign, exponent, mantissa, with subnormals, without infinities; exponent_bits defaults to half of the
                bits rounded up. 2^bits - 1 entries, as both zeros are one
    "dynamic"   each power of ten from 1 downwards has half the entries of the one above; exactly 0 and 1, not -1
    "quantile"  the medians of 2^bits equally filled bins of a normal distribution, or of the values of `data`
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"codebook: bits is {bits!r}, choices: {BITS}")
    if kind not in KINDS:
        raise ValueError(f"codebook: kind is {kind!r}, choices: {KINDS}")
    if exponent_bits is not None and (kind != "float" or not 1 <= exponent_bits < bits):
        raise ValueError(
            f"codebook: exponent_bits is {exponent_bits!r}, expected 1 to bits - 1, for kind 'float' alone"
        )
    if data is not None:
        if kind != "quantile" or not (data.any() and data.isfinite().all()):
            raise ValueError("codebook: data is given, expected for kind 'quantile' alone, finite and not all zero")
        return _scaled(_medians_of_bins(data, 2**bits))
    if kind == "float":
        exponent_bits = exponent_bits or -(-bits // 2)
        return _scaled(_floats(exponent_bits, bits - 1 - exponent_bits))
    return {"int": _integers, "dynamic": _dynamic, "quantile": _quantiles_of_normal}[kind](bits)


def bits_per_parameter(bits: int, block_size: int = 64, double_quant: bool = False) -> float:
    """What a packed format takes: codes, and a float32 scale a block, or an 8-bit one and a float32 one for 256."""
    return bits + (8 + 32 / NESTED_BLOCK if double_quant else 32) / block_size


def normalised(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """z [G, block_size] with z = x / absmax, zeros behind the end, and absmax [G], in float32.

    The reciprocal comes first, as in bitsandbytes. A block below the normal numbers, where it would overflow, counts as
    zero: absmax = 0, z = 0.
    """
    blocks = in_blocks(x.flatten().float(), block_size)
    absmax = blocks.abs().amax(1)
    nothing = absmax < _TINY
    return blocks * torch.where(nothing, 0.0, 1 / absmax)[:, None], torch.where(nothing, 0.0, absmax)


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """values [n] as [G, block_size], zeros behind the end."""
    missing = -len(values) % block_size
    return (F.pad(values, (0, missing)) if missing else values).view(-1, block_size)


def midpoints(entries: Tensor) -> Tensor:
    """Between neighbours, rounded to float32: what is beyond takes the upper one, a tie the lower."""
    return (entries[:-1] + entries[1:]) / 2


def check_input(op: str, x: Tensor, block_size: int) -> None:
    """Raises where x or block_size cannot be quantised."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x has dtype {x.dtype}, choices: {', '.join(map(str, DTYPES))}")
    check_block_size(op, block_size)


def check_codes(
    op: str, name: str, codes: Tensor, absmax: Tensor, elements: int, dtype: torch.dtype, block_size: int
) -> None:
    """Raises where codes (called `name`) and absmax are not those of so many elements, or dtype is no result's."""
    check_block_size(op, block_size)
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, choices: {', '.join(map(str, DTYPES))}")
    for given, tensor, expected in ((name, codes, torch.uint8), ("absmax", absmax, torch.float32)):
        if tensor.dtype != expected:
            raise TypeError(f"{op}: {given} has dtype {tensor.dtype}, expected {expected}")
    blocks = -(-elements // block_size)
    if absmax.shape != (blocks,):
        raise ValueError(
            f"{op}: absmax has shape {list(absmax.shape)}, expected [{blocks}], one for each {block_size} "
            f"of {elements} elements"
        )
    if absmax.device != codes.device:
        raise ValueError(f"{op}: absmax is on {absmax.device}, expected {codes.device} as {name}")


def check_block_size(op: str, block_size: int) -> None:
    """Raises where block_size is none of the choices."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size is {block_size!r}, choices: {', '.join(map(str, BLOCK_SIZES))}")


def _check_codebook(op: str, entries: Tensor) -> None:
    if entries.dtype != torch.float32:
        raise TypeError(f"{op}: codebook has dtype {entries.dtype}, expected torch.float32")
    if not 1 <= len(entries) <= 256:
        raise ValueError(f"{op}: codebook has {len(entries)} entries, expected 1 to 256")


def _integers(bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32, device="cpu") / (half - 1)


def _floats(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """All values of a format with subnormals, in units of its least exponent."""
    fractions = torch.arange(2**mantissa_bits, dtype=torch.float64, device="cpu") / 2**mantissa_bits
    exponents = torch.arange(2**exponent_bits - 1, dtype=torch.float64, device="cpu")
    normal = (1 + fractions) * 2 ** exponents[:, None]
    magnitudes = torch.cat([fractions, normal.flatten()])
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


def _dynamic(bits: int) -> Tensor:
    """The signed dynamic tree map: 2^i midpoints of [0.1, 1] in the decade that ends at 10^(i - bits + 2)."""
    positive = []
    for i in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (i - bits + 2))
    values = torch.cat(positive)
    return torch.cat([-values, values.new_tensor([0, 1]), values]).sort().values


def _quantiles_of_normal(bits: int) -> Tensor:
    middle = (torch.arange(2**bits, dtype=torch.float64, device="cpu") + 0.5) / 2**bits
    return _scaled(torch.special.ndtri(middle))


def _medians_of_bins(data: Tensor, bins: int) -> Tensor:
    values = data.flatten().double().sort().values
    return values[((torch.arange(bins, device=data.device) + 0.5) / bins * len(values)).long()]


def _scaled(values: Tensor) -> Tensor:
    return (values / values.abs().max()).float()


def _elements(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"])


def _ascending(values: Tensor) -> Tensor:
    return _scaled(values.sort().values)


KINDS = ("int", "float", "dynamic", "quantile")
NESTED_BLOCK = 256  # scales that share a scale of their own under double quantisation
_TINY = torch.finfo(torch.float32).tiny


def _codes(values: Tensor) -> Tensor:
    """Normal values as codes below 8, the smallest number of entries in the cases."""
    return (torch.special.ndtr(values) * 8).clamp(0, 7).to(torch.uint8)


def _decode(name: str, shape: tuple[int, ...], entries: int, large: bool = False, **options: Any) -> Case:
    """A case of decoding."""
    blocks = -(-math.prod(shape) // options.get("block_size", 64))
    return Case(name, {"*N": shape, "G": blocks, "C": entries}, options, large=large)


_CASES = (
    Case("one", {"*N": (1,), "C": 16}),
    Case("no element", {"*N": (0,), "C": 16}),
    Case("no element of several axes", {"*N": (3, 0), "C": 16}),
    Case("a number", {"*N": (), "C": 16}),
    Case("primes", {"*N": (7, 13), "C": 16}),
    Case("8 bits", {"*N": (5, 67), "C": 256}),
    Case("3 bits", {"*N": (130,), "C": 8}, {"block_size": 32}),
    Case("one entry", {"*N": (67,), "C": 1}),
    Case("no power of two", {"*N": (2, 3, 41), "C": 31}, {"block_size": 128}),
    Case("a large block", {"*N": (4097,), "C": 64}, {"block_size": 4096}),
    Case("small values", {"*N": (129,), "C": 32}, gain={"x": 1e-30}),
    Case("strided", {"*N": (9, 31), "C": 16}, layout="strided"),
    Case("transposed", {"*N": (3, 5, 17), "C": 16}, layout="transposed"),
    Case("a layer", {"*N": (4096, 4096), "C": 256}, large=True),
)
_BENCH = (
    Case("1024 x 4096, 8 bits", {"*N": (1024, 4096), "C": 256}, {"block_size": 256}),
    Case("8k x 8192, 8 bits", {"*N": (8192, 8192), "C": 256}, {"block_size": 256}, large=True),
)
_DECODE_CASES = (
    _decode("one", (1,), 16),
    _decode("no element", (0,), 16),
    _decode("no element of several axes", (3, 0), 16),
    _decode("a number", (), 16),
    _decode("primes", (7, 13), 16),
    _decode("8 bits", (5, 67), 256),
    _decode("bfloat16", (130,), 8, block_size=32, dtype=torch.bfloat16),
    _decode("float16", (2, 3, 41), 31, block_size=128, dtype=torch.float16),
    _decode("a large block", (4097,), 64, block_size=4096),
    _decode("a layer", (4096, 4096), 256, large=True, dtype=torch.bfloat16),
)
_DECODE_BENCH = (
    _decode("1024 x 4096, 8 bits", (1024, 4096), 256, block_size=256),
    _decode("8k x 8192, 8 bits", (8192, 8192), 256, large=True, block_size=256),
)

ENCODE_KBIT = register(
    Op(
        name="encode_kbit",
        area="quant",
        summary="block quantisation to 3 to 8 bits with any codebook, for studies",
        paper="https://arxiv.org/abs/2212.09720",
        shapes="x [*N], codebook [C] -> codes [*N], absmax [G]",
        function=encode_kbit,
        reference=encode_kbit_reference,
        torch=encode_kbit_torch,
        cases=_CASES,
        bench=_BENCH,
        rivals={"bitsandbytes": "effkit.rivals:bitsandbytes_encode_kbit"},
        grads=(),
        exact=True,
        flops=lambda case: 10 * _elements(case),
        traffic=_elements,
        other_bytes=_elements,
        draw={"codebook": _ascending},
    )
)
DECODE_KBIT = register(
    Op(
        name="decode_kbit",
        area="quant",
        summary="the values of codes of 3 to 8 bits",
        paper="https://arxiv.org/abs/2212.09720",
        shapes="codes [*N], absmax [G], codebook [C] -> y [*N]",
        function=decode_kbit,
        reference=decode_kbit_reference,
        torch=decode_kbit_torch,
        cases=_DECODE_CASES,
        bench=_DECODE_BENCH,
        rivals={"bitsandbytes": "effkit.rivals:bitsandbytes_decode_kbit"},
        grads=(),
        exact=True,
        flops=_elements,
        traffic=lambda case: 0,
        other_bytes=lambda case: 5 * _elements(case),
        draw={"codes": _codes, "absmax": lambda value: value.abs().float(), "codebook": _ascending},
    )
)
