"""Softmax attention: the forward kernel, the two operators, and the differentiable function around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels import softmax_backward as backward
from effkit.kernels import softmax_decode as decode
from effkit.kernels._common import INTERPRET, LN2, LOG2E, AotSpec, Tile, TileTable, distinct, unit_stride
from effkit.kernels._softmax_tiles import (
    LENGTHS,
    Mask,
    attend,
    blocks,
    key_range,
    load_tile,
    locate,
    pick,
    segment,
    store_tile,
    unit_vector,
    widths,
)


# One program owns BLOCK_M rows of one query head: it reads them once, sweeps the keys that some row sees, and writes
# their outputs and lse. The lse stays in units of log2: the backward then subtracts it from the very scores that made
# it, and a row that looks at one key alone gets its probability 1 exactly. BLOCK_M sets how often a key tile is used,
# so it is as tall as the registers of the accumulator allow.
@triton.jit(do_not_specialize=LENGTHS)
def _softmax_attention_fwd(
    q_ptr, k_ptr, v_ptr, sinks_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot,
    key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, sequence_ptr, n_blocks, n_sequences,
    T, S, heads, group, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, n, head, block = locate(sequence_ptr, cu_seqlens_ptr, n_blocks, heads, BLOCK_M)
    row_lo, row_hi, key_lo, key_hi, shift = segment(
        key_starts_ptr, key_lengths_ptr, query_offset_ptr, cu_seqlens_ptr, n_sequences, n, T, S
    )
    start = row_lo + block * BLOCK_M
    if start >= row_hi:
        return
    q = load_tile(q_ptr + b * stride_qb + head * stride_qh, stride_qt, start, row_hi, BLOCK_M, D, BLOCK_D)
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sink = tl.where((cu_seqlens_ptr is not None) & (n == n_sequences), float("-inf"), sink)
    first = start + shift
    last = tl.minimum(start + BLOCK_M, row_hi) - 1 + shift
    lo, hi, all_lo, all_hi = key_range(first, last, key_lo, key_hi, window, CAUSAL)
    o, lse = attend(
        q, first + tl.arange(0, BLOCK_M), sink, k_ptr + b * stride_kb + head // group * stride_kh,
        v_ptr + b * stride_vb + head // group * stride_vh, stride_ks, stride_vs, lo, hi, all_lo, all_hi,
        scale, softcap, window, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL,
    )  # fmt: skip
    store_tile(o_ptr + b * stride_ob + head * stride_oh, stride_ot, start, row_hi, o, BLOCK_M, DV, BLOCK_DV)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (b * heads + head) * T + rows, lse, mask=rows < row_hi)


# Tiles per (architecture, head width, bytes of an element), the width the next of 64, 128, 256; never by length or
# batch, so one build serves every call. Chosen as the largest that compile without spills, not timed on a device. Those
# for 80 fit into the 99 KiB of its smaller relatives. float32 multiplies without matrix instructions, in small tiles;
# at width 256 it spills a few registers whatever the tile.
_FWD: TileTable = {
    (80, 64, 2): Tile(128, 64, 8, 2), (80, 128, 2): Tile(64, 64, 4, 2), (80, 256, 2): Tile(64, 32, 8, 2),
    (80, 64, 4): Tile(32, 32, 4, 1), (80, 128, 4): Tile(32, 32, 8, 1), (80, 256, 4): Tile(16, 16, 8, 1),
    (90, 64, 2): Tile(128, 128, 8, 2), (90, 128, 2): Tile(128, 128, 8, 2), (90, 256, 2): Tile(128, 32, 8, 2),
    (90, 64, 4): Tile(32, 32, 4, 1), (90, 128, 4): Tile(32, 32, 8, 1), (90, 256, 4): Tile(16, 16, 8, 1),
    (100, 64, 2): Tile(128, 128, 8, 2), (100, 128, 2): Tile(128, 64, 8, 3), (100, 256, 2): Tile(64, 64, 8, 2),
    (100, 64, 4): Tile(32, 32, 4, 1), (100, 128, 4): Tile(32, 32, 8, 1), (100, 256, 4): Tile(16, 16, 8, 1),
}  # fmt: skip
_INTERPRETED = Tile(64, 64, 4, 1)  # few programs, yet several tiles at the lengths of tests


def _empty_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, T, DV] laid out as [B, T, H, DV], so that joining the heads costs no copy later, and lse [B, H, T]."""
    B, H, T, _ = q.shape
    o = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
    return o, q.new_empty(B, H, T, dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, sinks, mask = unit_stride(q), unit_stride(k), unit_stride(v), unit_vector(sinks), Mask(*options)
    o, lse = _empty_output(q, v)
    B, H, T, _ = q.shape
    if lse.numel() == 0:
        return o, lse
    sizes = {"T": T, "S": k.shape[2], "heads": H, "group": H // k.shape[1]} | widths(q, v)
    with torch.cuda.device_of(q):
        if T < decode.SHORT and mask.cu_seqlens is None:
            decode.decode(q, k, v, sinks, o, lse, mask.arguments() | sizes)
            return o, lse
        tile = pick(_FWD, q, v, _INTERPRETED)
        grid = blocks(T, tile.BLOCK_M, B, mask.cu_seqlens)
        _softmax_attention_fwd[grid["n_blocks"] * H * B,](
            q, k, v, sinks, o, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
            **mask.arguments(), **sizes, **grid, **tile._asdict(),
        )  # fmt: skip
    return o, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q, v)


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)


def _fold_heads(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A mapped x joined with its heads, [B, H, ...] -> [B, size H, ...] or [H] -> [size H]; grouping survives that."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if x.ndim == 2 else x.movedim(0, 1).flatten(1, 2)


def _vmap(run: Callable[..., tuple[Tensor, ...]], n_heads: int) -> Callable[..., tuple[Any, Any]]:
    """The batching rule of an operator whose first n_heads arguments have heads."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(dim is not None for dim in in_dims[n_heads:]):
            raise ValueError("softmax_attention: no vmap over key_starts, key_lengths, query_offset or cu_seqlens")
        size = info.batch_size
        folded = [_fold_heads(x, dim, size) for x, dim in zip(args[:n_heads], in_dims, strict=False)]
        outputs = run(*folded, *args[n_heads:])
        return tuple(x.unflatten(1, (size, -1)) for x in outputs), (1,) * len(outputs)

    return rule


_MASK_SCHEMA = (
    "Tensor? key_starts, Tensor? key_lengths, Tensor? query_offset, Tensor? cu_seqlens, "
    "bool causal, int? window, float scale, float? softcap"
)
_library = torch.library.Library("effkit", "FRAGMENT")


def _define(name: str, tensors: str, outputs: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(f"{name}({tensors}, {_MASK_SCHEMA}) -> ({outputs})")
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(name, run, "CPU" if INTERPRET else "CUDA")
    op = getattr(torch.ops.effkit, name).default
    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_vmap(op, _vmap(op, tensors.count("Tensor")), lib=_library)
    return op


_forward_op = _define(
    "softmax_attention_forward",
    "Tensor q, Tensor k, Tensor v, Tensor? sinks",
    "Tensor o, Tensor lse",
    _forward,
    _fake_forward,
)
_backward_op = _define(
    "softmax_attention_backward",
    "Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse",
    "Tensor dq, Tensor dk, Tensor dv, Tensor delta",
    backward.backward,
    _fake_backward,
)


# torch.compile tells a forward with a context from one without by its number of parameters: no *args here.
class _SoftmaxAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
        key_starts: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward_op(
            q, k, v, sinks, key_starts, key_lengths, query_offset, cu_seqlens, causal, window, scale, softcap
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, *options = inputs
        tensors, ctx.scalars = options[:4], options[4:]
        ctx.save_for_backward(q, k, v, sinks, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, o, lse, *tensors = ctx.saved_tensors
        dq, dk, dv, delta = _SoftmaxAttentionBackward.apply(do, dlse, q, k, v, o, lse, *tensors, *ctx.scalars)
        return dq, dk, dv, _sinks_gradient(sinks, lse, delta), *[None] * 8


class _SoftmaxAttentionBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
        key_starts: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(
            do, dlse, q, k, v, o, lse, key_starts, key_lengths, query_offset, cu_seqlens, causal, window, scale, softcap
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of softmax_attention have no second derivative; backend="reference" has')


def _sinks_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """db_h = -sum_bi e^(b_h - lse) delta. Where lse is -inf, behind the last packed token, no sink was seen."""
    if sinks is None:
        return None
    probability = torch.exp2(sinks.float()[:, None] * LOG2E.value - lse)
    return -torch.where(lse > float("-inf"), probability * delta, 0.0).sum((0, 2)).to(sinks.dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The kernels behind effkit.attention.softmax_attention, which documents and has checked the arguments."""
    tensors = distinct(q, k, v, sinks, key_starts, key_lengths, query_offset, cu_seqlens)
    o, lse = _SoftmaxAttention.apply(*tensors, causal, window, scale, softcap)
    return (o, lse * LN2.value) if return_lse else o


_OPTIONAL = {
    "causal": (),
    "packed": ("cu_seqlens_ptr", "sequence_ptr"),
    "packed, both sides": ("cu_seqlens_ptr", "sequence_ptr", "query_offset_ptr", "window"),
    "everything": (
        "sinks_ptr",
        "key_starts_ptr",
        "key_lengths_ptr",
        "query_offset_ptr",
        "window",
        "softcap",
        "dlse_ptr",
    ),
}
_INT32_POINTERS = ("key_starts_ptr", "key_lengths_ptr", "query_offset_ptr", "cu_seqlens_ptr", "sequence_ptr")
_FLOAT32_POINTERS = ("lse_ptr", "delta_ptr", "dlse_ptr", "part_ptr", "part_lse_ptr")


def _argument_type(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return "*i32" if name in _INT32_POINTERS else "*fp32" if name in _FLOAT32_POINTERS else f"*{dtype}"
    return "fp32" if name in ("scale", "softcap") else "i32"


def _spec(kernel: Any, arch: int, tile: Tile, dtype: str, width: int, variant: str, **extra: Any) -> AotSpec:
    """One build: the kernel with the optional arguments of a variant and without the others."""
    absent = {name: None for names in _OPTIONAL.values() for name in names if name not in _OPTIONAL[variant]}
    sizes = {"D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "CAUSAL": True}
    known = absent | sizes | {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N} | extra
    constants = {name: known[name] for name in kernel.arg_names if name in known}
    signature = {name: _argument_type(name, dtype) for name in kernel.arg_names if name not in known}
    wanted = [key.removeprefix("WANT_").lower() for key, value in extra.items() if value is True]
    name = "-".join([kernel.__name__.lstrip("_"), str(width), dtype, variant, *wanted])
    # Rows of matrix instructions on Hopper come in 64; float32 keeps its bits and uses none.
    needs = ("wgmma",) if arch == 90 and dtype == "bf16" and kernel.__name__.endswith(("_fwd", "_dq", "_dkv")) else ()
    return AotSpec(name, kernel, signature, constants, tile.num_warps, tile.num_stages, arch, needs)


def passes(arch: int, width: int, dtype: str, variant: str) -> Iterator[AotSpec]:
    """Forward and backward of one build, with the tiles that the tables pick."""
    key = arch, width, 2 if dtype == "bf16" else 4
    build = (dtype, width, variant)
    yield _spec(_softmax_attention_fwd, arch, _FWD[key], *build)
    yield _spec(backward._softmax_attention_bwd_dq, arch, backward.DQ[key], *build)
    for want in backward.dkv_passes({"BLOCK_D": width, "BLOCK_DV": width}, key[2]):
        yield _spec(backward._softmax_attention_bwd_dkv, arch, backward.DKV[key], *build, **want)


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    half = [(64, "bf16", "everything"), (128, "bf16", "causal"), (256, "bf16", "packed")]
    # float32 has the same tiles and the same instructions everywhere: one architecture speaks for all.
    for arch, builds in (80, [*half, (64, "fp32", "everything")]), (90, half), (100, half):
        for width, dtype, variant in builds:
            yield from passes(arch, width, dtype, variant)
        few_rows = decode.DECODE[arch, 128, 2]._replace(BLOCK_M=16)
        streaming = Tile(backward.DELTA_ROWS, 0, 4, 3)
        build = ("bf16", 128, "everything")
        yield _spec(decode._softmax_attention_decode, arch, few_rows, *build)
        yield _spec(decode._softmax_attention_combine, arch, streaming, *build, BLOCK_SPLITS=decode.SPLITS_AT_ONCE)
        yield _spec(backward._softmax_attention_bwd_delta, arch, streaming, *build)
