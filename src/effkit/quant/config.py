"""NF4Config and FP8Config: the weights of a model in four or eight bits, by effkit.apply.

Every nn.Linear of the model (and GPT-2's Conv1D, which is one with its weight transposed) becomes an NF4Linear or an
FP8Linear, and the three-dimensional expert weights of mixture-of-experts models become quantised experts, of which only
those that a token has chosen are dequantised. What is left as it was, and why, stands in the report of the change:
the output head, weights that are tied to another module, layers that are skipped or do not fit the format.

Cost: NF4 takes 4 + 32 / 64 bits a weight, 4.127 with double quantisation, FP8 8 and a little, against 16 or 32. But a
change that can be undone keeps the originals, and the model takes more memory than before: keep_original=False lets
them go.

When not to: see the pages of NF4 and FP8. Embeddings, norms and routers are never quantised.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effkit.change import ChangeConfig, Edit, PutBack, no_match, set_module
from effkit.ops import resolve
from effkit.quant._selection import QuantizationConfig, matches
from effkit.quant.four_bit import QUANT_TYPES
from effkit.quant.fp8 import FORMATS, GRANULARITIES
from effkit.quant.fp8_linear import FP8Linear
from effkit.quant.fp8_training import RECIPES
from effkit.quant.nf4_linear import NF4Linear
from effkit.quant.report import QuantizationReport, WeightReport, sqnr_db


@dataclass(frozen=True)
class NF4Config(QuantizationConfig):
    """Weights in four bits, one scale for every block_size of them (`NF4Linear`).

    block_size     a power of two from 32 to 4096, which must divide the inputs of a layer
    double_quant   scales in eight bits themselves: 4.127 instead of 4.5 bits a weight at blocks of 64
    quant_type     "nf4", or "fp4" and "int4" to compare with
    """

    block_size: int = 64
    double_quant: bool = False
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        if type(size) is not int or not 32 <= size <= 4096 or size & (size - 1):
            raise ValueError(f"NF4Config: block_size is {size!r}, expected a power of two from 32 to 4096")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"NF4Config: double_quant is {self.double_quant!r}, expected True or False")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"NF4Config: quant_type is {self.quant_type!r}, choices: {', '.join(QUANT_TYPES)}")

    def why_not(self, out_features: int, in_features: int) -> str | None:
        if in_features % self.block_size or not in_features:
            return f"{in_features} inputs are no multiple of block_size {self.block_size}"
        return None

    def layer(self, linear: nn.Linear) -> nn.Module:
        return NF4Linear.from_module(
            linear, block_size=self.block_size, double_quant=self.double_quant, quant_type=self.quant_type
        )


@dataclass(frozen=True)
class FP8Config(QuantizationConfig):
    """Weights in one byte each (`FP8Linear`), for inference or, with a recipe, products in FP8 for training.

    granularity    what shares a scale of a weight: "tensor", "row" or "block" (128 x 128)
    activation     None leaves inputs as they are; "tensor", "row" or "block" (1 x 128) quantises them, too
    format         "e4m3" or "e5m2"
    power_of_two   round scales up to powers of two
    recipe         the name of an FP8Recipe: weights stay as they are, the same parameters, and are quantised in each
                   pass; the fields above do not apply. None is for inference
    """

    granularity: str = "block"
    activation: str | None = None
    format: str = "e4m3"
    power_of_two: bool = False
    recipe: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("granularity", GRANULARITIES),
            ("activation", (None, *GRANULARITIES)),
            ("format", tuple(FORMATS)),
            ("recipe", (None, *RECIPES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"FP8Config: {name} is {getattr(self, name)!r}, choices: {', '.join(map(repr, choices))}"
                )
        if not isinstance(self.power_of_two, bool):
            raise TypeError(f"FP8Config: power_of_two is {self.power_of_two!r}, expected True or False")
        for pattern, fields in self.overrides.items():
            if self.recipe is not None and (fields or {}).get("recipe", self.recipe) is None:
                raise ValueError(
                    f"FP8Config: overrides[{pattern!r}] has recipe None, which stores weights in FP8, beside recipe "
                    f"{self.recipe!r}, which does not; choices: a recipe, or an FP8Config of its own before this one"
                )

    @property
    def stores(self) -> bool:
        return self.recipe is None

    def layer(self, linear: nn.Linear) -> nn.Module:
        return FP8Linear.from_module(
            linear,
            granularity=self.granularity,
            activation=self.activation,
            format=self.format,
            power_of_two=self.power_of_two,
            recipe=self.recipe,
        )


@dataclass(frozen=True)
class DequantizeConfig(ChangeConfig):
    """Puts dense layers in the place of quantised ones, with the values that those compute with.

    keep_original   keep the quantised modules, so that the change can be undone
    """

    keep_original: bool = True
    handler: ClassVar[str] = "effkit.quant.config:dequantize"


@dataclass
class QuantizationEdit(Edit):
    """An edit that knows the signal over noise of every weight, by its name, in dB."""

    sqnr_db: dict[str, float] = field(default_factory=dict)


class _Restore(PutBack):
    """Puts the modules back, and what a HuggingFace model said of its quantisation before."""

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module], said: Any) -> None:
        super().__init__(model, originals)
        self.said = said

    def __call__(self) -> None:
        super().__call__()
        if self.said is not None:
            resolve("effkit.hf.quantizers:say_again")(self.model, self.said)


@dataclass(frozen=True)
class Plan:
    """The layers that a config quantises, each with its own config, and those it leaves alone, with the reasons."""

    layers: dict[str, QuantizationConfig]
    left: dict[str, str]


def plan(model: nn.Module, config: QuantizationConfig) -> Plan:
    """What a config does to a model, from names and shapes alone; ValueError where that is nothing.

    A module that stands in several places is in the plan under each of its names.
    """
    layers: dict[str, QuantizationConfig] = {}
    left: dict[str, str] = {}
    kept, tied = _kept(model), _tied(model)
    trained = tuple(f"{name}.adapters." for name, module in model.named_modules() if hasattr(module, "plain"))
    for name, module in model.named_modules(remove_duplicate=False):
        shapes = weight_shapes(module)
        if not shapes or name.startswith(trained):
            continue
        chosen = config.of_layer(name) or kept.get(id(module)) or config
        if not isinstance(chosen, str):
            chosen = tied.get(id(module)) or _why_not(module, chosen, shapes) or chosen
        if isinstance(chosen, str):
            left[name] = chosen
        else:
            layers[name] = chosen
    if not layers:
        kind = type(config).__name__
        if left:
            raise ValueError(f"{kind}: no layer can be quantised: {_listed(left)}")
        raise no_match(kind, ("Linear",), (type(module).__name__ for module in model.modules()))
    return Plan(layers, left)


def quantize(model: nn.Module, config: QuantizationConfig, data: Iterable[Any] | None = None) -> Edit:
    """Handler of the configs: quantises every layer of the plan, then puts them all in place."""
    todo = plan(model, config)
    old = {name: model.get_submodule(name) for name in todo.layers}
    new = {name: quantized_like(module, todo.layers[name]) for name, module in _once(old).items()}
    noise = {
        f"{name}.{weight}": sqnr_db(exact, approximate)
        for name, module in new.items()
        for weight, exact, approximate in _before_and_after(old[name], module)
        if not exact.is_meta
    }
    return _replace(model, config, old, new, todo.left, noise)


def rebuild(model: nn.Module, config: QuantizationConfig, data: Iterable[Any] | None = None) -> Edit:
    """The same layers without values, which are loaded after this."""
    todo = plan(model, config)
    old = {name: model.get_submodule(name) for name in todo.layers}
    new = {name: empty_like(module, todo.layers[name]) for name, module in _once(old).items()}
    edit = _replace(model, config, old, new, todo.left, {})
    edit.undo, edit.irreversible = None, "the model was loaded from a file, which holds no original weights"
    return edit


def dequantize(model: nn.Module, config: DequantizeConfig, data: Iterable[Any] | None = None) -> Edit:
    """Handler of DequantizeConfig."""
    old = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_ours(module)}
    if not old:
        raise no_match("DequantizeConfig", ("NF4Linear",), (type(module).__name__ for module in model.modules()))
    adapted = [name for name, module in old.items() if hasattr(module, "plain")]
    if adapted:
        raise ValueError(
            f"DequantizeConfig: {adapted[0]} would lose its adapters; choices: merge_and_unload(model), which gives "
            "dense layers, or delete_adapter(model, name) first"
        )
    new = {name: dense_of(module) for name, module in _once(old).items()}
    replace(model, new)
    said = resolve("effkit.hf.quantizers:say")(model, None) if _is_huggingface(model) else None
    return Edit(list(old), _Restore(model, old, said), _GONE, final=not config.keep_original)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Bytes, bits per parameter and, where effkit.apply quantised the model, SQNR of every quantised weight."""
    noise: dict[str, float] = {}
    for change in model.__dict__.get("_effkit_changes", ()):
        noise |= getattr(change.edit, "sqnr_db", {})
    weights = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        for weight, (format, shape, tensors) in quantized_weights(module).items():
            path = f"{name}.{weight}" if name else weight
            counted |= {id(tensor) for tensor in tensors}
            weights.append(WeightReport(path, format, shape, sum(tensor.nbytes for tensor in tensors), noise.get(path)))
    dense = [parameter for parameter in model.parameters() if id(parameter) not in counted]
    return QuantizationReport(tuple(weights), sum(p.numel() for p in dense), sum(p.nbytes for p in dense))


def weight_shapes(module: Any) -> list[tuple[int, int]]:
    """[outputs, inputs] of the weights of a module that can be quantised; none for all other modules."""
    if getattr(module, "plain", type(module)) is nn.Linear:  # plain: what a layer with adapters was
        return [(module.out_features, module.in_features)]
    if _is_conv1d(module):
        inputs, outputs = module.weight.shape
        return [(outputs, inputs)]
    if _has_experts(module):
        return [tuple(getattr(module, name).shape[1:]) for name in ("gate_up_proj", "down_proj")]
    return []


def empty_like(module: Any, config: QuantizationConfig) -> nn.Module:
    """The quantised module of a dense one, on its device, with arbitrary values."""
    shell = copy.copy(module)
    shell._parameters = {
        name: None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    return quantized_like(shell, config).to_empty(device=next(module.parameters()).device)


def dense_of(module: Any) -> nn.Module:
    """The dense module of a quantised one, of the class that it was."""
    dense = module.dequantize()
    if getattr(module, "_was", nn.Linear) is nn.Linear:
        return dense
    conv = module._was(dense.out_features, dense.in_features)
    conv.weight = nn.Parameter(dense.weight.detach().T.contiguous())
    conv.bias = dense.bias
    return conv.train(module.training)


def quantized_like(module: Any, config: QuantizationConfig) -> nn.Module:
    """The quantised module of a dense one; of one on the meta device, one on the meta device."""
    if _has_experts(module):

        def make(projection: str, expert: int) -> nn.Module:
            return config.layer(_linear(getattr(module, projection)[expert], None))

        return resolve("effkit.hf.experts:QuantizedExperts")(module, make)
    linear = _linear(module.weight.T, module.bias) if _is_conv1d(module) else module
    new: Any = config.layer(linear)
    if type(module) is not nn.Linear:
        new._was = type(module)
    return new.train(module.training)


def stored_transposed(module: nn.Module) -> bool:
    """Whether a quantised layer stands for one whose dense weight is [inputs, outputs]."""
    return hasattr(module, "_was")


def quantized_tensors(config: QuantizationConfig, dense: Tensor) -> dict[str, Tensor]:
    """The parameters of the quantised layer of a weight [M, K], by what their names have behind that of the weight.

    Of expert weights [E, M, K] those of each expert, stacked.
    """
    if dense.ndim == 3:
        parts = [quantized_tensors(config, expert) for expert in dense]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    layer = config.layer(_linear(dense, None))
    return {name.removeprefix("weight"): parameter.detach() for name, parameter in layer.named_parameters()}


def _linear(weight: Tensor, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias
    return linear


def _before_and_after(old: nn.Module, new: nn.Module) -> Iterable[tuple[str, Tensor, Tensor]]:
    dense = dense_of(new)
    for name in quantized_weights(new):
        yield name, old.get_parameter(name), dense.get_parameter(name)


def _replace(
    model: nn.Module,
    config: QuantizationConfig,
    old: dict[str, nn.Module],
    new: dict[str, nn.Module],
    left: dict[str, str],
    noise: dict[str, float],
) -> QuantizationEdit:
    """Puts the new modules in place and says what that did."""
    replace(model, new)
    said = resolve("effkit.hf.quantizers:say")(model, config) if config.stores and _is_huggingface(model) else None
    notes: dict[str, Any] = {}
    parts = [part for module in new.values() for part in quantized_weights(module).values()]
    if parts:
        bits = 8 * sum(tensor.nbytes for _, _, tensors in parts for tensor in tensors)
        notes["bits"] = f"{bits / sum(math.prod(shape) for _, shape, _ in parts):.3f} a quantised parameter"
    if noise:
        worst = min(noise, key=lambda name: (not math.isnan(noise[name]), noise[name]))
        notes["SQNR"] = f"{statistics.median(noise.values()):.2f} dB in the middle, {noise[worst]:.2f} dB in {worst}"
    if left:
        notes["left"] = _listed(left)
    if unused := [p for p in (*config.skip, *config.overrides) if not any(matches(p, name) for name in (*old, *left))]:
        notes["unused"] = f"no layer matches {', '.join(map(repr, unused))}"
    if config.keep_original and parts:
        kept = sum(p.nbytes for module in _once(old).values() for p in module.parameters())
        notes["originals"] = f"{kept:,} bytes are kept for undo(); keep_original=False frees them"
    undo, final = _Restore(model, old, said), not config.keep_original
    return QuantizationEdit(list(old), undo, _GONE, notes, final, noise)


def replace(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Puts each new module in place, under every name of the one that it replaces."""
    by_module = {id(model.get_submodule(name)): module for name, module in new.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_module:
            set_module(model, name, by_module[id(module)])


def _once(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module under the first of its names."""
    first: dict[int, str] = {}
    for name, module in modules.items():
        first.setdefault(id(module), name)
    return {name: modules[name] for name in first.values()}


def _why_not(module: Any, config: QuantizationConfig, shapes: list[tuple[int, int]]) -> str | None:
    if hasattr(module, "plain"):
        return "it has adapters; quantise before adapting"
    if _has_experts(module):
        reason = resolve("effkit.hf.experts:why_not")(module)
        if reason is None and not config.stores:
            reason = "experts are quantised for inference alone"
        if reason is not None:
            return reason
    return next((reason for shape in shapes if (reason := config.why_not(*shape))), None)


def _kept(model: nn.Module) -> dict[int, str]:
    """The layers that are quantised only where an override names them, with the reasons.

    Those that are to stay in float32 are named by HuggingFace models themselves. The head of a classifier, which has no
    output embeddings, is what stands outside of its base model: a checkpoint of that lacks it, and it starts untrained.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [head]
    if head is None and _is_huggingface(model):
        base = {id(module) for module in getattr(model, "base_model", model).modules()}
        heads = [module for module in model.modules() if id(module) not in base]
    kept = {id(module): "it is the output head" for module in heads}
    for part in getattr(model, "_keep_in_fp32_modules", None) or ():
        for name, module in model.named_modules():
            if matches(part, name):
                kept[id(module)] = "the model keeps it in float32"
    return kept


def _tied(model: nn.Module) -> dict[int, str]:
    """The modules whose weight is also another's, with the reason to leave them: a quantised copy would come apart."""
    owners: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module)] = name
    return {
        module: f"its weight is also that of {next(other for key, other in names.items() if key != module)}"
        for names in owners.values()
        if len(names) > 1
        for module in names
    }


def quantized_weights(module: Any) -> dict[str, tuple[str, tuple[int, ...], list[Tensor]]]:
    """Format, dense shape and tensors of each quantised weight of a module, by name; none for a dense module."""
    if isinstance(module, NF4Linear) or (isinstance(module, FP8Linear) and module.recipe is None):
        tensors: list[Tensor] = [p for name, p in module.named_parameters(recurse=False) if name != "bias"]
        format = module.quant_type if isinstance(module, NF4Linear) else module.format
        return {"weight": (format, (module.out_features, module.in_features), tensors)}
    if hasattr(module, "quantized_experts"):
        return {
            name: (format, (module.num_experts, *shape), tensors)
            for name, layer, tensors in module.quantized_experts()
            for format, shape, _ in quantized_weights(layer).values()
        }
    return {}


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is one of those that the configs put in."""
    return isinstance(module, NF4Linear | FP8Linear) or hasattr(module, "quantized_experts")


def _has_experts(module: nn.Module) -> bool:
    """Whether a module holds expert weights as transformers names them, [E, ., .] each; unless it is one of ours."""
    found = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(p, nn.Parameter) and p.ndim == 3 for p in found) and not _is_ours(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, which holds its weight transposed."""
    kind = getattr(module, "plain", type(module))
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


def _is_huggingface(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_json_string")


def _listed(left: dict[str, str]) -> str:
    """Names with their reasons, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in reasons.items()
    )


_GONE = "keep_original was False, the original modules are gone"
