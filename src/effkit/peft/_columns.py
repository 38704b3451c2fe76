"""What DoRA and (IA)^3 have in common: factors of whole columns, and gradients of them from what is kept anyway.

A layer that multiplies its result u by a factor f needs u for the gradient of f. The next layer mostly keeps y = f u,
though, and u = y / f: to keep y costs nothing. Where f is too small to divide by, u is kept instead.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


def scale_columns(x: Tensor, factor: Tensor) -> Tensor:
    """x [*N, C] * factor [C], computed in the wider of their dtypes and rounded once, to that of x."""
    y = x.new_empty(x.shape)
    for rows, out in zip(_pieces(x), _pieces(y), strict=True):
        torch.mul(rows, factor, out=out)
    return y


def add_scaled_(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Adds x [*N, C] * factor [C] to y, contiguous, in place; computed and rounded as in `scale_columns`."""
    for out, rows in zip(_pieces(y), _pieces(x), strict=True):
        torch.addcmul(out, rows, factor, out=out)
    return y


def column_products(a: Tensor, b: Tensor, offset: Tensor | None = None) -> Tensor:
    """The sums over the rows of a [*N, C] * (b [*N, C] - offset [C]), in float32 or wider: [C]."""
    total = a.new_zeros(a.shape[-1], dtype=wide(a))
    for left, right in zip(_pieces(a), _pieces(b), strict=True):
        right = right.to(total.dtype)
        total = total + (left * (right if offset is None else right - offset)).sum(0)
    return total


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [C, R] of a [T, C] and b [T, R], in float32 or wider: what comes of it is rounded once, by others."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    total = a.new_zeros(b.shape[1], a.shape[1], dtype=wide(a))
    parts = _pieces(a)
    for left, right in zip(parts, b.split([len(part) for part in parts]), strict=True):
        total = torch.addmm(total, right.to(total.dtype).T, left.to(total.dtype))
    return total.T


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Memo:
    """What was computed from tensors, computed again only once one of them was replaced, moved or written to.

    It tells tensors by identity, address and version, and keeps none of them alive. Those that do not tell their
    version (made in inference mode, or inside of torch.func) are asked about each time. Any optimizer's step counts as
    a change, too: FSDP fills the same tensors with what came out of it, and hides that from their versions. Copies of
    a memo are empty.
    """

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._stamp: Any = None
        self._value: Any = None

    def __call__(self, compute: Callable[[], Any], *tensors: Tensor) -> Any:
        if any(is_functorch_wrapped_tensor(tensor) or tensor.is_inference() for tensor in tensors):
            return compute()
        stamp = _optimizer_steps()[0], [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if stamp != self._stamp or any(a() is not b for a, b in zip(self._tensors, tensors, strict=True)):
            self._value = compute()
            self._tensors, self._stamp = [weakref.ref(tensor) for tensor in tensors], stamp
        return self._value

    def __reduce__(self) -> Any:
        return Memo, ()


class Remembered:
    """A function of tensors that answers yes or no, asked again only when they change: to hear it waits for a GPU.

    Inside of torch.func there is no one answer, as tensors there stand for many: it is no.
    """

    def __init__(self, question: Callable[..., Tensor]) -> None:
        self.question = question
        self._memos: Any = WeakTensorKeyDictionary()  # by the first tensor, a parameter as a rule

    def __call__(self, *tensors: Tensor) -> bool:
        if any(map(is_functorch_wrapped_tensor, tensors)):
            return False
        memo = self._memos.get(tensors[0])
        if memo is None:
            memo = self._memos[tensors[0]] = Memo()
        with torch.no_grad():
            return memo(lambda: bool(self.question(*tensors)), *tensors)


@functools.cache
def _optimizer_steps() -> list[int]:
    """How many steps optimizers have made since the first call, of which all share the list."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of x [*N, C], on a CPU a few at a time, so that temporaries stay in its cache."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    size = _PIECE * torch.get_num_threads() // max(1, x.shape[-1]) if x.device.type == "cpu" else len(rows)
    return rows.split(max(1, size))


_PIECE = 1 << 17  # elements a thread; half a megabyte of float32
