"""Exact effkit attention in HuggingFace models, under the name "effkit" of transformers' attention interface.

    import effkit.hf
    model.set_attn_implementation("effkit")                              # or from_pretrained(attn_implementation=...)
    effkit.apply(model, effkit.attention.SoftmaxAttentionConfig())       # the same, verified, and with undo()

The attention function is half of it. transformers gives padding, cache offsets and windows to an implementation only
through a mask factory of the same name (`effkit.hf.mask`); without one it passes no mask at all, and padding would be
attended to. What cannot be computed exactly raises: dropout, biases, attention weights as an output.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from effkit.attention.sliding_window import SlidingWindowConfig
from effkit.attention.softmax import SoftmaxAttentionConfig, softmax_attention
from effkit.change import Edit
from effkit.hf.mask import MaskSpec, make_mask, warn_dense
from effkit.hf.window_cache import attend_in_window, fit
from effkit.ops import BackendUnavailable

NAME = "effkit"
_OPTIONS = "_effkit_attention"  # the config on an attention module: copied and pickled along with it
_REFUSED = ("position_bias", "head_mask", "sinks", "indices", "block_indices")  # change the result, not computed here
_calls: list[tuple[nn.Module, Any]] | None = None  # while a model is probed: modules that called, and their masks


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskSpec | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax_attention as transformers calls it.

    query [B, Hq, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, T, Hq, Dv], contiguous; s_aux [Hq] are sinks.
    Where there is a mask it alone decides what is visible, as in transformers' eager attention; without one
    sliding_window and is_causal (default: of the module) do.
    """
    if _calls is not None:
        _calls.append((module, attention_mask))
    _refuse(dropout, others)
    options: SoftmaxAttentionConfig | SlidingWindowConfig = options_of(module) or SoftmaxAttentionConfig()
    sink_tokens = options.sink_tokens if isinstance(options, SlidingWindowConfig) else 0
    if isinstance(options, SlidingWindowConfig) and isinstance(attention_mask, MaskSpec):
        attention_mask = fit(attention_mask, key.shape[2], sink_tokens)
    mask = _as_spec(module, query, key, attention_mask, sliding_window, is_causal)
    if others.get("cu_seq_lens_q") is not None and mask.cu_seqlens is None and mask.visible is None:
        raise ValueError(
            "cu_seq_lens_q is given, but the mask is not packed: effkit takes packed sequences from position_ids that "
            "restart, with use_cache=False and no attention_mask"
        )
    out: Any
    if isinstance(options, SlidingWindowConfig) and sink_tokens:
        out = attend_in_window(query, key, value, mask, options, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if options.window is not None:
        mask = _narrow(mask, options.window, module)
    if mask.visible is not None:
        if options.backend == "triton":
            raise BackendUnavailable(
                "backend='triton' has no kernel for a mask that is a tensor; choices: None, 'torch', 'reference'"
            )
        out = _dense_attention(query, key, value, mask.visible, scaling, softcap, s_aux)
    else:
        out = softmax_attention(
            query,
            key,
            value,
            causal=mask.causal,
            window=mask.window,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            key_starts=mask.key_starts,
            key_lengths=mask.key_lengths,
            query_offset=mask.query_offset,
            cu_seqlens=mask.cu_seqlens,
            backend=options.backend,
        )
    return out.transpose(1, 2).contiguous(), None


def options_of(module: nn.Module) -> SoftmaxAttentionConfig | SlidingWindowConfig | None:
    """The config that `apply` has put on an attention module."""
    return vars(module).get(_OPTIONS)


def set_options(module: nn.Module, config: SoftmaxAttentionConfig | SlidingWindowConfig) -> None:
    """Lets an attention module follow a config."""
    setattr(module, _OPTIONS, config)


def _refuse(dropout: float, others: dict[str, Any]) -> None:
    """Raises for what would change the result, or be asked for in vain."""
    if dropout > 0:
        raise ValueError(
            f"dropout is {dropout}: effkit attention has no dropout; choices: 0.0 (set the attention dropout of the "
            "model's config), model.eval(), or another attn_implementation"
        )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions is True: effkit attention never forms the attention weights; choices: False, or "
            "model.set_attn_implementation('eager')"
        )
    for name in _REFUSED:
        if others.get(name) is not None:
            raise ValueError(f"{name} is given: effkit attention does not compute it; choices: None")


def _as_spec(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, sliding_window: int | None, is_causal: bool | None
) -> MaskSpec:
    """The mask of a call, from whatever the model passes."""
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    if isinstance(mask, MaskSpec):
        if mask.shape[2:] != shape[2:]:
            raise ValueError(
                f"attention_mask is for {mask.shape[2]} queries and {mask.shape[3]} keys, "
                f"but {type(module).__name__} has {shape[2]} and {shape[3]}"
            )
        return mask
    if mask is not None:
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask is a {mask.ndim}-D {mask.dtype} tensor: effkit attention cannot add numbers to the "
                "scores; choices: a 2-D mask [batch, keys] given to the model, or a 4-D bool tensor, True where visible"
            )
        warn_dense("the model was given a 4-D mask")
        return MaskSpec(shape, visible=mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and shape[2] not in (1, shape[3]):
        raise ValueError(
            f"attention_mask is None with {shape[2]} queries and {shape[3]} keys in {type(module).__name__}: "
            "which keys a query may see is unknown; choices: call the model, which makes the mask, or pass one"
        )
    if sliding_window is not None and not causal:
        raise ValueError(f"sliding_window is {sliding_window} without a mask and without causal order; pass a mask")
    return MaskSpec(shape, causal, sliding_window)


def _narrow(mask: MaskSpec, window: int, module: nn.Module) -> MaskSpec:
    """The mask with no more than window keys visible, up to and including the query's own."""
    causal = mask.causal if mask.visible is None else getattr(module, "is_causal", True)
    if not causal:
        raise ValueError(f"window is {window}, but {type(module).__name__} attends in both directions; choices: None")
    if mask.visible is None:
        return dataclasses.replace(mask, window=min(window, mask.window or window))
    _, _, queries, keys = mask.shape
    device = mask.visible.device
    offset = keys - queries if mask.query_offset is None else mask.query_offset[:, None, None, None]
    i = torch.arange(queries, device=device)[:, None] + offset
    near = torch.arange(keys, device=device) > i - window
    return dataclasses.replace(mask, visible=mask.visible & near)


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention under any boolean mask [B, 1, T, S]; rows that see nothing are 0, as in softmax_attention."""
    sees = visible.any(dim=3, keepdim=True)
    visible = visible | ~sees
    if softcap is None and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, visible, scale=scale, enable_gqa=grouped)
        return out.masked_fill(~sees, 0.0)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=3)
    weights = torch.softmax(scores, dim=3)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).masked_fill(~sees, 0.0)


def use_attention(model: nn.Module, config: SoftmaxAttentionConfig, data: Iterable[Any] | None) -> Edit:
    """Handler of SoftmaxAttentionConfig: switches the model to effkit attention and makes sure that it is used.

    transformers only logs a message where a model cannot switch, and some models switch their config and still compute
    attention themselves: so the model runs once on two tokens, the first of them padding, and tells who called.
    data is read for models that do not take input_ids: its first batch, a mapping of arguments, is the input.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a transformers PreTrainedModel")
    implementations = [(part, part._attn_implementation) for part in _configs(model)]
    options = {module: vars(module).get(_OPTIONS) for module in model.modules()}

    undo = functools.partial(_restore, implementations, options)  # a partial follows its model into deep copies
    try:
        called = _switch(model, config, data)
    except ValueError as error:
        undo()
        raise ValueError(f"{type(model).__name__} cannot take effkit attention: {error}") from error
    except BaseException:
        undo()
        raise
    for module in options.keys() - called:
        vars(module).pop(_OPTIONS)
    named = dict(model.named_modules())
    matched = [path for path, module in named.items() if module in called]
    others = _bystanders(named, matched)
    handle = model.register_forward_pre_hook(_demand_mask, with_kwargs=True)
    undo = functools.partial(_restore, implementations, options, handle)
    return Edit(matched, undo, notes=dict(unchanged=others) if others else {})


def _demand_mask(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses padded input_ids without an attention_mask, which would attend to the padding; transformers only warns.

    Padding shows at either end of a row. Where the padding token also begins or ends texts, it proves nothing.
    """
    if torch.compiler.is_compiling():  # the values cannot be read without leaving the graph
        return
    config = model.config.get_text_config()
    pad: Any = getattr(config, "pad_token_id", None)
    ends = getattr(config, "eos_token_id", None)
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    ids = given.get("input_ids")
    elsewhere = any(given.get(name) is not None for name in ("attention_mask", "past_key_values", "position_ids"))
    ambiguous = pad in (None, getattr(config, "bos_token_id", None), *(ends if isinstance(ends, list) else [ends]))
    if ambiguous or elsewhere or not isinstance(ids, Tensor) or not ids.numel():
        return
    if ids[:, [0, -1]].eq(pad).any():
        raise ValueError(
            f"attention_mask is None, but input_ids have the padding token {pad} at the end of a row; expected a mask "
            "[batch, keys], 1 where there is a token (all ones where that token is meant)"
        )


def _restore(
    implementations: list[tuple[PreTrainedConfig, str]], options: dict[nn.Module, Any], hook: Any = None
) -> None:
    """Puts back what use_attention found: the implementation in each config, the options on each module, no hook."""
    if hook is not None:
        hook.remove()
    for part, implementation in implementations:
        part._attn_implementation = implementation
    for module, option in options.items():
        vars(module).pop(_OPTIONS, None)
        if option is not None:
            setattr(module, _OPTIONS, option)


def _switch(model: PreTrainedModel, config: SoftmaxAttentionConfig, data: Iterable[Any] | None) -> set[nn.Module]:
    """Switches every module and returns those that then called effkit attention; ValueError where padding is lost."""
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError("it does not use transformers' attention interface")
    for module in model.modules():
        setattr(module, _OPTIONS, config)
    calls = probe(model, data)
    if not calls:
        raise ValueError("it computes attention itself, whatever its config says")
    if model.main_input_name == "input_ids" and any(mask is None for _, mask in calls):
        raise ValueError("it does not pass the mask on, so padding would be attended to")
    return {module for module, _ in calls}


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config that names an attention implementation, outer ones first."""
    seen: set[int] = set()
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in waiting:
        if id(config) not in seen:
            seen.add(id(config))
            yield config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            waiting += [part for part in parts if part is not None]


def probe(model: PreTrainedModel, data: Iterable[Any] | None) -> list[tuple[nn.Module, Any]]:
    """Runs the model once, without gradients and in eval mode; the modules that called effkit, with their masks."""
    global _calls
    inputs = _probe_inputs(model, data)
    training = [module for module in model.modules() if module.training]
    before, _calls = _calls, []
    try:
        model.eval()
        with torch.no_grad():
            model(**inputs)
        return _calls
    finally:
        _calls = before
        for module in training:
            module.training = True


def _probe_inputs(model: PreTrainedModel, data: Iterable[Any] | None) -> Mapping[str, Any]:
    if model.main_input_name == "input_ids":
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        inputs = dict(input_ids=ids, attention_mask=torch.tensor([[0, 1]], device=model.device))
        takes_both = "decoder_input_ids" in inspect.signature(model.forward).parameters
        return inputs | dict(decoder_input_ids=ids) if takes_both else inputs
    if data is None:
        raise ValueError(
            f"data is None, but {type(model).__name__} takes {model.main_input_name}, not input_ids: give one batch to "
            f"try it on, data=[dict({model.main_input_name}=...)]"
        )
    return next(iter(data))


def _bystanders(named: Mapping[str, nn.Module], matched: list[str]) -> list[str]:
    """Modules that are attention by name, but neither called effkit, nor contain or belong to one that did."""

    def related(path: str) -> bool:
        return any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in matched)

    return [path for path, module in named.items() if "Attention" in type(module).__name__ and not related(path)]


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, make_mask)
