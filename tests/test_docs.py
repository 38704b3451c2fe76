"""The pages are true: tables agree with the ledger, links lead somewhere, every python block runs."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from effkit.ops import AREAS, INTERPRET

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLED = re.compile(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
in_both_processes = pytest.mark.interpreter if INTERPRET else pytest.mark.slow


def named(pages: Iterable[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def python(*arguments: str | Path, cwd: Path) -> None:
    """Runs a program that must succeed, on the CPU alone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def only_python(text: str) -> str:
    """The python blocks of a page, each line where it stands in the page, so that tracebacks point there."""
    lines = [""] * (text.count("\n") + 1)
    for block in PYTHON.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def test_tables_are_those_of_the_ledger() -> None:
    python(ROOT / "docs" / "make.py", "--check", cwd=ROOT / "docs")


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", named(page for page in PAGES if page.name != "CONTRIBUTING.md"))
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """All blocks of a page in one program, in a folder of its own."""
    code = only_python(page.read_text())
    if not code.strip():
        return
    program = tmp_path / f"{page.stem}.py"
    program.write_text(code)
    python(program, cwd=tmp_path)


JUDGE = """
import importlib.util, sys
from pathlib import Path

from effkit.ops import INTERPRET, load_ops
from effkit.testing import verify

known = set(load_ops())
for path in (*Path("src").rglob("*.py"), *Path("kernels").rglob("*.py")):
    parts = path.parts[1:] if path.parts[0] == "src" else ("effkit", *path.parts)
    name = ".".join(parts).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
(new,) = set(load_ops()) - known
results = list(verify(new, device="cpu", backends=("triton",) if INTERPRET else ("torch",)))
print(*results, sep="\\n")
assert len(results) >= 3 * 8 and all(result.ok for result in results)
if not INTERPRET:  # the last module is the kernel's
    from effkit.kernels._common import compile_ahead

    builds = [compile_ahead(spec) for spec in module.aot_specs()]
    assert builds and all(built.stack == built.local == 0 for built in builds)
"""


@in_both_processes
def test_the_example_of_contributing_passes_the_judge(tmp_path: Path) -> None:
    """Its two files as a reader would write them: equal to the reference on each backend, compiled ahead of time."""
    files = dict(TITLED.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert len(files) == 2
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    program = tmp_path / "judge" / "judge.py"  # apart, since a program's folder is where it imports from
    program.parent.mkdir()
    program.write_text(JUDGE)
    python(program, cwd=tmp_path)


def test_every_public_name_is_on_a_page() -> None:
    """Layers, configs and helpers too, which are no ops."""
    text = "\n".join(page.read_text() for page in ROOT.glob("docs/*.md"))
    for area in AREAS:
        for name in importlib.import_module(area).__all__:
            assert name in text, f"{area}.{name} is on no page of docs/"
