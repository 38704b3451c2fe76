"""effkit list and effkit show: the ledger, printed."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import torch

from effkit.cli import verified
from effkit.cli.arguments import find_device, find_ops
from effkit.cli.output import WIDTH, console, table, write_json
from effkit.ops import Case, Op, explain
from effkit.testing import make_inputs


def print_list(json: str | None) -> None:
    """All techniques, one row each."""
    device = find_device(None)
    found = verified.recall(device)
    techniques = [_technique(op, found.get(op.name, {})) for op in find_ops([])]
    write_json(json, {"device": str(device), "techniques": techniques})
    made = table(None, "technique", "what", "paper", f"verified, {device.type}", whole=("technique", "paper"))
    for technique in techniques:
        backends = technique["verified"].items()
        made.add_row(
            technique["op"],
            technique["summary"],
            technique["paper"].replace("https://arxiv.org/abs/", "arXiv "),
            "\n".join(f"{backend}: {_verdict(finding)}" for backend, finding in backends),
        )
    out = console(json)
    out.print(made)
    out.print("effkit show OP explains one of them, effkit verify OP judges it on this machine.")


def print_op(name: str, json: str | None) -> None:
    """Everything that the ledger and the docstrings say of one technique."""
    op = find_ops([name])[0]
    backends = _backends_here(op)
    costs = [_cost(op, case) for case in op.bench]
    out = console(json)
    write_json(
        json,
        {
            **_technique(op, verified.recall(find_device(None)).get(op.name, {})),
            "shapes": op.shapes,
            "about": inspect.getdoc(inspect.getmodule(op.function)),
            "arguments": inspect.getdoc(op.function),
            "gradients": list(op.grads),
            "cases": [case.name for case in op.cases],
            "backend_here": backends,
            "bench": costs,
            "rivals": list(op.rivals),
        },
    )
    out.print(f"{op.name}\n", style="bold")
    out.print(_fitted(f"{op.summary}\n{op.paper}\n"))
    out.print(_fitted(inspect.getdoc(inspect.getmodule(op.function)) or ""))
    out.print("\nShapes", style="bold")
    out.print(_fitted(op.shapes))
    out.print(f"\neffkit.{op.area}.{op.name}", style="bold")
    out.print(_fitted(f"{op.name}{inspect.signature(op.function)}".replace("'", "")))
    out.print()
    out.print(_fitted(inspect.getdoc(op.function) or ""))
    out.print("\nBackend taken here", style="bold")
    for device, choice in backends.items():
        out.print(f"{device:5} {choice['backend']}: {choice['reason']}")
    out.print(f"\nJudged on {len(op.cases)} cases, gradients of {', '.join(op.grads)}", style="bold")
    out.print(_fitted("; ".join(case.name for case in op.cases)))
    if costs:
        out.print()
        out.print(_cost_table(op, costs))


def _technique(op: Op, found: dict[str, Any]) -> dict[str, Any]:
    backends = ("torch", "triton") if op.triton else ("torch",)
    return {
        "op": op.name,
        "area": op.area,
        "summary": op.summary,
        "paper": op.paper,
        "verified": {backend: found.get(backend) for backend in backends},
    }


def _verdict(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return "not run"
    return f"yes, {finding['judged']} times" if finding["ok"] else "NO, it failed"


def _backends_here(op: Op) -> dict[str, dict[str, str]]:
    """For each kind of device present, the backend that the op takes there by itself, and why."""
    case = next(case for case in op.cases if not case.large)
    taken = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        inputs = make_inputs(op, case, torch.float32, device)
        choice = explain(op.function, **inputs, **case.options)[0]
        taken[device] = {"backend": choice.backend, "reason": choice.reason}
    return taken


def _cost(op: Op, case: Case) -> dict[str, Any]:
    return {
        "case": case.name,
        "sizes": dict(case.sizes),
        "options": {name: str(x) if isinstance(x, torch.dtype) else x for name, x in case.options.items()},
        "large": case.large,
        "flops": op.flops(case),
        "bytes_fp32": 4 * op.traffic(case) + op.other_bytes(case),
    }


def _cost_table(op: Op, costs: list[dict[str, Any]]) -> Any:
    rivals = f", rivals: {', '.join(op.rivals)}" if op.rivals else ""
    numbers = ("GFLOP", "MB, fp32", "FLOP/byte")
    made = table(
        f"Benchmark cases, one forward pass{rivals}", "case", "inputs", *numbers, right=numbers, whole=("case",)
    )
    for cost in costs:
        settings = {**cost["sizes"], **cost["options"]}
        made.add_row(
            cost["case"] + (" (GPU)" if cost["large"] else ""),
            " ".join(f"{name}={value}" for name, value in settings.items()),
            f"{cost['flops'] / 1e9:.4g}",
            f"{cost['bytes_fp32'] / 1e6:.4g}",
            f"{cost['flops'] / cost['bytes_fp32']:.3g}",
        )
    return made


def _fitted(text: str) -> str:
    """The text at the console's width: filled lines flow together, equations and columns keep their place."""
    paragraphs: list[str] = []
    filled = False  # the line before reached the edge, so that this one may continue it
    for line in text.splitlines():
        if filled and line.strip() and _indent(line) == _column(paragraphs[-1]) and "  " not in line.strip():
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(line)
        filled = len(line) > 85
    return "\n".join(_wrapped(paragraph) for paragraph in paragraphs)


def _wrapped(line: str) -> str:
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * _column(line), break_on_hyphens=False)
    return wrap.fill(line) if len(line) > WIDTH else line


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _column(line: str) -> int:
    """Where the text behind the first run of spaces starts: the indent, or the second column of arguments."""
    gap = re.search(r" {2,}", line)
    return gap.end() if gap else 0
