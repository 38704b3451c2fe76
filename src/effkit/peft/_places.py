"""Where an adapter would do nothing, or something wrong: the checks before one comes into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from effkit.peft.adapter import Adapted, Adapter, TrainedCopy
from effkit.peft.matching import first_match


def refuse_sharded(model: nn.Module, what: str, choices: str) -> None:
    """RuntimeError where parameters are in parts, on several processes."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise RuntimeError(f"{what}: {name} is sharded over several processes; choices: {choices}")


def warn_of_patterns(config: Any, layers: Iterable[str]) -> None:
    """Patterns of ranks and alphas that fit no layer are mostly slips; files may have some all the same."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name, ()):
            if not any(first_match({key: True}, path, False) for path in layers):
                warnings.warn(f"{type(config).__name__}: {name} has {key!r}, which fits no target", stacklevel=5)


def refuse_parallel(model: nn.Module, what: str) -> None:
    """DistributedDataParallel shares the gradients of those parameters alone that it found when it was made."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            f"{what}: the model is in DistributedDataParallel, which would not share gradients of new parameters; "
            "apply to the model itself, before that is made"
        )


def check_places(model: nn.Module, made: dict[str, Adapter]) -> None:
    """Raises for layers whose class cannot be made an adapted one."""
    for path, adapter in made.items():
        layer = model.get_submodule(path)
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{path}: its forward was replaced on the object itself (as by accelerate's hooks), so that an adapter "
                "would never be called; apply the config before that is done"
            )
        taken = [] if isinstance(layer, Adapted) else sorted(name for name in _NAMES if hasattr(layer, name))
        if taken:
            raise ValueError(f"{path}: {type(layer).__name__} has an attribute {taken[0]!r} of its own")
        _check_called(model, path)
        plain = layer.plain if isinstance(layer, Adapted) else type(layer)
        looks_up = plain.forward is nn.Embedding.forward or getattr(layer, "embed_scale", None) is not None
        if isinstance(layer, nn.Embedding) and not looks_up and not isinstance(adapter, TrainedCopy):
            raise TypeError(f"{path}: {plain.__name__} finds its rows in its own way, expected nn.Embedding")


def _check_called(model: nn.Module, path: str) -> None:
    """Raises for layers whose weights others read without calling them."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"{path}: nn.MultiheadAttention reads the weights of {path.rpartition('.')[2]} and never calls it, so that "
            "an adapter would do nothing; choices: leave it out by exclude_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"{path}: in inference nn.TransformerEncoderLayer reads the weights of its layers and never calls them, so "
            "that an adapter would do nothing; choices: torch.backends.mha.set_fastpath_enabled(False) before this, "
            "and for as long as there are adapters"
        )


# What layers with adapters have besides their own.
_NAMES = {"plain", "matrix", "adapters", "rows", "siblings", "used", "base", "dense_form"}
