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

from typing import Any

import torch
from torch import Tensor

from effkit.attention._recurrent import (
    RecurrentState,
    autocast,
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
)
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
    for t in range(q.shape[2]):
        kept = state if g is None else g[:, :, t, None, None].exp() * state
        state = kept + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(scale * q[:, :, t, None, :] @ state)
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
    T, dtype, heads = q.shape[2], v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    C = chunk_length(T, chunk_size)
    q, k, v = (to_chunks(expand_heads(x, heads), C) for x in widen(q * scale, k, v))
    scores = q @ k.mT  # [B, H, N, C, C]
    if g is None:
        decay, weights = None, scores.tril()
    else:
        c = cumulative_decay(to_chunks(g, C))  # [B, H, N, C]
        weights = scores * pair_decay(c, q.dtype)
        q = q * c.to(q.dtype).exp()[..., None]  # from the start of the chunk to the token
        k = k * (c[..., -1:] - c).to(q.dtype).exp()[..., None]  # from the token to the end of the chunk
        decay = c[..., -1].to(q.dtype).exp()
    before, last = scan_chunks(k.mT @ v, decay, first_memory(k, v, initial_state))
    o = weights @ v + q @ before
    return from_chunks(o, T).to(dtype), RecurrentState(last, next_position(from_chunks(q, T), initial_state))


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


def supports(q: Tensor, v: Tensor, chunk_size: int, **_: Any) -> str | None:
    """Why the chunk kernels cannot run, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"widths {q.shape[3]} and {v.shape[3]}: the kernels hold up to 256"
    if chunk_size not in (16, 32, 64, 128):
        return f"chunk_size is {chunk_size}, the kernels have 16, 32, 64, 128"
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
BENCH = tuple(
    Case(f"T={T}", sizes(1, 8, T, 64), large=large)
    for T, large in ((2048, False), (4096, False), (8192, False), (16384, True), (32768, True))
)

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
        supports=supports,
        cases=_CASES,
        bench=BENCH,
        grads=("q", "k", "v", "g", "initial_state"),
        flops=flops,
        traffic=traffic,
        draw={"g": log_decay},
    )
)
