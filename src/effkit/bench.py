"""Timing that says on what, against whom and how far from the machine's limits.

`run(op, case, ...)` first judges what it is about to time (see effkit.testing) and refuses otherwise. Then effkit's
backends and the ledger's rivals take turns, round after round, and each gets a row: median, 20th and 80th percentile,
rates from the ledger's counts of operations and bytes, and the share of this machine's own ceilings, measured in the
same run. A row says everything needed to repeat it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effkit.ops import INTERPRET, Case, Op, resolve
from effkit.testing import Result, flat_tensors, judge, make_inputs

ROOT = Path(__file__).resolve().parents[2]  # the checkout, where effkit is installed from one
MODES = ("forward", "forward+backward")

# What the backward pass adds to a ledger's count of one forward pass. Each product of matrices has two in its
# backward; recomputing counts as nothing. A backward pass reads the inputs and the gradient of the output and writes
# the gradients of the inputs: with inputs as large as outputs that is 3 tensors beside forward's 2.
WORK = {"forward": (1.0, 1.0), "forward+backward": (3.0, 2.5)}

Row = dict[str, Any]


class NotVerified(RuntimeError):
    """What was to be timed does not equal its reference."""


@dataclass(frozen=True)
class Provider:
    """Somebody who computes a case: an effkit backend ("effkit torch") or a rival of the ledger."""

    name: str
    call: Callable[..., Any]

    @property
    def own(self) -> bool:
        return self.name.startswith("effkit ")


@dataclass(frozen=True)
class Report:
    """The rows of one case, and who was left out and why."""

    rows: list[Row]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Ceilings:
    """The best rates that this machine showed: a large copy (bytes read and written) and a product of matrices."""

    copy_gb_per_s: float
    matrix_tflop_per_s: float

    def least_ms(self, flops: float, size: float) -> float:
        """The time that these operations and bytes need at least."""
        return max(flops / self.matrix_tflop_per_s / 1e9, size / self.copy_gb_per_s / 1e6)


def run(
    op: Op,
    case: Case,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rivals: Collection[str] | None = None,
    seconds: float | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Report:
    """Judges and times one case; rivals: these names of the ledger, None for all; seconds for each measurement,
    by default 0.5 on a GPU and 1 on a CPU.

    Raises NotVerified where one of effkit's backends does not equal its reference. A rival that is not installed,
    cannot compute the case or breaks on it is left out with the reason.
    """
    seconds = seconds or (0.5 if device.type == "cuda" else 1.0)
    allocator = keep_freed_memory() if device.type == "cpu" else "torch"
    torch.compiler.reset()  # rivals that compile get each case anew: torch gives up on a function after a few shapes
    inputs = make_inputs(op, case, dtype, device)
    providers, skipped = line_up(op, case, inputs, rivals)
    check = shortened(op, case, 2048 if device.type == "cuda" else 512)
    agrees = {}
    for provider in list(providers):
        tell(f"{op.name} {case.name}: judging {provider.name}")
        try:
            agrees[provider.name] = _judge(op, check, provider, dtype, device)
            for mode in modes(op, case):
                _call(op, provider, case, inputs, mode)()
        except Exception as error:
            if provider.own:
                raise
            providers.remove(provider)
            skipped[provider.name] = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    rows, here = [], {"allocator": allocator, **environment(device)}
    for mode in modes(op, case):
        tell(f"{op.name} {case.name}: timing {mode}")
        calls = [_call(op, provider, case, inputs, mode) for provider in providers]
        for provider, call, times in zip(providers, calls, interleave(calls, device, seconds), strict=True):
            judged = {"agrees": agrees[provider.name], "sizes": dict(check.sizes)}
            measured = _measured(op, case, dtype, mode, call, times, device)
            rows.append({**measured, "provider": provider.name, "judged": judged, **here})
    return Report(rows, skipped)


def run_lengths(
    op: Op,
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Times the path that effkit takes by itself on several lengths in turns, as `run` times one length on several
    paths: what a machine does in the meantime falls upon all of them, and how time grows can be read.

    Rows have "among": "lengths". Raises NotVerified as `run` does.
    """
    seconds = seconds or (0.5 if device.type == "cuda" else 1.0)
    allocator = keep_freed_memory() if device.type == "cpu" else "torch"
    inputs = {case.name: make_inputs(op, case, dtype, device) for case in cases}
    own = line_up(op, cases[-1], inputs[cases[-1].name], ())[0][-1]
    check = shortened(op, cases[-1], 2048 if device.type == "cuda" else 512)
    judged = {"agrees": _judge(op, check, own, dtype, device), "sizes": dict(check.sizes)}
    rows, here = [], {"among": "lengths", "allocator": allocator, **environment(device)}
    for mode in modes(op, cases[-1]):
        tell(f"{op.name}: timing {mode} at {len(cases)} lengths in turns")
        calls = [_call(op, own, case, inputs[case.name], mode) for case in cases]
        for case, call, times in zip(cases, calls, interleave(calls, device, seconds), strict=True):
            measured = _measured(op, case, dtype, mode, call, times, device)
            rows.append({**measured, "provider": own.name, "judged": judged, **here})
    return rows


def at_lengths(op: Op, cases: Iterable[Case]) -> list[Case]:
    """Those of an op's benchmark cases that differ in their length T alone, where there are several."""
    found = [case for case in cases if case in op.bench and case.name.startswith("T=")]
    return found if len(found) > 1 else []


def modes(op: Op, case: Case) -> tuple[str, ...]:
    """What is timed: forward, and with the backward pass where the op has one and the case wants one."""
    return MODES[:1] if case.forward_only or not op.grads else MODES


def line_up(
    op: Op, case: Case, inputs: Mapping[str, Tensor], rivals: Collection[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """Who computes the case, and who does not and why."""
    arguments = {**inputs, **case.options}
    found, skipped = [Provider("effkit torch", functools.partial(op.function, backend="torch"))], {}
    if op.triton is not None:
        reason = "it runs in the interpreter here" if INTERPRET else op.why_not_triton(arguments)
        if reason is None:
            found.append(Provider("effkit triton", functools.partial(op.function, backend="triton")))
        else:
            skipped["effkit triton"] = reason
    for name, path in op.rivals.items():
        if rivals is None or name in rivals:
            rival = resolve(path)
            reason = rival.cannot(**arguments)
            if reason is None:
                found.append(Provider(name, rival))
            else:
                skipped[name] = reason
    return found, skipped


def shortened(op: Op, case: Case, limit: int) -> Case:
    """The case with its long axes cut to the limit, for a reference whose cost may grow with their square.

    Axes that are last wherever they stand, the widths, stay: kernels are chosen by them.
    """
    # These take time in proportion; of quantisers the numbers of values and of their scales go together, too.
    if op.exact or op.area in ("quant", "peft"):
        return dataclasses.replace(case, large=False)
    several = [shape.axes for shape in op.signature.inputs if len(shape.axes) > 1]
    widths = {axes[-1] for axes in several} - {axis for axes in several for axis in axes[:-1]}  # g [B, H, T] ends long

    def cut(axis: str, size: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if axis in widths:
            return size
        return tuple(min(n, limit) for n in size) if isinstance(size, tuple) else min(size, limit)

    return dataclasses.replace(case, sizes={axis: cut(axis, size) for axis, size in case.sizes.items()}, large=False)


def interleave(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[list[float]]:
    """Milliseconds of each call: in every round all take a turn, and each round begins with another one.

    So a machine that slows down slows everybody down. At least five rounds, until the seconds (for each) are spent.
    """
    clocks = [_cuda_clock(call, device) if device.type == "cuda" else _cpu_clock(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 500):
        for turn in range(len(calls)):
            i = (rounds + turn) % len(calls)
            times[i].append(clocks[i]())
        rounds += 1
    return times


@functools.cache
def keep_freed_memory() -> str:
    """Has the C library of this process keep freed memory, as CUDA's allocator of torch does; says what it does now.

    glibc gives large blocks back to the system, which then fills each page with zeros when it is written again: from
    about 10 MB a tensor on that takes longer than many an op, and falls upon whoever runs after a larger one.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    kept = set_option is not None and set_option(trim_threshold, 1 << 30) and set_option(mmap_threshold, 1 << 25)
    return "glibc, keeps what is freed" if kept else "default"


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures this machine: the best of ten copies of a large tensor and of ten products of square matrices."""
    cuda = device.type == "cuda"
    size = 1 << (30 if cuda else 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)

    def best(call: Callable[[], Any]) -> float:
        clock = _cuda_clock(call, device) if cuda else _cpu_clock(call)
        return min(clock() for _ in range(10))

    return Ceilings(2 * size / best(lambda: target.copy_(source)) / 1e6, 2 * n**3 / best(lambda: a @ b) / 1e9)


def environment(device: torch.device) -> Row:
    """What a row says about where it was measured."""
    return {
        "device": device_name(device),
        "power_limit_w": _power_limit(device),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("effkit", "torch", "triton", "transformers")},
        "python": platform.python_version(),
        **_source(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of the GPU, or the model name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package, without its local part ("+cpu"); None where it is not installed."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def results_path(row: Row) -> Path:
    """Where a row is kept: benchmarks/results/<device>-<torch>-<triton>.jsonl of the checkout."""
    name = "-".join(str(row[key] or "none") for key in ("device", "torch", "triton"))
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.jsonl"


def append(rows: Iterable[Row]) -> None:
    """Adds rows to the results of the checkout."""
    for row in rows:
        results_path(row).parent.mkdir(exist_ok=True)
        with results_path(row).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def compared(rows: Iterable[Row]) -> list[Row]:
    """The rows with "to_effkit", how many times as long as effkit each provider took in the same measurement.

    effkit is what it takes by itself, the kernel where it was timed, else the torch path; that row holds None.
    """
    measurements: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row.get(name, "") for name in ("device", "timestamp", "op", "case", "dtype", "mode", "among"))
        measurements.setdefault(key, {})[row["provider"]] = row
    found = []
    for measured in measurements.values():
        own = "effkit triton" if "effkit triton" in measured else "effkit torch"
        for name, row in measured.items():
            times = row["median_ms"] / measured[own]["median_ms"]
            found.append({**row, "to_effkit": None if name == own else times})
    return found


def short(number: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{float(f'{number:.3g}'):.15g}" if number >= 1e-3 else f"{number:.5f}"


def plot(rows: Iterable[Row], path: str | Path) -> None:
    """Bars of the time relative to effkit's, one panel for each op, dtype and mode, from `compared` rows.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["op"], row["mode"], row["dtype"], row["device"]), []).append(row)
    bars = [len(panel) for panel in panels.values()]
    size = (9, 0.3 * sum(bars) + 0.9 * len(panels))
    figure, axes = pyplot.subplots(len(panels), figsize=size, height_ratios=bars, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row["provider"] for panel in panels.values() for row in panel))
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        length = [row["to_effkit"] or 1.0 for row in panel]
        below = [x * (1 - row["p20_ms"] / row["median_ms"]) for x, row in zip(length, panel, strict=True)]
        above = [x * (row["p80_ms"] / row["median_ms"] - 1) for x, row in zip(length, panel, strict=True)]
        colors = [f"C{names.index(row['provider'])}" for row in panel]
        drawn = axis.barh(range(len(panel)), length, xerr=[below, above], color=colors)
        axis.bar_label(drawn, [f"{short(row['median_ms'])} ms" for row in panel], padding=6)
        axis.set_yticks(range(len(panel)), [f"{row['case']}, {row['provider']}" for row in panel])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("time, effkit = 1 (median with p20 and p80)")
        axis.set_title(", ".join(title), loc="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _timed(op: Op, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors whose gradients are computed."""
    return tuple(name for name in op.grads if name in inputs and name not in op.frozen)


def _judge(op: Op, case: Case, provider: Provider, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a provider equals the reference on a case; NotVerified when effkit itself does not."""
    inputs = make_inputs(op, case, dtype, device)
    grads = _timed(op, inputs)
    rows = judge(
        functools.partial(provider.call, **case.options),
        functools.partial(op.function, **case.options, backend="reference"),
        inputs,
        grads,
        bitwise=op.exact,
    )
    result = Result(op.name, case.name, str(dtype), provider.name, device.type, tuple(rows))
    if provider.own and not result.ok:
        raise NotVerified(f"not timed, because it is wrong:\n{result}")
    return result.ok


def _call(op: Op, provider: Provider, case: Case, inputs: Mapping[str, Tensor], mode: str) -> Callable[[], Any]:
    """The provider's work on the inputs, as a function without arguments."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return provider.call(**inputs, **case.options)

        return forward

    leaves = {name: inputs[name].detach().requires_grad_() for name in _timed(op, inputs)}
    cotangents: list[Tensor] = []

    def both() -> Any:
        outputs = provider.call(**{**inputs, **leaves}, **case.options)
        outputs = [out for out in flat_tensors(outputs) if out.requires_grad]
        if not cotangents:
            cotangents.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)

    return both


def _cpu_clock(call: Callable[[], Any]) -> Callable[[], float]:
    """A function that returns the milliseconds of one call, a mean over so many calls that 20 ms pass."""

    def elapsed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) * 1e3 / count

    first = elapsed(1)
    count = max(1, math.ceil(20 / (elapsed(1) if first < 200 else first)))
    return lambda: elapsed(count)


def _cuda_clock(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """A function that returns the milliseconds of one call on the GPU, with cold caches.

    The memory written before the call empties the second-level cache, and takes long enough for the call to be queued
    before the GPU comes to it: what is measured is the GPU, not the launch.
    """
    flush = _flush_buffer(device)
    call()

    def elapsed() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    return elapsed


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device=device)


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one call takes beside what was there; None on a CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _about(op: Op, case: Case, dtype: torch.dtype, mode: str) -> Row:
    return {
        "op": op.name,
        "case": case.name,
        "sizes": dict(case.sizes),
        "options": {name: str(x) if isinstance(x, torch.dtype) else x for name, x in case.options.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
    }


def _measured(
    op: Op, case: Case, dtype: torch.dtype, mode: str, call: Callable[[], Any], times: list[float], device: torch.device
) -> Row:
    return {
        **_about(op, case, dtype, mode),
        **_times(times),
        "peak_bytes": _peak_bytes(call, device),
        **_rates(op, case, dtype, mode, times, ceilings(device, dtype)),
    }


def _times(times: list[float]) -> Row:
    low, median, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": len(times)}


def _rates(op: Op, case: Case, dtype: torch.dtype, mode: str, times: list[float], limits: Ceilings) -> Row:
    """Rates at the median time, from the ledger's counts, and the share of the time that the ceilings allow."""
    more_flops, more_bytes = WORK[mode]
    flops = op.flops(case) * more_flops
    size = (op.traffic(case) * dtype.itemsize + op.other_bytes(case)) * more_bytes
    median = _times(times)["median_ms"]
    return {
        "flops": flops,
        "bytes": size,
        "gb_per_s": size / median / 1e6,
        "tflop_per_s": flops / median / 1e9,
        **dataclasses.asdict(limits),
        "share_of_ceiling": limits.least_ms(flops, size) / median,
    }


def _power_limit(device: torch.device) -> float | None:
    """Watts that the GPU may draw, as nvidia-smi says; None where there is nothing to say it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", "-i", uuid, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    answer = re.fullmatch(r"[0-9.]+", subprocess.run(query, capture_output=True, text=True).stdout.strip())
    return float(answer[0]) if answer else None


def _source() -> Row:
    """The commit of the checkout, and whether what decides speed differs from it.

    Where the files travelled without their history, EFFKIT_COMMIT names the commit, and nobody knows the rest.
    """
    if not (ROOT / ".git").exists():
        return {"commit": os.environ.get("EFFKIT_COMMIT"), "dirty": None}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "src", "kernels"))}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
