"""effkit bench: the rows of effkit.bench as tables."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import torch

from effkit import bench as timing
from effkit.cli.arguments import check_cases, find_device, find_dtype, find_ops
from effkit.cli.output import check_folder, console, fail, progress, table, write_json
from effkit.ops import Case, Op

Row = dict[str, Any]


def bench(
    ops: list[str],
    device: str | None,
    dtype: str | None,
    cases: list[str],
    rivals: list[str],
    quick: bool,
    json: str | None,
    plot: str | None,
    save: bool,
) -> None:
    """Times, prints, keeps; exit code 1 when something to be timed is wrong."""
    check_folder(json, plot)
    where = find_device(device)
    kind = find_dtype(dtype or ("bf16" if where.type == "cuda" else "fp32"))
    work = _work(find_ops(ops), cases, rivals, where)
    if save and not (timing.ROOT / "benchmarks").is_dir():
        fail("--save keeps rows in benchmarks/results of a checkout, and this effkit is not installed from one")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install 'effkit[plot]'")
    rows: list[Row] = []
    skipped: dict[str, list[str]] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(work))
        for op, case in work:
            try:
                report = timing.run(
                    op,
                    case,
                    device=where,
                    dtype=kind,
                    rivals=rivals or None,
                    seconds=0.1 if quick else None,
                    tell=lambda what: bar.update(task, description=what, refresh=True),
                )
            except timing.NotVerified as error:
                bar.stop()
                fail(str(error), code=1)
            rows += report.rows
            for name, why in report.skipped.items():
                skipped.setdefault(f"{op.name} without {name}: {why}", []).append(case.name)
            if save:
                timing.append(report.rows)
            bar.update(task, advance=1, refresh=True)
        for op in {op.name: op for op, _ in work}.values():
            if lengths := timing.at_lengths(op, [case for other, case in work if other is op]):
                tell = lambda what: bar.update(task, description=what, refresh=True)  # noqa: E731
                grown = timing.run_lengths(
                    op, lengths, device=where, dtype=kind, seconds=0.1 if quick else None, tell=tell
                )
                rows += grown
                if save:
                    timing.append(grown)
    write_json(json, {**timing.environment(where), "rows": rows, "skipped": skipped})
    rows = timing.compared(rows)
    if plot is not None:
        timing.plot([row for row in rows if "among" not in row], plot)
    out = console(json)
    for _, group in itertools.groupby(sorted(rows, key=_panel), key=_panel):
        out.print(_table(list(group)))
    if not all(row["judged"]["agrees"] for row in rows):
        out.print("(differs): further from the reference than effkit verify allows an implementation to be")
    for line, left_out in skipped.items():
        out.print(f"{line} ({', '.join(left_out)})")


def _work(ops: list[Op], cases: list[str], rivals: list[str], device: torch.device) -> list[tuple[Op, Case]]:
    """The cases to time: those named, else on a GPU the large ones, on a CPU the others."""
    check_cases(cases, [case for op in ops for case in op.bench])
    known = list(dict.fromkeys(name for op in ops for name in op.rivals))
    for name in rivals:
        if name not in known:
            fail(f"--rival is {name!r}, choices: {', '.join(map(repr, known))}")
    large = device.type == "cuda"
    return [(op, case) for op in ops for case in op.bench if case.name in cases or (not cases and case.large == large)]


def _panel(row: Row) -> tuple[str, ...]:
    return row["op"], row["mode"], row.get("among", "")


def _table(rows: list[Row]) -> Any:
    first = rows[0]
    turns = ", lengths in turns" if first.get("among") else ""
    title = f"{first['op']}, {first['mode']}, {first['dtype']}{turns}, {first['device']}, {first['threads']} threads"
    numbers = ("ms", "p20 - p80", "to effkit", "GB/s", "TFLOP/s", "ceiling")
    made = table(title, "case", "who", *numbers, right=numbers)
    for _, group in itertools.groupby(rows, key=lambda row: row["case"]):
        for i, row in enumerate(group):
            made.add_row(
                row["case"] if i == 0 else "",
                row["provider"] + ("" if row["judged"]["agrees"] else " (differs)"),
                timing.short(row["median_ms"]),
                f"{timing.short(row['p20_ms'])} - {timing.short(row['p80_ms'])}",
                "" if row["to_effkit"] is None else f"{row['to_effkit']:.2f}x",
                timing.short(row["gb_per_s"]),
                timing.short(row["tflop_per_s"]),
                f"{row['share_of_ceiling']:.0%}",
            )
    return made
