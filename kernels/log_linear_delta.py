"""The log-linear gated delta rule: its blocks carried from chunk to chunk, their gradients, and decoding.

What happens within chunks are products of all of them at once, for which torch is as good. Left is a loop:

    seen_n = sum_i scales_i * (query_n S_i)          S_i: the blocks before chunk n; each token weighs each of them
    S_i <- decay_n S_i - key_n^T (erase_n S_i)       what the chunk leaves of them
    X_n = key_n^T written_n                          the chunk's own block

after which X_n and the blocks of the trailing ones of n become one block, that of the lowest set bit of n + 1. Slot i
holds the block of bit i of n; slots from LEVELS on hold blocks from before, which no chunk joins. After the last chunk
nothing joins at all. Everything is float32: a block is what is left of it after products with many erasures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from effkit.attention._fenwick import LogLinearState, one_by_one, recurrence, resume
from effkit.attention._recurrent import next_position, widen
from effkit.attention.deltanet import l2_normalize
from effkit.attention.log_linear_delta import in_chunks, prepared
from effkit.kernels._chunk_tiles import WIDTHS, ChunkTable, Tile, build, load_block, pick, store_block, through_memory
from effkit.kernels._common import AotSpec, distinct, dot, unit_stride
from effkit.kernels._recurrent_ops import define, empty_output
from effkit.kernels.log_linear import bit_length, decode

COUNTS = ["N", "SLOTS", "LEVELS", "stride_b", "stride_n"]


@triton.jit
def _lives(n, slot, LEVELS):
    """Whether chunk n finds a block in the slot."""
    return (slot >= LEVELS) | ((n >> tl.minimum(slot, LEVELS)) & 1 == 1)


@triton.jit
def _joined(n):
    """The slot of the block that chunk n's own becomes part of."""
    return bit_length((n + 1) & -(n + 1)) - 1


@triton.jit
def _next(n, slot, N):
    """Where the block that chunk n finds in the slot is afterwards."""
    return tl.where((n < N - 1) & (slot < _joined(n)), _joined(n), slot)


@triton.jit
def _through(
    x_ptr, matrix_ptr, n_out, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """x M of a chunk's rows x [C, K] and BLOCK_V columns of a matrix [K, V], of which n_out exist."""
    return through_memory(x_ptr, K, C, matrix_ptr, V, 1, n_out, K, C, BLOCK_K, BLOCK_V)


@triton.jit
def _onto(x_ptr, rows, k, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """x^T rows of a chunk for x [C, K], its columns from k on: [BLOCK_K, BLOCK_V]."""
    return dot(load_block(x_ptr + k, 1, K, K - k, C, BLOCK_K, C), rows)


# One program owns BLOCK_V columns of one head's blocks, for what is erased of a column depends on that column alone,
# and goes from chunk to chunk: it reads and writes each block that the chunk finds, once for each product. Without a
# stride between chunks the blocks stay where they are. The backward pass wants all of them, and no outputs.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_delta_scan(
    rows_ptr, key_ptr, written_ptr, decay_ptr, scales_ptr, blocks_ptr, seen_ptr, stride_b, stride_n, N, SLOTS, LEVELS,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    bh = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64)
    v = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V
    blocks_ptr += bh * stride_b + v
    for m in range(N):
        n = tl.cast(m, tl.int64)
        at = bh * N + n
        erase_ptr = rows_ptr + (2 * at + 1) * C * K
        here_ptr = blocks_ptr + n * stride_n
        next_ptr = blocks_ptr + tl.minimum(n + 1, N - 1) * stride_n
        n_kept = K + 0 * n
        if seen_ptr is None:  # nothing is wanted of the last chunk
            n_kept = tl.where(n < N - 1, n_kept, 0)
        decay = tl.load(decay_ptr + at)
        seen = tl.zeros([C, BLOCK_V], tl.float32)
        if n < N - 1:
            written = load_block(written_ptr + at * C * V + v, V, 1, C, V - v, C, BLOCK_V)
            for k in range(0, K, BLOCK_K):
                own = _onto(key_ptr + at * C * K, written, k, K, C, BLOCK_K)
                store_block(next_ptr + (_joined(n) * K + k) * V, V, K - k, V - v, own, BLOCK_K, BLOCK_V)
        for slot in range(SLOTS):
            if _lives(n, slot, LEVELS):
                block_ptr = here_ptr + tl.cast(slot, tl.int64) * K * V
                target = _next(n, slot, N)
                target_ptr = next_ptr + tl.cast(target, tl.int64) * K * V
                if seen_ptr is not None:
                    own_scales = tl.load(scales_ptr + (at * C + tl.arange(0, C)) * SLOTS + slot)
                    read = _through(rows_ptr + 2 * at * C * K, block_ptr, V - v, K, V, C, BLOCK_K, BLOCK_V)
                    seen += own_scales[:, None] * read
                erased = _through(erase_ptr, block_ptr, V - v, K, V, C, BLOCK_K, BLOCK_V)
                tl.debug_barrier()  # all have read what is written next
                for k in range(0, K, BLOCK_K):
                    block = load_block(block_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                    left = decay * block - _onto(key_ptr + at * C * K, erased, k, K, C, BLOCK_K)
                    if target != slot:
                        left += load_block(target_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                    tl.debug_barrier()
                    store_block(target_ptr + k * V, V, n_kept - k, V - v, left, BLOCK_K, BLOCK_V)
                tl.debug_barrier()
        if seen_ptr is not None:
            store_block(seen_ptr + at * C * V + v, V, C, V - v, seen, C, BLOCK_V)
        tl.debug_barrier()


# The same way back: one program owns BLOCK_V columns of the gradients of one head's blocks, [N + 1, SLOTS, K, V], and
# fills those before each chunk from those after it and from what its queries read.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_delta_dscan(
    rows_ptr, key_ptr, decay_ptr, scales_ptr, dseen_ptr, dblocks_ptr, N, SLOTS, LEVELS,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    bh = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64)
    v = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V
    dblocks_ptr += bh * (N + 1) * SLOTS * K * V + v
    for m in range(N):
        n = tl.cast(N - 1 - m, tl.int64)
        at = bh * N + n
        query_ptr = rows_ptr + 2 * at * C * K
        decay = tl.load(decay_ptr + at)
        dseen = load_block(dseen_ptr + at * C * V + v, V, 1, C, V - v, C, BLOCK_V)
        for slot in range(SLOTS):
            if _lives(n, slot, LEVELS):
                after_ptr = dblocks_ptr + ((n + 1) * SLOTS + _next(n, slot, N)) * K * V
                own_scales = tl.load(scales_ptr + (at * C + tl.arange(0, C)) * SLOTS + slot)
                kept = _through(key_ptr + at * C * K, after_ptr, V - v, K, V, C, BLOCK_K, BLOCK_V)
                for k in range(0, K, BLOCK_K):
                    gradient = decay * load_block(after_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
                    gradient -= _onto(query_ptr + C * K, kept, k, K, C, BLOCK_K)
                    gradient += _onto(query_ptr, own_scales[:, None] * dseen, k, K, C, BLOCK_K)
                    before_ptr = dblocks_ptr + (n * SLOTS + slot) * K * V + k * V
                    store_block(before_ptr, V, K - k, V - v, gradient, BLOCK_K, BLOCK_V)
        tl.debug_barrier()  # the chunk before reads what other threads of the program have written


# One program owns a chunk of one head: it reads the blocks before it and the gradients of those after it, and writes
# the gradients of all that the chunk brought to the loop.
@triton.jit(do_not_specialize=COUNTS)
def _log_linear_delta_gradients(
    rows_ptr, key_ptr, written_ptr, scales_ptr, dseen_ptr, blocks_ptr, dblocks_ptr,
    drows_ptr, dkey_ptr, dwritten_ptr, ddecay_ptr, dscales_ptr, N, SLOTS, LEVELS,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    n = at % N
    query_ptr = rows_ptr + 2 * at * C * K
    key_ptr += at * C * K
    dseen_ptr += at * C * V
    blocks_ptr += at * SLOTS * K * V
    dblocks_ptr += (at // N * (N + 1) + n + 1) * SLOTS * K * V  # after the chunk
    slots = tl.arange(0, BLOCK_S)
    dscales = tl.zeros([C, BLOCK_S], tl.float32)
    overlap = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        query = load_block(query_ptr + k, K, 1, C, K - k, C, BLOCK_K)
        dquery = tl.zeros([C, BLOCK_K], tl.float32)
        derase = tl.zeros([C, BLOCK_K], tl.float32)
        dkey = tl.zeros([C, BLOCK_K], tl.float32)
        for slot in range(SLOTS):
            if _lives(n, slot, LEVELS):
                block_ptr = blocks_ptr + tl.cast(slot, tl.int64) * K * V
                dblock_ptr = dblocks_ptr + tl.cast(_next(n, slot, N), tl.int64) * K * V
                through = tl.zeros([C, BLOCK_K], tl.float32)
                for v in range(0, V, BLOCK_V):
                    block = load_block(block_ptr + k * V + v, 1, V, V - v, K - k, BLOCK_V, BLOCK_K)
                    dblock = load_block(dblock_ptr + k * V + v, 1, V, V - v, K - k, BLOCK_V, BLOCK_K)
                    overlap += block * dblock
                    through = dot(load_block(dseen_ptr + v, V, 1, C, V - v, C, BLOCK_V), block, through)
                    derase -= dot(_through(key_ptr, dblock_ptr + v, V - v, K, V, C, BLOCK_K, BLOCK_V), block)
                    erased = _through(query_ptr + C * K, block_ptr + v, V - v, K, V, C, BLOCK_K, BLOCK_V)
                    dkey -= dot(erased, dblock)
                own_scales = tl.load(scales_ptr + (at * C + tl.arange(0, C)) * SLOTS + slot)
                dquery += own_scales[:, None] * through
                dscales += tl.where(slots[None, :] == slot, tl.sum(query * through, 1)[:, None], 0.0)
        if n < N - 1:
            for v in range(0, V, BLOCK_V):
                written = load_block(written_ptr + at * C * V + v, V, 1, C, V - v, C, BLOCK_V)
                own_ptr = dblocks_ptr + (_joined(n) * K + k) * V + v
                dkey = dot(written, load_block(own_ptr, 1, V, V - v, K - k, BLOCK_V, BLOCK_K), dkey)
        store_block(drows_ptr + 2 * at * C * K + k, K, C, K - k, dquery, C, BLOCK_K)
        store_block(drows_ptr + (2 * at + 1) * C * K + k, K, C, K - k, derase, C, BLOCK_K)
        store_block(dkey_ptr + at * C * K + k, K, C, K - k, dkey, C, BLOCK_K)
    for v in range(0, V, BLOCK_V):
        dwritten = tl.zeros([C, BLOCK_V], tl.float32)
        if n < N - 1:
            own_ptr = dblocks_ptr + _joined(n) * K * V + v
            dwritten += _through(key_ptr, own_ptr, V - v, K, V, C, BLOCK_K, BLOCK_V)
        store_block(dwritten_ptr + at * C * V + v, V, C, V - v, dwritten, C, BLOCK_V)
    store_block(dscales_ptr + at * C * SLOTS, SLOTS, C, SLOTS, dscales, C, BLOCK_S)
    tl.store(ddecay_ptr + at, tl.sum(tl.sum(overlap, 1), 0))


# (architecture, head width, bytes of an element) -> tile. Chosen as the largest that compile without spills, not timed
# on a device. The columns of a head are shared out to several programs, of which there are few.
_EVERY = tuple((arch, width, 4) for arch in (80, 90, 100) for width in WIDTHS)
SCAN: ChunkTable = dict.fromkeys(_EVERY, Tile(16, 16, 4, 1))
GRADIENTS: ChunkTable = dict.fromkeys(_EVERY, Tile(16, 16, 8, 1))


def _sizes(rows: Tensor, written: Tensor, scales: Tensor) -> dict[str, Any]:
    N, K, C, V = rows.shape[2], rows.shape[4], *written.shape[3:]
    return dict(N=N, SLOTS=scales.shape[4], LEVELS=(N - 1).bit_length(), K=K, V=V, C=C)


def _forward(
    rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    rows, key, written, decay, scales = (x.contiguous() for x in (rows, key, written, decay, scales))
    seen, after = _fake_forward(rows, key, written, decay, scales, before)
    if seen.numel():
        sizes = _sizes(rows, written, scales)
        after.zero_()[:, :, sizes["LEVELS"] :] = before
        _run_scan(rows, key, written, decay, scales, after, seen, sizes)
    return seen, after


def _run_scan(
    rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor, blocks: Tensor, seen: Tensor | None,
    sizes: dict[str, Any],
) -> None:  # fmt: skip
    tile = pick(SCAN, rows, written)
    heads = rows.shape[0] * rows.shape[1]
    stride_n = 0 if seen is not None else blocks.stride(2)
    with torch.cuda.device_of(rows):
        _log_linear_delta_scan[heads * triton.cdiv(sizes["V"], tile.BLOCK_V),](
            rows, key, written, decay, scales, blocks, seen, blocks.stride(1), stride_n, **sizes, **tile._asdict()
        )


def _fake_forward(
    rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    B, H, _, _, K = rows.shape
    return torch.empty_like(written, memory_format=torch.contiguous_format), before.new_empty(
        B, H, scales.shape[4], K, written.shape[4]
    )


def _backward(
    dseen: Tensor, dafter: Tensor, rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor,
    before: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (rows, key, written, decay, scales, before)
    rows, key, written, decay, scales, before, dseen = (x.contiguous() for x in (*inputs, dseen))
    found = _fake_backward(dseen, dafter, rows, key, written, decay, scales, before)
    if not dseen.numel():
        return found
    drows, dkey, dwritten, ddecay, dscales, dbefore = found
    sizes = _sizes(rows, written, scales)
    (B, H, N), S, K, V, LEVELS = decay.shape, *(sizes[name] for name in ("SLOTS", "K", "V", "LEVELS"))
    blocks = rows.new_empty(B, H, N, S, K, V)
    blocks[:, :, 0, LEVELS:] = before
    _run_scan(rows, key, written, decay, scales, blocks, None, sizes)
    dblocks = rows.new_empty(B, H, N + 1, S, K, V)
    dblocks[:, :, N] = dafter
    tile = pick(SCAN, rows, written)
    with torch.cuda.device_of(rows):
        _log_linear_delta_dscan[B * H * triton.cdiv(V, tile.BLOCK_V),](
            rows, key, decay, scales, dseen, dblocks, **sizes, **tile._asdict()
        )
        _log_linear_delta_gradients[B * H * N,](
            rows, key, written, scales, dseen, blocks, dblocks, drows, dkey, dwritten, ddecay, dscales,
            **sizes, BLOCK_S=triton.next_power_of_2(max(1, S)), **pick(GRADIENTS, rows, written)._asdict(),
        )  # fmt: skip
    dbefore.copy_(dblocks[:, :, 0, LEVELS:])
    return found


def _fake_backward(dseen: Tensor, dafter: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


_TENSORS = ("rows", "key", "written", "decay", "scales", "before")
_forward_op = define(
    "log_linear_delta_scan",
    ", ".join(f"Tensor {name}" for name in _TENSORS[:-1]),
    "Tensor before",
    "Tensor seen, Tensor after",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "log_linear_delta_scan_backward",
    ", ".join(f"Tensor {name}" for name in ("dseen", "dafter", *_TENSORS[:-1])),
    "Tensor before",
    ", ".join(f"Tensor d{name}" for name in _TENSORS),
    _backward,
    _fake_backward,
)


class _Loop(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(rows, key, written, decay, scales, before)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dseen: Tensor, dafter: Tensor) -> tuple[Any, ...]:
        return _LoopBackward.apply(dseen, dafter, *ctx.saved_tensors)


class _LoopBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dseen: Tensor, dafter: Tensor, rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, scales: Tensor,
        before: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return _backward_op(dseen, dafter, rows, key, written, decay, scales, before)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            'the kernels of log_linear_gated_delta_rule have no second derivative; backend="reference" has'
        )


def _at_least_16(x: Tensor) -> Tensor:
    """x [..., C, D] with as many tokens as a matrix instruction takes; those added do nothing."""
    return F.pad(x, (0, 0, 0, 16 - x.shape[-2])) if x.shape[-2] < 16 else x


def _scan(
    levels: tuple[int, ...], rows: Tensor, key: Tensor, written: Tensor, decay: Tensor, level_scales: Tensor,
    *before: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loop of the torch path, with the same arguments and results: see there."""
    N, C = written.shape[2:4]
    slots = [C.bit_length() + bit for bit in range((N - 1).bit_length())] + list(levels)
    scales = torch.stack([level_scales[..., level] for level in slots], -1) if slots else level_scales[..., :0]
    held = torch.stack(before, 2) if before else key.new_empty(*key.shape[:2], 0, key.shape[4], written.shape[4])
    query_and_erase = _at_least_16(rows.unflatten(3, (2, C))).flatten(3, 4)
    tokens = (_at_least_16(x) for x in (key, written))
    seen, after = _Loop.apply(query_and_erase, *tokens, decay[..., 0, 0], _at_least_16(scales), held)
    seen = seen[:, :, :, :C]
    blocks = {level: after[:, :, i] for i, level in enumerate(slots) if level in levels or (N - 1) >> i & 1}
    blocks[0] = key[:, :, -1].mT @ written[:, :, -1]
    return seen, *(blocks[level] for level in sorted(blocks))


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, level_scales: Tensor, first: Tensor, position: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, first = unit_stride(q), unit_stride(k), unit_stride(v), first.float().contiguous()
    o, last = _fake_step(q, k, v, g, beta, level_scales, first, position, scale)
    if o.numel():
        decode(q, k, v, g, beta, level_scales, first, position, scale, o, last)
    return o, last


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, level_scales: Tensor, first: Tensor, position: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_output(q, k, v), first.new_empty(first.shape, dtype=torch.float32)


_step_op = define(
    "log_linear_delta_step",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor level_scales, Tensor first, Tensor position",
    "float scale",
    "Tensor o, Tensor last",
    _step,
    _fake_step,
)


def log_linear_gated_delta_rule(
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
    """The kernels behind effkit.attention.log_linear_gated_delta_rule, which documents and has checked the arguments.

    A single token without gradients is one kernel; otherwise the torch path runs with its loop over chunks in kernels.
    """
    if one_by_one(q, initial_state):
        assert initial_state is not None
        tensors = (q, k, v, g, beta, level_scales, initial_state.memory)
        if q.shape[2] > 1 or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            o, state = recurrence(initial_state, *prepared(q, k, v, g, beta, level_scales, scale, qk_l2norm))
        else:
            if qk_l2norm:
                q, k = (l2_normalize(x) for x in widen(q, k))
            o, last = _step_op(*distinct(q, k, *tensors[2:]), initial_state.position, scale)
            state = LogLinearState(last, next_position(q, initial_state))
    else:
        ready = prepared(q, k, v, g, beta, level_scales, scale, qk_l2norm)
        o, state = resume(partial(in_chunks, _scan), ready, initial_state, chunk_size)
    return o.to(v.dtype), state


def _build(kernel: Any, arch: int, tile: Tile, width: int, variant: str, **constants: Any) -> AotSpec:
    spec = build(kernel, arch, tile, width, "fp32", variant, products=False, BLOCK_S=16, **constants)
    wide = {name: "i64" for name in ("stride_b", "stride_n") if name in spec.signature}
    return replace(spec, signature=spec.signature | wide)


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    for arch in (80, 90, 100):
        for width in (64, 256):
            scan, gradients = SCAN[arch, width, 4], GRADIENTS[arch, width, 4]
            yield _build(_log_linear_delta_scan, arch, scan, width, "outputs")
            yield _build(_log_linear_delta_dscan, arch, scan, width, "gradients")
            yield _build(_log_linear_delta_gradients, arch, gradients, width, "gradients")
        yield _build(_log_linear_delta_scan, arch, SCAN[arch, 64, 4], 64, "blocks", absent=("seen_ptr",))
