"""effkit verify: the judge's table."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import typer

from effkit import bench
from effkit.cli import verified
from effkit.cli.arguments import DTYPES, check_cases, find_device, find_dtype, find_ops
from effkit.cli.output import check_folder, console, fail, progress, table, write_json
from effkit.ops import INTERPRET, BackendUnavailable, Case, Op
from effkit.testing import Result, Row, compare, plan

Step = tuple[Op, Case, torch.dtype, str]


def verify(
    ops: list[str],
    device: str | None,
    backends: list[str],
    dtypes: list[str],
    cases: list[str],
    fail_fast: bool,
    json: str | None,
) -> None:
    """Judges, prints, remembers; exit code 1 when anything is wrong."""
    check_folder(json)
    where = find_device(device)
    steps = _steps(find_ops(ops), where, backends, [find_dtype(name) for name in dtypes or DTYPES], cases)
    results = _judged(steps, where, fail_fast)
    passed = all(result.ok for result in results)
    if not cases and not dtypes and len(results) == len(steps):
        verified.remember(where, _findings(results))
    write_json(
        json,
        {**bench.environment(where), "ok": passed, "results": [result.to_dict() for result in results]},
    )
    out = console(json)
    for (op, backend), group in itertools.groupby(results, key=lambda result: (result.op, result.backend)):
        out.print(_table(f"{op}: {backend} on {_place(where, backend)}", list(group)))
    for result in results:
        if not result.ok:
            out.print(str(result))
    wrong = sum(not result.ok for result in results)
    out.print(f"{len(results)} judged, {wrong} wrong" if wrong else f"{len(results)} judged, all equal the reference")
    if where.type == "cpu" and not INTERPRET:
        out.print("Kernels were not judged: set TRITON_INTERPRET=1 to run them on a CPU, or use --device cuda.")
    if not passed:
        raise typer.Exit(1)


def _steps(
    ops: list[Op], device: torch.device, backends: list[str], dtypes: list[torch.dtype], cases: list[str]
) -> list[Step]:
    """What to judge, in the order of op, backend, case, dtype."""
    check_cases(cases, [case for op in ops for case in op.cases])
    try:
        steps = plan(tuple(op.name for op in ops), device, tuple(backends) or None, tuple(dtypes))
    except BackendUnavailable as error:
        fail(str(error))
    steps = [step for step in steps if not cases or step[1].name in cases]
    if not steps:
        fail("nothing to judge: the case is for GPUs only, or the op has no such backend; see `effkit show OP`")
    return steps


def _judged(steps: list[Step], device: torch.device, fail_fast: bool) -> list[Result]:
    results = []
    with progress() as bar:
        task = bar.add_task("", total=len(steps))
        for op, case, dtype, backend in steps:
            bar.update(task, description=f"{op.name} {backend} {case.name}", refresh=True)
            results.append(_judge(op, case, dtype, backend, device))
            bar.update(task, advance=1, refresh=True)
            if fail_fast and not results[-1].ok:
                break
    return results


def _judge(op: Op, case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> Result:
    """The judge's result; an exception of the implementation is a failure like any other, and the rest goes on."""
    try:
        return compare(op, backend, case, dtype, device)
    except Exception as error:
        detail = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        name = next(name for name, known in DTYPES.items() if known == dtype)
        return Result(op.name, case.name, name, backend, device.type, (Row("-", math.inf, 0.0, False, detail),))


def _findings(results: list[Result]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        finding = found.setdefault(result.op, {}).setdefault(result.backend, {"ok": True, "judged": 0})
        finding["ok"] &= result.ok
        finding["judged"] += 1
    return found


def _place(device: torch.device, backend: str) -> str:
    interpreted = " under Triton's interpreter" if backend == "triton" and device.type == "cpu" else ""
    return f"{bench.device_name(device)}{interpreted}"


def _table(title: str, results: list[Result]) -> Any:
    numbers = ("output error / allowed", "gradient error / allowed")
    made = table(title, "case", "dtype", *numbers, "verdict", right=numbers)
    for result in results:
        shares = [_share(result.worst(gradient)) for gradient in (False, True)]
        made.add_row(result.case, result.dtype, *shares, "ok" if result.ok else "WRONG")
    return made


def _share(row: Row | None) -> str:
    return "-" if row is None else f"{row.error:.1e} / {row.allowed:.1e}"
