"""What is built and installed is what stands on disk, and importing it stays cheap and hides nobody else's package."""

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = {"effkit": "src/effkit", "effkit/kernels": "kernels"}  # place in the wheel: place in the tree
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORT_SECONDS = 0.3  # what `import effkit` may cost over `import torch`


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a program that must succeed, run with these variables and without the caller's paths."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution of a copy of this tree: what an index would hand out."""
    copy = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    return next((copy / "dist").glob("*.whl"))


def test_packages_are_the_folders_on_disk() -> None:
    """A package that is not in the list would import from a checkout and be missing from the wheel."""
    found = {
        ".".join((*Path(name).parts, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_kernels_are_flat() -> None:
    assert {path.parent for path in (ROOT / "kernels").rglob("*.py")} == {ROOT / "kernels"}


def test_wheel_holds_every_module_and_the_model(wheel: Path) -> None:
    copy = wheel.parent.parent
    expected = {
        f"{name}/{path.relative_to(copy / folder)}"
        for name, folder in FOLDERS.items()
        for path in (copy / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "model"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        top_level = next(name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["effkit"]
    assert held == expected


def test_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    places = python(
        "import torch, effkit, effkit.kernels\n"
        "from effkit.attention import softmax_attention\n"
        "q = torch.ones(1, 2, 3, 16)\n"
        "assert torch.equal(softmax_attention(q, q, q, causal=True), q)\n"
        "print(effkit.__file__, effkit.kernels.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert all(Path(place).is_relative_to(site) for place in places.split())


def test_kernels_of_another_project_are_not_hidden() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_the_folder_refuses_another_name() -> None:
    """With the root on sys.path, `import kernels` must fail instead of giving ours to who asked for another."""
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"effkit\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_nothing_puts_the_root_on_the_path() -> None:
    """pytest would insert the folder of a conftest, or the parent of a package of tests, into sys.path."""
    assert not (ROOT / "conftest.py").exists() and not list((ROOT / "tests").rglob("__init__.py"))
    assert "--import-mode=importlib" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


def test_import_leaves_the_heavy_packages_alone(tmp_path: Path) -> None:
    loaded = python("import sys, effkit; print(*sys.modules)", cwd=tmp_path).split()
    assert not {"transformers", "triton", "effkit.kernels"} & set(loaded)


def test_techniques_do_not_import_transformers_or_kernels(tmp_path: Path) -> None:
    """triton itself may be there: torch's compiler looks for it."""
    areas = "effkit.attention, effkit.norm, effkit.peft, effkit.quant, effkit.testing"
    loaded = python(f"import sys, {areas}; print(*sys.modules)", cwd=tmp_path)
    assert not {"transformers", "effkit.kernels"} & set(loaded.split())


def test_import_is_quick(tmp_path: Path) -> None:
    """Time of the processor, which a busy machine does not stretch."""
    code = "import time, torch; t = time.process_time(); import effkit; print(time.process_time() - t)"
    seconds = [float(python(code, cwd=tmp_path)) for _ in range(3)]
    assert statistics.median(seconds) <= IMPORT_SECONDS


def test_constraints_lie_in_the_ranges() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    ranges = {required.name: required.specifier for group in groups for required in map(Requirement, group)}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    assert pins
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "==" and ranges[pin.name].contains(version.version), str(pin)
