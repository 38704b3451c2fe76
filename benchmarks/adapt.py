"""Adapts the zoo's model to syntax trees with every kind of adapter, and makes the tables of docs/adapter_training.md.

    python benchmarks/adapt.py            run everything, about a quarter of an hour on two cores; renew the tables
    python benchmarks/adapt.py LoRA VeRA  run these methods only, and keep the rows of the others
    python benchmarks/adapt.py --tables   renew the tables from the rows
    python benchmarks/adapt.py --check    exit code 1 where the page holds other tables

Each method is run at each of its learning rates on the same batches. LoRA and LoRA+ are then run at the best of theirs
from other starting values and on other batches, since one run does not tell a small difference from chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import effkit
from effkit import bench, zoo
from effkit.change import ChangeConfig
from effkit.peft import DoRAConfig, IA3Config, LoRAConfig, SingLoRAConfig, VeRAConfig
from effkit.quant import NF4Config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "adapt"
PAGE = ROOT / "docs" / "adapter_training.md"
BEGIN, END = "<!-- adapt:begin -->", "<!-- adapt:end -->"
STEPS, ROWS, LENGTH, WINDOWS, EVERY, SEEDS = 60, 4, 256, 8, 5, 3
TARGET = 1.1  # held-out bits per byte


@dataclass(frozen=True)
class Method:
    """What is applied to the model, the (lr, ratio) of its runs, and how many seeds the best of them is run with."""

    configs: tuple[ChangeConfig, ...]
    rates: tuple[tuple[float, float], ...]
    seeds: int = 1


def plain(*rates: float) -> tuple[tuple[float, float], ...]:
    """One learning rate for all parameters."""
    return tuple((lr, 1) for lr in rates)


ALL = dict(target_modules="all-linear")
LORA = LoRAConfig(rank=8, alpha=16, **ALL)
PLUS = ((2e-3, 4), (3e-4, 16), (6e-4, 16), (1e-3, 16), (2e-3, 16))
METHODS = {
    "all weights": Method((), plain(3e-4, 6e-4, 1.2e-3)),
    "LoRA": Method((LORA,), plain(1e-3, 3e-3, 6e-3, 1e-2, 2e-2), SEEDS),
    "LoRA+": Method((LORA,), PLUS, SEEDS),
    "rsLoRA": Method((dataclasses.replace(LORA, rank_stabilized=True),), plain(1e-3, 3e-3, 6e-3)),
    "LoRA-FA": Method((dataclasses.replace(LORA, train_a=False),), plain(3e-3, 1e-2, 3e-2)),
    "DoRA": Method((DoRAConfig(rank=8, alpha=16, **ALL),), plain(6e-3, 1e-2)),
    "SingLoRA": Method((SingLoRAConfig(rank=8, alpha=16, ramp_steps=STEPS // 6, **ALL),), plain(1e-3, 3e-3, 1e-2)),
    "VeRA": Method((VeRAConfig(rank=256, **ALL),), plain(3e-2, 1e-1, 2e-1)),
    "(IA)^3": Method((IA3Config(),), plain(3e-2, 1e-1, 3e-1)),
    "QLoRA": Method((NF4Config(), LORA), plain(6e-3, 1e-2)),
}


def run(name: str, lr: float, ratio: float, seed: int = 0) -> dict[str, Any]:
    """One training from a fresh model: its row."""
    seeded = [dataclasses.replace(config, seed=seed) if seed else config for config in METHODS[name].configs]
    model = zoo.load_model()
    if seeded:
        effkit.apply(model, *seeded)
    batches = zoo.training_batches(STEPS, ROWS, LENGTH, seed, kind="tree")
    result = zoo.adapt(model, batches, zoo.heldout_batches(WINDOWS, kind="tree"), lr=lr, ratio=ratio, every=EVERY)
    return {
        "method": name,
        "configs": [config.to_dict() for config in seeded],
        **{"lr": lr, "ratio": ratio, "seed": seed, "rows": ROWS, "length": LENGTH, "windows": WINDOWS},
        **dataclasses.asdict(result),
        **bench.environment(torch.device("cpu")),
    }


def runs(names: Iterable[str]) -> Iterable[dict[str, Any]]:
    """The rows of these methods, each as soon as it is there."""
    for name in names:
        rows = []
        for lr, ratio in METHODS[name].rates:
            rows.append(run(name, lr, ratio))
            yield rows[-1]
        chosen = min(rows, key=bits)
        for seed in range(1, METHODS[name].seeds):
            yield run(name, chosen["lr"], chosen["ratio"], seed)


def bits(row: dict[str, Any]) -> float:
    """Held-out bits per byte at the end."""
    return list(row["curve"].values())[-1]


def steps_to(row: dict[str, Any]) -> str:
    """The steps after which TARGET was reached."""
    return next((str(step) for step, measured in row["curve"].items() if measured <= TARGET), "-")


def measure(names: Sequence[str]) -> None:
    """Runs methods, and writes their rows in the place of the older ones."""
    path = RESULTS / bench.results_path(bench.environment(torch.device("cpu"))).name
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in load(path) if row["method"] not in names]
    for row in runs(names):
        kept.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        print(f"{row['method']:11} lr {row['lr']:<7g} ratio {row['ratio']:<4g} seed {row['seed']}", end="  ")
        print(
            f"{bits(row):.4f} bits per byte, {TARGET} after {steps_to(row)} steps, {row['seconds']:.0f} s", flush=True
        )


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a file in the order of METHODS; none where there is no file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return sorted(rows, key=lambda row: list(METHODS).index(row["method"]))


def tables() -> str:
    """What stands on the page: for each file of rows the methods at their best, and all that was tried."""
    parts = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = load(path)
        first = rows[0]
        where = f"{first['device']}, {first['threads']} threads, torch {first['torch']}, Python {first['python']}"
        parts.append(f"{where}. Rows: `benchmarks/results/adapt/{path.name}`.\n\n{_best(rows)}\n\n{_tried(rows)}")
        parts.append(_seeds(rows))
    return "\n\n".join(parts) or "No rows yet."


def _best(rows: list[dict[str, Any]]) -> str:
    """Each method at the learning rate with the fewest bits."""
    lines = []
    for name in METHODS:
        own = [row for row in rows if row["method"] == name and row["seed"] == 0]
        if not own:
            continue
        row = min(own, key=bits)
        error = "" if row["merge_error"] is None else f"{row['merge_error']:.1e} of {row['largest_logit']:.0f}"
        rate = f"{row['lr']:g}" + (f", B {row['lr'] * row['ratio']:g}" if row["ratio"] != 1 else "")
        numbers = (f"{row['trainable']:,}", f"{row['saved_bytes'] / 1e6:.1f}", f"{bits(row):.3f}", steps_to(row), error)
        lines.append((name, rate, *numbers))
    head = (
        "method",
        "learning rate",
        "trained",
        "saved MB",
        "bits per byte",
        f"steps to {TARGET}",
        "merging moves logits",
    )
    before = f"Before any training: {next(iter(rows[0]['curve'].values())):.3f} bits per byte."
    return f"{_table(head, lines)}\n\n{before}"


def _tried(rows: list[dict[str, Any]]) -> str:
    """Bits per byte at each learning rate that was tried."""
    lines = []
    for name in METHODS:
        own = [row for row in rows if row["method"] == name and row["seed"] == 0]
        for ratio in sorted({row["ratio"] for row in own}):
            at = [f"{row['lr']:g}: {bits(row):.3f}" for row in own if row["ratio"] == ratio]
            lines.append((name if ratio == 1 else f"{name}, ratio {ratio:g}", ", ".join(at)))
    return _table(("method", "learning rate of A: bits per byte"), lines)


def _seeds(rows: list[dict[str, Any]]) -> str:
    """The best of LoRA and LoRA+ from several starting values, on several batches."""
    lines = []
    for name, method in METHODS.items():
        own = [row for row in rows if row["method"] == name]
        if method.seeds > 1 and len(own) > len(method.rates):
            chosen = min((row for row in own if row["seed"] == 0), key=bits)
            same = [row for row in own if (row["lr"], row["ratio"]) == (chosen["lr"], chosen["ratio"])]
            found = sorted(same, key=lambda row: row["seed"])
            lines.append((name, ", ".join(f"{bits(row):.3f}" for row in found), ", ".join(map(steps_to, found))))
    return _table(("at its best, seeds 0, 1, 2", "bits per byte", f"steps to {TARGET}"), lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def page() -> str:
    """The page with the tables of the rows."""
    text = PAGE.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        sys.exit(f"{PAGE} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default all")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="run and write nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"METHOD is {unknown[0]!r}, choices: {', '.join(METHODS)}")
    if arguments.check:
        sys.exit(page() != PAGE.read_text(encoding="utf-8"))
    if not arguments.tables:
        measure(arguments.methods or list(METHODS))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
