"""Which layers an adapter goes to: the rules of peft, so that a config means the same in both libraries.

Names are those of `model.named_modules()`, e.g. "model.layers.0.self_attn.q_proj".

    target_modules        a tuple of names, each the whole name or its end behind a dot; a string, a regular expression
                          for the whole name; "all-linear", every linear layer but the output head; None, what is usual
                          for the model's type
    exclude_modules       names or a regular expression in the same manner, which come first
    layers_to_transform   numbers of layers, the first number in a name; only with a tuple of ends of names
    layers_pattern        what stands before that number, e.g. "layers"
    modules_to_save       ends of the names of modules that are trained as a whole; nothing in them is a target
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from effkit.change import no_match

if TYPE_CHECKING:
    from effkit.peft.adapter import AdapterConfig

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: AdapterConfig, usual: Mapping[str, tuple[str, ...] | str]) -> dict[str, Any]:
    """The modules that a config targets, by name. ValueError with near names where there is none.

    usual: target modules by model type, for target_modules=None.
    """
    named = dict(own_modules(model))
    wanted = config.target_modules
    if wanted is None:
        wanted = _usual(model, type(config).__name__, usual)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        names = _all_linear(model, named)
        found = {name: named[name] for name in names if not _left_out(config, name)}
    else:
        found = {name: module for name, module in named.items() if _is_target(config, wanted, name)}
    if not found:
        patterns = (wanted,) if isinstance(wanted, str) else wanted
        raise no_match(type(config).__name__, patterns, _ends(named))
    return found


def find_saved(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that modules_to_save names by the ends of their names; ValueError for an end that none has."""
    named = dict(own_modules(model))
    found: dict[str, nn.Module] = {}
    for wanted in names:
        matched = {name: module for name, module in named.items() if name.endswith(wanted)}
        if not matched:
            raise no_match("modules_to_save", (wanted,), _ends(named))
        found |= matched
    return found


def own_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The named modules of a model without those of its adapters and without the model itself, each once."""
    children: list[Any] = [module.adapters for module in model.modules() if hasattr(module, "adapters")]
    adapters = {id(module) for child in children if isinstance(child, nn.ModuleDict) for module in child.modules()}
    return [(name, module) for name, module in model.named_modules() if name and id(module) not in adapters]


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern, a regular expression for the end of a name behind a dot, that fits; or default.

    The rule of rank_pattern and alpha_pattern.
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def check_expression(what: str, name: str, value: str) -> None:
    """ValueError unless value is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {name} is {value!r}, which is no regular expression: {error}") from None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, which holds its weight transposed."""
    return any(is_conv1d_class(kind) for kind in type(module).__mro__)


def is_conv1d_class(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


def _is_target(config: AdapterConfig, wanted: str | tuple[str, ...], name: str) -> bool:
    if _left_out(config, name):
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if name in wanted:
        return True
    return any(name.endswith(f".{end}") for end in wanted) and _in_layers(config, name)


def _left_out(config: AdapterConfig, name: str) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return True
    elif excluded and (name in excluded or any(name.endswith(f".{end}") for end in excluded)):
        return True
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save)


def _in_layers(config: AdapterConfig, name: str) -> bool:
    """Whether a name has the number of one of the layers to transform; the first number counts, not an expert's."""
    if not config.layers_to_transform:
        return True
    before = [rf"(?:^|.*?\.){pattern}\." for pattern in config.layers_pattern] or [r".*?\.[^.]*\."]
    for pattern in before:
        match = re.match(rf"{pattern}(\d+)\.", name)
        if match:
            return int(match.group(1)) in config.layers_to_transform
    return False


def _all_linear(model: nn.Module, named: Mapping[str, nn.Module]) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in named.items()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head and not _is_score(model, name)
    ]


def _is_score(model: nn.Module, name: str) -> bool:
    """Whether a name is that of the untrained head of a classifier."""
    return type(model).__name__.endswith("ForSequenceClassification") and name in ("score", "classifier")


def _usual(model: nn.Module, what: str, usual: Mapping[str, tuple[str, ...] | str]) -> tuple[str, ...] | str:
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind not in usual:
        raise ValueError(
            f"{what}: target_modules is None and there is no usual choice for model type {kind!r}; "
            f'choices: names of modules such as ("q_proj", "v_proj"), a regular expression, "{ALL_LINEAR}"'
        )
    return usual[kind]


def _ends(named: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names of all modules that have parameters of their own."""
    return [name.rpartition(".")[2] for name, m in named.items() if next(m.parameters(recurse=False), None) is not None]


def _by_type(**targets: str) -> dict[str, tuple[str, ...]]:
    """{model type: targets} of {"targets joined by __": "types separated by spaces"}."""
    return {kind: tuple(names.split("__")) for names, kinds in targets.items() for kind in kinds.split()}


# What peft takes for model types, for LoRA and what follows it.
USUAL_TARGETS: dict[str, tuple[str, ...] | str] = {
    **_by_type(
        q_proj__v_proj="llama llama4 mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text opt gptj gpt_neo stablelm "
        "bart",
        q__v="t5 mt5",
        c_attn="gpt2 gpt_bigcode",
        query_key_value="bloom falcon RefinedWeb RefinedWebModel gpt_neox chatglm",
        query__value="bert roberta xlm-roberta electra layoutlm",
        query_proj__value_proj="deberta-v2",
        in_proj="deberta",
        Wqkv="mpt",
        qkv_proj="codegen",
        q_proj__v_proj__fc1__fc2="phi",
        q_proj__k_proj__v_proj__o_proj="nemotron_h",
        q__v__q_proj__v_proj="blip-2",
        c_attn__c_proj="btlm",
        key__value__receptance__output="rwkv",
        r_proj__k_proj__v_proj__o_proj__key__value="rwkv7",
    ),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
