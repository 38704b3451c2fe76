"""LoftQ: LoRA that starts by making up for what four bits have taken from the weight.

    minimise |W - Q - s B A|_F:   Q = quantised(W - s B A),   s B A = the R largest singular parts of W - Q,  T times
                                                                    Li et al., arXiv 2310.08659, algorithm 1

QLoRA starts from B = 0, which leaves the model with the whole error of quantisation. Here the adapter starts as the
best product of rank R for that error, and the quantised weight is fitted to what is left of W beside it.

The singular values are shared out as sqrt(S / s) to either factor, so that the start is what was minimised whatever
alpha / R is. The authors' code and peft leave s out; with alpha other than R they start from another point.

Cost: T quantisations and T partial decompositions a layer, once: ten passes over the matrix for 2 R + 8 columns each
(randomised, Halko et al., arXiv 0909.4061) instead of a full decomposition's K M min(K, M).

When not to use it: when the adapters are to be taken off or exchanged, since without them the base is further from W
than plain NF4 is. At four bits the error is small and mostly noise of full rank, of which rank R holds little; the
paper's gains are largest at two bits.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkit.change import Change, Changes, apply
from effkit.peft.dora import DoRA
from effkit.peft.engine import adapters_of
from effkit.peft.lora import LoRAConfig, generator_of
from effkit.peft.matching import find_targets, is_conv1d
from effkit.quant.config import NF4Config, plan
from effkit.quant.four_bit import Quantized4bit, dequantize_nf4, quantize_fp4, quantize_int4, quantize_nf4


class LoftQ(NamedTuple):
    """A weight [M, K] as quantised + scale b a, with a [R, K] and b [M, R] in float32."""

    quantized: Quantized4bit
    a: Tensor
    b: Tensor

    def weight(self, scale: float) -> Tensor:
        """The sum of both, in float32."""
        return dequantize_nf4(self.quantized, dtype=torch.float32) + scale * (self.b @ self.a)


def loftq_factors_reference(
    weight: Tensor,
    rank: int,
    *,
    scale: float = 1.0,
    steps: int = 5,
    block_size: int = 64,
    double_quant: bool = False,
    quant_type: str = "nf4",
) -> LoftQ:
    """The algorithm, with full decompositions."""
    a, b = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    for _ in range(steps):
        q = _QUANTIZE[quant_type](weight - scale * b @ a, block_size, double_quant)
        u, s, v = torch.linalg.svd(weight - dequantize_nf4(q))
        root = (s[:rank] / scale).sqrt()
        a, b = root[:, None] * v[:rank], u[:, :rank] * root
    return LoftQ(q, a, b)


@torch.no_grad()
def loftq_factors(
    weight: Tensor,
    rank: int,
    *,
    scale: float = 1.0,
    steps: int = 5,
    block_size: int = 64,
    double_quant: bool = False,
    quant_type: str = "nf4",
    generator: torch.Generator | None = None,
) -> LoftQ:
    """A weight as one in four bits plus a product of two thin factors.

        weight ~ quantized + scale b a        arXiv 2310.08659, algorithm 1

    weight [M, K]                          float32, float16 or bfloat16
    rank                                   R, from 0 to min(M, K)
    scale                                  what the adapter multiplies its product by, alpha / R; anything but 0
    steps                                  how often both parts are fitted to each other; 1 fits each once
    block_size, double_quant, quant_type   of the four bits: see `NF4Config`
    generator                              on the CPU, for the randomised decomposition; None draws the same each time

    Returns the quantised part and a [R, K], b [M, R] in float32. Raises ValueError for arguments that do not fit.
    """
    _check(weight, rank, scale, steps, quant_type)
    generator = generator or torch.Generator().manual_seed(0)
    target = weight.detach().float()
    a, b = target.new_zeros(rank, target.shape[1]), target.new_zeros(target.shape[0], rank)
    for _ in range(steps):
        quantized = _QUANTIZE[quant_type](target - scale * (b @ a), block_size, double_quant)
        u, s, v = largest_parts(target - dequantize_nf4(quantized), rank, generator)
        root = (s / abs(scale)).sqrt()
        a, b = root[:, None] * v, u * (math.copysign(1, scale) * root)
    return LoftQ(quantized, a, b)


def apply_loftq(model: nn.Module, quantization: NF4Config, adapter: LoRAConfig, *, steps: int = 5) -> Changes:
    """QLoRA with the start of LoftQ: effkit.apply(model, quantization, adapter) with codes and factors that fit.

    steps    as in `loftq_factors`; the factors are drawn from the adapter's seed

    Layers that get an adapter but are not quantised keep the usual start. Returns both changes, whose undo() gives the
    model back; saving, merging and files are as after that apply. Raises ValueError where no layer gets both, and as
    apply does; the model then is as before.
    """
    for name, value, kind in (("quantization", quantization, NF4Config), ("adapter", adapter, LoRAConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"apply_loftq: {name} is {value!r}, expected an instance of {kind.__name__}")
    targets = find_targets(model, adapter, adapter.usual_targets)
    quantized = plan(model, quantization).layers
    both = [path for path in targets if path in quantized]
    if not both:
        raise ValueError(
            f"apply_loftq: no layer is both quantised and a target; targets are {list(targets)[:8]}, quantised are "
            f"{list(quantized)[:8]}"
        )
    # All is computed before anything is changed.
    fitted = {path: _fit(path, targets[path], quantized[path], adapter, steps) for path in both}
    changes: Any = apply(model, quantization, adapter)
    parts = adapters_of(model, adapter.name)
    with torch.no_grad():
        for path, (found, _) in fitted.items():
            layer: Any = model.get_submodule(path)
            layer.store_(found.quantized)
            parts[path].lora_A.copy_(found.a)
            parts[path].lora_B.copy_(found.b)
            if isinstance(parts[path], DoRA):
                parts[path].measure(layer)
    _report(changes.changes[0], changes.changes[1], fitted)
    return changes


def largest_parts(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, R], S [R], V [R, K] of the largest singular values of a matrix [M, K], by random projections.

    The error of quantisation is close to noise, whose singular values fall slowly: twice the columns asked for and four
    passes over the matrix and back find the space of the largest all the same.
    """
    width = 2 * rank + 8
    if width >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(4):
        basis = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], v[:rank]


def _report(quantization: Change, adapter: Change, fitted: dict[str, tuple[LoftQ, float]]) -> None:
    """Corrects what the changes tell: the codes of these layers stand for W together with the factors, not alone."""
    edit: Any = quantization.edit
    edit.notes.pop("SQNR", None)
    for path in fitted:
        edit.sqnr_db.pop(f"{path}.weight", None)
    errors = {path: error for path, (_, error) in fitted.items()}
    worst = max(errors, key=lambda path: errors[path])
    adapter.edit.notes["LoftQ"] = (
        f"|W - Q - s B A| / |W| of {len(errors)} layers: {statistics.median(errors.values()):.4f} in the middle, "
        f"{errors[worst]:.4f} in {worst}"
    )


def _fit(path: str, layer: Any, quantization: Any, adapter: LoRAConfig, steps: int) -> tuple[LoftQ, float]:
    """What a layer is to hold, and its error against the norm of the weight."""
    weight = (layer.weight.T if is_conv1d(layer) else layer.weight).detach()
    scale = adapter.scale_of(path)
    found = loftq_factors(
        weight,
        adapter.rank_of(path),
        scale=scale,
        steps=steps,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        quant_type=quantization.quant_type,
        generator=generator_of(adapter.seed, path),
    )
    return found, float((weight - found.weight(scale)).norm() / weight.float().norm())


def _check(weight: Tensor, rank: int, scale: float, steps: int, quant_type: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"loftq_factors: weight has shape {list(weight.shape)} of {weight.dtype}, expected floats [M, K]"
        )
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"loftq_factors: rank is {rank}, expected 0 to {min(weight.shape)} for {list(weight.shape)}")
    if not math.isfinite(scale) or (scale == 0 and rank):
        raise ValueError(f"loftq_factors: scale is {scale}, expected a finite number other than 0")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"loftq_factors: steps is {steps!r}, expected an integer of at least 1")
    if quant_type not in _QUANTIZE:
        raise ValueError(f"loftq_factors: quant_type is {quant_type!r}, choices: {', '.join(map(repr, _QUANTIZE))}")


_QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4, "int4": quantize_int4}
