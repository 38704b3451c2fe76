"""Which query sees which key, shared by the attention techniques."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as positions instead of a T x S tensor."""

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
        i = torch.arange(row, row_end, device=self.device)[:, None] + self.offset
        j = torch.arange(key, key_end, device=self.device)
        see = torch.ones(1, 1, row_end - row, key_end - key, dtype=torch.bool, device=self.device)
        if self.causal:
            see = see & (j <= i)
        if self.window is not None:
            see = see & (j > i - self.window)
        if self.starts is not None:
            see = see & (j >= self.starts)
        if self.lengths is not None:
            see = see & (j < self.lengths)
        if self.sequence is not None:
            own = self.sequence[row:row_end, None]
            see = see & (own == self.sequence[key:key_end]) & (own >= 0)
        return see

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
        first = row + self.offset - self.window + 1 if self.window is not None else 0
        end = row_end + self.offset if self.causal else keys
        return min(max(0, first), keys), min(max(0, end), keys)

    def cuts(self, row: int, row_end: int, key: int, key_end: int) -> bool:
        """Whether some query of the block may not see some key of the range, so that the mask must be applied."""
        if not isinstance(self.offset, int) or any(x is not None for x in (self.starts, self.lengths, self.sequence)):
            return True
        # With a window too: the key range of a block of several rows ends past its first row, that of one row is exact.
        return self.causal and key_end - 1 > row + self.offset
