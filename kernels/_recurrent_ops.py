"""What the kernels of recurrent techniques share on the host: buffers, groups of heads, operators, differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effkit.kernels._common import INTERPRET, multiprocessors

# Fewer tokens than this are taken one by one: a chunk of them would be mostly padding.
SHORT = 16

_library = torch.library.Library("effkit", "FRAGMENT")


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, heads and tokens, one tensor after the other."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def groups(heads: int, *tensors: Tensor) -> tuple[int, ...]:
    """How many heads share one head of each tensor."""
    return tuple(heads // x.shape[1] for x in tensors)


def n_segments(chunks: int, programs: int, device: torch.device) -> int:
    """How many segments the chunks of a head are cut into, so that a scan fills the device: programs times as many.

    Two would cost as much as one, since their chunks are read twice.
    """
    wanted = max(1, min(multiprocessors(device) // programs, chunks // _LEAST_CHUNKS))
    return wanted if wanted > 2 or INTERPRET else 1


_LEAST_CHUNKS = 1 if INTERPRET else 4


def empty_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o [B, H, T, V] laid out as [B, T, H, V], so that joining the heads costs no copy later."""
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    return v.new_empty(v.shape[0], v.shape[2], heads, v.shape[3]).transpose(1, 2)


def empty_memory(q: Tensor, v: Tensor, heads: int, *chunks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, H, *chunks, K, V]."""
    return q.new_empty(q.shape[0], heads, *chunks, q.shape[3], v.shape[3], dtype=dtype)


def for_each_head(dx: Tensor, heads: int) -> Tensor:
    """Where the gradient of each head goes: dx itself, or float32 to be summed over the heads that share one of dx."""
    if dx.shape[1] == heads:
        return dx
    return dx.new_empty(dx.shape[0], heads, *dx.shape[2:], dtype=torch.float32)


def sum_heads(dx: Tensor, each: Tensor) -> None:
    """Fill dx from what `for_each_head` gave."""
    if each is not dx:
        dx.copy_(each.unflatten(1, (dx.shape[1], -1)).sum(2))


def define(
    name: str, tensors: str, options: str, outputs: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """An operator effkit::name with its kernel, its fake kernel and its batching rule."""
    _library.define(f"{name}({tensors}, {options}) -> ({outputs})")
    # The interpreter works on tensors in main memory; without it they have no kernel, and the dispatcher says so.
    _library.impl(name, run, "CPU" if INTERPRET else "CUDA")
    op = getattr(torch.ops.effkit, name).default
    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_vmap(op, _vmap(op), lib=_library)
    return op


def _vmap(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    """The batching rule of an operator: what is mapped joins the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        outputs = run(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return tuple(x.unflatten(0, (size, len(x) // size)) for x in outputs), (0,) * len(outputs)

    return rule
