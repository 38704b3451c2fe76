"""Attention: exact, in forms whose memory and time do not grow with T x S where they need not."""

from effkit.attention._recurrent import RecurrentState
from effkit.attention.grouped_query import (
    GQAConfig,
    GroupedQueryAttention,
    KVCache,
    mha_to_gqa,
    rotary_embedding,
    similar_heads,
)
from effkit.attention.mamba2 import ssd
from effkit.attention.softmax import SoftmaxAttentionConfig, softmax_attention

__all__ = [
    "GQAConfig",
    "GroupedQueryAttention",
    "KVCache",
    "RecurrentState",
    "SoftmaxAttentionConfig",
    "mha_to_gqa",
    "rotary_embedding",
    "similar_heads",
    "softmax_attention",
    "ssd",
]
