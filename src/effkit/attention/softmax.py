"""Exact softmax attention whose memory grows with T, not T x S; multi-head, grouped-query and multi-query alike.

    s[i, j] = scale * q[i] . k[j],   softcap c: s = c tanh(s / c),   masked to -inf where i does not see j
    lse[i]  = log(sum_j exp s[i, j] + exp sink),   o[i] = sum_j exp(s[i, j] - lse[i]) v[j]

Query head h reads key/value head h // (Hq // Hkv) (Ainslie et al., arXiv 2305.13245); keys and values are never
repeated in memory. Tiles and running maxima: Dao et al., arXiv 2205.14135; sinks: a learned logit per head that only
enters the denominator (arXiv 2508.10925); windows: arXiv 2310.06825.

Cost: 4 Hq T S D operations (half of it when causal, T W instead of T S with a window) and one read of q, k, v, one
write of o. When not to use it: for a short causal sequence torch's own kernel is as good; for T far beyond what S^2 can
pay, use the linear-time techniques, which are other functions and not exact. Grouped-query conversion of a trained
model loses quality until it is trained further: mean pooling of heads is a starting point, not an equal model.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention._blocks import BlockAttention, fold, unfold, wide_dtype
from effkit.attention._mask import Mask
from effkit.change import ChangeConfig
from effkit.ops import Case, Op, register


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equation with the whole score matrix in memory, each key head repeated for its group of query heads."""
    group = q.shape[1] // k.shape[1]
    mask = Mask.of(q, k, causal, window, key_lengths, cu_seqlens, key_starts, query_offset)
    q, k, v = mask.blank_padding(q, k, v)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = scale * (q @ k.mT)  # [B, Hq, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.visible(0, q.shape[2], 0, k.shape[2]), -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=3)
        v = torch.cat((v, torch.zeros_like(v[:, :, :1]) if v.shape[2] else v.new_zeros(*v.shape[:2], 1, v.shape[3])), 2)
    sees = (scores > -math.inf).any(dim=3, keepdim=True)  # rows that see nothing give o = 0, lse = -inf
    finite = torch.where(sees, scores, 0.0)
    weights = torch.where(sees, torch.softmax(finite, dim=3), 0.0)
    lse = torch.where(sees[..., 0], torch.logsumexp(finite, dim=3), -math.inf)
    o = weights @ v
    return (o, lse.to(wide_dtype(q.dtype))) if return_lse else o


def softmax_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    key_starts: Tensor | None,
    query_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's fused kernel where it computes the same thing, otherwise blocks of query rows against their keys only."""
    options: dict[str, Any] = dict(causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks)
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        return _by_sequence(q, k, v, cu_seqlens.tolist(), return_lse, options)
    ragged = any(tensor is not None for tensor in (key_lengths, key_starts, query_offset, cu_seqlens))
    plain = softcap is None and sinks is None and not ragged and not return_lse and q.shape[3] == v.shape[3]
    square = q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
    if plain and q.numel() and k.numel() and (square or (window is None and (q.shape[2] == 1 or not causal))):
        return _by_sdpa(q, k, v, causal and q.shape[2] > 1, scale)
    o, lse = BlockAttention.apply(
        q, k, v, sinks, key_lengths, cu_seqlens, key_starts, query_offset, causal, window, scale, softcap
    )
    return (o, lse) if return_lse else o


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    key_starts: Tensor | None = None,
    query_offset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention; grouped-query when k and v have fewer heads than q.

        o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]     over the keys j that query i sees

    q [B, Hq, T, D]     queries, float16, bfloat16, float32 or float64; D from 1 to 256 in the kernel
    k [B, Hkv, S, D]    keys; Hq is a multiple of Hkv, query head h reads head h // (Hq // Hkv)
    v [B, Hkv, S, Dv]   values, all three of one dtype (under autocast they are cast to its dtype)
    causal              query i sees key j only if j <= i + S - T (aligned bottom-right when lengths differ)
    window              with causal: exactly this many keys up to and including the query's own; >= 1
    scale               default D ** -0.5
    softcap             scores become c tanh(score / c) before the mask; > 0
    sinks [Hq]          a logit per head that joins the denominator (and lse) but has no value
    key_lengths [B]     int32 or int64: keys at and past this index of a row do not exist; 0 to S
    cu_seqlens [N]      int32 or int64, 0 = first <= ... <= last <= T: sequences packed along T of a single batch row,
                        each sees itself only; rows past the last entry give zeros
    return_lse          also return lse, the log of each row's denominator
    key_starts [B]      int32 or int64: keys before this index of a row do not exist (left padding)
    query_offset [B]    int32 or int64: key index of query 0 for causal and window, in place of S - T, for caches with
                        room at the end
    backend             "reference", "torch", "triton" or None for the fastest that can

    Returns o [B, Hq, T, Dv] in q's dtype; with return_lse also lse [B, Hq, T] in float32 (float64 for float64). A row
    that sees no key gives o = 0 and lse = -inf (lse = sink with sinks) and zero gradients. Values of keys that do not
    exist may be anything, NaN included. Gradients flow to q, k, v and sinks, from o and lse.
    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, causal=causal, window=window, softcap=softcap, sinks=sinks)
    lengths = dict(key_lengths=key_lengths, cu_seqlens=cu_seqlens, key_starts=key_starts, query_offset=query_offset)
    lengths = {name: as_int32("softmax_attention", name, value) for name, value in lengths.items()}
    sizes = SOFTMAX_ATTENTION.check(q=q, k=k, v=v, sinks=sinks, **lengths)
    _check_window(window, causal)
    if softcap is not None and not (isinstance(softcap, float | int) and 0 < softcap < math.inf):
        raise ValueError(f"softmax_attention: softcap is {softcap!r}, expected None or a finite number > 0")
    check_tensors("softmax_attention", sizes, q=q, k=k, v=v, sinks=sinks, **lengths)
    scale = checked_scale("softmax_attention", scale, sizes["D"])
    arguments |= dict(**lengths, scale=scale, return_lse=return_lse)
    return run_outside_autocast(SOFTMAX_ATTENTION, backend, arguments)


@dataclass(frozen=True)
class SoftmaxAttentionConfig(ChangeConfig):
    """Puts exact effkit attention into a HuggingFace model: `effkit.apply(model, SoftmaxAttentionConfig())`.

    window: tokens that every layer may see, its own included; None keeps each layer's window, a smaller one of the
    layer's own wins. backend: as in softmax_attention. The projections and weights stay as they are.
    """

    window: int | None = None
    backend: str | None = None
    handler: ClassVar[str] = "effkit.hf.attention:use_attention"

    def __post_init__(self) -> None:
        _check_window(self.window, causal=True)
        if self.backend not in (None, "reference", "torch", "triton"):
            raise ValueError(f"backend is {self.backend!r}, choices: None, 'reference', 'torch', 'triton'")


def _by_sequence(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], return_lse: bool, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed sequences one by one: the cost is the sum of their own costs."""
    options |= dict(key_lengths=None, cu_seqlens=None, key_starts=None, query_offset=None, return_lse=return_lse)
    parts: list[Any] = []
    for begin, end in itertools.pairwise(bounds):
        if end > begin:
            own = [x[:, :, begin:end] for x in (q, k, v)]
            parts.append(softmax_attention_torch(own[0], own[1], own[2], **options))
    rest = q.shape[2] - bounds[-1]
    out = q.new_zeros(*q.shape[:2], rest, v.shape[3])
    if not return_lse:
        return torch.cat([*parts, out], 2)
    lse = q.new_full((*q.shape[:2], rest), -math.inf, dtype=wide_dtype(q.dtype))
    return torch.cat([part[0] for part in parts] + [out], 2), torch.cat([part[1] for part in parts] + [lse], 2)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """torch's fused attention; the heads of a group share their key head through a stride of zero.

    On a CPU its gradients of keys and values in half precision err by more than the judge allows from a few hundred
    queries on (and in float16 they are slow): there float32 does the work.
    """
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wants_grad and q.device.type == "cpu" and q.dtype.itemsize == 2:
        return _by_sdpa(q.float(), k.float(), v.float(), causal, scale).to(q.dtype)
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if group == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if not causal:  # the rows of a group are just more rows
        folded = F.scaled_dot_product_attention(fold(q, k.shape[1]), k, v, scale=scale)
        return unfold(folded, heads)
    grouped = q.reshape(batch * k.shape[1], group, rows, q.shape[3])
    k, v = (x.reshape(-1, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=scale)
    return out.reshape(batch, heads, rows, v.shape[3])


def run_outside_autocast(op: Op, backend: str | None, arguments: dict[str, Any]) -> Any:
    """op.run, where autocast does not round the wide products inside; q, k, v have been cast by now."""
    kind = arguments["q"].device.type
    if not torch.is_autocast_enabled(kind):
        return op.run(backend, **arguments)
    with torch.autocast(kind, enabled=False):
        return op.run(backend, **arguments)


def as_int32(op: str, name: str, value: Tensor | None) -> Tensor | None:
    """A tensor of integers as int32; TypeError for anything else."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} is {got}, expected a tensor of int32 or int64")
    return value.to(torch.int32)


def checked_scale(op: str, scale: float | None, width: int) -> float:
    """The scale as a number, width ** -0.5 where it is None; ValueError for anything else."""
    if scale is None:
        return width**-0.5 if width else 1.0
    if isinstance(scale, bool) or not isinstance(scale, float | int) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale!r}, expected a finite number or None for D ** -0.5")
    return float(scale)


def _check_window(window: int | None, causal: bool) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is {window!r}, expected None or an int >= 1 (keys seen, the query's own included)")
    if not causal:
        raise ValueError(f"window={window} needs causal=True: it counts the keys up to the query's own")


def check_tensors(op: str, sizes: dict[str, int], **arguments: Any) -> None:
    """What the shape line does not say. Values of integer tensors are read only where that costs nothing."""
    q, k, v = (arguments[name] for name in "qkv")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2 or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; "
            "expected one dtype of float16, bfloat16, float32, float64"
        )
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected q's device {q.device}")
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(
            f"{op}: q has Hq={sizes['Hq']} heads, expected a multiple of the Hkv={sizes['Hkv']} heads of k and v"
        )
    if arguments["cu_seqlens"] is not None:
        for name in ("key_lengths", "key_starts", "query_offset"):
            if arguments.get(name) is not None:
                raise ValueError(f"{op}: {name} and cu_seqlens are both given, expected at most one of them")
        if sizes["B"] != 1 or sizes["T"] != sizes["S"] or sizes["N"] < 1:
            raise ValueError(
                f"{op}: cu_seqlens has {sizes['N']} entries with B={sizes['B']}, T={sizes['T']}, S={sizes['S']}; "
                "packed sequences need B=1, T=S and at least one entry"
            )
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(op, sizes, **arguments)


def _check_values(op: str, sizes: dict[str, int], **arguments: Any) -> None:
    cu_seqlens = arguments["cu_seqlens"]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > sizes["T"]:
            raise ValueError(f"{op}: cu_seqlens is {bounds}, expected 0 = first <= ... <= last <= T={sizes['T']}")
    for name in ("key_lengths", "key_starts"):
        value = arguments[name]
        if value is not None and value.numel() and (value.min() < 0 or value.max() > sizes["S"]):
            raise ValueError(f"{op}: {name} is {value.tolist()}, expected values from 0 to S={sizes['S']}")


def kernel_cannot(q: Tensor, v: Tensor, **_: Any) -> str | None:
    """Why the kernel cannot run, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"head widths {q.shape[3]} and {v.shape[3]}: the kernel holds up to 256"
    return None


def _sizes(B: int, H: int | tuple[int, int], T: int | tuple[int, int], D: int | tuple[int, int]) -> dict[str, int]:
    """Sizes of a case; H (query, key heads), T (queries, keys), D (keys, values), or one number for both."""
    (hq, hkv), (t, s), (d, dv) = (x if isinstance(x, tuple) else (x, x) for x in (H, T, D))
    return dict(B=B, Hq=hq, Hkv=hkv, T=t, S=s, D=d, Dv=dv)


def _score_count(case: Case) -> float:
    """How many scores a case needs, per batch row and query head."""
    t, s = case.sizes["T"], case.sizes["S"]
    assert isinstance(t, int) and isinstance(s, int)
    if not case.options.get("causal"):
        return t * s
    window = case.options.get("window") or s
    return sum(min(window, max(0, i + s - t + 1)) for i in range(t))


def _flops(case: Case) -> float:
    n: Any = case.sizes
    return 2 * n["B"] * n["Hq"] * _score_count(case) * (n["D"] + n["Dv"])


def _traffic(case: Case) -> float:
    n: Any = case.sizes
    return n["B"] * (n["Hq"] * n["T"] + n["Hkv"] * n["S"]) * (n["D"] + n["Dv"])


_ALL = dict(causal=True, window=20, softcap=15.0, return_lse=True)
_CASES = (
    Case("one", _sizes(1, 1, 1, 16)),
    Case("no batch", _sizes(0, 2, 5, 16), dict(causal=True, return_lse=True)),
    Case("no queries", _sizes(2, 2, (0, 7), 16)),
    Case("no keys", _sizes(2, 2, (5, 0), 16), dict(return_lse=True)),
    Case("primes", _sizes(2, 3, 37, (40, 40)), dict(causal=True)),
    Case("one past a block", _sizes(1, 2, 65, 64), dict(causal=True)),
    Case("two queries", _sizes(2, 2, 2, 16), dict(causal=True, return_lse=True)),
    Case("grouped", _sizes(2, (4, 2), 127, 64), dict(causal=True, return_lse=True)),
    Case("multi-query", _sizes(1, (4, 1), 63, 16), dict(causal=True)),
    Case("both directions", _sizes(2, (4, 2), (15, 64), 32), dict(return_lse=True)),
    Case("square, both directions", _sizes(1, 2, 64, 64)),
    Case("decode", _sizes(2, (8, 2), (1, 127), 64), dict(causal=True)),
    Case("decode two, window", _sizes(1, (6, 2), (2, 127), 32), dict(causal=True, window=40, return_lse=True)),
    Case("decode, lengths and sinks", _sizes(3, (4, 1), (1, 100), 64), dict(causal=True, softcap=20.0, return_lse=True),
         ("sinks",), dict(key_lengths=(0, 17, 100))),
    Case("rows that see nothing", _sizes(1, 2, (64, 15), 32), dict(causal=True, return_lse=True)),
    Case("window 1", _sizes(1, 2, 33, 16), dict(causal=True, window=1)),
    Case("window", _sizes(1, (4, 2), 127, 32), dict(causal=True, window=16, return_lse=True)),
    Case("window over all", _sizes(1, 2, 40, 16), dict(causal=True, window=64)),
    Case("window, more keys", _sizes(1, 2, (30, 101), 16), dict(causal=True, window=33)),
    Case("window, blocks", _sizes(1, (4, 2), (280, 300), 16), dict(causal=True, window=40)),
    Case("several blocks", _sizes(1, (2, 1), (290, 290), 16), dict(causal=True, softcap=30.0, return_lse=True)),
    Case("hundreds of keys", _sizes(1, (4, 2), 640, 64), dict(causal=True)),
    Case("hundreds of keys, both directions", _sizes(1, 2, (640, 600), 64)),
    Case("softcap", _sizes(1, 2, 65, 32), dict(causal=True, softcap=2.0, return_lse=True), gain=dict(q=4.0)),
    Case("sinks", _sizes(2, (4, 2), 65, 32), dict(causal=True, return_lse=True), ("sinks",)),
    Case("sinks where nothing is seen", _sizes(1, 2, (9, 4), 16), dict(causal=True, return_lse=True), ("sinks",)),
    Case("right padding", _sizes(3, 2, 65, 32), dict(return_lse=True), ints=dict(key_lengths=(65, 0, 33))),
    Case("left padding", _sizes(3, (4, 2), 65, 32), dict(causal=True, window=50, return_lse=True),
         ints=dict(key_starts=(0, 64, 20))),
    Case("cache with room", _sizes(2, (4, 2), (5, 90), 32), dict(causal=True, window=30),
         ints=dict(key_lengths=(45, 45), query_offset=(40, 40), key_starts=(0, 20))),
    Case("packed", _sizes(1, (4, 2), 70, 32), dict(causal=True, return_lse=True),
         ints=dict(cu_seqlens=(0, 1, 1, 40, 64))),
    Case("packed, window, sinks", _sizes(1, 2, 130, 16), dict(causal=True, window=9), ("sinks",),
         dict(cu_seqlens=(0, 66, 130))),
    Case("packed, both directions", _sizes(1, 2, 65, 16), ints=dict(cu_seqlens=(0, 30, 65))),
    Case("width 80", _sizes(1, 2, 33, 80), dict(causal=True)),
    Case("width 128", _sizes(1, (2, 1), 65, 128), dict(causal=True)),
    Case("width 256", _sizes(1, 1, 33, 256), dict(causal=True, return_lse=True)),
    Case("values wider", _sizes(1, 2, 40, (40, 64)), dict(causal=True)),
    Case("values narrower", _sizes(1, (4, 2), (3, 70), (192, 128)), dict(causal=True, return_lse=True)),
    Case("transposed", _sizes(2, (4, 2), 33, 32), dict(causal=True), layout="transposed"),
    Case("strided", _sizes(1, 2, 33, 32), dict(causal=True), ("sinks",), layout="strided"),
    Case("peaked", _sizes(1, 2, 65, 32), dict(causal=True, return_lse=True), gain=dict(q=30.0)),
    Case("scaled", _sizes(1, 2, 33, 32), dict(causal=True, scale=0.5)),
    Case("all together", _sizes(2, (6, 2), (65, 90), (40, 24)), _ALL, ("sinks",),
         dict(key_starts=(0, 30), key_lengths=(90, 81), query_offset=(25, 16))),
    Case("long", _sizes(2, (16, 4), 4096, 128), dict(causal=True, return_lse=True), large=True),
    Case("long window", _sizes(1, (16, 4), 8192, 64), dict(causal=True, window=1024), ("sinks",), large=True),
    Case("long decode", _sizes(4, (32, 8), (1, 16384), 128), dict(causal=True), large=True),
)  # fmt: skip
_BENCH = (
    Case("dense causal", _sizes(1, 8, 2048, 64), dict(causal=True)),
    Case("grouped causal", _sizes(1, (16, 4), 2048, 64), dict(causal=True)),
    Case("window 256", _sizes(1, 8, 4096, 64), dict(causal=True, window=256)),
    Case("window 256, twice the length", _sizes(1, 8, 8192, 64), dict(causal=True, window=256)),
    Case("grouped decode", _sizes(4, (16, 4), (1, 4096), 64), dict(causal=True), forward_only=True),
    Case("dense 4k", _sizes(4, 16, 4096, 128), dict(causal=True), large=True),
    Case("dense 16k", _sizes(1, 16, 16384, 128), dict(causal=True), large=True),
    Case("grouped 8k", _sizes(2, (32, 8), 8192, 128), dict(causal=True), large=True),
    Case("window 1024 of 16k", _sizes(1, 16, 16384, 128), dict(causal=True, window=1024), large=True),
    Case("grouped decode 32k", _sizes(16, (32, 8), (1, 32768), 128), dict(causal=True), large=True, forward_only=True),
)

SOFTMAX_ATTENTION = register(
    Op(
        name="softmax_attention",
        area="attention",
        summary="exact attention: grouped-query, windows, softcap, sinks, packed and padded batches",
        paper="https://arxiv.org/abs/2305.13245",
        shapes="q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], sinks [Hq]?, key_lengths [B]?, cu_seqlens [N]?, "
        "key_starts [B]?, query_offset [B]? -> o [B, Hq, T, Dv], lse [B, Hq, T]",
        function=softmax_attention,
        reference=softmax_attention_reference,
        torch=softmax_attention_torch,
        triton="effkit.kernels.softmax_attention:softmax_attention",
        supports=kernel_cannot,
        cases=_CASES,
        bench=_BENCH,
        grads=("q", "k", "v", "sinks"),
        flops=_flops,
        traffic=_traffic,
        rivals={
            "sdpa": "effkit.rivals:sdpa",
            "transformers eager": "effkit.rivals:transformers_eager",
            "flex": "effkit.rivals:flex",
        },
    )
)
