"""Grouped LoRA on the GPU: rows in the order of their adapters, and three products over tiles of one adapter each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, architecture, cast, dot, multiprocessors, unit_stride
from effkit.peft.grouped import keep, one_by_one

# Rows belong to groups: 0 to E - 1 have that adapter, E none, E + 1 one that does not exist. `plan` is int32: the rows
# in the order of their groups [B], then how many there are up to the end of each group [E + 2]. A position counts
# tokens in that order; a tile is up to BLOCK_N positions of one group.


@triton.jit
def _group_of(rows_ptr, i, B, E):
    """The groups of rows i; those past the end come after all others."""
    e = tl.load(rows_ptr + i, mask=i < B, other=0)
    group = tl.where((e >= 0) & (e < E), e, tl.where(e == -1, E, E + 1)).to(tl.int32)
    return tl.where(i < B, group, E + 2)


# One program finds the places of BLOCK rows, and the ends of BLOCK groups, by comparing them with every row. That is
# quadratic and still the fastest way: rows are few, and sorting would be several launches.
@triton.jit(do_not_specialize=["B", "E"])
def _grouped_lora_plan(rows_ptr, plan_ptr, B, E, BLOCK: tl.constexpr):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = _group_of(rows_ptr, own, B, E)
    place = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32)
    for start in range(0, B, BLOCK):
        other = start + tl.arange(0, BLOCK)
        others = _group_of(rows_ptr, other, B, E)
        before = (others[None, :] < group[:, None]) | (
            (others[None, :] == group[:, None]) & (other[None, :] < own[:, None])
        )
        place += tl.sum(before.to(tl.int32), 1)
        end += tl.sum((others[None, :] <= own[:, None]).to(tl.int32), 1)
    tl.store(plan_ptr + place, own, mask=own < B)
    tl.store(plan_ptr + B + own, end, mask=own < E + 2)


@triton.jit
def _find_tile(plan_ptr, tile, B, T, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """The group of a tile, its first position, and where the group ends. A tile past the last one is empty."""
    groups = tl.arange(0, BLOCK_E)
    end = tl.load(plan_ptr + B + groups, mask=groups < E + 2, other=0) * T
    begin = tl.load(plan_ptr + B + groups - 1, mask=(groups > 0) & (groups < E + 2), other=0) * T
    tiles = (end - begin + BLOCK_N - 1) // BLOCK_N
    tiles_end = tl.cumsum(tiles, 0)
    group = tl.sum((tiles_end <= tile).to(tl.int32), 0)
    own = groups == group
    first = tl.sum(tl.where(own, begin + (tile - tiles_end + tiles) * BLOCK_N, 0), 0)
    return group, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def _tokens(plan_ptr, position, end, T):
    """(row, token) of positions."""
    row = tl.load(plan_ptr + position // T, mask=position < end, other=0).to(tl.int64)
    return row, position % T


@triton.jit
def _factor(ptr, c, r, C, R, stride_c, stride_r, dtype: tl.constexpr):
    """[c, r] of a factor, rounded to dtype; zero outside of it."""
    inside = (c < C)[:, None] & (r < R)[None, :]
    f = tl.load(ptr + c.to(tl.int64)[:, None] * stride_c + r[None, :] * stride_r, mask=inside, other=0.0)
    return f if f.dtype == dtype else cast(f.to(tl.float32), dtype)


@triton.jit
def _hidden(ptr, row, t, ok, r, B, T, R, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """[positions, r] of S [SPLITS, B, T, R], the sum of its shares rounded to dtype."""
    at = (row * T + t)[:, None] * R + r[None, :]
    inside = ok[:, None] & (r < R)[None, :]
    s = tl.load(ptr + at, mask=inside, other=0.0)
    if SPLITS > 1:
        for _ in range(SPLITS - 1):
            ptr += B.to(tl.int64) * T * R
            s += tl.load(ptr + at, mask=inside, other=0.0)
    return s if s.dtype == dtype else cast(s, dtype)


# One program owns BLOCK_N positions of one adapter and a share of the channels: it writes that share of
# scale * x f, f being [C, R] of the adapter, [BLOCK_N, R]. All of R is one tile, so that x is read once. With one share
# S is finished here, with several, which few tokens need to fill the device, their sums are left to the reader.
@triton.jit(do_not_specialize=["B", "T", "E", "n_splits"])
def _grouped_lora_shrink(
    x_ptr, f_ptr, scale_ptr, plan_ptr, s_ptr,
    stride_xb, stride_xt, stride_fe, stride_fc, stride_fr, B, T, C, R, E, n_splits,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    group, first, end = _find_tile(plan_ptr, tl.program_id(0), B, T, E, BLOCK_N, BLOCK_E)
    position = first + tl.arange(0, BLOCK_N)
    row, t = _tokens(plan_ptr, position, end, T)
    r = tl.arange(0, BLOCK_R)
    share = tl.cdiv(tl.cdiv(C, BLOCK_C), n_splits) * BLOCK_C
    begin = tl.program_id(1) * share
    stop = tl.where(group < E, tl.minimum(begin + share, C), begin)
    x_ptr += (row * stride_xb + t.to(tl.int64) * stride_xt)[:, None]
    f_ptr += group.to(tl.int64) * stride_fe
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(begin, stop, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + c[None, :], mask=(position < end)[:, None] & (c < C)[None, :], other=0.0)
        acc = dot(x, _factor(f_ptr, c, r, C, R, stride_fc, stride_fr, x.dtype), acc)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + group, mask=group < E, other=0.0).to(tl.float32)
    s_ptr += tl.program_id(1).to(tl.int64) * B * T * R + (row * T + t)[:, None] * R
    ok = (position < end)[:, None] & (r < R)[None, :]
    tl.store(s_ptr + r[None, :], cast(acc, s_ptr.dtype.element_ty), mask=ok)


# One program owns BLOCK_N positions of one group and a stripe of the channels: it reads their S and base once and
# writes base + scale * S f^T, BLOCK_C channels at a time. S stays in registers: the wider the stripe, the fewer
# programs read it and look for their tile. Rows without an adapter are those of base bit for bit, or 0 without a base.
@triton.jit(do_not_specialize=["B", "T", "E", "n_stripes"])
def _grouped_lora_expand(
    base_ptr, s_ptr, f_ptr, scale_ptr, plan_ptr, y_ptr,
    stride_bb, stride_bt, stride_fe, stride_fc, stride_fr, B, T, C, R, E, n_stripes,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    group, first, end = _find_tile(plan_ptr, tl.program_id(0), B, T, E, BLOCK_N, BLOCK_E)
    position = first + tl.arange(0, BLOCK_N)
    row, t = _tokens(plan_ptr, position, end, T)
    r = tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    s = _hidden(s_ptr, row, t, position < end, r, B, T, R, SPLITS, dtype)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + group, mask=group < E, other=0.0).to(tl.float32)
    f_ptr += group.to(tl.int64) * stride_fe
    y_ptr += (row * T + t)[:, None] * C
    if base_ptr is not None:
        base_ptr += (row * stride_bb + t.to(tl.int64) * stride_bt)[:, None]
    stripe = tl.cdiv(tl.cdiv(C, BLOCK_C), n_stripes) * BLOCK_C
    begin = tl.program_id(1) * stripe
    for start in range(begin, tl.minimum(begin + stripe, C), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        channels = tl.where(group < E, C, 0)  # of the factor: none where there is no adapter
        y = scale * dot(s, _factor(f_ptr, c, r, channels, R, stride_fc, stride_fr, dtype).T)
        ok = (position < end)[:, None] & (c < C)[None, :]
        if base_ptr is not None:
            base = tl.load(base_ptr + c[None, :], mask=ok, other=0.0).to(tl.float32)
            y = tl.where(group < E, base + y, tl.where(group == E, base, float("nan")))
        tl.store(y_ptr + c[None, :], cast(y, dtype), mask=ok)


# One program owns BLOCK_C channels of one adapter's factor and a share of its positions: it adds up
# scale * x^T S over them, [BLOCK_C, R], in the order of the positions.
@triton.jit(do_not_specialize=["B", "T", "E", "n_splits"])
def _grouped_lora_outer(
    x_ptr, s_ptr, scale_ptr, plan_ptr, df_ptr,
    stride_xb, stride_xt, stride_de, stride_dc, stride_dr, B, T, C, R, E, n_splits,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(C, BLOCK_C)
    e = tl.program_id(0) // n_tiles
    c = tl.program_id(0) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    begin = tl.load(plan_ptr + B + e - 1, mask=e > 0, other=0) * T
    end = tl.load(plan_ptr + B + e) * T
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), n_splits) * BLOCK_N
    begin += tl.program_id(1) * share
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(begin, tl.minimum(begin + share, end), BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        row, t = _tokens(plan_ptr, position, end, T)
        x_at = (row * stride_xb + t.to(tl.int64) * stride_xt)[:, None] + c[None, :]
        x = tl.load(x_ptr + x_at, mask=(position < end)[:, None] & (c < C)[None, :], other=0.0)
        acc = dot(x.T, _hidden(s_ptr, row, t, position < end, r, B, T, R, SPLITS, x.dtype), acc)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + e).to(tl.float32)
    df_ptr += tl.program_id(1).to(tl.int64) * E * C * R + e.to(tl.int64) * stride_de
    at = c.to(tl.int64)[:, None] * stride_dc + r[None, :] * stride_dr
    tl.store(df_ptr + at, cast(acc, df_ptr.dtype.element_ty), mask=(c < C)[:, None] & (r < R)[None, :])


_FEW = 16  # tokens of a row
_LOW, _HIGH = 64, 128


class Tile(NamedTuple):
    """Positions and channels of one program's step."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


# (architecture, rank up to, bytes of an element) -> tile, for few tokens a row, where an adapter seldom has more than
# 16, and for many, of which 64 are what a wgmma takes. High ranks need the registers of more warps, float32, which has
# no tensor cores, smaller tiles. None was timed on a device.
FEW = {
    (arch, rank, size): Tile(*steps, 4, stages)
    for arch in (80, 90, 100)
    for rank in (_LOW, _HIGH)
    for size, steps, stages in ((2, (16, 128), 3), (4, (16, 64), 2))
}
MANY = {
    (arch, rank, size): Tile(*steps, 4 if rank == _LOW else 8, stages)
    for arch in (80, 90, 100)
    for rank in (_LOW, _HIGH)
    for size, steps, stages in ((2, (64, 64), 3), (4, (32, 32), 2))
}
_INTERPRETED = Tile(32, 128, 4, 1)  # several tiles at the sizes of tests
# Programs that expand, for each multiprocessor, before their stripes are made wider; few in the interpreter, so that
# the stripes of tests are.
_PROGRAMS = 2 if INTERPRET else 8
_PLANNED = 64  # rows of one program of the plan


def _tile(x: Tensor, R: int) -> Tile:
    if INTERPRET:
        return _INTERPRETED
    tiles = FEW if x.shape[1] < _FEW else MANY
    return tiles[architecture(x.device), _LOW if R <= _LOW else _HIGH, x.element_size()]


def _tiles(x: Tensor, E: int, BLOCK_N: int) -> int:
    """As many tiles as there can be: those of each group but the last are full. What is too many finds no group."""
    B, T = x.shape[:2]
    return B * T // BLOCK_N + (min(B, E + 2) if T % BLOCK_N else 0)


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """Shares of a sum: as many as fill the device, a power of two with at least two steps for each."""
    splits = 1
    while programs * splits < multiprocessors(device) and steps >= 4 * splits:
        splits *= 2
    return splits


def _block_r(R: int) -> int:
    return max(16, triton.next_power_of_2(R))


def _block_e(E: int) -> int:
    return triton.next_power_of_2(E + 2)


def _plan(rows: Tensor, E: int) -> Tensor:
    B = rows.shape[0]
    plan = _empty_plan(rows, E)
    with torch.cuda.device_of(rows):
        grid = (triton.cdiv(max(B, E + 2), _PLANNED),)
        _grouped_lora_plan[grid](rows.contiguous(), plan, B, E, BLOCK=_PLANNED, num_warps=4)
    return plan


def _empty_plan(rows: Tensor, E: int) -> Tensor:
    return rows.new_empty(rows.shape[0] + E + 2, dtype=torch.int32)


def _shrink(x: Tensor, factor: Tensor, scale: Tensor | None, plan: Tensor) -> Tensor:
    """scale * x f of each row's adapter: x [B, T, C], factor [E, C, R] -> S [shares, B, T, R]."""
    s = _empty_s(x, factor, scale, plan)
    if s.numel():
        (B, T, C), (E, _, R) = x.shape, factor.shape
        x, tile = unit_stride(x), _tile(x, R)
        with torch.cuda.device_of(x):
            _grouped_lora_shrink[_tiles(x, E, tile.BLOCK_N), len(s)](
                x, factor, scale, plan, s, *x.stride()[:2], *factor.stride(), B, T, C, R, E, len(s),
                BLOCK_R=_block_r(R), BLOCK_E=_block_e(E), **tile._asdict(),
            )  # fmt: skip
    return s


def _empty_s(x: Tensor, factor: Tensor, scale: Tensor | None, plan: Tensor) -> Tensor:
    (B, T, C), (E, _, R) = x.shape, factor.shape
    tile = _tile(x, R)
    shares = _splits(_tiles(x, E, tile.BLOCK_N), triton.cdiv(C, tile.BLOCK_C), x.device)
    return x.new_empty(shares, B, T, R, dtype=x.dtype if shares == 1 else torch.float32)


def _expand(
    base: Tensor | None, s: Tensor, factor: Tensor, scale: Tensor | None, plan: Tensor, dtype: torch.dtype
) -> Tensor:
    """base + scale * S f^T of each row's adapter: S [shares, B, T, R], factor [E, C, R] -> y [B, T, C]."""
    y = _empty_y(base, s, factor, scale, plan, dtype)
    if not s.numel():
        return y.zero_() if base is None else y.copy_(base)
    if y.numel():
        base = None if base is None else unit_stride(base)
        (B, T, C), (E, _, R), tile = y.shape, factor.shape, _tile(y, s.shape[-1])
        tiles = _tiles(y, E, tile.BLOCK_N)
        stripes = min(triton.cdiv(C, tile.BLOCK_C), triton.cdiv(_PROGRAMS * multiprocessors(y.device), tiles))
        with torch.cuda.device_of(y):
            _grouped_lora_expand[tiles, stripes](
                base, s, factor, scale, plan, y,
                *((0, 0) if base is None else base.stride()[:2]), *factor.stride(), B, T, C, R, E, stripes,
                SPLITS=len(s), BLOCK_R=_block_r(R), BLOCK_E=_block_e(E), **tile._asdict(),
            )  # fmt: skip
    return y


def _empty_y(
    base: Tensor | None, s: Tensor, factor: Tensor, scale: Tensor | None, plan: Tensor, dtype: torch.dtype
) -> Tensor:
    return s.new_empty(s.shape[1], s.shape[2], factor.shape[1], dtype=dtype)


def _outer(x: Tensor, s: Tensor, scale: Tensor | None, plan: Tensor, factor: Tensor) -> Tensor:
    """The sum of scale * x^T S over an adapter's rows, laid out and rounded as the factor [E, C, R]."""
    gradient = _empty_gradient(x, s, scale, plan, factor)
    if gradient.numel():
        (B, T, C), (E, _, R) = x.shape, factor.shape
        x, tile = unit_stride(x), _tile(x, R)
        programs = E * triton.cdiv(C, tile.BLOCK_C)
        splits = _splits(programs, triton.cdiv(B * T, tile.BLOCK_N), x.device)
        sums = gradient if splits == 1 else x.new_empty(splits, E, C, R, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _grouped_lora_outer[programs, splits](
                x, s, scale, plan, sums, *x.stride()[:2], *sums.stride()[-3:], B, T, C, R, E, splits,
                SPLITS=len(s), BLOCK_R=_block_r(R), **tile._asdict(),
            )  # fmt: skip
        if splits > 1:
            gradient.copy_(sums.sum(0))
    return gradient


def _empty_gradient(x: Tensor, s: Tensor, scale: Tensor | None, plan: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(factor)


_library = torch.library.Library("effkit", "FRAGMENT")
_library.define("grouped_lora_plan(Tensor rows, SymInt E) -> Tensor")
_library.define("grouped_lora_shrink(Tensor x, Tensor factor, Tensor? scale, Tensor plan) -> Tensor")
_library.define(
    "grouped_lora_expand(Tensor? base, Tensor s, Tensor factor, Tensor? scale, Tensor plan, ScalarType dtype) -> Tensor"
)
_library.define("grouped_lora_outer(Tensor x, Tensor s, Tensor? scale, Tensor plan, Tensor factor) -> Tensor")
for _name, _run, _fake in (
    ("grouped_lora_plan", _plan, _empty_plan),
    ("grouped_lora_shrink", _shrink, _empty_s),
    ("grouped_lora_expand", _expand, _empty_y),
    ("grouped_lora_outer", _outer, _empty_gradient),
):
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(_name, _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


class _GroupedLoRA(torch.autograd.Function):
    """Returns y and S."""

    @staticmethod
    def forward(base: Tensor, x: Tensor, plan: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.ops.effkit.grouped_lora_shrink(x, a.mT, None, plan)
        return torch.ops.effkit.grouped_lora_expand(base, s, b, scale, plan, x.dtype), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        keep(ctx, *inputs[1:], s=output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, plan, a, b, scale, s = ctx.saved_tensors
        _, wants_x, _, wants_a, wants_b, _ = ctx.needs_input_grad
        dx = da = db = None
        if wants_x or wants_a:
            ds = torch.ops.effkit.grouped_lora_shrink(dy, b, scale, plan)
        if wants_x:
            dx = torch.ops.effkit.grouped_lora_expand(None, ds, a.mT, None, plan, dy.dtype)
        if wants_a:
            da = torch.ops.effkit.grouped_lora_outer(x, ds, None, plan, a.mT).mT
        if wants_b:
            db = torch.ops.effkit.grouped_lora_outer(dy, s, scale, plan, b)
        return dy, dx, None, da, db, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return one_by_one(_GroupedLoRA.apply, info.batch_size, in_dims, inputs)


def grouped_lora(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The kernels behind effkit.peft.grouped_lora, which documents and has checked the arguments."""
    plan = torch.ops.effkit.grouped_lora_plan(rows, a.shape[0])
    return _GroupedLoRA.apply(base, x, plan, a, b, scale.contiguous())[0]


class _Build(NamedTuple):
    """What is compiled ahead of time: x, factors, few tokens or many, the rank, and into how many shares S is split."""

    x: str
    factor: str
    few: bool
    R: int
    splits: int = 1


_BUILDS = (
    _Build("bf16", "fp32", False, 16),
    _Build("bf16", "bf16", False, 64),
    _Build("fp16", "fp32", False, 128),
    _Build("bf16", "bf16", True, 16, splits=8),
    _Build("bf16", "fp32", True, 128),
    _Build("fp32", "fp32", False, 16),
    _Build("fp32", "fp32", False, 128),
    _Build("fp32", "fp32", True, 64, splits=4),
)


def aot_specs() -> list[AotSpec]:
    """The plan, and the three products for few and many tokens, low and high ranks, plain factors and master copies."""
    products = (_grouped_lora_shrink, _grouped_lora_expand, _grouped_lora_outer)
    plan = [
        AotSpec(
            name="grouped_lora_plan",
            kernel=_grouped_lora_plan,
            signature={"rows_ptr": "*i64", "plan_ptr": "*i32", "B": "i32", "E": "i32"},
            constants={"BLOCK": _PLANNED},
            num_warps=4,
            num_stages=1,
            arch=arch,
        )
        for arch in (80, 90, 100)
    ]
    return plan + [_spec(arch, build, kernel) for arch in (80, 90, 100) for build in _BUILDS for kernel in products]


def _spec(arch: int, build: _Build, kernel: Any) -> AotSpec:
    tile = (FEW if build.few else MANY)[arch, _LOW if build.R <= _LOW else _HIGH, 4 if build.x == "fp32" else 2]
    shrinks = kernel is _grouped_lora_shrink
    shares = "fp32" if build.splits > 1 else build.x
    types = dict.fromkeys(kernel.arg_names, "i32") | {
        "x_ptr": f"*{build.x}", "base_ptr": f"*{build.x}", "y_ptr": f"*{build.x}", "s_ptr": f"*{shares}",
        "f_ptr": f"*{build.factor}", "df_ptr": f"*{build.factor}", "scale_ptr": "*fp32", "plan_ptr": "*i32",
    }  # fmt: skip
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    # Forward: a is read along its channels, b along its rank; the gradient is that of b.
    constants = {"stride_fc": 1} if shrinks else {"stride_fr": 1, "stride_dr": 1, "SPLITS": build.splits}
    constants |= {"BLOCK_R": _block_r(build.R), "BLOCK_E": 16}
    constants |= {name: value for name, value in tile._asdict().items() if name.startswith("BLOCK")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    factor = " master copies" if build.factor != build.x else ""
    tokens = "few" if build.few else "many"
    return AotSpec(
        name=f"{kernel.__name__[1:]} {build.x} {tokens} R={build.R}{factor}",
        kernel=kernel,
        signature=types,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        arch=arch,
        needs=("wgmma",) if arch == 90 and not build.few and build.x != "fp32" else (),
    )
