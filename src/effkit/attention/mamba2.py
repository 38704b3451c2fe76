"""State-space duality: linear attention whose memory decays by a factor per head and step, in time linear in T.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t        S [K, V], g_t <= 0

(Dao and Gu, arXiv 2405.21060, equations 1 and 12, with C = q, B = k, X dt = v, A dt = g.) The same sum is a masked
product, o = scale * (L o q k^T) v with L[t, s] = exp(g_{s+1} + ... + g_t), which is how a chunk of C tokens is computed
(section 6). This is the scalar-gated core that linear attention (g = 0) and retention (g constant) share.

Cost: 2 T (C + 2 K) V + 2 T C K operations a head, and one read of q, k, v, one write of o; the state is K x V numbers
however long the sequence. When not to use it: below a thousand tokens or so exact attention costs no more. Known limit:
a state of fixed size cannot hold every key of a long context, so exact recall (copying, retrieval) is worse than with
softmax attention of the same size (Arora et al., arXiv 2402.18668); hybrids keep some softmax layers for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._blocks import wide_dtype
from effkit.attention._recurrent import (
    LayerState,
    RecurrentState,
    autocast,
    by_spans,
    check_chunk_size,
    check_inputs,
    check_scale,
    chunk_length,
    cumulative_decay,
    expand_heads,
    from_chunks,
    next_position,
    pair_decay,
    run,
    scan_chunks,
    to_chunks,
    widen,
    zero_rest,
)
from effkit.attention._swap import DecayingConfig
from effkit.attention.short_convolution import ShortConvolution
from effkit.ops import Case, Op, register


def ssd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
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
    decay = torch.ones_like(v[..., 0]) if g is None else g.exp()
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(2) for x in (q, k, v, decay)), strict=True):
        state = decay_t[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outs.append(scale * q_t[..., None, :] @ state)
    return torch.cat(outs, 2).to(dtype), RecurrentState(state, next_position(q, initial_state))


def ssd_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """Chunks: a masked product within each, and a scan over the states between them."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    C = chunk_length(q.shape[2], chunk_size)
    q, k, v = (expand_heads(x, heads) for x in widen(q * scale, k, v))
    o, memory = by_spans(partial(_in_chunks, C), C, first_memory(k, v, initial_state), q, k, v, g)
    return o.to(dtype), RecurrentState(memory, next_position(q, initial_state))


def _in_chunks(C: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """A span of tokens in chunks of C: o and the memory after it."""
    T = q.shape[2]
    q, k, v = (to_chunks(x, C) for x in (q, k, v))
    scores = q @ k.mT  # [B, H, N, C, C]
    if g is None:
        decay, weights = None, scores.tril()
    else:
        c = cumulative_decay(to_chunks(g, C))  # [B, H, N, C]
        weights = scores * pair_decay(c, q.dtype)
        q = q * c.to(q.dtype).exp()[..., None]  # from the start of the chunk to the token
        k = k * (c[..., -1:] - c).to(q.dtype).exp()[..., None]  # from the token to the end of the chunk
        decay = c[..., -1].to(q.dtype).exp()
    before, last = scan_chunks(k.mT @ v, decay, memory)
    return from_chunks(weights @ v + q @ before, T), last


def first_memory(k: Tensor, v: Tensor, initial: RecurrentState | None) -> Tensor:
    """The memory before the first token, [B, H, K, V] in k's dtype; zeros without a state."""
    if initial is not None:
        return initial.memory.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])


def ssd(
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
    """Linear attention with a decay per head and step: the state-space duality of Mamba-2.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t        arXiv 2405.21060, equation 1

    q [B, Hq, T, K]     queries (C of the paper), float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys (B of the paper)
    v [B, Hv, T, V]     values (X dt of the paper); q, k, v of one dtype (under autocast they are cast to its dtype)
    g [B, H, T]         log-decays <= 0 (A dt of the paper), any float dtype; float32 is what models use
    initial_state       RecurrentState of an earlier call, or its memory [B, H, K, V]; default zeros
    return_state        also return the RecurrentState after the last token
    scale               default 1
    cu_seqlens [N]      int32 or int64, 0 = first <= ... <= last <= T: sequences packed along T of a single batch row,
                        each with a state of its own (initial_state then has N - 1 rows); rows past the last give zeros
    chunk_size          a power of two: tokens that are computed as one product; changes speed and rounding only
    backend             "reference", "torch", "triton" or None for the fastest that can

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on (groups of
    heads that share B and C have Hq = Hk < Hv = H). Returns o [B, H, T, V] in v's dtype; with return_state also
    RecurrentState(memory [B, H, K, V] in float32 (float64 for float64), position [B]). ssd of the first a tokens, then
    of the rest with their state, equals ssd of all. Gradients flow to q, k, v, g and initial_state, from o and memory.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    tensors = dict(q=q, k=k, v=v, g=g)
    check_inputs(SSD, tensors, initial_state, cu_seqlens)
    check_chunk_size("ssd", chunk_size)
    scale = check_scale("ssd", scale, 1.0)
    return run(
        SSD, backend, tensors, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
        scale=scale, chunk_size=chunk_size,
    )  # fmt: skip


class Mamba2(nn.Module):
    """The layer of Mamba-2 (arXiv 2405.21060, section 7.1 and figure 6): x [B, T, C] -> y [B, T, C].

        z, uBC, dt = in_proj(x)        u, B, C = conv1d(uBC)        dt = softplus(dt + dt_bias)
        y = out_proj(norm((ssd(q=C, k=B, v=dt u, g=-exp(A_log) dt) + D u) * silu(z)))

    hidden_size       C
    state_size        K, the width of B and C
    head_dim          V; there are expand * hidden_size / head_dim heads
    n_groups          groups of heads that share B and C; the norm is over the channels of a group
    conv_kernel       tokens that the convolution sees
    bias, conv_bias   of the projections, of the convolution
    time_step_limit   dt is clamped to it
    norm_eps          added to the mean square in the norm
    chunk_size, backend    as in `ssd`

    Parameters have the names and shapes of transformers' Mamba2Mixer, whose weights load_state_dict takes as they are.
    A_log, D and dt_bias are commonly left out of weight decay.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        time_step_limit: tuple[float, float] = (0.0, math.inf),
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        if head_dim < 1 or inner % head_dim:
            raise ValueError(f"Mamba2: head_dim is {head_dim}, expected a divisor of expand * hidden_size = {inner}")
        heads = inner // head_dim
        if n_groups < 1 or heads % n_groups:
            raise ValueError(f"Mamba2: n_groups is {n_groups}, expected a divisor of the {heads} heads")
        check_chunk_size("Mamba2", chunk_size)
        self.hidden_size, self.head_dim, self.state_size, self.n_groups = hidden_size, head_dim, state_size, n_groups
        self.time_step_limit, self.chunk_size, self.backend = time_step_limit, chunk_size, backend
        made: Any = dict(device=device, dtype=dtype)
        self._widths = inner, inner + 2 * n_groups * state_size, heads  # of z, of u, B and C together, of dt
        self.in_proj = nn.Linear(hidden_size, sum(self._widths), bias=bias, **made)
        self.conv1d = ShortConvolution(self._widths[1], conv_kernel, bias=conv_bias, **made)
        self.dt_bias = nn.Parameter(torch.empty(heads, **made))
        self.A_log = nn.Parameter(torch.empty(heads, **made))
        self.D = nn.Parameter(torch.empty(heads, **made))
        self.norm = _GatedNorm(inner, n_groups, norm_eps, **made)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """exp(A_log) uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1], D one; others as in torch."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            module.reset_parameters()
        self.A_log.uniform_(1, 16).log_()
        start_steps(self.dt_bias)
        self.D.fill_(1)

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """y [B, T, C], with return_state also the LayerState after the last token.

        state: that of an earlier call, which x continues. cu_seqlens [N] packs sequences along T of a single row, as in
        `ssd`, each with a state of its own.
        """
        conv, memory = state or (None, None)
        wide = wide_dtype(x.dtype)
        x = zero_rest(x, cu_seqlens)
        z, u, dt = self.in_proj(x).split(self._widths, dim=-1)
        u, conv = self.conv1d(u, state=conv, cu_seqlens=cu_seqlens)
        u, B, C = u.split((self._widths[0], *[self.n_groups * self.state_size] * 2), dim=-1)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)  # [B, T, H]
        q, k = (part.unflatten(2, (self.n_groups, -1)).transpose(1, 2) for part in (C, B))
        u = u.unflatten(2, (-1, self.head_dim))
        o: Any = self._attend(
            x, q, k, (dt[..., None] * u).to(u.dtype).transpose(1, 2), -(self.A_log.to(wide).exp() * dt).transpose(1, 2),
            initial_state=memory, return_state=return_state, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size,
            backend=self.backend,
        )  # fmt: skip
        o, memory = o if return_state else (o, None)
        y = o.transpose(1, 2) + self.D.to(wide)[:, None] * u
        y = self.out_proj(self.norm(y.flatten(2), z).to(x.dtype))
        return (y, LayerState(conv, memory)) if return_state else y

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
        """What LogLinearMamba2 does otherwise; x is the input of the layer."""
        return ssd(q, k, v, g, **options)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, state_size={self.state_size}, head_dim={self.head_dim}, n_groups={self.n_groups}"


@torch.no_grad()
def start_steps(bias: Tensor) -> None:
    """Fills a bias so that softplus(bias) is log-uniform in [0.001, 0.1]."""
    step = bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
    bias.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus


@dataclass(frozen=True)
class SSDConfig(DecayingConfig):
    """Puts gated linear attention, a decay per head and step, into a trained model: `apply(model, SSDConfig())`.

        o_t = sum_s w_ts v_s / sum_s w_ts,  w_ts = exp(g_{s+1} + ... + g_t) phi(q_t) . phi(k_s)

    phi are learned maps of positive features (`HedgehogFeatureMap`), exp(g) = sigmoid(W x + b) with W = 0 and b as
    half_lives say: it starts as `RetentionConfig` and learns from there to forget where the text says so. layers and
    backend as in `RecurrentConfig`.
    """


class _GatedNorm(nn.Module):
    """weight * rms_norm(y * silu(z)), each group of channels by itself."""

    def __init__(self, channels: int, groups: int, eps: float, **made: Any) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels, **made))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y, z, weight = widen(y, z, self.weight)
        y = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * weight


def supports(q: Tensor, v: Tensor, chunk_size: int, **_: Any) -> str | None:
    """Why the chunk kernels cannot run, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"widths {q.shape[3]} and {v.shape[3]}: the kernels hold up to 256"
    if chunk_size not in (16, 32, 64):
        return f"chunk_size is {chunk_size}, the kernels have 16, 32, 64"
    return None


def sizes(B: int, H: int | tuple[int, int, int], T: int, K: int, V: int | None = None, N: int = 0) -> dict[str, int]:
    """Sizes of a case; H heads of (q, k, v), or one number for all; N entries of cu_seqlens."""
    hq, hk, hv = H if isinstance(H, tuple) else (H, H, H)
    return dict(B=B, Hq=hq, Hk=hk, Hv=hv, H=max(hq, hk, hv), T=T, K=K, V=V or K, R=max(B, N - 1), N=N)


def flops(case: Case) -> float:
    """Products within chunks, and with the states between them."""
    n: Any = case.sizes
    C = case.options.get("chunk_size", 64)
    return 2 * n["B"] * n["H"] * n["T"] * (C * (n["K"] + n["V"]) / 2 + 2 * n["K"] * n["V"])


def traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * n["T"] * ((n["Hq"] + n["Hk"]) * n["K"] + (n["Hv"] + n["H"]) * n["V"] + n["H"])


def log_decay(x: Tensor) -> Tensor:
    """Log-decays from normal numbers: -|x|. A gain of 0 gives none, one of 10 gives gates that cut the past off."""
    return -x.abs()


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
    Case("small chunks", sizes(1, 2, 63, 16), dict(chunk_size=16, scale=0.25)),
    Case("packed", sizes(1, 2, 90, 16, N=5), _STATE, ("initial_state",), dict(cu_seqlens=(0, 1, 1, 66, 80))),
    Case("wide", sizes(1, 1, 65, 128), _STATE),
    Case("widest", sizes(1, 1, 66, 256, 64)),
    Case("wide values", sizes(1, 1, 33, 64, 256)),
    Case("transposed", sizes(2, 2, 33, 32), layout="transposed"),
    Case("strided", sizes(1, 2, 33, 32), _STATE, layout="strided"),
    Case("long", sizes(2, 8, 4099, 128, 64), _STATE, ("initial_state",), large=True),
)


def bench_cases(sizes_at: Callable[[int], dict[str, int]]) -> tuple[Case, ...]:
    """Lengths from 1k to 32k, in the layout in memory [B, T, H, D] in which projections leave their results."""
    lengths = (1024, 2048, 4096, 8192, 16384, 32768)
    return tuple(Case(f"T={T}", sizes_at(T), layout="transposed", large=T > 8192) for T in lengths)


BENCH = bench_cases(lambda T: sizes(1, 8, T, 64))

SSD = register(
    Op(
        name="ssd",
        area="attention",
        summary="linear attention with a decay per head and step (Mamba-2), in time linear in T",
        paper="https://arxiv.org/abs/2405.21060",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], g [B, H, T], initial_state [R, H, K, V]?, "
        "cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, K, V]",
        function=ssd,
        reference=ssd_reference,
        torch=ssd_torch,
        triton="effkit.kernels.chunk_scan:ssd",
        supports=supports,
        cases=_CASES,
        bench=BENCH,
        grads=("q", "k", "v", "g", "initial_state"),
        flops=flops,
        traffic=traffic,
        draw={"g": log_decay},
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "transformers": "effkit.rivals:transformers_ssd",
            "fla": "effkit.rivals:fla_ssd",
        },
    )
)
