"""4-bit linear: the weight stays in four bits, and is decoded piece by piece on its way into each product.

    y = x W^T + b      W[m, k] = table[code[m, k]] * absmax[m, k // block_size]      Dettmers et al., arXiv 2305.14314
    dx = dy W          W decoded once more; it takes no gradient itself

The base of QLoRA (equation 5): a frozen weight at 4.5 bits a value (4.127 with double quantisation) beside trained
factors. Nothing but the packed weight and its scales is kept for the backward pass, neither x nor the decoded weight.

W is rounded to the dtype of x before the product, as in bitsandbytes: the result is that of a dense layer that holds
the dequantised weight, and a layer computes the same whether it decodes or keeps what it has decoded (`cache_dequant`).

Cost: that of a dense layer, 2 N K M operations, and decoding K M values in every pass. A GPU is bound by memory at a
few tokens, where a quarter of the bytes wins; at many the product hides the decoding. On a CPU decoding costs more than
the product of a few tokens: keep the decoded weight there if memory allows.

When not to use it: where the dense weight fits and speed counts. A weight whose input width is no multiple of the block
size is refused, since its blocks would straddle rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.norm.dyt import batched
from effkit.ops import Case, Op, register
from effkit.quant.four_bit import (
    DECODE_4BIT,
    QUANT_TYPES,
    NestedScales,
    Quantized4bit,
    decode_4bit_reference,
    decode_scales,
    dequantize_nf4,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
)
from effkit.quant.kbit import NESTED_BLOCK, check_block_size


def linear_4bit_reference(
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
    """The equation: dequantise, then multiply."""
    scales = absmax.flatten()
    if nested_absmax is not None and nested_offset is not None:
        scales = decode_scales(scales, nested_absmax, nested_offset)
    dense = decode_4bit_reference(
        weight.flatten(),
        scales,
        shape=(weight.shape[0], x.shape[-1]),
        dtype=x.dtype,
        block_size=block_size,
        quant_type=quant_type,
    )
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def linear_4bit_torch(
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
    """The same with a few rows of the weight at a time, saving what is packed."""
    return product(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, quant_type, "torch")


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
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose weight is stored in four bits.

        y = x W^T + bias,    W = table[code] * absmax, rounded to the dtype of x        arXiv 2305.14314, equation 5

    x [*N, K]           float16, bfloat16, float32 or float64; K is a multiple of block_size
    weight [M, P]       uint8, P = K / 2: two codes to a byte, the column of even number in the high half
    absmax [M, G]       scales of the blocks, G = K / block_size: float32 (float64 is rounded to it), or uint8 under
                        double quantisation
    bias [M]            any float dtype; it is added in x's
    nested_absmax [S]   with uint8 absmax: float32, one for 256 scales, S = ceil(M G / 256)
    nested_offset []    with uint8 absmax: float32, what is added to all scales; shape [] or [1]
    block_size          values that share a scale, a power of two from 32 to 4096
    quant_type          "nf4", "fp4" or "int4"
    backend             "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast; sums are in float32 (float64 for float64). x and bias
    have gradients, which can be differentiated again; weight and scales have none. `encode_4bit` of a dense weight
    [M, K] gives weight and absmax, flat: reshape them to M rows. Raises ValueError or TypeError for arguments that do
    not fit, BackendUnavailable for a backend that cannot run.
    """
    if isinstance(nested_offset, Tensor) and nested_offset.shape == (1,):
        nested_offset = nested_offset.reshape(())
    tensors: dict[str, Tensor | None] = dict(
        x=x, weight=weight, absmax=absmax, bias=bias, nested_absmax=nested_absmax, nested_offset=nested_offset
    )
    sizes = LINEAR_4BIT.check(**tensors)
    check_format("linear_4bit", sizes["K"], block_size, quant_type)
    _check_dtypes(tensors)
    _check_sizes(sizes, block_size)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear_4bit: {name} is on {tensor.device}, expected {x.device} as x")
    for name in ("absmax", "nested_absmax", "nested_offset"):
        scale = tensors[name]
        tensors[name] = scale.float() if scale is not None and scale.dtype == torch.float64 else scale
    tensors["x"] = as_autocast(x)
    return LINEAR_4BIT.run(backend, **tensors, block_size=block_size, quant_type=quant_type)


class NF4Linear(nn.Linear):
    """nn.Linear with its weight in four bits: y = x W^T + bias (arXiv 2305.14314).

    in_features     K, a multiple of block_size
    out_features    M
    bias            whether there is a bias [M]
    block_size      values that share a scale, a power of two from 32 to 4096
    double_quant    store the scales in 8 bits: 4.127 instead of 4.5 bits a value at blocks of 64
    quant_type      "nf4", "fp4" or "int4"
    cache_dequant   "none": decode in every pass; "all": keep the dense weight of the first pass, in the dtype of x. The
                    layer then takes as much memory as a dense one, and is as fast. Nothing of it is saved, and it is
                    dropped when the layer is moved, cast or its parameters change. Compiled code does not use it.
    dtype           of the bias, and of what `dequantize` returns

    The parameters are plain: `weight` uint8 [M, K / 2], `weight_absmax` float32 [M, K / block_size] (uint8 under double
    quantisation, then with `weight_nested_absmax` float32 [S] and `weight_nested_offset` float32 [1]), none of which
    takes a gradient or is ever cast, and `bias`. It is computed in the dtype of x. A subclass of nn.Linear, because
    peft, and others that look for linear layers, go by that; its weight is not what nn.Linear's is.

    A new layer has the weight that nn.Linear starts from, quantised; `from_module` quantises a layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = False,
        quant_type: str = "nf4",
        cache_dequant: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_format("NF4Linear", in_features, block_size, quant_type)
        if not isinstance(double_quant, bool):
            raise TypeError(f"NF4Linear: double_quant is {double_quant!r}, expected True or False")
        if cache_dequant not in CACHES:
            raise ValueError(f"NF4Linear: cache_dequant is {cache_dequant!r}, choices: {', '.join(map(repr, CACHES))}")
        nn.Module.__init__(self)  # that of nn.Linear would make a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant, self.quant_type = block_size, double_quant, quant_type
        self.cache_dequant = cache_dequant
        self.dtype = dtype or torch.get_default_dtype()
        self._cached: _Cached | None = None
        blocks = in_features // block_size

        def frozen(*shape: int, of: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=of), requires_grad=False)

        self.weight = frozen(out_features, in_features // 2, of=torch.uint8)
        self.weight_absmax = frozen(out_features, blocks, of=torch.uint8 if double_quant else torch.float32)
        if double_quant:
            groups = math.ceil(out_features * blocks / NESTED_BLOCK)
            self.weight_nested_absmax: nn.Parameter | None = frozen(groups, of=torch.float32)
            self.weight_nested_offset: nn.Parameter | None = frozen(1, of=torch.float32)
        else:
            self.register_parameter("weight_nested_absmax", None)
            self.register_parameter("weight_nested_offset", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_module(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = False,
        quant_type: str = "nf4",
        cache_dequant: str = "none",
    ) -> NF4Linear:
        """A layer with the weight of a dense one in four bits; bias, device, dtype and mode stay."""
        if isinstance(linear, NF4Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"NF4Linear.from_module: linear is {linear}, expected a layer with a floating weight")
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            block_size=block_size,
            double_quant=double_quant,
            quant_type=quant_type,
            cache_dequant=cache_dequant,
            device="meta",
            dtype=linear.weight.dtype,
        )
        if linear.weight.device.type != "meta":
            new.to_empty(device=linear.weight.device)
            new.quantize_(linear.weight.detach())
        new.bias = linear.bias
        return new.train(linear.training)

    def reset_parameters(self) -> None:
        """What nn.Linear starts from, quantised."""
        if self.weight.device.type == "meta":
            return
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=self.dtype
        )
        self.quantize_(dense.weight.detach())
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(dense.bias)

    @torch.no_grad()
    def quantize_(self, dense: Tensor) -> None:
        """Takes over a dense weight [M, K]: float32, float16 or bfloat16."""
        shape = (self.out_features, self.in_features)
        if dense.shape != shape:
            raise ValueError(f"NF4Linear.quantize_: dense has shape {list(dense.shape)}, expected {list(shape)}")
        self.store_(_QUANTIZE[self.quant_type](dense, self.block_size, self.double_quant))

    @torch.no_grad()
    def store_(self, q: Quantized4bit) -> None:
        """Takes over a weight that is in four bits already, in this layer's shape and format."""
        self.weight.copy_(q.packed.view_as(self.weight))
        self.weight_absmax.copy_(q.absmax.view_as(self.weight_absmax))
        if q.nested is not None and self.weight_nested_absmax is not None and self.weight_nested_offset is not None:
            self.weight_nested_absmax.copy_(q.nested.absmax)
            self.weight_nested_offset.copy_(q.nested.offset)

    def quantized(self) -> Quantized4bit:
        """The weight as a tensor in four bits, sharing its memory."""
        nested = None
        if self.weight_nested_absmax is not None and self.weight_nested_offset is not None:
            nested = NestedScales(self.weight_nested_absmax.detach(), self.weight_nested_offset.detach().reshape(()))
        shape = (self.out_features, self.in_features)
        packed, absmax = self.weight.detach().flatten(), self.weight_absmax.detach().flatten()
        return Quantized4bit(packed, absmax, shape, self.dtype, self.block_size, self.quant_type, nested)

    def dequantize(self) -> nn.Linear:
        """A dense layer with the same bias and the weight as it now stands, in this layer's dtype."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        dense.weight = nn.Parameter(dequantize_nf4(self.quantized()))
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache_dequant == "all" and not torch.compiler.is_compiling():
            x = as_autocast(x)
            return product(x, self._dense(x.dtype), None, self.bias, None, None, self.block_size, self.quant_type, "")
        return linear_4bit(
            x,
            self.weight,
            self.weight_absmax,
            self.bias,
            self.weight_nested_absmax,
            self.weight_nested_offset,
            block_size=self.block_size,
            quant_type=self.quant_type,
        )

    def extra_repr(self) -> str:
        cache = "" if self.cache_dequant == "none" else f", cache_dequant={self.cache_dequant!r}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, quant_type={self.quant_type!r}{cache}"
        )

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight in this dtype, kept as long as the parameters are what it was decoded from."""
        now = [tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"]
        stamp = [(tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in now]
        kept = self._cached
        fresh = kept is not None and kept.stamp == stamp and all(a is b for a, b in zip(kept.source, now, strict=True))
        if kept is None or not fresh or kept.dense.dtype != dtype:
            decoded_as = torch.float32 if dtype == torch.float64 else dtype
            with torch.inference_mode(False):  # a pass with gradients may come later
                dense = dequantize_nf4(self.quantized(), dtype=decoded_as).to(dtype)
            self._cached = kept = _Cached(dense, now, stamp)
        return kept.dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Moves all parameters, but casts the bias alone: a scale in half precision would be another scale."""
        scales = [self.weight_absmax, self.weight_nested_absmax, self.weight_nested_offset]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype and any(tensor is scale for scale in scales)
            return tensor.to(moved.device) if cast else moved

        self._cached = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As every module, but refuses what would have to be cast: codes as numbers, scales in half precision."""
        for name, parameter in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if name != "bias" and isinstance(given, Tensor) and given.dtype != parameter.dtype:
                args[-1].append(f"{prefix}{name} has dtype {given.dtype}, expected {parameter.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class _Cached(NamedTuple):
    """A decoded weight, and the parameters it was decoded from with their addresses and versions at that time."""

    dense: Tensor
    source: Sequence[Tensor]
    stamp: list[tuple[int, int | None]]


def product(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    quant_type: str,
    backend: str,
    transposed: bool = False,
) -> Tensor:
    """x W^T + bias, or x W if transposed, with W decoded by this backend piece by piece, or given (weight as floats).

    Differentiable in x and bias any number of times, since either product is the gradient of the other.
    """
    return _Product.apply(
        x, weight, absmax, bias, nested_absmax, nested_offset, block_size, quant_type, backend, transposed
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        absmax: Tensor | None,
        bias: Tensor | None,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        block_size: int,
        quant_type: str,
        backend: str,
        transposed: bool,
    ) -> Tensor:
        # A compiler gets it as one operator: it would decode W in one piece, and keep that for the backward pass.
        run = torch.ops.effkit.linear_4bit_product if torch.compiler.is_compiling() else _product
        return run(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, quant_type, backend, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, absmax, bias, nested_absmax, nested_offset, *ctx.options, ctx.transposed = inputs
        ctx.save_for_backward(weight, absmax, nested_absmax, nested_offset)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, dy, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_Product.apply, info.batch_size, in_dims, inputs)


def gradients(ctx: Any, dy: Tensor, transposed: bool = False) -> tuple[Tensor | None, ...]:
    """The gradients of x and bias in the places of the ten arguments; W is decoded only if x asks for one."""
    weight, absmax, nested_absmax, nested_offset = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        block_size, quant_type, backend = ctx.options
        dx = product(
            dy, weight, absmax, None, nested_absmax, nested_offset, block_size, quant_type, backend, not transposed
        )
    if ctx.needs_input_grad[3]:
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    return dx, None, None, dbias, None, None, None, None, None, None


def _product(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    quant_type: str,
    backend: str,
    transposed: bool,
) -> Tensor:
    """See `product`. Both ways a piece of W makes a piece of the result, so that no sum is rounded on the way."""
    M, K = weight.shape[0], weight.shape[1] * (1 if absmax is None else 2)
    if absmax is not None and nested_absmax is not None and nested_offset is not None:
        absmax = decode_scales(absmax.flatten(), nested_absmax, nested_offset).view_as(absmax)

    def piece(rows: slice, columns: slice) -> Tensor:
        """W[rows, columns] in the dtype of x; columns begin and end with a block."""
        if absmax is None:
            return weight[rows, columns].contiguous()  # laid out as a decoded piece: the same bits come out
        halves = slice(columns.start // 2, columns.stop // 2)
        blocks = slice(columns.start // block_size, columns.stop // block_size)
        return DECODE_4BIT.implementation(backend)(
            weight[rows, halves].flatten(),
            absmax[rows, blocks].flatten(),
            shape=(rows.stop - rows.start, columns.stop - columns.start),
            dtype=x.dtype,
            block_size=block_size,
            quant_type=quant_type,
        )

    if transposed:
        pieces = [x @ piece(slice(0, M), columns) for columns in _pieces(K, block_size, x)]
    else:
        bias = None if bias is None else bias.to(x.dtype)
        pieces = [
            F.linear(x, piece(rows, slice(0, K)), None if bias is None else bias[rows]) for rows in _pieces(M, 1, x)
        ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _fake_product(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    transposed = others[-1]
    return x.new_empty(*x.shape[:-1], 2 * weight.shape[1] if transposed else weight.shape[0])


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define(
    "linear_4bit_product(Tensor x, Tensor weight, Tensor? absmax, Tensor? bias, Tensor? nested_absmax, "
    "Tensor? nested_offset, int block_size, str quant_type, str backend, bool transposed) -> Tensor"
)
_library.impl("linear_4bit_product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("effkit::linear_4bit_product", _fake_product, lib=_library)


def _pieces(length: int, step: int, x: Tensor) -> Iterator[slice]:
    """Slices of an axis of the weight: on a CPU a few hundred rows, or columns in whole steps; elsewhere one."""
    width = max(_PIECE, step) if x.device.type == "cpu" else length
    return (slice(start, min(start + width, length)) for start in range(0, max(1, length), max(1, width)))


_PIECE = 512  # fewer slow the product down


def check_format(op: str, in_features: int, block_size: int, quant_type: str) -> None:
    """Raises where a weight of this input width cannot be stored in four bits."""
    check_block_size(op, block_size)
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{op}: quant_type is {quant_type!r}, choices: {', '.join(map(repr, QUANT_TYPES))}")
    if in_features % block_size:
        raise ValueError(
            f"{op}: {in_features} input features are no multiple of block_size {block_size}, so that blocks would "
            "straddle the rows of the weight"
        )


def _check_dtypes(tensors: dict[str, Tensor | None]) -> None:
    nested = tensors["nested_absmax"] is not None
    if nested != (tensors["nested_offset"] is not None):
        raise ValueError("linear_4bit: nested_absmax and nested_offset belong together, expected both or neither")
    floats, scales, codes = tuple(FLOATS), (torch.float32, torch.float64), (torch.uint8,)
    expected = dict(
        x=floats, weight=codes, absmax=codes if nested else scales, bias=floats,
        nested_absmax=scales, nested_offset=scales,
    )  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in expected[name]:
            choices = ", ".join(map(str, expected[name]))
            raise TypeError(f"linear_4bit: {name} has dtype {tensor.dtype}, choices: {choices}")


def _check_sizes(sizes: dict[str, int], block_size: int) -> None:
    M, K = sizes["M"], sizes["K"]
    expected = {"weight": ("P", K // 2), "absmax": ("G", K // block_size)}
    for name, (axis, size) in expected.items():
        if sizes[axis] != size:
            raise ValueError(
                f"linear_4bit: {name} has shape {[M, sizes[axis]]}, expected {[M, size]} for {K} input features in "
                f"blocks of {block_size}"
            )
    groups = math.ceil(M * sizes["G"] / NESTED_BLOCK)
    if sizes.get("S", groups) != groups:
        raise ValueError(
            f"linear_4bit: nested_absmax has shape {[sizes['S']]}, expected {[groups]}, one for each {NESTED_BLOCK} of "
            f"{M * sizes['G']} scales"
        )


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that F.linear would compute in under torch.autocast."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _supports(x: Tensor, **arguments: Any) -> str | None:
    return "x has dtype torch.float64, the kernel computes in float32" if x.dtype == torch.float64 else None


def _counts(case: Case) -> tuple[int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"]


def _flops(case: Case) -> float:
    N, K, M = _counts(case)
    return 2 * N * K * M


def _traffic(case: Case) -> float:
    N, K, M = _counts(case)
    return N * (K + M) + (M if "bias" in case.given else 0)


def _packed_bytes(case: Case) -> float:
    """The weight and its scales, which have dtypes of their own."""
    _, K, M = _counts(case)
    blocks = M * K // case.options.get("block_size", 64)
    return M * K / 2 + (blocks + 4 * math.ceil(blocks / NESTED_BLOCK) if "nested_absmax" in case.given else 4 * blocks)


def _case(name: str, tokens: tuple[int, ...], K: int, M: int, given: tuple[str, ...] = (), **rest: Any) -> Case:
    """A case in terms of the dense weight; given may say "nested" for double quantisation."""
    size = rest.get("block_size", 64)
    sizes = {"*N": tokens, "K": K, "M": M, "P": K // 2, "G": K // size, "S": math.ceil(M * (K // size) / NESTED_BLOCK)}
    options: dict[str, Any] = {key: rest.pop(key) for key in ("block_size", "quant_type") if key in rest}
    draw = {}
    if "nested" in given:
        given = (*(part for part in given if part != "nested"), "nested_absmax", "nested_offset")
        draw = {"absmax": _bytes}
    return Case(name, sizes, options, given=given, draw=draw, **rest)


def _bytes(x: Tensor) -> Tensor:
    return (x * 1000).remainder(256).to(torch.uint8)


def _magnitudes(x: Tensor) -> Tensor:
    return x.abs().float()


CACHES = ("none", "all")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4, "int4": quantize_int4}

_CASES = (
    _case("one token, one feature", (1,), 64, 1, ("bias",)),
    _case("no token", (0,), 64, 8, ("bias",)),
    _case("no feature out", (3,), 64, 0),
    _case("no feature in", (3,), 0, 5, ("bias",)),
    _case("no axis of tokens", (), 128, 17, ("bias",)),
    _case("primes", (7, 3), 192, 67, ("bias",)),
    _case("bare", (5,), 256, 33),
    _case("several shares", (2,), 1088, 65, ("bias",)),
    _case("small blocks", (3,), 96, 35, ("bias",), block_size=32),
    _case("large blocks", (3,), 512, 13, block_size=256),
    _case("double quantised", (4,), 192, 129, ("bias", "nested")),
    _case("double quantised, many", (67,), 128, 70, ("nested",)),
    _case("fp4", (3,), 128, 31, ("bias",), quant_type="fp4"),
    _case("int4", (3,), 128, 31, ("bias",), quant_type="int4"),
    _case("many tokens", (2, 65), 128, 40, ("bias",)),
    _case("full tile of tokens", (64,), 64, 32, ("bias",)),
    _case("several pieces", (2,), 576, 513, ("bias",)),
    _case("transposed", (3, 5), 64, 33, ("bias",), layout="transposed"),
    _case("large values", (3,), 128, 16, ("bias",), gain={"x": 100.0}),
    _case("a layer", (5,), 4096, 11008, ("bias",), large=True),
    _case("a layer, many", (300,), 4096, 4096, ("nested",), large=True),
)
_BENCH = (
    _case("1 token, 4096 x 4096", (1,), 4096, 4096),
    _case("64 tokens, 4096 x 4096", (64,), 4096, 4096),
    _case("1 token, 8192 x 28672", (1,), 8192, 28672, large=True),
    _case("16 tokens, 8192 x 8192", (16,), 8192, 8192, large=True),
    _case("2048 tokens, 8192 x 8192", (2048,), 8192, 8192, large=True),
)

LINEAR_4BIT = register(
    Op(
        name="linear_4bit",
        area="quant",
        summary="linear layer with its weight in four bits, decoded on its way into the product",
        paper="https://arxiv.org/abs/2305.14314",
        shapes="x [*N, K], weight [M, P], absmax [M, G], bias [M]?, nested_absmax [S]?, nested_offset []? -> y [*N, M]",
        function=linear_4bit,
        reference=linear_4bit_reference,
        torch=linear_4bit_torch,
        triton="effkit.kernels.linear_4bit:linear_4bit",
        supports=_supports,
        cases=_CASES,
        bench=_BENCH,
        rivals={
            "dense": "effkit.rivals:dense_linear_of_4bit",
            "bitsandbytes": "effkit.rivals:bitsandbytes_linear_4bit",
            "bitsandbytes repacked": "effkit.rivals:bitsandbytes_repacked_linear_4bit",
        },
        draw={
            "weight": _bytes,
            "absmax": _magnitudes,
            "nested_absmax": _magnitudes,
            "nested_offset": _magnitudes,
        },
        grads=("x", "bias"),
        flops=_flops,
        traffic=_traffic,
        other_bytes=_packed_bytes,
    )
)
