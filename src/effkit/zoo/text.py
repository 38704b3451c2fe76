"""The text of the zoo: the Python standard library of the interpreter that runs this.

Every user has it, so nothing is downloaded and nothing is shipped. Test suites, generated tables (`encodings`), site
packages and caches are left out; what is left is about 10 MB. `HELD_OUT` names the modules that training never sees:
they exist in Python 3.10 to 3.14, and quality is always measured on them.

There is a second kind of text to adapt a model to, which it has never read: the syntax trees of the same modules, as
`ast.dump` writes them on one line. Each interpreter writes its own, so that every user has these, too.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

HELD_OUT = (
    "argparse.py", "asyncio/queues.py", "asyncio/subprocess.py", "bisect.py", "calendar.py",
    "concurrent/futures/thread.py", "configparser.py", "csv.py", "dataclasses.py", "email/message.py", "heapq.py",
    "http/client.py", "json/decoder.py", "json/encoder.py", "logging/handlers.py", "sched.py", "shutil.py",
    "statistics.py", "textwrap.py", "unittest/case.py", "urllib/robotparser.py", "xml/dom/minidom.py",
)  # fmt: skip
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3"}


def stdlib_files(split: str) -> list[Path]:
    """The files of a split, sorted by path: "heldout" (the modules of `HELD_OUT`) or "train" (all others)."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'heldout'")
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / name for name in HELD_OUT if (root / name).is_file()]
    if not files:
        raise FileNotFoundError(f"no held-out module found under {root}: this interpreter ships no library source")
    if split == "heldout":
        return files
    kept = (path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts))
    return [path for path in kept if path not in set(files)]


def stdlib_text(split: str, limit: int | None = None, seed: int = 0, kind: str = "source") -> list[bytes]:
    """The documents of a split as bytes; with `limit`, a seeded choice of whole documents up to about that many bytes.

    The limit lets a short healing run read a few hundred kilobytes instead of 10 MB. kind is "source" or "tree".
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, choices: {', '.join(map(repr, KINDS))}")
    files = stdlib_files(split)
    if limit is not None:
        random.Random(seed).shuffle(files)
    documents: list[bytes] = []
    total = 0
    for path in files:
        documents.append(KINDS[kind](path.read_bytes()))
        total += len(documents[-1])
        if limit is not None and total >= limit:
            break
    return documents


def _tree(source: bytes) -> bytes:
    """The syntax tree of a module on one line, such as Module(body=[Import(names=[alias(name='ast')])])."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that new parsers complain about
        return ast.dump(ast.parse(source)).encode()


KINDS: dict[str, Callable[[bytes], bytes]] = {"source": bytes, "tree": _tree}
