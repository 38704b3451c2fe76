"""The mask that effkit gives to a HuggingFace model: a few numbers a row in place of a [B, 1, T, S] tensor.

transformers asks the registered factory for one mask per forward (and per kind of layer) and hands it to every layer.
`make_mask` translates what it is asked for, a predicate over indices and a 2-D padding mask, into the arguments of
`softmax_attention`: causal, window, key_starts, key_lengths, query_offset, cu_seqlens. What these cannot say (holes in
the padding, chunks, a user's own predicate, windows in both directions) becomes a boolean tensor, with a warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as hf

Predicate = Callable[..., Any]
_MAKERS = tuple(
    getattr(hf, name)
    for name in (
        "and_masks",
        "sliding_window_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
    )
    if hasattr(hf, name)  # the last one came after 5.17
)


@dataclass(frozen=True)
class MaskSpec:
    """Which keys each query sees.

    shape is [B, 1, T, S] of the tensor it stands for. Either visible is that tensor (bool), or the other fields are
    arguments of `softmax_attention`; query_offset is right in both cases. generate() makes the masks of a static cache
    itself and passes them through code that expects tensors: hence ndim, contiguous() and to().
    """

    shape: tuple[int, int, int, int]
    causal: bool = False
    window: int | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    query_offset: Tensor | None = None
    cu_seqlens: Tensor | None = None
    visible: Tensor | None = None

    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> MaskSpec:
        return self

    def to(self, device: Any, non_blocking: bool = False) -> MaskSpec:
        """On another device, for models whose layers are spread over several."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class _Pattern:
    """A predicate that softmax_attention can compute; sequence [T] numbers the packed sequences."""

    causal: bool
    window: int | None = None
    sequence: Tensor | None = None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Predicate = hf.causal_mask_function,
    attention_mask: Tensor | MaskSpec | None = None,
    **options: Any,
) -> MaskSpec:
    """The mask factory registered with transformers; options are the further arguments of `hf.sdpa_mask`.

    Query i has position q_offset + i, key j has position kv_offset + j. mask_function(b, h, q, k) says of positions
    whether q sees k; attention_mask [B, P] (bool) which positions hold a token, none at and past P.
    """
    if isinstance(attention_mask, MaskSpec):  # generate() with a static cache passes in what it was given
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected [batch, keys], 1 where there is a token"
        )
    shape = (batch_size, 1, q_length, kv_length)
    pattern = _pattern(mask_function, batch_size, **options)
    extent = _extent(attention_mask, kv_length, kv_offset)
    offset = _query_offset(shape, q_offset - kv_offset, options.get("device"))
    if isinstance(pattern, _Pattern) and not isinstance(extent, str):
        starts, lengths = extent
        bounds = None if pattern.sequence is None else _bounds(pattern.sequence)
        return MaskSpec(shape, pattern.causal, pattern.window, starts, lengths, offset, bounds)
    reason = pattern if isinstance(pattern, str) else extent
    warn_dense(str(reason))
    options |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, attention_mask=attention_mask)
    visible = hf.sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,  # type: ignore[arg-type]  # a static cache gives a tensor
        kv_offset,
        mask_function,
        **options,
    )
    return MaskSpec(shape, query_offset=offset, visible=visible)


def _pattern(
    mask_function: Predicate,
    batch_size: int,
    *,
    config: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    **_: Any,
) -> _Pattern | str:
    """What a predicate of transformers computes, or why softmax_attention cannot."""
    if mask_function is hf.causal_mask_function:
        return _Pattern(causal=True)
    if mask_function is hf.bidirectional_mask_function:
        return _Pattern(causal=False)
    unknown = "its rule is none of causal, causal window, bidirectional, packed sequences"
    if torch.compiler.is_compiling():
        # Closures cannot be opened while tracing. But allow_is_causal_skip promises a causal mask, of width local_size
        # where that is given, and local_size is a chunk only where the config has attention_chunk_size.
        if allow_is_causal_skip and local_size and getattr(config, "attention_chunk_size", None) is None:
            return _Pattern(causal=True, window=local_size)
        return unknown
    causal, window, sequence, remapped = False, None, None, False
    rules = [mask_function]
    for rule in rules:  # all of them must hold; the list grows
        inside = _captured(rule)
        if rule is hf.causal_mask_function:
            causal = True
        elif "mask_functions" in inside:
            rules += inside["mask_functions"]
        elif "sliding_window" in inside:
            window = inside["sliding_window"]
        elif "packed_sequence_mask" in inside:
            sequence = inside["packed_sequence_mask"]
        elif "position_ids" in inside:
            # Within a packed sequence positions count up by one: a causal rule on them is that rule on indices.
            rules.append(inside["mask_function"])
            remapped = True
        elif rule is not hf.bidirectional_mask_function:
            return unknown
    if (window is not None and not causal) or (remapped and sequence is None):
        return unknown
    if sequence is None:
        return _Pattern(causal, window)
    if batch_size > 1:
        return "position_ids restart (packed sequences) in a batch of more than one row"
    return _Pattern(causal, window, sequence[0])


def _captured(function: Any) -> dict[str, Any]:
    """The variables that a function closes over, by name, where one of _MAKERS made it; otherwise none."""
    code: Any = getattr(function, "__code__", None)
    if not any(code in maker.__code__.co_consts for maker in _MAKERS):
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__, strict=True)}


def _extent(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> tuple[Tensor | None, Tensor | None] | str:
    """key_starts and key_lengths (int32 [B], None: every key) of a padding mask, or why there are none."""
    if attention_mask is None:
        return None, None
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    lengths = real.shape[1] - (real.flip(1).cumsum(1) == 0).sum(1)
    starts = torch.minimum((real.cumsum(1) == 0).sum(1), lengths)  # a row without any token: 0, 0
    broken = (lengths - starts != real.sum(1)).any()
    holes = "attention_mask has padding between the tokens of a row"
    if torch.compiler.is_compiling():  # the values cannot be read without leaving the graph: check them where they are
        torch._assert_async(~broken, f"{holes}, which effkit attention cannot handle under torch.compile")
    else:
        has_holes, is_full = torch.stack((broken, real.all())).tolist()  # one wait for the device per mask
        if has_holes:
            return holes
        if is_full and real.shape[1] == kv_length:
            return None, None
    return starts.to(torch.int32), lengths.to(torch.int32)


def _query_offset(shape: tuple[int, ...], offset: int | Tensor, device: Any) -> Tensor | None:
    """The key index of query 0, int32 [B]; None where it is S - T, which softmax_attention assumes.

    A static cache hands out its live counter, and layer 0 advances it before the mask is read: a copy is essential.
    """
    if isinstance(offset, Tensor):
        return offset.to(torch.int32).repeat(shape[0])
    if offset == shape[3] - shape[2]:
        return None
    return torch.full(shape[:1], offset, dtype=torch.int32, device=device)


def _bounds(sequence: Tensor) -> Tensor:
    """cu_seqlens of tokens numbered by their sequence, 0 0 0 1 1 2 -> 0 3 5 6."""
    lengths = torch.unique_consecutive(sequence, return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@torch.compiler.assume_constant_result  # under torch.compile the warning comes once, from tracing
def warn_dense(reason: str) -> None:
    """Says, once a reason, that attention is about to cost more than users expect."""
    message = f"effkit attention takes memory and time of order T * S here, as it needs the mask as a tensor: {reason}"
    warnings.warn(message, stacklevel=3)
