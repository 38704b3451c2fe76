"""The ledger: one record for each op, and the choice of its backend.

A technique is a plain function; the `Op` at the end of its file says how it is called, tested, measured and cited. The
tests, `effkit verify`, `effkit bench`, the README's table and the docs index are made from these records.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from effkit.shapes import Signature, parse

BACKENDS = ("reference", "torch", "triton")
AREAS = ("effkit.attention", "effkit.norm", "effkit.quant", "effkit.peft")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as triton itself: read once, before kernels are defined

_forced: str | None = os.environ.get("EFFKIT_BACKEND") or None
_trace: list[Choice] | None = None


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what can."""


@dataclass(frozen=True)
class Choice:
    """Which backend an op took, and why."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


@dataclass(frozen=True)
class Case:
    """One named set of inputs, from which tests, `verify` and `bench` draw.

    sizes maps each axis of the shape line to its length; options are further arguments, passed on as they are; given
    names the optional tensors that are present; ints gives integer tensors (int32) by value; gain multiplies the drawn
    values of a tensor; layout is "contiguous", "transposed" (axes 1 and 2 swapped in memory) or "strided" (every
    second element of a larger tensor). large cases run on a GPU only. forward_only cases (decoding) are not timed with
    their backward pass. draw takes the place of the op's where a tensor comes in another form.
    """

    name: str
    sizes: Mapping[str, int | tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    ints: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    gain: Mapping[str, float] = field(default_factory=dict)
    layout: str = "contiguous"
    large: bool = False
    forward_only: bool = False
    draw: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """A technique as the ledger knows it.

    function takes the tensors of the shape line and options by name, and backend=; reference and torch take the same
    without backend; triton is "module:function", imported on first use. supports(**arguments) gives the reason why the
    kernel cannot run them, or None; prefer_torch(**arguments) why torch is taken, unless asked otherwise, where both
    can. flops(case) and traffic(case) count one forward pass: operations, and elements in the dtype under test, read
    and written once; other_bytes(case) adds what has a dtype of its own. rivals maps a name to a function with the same
    arguments, for `bench`. draw turns the normal values drawn for a tensor into its own; what it returns in another
    dtype than float64 keeps that dtype. exact: every result equals that of the reference in the same dtype bit for bit,
    as those of a quantiser do. frozen names those of grads that nobody asks for in use, as of the weight beside an
    adapter: they are judged, and left out of benchmarks.
    """

    name: str
    area: str
    summary: str
    paper: str
    shapes: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    torch: Callable[..., Any]
    cases: tuple[Case, ...]
    grads: tuple[str, ...]
    flops: Callable[[Case], float]
    traffic: Callable[[Case], float]
    triton: str | None = None
    supports: Callable[..., str | None] | None = None
    prefer_torch: Callable[..., str | None] | None = None
    bench: tuple[Case, ...] = ()
    rivals: Mapping[str, str] = field(default_factory=dict)
    draw: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    exact: bool = False
    frozen: tuple[str, ...] = ()
    other_bytes: Callable[[Case], float] = lambda case: 0.0

    @functools.cached_property
    def signature(self) -> Signature:
        return parse(self.shapes)

    def case(self, name: str) -> Case:
        """A case by name; ValueError with the choices when there is none."""
        found = {case.name: case for case in self.cases}
        if name not in found:
            raise ValueError(f"{self.name}: no case named {name!r}, choices: {', '.join(map(repr, found))}")
        return found[name]

    def check(self, **tensors: Tensor | None) -> dict[str, int]:
        """Checks the tensors against the shape line and returns the sizes of its axes."""
        return self.signature.check(self.name, tensors)

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The function behind a backend name, without any check."""
        if backend == "triton":
            if self.triton is None:
                raise BackendUnavailable(f"{self.name} has no triton backend; choices: 'reference', 'torch'")
            _import_kernel(self.name)
            return self.__dict__["kernel"]
        return {"reference": self.reference, "torch": self.torch}[backend]

    def choose(self, backend: str | None, arguments: Mapping[str, Any]) -> Choice:
        """The backend these arguments take: as asked for (or BackendUnavailable), else the fastest that can."""
        asked = backend or _forced
        if asked is None:
            reason = self.why_not_triton(arguments)
            if reason is None and INTERPRET and not _tensor_on("cuda", arguments):
                reason = "the interpreter is only for backend='triton'"
            if reason is None and self.prefer_torch:
                reason = self.prefer_torch(**arguments)
            return Choice(self.name, "torch", reason) if reason else Choice(self.name, "triton", "CUDA tensors")
        if asked not in BACKENDS:
            raise ValueError(f"{self.name}: backend is {asked!r}, choices: {', '.join(map(repr, BACKENDS))}")
        if asked == "triton":
            reason = self.why_not_triton(arguments)
            if reason is not None:
                raise BackendUnavailable(
                    f"{self.name}: backend='triton' cannot run here: {reason}; choices: 'reference', 'torch'"
                )
        return Choice(self.name, asked, "asked for")

    def why_not_triton(self, arguments: Mapping[str, Any]) -> str | None:
        """Why the kernel cannot run on these arguments, or None."""
        if self.triton is None:
            return "no kernel for this op"
        if not _has_triton():
            return "triton is not installed"
        if not _tensor_on("cuda", arguments) and not INTERPRET:
            return "tensors are not on a CUDA device and TRITON_INTERPRET is not set"
        return self.supports(**arguments) if self.supports else None

    def run(self, backend: str | None, **arguments: Any) -> Any:
        """Calls the chosen backend. The last line of every public function."""
        choice = self.choose(backend, arguments)
        record(choice)
        return self.implementation(choice.backend)(**arguments)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enters an op into the ledger and returns it; the name must be new."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is already in the ledger")
    op.signature  # noqa: B018 - parsed now: a malformed line fails here, and torch.compile finds it ready
    OPS[op.name] = op
    return op


def load_ops() -> dict[str, Op]:
    """The whole ledger, in the order of the areas."""
    for area in AREAS:
        importlib.import_module(area)
    return OPS


def list_ops() -> list[str]:
    """The names of all ops."""
    return list(load_ops())


def get_op(name: str) -> Op:
    """An op by name; ValueError with the choices when there is none."""
    ops = load_ops()
    if name not in ops:
        raise ValueError(f"no op named {name!r}, choices: {', '.join(ops)}")
    return ops[name]


def asked_for() -> str | None:
    """The backend that all ops are to take where a call names none: by `use_backend` or the environment."""
    return _forced


def record(choice: Choice) -> None:
    """Tells a waiting `explain` of a choice."""
    if _trace is not None:
        _trace.append(choice)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block every op without an explicit `backend=` takes this one, for the whole process."""
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, choices: {', '.join(map(repr, BACKENDS))}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Runs fn(*args, **kwargs), an op, a module or a whole model, and lists which backend each op took and why."""
    global _trace
    before, _trace = _trace, []
    try:
        fn(*args, **kwargs)
        return _trace
    finally:
        _trace = before


def _constant_while_tracing(fn: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which would import the whole compiler to set this one attribute."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@functools.cache
def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def resolve(path: str) -> Any:
    """The object behind "module:name", imported on first use."""
    return _load(path)


@_constant_while_tracing
def _import_kernel(name: str) -> None:
    """Keeps an op's kernel as an attribute: torch.compile can guard that, but no function returned by a call."""
    op = OPS[name]
    if op.triton is not None:
        op.__dict__.setdefault("kernel", resolve(op.triton))


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@_constant_while_tracing
def _has_triton() -> bool:
    return _find_triton()


def _tensor_on(device: str, arguments: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == device for value in arguments.values())
