"""Adapters in a model: how they come into layers, which of them work, and how they become part of the weights.

`effkit.apply(model, LoRAConfig(...))` gives every target layer a child `adapters`, {name: Adapter}, and makes its class
a subclass of what it was, e.g. AdaptedLinear(Adapted, nn.Linear): the layer stays the same object with the same
parameters under the same names, and its forward lets the adapters that are on change the result. All other parameters
are frozen. More configs add more adapters; the one added last is on, `activate` chooses others.

What an adapter adds is multiplied by its `gate`, a tensor. Compiled code computes all adapters of a layer and reads the
gates, so that switching, scaling and disabling do not compile again; other code calls those that are on.

`merge` (merging.py) puts dense layers with changed weights in the place of adapted ones and keeps these for `unmerge`.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effkit.change import ChangeConfig, Edit, set_module
from effkit.peft.matching import (
    USUAL_TARGETS,
    check_expression,
    find_saved,
    find_targets,
    first_match,
    is_conv1d,
    is_conv1d_class,
    own_modules,
)
from effkit.peft.projections import Siblings, link

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
        self.copy = _copy(module)

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


def add_adapter(model: nn.Module, config: AdapterConfig, data: Iterable[Any] | None = None) -> Edit:
    """Handler of the configs: adds an adapter to a model and turns the others off."""
    kind, name = type(config).__name__, config.name
    refuse_merged(model, kind)
    refuse_sharded(model, kind, "apply, or load_adapter, before fully_shard: gradients would not be shared")
    _refuse_parallel(model, kind)
    if name in adapter_names(model):
        raise ValueError(f"{kind}: name is {name!r}, which the model has already; it has {adapter_names(model)}")
    layers = find_targets(model, config, config.usual_targets)
    _warn_of_patterns(config, layers)
    shared = config.shared(model, layers)
    made: dict[str, Adapter] = {path: config.adapter(path, layer, shared) for path, layer in layers.items()}
    for path, module in find_saved(model, config.modules_to_save).items():
        target = next((target for target in layers if f"{target}.".startswith(f"{path}.")), None)
        if target is not None:
            raise ValueError(f"{kind}: {target} is a target, but {path} is trained as a whole: see modules_to_save")
        if next(module.parameters(), None) is None:
            raise ValueError(f"{kind}: modules_to_save names {path}, {type(module).__name__}, which has no parameters")
        made[path] = TrainedCopy(module)
    _add_biases(model, config, made)
    _check_places(model, made)

    undo = _Remove(model, name, {key: p.requires_grad for key, p in model.named_parameters()}, active_adapters(model))
    for path, adapter in made.items():
        adapter.config = config
        _adapt(model.get_submodule(path), name, adapter.train(model.training))
    link(model, list(adapted_layers(model).values()))
    activate(model, name)
    set_trainable(model, name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    notes = {"trainable": f"{trained:,} of {total:,} parameters, {100 * trained / max(1, total):.3f} %"}
    state, set_state = functools.partial(_state, name), functools.partial(_set_state, name)
    return Edit(list(made), undo, notes=notes, cannot_save=_why_not_save, state=state, set_state=set_state)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapters_of(model: nn.Module, name: str) -> dict[str, Any]:
    """An adapter's part in every layer that has it, by the layer's name; ValueError with the names there are."""
    layers = _with_merged(model)
    found = {path: layer.adapters[name] for path, layer in layers.items() if name in layer.adapters}
    if not found:
        raise ValueError(f"no adapter {name!r} in the model, choices: {adapter_names(model)}")
    return found


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, oldest first."""
    return list(dict.fromkeys(name for layer in _with_merged(model).values() for name in layer.adapters))


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are on."""
    layers = _with_merged(model).values()
    return list(dict.fromkeys(name for layer in layers for name, adapter in layer.adapters.items() if adapter.on))


def activate(model: nn.Module, *names: str) -> None:
    """Turns these adapters on and all others off; none at all leaves the model itself.

    Compiled code is not compiled again. What is trainable does not change: see `set_trainable`. Raises ValueError for a
    name that the model lacks, and where two adapters in one layer cannot be on together (DoRA and (IA)^3 beside any).
    """
    refuse_merged(model, "activate")
    for name in names:
        adapters_of(model, name)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        on = [name for name in names if name in layer.adapters]
        alone = [name for name in on if not layer.adapters[name].additive]
        if alone and len(on) > 1:
            kind = type(layer.adapters[alone[0]]).__name__
            raise ValueError(f"activate: {on} are all in {path}, where {alone[0]!r}, {kind}, works alone only")
    for layer in layers.values():
        for name, adapter in layer.adapters.items():
            adapter.switch(name in names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes as without adapters, also if they are merged; then all is as before."""
    merged = merged_layers(model)
    layers = _with_merged(model)
    before = {id(adapter): adapter.on for layer in layers.values() for adapter in layer.adapters.values()}
    _put(model, {path: unmerged_of(module) for path, module in merged.items()})
    adapters = [adapter for layer in layers.values() for adapter in layer.adapters.values()]
    for adapter in adapters:
        adapter.switch(False)
    try:
        yield model
    finally:
        for adapter in adapters:
            adapter.switch(before[id(adapter)])
        _put(model, merged)


def set_trainable(model: nn.Module, *names: str) -> None:
    """Makes the parameters of these adapters the only ones of the model that ask for a gradient."""
    wanted = {id(adapter) for name in names for adapter in adapters_of(model, name).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapted_layers(model).values():
        for adapter in layer.adapters.values():
            for key, parameter in adapter.named_parameters():
                parameter.requires_grad_(id(adapter) in wanted and key not in adapter.frozen)


def set_scale(model: nn.Module, factor: float, *names: str) -> None:
    """How much of these adapters (those that are on, if none is named) there is: 1 as trained, 0 nothing.

    LoRA, VeRA and SingLoRA are multiplied by it; for (IA)^3 and DoRA the layer is taken that far from its base to what
    it is with them. Compiled code is not compiled again.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise TypeError(f"set_scale: factor is {factor!r}, expected a number")
    if not math.isfinite(factor):
        raise ValueError(f"set_scale: factor is {factor!r}, expected a finite number")
    refuse_merged(model, "set_scale")
    parts = [adapter for name in names or active_adapters(model) for adapter in adapters_of(model, name).values()]
    for adapter in parts:
        if not adapter.gated:
            raise ValueError(f"set_scale: {type(adapter).__name__} in adapter {adapter.config.name!r} has no scale")
    for adapter in parts:
        adapter.switch(adapter.on, float(factor))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of the model, and out of the list of its changes."""
    refuse_merged(model, "delete_adapter")
    adapters_of(model, name)
    take_out(model, name)
    for module in model.modules():
        changes = module.__dict__.get("_effkit_changes", [])
        changes[:] = [change for change in changes if not _is_of(change.config, name)]


class _Remove:
    """Undoes add_adapter, by names: a deep copy of the model comes with its own."""

    def __init__(self, model: nn.Module, name: str, trainable: dict[str, bool], active: list[str]) -> None:
        self.model, self.name, self.trainable, self.active = model, name, trainable, active

    def __call__(self) -> None:
        refuse_merged(self.model, "undo")
        take_out(self.model, self.name)
        activate(self.model, *(name for name in self.active if name in adapter_names(self.model)))
        for key, parameter in self.model.named_parameters():
            if key in self.trainable:
                parameter.requires_grad_(self.trainable[key])


def _is_of(config: ChangeConfig, name: str) -> bool:
    return isinstance(config, AdapterConfig) and config.name == name


def _state(name: str, model: nn.Module) -> dict[str, Any] | None:
    """Whether an adapter is on, and its strength, and whether it is trained; None where it is no longer there."""
    if name not in adapter_names(model):
        return None
    parts = adapters_of(model, name).values()
    trained = any(parameter.requires_grad for part in parts for parameter in part.parameters())
    part = next(iter(parts))
    return {"on": part.on, "strength": part.strength, "trained": trained}


def _set_state(name: str, model: nn.Module, state: dict[str, Any]) -> None:
    for part in adapters_of(model, name).values():
        part.switch(state["on"], state["strength"])
        for key, parameter in part.named_parameters():
            parameter.requires_grad_(state.get("trained", True) and key not in part.frozen)


def _why_not_save(model: nn.Module) -> str | None:
    if merged_layers(model):
        return "adapters are merged into the weights; choices: unmerge(model), or merge_and_unload(model) to keep it so"
    return None


def take_out(model: nn.Module, name: str) -> None:
    """Removes an adapter from the layers; those that have none left are of their own class again."""
    for layer in adapted_layers(model).values():
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            del layer.adapters
            layer.__dict__.pop("siblings", None)
            layer.__class__ = layer.plain
    link(model, list(adapted_layers(model).values()))


def _adapt(layer: Any, name: str, adapter: Adapter) -> None:
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_class(type(layer))
        layer.adapters = nn.ModuleDict()
    layer.adapters[name] = adapter


def refuse_sharded(model: nn.Module, what: str, choices: str) -> None:
    """RuntimeError where parameters are in parts, on several processes."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise RuntimeError(f"{what}: {name} is sharded over several processes; choices: {choices}")


def _warn_of_patterns(config: Any, layers: Iterable[str]) -> None:
    """Patterns of ranks and alphas that fit no layer are mostly slips; files may have some all the same."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name, ()):
            if not any(first_match({key: True}, path, False) for path in layers):
                warnings.warn(f"{type(config).__name__}: {name} has {key!r}, which fits no target", stacklevel=5)


def _refuse_parallel(model: nn.Module, what: str) -> None:
    """DistributedDataParallel shares the gradients of those parameters alone that it found when it was made."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            f"{what}: the model is in DistributedDataParallel, which would not share gradients of new parameters; "
            "apply to the model itself, before that is made"
        )


def _check_places(model: nn.Module, made: dict[str, Adapter]) -> None:
    """Raises for layers whose class cannot be made an adapted one."""
    for path, adapter in made.items():
        layer = model.get_submodule(path)
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{path}: its forward was replaced on the object itself (as by accelerate's hooks), so that an adapter "
                "would never be called; apply the config before that is done"
            )
        taken = [] if isinstance(layer, Adapted) else sorted(name for name in _NAMES if hasattr(layer, name))
        if taken:
            raise ValueError(f"{path}: {type(layer).__name__} has an attribute {taken[0]!r} of its own")
        _check_called(model, path)
        plain = layer.plain if isinstance(layer, Adapted) else type(layer)
        looks_up = plain.forward is nn.Embedding.forward or getattr(layer, "embed_scale", None) is not None
        if isinstance(layer, nn.Embedding) and not looks_up and not isinstance(adapter, TrainedCopy):
            raise TypeError(f"{path}: {plain.__name__} finds its rows in its own way, expected nn.Embedding")


def _check_called(model: nn.Module, path: str) -> None:
    """Raises for layers whose weights others read without calling them."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"{path}: nn.MultiheadAttention reads the weights of {path.rpartition('.')[2]} and never calls it, so that "
            "an adapter would do nothing; choices: leave it out by exclude_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"{path}: in inference nn.TransformerEncoderLayer reads the weights of its layers and never calls them, so "
            "that an adapter would do nothing; choices: torch.backends.mha.set_fastpath_enabled(False) before this, "
            "and for as long as there are adapters"
        )


# What layers with adapters have besides their own.
_NAMES = {"plain", "matrix", "adapters", "rows", "siblings", "used", "base", "dense_form"}


def _add_biases(model: nn.Module, config: AdapterConfig, made: dict[str, Adapter]) -> None:
    """Gives adapters the biases that are to be trained, and layers that have no adapter one for that alone."""
    if config.bias == "none":
        return
    adapted = {path: adapter for path, adapter in made.items() if not isinstance(adapter, TrainedCopy)}
    if config.bias == "all":
        for path, module in own_modules(model):
            if path in made or not isinstance(module._parameters.get("bias"), nn.Parameter):
                continue
            if any(path.startswith(f"{saved}.") for saved in made):
                continue
            if not (isinstance(module, nn.Linear | nn.LayerNorm) or is_conv1d(module)):
                raise TypeError(f'{path}: bias="all" cannot train the bias of {type(module).__name__}')
            adapted[path] = made[path] = TrainedBias(module._parameters["bias"].device)  # type: ignore[union-attr]
    for path, adapter in adapted.items():
        bias = model.get_submodule(path)._parameters.get("bias")
        if bias is not None:
            adapter.bias = nn.Parameter(bias.detach().to(parameter_dtype(config, model.get_submodule(path)), copy=True))


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


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy with parameters of its own, tied ones included, and without the adapters that there are by now."""
    new = copy.deepcopy(module)
    for name in adapter_names(new):
        take_out(new, name)
    return new


def _with_merged(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name, those included in whose place a merged one stands."""
    return adapted_layers(model) | {path: module.__dict__["_unmerged"] for path, module in merged_layers(model).items()}


def merged_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that stand in the place of adapted ones, by all of their names."""
    return {
        path: module for path, module in model.named_modules(remove_duplicate=False) if "_unmerged" in module.__dict__
    }


def unmerged_of(module: nn.Module) -> nn.Module:
    """The adapted layer in whose place a merged one stands, in the mode, on the device and in the dtype of that."""
    layer: Any = module.__dict__["_unmerged"]
    now, then = next(module.parameters()), next(layer.parameters())
    if now.dtype != then.dtype and type(module) is layer.plain:  # cast since: a quantised one may be dense now
        layer.to(now.dtype)
    return layer.to(now.device).train(module.training)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        set_module(model, path, module)


def refuse_merged(model: nn.Module, what: str) -> None:
    """RuntimeError where adapters are merged."""
    if merged_layers(model):
        raise RuntimeError(f"{what}: the adapters are merged into the weights; choices: unmerge(model) first")
