"""A few tokens picked out of each batch row, as many from every row: taken from a tensor, and put back into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def as_flags(global_tokens: Tensor, length: int) -> Tensor:
    """bool [B, T], of such flags or of positions [B, G]."""
    if global_tokens.dtype == torch.bool:
        return global_tokens
    flags = torch.zeros(global_tokens.shape[0], length + 1, dtype=torch.bool, device=global_tokens.device)
    places = torch.where(global_tokens < 0, length, global_tokens).long()
    return flags.scatter(1, places, True)[:, :length]


def most_flags(global_tokens: Tensor, flags: Tensor) -> int:
    """At least the largest number of global tokens in a row. The values of flags cannot be read while tracing."""
    if global_tokens.dtype != torch.bool or torch.compiler.is_compiling():
        return min(global_tokens.shape[1], flags.shape[1])
    return int(flags.sum(1).max()) if flags.numel() else 0


@dataclass(frozen=True)
class Selection:
    """The same number of tokens of each batch row: their indices [B, G], and which of them are meant [B, G]."""

    index: Tensor
    chosen: Tensor

    @staticmethod
    def of(flags: Tensor, count: int) -> Selection:
        """Those with a flag [B, T], of which no row has more than count, in order; then some without."""
        index = flags.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        return Selection(index, flags.gather(1, index))

    def take(self, x: Tensor) -> Tensor:
        """[B, H, T, n] -> [B, H, G, n], with zeros where none is meant."""
        return x.gather(2, self._spread(x)).masked_fill(~self.chosen[:, None, :, None], 0.0)

    def put(self, selected: Tensor, x: Tensor) -> Tensor:
        """x [B, H, T, n] with the selected [B, H, G, n] in their places."""
        place = self._spread(x)
        return x.scatter(2, place, torch.where(self.chosen[:, None, :, None], selected, x.gather(2, place)))

    def _spread(self, x: Tensor) -> Tensor:
        return self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
