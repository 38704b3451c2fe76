"""Grouped-query attention as a layer, and the conversion of a trained model to fewer key/value heads.

    W_k' [Hkv D, C] = mean over each group of the rows of W_k that belong to its heads, and the same for W_v and biases

(Ainslie et al., arXiv 2305.13245, section 2.1). The cache shrinks from 2 Hq D to 2 Hkv D numbers per token and layer.
Pooling commutes with rotary embedding, which turns every head alike, but not with a norm on the keys. The pooled model
is worse than the original until it is trained further, in the paper with 5 % of the original training; pooling is
better than keeping the first head of a group. Permuting similar heads into one group before pooling leaves the
unpooled model as it is, and can make the pooled one a better start; measure it on your model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effkit.attention.sliding_window import sliding_window_attention
from effkit.attention.softmax import softmax_attention
from effkit.change import ChangeConfig


def mha_to_gqa(weight: Tensor, num_heads: int, num_kv_heads: int, order: Tensor | None = None) -> Tensor:
    """Mean-pools the heads of a key or value projection into groups.

        out[g] = mean_{h in group g} weight[h]         arXiv 2305.13245, section 2.1

    weight [num_heads * D, C] or a bias [num_heads * D], any float dtype; sums are in float32 (float64 for float64)
    num_heads     heads in weight; num_kv_heads of the result, a divisor of it
    order         a permutation of the heads (`similar_heads`), applied first; the query heads that read them and the
                  columns of the output projection need the same permutation
    Returns [num_kv_heads * D, C] or [num_kv_heads * D] in weight's dtype. Raises ValueError for sizes that do not fit.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(f"mha_to_gqa: num_kv_heads is {num_kv_heads}, expected a divisor of num_heads: {divisors}")
    if weight.ndim not in (1, 2) or weight.shape[0] % num_heads:
        raise ValueError(
            f"mha_to_gqa: weight has shape {list(weight.shape)}, expected [num_heads * D, C] or [num_heads * D] with "
            f"num_heads={num_heads}"
        )
    heads = weight.unflatten(0, (num_heads, -1))
    heads = heads if order is None else heads[order]
    groups = heads.unflatten(0, (num_kv_heads, -1))
    wide = torch.promote_types(weight.dtype, torch.float32)
    return groups.to(wide).mean(1).to(weight.dtype).flatten(0, 1)


def similar_heads(key_weight: Tensor, value_weight: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """A permutation of the heads that puts similar ones into one group: int64 [num_heads].

    Greedy: the first head without a group takes those whose key and value projections, each normalised, have the
    largest cosine similarity with its own. Deterministic; ties go to the lower head.
    """
    rows = [weight.detach().double().reshape(num_heads, -1) for weight in (key_weight, value_weight)]
    rows = [weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-30) for weight in rows]
    similarity = rows[0] @ rows[0].T + rows[1] @ rows[1].T
    left, order = list(range(num_heads)), []
    while left:
        first = left[0]
        group = [first, *sorted(left[1:], key=lambda head: (-similarity[first, head].item(), head))]
        order += group[: num_heads // num_groups]
        left = [head for head in left if head not in order]
    return torch.tensor(order, device=key_weight.device)


def rotary_embedding(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates pairs (i, i + D / 2) of each head by positions * theta ** (-2 i / D) (arXiv 2104.09864, Llama's order).

    x [B, H, T, D], D even; positions [T] or [B, T]. Angles are computed in float32. Returns x's shape and dtype.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (torch.arange(half, device=x.device, dtype=torch.float32) / -half)
    angle = positions.to(torch.float32)[..., None] * frequency  # [T, D/2] or [B, T, D/2]
    angle = angle[:, None] if angle.ndim == 3 else angle
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far: [B, Hkv, S, D] each, or None before the first.

    window and sink_tokens: what a cache that forgets still holds, for layers of the same; None and 0 where all is kept.
    """

    window: int | None = None
    sink_tokens: int = 0

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens and returns all keys and values."""
        self.key = key if self.key is None else torch.cat((self.key, key), dim=2)
        self.value = value if self.value is None else torch.cat((self.value, value), dim=2)
        return self.key, self.value

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Appends new tokens and returns their queries with all keys and values, rotated for their positions.

        rotate(x, positions [T]) turns queries or keys [B, H, T, D].
        """
        positions = torch.arange(len(self), len(self) + q.shape[2], device=q.device)
        key, value = self.append(rotate(k, positions), v)
        return rotate(q, positions), key, value


class GroupedQueryAttention(nn.Module):
    """Projections, optional rotary embedding, grouped-query attention and output projection.

    hidden_size C; num_heads Hq query heads and num_kv_heads Hkv key/value heads of width head_dim (default C / Hq);
    bias for all four projections; rope_theta: base of the rotary embedding, None for none; causal and window as in
    `softmax_attention`, sink_tokens (beside a window) as in `sliding_window_attention`; backend likewise.
    x [B, T, C] -> y [B, T, C].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        rope_theta: float | None = 10000.0,
        causal: bool = True,
        window: int | None = None,
        sink_tokens: int = 0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size is {hidden_size}, expected a multiple of num_heads={num_heads} or a head_dim"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}, a rotary embedding needs an even width (or rope_theta=None)"
            )
        if sink_tokens and (window is None or not causal):
            raise ValueError(f"sink_tokens is {sink_tokens}, which needs a window and causal=True")
        self.rope_theta, self.causal, self.backend = rope_theta, causal, backend
        self.window, self.sink_tokens = window, sink_tokens
        made = dict(bias=bias, device=device, dtype=dtype)
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, **made)  # type: ignore[arg-type]
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, **made)  # type: ignore[arg-type]
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, **made)  # type: ignore[arg-type]
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, **made)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        *,
        cache: KVCache | None = None,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]. With a cache, x continues it and is appended to it.

        key_lengths [B] masks keys past each row's end, cu_seqlens [N] packs sequences (B = 1), as in
        `softmax_attention`; neither goes with a cache.
        """
        if cache is not None and (key_lengths is not None or cu_seqlens is not None):
            raise ValueError("cache is given together with key_lengths or cu_seqlens, expected at most one of them")
        if cache is not None and cache.window is not None:
            held, seen = (cache.window, cache.sink_tokens), (self.window, self.sink_tokens)
            if held != seen:
                raise ValueError(f"cache holds (window, sink_tokens) = {held}, expected the layer's {seen}")
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            q, k, v = cache.extend(q, k, v, self._rotate)
        else:
            positions = self._positions(x, cu_seqlens)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        o: Any
        lengths: dict[str, Any] = dict(key_lengths=key_lengths, cu_seqlens=cu_seqlens)
        if self.sink_tokens and self.window is not None:
            o = sliding_window_attention(
                q, k, v, window=self.window, sink_tokens=self.sink_tokens, **lengths, backend=self.backend
            )
        else:
            o = softmax_attention(q, k, v, causal=self.causal, window=self.window, **lengths, backend=self.backend)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope_theta is None else rotary_embedding(x, positions, self.rope_theta)

    def _positions(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is None:
            return positions
        sequence = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        return positions - cu_seqlens[sequence]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


@dataclass(frozen=True)
class GQAConfig(ChangeConfig):
    """Converts the attention of a HuggingFace model to fewer key/value heads by mean pooling (`mha_to_gqa`).

    num_kv_heads: a divisor of the model's present number. permute: group similar heads first (`similar_heads`). The
    model's config says the new number afterwards, so that save_pretrained and from_pretrained work as always.
    """

    num_kv_heads: int
    permute: bool = False
    handler: ClassVar[str] = "effkit.hf.grouped_query:convert"

    def __post_init__(self) -> None:
        if isinstance(self.num_kv_heads, bool) or not isinstance(self.num_kv_heads, int) or self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads!r}, expected an int >= 1")
