"""Two processes run the suite: an ordinary one, and one with TRITON_INTERPRET=1 for the tests marked `interpreter`.

Triton reads the variable when kernels are defined, so one process cannot do both (and the interpreter must not be there
when kernels are compiled ahead of time).
"""

import sys
from pathlib import Path

import pytest
import torch

from effkit.ops import INTERPRET

ROOT = Path(__file__).parent.parent
# The folder kernels/ would hide the package of that name from the hub's library whenever the root is on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of this process: those marked `interpreter` under the interpreter, the others without it."""
    kept = [item for item in items if (item.get_closest_marker("interpreter") is not None) == INTERPRET]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    """No test and no function under test may leave global switches changed or draw from the global generator."""
    before = torch.random.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    yield
    assert torch.are_deterministic_algorithms_enabled() == before[1] and torch.is_grad_enabled() == before[2]
