"""Attention: exact, in forms whose memory and time do not grow with T x S where they need not."""

from effkit.attention.softmax import SoftmaxAttentionConfig, softmax_attention

__all__ = ["SoftmaxAttentionConfig", "softmax_attention"]
