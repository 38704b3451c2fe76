"""Windows in HuggingFace models, and a cache that holds no more than the windows can see.

The model takes effkit attention (`effkit.hf.attention`); on the chosen layers it sees a window, and the first tokens
where sink_tokens asks for them. Plain layers of a `DynamicCache` forget what their window has left behind
(`effkit.hf.window_cache`). Layers that transformers limits to a window itself keep their own cache layer, and static
caches keep everything: there the window only masks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from effkit.attention.sliding_window import SlidingWindowConfig
from effkit.attention.softmax import SoftmaxAttentionConfig
from effkit.change import Edit, pick_layers
from effkit.hf.attention import options_of, probe, set_options, use_attention
from effkit.hf.recurrent import RecurrentAttention
from effkit.hf.window_cache import WindowLayer


def use_window(model: nn.Module, config: SlidingWindowConfig, data: Iterable[Any] | None) -> Edit:
    """Handler of SlidingWindowConfig: effkit attention in the whole model, the window on the chosen layers."""
    before = {module: options_of(module) for module in model.modules()}
    edit = use_attention(model, SoftmaxAttentionConfig(backend=config.backend), data)
    assert isinstance(model, PreTrainedModel) and edit.undo is not None  # use_attention has made sure of it
    try:
        chosen = _chosen(model, edit.matched, config)
        for path in edit.matched:
            module = model.get_submodule(path)
            own = config if path in chosen else before[module]  # perhaps a window that an earlier change has put there
            if own is not None:
                set_options(module, own)
        probe(model, data)  # what does not go with sink_tokens raises
    except BaseException:
        edit.undo()
        raise
    modules = [model.get_submodule(path) for path in chosen]
    handles = [
        model.register_forward_pre_hook(functools.partial(_forget_before, modules), with_kwargs=True),
        model.register_forward_hook(functools.partial(_forget_after, modules), with_kwargs=True),
    ]
    return Edit(chosen, functools.partial(_undo, handles, edit.undo), notes=edit.notes)


def _undo(handles: list[RemovableHandle], undo_attention: Callable[[], None]) -> None:
    for handle in handles:
        handle.remove()
    undo_attention()


def _chosen(model: nn.Module, paths: Sequence[str], config: SlidingWindowConfig) -> list[str]:
    """The paths of the layers that a config asks for; ValueError where one does not exist or looks both ways."""
    recurrent = [path for path, module in model.named_modules() if isinstance(module, RecurrentAttention)]
    layers = [path for path, _ in model.named_modules() if path in paths or path in recurrent]
    chosen = list(paths) if config.layers is None else [layers[i] for i in pick_layers(config.layers, len(layers))]
    for path in chosen:
        if path in recurrent:
            raise ValueError(f"layers is {config.layers}, but {path} has a recurrent state; choices: other layers")
    both_ways = [path for path in chosen if not getattr(model.get_submodule(path), "is_causal", True)]
    if both_ways:
        raise ValueError(f"window is {config.window}, but {both_ways[0]} attends in both directions; choices: layers")
    return chosen


def _forget_before(
    windowed: Sequence[nn.Module], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a forward: the cache that it was given forgets as it fills."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    _forget(windowed, given.get("past_key_values"), given.get("attention_mask"))


def _forget_after(
    windowed: Sequence[nn.Module], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """After it: so does a cache that the model has made itself."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    _forget(windowed, getattr(output, "past_key_values", None), given.get("attention_mask"))


def _forget(windowed: Sequence[nn.Module], cache: Any, attention_mask: Any) -> None:
    """Puts a WindowLayer in the place of each plain layer of a cache whose attention has a window."""
    if not isinstance(cache, DynamicCache) or torch.compiler.is_compiling():
        return
    padding: int | None = None
    for module in windowed:
        config, layer = options_of(module), getattr(module, "layer_idx", None)
        if not isinstance(config, SlidingWindowConfig) or layer is None:
            continue
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
        if type(cache.layers[layer]) is not DynamicLayer:
            continue
        if config.sink_tokens and padding is None:
            padding = _most_padding(attention_mask)
            if padding is None:
                return
        prefix = config.sink_tokens + padding if config.sink_tokens and padding is not None else 0
        cache.layers[layer] = WindowLayer.after(cache.layers[layer], config.window, prefix)


def _most_padding(attention_mask: Any) -> int | None:
    """The largest number of padding tokens before a row's first token; None where a row has none yet."""
    if attention_mask is None:
        return 0
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    padding = int((attention_mask.cumsum(1) == 0).sum(1).max())
    return padding if padding < attention_mask.shape[1] else None
