"""Writes what the ledger knows into README.md and docs/README.md, between markers.

python docs/make.py            rewrite both files
python docs/make.py --check    exit code 1 where a file says something else

The page of an op is docs/<name of the op>.md. Every other page in docs/ is listed under its own title.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effkit.ops import BACKENDS, Op, load_ops

DOCS = Path(__file__).resolve().parent
FILES = {DOCS.parent / "README.md": "docs/", DOCS / "README.md": ""}  # where, and how links from there begin


def techniques(prefix: str) -> str:
    """One row for each op of the ledger."""
    rows = ["| technique | what it does | paper | backends |", "| --- | --- | --- | --- |"]
    for op in load_ops().values():
        paper = f"[arXiv {op.paper.rpartition('/')[2]}]({op.paper})"
        rows.append(f"| [{op.name}]({prefix}{op.name}.md) | {op.summary} | {paper} | {', '.join(backends(op))} |")
    return "\n".join(rows)


def backends(op: Op) -> list[str]:
    return [name for name in BACKENDS if name != "triton" or op.triton]


def pages(prefix: str) -> str:
    """A link to each page that is not about an op."""
    others = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in {"README", *load_ops()}]
    return "\n".join(f"- [{title(page)}]({prefix}{page.name})" for page in others)


def title(page: Path) -> str:
    """The first heading of a page."""
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


SECTIONS = {"techniques": techniques, "pages": pages}


def filled(path: Path) -> str:
    """What the file should hold."""
    text = path.read_text(encoding="utf-8")
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, opened, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (opened and closed):
            sys.exit(f"{path}: has no {begin} ... {end}")
        text = f"{head}{begin}\n{make(FILES[path])}\n{end}{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a file is stale")
    check = parser.parse_args().check
    stale = {path: text for path in FILES if (text := filled(path)) != path.read_text(encoding="utf-8")}
    for path, text in stale.items():
        if check:
            print(f"{path} is stale: run python docs/make.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
