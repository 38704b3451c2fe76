"""Longformer's self-attention as a layer: a window around every token, and a few tokens that see and are seen by all.

    local token    one softmax over the window and the columns of global tokens, projections query, key, value
    global token   softmax over all tokens, projections query_global, key_global, value_global

(Beltagy et al., arXiv 2004.05150, sections 3.1 and 3.2.) The columns of global tokens use the ordinary projections,
their rows the separate ones, which start as copies of the ordinary ones. For encoders: both directions are seen.

Cost: 4 H T (2 w + 1 + G) D operations for G global tokens and a reach of w, twice G T more for their rows, and two more
projections of all tokens. When not to use it: for texts that fit into a window or two, dense attention is as fast and
sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkit.attention._mask import Mask
from effkit.attention._selection import Selection, as_flags, most_flags
from effkit.attention.sliding_window import check_window, sliding_window_attention
from effkit.attention.softmax import softmax_attention


class LongformerAttention(nn.Module):
    """Windowed self-attention with global tokens, and an output projection.

    hidden_size C; num_heads, a divisor of it; window: keys on each side of a token's own, as in
    `sliding_window_attention` with causal=False (transformers' `attention_window` is twice that); dilation: one number
    or one a head; bias of all projections; backend as there. The names of the six input projections are those of
    transformers' LongformerSelfAttention. x [B, T, C] -> y [B, T, C].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int,
        dilation: int | Sequence[int] = 1,
        *,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of hidden_size={hidden_size}")
        check_window("LongformerAttention", "window", window, 0)
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.window, self.dilation, self.backend = window, dilation, backend

        def projection() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias=bias, device=device, dtype=dtype)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.query_global, self.key_global, self.value_global = projection(), projection(), projection()
        self.out_proj = projection()
        for name in ("query", "key", "value"):
            getattr(self, f"{name}_global").load_state_dict(getattr(self, name).state_dict())

    def forward(
        self,
        x: Tensor,
        *,
        global_tokens: Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_starts: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C].

        global_tokens bool [B, T] or positions [B, G], key_lengths [B] and key_starts [B] (padding after and before the
        tokens of a row) as in `sliding_window_attention`.
        """
        q, k, v = (self._heads(projection(x)) for projection in (self.query, self.key, self.value))
        o = sliding_window_attention(
            q, k, v, window=self.window, causal=False, dilation=self.dilation, global_tokens=global_tokens,
            key_lengths=key_lengths, key_starts=key_starts, backend=self.backend,
        )  # fmt: skip
        if global_tokens is not None:
            mask = Mask.of(q, k, False, None, key_lengths, None, key_starts, None)
            flags = as_flags(global_tokens, x.shape[1]) & mask.exists(x.shape[1])
            rows = Selection.of(flags, most_flags(global_tokens, flags))
            o = rows.put(self._global_rows(x, rows, key_lengths, key_starts), o)
        return self.out_proj(o.transpose(1, 2).flatten(2))

    def _global_rows(self, x: Tensor, rows: Selection, key_lengths: Tensor | None, key_starts: Tensor | None) -> Tensor:
        """Full attention of the selected tokens, through projections of their own: [B, H, G, D]."""
        q = self._heads(self.query_global(rows.take(x[:, None])[:, 0]))
        k, v = self._heads(self.key_global(x)), self._heads(self.value_global(x))
        o = softmax_attention(q, k, v, key_lengths=key_lengths, key_starts=key_starts, backend=self.backend)
        assert isinstance(o, Tensor)
        return o

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, dilation={self.dilation}"
