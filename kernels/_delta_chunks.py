"""The delta rules in chunks: the triangular system of each, memories between them, their gradients, and decoding.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * q_t S_t

Within a chunk of C tokens, c the sums of g from its start, D_ij = exp(c_i - c_j), S the memory before it:

    A = (I + M)^-1           M_ij = beta_i D_ij (k_i k_j) for j < i
    writes = A diag(beta) V                     erasures = A diag(beta exp c) K
    values = writes - erasures S                what the tokens add to the memory, given what they find there
    o, S_next = those of the scalar-gated recurrence with these values (`chunk_scan`)

and backwards, with dvalues and the gradient G of S_next from that recurrence:

    X = A^T dvalues          dv = diag(beta) X        dM = -X values^T below the diagonal
    dk = from M, and -diag(beta exp c) X S^T          dbeta and dg likewise
    G_before = exp(c_last) G + scale * (diag(exp c) Q)^T do - erasures^T dvalues

Everything but the inputs is made again in the backward pass.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._chunk_tiles import (
    LENGTHS,
    WIDTHS,
    ChunkTable,
    Tile,
    across,
    chunk_decay,
    chunk_rows,
    from_start,
    load_block,
    pick,
    row_products,
    store_block,
    to_end,
    weighted,
)
from effkit.kernels._common import cast, dot, unit_stride
from effkit.kernels._recurrent_ops import empty_memory, groups, strides
from effkit.kernels.chunk_scan import _locate as locate


@triton.jit
def _diagonal(m, C: tl.constexpr, B: tl.constexpr):
    """The blocks on the diagonal of m [C, C], [C // B, B, B]."""
    n: tl.constexpr = C // B
    own = tl.arange(0, n)[:, None, None, None] == tl.arange(0, n)[None, None, :, None]
    return tl.sum(tl.where(own, tl.reshape(m, [n, B, n, B]), 0.0), 2)


@triton.jit
def _invert_16(m):
    """(I + m)^-1 of strictly lower m [n, 16, 16], from blocks of 2 by doubling as in _double, with masks for blocks."""
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    x = tl.where(i == j, 1.0, tl.where((i == j + 1) & (j % 2 == 0), -m, 0.0))
    for level in tl.static_range(1, 4):
        below = tl.where(((i >> level) == (j >> level) + 1) & ((j >> level) % 2 == 0), m, 0.0)
        x -= dot(dot(x, below), x)
    return x


@triton.jit
def _double(x, m, C: tl.constexpr, B: tl.constexpr):
    """Inverses x [2 n, B, B] of the diagonal blocks of I + m to those of blocks twice as large, [n, 2 B, 2 B].

    The inverse of [[a, 0], [m, b]] is [[a^-1, 0], [-b^-1 m a^-1, b^-1]].
    """
    n: tl.constexpr = C // (2 * B)
    quarters = tl.reshape(_diagonal(m, C, 2 * B), [n, 2, B, 2, B])
    _, lower = tl.split(tl.permute(quarters, [0, 2, 3, 4, 1]))
    below, _ = tl.split(tl.permute(lower, [0, 1, 3, 2]))  # [n, B, B]
    upper_left, lower_right = tl.split(tl.permute(tl.reshape(x, [n, 2, B, B]), [0, 2, 3, 1]))
    lower_left = -dot(dot(lower_right, below), upper_left)
    upper = tl.reshape(tl.permute(tl.join(upper_left, tl.zeros_like(upper_left)), [0, 1, 3, 2]), [n, B, 2 * B])
    lower = tl.reshape(tl.permute(tl.join(lower_left, lower_right), [0, 1, 3, 2]), [n, B, 2 * B])
    return tl.reshape(tl.permute(tl.join(upper, lower), [0, 3, 1, 2]), [n, 2 * B, 2 * B])


@triton.jit
def _invert(m, C: tl.constexpr):
    """(I + m)^-1 of strictly lower m [C, C], in float32: blocks of 16, doubled until they are one."""
    x = _invert_16(_diagonal(m, C, 16))
    if C >= 32:
        x = _double(x, m, C, 16)
    if C >= 64:
        x = _double(x, m, C, 32)
    return tl.reshape(x, [C, C])


@triton.jit
def below_diagonal(pairs, c_ptr, C: tl.constexpr):
    """D_ij times pairs (i, j) for j < i, else 0."""
    i = tl.arange(0, C)
    return tl.where(i[:, None] > i[None, :], weighted(pairs, c_ptr, C, KEYS_FIRST=False), 0.0)


@triton.jit
def _solved(inverse, strength, x, C: tl.constexpr):
    """inverse diag(strength) x, in float32. The ones on the diagonal of the inverse leave their rows of x unrounded."""
    i = tl.arange(0, C)
    below = tl.where(i[:, None] > i[None, :], inverse * strength[None, :], 0.0)
    return dot(below, x, strength[:, None] * x.to(tl.float32))


# One program owns a chunk of one head: it reads its keys twice and its values once, and writes its writes and erasures,
# and, for the backward pass, the inverse below its diagonal of ones. Neither inverse nor writes are rounded: what they
# add to the memory stays exact, and where beta is near 2 the sums of the inverse cancel.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_system(
    k_ptr, v_ptr, beta_ptr, c_ptr, writes_ptr, erasures_ptr, below_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    T, N, H, k_group, v_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, n, _, _ = locate(N, H, BLOCK_K, BLOCK_V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * N + n
    start = tl.cast(n, tl.int64) * C
    row = (b * H + h) * T + start
    n_rows = T - start
    k_ptr += b * stride_kb + h // k_group * stride_kh + start * stride_kt
    v_ptr += b * stride_vb + h // v_group * stride_vh + start * stride_vt
    i = tl.arange(0, C)
    beta = tl.load(beta_ptr + row + i, mask=i < n_rows, other=0.0)
    strength = beta
    if c_ptr is not None:
        c_ptr += at * 2 * C
        strength *= from_start(c_ptr, C)
    similarities = row_products(k_ptr, k_ptr, stride_kt, stride_kt, n_rows, K, C, BLOCK_K)
    inverse = _invert(beta[:, None] * below_diagonal(similarities, c_ptr, C), C)
    if below_ptr is not None:
        store_block(below_ptr + at * C * C, C, C, C, tl.where(i[:, None] > i[None, :], inverse, 0.0), C, C)
    for v in range(0, V, BLOCK_V):
        values = load_block(v_ptr + v, stride_vt, 1, n_rows, V - v, C, BLOCK_V)
        store_block(writes_ptr + row * V + v, V, n_rows, V - v, _solved(inverse, beta, values, C), C, BLOCK_V)
    for k in range(0, K, BLOCK_K):
        keys = load_block(k_ptr + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
        store_block(erasures_ptr + row * K + k, K, n_rows, K - k, _solved(inverse, strength, keys, C), C, BLOCK_K)


# One program owns BLOCK_V columns of one head's memory, with all their keys, since what a token finds under its key
# takes them all. It goes from chunk to chunk, and writes the memory before each, the values, and what is left.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_memories(
    k_ptr, c_ptr, values_ptr, erasures_ptr, first_ptr, memories_ptr, last_ptr,
    stride_kb, stride_kh, stride_kt, T, N, H, k_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    k_ptr += b * stride_kb + h // k_group * stride_kh
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + bh * K * V + v, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    for n in range(N):
        start = tl.cast(n, tl.int64) * C
        row = bh * T + start
        n_rows = T - start
        store_block(memories_ptr + (bh * N + n) * K * V + v, V, K, V - v, memory, BLOCK_K, BLOCK_V)
        writes = load_block(values_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        erasures = load_block(erasures_ptr + row * K, K, 1, n_rows, K, C, BLOCK_K)
        keys = load_block(k_ptr + start * stride_kt, stride_kt, 1, n_rows, K, C, BLOCK_K)
        values = writes - dot(erasures, cast(memory, dtype))
        store_block(values_ptr + row * V + v, V, n_rows, V - v, values, C, BLOCK_V)
        if c_ptr is not None:
            chunk_ptr = c_ptr + (bh * N + n) * 2 * C
            memory *= across(chunk_ptr, C)
            values *= to_end(chunk_ptr, C)[:, None]
        memory = dot(tl.trans(keys), values, memory)
    store_block(last_ptr + bh * K * V + v, V, K, V - v, memory, BLOCK_K, BLOCK_V)


@triton.jit
def begin(
    first_ptr, last_ptr, at, n_columns, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Puts the first memory, or zeros, where the running one is kept, tile by tile."""
    for k in range(0, K, BLOCK_K):
        memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if first_ptr is not None:
            memory = load_block(first_ptr + at + k * V, V, 1, K - k, n_columns, BLOCK_K, BLOCK_V)
        store_block(last_ptr + k * V, V, K - k, n_columns, memory, BLOCK_K, BLOCK_V)
    tl.debug_barrier()


# The same where the memory of all keys does not fit into registers: it stays in last_ptr, BLOCK_K keys in a tile.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_memories_in_tiles(
    k_ptr, c_ptr, values_ptr, erasures_ptr, first_ptr, memories_ptr, last_ptr,
    stride_kb, stride_kh, stride_kt, T, N, H, k_group,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    bh = b * H + h
    k_ptr += b * stride_kb + h // k_group * stride_kh
    last_ptr += bh * K * V + v
    begin(first_ptr, last_ptr, bh * K * V + v, V - v, K, V, BLOCK_K, BLOCK_V)
    for n in range(N):
        start = tl.cast(n, tl.int64) * C
        row = bh * T + start
        n_rows = T - start
        memory_ptr = memories_ptr + (bh * N + n) * K * V + v
        values = load_block(values_ptr + row * V + v, V, 1, n_rows, V - v, C, BLOCK_V)
        for k in range(0, K, BLOCK_K):
            memory = load_block(last_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            store_block(memory_ptr + k * V, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
            values -= dot(load_block(erasures_ptr + row * K + k, K, 1, n_rows, K - k, C, BLOCK_K), memory)
        store_block(values_ptr + row * V + v, V, n_rows, V - v, values, C, BLOCK_V)
        decay = 1.0
        if c_ptr is not None:
            chunk_ptr = c_ptr + (bh * N + n) * 2 * C
            decay = across(chunk_ptr, C)
            values *= to_end(chunk_ptr, C)[:, None]
        tl.debug_barrier()  # all have read what is written next
        for k in range(0, K, BLOCK_K):
            memory = load_block(last_ptr + k * V, V, 1, K - k, V - v, BLOCK_K, BLOCK_V)
            keys = load_block(k_ptr + start * stride_kt + k, stride_kt, 1, n_rows, K - k, C, BLOCK_K)
            memory = dot(tl.trans(keys), values, decay * memory)
            tl.debug_barrier()
            store_block(last_ptr + k * V, V, K - k, V - v, memory, BLOCK_K, BLOCK_V)
        tl.debug_barrier()  # the next chunk may read what another thread of the program wrote


# The largest tiles that compile without spills, not timed on a device; those for 80 fit into the 99 KiB of its smaller
# relatives. Where a program holds all keys of a head, few columns of values leave more programs to run side by side.
EVERY = tuple(itertools.product((80, 90, 100), WIDTHS))
SINGLE: ChunkTable = {(*key, 4): Tile(32, 32, 8, 1) for key in EVERY}
PRODUCTS: ChunkTable = SINGLE | {(*key, 2): Tile(64, 64, 4, 2) for key in EVERY}
SYSTEM: ChunkTable = PRODUCTS | {(100, width, 4): Tile(32, 64, 8, 1) for width in WIDTHS}
IN_TILES = Tile(32, 32, 8, 1)  # where the memory is worked on tile by tile
MEMORIES: ChunkTable = (
    {(arch, width, 4): Tile(width, 16, 8, 1) if width <= 64 else IN_TILES for arch, width in EVERY}
    | {(arch, width, 2): Tile(width, 32, 4, 2) for arch, width in EVERY}
    | {(arch, 256, 2): Tile(256, 32, 8, 2) for arch in (80, 90, 100)}
)


def in_tiles(q: Tensor) -> bool:
    """Whether registers are too few for the memory of all keys: its products in float32 take several times as many."""
    return q.dtype == torch.float32 and q.shape[3] > 64


def whole(tile: Tile, q: Tensor) -> Tile:
    """The tile with all keys of a head, unless they are worked on tile by tile."""
    return IN_TILES if in_tiles(q) else tile._replace(BLOCK_K=max(16, triton.next_power_of_2(q.shape[3])))


class Chunks:
    """The inputs of one call as the kernels take them, and the launches that both passes share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float,
        chunk_size: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.beta = unit_stride(q), unit_stride(k), unit_stride(v), beta.float().contiguous()
        self.first = None if first is None else first.float().contiguous()
        self.scale, self.C = scale, chunk_rows(q.shape[2], chunk_size)
        self.B, self.H, self.T = beta.shape
        self.K, self.V, self.N = q.shape[3], v.shape[3], triton.cdiv(self.T, self.C)
        self.c = None if g is None else chunk_decay(g, self.C)
        self.sizes = dict(T=self.T, N=self.N, H=self.H, K=self.K, V=self.V, C=self.C)
        self.programs = self.B * self.H * self.N

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch for each token of each head; in the dtype of k unless one is given."""
        return self.k.new_empty(self.B, self.H, self.T, width, dtype=dtype)

    def solve(self, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """writes and erasures; fills the inverse below its diagonal."""
        writes, erasures = self.rows(self.V, torch.float32), self.rows(self.K)
        k_group, v_group = groups(self.H, self.k, self.v)
        _delta_system[self.programs,](
            self.k, self.v, self.beta, self.c, writes, erasures, below, *strides(self.k, self.v),
            k_group=k_group, v_group=v_group, **self.sizes, **pick(SYSTEM, self.q, self.v)._asdict(),
        )  # fmt: skip
        return writes, erasures

    def remember(self, values: Tensor, erasures: Tensor, last: Tensor) -> Tensor:
        """The memory before each chunk; fills last, and makes values of writes, in place."""
        memories = empty_memory(self.q, self.v, self.H, self.N, dtype=self.k.dtype)
        tile = whole(pick(MEMORIES, self.q, self.v), self.q)
        kernel = _delta_memories_in_tiles if in_tiles(self.q) else _delta_memories
        kernel[self.B * self.H * triton.cdiv(self.V, tile.BLOCK_V),](
            self.k, self.c, values, erasures, self.first, memories, last, *strides(self.k),
            k_group=self.H // self.k.shape[1], **self.sizes, **tile._asdict(),
        )  # fmt: skip
        return memories
