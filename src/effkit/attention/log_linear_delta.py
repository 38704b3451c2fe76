"""The log-linear gated delta rule: a few memories that correct what they hold for a key, the older the coarser.

    o_t = scale * sum_l level_scales[t, l] q_t S_t^l        l over the blocks of the past, see `log_linear_attention`
    S_t^l = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1}^l       and S_t^0 = beta_t k_t v_t^T for the token itself

(Guo et al., arXiv 2506.04761, section 3, over Gated DeltaNet.) The memories of all blocks together are the memory of
`gated_delta_rule`, to which it is equal with all level_scales 1. Within a chunk of C tokens a token must weigh each
source by itself, so the inverse of the triangular system of `gated_delta_rule` is formed in full:

    o = ((Q K^T o D) (I + M)^-1 diag(beta) o level_scales) V + (reads of the blocks before)

Cost: that of `gated_delta_rule`, 2 T C^2 operations a head more within chunks, and 6 T K V for each of the
log2(T / C) / 2 blocks that a chunk finds and has to carry on, in a loop over chunks. When not to use it: where
`gated_delta_rule` does as well, at a fraction of the time; with keys that are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention._fenwick import (
    Blocks,
    LogLinearState,
    after_tokens,
    carried,
    check,
    empty_state,
    levels_for,
    one_by_one,
    past_blocks,
    recurrence,
    resume,
    scales_of_past,
    spare_levels,
    wants_gradient,
    within_chunk,
)
from effkit.attention._recurrent import (
    autocast,
    check_scale,
    cumulative_decay,
    expand_heads,
    may_read,
    pair_decay,
    run,
    to_chunks,
    widen,
)
from effkit.attention.deltanet import GatedDeltaNet, _warn_of_growth, l2_normalize, supports, unit_length
from effkit.attention.log_linear import BENCH, CASES, LevelScales, level_sizes, traffic
from effkit.attention.mamba2 import log_decay
from effkit.ops import Case, Op, register


def log_linear_gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, LogLinearState]:
    """The masked product, with the weight of every source in every output."""
    dtype = v.dtype
    q, k, v, g, beta, level_scales = prepared(q, k, v, g, beta, level_scales, scale, qk_l2norm)
    state = empty_state(k, v, level_scales) if initial_state is None else initial_state
    memory = state.memory.to(q.dtype)
    of_tokens, of_blocks = scales_of_past(level_scales, state)
    c, total, beta = cumulative_decay(g), g.double().sum(-1, keepdim=True), beta[..., None]
    pairs, decay = pair_decay(c, q.dtype), c.to(q.dtype).exp()[..., None]
    scores, one = (q @ k.mT) * pairs, torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
    # The inverse of I + M, M strictly lower. Not by inv: its general form fails in torch 2.13 with two threads of MKL.
    system = beta * (k @ k.mT) * pairs
    inverse = torch.linalg.solve_triangular(system, one.expand_as(system), upper=False, unitriangular=True)
    o = ((scores @ inverse * beta.mT) * of_tokens) @ v
    erase = inverse @ (beta * decay * k)
    o = o + torch.einsum("bhtl, bhtk, bhlkv -> bhtv", of_blocks, q * decay - scores @ erase, memory)
    k = k * (total - c).to(q.dtype).exp()[..., None]  # to the last token
    memory = total.to(q.dtype).exp()[..., None, None] * memory - k[:, :, None].mT @ (erase[:, :, None] @ memory)
    return o.to(dtype), after_tokens(state, inverse.mT @ k, beta * v, memory)


def log_linear_gated_delta_rule_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, LogLinearState]:
    """Chunks: a triangular system within each, and a loop that carries the blocks of the past over them."""
    tensors = prepared(q, k, v, g, beta, level_scales, scale, qk_l2norm)
    if one_by_one(q, initial_state):
        o, state = recurrence(initial_state, *tensors)
    else:
        o, state = resume(partial(in_chunks, scan), tensors, initial_state, chunk_size)
    return o.to(v.dtype), state


def prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, level_scales: Tensor, scale: float, qk_l2norm: bool
) -> tuple[Tensor, ...]:
    """The tensors as wide as sums, with all heads; queries scaled."""
    q, k, v = (expand_heads(x, beta.shape[1]) for x in widen(q, k, v))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    return q * scale, k, v, g, beta.to(q.dtype), level_scales.to(q.dtype)


def in_chunks(
    scan: Callable[..., tuple[Tensor, ...]],
    blocks: Blocks,
    C: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    level_scales: Tensor,
) -> tuple[Tensor, Blocks]:
    """One of `aligned_pieces`: o, and the blocks of the past after it; blocks are those before it.

    scan is the loop over chunks: `scan`, or a kernel.
    """
    T = q.shape[2]
    q, k, v, g, beta, level_scales = (to_chunks(x, C) for x in (q, k, v, g, beta[..., None], level_scales))
    c = cumulative_decay(g)  # [B, H, N, C]
    pairs, decay = pair_decay(c, q.dtype), c.to(q.dtype).exp()[..., None]  # from before the chunk to the token
    scores, system = (q @ k.mT) * pairs, beta * (k @ k.mT) * pairs  # [B, H, N, C, C]
    # Only what lies below the diagonal is read: I + M, M strictly lower.
    eye = torch.eye(C, dtype=q.dtype, device=q.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    erase, values = inverse @ (beta * decay * k), beta * v
    within = ((scores @ inverse) * within_chunk(level_scales)) @ values
    from_start = q * decay - scores @ erase  # a query as the memory before the chunk meets it
    to_end = k * (c[..., -1:] - c).to(q.dtype).exp()[..., None]  # from the token to the end of the chunk
    rows = torch.cat((from_start, erase), dim=3)
    levels = sorted({*blocks, *past_blocks((c.shape[2] - 1) * C)})
    per_chunk = (rows, to_end, inverse @ values, decay[..., -1:, :], level_scales)
    seen, *after_chunks = scan(tuple(blocks), *per_chunk, *blocks.values())
    after = dict(zip(levels, after_chunks, strict=True))
    key, inverse, values = to_end[:, :, -1], inverse[:, :, -1], values[:, :, -1]
    for i, tokens in past_blocks((T - 1) % C).items():  # of the last chunk
        after[i] = key.mT @ (inverse[..., tokens] @ values[:, :, tokens])
    return (within + seen).flatten(2, 3)[:, :, :T], after


def scan(levels: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`_scan`, repeated in backward where there is one."""
    return Scan.apply(levels, *tensors) if wants_gradient(*tensors) else _scan(levels, *tensors)


class Scan(torch.autograd.Function):
    """`_scan` that is repeated in backward: of all the blocks only those before the piece are kept for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(levels: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return _scan(levels, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.levels, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        pull = torch.func.vjp(partial(_scan, ctx.levels), *ctx.saved_tensors)[1]
        return None, *pull(d_outs)


def _scan(
    levels: tuple[int, ...],
    rows: Tensor,
    to_end: Tensor,
    written: Tensor,
    decay: Tensor,
    level_scales: Tensor,
    *before: Tensor,
) -> tuple[Tensor, ...]:
    """What each chunk reads from the blocks before it, [B, H, N, C, V], and the blocks after all, by rising level.

    rows [B, H, N, 2 C, K] are queries and what they erase, `before` are blocks at `levels`.
    """
    blocks, outs = dict(zip(levels, before, strict=True)), []
    chunks = zip(*(x.unbind(2) for x in (rows, to_end, written, decay, level_scales)), strict=True)
    for n, (row, key, new, kept, scales) in enumerate(chunks):
        C, V = new.shape[2:]
        blocks = carried(blocks, n * C) if n else blocks
        after = {0: key.mT @ new}
        if blocks:
            memory = torch.cat(list(blocks.values()), dim=3)  # [B, H, K, V of each block]
            seen, erased = (row @ memory).split(C, dim=2)
            weights = torch.stack([scales[..., i] for i in blocks], dim=-1)
            outs.append((weights[..., None] * seen.unflatten(3, (-1, V))).sum(3))
            after |= dict(zip(blocks, (kept * memory - key.mT @ erased).split(V, dim=3), strict=True))
        else:
            outs.append(torch.zeros_like(new))
        blocks = after
    return torch.stack(outs, dim=2), *(blocks[i] for i in sorted(blocks))


def log_linear_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    *,
    qk_l2norm: bool = False,
    initial_state: LogLinearState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LogLinearState]:
    """The gated delta rule over log2(T) blocks of the past, each of which a token weighs by itself.

        o_t = scale * sum_l level_scales[t, l] q_t S_t^l        S_t^0 = beta_t k_t v_t^T
        S_t^l = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1}^l       arXiv 2506.04761, section 3

    q [B, Hq, T, K]     queries, float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys of length 1, or any with qk_l2norm
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    g [B, H, T]         log-decays <= 0, any float dtype; float32 is what models use
    beta [B, H, T]      how much of the old value is replaced, from 0 to 2, any float dtype; see `delta_rule`
    qk_l2norm           divide each query and key by sqrt(|x|^2 + 1e-6) first, in float32; gradients flow through it
    scale               default 1: with queries and keys of length 1 nothing has to be scaled (`gated_delta_rule` has
                        K ** -0.5, which the authors' code multiplies to q and divides out of level_scales)
    level_scales [B, H, T, L], initial_state, return_state, cu_seqlens, chunk_size, backend
                        as in `log_linear_attention`

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also the LogLinearState that continues the sequences. Gradients flow
    to q, k, v, g, beta, level_scales and the memory, from o and the memory. On a CPU it warns where beta |k|^2 leaves
    [0, 2], as `delta_rule` does. Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a
    backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    tensors = dict(q=q, k=k, v=v, g=g, beta=beta, level_scales=level_scales)
    _check(tensors, initial_state, cu_seqlens, chunk_size, qk_l2norm)
    tensors["level_scales"] = spare_levels(level_scales, initial_state, cu_seqlens)
    return run(
        LOG_LINEAR_GATED_DELTA_RULE, backend, tensors, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, scale=check_scale("log_linear_gated_delta_rule", scale, 1.0), qk_l2norm=bool(qk_l2norm),
        chunk_size=chunk_size,
    )  # fmt: skip


def _check(
    tensors: dict[str, Tensor], initial: Any, cu_seqlens: Tensor | None, chunk_size: int, qk_l2norm: bool
) -> None:
    """The arguments, and a warning where the memory would grow without bound."""
    op = LOG_LINEAR_GATED_DELTA_RULE
    check(op, tensors, initial, cu_seqlens, chunk_size)
    k, beta = tensors["k"], tensors["beta"]
    if not qk_l2norm and may_read(k):
        _warn_of_growth(op.name, k, beta, beta.shape[1], cu_seqlens)


class LogLinearGatedDeltaNet(GatedDeltaNet):
    """`GatedDeltaNet` with memories for blocks of the past (arXiv 2506.04761, section 3): x [B, T, C] -> y [B, T, C].

    max_length    how many tokens a sequence may have, those before `state` included
    options       those of `GatedDeltaNet`

    Beside the parameters of `GatedDeltaNet` it has those of `level_scales`, a `LevelScales`.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, max_length: int = 16384, **options: Any) -> None:
        super().__init__(hidden_size, num_heads, **options)
        made: Any = dict(device=self.A_log.device, dtype=self.A_log.dtype)
        self.level_scales = LevelScales(hidden_size, self.num_v_heads, max_length, **made)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        return log_linear_gated_delta_rule(q, k, v, g, beta, self.level_scales(x), qk_l2norm=True, **options)


def flops(case: Case) -> float:
    """What `gated_delta_rule` has, weights of single sources, and three products for every block a chunk finds."""
    n: Any = case.sizes
    C = case.options.get("chunk_size", 64)
    found = (levels_for(-(-n["T"] // C)) - 1) / 2
    per_token = C * (1.5 * n["K"] + n["V"]) + C * C + (1 + 3 * found) * n["K"] * n["V"]
    return 2 * n["B"] * n["H"] * n["T"] * per_token


def _number_of_gates(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * n["H"] * n["T"]


_STATE, _NORM = dict(return_state=True), dict(return_state=True, qk_l2norm=True)

LOG_LINEAR_GATED_DELTA_RULE = register(
    Op(
        name="log_linear_gated_delta_rule",
        area="attention",
        summary="the gated delta rule over log2(T) blocks of the past, weighed by each token, in time T log T",
        paper="https://arxiv.org/abs/2506.04761",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], g [B, H, T], beta [B, H, T], "
        "level_scales [B, H, T, L], initial_state [R, H, L, K, V]?, cu_seqlens [N]? "
        "-> o [B, H, T, V], memory [R, H, L, K, V]",
        function=log_linear_gated_delta_rule,
        reference=log_linear_gated_delta_rule_reference,
        torch=log_linear_gated_delta_rule_torch,
        triton="effkit.kernels.log_linear_delta:log_linear_gated_delta_rule",
        supports=supports,
        cases=(
            *CASES,
            Case("unnormalised keys", level_sizes(1, (2, 2, 1), 40, 16), _NORM, gain=dict(k=5.0)),
            Case("negative eigenvalues", level_sizes(1, 2, 66, 16), _STATE, gain=dict(beta=2.0)),
            Case("nothing written", level_sizes(1, 1, 40, 16), _STATE, gain=dict(beta=0.0)),
        ),
        bench=BENCH,
        grads=("q", "k", "v", "g", "beta", "level_scales"),
        flops=flops,
        traffic=lambda case: traffic(case) + _number_of_gates(case),
        draw={"k": unit_length, "g": log_decay, "beta": torch.sigmoid, "level_scales": F.softplus},
        rivals={"dense sdpa": "effkit.rivals:dense_sdpa"},
    )
)
