"""Training with FP8 products: codes of e4m3 in the forward pass, e5m2 or e4m3 for gradients, a master weight beside.

    y = Q4(x) Q4(W)^T + b,    dx = Q5(dy) Q4(W),    dW = Q5(dy)^T Q4(x),    db = sum dy
                               Micikevicius et al., arXiv 2209.05433; delayed scales as in Transformer Engine

Q4 and Q5 quantise to e4m3 and e5m2. Each product sums along another axis. One scale for a tensor serves all of them;
scales of rows or blocks run along the axis that is summed, so that x, dy and W are quantised once for each product.
What is kept for the backward pass is Q4(x), one byte an element, and the weight itself, which is there anyway.

Delayed scaling (Transformer Engine's, per tensor) takes its scale from the steps before, so that a tensor need not be
read twice:    s = max(history of max |x|) 2^margin / fmax,    anew after each step of the optimizer.

Cost: three FP8 products instead of three in bfloat16, and quantising x, W and dy in each pass.

When not to use it: below some thousand rows or columns quantising costs more than FP8 products save. The first and last
layers, embeddings and the head are better left alone. One scale for a tensor fails late in training, when SwiGLU grows
single channels (arXiv 2409.12517: see `smooth_swiglu`); a delayed scale lags behind a sudden growth, and saturates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkit.quant.fp8 import FORMATS, GRANULARITIES, encode_fp8, fp8_scale
from effkit.quant.fp8_matmul import BLOCK, matmul_fp8

AMAX_ALGORITHMS = ("max", "most_recent")


@dataclass(frozen=True)
class FP8Recipe:
    """How FP8Linear trains.

    granularity              what shares a scale: "tensor", "row", or "block" (1 x 128; 128 x 128 of the weight)
    gradient_format          of dy, "e5m2" or "e4m3"; x and W are e4m3
    power_of_two             round scales up to a power of two: quantising along either axis then gives the same codes
                             apart from those that become subnormal
    precise_weight_gradient  compute dW from x and dy as they are, and keep x instead of its codes
    amax_history             None takes the scale of a tensor from itself; a number of steps makes it delayed
    amax_algorithm           of delayed scales: "max" of the history, or the "most_recent" step
    margin                   of delayed scales: binades that are kept free
    """

    granularity: str = "tensor"
    gradient_format: str = "e5m2"
    power_of_two: bool = False
    precise_weight_gradient: bool = False
    amax_history: int | None = None
    amax_algorithm: str = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("granularity", GRANULARITIES),
            ("gradient_format", tuple(FORMATS)),
            ("amax_algorithm", AMAX_ALGORITHMS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, choices: {', '.join(map(repr, choices))}")
        if not isinstance(self.margin, int):
            raise ValueError(f"margin is {self.margin!r}, expected an integer")
        if self.amax_history is None:
            return
        if not isinstance(self.amax_history, int) or self.amax_history < 1:
            raise ValueError(f"amax_history is {self.amax_history!r}, expected None or a number of steps from 1 on")
        if self.granularity != "tensor":
            raise ValueError(
                f"amax_history is {self.amax_history}, but granularity is {self.granularity!r}: delayed "
                "scales are of tensors"
            )


RECIPES = {
    "tensorwise": FP8Recipe(),
    "rowwise": FP8Recipe("row", "e4m3", power_of_two=True),
    "rowwise_with_gw_hp": FP8Recipe("row", "e4m3", power_of_two=True, precise_weight_gradient=True),
    "blockwise": FP8Recipe("block", "e4m3", power_of_two=True),
    "delayed": FP8Recipe(amax_history=1024),
}


def recipe_of(recipe: FP8Recipe | str) -> FP8Recipe:
    """A recipe, or that of a name in RECIPES."""
    if isinstance(recipe, FP8Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, choices: {', '.join(map(repr, RECIPES))}, or an FP8Recipe")
    return RECIPES[recipe]


class DelayedScaling(nn.Module):
    """Scales of x, W and dy of one layer, from the largest magnitudes of its last steps.

    scale              float32 [3]: of x, W and dy; it multiplies on decoding and starts from 1
    input_amax         float32 [amax_history]: slot 0 is the step that is going on; those before it follow, oldest first
    weight_amax, gradient_amax    likewise

    Buffers, and never cast. A pass only raises slot 0: one that is repeated (activation checkpointing) or is one of
    several in a step (accumulated gradients) leaves what is due. `update` ends the step.
    """

    scale: Tensor
    input_amax: Tensor
    weight_amax: Tensor
    gradient_amax: Tensor

    def __init__(self, recipe: FP8Recipe, device: torch.device | str | None = None) -> None:
        super().__init__()
        if recipe.amax_history is None:
            raise ValueError(f"DelayedScaling: {recipe} has no amax_history")
        self.recipe = recipe
        self.register_buffer("scale", torch.empty(3, device=device, dtype=torch.float32))
        for name in ("input_amax", "weight_amax", "gradient_amax"):
            self.register_buffer(name, torch.empty(recipe.amax_history, device=device, dtype=torch.float32))
        self.reset_parameters()

    def histories(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of x, W and dy."""
        return self.input_amax, self.weight_amax, self.gradient_amax

    def reset_parameters(self) -> None:
        """As before the first step."""
        self.scale.fill_(1)
        for history in self.histories():
            history.zero_()

    @torch.no_grad()
    def update(self) -> None:
        """Ends a step: new scales from the histories, which make room for the next step.

        A maximum that is 0, infinite or NaN leaves its scale as it is, for as long as it is in the history.
        """
        formats = "e4m3", "e4m3", self.recipe.gradient_format
        for i, (history, format) in enumerate(zip(self.histories(), formats, strict=True)):
            amax = history.amax() if self.recipe.amax_algorithm == "max" else history[0]
            new = fp8_scale(amax * 2.0**self.recipe.margin, format, power_of_two=self.recipe.power_of_two)
            self.scale[i].copy_(torch.where((amax > 0) & amax.isfinite(), new, self.scale[i]))
            history.copy_(history.roll(-1))
            history[0].zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> DelayedScaling:
        """Moves, but casts nothing."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def update_fp8_scales(model: nn.Module) -> None:
    """Ends a step for all delayed scales in a model: call it once after each step of the optimizer.

    When processes share the work, `synchronize_amax` comes first, so that their scales stay equal.
    """
    for module in model.modules():
        if isinstance(module, DelayedScaling):
            module.update()


@torch.no_grad()
def synchronize_amax(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
    """The maxima of this step over all processes, in one all-reduce; call it before `update_fp8_scales`."""
    histories = [h for module in model.modules() if isinstance(module, DelayedScaling) for h in module.histories()]
    if histories:
        largest = torch.stack([history[0] for history in histories])
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        for history, amax in zip(histories, largest, strict=True):
            history[0].copy_(amax)


def training_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, recipe: FP8Recipe, delayed: DelayedScaling | None = None
) -> Tensor:
    """x [*N, K] W [M, K]^T + bias in x's dtype, with products in FP8 in both passes.

    delayed holds the scales of a delayed recipe. Maxima are recorded while it is in training mode.
    """
    scale = gradient_amax = None
    if delayed is not None:
        scale = delayed.scale
        gradient_amax = delayed.gradient_amax if delayed.training else None
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    keep = torch.is_grad_enabled() and weight.requires_grad
    y = _TrainingLinear.apply(rows, weight, bias, scale, gradient_amax, recipe, keep)[0]
    if delayed is not None and delayed.training:  # not before: a pass that fails leaves no trace
        raise_amax(delayed.input_amax, x)
        raise_amax(delayed.weight_amax, weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def raise_amax(history: Tensor, x: Tensor) -> None:
    """The largest magnitude of this step, in slot 0, is at least that of x; NaN stays NaN."""
    if x.numel():
        history[0].copy_(torch.maximum(history[0], x.detach().abs().amax().float()))


class _Codes(NamedTuple):
    """A matrix [rows, summed] in FP8."""

    codes: Tensor
    scale: Tensor
    format: str

    @property
    def mT(self) -> _Codes:
        """Transposed. Scales of rows or of 1 x 128 would then run along the wrong axis: not for those."""
        return _Codes(self.codes.mT, self.scale.mT if self.scale.ndim else self.scale, self.format)


def _multiply(a: _Codes, b: _Codes, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    return matmul_fp8(a.codes, a.scale, b.codes, b.scale, bias, a_format=a.format, b_format=b.format, dtype=dtype)


def _encode(x: Tensor, recipe: FP8Recipe, format: str = "e4m3", scale: Tensor | None = None) -> _Codes:
    """Activations or their gradients [rows, summed]."""
    block = (1, BLOCK) if recipe.granularity == "block" else None
    power_of_two = recipe.power_of_two and scale is None
    codes, scale = encode_fp8(
        x, scale, granularity=recipe.granularity, format=format, block=block, power_of_two=power_of_two
    )
    return _Codes(codes, scale, format)


def _encode_weight(weight: Tensor, recipe: FP8Recipe, scale: Tensor | None) -> _Codes:
    """A weight [rows, summed], with blocks of 128 x 128, which can be transposed."""
    power_of_two = recipe.power_of_two and scale is None
    codes, scale = encode_fp8(weight, scale, granularity=recipe.granularity, power_of_two=power_of_two)
    return _Codes(codes, scale, "e4m3")


def _along_rows(x: Tensor, recipe: FP8Recipe, by_rows: _Codes) -> _Codes:
    """x^T for a product that sums over its rows: the codes there are, where one scale serves both, else new ones."""
    return by_rows.mT if recipe.granularity == "tensor" else _encode(x.mT, recipe, by_rows.format)


class _TrainingLinear(torch.autograd.Function):
    """Returns y, and what it keeps of x: with as many bytes as elements, or x itself for a precise dW."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        gradient_amax: Tensor | None,
        recipe: FP8Recipe,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_scale, w_scale = (None, None) if scale is None else (scale[0], scale[1])
        by_rows = _encode(x, recipe, scale=x_scale)
        y = _multiply(by_rows, _encode_weight(weight, recipe, w_scale), x.dtype, bias)
        if recipe.precise_weight_gradient or not keep:
            return y, None, None
        kept = _along_rows(x, recipe, by_rows)
        return y, kept.codes, kept.scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        x, weight, bias, scale, ctx.gradient_amax, ctx.recipe, _ = inputs
        ctx.mark_non_differentiable(*(kept for kept in output[1:] if kept is not None))
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.recipe.precise_weight_gradient else None, weight, scale, *output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, scale, codes, codes_scale = ctx.saved_tensors
        recipe: FP8Recipe = ctx.recipe
        if ctx.gradient_amax is not None:
            raise_amax(ctx.gradient_amax, dy)
        dx = dweight = dbias = None
        by_rows = _encode(dy, recipe, recipe.gradient_format, None if scale is None else scale[2])
        if ctx.needs_input_grad[0]:
            w_scale = None if scale is None else scale[1]
            if recipe.granularity == "row":
                w = _encode_weight(weight.mT, recipe, w_scale)
            else:
                w = _encode_weight(weight, recipe, w_scale).mT
            dx = _multiply(by_rows, w, dy.dtype)
        if ctx.needs_input_grad[1] and recipe.precise_weight_gradient:
            dweight = (dy.mT @ x).to(weight.dtype)
        elif ctx.needs_input_grad[1]:
            dweight = _multiply(_along_rows(dy, recipe, by_rows), _Codes(codes, codes_scale, "e4m3"), weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None, None
