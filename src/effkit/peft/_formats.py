"""adapter_config.json, peft's description of an adapter, and the configs of this library: one from the other.

A `Format` says which config stands for a peft_type and how its fields are called there. Everything in a file is one of
these: a field of the format; an option that must be off, since there is nothing like it here; a note, which changes
nothing that is computed; or unknown, which is kept with a warning.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from effkit.ops import resolve
from effkit.peft.adapter import AdapterConfig
from effkit.peft.matching import ALL_LINEAR, find_targets, first_match, is_conv1d, own_modules

COMMON = ("target_modules", "modules_to_save", "bias")  # keys of all types, save that some have no bias


@dataclass(frozen=True)
class Format:
    """How a type of adapter is described.

    type    peft_type
    config  the config here, "module:Class"
    fields  {field of the config: its key}
    scope   of the common fields that choose layers those that the type has
    bias    the word for bias="lora_only"; None where biases cannot be trained
    off     options that must be off
    said    what tells the format from others of the same type
    """

    type: str
    config: str
    fields: Mapping[str, str]
    scope: tuple[str, ...]
    bias: str | None = None
    off: tuple[str, ...] = ()
    said: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys that a config answers for."""
        return {
            *self.fields.values(),
            *self.scope,
            *self.said,
            "peft_type",
            "target_modules",
            "modules_to_save",
            "bias",
        }


LORA = Format(
    "LORA",
    "effkit.peft.lora:LoRAConfig",
    {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rank_stabilized": "use_rslora",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "update_bias": "lora_bias",
    },
    ("exclude_modules", "layers_to_transform", "layers_pattern"),
    "lora_only",
    (
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    ),
    {"use_dora": False},
)
FORMATS = (
    LORA,
    dataclasses.replace(LORA, config="effkit.peft.dora:DoRAConfig", said={"use_dora": True}),
    Format(
        "VERA",
        "effkit.peft.vera:VeRAConfig",
        {
            "rank": "r",
            "dropout": "vera_dropout",
            "d_initial": "d_initial",
            "projection_prng_key": "projection_prng_key",
            "save_projection": "save_projection",
        },
        ("layers_to_transform", "layers_pattern"),
        "vera_only",
    ),
    Format(
        "IA3", "effkit.peft.ia3:IA3Config", {"feedforward_modules": "feedforward_modules"}, ("exclude_modules",), None
    ),
)
NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# Initialisations that change the model's own weights: the adapter belongs to these, which its folder does not hold.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def format_of_config(config: AdapterConfig) -> Format | None:
    """The format that a config is written in, None if there is none."""
    kind = f"{type(config).__module__}:{type(config).__qualname__}"
    return next((form for form in FORMATS if form.config == kind), None)


def format_of_file(said: Mapping[str, Any], where: str) -> Format:
    """The format of a file's contents; ValueError for types and options that there is nothing for."""
    kinds = [form for form in FORMATS if form.type == said.get("peft_type")]
    if not kinds:
        choices = ", ".join(repr(kind) for kind in dict.fromkeys(form.type for form in FORMATS))
        raise ValueError(f"{where}: peft_type is {said.get('peft_type')!r}, choices: {choices}")
    form = next(form for form in kinds if all(bool(said.get(key)) == value for key, value in form.said.items()))
    for key in form.off:
        if said.get(key):
            raise ValueError(f"{where}: {key} is {said[key]!r}, which is not implemented")
    init = said.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {init!r}, which has changed the weights of the model itself; the adapter "
            "belongs to those. Choices: in peft, save_pretrained with path_initial_model_for_weight_conversion, which "
            "writes an adapter of the unchanged model; or give the changed model, and say true in the file"
        )
    for key in sorted(said.keys() - form.keys - {*NOTES, *form.off}):
        if said[key]:
            warnings.warn(f"{where}: {key} is {said[key]!r}, which means nothing here", stacklevel=3)
    return form


def config_of(said: Mapping[str, Any], form: Format, model: nn.Module, **values: Any) -> AdapterConfig:
    """The config that a file describes; values are further fields."""
    if form.type == "LORA":
        said = {"lora_alpha": 8, **said}  # peft's default, where the field's is that of the rank
    names = {**form.fields, "target_modules": "target_modules", **{key: key for key in form.scope}}
    values |= {field: _tuple(said[key]) for field, key in names.items() if said.get(key) not in (None, "")}
    # For classifiers peft names the usual heads, whether the model has them or not. What is missing the tensors tell.
    paths = [path for path, _ in own_modules(model)]
    saved = tuple(end for end in said.get("modules_to_save") or () if any(path.endswith(end) for path in paths))
    bias = said.get("bias") or "none"
    return resolve(form.config)(**values, modules_to_save=saved, bias="lora_only" if bias == form.bias else bias)


def described(model: nn.Module, config: Any, paths: list[str], form: Format, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the adapter with this config in these layers; kept is what its own file said besides."""
    said = {
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        **kept,
        **form.said,
        "peft_type": form.type,
        "inference_mode": True,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path)) for path in paths),
        "modules_to_save": list(config.modules_to_save) or None,
    }
    if form.bias is not None:
        said["bias"] = form.bias if config.bias == "lora_only" else config.bias
    elif config.bias != "none":
        raise ValueError(f"save_adapter: bias is {config.bias!r}, choices: 'none' in a file of type {form.type!r}")
    own = {key: getattr(config, field) for field, key in form.fields.items()}
    return said | (own | _ranks(config, paths) if form.type == "LORA" else own) | _choice(model, config, paths, form)


def explicit(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The pattern that gives each of these layers its value."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def _ranks(config: Any, paths: list[str]) -> dict[str, Any]:
    """r, lora_alpha and their patterns."""
    ranks = {path: config.rank_of(path) for path in paths}
    if 0 in ranks.values():
        raise ValueError("save_adapter: rank is 0, expected at least 1 in a file")
    alpha = config.rank if config.alpha is None else config.alpha
    alphas = {path: config.alpha_of(path) for path in paths}
    return {
        "r": config.rank,
        "rank_pattern": _pattern(config.rank_pattern, ranks, config.rank),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # some readers take integers only
        "alpha_pattern": _pattern(config.alpha_pattern, alphas, alpha),
    }


def _pattern(pattern: Mapping[str, Any], values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The pattern, unless it reads otherwise in a file: the first that fits counts, and there its keys are sorted."""
    ordered = dict(sorted(pattern.items()))
    same = all(first_match(ordered, path, default) == value for path, value in values.items())
    return ordered if same else explicit(values, default)


def _choice(model: Any, config: Any, paths: list[str], form: Format) -> dict[str, Any]:
    """target_modules, and what goes with them."""
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = config.target_modules
    if wanted is None:
        wanted = config.usual_targets[model.config.model_type]
    said = {"target_modules": _list(wanted)} | {key: _list(getattr(config, key)) or None for key in form.scope}
    lost = any(getattr(config, key) for key in fields if key not in form.scope)
    if lost or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):
        said = {"target_modules": _selection(model, config, paths)} | dict.fromkeys(form.scope)
    if form.type == "IA3":
        said["feedforward_modules"] = _feedforward(_list(config.shared(model, {})), said["target_modules"])
    return said


def _feedforward(names: list[str] | str, targets: list[str] | str) -> list[str] | str:
    """Names that are among the targets, as peft asks of two lists, or else an expression for the same."""
    if isinstance(names, str) or isinstance(targets, str) or {*names} <= {*targets}:
        return names
    return f".*({'|'.join(map(re.escape, names))})"


def _selection(model: nn.Module, config: AdapterConfig, paths: list[str]) -> list[str] | str:
    """What selects just these layers: the ends of their names, or else the whole names."""
    ends = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    for wanted in (ends, tuple(paths)):
        alone = AdapterConfig(target_modules=wanted, modules_to_save=config.modules_to_save)
        if find_targets(model, alone, {}).keys() == set(paths):
            return list(wanted)
    return "|".join(map(re.escape, paths))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
