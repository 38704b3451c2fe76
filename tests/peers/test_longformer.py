"""LongformerAttention against the self-attention of transformers' Longformer, with its weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from effkit.attention import LongformerAttention
from effkit.testing import assert_equivalent

longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")

HIDDEN, HEADS, WINDOW, LENGTH = 24, 3, 4, 32  # transformers wants lengths that are multiples of both sides of a window


def theirs() -> Any:
    torch.manual_seed(0)
    config = longformer.LongformerConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, attention_window=[2 * WINDOW], attention_probs_dropout_prob=0.0
    )
    return longformer.LongformerSelfAttention(config, layer_id=0).eval()


def mine(weights: dict[str, Tensor]) -> LongformerAttention:
    layer = LongformerAttention(HIDDEN, HEADS, WINDOW)
    layer.load_state_dict({**weights, "out_proj.weight": torch.eye(HIDDEN), "out_proj.bias": torch.zeros(HIDDEN)})
    return layer


@pytest.mark.parametrize(
    ("lengths", "global_tokens"),
    [
        ([LENGTH, LENGTH], [[], []]),
        ([LENGTH, 19], [[], []]),
        ([LENGTH, LENGTH], [[0, 17], [4, 30]]),
        ([LENGTH, LENGTH], [[0], [3, 4, 30]]),
        ([LENGTH, 21], [[0, 1], [20]]),
        ([LENGTH, 17], [[5], []]),
    ],
)
def test_equals_transformers(lengths: list[int], global_tokens: list[list[int]]) -> None:
    """Outputs of the real tokens, and the gradients of the input and of every weight.

    With padding, or rows that differ in their number of global tokens, transformers' gradients are NaN: there outputs
    alone. A key bias moves all scores of a query alike; its gradient is zero, and computed, noise.
    """
    peer = theirs()
    layer = mine(peer.state_dict())
    weights = {name: value.detach() for name, value in peer.named_parameters()}
    if not any(global_tokens):
        weights = {name: value for name, value in weights.items() if "global" not in name}
    x = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    real = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    is_global = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, tokens in enumerate(global_tokens):
        is_global[row, tokens] = True

    def of_mine(x: Tensor, **weights: Tensor) -> Tensor:
        options = dict(global_tokens=is_global, key_lengths=torch.tensor(lengths))
        own = {name: value.to(x.dtype) for name, value in layer.state_dict().items()}
        return functional_call(layer, own | weights, (x,), options)[real]

    def of_theirs(x: Tensor, **weights: Tensor) -> Tensor:
        mask = torch.where(real, torch.where(is_global, 10000.0, 0.0), -10000.0).to(x.dtype)
        options = dict(
            attention_mask=mask, is_index_masked=~real, is_index_global_attn=is_global, is_global_attn=is_global.any()
        )
        own = {name: value.to(x.dtype) for name, value in peer.state_dict().items()}
        return functional_call(peer, own | weights, (x,), options)[0][real]

    wanted = tuple(name for name in ("x", *weights) if not name.startswith("key") or not name.endswith("bias"))
    has_gradients = bool(real.all()) and len(set(map(len, global_tokens))) == 1
    assert_equivalent(of_mine, of_theirs, {"x": x, **weights}, grads=wanted if has_gradients else False)
