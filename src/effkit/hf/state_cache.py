"""A cache layer for attention with a recurrent state: `Cache.layers` of transformers may hold any layer, also this one.

The module puts it there at its first forward, in place of the layer that would have kept keys and values. It answers
what the cache, `generate()` and the masks of the other layers ask: how many tokens were seen, rows in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from effkit.attention._recurrent import map_state


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The StateLayer at an index of a cache; made there where the cache has none yet."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if not isinstance(layer, StateLayer):
        held = int(layer.get_seq_length())
        if held:
            raise ValueError(
                f"past_key_values holds keys and values of {held} tokens at layer {index}, which now has a recurrent "
                "state; expected a new cache"
            )
        layer = cache.layers[index] = StateLayer(layer)
    return layer


class StateLayer(CacheLayerMixin):
    """The state of one layer, a NamedTuple of tensors with the batch first, and the number of tokens seen.

    seen counts padding too: the masks that the model makes for its other layers count it. replaced is the layer that
    stood here; where it holds a window or has a fixed size, those masks have its form.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0
        self.replaced = replaced
        self.is_sliding = replaced.is_sliding

    def advance(self, state: Any, tokens: int) -> None:
        """Takes the state after so many more tokens."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True
        self._tell_replaced()

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask has, and the position of the first."""
        if hasattr(self.replaced, "cumulative_length"):  # a window, or a fixed size
            return self.replaced.get_mask_sizes(query_length)
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False
        self._tell_replaced()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(partial(torch.repeat_interleave, repeats=repeats, dim=0))

    def offload(self) -> None:
        """Nothing: a state is no larger than the keys and values of a few dozen tokens, it stays where it is."""

    def prefetch(self) -> None:
        """Nothing, as in `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(
                f"crop: a recurrent state cannot forget the last {abs(tokens_to_remove)} tokens, so assisted and "
                "prompt-lookup decoding are not possible; choices: generate() without them"
            )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the state comes with the first tokens."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "this layer of the cache holds a recurrent state, but the model now has softmax attention there; expected "
            "a new cache"
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.state = map_state(fn, self.state)

    def _tell_replaced(self) -> None:
        """Lets the replaced layer count along, as its mask sizes depend on it."""
        if hasattr(self.replaced, "cumulative_length_int"):
            self.replaced.cumulative_length_int = self.seen
        count = getattr(self.replaced, "cumulative_length", None)
        if isinstance(count, Tensor):
            count.fill_(self.seen)
        elif count is not None:
            self.replaced.cumulative_length = self.seen
