"""The ledger against everything that must agree with it: exports, docs, cases, kernels, rivals, configs."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import effkit
from effkit import ops as ledger
from effkit.change import ChangeConfig
from effkit.ops import AREAS, OPS, Case, Op, load_ops
from effkit.testing import make_inputs

ROOT = Path(__file__).parent.parent
ALL = list(load_ops().values())
every_op = pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)


def options_of(fn: Any) -> set[str]:
    return set(inspect.signature(fn).parameters)


@every_op
def test_exported_where_the_ledger_says(op: Op) -> None:
    area = importlib.import_module(f"effkit.{op.area}")
    assert f"effkit.{op.area}" in AREAS
    assert op.name in area.__all__ and getattr(area, op.name) is op.function
    assert op.function.__name__ == op.name and not op.function.__module__.endswith(f".{op.name}")


# What a public function may deal with before it calls a backend.
BY_THE_FRONT = {"cu_seqlens", "return_state", "feature_map", "key_lengths", "activation"}


@every_op
def test_one_signature(op: Op) -> None:
    """Public function, reference and torch path take the same; the tensors are those of the shape line."""
    public = options_of(op.function) - {"backend"}
    tensors = {shape.name for shape in op.signature.inputs}
    assert tensors <= public and set(op.grads) <= tensors and op.signature.outputs
    taken = options_of(op.reference)
    assert set(op.grads) <= taken <= public and public - taken <= BY_THE_FRONT
    inspect.signature(op.torch).bind(**dict.fromkeys(taken))
    assert op.function.__doc__ and op.paper.startswith("https://arxiv.org/abs/")
    assert (inspect.getdoc(inspect.getmodule(op.function)) or "").count("\n") >= 7, (
        "the module's docstring is the paper"
    )


@every_op
def test_cases_are_drawable_and_named_once(op: Op) -> None:
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names) and len(names) >= 8
    for case in op.cases:
        if not case.large:
            inputs = make_inputs(op, case, torch.float32)
            op.signature.check(op.name, inputs)  # raises
            assert set(case.options) <= options_of(op.function)
            assert set(case.given) <= {shape.name for shape in op.signature.inputs if shape.optional}
            assert set(case.ints) <= {shape.name for shape in op.signature.inputs}


@every_op
def test_benchmark_cases_and_rivals(op: Op) -> None:
    assert any(not case.large for case in op.bench) and any(case.large for case in op.bench)
    for case in (*op.bench, *op.cases):
        assert op.flops(case) >= 0 and op.traffic(case) >= 0
    assert all(op.flops(case) > 0 and op.traffic(case) + op.other_bytes(case) > 0 for case in op.bench)
    assert op.rivals and all(callable(ledger.resolve(path)) for path in op.rivals.values())


# Ops without a kernel of their own, and why.
WITHOUT_KERNEL: dict[str, str] = {
    "encode_kbit": "a byte for each code: for studies of data types, not to run a model",
    "decode_kbit": "a byte for each code: for studies of data types, not to run a model",
    "dora_linear": "products of torch, and one multiplication that goes with memory as it is",
    "ia3_linear": "a product of torch, and one multiplication that goes with memory as it is",
    "vera_linear": "at its usual rank of 256 there is no thin side: the products are ordinary ones",
}


@every_op
def test_kernel_takes_what_the_torch_path_takes(op: Op) -> None:
    assert (op.triton is None) == (op.name in WITHOUT_KERNEL), "an op without a kernel needs its reason here"
    if op.triton is None:
        return
    inspect.signature(op.implementation("triton")).bind(**dict.fromkeys(options_of(op.reference)))
    assert importlib.import_module(op.triton.partition(":")[0]).aot_specs()


@every_op
def test_documented(op: Op) -> None:
    page = ROOT / "docs" / f"{op.name}.md"
    assert page.is_file(), f"{op.name} needs docs/{op.name}.md"
    for listing in ("README.md", "docs/README.md"):
        assert f"{op.name}.md" in (ROOT / listing).read_text(), f"{listing} does not list {op.name}"


def subclasses(cls: type) -> set[type]:
    return {sub for direct in cls.__subclasses__() for sub in {direct, *subclasses(direct)}}


def test_configs_are_exported_with_handlers_that_exist() -> None:
    configs = {cls for cls in subclasses(ChangeConfig) if cls.__module__.startswith("effkit.")}
    configs = {cls for cls in configs if not cls.__module__.rpartition(".")[2].startswith("_")}  # bases of others
    assert configs
    for cls in configs:
        area = importlib.import_module(cls.__module__.rpartition(".")[0])
        assert cls.__name__ in area.__all__
        assert callable(ledger.resolve(cls.handler))


def test_public_names() -> None:
    """The names that programs outside call: present, listed, and importable."""
    assert set(effkit.__all__) == {*effkit._NAMES, *effkit._MODULES, "__version__"}
    for name in effkit.__all__:
        assert getattr(effkit, name) is not None
    for name in ("apply", "describe", "save", "load", "verify", "explain", "use_backend", "list_ops", "__version__"):
        assert name in effkit.__all__
    assert set(effkit.list_ops()) == set(OPS)
    with pytest.raises(AttributeError, match="has no attribute 'attend'"):
        _ = effkit.attend
    for area in AREAS:
        module = importlib.import_module(area)
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_a_name_enters_once() -> None:
    with pytest.raises(ValueError, match="already in the ledger"):
        ledger.register(ALL[0])
    with pytest.raises(ValueError, match=r"no op named 'softmax', choices: .*softmax_attention"):
        ledger.get_op("softmax")


class TestShapeLines:
    """The small language of shapes."""

    line = ledger.parse("x [*N, C], weight [C]?, pair [2] -> y [*N, C]")

    def check(self, **shapes: tuple[int, ...] | None) -> dict[str, int]:
        return self.line.check("op", {n: None if s is None else torch.zeros(s) for n, s in shapes.items()})

    def test_sizes(self) -> None:
        assert self.check(x=(3, 4, 5), weight=(5,), pair=(2,)) == {"C": 5}
        assert self.check(x=(5,), weight=None, pair=(2,)) == {"C": 5}
        assert self.line.shape_of("x", {"*N": (3, 4), "C": 5}) == (3, 4, 5)

    @pytest.mark.parametrize(
        ("shapes", "error", "message"),
        [
            (
                dict(x=(3, 512), weight=(511,), pair=(2,)),
                ValueError,
                r"weight has shape \[511\], expected \[C\] with C=512",
            ),
            (dict(x=(), pair=(2,)), ValueError, r"x has shape \[\], expected \[\*N, C\]"),
            (dict(x=(3, 4), pair=(3,)), ValueError, r"pair has shape \[3\], expected \[2\]"),
            (dict(x=None, pair=(2,)), TypeError, r"x is None, expected a tensor \[\*N, C\]"),
        ],
    )
    def test_errors(self, shapes: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"op: {message}"):
            self.check(**shapes)

    @pytest.mark.parametrize("line", ["x [N]", "x N -> y [N]", "x [C, *N] -> y [C]"])
    def test_malformed(self, line: str) -> None:
        with pytest.raises(ValueError, match="shape line"):
            ledger.parse(line)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout is 'diagonal', choices"):
        make_inputs(ALL[0], Case("c", ALL[0].cases[0].sizes, ALL[0].cases[0].options, layout="diagonal"), torch.float32)
