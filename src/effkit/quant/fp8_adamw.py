"""AdamW whose two moments take a byte each: m in e4m3, v in e5m2, with one float32 scale for 256 neighbours.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)
                        m^ = m / (1 - b1^t), v^ = v / (1 - b2^t);  Loshchilov and Hutter, arXiv 1711.05101, algorithm 2
    kept between steps: Q_e4m3(m), Q_e5m2(v)                                           Fishman et al., arXiv 2409.12517

Why e5m2 for v: 1 / sqrt(v) turns what rounds to zero into steps without bound, so that v wants range, not digits. With
v in e4m3 the same optimizer diverges where gradients of neighbours differ by a thousand. Even e5m2 ends somewhere, 32
binades below the largest of its 256; there v is kept at the smallest number that is not zero (`round_up_v`).

Cost: 2.03 bytes of state a parameter instead of 8. One pass reads the gradient and reads and writes parameters and
state; everything between is in float32.

When not to use it: it saves memory and no arithmetic. Parameters stay as they are, so that those in half precision lose
small updates as with any other optimizer: train float32 master weights. Blocks run over the flattened tensor: an
element whose m is below 2e-6 of the largest among its 256 has an m of zero from one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from effkit.ops import Case, Op, register
from effkit.quant.fp8 import (
    FORMATS,
    decode_fp8_reference,
    decode_fp8_torch,
    encode_fp8_reference,
    encode_fp8_torch,
)

State = tuple[Tensor, ...]  # param, m, m_scale, v, v_scale


def adamw_fp8_step_reference(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    m_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    block_size: int = 256,
    formats: tuple[str, str] = ("e4m3", "e5m2"),
    round_up_v: bool = True,
    inplace: bool = False,
) -> State:
    """The equations between decoding and encoding, one rounding for each operation, in this order."""
    of_m, of_v = (_blocks_of(block_size, format) for format in formats)
    old_m = decode_fp8_reference(m.reshape(-1), m_scale, **of_m)
    old_v = decode_fp8_reference(v.reshape(-1), v_scale, **of_v)
    g, p = grad.reshape(-1).float(), param.reshape(-1).float()
    new_m = betas[0] * old_m + (1 - betas[0]) * g
    new_v = betas[1] * old_v + (1 - betas[1]) * (g * g)
    unbias_m, unbias_root_v = 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)
    new_p = (1 - lr * weight_decay) * p - lr * unbias_m * (new_m / (root(new_v) * unbias_root_v + eps))
    m_codes, new_m_scale = encode_fp8_reference(new_m, **of_m)
    v_codes, new_v_scale = encode_fp8_reference(new_v, **of_v)
    if round_up_v:
        v_codes = torch.where((new_v > 0) & (v_codes == 0), 1, v_codes)
    new = (new_p.to(param.dtype), m_codes, new_m_scale, v_codes, new_v_scale)
    old = (param, m, m_scale, v, v_scale)
    shaped = tuple(value.reshape(before.shape) for value, before in zip(new, old, strict=True))
    return tuple(a.copy_(b) for a, b in zip(old, shaped, strict=True)) if inplace else shaped


def adamw_fp8_step_torch(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    m_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    block_size: int = 256,
    formats: tuple[str, str] = ("e4m3", "e5m2"),
    round_up_v: bool = True,
    inplace: bool = False,
) -> State:
    """The same, some blocks at a time, so that the float32 values of all of them never exist at once."""
    old = (param, m, m_scale, v, v_scale)
    new = old if inplace else tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in old)
    of_m, of_v = (_blocks_of(block_size, format) for format in formats)
    sizes = _piece(param, block_size)
    inputs = (x.reshape(-1).split(size) for x, size in zip((*old, grad), (*sizes, sizes[0]), strict=True))
    outputs = (x.view(-1).split(size) for x, size in zip(new, sizes, strict=True))
    for pieces, targets in zip(zip(*inputs, strict=True), zip(*outputs, strict=True), strict=True):
        p, codes_m, scale_m, codes_v, scale_v, g = pieces
        new_p, new_m, new_v = adamw_update(
            p.float(),
            g.float(),
            decode_fp8_torch(codes_m, scale_m, **of_m),
            decode_fp8_torch(codes_v, scale_v, **of_v),
            *step_sizes(step, lr, betas, eps, weight_decay),
        )
        results = new_p, *encode_fp8_torch(new_m, **of_m), *encode_fp8_torch(new_v, **of_v)
        if round_up_v:
            results[3].add_((new_v > 0) & (results[3] == 0))
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)
    return new


def _blocks_of(block_size: int, format: str) -> dict[str, Any]:
    """How `encode_fp8` and `decode_fp8` are told about blocks of a flattened tensor."""
    return {"granularity": "block", "block": (1, block_size), "format": format}


def adamw_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    beta1: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    decay: float,
    unbias_root_v: float,
    eps: float,
    step_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW on float32 values with the scalars of `step_sizes`: new p, m and v."""
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    return decay * p - step_size * (m / (root(v) * unbias_root_v + eps)), m, v


def root(v: Tensor) -> Tensor:
    """The square root, rounded to the nearest float32: that of torch is one unit off at places, on a CPU."""
    return torch.sqrt(v.double()).float()


def step_sizes(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float, float, float, float, float, float, float]:
    """The scalars of one step, computed in float64: what is left to the elements are products and sums."""
    unbias_m, unbias_root_v = 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)
    return betas[0], 1 - betas[0], betas[1], 1 - betas[1], 1 - lr * weight_decay, unbias_root_v, eps, lr * unbias_m


def adamw_fp8_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    m_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    block_size: int = 256,
    formats: tuple[str, str] = ("e4m3", "e5m2"),
    round_up_v: bool = True,
    inplace: bool = False,
    backend: str | None = None,
) -> State:
    """One step of AdamW on a tensor whose moments are kept in FP8.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  p = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)
                                                                                  arXiv 1711.05101, arXiv 2409.12517
    param [*N]      float16, bfloat16 or float32, any strides
    grad [*N]       of the same dtype
    m, v [*N]       uint8 codes of the moments; zeros before the first step
    m_scale, v_scale [G]   float32, one for each block_size elements of the flattened tensor, G of them; they multiply
    step            number of this step, from 1 on
    lr, betas, eps, weight_decay   as of torch.optim.AdamW
    block_size      elements that share a scale, a power of two from 32 to 4096
    formats         of m and v, "e4m3" or "e5m2" each
    round_up_v      keep a v that is not zero at the smallest code that is not zero
    inplace         write the results into param, m, m_scale, v and v_scale; otherwise those are left alone
    backend         "reference", "torch", "triton" or None for the fastest that can

    Returns param, m, m_scale, v, v_scale after the step. The step itself uses the moments before they are rounded. All
    is computed in float32 with one rounding for each operation, so that backends agree bit for bit. No gradient.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    tensors = {"param": param, "grad": grad, "m": m, "m_scale": m_scale, "v": v, "v_scale": v_scale}
    ADAMW_FP8_STEP.check(**tensors)
    if step < 1:
        raise ValueError(f"adamw_fp8_step: step is {step!r}, expected an integer from 1 on")
    options: dict[str, Any] = dict(
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_size=block_size, formats=formats
    )
    _check_options("adamw_fp8_step", options)
    _check_tensors(tensors, block_size)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    targets = [tensor for name, tensor in tensors.items() if name != "grad"]
    packed = all(target.is_contiguous() for target in targets)
    results = ADAMW_FP8_STEP.run(
        backend, **tensors, step=step, **options, round_up_v=round_up_v, inplace=inplace and packed
    )
    if inplace and not packed:
        return tuple(target.copy_(result) for target, result in zip(targets, results, strict=True))
    return results


class AdamWFP8(torch.optim.Optimizer):
    """AdamW with moments in FP8, in the place of torch.optim.AdamW.

    params          float16, bfloat16 or float32 parameters, or groups of them
    lr, betas, eps, weight_decay   as of torch.optim.AdamW; the decay is decoupled
    block_size      elements that share a scale, a power of two from 32 to 4096
    formats         of m and v, "e4m3" or "e5m2" each
    round_up_v      keep a v that is not zero at the smallest code that is not zero
    min_elements    parameters with fewer elements, and those with one axis, keep moments in float32: there is little to
                    save in norms and biases; 0 quantises these as well
    backend         as of `adamw_fp8_step`

    All but backend may differ from group to group. State of a parameter: `step`, and `exp_avg` in float8_e4m3fn and
    `exp_avg_sq` in float8_e5m2 with float32 `exp_avg_scale` and `exp_avg_sq_scale`, or the first two in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        formats: tuple[str, str] = ("e4m3", "e5m2"),
        round_up_v: bool = True,
        min_elements: int = 4096,
        backend: str | None = None,
    ) -> None:
        self.backend = backend
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            block_size=block_size,
            formats=formats,
            round_up_v=round_up_v,
            min_elements=min_elements,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options("AdamWFP8", group)
            for param in group["params"]:
                if param.dtype not in _DTYPES:
                    raise TypeError(f"AdamWFP8: a parameter has dtype {param.dtype}, choices: {_CHOICES}")
                if hasattr(param, "placements"):
                    raise TypeError(
                        "AdamWFP8: a parameter is a DTensor, whose state could not be saved; expected a plain one"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what closure, called with gradients on, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [(param, group) for group in self.param_groups for param in group["params"] if param.grad is not None]
        for param, _ in updates:
            if param.grad.layout != torch.strided:
                raise TypeError(f"AdamWFP8: a gradient has layout {param.grad.layout}, expected torch.strided")
        for param, group in updates:
            state = self.state[param]
            if not state:
                state.update(_initial_state(param, group))
            (self._step_in_fp8 if "exp_avg_scale" in state else _step_in_float32)(param, state, group)
            state["step"] += 1
        return loss

    def _step_in_fp8(self, param: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        adamw_fp8_step(
            param,
            param.grad,  # type: ignore[arg-type]
            state["exp_avg"].view(torch.uint8),
            state["exp_avg_scale"],
            state["exp_avg_sq"].view(torch.uint8),
            state["exp_avg_sq_scale"],
            step=state["step"] + 1,
            **{name: group[name] for name in _OPTIONS},
            round_up_v=group["round_up_v"],
            inplace=True,
            backend=self.backend,
        )
        torch.autograd.graph.increment_version(param)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of any optimizer, except that state keeps its dtypes: torch would cast it to that of the parameter.

        Raises ValueError for a state of another optimizer, and leaves this one as it was.
        """
        for group in state_dict["param_groups"]:
            if lacking := [name for name in self.defaults if name not in group]:
                raise ValueError(f"AdamWFP8: a group lacks {', '.join(lacking)}: expected a state dict of AdamWFP8")
        state = state_dict["state"]
        steps = {key: {"step": values["step"]} for key, values in state.items()}
        super().load_state_dict({**state_dict, "state": steps})
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=True):
            for name in state.get(key, {}).keys() - {"step"}:
                self.state[param][name] = state[key][name].to(param.device, copy=True)


def _initial_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Moments of zero, in FP8 for what is large enough."""
    packed = torch.contiguous_format
    if group["min_elements"] and (param.ndim < 2 or param.numel() < group["min_elements"]):
        m, v = (torch.zeros_like(param, dtype=torch.float32, memory_format=packed) for _ in range(2))
        return {"step": 0, "exp_avg": m, "exp_avg_sq": v}
    state: dict[str, Any] = {"step": 0}
    for name, format in zip(("exp_avg", "exp_avg_sq"), group["formats"], strict=True):
        codes = torch.zeros_like(param, dtype=torch.uint8, memory_format=packed)
        state[name] = codes.view(FORMATS[format].dtype)
        state[f"{name}_scale"] = torch.ones(-(-param.numel() // group["block_size"]), device=param.device)
    return state


def _step_in_float32(param: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    scalars = step_sizes(state["step"] + 1, *(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
    moments = state["exp_avg"], state["exp_avg_sq"]
    results = adamw_update(param.float(), param.grad.float(), *moments, *scalars)  # type: ignore[union-attr]
    for old, new in zip((param, *moments), results, strict=True):
        old.copy_(new)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for options of a step that are out of range."""
    for key in ("lr", "eps", "weight_decay"):
        if not isinstance(options[key], Real):
            given = "a tensor" if isinstance(options[key], Tensor) else repr(options[key])
            raise TypeError(f"{name}: {key} is {given}, expected a number")
        if not 0 <= options[key] < math.inf:
            raise ValueError(f"{name}: {key} is {options[key]!r}, expected a finite number from 0 on")
    betas, size, formats = options["betas"], options["block_size"], options["formats"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name}: betas is {betas!r}, expected two numbers in [0, 1)")
    if size not in _BLOCK_SIZES:
        raise ValueError(f"{name}: block_size is {size!r}, choices: {', '.join(map(str, _BLOCK_SIZES))}")
    if len(formats) != 2 or not all(format in FORMATS for format in formats):
        raise ValueError(f"{name}: formats is {formats!r}, expected two of {', '.join(map(repr, FORMATS))}")


def _check_tensors(tensors: Mapping[str, Tensor], block_size: int) -> None:
    param = tensors["param"]
    blocks = -(-param.numel() // block_size)
    for name, tensor in tensors.items():
        codes, scale = name in ("m", "v"), name.endswith("_scale")
        expected = torch.uint8 if codes else torch.float32 if scale else param.dtype
        if name == "param" and param.dtype not in _DTYPES:
            raise TypeError(f"adamw_fp8_step: param has dtype {param.dtype}, choices: {_CHOICES}")
        if tensor.dtype != expected:
            raise TypeError(f"adamw_fp8_step: {name} has dtype {tensor.dtype}, expected {expected}")
        if tensor.device != param.device:
            raise ValueError(f"adamw_fp8_step: {name} is on {tensor.device}, expected {param.device} as param")
        if scale and tensor.shape != (blocks,):
            raise ValueError(
                f"adamw_fp8_step: {name} has shape {list(tensor.shape)}, expected [{blocks}] for {param.numel()} "
                f"elements in blocks of {block_size}"
            )


def _piece(param: Tensor, block_size: int) -> tuple[int, int, int, int, int]:
    """Elements of param, m, m_scale, v and v_scale to update at a time: on a CPU what fits its cache."""
    whole = max(1, -(-param.numel() // block_size))
    in_pieces = param.device.type == "cpu" and not torch.compiler.is_compiling()
    blocks = max(1, _PIECE * torch.get_num_threads() // block_size) if in_pieces else whole
    return blocks * block_size, blocks * block_size, blocks, blocks * block_size, blocks


def _blocks(case: Case) -> int:
    return -(-_elements(case) // case.options.get("block_size", 256))


def _elements(case: Case) -> int:
    return math.prod(case.sizes["*N"])  # type: ignore[arg-type]


def _case(name: str, shape: tuple[int, ...], *, large: bool = False, **fields: Any) -> Case:
    """A case on a parameter of this shape; the number of scales follows."""
    apart = {key: fields.pop(key) for key in ("layout", "gain", "draw") if key in fields}
    scales = -(-math.prod(shape) // fields.get("block_size", 256))
    return Case(name, {"*N": shape, "G": scales}, {"step": 3, **fields}, large=large, **apart)


def _codes(largest: int) -> Callable[[Tensor], Tensor]:
    """Codes of finite numbers, small ones more often than large ones; with both signs where `largest` is that of m."""
    return lambda value: (value.abs() * 40).clamp(max=largest).to(torch.uint8)


def _signed_codes(value: Tensor) -> Tensor:
    return _codes(0x7B)(value) + 128 * (value < 0).to(torch.uint8)


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=torch.uint8)


def _all_sizes(value: Tensor) -> Tensor:
    """Gradients so different that either moment of the smaller ones is lost."""
    return value**9 / 1000


_OPTIONS = ("lr", "betas", "eps", "weight_decay", "block_size", "formats")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHOICES = ", ".join(map(str, _DTYPES))
_PIECE = 1 << 16  # elements a thread; a quarter megabyte of float32
_NO_MOMENTS = {"m": _zeros, "v": _zeros}

ADAMW_FP8_STEP = register(
    Op(
        name="adamw_fp8_step",
        area="quant",
        summary="a step of AdamW with both moments in FP8, m in e4m3 and v in e5m2",
        paper="https://arxiv.org/abs/2409.12517",
        shapes=(
            "param [*N], grad [*N], m [*N], m_scale [G], v [*N], v_scale [G] "
            "-> param [*N], m [*N], m_scale [G], v [*N], v_scale [G]"
        ),
        function=adamw_fp8_step,
        reference=adamw_fp8_step_reference,
        torch=adamw_fp8_step_torch,
        triton="effkit.kernels.fp8_adamw:adamw_fp8_step",
        exact=True,
        cases=(
            _case("one", (1,)),
            _case("no axis", ()),
            _case("empty", (0, 8)),
            _case("a block", (256,)),
            _case("one past a block", (257,)),
            _case("one short of two blocks", (7, 73)),
            _case("weight", (37, 67)),
            _case("several pieces", (300, 220)),
            _case("first step", (9, 65), step=1, draw=_NO_MOMENTS),
            _case("late step", (9, 65), step=100_000),
            _case("small blocks", (5, 131), block_size=32),
            _case("large blocks", (3, 1367), block_size=4096),
            _case("other formats", (9, 65), formats=("e5m2", "e4m3")),
            _case("v rounds to zero", (9, 65), formats=("e4m3", "e4m3"), round_up_v=False),
            _case(
                "v is rounded up", (9, 65), formats=("e4m3", "e4m3"), step=1, draw={**_NO_MOMENTS, "grad": _all_sizes}
            ),
            _case("transposed", (3, 5, 33), layout="transposed"),
            _case("strided", (9, 65), layout="strided"),
            _case("large gradients", (9, 65), gain={"grad": 1e3}, lr=0.1, weight_decay=0.0),
            _case("other betas", (9, 65), betas=(0.0, 0.95), eps=1e-6),
            _case("embedding", (32000, 4096), large=True),
        ),
        bench=(
            _case("512 x 2048", (512, 2048)),
            _case("4k x 4k", (4096, 4096), large=True),
            _case("4k x 14336", (4096, 14336), large=True),
        ),
        grads=(),
        flops=lambda case: 20 * _elements(case),
        traffic=lambda case: 3 * _elements(case),
        other_bytes=lambda case: 4 * _elements(case) + 16 * _blocks(case),
        draw={
            "m": _signed_codes,
            "v": _codes(0x7B),
            "m_scale": lambda value: (value.abs() * 1e-3 + 1e-6).float(),
            "v_scale": lambda value: (value.abs() * 1e-6 + 1e-9).float(),
        },
        rivals={"adamw": "effkit.rivals:adamw_eager", "fused adamw": "effkit.rivals:adamw_fused"},
    )
)
