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


def techniques(folder: str) -> str:
    """One row for each op of the ledger; folder is where the pages are, seen from the file."""
    rows = ["| technique | what it does | paper | backends |", "| --- | --- | --- | --- |"]
    for op in load_ops().values():
        paper = f"[arXiv {op.paper.rpartition('/')[2]}]({op.paper})"
        rows.append(f"| [{op.name}]({folder}{op.name}.md) | {op.summary} | {paper} | {', '.join(backends(op))} |")
    return "\n".join(rows)


def backends(op: Op) -> list[str]:
    return [name for name in BACKENDS if name != "triton" or op.triton]


def pages() -> str:
    """A link to each page in docs/ that is not about an op."""
    others = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in {"README", *load_ops()}]
    return "\n".join(f"- [{title(page)}]({page.name})" for page in others)


def title(page: Path) -> str:
    """The first heading of a page."""
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def filled(path: Path, sections: dict[str, str]) -> str:
    """The file with each section between its markers."""
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, opened, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (opened and closed):
            sys.exit(f"{path}: has no {begin} ... {end}")
        text = f"{head}{begin}\n{content}\n{end}{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a file is stale")
    check = parser.parse_args().check
    files = {
        DOCS.parent / "README.md": {"techniques": techniques("docs/")},
        DOCS / "README.md": {"techniques": techniques(""), "pages": pages()},
    }
    wanted = {path: filled(path, sections) for path, sections in files.items()}
    stale = [path for path, text in wanted.items() if text != path.read_text(encoding="utf-8")]
    for path in stale:
        if check:
            print(f"{path} is stale: run python docs/make.py", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
