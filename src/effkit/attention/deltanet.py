"""Delta rules: a linear memory that corrects what it holds for a key instead of adding to it, in time linear in T.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * q_t S_t        S [K, V]

(`delta_rule`, g = 0: Yang et al., arXiv 2406.06484; `gated_delta_rule`: Yang et al., arXiv 2412.06464, equation 10.) It
is one step of gradient descent on |k_t S - v_t|^2 / 2 with step size beta_t, from a memory that has decayed: a key that
comes again replaces its value. Within a chunk of C tokens the corrections depend on each other, a triangular system:

    (I + M) U = diag(beta) (V - diag(exp c) K S)     M[i, j] = beta_i exp(c_i - c_j) k_i.k_j for j < i, c = cumsum(g)
    o = scale * (diag(exp c) Q S + (Q K^T o D) U)    S_next = exp(c_last) S + (diag(exp(c_last - c)) K)^T U

(the WY form of products of I - beta k k^T: no memory is formed within a chunk). Cost: about 2 T (C (1.5 K + V) + 3 K V)
operations a head, some twice those of `ssd`, for the same state. When not to use it: with keys that are not normalised.
I - beta k k^T lengthens no vector only while 0 <= beta |k|^2 <= 2, and with keys of normal numbers its products within
a chunk of 64 reach 1e7 (K = 8) or pass 1e20 (K = 64): hence `qk_l2norm`, and a warning. Known limit: as with every
state of fixed size, exact recall over long contexts is worse than with softmax attention.
"""

from __future__ import annotations

import warnings
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
    may_read,
    next_position,
    pair_decay,
    run,
    to_chunks,
    widen,
    zero_rest,
)
from effkit.attention._swap import DecayingConfig, RecurrentConfig
from effkit.attention.mamba2 import BENCH, first_memory, log_decay, sizes, start_steps
from effkit.attention.short_convolution import ShortConvolution
from effkit.ops import Case, Op, register


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The recurrence, one token after the other: decay, compare with what is held for the key, correct."""
    dtype, heads = v.dtype, beta.shape[1]
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    q, k, v, beta, g = widen(*(expand_heads(x, heads) for x in (q, k, v)), beta, g)
    state = first_memory(k, v, initial_state)
    outs = [v[:, :, :0]]
    decay = torch.ones_like(beta) if g is None else g.exp()
    for q_t, k_t, v_t, decay_t, beta_t in zip(*(x.unbind(2) for x in (q, k, v, decay, beta)), strict=True):
        state = decay_t[..., None, None] * state
        error = v_t[..., None, :] - k_t[..., None, :] @ state  # [B, H, 1, V]
        state = state + beta_t[..., None, None] * k_t[..., :, None] * error
        outs.append(scale * q_t[..., None, :] @ state)
    return torch.cat(outs, 2).to(dtype), RecurrentState(state, next_position(q, initial_state))


def gated_delta_rule_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """Chunks: a triangular system within each, and a scan over the states between them."""
    dtype, heads = v.dtype, beta.shape[1]
    C = chunk_length(q.shape[2], chunk_size)
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    q, k, v, beta, g = widen(q, k, v, beta, g)
    q, k, v = (expand_heads(x, heads) for x in (q * scale, k, v))
    o, memory = by_spans(partial(_in_chunks, C), C, first_memory(k, v, initial_state), q, k, v, beta, g)
    return o.to(dtype), RecurrentState(memory, next_position(q, initial_state))


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The same recurrence without decay."""
    return gated_delta_rule_reference(
        q, k, v, None, beta, initial_state=initial_state, scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size
    )


def delta_rule_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The same chunks without decay."""
    return gated_delta_rule_torch(
        q, k, v, None, beta, initial_state=initial_state, scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size
    )


def _in_chunks(
    C: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """A span of tokens in chunks of C: o and the memory after it."""
    T = q.shape[2]
    q, k, v, beta = (to_chunks(x, C) for x in (q, k, v, beta[..., None]))
    scores, system = (q @ k.mT).tril(), beta * (k @ k.mT)  # [B, H, N, C, C]
    from_start, to_end, across = q, k, None
    erase = beta * k
    if g is not None:
        c = cumulative_decay(to_chunks(g, C))  # [B, H, N, C]
        pairs = pair_decay(c, q.dtype)
        scores, system = scores * pairs, system * pairs
        decay = c.to(q.dtype).exp()[..., None]  # from before the chunk to the token
        from_start, erase = q * decay, erase * decay
        to_end = k * (c[..., -1:] - c).to(q.dtype).exp()[..., None]  # from the token to the end of the chunk
        across = decay[..., -1:, :]
    # Only what lies below the diagonal is read: I + M, M strictly lower.
    solved = torch.linalg.solve_triangular(
        system, torch.cat((beta * v, erase), dim=-1), upper=False, unitriangular=True
    )
    write, erase = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    before, values, last = _scan(write, erase, to_end, across, memory)
    return from_chunks(scores @ values + from_start @ before, T), last


def _scan(
    write: Tensor, erase: Tensor, to_end: Tensor, across: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The memory before each chunk [B, H, N, K, V], what each token writes [B, H, N, C, V], and the last memory."""
    before, values = [], []
    factors = [None] * write.shape[2] if across is None else across.unbind(2)
    for w, e, key, factor in zip(write.unbind(2), erase.unbind(2), to_end.unbind(2), factors, strict=True):
        value = w - e @ memory
        before.append(memory)
        values.append(value)
        memory = (memory if factor is None else factor * memory) + key.mT @ value
    if not before:  # no tokens
        return memory[:, :, None][:, :, :0], write, memory
    return torch.stack(before, dim=2), torch.stack(values, dim=2), memory


_EPS = 1e-6


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, computed in float32 or wider, in x's dtype."""
    wide = x.to(wide_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _EPS)).to(x.dtype)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = False,
    initial_state: RecurrentState | Tensor | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RecurrentState]:
    """A linear memory that replaces what it holds for a key: DeltaNet.

        S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T        o_t = scale * q_t S_t        arXiv 2406.06484

    q [B, Hq, T, K]     queries, float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys of length 1, or any with qk_l2norm
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    beta [B, H, T]      how much of the old value is replaced, any float dtype: 0 nothing, 1 all of it; between 1 and 2
                        the memory along k changes sign (eigenvalues 1 - beta |k|^2 < 0)
    qk_l2norm           divide each query and key by sqrt(|x|^2 + 1e-6) first, in float32, rounded to its dtype;
                        gradients flow through it
    scale               default K ** -0.5
    initial_state, return_state, cu_seqlens, chunk_size, backend    as in `ssd`

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also RecurrentState(memory [B, H, K, V] in float32 (float64 for
    float64), position [B]). Gradients flow to q, k, v, beta and initial_state, from o and memory. On a CPU it warns
    where beta |k|^2 leaves [0, 2]: the memory then grows without bound. Raises ValueError or TypeError for arguments
    that do not fit, BackendUnavailable for a backend that cannot run.
    """
    return _run(
        DELTA_RULE, q, k, v, None, beta, qk_l2norm, scale, chunk_size, backend,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = False,
    initial_state: RecurrentState | Tensor | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RecurrentState]:
    """The delta rule on a memory that decays: Gated DeltaNet.

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t exp(g_t) S_{t-1})^T        o_t = scale * q_t S_t
        arXiv 2412.06464, equation 10

    g [B, H, T]         log-decays <= 0, any float dtype; float32 is what models use
    q, k, v, beta, qk_l2norm, scale                                 as in `delta_rule`
    initial_state, return_state, cu_seqlens, chunk_size, backend    as in `ssd`

    Returns, warns and raises as `delta_rule`; gradients flow to g as well.
    """
    return _run(
        GATED_DELTA_RULE, q, k, v, g, beta, qk_l2norm, scale, chunk_size, backend,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _run(
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    qk_l2norm: bool,
    scale: float | None,
    chunk_size: int,
    backend: str | None,
    **state: Any,
) -> Any:
    """What both public functions do: check, warn, call."""
    q, k, v = autocast(q, k, v)
    gates = dict(beta=beta) if op is DELTA_RULE else dict(g=g, beta=beta)
    tensors = dict(q=q, k=k, v=v, **gates)
    heads = check_inputs(op, tensors, state["initial_state"], state["cu_seqlens"])
    check_chunk_size(op.name, chunk_size)
    if not qk_l2norm and may_read(q):
        _warn_of_growth(op.name, k, beta, heads, state["cu_seqlens"])
    return run(
        op, backend, tensors, **state, scale=check_scale(op.name, scale, q.shape[3] ** -0.5 if q.shape[3] else 1.0),
        qk_l2norm=bool(qk_l2norm), chunk_size=chunk_size,
    )  # fmt: skip


def _warn_of_growth(name: str, k: Tensor, beta: Tensor, heads: int, cu_seqlens: Tensor | None) -> None:
    """Warns where |1 - beta |k|^2|, the factor of the memory along a key, is above 1 by more than rounding."""
    end = k.shape[2] if cu_seqlens is None else int(cu_seqlens[-1])
    length = torch.linalg.vector_norm(k.detach()[:, :, :end], dim=-1, dtype=wide_dtype(k.dtype))
    step = beta.detach()[:, :, :end] * expand_heads(length, heads).square()
    worst = step[(step - 1).abs() > 1.1]
    if worst.numel():
        warnings.warn(
            f"{name}: beta |k|^2 is {worst.flatten()[0].item():.4g} somewhere, outside of [0, 2]: products of "
            "(I - beta k k^T) grow without bound, past 1e20 within 64 tokens for keys of 64 normal numbers. Normalise "
            "the keys, or pass qk_l2norm=True.",
            stacklevel=4,
        )


class DeltaNet(nn.Module):
    """The layer of arXiv 2406.06484, section 3.4: x [B, T, C] -> y [B, T, C].

        q, k, v = silu(conv(x W)), each with its own W and convolution        beta = sigmoid(x W_b)
        y = RMSNorm(delta_rule(q, k, v, beta, qk_l2norm=True)) W_o            the norm over each head's values

    hidden_size         C
    num_heads           H
    expand_k, expand_v  K = expand_k * C / H, V = expand_v * C / H, the widths of a head's keys and values
    conv_kernel         tokens that the convolutions see
    allow_neg_eigval    beta = 2 sigmoid(x W_b): along a key the memory may change sign (arXiv 2411.12537)
    norm_eps            of the RMSNorm
    chunk_size, backend    as in `delta_rule`
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_kernel: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keys, values = int(hidden_size * expand_k), int(hidden_size * expand_v)
        for name, width in (("expand_k", keys), ("expand_v", values)):
            if num_heads < 1 or width < num_heads or width % num_heads:
                raise ValueError(
                    f"DeltaNet: {name} * hidden_size is {width}, expected a multiple of num_heads={num_heads}"
                )
        check_chunk_size("DeltaNet", chunk_size)
        self.num_heads, self.allow_neg_eigval, self.chunk_size, self.backend = (
            num_heads, allow_neg_eigval, chunk_size, backend
        )  # fmt: skip
        made: Any = dict(device=device, dtype=dtype)
        self.q_proj, self.k_proj = (nn.Linear(hidden_size, keys, bias=False, **made) for _ in range(2))
        self.v_proj = nn.Linear(hidden_size, values, bias=False, **made)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False, **made)
        self.q_conv1d, self.k_conv1d = (ShortConvolution(keys, conv_kernel, **made) for _ in range(2))
        self.v_conv1d = ShortConvolution(values, conv_kernel, **made)
        self.o_norm = nn.RMSNorm(values // num_heads, eps=norm_eps, **made)
        self.o_proj = nn.Linear(values, hidden_size, bias=False, **made)

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
        convs, memory = state or ((None, None, None), None)
        x = zero_rest(x, cu_seqlens)
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        mixed = [
            convolution(part, state=before, cu_seqlens=cu_seqlens)
            for convolution, part, before in zip(convolutions, projected, convs, strict=True)
        ]
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y, _ in mixed)
        o: Any = delta_rule(
            q, k, v, _step_size(self.b_proj(x), self.allow_neg_eigval), qk_l2norm=True, initial_state=memory,
            return_state=return_state, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size, backend=self.backend,
        )  # fmt: skip
        o, memory = o if return_state else (o, None)
        o = o.transpose(1, 2).to(self.o_norm.weight.dtype)  # under autocast o is half, the norm is not
        y = self.o_proj(self.o_norm(o).flatten(2))
        return (y, LayerState(tuple(last for _, last in mixed), memory)) if return_state else y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, allow_neg_eigval={self.allow_neg_eigval}"


class GatedDeltaNet(nn.Module):
    """The layer of arXiv 2412.06464, section 3.4 and figure 1, as in Qwen3-Next: x [B, T, C] -> y [B, T, C].

        q, k, v = silu(conv1d(x W_qkv))        z = x W_z        beta = sigmoid(x W_b)
        g = -exp(A_log) softplus(x W_a + dt_bias)
        y = (RMSNorm(gated_delta_rule(q, k, v, g, beta, qk_l2norm=True)) * silu(z)) W_o

    hidden_size         C
    num_heads           heads of queries and keys
    num_v_heads         heads of values, gates and memories, a multiple of num_heads whose query and key they share in
                        groups; default num_heads
    head_dim            K
    head_v_dim          V, default head_dim
    conv_kernel         tokens that the convolution sees
    allow_neg_eigval    beta = 2 sigmoid(x W_b): along a key the memory may change sign (arXiv 2411.12537)
    norm_eps            of the RMSNorm over each head's values
    chunk_size, backend    as in `gated_delta_rule`

    Parameters have the names and shapes of transformers' Qwen3_5GatedDeltaNet, whose weights load_state_dict takes as
    they are. A_log and dt_bias are commonly left out of weight decay.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_v_heads: int | None = None,
        head_dim: int = 128,
        head_v_dim: int | None = None,
        conv_kernel: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-6,
        chunk_size: int = 64,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads, width = num_v_heads or num_heads, head_v_dim or head_dim
        if num_heads < 1 or heads % num_heads:
            raise ValueError(f"GatedDeltaNet: num_v_heads is {heads}, expected a multiple of num_heads={num_heads}")
        if head_dim < 1 or width < 1:
            raise ValueError(f"GatedDeltaNet: head_dim is {head_dim}, head_v_dim {width}, expected at least 1")
        check_chunk_size("GatedDeltaNet", chunk_size)
        self.num_heads, self.num_v_heads, self.head_dim, self.head_v_dim = num_heads, heads, head_dim, width
        self.allow_neg_eigval, self.chunk_size, self.backend = allow_neg_eigval, chunk_size, backend
        made: Any = dict(device=device, dtype=dtype)
        self._widths = num_heads * head_dim, num_heads * head_dim, heads * width  # of q, k, v
        self.in_proj_qkv = nn.Linear(hidden_size, sum(self._widths), bias=False, **made)
        self.in_proj_z = nn.Linear(hidden_size, heads * width, bias=False, **made)
        self.in_proj_b = nn.Linear(hidden_size, heads, bias=False, **made)
        self.in_proj_a = nn.Linear(hidden_size, heads, bias=False, **made)
        self.conv1d = ShortConvolution(sum(self._widths), conv_kernel, **made)
        self.dt_bias = nn.Parameter(torch.empty(heads, **made))
        self.A_log = nn.Parameter(torch.empty(heads, **made))
        self.norm = nn.RMSNorm(width, eps=norm_eps, **made)
        self.out_proj = nn.Linear(heads * width, hidden_size, bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """exp(A_log) uniform in [0.01, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]; others as in torch."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        self.A_log.uniform_(0.01, 16).log_()
        start_steps(self.dt_bias)

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """y [B, T, C], with return_state also the LayerState after the last token; arguments as in `DeltaNet`."""
        conv, memory = state or (None, None)
        x = zero_rest(x, cu_seqlens)
        mixed, conv = self.conv1d(self.in_proj_qkv(x), state=conv, cu_seqlens=cu_seqlens)
        q, k, v = (
            part.unflatten(2, (-1, width)).transpose(1, 2)
            for part, width in zip(
                mixed.split(self._widths, dim=-1), (self.head_dim, self.head_dim, self.head_v_dim), strict=True
            )
        )
        step, A_log, dt_bias = widen(self.in_proj_a(x), self.A_log, self.dt_bias)
        g = -(A_log.exp() * F.softplus(step + dt_bias)).transpose(1, 2)
        o: Any = self._attend(
            x, q, k, v, g, _step_size(self.in_proj_b(x), self.allow_neg_eigval), initial_state=memory,
            return_state=return_state, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size, backend=self.backend,
        )  # fmt: skip
        o, memory = o if return_state else (o, None)
        o = self.norm(o.transpose(1, 2).to(self.norm.weight.dtype)).flatten(2)  # under autocast o is half, the norm not
        y = self.out_proj((o * F.silu(self.in_proj_z(x))).to(x.dtype))
        return (y, LayerState(conv, memory)) if return_state else y

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        """What a log-linear layer does otherwise; x is the input of the layer."""
        return gated_delta_rule(q, k, v, g, beta, qk_l2norm=True, **options)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_v_heads={self.num_v_heads}, head_dim={self.head_dim}"


def _step_size(x: Tensor, allow_neg_eigval: bool) -> Tensor:
    """beta [B, H, T] from [B, T, H]: sigmoid, or twice that."""
    beta = x.to(wide_dtype(x.dtype)).sigmoid().transpose(1, 2)
    return 2 * beta if allow_neg_eigval else beta


@dataclass(frozen=True)
class DeltaRuleConfig(RecurrentConfig):
    """Puts the delta rule in the place of a trained model's attention: `apply(model, DeltaRuleConfig(layers=(1, 3)))`.

    Queries and keys are learned features (`HedgehogFeatureMap`) of length 1, scale 1, and beta = sigmoid(W x + b) for
    each head, with W = 0 and beta = 0.27 at first. What the memory returns for a key is its value, not a mean over
    tokens: it starts farther from softmax attention than `LinearAttentionConfig`. layers, backend: `RecurrentConfig`.
    """


@dataclass(frozen=True)
class GatedDeltaRuleConfig(DecayingConfig):
    """The same with a memory that decays, exp(g) = sigmoid(W x + b) as in `SSDConfig`, b as half_lives say."""


def supports(q: Tensor, chunk_size: int, **_: Any) -> str | None:
    """Why the kernels cannot run, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if q.shape[3] > 256:
        return f"keys of width {q.shape[3]}: the kernels hold up to 256"
    if chunk_size not in (16, 32, 64):
        return f"chunk_size is {chunk_size}, the kernels have 16, 32, 64"
    return None


def flops(case: Case) -> float:
    """Two products of rows within chunks, the triangular system, what is written; three products with the memory."""
    n: Any = case.sizes
    C = case.options.get("chunk_size", 64)
    return 2 * n["B"] * n["H"] * n["T"] * (C * (1.5 * n["K"] + n["V"]) + 3 * n["K"] * n["V"])


def traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * n["T"] * ((n["Hq"] + n["Hk"]) * n["K"] + (n["Hv"] + n["H"]) * n["V"] + 2 * n["H"])


def unit_length(x: Tensor) -> Tensor:
    """Keys from normal numbers."""
    return F.normalize(x, dim=-1)


_STATE = dict(return_state=True)
_NORM = dict(return_state=True, qk_l2norm=True)
_CASES = (
    Case("one", sizes(1, 1, 1, 16), _STATE),
    Case("no batch", sizes(0, 2, 5, 16), _STATE),
    Case("no tokens", sizes(2, 2, 0, 16), _STATE, ("initial_state",)),
    Case("few", sizes(2, (1, 1, 2), 3, 24, 40), _NORM, ("initial_state",)),
    Case("primes", sizes(1, 3, 37, 40, 24), _STATE),
    Case("one past a chunk", sizes(1, 2, 65, 32), _STATE, ("initial_state",)),
    Case("grouped", sizes(1, (2, 1, 4), 35, 16), dict(chunk_size=32, **_STATE)),
    Case("unnormalised keys", sizes(1, (2, 2, 1), 40, 16), _NORM, gain=dict(k=5.0)),
    Case("packed", sizes(1, 1, 90, 16, N=5), {}, ("initial_state",), dict(cu_seqlens=(0, 1, 1, 66, 80))),
    Case("long", sizes(2, 8, 4099, 128), _STATE, ("initial_state",), large=True),
)
_GATED_CASES = (
    Case("a chunk", sizes(1, 1, 64, 16), _STATE),
    Case("several chunks", sizes(1, 1, 130, 16), _STATE, ("initial_state",), gain=dict(g=0.1)),
    Case("negative eigenvalues", sizes(1, 2, 66, 16), _STATE, gain=dict(beta=2.0)),
    Case("nothing written", sizes(1, 1, 40, 16), _STATE, ("initial_state",), gain=dict(beta=0.0)),
    Case("small chunks", sizes(1, 1, 39, 16), dict(chunk_size=16, scale=0.5)),
    Case("wide", sizes(1, 1, 65, 128), _STATE),
    Case("widest", sizes(1, 1, 40, 256, 80)),
    Case("transposed", sizes(2, 2, 33, 32), layout="transposed"),
    Case("strided", sizes(1, 2, 33, 32), _STATE, layout="strided"),
    Case("strong gates", sizes(1, 2, 100, 16), _STATE, ("initial_state",), gain=dict(g=10.0)),
    Case("no decay", sizes(1, 1, 70, 16), _STATE, gain=dict(g=0.0)),
)
_SHAPES = (
    "q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], {}beta [B, H, T], initial_state [R, H, K, V]?, "
    "cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, K, V]"
)
_GRADS = ("q", "k", "v", "beta", "initial_state")

DELTA_RULE = register(
    Op(
        name="delta_rule",
        area="attention",
        summary="a linear memory that replaces what it holds for a key (DeltaNet), in time linear in T",
        paper="https://arxiv.org/abs/2406.06484",
        shapes=_SHAPES.format(""),
        function=delta_rule,
        reference=delta_rule_reference,
        torch=delta_rule_torch,
        triton="effkit.kernels.chunk_delta:delta_rule",
        supports=supports,
        cases=_CASES,
        bench=BENCH,
        grads=_GRADS,
        flops=flops,
        traffic=traffic,
        draw={"k": unit_length, "beta": torch.sigmoid},
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "fla": "effkit.rivals:fla_delta_rule",
        },
    )
)

GATED_DELTA_RULE = register(
    Op(
        name="gated_delta_rule",
        area="attention",
        summary="the delta rule on a memory that decays (Gated DeltaNet), in time linear in T",
        paper="https://arxiv.org/abs/2412.06464",
        shapes=_SHAPES.format("g [B, H, T], "),
        function=gated_delta_rule,
        reference=gated_delta_rule_reference,
        torch=gated_delta_rule_torch,
        triton="effkit.kernels.chunk_delta:gated_delta_rule",
        supports=supports,
        cases=_CASES + _GATED_CASES,
        bench=BENCH,
        grads=(*_GRADS, "g"),
        flops=flops,
        traffic=traffic,
        draw={"k": unit_length, "beta": torch.sigmoid, "g": log_decay},
        rivals={
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "transformers": "effkit.rivals:transformers_gated_delta_rule",
            "fla": "effkit.rivals:fla_gated_delta_rule",
        },
    )
)
