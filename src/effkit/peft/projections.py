"""Several LoRA layers of one input (q, k, v; gate, up) in one pass.

    y_i = x W_i^T + bias_i + scale_i (x A_i^T) B_i^T        dx = sum_i dy_i W_i + dS_i A_i

The way down is one product with all A_i below each other, x is read once for it, and dx is summed where it lies, where
separate layers leave two more additions of its size to autograd. Saved are x, once, and all S_i = scale_i x A_i^T.

In a model `Siblings` does this for layers of one parent whose names say that they share an input: the first that is
called computes the others' results as well, which these hand out when they are called with the very same tensor. Should
they not be, the siblings go separate ways from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit import ops
from effkit.peft.low_rank import (
    LORA_LINEAR,
    lora_linear_reference,
    lora_linear_torch,
    outside_autocast,
    rows_of,
    with_axes,
)
from effkit.quant.nf4_linear import as_autocast

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def lora_projections(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """`lora_linear` of one x for each of several layers, without dropout.

        y_i = x W_i^T + bias_i + scale_i (x a_i^T) b_i^T

    x [*N, K]          any float dtype
    a [R_i, K] each    lora_A
    b [M_i, R_i] each  lora_B
    scale [] each      without a gradient
    weight [M_i, K] each, bias [M_i] or None each

    Returns y_i [*N, M_i] in x's dtype, or that of torch.autocast. Gradients flow to x and to every a, b, weight and
    bias that asks for one. Raises ValueError where the sequences differ in length.
    """
    lengths = {name: len(part) for name, part in dict(a=a, b=b, scale=scale, weight=weight, bias=bias).items()}
    if len(set(lengths.values())) != 1 or not a:
        raise ValueError(f"lora_projections: {lengths} layers, expected the same number of each, at least 1")
    x = as_autocast(x)
    if torch.compiler.is_compiling():
        return tuple(lora_linear_reference(x, *layer) for layer in zip(a, b, scale, weight, bias, strict=True))
    if torch._C._are_functorch_transforms_active():  # which know the rules of a single layer
        return tuple(lora_linear_torch(x, *layer) for layer in zip(a, b, scale, weight, bias, strict=True))
    # Where there is no graph a Function takes longer than a small layer, as in decoding.
    compute = _Projections.apply if torch.is_grad_enabled() else _Projections.forward
    return compute(len(a), x, *a, *b, *scale, *weight, *bias)[: len(a)]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(count: int, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        a, b, scale, weight, bias = _groups(count, tensors)
        rows = rows_of(x)
        down = (rows @ _stacked(a, x.dtype).T).mul_(_columns(scale, a))
        results = []
        for part, up, matrix, shift in zip(_parts(down, a), b, weight, bias, strict=True):
            y = F.linear(rows, matrix.to(x.dtype), None if shift is None else shift.to(x.dtype))
            results.append(with_axes(y.addmm_(part, up.to(x.dtype).T), x.shape[:-1]))
        return (*results, down)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        count, x, *tensors = inputs
        a, b, scale, weight, _ = _groups(count, tensors)
        of_a, of_b, _, of_weight, _ = (any(part) for part in _groups(count, ctx.needs_input_grad[2:]))
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if of_a or of_weight else None,
            output[-1] if of_b else None,
            *(*a, *b, *scale),
            *(weight if ctx.needs_input_grad[1] else [None] * count),
        )
        ctx.count, ctx.stars = count, x.shape[:-1]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down, *saved = ctx.saved_tensors
        count, none = ctx.count, [None] * ctx.count
        a, b, scale, weight, _ = _groups(count, (*saved, *none))
        of_a, of_b, _, of_weight, of_bias = _groups(count, ctx.needs_input_grad[2:])
        dy: Any = [None if gradient is None else rows_of(gradient) for gradient in gradients[:count]]
        if all(gradient is None for gradient in dy):
            return (None,) * (2 + 5 * count)
        rows: Any = None if x is None else rows_of(x)
        d_down = _d_down(dy, a, b).mul_(_columns(scale, a))
        db = [None if g is None or not of else g.T @ s for g, of, s in zip(dy, of_b, _parts(down, a), strict=True)]
        da = (d_down.T @ rows).split([len(part) for part in a]) if any(of_a) else none
        dx: Any = None
        if ctx.needs_input_grad[1]:
            dx = d_down @ _stacked(a, d_down.dtype)
            for gradient, matrix in zip(dy, weight, strict=True):
                dx = dx if gradient is None else dx.addmm_(gradient, matrix.to(gradient.dtype))
            dx = dx.view(*ctx.stars, dx.shape[1])
        wide = torch.float64 if d_down.dtype == torch.float64 else torch.float32
        d_weight = [None if g is None or not of else g.T @ rows for g, of in zip(dy, of_weight, strict=True)]
        d_bias = [None if g is None or not of else g.sum(0, dtype=wide) for g, of in zip(dy, of_bias, strict=True)]
        found = (*da, *db, *none, *d_weight, *d_bias)
        asked = ctx.needs_input_grad[2:]
        own = [
            g.to(kind) if of and g is not None else None for g, of, kind in zip(found, asked, ctx.dtypes, strict=True)
        ]
        return (None, dx, *own)


def _d_down(dy: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The gradients of all S_i beside each other, [T, sum of R_i]; zero where a result was not used."""
    given = next(gradient for gradient in dy if gradient is not None)
    d_down = given.new_zeros(len(given), sum(map(len, a)))
    for part, gradient, up in zip(_parts(d_down, a), dy, b, strict=True):
        if gradient is not None:
            part.copy_(gradient @ up.to(gradient.dtype))
    return d_down


def _stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in a])


def _parts(columns: Tensor | None, a: Sequence[Tensor]) -> Sequence[Any]:
    """The columns [T, sum of R_i] of each layer."""
    return [None] * len(a) if columns is None else columns.split([len(part) for part in a], 1)


def _groups(count: int, tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """What belongs together: all a, all b, all scale, all weight, all bias."""
    return [tensors[start : start + count] for start in range(0, 5 * count, count)]


def _columns(scale: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
    """The scale of every column of S."""
    return torch.cat([value.expand(len(part)) for value, part in zip(scale, a, strict=True)])


class Siblings:
    """Adapted layers that are called with one input after each other, and the results of those still to be called."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers, self.together, self._left_over = tuple(layers), True, 0
        self._held = _NOTHING  # in one piece: another thread that calls the layers replaces it, and changes none

    def result(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result if it can be had together with that of its siblings, else None."""
        if layer not in self.layers:  # a copy that others made of a layer, as DataParallel does
            return None
        state, (held, held_state, results) = _state_of(x), self._held
        kept = results.pop(id(layer), None)
        if kept is not None:
            if held is x and held_state == state:
                if not results:
                    self._left_over, self._held = 0, _NOTHING
                if _same_parts(kept[1], _parts_of(layer)):
                    return kept[0]
            else:
                self.together = False  # called with something else than its siblings
        elif results:  # twice in a row: there are siblings that are never called; once may be an interruption
            self._left_over += 1
            self.together = self._left_over < 2
        self._held = _NOTHING
        parts = [_shareable(sibling) for sibling in self.layers] if self.together else [None]
        if None in parts or ops.asked_for() not in (None, "torch"):
            return None
        made = lora_projections(x, *zip(*parts, strict=True))
        reason = f"one pass for {len(made)} layers with the same input"
        for _ in made:
            ops.record(ops.Choice(LORA_LINEAR.name, "torch", reason))
        results = {id(one): (y, _parts_of(one)) for one, y in zip(self.layers, made, strict=True)}
        y, _ = results.pop(id(layer))
        self._held = x, state, results
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no results."""
        return {**self.__dict__, "_held": _NOTHING}


_NOTHING: tuple[Any, tuple[Any, ...], dict[int, Any]] = (None, (), {})


def link(model: nn.Module, layers: Sequence[Any]) -> None:
    """Makes siblings of those of the layers that have one parent and the names of a group."""
    mine = {id(layer) for layer in layers}
    for layer in layers:
        layer.siblings = None
    for module in model.modules():
        children = dict(module.named_children())
        for group in GROUPS:
            found: list[Any] = [children[name] for name in group if id(children.get(name)) in mine]
            if len(found) > 1:
                together = Siblings(found)
                for layer in found:
                    layer.siblings = together


def _shareable(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None:
    """(a, b, scale, weight, bias) of a layer that is dense and has one plain LoRA that is on, else None."""
    dense, used = layer.dense_form(), layer.used()
    if dense is None or len(used) != 1 or layer.rows is not None:
        return None
    factors = used[0].plain_factors()
    if factors is None or type(dense[0]) not in (Tensor, nn.Parameter):  # FSDP's shards are gathered layer by layer
        return None
    return (*factors, *dense)


def _parts_of(layer: Any) -> list[tuple[Tensor, int | None]] | None:
    """The tensors that a layer's result is computed from and their versions; None where it is not shareable."""
    parts = _shareable(layer)
    tensors = [] if parts is None else [t for t in (*parts[:3], layer.weight, layer.bias) if t is not None]
    return None if parts is None else [(t, None if t.is_inference() else t._version) for t in tensors]


def _same_parts(old: Any, new: Any) -> bool:
    """Whether they are the same tensors and hold what they held."""
    return new is not None and all(a is b and v == w for (a, v), (b, w) in zip(old, new, strict=True))


def _state_of(x: Tensor) -> tuple[Any, ...]:
    """What may not change between the calls of siblings besides x itself."""
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
