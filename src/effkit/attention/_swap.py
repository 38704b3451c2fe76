"""The common part of the configs that put a technique with a state into a trained model (`effkit.hf.recurrent`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from effkit.change import ChangeConfig


@dataclass(frozen=True)
class RecurrentConfig(ChangeConfig):
    """Which attention layers of a HuggingFace model to replace: by number from 0, negative ones from the end, or all.

    backend is that of the op. Projections, norms of queries and keys and the rotary embedding stay those of the
    replaced layer, the same parameters; what is new, and what it starts from, is said by each config.
    """

    layers: tuple[int, ...] | None = None
    backend: str | None = None
    handler: ClassVar[str] = "effkit.hf.recurrent:swap_attention"

    def __post_init__(self) -> None:
        name = type(self).__name__
        numbers = isinstance(self.layers, tuple) and self.layers and all(type(layer) is int for layer in self.layers)
        if self.layers is not None and not numbers:
            raise ValueError(f"{name}: layers is {self.layers!r}, expected None or a tuple of layer numbers")
        if self.backend not in (None, "reference", "torch", "triton"):
            raise ValueError(f"{name}: backend is {self.backend!r}, choices: None, 'reference', 'torch', 'triton'")


@dataclass(frozen=True)
class DecayingConfig(RecurrentConfig):
    """With memories that decay: half_lives, in tokens, of the first head and of the last, the others spread between."""

    half_lives: tuple[float, float] = (1.0, 512.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        lives = self.half_lives
        if not isinstance(lives, tuple) or len(lives) != 2 or not all(_is_positive(tokens) for tokens in lives):
            raise ValueError(f"{type(self).__name__}: half_lives is {lives!r}, expected two numbers of tokens above 0")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
