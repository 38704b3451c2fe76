"""Caches of a fixed size: what they hold, and that a pass in pieces through them equals one full pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from effkit.attention import GroupedQueryAttention, KVCache, RollingKVCache, SinkKVCache, rotary_embedding
from effkit.testing import assert_equivalent

LENGTH = 17
PIECES = [[1] * LENGTH, [LENGTH], [6, 1, 1, 3, 5, 1]]


def attention(**options: Any) -> GroupedQueryAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GroupedQueryAttention(16, 4, 2, **options)


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(0))


class InPieces(nn.Module):
    """A layer over pieces of x, one after the other, with a cache made for each pass."""

    def __init__(self, layer: GroupedQueryAttention, cache: Any, pieces: list[int]) -> None:
        super().__init__()
        self.layer, self.cache, self.pieces = layer, cache, pieces

    def forward(self, x: Tensor) -> Tensor:
        cache = self.cache()
        return torch.cat([self.layer(piece, cache=cache) for piece in x.split(self.pieces, dim=1)], dim=1)


def assert_equals_full_pass(layer: GroupedQueryAttention, cache: Any, pieces: list[int]) -> None:
    """Outputs, and the gradients of x and of every weight."""
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    split = InPieces(layer, cache, pieces)
    assert_equivalent(
        lambda x, **weights: functional_call(split, {f"layer.{name}": w for name, w in weights.items()}, (x,)),
        lambda x, **weights: functional_call(layer, weights, (x,)),
        {"x": tokens(), **weights},
    )


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("window", [1, 5, 40])
def test_rolling_cache_equals_a_windowed_pass(window: int, pieces: list[int]) -> None:
    assert_equals_full_pass(attention(window=window), lambda: RollingKVCache(window), pieces)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize(("sinks", "window"), [(2, 5), (4, 1), (1, 40)])
def test_sink_cache_equals_a_pass_with_the_same_mask(sinks: int, window: int, pieces: list[int]) -> None:
    layer = attention(window=window, sink_tokens=sinks)
    assert_equals_full_pass(layer, lambda: SinkKVCache(sinks, window), pieces)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_a_sink_cache_without_sinks_rolls(pieces: list[int]) -> None:
    assert_equals_full_pass(attention(window=5), lambda: SinkKVCache(0, 5), pieces)


class StreamingByHand(nn.Module):
    """The paper's loop: at each step what is kept, rotated for its place among what is kept."""

    def __init__(self, layer: GroupedQueryAttention, sinks: int, window: int) -> None:
        super().__init__()
        self.layer, self.sinks, self.window = layer, sinks, window

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.layer.q_proj, self.layer.k_proj, self.layer.v_proj)
        q, k, v = (projection(x).unflatten(2, (-1, 4)).transpose(1, 2) for projection in projections)
        steps = []
        for t in range(LENGTH):
            kept = [j for j in range(t + 1) if j < self.sinks or j > t - self.window]
            places = torch.arange(len(kept))
            query = rotary_embedding(q[:, :, t : t + 1], places[-1:], 10000.0)
            key = rotary_embedding(k[:, :, kept], places, 10000.0).repeat_interleave(2, 1)
            steps.append(torch.softmax(query @ key.mT / 2, dim=3) @ v[:, :, kept].repeat_interleave(2, 1))
        return self.layer.o_proj(torch.cat(steps, 2).transpose(1, 2).flatten(2))


def test_positions_in_the_cache() -> None:
    layer = attention(window=5, sink_tokens=3)
    mine = InPieces(layer, lambda: SinkKVCache(3, 5, positions="cache"), [1] * LENGTH)
    by_hand = StreamingByHand(layer, 3, 5)
    weights = {name: value.detach() for name, value in mine.named_parameters()}
    assert_equivalent(
        lambda x, **weights: functional_call(mine, weights, (x,)),
        lambda x, **weights: functional_call(by_hand, weights, (x,)),
        {"x": tokens(), **weights},
    )


def test_kinds_of_positions_agree_until_the_cache_is_full() -> None:
    layer, x = attention(window=6, sink_tokens=3), tokens()[:, :9]
    by_kind = [
        InPieces(layer, lambda kind=kind: SinkKVCache(3, 6, positions=kind), [1] * 9)(x) for kind in ("true", "cache")
    ]
    assert torch.equal(*by_kind)


def test_rolling_cache_has_one_slot_for_each_key_of_the_window() -> None:
    cache = RollingKVCache(4)
    key = torch.arange(11.0)[None, None, :, None].expand(1, 2, -1, 3)
    for start, end in ((0, 1), (1, 3), (3, 8), (8, 9), (9, 11)):
        keys, values = cache.append(key[:, :, start:end], -key[:, :, start:end])
        assert len(cache) == end and cache.key is not None and cache.key.shape == (1, 2, 4, 3)
        assert torch.equal(keys, -values)
        seen = sorted(set(keys[0, 0, :, 0].int().tolist()))
        assert seen == list(range(max(0, start - 3), end))
        for p in range(max(0, end - 4), end):
            assert cache.key[0, 0, p % 4, 0] == p


def test_memory_stays_as_it_is() -> None:
    """Without gradients a rolling cache never allocates again; a sink cache holds sinks + window - 1 tokens."""
    x = torch.zeros(1, 2, 1, 3)
    rolling, sinks = RollingKVCache(4), SinkKVCache(2, 4)
    with torch.no_grad():
        rolling.append(x, x)
        assert rolling.key is not None
        place = rolling.key.data_ptr()
        for _ in range(20):
            rolling.append(x, x)
            sinks.append(x, x)
    assert rolling.key.data_ptr() == place
    assert sinks.key is not None and sinks.key.shape[2] == 5 and len(sinks) == len(rolling) - 1 == 20


def test_wrong_caches() -> None:
    layer, x = attention(window=5), tokens()
    for cache in (RollingKVCache(6), SinkKVCache(2, 5)):
        with pytest.raises(
            ValueError, match=r"cache holds \(window, sink_tokens\) = .*, expected the layer's \(5, 0\)"
        ):
            layer(x, cache=cache)
    layer(x, cache=KVCache())
    for make, message in (
        (lambda: RollingKVCache(0), "window is 0"),
        (lambda: SinkKVCache(-1, 3), "sink_tokens is -1"),
        (lambda: SinkKVCache(2, 3, positions="kept"), "positions is 'kept', choices: 'true', 'cache'"),
        (lambda: attention(sink_tokens=2), "sink_tokens is 2, which needs a window"),
        (lambda: attention(window=3, causal=False, sink_tokens=2), "needs a window and causal=True"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
