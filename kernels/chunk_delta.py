"""The delta rules: decoding, the two operators, and the differentiable function around them. See `_delta_chunks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.attention._recurrent import RecurrentState, next_position
from effkit.attention.deltanet import l2_normalize
from effkit.kernels import _delta_chunks as chunks
from effkit.kernels import chunk_scan
from effkit.kernels import delta_backward as backward
from effkit.kernels._chunk_tiles import LENGTHS, ChunkTable, Tile, build, load_block, pick, store_block
from effkit.kernels._common import AotSpec, cast, distinct, unit_stride
from effkit.kernels._delta_chunks import EVERY, SINGLE, Chunks
from effkit.kernels._recurrent_ops import SHORT, define, empty_memory, empty_output, groups, strides
from effkit.kernels.chunk_scan import _locate as locate


# One program owns BLOCK_V columns of one head's memory: it reads them once, takes the tokens one by one, and writes
# them once. All keys of a column are in the program, so that an output needs no other; the tile fills its registers.
@triton.jit(do_not_specialize=LENGTHS)
def _delta_recurrence(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, first_ptr, o_ptr, last_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot,
    T, H, q_group, k_group, v_group, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h, _, _, v = locate(1, H, BLOCK_K, V, BLOCK_K, BLOCK_V)
    at = (b * H + h) * K * V + v
    rows = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    q_ptr += b * stride_qb + h // q_group * stride_qh + rows
    k_ptr += b * stride_kb + h // k_group * stride_kh + rows
    v_ptr += b * stride_vb + h // v_group * stride_vh + v + columns
    o_ptr += b * stride_ob + h * stride_oh + v + columns
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first_ptr is not None:
        memory = load_block(first_ptr + at, V, 1, K, V - v, BLOCK_K, BLOCK_V)
    for t in range(T):
        if g_ptr is not None:
            memory *= tl.exp(tl.load(g_ptr + b * stride_gb + h * stride_gh + t * stride_gt).to(tl.float32))
        q = tl.load(q_ptr + t * stride_qt, mask=rows < K, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t * stride_kt, mask=rows < K, other=0.0).to(tl.float32)
        values = tl.load(v_ptr + t * stride_vt, mask=columns < V - v, other=0.0).to(tl.float32)
        error = values - tl.sum(k[:, None] * memory, 0)
        memory += k[:, None] * (tl.load(beta_ptr + (b * H + h) * T + t) * error)[None, :]
        o = scale * tl.sum(q[:, None] * memory, 0)
        tl.store(o_ptr + t * stride_ot, cast(o, o_ptr.dtype.element_ty), mask=columns < V - v)
    store_block(last_ptr + at, V, K, V - v, memory, BLOCK_K, BLOCK_V)


_COLUMN_ELEMENTS = 4096  # of the memory that one program of the recurrence holds
OUTPUT: ChunkTable = SINGLE | {(*key, 2): Tile(64, 64, 8, 2) for key in EVERY}  # see PRODUCTS in _delta_chunks


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    o, last = _fake_forward(q, k, v, g, beta, first, scale, chunk_size)
    if not o.numel():
        return o, last.zero_() if first is None else last.copy_(first)
    with torch.cuda.device_of(q):
        if q.shape[2] < SHORT:
            _recur(q, k, v, g, beta, first, o, last, scale)
            return o, last
        call = Chunks(q, k, v, g, beta, first, scale, chunk_size)
        values, erasures = call.solve(None)
        memories = call.remember(values, erasures, last)
        tile = pick(OUTPUT, q, v)
        chunk_scan._chunk_output[call.programs,](
            call.q, call.k, values, call.c, memories, o, *strides(call.q, call.k, values, o),
            q_group=call.H // q.shape[1], k_group=call.H // k.shape[1], v_group=1, scale=scale,
            **call.sizes, **tile._asdict(),
        )  # fmt: skip
    return o, last


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return empty_output(q, k, v), empty_memory(q, v, beta.shape[1])


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, o: Tensor, last: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Fill o and last, token by token."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    B, H, T, V = o.shape
    block_k = max(16, triton.next_power_of_2(q.shape[3]))
    block_v = min(max(16, _COLUMN_ELEMENTS // block_k), max(16, triton.next_power_of_2(V)))
    _delta_recurrence[B * H * triton.cdiv(V, block_v),](
        q, k, v, g, beta.float().contiguous(), None if first is None else first.float().contiguous(), o, last,
        *strides(q, k, v), *((0, 0, 0) if g is None else g.stride()), *strides(o),
        T, H, *groups(H, q, k, v), scale, K=q.shape[3], V=V, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip


_OPTIONS = "float scale, int chunk_size"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? first"
_forward_op = define("delta_rule_forward", _INPUTS, _OPTIONS, "Tensor o, Tensor last", _forward, _fake_forward)
_backward_op = define(
    "delta_rule_backward",
    f"Tensor do, Tensor? dlast, {_INPUTS}",
    _OPTIONS,
    "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dfirst",
    backward.backward,
    backward.empty_gradients,
)


class _DeltaRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, first: Tensor | None, scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward_op(q, k, v, g, beta, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, beta, first = ctx.saved_tensors
        do = torch.zeros_like(empty_output(q, k, v)) if do is None else do
        dq, dk, dv, dg, dbeta, dfirst = _DeltaRuleBackward.apply(
            do, dlast, q, k, v, g, beta, first, ctx.scale, ctx.chunk_size
        )  # fmt: skip
        dg = None if g is None else dg.to(g.dtype)
        return dq, dk, dv, dg, dbeta.to(beta.dtype), None if first is None else dfirst.to(first.dtype), None, None


class _DeltaRuleBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: the bare operator's would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
        first: Tensor | None, scale: float, chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _backward_op(do, dlast, q, k, v, g, beta, first, scale, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError('the kernels of the delta rules have no second derivative; backend="reference" has')


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.gated_delta_rule, which documents and has checked the arguments."""
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    first = None if initial_state is None else initial_state.memory
    o, last = _DeltaRule.apply(*distinct(q, k, v, g, beta, first), scale, chunk_size)
    return o, RecurrentState(last, next_position(q, initial_state))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: RecurrentState | None,
    scale: float,
    qk_l2norm: bool,
    chunk_size: int,
) -> tuple[Tensor, RecurrentState]:
    """The kernels behind effkit.attention.delta_rule: the same without gates."""
    return gated_delta_rule(
        q, k, v, None, beta, initial_state=initial_state, scale=scale, qk_l2norm=qk_l2norm, chunk_size=chunk_size
    )


_FLOAT32 = (
    "beta_ptr", "below_ptr", "writes_ptr", "values_ptr", "first_ptr", "last_ptr", "dvalues_ptr", "dlast_ptr",
    "dfirst_ptr", "dk_sum_ptr", "dbeta_ptr", "dg_ptr", "g_ptr",
)  # fmt: skip
_GATES = ("c_ptr", "g_ptr", "dg_ptr")


def aot_specs() -> Iterator[AotSpec]:
    """The builds that are compiled and inspected without a GPU: every kernel, with the tiles that its table picks."""
    kernels = (
        (chunks._delta_system, chunks.SYSTEM),
        (chunks._delta_memories, chunks.MEMORIES),
        (backward._delta_from_outputs, backward.FROM_OUTPUTS),
        (backward._delta_dmemories, backward.DMEMORIES),
        (backward._delta_output_gradients, backward.OUTPUT_GRADIENTS),
        (backward._delta_value_gradients, backward.VALUE_GRADIENTS),
        (backward._delta_key_gradients, backward.KEY_GRADIENTS),
    )
    in_tiles = {
        chunks._delta_memories: chunks._delta_memories_in_tiles,
        backward._delta_dmemories: backward._delta_dmemories_in_tiles,
    }
    half = [(64, "bf16", "plain"), (128, "bf16", "gated"), (256, "bf16", "gated")]
    wide = (128, "fp32", "gated")  # 90 compiles float32 as 80 does
    for arch, builds in (80, [*half, (64, "fp32", "gated"), wide]), (90, half), (100, [*half, wide]):
        for width, dtype, variant in builds:
            key = arch, width, 2 if dtype == "bf16" else 4
            absent = _GATES if variant == "plain" else ()
            for kernel, table in kernels:
                kernel = in_tiles.get(kernel, kernel) if dtype == "fp32" and width > 64 else kernel
                yield build(kernel, arch, table[key], width, dtype, variant, float32=_FLOAT32, absent=absent)
            output, tile = chunk_scan._chunk_output, OUTPUT[key]
            yield build(output, arch, tile, width, dtype, f"{variant}-values", float32=("v_ptr",), absent=absent)
        for kernel in in_tiles.values() if arch == 90 else ():
            yield build(kernel, arch, chunks.IN_TILES, 128, "fp32", "gated", float32=_FLOAT32)
        column = Tile(128, _COLUMN_ELEMENTS // 128, 4, 1)
        yield build(_delta_recurrence, arch, column, 128, "bf16", "gated", float32=_FLOAT32, products=False)
