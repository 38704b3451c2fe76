"""Linear attention: a positive feature map in place of the exponential, so that keys and values add up to a matrix.

    o_i = phi(q_i) S_i / (phi(q_i) . z_i),    S_i = sum_{j <= i} phi(k_j) v_j^T,    z_i = sum_{j <= i} phi(k_j)

(Katharopoulos et al., arXiv 2006.16236, equations 5 and 18 to 20; j over all tokens when not causal.) phi = elu + 1 is
the paper's; others are below. Without the division (`normalize=False`) it is a fast-weight memory. With the softmax of
queries over channels and of keys over the tokens it is Efficient Attention (Shen et al., arXiv 1812.01243).

Cost: 2 T (C + 2 K) V + 2 T C K operations a head when causal (chunks of C), 4 T K V when not; the state is K x V + K
numbers. When not to use it: as a drop-in for trained softmax attention without further training, since no fixed phi has
its sharp weights; and for exact recall over long contexts (Arora et al., arXiv 2402.18668). Gates help: see `ssd`,
`gated_linear_attention`, `gated_delta_rule`. Without the division, sums past 65504 overflow in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkit.attention._blocks import wide_dtype
from effkit.attention._recurrent import (
    RecurrentState,
    autocast,
    check_chunk_size,
    check_inputs,
    check_scale,
    expand_heads,
    next_position,
    run,
    token_positions,
    widen,
    zero_rest,
)
from effkit.attention._swap import RecurrentConfig
from effkit.attention.grouped_query import rotary_embedding
from effkit.attention.mamba2 import BENCH, first_memory, flops, sizes, ssd_torch, supports, traffic
from effkit.ops import Case, Op, register

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    # arXiv 2006.16236, equation 7: elu(x) + 1, which in float32 would round to 0 from x = -17 on
    "elu+1": lambda x: x.clamp_max(0).exp() + torch.relu(x),
    "relu": torch.relu,
    "exp": torch.exp,
    "squared relu": lambda x: torch.relu(x).square(),
    "signed softmax": lambda x: torch.cat((x.softmax(-1), (-x).softmax(-1)), -1),  # arXiv 2402.04347, 2 K features
    "identity": lambda x: x,
}
_CHOICES = ", ".join(repr(name) for name in (*FEATURE_MAPS, "softmax"))


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The equations: a recurrence when causal, sums over all tokens when not. q and k are features already."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = widen(*(expand_heads(x, heads) for x in (q, k, v)))
    S, z = first_memory(k, v, initial_state), first_normalizer(k, initial_state)
    outs = [v[:, :, :0]]
    if not causal:
        S, z = k.mT @ v, k.sum(2)
    for q_t, k_t, v_t in zip(*(x.unbind(2) for x in (q, k, v)), strict=True):
        if causal:
            S = S + k_t[..., :, None] * v_t[..., None, :]
            z = z + k_t
        o = scale * q_t[..., None, :] @ S
        if normalize:
            o = o / (scale * (q_t * z).sum(-1) + eps)[..., None, None]
        outs.append(o)
    return torch.cat(outs, 2).to(dtype), RecurrentState(S, next_position(q, initial_state), z if normalize else None)


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """Chunks when causal (ssd without decay), two products when not.

    The denominator is the sum for a value of 1: one more column. Its gradient then cancels against that of the
    numerator within one product, where it must, and not between two results that were rounded before.
    """
    dtype, width, heads = v.dtype, v.shape[3], max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = widen(q, k, v)
    if normalize:
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=3)
        if initial_state is not None:
            assert initial_state.normalizer is not None
            columns = torch.cat((initial_state.memory, initial_state.normalizer[..., None]), dim=3)
            initial_state = RecurrentState(columns, initial_state.position)
    if causal:
        o, state = ssd_torch(q, k, v, None, initial_state=initial_state, scale=scale, chunk_size=chunk_size)
    else:
        q, k, v = (expand_heads(x, heads) for x in (q, k, v))
        state = RecurrentState(k.mT @ v, next_position(q, None))
        o = (scale * q) @ state.memory
    if normalize:
        o = o[..., :width] / (o[..., width:] + eps)
        state = state._replace(memory=state.memory[..., :width], normalizer=state.memory[..., width])
    return o.to(dtype), state


def first_normalizer(k: Tensor, initial: RecurrentState | None) -> Tensor:
    """The sum of the keys before the first token, [B, H, K] in k's dtype; zeros without a state."""
    if initial is not None and initial.normalizer is not None:
        return initial.normalizer.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[1], k.shape[-1])


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu+1",
    normalize: bool = True,
    causal: bool = True,
    eps: float = 1e-6,
    key_lengths: Tensor | None = None,
    initial_state: RecurrentState | Tensor | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RecurrentState]:
    """Attention whose weights are products of positive features, in time linear in T.

        o_i = phi(q_i) S_i / (phi(q_i) . z_i + eps)        arXiv 2006.16236, equations 5 and 18 to 20

    q [B, Hq, T, D]     queries, float16, bfloat16, float32 or float64
    k [B, Hk, T, D]     keys
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    feature_map         phi: "elu+1", "relu", "exp", "squared relu", "signed softmax" (2 D features), "identity", or a
                        function [B, H, T, D] -> [B, H, T, K] with results >= 0. "softmax", with causal=False only:
                        queries over channels, keys over the tokens (arXiv 1812.01243), which needs no division
    normalize           divide by the sum of the weights; False leaves scale * phi(q_i) S_i
    causal              token i sees tokens up to i; otherwise all of them
    eps                 added to the denominator (in units of the weights, after scale)
    key_lengths [B]     int32 or int64, with causal=False: tokens at and past this index of a row are not seen
    initial_state       causal: RecurrentState of an earlier call, or with normalize=False its memory [B, H, K, V]
    return_state        causal: also return the RecurrentState after the last token
    scale               default 1; matters beside eps and without normalize
    cu_seqlens, chunk_size, backend    as in `ssd`

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also RecurrentState(memory [B, H, K, V], position [B], normalizer
    [B, H, K]), float32 (float64 for float64). Gradients flow to q, k, v and initial_state. Raises ValueError or
    TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    check_chunk_size("linear_attention", chunk_size)
    _check(causal, normalize, initial_state, return_state, key_lengths, cu_seqlens, feature_map)
    raw = dict(q=q, k=k, v=v)
    check_inputs(LINEAR_ATTENTION, raw, None, cu_seqlens, key_lengths=key_lengths)
    gone = _missing(k, key_lengths, cu_seqlens)
    if gone is not None:  # before the feature map, whose slope there may be NaN
        q, k = (q.masked_fill(gone, 0.0) if key_lengths is None else q), k.masked_fill(gone, 0.0)
    if feature_map == "softmax":
        wide_q, wide_k = widen(q, k)
        q, k = (x.to(v.dtype) for x in _softmax_features(wide_q, wide_k, key_lengths, cu_seqlens))
        normalize = False
    else:
        q, k = (features(x, feature_map) for x in (q, k))
    if gone is not None:  # and after it, since features of 0 are not 0
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    tensors = dict(q=q, k=k, v=v)
    check_inputs(LINEAR_ATTENTION, tensors, initial_state, cu_seqlens)
    return run(
        LINEAR_ATTENTION, backend, tensors, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, causal=causal, normalize=normalize, eps=eps,
        scale=check_scale("linear_attention", scale, 1.0), chunk_size=chunk_size,
    )  # fmt: skip


def features(x: Tensor, feature_map: str | Callable[[Tensor], Tensor]) -> Tensor:
    """phi(x) [B, H, T, K] in x's dtype; named maps are computed in float32 or wider."""
    if callable(feature_map):
        return feature_map(x).to(x.dtype)
    return FEATURE_MAPS[feature_map](x.to(wide_dtype(x.dtype))).to(x.dtype)


def _missing(k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """bool [B or 1, 1, T, 1]: tokens that do not exist; None where all do."""
    token = torch.arange(k.shape[2], device=k.device)
    if key_lengths is not None:
        return (token >= key_lengths[:, None])[:, None, :, None]
    return None if cu_seqlens is None else (token >= cu_seqlens[-1])[None, None, :, None]


def _softmax_features(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax of q over channels and of k over the tokens that belong together."""
    if key_lengths is not None:
        gone = torch.arange(k.shape[2], device=k.device) >= key_lengths[:, None]
        k = k.masked_fill(gone[:, None, :, None], -torch.inf)
        k = torch.where(gone.all(1)[:, None, None, None], 0.0, k)  # a row without keys: anything finite
    if cu_seqlens is None:
        return q.softmax(-1), k.softmax(2)
    token = torch.arange(k.shape[2], device=k.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True)  # one number more for the rest behind the last
    index = sequence[None, None, :, None].expand_as(k)
    groups = (*k.shape[:2], len(cu_seqlens) + 1, k.shape[3])
    top = k.detach().new_full(groups, -torch.inf).scatter_reduce(2, index, k.detach(), "amax")
    shifted = (k - top.gather(2, index)).exp()
    total = torch.zeros_like(top).scatter_add(2, index, shifted)
    return q.softmax(-1), shifted / total.gather(2, index)


def _check(
    causal: bool,
    normalize: bool,
    initial_state: Any,
    return_state: bool,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: Any,
) -> None:
    name = "linear_attention"
    if not callable(feature_map) and feature_map not in (*FEATURE_MAPS, "softmax"):
        raise ValueError(f"{name}: feature_map is {feature_map!r}, choices: {_CHOICES}, or a function")
    if feature_map == "softmax" and causal:
        raise ValueError(f"{name}: feature_map='softmax' takes the softmax over all tokens, it needs causal=False")
    if not causal and (initial_state is not None or return_state):
        raise ValueError(f"{name}: causal=False has no state; expected initial_state=None and return_state=False")
    if key_lengths is not None and (causal or cu_seqlens is not None):
        raise ValueError(f"{name}: key_lengths needs causal=False and no cu_seqlens; causal rows see no later padding")
    if normalize and isinstance(initial_state, Tensor):
        raise ValueError(f"{name}: initial_state is a tensor, with normalize=True a RecurrentState with a normalizer")
    if normalize and initial_state is not None and initial_state.normalizer is None:
        raise ValueError(f"{name}: initial_state has no normalizer, it comes from a call with normalize=False")


class HedgehogFeatureMap(nn.Module):
    """A feature map that is learned: [softmax(W x), softmax(-W x)] with a W for each head (arXiv 2402.04347).

    x [B, H, T, D] -> [B, H, T, 2 D]. weight [H, D, D] starts from the identity: then this is "signed softmax". Trained
    to copy the weights of softmax attention it comes closer to them than a fixed map.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_().diagonal(dim1=1, dim2=2).fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return features(x @ self.weight.mT, "signed softmax")

    def extra_repr(self) -> str:
        return f"num_heads={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"


class LinearAttention(nn.Module):
    """Projections, feature maps and linear attention: x [B, T, C] -> y [B, T, C] (arXiv 2006.16236).

    hidden_size       C
    num_heads         H query heads, num_kv_heads (default H) key/value heads, each of width head_dim (default C / H)
    feature_map       as in `linear_attention`, or "hedgehog": a `HedgehogFeatureMap` each for queries and keys, q_map
                      and k_map; a function or module takes both queries and keys
    bias              of all four projections
    rope_theta        base of a rotary embedding in front of the feature map, None for none
    normalize, causal, chunk_size, backend    as in `linear_attention`
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        feature_map: str | Callable[[Tensor], Tensor] = "elu+1",
        normalize: bool = True,
        causal: bool = True,
        bias: bool = False,
        rope_theta: float | None = None,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"LinearAttention: num_kv_heads is {kv_heads}, expected a divisor of {num_heads=}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"LinearAttention: hidden_size is {hidden_size}, expected a multiple of {num_heads=} or a head_dim"
            )
        self.head_dim = head_dim or hidden_size // num_heads
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"LinearAttention: head_dim is {self.head_dim}, a rotary embedding needs an even width "
                "(or rope_theta=None)"
            )
        check_chunk_size("LinearAttention", chunk_size)
        learned = feature_map == "hedgehog"
        if not learned:
            _check(causal, normalize, None, False, None, None, feature_map)
        self.feature_map = "identity" if learned else feature_map
        self.normalize, self.causal, self.rope_theta = normalize, causal, rope_theta
        self.chunk_size, self.backend = chunk_size, backend
        made: Any = dict(device=device, dtype=dtype)
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias, **made)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias, **made)
        self.q_map = HedgehogFeatureMap(num_heads, self.head_dim, **made) if learned else nn.Identity()
        self.k_map = HedgehogFeatureMap(kv_heads, self.head_dim, **made) if learned else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        state: RecurrentState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RecurrentState]:
        """y, or (y, state) with return_state; the options as in `linear_attention`."""
        x = zero_rest(x, cu_seqlens)
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            positions = token_positions(x.shape[1], state, cu_seqlens, x.device)
            q, k = (rotary_embedding(part, positions, self.rope_theta) for part in (q, k))
        result = linear_attention(
            self.q_map(q), self.k_map(k), v, feature_map=self.feature_map, normalize=self.normalize,
            causal=self.causal, key_lengths=key_lengths, initial_state=state, return_state=return_state,
            cu_seqlens=cu_seqlens, chunk_size=self.chunk_size, backend=self.backend,
        )  # fmt: skip
        o, *last = result if isinstance(result, tuple) else (result,)
        y = self.o_proj(o.transpose(1, 2).flatten(2))
        return (y, *last) if return_state else y

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D], a view."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, normalize={self.normalize}, causal={self.causal}"


@dataclass(frozen=True)
class LinearAttentionConfig(RecurrentConfig):
    """Puts linear attention in the place of a trained model's: `apply(model, LinearAttentionConfig(layers=(1, 3)))`.

        o_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = phi(q_i) . phi(k_j)

    feature_map is "hedgehog", a learned map of its own for each head that starts as "signed softmax", or a name in
    FEATURE_MAPS. It is a mean of values with positive weights, as softmax attention is, but the weights are flat: of a
    layer that looks at one near token little is left before a training (`zoo.distill`, `zoo.heal`). layers and backend
    as in `RecurrentConfig`.
    """

    feature_map: str = "hedgehog"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ("hedgehog", *(name for name in FEATURE_MAPS if name != "identity"))
        if self.feature_map not in choices:
            raise ValueError(f"LinearAttentionConfig: feature_map is {self.feature_map!r}, choices: {choices}")


_STATE = dict(return_state=True)
_BARE = dict(return_state=True, normalize=False)
_CASES = (
    Case("one", sizes(1, 1, 1, 16), _STATE),
    Case("no batch", sizes(0, 2, 5, 16), _STATE),
    Case("no tokens", sizes(2, 2, 0, 16), _STATE),
    Case("primes", sizes(2, 3, 37, 40, 24), _STATE),
    Case("one past a chunk", sizes(1, 2, 65, 32), _STATE),
    Case("several chunks", sizes(1, 2, 130, 16), _STATE),
    Case("unnormalised", sizes(1, 2, 70, 16), dict(feature_map="identity", scale=0.25, **_BARE), ("initial_state",)),
    Case("no tokens, unnormalised", sizes(2, 2, 0, 16), _BARE, ("initial_state",)),
    Case("grouped keys", sizes(2, (4, 2, 2), 35, 16, 32), _STATE),
    Case("relu", sizes(1, 2, 66, 16), dict(feature_map="relu", eps=1e-2)),
    Case("exp", sizes(1, 2, 40, 16), dict(feature_map="exp")),
    Case("signed softmax", sizes(1, 2, 40, 16), dict(feature_map="signed softmax", scale=16.0)),
    Case("both directions", sizes(2, (4, 2, 2), 37, 16, 24), dict(causal=False)),
    Case("both directions, unnormalised", sizes(1, 2, 20, 16), dict(causal=False, normalize=False, scale=0.1)),
    Case("both directions, lengths", sizes(3, 2, 20, 16), dict(causal=False), ints=dict(key_lengths=(20, 0, 7))),
    Case("packed", sizes(1, 2, 90, 16, N=5), ints=dict(cu_seqlens=(0, 1, 1, 66, 80))),
    Case("softmax", sizes(2, 2, 37, 16), dict(causal=False, feature_map="softmax")),
    Case("softmax, lengths", sizes(3, 2, 20, 16), dict(causal=False, feature_map="softmax"),
         ints=dict(key_lengths=(20, 0, 7))),
    Case("softmax, packed", sizes(1, 2, 40, 16, N=4), dict(causal=False, feature_map="softmax"),
         ints=dict(cu_seqlens=(0, 1, 20, 33))),
    Case("packed, unnormalised", sizes(1, 2, 90, 16, N=3), _BARE, ("initial_state",), dict(cu_seqlens=(0, 66, 80))),
    Case("transposed", sizes(2, 2, 33, 32), layout="transposed"),
    Case("strided", sizes(1, 2, 33, 32), _STATE, layout="strided"),
    Case("long", sizes(2, 8, 4099, 128, 64), _STATE, large=True),
)  # fmt: skip

LINEAR_ATTENTION = register(
    Op(
        name="linear_attention",
        area="attention",
        summary="attention with a positive feature map in place of the exponential, in time linear in T",
        paper="https://arxiv.org/abs/2006.16236",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], key_lengths [B]?, initial_state [R, H, K, V]?, "
        "cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, K, V], normalizer [R, H, K]",
        function=linear_attention,
        reference=linear_attention_reference,
        torch=linear_attention_torch,
        triton="effkit.kernels.linear_attention:linear_attention",
        supports=supports,
        cases=_CASES,
        bench=BENCH,
        grads=("q", "k", "v", "initial_state"),
        flops=flops,
        traffic=traffic,
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "fla": "effkit.rivals:fla_linear_attention",
        },
    )
)
