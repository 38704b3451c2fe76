"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU: no spills, shared memory fits, wgmma where due."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import effkit.kernels
from effkit.kernels._common import compile_ahead
from effkit.ops import load_ops

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MODULES = [
    importlib.import_module(f"effkit.kernels.{module.name}")
    for module in pkgutil.iter_modules([str(Path(effkit.kernels.__file__).parent)])
    if not module.name.startswith("_")
]
SPECS = [spec for module in MODULES for spec in getattr(module, "aot_specs", list)()]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-sm{spec.arch}")
def test_compiles(spec: Any) -> None:
    built = compile_ahead(spec)
    assert built.stack == 0 and built.local == 0, f"spills: {built.stack} bytes of stack, {built.local} local"
    assert built.shared <= SHARED_LIMIT[spec.arch]
    for instruction in spec.needs:
        assert instruction in built.ptx


def test_all_kernels_are_covered_on_all_architectures() -> None:
    """Each jitted entry kernel has a spec on each architecture."""
    for name, op in load_ops().items():
        if op.triton:
            assert hasattr(importlib.import_module(op.triton.partition(":")[0]), "aot_specs"), f"{name}: no aot_specs"
    covered: dict[Any, set[int]] = {}
    for spec in SPECS:
        covered.setdefault(spec.kernel.__name__, set()).add(spec.arch)
    assert covered and all(archs == set(SHARED_LIMIT) for archs in covered.values()), covered


def test_matrix_kernels_use_tensor_cores_on_hopper() -> None:
    """Forward and backward attention must ask for wgmma; a spec that forgets to would pass unseen."""
    asking = {spec.kernel.__name__ for spec in SPECS if spec.arch == 90 and "wgmma" in spec.needs}
    products = {spec.kernel.__name__ for spec in SPECS if spec.kernel.__name__.endswith(("_fwd", "_dq", "_dkv"))}
    products = {name for name in products if "attention" in name}
    assert len(products) == 3 and products <= asking
