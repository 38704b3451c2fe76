"""The one judge of equality.

`compare(op, backend, case, dtype)` decides whether an implementation equals its reference; `assert_equivalent(fn,
reference, inputs)` does the same for any pair of functions. No tolerance is chosen anywhere:

* truth is the reference in float64, the yardstick is the same reference in the dtype under test, on inputs that were
  drawn in float64 and rounded to that dtype for everybody;
* an implementation may err twice as much as the yardstick does, plus a floor of the dtype times rms(truth);
* the bound must hold for the largest error, for the rms error, and for the rms error of every row (last axis), so that
  one bad row cannot hide. A row's yardstick is its own error or the typical one, whichever is larger, since one row's
  error is a single draw. The floor is the same for all rows: a row that cancels to nearly zero carries the rounding of
  its terms, whose size is that of the other rows. Likewise a result that is zero everywhere (a gradient that cancels)
  takes its floor from the largest of the other results;
* shapes, dtypes, devices, the places of NaN and infinities agree exactly; integer results are bit-equal, and so is
  every result of an op that is defined bit by bit (`Op.exact`): truth then is the reference in the dtype under test;
* inputs stay as they were, bit for bit; memory that an implementation leaves unwritten holds NaN, and shows.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effkit.ops import INTERPRET, BackendUnavailable, Case, Op, get_op, load_ops

FLOOR = {torch.float64: 1e-12, torch.float32: 8e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """The judgement of one tensor: an output ("o") or a gradient ("d q")."""

    tensor: str
    error: float
    allowed: float
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Result:
    """What the judge says of one op, backend, case, dtype and device."""

    op: str
    case: str
    dtype: str
    backend: str
    device: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def worst(self, gradient: bool) -> Row | None:
        """The row with the largest share of its allowance among the outputs, or among the gradients."""
        rows = [row for row in self.rows if row.tensor.startswith("d ") == gradient]
        return max(rows, key=lambda row: (not row.ok, row.error / row.allowed if row.allowed else 0.0), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        head = f"{self.op} [{self.case}] {self.dtype} {self.backend} on {self.device}: {verdict}"
        lines = [
            f"  {row.tensor:8} error {row.error:.2e} allowed {row.allowed:.2e} {row.detail}".rstrip()
            for row in self.rows
        ]
        return "\n".join([head, *lines])


def compare(
    op: Op | str,
    backend: str,
    case: Case | str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Result:
    """Judges a backend of an op on a case, itself or its name in the ledger: outputs and every gradient."""
    op = get_op(op) if isinstance(op, str) else op
    case = op.case(case) if isinstance(case, str) else case
    inputs = make_inputs(op, case, dtype, device)

    def candidate(**tensors: Any) -> Any:
        return op.function(**tensors, **case.options, backend=backend)

    def reference(**tensors: Any) -> Any:
        return op.function(**tensors, **case.options, backend="reference")

    grads = tuple(name for name in op.grads if name in inputs)
    rows = judge(candidate, reference, inputs, grads, bitwise=op.exact)
    return Result(op.name, case.name, _short(dtype), backend, torch.device(device).type, tuple(rows))


def verify(
    *ops: str,
    device: str | torch.device | None = None,
    backends: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[Result]:
    """Judges the named ops (default: all) on every case, dtype and backend that can run here.

    device: default CUDA where there is one, else the CPU. backends: default torch, and triton where it can run: on
    CUDA, or on the CPU with TRITON_INTERPRET=1.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    planned = plan(ops, device, backends, dtypes)
    return [compare(op, backend, case, dtype, device) for op, case, dtype, backend in planned]


def plan(
    ops: tuple[str, ...],
    device: torch.device,
    backends: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[tuple[Op, Case, torch.dtype, str]]:
    """What `verify` judges: every combination of op, case, dtype and backend that can run on the device."""
    chosen = [get_op(name) for name in ops] if ops else list(load_ops().values())
    on_cuda = device.type == "cuda"
    can_run = {"torch"} | ({"triton"} if on_cuda or INTERPRET else set())
    for backend in backends or ():
        if backend not in can_run:
            raise BackendUnavailable(
                f"backend {backend!r} cannot be judged on {device.type} here; choices: {', '.join(sorted(can_run))}"
                + ("" if "triton" in can_run else " (set TRITON_INTERPRET=1 to run kernels on a CPU)")
            )
    return [
        (op, case, dtype, backend)
        for op in chosen
        for backend in backends or sorted(can_run)
        if backend != "triton" or op.triton
        for case in op.cases
        if on_cuda or not case.large
        for dtype in dtypes
    ]


def assert_equivalent(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any] | tuple[Any, ...],
    grads: bool | tuple[str, ...] = True,
) -> None:
    """Raises AssertionError with the judge's table unless fn equals reference on the inputs.

    inputs are positional (a tuple) or named (a mapping). The reference must run in float64 as well as in the dtype of
    the inputs. grads: all floating inputs (True), none (False), or these names ("0", "1", ... for positional inputs).
    """
    if isinstance(inputs, tuple):
        named = {str(i): value for i, value in enumerate(inputs)}
        call, ref = (lambda **kw: fn(*kw.values())), (lambda **kw: reference(*kw.values()))
    else:
        named, call, ref = dict(inputs), fn, reference
    floating = tuple(name for name, value in named.items() if _is_floating(value))
    wanted = floating if grads is True else () if grads is False else grads
    rows = judge(call, ref, named, wanted)
    if not all(row.ok for row in rows):
        raise AssertionError(str(Result(getattr(fn, "__name__", "fn"), "inputs", "", "fn", "", tuple(rows))))


def make_inputs(op: Op, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a case: normal values drawn in float64 from a generator seeded by op and case, then rounded."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name}/{case.name}".encode()))
    inputs: dict[str, Tensor] = {}
    draw = {**op.draw, **case.draw}
    for shape in op.signature.inputs:
        name = shape.name
        if name in case.ints:
            inputs[name] = torch.tensor(case.ints[name], dtype=torch.int32, device=device)
        elif not shape.optional or name in case.given:
            value = torch.randn(op.signature.shape_of(name, case.sizes), generator=generator, dtype=torch.float64)
            value = draw[name](value) if name in draw else value
            value = (value * case.gain.get(name, 1.0)).to(dtype) if value.dtype == torch.float64 else value
            inputs[name] = _lay_out(value.to(device), case.layout)
    return inputs


def judge(
    candidate: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    grads: tuple[str, ...],
    bitwise: bool = False,
) -> list[Row]:
    """The rows of one comparison; see the module docstring for the rule."""
    exact = {name: value.double() if _is_floating(value) else value for name, value in inputs.items()}
    cotangents: list[Tensor] = []
    truth, truth_grads = _evaluate(reference, inputs if bitwise else exact, grads, cotangents)
    yard, yard_grads = (truth, truth_grads) if bitwise else _evaluate(reference, inputs, grads, cotangents)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    with _poisoned_memory():
        got, got_grads = _evaluate(candidate, inputs, grads, cotangents)
    if len(got) != len(truth):
        return [Row("outputs", math.inf, 0.0, False, f"{len(got)} outputs, the reference has {len(truth)}")]
    floor = max((FLOOR[value.dtype] for value in inputs.values() if _is_floating(value)), default=0.0)
    names = ["out"] if len(truth) == 1 else [f"out{i}" for i in range(len(truth))]
    names += [f"d {name}" for name in grads]
    compared = zip(names, got + got_grads, truth + truth_grads, yard + yard_grads, strict=True)
    largest = max((_scale(x) for x in (*truth, *truth_grads)), default=0.0)
    rows = [_row(name, mine, exactly, own, floor, largest, bitwise) for name, mine, exactly, own in compared]
    rows += [
        Row(name, math.inf, 0.0, False, "the input was changed")
        for name, value in before.items()
        if not _same_bits(value, inputs[name])
    ]
    return rows


def _evaluate(
    fn: Callable[..., Any], inputs: Mapping[str, Any], grads: tuple[str, ...], cotangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of fn. The first call (float64) draws the cotangents that all calls share."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
    outputs = list(flat_tensors(fn(**{**inputs, **leaves})))
    if not grads:
        return [out.detach() for out in outputs], []
    if not cotangents:
        generator = torch.Generator().manual_seed(1)
        # Multiples of 1/8 in [-2, 2] are exact in every dtype, so all sides see the same cotangent.
        cotangents += [torch.randint(-16, 17, out.shape, generator=generator) / 8 for out in outputs]
    # Outputs too many, too few or of another shape are judged later; here they just have no part.
    pairs = zip(outputs, cotangents, strict=False)
    used = [(out, c) for out, c in pairs if out.requires_grad and out.shape == c.shape]
    found = torch.autograd.grad(
        [out for out, _ in used],
        [leaves[name] for name in grads],
        [c.to(out.device, out.dtype) for out, c in used],
        allow_unused=True,
    )
    filled = [torch.zeros_like(leaves[n]) if grad is None else grad for n, grad in zip(grads, found, strict=True)]
    return [out.detach() for out in outputs], filled


def flat_tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a function returned: one, or tuples of them (a state) within tuples; None is skipped."""
    if isinstance(outputs, tuple | list):
        for part in outputs:
            yield from flat_tensors(part)
    elif outputs is not None:
        yield outputs


def _row(name: str, got: Tensor, truth: Tensor, yard: Tensor, floor: float, largest: float, bitwise: bool) -> Row:
    """One tensor judged against truth and yardstick."""
    for what in ("shape", "dtype", "device"):
        if getattr(got, what) != getattr(yard, what):
            return Row(name, math.inf, 0.0, False, f"{what} is {getattr(got, what)}, expected {getattr(yard, what)}")
    if not truth.numel():
        return Row(name, 0.0, 0.0, True)
    if bitwise:
        got, truth = _bits(got), _bits(truth)
    if not truth.is_floating_point():
        wrong = got != truth
        return Row(name, float(wrong.sum()), 0.0, not wrong.any(), f"integers differ, {_worst(wrong, got, truth)}")
    got, yard = got.double(), yard.double()
    finite = truth.isfinite()
    # Where the dtype itself overflows (the yardstick is infinite), the same infinity is a right answer too.
    overflow = finite & yard.isinf() & (got == yard)
    same = (got == truth) | (got.isnan() & truth.isnan())
    strange = torch.where(finite, ~got.isfinite() & ~overflow, ~same)
    if strange.any():
        return Row(name, math.inf, 0.0, False, f"non-finite values differ, {_worst(strange, got, truth)}")
    judged = finite & ~overflow
    error = torch.where(judged, (got - truth).abs(), 0.0)
    own = torch.where(judged & yard.isfinite(), (yard - truth).abs(), 0.0)
    value = torch.where(judged, truth, 0.0)
    scale = _scale(value) or largest
    checks = [
        ("largest", error.max(), 2 * own.max() + floor * scale),
        ("rms", _rms(error), 2 * _rms(own) + floor * scale),
    ]
    if truth.ndim:
        allowed = 2 * _rms(own, -1).clamp_min(_rms(own)) + floor * scale
        row = (_rms(error, -1) - allowed).argmax()
        checks.append(("row", _rms(error, -1).flatten()[row], allowed.flatten()[row]))
    failed = [f"{kind} error {float(e):.2e} > {float(a):.2e}" for kind, e, a in checks if not e <= a]
    detail = f"{'; '.join(failed)}; {_worst(error, got, truth)}" if failed else ""
    return Row(name, float(checks[0][1]), float(checks[0][2]), not failed, detail)


def _bits(x: Tensor) -> Tensor:
    """Floats as integers of their bits, all NaN alike."""
    if not x.is_floating_point():
        return x
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if integer != torch.uint8:  # float8 has few operations, and one NaN for each sign
        x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().view(integer)


def _scale(truth: Tensor) -> float:
    """rms of the finite values of a result, 0.0 for integers and for nothing."""
    finite = truth[truth.isfinite()] if truth.is_floating_point() else truth.new_empty(0)
    return float(_rms(finite)) if finite.numel() else 0.0


def _rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.square().mean().sqrt() if dim is None else x.square().mean(dim).sqrt()


def _worst(badness: Tensor, got: Tensor, truth: Tensor, count: int = 3) -> str:
    """The worst coordinates with both values, to print."""
    flat = badness.double().flatten()
    places = flat.topk(min(count, int((flat > 0).sum()) or 1)).indices
    index = [tuple(int(x) for x in torch.unravel_index(place, badness.shape)) for place in places]
    return "worst at " + ", ".join(f"{list(i)}: {got[i].item():.6g}, truth {truth[i].item():.6g}" for i in index)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """x with the same values in another memory layout."""
    if layout == "transposed" and x.ndim >= 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided" and x.ndim:
        between = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        return torch.stack((x, torch.full_like(x, between)), dim=-1)[..., 0]
    if layout not in ("contiguous", "transposed", "strided"):
        raise ValueError(f"layout is {layout!r}, choices: 'contiguous', 'transposed', 'strided'")
    return x


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if not _is_floating(a) else bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _short(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Within the block torch fills uninitialised memory with NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
