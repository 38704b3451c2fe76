"""Techniques that contain each other give the same result where they must: through the judge, with gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention import linear_attention, retention, ssd
from effkit.ops import INTERPRET
from effkit.testing import assert_equivalent

BACKEND = "triton" if INTERPRET else "torch"
pytestmark = [pytest.mark.interpreter] if INTERPRET else []


def tensors(T: int = 70, H: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, H, T, 16, generator=generator) for _ in "qkv")
    return dict(q=q, k=k, v=v, g=-torch.rand(2, H, T, generator=generator))


def test_ssd_with_a_constant_gate_is_retention() -> None:
    inputs = tensors()
    decay = torch.tensor([-0.03, -0.7])
    del inputs["g"]

    def as_ssd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ssd(q, k, v, decay[None, :, None].expand(2, 2, 70), scale=0.25, backend=BACKEND)

    assert_equivalent(as_ssd, lambda q, k, v: retention(q, k, v, decay=decay, backend="reference"), inputs)


def test_ssd_without_decay_is_unnormalised_linear_attention() -> None:
    inputs = tensors()
    inputs["g"] = torch.zeros_like(inputs["g"])

    def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map="identity", normalize=False, backend="reference")

    assert_equivalent(lambda **x: ssd(**x, backend=BACKEND), linear, inputs, grads=("q", "k", "v"))


def test_ssd_with_closed_gates_sees_only_its_own_token() -> None:
    inputs = tensors() | dict(g=torch.full((2, 2, 70), -1e4))
    assert_equivalent(
        lambda **x: ssd(**x, backend=BACKEND), lambda q, k, v, g: (q * k).sum(-1, keepdim=True) * v, inputs,
        grads=("q", "k", "v"),
    )  # fmt: skip


def test_linear_attention_is_weighted_mean_of_values() -> None:
    """Equation 3 of the paper: weights phi(q) . phi(k), which add up to 1."""
    inputs = tensors()
    del inputs["g"]

    def weights(q: Tensor, k: Tensor) -> Tensor:
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        scores = scores * torch.ones_like(scores).tril()
        return scores / scores.sum(-1, keepdim=True)

    assert_equivalent(
        lambda q, k, v: linear_attention(q, k, v, eps=0.0, backend=BACKEND), lambda q, k, v: weights(q, k) @ v, inputs
    )


def test_efficient_attention_is_two_softmaxes() -> None:
    inputs = tensors()
    del inputs["g"]
    assert_equivalent(
        lambda q, k, v: linear_attention(q, k, v, feature_map="softmax", causal=False, backend=BACKEND),
        lambda q, k, v: (q.softmax(-1) @ k.softmax(-2).mT) @ v,
        inputs,
    )
