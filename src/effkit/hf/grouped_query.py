"""GQAConfig on HuggingFace models: pools the key and value projections and keeps module and config attributes true."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effkit.attention.grouped_query import GQAConfig, mha_to_gqa, similar_heads
from effkit.change import Edit, no_match

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv")


def convert(model: nn.Module, config: GQAConfig, data: Iterable[Any] | None = None) -> Edit:
    """Replaces k_proj and v_proj of every attention module; the projections that were there return on undo."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in _PROJECTIONS)
    }
    if not layers:
        fused = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & set(_FUSED))
        if fused:
            raise ValueError(
                f"GQAConfig: {type(model).__name__} fuses its projections into {fused}; expected separate "
                f"{', '.join(_PROJECTIONS)}"
            )
        raise no_match("GQAConfig", _PROJECTIONS, (name for name, _ in model.named_modules() if name))
    for path in (f"{name}.{part}" for name in layers for part in _PROJECTIONS):
        if hasattr(model.get_submodule(path), "dequantize"):
            raise ValueError(
                f"GQAConfig: {path} is a {type(model.get_submodule(path)).__name__}, whose rows cannot be pooled; "
                "choices: GQAConfig before it is quantised, or DequantizeConfig before this"
            )
        if hasattr(model.get_submodule(path), "adapters"):
            raise ValueError(
                f"GQAConfig: {path} has adapters, which were made for all heads; choices: GQAConfig before the "
                "adapters, or effkit.peft.merge_and_unload before this"
            )
    text_config = _text_config(model)
    before = text_config.num_key_value_heads
    if before % config.num_kv_heads:
        divisors = [n for n in range(1, before + 1) if before % n == 0]
        raise ValueError(f"GQAConfig: num_kv_heads is {config.num_kv_heads}, the model can have one of {divisors}")
    plans = [(name, module, _pooled(module, before, config)) for name, module in layers.items()]

    old: list[tuple[Any, str, Any]] = [(text_config, "num_key_value_heads", before)]
    text_config.num_key_value_heads = config.num_kv_heads
    for _, module, parts in plans:
        counts = {
            key: value
            for key, value in (
                ("num_key_value_groups", text_config.num_attention_heads // config.num_kv_heads),
                ("num_key_value_heads", config.num_kv_heads),
            )
            if hasattr(module, key)
        }
        for key, value in {**parts, **counts}.items():
            old.append((module, key, getattr(module, key)))
            setattr(module, key, value)

    notes = {"kv heads": f"{before} -> {config.num_kv_heads}"}
    return Edit(matched=list(layers), undo=functools.partial(_restore, old), notes=notes)


def _restore(old: list[tuple[Any, str, Any]]) -> None:
    for owner, key, value in old:
        setattr(owner, key, value)


def _text_config(model: nn.Module) -> Any:
    """The part of the model's config that holds the numbers of heads."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "num_key_value_heads", None) is None:
        raise ValueError(
            f"GQAConfig: the config of {type(model).__name__} has no num_key_value_heads, so its code cannot run with "
            "fewer key/value heads than query heads"
        )
    return text


@torch.no_grad()
def _pooled(module: nn.Module, heads: int, config: GQAConfig) -> dict[str, nn.Linear]:
    """New projections of one attention module; with permute also the query and output side, in the same order."""
    q, k, v, o = (getattr(module, part) for part in _PROJECTIONS)
    if not config.permute:
        return {name: _pool(part, heads, config.num_kv_heads, None) for name, part in (("k_proj", k), ("v_proj", v))}
    order = similar_heads(k.weight, v.weight, heads, config.num_kv_heads)
    new = {name: _pool(part, heads, config.num_kv_heads, order) for name, part in (("k_proj", k), ("v_proj", v))}
    new["q_proj"] = _linear(_permuted(q.weight, order), None if q.bias is None else _permuted(q.bias, order), q)
    new["o_proj"] = _linear(_permuted(o.weight.T, order).T.contiguous(), o.bias, o)
    return new


def _pool(part: nn.Linear, heads: int, groups: int, order: Tensor | None) -> nn.Linear:
    bias = None if part.bias is None else mha_to_gqa(part.bias, heads, groups, order)
    return _linear(mha_to_gqa(part.weight, heads, groups, order), bias, part)


def _permuted(rows: Tensor, order: Tensor) -> Tensor:
    """Rows in blocks, one block for each key head and the query heads that read it."""
    return rows.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A Linear of these values with the training flags of another."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=like.weight.requires_grad)
    return new.train(like.training)
