"""Attention: exact, in forms whose memory and time do not grow with T x S where they need not."""

# isort: off
# In this order the ledger, and the tables made from it, list the techniques.
from effkit.attention.softmax import SoftmaxAttentionConfig, softmax_attention
from effkit.attention.sliding_window import SlidingWindowConfig, sliding_window_attention
from effkit.attention.linear import (
    FEATURE_MAPS,
    HedgehogFeatureMap,
    LinearAttention,
    LinearAttentionConfig,
    linear_attention,
)
from effkit.attention.retnet import MultiScaleRetention, RetentionConfig, default_decay, retention
from effkit.attention.mamba2 import Mamba2, SSDConfig, ssd
from effkit.attention.gla import GatedLinearAttention, GatedLinearAttentionConfig, gated_linear_attention
from effkit.attention.deltanet import (
    DeltaNet,
    DeltaRuleConfig,
    GatedDeltaNet,
    GatedDeltaRuleConfig,
    delta_rule,
    gated_delta_rule,
)
from effkit.attention.log_linear import (
    LevelScales,
    LogLinearAttentionConfig,
    LogLinearMamba2,
    log_linear_attention,
)
from effkit.attention.log_linear_delta import LogLinearGatedDeltaNet, log_linear_gated_delta_rule

# isort: on
from effkit.attention._fenwick import LogLinearState
from effkit.attention._recurrent import LayerState, RecurrentState
from effkit.attention.grouped_query import (
    GQAConfig,
    GroupedQueryAttention,
    KVCache,
    mha_to_gqa,
    rotary_embedding,
    similar_heads,
)
from effkit.attention.longformer import LongformerAttention
from effkit.attention.short_convolution import ShortConvolution
from effkit.attention.window_caches import RollingKVCache, SinkKVCache

__all__ = [
    "FEATURE_MAPS",
    "DeltaNet",
    "DeltaRuleConfig",
    "GQAConfig",
    "GatedDeltaNet",
    "GatedDeltaRuleConfig",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GroupedQueryAttention",
    "HedgehogFeatureMap",
    "KVCache",
    "LayerState",
    "LevelScales",
    "LinearAttention",
    "LinearAttentionConfig",
    "LogLinearAttentionConfig",
    "LogLinearGatedDeltaNet",
    "LogLinearMamba2",
    "LogLinearState",
    "LongformerAttention",
    "Mamba2",
    "MultiScaleRetention",
    "RecurrentState",
    "RetentionConfig",
    "RollingKVCache",
    "SSDConfig",
    "ShortConvolution",
    "SinkKVCache",
    "SlidingWindowConfig",
    "SoftmaxAttentionConfig",
    "default_decay",
    "delta_rule",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_attention",
    "log_linear_attention",
    "log_linear_gated_delta_rule",
    "mha_to_gqa",
    "retention",
    "rotary_embedding",
    "similar_heads",
    "sliding_window_attention",
    "softmax_attention",
    "ssd",
]
