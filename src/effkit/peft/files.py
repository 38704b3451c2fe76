"""Adapters on disk, in peft's folder format: what one library writes the other reads, and neither needs the other.

    save_adapter(model, "folder")                  adapter_config.json and adapter_model.safetensors
    change = load_adapter(other_model, "folder")   the layers adapted, the values read

A tensor's key is `base_model.model.`, the layer's name, and what the adapter calls the tensor, e.g. `lora_A.weight`; it
does not tell the adapter's name. LoRA, DoRA, VeRA and (IA)^3 have formats of their own; any other adapter that adds a
product of two matrices, such as SingLoRA, is written as the LoRA that it amounts to.

Reading is strict: a missing or extra key, another shape, an option that is not implemented raise ValueError, and the
model is as it was. peft warns, or says nothing, and goes on with a random adapter. Tensors of the model itself, which
peft stores beside the adapter of an embedding, must be the model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effkit.change import Change, apply
from effkit.peft._formats import LORA, config_of, described, explicit, format_of_config, format_of_file
from effkit.peft.adapter import Adapter, AdapterConfig, TrainedBias, TrainedCopy
from effkit.peft.engine import active_adapters, adapter_names, adapters_of, set_trainable
from effkit.peft.lora import LoRA, LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What a parameter is called in a file, where that is not its name.
_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "bias": "base_layer.bias",
}


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    as_lora: bool = False,
) -> None:
    """Writes an adapter as a folder that `load_adapter`, peft and others that know its format read.

    path     the folder; what it holds of an adapter is replaced
    name     of the adapter; None is the only one of the model, or else the only one that is on
    dtype    of the tensors in the file; None leaves each as it is, mostly float32, whatever the model's dtype is
    as_lora  write VeRA as the LoRA that it amounts to, for programs that read nothing else; it is LoRA then when it is
             loaded. SingLoRA, with the scale that its ramp has reached, is always written so

    Whether the adapter is on or merged, and the strength that `set_scale` gave it, make no difference. Where parameters
    are sharded every process must call, and the first writes. Raises ValueError for a name that the model lacks and for
    what the format cannot express, TypeError for adapters that it cannot hold.
    """
    from safetensors.torch import save_file

    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"save_adapter: dtype is {dtype}, expected None or a floating dtype")
    parts = adapters_of(model, _chosen(model, name))
    first = next(iter(parts.values()))
    config, kept, form = first.config, first.kept, format_of_config(first.config)
    if form is None or (as_lora and form is not LORA):
        config, parts, kept, form = *_as_lora(config, parts), {}, LORA
    paths = [path for path, part in parts.items() if not isinstance(part, TrainedCopy | TrainedBias)]
    if not getattr(config, "save_projection", True) and not config.implied_by([parts[path] for path in paths]):
        config = dataclasses.replace(config, save_projection=True)  # the format has no place for their sizes
    said = described(model, config, paths, form, kept)
    stored = {key: _stored(key, tensor, dtype) for key, tensor in _tensors(parts).items()}
    if getattr(config, "save_projection", False):  # exact in any file: the key gives them again
        stored |= {key: _stored(key, tensor, None) for key, tensor in _projections(parts).items()}
    sharded = any(_is_sharded(parameter) for part in parts.values() for parameter in part.parameters())
    if sharded and torch.distributed.get_rank() > 0:
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    dtype: str | None = None,
) -> Change:
    """Adds the adapter of a folder in peft's format to a model, and turns the model's other adapters off.

    path       a local folder with adapter_config.json and adapter_model.safetensors
    name       of the adapter in the model; files do not tell it
    trainable  whether its parameters, and no others, are trained from here on; otherwise none are
    dtype      of its parameters, see `AdapterConfig`

    Returns the change, as `effkit.apply` does: it can be undone, and `effkit.save` saves the adapter with the model.
    The model may be quantised and may have other adapters. Keys of adapter_config.json that are not known here are
    written again by `save_adapter`; where one is set there is a warning. Raises ValueError where the folder does not
    fit the model or asks for what is not implemented, FileNotFoundError where a file is missing; the model is as before
    then.
    """
    folder = Path(path)
    where = str(folder / CONFIG)
    said, found = _read_config(folder), _read_tensors(folder)
    form = format_of_file(said, where)
    values: dict[str, Any] = {"name": name, "dtype": dtype}
    if {"base_model.vera_A", "base_model.vera_B"} <= found.keys():
        values["in_features"] = found["base_model.vera_A"].shape[-1]
        values["out_features"] = found["base_model.vera_B"].shape[0]
    change: Any = apply(model, config_of(said, form, model, **values))
    try:
        parts = adapters_of(model, name)
        _fill(model, folder, parts, found)
    except BaseException:
        change.undo()
        raise
    for part in parts.values():
        part.kept = {key: value for key, value in said.items() if key not in form.keys}
    change.edit.notes["read from"] = str(folder)
    if not trainable:
        set_trainable(model)
        change.edit.notes["trainable"] = "nothing"
    return change


def _tensors(parts: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The parameters of an adapter by their keys in a file."""
    found: dict[str, Tensor] = {}
    for path, part in parts.items():
        if isinstance(part, TrainedCopy):
            own = part.copy.state_dict(keep_vars=True)
        elif isinstance(part, TrainedBias):
            own = dict(part.named_parameters())
        else:
            own = {_KEYS.get(key, key): parameter for key, parameter in part.named_parameters()}
        found |= {f"{_PREFIX}{path}.{key}": tensor for key, tensor in own.items()}
    return found


def _projections(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The projections that VeRA's layers share, by their keys; nothing for others."""
    shared = next((part.projections for part in parts.values() if hasattr(part, "projections")), None)
    return {} if shared is None else {f"base_model.{key}": getattr(shared, key) for key in ("vera_A", "vera_B")}


# --- writing


def _chosen(model: nn.Module, name: str | None) -> str:
    """The adapter's name, where one is given or only one can be meant."""
    if name is not None:
        return name
    names, on = adapter_names(model), active_adapters(model)
    if len(names) != 1 and len(on) != 1:
        raise ValueError(f"save_adapter: name is None and {len(on)} adapters are on, choices: {names}")
    return names[0] if len(names) == 1 else on[0]


def _stored(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it goes into a file: whole, on the CPU, in memory of its own."""
    whole: Any = tensor.detach()
    if _is_sharded(whole):
        whole = whole.full_tensor()
    if dtype is None or not whole.is_floating_point():
        dtype = whole.dtype
    stored = whole.to("cpu", dtype, copy=True).contiguous()
    if not torch.equal(stored.isfinite(), whole.isfinite().cpu()):
        raise ValueError(f"save_adapter: dtype is {dtype}, too narrow for values of {key}")
    return stored


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def _as_lora(config: Any, parts: Mapping[str, Any]) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """The LoRA that an adapter amounts to."""
    made, ranks, alphas = {}, {}, {}
    for path, part in parts.items():
        made[path] = part
        if isinstance(part, TrainedCopy | TrainedBias):
            continue
        if not part.additive:
            raise TypeError(f"save_adapter: as_lora is True, but {type(part).__name__} in {path} adds no product")
        with _in_full(part):
            a, b, scale = (factor.detach() for factor in part.factors())
        ranks[path], alphas[path] = len(a), float(scale) * len(a)
        made[path] = LoRA(a.shape[1], len(b), rank=len(a), device="meta")
        made[path].lora_A, made[path].lora_B, made[path].bias = nn.Parameter(a), nn.Parameter(b), part.bias
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(AdapterConfig)}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    patterns: dict[str, Any] = dict(rank_pattern=explicit(ranks, rank), alpha_pattern=explicit(alphas, alpha))
    dropout = getattr(config, "dropout", 0.0)
    return LoRAConfig(**common, rank=rank, alpha=alpha, dropout=dropout, **patterns), made


@contextmanager
def _in_full(part: Adapter) -> Iterator[None]:
    """Within the block an adapter counts as in inference, on and with nothing but its own scale."""
    before = part.on, part.strength, part.training
    part.train(False).switch(True, 1.0)
    try:
        yield
    finally:
        part.train(before[2]).switch(*before[:2])


# --- reading


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        inside = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG}"))
        other = f"; of the folders in it these do: {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"load_adapter: {folder} holds no {CONFIG}{other}")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"load_adapter: {file} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"load_adapter: {file} holds {type(said).__name__}, expected an object")
    return said


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        return load_file(str(folder / WEIGHTS))
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"load_adapter: {folder} holds adapter_model.bin, a pickle, which is never read; convert it with "
            f'torch.load(..., weights_only=True) and safetensors.torch.save_file(..., "{WEIGHTS}")'
        )
    raise FileNotFoundError(f"load_adapter: {folder} holds no {WEIGHTS}")


def _fill(model: nn.Module, folder: Path, parts: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Copies a file's tensors into an adapter, once it is known that all of them fit."""
    wanted, shared = _tensors(parts), _projections(parts)
    config = next(iter(parts.values())).config
    needed = wanted | (shared if getattr(config, "save_projection", False) else {})
    missing = [f"missing: {key} {list(tensor.shape)}" for key, tensor in needed.items() if key not in found]
    other, extra = [], []
    own = _own_tensors(model)
    for key, value in _once(found).items():
        target, fixed = wanted.get(key), shared.get(key, own.get(key))
        if target is not None:
            if value.shape != target.shape:
                other.append(f"shape: {key} is {list(value.shape)}, expected {list(target.shape)}")
            elif value.is_floating_point() != target.is_floating_point():
                other.append(f"dtype: {key} is {value.dtype}, expected one such as {target.dtype}")
        elif fixed is None:
            extra.append(f"extra: {key} {list(value.shape)}")
        elif not _same(fixed, value):
            other.append(f"values: {key} is not what {'its key draws' if key in shared else 'the model has'}")
    problems = [line for lines in (other, missing, extra) for line in _first(lines)]
    if problems:
        raise ValueError(f"load_adapter: {folder} does not fit the model\n  " + "\n  ".join(problems))
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("load_adapter: the model is on the meta device, which holds no values")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])


def _once(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors without the repetitions that peft writes of the biases of modules_to_save, for bias="all"."""
    twins = {key: key.replace(".modules_to_save.", ".") for key in found}
    repeated = {key for key, twin in twins.items() if key != twin in found and torch.equal(found[key], found[twin])}
    return {key: value for key, value in found.items() if key not in repeated}


def _first(lines: list[str], count: int = 4) -> list[str]:
    return lines[:count] + ([f"... and {len(lines) - count} more"] if len(lines) > count else [])


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters, under all keys that peft may give them."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, dot, key = name.rpartition(".")
        for wrapper in ("", "base_layer.", "original_module."):
            found[f"{_PREFIX}{path}{dot}{wrapper}{key}"] = parameter
    return found


def _same(mine: Tensor, value: Tensor) -> bool:
    """Whether two tensors are equal in the narrower of their dtypes."""
    dtype = min(mine.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
    return mine.shape == value.shape and torch.equal(mine.detach().cpu().to(dtype), value.to(dtype))
