"""Sliding-window attention: the band is what the softmax attention kernels compute, seen from shifted positions.

A symmetric window of w on each side is a causal one of 2 w + 1 keys for a query that stands w places further on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effkit.attention.sliding_window import attend_in_parts
from effkit.kernels import softmax_attention as softmax
from effkit.kernels._common import AotSpec


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, cu_seqlens: Tensor | None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax_attention's kernels, where a window without causal reaches to both sides of a query."""
    if window is not None and not causal:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel()  # one more: what follows the last
        ahead = torch.full((sequences,), window, dtype=torch.int32, device=q.device)
        options |= dict(query_offset=ahead)
        causal, window = True, 2 * window + 1
    return softmax.softmax_attention(q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, **options)


sliding_window_attention = functools.partial(attend_in_parts, _attend)


def aot_specs() -> Iterator[AotSpec]:
    """The build that softmax_attention alone does not make: packed sequences with shifted positions."""
    for arch in (80, 90, 100):
        yield from softmax.passes(arch, 64, "bf16", "packed, both sides")
