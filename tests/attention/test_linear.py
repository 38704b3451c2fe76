"""What linear attention promises beyond its ledger entry: padding, feature maps, and the errors of its options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.attention import FEATURE_MAPS, RecurrentState, linear_attention
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

BACKEND = "triton" if INTERPRET else "torch"
pytestmark = [pytest.mark.interpreter] if INTERPRET else []
LENGTHS = (20, 0, 7)


def tensors(B: int = 3, T: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(B, 2, T, 16, generator=generator) for name in "qkv"}


@pytest.mark.parametrize("feature_map", ["elu+1", "softmax", "signed softmax"])
def test_padded_keys_do_not_exist(feature_map: str) -> None:
    """A padded row equals the row without its padding, which may hold NaN; a row without keys gives 0."""
    inputs = tensors()
    options: dict[str, Any] = dict(causal=False, feature_map=feature_map)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gone = (torch.arange(20) >= torch.tensor(LENGTHS)[:, None])[:, None, :, None]
        k, v = (torch.where(gone, torch.nan, x) for x in (k, v))
        return linear_attention(q, k, v, key_lengths=torch.tensor(LENGTHS), backend=BACKEND, **options)

    def shortened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for n, length in enumerate(LENGTHS):
            own = [x[n : n + 1, :, :length] for x in (k, v)]
            # Queries without a key of their own: the sums over the keys, for each query apart.
            parts = [_one(q[n : n + 1, :, i : i + 1], *own, **options) for i in range(20)]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows)

    assert_equivalent(padded, shortened, inputs)


def _one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A single query over keys of another number: its row of the mean, written out."""
    if k.shape[2] == 0:
        return torch.zeros_like(q)
    if options["feature_map"] == "softmax":
        return q.softmax(-1) @ (k.softmax(2).mT @ v)
    phi = FEATURE_MAPS[options["feature_map"]]
    weights = phi(q) @ phi(k).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def test_a_function_is_a_feature_map() -> None:
    assert torch.equal(
        linear_attention(**tensors(), feature_map=FEATURE_MAPS["elu+1"], backend=BACKEND),
        linear_attention(**tensors(), backend=BACKEND),
    )


def test_feature_maps_are_positive() -> None:
    x = torch.linspace(-20, 20, 401)[:, None].expand(-1, 4)
    for name, phi in FEATURE_MAPS.items():
        assert name == "identity" or (phi(x) >= 0).all()
    assert (FEATURE_MAPS["elu+1"](x) > 0).all()  # where elu itself has rounded to -1 as well


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(feature_map="gelu"), "feature_map is 'gelu', choices: 'elu\\+1'"),
        (dict(feature_map="softmax"), "needs causal=False"),
        (dict(causal=False, return_state=True), "causal=False has no state"),
        (dict(key_lengths=torch.tensor([1, 2, 3])), "key_lengths needs causal=False"),
        (dict(initial_state=torch.zeros(3, 2, 16, 16)), "a RecurrentState with a normalizer"),
        (dict(initial_state=RecurrentState(torch.zeros(3, 2, 16, 16), torch.zeros(3).long())), "has no normalizer"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**tensors(), **change)
