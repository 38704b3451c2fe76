"""Timing that says on what, against whom and how far from the machine's limits.

`run(op, case, ...)` first judges what it is about to time (see effkit.testing) and refuses otherwise. Then effkit's
backends and the ledger's rivals take turns, round after round, and each gets a row: median, 20th and 80th percentile,
rates from the ledger's counts of operations and bytes, and the share of this machine's own ceilings, measured in the
same run. A row says everything needed to repeat it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]  # the checkout, where effkit is installed from one


def environment(device: torch.device) -> dict[str, Any]:
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


def _power_limit(device: torch.device) -> float | None:
    """Watts that the GPU may draw, as nvidia-smi says; None for a processor, which does not say."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", "-i", uuid, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def _source() -> dict[str, Any]:
    """The commit of the checkout, and whether what decides speed differs from it; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "src", "kernels"))}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
