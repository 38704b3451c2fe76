"""What the commands share: consoles at most 100 columns wide, tables, progress, JSON, one-line errors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 100


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"effkit: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def console(json_path: str | None = None, stderr: bool = False) -> Console:
    """A console as wide as the terminal, at most 100 columns, 100 where there is none; silent beside `--json -`."""
    stream = sys.stderr if stderr else sys.stdout
    found = Console(stderr=stderr, highlight=False, emoji=False, markup=False, quiet=json_path == "-")
    found.width = min(found.width, WIDTH) if stream.isatty() else WIDTH
    return found


def table(title: str | None, *columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` are numbers, those in `whole` are never broken into lines."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column in whole)
    return made


def progress() -> Progress:
    """A bar on standard error, gone when done; off where standard error is no terminal.

    It is drawn when told (refresh=True) and not by a thread of its own, which would disturb what is timed.
    """
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    off = not sys.stderr.isatty()
    return Progress(*columns, console=console(stderr=True), transient=True, auto_refresh=False, disable=off)


def check_folder(*paths: str | None) -> None:
    """Ends the program, before it has worked for minutes, when a file that it is to write has no folder."""
    for path in paths:
        if path is not None and path != "-" and not Path(path).absolute().parent.is_dir():
            fail(f"cannot write {path!r}: there is no folder {str(Path(path).parent)!r}")


def write_json(path: str | None, data: Any) -> None:
    """Writes data as JSON to a file, or to standard output for "-"; nothing for None."""
    if path is None:
        return
    text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinities: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
