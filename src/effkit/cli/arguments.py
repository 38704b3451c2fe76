"""Arguments of the command line turned into objects; what cannot be is a one-line error with the choices."""

from __future__ import annotations

import torch

from effkit.cli.output import fail
from effkit.ops import Case, Op, load_ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def find_ops(names: list[str]) -> list[Op]:
    """The ops of these names, all where there are none."""
    ops = load_ops()
    for name in names:
        if name not in ops:
            fail(f"no op named {name!r}, choices: {', '.join(ops)}")
    return [ops[name] for name in names] or list(ops.values())


def find_device(name: str | None) -> torch.device:
    """cpu or cuda, perhaps with an index; None: cuda where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        fail(f"--device is {name!r}, choices: 'cpu', 'cuda', 'cuda:0' and so on")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        fail(f"--device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def find_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16."""
    if name not in DTYPES:
        fail(f"--dtype is {name!r}, choices: {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def check_cases(names: list[str], cases: list[Case]) -> None:
    """Ends the program when a name given by --case is no case."""
    known = list(dict.fromkeys(case.name for case in cases))
    for name in names:
        if name not in known:
            fail(f"--case is {name!r}, choices: {', '.join(map(repr, known))}")
