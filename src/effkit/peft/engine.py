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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from effkit.change import ChangeConfig, Edit, set_module
from effkit.peft._places import check_places, refuse_parallel, refuse_sharded, warn_of_patterns
from effkit.peft.adapter import (
    Adapted,
    Adapter,
    AdapterConfig,
    TrainedBias,
    TrainedCopy,
    adapted_class,
    parameter_dtype,
)
from effkit.peft.matching import find_saved, find_targets, is_conv1d, own_modules
from effkit.peft.projections import link


def add_adapter(model: nn.Module, config: AdapterConfig, data: Iterable[Any] | None = None) -> Edit:
    """Handler of the configs: adds an adapter to a model and turns the others off."""
    kind, name = type(config).__name__, config.name
    refuse_merged(model, kind)
    refuse_sharded(model, kind, "apply, or load_adapter, before fully_shard: gradients would not be shared")
    refuse_parallel(model, kind)
    if name in adapter_names(model):
        raise ValueError(f"{kind}: name is {name!r}, which the model has already; it has {adapter_names(model)}")
    layers = find_targets(model, config, config.usual_targets)
    warn_of_patterns(config, layers)
    shared = config.shared(model, layers)
    made: dict[str, Adapter] = {path: config.adapter(path, layer, shared) for path, layer in layers.items()}
    for path, module in find_saved(model, config.modules_to_save).items():
        target = next((target for target in layers if f"{target}.".startswith(f"{path}.")), None)
        if target is not None:
            raise ValueError(f"{kind}: {target} is a target, but {path} is trained as a whole: see modules_to_save")
        if next(module.parameters(), None) is None:
            raise ValueError(f"{kind}: modules_to_save names {path}, {type(module).__name__}, which has no parameters")
        made[path] = TrainedCopy(_copy(module))
    _add_biases(model, config, made)
    check_places(model, made)

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
