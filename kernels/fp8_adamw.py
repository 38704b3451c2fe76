"""AdamW with moments in FP8 on the GPU: one pass over parameters, gradients and state."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkit.kernels._common import INTERPRET, AotSpec, cast
from effkit.kernels._fp8 import fp8_scale, from_fp8, magnitude, to_fp8
from effkit.quant.fp8 import FORMATS
from effkit.quant.fp8_adamw import State, step_sizes


@triton.jit
def _load_moment(codes_ptr, scale_ptr, at, ok, blocks, there, MANTISSA: tl.constexpr):
    """A moment [ROWS, BLOCK] in float32."""
    scale = tl.load(scale_ptr + blocks, mask=there, other=1.0)
    return from_fp8(tl.load(codes_ptr + at, mask=ok, other=0), MANTISSA) * scale[:, None]


@triton.jit
def _store_moment(
    codes_ptr, scale_ptr, moment, at, ok, blocks, there, MANTISSA: tl.constexpr, ROUND_UP: tl.constexpr
):  # fmt: skip
    """A moment as codes, and the scale of each block; what is not there is 0 and leaves the maximum alone."""
    scale = fp8_scale(tl.max(magnitude(moment), 1), 0.0, MANTISSA, False)
    codes = to_fp8(moment * tl.div_rn(1.0, scale)[:, None], MANTISSA)
    if ROUND_UP:
        codes = tl.where((moment > 0) & (codes == 0), 1, codes).to(tl.uint8)
    tl.store(codes_ptr + at, codes, mask=ok)
    tl.store(scale_ptr + blocks, scale, mask=there)


# One program owns ROWS blocks of BLOCK elements that share a scale. It reads parameter, gradient, codes and scales once
# and writes all but the gradient, in place where the outputs are the inputs. Four float32 values an element are alive,
# so that a thread has 8 elements. Launched without contraction of products and sums: every operation is rounded by
# itself, as torch does it, and the results agree with torch's bit for bit.
@triton.jit(do_not_specialize=["N"])
def _adamw_fp8_step(
    p_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr,
    new_p_ptr, new_m_ptr, new_m_scale_ptr, new_v_ptr, new_v_scale_ptr,
    N, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, unbias_root_v, eps, step_size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, M_MANTISSA: tl.constexpr, V_MANTISSA: tl.constexpr, ROUND_UP: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    ok, there = at < N, blocks * BLOCK < N
    p = tl.load(p_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=ok, other=0.0).to(tl.float32)
    m = _load_moment(m_ptr, m_scale_ptr, at, ok, blocks, there, M_MANTISSA)
    v = _load_moment(v_ptr, v_scale_ptr, at, ok, blocks, there, V_MANTISSA)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    p = decay * p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * unbias_root_v + eps)
    tl.store(new_p_ptr + at, cast(p, new_p_ptr.dtype.element_ty), mask=ok)
    _store_moment(new_m_ptr, new_m_scale_ptr, m, at, ok, blocks, there, M_MANTISSA, False)
    _store_moment(new_v_ptr, new_v_scale_ptr, v, at, ok, blocks, there, V_MANTISSA, ROUND_UP)


_ELEMENTS, _WARPS = 1024, 4


def _rows(block_size: int) -> int:
    return max(1, _ELEMENTS // block_size)


def _warps(block_size: int) -> int:
    return max(_WARPS, _WARPS * block_size // _ELEMENTS)


def _launch(
    new: State, old: State, grad: Tensor, block_size: int, formats: list[str], round_up_v: bool, scalars: list[float]
) -> None:
    if grad.numel():
        old = tuple(x.contiguous() for x in old)
        param, m, m_scale, v, v_scale = old
        rows = _rows(block_size)
        grid = (triton.cdiv(triton.cdiv(grad.numel(), block_size), rows),)
        with torch.cuda.device_of(grad):
            _adamw_fp8_step[grid](
                param, grad.contiguous(), m, m_scale, v, v_scale, *new, grad.numel(), *scalars,
                ROWS=rows, BLOCK=block_size, M_MANTISSA=FORMATS[formats[0]].mantissa,
                V_MANTISSA=FORMATS[formats[1]].mantissa, ROUND_UP=round_up_v,
                num_warps=_warps(block_size), enable_fp_fusion=False,
            )  # fmt: skip


def _step(
    param: Tensor, grad: Tensor, m: Tensor, m_scale: Tensor, v: Tensor, v_scale: Tensor,
    block_size: int, formats: list[str], round_up_v: bool, scalars: list[float],
) -> State:  # fmt: skip
    old = (param, m, m_scale, v, v_scale)
    new = _fake_step(param, grad, m, m_scale, v, v_scale)
    _launch(new, old, grad, block_size, formats, round_up_v, scalars)
    return new


def _step_inplace(
    param: Tensor, grad: Tensor, m: Tensor, m_scale: Tensor, v: Tensor, v_scale: Tensor,
    block_size: int, formats: list[str], round_up_v: bool, scalars: list[float],
) -> None:  # fmt: skip
    old = (param, m, m_scale, v, v_scale)
    _launch(old, old, grad, block_size, formats, round_up_v, scalars)


def _fake_step(param: Tensor, grad: Tensor, *state: Any) -> State:
    old = (param, *state[:4])
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in old)


_library = torch.library.Library("effkit", "FRAGMENT")
_options = "int block_size, str[] formats, bool round_up_v, float[] scalars"
_library.define(
    "adamw_fp8_step(Tensor param, Tensor grad, Tensor m, Tensor m_scale, Tensor v, Tensor v_scale, "
    f"{_options}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "adamw_fp8_step_(Tensor(a!) param, Tensor grad, Tensor(b!) m, Tensor(c!) m_scale, Tensor(d!) v, "
    f"Tensor(e!) v_scale, {_options}) -> ()"
)
for _name, _run, _fake in (
    ("adamw_fp8_step", _step, _fake_step),
    ("adamw_fp8_step_", _step_inplace, lambda *_: None),
):
    _library.impl(_name, _run, "CPU" if INTERPRET else "CUDA")
    torch.library.register_fake(f"effkit::{_name}", _fake, lib=_library)


def adamw_fp8_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    m_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    block_size: int,
    formats: tuple[str, str],
    round_up_v: bool,
    inplace: bool,
) -> State:
    """The kernel behind effkit.quant.adamw_fp8_step, which documents and has checked the arguments."""
    scalars = step_sizes(step, lr, betas, eps, weight_decay)
    arguments = (param, grad, m, m_scale, v, v_scale, block_size, formats, round_up_v, scalars)
    if inplace:
        torch.ops.effkit.adamw_fp8_step_(*arguments)
        return param, m, m_scale, v, v_scale
    return torch.ops.effkit.adamw_fp8_step(*arguments)


def aot_specs() -> list[AotSpec]:
    """Small, usual and large blocks, with parameters of two and four bytes and either order of formats."""
    variants = [(256, "fp32", (3, 2)), (256, "bf16", (3, 2)), (32, "fp32", (3, 2)), (4096, "fp32", (2, 3))]
    return [_spec(arch, *variant) for arch in (80, 90, 100) for variant in variants]


def _spec(arch: int, block: int, dtype: str, mantissas: tuple[int, int]) -> AotSpec:
    def type_of(name: str) -> str:
        if not name.endswith("_ptr"):
            return "i32" if name == "N" else "fp32"
        if name.endswith("scale_ptr"):
            return "*fp32"
        return f"*{dtype}" if name.endswith(("p_ptr", "g_ptr")) else "*u8"

    constants = dict(ROWS=_rows(block), BLOCK=block, M_MANTISSA=mantissas[0], V_MANTISSA=mantissas[1], ROUND_UP=True)
    types = {name: type_of(name) for name in _adamw_fp8_step.arg_names}
    return AotSpec(f"adamw_fp8_step {block} {dtype}", _adamw_fp8_step, types, constants, _warps(block), 1, arch)
