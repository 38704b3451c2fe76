"""The one command for a machine.

    python benchmarks/run.py
        verify everything, time everything, keep the rows, renew the tables
    python benchmarks/run.py --gpu OUT [OP ...]
        on a GPU, in under 8 minutes: verify all cases, measure tiles, time the ops (default: all) against their rivals;
        results and a log in the folder OUT; where the files came without their history, EFFKIT_COMMIT names the commit
        for the rows. Rivals that are not installed are left out: flash-linear-attention is a pure Python wheel

Each step is a process of its own with a time limit: one that hangs or takes the GPU down with it loses its own results,
not those of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from effkit import bench as timing
from effkit.ops import Op, get_op, load_ops

HERE = Path(__file__).resolve().parent
EFFKIT = (sys.executable, "-m", "effkit.cli")  # run in this folder: from the root, kernels/ would hide a package
# Seconds for each step of a run on a GPU, under 8 minutes together; what one leaves over, the next may use.
LIMITS = {"verify": 150, "tune": 100, "bench": 90, "compiled": 120}
COMPILED = ("flex", "compiled")  # rivals that compile for long: they come last, so as not to cost the others their time


@dataclass
class GpuRun:
    """Where a run on a GPU leaves its results, and what it has to say at the end."""

    out: Path
    summary: list[str] = field(default_factory=list)

    def step(self, name: str, command: tuple[str, ...], deadline: float) -> None:
        """Runs a command until it ends or its time is over; its output goes to the log."""
        start = time.monotonic()
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n=== {name}: {' '.join(command)}\n")
            log.flush()
            code = run_until(command, deadline, log)
        self.say(
            f"{name}: {'out of time' if code is None else f'exit code {code}'} after {time.monotonic() - start:.0f} s"
        )

    def say(self, line: str) -> None:
        self.summary.append(line)
        print(line, flush=True)


def run_until(command: tuple[str, ...], deadline: float, output: Any) -> int | None:
    """The exit code of a command; None where it and its children had to be ended at the deadline."""
    process = subprocess.Popen(command, cwd=HERE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def ordinary_run(quick: bool) -> int:
    """Verify, bench, report; stops at the first that fails."""
    bench = (*EFFKIT, "bench", "--save", *(["--quick"] if quick else []))
    for command in ((*EFFKIT, "verify"), bench, (sys.executable, str(HERE / "report.py"))):
        code = subprocess.run(command, cwd=HERE).returncode
        if code:
            return code
    return 0


def gpu_run(out: Path, names: list[str]) -> int:
    """All that a GPU is needed for, the most important first."""
    out.mkdir(parents=True, exist_ok=True)
    log = GpuRun(out)
    end = time.monotonic()
    end += LIMITS["verify"]
    correct = verify_in_parallel(log, end, names)
    end += LIMITS["tune"]
    tune = (
        sys.executable,
        str(HERE / "tune.py"),
        "--seconds",
        str(LIMITS["tune"] - 10),
        "--out",
        str(out / "tiles.json"),
        *names,
    )
    log.step("tune", tune, end)
    end += LIMITS["bench"]
    bench = (*EFFKIT, "bench", "--device", "cuda", "--save")
    ops = chosen(names)
    quick = dict.fromkeys(name for op in ops for name in op.rivals if name not in COMPILED)
    log.step("bench", (*bench, *names, *against(quick)), end)
    end += LIMITS["compiled"]
    for op in reversed(ops):
        if slow := [name for name in op.rivals if name in COMPILED]:
            log.step(f"bench {op.name} against {' and '.join(slow)}", (*bench, op.name, *against(slow)), end)
    collect_rows(log)
    (out / "summary.txt").write_text("\n".join(log.summary) + "\n", encoding="utf-8")
    return 0 if correct else 1


def chosen(names: Sequence[str]) -> list[Op]:
    """The ops of these names, all without any."""
    return [get_op(name) for name in names] if names else list(load_ops().values())


def verify_in_parallel(log: GpuRun, deadline: float, names: list[str]) -> bool:
    """effkit verify on the GPU, in as many processes as there are processors: its time is the compiler's.

    Large cases come last and alone, for their references fill the memory.
    """
    small, large = shares(max(1, min(12, (os.cpu_count() or 4) - 2)), names)
    with tempfile.TemporaryDirectory() as folder:

        def run(number_and_share: tuple[int, tuple[str, ...]]) -> dict[str, Any]:
            number, share = number_and_share
            path = Path(folder) / f"{number}.json"
            command = (*EFFKIT, "verify", "--device", "cuda", "--json", str(path), *share)
            with (Path(folder) / f"{number}.txt").open("w") as output:
                code = run_until(command, deadline, output)
            if path.exists():
                return json.loads(path.read_text(encoding="utf-8"))
            tail = (Path(folder) / f"{number}.txt").read_text(encoding="utf-8").splitlines()[-5:]
            reason = "out of time" if code is None else f"exit code {code}"
            return {"results": [], "lost": {"share": share, "reason": reason, "tail": tail}}

        with ThreadPoolExecutor(len(small)) as pool:
            parts = list(pool.map(run, enumerate(small)))
        parts += [run((len(small) + i, share)) for i, share in enumerate(large)]
    results = [result for part in parts for result in part["results"]]
    lost = [part["lost"] for part in parts if "lost" in part]
    wrong = [result for result in results if not result["ok"]]
    (log.out / "verify.json").write_text(json.dumps({"results": results, "lost": lost}), encoding="utf-8")
    log.say(f"verify: {len(results)} judged, {len(wrong)} wrong, {len(lost)} of {len(parts)} processes lost")
    for result in wrong[:20]:
        worst = [f"{row['tensor']} {row['detail']}" for row in result["rows"] if not row["ok"]]
        log.say(f"  {result['op']} [{result['case']}] {result['dtype']} {result['backend']}: {worst[0]}")
    for part in lost:
        log.say(f"  lost ({part['reason']}): {' '.join(part['share'])} {' '.join(part['tail'][-1:])}")
    return not wrong and not lost


def shares(count: int, names: Sequence[str] = ()) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Arguments of `effkit verify` for each process: small cases dealt to about `count`, large cases one each."""
    small: list[tuple[str, ...]] = []
    large: list[tuple[str, ...]] = []
    ops = chosen(names)
    total = sum(not case.large for op in ops for case in op.cases)
    for op in ops:
        cases = [case.name for case in op.cases if not case.large]
        hands = max(1, round(count * len(cases) / total))
        for hand in range(hands):
            small.append((op.name, *(word for name in cases[hand::hands] for word in ("--case", name))))
        large += [(op.name, "--case", case.name) for case in op.cases if case.large]
    return small, large


def against(names: Iterable[str]) -> tuple[str, ...]:
    """Arguments of `effkit bench` that choose these rivals."""
    return tuple(word for name in names for word in ("--rival", name))


def collect_rows(log: GpuRun) -> None:
    """Copies this GPU's rows beside the other results and says the short of them."""
    path = timing.results_path(timing.environment(torch.device("cuda")))
    if not path.exists():
        log.say("no rows")
        return
    shutil.copy(path, log.out / path.name)
    rows = timing.compared(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    for row in rows:
        times = "" if row["to_effkit"] is None else f"{row['to_effkit']:.2f}x effkit"
        log.say(
            f"{row['op']:18} {row['case']:20} {row['mode']:17} {row['provider']:19}"
            f"{timing.short(row['median_ms']):>7} ms {row['share_of_ceiling']:4.0%} {times}".rstrip()
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="OUT", type=Path, help="folder for the results")
    parser.add_argument("ops", nargs="*", metavar="OP", help="with --gpu: these ops only")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    arguments = parser.parse_args()
    if arguments.ops and not arguments.gpu:
        parser.error(f"{' '.join(arguments.ops)}: ops are chosen with --gpu OUT; without it all are measured")
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no CUDA device here; without it everything runs on the CPU")
    return gpu_run(arguments.gpu.resolve(), arguments.ops) if arguments.gpu else ordinary_run(arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
