"""Caches of a fixed size for `GroupedQueryAttention`: a ring of the last W tokens, and StreamingLLM's sinks and window.

A token-by-token pass with either equals one full pass with the same mask: `RollingKVCache(W)` a causal window of W keys
(arXiv 2310.06825, section 2), `SinkKVCache(S, W)` that window beside the first S keys (arXiv 2309.17453, section 3.2).
Memory is O(W) for ever. What lies further back is gone: no cache remembers what it has dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effkit.attention.grouped_query import KVCache
from effkit.attention.sliding_window import check_window


class RollingKVCache(KVCache):
    """The last `window` tokens: token p lies in slot p mod window, with its key rotated for position p.

    A single query may see all slots, so their order does not matter. Several new tokens at once come back in order,
    behind the window - 1 tokens before them.
    """

    window: int

    def __init__(self, window: int) -> None:
        super().__init__()
        check_window("RollingKVCache", "window", window, 1)
        self.window = window
        self._length = 0

    def __len__(self) -> int:
        """Tokens seen so far, which is the position of the next one."""
        return self._length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new tokens into their slots and returns what they may see: [B, Hkv, at most window - 1 + T, D]."""
        new = key.shape[2]
        if self.key is None or self.value is None:
            self.key, self.value = (x.new_zeros(*x.shape[:2], self.window, x.shape[3]) for x in (key, value))
        elif torch.is_grad_enabled():  # what an earlier step has given to autograd stays as it was
            self.key, self.value = self.key.clone(), self.value.clone()
        before = torch.arange(max(0, self._length - self.window + 1), self._length, device=key.device) % self.window
        key_seen, value_seen = (
            torch.cat((stored[:, :, before], x), 2) if new != 1 else stored
            for stored, x in ((self.key, key), (self.value, value))
        )
        slots = torch.arange(self._length, self._length + new, device=key.device)[-self.window :] % self.window
        self.key.index_copy_(2, slots, key[:, :, -self.window :])
        self.value.index_copy_(2, slots, value[:, :, -self.window :])
        self._length += new
        if new != 1:
            return key_seen, value_seen
        return self.key[:, :, : self._length], self.value[:, :, : self._length]


class SinkKVCache(KVCache):
    """The first `sink_tokens` tokens and the last `window`, the query's own included.

    positions   "true": a token keeps the position that it had. "cache": keys are stored unrotated, and at each use they
                and the queries are rotated for their place in the cache, as in the paper: no position exceeds
                sink_tokens + window, however long the stream. That is defined token by token; with T new tokens at once
                the sinks stand up to T - 1 places further from the last of them than one by one.
    """

    window: int

    def __init__(self, sink_tokens: int, window: int, *, positions: str = "true") -> None:
        super().__init__()
        check_window("SinkKVCache", "sink_tokens", sink_tokens, 0)
        check_window("SinkKVCache", "window", window, 1)
        if positions not in ("true", "cache"):
            raise ValueError(f"SinkKVCache: positions is {positions!r}, choices: 'true', 'cache'")
        self.sink_tokens, self.window, self.positions = sink_tokens, window, positions
        self._length = 0

    def __len__(self) -> int:
        """Tokens seen so far."""
        return self._length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens, returns all that is there, and keeps of it what the next token may see."""
        self._length += key.shape[2]
        seen = super().append(key, value)
        self.key, self.value = (self._keep(x) for x in seen)
        return seen

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.positions == "true":
            return super().extend(q, k, v, rotate)
        key, value = self.append(k, v)
        places = torch.arange(key.shape[2], device=q.device)
        return rotate(q, places[-q.shape[2] :]), rotate(key, places), value

    def _keep(self, x: Tensor) -> Tensor:
        recent = max(self.sink_tokens, x.shape[2] - self.window + 1)
        if recent == self.sink_tokens:
            return x
        return torch.cat((x[:, :, : self.sink_tokens], x[:, :, recent:]), 2)
