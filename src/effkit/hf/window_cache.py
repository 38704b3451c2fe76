"""A cache layer that holds no more than a window can see, and attention over what it has kept.

transformers makes its masks for all tokens, and goes on doing so: a `WindowLayer` counts the tokens that it has seen.
Where it has forgotten some, `fit` tells what is left of the mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from effkit.attention.sliding_window import SlidingWindowConfig, sliding_window_attention
from effkit.hf.mask import MaskSpec


class WindowLayer(DynamicLayer):
    """A layer of a cache that keeps the first `prefix` tokens and the last window - 1, all that a next one can see."""

    def __init__(self, window: int, prefix: int) -> None:
        super().__init__()
        self.window, self.prefix = window, prefix
        self.cumulative_length = 0

    @staticmethod
    def after(layer: DynamicLayer, window: int, prefix: int) -> WindowLayer:
        """The layer with what it still needs of another one's tokens."""
        new = WindowLayer(window, prefix)
        if layer.is_initialized and layer.keys is not None and layer.values is not None and layer.keys.numel():
            new.update(layer.keys, layer.values)
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, returns all that is there, forgets what the next token cannot see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (self._keep(x) for x in seen)
        return seen

    def get_seq_length(self) -> int:
        """Tokens seen so far: positions and masks go by them."""
        return self.cumulative_length

    def crop(self, *args: Any, **kwargs: Any) -> None:
        held = 0 if self.keys is None else self.keys.shape[-2]
        if held < self.cumulative_length:
            raise RuntimeError(
                f"crop: of {self.cumulative_length} tokens the cache has forgotten all but {held}, which a window of "
                f"{self.window} needs no longer; it cannot go back. choices: cache_implementation='static'"
            )
        super().crop(*args, **kwargs)
        self.cumulative_length = 0 if self.keys is None else self.keys.shape[-2]

    def _keep(self, x: Tensor) -> Tensor:
        recent = max(self.prefix, x.shape[-2] - self.window + 1)
        if recent == self.prefix:
            return x
        return torch.cat((x[..., : self.prefix, :], x[..., recent:, :]), dim=-2)  # a view would keep a prompt alive


def fit(mask: MaskSpec, keys: int, sink_tokens: int) -> MaskSpec:
    """The mask for the keys that a WindowLayer has kept, counted from the first of them.

    With sink tokens it keeps all rows' first tokens, however much padding is before them: starts stay what they are.
    Between them and the last tokens lie only keys that no query sees any more.
    """
    gone = mask.shape[3] - keys
    if gone <= 0:
        return mask
    if mask.visible is not None:
        return dataclasses.replace(mask, shape=(*mask.shape[:3], keys), visible=mask.visible[..., gone:])
    lengths = None if mask.key_lengths is None else (mask.key_lengths - gone).clamp_min(0)
    starts = mask.key_starts
    if starts is not None and not sink_tokens:
        starts = (starts - gone).clamp_min(0)
    return dataclasses.replace(mask, shape=(*mask.shape[:3], keys), key_starts=starts, key_lengths=lengths)


def attend_in_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskSpec,
    config: SlidingWindowConfig,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a layer whose first tokens stay visible beside its window."""
    given = {"softcap": softcap, "s_aux (learned sinks)": sinks, "a mask that is a tensor": mask.visible}
    given |= {"a window of the model's own": mask.window}
    for name, argument in given.items():
        if argument is not None:
            raise ValueError(f"sink_tokens is {config.sink_tokens}, but the layer has {name}; choices: sink_tokens=0")
    return sliding_window_attention(
        query, key, value, window=config.window, sink_tokens=config.sink_tokens, scale=scale,
        key_starts=mask.key_starts, key_lengths=mask.key_lengths, query_offset=mask.query_offset,
        cu_seqlens=mask.cu_seqlens, backend=config.backend,
    )  # fmt: skip
