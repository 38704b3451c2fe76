"""Quantised weights in transformers' own verbs: from_pretrained, save_pretrained and model.dequantize().

    import effkit.hf
    config = effkit.hf.NF4QuantizationConfig(double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)   weights are quantised as they load
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)                             the same bits again

The configs take the fields of `effkit.quant.NF4Config` and `FP8Config`, which decide what becomes of which layer; the
model is changed as by `effkit.apply`, so that `effkit.describe`, `quantization_report` and `effkit.save` know it. What
effkit.apply has quantised can be saved by save_pretrained as well. Where a checkpoint is loaded, effkit.hf must have
been imported before: transformers has no other way to find a quantiser.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

import effkit
from effkit.change import Edit, Size, remember
from effkit.hf.experts import QuantizedExperts
from effkit.quant._selection import QuantizationConfig
from effkit.quant.config import (
    DequantizeConfig,
    FP8Config,
    NF4Config,
    plan,
    quantized_like,
    quantized_tensors,
    quantized_weights,
    replace,
    stored_transposed,
)


class _ModelConfig(QuantizationConfigMixin):
    """quantization_config of a model: the fields of a config of effkit.apply, as JSON values."""

    change: ClassVar[Any]  # the class of the config
    method: ClassVar[str]

    def __init__(self, **fields: Any) -> None:
        method = fields.pop("quant_method", self.method)
        if method != self.method:
            raise ValueError(f"quant_method is {method!r}, expected {self.method!r}")
        known = [entry.name for entry in dataclasses.fields(self.change) if entry.name not in _NOT_OF_MODELS]
        unknown = sorted(fields.keys() - set(known))
        if unknown:
            raise ValueError(f"{type(self).__name__}: no field {unknown}, choices: {', '.join(known)}")
        values = self.change(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        self.quant_method: Any = self.method
        for name in known:
            value = getattr(values, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    @classmethod
    def of(cls, config: QuantizationConfig) -> _ModelConfig:
        """The same fields as a config of effkit.apply."""
        return cls(**{key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_MODELS})

    def as_change(self) -> QuantizationConfig:
        """The config of effkit.apply with these fields. No original is kept: weights are quantised as they load."""
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in vars(self).items() if key != "quant_method"}
        return self.change(**fields, keep_original=False)


_NOT_OF_MODELS = ("keep_original", "recipe")  # fields that speak of a change, or of how to train


class NF4QuantizationConfig(_ModelConfig):
    """quantization_config of NF4 models: block_size, double_quant, quant_type, skip, overrides as in `NF4Config`."""

    change, method = NF4Config, "effkit_nf4"


class FP8QuantizationConfig(_ModelConfig):
    """quantization_config of FP8 models: granularity, activation, format, ..., as in `FP8Config`, but no recipe."""

    change, method = FP8Config, "effkit_fp8"


class Quantizer(HfQuantizer):
    """What transformers asks while it loads, saves and dequantises a model with one of the configs above.

    Quantised layers have plain parameters under the names they are stored by, so that a stored model needs no operation
    to be loaded; a dense one is quantised tensor by tensor.
    """

    quantization_config: _ModelConfig
    requires_calibration = False
    is_trainable = True  # what stands beside the quantised weights: adapters, norms, embeddings
    is_qat_trainable = True  # what transformers' Trainer asks of a model whose adapters are not peft's
    unsaveable = ""  # why save_pretrained cannot express the model

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Puts quantised layers into the model, which is on the meta device."""
        self.size, self.change = Size.of(model), self.change_of(model)
        self.layers = plan(model, self.change).layers
        replace(model, {name: quantized_like(model.get_submodule(name), own) for name, own in self.layers.items()})
        self.expected = dict(self._stored(model))
        self.element_sizes: dict[str, float] = {}
        if not self.pre_quantized:
            for name in self.layers:
                self._expect_dense(name, model.get_submodule(name), model.dtype)

    def _stored(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The parameters of the quantised weights, by name."""
        for path, module in model.named_modules():
            for _, _, tensors in quantized_weights(module).values():
                ours = {id(tensor) for tensor in tensors}
                yield from ((f"{path}.{name}", p) for name, p in module.named_parameters() if id(p) in ours)

    def _expect_dense(self, path: str, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives the weights that are to be quantised the form in which they are read: some versions cast to it."""
        for name, (_, shape, _) in quantized_weights(module).items():
            self.element_sizes[f"{path}.{name}"] = module.get_parameter(name).nbytes / math.prod(shape)
            dense = torch.empty(shape, dtype=dtype, device="meta")
            setattr(module, name, nn.Parameter(dense, requires_grad=False))

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes for each element that a device_map has to plan for."""
        return self.element_sizes.get(param_name, param.element_size())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name in quantized_weights(model.get_submodule(path))

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, tensor in self._stored(model):
            wanted = self.expected[name]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype} in the checkpoint, expected "
                    f"{list(wanted.shape)} and {wanted.dtype}"
                )
            if not getattr(tensor, "_is_hf_initialized", False):  # transformers would go on with arbitrary values
                raise ValueError(f"the checkpoint has no {name}: it is incomplete")
            tensor.requires_grad_(False)  # transformers lets every float parameter that it loads take gradients
        _keep_experts_stacked(model)
        edit = Edit(list(self.layers), None, "the original weights were not kept as the model was loaded")
        remember(model, self.change, edit, self.size)
        return model

    def change_of(self, model: Any) -> QuantizationConfig:
        """The change that the quantised model comes from, as a config of effkit.apply."""
        return self.quantization_config.as_change()

    def leave_dense(self, model: Any, names: Sequence[str]) -> None:
        """Has the config say that these layers, which were quantised, are dense now."""
        config: Any = self.quantization_config
        config.overrides = {**dict.fromkeys(names), **config.overrides}

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        if any("_unmerged" in vars(module) for module in model.modules()):
            raise ValueError(
                "save_pretrained: adapters are merged for a while, into layers that config.json calls quantised; "
                "choices: unmerge(model), or merge_and_unload(model)"
            )
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self) -> bool:
        if self.unsaveable:
            raise ValueError(self.unsaveable)
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        change = effkit.apply(model, DequantizeConfig(keep_original=False))
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config has a name for it
        for name in change.matched:
            model.get_submodule(name).to(wanted)
        return model


class _Quantize(ConversionOps):
    """Turns a dense weight that has been read into the parameters of its quantised layer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        return {
            name: parameter
            for key, value in input_dict.items()
            for name, parameter in self._parameters(model, key, value[0] if isinstance(value, list) else value)
        }

    def _parameters(self, model: nn.Module, key: str, dense: Tensor) -> Iterator[tuple[str, nn.Parameter]]:
        path = key.rpartition(".")[0]
        if stored_transposed(model.get_submodule(path)):
            dense = dense.T
        for suffix, tensor in quantized_tensors(self.quantizer.layers[path], dense).items():
            yield key + suffix, nn.Parameter(tensor, requires_grad=False)

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def say(model: PreTrainedModel, config: QuantizationConfig | None) -> dict[str, Any]:
    """Makes a model's attributes and its config tell how it is quantised, or not; what they said before, to say again.

    They can tell of one quantisation. A model with a second one can be saved by effkit.save alone.
    """
    before = {name: value for name, value in vars(model).items() if name in (*_ATTRIBUTES, _CONVERSIONS)}
    before["quantization_config"] = getattr(model.config, "quantization_config", None)
    quantizer = None
    if config is not None:
        quantizer = Quantizer(_OF_CHANGE[type(config)].of(config), pre_quantized=True)
        if before.get("hf_quantizer") is not None:
            quantizer.unsaveable = (
                f"{type(config).__name__} is the second quantisation of this model, and config.json can tell of one; "
                "choices: effkit.save"
            )
    _say(model, quantizer)
    _keep_experts_stacked(model)
    return before


def say_again(model: PreTrainedModel, before: dict[str, Any]) -> None:
    """What the model said before `say`."""
    _say(model, None)
    if before["quantization_config"] is not None:
        model.config.quantization_config = before["quantization_config"]
    vars(model).pop(_CONVERSIONS, None)
    vars(model).update({name: value for name, value in before.items() if name in (*_ATTRIBUTES, _CONVERSIONS)})


def _say(model: Any, quantizer: Quantizer | None) -> None:
    for name in _ATTRIBUTES:
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    if quantizer is not None:
        model.config.quantization_config = quantizer.quantization_config
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.quantization_method = quantizer.quantization_config.quant_method


def _keep_experts_stacked(model: Any) -> None:
    """Has quantised experts saved as the stacked parameters they are.

    transformers would split them into the files' one weight for each expert, which scales cannot follow.
    """
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        setattr(model, _CONVERSIONS, [])


_CONVERSIONS = "_weight_conversions"  # between the names in a file and those in the model, undone on saving
_ATTRIBUTES = ("hf_quantizer", "is_quantized", "quantization_method")
_OF_CHANGE: dict[type[QuantizationConfig], type[_ModelConfig]] = {
    NF4Config: NF4QuantizationConfig,
    FP8Config: FP8QuantizationConfig,
}


def register_once(config: Any, quantizer: type[Quantizer]) -> None:
    """Tells transformers of a config, unless it knows one of that name: a module may be imported twice."""
    if config.method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(config.method)(config)
        register_quantizer(config.method)(quantizer)


for _config in _OF_CHANGE.values():
    register_once(_config, Quantizer)
