"""What stands between the projections of a swapped attention layer: a technique, its maps and gates, one class each.

A mixer is called with q [B, Hq, T, D] and k [B, Hk, T, D] after norms and rotary embedding, v [B, Hk, T, D], the
layer's input x [B, T, C], and initial_state, return_state, cu_seqlens as the ops have them; it returns o [B, Hq, T, D]
and the state, None where it was not asked for.

Softmax attention is a mean of values with positive weights, so these are too, but for the delta rules: queries and keys
become positive features (`HedgehogFeatureMap`, a softmax over signed channels), and the sum of the weights is the sum
for a value of 1, one more column. Gates and scales come from x by projections that start at zero: at first they are the
same at every token, as the biases say. Each config says what that is, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._blocks import wide_dtype
from effkit.attention._fenwick import levels_for
from effkit.attention._swap import DecayingConfig, RecurrentConfig
from effkit.attention.deltanet import DeltaRuleConfig, GatedDeltaRuleConfig, delta_rule, gated_delta_rule
from effkit.attention.gla import GatedLinearAttentionConfig, gated_linear_attention
from effkit.attention.linear import HedgehogFeatureMap, LinearAttentionConfig, features, linear_attention
from effkit.attention.log_linear import LogLinearAttentionConfig, log_linear_attention
from effkit.attention.mamba2 import SSDConfig, ssd
from effkit.attention.retnet import RetentionConfig, retention

_EPS = 1e-6  # beside the sum of the weights


class Sizes(NamedTuple):
    """What a mixer has to fit: channels C, query and key heads, the width of a head, device and dtype."""

    channels: int
    heads: int
    kv_heads: int
    width: int
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(module: Any) -> Sizes:
        """Of an attention module with q_proj, k_proj and o_proj, which may be quantised: they know their dtype then."""
        weights = [p for p in module.parameters() if p.is_floating_point()]
        dtype = weights[0].dtype if weights else torch.get_default_dtype()
        dtype = getattr(module.q_proj, "dtype", dtype)
        width = module.head_dim
        return Sizes(
            module.q_proj.in_features, module.q_proj.out_features // width, module.k_proj.out_features // width,
            width, module.q_proj.weight.device, dtype,
        )  # fmt: skip


def make_mixer(config: RecurrentConfig, module: nn.Module) -> nn.Module:
    """The mixer of a config, to stand in for the softmax of an attention module."""
    return MIXERS[type(config)](config, Sizes.of(module), module)


class TokenLinear(nn.Module):
    """A number for each token and each of `outputs`, [B, T, outputs] in float32: bias + weight x, the weight zero.

    With rank the weight is a product of two, only the second of which is zero.
    """

    def __init__(self, sizes: Sizes, start: Tensor, rank: int | None = None) -> None:
        super().__init__()
        made: Any = dict(device=sizes.device, dtype=sizes.dtype)
        self.down = None if rank is None else nn.Linear(sizes.channels, rank, bias=False, **made)
        self.weight = nn.Parameter(torch.zeros(len(start), rank or sizes.channels, **made))
        self.bias = nn.Parameter(start.to(**made))

    def forward(self, x: Tensor) -> Tensor:
        wide = wide_dtype(x.dtype)
        y = F.linear(x if self.down is None else self.down(x), self.weight)
        return y.to(wide) + self.bias.to(wide)


class LinearMixer(nn.Module):
    """linear_attention, normalised."""

    def __init__(self, config: LinearAttentionConfig, sizes: Sizes, module: nn.Module) -> None:
        super().__init__()
        self.q_map, self.k_map = (_feature_map(config.feature_map, sizes, heads) for heads in sizes[1:3])
        self.backend = config.backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **state: Any) -> tuple[Tensor, Any]:
        q, k = self.q_map(q), self.k_map(k)
        return _pair(linear_attention(q, k, v, feature_map="identity", eps=_EPS, backend=self.backend, **state))


class _MeanMixer(nn.Module):
    """A mean of values under the weights of `core`, which is called as the mixer is, with features and a longer v."""

    def __init__(self, config: RecurrentConfig, sizes: Sizes) -> None:
        super().__init__()
        self.q_map, self.k_map = (_feature_map("hedgehog", sizes, heads) for heads in sizes[1:3])
        self.backend = config.backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **state: Any) -> tuple[Tensor, Any]:
        columns = torch.cat((v, torch.ones_like(v[..., :1])), dim=3)
        o, last = _pair(self.core(self.q_map(q), self.k_map(k), columns, x, backend=self.backend, **state))
        wide = o.to(wide_dtype(o.dtype))
        return (wide[..., :-1] / (wide[..., -1:] + _EPS)).to(v.dtype), last

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Any:
        raise NotImplementedError


class RetentionMixer(_MeanMixer):
    """retention, with a fixed decay per head."""

    decay: Tensor

    def __init__(self, config: RetentionConfig, sizes: Sizes, module: nn.Module) -> None:
        super().__init__(config, sizes)
        self.register_buffer("decay", _decays(config, sizes.heads).float().to(sizes.device))

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Any:
        return retention(q, k, v, decay=self.decay, scale=1.0, **options)


class SSDMixer(_MeanMixer):
    """ssd: exp(g) = sigmoid(gate(x)), one for each head."""

    def __init__(self, config: SSDConfig | LogLinearAttentionConfig, sizes: Sizes, module: nn.Module) -> None:
        super().__init__(config, sizes)
        self.gate = TokenLinear(sizes, _decays(config, sizes.heads).exp().logit())

    def decay(self, x: Tensor) -> Tensor:
        """g [B, H, T]."""
        return F.logsigmoid(self.gate(x)).transpose(1, 2)

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Any:
        return ssd(q, k, v, self.decay(x), **options)


class GatedLinearMixer(_MeanMixer):
    """gated_linear_attention: exp(g) = sigmoid(gate(x)), one for each feature of each head, gate of low rank."""

    def __init__(self, config: GatedLinearAttentionConfig, sizes: Sizes, module: nn.Module) -> None:
        super().__init__(config, sizes)
        start = _decays(config, sizes.heads).exp().logit()
        self.gate = TokenLinear(sizes, start.repeat_interleave(2 * sizes.width), rank=config.gate_rank)
        self.width = 2 * sizes.width

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Any:
        g = F.logsigmoid(self.gate(x)).unflatten(2, (-1, self.width)).transpose(1, 2)
        return gated_linear_attention(q, k, v, g, scale=1.0, **options)


class LogLinearMixer(SSDMixer):
    """log_linear_attention: gates as in ssd, and level_scales = softplus(level(x)) for each head and level."""

    def __init__(self, config: LogLinearAttentionConfig, sizes: Sizes, module: Any) -> None:
        super().__init__(config, sizes, module)
        levels = levels_for(config.max_length or module.config.max_position_embeddings)
        one = torch.full((sizes.heads * levels,), math.log(math.e - 1))  # where softplus is 1
        self.level, self.heads = TokenLinear(sizes, one), sizes.heads

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Any:
        scales = -F.logsigmoid(-self.level(x))  # softplus, whose own backward does not trace in every layout
        scales = scales.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return log_linear_attention(q, k, v, self.decay(x), scales, **options)


class DeltaMixer(nn.Module):
    """delta_rule or gated_delta_rule on features of length 1, beta = sigmoid(beta(x)), g as in ssd."""

    def __init__(self, config: DeltaRuleConfig | GatedDeltaRuleConfig, sizes: Sizes, module: nn.Module) -> None:
        super().__init__()
        self.q_map, self.k_map = (_feature_map("hedgehog", sizes, heads) for heads in sizes[1:3])
        self.beta = TokenLinear(sizes, torch.full((sizes.heads,), _DELTA_START))
        self.gate: nn.Module | None = None
        if isinstance(config, GatedDeltaRuleConfig):
            self.gate = TokenLinear(sizes, _decays(config, sizes.heads).exp().logit())
        self.backend = config.backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **state: Any) -> tuple[Tensor, Any]:
        q, k, beta = self.q_map(q), self.k_map(k), torch.sigmoid(self.beta(x)).transpose(1, 2)
        options = dict(qk_l2norm=True, scale=1.0, backend=self.backend, **state)
        if self.gate is None:
            return _pair(delta_rule(q, k, v, beta, **options))
        g = F.logsigmoid(self.gate(x)).transpose(1, 2)
        return _pair(gated_delta_rule(q, k, v, g, beta, **options))


_DELTA_START = -1.0  # beta = 0.27 at first

MIXERS: dict[type[RecurrentConfig], Callable[..., nn.Module]] = {
    LinearAttentionConfig: LinearMixer,
    RetentionConfig: RetentionMixer,
    SSDConfig: SSDMixer,
    GatedLinearAttentionConfig: GatedLinearMixer,
    LogLinearAttentionConfig: LogLinearMixer,
    DeltaRuleConfig: DeltaMixer,
    GatedDeltaRuleConfig: DeltaMixer,
}


class _NamedMap(nn.Module):
    """A feature map by its name, without parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return features(x, self.name)

    def extra_repr(self) -> str:
        return repr(self.name)


def _feature_map(name: str, sizes: Sizes, heads: int) -> nn.Module:
    if name == "hedgehog":
        return HedgehogFeatureMap(heads, sizes.width, device=sizes.device, dtype=sizes.dtype)
    return _NamedMap(name)


def _pair(result: Any) -> tuple[Tensor, Any]:
    """(o, state) of a call with or without return_state."""
    return result if isinstance(result, tuple) else (result, None)


def _decays(config: DecayingConfig, heads: int) -> Tensor:
    """The log of what is left after a token, [heads] float64: half-lives spread geometrically over the heads."""
    first, last = (math.log(tokens) for tokens in config.half_lives)
    return -math.log(2) / torch.linspace(first, last, heads, dtype=torch.float64).exp()
