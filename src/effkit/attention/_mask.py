"""Which query sees which key, shared by the attention techniques."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as positions instead of a T x S tensor.

    window counts the keys up to the query's own when causal, else those on each side of it.
    """

    device: torch.device
    causal: bool
    window: int | None
    offset: int | Tensor  # key index of query 0
    starts: Tensor | None  # [B, 1, 1, 1]
    lengths: Tensor | None  # [B, 1, 1, 1]
    sequence: Tensor | None  # [T] number of the packed sequence that a token belongs to, -1 past the end

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        causal: bool,
        window: int | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        key_starts: Tensor | None,
        query_offset: Tensor | None,
    ) -> Mask:
        starts, lengths = (None if x is None else x.view(-1, 1, 1, 1) for x in (key_starts, key_lengths))
        offset = k.shape[2] - q.shape[2] if query_offset is None else query_offset.view(-1, 1, 1, 1)
        sequence = None
        if cu_seqlens is not None:
            token = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
            sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
            sequence = torch.where(token < cu_seqlens[-1], sequence, -1)
        return Mask(q.device, causal, window, offset, starts, lengths, sequence)

    def visible(self, row: int, row_end: int, key: int, key_end: int) -> Tensor:
        """bool [B or 1, 1, rows, keys]: whether each query of a range of rows sees each key of a range of keys."""
        rows = torch.arange(row, row_end, device=self.device)[:, None]
        return self.between(rows, torch.arange(key, key_end, device=self.device))

    def between(self, row: Tensor, key: Tensor) -> Tensor:
        """The same for any rows and keys, whose indices broadcast against [B, 1, rows, keys]."""
        i, j = row + self.offset, key
        see = torch.ones(1, 1, *torch.broadcast_shapes(row.shape, key.shape)[-2:], dtype=torch.bool, device=self.device)
        if self.causal:
            see = see & (j <= i)
        if self.window is not None:
            see = see & in_window(i - j, self.window, self.causal)
        if self.starts is not None:
            see = see & (j >= self.starts)
        if self.lengths is not None:
            see = see & (j < self.lengths)
        if self.sequence is not None:
            own = self.sequence[row]
            see = see & (own == self.sequence[key]) & (own >= 0)
        return see

    def exists(self, keys: int) -> Tensor:
        """bool [B or 1, keys]: which keys exist at all."""
        j = torch.arange(keys, device=self.device)[None]
        real = torch.ones_like(j, dtype=torch.bool) if self.sequence is None else self.sequence[None] >= 0
        if self.starts is not None:
            real = real & (j >= self.starts[:, 0, 0])
        if self.lengths is not None:
            real = real & (j < self.lengths[:, 0, 0])
        return real

    def blank_padding(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with zeros where nothing exists, so that 0 * NaN never meets a sum or a gradient."""
        if self.sequence is not None:
            gone = (self.sequence < 0)[:, None]
            return q.masked_fill(gone, 0.0), k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        if self.starts is None and self.lengths is None:
            return q, k, v
        j = torch.arange(k.shape[2], device=k.device)[:, None]
        gone = torch.zeros(1, 1, k.shape[2], 1, dtype=torch.bool, device=k.device)
        if self.starts is not None:
            gone = gone | (j < self.starts)
        if self.lengths is not None:
            gone = gone | (j >= self.lengths)
        return q, k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)

    def key_range(self, row: int, row_end: int, keys: int) -> tuple[int, int]:
        """A range of keys outside of which no row of the block sees anything (all keys where that is unknown)."""
        if not isinstance(self.offset, int):
            return 0, keys
        before, after = self._reach()
        first = 0 if before is None else row + self.offset - before
        end = keys if after is None else row_end + self.offset + after
        return min(max(0, first), keys), min(max(0, end), keys)

    def cuts(self, row: int, row_end: int, key: int, key_end: int) -> bool:
        """Whether some query of the block may not see some key of the range, so that the mask must be applied."""
        if not isinstance(self.offset, int) or any(x is not None for x in (self.starts, self.lengths, self.sequence)):
            return True
        before, after = self._reach()
        too_late = after is not None and key_end - 1 > row + self.offset + after
        return too_late or (before is not None and key < row_end - 1 + self.offset - before)

    def _reach(self) -> tuple[int | None, int | None]:
        """How many keys a query sees before and after its own at most, None: all."""
        if self.window is None:
            return None, 0 if self.causal else None
        return (self.window - 1, 0) if self.causal else (self.window, self.window)


def in_window(distance: Tensor, window: int, causal: bool, dilation: int | Tensor = 1) -> Tensor:
    """Whether a key lies in its query's window: `window` keys up to its own, or that many on each side of it."""
    reach = window - 1 if causal else window
    return (distance.abs() <= reach * dilation) & (distance % dilation == 0)
