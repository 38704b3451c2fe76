"""What the linear ops of this area ask of their arguments alike."""

from __future__ import annotations

import torch
from torch import Tensor

from effkit.ops import Op
from effkit.quant.nf4_linear import as_autocast

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def checked(
    op: Op, tensors: dict[str, Tensor | None], dropout: float = 0.0, *, bias_of_base: bool = False
) -> dict[str, Tensor | None]:
    """The tensors of x W^T + bias or base and an adapter, x as autocast has it; raises where they do not fit.

    Either weight or base is given, bias only beside weight unless bias_of_base, and a seed where there is dropout.
    scale and gate are factors without a gradient.
    """
    op.check(**tensors)
    x = tensors["x"]
    for name, tensor in tensors.items():
        if tensor is None or x is None:
            continue
        choices = INTEGERS if name == "seed" else FLOATS
        if tensor.dtype not in choices:
            raise TypeError(f"{op.name}: {name} has dtype {tensor.dtype}, choices: {', '.join(map(str, choices))}")
        if tensor.device != x.device:
            raise ValueError(f"{op.name}: {name} is on {tensor.device}, expected {x.device} as x")
        if name in ("scale", "gate") and tensor.requires_grad:
            raise ValueError(f"{op.name}: {name} asks for a gradient, which it does not get: pass {name}.detach()")
    _check_base(op, tensors, bias_of_base)
    if not 0 <= dropout < 1:
        raise ValueError(f"{op.name}: dropout is {dropout!r}, expected a probability in [0, 1)")
    if dropout and tensors["seed"] is None:
        raise ValueError(f"{op.name}: dropout is {dropout!r} and seed None, expected an integer tensor [] with it")
    return {**tensors, "x": None if x is None else as_autocast(x)}


def _check_base(op: Op, tensors: dict[str, Tensor | None], bias_of_base: bool) -> None:
    weight, bias, base = (tensors[name] is not None for name in ("weight", "bias", "base"))
    if weight == base:
        raise ValueError(f"{op.name}: weight and base are {'both' if weight else 'not'} given, expected one of them")
    if bias and base and not bias_of_base:
        raise ValueError(f"{op.name}: bias is given beside base, expected it to be in base, or beside weight")
