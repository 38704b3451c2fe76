"""Recurrent attention in HuggingFace models: a module in place of softmax attention, with its state in the cache.

The handler of every config that replaces attention layers (`RecurrentConfig`). The new module keeps the projections of
the old one, the same parameters, its query and key norms and its rotary embedding; between them stands a mixer
(`effkit.hf.mixers`). Undo puts the old module back.

What enters the state are tokens, not padding: which ones are tokens, and where packed sequences begin, is read off the
mask that the model hands to every attention module, whatever its implementation makes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._recurrent import map_state
from effkit.attention._swap import RecurrentConfig
from effkit.change import Edit, PutBack, no_match, pick_layers, set_module
from effkit.hf.mask import MaskSpec
from effkit.hf.mixers import make_mixer
from effkit.hf.state_cache import state_layer

# Causal self-attention with these projections, a rotary embedding over the whole head and at most norms on q and k.
FAMILIES = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


def swap_attention(model: nn.Module, config: RecurrentConfig, data: Iterable[Any] | None = None) -> Edit:
    """Replaces the attention modules that the config names; refuses models whose attention does something else."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, RecurrentAttention) or type(module).__name__ in FAMILIES
    ]
    if not names:
        kinds = (type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__)
        raise no_match(type(config).__name__, FAMILIES, kinds)
    old = {names[layer]: model.get_submodule(names[layer]) for layer in pick_layers(config.layers, len(names))}
    for name, module in old.items():
        if isinstance(module, RecurrentAttention):
            raise ValueError(f"layers is {config.layers}, but {name} is recurrent already; choices: other layers, undo")
    new = {name: RecurrentAttention(module, make_mixer(config, module)) for name, module in old.items()}
    for name, swapped in new.items():
        set_module(model, name, swapped)
    added = sum(p.numel() for swapped in new.values() for p in swapped.mixer.parameters())
    return Edit(list(old), PutBack(model, old), notes={"new parameters": f"{added:,}"})


class Tokens(NamedTuple):
    """Which positions of a forward [B, T] hold tokens, and which tokens begin a sequence though others precede them."""

    present: Tensor
    begins: Tensor


class RecurrentAttention(nn.Module):
    """q, k, v = projections(x), norms and rotary embedding as before; y = o_proj(mixer(q, k, v, x)).

    The parts of the old module keep their names, so that its weights keep theirs; mixer holds all that is new.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, old: Any, mixer: nn.Module) -> None:
        super().__init__()
        for name, part in old.named_children():
            self.add_module(name, part)
        self.mixer = mixer.train(old.training)
        self.training = old.training
        self.config, self.layer_idx, self.head_dim = old.config, old.layer_idx, old.head_dim
        self.is_causal = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: hidden_states [B, T, C], the rotary cos and sin [B or 1, T, D], a mask, a cache."""
        self._refuse(others)
        x, (cos, sin) = hidden_states, position_embeddings
        layer = None if past_key_values is None else state_layer(past_key_values, self.layer_idx)
        state = None if layer is None else layer.state
        mix = functools.partial(self._mix, return_state=layer is not None)
        tokens = self._tokens(attention_mask, x, layer, others.get("position_ids"))
        if tokens is None:
            y, state = mix(x, cos, sin, state)
        elif x.shape[1] == 1:
            y, new = mix(x, cos, sin, state)
            state = _where(tokens.present[:, 0], new, state)
        elif torch.compiler.is_compiling():
            y, state = self._mix_traced(x, cos, sin, state, tokens, layer is not None)
        elif bool((tokens.present & ~tokens.begins).all()):
            y, state = mix(x, cos, sin, state)
        else:
            index, bounds = _packing(tokens, layer is not None)
            cos, sin = (r.expand(len(x), -1, -1).flatten(0, 1)[None, index] for r in (cos, sin))
            packed, state = mix(x.flatten(0, 1)[None, index], cos, sin, state, cu_seqlens=bounds)
            y = packed.new_zeros(x.shape[0] * x.shape[1], packed.shape[2]).index_copy(0, index, packed[0])
            y = y.unflatten(0, x.shape[:2])
        if layer is not None:
            layer.advance(state, x.shape[1])
        return y, None

    def _mix(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: Any,
        *,
        return_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Attention over rows without padding, or over packed sequences."""
        q, k, v = (part(x).unflatten(2, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_rotated(part.transpose(1, 2), cos[:, None], sin[:, None]) for part in (q, k))
        o, state = self.mixer(
            q, k, v.transpose(1, 2), x, initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens
        )
        return self.o_proj(o.transpose(1, 2).flatten(2)), state

    def _mix_traced(
        self, x: Tensor, cos: Tensor, sin: Tensor, state: Any, tokens: Tokens, return_state: bool
    ) -> tuple[Tensor, Any]:
        """The same under torch.compile, where shapes cannot depend on values: tokens go first, padding behind them."""
        none = "effkit: packed sequences are not possible in recurrent attention under torch.compile"
        torch._assert_async(~tokens.begins.any(), none)
        if return_state:
            message = "effkit: padding in several tokens that continue a cache is not possible under torch.compile"
            torch._assert_async(tokens.present.all(), message)
            return self._mix(x, cos, sin, state, return_state=True)
        order = (~tokens.present).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        here = tokens.present[..., None]
        x = x.masked_fill(~here, 0.0).take_along_dim(order, 1)
        cos, sin = (part.expand(len(x), -1, -1).take_along_dim(order, 1) for part in (cos, sin))
        y, _ = self._mix(x, cos, sin, None, return_state=False)
        return y.take_along_dim(order.argsort(dim=1), 1).masked_fill(~here, 0.0), None

    def _tokens(self, mask: Any, x: Tensor, layer: Any, position_ids: Tensor | None) -> Tokens | None:
        """What a mask says of the T tokens of x; None where all are tokens of one sequence a row."""
        B, T = x.shape[:2]
        if mask is None:
            if layer is None and position_ids is not None and "flash" in self.config._attn_implementation:
                return Tokens(x.new_ones(B, T, dtype=torch.bool), _restarts(position_ids).expand(B, T))
            return None
        if isinstance(mask, MaskSpec):
            return _of_spec(mask, x)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            raise TypeError(
                f"attention_mask is a {type(mask).__name__}, which recurrent attention cannot read; choices: "
                "model.set_attn_implementation('sdpa'), 'eager', 'effkit'"
            )
        if mask.ndim == 2:
            return Tokens(mask[:, -T:].bool(), torch.zeros_like(mask[:, -T:], dtype=torch.bool))
        first = mask.shape[3] - T  # the column of the first token of x
        if layer is not None:
            first = layer.seen - layer.get_mask_sizes(T)[1]
        return _of_visible(mask, first)

    def _refuse(self, others: dict[str, Any]) -> None:
        if others.get("output_attentions"):
            raise ValueError("output_attentions is True: recurrent attention has no attention weights; choices: False")
        dropout = getattr(self.config, "attention_dropout", 0.0)
        if self.training and dropout:
            raise ValueError(
                f"the config's attention_dropout is {dropout}: recurrent attention has no dropout; choices: 0.0"
            )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of the families above: channels i and i + D/2 turn together."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _of_spec(mask: MaskSpec, x: Tensor) -> Tokens | None:
    B, T = x.shape[:2]
    keys = torch.arange(T, device=x.device) + (mask.shape[3] - T)
    first: int | Tensor = mask.shape[3] - T
    if mask.query_offset is not None:
        keys = torch.arange(T, device=x.device) + mask.query_offset[:, None]
        first = mask.query_offset
    if mask.visible is not None:
        return _of_visible(mask.visible, first)
    if mask.key_starts is None and mask.key_lengths is None and mask.cu_seqlens is None:
        return None
    present = torch.ones(B, T, dtype=torch.bool, device=x.device)
    begins = torch.zeros_like(present)
    if mask.key_starts is not None:
        present = present & (keys >= mask.key_starts[:, None])
    if mask.key_lengths is not None:
        present = present & (keys < mask.key_lengths[:, None])
    if mask.cu_seqlens is not None:
        begins[0, mask.cu_seqlens[1:-1].long()] = True
    return Tokens(present, begins)


def _of_visible(mask: Tensor, first: int | Tensor) -> Tokens:
    """From a mask [B, 1, T, S], bool or added to the scores: a token sees itself, and the one before it in a sequence.

    first is the column of the first token, or one for each row.
    """
    own = torch.arange(mask.shape[2], device=mask.device) + torch.as_tensor(first, device=mask.device).view(-1, 1)
    own = own.expand(mask.shape[0], -1)[:, None, :, None]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    present = visible.gather(3, own)[:, 0, :, 0]
    follows = visible.gather(3, (own - 1).clamp_min(0))[:, 0, :, 0]
    before = F.pad(present, (1, -1))  # whether the position before holds a token, none before the first
    return Tokens(present, present & before & ~follows)


def _restarts(position_ids: Tensor) -> Tensor:
    """Where positions do not count on by one: flash attention takes packed sequences from them, without a mask."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0))


def _packing(tokens: Tokens, one_a_row: bool) -> tuple[Tensor, Tensor]:
    """Where the tokens are in the flattened rows, and cu_seqlens of their sequences; with one_a_row one for each row.

    A row without tokens counts then, as a sequence without any.
    """
    index = tokens.present.flatten().nonzero()[:, 0]
    bounds = F.pad(tokens.present.sum(1).cumsum(0), (1, 0))
    begins = tokens.begins.flatten()[index].nonzero()[:, 0]
    if not len(begins):
        return index, bounds
    if one_a_row:
        raise ValueError(
            "attention_mask packs several sequences in a row, which have no common state; choices: use_cache=False"
        )
    return index, torch.cat((bounds, begins)).unique()


def _where(present: Tensor, new: Any, old: Any) -> Any:
    """The new state in rows that hold a token, the old one (nothing read yet: zeros) in the others."""
    if new is None:
        return None
    before: Iterator[Tensor | None] = iter(map_state(torch.zeros_like, new) if old is None else old)

    def choose(x: Tensor) -> Tensor:
        return torch.where(present.view(-1, *[1] * (x.ndim - 1)), x, next(rest))

    rest = (x for x in before if x is not None)
    return map_state(choose, new)
