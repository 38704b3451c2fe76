"""What the techniques with a recurrent state share: the state, the checks, chunks, and packed sequences.

Every one of them is a sum over the past that a fixed-size matrix carries. Tokens are cut into chunks of C: within a
chunk the sum is a C x C product under a mask of decays, and what came before is one K x V state. Work grows with T, and
the state after the last token continues the sequence later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkit.attention._blocks import wide_dtype
from effkit.ops import Op


class RecurrentState(NamedTuple):
    """What a recurrent technique carries from the tokens it has read to those that follow.

    memory      [B, H, K, V] the sum over the past, float32 (float64 for float64 inputs)
    position    [B] int64, how many tokens each row has read
    normalizer  [B, H, K] the sum of the keys, where a technique divides by it
    With packed sequences B counts the sequences.
    """

    memory: Tensor
    position: Tensor
    normalizer: Tensor | None = None


class LayerState(NamedTuple):
    """What a layer around a recurrent technique carries.

    conv        [B, W - 1, C] the last inputs of its short convolution, a tuple of them, or None without one
    recurrent   the state of its op
    """

    conv: Any
    recurrent: Any


def check_inputs(
    op: Op, tensors: Mapping[str, Tensor | None], initial: Any, cu_seqlens: Tensor | None, **others: Tensor | None
) -> int:
    """Everything about the tensors that is common to the family; returns H. g, where there is one, is a log-decay.

    others are tensors without a time axis, of which only shape and device are checked. Values are read only where that
    costs nothing: on the CPU, outside of torch.compile.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    memory = initial.memory if isinstance(initial, RecurrentState) else initial
    sizes = op.check(**tensors, initial_state=memory, cu_seqlens=cu_seqlens, **others)
    q, k, v = (present[name] for name in "qkv")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2 or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{op.name}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; "
            "expected one dtype of float16, bfloat16, float32, float64"
        )
    for name, x in (*present.items(), ("initial_state", memory), ("cu_seqlens", cu_seqlens), *others.items()):
        if x is not None and x.device != q.device:
            raise ValueError(f"{op.name}: {name} is on {x.device}, expected q's device {q.device}")
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    for name, x in present.items():
        if x.shape[1] == 0 or heads % x.shape[1]:
            raise ValueError(f"{op.name}: {name} has {x.shape[1]} heads, expected a divisor of H={heads}")
    if sizes.get("H", heads) != heads:
        raise ValueError(
            f"{op.name}: H={sizes['H']} heads have a gate or state, expected H={heads}, the most of q, k, v"
        )
    readable = may_read(q)
    g = present.get("g")
    if g is not None and readable and g.numel() and g.max() > 1e-3:  # a zero may have been rounded up
        raise ValueError(
            f"{op.name}: g reaches {g.max().item():.4g}, expected log-decays <= 0 (the log of a factor from 0 to 1)"
        )
    if cu_seqlens is not None:
        check_packing(op.name, cu_seqlens, q.shape[0], q.shape[2], readable)
    if memory is not None and len(memory) != (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1):
        raise ValueError(
            f"{op.name}: initial_state has {len(memory)} rows, expected one for each row or packed sequence"
        )
    return heads


def may_read(x: Tensor) -> bool:
    """Whether values may be looked at: they are on the CPU, and nothing traces or maps over them."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)  # by vmap, which has no values to read


def check_packing(op: str, cu_seqlens: Tensor, B: int, T: int, readable: bool) -> None:
    """0 = first <= ... <= last <= T, in a batch of one."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens is {cu_seqlens.dtype}, expected int32 or int64")
    if B != 1 or not len(cu_seqlens):
        raise ValueError(f"{op}: cu_seqlens has {len(cu_seqlens)} entries with B={B}; packed sequences need B=1")
    bounds = cu_seqlens.tolist() if readable else [0]
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > T:
        raise ValueError(f"{op}: cu_seqlens is {bounds}, expected 0 = first <= ... <= last <= T={T}")


def check_chunk_size(op: str, chunk_size: int) -> None:
    if (
        isinstance(chunk_size, bool)
        or not isinstance(chunk_size, int)
        or chunk_size < 1
        or chunk_size & (chunk_size - 1)
    ):
        raise ValueError(f"{op}: chunk_size is {chunk_size!r}, expected a power of two, such as 64")


def check_scale(op: str, scale: float | None, default: float) -> float:
    if scale is None:
        return default
    if isinstance(scale, bool) or not isinstance(scale, float | int) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale!r}, expected a finite number or None for {default:.4g}")
    return float(scale)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of an active autocast region, as matrix products take theirs."""
    device = getattr(tensors[0], "device", torch.device("cpu")).type  # what is no tensor is named by the checks later
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def run(
    op: Op,
    backend: str | None,
    tensors: Mapping[str, Tensor | None],
    *,
    initial_state: Any,
    return_state: bool,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> Any:
    """Calls a backend of a recurrent op, on each packed sequence by itself; o, or (o, state) with return_state.

    A backend takes the tensors, initial_state (a NamedTuple of tensors [B, ...] that `op` knows, or None) and options,
    and returns o [B, H, T, V] and the state after the last token.
    """
    q = tensors["q"]
    assert q is not None
    if isinstance(initial_state, Tensor):
        initial_state = RecurrentState(
            initial_state, torch.zeros(len(initial_state), dtype=torch.int64, device=q.device)
        )

    def call(part: Mapping[str, Tensor | None], initial: Any) -> tuple[Tensor, Any]:
        if not torch.is_autocast_enabled(q.device.type):
            return op.run(backend, **part, initial_state=initial, **options)
        with torch.autocast(q.device.type, enabled=False):  # the inputs are rounded by now; sums are not to be
            return op.run(backend, **part, initial_state=initial, **options)

    if cu_seqlens is None:
        o, state = call(tensors, initial_state)
    elif torch.compiler.is_compiling():
        if return_state:
            raise ValueError(f"{op.name}: return_state=True with cu_seqlens is not possible under torch.compile")
        o, state = _as_rows(call, tensors, initial_state, cu_seqlens.long()), None
    else:
        o, state = _by_sequence(call, tensors, initial_state, cu_seqlens.tolist())
    return (o, state) if return_state else o


def _by_sequence(
    call: Any, tensors: Mapping[str, Tensor | None], initial: Any, bounds: list[int]
) -> tuple[Tensor, Any]:
    """Packed sequences one by one: the cost is the sum of their own costs. Rows behind the last give zeros."""
    outs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = {name: None if x is None else x[:, :, begin:end] for name, x in tensors.items()}
        o, state = call(own, map_state(partial(torch.narrow, dim=0, start=n, length=1), initial))
        outs.append(o)
        states.append(state)
    rest = {name: None if x is None else x[:, :, :0] for name, x in tensors.items()}
    o, state = call(rest, map_state(lambda x: x[:1], initial))  # no tokens: shapes and dtypes alone
    states.append(map_state(lambda x: x[:0], state))
    q = tensors["q"]
    assert q is not None
    outs.append(o.new_zeros(1, o.shape[1], q.shape[2] - bounds[-1], o.shape[3]))
    joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*states, strict=True)]
    return torch.cat(outs, 2), type(state)(*joined)


def _as_rows(call: Any, tensors: Mapping[str, Tensor | None], initial: Any, cu_seqlens: Tensor) -> Tensor:
    """Packed sequences as the rows of a batch, each as long as all of them: static shapes for torch.compile."""
    q = tensors["q"]
    assert q is not None
    token = torch.arange(q.shape[2], device=q.device)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    index = begin + token  # [sequences, T]
    exists = index < end

    def rows(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        taken = x[0][:, index.clamp_max(q.shape[2] - 1)].transpose(0, 1)  # [sequences, heads, T, ...]
        return torch.where(exists.view(len(index), 1, -1, *[1] * (x.ndim - 3)), taken, 0.0)

    o, _ = call({name: rows(x) for name, x in tensors.items()}, initial)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(0, len(index) - 1)
    taken = o[sequence, :, token - cu_seqlens[sequence]]  # [T, heads, V]
    return torch.where((token < cu_seqlens[-1])[:, None, None], taken, 0.0).transpose(0, 1)[None]


def by_spans(
    core: Callable[..., tuple[Tensor, Any]], C: int, initial: Any, *tensors: Tensor | None
) -> tuple[Tensor, Any]:
    """core(*tensors, state) over spans of whole chunks, each continued from the state before it; (o, state).

    On a CPU a span's C x C products then fit into the cache, where memory would else be mapped anew for every one of
    them: several times faster from a few thousand tokens on.
    """
    q = tensors[0]
    assert q is not None
    T, span = q.shape[2], span_length(q, C)
    # split, not slices: the gradient of a slice is a tensor as long as the whole, for every span.
    spans = zip(*([None] * -(-T // span) if x is None else x.split(span, dim=2) for x in tensors), strict=True)
    outs, state = [], initial
    for parts in spans if T else [tensors]:
        o, state = core(*parts, state)
        outs.append(o)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)), state


def span_length(q: Tensor, C: int) -> int:
    """How many tokens of q [B, H, T, K] are worked on at a time, in whole chunks."""
    if q.device.type != "cpu":
        return max(C, q.shape[2])
    return C * max(1, _SPAN_PAIRS // max(1, q.shape[0] * q.shape[1] * C * C))


_SPAN_PAIRS = 1 << 19  # two megabytes of float32


def map_state(fn: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state with fn applied to each of its tensors; None stays None."""
    return None if state is None else type(state)(*(None if x is None else fn(x) for x in state))


def next_position(q: Tensor, initial: Any) -> Tensor:
    """[B] int64: how many tokens each row has read after those of q [B, H, T, K]."""
    read = torch.full((q.shape[0],), q.shape[2], dtype=torch.int64, device=q.device)
    return read if initial is None else initial.position + read


def zero_rest(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, C] with zeros behind the last packed token: NaN there would reach the gradients of a layer's weights."""
    if cu_seqlens is None:
        return x
    exists = torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1]
    return torch.where(exists[:, None], x, 0.0)


def token_positions(T: int, state: RecurrentState | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The place of each token in its sequence, [T] or [B, T] int64: what a rotary embedding turns by."""
    token = torch.arange(T, device=device)
    if cu_seqlens is None:
        return token if state is None else state.position[:, None] + token
    bounds = cu_seqlens.long()
    sequence = (torch.searchsorted(bounds, token, right=True) - 1).clamp_max(len(bounds) - 2)
    return token - bounds[sequence] + (0 if state is None else state.position[sequence])


def widen(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of sums: float32, or float64 where they are float64."""
    return tuple(None if x is None else x.to(wide_dtype(x.dtype)) for x in tensors)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hx, ...] -> [B, H, ...]: head h reads head h // (H // Hx)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def chunk_length(T: int, chunk_size: int) -> int:
    """The chunk for T tokens: a power of two, no longer than needed. One token takes a chunk of one: the recurrence."""
    return min(chunk_size, 1 << max(0, T - 1).bit_length())


def to_chunks(x: Tensor, C: int) -> Tensor:
    """[B, H, T, ...] -> [B, H, N, C, ...], zeros behind the last token: they leave every state as it is."""
    short = -x.shape[2] % C
    if short:
        x = torch.cat((x, x.new_zeros(*x.shape[:2], short, *x.shape[3:])), dim=2)
    return x.unflatten(2, (x.shape[2] // C, C))


def from_chunks(x: Tensor, T: int) -> Tensor:
    """[B, H, N, C, ...] -> [B, H, T, ...]."""
    return x.flatten(2, 3)[:, :, :T]


def cumulative_decay(g: Tensor) -> Tensor:
    """Sums of log-decays from the start of each chunk, own step included: [..., C] float64.

    What is exponentiated are differences of these sums. In float32 a chunk with a few strong gates leaves an error of
    1e-4 in the exponent between two weak neighbours.
    """
    return g.double().cumsum(-1)


def pair_decay(c: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(c_i - c_j) for j <= i, else 0: [..., C] -> [..., C, C]. No exponent is positive."""
    C = c.shape[-1]
    past = torch.ones(C, C, dtype=torch.bool, device=c.device).tril()
    return (c[..., :, None] - c[..., None, :]).masked_fill(~past, -math.inf).to(dtype).exp()


def scan_chunks(update: Tensor, decay: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [B, H, N, K, V], and after the last, [B, H, K, V].

        S_next = decay_n * S + update_n        update [B, H, N, K, V], decay [B, H, N] (or with K) or None for 1

    A loop, since on a CPU nothing beats reading and writing each state once.
    """
    state, before = initial, [update[:, :, :0]]
    factors: Any = itertools.repeat(1)
    if decay is not None:
        factors = decay.view(*decay.shape, *[1] * (update.ndim - decay.ndim)).unbind(2)
    for new, factor in zip(update.unbind(2), factors, strict=False):  # unbind: an index would cost a whole gradient
        before.append(state[:, :, None])
        state = new + factor * state
    return torch.cat(before, dim=2), state
