"""effkit: efficiency techniques for language models that you can read, trust and run.

Public names are imported on first use; importing effkit imports neither transformers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "apply": "effkit.change",
    "describe": "effkit.change",
    "save": "effkit.change",
    "load": "effkit.change",
    "verify": "effkit.testing",
    "explain": "effkit.ops",
    "use_backend": "effkit.ops",
    "list_ops": "effkit.ops",
    "BackendUnavailable": "effkit.ops",
}
_MODULES = ("attention", "norm", "peft", "quant", "hf", "zoo", "testing", "bench")

__all__ = [  # written out for static checkers; tests/test_ledger.py compares it with the tables above
    "BackendUnavailable",
    "__version__",
    "apply",
    "attention",
    "bench",
    "describe",
    "explain",
    "hf",
    "list_ops",
    "load",
    "norm",
    "peft",
    "quant",
    "save",
    "testing",
    "use_backend",
    "verify",
    "zoo",
]

if TYPE_CHECKING:
    from effkit import attention, bench, hf, norm, peft, quant, testing, zoo
    from effkit.change import apply, describe, load, save
    from effkit.ops import BackendUnavailable, explain, list_ops, use_backend
    from effkit.testing import verify


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"effkit.{name}")
    raise AttributeError(f"module 'effkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
