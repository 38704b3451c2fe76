"""FP8 linear layers: a weight of one byte an element for inference on every device, and FP8 products for training.

    y = x (s * W8)^T + b                    weight only: x stays as it is
    y = (s_x * Q(x)) (s * W8)^T + b         with quantised activations: `activation="row"`, "block" or "tensor"
    dx = dy (s * W8)                        either way; W8 and s take no gradient

Formats: Micikevicius et al., arXiv 2209.05433. Scales of the weight: one, one for each row, or one for each 128 x 128
as DeepSeek-V3 stores them (arXiv 2412.19437, section 3.3.2). Training is in `effkit.quant.fp8_training`.

Cost: one byte for each weight instead of two. With few tokens the weight is all that is read, and half the bytes are
half the time at best; with many, quantised activations let tensor cores multiply FP8 at twice the rate, where there are
such (compute capability 8.9 and later). Elsewhere codes are decoded by integers on their way into the product, and the
weight still takes one byte.

When not to use it: at four bits a value `NF4Linear` halves the bytes again, and loses more. On a CPU decoding costs as
much as the product of dozens of tokens. Quantised activations cost about 3 dB of the result's 31 dB on Gaussian data,
more with outliers beyond some thousand times the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.norm.dyt import batched
from effkit.ops import Case, Op, register
from effkit.quant.fp8 import FORMATS, GRANULARITIES, QuantizedFP8, dequantize_fp8, encode_fp8, quantize_fp8
from effkit.quant.fp8_matmul import (
    BLOCK,
    DTYPES,
    checked_codes,
    checked_scale,
    codes_of_normal,
    decoded,
    decoded_tiles,
    matmul_fp8,
    scales_of_normal,
    tile_size,
)
from effkit.quant.fp8_training import DelayedScaling, FP8Recipe, recipe_of, training_linear


def linear_fp8_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, format: str = "e4m3"
) -> Tensor:
    """The equation: dequantise, then multiply."""
    wide = torch.promote_types(x.dtype, weight_scale.dtype)
    dense = decoded(weight, weight_scale, format, wide).to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def linear_fp8_torch(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, format: str = "e4m3"
) -> Tensor:
    """The same with a few rows of the weight at a time, saving nothing but the weight in one byte."""
    return _LinearFP8.apply(x, weight, weight_scale, bias, format)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    format: str = "e4m3",
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose weight is stored in FP8.

        y = x (weight_scale * weight)^T + bias        arXiv 2209.05433

    x [*N, K]             float16, bfloat16, float32, and without `activation` float64
    weight [M, K]         float8_e4m3fn, float8_e5m2, or uint8 codes of `format`
    weight_scale [*S]     float32: [] or one element, [M, 1], or [ceil(M / 128), ceil(K / 128)]
    bias [M]              any float dtype; it is added in x's
    activation            None leaves x as it is. "tensor", "row" or "block" (1 x 128) quantises it to e4m3 with scales
                          of its own; gradients pass through the rounding as if it were not there
    format                what uint8 codes are, "e4m3" or "e5m2"; a float8 weight says so itself
    backend               "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, M] in x's dtype, summed in float32 (float64 for float64). x and bias have gradients, which can be
    differentiated again; weight and scale have none. Raises ValueError or TypeError for arguments that do not fit,
    BackendUnavailable for a backend that cannot run.
    """
    weight, format = checked_codes("linear_fp8", "weight", weight, format)
    LINEAR_FP8.check(x=x, weight=weight, weight_scale=weight_scale, bias=bias)
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"linear_fp8: x has dtype {x.dtype}, choices: {', '.join(map(str, DTYPES))}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear_fp8: {name} is on {tensor.device}, expected {x.device} as x")
    scale = checked_scale("linear_fp8", "weight_scale", weight_scale, tuple(weight.shape), x.device)
    if activation is None:
        return LINEAR_FP8.run(backend, x=x, weight=weight, weight_scale=scale, bias=bias, format=format)
    if activation not in GRANULARITIES:
        raise ValueError(f"linear_fp8: activation is {activation!r}, choices: None, 'tensor', 'row', 'block'")
    return _QuantizedInput.apply(x, weight, scale, bias, format, activation, backend)


class FP8Linear(nn.Linear):
    """nn.Linear in FP8: for inference with the weight in one byte, or with a `recipe` for training.

    in_features     K
    out_features    M
    bias            whether there is a bias [M]
    granularity     what shares a scale of the weight: "tensor", "row", or "block" (128 x 128, also where neither K nor
                    M is a multiple of it)
    activation      None leaves inputs as they are; "tensor", "row" or "block" (1 x 128) quantises them, too
    format          of the weight, "e4m3" or "e5m2"
    power_of_two    round scales up to a power of two, so that dividing by them is exact
    recipe          None for inference; for training an `FP8Recipe` or the name of one in `RECIPES`. The options above
                    then do not apply: the recipe has its own
    dtype           of the bias and of what `dequantize` returns; with a recipe of the weight as well

    For inference the parameters are plain: `weight` float8 [M, K] and `weight_scale_inv` float32 [1], [M, 1] or
    [ceil(M / 128), ceil(K / 128)], which take no gradient and are never cast, and `bias`. Names, dtypes and blocks are
    those of DeepSeek's and transformers' FP8 checkpoints, whose tensors load as they are; for all its name the scale
    multiplies on decoding. Gradients flow to x and bias.

    For training `weight` stays in `dtype`, the optimizer's master copy, and is quantised in each pass. With delayed
    scaling `delayed` holds the scales and the histories of maxima, part of the state dict; `update_fp8_scales(model)`
    is due once after each step of the optimizer. FP8Linear.from_module(trained layer) gives one for inference.

    A subclass of nn.Linear, because peft, and others that look for linear layers, go by that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str = "block",
        activation: str | None = None,
        format: str = "e4m3",
        power_of_two: bool = False,
        recipe: FP8Recipe | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, choices in (
            ("granularity", granularity, GRANULARITIES),
            ("activation", activation, (None, *GRANULARITIES)),
            ("format", format, tuple(FORMATS)),
        ):
            if value not in choices:
                raise ValueError(f"FP8Linear: {name} is {value!r}, choices: {', '.join(map(repr, choices))}")
        nn.Module.__init__(self)  # that of nn.Linear would make a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.granularity, self.activation, self.format, self.power_of_two = (
            granularity,
            activation,
            format,
            power_of_two,
        )
        self.recipe = None if recipe is None else recipe_of(recipe)
        self.dtype = dtype or torch.get_default_dtype()
        self.delayed: DelayedScaling | None = None
        if self.recipe is None:
            scales = {"tensor": (1,), "row": (out_features, 1)}.get(
                granularity, (-(-out_features // BLOCK), -(-in_features // BLOCK))
            )
            codes = torch.empty(out_features, in_features, device=device, dtype=FORMATS[format].dtype)
            self.weight = nn.Parameter(codes, requires_grad=False)
            scale = torch.empty(scales, device=device, dtype=torch.float32)
            self.weight_scale_inv: nn.Parameter | None = nn.Parameter(scale, requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=self.dtype))
            self.register_parameter("weight_scale_inv", None)
            if self.recipe.amax_history is not None:
                self.delayed = DelayedScaling(self.recipe, device=device)
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
        granularity: str = "block",
        activation: str | None = None,
        format: str = "e4m3",
        power_of_two: bool = False,
        recipe: FP8Recipe | str | None = None,
    ) -> FP8Linear:
        """A layer with the weight of a dense one, or of one for training; bias, device, dtype and mode stay.

        With a recipe the weight itself is taken over, so that an optimizer that knows it goes on.
        """
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in DTYPES:
            raise TypeError(f"FP8Linear.from_module: linear is {linear}, expected a layer with a floating weight")
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            granularity=granularity,
            activation=activation,
            format=format,
            power_of_two=power_of_two,
            recipe=recipe,
            device="meta",
            dtype=linear.weight.dtype,
        )
        if linear.weight.device.type != "meta":
            new.to_empty(device=linear.weight.device)
            if new.delayed is not None:
                new.delayed.reset_parameters()
            if new.recipe is None:
                new.quantize_(linear.weight)
        if new.recipe is not None:
            new.weight = linear.weight
        new.bias = linear.bias
        return new.train(linear.training)

    def reset_parameters(self) -> None:
        """What nn.Linear starts from, quantised unless there is a recipe; delayed scales start anew."""
        if self.weight.device.type == "meta":
            return
        if self.delayed is not None:
            self.delayed.reset_parameters()
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=self.dtype
        )
        with torch.no_grad():
            if self.recipe is None:
                self.quantize_(dense.weight)
            else:
                self.weight.copy_(dense.weight)
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    @torch.no_grad()
    def quantize_(self, dense: Tensor) -> None:
        """Takes over a dense weight [M, K]: float32, float16 or bfloat16. For inference only."""
        if self.weight_scale_inv is None:
            raise ValueError("FP8Linear.quantize_: this layer has a recipe, its weight is quantised in each pass")
        q = quantize_fp8(dense, self.granularity, self.format, power_of_two=self.power_of_two)
        self.weight.copy_(q.codes)
        self.weight_scale_inv.copy_(q.scale)

    def quantized(self) -> QuantizedFP8:
        """The weight as a tensor in FP8, sharing its memory. For inference only."""
        if self.weight_scale_inv is None:
            raise ValueError("FP8Linear.quantized: this layer has a recipe, its weight is quantised in each pass")
        scale = self.weight_scale_inv.detach()
        scale = scale.reshape(()) if self.granularity == "tensor" else scale
        block = (BLOCK, BLOCK) if self.granularity == "block" else None
        return QuantizedFP8(self.weight.detach(), scale, self.granularity, self.format, self.dtype, block)

    def dequantize(self) -> nn.Linear:
        """A dense layer with the same bias and the weight as it now stands, in this layer's dtype."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        if self.recipe is not None:
            dense.weight = self.weight
        else:  # float64 has no rounding left to do
            dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
            dense.weight = nn.Parameter(dequantize_fp8(self.quantized(), dtype=dtype).to(self.dtype))
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.recipe is not None:
            return training_linear(x, self.weight, self.bias, self.recipe, self.delayed)
        scale: Any = self.weight_scale_inv
        return linear_fp8(x, self.weight, scale, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        how = f"granularity={self.granularity!r}, activation={self.activation!r}, format={self.format!r}"
        how = how if self.recipe is None else f"recipe={self.recipe}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        """Moves all parameters, but casts neither codes nor scales: they would no longer be what they are."""
        fixed = () if self.recipe is not None else (self.weight, self.weight_scale_inv)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype and any(tensor is one for one in fixed)
            return tensor.to(moved.device) if cast else moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As every module, but refuses what would have to be cast: numbers as codes, scales in half precision."""
        for name in () if self.recipe is not None else ("weight", "weight_scale_inv"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                args[-1].append(f"{prefix}{name} has dtype {given.dtype}, expected {own.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


class _LinearFP8(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
        tiles = decoded_tiles(weight, scale, format, x.dtype)
        if bias is None:
            return torch.cat([F.linear(x, rows) for rows in tiles], -1)
        parts = bias.to(x.dtype).split(tile_size(weight))
        return torch.cat([F.linear(x, rows, part) for rows, part in zip(tiles, parts, strict=True)], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(ctx, *inputs[1:5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, dy)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_LinearFP8.apply, info.batch_size, in_dims, inputs)


class _QuantizedInput(torch.autograd.Function):
    """A product of quantised inputs, whose backward takes them for what they were: dx = dy W."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        format: str,
        activation: str,
        backend: str | None,
    ) -> Tensor:
        block = (1, BLOCK) if activation == "block" else None
        codes, x_scale = encode_fp8(x, granularity=activation, block=block, backend=backend)
        return matmul_fp8(codes, x_scale, weight, scale, bias, b_format=format, dtype=x.dtype, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(ctx, *inputs[1:5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if inputs[5] == "tensor" and in_dims[0] is not None and not any(dim is not None for dim in in_dims[1:]):
            each = [_QuantizedInput.apply(x, *inputs[1:]) for x in inputs[0].movedim(in_dims[0], 0)]
            return torch.stack(each), 0  # each has a scale of its own
        return batched(_QuantizedInput.apply, info.batch_size, in_dims, inputs)


def keep(ctx: Any, weight: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> None:
    """What `gradients` needs: neither x nor a decoded weight."""
    ctx.save_for_backward(weight, scale)
    ctx.format, ctx.bias_dtype = format, None if bias is None else bias.dtype


def decoded_columns(weight: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Iterable[Tensor]:
    """The weight some columns at a time."""
    return decoded_tiles(weight, scale, format, dtype, axis=1)


def gradients(
    ctx: Any, dy: Tensor, decode: Callable[..., Iterable[Tensor]] = decoded_columns
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, scale, bias and format, in operations that can be differentiated again.

    decode gives the weight by columns, so that no sum is rounded on the way.
    """
    weight, scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.cat([dy @ columns for columns in decode(weight, scale, ctx.format, dy.dtype)], -1)
    if ctx.needs_input_grad[3]:
        dbias = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, None, None, dbias, None


def _supports(x: Tensor, weight_scale: Tensor, **_: Any) -> str | None:
    """Why the kernel cannot run, or None."""
    wide = torch.float64 in (x.dtype, weight_scale.dtype)
    return "float64 has no kernel, which sums in float32" if wide else None


def _tokens(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"])


def _inputs_and_results(case: Case) -> int:
    sizes: Any = case.sizes
    return _tokens(case) * (sizes["M"] + sizes["K"])


def _weights(case: Case) -> int:
    sizes: Any = case.sizes
    return sizes["M"] * sizes["K"]


def _case(name: str, n: tuple[int, ...], m: int, k: int, scales: str = "block", **options: Any) -> Case:
    """A case whose weight has this granularity, with a bias unless given=()."""
    fields: dict[str, Any] = {"given": ("bias",)}
    fields |= {key: options.pop(key) for key in ("given", "layout", "large", "gain") if key in options}
    shape = {"tensor": (), "row": (m, 1), "block": (-(-m // BLOCK), -(-k // BLOCK))}[scales]
    return Case(name, {"*N": n, "M": m, "K": k, "*S": shape}, options, **fields)


LINEAR_FP8 = register(
    Op(
        name="linear_fp8",
        area="quant",
        summary="linear layer with its weight in FP8, inputs as they are or in FP8, too",
        paper="https://arxiv.org/abs/2209.05433",
        shapes="x [*N, K], weight [M, K], weight_scale [*S], bias [M]? -> y [*N, M]",
        function=linear_fp8,
        reference=linear_fp8_reference,
        torch=linear_fp8_torch,
        triton="effkit.kernels.fp8_linear:linear_fp8",
        supports=_supports,
        cases=(
            _case("one", (1,), 1, 1, "tensor"),
            _case("no rows", (0,), 8, 16),
            _case("nothing to sum", (3,), 5, 0),
            _case("vector", (), 65, 129, "row"),
            _case("tensor", (2, 3, 5), 67, 130, "tensor"),
            _case("rows", (37,), 70, 131, "row"),
            _case("rows, e5m2", (5,), 131, 64, "row", format="e5m2"),
            _case("blocks", (3, 13), 257, 300),
            _case("blocks of 576", (17,), 72, 576),
            _case("bare", (7,), 129, 127, given=()),
            _case("decoding", (1,), 64, 2100),
            _case("several tiles", (2,), 2100, 300),
            _case("several tiles, rows", (2,), 1100, 300, "row"),
            _case("many tokens", (300,), 40, 65),
            _case("large values", (9,), 33, 128, "row", gain={"x": 20.0}),
            _case("transposed", (3, 5), 33, 48, layout="transposed"),
            _case("model", (16,), 4096, 4096, large=True),
            _case("model, many tokens", (2048,), 4096, 4096, large=True),
        ),
        bench=(
            _case("1 x 2k x 2k", (1,), 2048, 2048),
            _case("64 x 2k x 2k", (64,), 2048, 2048),
            _case("1 x 4k x 4k", (1,), 4096, 4096, large=True),
            _case("16 x 4k x 4k", (16,), 4096, 4096, large=True),
            _case("1 x 14k x 4k", (1,), 14336, 4096, large=True),
            _case("4k x 4k x 4k", (4096,), 4096, 4096, large=True),
        ),
        rivals={"dense": "effkit.rivals:dense_linear_of_fp8"},
        grads=("x", "bias"),
        flops=lambda case: 2 * _tokens(case) * _weights(case),
        traffic=_inputs_and_results,
        other_bytes=_weights,
        draw={"weight": codes_of_normal, "weight_scale": scales_of_normal},
    )
)
