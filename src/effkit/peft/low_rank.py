"""LoRA: a trained product of two thin matrices beside a frozen layer.

    y = base(x) + scale * (x_d A^T) B^T        A [R, K], B [M, R], x_d dropout of x        Hu et al., arXiv 2106.09685

scale is alpha / R, or alpha / sqrt(R) (arXiv 2312.03732), which keeps the update's size as R grows. With B = 0, where
training starts, the layer is the base bit for bit.

Cost: 2 T R (K + M) operations beside the 2 T K M of the base, a share of R (1/K + 1/M): under one per cent at R = 16
and 4096 x 4096. What costs is memory traffic, so nothing of the size of x or y is made but y: the product is added in
place (forward), its gradient is where the base's is added (backward), factors are rounded to the dtype of x and never
x to theirs. Saved for the backward pass: x and S = x_d A^T [T, R]; without x where A is frozen (LoRA-FA, arXiv
2308.03303). Dropout keeps no mask, it computes it again.

    dS = scale * dy B    dB = dy^T S    dA = dS^T x_d    dx = dy W + keep * (dS A) / (1 - p)

When not to use it: a rank of several hundred costs as much as it saves; for one adapter and no training, merge it. A
change that is not of low rank (new knowledge from much text) is learnt worse than by training all of the weights.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.ops import Case, Op, register
from effkit.peft._arguments import checked
from effkit.peft._dropout import dropped_reference, keep_pieces, keep_probability

Backward = TypeVar("Backward", bound=Callable[..., Any])


def lora_linear_reference(
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
    """The equation."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    down = dropped_reference(x, seed, dropout) @ a.T
    return base_of(x, weight, bias, base) + (scale * down).to(x.dtype) @ b.T


def lora_linear_torch(
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
    """The same with sums in place, saving x and S only; under torch.compile as written, which then fuses it."""
    if torch.compiler.is_compiling():
        return lora_linear_reference(x, a, b, scale, weight, bias, base, seed, dropout=dropout)
    inputs = (x, a, b, scale, weight, bias, base, seed if dropout else None, dropout)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _LoRALinear.forward(*inputs)[0]  # a Function takes longer than a small layer, as in decoding
    return _LoRALinear.apply(*inputs)[0]


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
    backend: str | None = None,
) -> Tensor:
    """A linear layer, or the result of any layer, plus a product of two thin matrices.

        y = x W^T + bias + scale * (x_d a^T) b^T        arXiv 2106.09685, equation 3
        y = base + scale * (x_d a^T) b^T

    x [*N, K]        float16, bfloat16, float32 or float64, any strides
    a [R, K]         lora_A, any float dtype: float32 beside an x in half precision is a master copy
    b [M, R]         lora_B, any float dtype
    scale []         alpha / R, a factor without a gradient; a tensor, so that compiled code takes any value
    weight [M, K]    a dense base's weight; it gets a gradient if it asks for one
    bias [M]         with weight
    base [*N, M]     or the result of the base, whatever that is (a quantised layer, another adapter's result)
    seed []          int32 or int64, where there is dropout: the mask is a function of seed, row and column
    dropout          probability of dropping an element of x on its way to a; the base sees all of x
    backend          "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast. All tensors are rounded to that dtype for the products,
    which sum in float32 (float64 for float64); gradients come in each tensor's own dtype. With b = 0, scale = 0 or
    R = 0 the result is the base bit for bit. Second derivatives: backend="reference". Raises ValueError or TypeError
    for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    tensors: dict[str, Tensor | None] = dict(x=x, a=a, b=b, scale=scale, weight=weight, bias=bias, base=base, seed=seed)
    return LORA_LINEAR.run(backend, **checked(LORA_LINEAR, tensors, dropout), dropout=dropout)


def base_of(x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None) -> Tensor:
    """What stands beside an adapter, in the dtype of x: base where given, else the dense layer's result."""
    if base is not None:
        return base.to(x.dtype)
    if weight is None:
        raise ValueError("weight and base are both None")
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def outside_autocast(backward: Backward) -> Backward:
    """A Function's backward whose products are in the dtypes of its tensors, as the forward pass has chosen them."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        kind = next((dy.device.type for dy in gradients if dy is not None), "cpu")
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return backward(ctx, *gradients)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *gradients)

    return cast(Backward, run)


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
        return added(x, down_product(rows_of(x), a.to(x.dtype), scale, seed, dropout), b, weight, bias, base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep_for_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return gradients(up_gradients, down_gradients, ctx, dy)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        return batched_pair(_LoRALinear.apply, info.batch_size, in_dims, inputs)


# torch asks for it in every call, and would find it out each time.
_LoRALinear.forward.__signature__ = inspect.signature(_LoRALinear.forward)  # type: ignore[attr-defined]


def added(
    x: Tensor, down: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [*N, M], the base with down b^T added, in place where the base was computed here; and down as [*N, R]."""
    up, stars = b.to(x.dtype).T, x.shape[:-1]
    if base is None:
        y = base_of(rows_of(x), weight, bias, None).addmm_(down, up)
    else:
        y = torch.addmm(rows_of(base_of(x, None, None, base)), down, up)
    return with_axes(y, stars), with_axes(down, stars)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves what the gradients asked for need: x only for a (or weight), the product with a only for b."""
    x, a, b, scale, weight, bias, base, seed, ctx.dropout = inputs
    of_x, of_a, of_b, _, of_weight, *_ = ctx.needs_input_grad
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if of_a or of_weight else None,
        a if of_x else None,
        b if of_x or of_a else None,
        scale,
        weight if of_x else None,
        output[1] if of_b else None,
        seed,
    )
    ctx.stars = x.shape[:-1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (a, b, weight, bias, base)]


def gradients(of_up: Callable[..., Any], of_down: Callable[..., Any], ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """The gradients in the places of the nine arguments, those nobody asks for left out.

    of_up and of_down compute those of the two thin products: see `up_gradients` and `down_gradients`.
    """
    if dy is None:  # y has no part in what is differentiated
        return (None,) * 9
    x, a, b, scale, weight, down, seed = ctx.saved_tensors
    of_x, of_a, of_b, _, of_weight, of_bias, of_base, *_ = ctx.needs_input_grad
    a_dtype, b_dtype, weight_dtype, bias_dtype, base_dtype = ctx.dtypes
    d_rows = rows_of(dy)
    rows: Any = None if x is None else rows_of(x)
    dx: Any = None
    da: Any = None
    d_down, db = of_up(d_rows, None if down is None else rows_of(down), b, scale, ctx.dropout)
    if of_x or of_a:
        dx, da = of_down(rows if of_a else None, d_down, a, seed, ctx.dropout)
    if of_x:
        dx = dx if weight is None else dx.addmm_(d_rows, weight.to(dy.dtype))
    return (
        dx.view(*ctx.stars, dx.shape[-1]) if of_x else None,
        da.to(a_dtype) if of_a else None,
        db.to(b_dtype) if of_b else None,
        None,
        (d_rows.T @ rows).to(weight_dtype) if of_weight else None,
        d_rows.sum(0, dtype=_wide(dy)).to(bias_dtype) if of_bias else None,
        dy.to(base_dtype) if of_base else None,
        None,
        None,
    )


def batched_pair(
    apply: Callable[..., tuple[Tensor, Tensor]], size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The op under vmap. A batch of x alone is one more leading axis, unless that changes what a mask or base means."""
    *_, base, seed, _ = inputs
    if base is None and seed is None and all(dim is None for dim in in_dims[1:]):
        return apply(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), (0, 0)
    each = [
        apply(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0)


def down_product(rows: Tensor, a: Tensor, scale: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """scale * x_d a^T of rows [T, K]. The division by the probability of being kept is done here, on R columns."""
    if seed is None:
        down = rows @ a.T
    else:
        down = rows.new_empty(len(rows), len(a))
        for piece, keep in keep_pieces(len(rows), rows.shape[1], rows.dtype, seed, dropout):
            torch.mm(keep.mul_(rows[piece]), a.T, out=down[piece])
    return down.mul_(factor(scale, rows, dropout))


def up_gradients(
    dy: Tensor, down: Tensor | None, b: Tensor | None, scale: Tensor, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """Of down (before scale and division by the probability) where b is given, and of b where down is."""
    d_down = None if b is None else (dy @ b.to(dy.dtype)).mul_(factor(scale, dy, dropout))
    return d_down, None if down is None else (down.T @ dy).T  # faster than dy.T @ down, which walks dy across its rows


def down_gradients(
    rows: Tensor | None, d_down: Tensor, a: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """Of x, through the adapter alone, where a is given, and of a where rows are."""
    dx = None if a is None else d_down @ a.to(d_down.dtype)
    if seed is None:
        return dx, None if rows is None else d_down.T @ rows
    source: Any = a if rows is None else rows
    K = source.shape[1]
    da = torch.zeros(d_down.shape[1], K, dtype=_wide(d_down), device=d_down.device)
    for piece, keep in keep_pieces(len(d_down), K, d_down.dtype, seed, dropout):
        if dx is not None:
            dx[piece].mul_(keep)
        if rows is not None:
            da = da + d_down[piece].T @ (rows[piece] * keep)
    return dx, None if rows is None else da


def factor(scale: Tensor, like: Tensor, dropout: float) -> Tensor:
    """scale over the probability of being kept, in the dtype of sums."""
    return scale.to(_wide(like)) / keep_probability(dropout)


def rows_of(x: Tensor) -> Tensor:
    """x [*N, K] as [T, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def with_axes(rows: Tensor, stars: torch.Size) -> Tensor:
    """rows [T, C] as [*N, C]: no view for autograd, which lets nobody change a view out of a Function in place."""
    return torch.ops.aten._unsafe_view(rows, (*stars, rows.shape[-1]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def supports(x: Tensor, a: Tensor, **arguments: Any) -> str | None:
    """Why the kernels cannot run, or None."""
    if x.dtype == torch.float64:
        return "x has dtype torch.float64, the kernel computes in float32"
    return f"the kernels hold ranks up to {MAX_RANK}, a has {len(a)}" if len(a) > MAX_RANK else None


MAX_RANK = 128


def _counts(case: Case) -> tuple[int, int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"], sizes["R"]


def _flops(case: Case) -> float:
    T, K, M, R = _counts(case)
    return 2 * T * (R * (K + M) + (K * M if "weight" in case.given else 0))


def _traffic(case: Case) -> float:
    T, K, M, R = _counts(case)
    return T * (K + M) + R * (K + M) + (K * M if "weight" in case.given else T * M)


def any_seed(value: Tensor) -> Tensor:
    """A seed of more than 32 bits from a drawn normal value."""
    return (value * (1 << 40)).to(torch.int64)


def _case(tokens: tuple[int, ...], K: int, M: int, R: int, *given: str, name: str = "", **rest: Any) -> Case:
    """A case with a dense base unless given says base; dropout brings its seed."""
    given = given if "base" in given else ("weight", *given)
    options = {"dropout": rest.pop("dropout")} if "dropout" in rest else {}
    if rest.pop("master", False):  # factors in float32 whatever x is
        rest["draw"] = {"a": Tensor.float, "b": Tensor.float}
    given = (*given, "seed") if options else given
    name = name or f"{' x '.join(map(str, (*tokens, K, M)))}, rank {R}"
    return Case(name, {"*N": tokens, "K": K, "M": M, "R": R}, options, given=given, **rest)


_CASES = (
    _case((1,), 1, 1, 1, "bias", name="one element"),
    _case((0,), 16, 8, 4, "bias", dropout=0.1, name="no token"),
    _case((3,), 0, 5, 2, "bias", dropout=0.1, name="no feature in"),
    _case((3,), 5, 0, 2, name="no feature out"),
    _case((5,), 33, 17, 0, "bias", dropout=0.1, name="rank 0"),
    _case((), 64, 17, 3, "bias", name="no axis of tokens"),
    _case((7, 3), 67, 31, 5, "bias", name="primes"),
    _case((5, 13), 67, 31, 5, "bias", dropout=0.3, name="primes, dropout"),
    _case((9,), 65, 130, 8, "base", name="beside a result"),
    _case((130,), 48, 33, 17, "base", dropout=0.5, name="beside a result, dropout"),
    _case((65,), 128, 129, 16, name="one past a block"),
    _case((64,), 64, 64, 64, dropout=0.1, name="full tiles, dropout"),
    _case((3,), 80, 48, 128, "bias", dropout=0.9, name="largest rank of the kernels, dropout"),
    _case((3, 5), 64, 33, 4, "bias", dropout=0.2, layout="transposed", name="transposed"),
    _case((19,), 40, 24, 6, "base", dropout=0.2, layout="strided", name="strided"),
    _case((300,), 24, 20, 4, dropout=0.1, name="many tokens, dropout"),
    _case((17,), 96, 32, 8, "bias", gain={"x": 100.0}, name="large values"),
    _case((17,), 96, 32, 8, "bias", gain={"b": 0.0}, dropout=0.1, name="where training starts"),
    _case((2048,), 4096, 4096, 16, large=True, name="a layer"),
    _case((2049,), 4096, 11008, 64, "bias", dropout=0.1, large=True, name="a layer, dropout"),
)
_BENCH = (
    _case((512,), 1024, 1024, 16, master=True),
    _case((512,), 1024, 1024, 16, master=True, dropout=0.1, name="512 x 1024 x 1024, rank 16, dropout"),
    _case((2048,), 1024, 1024, 16, master=True),
    _case((2048,), 1024, 1024, 16, master=True, dropout=0.1, name="2048 x 1024 x 1024, rank 16, dropout"),
    _case((512,), 2048, 2048, 16, master=True),
    _case((512,), 4096, 4096, 16, master=True, large=True),
    _case((4096,), 4096, 4096, 16, master=True, large=True),
    _case((4096,), 4096, 4096, 16, master=True, dropout=0.1, large=True, name="4096 x 4096 x 4096, rank 16, dropout"),
    _case((16384,), 4096, 4096, 16, master=True, large=True),
)

LORA_LINEAR = register(
    Op(
        name="lora_linear",
        area="peft",
        summary="linear layer with a trained update of low rank beside its frozen weight (LoRA)",
        paper="https://arxiv.org/abs/2106.09685",
        shapes="x [*N, K], a [R, K], b [M, R], scale [], weight [M, K]?, bias [M]?, base [*N, M]?, seed []? "
        "-> y [*N, M]",
        function=lora_linear,
        reference=lora_linear_reference,
        torch=lora_linear_torch,
        triton="effkit.kernels.low_rank:lora_linear",
        supports=supports,
        cases=_CASES,
        bench=_BENCH,
        rivals={"peft": "effkit.rivals:peft_lora_linear", "dense": "effkit.rivals:linear_without_adapter"},
        draw={"seed": any_seed, "scale": Tensor.float},
        grads=("x", "a", "b", "weight", "bias", "base"),
        frozen=("weight", "bias"),
        flops=_flops,
        traffic=_traffic,
    )
)
