"""Log-linear attention: a gated linear attention that keeps the past in a few memories, the older the coarser.

    o_t = scale * sum_{s <= t} level_scales[t, level(t, s)] exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s
    level(t, s) = bit_length(t XOR s)        0 for the token itself, l for the 2^(l-1) tokens of one block before it

(Guo et al., arXiv 2506.04761, section 3, over Mamba-2.) The levels cut the past of t as a Fenwick tree does: one block
for each bit of t, so that log2(t) + 1 matrices K x V hold everything, and each token weighs every block by itself. With
all level_scales 1 this is `ssd`. Tokens of different chunks share one level, so chunks are the leaves of a binary tree.

Cost: within chunks as `ssd`; between them 2 T K V log2(T / C) / 2 operations a head in each pass. Training keeps O(T)
numbers (the reads of each level are computed again in backward), decoding log2(T) matrices. When not to use it: where
one state does as well, since a decoding step reads and writes all of them; and where recall must be exact at any
distance, since old blocks are still sums over many tokens: the paper itself reports gaps to softmax attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._fenwick import (
    Blocks,
    LogLinearState,
    after_tokens,
    check,
    empty_state,
    levels_for,
    one_by_one,
    past_blocks,
    read,
    recurrence,
    resume,
    scales_of_past,
    spare_levels,
    within_chunk,
)
from effkit.attention._recurrent import (
    autocast,
    check_scale,
    cumulative_decay,
    expand_heads,
    pair_decay,
    run,
    to_chunks,
    widen,
)
from effkit.attention._swap import DecayingConfig
from effkit.attention.mamba2 import Mamba2, bench_cases, log_decay, sizes, supports
from effkit.ops import Case, Op, register


@dataclass(frozen=True)
class LogLinearAttentionConfig(DecayingConfig):
    """Puts log-linear attention in the place of a trained model's: `apply(model, LogLinearAttentionConfig())`.

        o_t = sum_s w_ts v_s / sum_s w_ts
        w_ts = level_scales[t, level(t, s)] exp(g_{s+1} + ... + g_t) phi(q_t) . phi(k_s)

    phi are learned maps of positive features (`HedgehogFeatureMap`), g is that of `SSDConfig`, and level_scales =
    softplus(W x + b) for each head and level, with W = 0 and all scales 1 at first: it starts as `SSDConfig` and learns
    from there which distances matter. max_length, by default the model's max_position_embeddings, is the longest
    sequence for which there are levels. layers and backend as in `RecurrentConfig`.
    """

    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise ValueError(f"LogLinearAttentionConfig: max_length is {self.max_length!r}, expected None or above 0")


def log_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, LogLinearState]:
    """The masked product; a block of the state counts as one more token, standing where the block begins."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v, level_scales = widen(*(expand_heads(x, heads) for x in (q, k, v)), level_scales)
    state = empty_state(k, v, level_scales) if initial_state is None else initial_state
    memory = state.memory.to(q.dtype)
    of_tokens, of_blocks = scales_of_past(level_scales, state)
    c, total = cumulative_decay(g), g.double().sum(-1, keepdim=True)
    o = (scale * (q @ k.mT) * pair_decay(c, q.dtype) * of_tokens) @ v
    decayed = scale * q * c.to(q.dtype).exp()[..., None]  # from before the first token
    o = o + torch.einsum("bhtl, bhtk, bhlkv -> bhtv", of_blocks, decayed, memory)
    k = k * (total - c).to(q.dtype).exp()[..., None]  # to the last token
    memory = total.to(q.dtype).exp()[..., None, None] * memory
    return o.to(dtype), after_tokens(state, k, v, memory)


def log_linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, LogLinearState]:
    """Chunks: a masked product within each, and a tree over them."""
    dtype, heads = v.dtype, max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v, level_scales = widen(*(expand_heads(x, heads) for x in (q * scale, k, v)), level_scales)
    level_scales = level_scales.to(q.dtype)
    if one_by_one(q, initial_state):
        o, state = recurrence(initial_state, q, k, v, g, None, level_scales)
    else:
        o, state = resume(_piece, (q, k, v, g, level_scales), initial_state, chunk_size)
    return o.to(dtype), state


def _piece(
    blocks: Blocks, C: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor
) -> tuple[Tensor, Blocks]:
    """One of `aligned_pieces`: o, and the blocks of the past after it; blocks are those before it."""
    T = q.shape[2]
    q, k, v, g, level_scales = (to_chunks(x, C) for x in (q, k, v, g, level_scales))
    c = cumulative_decay(g)  # [B, H, N, C]
    total = c[..., -1]
    o = ((q @ k.mT) * pair_decay(c, q.dtype) * within_chunk(level_scales)) @ v
    q = q * c.to(q.dtype).exp()[..., None]  # from the start of the chunk to the token
    k = k * (total[..., None] - c).to(q.dtype).exp()[..., None]  # from the token to the end of the chunk
    scales = level_scales.unbind(-1)
    o, found = _tree(o, q, k.mT @ v, total, scales)
    o, after = o.flatten(2, 3), total.cumsum(-1)  # from the start of the piece to the end of the chunk
    if blocks:
        before = (after - total).to(q.dtype).exp()[..., None]
        weights = [(scales[i] * before).flatten(2) for i in blocks]
        o = o + read(weights, q.flatten(2, 3), list(blocks.values()))
    kept = after[..., -1, None, None].to(q.dtype).exp()
    found |= {i: kept * block for i, block in blocks.items()}
    k, v = k[:, :, -1], v[:, :, -1]
    for i, tokens in past_blocks((T - 1) % C).items():
        found[i] = k[:, :, tokens].mT @ v[:, :, tokens]
    return o[:, :, :T], found


def _tree(o: Tensor, q: Tensor, blocks: Tensor, total: Tensor, scales: tuple[Tensor, ...]) -> tuple[Tensor, Blocks]:
    """o with what each chunk of a piece reads from those before it, and the blocks before the last chunk.

    q [B, H, N, C, K] is decayed from the start of its chunk, blocks [B, H, N, K, V] are the sums over single chunks,
    decayed to their ends, total [B, H, N] the log-decays of chunks. Each turn joins neighbouring blocks to one.
    """
    C, found = q.shape[3], {}
    before = torch.zeros_like(total)  # from the start of its block to that of the chunk
    while blocks.shape[2] > 1:
        width = q.shape[2] // blocks.shape[2]
        halves = (-1, 2, width)
        i = (width * C).bit_length()
        first, second = blocks.unflatten(2, (-1, 2)).unbind(3)
        across, own = total.unflatten(2, (-1, 2)).unbind(3)
        early, late = before.unflatten(2, halves).unbind(3)
        weight = scales[i].unflatten(2, halves)[:, :, :, 1] * late.to(q.dtype).exp()[..., None]
        seen = read([weight.flatten(3)], q.unflatten(2, halves)[:, :, :, 1].flatten(3, 4), [first])
        mine, other = o.unflatten(2, halves).unbind(3)
        o = torch.stack((mine, other + seen.unflatten(3, (width, C))), 3).flatten(2, 4)
        kept = own.to(q.dtype).exp()[..., None, None] * first
        found[i] = kept[:, :, -1]
        blocks, total = kept + second, across + own
        before = torch.stack((early, late + across[..., None]), 3).flatten(2)
    return o, found


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    *,
    initial_state: LogLinearState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LogLinearState]:
    """Gated linear attention over log2(T) blocks of the past, each of which a token weighs by itself.

        o_t = scale * sum_{s <= t} level_scales[t, level(t, s)] exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s
        level(t, s) = bit_length(t XOR s)        arXiv 2506.04761, section 3

    q [B, Hq, T, K]     queries, float16, bfloat16, float32 or float64
    k [B, Hk, T, K]     keys
    v [B, Hv, T, V]     values; q, k, v of one dtype (under autocast they are cast to its dtype)
    g [B, H, T]         log-decays <= 0, any float dtype; float32 is what models use
    level_scales [B, H, T, L]    the weight of each level, any float dtype; models make them positive (softplus). Tokens
                        are counted from the start of their sequence, tokens of initial_state included: T of them have
                        bit_length(T - 1) + 1 levels, and L may be larger
    initial_state       LogLinearState of an earlier call
    return_state        also return the LogLinearState after the last token
    scale               default 1
    cu_seqlens [N]      int32 or int64, 0 = first <= ... <= last <= T: sequences packed along T of a single batch row,
                        each with a state of its own (initial_state then has N - 1 rows); rows past the last give zeros
    chunk_size          a power of two: tokens that are computed as one product; changes speed and rounding only
    backend             "reference", "torch", "triton" or None for the fastest that can

    H is the largest of Hq, Hk, Hv and a multiple of each: head h reads query head h // (H // Hq), and so on. Returns
    o [B, H, T, V] in v's dtype; with return_state also LogLinearState(memory [B, H, L, K, V] in float32 (float64 for
    float64), position [B]), whose rows may stand at different positions, which continues the sequences exactly.
    Gradients flow to q, k, v, g, level_scales and the memory, from o and the memory. One token more (T = 1) costs no
    look at the position on the host; past 2 ** (L - 1) tokens, where that is not seen, it gives NaN. Raises ValueError
    or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    q, k, v = autocast(q, k, v)
    tensors = dict(q=q, k=k, v=v, g=g, level_scales=level_scales)
    check(LOG_LINEAR_ATTENTION, tensors, initial_state, cu_seqlens, chunk_size)
    tensors["level_scales"] = spare_levels(level_scales, initial_state, cu_seqlens)
    return run(
        LOG_LINEAR_ATTENTION, backend, tensors, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, scale=check_scale("log_linear_attention", scale, 1.0), chunk_size=chunk_size,
    )  # fmt: skip


class LevelScales(nn.Module):
    """x [B, T, C] -> level_scales [B, H, T, L] in float32 or wider: softplus(L * proj(x)), arXiv 2506.04761.

    There are levels for sequences of max_length tokens. L [H, L] starts at one: where proj(x) is small all levels weigh
    about ln 2. It is commonly left out of weight decay.
    """

    def __init__(self, hidden_size: int, heads: int, max_length: int, **made: Any) -> None:
        super().__init__()
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"LevelScales: max_length is {max_length!r}, expected a number of tokens above 0")
        self.max_length = max_length
        self.L = nn.Parameter(torch.empty(heads, levels_for(max_length), **made))
        self.proj = nn.Linear(hidden_size, self.L.numel(), bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.L.fill_(1)
        self.proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        scales, L = widen(self.proj(x), self.L)
        return F.softplus(L.flatten() * scales).unflatten(2, L.shape).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}"


class LogLinearMamba2(Mamba2):
    """`Mamba2` with log-linear attention in the place of ssd (arXiv 2506.04761, section 3): x [B, T, C] -> y [B, T, C].

    max_length    how many tokens a sequence may have, those before `state` included
    options       those of `Mamba2`

    Beside the parameters of `Mamba2` it has those of `level_scales`, a `LevelScales`.
    """

    def __init__(self, hidden_size: int, *, max_length: int = 16384, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        made: Any = dict(device=self.A_log.device, dtype=self.A_log.dtype)
        self.level_scales = LevelScales(hidden_size, len(self.A_log), max_length, **made)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "level_scales"):  # not yet while Mamba2 is made
            self.level_scales.reset_parameters()

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
        return log_linear_attention(q, k, v, g, self.level_scales(x), **options)


def level_sizes(
    B: int, H: int | tuple[int, int, int], T: int, K: int, V: int | None = None, N: int = 0, L: int | None = None
) -> dict[str, int]:
    """Sizes of a case, with the levels that T tokens have unless L is given."""
    return {**sizes(B, H, T, K, V, N), "L": L or levels_for(T)}


def flops(case: Case) -> float:
    """Products within chunks; between them each token reads half of the levels, and each level joins its blocks."""
    n: Any = case.sizes
    C = case.options.get("chunk_size", 64)
    between = levels_for(-(-n["T"] // C)) - 1
    return 2 * n["B"] * n["H"] * n["T"] * (C * (n["K"] + n["V"]) / 2 + (1 + between / 2) * n["K"] * n["V"])


def traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * n["T"] * ((n["Hq"] + n["Hk"]) * n["K"] + (n["Hv"] + n["H"]) * n["V"] + n["H"] * (1 + n["L"]))


_STATE = dict(return_state=True)
CASES = (
    Case("one", level_sizes(1, 1, 1, 16), _STATE),
    Case("no batch", level_sizes(0, 2, 5, 16), _STATE),
    Case("no tokens", level_sizes(2, 2, 0, 16), _STATE),
    Case("two", level_sizes(2, 2, 2, 16, L=5), _STATE),
    Case("primes", level_sizes(2, 3, 37, 40, 24), _STATE),
    Case("a chunk", level_sizes(1, 2, 64, 16), _STATE),
    Case("one past a chunk", level_sizes(1, 2, 65, 32), _STATE),
    Case("several chunks", level_sizes(1, 2, 130, 16, L=10), _STATE, gain=dict(g=0.1)),
    Case("grouped", level_sizes(1, (2, 1, 4), 70, 16), _STATE),
    Case("strong gates", level_sizes(1, 2, 100, 16), dict(chunk_size=16, **_STATE), gain=dict(g=10.0)),
    Case("no decay", level_sizes(1, 2, 70, 16), dict(chunk_size=16, **_STATE), gain=dict(g=0.0)),
    Case("levels off", level_sizes(1, 2, 67, 16), dict(chunk_size=16, **_STATE), gain=dict(level_scales=0.0)),
    Case("small chunks", level_sizes(1, 2, 127, 16), dict(chunk_size=16, scale=0.25)),
    Case("packed", level_sizes(1, 2, 90, 16, N=5), _STATE, ints=dict(cu_seqlens=(0, 1, 1, 66, 80))),
    Case("wide", level_sizes(1, 1, 65, 128), _STATE),
    Case("widest", level_sizes(1, 1, 40, 256, 80)),
    Case("transposed", level_sizes(2, 2, 33, 32), layout="transposed"),
    Case("strided", level_sizes(1, 2, 33, 32), _STATE, layout="strided"),
    Case("long", level_sizes(2, 8, 4099, 128, 64), _STATE, large=True),
)
BENCH = bench_cases(lambda T: level_sizes(1, 8, T, 64))

LOG_LINEAR_ATTENTION = register(
    Op(
        name="log_linear_attention",
        area="attention",
        summary="gated linear attention over log2(T) blocks of the past, weighed by each token, in time T log T",
        paper="https://arxiv.org/abs/2506.04761",
        shapes="q [B, Hq, T, K], k [B, Hk, T, K], v [B, Hv, T, V], g [B, H, T], level_scales [B, H, T, L], "
        "initial_state [R, H, L, K, V]?, cu_seqlens [N]? -> o [B, H, T, V], memory [R, H, L, K, V]",
        function=log_linear_attention,
        reference=log_linear_attention_reference,
        torch=log_linear_attention_torch,
        triton="effkit.kernels.log_linear:log_linear_attention",
        supports=supports,
        cases=CASES,
        bench=BENCH,
        grads=("q", "k", "v", "g", "level_scales"),
        flops=flops,
        traffic=traffic,
        draw={"g": log_decay, "level_scales": F.softplus},
        rivals={
            "quadratic": "effkit.rivals:log_linear_quadratic",
            "dense sdpa": "effkit.rivals:dense_sdpa",
            "fla": "effkit.rivals:fla_log_linear_attention",
        },
    )
)
