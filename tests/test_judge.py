"""The judge sees what it says it sees: each test gives it one wrong implementation, and a right one that must pass."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import effkit
from effkit.testing import DTYPES, assert_equivalent, compare, judge, verify


def reference(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x) * w


def inputs(dtype: torch.dtype = torch.float32, rows: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(rows, 64, generator=generator).to(dtype),
        "w": torch.randn(64, generator=generator).to(dtype),
    }


def wrong(fn: Callable[..., Any], message: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(fn, reference, inputs(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_same_in_other_words_passes(dtype: torch.dtype) -> None:
    assert_equivalent(lambda x, w: w * (2 * torch.sigmoid(2 * x.double()) - 1).to(x.dtype), reference, inputs(dtype))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_errors_beyond_rounding(dtype: torch.dtype, error: float) -> None:
    wrong(lambda x, w: reference(x, w) * (1 + error), "out .*largest error", dtype)


def test_one_bad_row_cannot_hide() -> None:
    """Off by far less than the largest value's own rounding in half precision, but in a single row."""

    def one_row(x: Tensor, w: Tensor) -> Tensor:
        y = reference(x, w)
        return torch.cat((y[:1] * 1.02, y[1:]))

    wrong(one_row, "row error", torch.float16)


def test_shape_dtype_and_number_of_outputs() -> None:
    wrong(lambda x, w: reference(x, w)[None], "shape is .*1, 32, 64")
    wrong(lambda x, w: reference(x, w).double(), "dtype is torch.float64, expected torch.float32")
    wrong(lambda x, w: (reference(x, w), x), "2 outputs, the reference has 1")
    wrong(lambda x, w: reference(x, w)[:, :1], "shape is")  # would broadcast


def test_a_gradient_alone() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy / 2

    wrong(lambda x, w: Half.apply(reference(x, w)), "d x .*WRONG|d x .*largest")
    wrong(lambda x, w: reference(x, w.detach()), "d w .*largest error")
    wrong(lambda x, w: reference(x, w).detach(), "d x .*largest error")


def test_nan_and_infinities_must_agree() -> None:
    def poked(value: float) -> Callable[..., Tensor]:
        return lambda x, w: torch.cat((torch.full_like(x[:1], value), reference(x, w)[1:]))

    wrong(poked(math.nan), "non-finite values differ")
    wrong(poked(math.inf), "non-finite values differ")
    data = {**inputs(), "x": torch.full((4, 64), math.nan)}
    assert_equivalent(reference, reference, data)
    with pytest.raises(AssertionError, match="non-finite values differ"):
        assert_equivalent(lambda x, w: reference(x, w).nan_to_num(), reference, data)


def test_memory_that_is_never_written_shows() -> None:
    def forgets_a_row(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[1:] = torch.tanh(x[1:]) * w
        return out

    with pytest.raises(AssertionError, match="non-finite values differ"):
        assert_equivalent(forgets_a_row, reference, inputs(), grads=False)


def test_an_input_that_is_changed() -> None:
    def in_place(x: Tensor, w: Tensor) -> Tensor:
        y = reference(x, w)
        with torch.no_grad():
            w += 1
        return y

    with pytest.raises(AssertionError, match="the input was changed"):
        assert_equivalent(in_place, reference, inputs(), grads=False)


def test_integers_are_exact() -> None:
    rank = lambda x: x.argsort(dim=-1)  # noqa: E731
    x = inputs()["x"]
    assert_equivalent(rank, rank, (x,), grads=False)
    with pytest.raises(AssertionError, match="integers differ"):
        assert_equivalent(lambda x: rank(x).roll(1, 0), rank, (x,), grads=False)


def test_a_gradient_that_cancels_to_zero_is_judged_by_the_others() -> None:
    """softmax of one value: its gradient is exactly zero, and rounding noise of the size of others' passes."""
    one = lambda x, w: torch.softmax(x[:, :1], 1) * w  # noqa: E731
    assert_equivalent(lambda x, w: one(x, w) + 1e-7 * x[:, :1], one, inputs())
    with pytest.raises(AssertionError, match="d x"):
        assert_equivalent(lambda x, w: one(x, w) + 1e-3 * x[:, :1] - 1e-3 * x[:, :1].detach(), one, inputs())


def test_positional_inputs_and_named_gradients() -> None:
    x, w = inputs().values()
    assert_equivalent(reference, reference, (x, w))
    detached = lambda x, w: reference(x, w.detach())  # noqa: E731
    assert_equivalent(detached, reference, (x, w), grads=("0",))
    with pytest.raises(AssertionError, match="d 1"):
        assert_equivalent(detached, reference, (x, w))


def test_cases_by_name_and_what_cannot_run() -> None:
    assert compare("dynamic_tanh", "torch", "primes").ok
    with pytest.raises(ValueError, match="dynamic_tanh: no case named 'prime', choices: 'one'"):
        compare("dynamic_tanh", "torch", "prime")
    with pytest.raises(effkit.BackendUnavailable, match="cannot be judged on cpu here; choices: torch"):
        verify("dynamic_tanh", device="cpu", backends=("triton",))
    results = verify("dynamic_tanh", device="cpu", dtypes=(torch.float32,))
    assert len(results) > 10 and all(result.ok for result in results)
    assert all(row["error"] >= 0 for row in results[0].to_dict()["rows"])


def test_bitwise_tells_dtypes_and_bits_apart():
    x = {"x": torch.tensor([1.0, math.nan, 0.0])}
    assert all(row.ok for row in judge(lambda x: x.half(), lambda x: x.half(), x, (), bitwise=True))
    for wrong in (lambda x: x.bfloat16(), lambda x: (x * 1.001).half(), lambda x: -x.half().abs()):
        assert not all(row.ok for row in judge(wrong, lambda x: x.half(), x, (), bitwise=True))
    zeros = {"x": torch.zeros(3)}
    assert not all(row.ok for row in judge(lambda x: x.bfloat16(), lambda x: x.half(), zeros, (), bitwise=True))
