"""VeRA: low-rank adaptation whose projections are random, frozen and shared; two vectors a layer are trained.

    y = W x + bias + lambda_b * (B (lambda_d * (A x)))        Kopiczko et al., arXiv 2310.11454, equation 2

A [R, K_max] and B [M_max, R] are drawn once from a seed. All layers of a model share them: a layer from K to M features
takes the first K columns of A and the first M rows of B. Trained are lambda_d [R] and lambda_b [M]; lambda_b starts
from zero, so that the adapted model starts as the model it was.

Cost: 2 T R (K + M) operations forward and as many for the gradients of x and of lambda, as LoRA of that rank. As A is
frozen, x is needed for no gradient: kept for the backward pass is A x [T, R] alone, R / K of what LoRA keeps.

When not to use it: where speed counts or ranks are small. The usual rank is 256, and its products cost 16 times those
of LoRA at rank 16; what is small is the number of trained values, R + M a layer, and so the file. In the paper quality
is on a par with LoRA at a tenth of its parameters or less; it takes learning rates about ten times as high.
Two configs share projections only if seed, rank and widest layer agree: growing K_max changes every value of A and B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.ops import Case, Op, register
from effkit.peft._arguments import checked
from effkit.peft._dropout import dropped_reference
from effkit.peft.adapter import Adapted, Adapter, AdapterConfig, linear_shape, parameter_dtype
from effkit.peft.lora import new_seed
from effkit.peft.low_rank import (
    added,
    any_seed,
    base_of,
    batched_pair,
    down_gradients,
    down_product,
    outside_autocast,
    rows_of,
    up_gradients,
)
from effkit.peft.low_rank import gradients as lora_gradients
from effkit.peft.matching import USUAL_TARGETS
from effkit.quant.nf4_linear import as_autocast


def vera_linear_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The equation, read from right to left."""
    y = base_of(x, weight, bias, base)
    h = F.linear(dropped_reference(x, seed, dropout), a.to(x.dtype))  # [*N, R]
    u = F.linear((lambda_d * h).to(x.dtype), b.to(x.dtype))  # [*N, M]
    return (y + lambda_b * u if gate is None else y + gate * lambda_b * u).to(x.dtype)


def vera_linear_torch(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """LoRA with both vectors multiplied into its second factor, keeping A x; under torch.compile as written above."""
    if torch.compiler.is_compiling():
        return vera_linear_reference(x, a, b, lambda_d, lambda_b, weight, bias, base, seed, gate, dropout=dropout)
    gate = x.new_ones((), dtype=torch.float32) if gate is None else gate
    y, _ = _VeRALinear.apply(x, a, b, lambda_d, lambda_b, gate, weight, bias, base, seed if dropout else None, dropout)
    return y


def vera_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with frozen random projections beside it, of which two vectors are trained.

        y = x weight^T + bias + gate * lambda_b * (B (lambda_d * (A drop(x))))        arXiv 2310.11454, equation 2

    x [*N, K]       float16, bfloat16, float32 or float64
    a [R, K]        the first projection, any strides; it takes no gradient
    b [M, R]        the second; it takes no gradient
    lambda_d [R]    scales of the inner features
    lambda_b [M]    scales of the outputs; with zeros y is the bare layer's, bit for bit
    weight [M, K]   of a dense layer, in x's dtype
    bias [M]        of a dense layer
    base [*N, M]    in the place of weight and bias: the result of any other layer
    seed []         int32 or int64, of the dropout; the mask is that of `lora_linear`
    gate []         float32, without a gradient: 1 where absent, 0 for the bare layer
    dropout         share of the inputs that A does not see, 0 <= dropout < 1
    backend         "reference", "torch" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast, in which the products are computed; gradients come in the
    dtype of each tensor. Kept for the backward pass are A x [T, R] and what was passed in, of that x only if weight
    asks for a gradient. Second derivatives: backend="reference". Raises ValueError or TypeError for arguments that do
    not fit, BackendUnavailable for a backend that cannot run.
    """
    tensors: dict[str, Tensor | None] = dict(
        x=x, a=a, b=b, lambda_d=lambda_d, lambda_b=lambda_b, weight=weight, bias=bias, base=base, seed=seed, gate=gate
    )
    arguments = checked(VERA_LINEAR, tensors, dropout)
    for name, projection in (("a", a), ("b", b)):
        if projection.requires_grad:
            raise ValueError(
                f"vera_linear: {name} asks for a gradient, but projections are frozen; choices: {name}.detach()"
            )
    return VERA_LINEAR.run(backend, **arguments, dropout=dropout)


class _VeRALinear(torch.autograd.Function):
    """Returns y, and the A x that it keeps, multiplied by the gate."""

    @staticmethod
    def forward(
        x: Tensor,
        a: Tensor,
        b: Tensor,
        lambda_d: Tensor,
        lambda_b: Tensor,
        gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        down = down_product(rows_of(x), a.to(x.dtype), gate, seed, dropout)
        return added(x, down, second_factor(b, lambda_d, lambda_b, x.dtype), weight, bias, base)

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
        return batched_pair(_VeRALinear.apply, info.batch_size, in_dims, inputs)


def second_factor(b: Tensor, lambda_d: Tensor, lambda_b: Tensor, dtype: torch.dtype) -> Tensor:
    """lambda_b[m] b[m, r] lambda_d[r], in float32 or wider: what LoRA calls B, if all scales are in it."""
    wide = torch.promote_types(dtype, torch.float32)
    return lambda_b.to(wide).unsqueeze(1) * b * lambda_d.to(wide)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves arguments, x only for weight, and the product with A; the second factor is made again."""
    x, a, b, lambda_d, lambda_b, gate, weight, bias, base, seed, ctx.dropout = inputs
    of_x, _, _, of_d, of_b, _, of_weight, *_ = ctx.needs_input_grad
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if of_weight else None,
        a if of_x else None,
        b,
        lambda_d,
        lambda_b,
        gate,
        weight if of_x else None,
        output[1] if of_d or of_b else None,
        seed,
    )
    ctx.stars = x.shape[:-1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, base)]


def gradients(of_up: Callable[..., Any], of_down: Callable[..., Any], ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """The gradients in the places of the eleven arguments: LoRA's, and from its second factor those of the vectors."""
    if dy is None:  # y has no part in what is differentiated
        return (None,) * 11
    x, a, b, lambda_d, lambda_b, gate, weight, down, seed = ctx.saved_tensors
    of_x, _, _, of_d, of_b, _, *of_layer, _, _ = ctx.needs_input_grad
    wide = torch.promote_types(dy.dtype, torch.float32)
    factor = second_factor(b, lambda_d, lambda_b, dy.dtype) if of_x else None
    as_lora = SimpleNamespace(
        saved_tensors=(x, a, factor, gate, weight, down, seed),
        needs_input_grad=(of_x, False, of_d or of_b, False, *of_layer, False, False),
        dtypes=(a if a is None else a.dtype, wide, *ctx.dtypes),
        stars=ctx.stars,
        dropout=ctx.dropout,
    )
    dx, _, d_factor, _, dweight, dbias, dbase, *_ = lora_gradients(of_up, of_down, as_lora, dy)
    d_lambda_d = d_lambda_b = None
    if d_factor is not None:
        by_both = (d_factor * b).to(wide)  # [M, R]
        d_lambda_d = (lambda_b.to(wide) @ by_both).to(lambda_d.dtype) if of_d else None
        d_lambda_b = (by_both @ lambda_d.to(wide)).to(lambda_b.dtype) if of_b else None
    return dx, None, None, d_lambda_d, d_lambda_b, None, dweight, dbias, dbase, None, None


class Projections(nn.Module):
    """The frozen pair that the VeRA layers of a model share: vera_A [R, K_max] and vera_B [M_max, R], from a key.

    rank            R
    in_features     K_max, of the widest layer
    out_features    M_max
    key             seed of the draw: A, then B, from one generator of the CPU, so that every machine, and peft, gets
                    the same bits. Both are uniform, within sqrt(6 / K_max) and sqrt(6 / R)

    They are no parameters and in no state dict, since they can be drawn again. They stay in float32 however the model
    is cast; `cast` gives them in the dtype of a product.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(
        self,
        rank: int,
        in_features: int,
        out_features: int,
        key: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.in_features, self.out_features, self.key = rank, in_features, out_features, key
        self._casts: dict[Any, _Cast] = {}
        for name, value in zip(("vera_A", "vera_B"), self._drawn(torch.empty(0, device=device).device), strict=True):
            self.register_buffer(name, value, persistent=False)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """What the values depend on: rank, in_features, out_features, key."""
        return self.rank, self.in_features, self.out_features, self.key

    def check(self, what: str, in_features: int, out_features: int) -> None:
        """ValueError where a layer is larger than the projections."""
        if in_features > self.in_features or out_features > self.out_features:
            raise ValueError(
                f"{what}: a layer from {in_features} to {out_features} features, but the projections are for "
                f"in_features up to {self.in_features} and out_features up to {self.out_features}"
            )

    def cast(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B on this device in this dtype. Copies are kept as long as A and B stay as they are."""
        return self._cast("vera_A", device, dtype), self._cast("vera_B", device, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, key={self.key}"

    def _cast(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        source: Tensor = getattr(self, name)
        # What a compiler or a transform of torch.func traces must not outlive it.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return source.to(device, dtype)
        if source.device == device and source.dtype == dtype:
            return source
        kept = self._casts.get((name, device, dtype))
        if kept is None or kept.source is not source or kept.version != source._version:
            with torch.inference_mode(False):  # a pass with gradients may come later
                kept = _Cast(source.to(device, dtype), source, source._version)
            self._casts[name, device, dtype] = kept
        return kept.value

    @torch.inference_mode(False)
    def _drawn(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and B as the key gives them; without values on the meta device."""
        where = "meta" if device.type == "meta" else "cpu"
        a = torch.empty(self.rank, self.in_features, device=where, dtype=torch.float32)
        b = a.new_empty(self.out_features, self.rank)
        if not a.is_meta:
            generator = torch.Generator().manual_seed(self.key)
            for projection in (a, b):
                nn.init.kaiming_uniform_(projection, generator=generator)
        return a.to(device), b.to(device)

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projections:
        """Moves both, but never casts them; where the model leaves the meta device they are drawn."""
        device = fn(self.vera_A.new_empty(0)).device
        if self.vera_A.is_meta and device.type != "meta":
            self.vera_A, self.vera_B = self._drawn(device)
        else:
            self.vera_A, self.vera_B = self.vera_A.to(device), self.vera_B.to(device)
        self._casts = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}}


class _Cast(NamedTuple):
    """A projection in another dtype, and what it was cast from, with its version at that time."""

    value: Tensor
    source: Tensor
    version: int


class VeRA(Adapter):
    """The two vectors of one linear layer: y + lambda_b * (B (lambda_d * (A drop(x)))), A and B from the projections.

    in_features     K
    out_features    M
    projections     the pair that all layers share, as large as the largest of them
    d_initial       what lambda_d starts from; lambda_b starts from zero
    dropout         share of the inputs left out while training, before A; the layer itself sees all

    vera_lambda_d [R] and vera_lambda_b [M] are the parameters.
    """

    projections: Projections

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        projections: Projections,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        projections.check("VeRA", in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.d_initial, self.dropout, self.projections = d_initial, dropout, projections
        self.vera_lambda_d = nn.Parameter(torch.empty(projections.rank, device=device, dtype=dtype))
        self.vera_lambda_b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lambda_d = d_initial, lambda_b = 0: the layer as it is without the adapter."""
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        x = as_autocast(x)
        dropout = self.dropout if self.training else 0.0
        weight, bias = (layer.dense_form() or (None, None)) if y is None else (None, None)
        base = y if y is not None or weight is not None else layer.base(x)
        a, b = self.projections.cast(x.device, x.dtype)
        return vera_linear(
            x,
            a[:, : self.in_features],
            b[: self.out_features],
            self.vera_lambda_d,
            self.vera_lambda_b,
            weight,
            bias,
            base,
            new_seed(x) if dropout else None,
            self.gate,
            dropout=dropout,
        )

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, scale = (part.to(weight.dtype) for part in self.factors())
        return weight + scale * (b @ a), bias

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        lambda_d, lambda_b = (
            v.to(torch.promote_types(v.dtype, torch.float32)) for v in (self.vera_lambda_d, self.vera_lambda_b)
        )
        a, b = self.projections.cast(lambda_d.device, lambda_d.dtype)
        a, b = a[:, : self.in_features], b[: self.out_features]
        return lambda_d.unsqueeze(1) * a, lambda_b.unsqueeze(1) * b, self.gate

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class VeRAConfig(AdapterConfig):
    """VeRA in a model's linear layers: `effkit.apply(model, VeRAConfig(target_modules=("q_proj", "v_proj")))`.

    rank                  R, the inner width
    d_initial             what lambda_d starts from
    projection_prng_key   the seed that A and B are drawn from; those of peft with the same seed are the same bits
    dropout               share of a layer's inputs left out before A while training
    save_projection       whether adapter files hold A and B besides the seed; those do in any case whose layers alone
                          do not tell how large A and B are
    in_features           K_max, the width that A is drawn with; None is that of the widest target layer. The values of
                          both projections depend on it: give it, and out_features, where models or sets of target
                          layers are to share them
    out_features          M_max, the rows of B

    A second adapter of a model with the same four numbers shares the projections of the first, any other has its own.
    The other fields are those of `AdapterConfig`.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    dropout: float = 0.0
    save_projection: bool = True
    in_features: int | None = None
    out_features: int | None = None
    usual_targets: ClassVar[Mapping[str, tuple[str, ...] | str]] = {**USUAL_TARGETS, "phi": ("q_proj", "v_proj")}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "in_features", "out_features"):
            value = getattr(self, name)
            if not (value is None and name != "rank") and (type(value) is not int or value < 1):
                raise ValueError(f"VeRAConfig: {name} is {value!r}, expected an integer of at least 1")
        if type(self.projection_prng_key) is not int or self.projection_prng_key < 0:
            raise ValueError(
                f"VeRAConfig: projection_prng_key is {self.projection_prng_key!r}, expected an integer of at least 0"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"VeRAConfig: dropout is {self.dropout!r}, expected 0 <= dropout < 1")

    def shared(self, model: nn.Module, layers: dict[str, Any]) -> Projections:
        """The model's projections with these numbers, or new ones."""
        shapes = {path: linear_shape(self, path, layer) for path, layer in layers.items()}
        inputs, outputs = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
        numbers = (self.rank, self.in_features or inputs, self.out_features or outputs, self.projection_prng_key)
        found = (module for module in model.modules() if isinstance(module, Projections) and module.numbers == numbers)
        projections = next(found, None) or Projections(*numbers, device=next(iter(layers.values())).weight.device)
        for path, shape in shapes.items():
            projections.check(f"VeRAConfig: {path}", *shape)
        return projections

    def implied_by(self, parts: list[VeRA]) -> bool:
        """Whether the layers alone tell how large the projections are, as without in_features and out_features."""
        largest = max(part.in_features for part in parts), max(part.out_features for part in parts)
        return all((part.projections.in_features, part.projections.out_features) == largest for part in parts)

    def adapter(self, path: str, layer: Any, shared: Any) -> Adapter:
        return VeRA(
            *linear_shape(self, path, layer),
            projections=shared,
            d_initial=self.d_initial,
            dropout=self.dropout,
            device=layer.weight.device,
            dtype=parameter_dtype(self, layer),
        )


def _sizes(case: Case) -> tuple[int, int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"], sizes["R"]


def _flops(case: Case) -> float:
    T, K, M, R = _sizes(case)
    return 2 * T * R * (K + M) + (2 * T * K * M if "weight" in case.given else 0)


def _traffic(case: Case) -> float:
    T, K, M, R = _sizes(case)
    return T * (K + M) + R * (K + M) + (K * M if "weight" in case.given else T * M)


def _case(name: str, tokens: tuple[int, ...], K: int, M: int, R: int, given: str = "weight bias", **rest: Any) -> Case:
    return Case(name, {"*N": tokens, "K": K, "M": M, "R": R}, given=tuple(given.split()), **rest)


_CASES = (
    _case("one", (1,), 1, 1, 1),
    _case("no token", (0,), 8, 5, 3),
    _case("no rank", (5,), 16, 8, 0),
    _case("no axis of tokens", (), 17, 9, 4),
    _case("primes", (7, 3), 31, 67, 13),
    _case("wide out", (5,), 16, 130, 8, "weight"),
    _case("beside another layer", (2, 19), 33, 48, 16, "base"),
    _case("rank above width", (65,), 24, 40, 65),
    _case("usual rank", (33,), 64, 80, 256),
    _case("off", (9,), 16, 24, 8, "weight bias gate", draw={"gate": lambda value: torch.zeros_like(value).float()}),
    _case("dropout", (37,), 40, 24, 8, "weight bias seed", options={"dropout": 0.25}),
    _case("dropout beside another layer", (3, 5), 33, 24, 8, "base seed gate", options={"dropout": 0.5}),
    _case("small vectors", (15,), 32, 48, 16, gain={"lambda_b": 1e-4, "lambda_d": 0.1}),
    _case("large vectors", (15,), 32, 48, 16, gain={"lambda_b": 30.0}),
    _case("transposed", (3, 5), 33, 20, 8, "base", layout="transposed"),
    _case("strided", (7,), 33, 20, 8, layout="strided"),
    _case("a layer", (2048,), 4096, 4096, 256, large=True),
)
_BENCH = (
    _case("512 tokens, 1024 x 1024", (512,), 1024, 1024, 256, "weight"),
    _case("2048 tokens, 4096 x 4096", (2048,), 4096, 4096, 256, "weight", large=True),
)

VERA_LINEAR = register(
    Op(
        name="vera_linear",
        area="peft",
        summary="linear layer beside frozen random projections, two vectors of which are trained (VeRA)",
        paper="https://arxiv.org/abs/2310.11454",
        shapes=(
            "x [*N, K], a [R, K], b [M, R], lambda_d [R], lambda_b [M], weight [M, K]?, bias [M]?, base [*N, M]?, "
            "seed []?, gate []? -> y [*N, M]"
        ),
        function=vera_linear,
        reference=vera_linear_reference,
        torch=vera_linear_torch,
        cases=_CASES,
        bench=_BENCH,
        grads=("x", "lambda_d", "lambda_b", "weight", "bias", "base"),
        frozen=("weight", "bias"),
        flops=_flops,
        traffic=_traffic,
        draw={"seed": any_seed, "gate": torch.Tensor.float},
        rivals={"peft": "effkit.rivals:peft_vera_linear"},
    )
)
