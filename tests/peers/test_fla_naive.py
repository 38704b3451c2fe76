"""The recurrent ops against the naive forms of flash-linear-attention (fla-core), which are plain torch.

Their files are loaded one by one: importing the package takes half a minute on a machine without a GPU, and once it is
installed there transformers takes its Triton kernels for CPU tensors. scripts/test therefore puts it into .venv/peers,
where nothing imports it from. Most compute in float32, so they are judged as what they are: another implementation of
effkit's references.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.attention import FEATURE_MAPS
from effkit.ops import Case, get_op
from effkit.testing import assert_equivalent, make_inputs


def package() -> Path | None:
    """The folder of the package `fla`, found without importing it."""
    apart = Path(sys.prefix) / "peers" / "fla"
    spec = importlib.util.find_spec("fla")
    found = Path(spec.origin).parent if spec is not None and spec.origin else apart
    return found if found.exists() else None


pytestmark = pytest.mark.skipif(package() is None, reason="fla-core is not installed; scripts/test installs it")


def naive(path: str) -> Callable[..., Any]:
    """The function behind "folder:function" of fla/ops."""
    folder, _, name = path.partition(":")
    place = package()
    assert place is not None
    spec = importlib.util.spec_from_file_location(f"naive_{folder}", place / "ops" / folder / "naive.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def heads(*tensors: Tensor) -> list[Tensor]:
    """All tensors with as many heads as the one that has the most."""
    most = max(x.shape[1] for x in tensors)
    return [x.repeat_interleave(most // x.shape[1], dim=1) for x in tensors]


def by_time(*tensors: Tensor) -> list[Tensor]:
    """[B, H, T, ...] -> [B, T, H, ...] and back."""
    return [x.transpose(1, 2) for x in tensors]


@dataclass(frozen=True)
class Form:
    """A naive form of an op.

    call(function, **tensors) gives o and then the parts of the state; options are those with which the op computes the
    same; takes are the optional tensors that the form has. dtype: float64 where a form computes in it, and adds decays
    up over the whole sequence, which in float32 is less exact than a recurrence.
    """

    op: str
    path: str
    call: Callable[..., tuple[Tensor, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ("initial_state",)
    state: tuple[str, ...] = ("memory",)
    dtype: torch.dtype = torch.float32

    def cases(self) -> list[Case]:
        return [
            case
            for case in get_op(self.op).cases
            if case.sizes["B"] > 0 and 0 < case.sizes["T"] <= 70
            and set(case.given) <= set(self.takes)
            and not case.ints and not case.large and not case.options.get("qk_l2norm")
        ]  # fmt: skip


def linear(function: Any, q: Tensor, k: Tensor, v: Tensor, initial_state: Any = None) -> tuple[Tensor, ...]:
    q, k, v = by_time(*heads(q, k, v))
    o, memory = function(q, k, v, scale=1.0, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), memory


def normalized_linear(function: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = by_time(*heads(*map(FEATURE_MAPS["elu+1"], (q, k)), v))
    o, (memory, normalizer) = function(q, k, v, scale=1.0, output_final_state=True, normalize=True)
    return o.transpose(1, 2), memory, normalizer[:, 0]


def retention(function: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (function(*heads(q, k, v)),)


def ssd(function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Any = None) -> tuple[Tensor, ...]:
    q, k, v, g = by_time(*heads(q, k, v, g))
    o, memory = function(q, k, v, g, scale=1.0, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), memory


def gla(function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Any = None) -> tuple[Tensor, ...]:
    q, k, v, g = by_time(*heads(q, k, v, g))
    o, memory = function(q, k, v, g, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), memory


def delta(
    function: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Any = None
) -> tuple[Tensor, ...]:
    return function(*heads(q, k, v, beta), initial_state=initial_state)


def gated_delta(
    function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Any = None
) -> tuple[Tensor, ...]:
    q, k, v, g, beta = by_time(*heads(q, k, v, g, beta))
    o, memory = function(q, k, v, g=g, beta=beta, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), memory


def log_linear(function: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor) -> tuple[Tensor, ...]:
    q, k, v, g, level_scales = by_time(*heads(q, k, v, g, level_scales))
    return (function(q, k, v, g, level_scales).transpose(1, 2),)


FORMS = (
    Form("linear_attention", "linear_attn:naive_recurrent_linear_attn", linear,
         dict(feature_map="identity", normalize=False)),
    Form("linear_attention", "linear_attn:naive_recurrent_linear_attn", normalized_linear, dict(eps=1e-10), takes=(),
         state=("memory", "normalizer")),
    Form("retention", "retention:naive_retention", retention, takes=(), state=()),
    Form("ssd", "simple_gla:naive_recurrent_simple_gla", ssd),
    Form("gated_linear_attention", "gla:naive_recurrent_gla", gla),
    Form("delta_rule", "delta_rule:delta_rule_recurrence", delta),
    Form("gated_delta_rule", "gated_delta_rule:naive_recurrent_gated_delta_rule", gated_delta),
    Form("log_linear_attention", "log_linear_attn:naive_log_linear_attn", log_linear, takes=(), state=(),
         dtype=torch.float64),
)  # fmt: skip


@pytest.mark.parametrize(
    ("form", "case"),
    [pytest.param(form, case, id=f"{form.call.__name__}-{case.name}") for form in FORMS for case in form.cases()],
)
def test_reference_equals_the_naive_form(form: Form, case: Case) -> None:
    op, function = get_op(form.op), naive(form.path)

    def theirs(**tensors: Tensor) -> tuple[Tensor, ...]:
        return form.call(function, **tensors)

    def ours(**tensors: Tensor) -> tuple[Tensor, ...]:
        o, state = op.function(**tensors, **form.options, return_state=True, backend="reference")
        return o, *(getattr(state, part) for part in form.state)

    assert_equivalent(theirs, ours, make_inputs(op, case, form.dtype))
