"""SingLoRA: low-rank adaptation with one matrix instead of two, which grows into the layer over the first steps.

    W = W0 + (alpha / r) u(t) A A^T        u(t) = min(t / T, 1)        Bensaid et al., arXiv 2507.05566

t counts the optimizer's steps. For a layer from K to M features A is [P, R] with P = max(K, M), and the shorter side
takes its first rows: W0 + (alpha / r) u(t) A[:M] A[:K]^T. A starts as noise, u(0) = 0 makes that harmless.

Cost: that of LoRA, of which it is the case with lora_A = A[:K]^T and lora_B = A[:M]; P R trained values instead of
(K + M) R: half as many on square layers, 73 % from 4096 to 11008. No product of A with itself is ever formed.

When not to use it: where the change may need negative eigenvalues. On square layers it is symmetric and positive
semi-definite (negative, with a negative alpha): nothing can be taken away from W0 in any direction, nor rotated. The
claim that training does not depend on the choice of A among all A Q of the same product (Q orthogonal) is exact for
SGD, with momentum or without; Adam's update of each value by its own scale breaks it, as it does for LoRA.
Two factors of different sizes need two learning rates (LoRA+); one matrix has one size.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from effkit.ops import Case, Op, register
from effkit.peft._arguments import checked
from effkit.peft._dropout import dropped_reference
from effkit.peft.adapter import Adapted, Adapter, AdapterConfig, linear_shape, parameter_dtype
from effkit.peft.lora import generator_of, new_seed
from effkit.peft.low_rank import any_seed, base_of, lora_linear_torch, supports


def singlora_linear_reference(
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
    """The equation, with the change of the weight as a matrix."""
    y = base_of(x, weight, bias, base)
    factor = factor.to(x.dtype)
    change = factor[: y.shape[-1]] @ factor[: x.shape[-1]].T  # [M, K]
    return y + (scale * F.linear(dropped_reference(x, seed, dropout), change)).to(x.dtype)


def singlora_linear_torch(
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
    """LoRA with two views of one matrix, to which the gradients of both add up."""
    a, b = views(x, factor, weight, base)
    return lora_linear_torch(x, a, b, scale, weight, bias, base, seed, dropout=dropout)


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
    backend: str | None = None,
) -> Tensor:
    """A linear layer with the product of a matrix and its own transpose beside it.

        y = x weight^T + bias + scale * A[:M] (A[:K]^T drop(x))        arXiv 2507.05566

    x [*N, K]       float16, bfloat16, float32 or float64
    factor [P, R]   A, P = max(K, M); any float dtype
    scale []        (alpha / R) u(t), float32, without a gradient; with 0 y is the bare layer's, bit for bit
    weight [M, K]   of a dense layer
    bias [M]        with weight
    base [*N, M]    in the place of weight and bias: the result of any other layer
    seed []         int32 or int64, where there is dropout; the mask is that of `lora_linear`
    dropout         share of the inputs that A does not see, 0 <= dropout < 1
    backend         "reference", "torch", "triton" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast, in which the products are computed; gradients come in the
    dtype of each tensor. Kept for the backward pass are x and A x [T, R]. Second derivatives: backend="reference".
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    tensors: dict[str, Tensor | None] = dict(
        x=x, factor=factor, scale=scale, weight=weight, bias=bias, base=base, seed=seed
    )
    arguments = checked(SINGLORA_LINEAR, tensors, dropout)
    longer = max(_sides(x, weight, base))
    if len(factor) != longer:
        raise ValueError(
            f"singlora_linear: factor has shape {list(factor.shape)}, expected [{longer}, R], the longer side of the "
            f"layer ({SINGLORA_LINEAR.shapes})"
        )
    return SINGLORA_LINEAR.run(backend, **arguments, dropout=dropout)


class SingLoRA(Adapter):
    """The one matrix of a linear layer: y + (alpha / r) u(t) A[:M] A[:K]^T drop(x).

    in_features     K
    out_features    M
    rank            R
    alpha           the change is multiplied by alpha / rank; None is alpha = rank
    ramp_steps      T, the steps after which the change counts in full
    dropout         share of the inputs left out while training, before A; the layer itself sees all
    generator       what the values are drawn from

    singlora_A [max(K, M), R] is the parameter: uniform within 1 / sqrt(max(K, M)), as LoRA's A of that width. `steps`,
    an int64 [] in the state dict, counts the completed steps: by itself, for every optimizer of torch that holds the
    parameter, where the adapter is on and trained. Passes do not count, so that gradient accumulation and checkpointing
    change nothing, nor do steps that a GradScaler leaves out. Other training loops call `advance_ramp`.

    While training t = steps + 1, since with u = 0 the first gradient would be zero; in eval mode t = steps.
    """

    steps: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None = None,
        ramp_steps: int = 1000,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        self.in_features, self.out_features = in_features, out_features
        self.ramp_steps, self.dropout = ramp_steps, dropout
        self.scale = 1.0 if alpha is None else alpha / rank
        longer = max(in_features, out_features)
        self.singlora_A = nn.Parameter(torch.empty(longer, rank, device=device, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters(generator)
        _RAMPS.watch(self)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Starts again, at step 0."""
        self.steps.zero_()
        if not self.singlora_A.is_meta:
            bound = 1 / math.sqrt(max(1, len(self.singlora_A)))
            drawn = torch.empty(self.singlora_A.shape, device="cpu", dtype=torch.float32)
            self.singlora_A.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def gain(self) -> Tensor:
        """(alpha / r) u(t), float32 []: a tensor, so that compiled code does not depend on the step."""
        t = (self.steps + int(self.training)).to(torch.float32)
        return (t / self.ramp_steps).clamp(max=1) * (self.gate * self.scale)

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        weight, bias = (layer.dense_form() or (None, None)) if y is None else (None, None)
        base = y if y is not None or weight is not None else layer.base(x)
        seed = new_seed(x) if dropout else None
        return singlora_linear(x, self.singlora_A, self.gain(), weight, bias, base, seed, dropout=dropout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, scale = (part.to(weight.dtype) for part in self.factors())
        return weight + scale * (b @ a), bias

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.singlora_A[: self.in_features].T, self.singlora_A[: self.out_features], self.gain()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.singlora_A.shape[1]}, scale={self.scale:g}, "
            f"ramp_steps={self.ramp_steps}, dropout={self.dropout:g}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one out of a pickle, counts steps as well."""
        super().__setstate__(state)
        _RAMPS.watch(self)


@dataclass(frozen=True)
class SingLoRAConfig(AdapterConfig):
    """SingLoRA in a model's linear layers: `effkit.apply(model, SingLoRAConfig(rank=8, ramp_steps=1000))`.

    rank         R
    alpha        the change is multiplied by alpha / rank; None is alpha = rank. Negative ones take away from the weight
    ramp_steps   T, the optimizer steps over which the change grows from nothing to its full size
    dropout      share of a layer's inputs left out before A while training
    seed         of the values that A starts with; each layer draws its own

    The other fields are those of `AdapterConfig`.
    """

    rank: int = 8
    alpha: float | None = None
    ramp_steps: int = 1000
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "ramp_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"SingLoRAConfig: {name} is {value!r}, expected an integer of at least 1")
        if self.alpha is not None and (isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float)):
            raise TypeError(f"SingLoRAConfig: alpha is {self.alpha!r}, expected a number or None")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"SingLoRAConfig: dropout is {self.dropout!r}, expected 0 <= dropout < 1")

    def adapter(self, path: str, layer: Any, shared: Any) -> Adapter:
        return SingLoRA(
            *linear_shape(self, path, layer),
            rank=self.rank,
            alpha=self.alpha,
            ramp_steps=self.ramp_steps,
            dropout=self.dropout,
            generator=generator_of(self.seed, path),
            device=layer.weight.device,
            dtype=parameter_dtype(self, layer),
        )


def advance_ramp(model: nn.Module, steps: int = 1) -> None:
    """Counts completed steps for every SingLoRA of a model that is on: for loops without an optimizer of torch.

    Call it once a step, after the update; not where an optimizer of torch holds the parameters, which counts by itself.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"advance_ramp: steps is {steps!r}, expected an integer of at least 1")
    ramps = [module for module in model.modules() if isinstance(module, SingLoRA)]
    if not ramps:
        raise ValueError(f"advance_ramp: there is no SingLoRA in the model, {type(model).__name__}")
    for ramp in ramps:
        if ramp.on:
            ramp.steps.add_(steps)


class _Ramps:
    """Counts the steps of torch's optimizers for the adapters whose parameter they hold.

    One optimizer may call another that holds the same parameters, as ZeroRedundancyOptimizer does. So each start of a
    step is numbered, and at its end an adapter that was counted since then is not counted again.
    """

    def __init__(self) -> None:
        self.adapters: weakref.WeakSet[SingLoRA] = weakref.WeakSet()
        self.counted: weakref.WeakKeyDictionary[SingLoRA, int] = weakref.WeakKeyDictionary()
        self.started: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self.starts = 0
        self.hooked = False

    def watch(self, adapter: SingLoRA) -> None:
        if not self.hooked:
            register_optimizer_step_pre_hook(self.start)
            register_optimizer_step_post_hook(self.end)
            self.hooked = True
        self.adapters.add(adapter)

    def start(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.starts += 1
        self.started[optimizer] = self.starts

    @torch.no_grad()
    def end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # A GradScaler has fused optimizers leave out a step on the device, and then it is found out there.
        skipped = getattr(optimizer, "found_inf", None)
        for adapter in self.adapters:
            factor = adapter.singlora_A  # FSDP2 puts another parameter in the place of the first: looked up each time
            trained = adapter.on and factor.requires_grad and id(factor) in held
            if trained and self.counted.get(adapter, 0) < self.started.get(optimizer, 0):
                self.counted[adapter] = self.starts
                adapter.steps += 1 if skipped is None else (skipped == 0).to(adapter.steps)


_RAMPS = _Ramps()


def _sides(x: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[int, int]:
    """K and M of the layer."""
    return x.shape[-1], len(weight) if weight is not None else base.shape[-1]  # type: ignore[union-attr]


def views(x: Tensor, factor: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """What LoRA calls A [R, K] and B [M, R]."""
    K, M = _sides(x, weight, base)
    return factor[:K].T, factor[:M]


def _sizes(case: Case) -> tuple[int, int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"], sizes["R"]


def _flops(case: Case) -> float:
    T, K, M, R = _sizes(case)
    return 2 * T * R * (K + M) + (2 * T * K * M if "weight" in case.given else 0)


def _traffic(case: Case) -> float:
    T, K, M, R = _sizes(case)
    return T * (K + M) + R * max(K, M) + (K * M if "weight" in case.given else T * M)


def _case(name: str, tokens: tuple[int, ...], K: int, M: int, R: int, given: str = "weight bias", **rest: Any) -> Case:
    return Case(name, {"*N": tokens, "K": K, "M": M, "P": max(K, M), "R": R}, given=tuple(given.split()), **rest)


_CASES = (
    _case("one", (1,), 1, 1, 1),
    _case("no token", (0,), 8, 5, 3),
    _case("no rank", (5,), 16, 8, 0),
    _case("no axis of tokens", (), 17, 9, 4),
    _case("square", (7, 3), 33, 33, 5),
    _case("wide in", (5,), 67, 16, 8, "weight"),
    _case("wide out", (5,), 16, 130, 8),
    _case("beside another layer", (2, 19), 33, 48, 16, "base"),
    _case("dropout", (37,), 40, 24, 8, "weight bias seed", options={"dropout": 0.25}),
    _case("dropout beside another layer", (3, 5), 24, 33, 8, "base seed", options={"dropout": 0.5}),
    _case("not begun", (9,), 16, 24, 8, gain={"scale": 0.0}),
    _case("transposed", (3, 5), 33, 20, 8, "base", layout="transposed"),
    _case("strided", (7,), 20, 33, 8, layout="strided"),
    _case("a layer", (2048,), 4096, 11008, 16, large=True),
)
_BENCH = (
    _case("512 tokens, 1024 x 1024", (512,), 1024, 1024, 16, "weight"),
    _case("2048 tokens, 4096 x 11008", (2048,), 4096, 11008, 16, "weight", large=True),
)

SINGLORA_LINEAR = register(
    Op(
        name="singlora_linear",
        area="peft",
        summary="linear layer with a trained matrix times its own transpose beside its frozen weight (SingLoRA)",
        paper="https://arxiv.org/abs/2507.05566",
        shapes=("x [*N, K], factor [P, R], scale [], weight [M, K]?, bias [M]?, base [*N, M]?, seed []? -> y [*N, M]"),
        function=singlora_linear,
        reference=singlora_linear_reference,
        torch=singlora_linear_torch,
        triton="effkit.kernels.low_rank:singlora_linear",
        supports=lambda x, factor, **others: supports(x, factor.T),
        cases=_CASES,
        bench=_BENCH,
        grads=("x", "factor", "weight", "bias", "base"),
        frozen=("weight", "bias"),
        flops=_flops,
        traffic=_traffic,
        draw={"seed": any_seed},
        rivals={"materialized": "effkit.rivals:materialized_singlora"},
    )
)
