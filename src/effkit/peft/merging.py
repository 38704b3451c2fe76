"""Adapters as part of the weights: merged for a while, or for good.

    W' = W + s B A, in float32, rounded once to the layer's dtype

A merged layer is a dense one in the place of the adapted layer, which is kept: `unmerge` gives back the very same bits.
Adding and subtracting the update in half precision would not: ten rounds of it change a quarter of all
weights. The price is a second copy of the weights until `merge_and_unload` lets go of the first.

Layers in four or eight bits become dense layers of their `dtype`. To quantise the sum again is possible and mostly
wrong: the update of a usual fine-tuning, 1 to 3 % of the weight, is smaller than the distance between two codes and is
lost. The report says how much of it is left.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effkit.change import ChangeConfig, Edit, set_module
from effkit.ops import resolve
from effkit.peft._places import refuse_sharded
from effkit.peft.adapter import TrainedCopy
from effkit.peft.engine import (
    activate,
    active_adapters,
    adapted_layers,
    adapter_names,
    merged_layers,
    refuse_merged,
    take_out,
    unmerged_of,
)
from effkit.peft.matching import is_conv1d
from effkit.quant.config import dense_of
from effkit.quant.fp8_linear import FP8Linear
from effkit.quant.nf4_linear import NF4Linear


@dataclass(frozen=True)
class MergedLayer:
    """What became of a layer's update D = W' - W on its way into the stored weight.

    kept   <stored - W, D> / |D|^2, the share of the update that is there: 1 is all
    error  |stored - W - D| / |D|, what else has changed, against the update
    """

    kind: str
    kept: float
    error: float


@dataclass(frozen=True)
class MergeReport:
    """The merged layers by name. print() shows a table."""

    layers: dict[str, MergedLayer]

    def __str__(self) -> str:
        width = max(map(len, ["layer", *self.layers]))
        rows = [f"{'layer':{width}}  {'merged into':12}  kept of update   error"]
        for path, layer in self.layers.items():
            rows.append(f"{path:{width}}  {layer.kind:12}  {layer.kept:14.4f}  {layer.error:6.4f}")
        return "\n".join(rows)


@dataclass(frozen=True)
class MergeConfig(ChangeConfig):
    """Merges adapters into the weights for good, and takes all adapters out of the model.

    requantize  store the sums in the format of the layers that are quantised; see the warning above
    names       of the adapters to merge, which may be left out where the model has one
    """

    requantize: bool = False
    names: tuple[str, ...] = ()
    handler: ClassVar[str] = "effkit.peft.merging:merge_for_good"
    reload: ClassVar[str] = "effkit.peft.merging:rebuild_merged"

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise TypeError(f"MergeConfig: names is {self.names!r}, expected a tuple of names")
        object.__setattr__(self, "names", tuple(self.names))


def merge(model: nn.Module, *, requantize: bool = False) -> MergeReport:
    """Makes the adapters that are on part of the weights; `unmerge` takes that back, bit for bit.

    Quantised layers become dense in their `dtype`, or with requantize=True are quantised again, at a loss that the
    report tells. Raises ValueError where no adapter is on or a merged weight is not finite, RuntimeError if the model
    is merged already; the model is as before then.
    """
    refuse_merged(model, "merge")
    refuse_sharded(model, "merge", "save_adapter; then load_adapter and merge in one process")
    layers = {
        path: layer for path, layer in adapted_layers(model).items() if any(a.on for a in layer.adapters.values())
    }
    if not layers:
        raise ValueError(f"merge: no adapter is on; choices: activate(model, name), one of {adapter_names(model)}")
    made, report = {}, {}
    for path, layer in layers.items():
        made[id(layer)], report[path] = _merged_layer(path, layer, requantize)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            set_module(model, path, made[id(module)])
    return MergeReport(report)


def unmerge(model: nn.Module) -> None:
    """Puts the adapted layers back, with the weights that they had. RuntimeError if nothing is merged."""
    merged: dict[str, Any] = merged_layers(model)
    if not merged:
        raise RuntimeError(
            "unmerge: nothing is merged, or it was for good: merge_and_unload keeps no copy of the weights"
        )
    for path, module in merged.items():
        set_module(model, path, unmerged_of(module))


def merge_and_unload(model: nn.Module, *, requantize: bool = False) -> nn.Module:
    """Merges the adapters that are on and takes all out: the model is a plain one again, and is returned.

    The original weights are gone. What is trainable does not change. The same as effkit.apply with a MergeConfig.
    """
    from effkit.change import apply

    apply(model, MergeConfig(requantize, tuple(active_adapters(model))))
    return model


def merge_for_good(model: nn.Module, config: MergeConfig, data: Iterable[Any] | None = None) -> Edit:
    """Handler of MergeConfig."""
    on, every = active_adapters(model), adapter_names(model)
    if not config.names and len(every) > 1:
        raise ValueError(f"MergeConfig: names is (), but the model has several adapters; choices: {every}")
    if not merged_layers(model):
        _merge_these(model, config.names or on, config.requantize)
    elif not set(config.names) <= set(on):
        raise ValueError(f"MergeConfig: names is {config.names}, but {on} are merged; choices: unmerge(model) first")
    matched = merged_layers(model)
    gained = [path for path, module in matched.items() if _gained_bias(module)]
    for module in matched.values():
        module.__dict__.pop("_unmerged", None)  # several names may hold one module
    for name in adapter_names(model):
        take_out(model, name)
    if hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_json_string"):
        if gained:
            warnings.warn(
                f"merge: {gained[0]} and {len(gained) - 1} more layers have a bias now, which transformers would leave "
                "out when it loads the model; choices: effkit.save and effkit.load",
                stacklevel=2,
            )
        resolve("effkit.hf.adapters:say_merged")(model, list(matched))
    return Edit(list(matched), None, "the adapters are part of the weights, and the original weights are gone")


@torch.no_grad()
def rebuild_merged(model: nn.Module, config: MergeConfig, data: Iterable[Any] | None = None) -> Edit:
    """The same layers without values, which are loaded after this: those that are there are arbitrary, even NaN."""
    for layer in adapted_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.zero_()
    with warnings.catch_warnings():  # of what was said when the model was merged
        warnings.simplefilter("ignore")
        return merge_for_good(model, config)


def _gained_bias(merged: nn.Module) -> bool:
    """Whether a merged layer has a bias that it had not before."""
    before = merged.__dict__["_unmerged"]
    return merged._parameters.get("bias") is not None and before._parameters.get("bias") is None


def _merge_these(model: nn.Module, names: Sequence[str], requantize: bool) -> None:
    """Merges adapters of these names; those that were on are on again if that fails."""
    on = active_adapters(model)
    activate(model, *names)
    try:
        merge(model, requantize=requantize)
    except BaseException:
        activate(model, *on)
        raise


@torch.no_grad()
def _merged_layer(path: str, layer: Any, requantize: bool) -> tuple[nn.Module, MergedLayer]:
    """The layer with its adapters in the weight, and how well that went."""
    active = [adapter for adapter in layer.adapters.values() if adapter.on]
    if isinstance(active[0], TrainedCopy):
        new = copy.copy(active[0].copy)  # the adapter's own is not marked as merged
        new.__dict__["_unmerged"] = layer
        return new, MergedLayer(type(new).__name__, 1.0, 0.0)
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(f"merge: {path} has max_norm {layer.max_norm}, which would shorten rows that hold the update")
    new = _plain(layer)
    stored = _oriented(new, new.weight)
    exact = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    bias = new._parameters.get("bias")
    weight, shift = exact, None if bias is None else bias.to(exact.dtype)
    for adapter in active:
        weight, shift = adapter.merged(weight, shift)
        if adapter.bias is not None and bias is not None:
            shift = shift + adapter.gate * (adapter.bias - bias).to(exact.dtype)
    if not (weight.isfinite().all() and (shift is None or shift.isfinite().all())):
        raise ValueError(f"merge: the weight of {path} would hold values that are not finite")
    new.weight = nn.Parameter(_oriented(new, weight.to(stored.dtype)).contiguous(), requires_grad=False)
    new.bias = None if shift is None else nn.Parameter(shift.to(stored.dtype if bias is None else bias.dtype), False)
    if requantize:
        new = _requantized(new, layer)
    report = _loss(type(new).__name__, exact, weight, _oriented(new, _weight(new)))
    new.__dict__["_unmerged"] = layer
    return new.train(layer.training), report


def _plain(layer: Any) -> Any:
    """A dense layer of the class that an adapted one had, with its hooks, sharing its parameters."""
    if isinstance(layer, NF4Linear) or (isinstance(layer, FP8Linear) and layer.recipe is None):
        return dense_of(layer)
    new = copy.copy(layer)
    new.__class__ = layer.plain
    new._parameters = dict(layer._parameters)
    new._modules = {name: module for name, module in layer._modules.items() if name != "adapters"}
    return new


def _oriented(layer: Any, weight: Tensor) -> Tensor:
    """A weight as [outputs, inputs], or back as the layer stores it."""
    return weight.T if is_conv1d(layer) else weight


def _requantized(dense: Any, layer: Any) -> Any:
    if isinstance(layer, NF4Linear):
        options = ("block_size", "double_quant", "quant_type", "cache_dequant")
    elif isinstance(layer, FP8Linear) and layer.recipe is None:
        options = ("granularity", "activation", "format", "power_of_two")
    else:
        return dense
    conv, linear = is_conv1d(dense), dense
    if conv:
        inputs, outputs = dense.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight, linear.bias = nn.Parameter(dense.weight.T.contiguous(), requires_grad=False), dense.bias
    new: Any = layer.plain.from_module(linear, **{name: getattr(layer, name) for name in options})
    if conv:
        new._was = type(dense)
    return new


def _weight(layer: Any) -> Tensor:
    """The values that a layer multiplies by."""
    return layer.dequantize().weight if hasattr(layer, "dequantize") else layer.weight


def _loss(kind: str, before: Tensor, merged: Tensor, stored: Tensor) -> MergedLayer:
    update, change = merged - before, stored.to(before.dtype) - before
    square = update.square().sum()
    if square == 0:
        return MergedLayer(kind, 1.0, 0.0 if torch.equal(change, update) else float("inf"))
    return MergedLayer(kind, float((change * update).sum() / square), float((change - update).norm() / square.sqrt()))


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are merged into the weights, and kept."""
    return bool(merged_layers(model))
