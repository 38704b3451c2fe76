"""Smooth-SwiGLU: each channel of SwiGLU is brought to the same size by a power of two before it becomes FP8.

    h = silu(gate) * up,    s_c = 2 ** -ceil(log2 max_n |h[n, c]|),    y = Q(s * h) @ Q(W_down / s)^T
                               Fishman et al., arXiv 2409.12517: without Q this is W_down h, whatever s is

Why: late in training the gate and up weights of a channel align, and its h grows with the square of its input. One such
channel sets the scale of the whole tensor, and the others fall into FP8's subnormals or to zero. With s every channel
peaks in (1/2, 1]. As s is a power of two, multiplying and dividing by it lose nothing.

Cost: h is written once, the maxima are taken while it is at hand, and the codes are made in one more read: 9 bytes an
element in bfloat16. Backward reads dh, gate and up, of which gate and up are kept, and writes two gradients.

When not to use it: without FP8, where it changes nothing; with scales by token or by block of channels, which contain
most of such an outlier. s is as fresh as its batch: an input alone and in a batch need not give the same bits, unless
the scales are fixed and merged into the weights (`merge_smooth_scales`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.ops import Case, Op, register
from effkit.quant.fp8 import FORMATS, encode_fp8, encode_fp8_reference, to_fp8_codes
from effkit.quant.fp8_linear import FP8Linear
from effkit.quant.fp8_matmul import matmul_fp8
from effkit.quant.fp8_training import FP8Recipe


def smooth_swiglu_reference(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The equation, in float32 at least, rounded once."""
    wide = _wide(gate)
    h = (gate.to(wide) * torch.sigmoid(gate.to(wide)) * up.to(wide)).to(gate.dtype)
    rows = h.detach().to(wide).reshape(math.prod(h.shape[:-1]), h.shape[-1])
    amax = torch.cat((rows.abs(), rows.new_zeros(1, h.shape[-1]))).amax(0)  # 0 where there is no row
    exponent = torch.ceil(torch.log2(amax.double())).clamp(-126, 126)
    return h, torch.where((amax > 0) & amax.isfinite(), torch.exp2(-exponent).float(), 1.0)


def smooth_scale(amax: Tensor) -> Tensor:
    """2 ** -ceil(log2 amax) in float32 for each channel, on bits: amax times it is in (1/2, 1].

    1 where amax is 0, infinite or NaN. Exponents stay within -126 and 126, so that the inverse is a normal number, too.
    """
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2 ** exponent, mantissa in [1/2, 1)
    ceiling = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = ((127 - ceiling).clamp(1, 253) << 23).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def smooth_swiglu_torch(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A few rows at a time, saving gate and up only; under torch.compile as written, which then fuses it."""
    if torch.compiler.is_compiling():
        return smooth_swiglu_reference(gate, up)
    return _SmoothSwiGLU.apply(gate, up)


def smooth_swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """SwiGLU, and the power of two that brings each of its channels to a maximum in (1/2, 1].

        h = silu(gate) * up,    channel_scale[c] = 2 ** -ceil(log2 max_n |h[n, c]|)        arXiv 2409.12517

    gate [*N, C]  float16, bfloat16, float32 or float64, any strides
    up [*N, C]    of the same dtype
    backend       "reference", "torch", "triton" or None for the fastest that can

    Returns h [*N, C] in gate's dtype, computed in float32 (float64 for float64), and channel_scale [C] in float32: of h
    as it was rounded, 1 for a channel that is zero or not finite. Gradients flow through h; channel_scale is a
    constant, since whoever multiplies by it divides by it again.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    SMOOTH_SWIGLU.check(gate=gate, up=up)
    if gate.dtype not in _DTYPES:
        raise TypeError(f"smooth_swiglu: gate has dtype {gate.dtype}, choices: {', '.join(map(str, _DTYPES))}")
    for what in ("dtype", "device"):
        if getattr(up, what) != getattr(gate, what):
            raise (TypeError if what == "dtype" else ValueError)(
                f"smooth_swiglu: up has {what} {getattr(up, what)}, expected {getattr(gate, what)} as gate"
            )
    return SMOOTH_SWIGLU.run(backend, gate=gate, up=up)


def encode_smooth_fp8_reference(h: Tensor, channel_scale: Tensor, *, format: str = "e4m3") -> tuple[Tensor, Tensor]:
    """The equation: h is brought to a peak of 1, then to that of the format."""
    return encode_fp8_reference(
        h.float() * channel_scale, torch.tensor(1 / PEAK[format], device=h.device), format=format
    )


def encode_smooth_fp8_torch(h: Tensor, channel_scale: Tensor, *, format: str = "e4m3") -> tuple[Tensor, Tensor]:
    """A few rows at a time."""
    codes = h.new_empty(h.shape, dtype=torch.uint8)
    for rows, out in zip(_chunks(h), _chunks(codes), strict=True):
        out.copy_(to_fp8_codes((rows * channel_scale).mul_(PEAK[format]), format))
    return codes, torch.full((), 1 / PEAK[format], device=h.device)


def encode_smooth_fp8(
    h: Tensor, channel_scale: Tensor, *, format: str = "e4m3", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """FP8 codes of channels that were brought to the same size: what the down projection takes.

        codes = round_fp8(clamp(s_c h / scale)),    scale = 2^-8 for e4m3, 2^-15 for e5m2        arXiv 2409.12517

    h [*N, C]           float16, bfloat16 or float32, any strides
    channel_scale [C]   float32: powers of two, those of `smooth_swiglu` or fixed ones
    format              "e4m3" or "e5m2"
    backend             "reference", "torch", "triton" or None for the fastest that can

    Returns codes uint8 [*N, C] and scale float32 []: h ~ codes scale / channel_scale. With the scales of h itself every
    channel peaks in (1/2, 1], so that scale is a constant, and no maximum is looked for again. It is a power of two:
    nothing is rounded but the codes. Above that, h saturates at 1.75 times the peak; NaN becomes 0x7F. No gradient.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    ENCODE_SMOOTH_FP8.check(h=h, channel_scale=channel_scale)
    if h.dtype not in _DTYPES[:3]:
        raise TypeError(f"encode_smooth_fp8: h has dtype {h.dtype}, choices: {', '.join(map(str, _DTYPES[:3]))}")
    if channel_scale.dtype != torch.float32:
        raise TypeError(f"encode_smooth_fp8: channel_scale has dtype {channel_scale.dtype}, expected torch.float32")
    if channel_scale.device != h.device:
        raise ValueError(f"encode_smooth_fp8: channel_scale is on {channel_scale.device}, expected {h.device} as h")
    if format not in FORMATS:
        raise ValueError(f"encode_smooth_fp8: format is {format!r}, choices: {', '.join(map(repr, FORMATS))}")
    return ENCODE_SMOOTH_FP8.run(backend, h=h.detach(), channel_scale=channel_scale.detach(), format=format)


def merge_smooth_scales(up_weight: Tensor, down_weight: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights with fixed scales merged in, so that inference needs none: (s * rows of up, columns of down / s).

    up_weight [C, K]     of the projection that is not gated; a bias of it [C] is multiplied by channel_scale likewise
    down_weight [D, C]   of the projection that takes h
    channel_scale [C]    powers of two, as from `smooth_swiglu` on data for calibration

    silu(gate) * (s * up) is s * h, so that the output stays what it was, bit for bit in floating point as long as no
    product leaves the range of normal numbers.
    """
    if up_weight.ndim != 2 or down_weight.ndim != 2 or channel_scale.shape != up_weight.shape[:1]:
        raise ValueError(
            f"merge_smooth_scales: shapes {list(up_weight.shape)}, {list(down_weight.shape)} and "
            f"{list(channel_scale.shape)}, expected up_weight [C, K], down_weight [D, C] and channel_scale [C]"
        )
    if down_weight.shape[1] != up_weight.shape[0]:
        raise ValueError(
            f"merge_smooth_scales: down_weight has shape {list(down_weight.shape)}, expected [D, C] with "
            f"C={up_weight.shape[0]} from up_weight"
        )
    for name, weight in (("up_weight", up_weight), ("down_weight", down_weight)):
        if weight.dtype not in _DTYPES:
            choices = ", ".join(map(str, _DTYPES))
            raise TypeError(f"merge_smooth_scales: {name} has dtype {weight.dtype}, choices: {choices}")
    return (
        (up_weight * channel_scale[:, None]).to(up_weight.dtype),
        (down_weight / channel_scale).to(down_weight.dtype),
    )


class SmoothSwiGLU(nn.Module):
    """A gated MLP trained in FP8 whose hidden channels cannot spoil each other (arXiv 2409.12517).

        y = Q4(s h) Q4(W_down / s)^T + b,    h, s = smooth_swiglu(gate_proj(x), up_proj(x))

    hidden_size         channels of x and y
    intermediate_size   channels of h
    bias                whether the three projections have one
    recipe              of gate_proj and up_proj, as of FP8Linear. The down projection has one scale for a tensor, found
                        anew in each pass, for W_down / s and for dy; that of s h is a constant
    gradient_format     of dy of the down projection, "e5m2" or "e4m3"

    The projections have the names that they have in HuggingFace's Llama, and master weights in `dtype`. Gradients are
    straight through: dh = s Q5(dy) Q4(W_down / s), dW_down = Q5(dy)^T Q4(s h) / s. Kept for them is one byte for each
    element of h, beside gate and up.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        recipe: FP8Recipe | str = "tensorwise",
        gradient_format: str = "e5m2",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gradient_format not in FORMATS:
            raise ValueError(
                f"SmoothSwiGLU: gradient_format is {gradient_format!r}, choices: {', '.join(map(repr, FORMATS))}"
            )
        self.gradient_format = gradient_format
        self.gate_proj = FP8Linear(hidden_size, intermediate_size, bias, recipe=recipe, device=device, dtype=dtype)
        self.up_proj = FP8Linear(hidden_size, intermediate_size, bias, recipe=recipe, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)

    @classmethod
    def from_module(
        cls, mlp: nn.Module, *, recipe: FP8Recipe | str = "tensorwise", gradient_format: str = "e5m2"
    ) -> SmoothSwiGLU:
        """One with the parameters of a gated MLP with gate_proj, up_proj, down_proj and SiLU, such as Llama's.

        The parameters themselves are taken over, so that an optimizer that knows them goes on; mode, device and dtype
        stay.
        """
        gate: Any = getattr(mlp, "gate_proj", None)
        up: Any = getattr(mlp, "up_proj", None)
        down: Any = getattr(mlp, "down_proj", None)
        if not all(isinstance(layer, nn.Linear) and layer.weight.dtype in _DTYPES[:3] for layer in (gate, up, down)):
            raise TypeError(
                f"SmoothSwiGLU.from_module: mlp is {type(mlp).__name__}, expected linear layers gate_proj, up_proj and "
                "down_proj with floating weights"
            )
        probe = torch.linspace(-4, 4, 9)
        if not torch.equal(getattr(mlp, "act_fn", F.silu)(probe), F.silu(probe)):
            raise ValueError(f"SmoothSwiGLU.from_module: act_fn is {mlp.act_fn}, expected SiLU")
        new = cls(1, 1, recipe=recipe, gradient_format=gradient_format, device="meta")
        new.gate_proj = FP8Linear.from_module(gate, recipe=recipe)
        new.up_proj = FP8Linear.from_module(up, recipe=recipe)
        new.down_proj = down
        return new.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        h, channel_scale = smooth_swiglu(self.gate_proj(x), self.up_proj(x))
        return smooth_linear(h, channel_scale, self.down_proj.weight, self.down_proj.bias, self.gradient_format)


def smooth_linear(
    h: Tensor, channel_scale: Tensor, weight: Tensor, bias: Tensor | None = None, gradient_format: str = "e5m2"
) -> Tensor:
    """h [*N, C] W [D, C]^T + bias in FP8, with channels of h brought to one size and columns of W to their inverse.

    y = Q4(s h) Q4(W / s)^T + b,    dh = s Q5(dy) Q4(W / s),    dW = Q5(dy)^T Q4(s h) / s,    db = sum dy
    """
    rows = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    y, _ = _SmoothLinear.apply(rows, channel_scale, weight, bias, gradient_format)
    return y.reshape(*h.shape[:-1], weight.shape[0])


class _SmoothLinear(torch.autograd.Function):
    """Returns y and the codes of s h, which it keeps. In the backward products s is part of the scales of rows."""

    @staticmethod
    def forward(
        h: Tensor, channel_scale: Tensor, weight: Tensor, bias: Tensor | None, gradient_format: str
    ) -> tuple[Tensor, Tensor]:
        codes, scale = encode_smooth_fp8(h, channel_scale)
        return matmul_fp8(codes, scale, *encode_fp8(weight / channel_scale), bias, dtype=h.dtype), codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, channel_scale, weight, bias, ctx.format = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(channel_scale, weight, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        channel_scale, weight, codes = ctx.saved_tensors
        dh = dweight = dbias = None
        g, g_scale = encode_fp8(dy, format=ctx.format)
        if ctx.needs_input_grad[0]:
            w, w_scale = encode_fp8(weight / channel_scale)
            scales = (w_scale * channel_scale)[:, None]
            dh = matmul_fp8(g, g_scale, w.mT, scales, a_format=ctx.format, dtype=dy.dtype)
        if ctx.needs_input_grad[2]:
            scales = (1 / PEAK["e4m3"] / channel_scale)[:, None]
            dweight = matmul_fp8(g.mT, g_scale, codes.mT, scales, a_format=ctx.format, dtype=weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dh, None, dweight, dbias, None


class _SmoothSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        h, amax = gate.new_empty(gate.shape), gate.new_zeros(gate.shape[-1])
        for g, u, out in zip(_chunks(gate), _chunks(up), _chunks(h), strict=True):
            torch.mul(F.silu(g.to(_wide(gate))), u.to(_wide(gate)), out=out)
            amax = torch.maximum(amax, out.abs().amax(0))
        return h, smooth_scale(amax.to(_wide(gate)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dh: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return swiglu_gradients(dh, gate, up)
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        for *inputs, dg, du in zip(*map(_chunks, (dh, gate, up, dgate, dup)), strict=True):
            d, g, u = (x.to(_wide(gate)) for x in inputs)
            torch.ops.aten.silu_backward(d * u, g, grad_input=dg)
            torch.mul(F.silu(g), d, out=du)
        return dgate, dup

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return batched(_SmoothSwiGLU.apply, info.batch_size, in_dims, inputs)


def swiglu_gradients(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in differentiable operations."""
    dh, g, u = (x.to(_wide(gate)) for x in (dh, gate, up))
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    dgate = dh * u * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(gate.dtype), (dh * silu).to(up.dtype)


def batched(apply: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> Any:
    """The op under vmap: each member of the batch has scales of its own, so they are taken one by one."""
    each = [
        apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """x [*N, C] as pieces [rows, C]: on a CPU of a size for its cache, else in one piece; none without elements."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not rows.numel():
        return ()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(1, _CHUNK * torch.get_num_threads() // x.shape[-1]))


_CHUNK = 1 << 16  # elements a thread: five pieces of a quarter megabyte in float32


def _supports(gate: Tensor, up: Tensor) -> str | None:
    return "float64: the kernel computes in float32" if gate.dtype == torch.float64 else None


def _elements(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]) * sizes["C"]


def _power(value: Tensor) -> Tensor:
    return torch.exp2(value.round()) * value.sign()


PEAK = {"e4m3": 2.0**8, "e5m2": 2.0**15}  # the largest power of two that the format holds
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASES = (
    Case("one", {"*N": (1,), "C": 1}),
    Case("no rows", {"*N": (0,), "C": 8}),
    Case("no rows of several axes", {"*N": (3, 0), "C": 8}),
    Case("no channels", {"*N": (3,), "C": 0}),
    Case("one row, no axis", {"*N": (), "C": 17}),
    Case("one channel", {"*N": (67,), "C": 1}),
    Case("primes", {"*N": (37,), "C": 67}),
    Case("several axes", {"*N": (2, 3, 5), "C": 33}),
    Case("a block", {"*N": (64,), "C": 128}),
    Case("one past a block", {"*N": (65,), "C": 129}),
    Case("many rows", {"*N": (1031,), "C": 16}),
    Case("several pieces", {"*N": (513,), "C": 130}),
    Case("transposed", {"*N": (3, 5), "C": 33}, layout="transposed"),
    Case("strided", {"*N": (7, 5), "C": 65}, layout="strided"),
    Case("large gates", {"*N": (29,), "C": 65}, gain={"gate": 50.0}),
    Case("small values", {"*N": (29,), "C": 65}, gain={"gate": 1e-2, "up": 1e-2}),
    Case("large up", {"*N": (29,), "C": 65}, gain={"up": 1e3}),
    Case("powers of two", {"*N": (5,), "C": 33}, draw={"gate": lambda value: torch.full_like(value, 64), "up": _power}),
    Case("language model", {"*N": (4096,), "C": 14336}, large=True),
    Case("long and odd", {"*N": (100003,), "C": 1025}, large=True),
)
_BENCH = (
    Case("1024 x 2816", {"*N": (1024,), "C": 2816}),
    Case("256 x 14336", {"*N": (256,), "C": 14336}),
    Case("8k x 14336", {"*N": (8192,), "C": 14336}, large=True),
    Case("16k x 8192", {"*N": (16384,), "C": 8192}, large=True),
)

SMOOTH_SWIGLU = register(
    Op(
        name="smooth_swiglu",
        area="quant",
        summary="SwiGLU with a power-of-two scale for each channel, so that one outlier does not cost FP8 the others",
        paper="https://arxiv.org/abs/2409.12517",
        shapes="gate [*N, C], up [*N, C] -> h [*N, C], channel_scale [C]",
        function=smooth_swiglu,
        reference=smooth_swiglu_reference,
        torch=smooth_swiglu_torch,
        triton="effkit.kernels.fp8_swiglu:smooth_swiglu",
        supports=_supports,
        cases=_CASES,
        bench=_BENCH,
        grads=("gate", "up"),
        flops=lambda case: 6 * _elements(case),  # sigmoid counted as one
        traffic=lambda case: 3 * _elements(case),
        rivals={
            "eager": "effkit.rivals:smooth_swiglu_eager",
            "compiled": "effkit.rivals:smooth_swiglu_compiled",
        },
    )
)

ENCODE_SMOOTH_FP8 = register(
    Op(
        name="encode_smooth_fp8",
        area="quant",
        summary="FP8 codes of a tensor whose channels a power of two each has brought to the same size",
        paper="https://arxiv.org/abs/2409.12517",
        shapes="h [*N, C], channel_scale [C] -> codes [*N, C], scale []",
        function=encode_smooth_fp8,
        reference=encode_smooth_fp8_reference,
        torch=encode_smooth_fp8_torch,
        triton="effkit.kernels.fp8_swiglu:encode_smooth_fp8",
        exact=True,
        cases=(
            Case("one", {"*N": (1,), "C": 1}),
            Case("no rows", {"*N": (0,), "C": 8}),
            Case("no channels", {"*N": (3,), "C": 0}),
            Case("one row, no axis", {"*N": (), "C": 17}),
            Case("primes", {"*N": (37,), "C": 67}),
            Case("one past a block", {"*N": (17,), "C": 65}),
            Case("several axes, e5m2", {"*N": (2, 3, 5), "C": 33}, {"format": "e5m2"}),
            Case("transposed", {"*N": (3, 5), "C": 33}, layout="transposed"),
            Case("strided", {"*N": (7, 5), "C": 65}, layout="strided"),
            Case("saturated", {"*N": (9,), "C": 65}, gain={"h": 1e3}),
            Case("subnormal codes", {"*N": (9,), "C": 65}, gain={"h": 1e-4}),
            Case("subnormal codes, e5m2", {"*N": (9,), "C": 65}, {"format": "e5m2"}, gain={"h": 1e-7}),
            Case("language model", {"*N": (4096,), "C": 14336}, large=True),
        ),
        bench=_BENCH,
        grads=(),
        flops=lambda case: 2 * _elements(case),
        traffic=lambda case: _elements(case),
        other_bytes=lambda case: _elements(case) + 4 * case.sizes["C"],  # type: ignore[operator]
        draw={"channel_scale": lambda value: torch.exp2((3 * value).round()).float()},
        rivals={
            "eager": "effkit.rivals:encode_smooth_fp8_eager",
            "compiled": "effkit.rivals:encode_smooth_fp8_compiled",
        },
    )
)
