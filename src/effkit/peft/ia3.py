"""(IA)^3: the outputs of a layer, or its inputs, are multiplied by one trained vector.

    y = l * (W x + bias)            attention's keys and values: l [M, 1] scales what comes out
    y = W (l * x) + bias            feed-forward: l [1, K] scales what goes into the last layer of an MLP
                                                            Liu et al., arXiv 2205.05638, section 3.3

l starts from one, so that the adapted model starts as it was, bit for bit. Trained are M or K numbers a layer, the
fewest of all adapters; merged into W they cost nothing.

Cost: one multiplication a value, T M or T K of them. Kept for the backward pass is y, which the next layer mostly keeps
anyway: with u = W x + bias the gradient of l is sum_t dy u = (sum_t dy y) / l. Feed-forward layers keep x instead.

When not to use it: to teach a model what it does not know. A vector turns features up and down, and no more; the paper
takes a model pretrained on hundreds of tasks to one more by a few examples, with the vectors pretrained as well.
It wants high learning rates (3e-3 with Adafactor in the paper), and cannot be merged and unmerged without a copy of W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.norm.dyt import batched
from effkit.ops import Case, Op, register
from effkit.peft._arguments import FLOATS
from effkit.peft._columns import Remembered, column_products, scale_columns
from effkit.peft.adapter import Adapted, Adapter, AdapterConfig, linear_shape, parameter_dtype
from effkit.quant.nf4_linear import as_autocast


def ia3_linear_reference(
    x: Tensor, vector: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, feedforward: bool = False
) -> Tensor:
    """The equation."""
    factor = vector.flatten()
    if feedforward:
        return _linear((factor * x).to(x.dtype), weight, bias)
    return (factor * _linear(x, weight, bias)).to(x.dtype)


def ia3_linear_torch(
    x: Tensor, vector: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, feedforward: bool = False
) -> Tensor:
    """The same, keeping nothing but y, or x where that is scaled; under torch.compile as written."""
    if torch.compiler.is_compiling():
        return ia3_linear_reference(x, vector, weight, bias, feedforward=feedforward)
    if feedforward:
        return _linear(_Scaled.apply(x, vector, False), weight, bias)
    return _Scaled.apply(_linear(x, weight, bias), vector, _can_divide(vector))


def ia3_linear(
    x: Tensor,
    vector: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    feedforward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with its outputs, or its inputs, multiplied by a vector.

        y = vector * (x W^T + bias)          arXiv 2205.05638, section 3.3
        y = (vector * x) W^T + bias          with feedforward

    x [*N, K]         float16, bfloat16, float32 or float64, any strides
    vector [M, 1]     one factor for each output, any float dtype; [1, K], one for each input, with feedforward
    weight [M, K]     of the dense layer. Where absent there is no layer, only the product with the vector: for what
                      comes out of any other layer, or goes into it
    bias [M]          with weight
    feedforward       scale what goes in, not what comes out
    backend           "reference", "torch" or None for the fastest that can

    Returns y [*N, M] in x's dtype, or that of torch.autocast; M is K without a weight. All tensors have gradients, in
    their own dtypes, which can be differentiated again. A vector of ones gives the bits of the layer itself. Raises
    ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    tensors: dict[str, Tensor | None] = dict(x=x, vector=vector, weight=weight, bias=bias)
    sizes = IA3_LINEAR.check(**tensors)
    if weight is None and bias is not None:
        raise ValueError("ia3_linear: bias is given without weight, expected it beside the weight of its layer")
    shape = [1, sizes["K"]] if feedforward else [sizes.get("M", sizes["K"]), 1]
    if list(vector.shape) != shape:
        raise ValueError(
            f"ia3_linear: vector has shape {list(vector.shape)}, expected {shape} with feedforward={feedforward}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            choices = ", ".join(map(str, FLOATS))
            raise TypeError(f"ia3_linear: {name} has dtype {tensor.dtype}, choices: {choices}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"ia3_linear: {name} is on {tensor.device}, expected {x.device} as x")
    tensors["x"] = as_autocast(x)
    return IA3_LINEAR.run(backend, **tensors, feedforward=feedforward)


class IA3(Adapter):
    """The vector of one linear layer: see `ia3_linear`.

    in_features    K
    out_features   M
    feedforward    whether what goes into the layer is scaled, not what comes out

    ia3_l, [1, K] with feedforward, else [M, 1], starts as ones.
    """

    additive = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        feedforward: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        self.feedforward = feedforward
        shape = (1, in_features) if feedforward else (out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def vector(self) -> Tensor:
        """What is multiplied with: ia3_l, or as far from one towards it as the gate says."""
        if not torch.compiler.is_compiling() and self.on and self.strength == 1.0:
            return self.ia3_l
        return torch.lerp(torch.ones_like(self.ia3_l), self.ia3_l, self.gate.to(self.ia3_l.dtype))

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        vector, dense = self.vector(), layer.dense_form()
        if dense is not None:
            return ia3_linear(x, vector, *dense, feedforward=self.feedforward)
        if self.feedforward:
            return layer.base(ia3_linear(x, vector, feedforward=True))
        return ia3_linear(layer.base(x), vector)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vector = self.vector().to(weight.dtype)
        return weight * vector, bias if bias is None or self.feedforward else bias * vector.flatten()

    def extra_repr(self) -> str:
        return f"{self.ia3_l.numel()}, feedforward={self.feedforward}"


def _by_type(**types: str) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(names.split("__")) for names, kinds in types.items() for kind in kinds.split()}


# What peft scales in models of each type: the results of these layers, and the inputs of those.
_USUAL_OUTPUTS = _by_type(
    k_proj__v_proj="llama mistral mixtral",
    q_proj__v_proj="llama4 gemma gemma2 gemma3_text qwen2 qwen3 gptj gpt_neo bart phi",
    q_proj__k_proj="opt",
    k__v="t5",
    k__v__wi_1="mt5",
    c_attn="gpt2 gpt_bigcode",
    query_key_value="bloom gpt_neox falcon RefinedWeb RefinedWebModel",
    key__value="bert roberta",
    key_proj__value_proj="deberta-v2",
    in_proj="deberta",
)
USUAL_FEEDFORWARD: dict[str, tuple[str, ...]] = {
    "mt5": (),
    **_by_type(down_proj="llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3", w2="mixtral", wo="t5"),
    **_by_type(fc2="opt bart phi", fc_out="gptj", c_proj="gpt_neo"),
    **_by_type(dense_4h_to_h="gpt_neox falcon RefinedWeb RefinedWebModel"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    **dict.fromkeys(("bert", "roberta", "deberta-v2", "deberta"), ("output.dense",)),
    "bloom": ("mlp.dense_4h_to_h",),
}
USUAL_IA3_TARGETS = {kind: (*names, *USUAL_FEEDFORWARD[kind]) for kind, names in _USUAL_OUTPUTS.items()}


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """(IA)^3 in a model's linear layers: `effkit.apply(model, IA3Config())`.

    feedforward_modules   ends of the names of those targets whose inputs are scaled, or a regular expression for whole
                          names; () for none; None is what is usual for the model's type

    target_modules=None is what is usual for the model's type: keys, values and the last layer of the MLP. The other
    fields are those of `AdapterConfig`; bias stays "none", since a vector scales it already.
    """

    feedforward_modules: str | tuple[str, ...] | None = None
    usual_targets: ClassVar[Mapping[str, tuple[str, ...] | str]] = USUAL_IA3_TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.feedforward_modules
        if given is not None and not isinstance(given, str):
            if not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
                raise TypeError(f"IA3Config: feedforward_modules is {given!r}, expected a tuple of names of modules")
            object.__setattr__(self, "feedforward_modules", tuple(sorted(given) if isinstance(given, set) else given))
        if isinstance(self.feedforward_modules, tuple) and isinstance(self.target_modules, tuple):
            others = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if others:
                raise ValueError(
                    f"IA3Config: feedforward_modules has {others}, which target_modules {self.target_modules} has not"
                )
        if self.bias != "none":
            raise ValueError(f"IA3Config: bias is {self.bias!r}, choices: 'none'")

    def shared(self, model: nn.Module, layers: dict[str, nn.Module]) -> str | tuple[str, ...]:
        """Which of the targets are feed-forward layers."""
        if self.feedforward_modules is not None:
            return self.feedforward_modules
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in USUAL_FEEDFORWARD:
            raise ValueError(
                "IA3Config: feedforward_modules is None and there is no usual choice for model type "
                f'{kind!r}; choices: names of modules such as ("down_proj",), or ()'
            )
        return USUAL_FEEDFORWARD[kind]

    def adapter(self, path: str, layer: Any, shared: str | tuple[str, ...]) -> Adapter:
        feedforward = re.fullmatch(shared, path) is not None if isinstance(shared, str) else path.endswith(shared)
        sizes, dtype = linear_shape(self, path, layer), parameter_dtype(self, layer)
        return IA3(*sizes, feedforward=feedforward, device=layer.weight.device, dtype=dtype)


class _Scaled(torch.autograd.Function):
    """value [*N, C] times a vector of any shape with C elements. Its gradient is had from the result, or from value."""

    @staticmethod
    def forward(value: Tensor, vector: Tensor, keep_result: bool) -> Tensor:
        return scale_columns(value, vector.flatten())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, vector, ctx.keep_result = inputs
        kept = (output if ctx.keep_result else value) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(vector, kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        vector, kept = ctx.saved_tensors
        factor = vector.flatten()
        d_value = d_vector = None
        if ctx.needs_input_grad[0]:
            # Where the gradient is itself to be differentiated it cannot be written piece by piece.
            d_value = (dy * factor).to(dy.dtype) if torch.is_grad_enabled() else scale_columns(dy, factor)
        if ctx.needs_input_grad[1]:
            total = column_products(dy, kept)
            d_vector = (total / factor if ctx.keep_result else total).to(vector.dtype).view(vector.shape)
        return d_value, d_vector, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return batched(_Scaled.apply, info.batch_size, in_dims, inputs)


# y / l is as exact as u only while y has not gone below the normal numbers, of which float16 has few.
_can_divide = Remembered(lambda vector: (vector.abs() >= 1 / 64).all())


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x W^T + bias in the dtype of x; x itself without a weight."""
    if weight is None:
        return x
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _counts(case: Case) -> tuple[int, int, int]:
    sizes: Any = case.sizes
    return math.prod(sizes["*N"]), sizes["K"], sizes["M"]


def _flops(case: Case) -> float:
    N, K, M = _counts(case)
    product = 2 * N * K * M if "weight" in case.given else 0
    return product + N * (K if case.options.get("feedforward") else M)


def _traffic(case: Case) -> float:
    N, K, M = _counts(case)
    return N * (K + M) + (K * M if "weight" in case.given else 0)


def _case(
    name: str, tokens: tuple[int, ...], K: int, M: int, *given: str, feedforward: bool = False, **rest: Any
) -> Case:
    """A case with the vector in the shape that goes with it; given may be "weight" and "bias"."""
    sizes: dict[str, Any] = {"*N": tokens, "K": K, "M": M, "P": 1 if feedforward else M, "Q": K if feedforward else 1}
    return Case(name, sizes, {"feedforward": feedforward}, given=given, **rest)


def _around_one(value: Tensor) -> Tensor:
    return 1 + value.tanh() / 2


def _some_tiny(value: Tensor) -> Tensor:
    """Factors of zero, of a thousandth, and others."""
    place = torch.arange(value.numel(), dtype=value.dtype).view(value.shape) % 3
    return torch.where(place == 0, 0.0, torch.where(place == 1, 1e-3, 1.0)) * value


_BOTH = ("weight", "bias")
_CASES = (
    _case("one", (1,), 1, 1, *_BOTH),
    _case("one, feed-forward", (1,), 1, 1, *_BOTH, feedforward=True),
    _case("no token", (0,), 8, 5, *_BOTH),
    _case("no feature out", (3,), 8, 0, "weight"),
    _case("no feature in", (3,), 0, 5, *_BOTH),
    _case("no axis of tokens", (), 17, 13, *_BOTH),
    _case("primes", (7, 3), 37, 67, *_BOTH),
    _case("primes, feed-forward", (7, 3), 67, 37, *_BOTH, feedforward=True),
    _case("no bias", (65,), 33, 64, "weight"),
    _case("no layer", (2, 19), 65, 65),
    _case("no layer, feed-forward", (2, 19), 65, 65, feedforward=True),
    _case("several pieces", (1031,), 3, 131, *_BOTH),
    _case("tiny and zero", (29,), 33, 67, *_BOTH, draw={"vector": _some_tiny}),
    _case("tiny and zero, feed-forward", (29,), 33, 67, *_BOTH, draw={"vector": _some_tiny}, feedforward=True),
    _case("large", (29,), 33, 67, *_BOTH, gain={"vector": 50.0}),
    _case("transposed", (3, 5), 33, 17, *_BOTH, layout="transposed"),
    _case("strided, feed-forward", (7, 5), 33, 17, *_BOTH, layout="strided", feedforward=True),
    _case("a layer", (2048,), 4096, 4096, "weight", large=True),
    _case("a layer, feed-forward", (2048,), 11008, 4096, "weight", feedforward=True, large=True),
)
_BENCH = (
    _case("512 tokens, 1024 x 1024", (512,), 1024, 1024, "weight"),
    _case("512 tokens, 4096 x 1024, feed-forward", (512,), 4096, 1024, "weight", feedforward=True),
    _case("8k tokens, 4096 x 1024", (8192,), 4096, 1024, "weight", large=True),
    _case("8k tokens, 11008 x 4096, feed-forward", (8192,), 11008, 4096, "weight", feedforward=True, large=True),
)

IA3_LINEAR = register(
    Op(
        name="ia3_linear",
        area="peft",
        summary="linear layer with its outputs or inputs multiplied by a trained vector ((IA)^3)",
        paper="https://arxiv.org/abs/2205.05638",
        shapes="x [*N, K], vector [P, Q], weight [M, K]?, bias [M]? -> y [*N, M]",
        function=ia3_linear,
        reference=ia3_linear_reference,
        torch=ia3_linear_torch,
        cases=_CASES,
        bench=_BENCH,
        grads=("x", "vector", "weight", "bias"),
        frozen=("weight", "bias"),
        flops=_flops,
        traffic=_traffic,
        draw={"vector": _around_one},
        rivals={"as written": "effkit.rivals:ia3_as_written"},
    )
)
