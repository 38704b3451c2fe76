"""LoRA on the GPU: one pass over x down to the rank, one over dy for both gradients of the way up, masks on the fly.

The products of full size are cuBLAS'; here are those with a thin side, which are bound by memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, dot, multiprocessors, unit_stride
from effkit.kernels._dropout import dropped, row_keys
from effkit.peft._dropout import drop_below, keep_probability
from effkit.peft.low_rank import (
    added,
    batched_pair,
    gradients,
    keep_for_backward,
    outside_autocast,
    rows_of,
    up_gradients,
)
from effkit.peft.singlora import views


@triton.jit
def _keys(seed_ptr, rows):
    """The keys of rows, None where nothing is dropped."""
    if seed_ptr is None:
        keys = None
    else:
        keys = row_keys(seed_ptr, rows)
    return keys


@triton.jit
def _load(ptr, rows, columns, n_rows, n_columns, stride_row, stride_column):
    """A tile [rows, columns] of a matrix, zero outside of it."""
    ok = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride_row + columns[None, :] * stride_column, mask=ok, other=0.0)


@triton.jit
def _store(ptr, values, rows, columns, n_rows, n_columns):
    """A tile of a contiguous matrix, in its dtype."""
    ok = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    tl.store(ptr + at, cast(values, ptr.dtype.element_ty), mask=ok)


# One program owns BLOCK_T rows and a share of the columns: it reads that part of x once, drops on the way, and writes
# scale * x_d a^T of its share, [BLOCK_T, R].
@triton.jit(do_not_specialize=["T", "n_shares", "drop_below"])
def _lora_down(
    x_ptr, a_ptr, scale_ptr, seed_ptr, out_ptr, stride_xt, stride_ar, stride_ak, T, K, R, n_shares, drop_below, kept,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    rows = (tl.program_id(0) // n_shares).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    keys = _keys(seed_ptr, rows)
    width = tl.cdiv(tl.cdiv(K, BLOCK_C), n_shares) * BLOCK_C
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for k in range(share * width, tl.minimum(share * width + width, K), BLOCK_C):
        columns = k + tl.arange(0, BLOCK_C)
        x = _load(x_ptr, rows, columns, T, K, stride_xt, 1)  # [BLOCK_T, BLOCK_C]
        a = _load(a_ptr, ranks, columns, R, K, stride_ar, stride_ak)  # [BLOCK_R, BLOCK_C]
        a = cast(a.to(tl.float32), x.dtype)
        acc = dot(dropped(x, keys, k, drop_below), tl.trans(a), acc)
    acc *= tl.load(scale_ptr).to(tl.float32) / kept
    _store(out_ptr + share.to(tl.int64) * T * R, acc, rows, ranks, T, R)


# One program owns BLOCK_T rows and a share of the columns of dy, which it reads once for both: the gradient of down,
# summed over columns in registers, [BLOCK_T, R], and that of b, one sum over its rows for each step, [BLOCK_C, R].
@triton.jit(do_not_specialize=["T", "n_shares"])
def _lora_up_bwd(
    dy_ptr, down_ptr, b_ptr, scale_ptr, d_down_ptr, db_ptr, stride_dyt, stride_bm, stride_br, T, M, R, n_shares, kept,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % n_shares
    stripe = (tl.program_id(0) // n_shares).to(tl.int64)
    rows = stripe * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    down = _load(down_ptr, rows, ranks, T, R, R, 1)  # [BLOCK_T, BLOCK_R]
    width = tl.cdiv(tl.cdiv(M, BLOCK_C), n_shares) * BLOCK_C
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for m in range(share * width, tl.minimum(share * width + width, M), BLOCK_C):
        columns = m + tl.arange(0, BLOCK_C)
        dy = _load(dy_ptr, rows, columns, T, M, stride_dyt, 1)  # [BLOCK_T, BLOCK_C]
        b = _load(b_ptr, columns, ranks, M, R, stride_bm, stride_br)  # [BLOCK_C, BLOCK_R]
        acc = dot(dy, cast(b.to(tl.float32), dy.dtype), acc)
        _store(db_ptr + stripe * M * R, dot(tl.trans(dy), down), columns, ranks, M, R)
    acc *= tl.load(scale_ptr).to(tl.float32) / kept
    _store(d_down_ptr + share.to(tl.int64) * T * R, acc, rows, ranks, T, R)


# One program owns BLOCK_C columns and a stripe of rows of x, which it reads once: it drops again what was dropped, and
# writes its sum over rows of d_down^T x_d, [R, BLOCK_C]. The product is the transposed one: columns of x on the left
# fill the rows of a tensor core, which so few ranks would not.
@triton.jit(do_not_specialize=["T", "n_stripes", "drop_below"])
def _lora_down_bwd(
    x_ptr, d_down_ptr, seed_ptr, da_ptr, stride_xt, T, K, R, n_stripes, drop_below,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    stripe = tl.program_id(0) % n_stripes
    start = tl.program_id(0) // n_stripes * BLOCK_C
    columns = start + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    height = tl.cdiv(tl.cdiv(T, BLOCK_T), n_stripes) * BLOCK_T
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for t in range(stripe * height, tl.minimum(stripe * height + height, T), BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        x = _load(x_ptr, rows, columns, T, K, stride_xt, 1)  # [BLOCK_T, BLOCK_C]
        x = dropped(x, _keys(seed_ptr, rows), start, drop_below)
        acc = dot(tl.trans(x), _load(d_down_ptr, rows, ranks, T, R, R, 1), acc)
    _store(da_ptr + stripe.to(tl.int64) * K * R, tl.trans(acc), ranks, columns, R, K)


# One program owns a tile of dx: keep * (d_down a). The product of full size is added to it afterwards.
@triton.jit(do_not_specialize=["T", "drop_below"])
def _lora_masked(
    d_down_ptr, a_ptr, seed_ptr, dx_ptr, stride_ar, stride_ak, T, K, R, drop_below,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(K, BLOCK_C)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(0) % n_tiles * BLOCK_C
    columns = start + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    d_down = _load(d_down_ptr, rows, ranks, T, R, R, 1)  # [BLOCK_T, BLOCK_R]
    a = _load(a_ptr, ranks, columns, R, K, stride_ar, stride_ak)  # [BLOCK_R, BLOCK_C]
    dx = dot(d_down, cast(a.to(tl.float32), d_down.dtype))
    _store(dx_ptr, dropped(dx, _keys(seed_ptr, rows), start, drop_below), rows, columns, T, K)


# One program owns BLOCK elements of a sum: it adds what others found, in order.
@triton.jit(do_not_specialize=["n_parts"])
def _lora_sum(part_ptr, out_ptr, size, n_parts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part_ptr += at
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_parts):
        total += tl.load(part_ptr, mask=at < size, other=0.0)
        part_ptr += size
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=at < size)


class Tile(NamedTuple):
    """Rows and columns of the large matrix in one step."""

    BLOCK_T: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


def _table(entries: dict[tuple[int, int], Tile]) -> dict[tuple[int, int, int], Tile]:
    """(architecture, rank up to, bytes of an element) -> tile: the same for each architecture until it is timed."""
    return {(arch, *key): tile for arch in (80, 90, 100) for key, tile in entries.items()}


# What bounds them is memory: a tile is what a few loads of 16 bytes a thread bring, in two or three steps in flight.
# float32 has no tensor cores: smaller tiles, or registers run out. Not timed on a device.
DOWN = _table({
    (16, 2): Tile(64, 64, 4, 4), (32, 2): Tile(64, 64, 4, 4), (64, 2): Tile(64, 64, 4, 4), (128, 2): Tile(64, 64, 4, 3),
    (16, 4): Tile(32, 64, 4, 3), (32, 4): Tile(32, 32, 4, 3), (64, 4): Tile(32, 32, 4, 2), (128, 4): Tile(32, 16, 4, 2),
})  # fmt: skip
UP_BWD = _table({
    (16, 2): Tile(256, 64, 8, 3), (32, 2): Tile(256, 64, 8, 3),
    (16, 4): Tile(64, 32, 4, 2), (32, 4): Tile(64, 32, 4, 2),
})  # fmt: skip
DOWN_BWD = _table({
    (16, 2): Tile(64, 128, 4, 3), (32, 2): Tile(64, 128, 4, 3),
    (64, 2): Tile(64, 64, 4, 3), (128, 2): Tile(64, 64, 4, 3),
    (16, 4): Tile(32, 64, 4, 3), (32, 4): Tile(32, 32, 4, 3), (64, 4): Tile(32, 32, 4, 2), (128, 4): Tile(16, 32, 4, 2),
})  # fmt: skip
MASKED = _table({
    (16, 2): Tile(64, 64, 4, 1), (32, 2): Tile(64, 64, 4, 1), (64, 2): Tile(64, 64, 4, 1), (128, 2): Tile(64, 64, 4, 1),
    (16, 4): Tile(32, 64, 4, 1), (32, 4): Tile(32, 64, 4, 1), (64, 4): Tile(32, 32, 4, 1), (128, 4): Tile(16, 32, 4, 1),
})  # fmt: skip
_INTERPRETED = Tile(64, 32, 4, 1)  # several rows and columns of tiles at the sizes of tests
_SUMMED = 1024
# Above this rank the sums for b that each program of the fused pass writes are more than a second read of dy.
FUSED_RANK = 32


def _tile(table: dict[tuple[int, int, int], Tile], x: Tensor, rank: int) -> tuple[Tile, int]:
    """The tile and the padded rank."""
    padded = max(16, triton.next_power_of_2(rank))
    return (_INTERPRETED if INTERPRET else table[architecture(x.device), padded, x.element_size()]), padded


def _shares(x: Tensor, tiles: int, steps: int) -> int:
    """Into how many programs the sum of one tile is split: two for each multiprocessor, of at least two steps each."""
    return max(1, min(2 * multiprocessors(x.device) // max(1, tiles), steps // 2))


def _parts(x: Tensor, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where n programs write what is to be summed; a single one writes the result itself, in its dtype."""
    return x.new_empty(n, *shape, dtype=dtype if n == 1 else torch.float32)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    grid = (triton.cdiv(out.numel(), _SUMMED),)
    _lora_sum[grid](parts, out, out.numel(), len(parts), BLOCK=_SUMMED, num_warps=4)
    return out


def _down(x: Tensor, a: Tensor, scale: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    (T, K), R = x.shape, len(a)
    if not T * K * R:
        return x.new_zeros(T, R)
    x = unit_stride(x)
    tile, padded = _tile(DOWN, x, R)
    tiles = triton.cdiv(T, tile.BLOCK_T)
    parts = _parts(x, _shares(x, tiles, triton.cdiv(K, tile.BLOCK_C)), T, R, dtype=x.dtype)
    with torch.cuda.device_of(x):
        _lora_down[(tiles * len(parts),)](
            x, a, scale, seed, parts, x.stride(0), *a.stride(), T, K, R, len(parts), drop_below(dropout),
            keep_probability(dropout), BLOCK_R=padded, **tile._asdict(),
        )  # fmt: skip
        return _summed(parts, x.dtype)


def _up_bwd(dy: Tensor, down: Tensor, b: Tensor, scale: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    (T, M), R = dy.shape, down.shape[1]
    if not T * M * R:
        return dy.new_zeros(T, R), dy.new_zeros(M, R, dtype=torch.float32)
    dy = unit_stride(dy)
    tile, padded = _tile(UP_BWD, dy, R)
    tiles = triton.cdiv(T, tile.BLOCK_T)
    d_down = _parts(dy, _shares(dy, tiles, triton.cdiv(M, tile.BLOCK_C)), T, R, dtype=dy.dtype)
    db = _parts(dy, tiles, M, R)
    with torch.cuda.device_of(dy):
        _lora_up_bwd[(tiles * len(d_down),)](
            dy, down.contiguous(), b, scale, d_down, db, dy.stride(0), *b.stride(), T, M, R, len(d_down),
            keep_probability(dropout), BLOCK_R=padded, **tile._asdict(),
        )  # fmt: skip
        return _summed(d_down, dy.dtype), _summed(db, torch.float32)


def _down_bwd(x: Tensor, d_down: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    (T, K), R = x.shape, d_down.shape[1]
    if not T * K * R:
        return x.new_zeros(R, K, dtype=torch.float32)
    x = unit_stride(x)
    tile, padded = _tile(DOWN_BWD, x, R)
    tiles = triton.cdiv(K, tile.BLOCK_C)
    parts = _parts(x, _shares(x, tiles, triton.cdiv(T, tile.BLOCK_T)), R, K)
    with torch.cuda.device_of(x):
        _lora_down_bwd[(tiles * len(parts),)](
            x, d_down.contiguous(), seed, parts, x.stride(0), T, K, R, len(parts), drop_below(dropout), BLOCK_R=padded,
            **tile._asdict(),
        )  # fmt: skip
        return _summed(parts, torch.float32)


def _masked(d_down: Tensor, a: Tensor, seed: Tensor, dropout: float) -> Tensor:
    (T, R), K = d_down.shape, a.shape[1]
    if not T * K * R:
        return d_down.new_zeros(T, K)
    dx = d_down.new_empty(T, K)
    tile, padded = _tile(MASKED, dx, R)
    grid = (triton.cdiv(T, tile.BLOCK_T) * triton.cdiv(K, tile.BLOCK_C),)
    with torch.cuda.device_of(dx):
        _lora_masked[grid](
            d_down.contiguous(),
            a,
            seed,
            dx,
            *a.stride(),
            T,
            K,
            R,
            drop_below(dropout),
            BLOCK_R=padded,
            **tile._asdict(),
        )
    return dx


_library = torch.library.Library("effkit", "FRAGMENT")
for _schema, _run, _fake in (
    (
        "lora_down(Tensor x, Tensor a, Tensor scale, Tensor? seed, float dropout) -> Tensor",
        _down,
        lambda x, a, scale, seed, dropout: x.new_empty(x.shape[0], a.shape[0]),
    ),
    (
        "lora_up_backward(Tensor dy, Tensor down, Tensor b, Tensor scale, float dropout) -> (Tensor, Tensor)",
        _up_bwd,
        lambda dy, down, b, scale, dropout: (torch.empty_like(down), b.new_empty(b.shape, dtype=torch.float32)),
    ),
    (
        "lora_down_backward(Tensor x, Tensor d_down, Tensor? seed, float dropout) -> Tensor",
        _down_bwd,
        lambda x, d_down, seed, dropout: x.new_empty(d_down.shape[1], x.shape[1], dtype=torch.float32),
    ),
    (
        "lora_masked(Tensor d_down, Tensor a, Tensor seed, float dropout) -> Tensor",
        _masked,
        lambda d_down, a, seed, dropout: d_down.new_empty(d_down.shape[0], a.shape[1]),
    ),
):
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_schema.partition('(')[0]}", _fake, lib=_library)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        down = torch.ops.effkit.lora_down(rows_of(x), a, scale, seed, dropout)
        return added(x, down, b, weight, bias, base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep_for_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return gradients(_up_gradients, _down_gradients, ctx, dy)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        return batched_pair(_LoRALinear.apply, info.batch_size, in_dims, inputs)


def _up_gradients(
    dy: Tensor, down: Tensor | None, b: Tensor | None, scale: Tensor, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """Both in one pass, where both are asked for and the rank is small; else a product each."""
    if down is None or b is None or down.shape[1] > FUSED_RANK:
        return up_gradients(dy, down, b, scale, dropout)
    return torch.ops.effkit.lora_up_backward(dy, down, b, scale, dropout)


def _down_gradients(
    x: Tensor | None, d_down: Tensor, a: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """Each asked for is a pass of its own: they have no large matrix in common."""
    dx = da = None
    if a is not None:
        masked = torch.ops.effkit.lora_masked
        dx = d_down @ a.to(d_down.dtype) if seed is None else masked(d_down, a, seed, dropout)
    if x is not None:
        da = torch.ops.effkit.lora_down_backward(x, d_down, seed, dropout)
    return dx, da


def lora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The kernels behind effkit.peft.lora_linear, which documents and has checked the arguments."""
    y, _ = _LoRALinear.apply(x, a, b, scale, weight, bias, base, seed if dropout else None, dropout)
    return y


def singlora_linear(
    x: Tensor,
    factor: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The same with two views of one matrix: behind effkit.peft.singlora_linear."""
    return lora_linear(x, *views(x, factor, weight, base), scale, weight, bias, base, seed, dropout=dropout)


def aot_specs() -> list[AotSpec]:
    """Each kernel at the smallest and the largest rank of its table, in bfloat16 without a mask, too; and the sums."""
    thin = [
        _spec(kernel, table, arch, dtype, rank, masked)
        for kernel, table in (
            (_lora_down, DOWN),
            (_lora_up_bwd, UP_BWD),
            (_lora_down_bwd, DOWN_BWD),
            (_lora_masked, MASKED),
        )
        for arch in (80, 90, 100)
        for dtype in ("bf16", "fp32")
        for rank in (16, max(rank for _, rank, _ in table))
        for masked in ((True, False) if kernel in (_lora_down, _lora_down_bwd) and dtype == "bf16" else (True,))
    ]
    sums = [
        AotSpec(
            name=f"lora_sum {dtype}",
            kernel=_lora_sum,
            signature={"part_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i32", "n_parts": "i32"},
            constants={"BLOCK": _SUMMED},
            num_warps=4,
            num_stages=1,
            arch=arch,
        )
        for arch in (80, 90, 100)
        for dtype in ("bf16", "fp32")
    ]
    return thin + sums


def _spec(
    kernel: Any, table: dict[tuple[int, int, int], Tile], arch: int, dtype: str, rank: int, masked: bool
) -> AotSpec:
    tile = table[arch, rank, {"bf16": 2, "fp32": 4}[dtype]]
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= dict(seed_ptr="*i64", scale_ptr="*fp32", a_ptr="*fp32", b_ptr="*fp32", kept="fp32")  # master copies
    if kernel is _lora_up_bwd:
        types["d_down_ptr"] = "*fp32"  # one of several parts, as are:
    types |= dict(out_ptr="*fp32", da_ptr="*fp32", db_ptr="*fp32")
    constants: dict[str, Any] = {"BLOCK_T": tile.BLOCK_T, "BLOCK_C": tile.BLOCK_C, "BLOCK_R": rank}
    constants |= {name: 1 for name in ("stride_ak", "stride_br") if name in kernel.arg_names}
    if not masked:
        constants["seed_ptr"] = None
    return AotSpec(
        name=f"{kernel.__name__[1:]} {dtype} rank {rank}{'' if masked else ', no mask'}",
        kernel=kernel,
        signature=types,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
        needs=("wgmma",) if arch == 90 and dtype == "bf16" else (),
    )
