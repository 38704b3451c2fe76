"""What `effkit verify` found on this machine, remembered for `effkit list`.

One small JSON file in the user's cache folder. A finding belongs to a device, to the versions of what computes, and to
the very source of effkit: after any edit it counts no more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import effkit.kernels
from effkit import bench


def recall(device: torch.device) -> dict[str, dict[str, Any]]:
    """Op to backend to {"ok", "judged"}: what was found for this device, these versions and this source."""
    return dict(_read().get(_key(device), {}))


def remember(device: torch.device, findings: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds findings, op to backend to {"ok", "judged"}; those of another source or version are dropped."""
    kept = recall(device)
    for op, backends in findings.items():
        kept[op] = {**kept.get(op, {}), **backends}
    current = {key: value for key, value in _read().items() if key.endswith(_state())}
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**current, _key(device): kept}, indent=1), encoding="utf-8")


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "effkit" / "verified.json"


def _read() -> dict[str, Any]:
    path = _path()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _key(device: torch.device) -> str:
    return f"{bench.device_name(device)}, {_state()}"


def _state() -> str:
    """Versions and a digest of the package's own source."""
    digest = hashlib.sha256()
    for package in (effkit, effkit.kernels):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return f"torch {torch.__version__}, triton {bench.version('triton')}, source {digest.hexdigest()[:16]}"
