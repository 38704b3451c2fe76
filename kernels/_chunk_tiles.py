"""The tile arithmetic that chunked recurrences share: decays within a chunk, its products, and its part of the memory.

A chunk is C tokens, n_rows of which exist; what lies behind them is never read. Log-decays come as c [B, H, N, 2, C]:
for each chunk the sums of the gates from its start, own step included, as two float32 numbers hi + lo. A float32 sum of
strong gates would leave an error of 1e-4 in the difference between two weak neighbours. No exponent is positive.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, dot

# Lengths change from call to call; a build for "multiple of 16" and another for "1" would buy nothing.
LENGTHS = ["T", "N", "H", "segments", "length", *(f"{name}_group" for name in "qkvabx")]


@triton.jit
def load_block(ptr, stride_row, stride_column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The [ROWS, COLUMNS] at ptr of a matrix; zero from row n_rows and from column n_columns on."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=mask, other=0.0)


@triton.jit
def store_block(ptr, stride_row, n_rows, n_columns, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] to ptr, rounded to its dtype; only rows before n_rows and columns before n_columns."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(ptr + rows[:, None] * stride_row + columns[None, :], cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_row(ptr, x, n, C: tl.constexpr):
    """The first n of x [C] to ptr."""
    i = tl.arange(0, C)
    tl.store(ptr + i, x, mask=i < n)


@triton.jit
def from_start(c_ptr, C: tl.constexpr):
    """exp(c_i): the decay from before the chunk to token i, [C]."""
    i = tl.arange(0, C)
    return tl.exp(tl.load(c_ptr + i) + tl.load(c_ptr + C + i))


@triton.jit
def to_end(c_ptr, C: tl.constexpr):
    """exp(c_last - c_i): the decay from token i to the end of the chunk, [C]."""
    i = tl.arange(0, C)
    hi = tl.load(c_ptr + C - 1) - tl.load(c_ptr + i)
    return tl.exp(hi + (tl.load(c_ptr + 2 * C - 1) - tl.load(c_ptr + C + i)))


@triton.jit
def across(c_ptr, C: tl.constexpr):
    """exp(c_last): the decay from before the chunk to its end."""
    return tl.exp(tl.load(c_ptr + C - 1) + tl.load(c_ptr + 2 * C - 1))


@triton.jit
def weighted(scores, c_ptr, C: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """scores of (query i, key j), or (j, i) with KEYS_FIRST, times exp(c_i - c_j); zero where j > i. c_ptr None: 1."""
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    seen = row >= column
    if KEYS_FIRST:
        seen = row <= column
    if c_ptr is None:
        scores = tl.where(seen, scores, 0.0)
    else:
        hi = tl.load(c_ptr + row) - tl.load(c_ptr + column)
        exponent = hi + (tl.load(c_ptr + C + row) - tl.load(c_ptr + C + column))
        if KEYS_FIRST:
            exponent = -exponent
        scores *= tl.exp(tl.where(seen, exponent, float("-inf")))
    return scores


@triton.jit
def row_products(
    x_ptr, y_ptr, stride_x, stride_y, n_rows, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x y^T of two chunks of rows, [C, C]."""
    products = tl.zeros([C, C], tl.float32)
    for w in range(0, WIDTH, BLOCK):
        x = load_block(x_ptr + w, stride_x, 1, n_rows, WIDTH - w, C, BLOCK)
        y = load_block(y_ptr + w, stride_y, 1, n_rows, WIDTH - w, C, BLOCK)
        products = dot(x, tl.trans(y), products)
    return products


@triton.jit
def through_memory(
    x_ptr, stride_x, n_rows, memory_ptr, stride_in, stride_out, n_out,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """x M of a chunk of rows [C, WIDTH] and the first n_out columns at memory_ptr, [C, BLOCK_OUT]."""
    products = tl.zeros([C, BLOCK_OUT], tl.float32)
    for w in range(0, WIDTH, BLOCK_IN):
        x = load_block(x_ptr + w, stride_x, 1, n_rows, WIDTH - w, C, BLOCK_IN)
        memory = load_block(memory_ptr + w * stride_in, stride_in, stride_out, WIDTH - w, n_out, BLOCK_IN, BLOCK_OUT)
        if memory.dtype == tl.float32:
            memory = cast(memory, x.dtype)
        products = dot(x, memory, products)
    return products


@triton.jit
def write_rows(
    out_ptr, weights, z_ptr, factor, x_ptr, memory_ptr, partner_ptr, shift, column_ptr,
    stride_o, stride_z, stride_x, stride_in, stride_out, stride_partner, n_rows,
    WIDTH: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Write weights z + factor * (x M) to out, for a chunk of rows x [C, WIDTH], weights [C, C] and z, out [C, OUT].

    Where there is a column [OUT], shift [C] times it is added. Returns the products of the rows of factor * (x M) with
    those of a partner [C, OUT], or zeros without one.
    """
    products = tl.zeros([C], tl.float32)
    for w in range(0, OUT, BLOCK_OUT):
        rows = factor[:, None] * through_memory(
            x_ptr, stride_x, n_rows, memory_ptr + w * stride_out, stride_in, stride_out, OUT - w,
            WIDTH, C, BLOCK_IN, BLOCK_OUT,
        )  # fmt: skip
        if partner_ptr is not None:
            partner = load_block(partner_ptr + w, stride_partner, 1, n_rows, OUT - w, C, BLOCK_OUT)
            products += tl.sum(partner.to(tl.float32) * rows, 1)
        if column_ptr is not None:
            columns = tl.arange(0, BLOCK_OUT)
            column = tl.load(column_ptr + w + columns, mask=columns < OUT - w, other=0.0)
            rows += shift[:, None] * column[None, :]
        rows = dot(weights, load_block(z_ptr + w, stride_z, 1, n_rows, OUT - w, C, BLOCK_OUT), rows)
        store_block(out_ptr + w, stride_o, n_rows, OUT - w, rows, C, BLOCK_OUT)
    return products


@triton.jit
def summary(k, v, weight):
    """sum_j weight_j k_j v_j^T of a chunk [C, K], [C, V]; weight None is 1. It goes to v: k^T is used as loaded."""
    if weight is not None:
        v = cast(v.to(tl.float32) * weight[:, None], v.dtype)
    return dot(tl.trans(k), v)


# One program owns CHUNKS chunks of one head: it reads their gates once and writes their sums. It streams memory.
@triton.jit(do_not_specialize=LENGTHS)
def _chunk_decay(
    g_ptr, c_ptr, stride_gb, stride_gh, stride_gt, T, N, H, C: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(N, CHUNKS)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks * CHUNKS + tl.arange(0, CHUNKS)).to(tl.int64)[:, None]
    i = tl.arange(0, C)[None, :]
    t = n * C + i
    g = tl.load(g_ptr + bh // H * stride_gb + bh % H * stride_gh + t * stride_gt, mask=t < T, other=0.0)
    g = g.to(tl.float32)
    g = tl.where(g < -1000.0, -1000.0, g)  # a factor of 0 as well; sums with -inf would have no differences
    c = tl.cumsum(g.to(tl.float64), 1)
    hi = c.to(tl.float32)
    at = c_ptr + (bh * N + n) * 2 * C + i
    tl.store(at, hi, mask=n < N)
    tl.store(at + C, (c - hi.to(tl.float64)).to(tl.float32), mask=n < N)


def chunk_decay(g: Tensor, C: int) -> Tensor:
    """Sums of log-decays g [B, H, T] from the start of each chunk: c [B, H, N, 2, C], hi and lo. A blank gate is 0."""
    B, H, T = g.shape
    N = triton.cdiv(T, C)
    c = g.new_empty(B, H, N, 2, C, dtype=torch.float32)
    if c.numel():
        chunks = max(1, 1024 // C)
        with torch.cuda.device_of(g):
            _chunk_decay[B * H * triton.cdiv(N, chunks),](g, c, *g.stride(), T, N, H, C=C, CHUNKS=chunks, num_warps=4)
    return c


def decay_build(arch: int) -> AotSpec:
    tile = Tile(0, 0, 4, 1)
    return build(_chunk_decay, arch, tile, 0, "fp32", "gates", products=False, CHUNKS=16)


class Tile(NamedTuple):
    """Columns of keys and of values that one program takes at a time; the names are those of the launch options."""

    BLOCK_K: int
    BLOCK_V: int
    num_warps: int
    num_stages: int


# (architecture, head width, bytes of an element) -> tile
ChunkTable = Mapping[tuple[int, int, int], Tile]
WIDTHS = (64, 128, 256)
_INTERPRETED = Tile(64, 64, 4, 1)  # few programs, yet several tiles at the widths of tests


def pick(table: ChunkTable, q: Tensor, v: Tensor) -> Tile:
    """The tile for this device, element size and head width, the next of 64, 128, 256; no wider than the heads."""
    K, V = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    width = min(max(WIDTHS[0], K, V), WIDTHS[-1])
    tile = _INTERPRETED if INTERPRET else table[architecture(q.device), width, q.element_size()]
    return tile._replace(BLOCK_K=min(tile.BLOCK_K, K), BLOCK_V=min(tile.BLOCK_V, V))


def chunk_rows(T: int, chunk_size: int) -> int:
    """Rows of a chunk: no more than hold T tokens, no fewer than a matrix instruction takes."""
    return max(16, min(chunk_size, triton.next_power_of_2(max(1, T))))


def build(
    kernel: Any, arch: int, tile: Tile, width: int, dtype: str, variant: str, *, float32: Container[str] = (),
    absent: Iterable[str] = (), products: bool = True, **constants: Any,
) -> AotSpec:  # fmt: skip
    """A build of a kernel for heads of one width, chunks of 64 and pointers to dtype, but float32 for some and c.

    absent names arguments that are None. A kernel of products is expected to use the matrix instructions of Hopper.
    """
    sizes = {"K": width, "V": width, "C": 64, "BLOCK_K": tile.BLOCK_K, "BLOCK_V": tile.BLOCK_V}
    known = sizes | constants | dict.fromkeys(absent)
    given = [name for name in kernel.arg_names if name not in known]
    signature = {name: "fp32" if name in ("scale", "eps") else "i32" for name in given}
    signature |= {x: "*fp32" if x in float32 or x == "c_ptr" else f"*{dtype}" for x in given if x.endswith("_ptr")}
    chosen = {name: known[name] for name in kernel.arg_names if name in known}
    needs = ("wgmma",) if products and arch == 90 and dtype == "bf16" else ()
    name = f"{kernel.__name__.lstrip('_')}-{width}-{dtype}-{variant}"
    return AotSpec(name, kernel, signature, chosen, tile.num_warps, tile.num_stages, arch, needs)
