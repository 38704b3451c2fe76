"""Dynamic tanh: an elementwise stand-in for LayerNorm and RMSNorm that needs no statistics of a row.

    y = weight * tanh(alpha * x) + bias        Zhu et al., arXiv 2503.10622, section 4; alpha one learnable scalar

Cost: about four operations an element, one read of x and one write of y; the backward reads x and dy, writes dx, and
saves nothing but x. A norm must see a whole row before it writes one, DyT need not.

When not to use it: it is an architecture to train with, not a drop-in for a trained model. Swapped into one, it changes
every activation; the model is of no use until it has been trained further. Known to lose:
* Language models need alpha0 tuned by width, larger before attention than elsewhere. The authors' LLaMA runs use 7B
  0.8/0.2, 13B 0.6/0.15, 34B and 70B 0.2/0.05 (attention/other), and scale the embedding by a learnable scalar that
  starts at sqrt(C); `DyTConfig` sets the former, the latter is left to the model.
* The paper itself finds that it does not replace BatchNorm in ResNet-50 and VGG19.
* nanochat (dev/LOG.md, 2026-05-05) found no variant that beat its RMSNorm baseline, at about 10 % fewer tokens/s.
* arXiv 2604.23434 trains GPT-2 models: it helps where data is scarce and hurts, by up to 28 % in loss, where it is not.
* A compiler that fuses norms takes away most of the speed argument: measure before believing it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.change import ChangeConfig, Edit, PutBack, no_match, set_module
from effkit.ops import Case, Op, register


def dynamic_tanh_reference(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The equation."""
    y = torch.tanh(alpha * x)
    if weight is not None:
        y = weight * y
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def dynamic_tanh_torch(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The equation a few rows at a time, saving x only; under torch.compile as written, which then fuses it."""
    if torch.compiler.is_compiling():
        return dynamic_tanh_reference(x, alpha, weight, bias)
    return _DynamicTanh.apply(x, alpha, weight, bias)


def dynamic_tanh(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """An elementwise replacement for a norm.

        y = weight * tanh(alpha * x) + bias        arXiv 2503.10622

    x [*N, C]     float16, bfloat16, float32 or float64, any strides
    alpha []      the scalar inside tanh, shape [] or [1]
    weight [C]    gain, 1 where absent
    bias [C]      offset, 0 where absent; the parameters may be of another float dtype than x
    backend       "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, C] in x's dtype. NaN stays NaN, infinities give weight * (+-1) + bias. Gradients come in the dtype of
    each parameter, summed in float32 (float64 for float64); they can be differentiated again, in torch operations.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    if isinstance(alpha, Tensor) and alpha.shape == (1,):
        alpha = alpha.reshape(())
    DYNAMIC_TANH.check(x=x, alpha=alpha, weight=weight, bias=bias)
    for name, tensor in (("x", x), ("alpha", alpha), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            choices = ", ".join(map(str, _DTYPES))
            raise TypeError(f"dynamic_tanh: {name} has dtype {tensor.dtype}, choices: {choices}")
        if tensor.device != x.device:
            raise ValueError(f"dynamic_tanh: {name} is on {tensor.device}, expected {x.device} as x")
    return DYNAMIC_TANH.run(backend, x=x, alpha=alpha, weight=weight, bias=bias)


class DyT(nn.Module):
    """y = weight * tanh(alpha * x) + bias over the last axis (arXiv 2503.10622).

    channels   length of the last axis
    alpha0     what alpha starts from
    weight     whether there is a gain [channels], starting from 1
    bias       whether there is an offset [channels], starting from 0

    alpha has shape [1], as in the authors' checkpoints: fully_shard refuses parameters without an axis.
    """

    def __init__(
        self,
        channels: int,
        alpha0: float = 0.5,
        *,
        weight: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"DyT: channels is {channels!r}, expected at least 1")
        self.channels, self.alpha0 = channels, _checked_alpha0(alpha0)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if weight else None
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_module(
        cls,
        old: nn.Module,
        alpha0: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DyT:
        """A DyT with gain, offset, device, dtype and mode of a norm over the last axis; alpha starts from alpha0.

        It has a weight or a bias only where the norm has one. device and dtype are for norms without parameters.
        """
        weight: Any = getattr(old, "weight", None)
        bias: Any = getattr(old, "bias", None)
        shape = tuple(getattr(old, "normalized_shape", ()) if weight is None else weight.shape)
        if len(shape) != 1:
            raise ValueError(f"DyT.from_module: {old} normalises over shape {list(shape)}, expected one axis [C]")
        if weight is not None:
            device, dtype = weight.device, weight.dtype
        new = cls(shape[0], alpha0, weight=weight is not None, bias=bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            if new.weight is not None:
                new.weight.copy_(_gain(old)).requires_grad_(weight.requires_grad)
            if new.bias is not None:
                new.bias.copy_(bias).requires_grad_(bias.requires_grad)
        return new.train(old.training)

    def reset_parameters(self) -> None:
        """alpha = alpha0, weight = 1, bias = 0."""
        nn.init.constant_(self.alpha, self.alpha0)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_tanh(x, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, alpha0={self.alpha0}, weight={self.weight is not None}, bias={self.bias is not None}"


@dataclass(frozen=True)
class DyTConfig(ChangeConfig):
    """Puts DyT in the place of a model's norms: `effkit.apply(model, DyTConfig())`.

    Replaced are nn.LayerNorm and every class whose name ends with "RMSNorm" and that has a `weight`; device, dtype and
    gains stay, gains stored as an offset from 1 (Gemma, Qwen3-Next) become plain ones.

    alpha0           what every alpha starts from, or a pair: norms in front of attention, all others. The authors'
                     LLaMA values are (0.8, 0.2) for 7B, (0.6, 0.15) for 13B, (0.2, 0.05) for 34B and 70B
    target           parts of module names, e.g. ("input_layernorm", "layers.0."): only norms whose name has one of
                     them are replaced; None for all
    query_key_norms  also replace the norms of queries, keys and values inside attention, whose job is to bound the
                     scores; with a pair they take the first value

    The last part of a norm's name tells where it stands. In front of attention: it speaks of attention and does not
    start with "post" (self_attn_layer_norm, attention_norm), or is one of input_layernorm, ln_1, norm1, layer_norm1,
    layernorm_before and their spellings. Inside: it starts with q_, k_, v_, kv_, qk_, query_, key_ or value_. Names are
    all it knows: for models that normalise after the residual sum (BERT, BART) one alpha0 is the better choice.
    """

    alpha0: float | tuple[float, float] = 0.5
    target: tuple[str, ...] | None = None
    query_key_norms: bool = False
    handler: ClassVar[str] = "effkit.norm.dyt:replace_norms"

    def __post_init__(self) -> None:
        if isinstance(self.alpha0, tuple) and len(self.alpha0) != 2:
            raise ValueError(f"alpha0 is {self.alpha0!r}, expected a number or a pair (attention, other)")
        for value in self.alpha0 if isinstance(self.alpha0, tuple) else (self.alpha0,):
            _checked_alpha0(value)
        if self.target is not None and not (
            isinstance(self.target, tuple) and self.target and all(isinstance(part, str) for part in self.target)
        ):
            raise TypeError(f"target is {self.target!r}, expected a tuple of parts of module names, or None")

    def takes(self, name: str) -> bool:
        """Whether the norm of this name is to be replaced."""
        wanted = self.target is None or any(part in name for part in self.target)
        return wanted and (self.query_key_norms or _place(name) != "inside")

    def alpha0_of(self, name: str) -> float:
        """What the alpha of the norm of this name starts from."""
        if not isinstance(self.alpha0, tuple):
            return self.alpha0
        return self.alpha0[_place(name) == "other"]


def replace_norms(model: nn.Module, config: DyTConfig, data: object = None) -> Edit:
    """The handler of DyTConfig."""
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    norms = {name: module for name, module in named.items() if _is_norm(module)}
    old = {name: module for name, module in norms.items() if config.takes(name)}
    if not old:
        available = norms or {type(module).__name__: module for module in named.values()}
        raise no_match("DyTConfig", config.target or ("LayerNorm", "RMSNorm"), available)
    like = next(model.parameters(), torch.empty(0))
    new: dict[nn.Module, DyT] = {}  # by the norm it replaces, so that one used under two names stays one
    for name, module in old.items():
        if module not in new:
            new[module] = DyT.from_module(module, config.alpha0_of(name), device=like.device, dtype=like.dtype)
    for name, module in old.items():
        set_module(model, name, new[module])

    notes = {"norms kept": [name for name in norms if name not in old]}
    return Edit(list(old), PutBack(model, old), notes=notes)


class _DynamicTanh(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y, wide = x.new_empty(x.shape), _wide(x)
        alpha = alpha.to(wide)
        for rows, out in zip(_chunks(x), _chunks(y), strict=True):
            t = _tanh_of_half(rows.to(wide) * (2 * alpha), half=x.dtype.itemsize == 2)
            if weight is not None:
                t.mul_(weight)
            if bias is not None:
                t.add_(bias)
            out.copy_(t)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(_sums_by_chunk, dy, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_DynamicTanh.apply, info.batch_size, in_dims, inputs)


def gradients(
    fast: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, alpha, weight and bias, each in its own dtype, from `fast`: dx and [3, C] sums over the rows.

    The sums are those of dalpha (still to be summed over channels), dweight and dbias. Where the gradient will itself
    be differentiated, the formula takes the place of `fast`.
    """
    dx, sums = (_sums_by_formula if torch.is_grad_enabled() else fast)(dy, x, alpha, weight)
    dalpha, dweight, dbias = sums.unbind()
    return (
        dx,
        dalpha.sum().to(alpha.dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


def batched(
    apply: Callable[..., Tensor], size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Tensor, int]:
    """The op under vmap: a batch of x alone is one more leading axis; batched parameters are taken one by one."""
    if all(dim is None for dim in in_dims[1:]):
        return apply(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), 0
    each = [
        apply(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    return torch.stack(each), 0


def _sums_by_formula(dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx and the three sums over rows in differentiable operations."""
    wide = _wide(x)
    wide_x, wide_alpha, wide_dy = x.to(wide), alpha.to(wide), dy.to(wide)
    t = torch.tanh(wide_alpha * wide_x)
    through = (wide_dy if weight is None else wide_dy * weight.to(wide)) * (1 - t * t)
    terms = torch.stack((through * wide_x, wide_dy * t, wide_dy))
    return (wide_alpha * through).to(x.dtype), terms.flatten(1, -2).sum(1) if x.ndim > 1 else terms


def _sums_by_chunk(dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time, so that the temporaries stay in the processor's cache."""
    dx, sums = x.new_empty(x.shape), x.new_zeros(3, x.shape[-1], dtype=_wide(x))
    alpha, weight = alpha.to(sums.dtype), None if weight is None else weight.to(sums.dtype)
    for rows, d_rows, out in zip(_chunks(x), _chunks(dy), _chunks(dx), strict=True):
        rows = rows.to(sums.dtype)
        t = _tanh_of_half(rows * (2 * alpha), half=x.dtype.itemsize == 2)
        g = d_rows.to(sums.dtype, copy=True)
        sums[2] += g.sum(0)
        sums[1] += (g * t).sum(0)
        if weight is not None:
            g.mul_(weight)
        torch.ops.aten.tanh_backward.grad_input(g, t, grad_input=t)  # g * (1 - t^2)
        sums[0] += torch.mul(t, rows, out=g).sum(0)
        torch.mul(t, alpha, out=out)
    return dx, sums


def _tanh_of_half(z: Tensor, half: bool) -> Tensor:
    """tanh(z / 2) of a temporary in float32 or float64, which it uses up.

    On a CPU torch.tanh costs more than all the rest of DyT. expm1 is cheaper and as exact; sigmoid is cheaper still,
    but cancels near 0. There tanh z = z to half precision, so that values below 1/64 go past it.
    """
    if z.device.type != "cpu":
        return z.div_(2).tanh_()
    if half:
        large = F.hardshrink(z.clamp_(-40, 40), 1 / 32)
        small = z.sub_(large)
        return torch.sigmoid_(large).sub_(0.5).add_(small, alpha=0.25).mul_(2)
    e = z.clamp_(max=80).expm1_()  # finite up to 88
    return e.div_(e + 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """x [*N, C] as pieces [rows, C]: on a CPU of a size for its cache, elsewhere in one piece."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    size = max(1, _CHUNK * torch.get_num_threads() // max(1, x.shape[-1])) if x.device.type == "cpu" else len(rows)
    return rows.split(max(1, size))


_CHUNK = 1 << 17  # elements a thread; half a megabyte of float32


def _gain(norm: nn.Module) -> Tensor:
    """The factor that a norm multiplies with. Some RMSNorms store it as an offset from 1: the norm itself is asked.

    A row of ones has the norm 1, so that it comes out as the factor.
    """
    weight: Any = norm.weight
    if type(norm) is nn.LayerNorm:
        return weight
    factor = norm.forward(torch.ones_like(weight).expand(1, 1, -1)).flatten()
    offset = float((factor.float() - weight.float()).median())
    if not min(abs(offset), abs(offset - 1)) < 0.25:
        raise ValueError(
            f"DyT.from_module: {type(norm).__name__} turns a row of ones into its weight plus {offset:.3g}, "
            "expected plus 0 or 1: it is not an RMSNorm with a gain"
        )
    return weight + round(offset)


def _is_norm(module: nn.Module) -> bool:
    # Subclasses of nn.LayerNorm are left out: many of them normalise over another axis.
    return type(module) is nn.LayerNorm or (type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"))


def _place(name: str) -> str:
    """Where a norm stands by its name: "attention" (in front of it), "inside" attention, or "other"."""
    last = name.rpartition(".")[2]
    if _INSIDE.fullmatch(last):
        return "inside"
    return "attention" if _ATTENTION.fullmatch(last) else "other"


_INSIDE = re.compile(r"(q|k|v|kv|qk|query|key|value)_.*")
_ATTENTION = re.compile(
    r"(?!post).*att(n|ention).*|input_(layer_?)?norm|(layer_?|rms_?)?(ln|norm)_?1|layer_?norm_before"
)


def _checked_alpha0(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"alpha0 is {value!r}, expected a number")
    if not 0 < value < math.inf:
        raise ValueError(f"alpha0 is {value!r}, expected a finite number above 0")
    return float(value)


def _supports(**tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} has dtype torch.float64, the kernel computes in float32"
    return None


def _elements(case: Case) -> int:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]) * sizes["C"]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AFFINE = ("weight", "bias")
_CASES = (
    Case("one", {"*N": (1,), "C": 1}, given=_AFFINE),
    Case("no rows", {"*N": (0,), "C": 8}, given=_AFFINE),
    Case("no rows of several axes", {"*N": (3, 0), "C": 8}, given=_AFFINE),
    Case("no channels", {"*N": (3,), "C": 0}, given=_AFFINE),
    Case("one row, no axis", {"*N": (), "C": 17}, given=_AFFINE),
    Case("one channel", {"*N": (67,), "C": 1}, given=_AFFINE),
    Case("primes", {"*N": (37,), "C": 67}, given=_AFFINE),
    Case("several axes", {"*N": (2, 3, 5), "C": 33}, given=_AFFINE),
    Case("bare", {"*N": (2, 19), "C": 65}),
    Case("no bias", {"*N": (31,), "C": 127}, given=("weight",)),
    Case("no weight", {"*N": (31,), "C": 127}, given=("bias",)),
    Case("a block", {"*N": (64,), "C": 1024}, given=_AFFINE),
    Case("one past a block", {"*N": (33,), "C": 1025}, given=_AFFINE),
    Case("one past two blocks", {"*N": (65,), "C": 2049}, given=_AFFINE),
    Case("one short of a block", {"*N": (15,), "C": 1023}, given=("weight",)),
    Case("many rows", {"*N": (1031,), "C": 16}, given=_AFFINE),
    Case("transposed", {"*N": (3, 5), "C": 33}, given=_AFFINE, layout="transposed"),
    Case("transposed rows", {"*N": (3, 5, 7), "C": 33}, given=_AFFINE, layout="transposed"),
    Case("transposed rows of one batch", {"*N": (1, 5, 7), "C": 33}, given=_AFFINE, layout="transposed"),
    Case("strided", {"*N": (7, 5), "C": 65}, given=_AFFINE, layout="strided"),
    Case("saturated", {"*N": (29,), "C": 65}, given=_AFFINE, gain={"x": 50.0}),
    Case("all but linear", {"*N": (29,), "C": 65}, given=_AFFINE, gain={"x": 1e-3}),
    Case("around the bend", {"*N": (29,), "C": 65}, given=_AFFINE, gain={"alpha": 4.0}),
    Case("negative alpha", {"*N": (29,), "C": 65}, given=_AFFINE, gain={"alpha": -2.0}),
    Case("large parameters", {"*N": (29,), "C": 65}, given=_AFFINE, gain={"weight": 30.0, "bias": 30.0}),
    Case("language model", {"*N": (8192,), "C": 4096}, given=_AFFINE, large=True),
    Case("long and odd", {"*N": (100003,), "C": 1025}, given=_AFFINE, large=True),
)
_BENCH = (
    Case("4096 x 1024", {"*N": (4096,), "C": 1024}, given=_AFFINE),
    Case("512 x 4096", {"*N": (512,), "C": 4096}, given=_AFFINE),
    Case("8k x 4096", {"*N": (8192,), "C": 4096}, given=_AFFINE, large=True),
    Case("16k x 8192", {"*N": (16384,), "C": 8192}, given=_AFFINE, large=True),
    Case("64k x 1024", {"*N": (65536,), "C": 1024}, given=_AFFINE, large=True),
)

DYNAMIC_TANH = register(
    Op(
        name="dynamic_tanh",
        area="norm",
        summary="tanh with a learnable scale in the place of a norm (DyT)",
        paper="https://arxiv.org/abs/2503.10622",
        shapes="x [*N, C], alpha [], weight [C]?, bias [C]? -> y [*N, C]",
        function=dynamic_tanh,
        reference=dynamic_tanh_reference,
        torch=dynamic_tanh_torch,
        triton="effkit.kernels.dyt:dynamic_tanh",
        supports=_supports,
        cases=_CASES,
        bench=_BENCH,
        grads=("x", "alpha", "weight", "bias"),
        flops=lambda case: 4 * _elements(case),  # tanh counted as one
        traffic=lambda case: 2 * _elements(case),
        draw={"alpha": lambda value: 0.5 + 0.25 * value.sigmoid()},
        rivals={
            "eager": "effkit.rivals:dyt_eager",
            "compiled": "effkit.rivals:dyt_compiled",
            "liger": "effkit.rivals:dyt_liger",
        },
    )
)
