"""What an adapter is: its part in one layer, the layer that has adapters, and what the configs of all of them share.

A layer with adapters is the object that it was, of a class made from its own and `Adapted`; effkit.peft.engine makes it
so. A technique gives a subclass of `Adapter` and one of `AdapterConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effkit.change import ChangeConfig
from effkit.peft.matching import USUAL_TARGETS, check_expression, is_conv1d, is_conv1d_class
from effkit.peft.projections import Siblings

BIASES = ("none", "all", "lora_only")
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Adapter(nn.Module):
    """One adapter in one layer: what it does to the layer's result.

    A subclass gives forward(layer, x, y) and merged(weight, bias), an additive one factors() as well:

    forward    y is the result so far, None if nothing has been computed: the adapter then computes the layer, too,
               together with its own product where `layer.dense_form()` gives the matrix, else by `layer.base(x)`
    merged     (weight [M, K], bias [M] or None) of the layer with the adapter in it, in float32 or wider
    factors    (a [R, K], b [M, R], scale []): the layer with the adapter has the weight `weight + scale b a`

    gate is how much of the adapter there is, float32 []: 0 while it is off, else its strength, which is 1 unless
    `set_scale` says otherwise. It is replaced, never filled: a backward pass that waits keeps the old one. refresh() is
    called after that; what depends on the gate can be computed there, once for many passes.
    """

    additive: ClassVar[bool] = True  # others cannot share a layer with another adapter that is on
    gated: ClassVar[bool] = True  # whether forward obeys gate; others are chosen in Python and compiled for that
    frozen: tuple[str, ...] = ()  # names of its parameters that are never trained
    kept: Mapping[str, Any] = MappingProxyType({})  # what else the file said that it was read from
    config: AdapterConfig
    gate: Tensor

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.on, self.strength = True, 1.0
        self.register_buffer("gate", torch.ones((), device=device, dtype=torch.float32), persistent=False)
        self.register_parameter("bias", None)  # trained in the place of the layer's, see AdapterConfig.bias

    def switch(self, on: bool, strength: float | None = None) -> None:
        """Turns the adapter on or off, and sets its strength where one is given."""
        self.on, self.strength = on, self.strength if strength is None else strength
        with torch.inference_mode(False):
            self.gate = torch.full((), self.strength if on else 0.0, device=self.gate.device, dtype=torch.float32)
            self.refresh()

    def refresh(self) -> None:
        """Called when the gate has changed."""

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} has no factors: it does not add a product of two matrices")

    def plain_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """factors() where they are all that this adapter is in a pass as of now: no dropout, no bias; else None."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Moves everything and makes the gate anew: a cast would round it, `to_empty` leaves it without a value."""
        super()._apply(fn, recurse)
        self.switch(self.on)
        return self


class TrainedCopy(Adapter):
    """A copy of a whole module that is trained in its place (modules_to_save)."""

    additive, gated = False, False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(next(module.parameters()).device)
        self.copy = module

    def forward(self, layer: Adapted, *args: Any, **kwargs: Any) -> Any:
        return self.copy(*args, **kwargs)


class TrainedBias(Adapter):
    """A layer's bias alone is trained (bias="all")."""

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        return layer.base(x) if y is None else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class Adapted(nn.Module):
    """What a layer with adapters is besides its own class: its forward calls the adapters that are on.

    rows, while `adapter_rows` holds, takes the place of forward: it knows which adapter each row of the batch has.
    """

    plain: ClassVar[type[nn.Module]]  # the class that the layer had
    matrix: ClassVar[str | None]  # how a layer that is just a matrix stores it: "as is", "transposed"; None for others
    adapters: nn.ModuleDict
    weight: Tensor
    bias: Tensor | None
    rows: Callable[..., Any] | None = None
    siblings: Siblings | None = None  # the layers that share their input, see projections.py

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            return self.rows(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and self.siblings is not None:
            shared = self.siblings.result(self, *args, **kwargs)
            if shared is not None:
                return shared
        used = self.used()
        if not used:
            return self.base(*args, **kwargs)
        if isinstance(used[0], TrainedCopy):
            return used[0](self, *args, **kwargs)
        y: Any = None
        for adapter in used:
            y = adapter(self, *args, y)
        for adapter in used:
            if adapter.bias is not None:
                y = y + (adapter.gate * (adapter.bias - self.bias)).to(y.dtype)
        return y

    def used(self) -> list[Any]:
        """The adapters that compute: those that are on; for a compiler all, where gates can tell them apart."""
        every: list[Any] = list(self.adapters.values())
        if torch.compiler.is_compiling() and all(a.gated and (a.additive or len(every) == 1) for a in every):
            return every
        return [adapter for adapter in every if adapter.on]

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        return super().forward(*args, **kwargs)

    def dense_form(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight [M, K], bias [M] or None) where the layer is just their product with x, else None."""
        if self.matrix is None:
            return None
        return (self.weight.T if self.matrix == "transposed" else self.weight), self.bias

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its plain class: the class of an adapted layer is made when it is needed."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new_adapted, (self.plain,), state


def adapted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer of this class once it has adapters, always the same one."""
    if plain not in _CLASSES:
        matrix = "transposed" if is_conv1d_class(plain) else "as is" if plain.forward is nn.Linear.forward else None
        body = {"plain": plain, "matrix": matrix, "__module__": __name__}
        _CLASSES[plain] = type(f"Adapted{plain.__name__}", (Adapted, plain), body)
    return _CLASSES[plain]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _new_adapted(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)
    return kind.__new__(kind)


@dataclass(frozen=True)
class AdapterConfig(ChangeConfig):
    """What the configs of all adapters share: which layers, under which name, and what else is trained.

    target_modules, exclude_modules, layers_to_transform, layers_pattern and modules_to_save have peft's meaning: see
    `effkit.peft.matching`.

    name   of the adapter, new in the model and without a dot
    bias   "none"; "all" trains every bias of the model, too, "lora_only" those of the adapted layers. The adapter has
           its own: the model's are left alone
    dtype  of its parameters, e.g. "bfloat16"; None is the layer's, but float32 where that is narrower: updates of a
           few per cent of a step's rounding would be lost. Products are computed in the dtype of the input all the same
    """

    target_modules: str | tuple[str, ...] | None = field(default=None, kw_only=True)
    exclude_modules: str | tuple[str, ...] = field(default=(), kw_only=True)
    layers_to_transform: tuple[int, ...] = field(default=(), kw_only=True)
    layers_pattern: tuple[str, ...] = field(default=(), kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)
    name: str = field(default="default", kw_only=True)
    bias: str = field(default="none", kw_only=True)
    dtype: str | None = field(default=None, kw_only=True)
    handler: ClassVar[str] = "effkit.peft.engine:add_adapter"
    usual_targets: ClassVar[Mapping[str, tuple[str, ...] | str]] = USUAL_TARGETS

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            object.__setattr__(self, key, self._names(key))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, key), str):
                check_expression(kind, key, getattr(self, key))
        if self.target_modules == ():
            raise ValueError(f"{kind}: target_modules is empty, expected names of modules or None for the usual ones")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ValueError(
                f"{kind}: layers_to_transform is {self.layers_to_transform} beside target_modules "
                f"{self.target_modules!r}, which speaks of whole names; choices: a tuple of ends of names"
            )
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError(f"{kind}: layers_pattern is {self.layers_pattern} without layers_to_transform")
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"{kind}: name is {self.name!r}, expected a string without a dot")
        if hasattr(nn.ModuleDict(), self.name):
            raise ValueError(f"{kind}: name is {self.name!r}, which torch's modules use themselves; choices: any other")
        if self.bias not in BIASES:
            raise ValueError(f"{kind}: bias is {self.bias!r}, choices: {', '.join(map(repr, BIASES))}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"{kind}: dtype is {self.dtype!r}, choices: None, {', '.join(map(repr, DTYPES))}")

    def _names(self, key: str) -> Any:
        """A field of names as a tuple, whatever sequence was given; a string stays one where it is an expression."""
        value, item = getattr(self, key), int if key == "layers_to_transform" else str
        if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
            return value
        if value is None:
            return None if key == "target_modules" else ()
        values = (value,) if isinstance(value, item) else tuple(sorted(value) if isinstance(value, set) else value)
        if not all(isinstance(one, item) for one in values):
            raise TypeError(f"{type(self).__name__}: {key} is {value!r}, expected a tuple of {item.__name__}")
        return values

    def shared(self, model: nn.Module, layers: dict[str, nn.Module]) -> Any:
        """What the adapters of a model have in common, given to each; None unless a technique says otherwise."""
        return None

    def adapter(self, path: str, layer: nn.Module, shared: Any) -> Adapter:
        """The adapter of one layer. TypeError naming path and what is supported where there can be none."""
        raise NotImplementedError


def parameter_dtype(config: AdapterConfig, layer: Any) -> torch.dtype:
    """The dtype of an adapter's parameters in a layer: config.dtype, or the layer's but never narrower than float32."""
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    dtype = getattr(layer, "dtype", layer.weight.dtype)
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_shape(config: AdapterConfig, path: str, layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; TypeError for any other."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_conv1d(layer):
        return tuple(layer.weight.shape)
    raise TypeError(
        f"{type(config).__name__}: {path} is {type(layer).__name__}, expected nn.Linear, a quantised linear layer of "
        "effkit.quant or transformers' Conv1D"
    )
