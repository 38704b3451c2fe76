"""What the log-linear techniques share: the blocks of the past that a token sees, and how they are carried on.

Token t sees the tokens before it in blocks, one for each set bit of t: a set bit i is a block of 2^i tokens, at level
i + 1; level 0 is the token itself. Before token t joins, the blocks below the lowest set bit of t become one, as the
ones of a binary counter do when it carries. So a piece of tokens that starts at a multiple of its size, a power of two,
finds the same blocks at the same levels for all of its tokens, and sees itself as a sequence of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention._recurrent import check_chunk_size, check_inputs, chunk_length, may_read, span_length
from effkit.ops import Op

Blocks = dict[int, Tensor]  # level -> [B, H, K, V], the sum over a block of the past, where it is not empty
Piece = Callable[..., tuple[Tensor, Blocks]]  # (blocks before, chunk, q, k, v, ..., level_scales) -> (o, blocks after)


class LogLinearState(NamedTuple):
    """What log-linear attention carries from the tokens it has read to those that follow.

    memory      [B, H, L, K, V] the sum over each block of the past, at its level for the last token that was read,
                float32 (float64 for float64 inputs); zeros where a level has no tokens
    position    [B] int64, how many tokens each row has read; rows may differ
    With packed sequences B counts the sequences.
    """

    memory: Tensor
    position: Tensor


def empty_state(k: Tensor, v: Tensor, level_scales: Tensor) -> LogLinearState:
    """The state before the first token, in k's dtype."""
    B, H, _, L = level_scales.shape
    memory = k.new_zeros(B, H, L, k.shape[3], v.shape[3])
    return LogLinearState(memory, torch.zeros(B, dtype=torch.int64, device=k.device))


def check(op: Op, tensors: dict[str, Tensor], initial: Any, cu_seqlens: Tensor | None, chunk_size: int) -> None:
    """Everything about the arguments that both techniques have."""
    if initial is not None and not isinstance(initial, LogLinearState):
        raise TypeError(f"{op.name}: initial_state is a {type(initial).__name__}, expected a LogLinearState")
    check_inputs(op, tensors, None if initial is None else initial.memory, cu_seqlens)
    check_chunk_size(op.name, chunk_size)
    if initial is not None and initial.position.shape != initial.memory.shape[:1]:
        raise ValueError(
            f"{op.name}: initial_state.position has shape {list(initial.position.shape)}, expected "
            f"{list(initial.memory.shape[:1])}, an entry for each row of its memory"
        )
    B, _, T, L = tensors["level_scales"].shape
    length = _longest(B, T, initial, cu_seqlens)
    if levels_for(length) > L:
        raise ValueError(
            f"{op.name}: level_scales has L={L} levels, expected at least {levels_for(length)}: "
            f"bit_length({length} - 1) + 1 for a sequence of {length} tokens"
        )


def _longest(B: int, T: int, initial: LogLinearState | None, cu_seqlens: Tensor | None) -> int:
    """The length of the longest sequence, these tokens included, as far as it is known without waiting for a device."""
    if torch.compiler.is_compiling():
        return T if cu_seqlens is None else 0
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    read = [0] * len(lengths)
    if initial is not None and (T > 1 or may_read(initial.position)):
        read = initial.position.tolist()
    return max((length + before for length, before in zip(lengths, read, strict=True)), default=0)


def spare_levels(level_scales: Tensor, initial: LogLinearState | None, cu_seqlens: Tensor | None) -> Tensor:
    """Under torch.compile packed sequences become rows as long as all of them: levels for what is padding there."""
    missing = levels_for(level_scales.shape[2]) - level_scales.shape[3]
    if torch.compiler.is_compiling() and cu_seqlens is not None and initial is None and missing > 0:
        return F.pad(level_scales, (0, missing))
    return level_scales


def levels_for(length: int) -> int:
    """How many levels `length` tokens have: bit_length(length - 1) + 1, at least one."""
    return max(0, length - 1).bit_length() + 1


def level(t: Tensor, s: Tensor) -> Tensor:
    """bit_length(t XOR s), int64: the level at which token t sees token s."""
    return torch.frexp((t ^ s).double()).exponent.long()


def scales_of_past(level_scales: Tensor, state: LogLinearState) -> tuple[Tensor, Tensor]:
    """level_scales at each pair of tokens [B, H, T, T], 0 for later ones, and at the blocks of a state [B, H, T, L].

    A block counts as the token where it begins: later tokens see all of its tokens at one level.
    """
    t = state.position[:, None] + torch.arange(level_scales.shape[2], device=level_scales.device)  # [B, T]
    pairs = level(t[:, :, None], t[:, None]).tril()
    blocks = level(t[:, :, None], _block_begins(state)[:, None])
    heads = level_scales.shape[1]
    of_tokens, of_blocks = (level_scales.gather(3, x[:, None].expand(-1, heads, -1, -1)) for x in (pairs, blocks))
    return of_tokens.tril(), of_blocks


def after_tokens(state: LogLinearState, k: Tensor, v: Tensor, memory: Tensor) -> LogLinearState:
    """The state after tokens that add k_t v_t^T: k and the old memory as the last token leaves them."""
    L, T = memory.shape[2], k.shape[2]
    last = state.position[:, None] + T - 1
    begins = torch.cat((_block_begins(state), state.position[:, None] + torch.arange(T, device=k.device)), dim=1)
    at = level(last, begins)[:, None] == torch.arange(L, device=k.device)[:, None]  # [B, L, L + T]
    old, new = at.to(k.dtype).split((L, T), dim=2)
    added = torch.einsum("blt, bhtk, bhtv -> bhlkv", new, k, v)
    return LogLinearState(torch.einsum("blm, bhmkv -> bhlkv", old, memory) + added, state.position + T)


def _block_begins(state: LogLinearState) -> Tensor:
    """The first token of the block at each level, [B, L]; any token where a level is empty."""
    levels = torch.arange(state.memory.shape[2], device=state.position.device)
    return (state.position - 1).clamp_min(0)[:, None] >> levels << levels


def past_blocks(last: int) -> dict[int, slice]:
    """The tokens of each block up to token `last`, by its level for that token; none where last is -1."""
    blocks = {0: slice(last, last + 1)} if last >= 0 else {}
    for i in range(max(0, last).bit_length()):
        if last >> i & 1:
            begin = last >> i + 1 << i + 1
            blocks[i + 1] = slice(begin, begin + (1 << i))
    return blocks


def aligned_pieces(position: int, T: int, chunk_size: int, longest: int) -> Iterator[tuple[int, int]]:
    """(length, chunk) of pieces that make up T tokens from a position on.

    Each starts at a multiple of its size, a power of two up to `longest`, and has whole chunks or is a part of one.
    """
    end = position + T
    while position < end:
        size = min(position & -position or longest, longest)
        rest, C = end - position, min(size, chunk_size)
        length = min(size, _largest_power(rest)) if rest >= C else rest
        yield length, chunk_length(length, C)
        position += length


def _largest_power(n: int) -> int:
    """The largest power of two up to n >= 1."""
    return 1 << n.bit_length() - 1


def resume(
    piece: Piece, tensors: tuple[Tensor, ...], initial: LogLinearState | None, chunk_size: int
) -> tuple[Tensor, LogLinearState]:
    """o and the state after tensors (q, k, v, ..., level_scales), which continue a state of rows at any positions."""
    state = empty_state(tensors[1], tensors[2], tensors[-1]) if initial is None else initial
    positions = [0] * len(state.position) if initial is None else state.position.tolist()
    starts = sorted(set(positions)) or [0]
    if len(starts) == 1:
        o, memory = _in_pieces(piece, tensors, state.memory, starts[0], chunk_size)
    else:
        rows = [torch.tensor([n for n, p in enumerate(positions) if p == start]) for start in starts]
        rows = [own.to(state.position.device) for own in rows]
        parts = [
            _in_pieces(piece, tuple(x[own] for x in tensors), state.memory[own], start, chunk_size)
            for own, start in zip(rows, starts, strict=True)
        ]
        order = torch.cat(rows).argsort()
        o, memory = (torch.cat(found)[order] for found in zip(*parts, strict=True))
    return o, LogLinearState(memory, state.position + tensors[0].shape[2])


def _in_pieces(
    piece: Piece, tensors: tuple[Tensor, ...], memory: Tensor, position: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o and the memory after tensors whose first token stands at `position` in every row."""
    q, v, T = tensors[0], tensors[2], tensors[0].shape[2]
    memory = memory.to(q.dtype)
    blocks = {i: memory[:, :, i] for i in past_blocks(position - 1)}
    pieces = list(aligned_pieces(position, T, chunk_size, _largest_power(span_length(q, chunk_length(T, chunk_size)))))
    # split, not slices: the gradient of a slice is a tensor as long as the whole.
    split = zip(*(x.split([length for length, _ in pieces], dim=2) for x in tensors), strict=True)
    outs = [v[:, :, :0]]
    for (length, C), parts in zip(pieces, split, strict=True):
        o, blocks = piece(carried(blocks, position), C, *parts)
        outs.append(o)
        position += length
    empty = torch.zeros_like(memory[:, :, 0])
    return torch.cat(outs, 2), torch.stack([blocks.get(i, empty) for i in range(memory.shape[2])], 2)


def carried(blocks: Blocks, position: int) -> Blocks:
    """The blocks as the token at `position` finds them."""
    joined = [block for i, block in blocks.items() if position % (1 << i) == 0]
    if not joined:
        return blocks
    rest = {i: block for i, block in blocks.items() if position % (1 << i)}
    return rest | {(position & -position).bit_length(): torch.stack(joined).sum(0)}


def recurrence(
    initial: LogLinearState | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
) -> tuple[Tensor, LogLinearState]:
    """One token after the other, for rows at any positions, which stay on the device. With beta the delta rule."""
    memory, position = empty_state(k, v, level_scales) if initial is None else initial
    memory, capacity = memory.to(q.dtype), 1 << level_scales.shape[3] - 1
    decay = g.to(q.dtype).exp()
    outs = [v[:, :, :0]]
    for t in range(q.shape[2]):
        memory = decay[:, :, t, None, None, None] * _merged(memory, position)
        key = write = k[:, :, t]
        if beta is not None:
            write = beta[:, :, t, None] * key
            held = torch.einsum("bhk, bhlkv -> bhlv", key, memory)
            memory = memory - write[:, :, None, :, None] * held[:, :, :, None]
        new = write[..., None] * v[:, :, t, None, :]
        memory = torch.cat((new[:, :, None], memory[:, :, 1:]), dim=2)
        o = torch.einsum("bhl, bhk, bhlkv -> bhv", level_scales[:, :, t], q[:, :, t], memory)
        # On the host nobody may have read the position: past the last level nothing may look right.
        outs.append(o.masked_fill((position >= capacity)[:, None, None], math.nan)[:, :, None])
        position = position + 1
    return torch.cat(outs, 2), LogLinearState(memory, position)


def _merged(memory: Tensor, position: Tensor) -> Tensor:
    """`carried` for rows at different positions [B]: memory [B, H, L, K, V]."""
    size = 1 << torch.arange(memory.shape[2], device=position.device)
    lowest = (position & -position)[:, None]
    joins, into = (x[:, None, :, None, None] for x in (size <= lowest, size == 2 * lowest))
    block = memory.where(joins, 0.0).sum(2, keepdim=True)
    return memory.masked_fill(joins, 0.0) + block.where(into, 0.0)


def one_by_one(q: Tensor, initial: LogLinearState | None) -> bool:
    """Whether to take `recurrence`: when decoding, and under torch.compile, which cannot see where a state stands."""
    return initial is not None and (q.shape[2] == 1 or torch.compiler.is_compiling())


def within_chunk(level_scales: Tensor) -> Tensor:
    """level_scales [..., C, L] of the tokens of a chunk at each token of it up to theirs: [..., C, C], else 0.

    A product with zeros and ones, since the gradient of an index would be a sum in no fixed order on a GPU.
    """
    C = level_scales.shape[-2]
    t = torch.arange(C, device=level_scales.device)
    levels = torch.where(t[:, None] >= t, level(t[:, None], t), -1)
    chosen = levels[:, None] == torch.arange(C.bit_length(), device=t.device)[:, None]  # [C, levels, C]
    used = level_scales[..., : C.bit_length()]
    return torch.einsum("...tl, tls -> ...ts", used, chosen.to(used.dtype))


def read(weights: list[Tensor], q: Tensor, blocks: list[Tensor]) -> Tensor:
    """sum_i (weights_i q) blocks_i for weights [..., T], q [..., T, K], blocks [..., K, V]."""
    call = _Read.apply if wants_gradient(q, *weights, *blocks) else _Read.forward
    return call(q, *weights, *blocks)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to know of them. Where not, torch.compile fails on a Function of any number of tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Read(torch.autograd.Function):
    """Keeps its inputs for backward and nothing else: the products weights_i q would be log2(T) times as large as q."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, *parts: Tensor) -> Tensor:
        weights, blocks = _halves(parts)
        return torch.cat([w[..., None] * q for w in weights], -1) @ torch.cat(blocks, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, *parts = ctx.saved_tensors
        weights, blocks = _halves(parts)
        d_queries = [d_out @ block.mT for block in blocks]  # [..., T, K]
        d_q = sum(w[..., None] * d for w, d in zip(weights, d_queries, strict=True))
        d_blocks = [(w[..., None] * q).mT @ d_out for w in weights]
        return d_q, *((d * q).sum(-1) for d in d_queries), *d_blocks


def _halves(parts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return list(parts[: len(parts) // 2]), list(parts[len(parts) // 2 :])
