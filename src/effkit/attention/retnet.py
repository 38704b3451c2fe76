"""Retention: linear attention with one fixed decay per head, in time linear in T.

    S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = scale * q_t S_t        which is  o = scale * (q k^T o D) v
    D[t, s] = gamma_h ** (t - s) for t >= s, else 0                  gamma_h = 1 - 2 ** (-5 - h)

(Sun et al., arXiv 2307.08621, equations 5 and 6; q and k come rotated, as in the layer `MultiScaleRetention`.) Heads
with gamma near 1 look far back, the others at their neighbours.

Cost: that of `ssd`, whose special case this is. When not to use it: where what to forget depends on the text; then
the gates of `ssd` or `gated_linear_attention` do better at the same cost. Exact recall over long contexts is worse than
with softmax attention, as in every state of fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from effkit.attention._swap import DecayingConfig
from effkit.attention.grouped_query import rotary_embedding
from effkit.attention.mamba2 import BENCH, first_memory, flops, sizes, ssd_torch, supports, traffic
from effkit.ops import Case, Op, register


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The masked product with D in full; a state counts as what lies before the first token."""
    T, dtype, heads = q.shape[2], v.dtype, len(decay)
    q, k, v, decay = widen(*(expand_heads(x, heads) for x in (q, k, v)), decay)
    t = torch.arange(T, device=q.device)
    before = t[:, None] >= t
    D = torch.where(before, (decay[:, None, None] * (t[:, None] - t) * before).exp(), 0.0)
    first = first_memory(k, v, initial_state)
    since = (decay[:, None] * (t + 1)).exp()[..., None]  # gamma ** (t + 1): from before the first token to t
    o = (scale * (q @ k.mT) * D) @ v + scale * (q * since) @ first
    left = (decay[:, None] * (T - 1 - t)).exp()[..., None]  # gamma ** (T - 1 - t): from t to the last token
    memory = (k * left).mT @ v + (decay * T).exp()[:, None, None] * first
    return o.to(dtype), RecurrentState(memory, next_position(q, initial_state))


def retention_torch(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor, **options: Any) -> tuple[Tensor, RecurrentState]:
    """Chunks, as in ssd, with the same decay at every step."""
    return ssd_torch(q, k, v, spread(decay, q), **options)


def spread(decay: Tensor, q: Tensor) -> Tensor:
    """decay [H] at every token: [B, H, T], a view."""
    return decay[None, :, None].expand(q.shape[0], -1, q.shape[2])


def default_decay(heads: int, device: torch.device | str | None = None) -> Tensor:
    """log(1 - 2 ** (-5 - h)) for h = 0, 1, ...: [heads] float32 (arXiv 2307.08621, section 2.4)."""
    h = torch.arange(heads, dtype=torch.float64, device=device)
    return torch.log1p(-(2.0 ** (-5 - h))).float()


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    initial_state: RecurrentState | Tensor | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RecurrentState]:
    """Linear attention with one fixed decay per head.

        S_t = gamma_h S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t        arXiv 2307.08621, equation 6

    q [B, Hq, T, K]     queries, rotated by the caller; float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys, rotated by the caller
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    decay [H]           log(gamma_h) <= 0; default log(1 - 2 ** (-5 - h)), `default_decay`
    scale               default K ** -0.5
    initial_state, return_state, cu_seqlens, chunk_size, backend    as in `ssd`

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also RecurrentState(memory [B, H, K, V], position [B]). Gradients
    flow to q, k, v, decay and initial_state. Raises ValueError or TypeError for arguments that do not fit,
    BackendUnavailable for a backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    tensors = dict(q=q, k=k, v=v)
    heads = check_inputs(RETENTION, tensors, initial_state, cu_seqlens, decay=decay)
    check_chunk_size("retention", chunk_size)
    if decay is None:
        decay = default_decay(heads, q.device)
    elif len(decay) != heads:
        raise ValueError(f"retention: decay has {len(decay)} entries, expected H={heads}, the most heads of q, k, v")
    elif decay.device.type == "cpu" and not torch.compiler.is_compiling() and decay.max() > 1e-3:
        raise ValueError(f"retention: decay reaches {decay.max().item():.4g}, expected log(gamma) <= 0")
    return run(
        RETENTION, backend, tensors, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
        decay=decay, scale=check_scale("retention", scale, q.shape[3] ** -0.5 if q.shape[3] else 1.0),
        chunk_size=chunk_size,
    )  # fmt: skip


class MultiScaleRetention(nn.Module):
    """The layer of RetNet (arXiv 2307.08621, equation 8): x [B, T, C] -> y [B, T, C].

        y = o_proj(silu(g_proj(x)) * g_norm(retention(rotate(q), rotate(k), v)))        g_norm over each head's values

    hidden_size       C
    num_heads         H, with decays 1 - 2 ** (-5 - h)
    expand_k          K = expand_k * C / H, the width of a head's queries and keys
    expand_v          V = expand_v * C / H, the width of a head's values
    rope_theta        base of the rotary embedding
    norm_eps          of the group norm
    chunk_size, backend    as in `retention`
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keys, values = int(hidden_size * expand_k), int(hidden_size * expand_v)
        for name, width, unit in (("expand_k", keys, 2 * num_heads), ("expand_v", values, num_heads)):
            if width < 1 or width % unit:
                raise ValueError(
                    f"MultiScaleRetention: {name} * hidden_size is {width}, expected a multiple of {unit} "
                    f"(num_heads={num_heads}; queries and keys are rotated in pairs)"
                )
        check_chunk_size("MultiScaleRetention", chunk_size)
        self.num_heads, self.rope_theta, self.chunk_size, self.backend = num_heads, rope_theta, chunk_size, backend

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj = linear(hidden_size, keys), linear(hidden_size, keys)
        self.v_proj, self.g_proj = linear(hidden_size, values), linear(hidden_size, values)
        self.g_norm = nn.GroupNorm(num_heads, values, eps=norm_eps, device=device, dtype=dtype)
        self.o_proj = linear(values, hidden_size)

    def forward(
        self,
        x: Tensor,
        *,
        state: RecurrentState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RecurrentState]:
        """y, or (y, state) with return_state; state and cu_seqlens as in `retention`."""
        x = zero_rest(x, cu_seqlens)
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        positions = token_positions(x.shape[1], state, cu_seqlens, x.device)
        q, k = (rotary_embedding(part, positions, self.rope_theta) for part in (q, k))
        result = retention(
            q, k, v, initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size,
            backend=self.backend,
        )  # fmt: skip
        o, *last = result if isinstance(result, tuple) else (result,)
        rows = o.transpose(1, 2).flatten(2).flatten(0, 1)  # a group is one head of one token
        y = self.o_proj(F.silu(self.g_proj(x)) * self.g_norm(rows).unflatten(0, x.shape[:2]))
        return (y, *last) if return_state else y

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D], a view."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rope_theta={self.rope_theta}"


@dataclass(frozen=True)
class RetentionConfig(DecayingConfig):
    """Puts retention in the place of a trained model's attention: `apply(model, RetentionConfig(layers=(1, 3)))`.

        o_t = sum_s w_ts v_s / sum_s w_ts,  w_ts = 2 ** ((s - t) / half_life_h) phi(q_t) . phi(k_s)

    phi are learned maps of positive features (`HedgehogFeatureMap`). half_lives are fixed, in tokens: those of the
    first head and the last. Trained attention looks at near tokens far more than at others; on the zoo's model the
    default spread comes closest to it. layers and backend as in `RecurrentConfig`.
    """


_STATE = dict(return_state=True)
_CASES = (
    Case("one", sizes(1, 1, 1, 16), _STATE),
    Case("no batch", sizes(0, 2, 5, 16), _STATE),
    Case("no tokens", sizes(2, 2, 0, 16), _STATE, ("initial_state",)),
    Case("primes", sizes(2, 3, 37, 40, 24), _STATE, ("decay",)),
    Case("one past a chunk", sizes(1, 2, 65, 32), _STATE, ("initial_state", "decay")),
    Case("several chunks", sizes(1, 4, 130, 16), _STATE, ("initial_state",)),
    Case("grouped keys", sizes(1, (4, 2, 2), 70, 16), _STATE, ("decay",)),
    Case("strong decay", sizes(1, 2, 100, 16), _STATE, ("initial_state", "decay"), gain=dict(decay=10.0)),
    Case("no decay", sizes(1, 2, 70, 16), _STATE, ("decay",), gain=dict(decay=0.0)),
    Case("small chunks", sizes(1, 2, 63, 16), dict(chunk_size=16, scale=1.0)),
    Case("packed", sizes(1, 2, 90, 16, N=4), _STATE, ("initial_state", "decay"), dict(cu_seqlens=(0, 1, 66, 80))),
    Case("transposed", sizes(2, 2, 33, 32), layout="transposed"),
    Case("long", sizes(2, 8, 4099, 128, 256), _STATE, ("initial_state",), large=True),
)

RETENTION = register(
    Op(
        name="retention",
        area="attention",
        summary="linear attention with one fixed decay per head (RetNet), in time linear in T",
        paper="https://arxiv.org/abs/2307.08621",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], decay [H]?, initial_state [R, H, K, V]?, "
        "cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, K, V]",
        function=retention,
        reference=retention_reference,
        torch=retention_torch,
        triton="effkit.kernels.chunk_scan:retention",
        supports=supports,
        cases=_CASES,
        bench=BENCH,
        grads=("q", "k", "v", "decay", "initial_state"),
        flops=flops,
        traffic=traffic,
        draw={"decay": lambda x: -x.abs() / 4},
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "fla": "effkit.rivals:fla_retention",
        },
    )
)
