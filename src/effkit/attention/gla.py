"""Gated linear attention: a linear memory whose channels each forget at a rate of their own, in time linear in T.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t        S [K, V], g_t [K] <= 0

(Yang et al., arXiv 2312.06635, equations 3 and 4, with alpha = exp(g).) Within a chunk the weight of token j for token
i is a sum over channels, sum_d q_i k_j exp(g_{j+1} + ... + g_i). Written as (q e^c)(k e^-c)^T with running sums c it
would overflow after a few strong gates. So the chunk is halved, and halved again: for i in the later half of a block
and j in the earlier one the decay splits at their border, exp(border to i) exp(j to border), both exponents <= 0, and
each level of halves is a matrix product. The paper's secondary chunks (section 4.3) do so once, then go pair by pair.

Cost: 2 T (C + 2 K) V + 2 T C K operations a head in chunks of C, log2(C) + 2 exponentials a token and channel; reads of
q, k, v, g, one write of o. When not to use it: where one gate a head and step is enough, `ssd` is cheaper by those
exponentials and by the reads of g. Exact recall over long contexts is worse than with softmax attention, as in every
state of fixed size (Arora et al., arXiv 2402.18668).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._blocks import wide_dtype
from effkit.attention._recurrent import (
    RecurrentState,
    autocast,
    by_spans,
    check_chunk_size,
    check_inputs,
    check_scale,
    chunk_length,
    expand_heads,
    from_chunks,
    next_position,
    run,
    scan_chunks,
    to_chunks,
    widen,
    zero_rest,
)
from effkit.attention._swap import DecayingConfig
from effkit.attention.mamba2 import bench_cases, first_memory, log_decay, sizes
from effkit.ops import Case, Op, register


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The recurrence, one token after the other."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v, g = widen(*(expand_heads(x, heads) for x in (q, k, v)), g)
    state = first_memory(k, v, initial_state)
    outs = [v[:, :, :0]]
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, g)), strict=True):
        state = g_t[..., :, None].exp() * state + k_t[..., :, None] * v_t[..., None, :]
        outs.append(scale * q_t[..., None, :] @ state)
    return torch.cat(outs, 2).to(dtype), RecurrentState(state, next_position(q, initial_state))


def gated_linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """Chunks: products between halves of halves within each, and a scan over the states between them."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    C = chunk_length(q.shape[2], chunk_size)
    q, k, v = widen(*(expand_heads(x, heads) for x in (q, k, v)))
    parts = (scale * q, k, v, g.to(q.dtype))
    o, memory = by_spans(partial(_in_chunks, C), C, first_memory(k, v, initial_state), *parts)
    return o.to(dtype), RecurrentState(memory, next_position(q, initial_state))


def _in_chunks(C: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """A span of tokens in chunks of C: o and the memory after it."""
    T = q.shape[2]
    q, k, v, g = (to_chunks(x, C) for x in (q, k, v, g))
    weights, since, left = halve(q, k, g)
    before, last = scan_chunks((k * left.exp()).mT @ v, since[..., -1, :].exp(), memory)
    return from_chunks(weights @ v + (q * since.exp()) @ before, T), last


def halve(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of a chunk, and the log-decays from its start to each token and from each token to its end.

    q, k, g [..., C, K] -> weights [..., C, C], zero for j > i; since, left [..., C, K]. From blocks of one token up to
    the whole chunk. The log-decays are sums of g alone, never differences of sums: however strong a gate, those of its
    neighbours keep their bits, and a gate of -inf is a number like any other.
    """
    C = q.shape[-2]
    weights = (q * k).sum(-1)[..., None, None]  # [..., blocks, length, length]
    since, left = g, torch.zeros_like(g)
    for length in (1 << level for level in range(C.bit_length() - 1)):
        _, q_late = _halves(q, length)
        k_early, _ = _halves(k, length)
        (since_early, since_late), (left_early, left_late) = _halves(since, length), _halves(left, length)
        across = (q_late * since_late.exp()) @ (k_early * left_early.exp()).mT
        early, late = weights.unflatten(-3, (-1, 2)).unbind(-3)
        weights = torch.cat((torch.cat((early, torch.zeros_like(across)), -1), torch.cat((across, late), -1)), -2)
        total_early, total_late = since_early[..., -1:, :], since_late[..., -1:, :]
        since = torch.cat((since_early, since_late + total_early), -2).flatten(-3, -2)
        left = torch.cat((left_early + total_late, left_late), -2).flatten(-3, -2)
    return weights.flatten(-3, -2), since, left


def _halves(x: Tensor, length: int) -> tuple[Tensor, ...]:
    """The earlier and the later halves of blocks of 2 * length tokens: [..., C, K] -> two [..., blocks, length, K]."""
    return x.unflatten(-2, (-1, 2, length)).unbind(-3)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: RecurrentState | Tensor | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RecurrentState]:
    """Linear attention with a decay per head, step and key channel.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t        arXiv 2312.06635, equation 3

    q [B, Hq, T, K]     queries, float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    g [B, H, T, K]      log-decays <= 0, any float dtype; float32 is what models use. -inf forgets the channel's past
    scale               default K ** -0.5
    initial_state, return_state, cu_seqlens, chunk_size, backend    as in `ssd`

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also RecurrentState(memory [B, H, K, V], position [B]), float32
    (float64 for float64). Gradients flow to q, k, v, g and initial_state, from o and memory. Raises ValueError or
    TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    tensors = dict(q=q, k=k, v=v, g=g)
    check_inputs(GATED_LINEAR_ATTENTION, tensors, initial_state, cu_seqlens)
    check_chunk_size("gated_linear_attention", chunk_size)
    scale = check_scale("gated_linear_attention", scale, q.shape[3] ** -0.5 if q.shape[3] else 1.0)
    return run(
        GATED_LINEAR_ATTENTION, backend, tensors, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, scale=scale, chunk_size=chunk_size,
    )  # fmt: skip


class GatedLinearAttention(nn.Module):
    """The layer of arXiv 2312.06635, section 4.4: x [B, T, C] -> y [B, T, C].

        g = logsigmoid(x W1 W2 + b) / gate_normalizer
        y = (RMSNorm(gated_linear_attention(q, k, v, g)) * silu(x W_r)) W_o        the norm over each head's values

    hidden_size        C
    num_heads          H
    expand_k           K = expand_k * C / H, the width of a head's queries, keys and gates
    expand_v           V = expand_v * C / H, the width of a head's values
    gate_low_rank      columns of W1
    gate_normalizer    16 makes untrained gates slow: a factor of about 0.96 a step
    norm_eps           of the RMSNorm
    chunk_size, backend    as in `gated_linear_attention`
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keys, values = int(hidden_size * expand_k), int(hidden_size * expand_v)
        for name, width in (("expand_k", keys), ("expand_v", values)):
            if width < num_heads or width % num_heads:
                raise ValueError(
                    f"GatedLinearAttention: {name} * hidden_size is {width}, expected a multiple of "
                    f"num_heads={num_heads}"
                )
        if gate_low_rank < 1 or gate_normalizer <= 0:
            raise ValueError(
                f"GatedLinearAttention: gate_low_rank is {gate_low_rank} and gate_normalizer {gate_normalizer}, "
                "expected at least 1 and more than 0"
            )
        check_chunk_size("GatedLinearAttention", chunk_size)
        self.num_heads, self.gate_normalizer, self.chunk_size, self.backend = (
            num_heads, gate_normalizer, chunk_size, backend
        )  # fmt: skip

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj = linear(hidden_size, keys), linear(hidden_size, keys)
        self.v_proj, self.g_proj = linear(hidden_size, values), linear(hidden_size, values)
        self.gk_proj = nn.Sequential(linear(hidden_size, gate_low_rank), linear(gate_low_rank, keys, bias=True))
        self.g_norm = nn.RMSNorm(values // num_heads, eps=norm_eps, device=device, dtype=dtype)
        self.o_proj = linear(values, hidden_size)

    def forward(
        self,
        x: Tensor,
        *,
        state: RecurrentState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RecurrentState]:
        """y, or (y, state) with return_state; state and cu_seqlens as in `gated_linear_attention`."""
        x = zero_rest(x, cu_seqlens)
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        gate = self.gk_proj(x)
        g = self._heads(F.logsigmoid(gate.to(wide_dtype(gate.dtype))) / self.gate_normalizer)
        result = gated_linear_attention(
            q, k, v, g, initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size, backend=self.backend,
        )  # fmt: skip
        o, *last = result if isinstance(result, tuple) else (result,)
        o = o.transpose(1, 2).to(self.g_norm.weight.dtype)  # under autocast o is half, the norm is not
        y = self.o_proj(self.g_norm(o).flatten(2) * F.silu(self.g_proj(x)))
        return (y, *last) if return_state else y

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D], a view."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, gate_normalizer={self.gate_normalizer}"


@dataclass(frozen=True)
class GatedLinearAttentionConfig(DecayingConfig):
    """Puts gated linear attention, a decay per channel and step, into a trained model.

        o_t = sum_s w_ts v_s / sum_s w_ts,  w_ts = sum_d phi(q_t)_d phi(k_s)_d exp(g_{s+1, d} + ... + g_{t, d})

    phi are learned maps of positive features (`HedgehogFeatureMap`), exp(g) = sigmoid(W2 W1 x + b) with W1 of
    gate_rank rows, W2 = 0 and b as half_lives say: it starts as `RetentionConfig`. layers, backend: `RecurrentConfig`.
    """

    gate_rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.gate_rank) is not int or self.gate_rank < 1:
            raise ValueError(f"GatedLinearAttentionConfig: gate_rank is {self.gate_rank!r}, expected at least 1")


def _supports(q: Tensor, v: Tensor, chunk_size: int, **_: Any) -> str | None:
    """Why the kernels cannot run, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"widths {q.shape[3]} and {v.shape[3]}: the kernels hold up to 256"
    if chunk_size not in (16, 32, 64):
        return f"chunk_size is {chunk_size}, the kernels have 16, 32, 64"
    return None


def _flops(case: Case) -> float:
    """Products within chunks, and with the states between them."""
    n: Any = case.sizes
    C = case.options.get("chunk_size", 64)
    return 2 * n["B"] * n["H"] * n["T"] * (C * (n["K"] + n["V"]) / 2 + 2 * n["K"] * n["V"])


def _traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * n["T"] * ((n["Hq"] + n["Hk"] + n["H"]) * n["K"] + (n["Hv"] + n["H"]) * n["V"])


_STATE = dict(return_state=True)
_CASES = (
    Case("one", sizes(1, 1, 1, 16), _STATE),
    Case("no batch", sizes(0, 2, 5, 16), _STATE),
    Case("no tokens", sizes(2, 2, 0, 16), _STATE, ("initial_state",)),
    Case("two", sizes(2, 2, 2, 16), _STATE, ("initial_state",)),
    Case("primes", sizes(2, 3, 37, 40, 24), _STATE),
    Case("a chunk", sizes(1, 2, 64, 16), _STATE),
    Case("one past a chunk", sizes(1, 2, 65, 32), _STATE, ("initial_state",)),
    Case("several chunks", sizes(1, 2, 130, 16), _STATE, ("initial_state",), gain=dict(g=0.1)),
    Case("grouped keys", sizes(1, (2, 2, 4), 70, 16), _STATE),
    Case("grouped values", sizes(2, (4, 2, 2), 35, 16, 32), _STATE, ("initial_state",)),
    Case("strong gates", sizes(1, 2, 100, 16), _STATE, ("initial_state",), gain=dict(g=10.0)),
    Case("no decay", sizes(1, 2, 70, 16), _STATE, gain=dict(g=0.0)),
    Case("small chunks", sizes(1, 2, 63, 16), dict(chunk_size=16, scale=1.0)),
    Case("packed", sizes(1, 2, 90, 16, N=5), _STATE, ("initial_state",), dict(cu_seqlens=(0, 1, 1, 66, 80))),
    Case("wide keys", sizes(1, 1, 33, 256, 64)),
    Case("wide values", sizes(1, 1, 65, 64, 128), _STATE),
    Case("transposed", sizes(2, 2, 33, 32), layout="transposed"),
    Case("strided", sizes(1, 2, 33, 32), _STATE, layout="strided"),
    Case("long", sizes(2, 4, 4099, 128, 256), _STATE, ("initial_state",), large=True),
)
_BENCH = bench_cases(lambda T: sizes(1, 4, T, 64, 128))

GATED_LINEAR_ATTENTION = register(
    Op(
        name="gated_linear_attention",
        area="attention",
        summary="linear attention with a decay per head, step and channel (GLA), in time linear in T",
        paper="https://arxiv.org/abs/2312.06635",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], g [B, H, T, K], initial_state [R, H, K, V]?, "
        "cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, K, V]",
        function=gated_linear_attention,
        reference=gated_linear_attention_reference,
        torch=gated_linear_attention_torch,
        triton="effkit.kernels.chunk_gla:gated_linear_attention",
        supports=_supports,
        cases=_CASES,
        bench=_BENCH,
        grads=("q", "k", "v", "g", "initial_state"),
        flops=_flops,
        traffic=_traffic,
        draw={"g": log_decay},
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "fla": "effkit.rivals:fla_gated_linear_attention",
        },
    )
)
