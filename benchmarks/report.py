"""Makes the benchmark tables of README.md and docs/benchmarks.md from the committed rows, and nothing else does.

python benchmarks/report.py           write the tables between the markers of both files
python benchmarks/report.py --check   exit code 1 where a file holds other tables
python benchmarks/report.py --plots   also draw docs/benchmarks-<results>.png (needs matplotlib)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from effkit import bench
from effkit.bench import Row, short

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DENSE = "dense sdpa"  # the rival that stands for exact attention beside the linear-time ops
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PAGES = {ROOT / "README.md": lambda: render_short(load()), ROOT / "docs" / "benchmarks.md": lambda: render_full(load())}


def load(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The newest row of each provider for each case, dtype and mode, compared with effkit in its own measurement."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = bench.compared(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        keys = ("op", "case", "dtype", "mode", "provider", "among")
        newest = {tuple(row.get(key) for key in keys): row for row in sorted(rows, key=lambda row: row["timestamp"])}
        found[path.stem] = list(newest.values())
    return found


def render_short(results: dict[str, list[Row]]) -> str:
    """For the README: effkit's time, how many times as long its rivals took, and how time grows with T."""
    parts = []
    for rows in results.values():
        parts.append(f"**{_machine(rows[0])}.** Time of effkit, and how many times as long the others took.")
        for _, group in _by([row for row in rows if not _at_length(row)], "op"):
            parts.append(_short_table(group))
        if growth := _growth(rows):
            parts.append(f"How time grows with T.\n\n{growth}")
    return "\n\n".join(parts) or "No rows yet."


def render_full(results: dict[str, list[Row]]) -> str:
    """For the docs: everything that was measured, with its spread, rates and ceilings."""
    parts = []
    for name, rows in results.items():
        parts.append(f"## {_machine(rows[0])}\n\nRows: `benchmarks/results/{name}.jsonl`.")
        for (op, mode, dtype), group in _by([row for row in rows if "among" not in row], "op", "mode", "dtype"):
            parts.append(f"### {op}, {mode}, {dtype}\n\n{_ceilings(group[0])}\n\n{_full_table(group)}")
        if growth := _growth(rows):
            parts.append(f"### How time grows with T\n\n{growth}")
    return "\n\n".join(parts) or "No rows yet."


def _at_length(row: Row) -> bool:
    """Whether a row is one of several lengths."""
    return row["case"].startswith("T=")


def _growth(rows: list[Row]) -> str:
    """How time grows with T, for ops measured at several lengths (cases "T=...") in turns; where dense is overtaken."""
    lines = []
    for (op, dtype), group in _by([row for row in rows if _at_length(row)], "op", "dtype"):
        for (mode,), own in _by([row for row in group if "among" in row], "mode"):
            times = {int(row["case"].removeprefix("T=")): row["median_ms"] for row in own}
            lengths = sorted(times)
            doubled = [f"{times[2 * T] / times[T]:.2f}x" for T in lengths if 2 * T in times]
            dense = {
                int(row["case"].removeprefix("T=")): row["to_effkit"]
                for row in group
                if row["provider"] == DENSE and row["mode"] == mode
            }
            cells = [op, f"{mode}, {dtype}", f"{lengths[0]} to {lengths[-1]}", ", ".join(doubled), crossing(dense)]
            lines.append(_line(cells))
    heads = ["op", "", "T", "time at each doubling of T", f"against {DENSE}"]
    return "\n".join([_line(heads), _line(["---"] * len(heads)), *lines]) if lines else ""


def crossing(ratios: dict[int, float]) -> str:
    """From which measured T on effkit is the faster, given how many times as long the other took at each T."""
    if not ratios:
        return "-"
    lengths = sorted(ratios)
    slower = [T for T in lengths if ratios[T] < 1]
    if not slower:
        return f"faster from T={lengths[0]} on, {ratios[lengths[-1]]:.2f}x at T={lengths[-1]}"
    if slower[-1] == lengths[-1]:
        return f"slower up to T={lengths[-1]}, {ratios[lengths[-1]]:.2f}x there"
    first = lengths[lengths.index(slower[-1]) + 1]
    return f"faster from T={first} on, {ratios[lengths[-1]]:.2f}x at T={lengths[-1]}"


def _short_table(rows: list[Row]) -> str:
    rivals = list(dict.fromkeys(row["provider"] for row in rows if not row["provider"].startswith("effkit ")))
    lines = [_line([rows[0]["op"], "", "effkit", *rivals, "share of ceiling"]), _line(["---"] * (4 + len(rivals)))]
    for (case, mode, dtype), group in _by(rows, "case", "mode", "dtype"):
        own = next(row for row in group if row["to_effkit"] is None)
        ratios = {row["provider"]: _times(row) for row in group}
        cells = [f"{case}, {dtype}", mode, f"{short(own['median_ms'])} ms", *(ratios.get(name, "-") for name in rivals)]
        lines.append(_line([*cells, f"{own['share_of_ceiling']:.0%}"]))
    return "\n".join(lines)


def _full_table(rows: list[Row]) -> str:
    heads = ["case", "who", "ms", "p20 - p80", "to effkit", "GB/s", "TFLOP/s", "share of ceiling", "peak MB", "commit"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else short(row["peak_bytes"] / 1e6)
        commit = "-" if row["commit"] is None else row["commit"][:9] + ("+" if row["dirty"] else "")
        lines.append(
            _line(
                [
                    row["case"],
                    row["provider"] + ("" if row["judged"]["agrees"] else " (differs)"),
                    short(row["median_ms"]),
                    f"{short(row['p20_ms'])} - {short(row['p80_ms'])}",
                    _times(row),
                    short(row["gb_per_s"]),
                    short(row["tflop_per_s"]),
                    f"{row['share_of_ceiling']:.0%}",
                    peak,
                    commit,
                ]
            )
        )
    return "\n".join(lines)


def _by(rows: list[Row], *keys: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows that agree in the keys, neighbours or not, in the order of first appearance."""
    order: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        order.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(order.items())


def _machine(row: Row) -> str:
    power = "" if row["power_limit_w"] is None else f" at {row['power_limit_w']:.0f} W"
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers", "python") if row[name])
    return f"{row['device']}{power}, {row['threads']} threads, {versions}, {row['timestamp'][:10]}"


def _ceilings(row: Row) -> str:
    copy, matrix = short(row["copy_gb_per_s"]), short(row["matrix_tflop_per_s"])
    return f"Measured ceilings: copy {copy} GB/s, matrix product {matrix} TFLOP/s."


def _times(row: Row) -> str:
    return "" if row["to_effkit"] is None else f"{row['to_effkit']:.2f}x"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(text: str, tables: str, name: str) -> str:
    """The text with the tables between its markers; ValueError where it has none."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{name} has no markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    arguments = parser.parse_args()
    stale = False
    for path, render in PAGES.items():
        before = path.read_text(encoding="utf-8")
        after = replaced(before, render(), path.name)
        stale |= before != after
        if not arguments.check:
            path.write_text(after, encoding="utf-8")
    if arguments.plots:
        for name, rows in load().items():
            bench.plot([row for row in rows if "among" not in row], ROOT / "docs" / f"benchmarks-{name}.png")
    if arguments.check and stale:
        print("The tables are not those of the rows: run python benchmarks/report.py", file=sys.stderr)
    return int(arguments.check and stale)


if __name__ == "__main__":
    sys.exit(main())
