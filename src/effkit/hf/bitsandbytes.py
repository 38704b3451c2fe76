"""bitsandbytes' 4-bit checkpoints, read and written key for key; bitsandbytes itself is not needed.

    model = load_bitsandbytes("folder")     a HuggingFace model whose quantised layers are NF4Linear
    save_bitsandbytes(model, "other")       any model with NF4Linear layers, as bitsandbytes and transformers read it

A quantised weight `P` is stored as P (two codes to a byte, [n / 2, 1]), P.absmax, P.quant_map (the table of 16 values),
under double quantisation also P.nested_absmax and P.nested_quant_map, and P.quant_state.bitsandbytes__nf4 or __fp4: the
bytes of a JSON object with the type, block size, dtype and shape. What is read here dequantises bit for bit to what
bitsandbytes gives, and is written back byte for byte: inference never changes what is saved.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from effkit.change import Edit, Size, remember
from effkit.hf.quantizers import Quantizer, register_once, say, say_again
from effkit.quant._selection import matches
from effkit.quant.config import NF4Config, empty_like, plan, quantized_weights, replace, weight_shapes
from effkit.quant.four_bit import NestedScales, Quantized4bit, code_table, dequantize_nf4
from effkit.quant.kbit import NESTED_BLOCK, codebook
from effkit.quant.nf4_linear import NF4Linear

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "weight") -> Quantized4bit:
    """The quantised tensor `name` from the tensors that bitsandbytes stores for it, under its own keys.

    Raises ValueError naming the key that is missing, or whose contents are not what the others say.
    """
    meta = _metadata(tensors, name)
    shape, block_size, quant_type = tuple(meta["shape"]), meta["blocksize"], meta["quant_type"]
    elements = math.prod(shape)
    blocks = -(-elements // block_size)
    packed = _need(tensors, name).contiguous().view(torch.uint8).flatten()
    _check_length(name, packed, (elements + 1) // 2)
    _check_map(f"{name}.quant_map", _need(tensors, f"{name}.quant_map"), code_table(quant_type))
    absmax = _need(tensors, f"{name}.absmax")
    _check_length(f"{name}.absmax", absmax, blocks)
    nested = None
    if "nested_blocksize" in meta:
        if meta["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError(f"{name}: nested_blocksize is {meta['nested_blocksize']}, expected {NESTED_BLOCK}")
        _check_map(f"{name}.nested_quant_map", _need(tensors, f"{name}.nested_quant_map"), codebook("dynamic", 8))
        scales = _need(tensors, f"{name}.nested_absmax")
        _check_length(f"{name}.nested_absmax", scales, -(-blocks // NESTED_BLOCK))
        if not scales.is_floating_point():
            raise ValueError(f"{name}.nested_absmax has dtype {scales.dtype}, expected torch.float32")
        offset = torch.tensor(meta["nested_offset"], dtype=torch.float32, device=absmax.device)
        nested = NestedScales(scales.float(), offset)
    expected = torch.uint8 if nested else torch.float32
    if absmax.dtype != expected:
        raise ValueError(f"{name}.absmax has dtype {absmax.dtype}, expected {expected}")
    return Quantized4bit(packed, absmax, shape, _DTYPES[meta["dtype"]], block_size, quant_type, nested)


def to_bitsandbytes(q: Quantized4bit, name: str = "weight", *, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for a quantised tensor, under its keys.

    storage   dtype that the codes are seen as, bitsandbytes' quant_storage; their bytes are the same in each
    """
    if q.quant_type not in _TYPES:
        raise ValueError(f"{name} is {q.quant_type}, which bitsandbytes does not know; choices: {', '.join(_TYPES)}")
    meta: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": q.shape,
    }
    tensors = {
        name: q.packed.view(storage).view(-1, 1),
        f"{name}.absmax": q.absmax,
        f"{name}.quant_map": code_table(q.quant_type).clone(),
    }
    if q.nested is not None:
        tensors[f"{name}.nested_absmax"] = q.nested.absmax
        tensors[f"{name}.nested_quant_map"] = codebook("dynamic", 8).clone()
        meta |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": q.nested.offset.item(),
        }
    tensors[f"{name}{_STATE}{q.quant_type}"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors


def read_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Quantized4bit], dict[str, Tensor]]:
    """The quantised tensors of a state dict of bitsandbytes' 4-bit format, by name, and all others as they are."""
    names = [key.partition(_STATE)[0] for key in state if _STATE in key]
    quantized = {name: from_bitsandbytes(state, name) for name in names}
    used = {key for name, q in quantized.items() for key in _keys(name, q)}
    others = {key: tensor for key, tensor in state.items() if key not in used}
    stray = [key for key in others if key.endswith((".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))]
    if stray:
        raise ValueError(f"the checkpoint has {stray[0]} but no {stray[0].rpartition('.')[0]}{_STATE}nf4 or fp4")
    return quantized, others


def _keys(name: str, q: Quantized4bit) -> list[str]:
    parts = ["", ".absmax", ".quant_map", f"{_STATE}{q.quant_type}"]
    nested = [".nested_absmax", ".nested_quant_map"] if q.nested else []
    return [name + part for part in (*parts, *nested)]


def _metadata(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON object of a quantised tensor, each of its values as it must be."""
    found = [key for key in tensors if key.startswith(name + _STATE)]
    if len(found) != 1 or found[0].removeprefix(name + _STATE) not in _TYPES:
        raise ValueError(f"{name} has the keys {found}, expected one of {[name + _STATE + kind for kind in _TYPES]}")
    (key,) = found
    try:
        meta = json.loads(bytes(tensors[key].tolist()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} holds no JSON: {error}") from error
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    if not isinstance(meta, dict) or meta.keys() not in (wanted, wanted | nested):
        raise ValueError(f"{key} has {sorted(meta)}, expected {sorted(wanted)}, and perhaps {sorted(nested)}")
    if meta["quant_type"] != key.removeprefix(name + _STATE):
        raise ValueError(f"{key}: quant_type is {meta['quant_type']!r}, expected that of the key")
    size = meta["blocksize"]
    if type(size) is not int or not 32 <= size <= 4096 or size & (size - 1):
        raise ValueError(f"{key}: blocksize is {size!r}, expected a power of two from 32 to 4096")
    for field in meta.keys() & {"dtype", "nested_dtype"}:
        if meta[field] not in list(_DTYPES):
            raise ValueError(f"{key}: {field} is {meta[field]!r}, choices: {', '.join(_DTYPES)}")
    shape, offset = meta["shape"], meta.get("nested_offset", 0.0)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{key}: shape is {shape!r}, expected a list of sizes")
    if type(offset) not in (int, float):
        raise ValueError(f"{key}: nested_offset is {offset!r}, expected a number")
    return meta


def _need(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the checkpoint has no {key}: it is incomplete")
    return tensors[key]


def _check_length(key: str, tensor: Tensor, length: int) -> None:
    if tensor.numel() != length:
        raise ValueError(f"{key} has {tensor.numel()} elements, expected {length} for the shape in its quant_state")


def _check_map(key: str, tensor: Tensor, table: Tensor) -> None:
    if not torch.equal(tensor.cpu().float(), table):
        raise ValueError(f"{key} is another table than that of its type: this checkpoint cannot be read")


class BitsAndBytesFiles(QuantizationConfigMixin):
    """quantization_config of a model that is read from bitsandbytes' files, or written to them.

    stored   what config.json says, or is to say; settings are the fields of `NF4Config` that the tensors are stored by
    """

    method = "effkit_bitsandbytes"  # transformers' own class has the name that stands in the files

    def __init__(self, stored: dict[str, Any], settings: dict[str, Any], **others: Any) -> None:
        self.quant_method: Any = self.method
        self.stored, self.settings = stored, settings

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)


class _Quantizer(Quantizer):
    """Puts NF4Linear where bitsandbytes has a layer of its own, and saves under bitsandbytes' keys."""

    quantization_config: Any

    def change_of(self, model: Any) -> NF4Config:
        """The layers that bitsandbytes would replace, by its own rule, as far as NF4Linear can hold them."""
        skip = self.quantization_config.stored.get("llm_int8_skip_modules")
        skipped = self.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
        names = [
            name
            for name, module in model.named_modules()
            if len(weight_shapes(module)) == 1 and should_convert_module(name, skipped)
        ]
        return _exactly(model, names, self.quantization_config.settings)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.stored["llm_int8_skip_modules"] = _dense(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def leave_dense(self, model: Any, names: Sequence[str]) -> None:
        self.quantization_config.stored["llm_int8_skip_modules"] = _dense(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        super().get_state_dict_and_metadata(model)
        storage = getattr(torch, self.quantization_config.stored.get("bnb_4bit_quant_storage") or "uint8")
        return _state_dict(model, storage), {}


def load_bitsandbytes(path: str | Path, **options: Any) -> Any:
    """The HuggingFace model of a folder that transformers and bitsandbytes have saved in 4 bits, with NF4Linear layers.

    path      folder with config.json and safetensors
    options   as from_pretrained takes them: dtype, device_map, attn_implementation

    The model computes in its own dtype, not in a bnb_4bit_compute_dtype, and save_pretrained writes the same format
    again. A layer whose rows are no multiple of the block size, so that blocks straddle rows, becomes a dense layer
    with the dequantised weight, and a warning names it. Raises ValueError where the folder holds something else, or
    tensors are missing or not what they should be.
    """
    folder = Path(path)
    config = AutoConfig.from_pretrained(folder)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or not stored.get("load_in_4bit"):
        raise ValueError(f"{folder}: quantization_config is {stored}, expected bitsandbytes' with load_in_4bit")
    if not config.architectures:
        raise ValueError(f"{folder}: architectures is {config.architectures} in config.json, expected a class's name")
    quantized, others = read_state_dict(_read_folder(folder))
    settings = _settings(quantized)
    config.quantization_config = {"quant_method": BitsAndBytesFiles.method, "stored": stored, "settings": settings}
    model_class = getattr(transformers, config.architectures[0])
    options = {"dtype": config.dtype, **options, "config": config, "output_loading_info": True}
    model, info = model_class.from_pretrained(None, state_dict=_native(quantized) | others, **options)
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{folder} does not hold the weights of {model_class.__name__}: {wrong}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def save_bitsandbytes(model: Any, path: str | Path) -> None:
    """Writes a HuggingFace model with NF4Linear layers as transformers and bitsandbytes would, to be loaded by them.

    Layers may be NF4 or FP4, all with one block size, double quantised or not. config.json names the linear layers that
    are dense among those that bitsandbytes is to skip.
    """
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "plain")), None)
    if adapted is not None:
        raise ValueError(
            f"save_bitsandbytes: {adapted} has adapters, which have no place in the format; choices: save_adapter for "
            "them, delete_adapter, then this for the rest; or effkit.save"
        )
    layers = _layers(model)
    settings = _settings({name: layer.quantized() for name, layer in layers.items()})
    before = say(model, None)
    model.hf_quantizer = _Quantizer(BitsAndBytesFiles(_stored(model, settings), settings), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    try:
        model.save_pretrained(path)
    finally:
        say_again(model, before)


def bitsandbytes_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with NF4Linear layers under bitsandbytes' keys."""
    return _state_dict(model, torch.uint8)


def _state_dict(model: nn.Module, storage: torch.dtype) -> dict[str, Tensor]:
    layers = _layers(model)
    ours = {id(p) for layer in layers.values() for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    state = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in ours}
    state = {key: tensor.detach() for key, tensor in state.items()}
    for name, layer in layers.items():
        state |= to_bitsandbytes(layer.quantized(), f"{name}.weight", storage=storage)
    return state


def load_bitsandbytes_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict of bitsandbytes' 4-bit format into a dense model; the layers it quantises become NF4Linear.

    Strict: what is missing, left over or of another shape raises ValueError, and leaves the model as it was.
    """
    quantized, others = read_state_dict(state)
    names = [name.removesuffix(".weight") for name, q in quantized.items() if not _straddles(q)]
    config = _exactly(model, names, _settings(quantized))
    layers = plan(model, config).layers
    new = {name: empty_like(model.get_submodule(name), own) for name, own in layers.items()}
    native = _native(quantized) | others
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for name, layer in new.items():
        expected |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in native.items()}
    wrong = {
        key: (given.get(key), expected.get(key)) for key in given | expected if given.get(key) != expected.get(key)
    }
    if wrong:
        key, (got, wanted) = next(iter(wrong.items()))
        raise ValueError(
            f"{len(wrong)} tensors do not fit the model, the first is {key}: shape {got}, expected {wanted}"
        )
    before = Size.of(model)
    replace(model, new)
    model.load_state_dict(native)
    remember(model, config, Edit(names, None, "the weights were loaded in four bits"), before)


def _native(quantized: Mapping[str, Quantized4bit]) -> dict[str, Tensor]:
    """The parameters of NF4Linear, and dense weights where blocks straddle rows."""
    straddling = [name for name, q in quantized.items() if _straddles(q)]
    if straddling:
        names = ", ".join(straddling[:3]) + (", ..." if len(straddling) > 3 else "")
        warnings.warn(f"dequantised, because blocks straddle rows: {names}, {len(straddling)} in all", stacklevel=3)
    state: dict[str, Tensor] = {}
    for name, q in quantized.items():
        if _straddles(q):
            state[name] = dequantize_nf4(q)
            continue
        state |= {name: q.packed.view(q.shape[0], -1), f"{name}_absmax": q.absmax.view(q.shape[0], -1)}
        if q.nested is not None:
            state |= {f"{name}_nested_absmax": q.nested.absmax, f"{name}_nested_offset": q.nested.offset.reshape(1)}
    return state


def _straddles(q: Quantized4bit) -> bool:
    return q.shape[-1] % q.block_size != 0


def _settings(quantized: Mapping[str, Quantized4bit]) -> dict[str, Any]:
    """The fields of NF4Config that all of these were quantised with."""
    found: dict[tuple[int, bool, str], str] = {}
    for name, q in quantized.items():
        found.setdefault((q.block_size, q.nested is not None, q.quant_type), name)
    if len(found) != 1:
        raise ValueError(
            f"weights have {len(found)} combinations of block size, double quantisation and type, {found}, expected one"
        )
    return dict(zip(("block_size", "double_quant", "quant_type"), next(iter(found)), strict=True))


def _exactly(model: nn.Module, names: Iterable[str], settings: Mapping[str, Any]) -> NF4Config:
    """The config that quantises these layers, as far as they fit, and no others.

    A name is also a pattern for layers deeper in the model, whose own names therefore stand before it.
    """
    chosen: dict[str, Mapping[str, Any] | None] = {name: {} for name in names}
    for name, module in model.named_modules():
        if weight_shapes(module) and name not in chosen and any(matches(pattern, name) for pattern in chosen):
            chosen[name] = None
    overrides = dict(sorted(chosen.items(), key=lambda item: -item[0].count(".")))
    return NF4Config(**settings, overrides={**overrides, "*": None}, keep_original=False)


def _layers(model: nn.Module) -> dict[str, NF4Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4Linear: there is nothing to write in 4 bits")
    for name, module in model.named_modules():
        if quantized_weights(module) and name not in layers:
            raise ValueError(
                f"{name} is a {type(module).__name__}, for which bitsandbytes has no format; choices: leave it dense "
                f"by NF4Config(overrides={{{name!r}: None}}), or effkit.save"
            )
    return layers


def _stored(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config that transformers writes for bitsandbytes."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings["quant_type"],
        "bnb_4bit_use_double_quant": settings["double_quant"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _dense(model),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _dense(model: nn.Module) -> list[str]:
    """The layers that bitsandbytes is to leave alone."""
    return [name for name, module in model.named_modules() if len(weight_shapes(module)) == 1]


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or several."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    return {key: tensor for name in sorted(names) for key, tensor in load_file(str(folder / name)).items()}


register_once(BitsAndBytesFiles, _Quantizer)
