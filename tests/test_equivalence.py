"""Every op, backend, case and dtype of the ledger against its reference. Generated: nothing to edit for a new op."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effkit.ops import INTERPRET, Case, Op, load_ops
from effkit.testing import compare, flat_tensors, judge, make_inputs, plan

DEVICES = ["cpu"] if INTERPRET or not torch.cuda.is_available() else ["cpu", "cuda"]
BACKENDS = ("triton",) if INTERPRET else None
OPS = load_ops()
SMALL = {name: [case for case in op.cases if not case.large] for name, op in OPS.items()}
# What runs the cases of an op here: torch anywhere, triton where kernels run.
RUNS_HERE = ["triton"] if INTERPRET else ["torch"] + (["triton"] if torch.cuda.is_available() else [])


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRET else "cpu"


def judged() -> Iterator[Any]:
    for device in DEVICES:
        for op, case, dtype, backend in plan((), torch.device(device), BACKENDS):
            name = f"{op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}-{backend}-{device}"
            marks = [pytest.mark.interpreter] if INTERPRET else []
            yield pytest.param(op, case, dtype, backend, device, id=name, marks=marks)


def some_cases(count: int | None = None) -> Iterator[Any]:
    """Each op and backend with its cases, or with `count` of them spread over the list."""
    for name, op in OPS.items():
        cases = SMALL[name] if count is None else SMALL[name][:: max(1, len(SMALL[name]) // count)]
        for backend in RUNS_HERE:
            for case in cases if backend == "torch" or op.triton else ():
                marks = [pytest.mark.interpreter] if INTERPRET else []
                yield pytest.param(op, case, backend, id=f"{name}-{case.name.replace(' ', '_')}-{backend}", marks=marks)


def call(op: Op, case: Case, backend: str) -> Any:
    """The op as a function of its tensors alone."""
    return lambda **tensors: op.function(**tensors, **case.options, backend=backend)


def gradients(op: Op, inputs: dict[str, torch.Tensor]) -> tuple[str, ...]:
    return tuple(name for name in op.grads if name in inputs)


@pytest.mark.parametrize(("op", "case", "dtype", "backend", "device"), list(judged()))
def test_equals_reference(op: Op, case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    result = compare(op, backend, case, dtype, device)
    assert result.ok, str(result)


@pytest.mark.parametrize(("op", "case", "backend"), list(some_cases(8)))
def test_repeats_bit_for_bit(op: Op, case: Case, backend: str) -> None:
    inputs = make_inputs(op, case, torch.float32, device_of(backend))
    grads = gradients(op, inputs)
    runs = []
    for _ in range(2):
        leaves = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in grads}}
        outputs = list(flat_tensors(call(op, case, backend)(**leaves)))
        if grads:
            total = sum(torch.where(out.isfinite(), out, 0.0).square().sum() for out in outputs if out.requires_grad)
            outputs += torch.autograd.grad(total, [leaves[name] for name in grads], materialize_grads=True)
        runs.append(outputs)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("op", "case", "backend"), list(some_cases(4)))
def test_compiles_without_graph_breaks(op: Op, case: Case, backend: str) -> None:
    inputs = make_inputs(op, case, torch.float32, device_of(backend))
    torch._dynamo.reset()
    compiled = torch.compile(call(op, case, backend), fullgraph=True, backend="aot_eager", dynamic=False)
    rows = judge(compiled, call(op, case, "reference"), inputs, gradients(op, inputs), bitwise=op.exact)
    assert all(row.ok for row in rows), rows


@pytest.mark.parametrize(("op", "case", "backend"), list(some_cases(2)))
def test_compiles_without_gradients(op: Op, case: Case, backend: str) -> None:
    """As in inference: other code is traced, and fullgraph=True would read values that otherwise break the graph."""
    inputs = make_inputs(op, case, torch.float32, device_of(backend))
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(call(op, case, backend))(**inputs)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


class Recorded(TorchDispatchMode):
    """Notes every call of an operator in the namespace effkit."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "effkit":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


if "torch" in RUNS_HERE:

    @pytest.mark.parametrize(
        ("op", "case", "backend"), [p for p in some_cases() if p.values[2] == "torch" and p.values[0].grads]
    )
    def test_gradcheck(op: Op, case: Case, backend: str) -> None:
        """float64 numerical gradients of the torch path."""
        inputs = make_inputs(op, case, torch.float64)
        grads = gradients(op, inputs)
        if not all(inputs[name].numel() for name in grads):
            return  # nothing to differentiate; test_equals_reference covers the shapes
        leaves = [inputs[name].detach().clone().requires_grad_() for name in grads]

        def of_leaves(*values: torch.Tensor) -> Any:
            outputs = flat_tensors(call(op, case, "torch")(**{**inputs, **dict(zip(grads, values, strict=True))}))
            return tuple(torch.where(out.isfinite(), out, 0.0) for out in outputs if out.requires_grad)

        assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


if "triton" in RUNS_HERE:

    @pytest.mark.parametrize(("op", "case", "backend"), [p for p in some_cases(4) if p.values[2] == "triton"])
    def test_operators_pass_opcheck(op: Op, case: Case, backend: str) -> None:
        """Schema, fake kernel and autograd registration of every operator that a forward and backward pass call."""
        inputs = make_inputs(op, case, torch.float32, device_of(backend))
        leaves = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in gradients(op, inputs)}}
        with Recorded() as recorded:
            out = next(flat_tensors(call(op, case, backend)(**leaves)))
            if out.requires_grad:
                out.sum().backward()
        assert recorded.calls
        for func, args, kwargs in recorded.calls:
            plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            torch.library.opcheck(func, plain, kwargs)
