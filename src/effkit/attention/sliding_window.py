"""Attention within a window of the sequence, plus a few keys that everybody sees: time and memory linear in T.

    o[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]    over the keys j that query i sees, which are
    causal       i - W d < j <= i  with d | i - j               W keys, the query's own included (arXiv 2310.06825)
    symmetric    |i - j| <= w d    with d | i - j               2 w + 1 keys (Longformer, arXiv 2004.05150, section 3.1)
    sinks        j < S, the first S tokens, at their true positions (arXiv 2309.17453 keeps them for stability)
    global       every j where i or j is a global token         one softmax over window and global columns together

causal=True hides what lies ahead from all of them. The window is exact attention over a band (`softmax_attention`'s
blocks and kernels), dilation d the same within each residue class mod d. What everybody sees, and the rows of global
tokens, are small dense products; the band and those columns are joined by their lse, each key counted once.

Cost: 4 Hq T (W + G) D operations, and G T scores for G sink and global tokens; one read of q, k, v. When not to use it:
a layer passes information no further than its window, so that a trained dense model loses what lies beyond, unless
some layers stay dense. With a window of half the sequence or more, dense attention is as fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention._blocks import fold, unfold, wide_dtype
from effkit.attention._mask import Mask, in_window
from effkit.attention._selection import Selection, as_flags, most_flags
from effkit.attention.softmax import (
    as_int32,
    check_tensors,
    checked_scale,
    kernel_cannot,
    run_outside_autocast,
    softmax_attention_torch,
)
from effkit.change import ChangeConfig
from effkit.ops import Case, Op, register


def sliding_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: Tensor | None,
    causal: bool,
    dilation: int | tuple[int, ...],
    sink_tokens: int,
    scale: float,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor:
    """The equation with the whole score matrix in memory, each key head repeated for its group of query heads."""
    group = q.shape[1] // k.shape[1]
    mask = Mask.of(q, k, causal, None, key_lengths, cu_seqlens, key_starts, query_offset)
    q, k, v = mask.blank_padding(q, k, v)
    i = torch.arange(q.shape[2], device=q.device)[:, None] + mask.offset
    j = torch.arange(k.shape[2], device=q.device)
    sees = in_window(i - j, window, causal, _per_head(dilation, q.device))  # [1 or B, 1 or Hkv, T, S]
    sees = sees | _is_sink(mask, k.shape[2], sink_tokens, cu_seqlens)[:, None, None, :]
    if global_tokens is not None:
        is_global = mask.exists(k.shape[2]) & as_flags(global_tokens, k.shape[2])
        sees = sees | is_global[:, None, None, :] | is_global[:, None, :, None]
    sees = sees & mask.visible(0, q.shape[2], 0, k.shape[2])
    sees = sees.expand(-1, k.shape[1], -1, -1).repeat_interleave(group, dim=1)
    scores = scale * (q @ k.repeat_interleave(group, dim=1).mT)  # [B, Hq, T, S]
    seen = sees.any(dim=3, keepdim=True)  # rows that see nothing give o = 0
    scores = torch.where(seen, scores.masked_fill(~sees, -math.inf), 0.0)
    return torch.where(seen, torch.softmax(scores, dim=3), 0.0) @ v.repeat_interleave(group, dim=1)


def attend_in_parts(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: Tensor | None,
    causal: bool,
    dilation: int | tuple[int, ...],
    sink_tokens: int,
    scale: float,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor:
    """The band by `attend`, joined with the columns that every query sees; the rows of global tokens put over it.

    attend takes the arguments of `softmax_attention_torch`, where a window without causal reaches to both sides.
    """
    band = _Band(attend, causal, window, scale, key_lengths, cu_seqlens, key_starts, query_offset)
    length = k.shape[2]
    mask = Mask.of(q, k, causal, None, key_lengths, cu_seqlens, key_starts, query_offset)
    shown = _is_sink(mask, length, sink_tokens, cu_seqlens) & mask.exists(length)
    n_shown = sink_tokens * (1 if cu_seqlens is None else cu_seqlens.numel() - 1)
    if global_tokens is not None:
        is_global = as_flags(global_tokens, length) & mask.exists(length)
        n_global = most_flags(global_tokens, is_global)
        shown, n_shown = shown | is_global, n_shown + n_global
    if n_shown == 0 or length == 0:
        return band(q, k, v, dilation=dilation, with_lse=False)[0]
    columns = Selection.of(shown.expand(q.shape[0], -1), min(n_shown, length))
    row, column = torch.arange(q.shape[2], device=q.device)[:, None], columns.index[:, None, None, :]
    in_band = in_window(row + mask.offset - column, window, causal, _per_head(dilation, q.device))
    visible = mask.between(row, column) & columns.chosen[:, None, None, :] & ~in_band
    queries, keys, values = mask.blank_padding(q, k, v)
    beside = _dense_attention(queries, columns.take(keys), columns.take(values), visible, scale)
    inside = band(q, k, v, dilation=dilation, with_lse=True)
    out = _join(inside, beside).to(q.dtype)
    if global_tokens is None:
        return out
    rows = Selection.of(is_global.expand(q.shape[0], -1), n_global)
    visible = mask.between(rows.index[:, None, :, None], torch.arange(length, device=q.device))
    full = _dense_attention(rows.take(queries), keys, values, visible, scale)[0]
    return rows.put(full.to(q.dtype), out)


sliding_window_attention_torch = functools.partial(attend_in_parts, softmax_attention_torch)


@dataclass(frozen=True)
class _Band:
    """Attention to the keys of the window alone."""

    attend: Callable[..., Any]
    causal: bool
    window: int
    scale: float
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    key_starts: Tensor | None
    query_offset: Tensor | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, dilation: int | tuple[int, ...], with_lse: bool
    ) -> tuple[Tensor, ...]:
        """(o,) or (o, lse)."""
        if isinstance(dilation, tuple):
            return self._by_head(q, k, v, dilation, with_lse)
        if dilation > 1:
            return self._by_residue(q, k, v, dilation, with_lse)
        dense = not self.causal and self.window >= k.shape[2] - 1
        found = self.attend(
            q, k, v, causal=self.causal, window=None if dense else self.window, scale=self.scale, softcap=None,
            sinks=None, key_lengths=self.key_lengths, cu_seqlens=self.cu_seqlens, return_lse=with_lse,
            key_starts=self.key_starts, query_offset=self.query_offset,
        )  # fmt: skip
        return found if with_lse else (found,)

    def _by_head(
        self, q: Tensor, k: Tensor, v: Tensor, dilations: tuple[int, ...], with_lse: bool
    ) -> tuple[Tensor, ...]:
        """Key heads of one dilation together, each with its group of query heads."""
        q = q.unflatten(1, (k.shape[1], -1))
        heads = {d: [head for head, own in enumerate(dilations) if own == d] for d in dilations}
        parts = [
            self(q[:, of].flatten(1, 2), k[:, of], v[:, of], dilation=d, with_lse=with_lse) for d, of in heads.items()
        ]
        order = [head for of in heads.values() for head in of]
        back = sorted(range(len(order)), key=order.__getitem__)
        joined = (torch.cat([x.unflatten(1, (-1, q.shape[2])) for x in part], 1) for part in zip(*parts, strict=True))
        return tuple(x[:, back].flatten(1, 2) for x in joined)

    def _by_residue(self, q: Tensor, k: Tensor, v: Tensor, d: int, with_lse: bool) -> tuple[Tensor, ...]:
        """Tokens i = r mod d see each other only: d sequences of T / d tokens each, with a window without gaps."""
        length = q.shape[2]
        starts, lengths = self.key_starts, self.key_lengths
        if length % d and lengths is None:
            lengths = torch.full((q.shape[0],), length, device=q.device)
        of_class = dataclasses.replace(self, key_starts=_in_residues(starts, d), key_lengths=_in_residues(lengths, d))
        parts = of_class(*(_to_residues(x, d) for x in (q, k, v)), dilation=1, with_lse=with_lse)
        return tuple(_from_residues(x, d, length) for x in parts)


def _to_residues(x: Tensor, d: int) -> Tensor:
    """[B, H, T, n] -> [B d, H, ceil(T / d), n]: token i goes to place i // d of sequence i % d."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % d))
    return padded.unflatten(2, (-1, d)).movedim(3, 1).flatten(0, 1)


def _from_residues(x: Tensor, d: int, length: int) -> Tensor:
    """The inverse, for [B d, H, ceil(T / d), ...]."""
    return x.unflatten(0, (-1, d)).movedim(1, 3).flatten(2, 3)[:, :, :length]


def _in_residues(bound: Tensor | None, d: int) -> Tensor | None:
    """How many of the tokens before a bound [B] each residue class has: int32 [B d]."""
    if bound is None:
        return None
    residues = torch.arange(d, device=bound.device)
    return ((bound[:, None] - residues + d - 1) // d).clamp_min(0).flatten().to(torch.int32)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse), not rounded, by all scores at once; visible [B, 1 or Hkv, T, G]. Rows that see nothing: 0, -inf."""
    wide = wide_dtype(q.dtype)
    group = q.shape[1] // k.shape[1]
    scores = scale * (fold(q.to(wide), k.shape[1]) @ k.to(wide).mT).unflatten(2, (group, -1))
    scores = scores.masked_fill(~visible[:, :, None], -math.inf).flatten(2, 3)  # [B, Hkv, group T, G]
    top = scores.amax(3, keepdim=True).clamp_min(torch.finfo(wide).min).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(3, keepdim=True)
    sees = total > 0
    total = torch.where(sees, total, 1.0)
    lse = torch.where(sees, top + total.log(), -math.inf)
    return unfold(weights @ v.to(wide) / total, q.shape[1]), unfold(lse, q.shape[1])[..., 0]


def _join(inside: tuple[Tensor, ...], beside: tuple[Tensor, ...]) -> Tensor:
    """Attention over two disjoint sets of keys from (o, lse) over each: the weights are exp lse."""
    (o, lse), (o_beside, lse_beside) = inside, beside
    top = torch.maximum(lse, lse_beside).clamp_min(torch.finfo(lse.dtype).min).detach()
    share, share_beside = (torch.exp(x - top)[..., None] for x in (lse, lse_beside))
    total = (share + share_beside).clamp_min(torch.finfo(lse.dtype).tiny)  # where neither sees a key: 0 / tiny
    return (share * o + share_beside * o_beside) / total


def _is_sink(mask: Mask, length: int, sink_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """bool [B or 1, S]: the first sink_tokens keys of each row, or of each packed sequence."""
    j = torch.arange(length, device=mask.device)[None]
    if mask.sequence is not None and cu_seqlens is not None:
        return j - cu_seqlens[mask.sequence.clamp_min(0)] < sink_tokens
    return j - (0 if mask.starts is None else mask.starts[:, 0, 0]) < sink_tokens


def _per_head(dilation: int | tuple[int, ...], device: torch.device) -> int | Tensor:
    """A dilation that broadcasts against [B, Hkv, T, S]."""
    return dilation if isinstance(dilation, int) else torch.tensor(dilation, device=device).view(1, -1, 1, 1)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: Tensor | None = None,
    causal: bool = True,
    dilation: int | Sequence[int] = 1,
    sink_tokens: int = 0,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_offset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention to a window of the sequence, to the first tokens and to global ones, in one softmax.

        o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]        over the keys j that query i sees

    q [B, Hq, T, D]     queries, float16, bfloat16, float32 or float64; D from 1 to 256 in the kernel
    k [B, Hkv, S, D]    keys; Hq is a multiple of Hkv, query head h reads head h // (Hq // Hkv)
    v [B, Hkv, S, Dv]   values, all three of one dtype (under autocast they are cast to its dtype)
    window              causal: exactly this many keys up to and including the query's own, >= 1 (Mistral). Otherwise
                        this many on each side of it, 2 window + 1 in all, >= 0: half of transformers'
                        `attention_window` of Longformer
    global_tokens       bool [B, T], or int positions [B, G] with -1 for none: tokens that see all and are seen by all.
                        Under torch.compile flags cost T x T, as their number is unknown; positions do not
    causal              keys after a query are hidden, those of global tokens too; query i sits at i + S - T when
                        lengths differ. causal=False, global_tokens and dilation need T = S
    dilation            the window takes every dilation-th key: i, i - d, i - 2 d, ...; one number, or one a key head
    sink_tokens         that many tokens at the start of the row (of the sequence, when packed) stay visible to all
    scale               default D ** -0.5
    key_lengths [B]     int32 or int64: keys at and past this index of a row do not exist; 0 to S
    cu_seqlens [N]      int32 or int64, 0 = first <= ... <= last <= T: sequences packed along T of a single batch row,
                        each sees itself only; rows past the last entry give zeros. dilation must be 1
    key_starts [B]      int32 or int64: keys before this index of a row do not exist (left padding)
    query_offset [B]    int32 or int64: key index of query 0 in place of S - T, for caches with room at the end
    backend             "reference", "torch", "triton" or None for the fastest that can

    Returns o [B, Hq, T, Dv] in q's dtype. A row that sees no key gives 0 and zero gradients. Values of keys that do not
    exist may be anything, NaN included. Raises ValueError or TypeError for arguments that do not fit,
    BackendUnavailable for a backend that cannot run. Sources: arXiv 2004.05150, 2309.17453, 2310.06825.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    name = "sliding_window_attention"
    lengths = dict(key_lengths=key_lengths, cu_seqlens=cu_seqlens, key_starts=key_starts, query_offset=query_offset)
    lengths = {argument: as_int32(name, argument, value) for argument, value in lengths.items()}
    sizes = SLIDING_WINDOW_ATTENTION.check(q=q, k=k, v=v, global_tokens=global_tokens, **lengths)
    check_tensors(name, sizes, q=q, k=k, v=v, global_tokens=global_tokens, **lengths)
    check_window(name, "window", window, 1 if causal else 0)
    check_window(name, "sink_tokens", sink_tokens, 0)
    dilation = _checked_dilation(dilation, sizes["Hkv"])
    if dilation != 1 and cu_seqlens is not None:
        raise ValueError(f"{name}: dilation is {dilation} with cu_seqlens, expected 1")
    _check_square(sizes, causal, dilation, global_tokens, query_offset)
    if global_tokens is not None:
        _check_global_tokens(sizes, global_tokens)
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, window=window, global_tokens=global_tokens, causal=causal)
    arguments |= dict(dilation=dilation, sink_tokens=sink_tokens, scale=checked_scale(name, scale, sizes["D"]))
    return run_outside_autocast(SLIDING_WINDOW_ATTENTION, backend, arguments | lengths)


@dataclass(frozen=True)
class SlidingWindowConfig(ChangeConfig):
    """Limits attention layers of a HuggingFace model to a window: `apply(model, SlidingWindowConfig(window=1024))`.

    window: tokens that a layer may see, its own included; a smaller window of the layer's own wins. sink_tokens: that
    many tokens at the start of each row stay visible as well. layers: which attention layers, by number from 0,
    negative ones from the end; None is all of them. backend: as in sliding_window_attention. Weights stay as they are;
    the cache of generate() keeps what the window can see.
    """

    window: int
    sink_tokens: int = 0
    layers: tuple[int, ...] | None = None
    backend: str | None = None
    handler: ClassVar[str] = "effkit.hf.sliding_window:use_window"

    def __post_init__(self) -> None:
        check_window("SlidingWindowConfig", "window", self.window, 1)
        check_window("SlidingWindowConfig", "sink_tokens", self.sink_tokens, 0)
        if self.backend not in (None, "reference", "torch", "triton"):
            raise ValueError(f"backend is {self.backend!r}, choices: None, 'reference', 'torch', 'triton'")
        if self.layers is not None and (not self.layers or not all(_is_int(layer) for layer in self.layers)):
            raise ValueError(f"layers is {self.layers!r}, expected None or a tuple of layer numbers")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_window(op: str, name: str, value: Any, least: int) -> None:
    """ValueError unless value is an int of at least `least`."""
    if not _is_int(value) or value < least:
        raise ValueError(f"{op}: {name} is {value!r}, expected an int >= {least}")


def _checked_dilation(dilation: Any, heads: int) -> int | tuple[int, ...]:
    each = dilation if isinstance(dilation, Sequence) else (dilation,)
    if not each or not all(_is_int(d) and d >= 1 for d in each):
        raise ValueError(f"sliding_window_attention: dilation is {dilation!r}, expected an int >= 1, or one a key head")
    if isinstance(dilation, Sequence) and len(dilation) != heads:
        raise ValueError(
            f"sliding_window_attention: dilation is {dilation!r}, expected one number for each of Hkv={heads} key heads"
        )
    return each[0] if len(set(each)) == 1 else tuple(each)


def _check_square(
    sizes: dict[str, int], causal: bool, dilation: Any, global_tokens: Tensor | None, query_offset: Tensor | None
) -> None:
    """Raises where queries are not the keys' own and who is whose neighbour is not defined."""
    name = "sliding_window_attention"
    asked = {
        "causal=False": not causal,
        f"dilation={dilation}": dilation != 1,
        "global_tokens": global_tokens is not None,
    }
    special = [what for what, given in asked.items() if given]
    if special and query_offset is not None:
        raise ValueError(f"{name}: query_offset is given with {special[0]}, which needs queries at their keys' places")
    if special and sizes["T"] != sizes["S"]:
        raise ValueError(f"{name}: T={sizes['T']} and S={sizes['S']} differ, but {special[0]} needs T = S")


def _check_global_tokens(sizes: dict[str, int], global_tokens: Tensor) -> None:
    name, dtype = "sliding_window_attention", global_tokens.dtype
    if dtype not in (torch.bool, torch.int32, torch.int64):
        raise TypeError(f"{name}: global_tokens is {dtype}, expected bool flags [B, T] or int positions [B, G]")
    if dtype == torch.bool and sizes["G"] != sizes["T"]:
        raise ValueError(f"{name}: global_tokens has {sizes['G']} flags a row, expected T={sizes['T']}")
    readable = global_tokens.device.type == "cpu" and not torch.compiler.is_compiling() and global_tokens.numel()
    if dtype != torch.bool and readable and int(global_tokens.max()) >= sizes["T"]:
        raise ValueError(
            f"{name}: global_tokens holds {int(global_tokens.max())}, expected positions below T={sizes['T']}"
        )


def _sizes(B: int, H: int | tuple[int, int], T: int | tuple[int, int], D: int, **others: int) -> dict[str, Any]:
    """Sizes of a case; H (query, key heads) and T (queries, keys), or one number for both."""
    (hq, hkv), (t, s) = (x if isinstance(x, tuple) else (x, x) for x in (H, T))
    return dict(B=B, Hq=hq, Hkv=hkv, T=t, S=s, D=D, Dv=D) | others


def _flops(case: Case) -> float:
    """Two products over the keys of the window and those that everybody sees, and over all keys for global rows."""
    n: Any = case.sizes
    window = case.options["window"]
    n_global = len(case.ints["global_tokens"][0]) if "global_tokens" in case.ints else 0
    keys = min(n["S"], window if case.options.get("causal", True) else 2 * window + 1)
    scores = n["T"] * (keys + n_global + case.options.get("sink_tokens", 0)) + n_global * n["S"]
    return 2 * n["B"] * n["Hq"] * scores * (n["D"] + n["Dv"])


def _traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * (n["Hq"] * n["T"] + n["Hkv"] * n["S"]) * (n["D"] + n["Dv"])


# Compiled tests take every fourth or so of these; tests/attention/test_sliding_window.py compiles the other forms.
_SIDES: dict[str, Any] = dict(causal=False)
_CASES = (
    Case("one", _sizes(1, 1, 1, 16), dict(window=1)),
    Case("no batch", _sizes(0, 2, 5, 16), dict(window=2, sink_tokens=1)),
    Case("no queries", _sizes(2, 2, (0, 7), 16), dict(window=3, sink_tokens=1)),
    Case("sinks", _sizes(2, (4, 2), 70, 32), dict(window=9, sink_tokens=4)),
    Case("causal", _sizes(1, (4, 2), 127, 32), dict(window=16)),
    Case("sinks of a decoding step", _sizes(2, (4, 2), (3, 90), 32), dict(window=20, sink_tokens=4)),
    Case("sinks, more queries than keys", _sizes(1, 2, (20, 15), 16), dict(window=4, sink_tokens=2)),
    Case("both sides", _sizes(1, (4, 2), 130, 32), dict(window=20, **_SIDES)),
    Case("own key alone", _sizes(2, 2, 33, 16), dict(window=0, **_SIDES)),
    Case("both sides over all", _sizes(1, 2, 37, 40), dict(window=64, **_SIDES)),
    Case("both sides, padded", _sizes(3, 2, 65, 16), dict(window=7, **_SIDES),
         ints=dict(key_lengths=(65, 0, 33), key_starts=(0, 0, 20))),
    Case("sinks, padded", _sizes(3, 2, 65, 16), dict(window=5, sink_tokens=3),
         ints=dict(key_starts=(0, 63, 30), key_lengths=(65, 65, 50))),
    Case("sinks, a cache with room", _sizes(2, (4, 2), (5, 60), 32), dict(window=20, sink_tokens=3),
         ints=dict(key_lengths=(45, 45), query_offset=(40, 40), key_starts=(0, 20))),
    Case("sinks, packed", _sizes(1, (4, 2), 70, 16), dict(window=5, sink_tokens=3),
         ints=dict(cu_seqlens=(0, 2, 2, 40, 64))),
    Case("both sides, packed", _sizes(1, 2, 70, 32), dict(window=4, **_SIDES), ints=dict(cu_seqlens=(0, 1, 40, 66))),
    Case("global tokens", _sizes(2, (4, 2), 67, 32, G=3), dict(window=6, **_SIDES),
         ints=dict(global_tokens=((0, 40, 66), (5, -1, 5)))),
    Case("dilated", _sizes(2, (4, 2), 67, 16), dict(window=6, dilation=3)),
    Case("a dilation for each head", _sizes(1, (6, 3), 65, 16, G=2), dict(window=5, dilation=(2, 1, 2), **_SIDES),
         ints=dict(global_tokens=((0, 31),))),
    Case("global tokens, causal, with sinks", _sizes(2, 2, 40, 16, G=2), dict(window=5, sink_tokens=2),
         ints=dict(global_tokens=((12, 1), (30, 20)), key_starts=(0, 11), key_lengths=(39, 40))),
    Case("global tokens, packed", _sizes(1, 2, 40, 16, G=4), dict(window=3, sink_tokens=1, **_SIDES),
         ints=dict(cu_seqlens=(0, 11, 30), global_tokens=((3, 11, 29, 35),))),
    Case("all together", _sizes(2, (4, 2), 66, 24, G=2), dict(window=4, dilation=2, sink_tokens=3, scale=0.3, **_SIDES),
         ints=dict(global_tokens=((0, 50), (64, 33)), key_starts=(0, 7), key_lengths=(61, 66))),
    Case("values wider", _sizes(1, 2, 40, 40, Dv=64), dict(window=8, sink_tokens=1)),
    Case("transposed", _sizes(2, (4, 2), 33, 32), dict(window=8, sink_tokens=2), layout="transposed"),
    Case("peaked", _sizes(1, 2, 65, 32), dict(window=9, sink_tokens=2), gain=dict(q=30.0)),
    Case("long", _sizes(2, (16, 4), 4096, 128), dict(window=512, sink_tokens=4), large=True),
    Case("long, both sides", _sizes(1, 12, 4096, 64, G=4), dict(window=256, **_SIDES),
         ints=dict(global_tokens=((0, 1, 2, 3),)), large=True),
)  # fmt: skip
_FIRST: dict[str, Any] = dict(global_tokens=((0, 1, 2, 3),))
_BENCH = (
    Case("causal 256", _sizes(1, 8, 4096, 64), dict(window=256)),
    Case("causal 256, twice the length", _sizes(1, 8, 8192, 64), dict(window=256)),
    Case("256 and 4 sinks", _sizes(1, 8, 4096, 64), dict(window=256, sink_tokens=4)),
    Case("128 on both sides, 4 global", _sizes(1, 8, 4096, 64, G=4), dict(window=128, **_SIDES), ints=_FIRST),
    Case("128 on both sides, 4 global, 8k", _sizes(1, 8, 8192, 64, G=4), dict(window=128, **_SIDES),
         ints=_FIRST),
    Case("1024 and 4 sinks of 16k", _sizes(1, (16, 4), 16384, 128), dict(window=1024, sink_tokens=4), large=True),
    Case("256 on both sides, 4 global, 16k", _sizes(4, 12, 16384, 64, G=4), dict(window=256, **_SIDES),
         ints=dict(global_tokens=_FIRST["global_tokens"] * 4), large=True),
)  # fmt: skip

SLIDING_WINDOW_ATTENTION = register(
    Op(
        name="sliding_window_attention",
        area="attention",
        summary="attention in a window, causal or symmetric, dilated, with sink and global tokens; linear in T",
        paper="https://arxiv.org/abs/2004.05150",
        shapes="q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], global_tokens [B, G]?, key_lengths [B]?, "
        "cu_seqlens [N]?, key_starts [B]?, query_offset [B]? -> o [B, Hq, T, Dv]",
        function=sliding_window_attention,
        reference=sliding_window_attention_reference,
        torch=sliding_window_attention_torch,
        triton="effkit.kernels.sliding_window:sliding_window_attention",
        supports=kernel_cannot,
        cases=_CASES,
        bench=_BENCH,
        grads=("q", "k", "v"),
        flops=_flops,
        traffic=_traffic,
        rivals={"sdpa": "effkit.rivals:sdpa_in_window"},
    )
)
