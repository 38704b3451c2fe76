"""DoRA: LoRA that learns the lengths of a weight's rows apart from their directions.

    W' = m / |V| * V,   V = W + s B A,   |V| [M] the lengths of its rows           Liu et al., arXiv 2402.09353, eq. 5
    y  = base + (g - 1) * W x_d + g * s B A x_d,   g = m / |V|,   x_d dropout of x

m [M] starts as |W| and B as zero, so that the adapted model starts as it was, bit for bit. |V| is held constant in the
backward pass (section 4.3), which then is that of LoRA with a factor for each output.

Cost: that of LoRA, one multiplication for each value of y, and |V| whenever A or B has changed: 2 R K M operations, as
LoRA itself has for M tokens, once in a training step and never in inference. Kept for the backward pass are x, A x
[T, R] and y, which the next layer mostly keeps anyway: the gradient of g is sum_t dy (W x + s B A x), and that is had
from y. With dropout the product with W x_d comes on top, forward and backward, and once more for the gradient of m.

When not to use it: where LoRA is good enough, which a higher rank often makes it; the gain that the paper reports is
largest at low ranks. It shares a layer with no other adapter. For inference merge it, and it costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effkit.ops import Case, Op, register
from effkit.peft._arguments import checked
from effkit.peft._columns import Memo, Remembered, add_scaled_, column_products, scale_columns, thin_product, wide
from effkit.peft._dropout import dropped, dropped_reference
from effkit.peft.adapter import Adapted, Adapter, linear_shape
from effkit.peft.lora import LoRA, LoRAConfig, new_seed
from effkit.peft.low_rank import any_seed, base_of, outside_autocast, rows_of, with_axes
from effkit.peft.matching import is_conv1d
from effkit.quant.four_bit import dequantize_nf4
from effkit.quant.fp8 import dequantize_fp8
from effkit.quant.fp8_linear import FP8Linear
from effkit.quant.nf4_linear import NF4Linear


def dora_linear_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The equation."""
    base = base_of(x, weight, None if weight is None else bias, base)
    x = dropped_reference(x, seed, dropout)
    plain = base if bias is None else base - bias
    if dropout and weight is not None:
        plain = F.linear(x, weight.to(x.dtype))
    update = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    g = _ratio(magnitude, norm)
    change = (g - 1) * plain + g * scale * update
    return (base + (change if gate is None else gate * change)).to(x.dtype)


def dora_linear_torch(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The same with sums in place, keeping x, A x and y; under torch.compile as written, which then fuses it."""
    arguments = x, a, b, scale, magnitude, norm, weight, bias, base, seed, gate
    if torch.compiler.is_compiling():
        return dora_linear_reference(*arguments, dropout=dropout)
    lengths = (magnitude, norm) if gate is None else (magnitude, norm, gate)
    return _DoRALinear.apply(*arguments, dropout, _can_divide(*lengths))[0]


def dora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a low-rank update, the rows of the sum stretched to trained lengths.

        y = base + gate * ((g - 1) * W x_d + g * scale * b a x_d),   g = magnitude / norm      arXiv 2402.09353, eq. 5

    x [*N, K]        float16, bfloat16, float32 or float64, any strides
    a [R, K]         lora_A, any float dtype: float32 beside an x in half precision is a master copy
    b [M, R]         lora_B, any float dtype
    scale []         alpha / R, a factor without a gradient
    magnitude [M]    lora_magnitude_vector, the trained lengths of the rows
    norm [M]         their lengths as they are, `dora_norm(weight, a, b, scale)`: a constant, without a gradient. Where
                     it is 0, g is 1
    weight [M, K]    W of a dense layer, or
    base [*N, M]     the result of any other layer, its bias included; there is no dropout then
    bias [M]         of the layer: with weight it is added, of base it is the part that g leaves alone
    seed []          int32 or int64, where there is dropout: the mask is a function of seed, row and column
    gate []          how much of the change there is, 1 where absent; a factor without a gradient
    dropout          probability of dropping an element of x, for the change; base sees all of x
    backend          "reference", "torch" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast; g is not rounded to it. With b = 0 and magnitude = norm,
    or gate = 0, it is the base bit for bit. Gradients come in each tensor's own dtype. Second derivatives:
    backend="reference". Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend
    that cannot run.
    """
    tensors: dict[str, Tensor | None] = dict(
        x=x, a=a, b=b, scale=scale, magnitude=magnitude, norm=norm, weight=weight, bias=bias, base=base, seed=seed,
        gate=gate,
    )  # fmt: skip
    tensors = checked(DORA_LINEAR, tensors, dropout, bias_of_base=True)
    if dropout and base is not None:
        raise ValueError(
            f"dora_linear: dropout is {dropout!r} beside base, which is of all of x: W x_d cannot be had from it; "
            "choices: weight, or x and base after dropout"
        )
    return DORA_LINEAR.run(backend, **tensors, dropout=dropout)


def dora_norm_reference(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The equation."""
    return torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The lengths [M] of the rows of weight + scale b a, in float32 (float64 for float64), without a gradient.

    weight [M, K]    any float dtype, as are
    a [R, K], b [M, R], scale []

    Some rows at a time, so that the sum is never there as a whole. The expanded square, |W|^2 + 2 s (W A^T) . B + ...,
    saves nothing, since its W A^T costs what B A does, and cancels where a row is all but removed.
    """
    precise = wide(weight)
    rows = max(1, (_NORM_PIECE if weight.device.type == "cpu" else _NORM_PIECE << 6) // max(1, weight.shape[1]))
    with torch.autocast(weight.device.type, enabled=False):
        a, b, scale = a.to(precise), b.to(precise), scale.to(precise)
        if torch.compiler.is_compiling():
            return dora_norm_reference(weight.to(precise), a, b, scale)
        lengths = [
            torch.linalg.vector_norm(torch.addmm(w.to(precise), of_w, a), dim=1)
            for w, of_w in zip(weight.split(rows), (scale * b).split(rows), strict=True)
        ]
    return torch.cat(lengths)


_NORM_PIECE = 1 << 18  # elements; a megabyte of float32


class DoRA(LoRA):
    """LoRA of one linear layer with trained lengths of the rows: see `dora_linear`. The arguments are those of `LoRA`.

    lora_magnitude_vector [M] is a parameter beside lora_A and lora_B, in float32 or wider: its updates are small. It
    starts as ones; `measure` makes it what it has to start from. What it is divided by, the lengths that the rows have,
    is computed again whenever the layer, lora_A or lora_B has changed, and in every pass of compiled code.
    """

    additive = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype, **options)
        if self.lora_bias is not None:
            raise ValueError("DoRA: update_bias is True, but DoRA has no bias of the update")
        lengths = torch.ones(out_features, device=device, dtype=wide(self.lora_A))
        self.lora_magnitude_vector = nn.Parameter(lengths)
        self._norm = Memo()

    @torch.no_grad()
    def measure(self, layer: nn.Module) -> None:
        """Makes the trained lengths those of the rows as they are: a start from which nothing changes."""
        if not self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector.copy_(self.norm(layer))

    def norm(self, layer: nn.Module) -> Tensor:
        """The lengths [M] of the rows of the layer's weight plus the update, in float32 or wider."""

        def lengths() -> Tensor:
            return dora_norm(_weight_of(layer), self.lora_A, self.lora_B, self.gain)

        if torch.compiler.is_compiling():
            return lengths()
        of_layer = [parameter for name, parameter in layer.named_parameters(recurse=False) if name != "bias"]
        with torch.inference_mode(False):  # what is remembered may be needed for gradients later
            return self._norm(lengths, self.lora_A, self.lora_B, self.gain, *of_layer)

    def refresh(self) -> None:
        """The lengths are those of the whole update, however much of the change there is to be."""
        if hasattr(self, "gain"):
            self.gain = torch.full_like(self.gate, self.scale)

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        own = self.lora_A, self.lora_B, self.gain, self.lora_magnitude_vector, self.norm(layer)
        dense = layer.dense_form()
        if dense is not None:
            seed = new_seed(x) if dropout else None
            return dora_linear(x, *own, *dense, seed=seed, gate=self.gate, dropout=dropout)
        bias: Any = layer.bias
        seen = F.dropout(x, dropout)
        plain = layer.base(seen)
        y = dora_linear(seen, *own, bias=bias, base=plain, gate=self.gate)
        return layer.base(x) + (y - plain) if dropout else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, scale, magnitude, gate = (
            part.to(weight.dtype)
            for part in (self.lora_A, self.lora_B, self.gain, self.lora_magnitude_vector, self.gate)
        )
        g = _ratio(magnitude, dora_norm(weight, a, b, scale))[:, None]
        return weight + gate * ((g - 1) * weight + g * (scale * b @ a)), bias

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        raise TypeError("DoRA has no factors: it also stretches the rows of the weight")


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """DoRA in a model's linear layers: `effkit.apply(model, DoRAConfig(rank=8, alpha=16))`.

    The fields are those of `LoRAConfig`, all but update_bias. Embeddings are refused.
    """

    linear_adapter: ClassVar[type[LoRA]] = DoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_bias:
            raise ValueError("DoRAConfig: update_bias is True, but DoRA has no bias of the update")

    def adapter(self, path: str, layer: nn.Module, shared: Any) -> Adapter:
        linear_shape(self, path, layer)
        new: Any = super().adapter(path, layer, shared)
        new.measure(layer)
        return new


def _weight_of(layer: Any) -> Tensor:
    """The weight [M, K] of a linear layer, decoded where it is quantised."""
    if isinstance(layer, NF4Linear):
        return dequantize_nf4(layer.quantized(), dtype=_decoded(layer))
    if isinstance(layer, FP8Linear) and layer.recipe is None:
        return dequantize_fp8(layer.quantized(), dtype=_decoded(layer))
    return layer.weight.T if is_conv1d(layer) else layer.weight


def _decoded(layer: Any) -> torch.dtype:
    return torch.float32 if layer.dtype == torch.float64 else layer.dtype  # codes have no more to tell


class _DoRALinear(torch.autograd.Function):
    """y; A x_d; and the base, where the gradient of magnitude cannot be had from y, else nothing."""

    @staticmethod
    def forward(
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        gate: Tensor | None,
        dropout: float,
        keep_result: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows_of(x)
        seen = dropped(rows, seed, dropout)
        stretch, share = _factors(scale, magnitude, norm, gate, x)
        plain = rows_of(base_of(x, weight, None if weight is None else bias, base))
        down, up = F.linear(seen, a.to(x.dtype)), _up(b, share, x)
        # What is small comes first: in half precision the sum is rounded once as coarsely as the base is.
        if dropout and weight is not None:
            change = F.linear(seen, weight.to(x.dtype))
            y = add_scaled_(down @ up.T, change, stretch).add_(plain)
        else:
            y = down @ up.T if bias is None else torch.addmm((-stretch * bias).to(x.dtype), down, up.T)
            add_scaled_(y, plain, 1 + stretch)
        kept = x.new_empty(0) if base is not None or dropout or keep_result else plain
        return with_axes(y, x.shape[:-1]), down, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, a, b, scale, magnitude, norm, weight, bias, base, seed, gate, ctx.dropout, keep_result = inputs
        y, down, kept = output
        ctx.mark_non_differentiable(down, kept)
        ctx.set_materialize_grads(False)
        _, of_a, of_b, _, of_magnitude, _, of_weight, *_ = ctx.needs_input_grad
        recomputed = of_magnitude and bool(ctx.dropout)
        ctx.from_result = keep_result and not recomputed
        source = None if recomputed or not of_magnitude else y if keep_result else kept if base is None else base
        ctx.save_for_backward(
            *(a, b, scale, magnitude, norm, weight, bias, seed, gate),  # parameters, whatever is needed of them
            x if of_a or of_weight or recomputed else None,
            down if of_b or of_magnitude else None,
            source,
        )
        ctx.stars = x.shape[:-1]
        ctx.base_dtype = None if base is None else base.dtype

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 13
        a, b, scale, magnitude, norm, weight, bias, seed, gate, x, down, source = ctx.saved_tensors
        of_x, of_a, of_b, _, of_magnitude, _, of_weight, of_bias, of_base, *_ = ctx.needs_input_grad
        dy, dtype = rows_of(dy), dy.dtype
        stretch, share = _factors(scale, magnitude, norm, gate, dy)
        up = _up(b, share, dy)
        rows: Any = None if x is None else rows_of(x)
        seen: Any = None if x is None else dropped(rows, seed, ctx.dropout)
        dx: Any = None
        da = db = dmagnitude = dweight = dbias = dbase = None
        if of_b or of_magnitude:
            d_up = thin_product(dy, down)  # [M, R]
            db = (share[:, None] * d_up).to(b.dtype)
        if of_magnitude:
            # The gradient of g: sum_t dy W x_d, from what is kept, and sum_t dy scale B A x_d.
            if ctx.dropout:
                direct = column_products(dy, F.linear(seen, weight.to(dtype)))
            else:
                direct = column_products(dy, rows_of(source), bias)
            if ctx.from_result:
                direct = (direct - (up * d_up).sum(1)) / (1 + stretch)
            dg = direct + (scale * b * d_up).sum(1)
            dg = dg if gate is None else gate * dg
            dmagnitude = torch.where(norm != 0, dg / norm, 0).to(magnitude.dtype)
        if of_x or of_weight or of_base:
            through = scale_columns(dy, stretch if ctx.dropout else 1 + stretch)
        if of_x or of_a:
            d_down = dy @ up  # [T, R]
            da = (d_down.T @ seen).to(a.dtype) if of_a else None
        if of_x:
            dx = d_down @ a.to(dtype)
            if weight is not None:
                dx.addmm_(through, weight.to(dtype))
            if ctx.dropout:  # which is its own transpose
                dx = dropped(dx, seed, ctx.dropout).addmm_(dy, weight.to(dtype))
            dx = dx.view(*ctx.stars, dx.shape[-1])
        if of_weight:
            dweight = through.T @ seen
            dweight = (dweight.addmm_(dy.T, rows) if ctx.dropout else dweight).to(weight.dtype)
        if of_bias:
            dbias = dy.sum(0, dtype=stretch.dtype)
            dbias = (dbias if weight is not None else -stretch * dbias).to(bias.dtype)
        if of_base:
            dbase = through.view(*ctx.stars, through.shape[-1]).to(ctx.base_dtype)
        return dx, da, db, None, dmagnitude, None, dweight, dbias, dbase, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        each = [
            _DoRALinear.apply(*(v if dim is None else v.select(dim, i) for v, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g. A row of length 0 has no direction to be stretched in: it stays as it is."""
    there = norm != 0
    return torch.where(there, magnitude / torch.where(there, norm, 1), 1)


def _factors(
    scale: Tensor, magnitude: Tensor, norm: Tensor, gate: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """gate * (g - 1) and gate * g * scale, [M] each, in the dtype of sums."""
    g = _ratio(magnitude.to(wide(like)), norm)
    g, stretch = scale * g, g - 1
    return (stretch, g) if gate is None else (gate * stretch, gate * g)


def _up(b: Tensor, share: Tensor, like: Tensor) -> Tensor:
    """b [M, R] with each row multiplied by its share, in the dtype of products."""
    return (share[:, None] * b).to(like.dtype)


@Remembered
def _can_divide(magnitude: Tensor, norm: Tensor, *gate: Tensor) -> Tensor:
    """Whether every column is multiplied by at least 1/2: the base is had from y with at most twice the error of y."""
    stretch = _ratio(magnitude, norm) - 1
    return ((gate[0] * stretch if gate else stretch) >= -0.5).all()


def _counts(case: Case) -> tuple[int, int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"], sizes["R"]


def _flops(case: Case) -> float:
    T, K, M, R = _counts(case)
    products = 2 if "seed" in case.given else 1
    return 2 * T * (R * (K + M) + (products * K * M if "weight" in case.given else 0)) + 2 * T * M


def _traffic(case: Case) -> float:
    T, K, M, R = _counts(case)
    return T * (K + M) + R * (K + M) + (K * M if "weight" in case.given else T * M)


def _case(name: str, tokens: tuple[int, ...], K: int, M: int, R: int, *given: str, **rest: Any) -> Case:
    """A case with a dense layer unless given says base; dropout brings its seed."""
    given = given if "base" in given else ("weight", *given)
    options = {"dropout": rest.pop("dropout")} if "dropout" in rest else {}
    given = (*given, "seed") if options else given
    return Case(name, {"*N": tokens, "K": K, "M": M, "R": R}, options, given=given, **rest)


def _lengths(value: Tensor) -> Tensor:
    return 1 + value.tanh() / 4


def _constant_lengths(value: Tensor) -> Tensor:
    """Those of rows as they are: nobody asks for their gradient, and they are in float32 whatever the layer is in."""
    return _lengths(value).float()


def _some_tiny(value: Tensor) -> Tensor:
    """Lengths of zero, of a thousandth, negative ones, others."""
    place = torch.arange(len(value)) % 4
    return value * torch.tensor([0.0, 1e-3, -1.0, 1.0], dtype=value.dtype)[place]


def _some_zero(value: Tensor) -> Tensor:
    return torch.where(torch.arange(len(value)) % 3 == 0, 0.0, _constant_lengths(value))


def _number(value: Tensor) -> Tensor:
    return value.sigmoid().float()


_CASES = (
    _case("one", (1,), 1, 1, 1, "bias"),
    _case("no token", (0,), 8, 5, 2, "bias"),
    _case("no token, dropout", (0,), 8, 5, 2, "bias", dropout=0.1),
    _case("no feature out", (3,), 8, 0, 2),
    _case("no feature in", (3,), 0, 5, 2, "bias"),
    _case("rank 0", (5,), 33, 17, 0, "bias"),
    _case("no axis of tokens", (), 17, 13, 3, "bias"),
    _case("primes", (7, 3), 37, 67, 5, "bias"),
    _case("primes, dropout", (7, 3), 37, 67, 5, "bias", dropout=0.3),
    _case("bare", (65,), 64, 33, 8),
    _case("bare, dropout", (65,), 64, 33, 8, dropout=0.5),
    _case("beside a result", (19,), 33, 65, 4, "base"),
    _case("beside a result with bias", (19,), 33, 65, 4, "base", "bias"),
    _case("gate", (19,), 33, 65, 4, "bias", "gate"),
    _case("gate, dropout", (19,), 33, 65, 4, "bias", "gate", dropout=0.2),
    _case("tiny lengths", (29,), 33, 67, 4, "bias", draw={"magnitude": _some_tiny}),
    _case("tiny lengths beside a result", (29,), 33, 67, 4, "base", "bias", draw={"magnitude": _some_tiny}),
    _case("rows of zero length", (29,), 33, 67, 4, "bias", draw={"norm": _some_zero}),
    _case("large bias", (29,), 33, 67, 4, "bias", gain={"bias": 100.0}),
    _case("transposed", (3, 5), 33, 17, 4, "bias", layout="transposed"),
    _case("strided, dropout", (7, 5), 33, 17, 4, "bias", layout="strided", dropout=0.1),
    _case("several pieces", (1031,), 3, 131, 2, "bias"),
    _case("a layer", (2048,), 4096, 4096, 16, large=True),
    _case("a layer, dropout", (2048,), 4096, 4096, 16, dropout=0.1, large=True),
)
_BENCH = (
    _case("512 tokens, 1024 x 1024", (512,), 1024, 1024, 16),
    _case("512 tokens, 1024 x 1024, dropout", (512,), 1024, 1024, 16, dropout=0.1),
    _case("8k tokens, 4096 x 4096", (8192,), 4096, 4096, 16, large=True),
)

DORA_LINEAR = register(
    Op(
        name="dora_linear",
        area="peft",
        summary="linear layer with a low-rank update and trained lengths of the rows of the sum (DoRA)",
        paper="https://arxiv.org/abs/2402.09353",
        shapes=(
            "x [*N, K], a [R, K], b [M, R], scale [], magnitude [M], norm [M], weight [M, K]?, bias [M]?, "
            "base [*N, M]?, seed []?, gate []? -> y [*N, M]"
        ),
        function=dora_linear,
        reference=dora_linear_reference,
        torch=dora_linear_torch,
        cases=_CASES,
        bench=_BENCH,
        grads=("x", "a", "b", "magnitude", "weight", "bias", "base"),
        frozen=("weight", "bias"),
        flops=_flops,
        traffic=_traffic,
        draw={
            "scale": _number,
            "magnitude": _lengths,
            "norm": _constant_lengths,
            "seed": any_seed,
            "gate": _number,
        },
        rivals={"as written": "effkit.rivals:dora_as_written"},
    )
)
