"""What every technique with a recurrent state promises: sequences may be cut anywhere, packed, and left unfinished.

Runs over all ops of the ledger that take initial_state; a new one needs no line here.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effkit.attention import _recurrent
from effkit.attention._recurrent import map_state
from effkit.ops import INTERPRET, Case, Op, load_ops
from effkit.testing import assert_equivalent, make_inputs

OPS = [op for op in load_ops().values() if "initial_state" in inspect.signature(op.function).parameters]
BACKENDS = ["triton"] if INTERPRET else ["reference", "torch"]
marks = [pytest.mark.interpreter] if INTERPRET else []
CHUNK = 16
every_op = pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
every_backend = pytest.mark.parametrize("backend", [pytest.param(name, marks=marks) for name in BACKENDS])


def has(op: Op, backend: str) -> None:
    if backend == "triton" and op.triton is None:
        pytest.skip(f"{op.name} has no kernel")


def inputs_of(op: Op, T: int, B: int = 2, **gain: float) -> dict[str, Tensor]:
    """Tensors with a time axis for a small call, fp32, drawn as in the ledger."""
    sizes = {axis: 2 for shape in op.signature.inputs for axis in shape.axes}
    sizes |= dict(B=B, R=B, T=T, K=16, V=16, L=9)
    case = Case(f"T={T}, B={B}", sizes, gain=gain)
    return {name: x for name, x in make_inputs(op, case, torch.float32).items() if name not in ("cu_seqlens", "decay")}


def run(op: Op, backend: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    return op.function(**inputs, chunk_size=CHUNK, backend=backend, **options)


def part(inputs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, :, begin:end] for name, x in inputs.items()}


def in_pieces(op: Op, backend: str, *cuts: int) -> Callable[..., Any]:
    """The op in pieces that end at the cuts, each continued from the state of the one before."""

    def call(**inputs: Tensor) -> Any:
        outs, state = [], None
        bounds = (0, *cuts, inputs["q"].shape[2])
        for begin, end in itertools.pairwise(bounds):
            o, state = run(op, backend, part(inputs, begin, end), initial_state=state, return_state=True)
            outs.append(o)
        return torch.cat(outs, 2), state

    return call


def at_once(op: Op) -> Callable[..., Any]:
    return lambda **inputs: run(op, "reference", inputs, return_state=True)


@every_op
@every_backend
@pytest.mark.parametrize("cuts", [(1,), (15,), (16,), (17,), (5, 6, 30), (33,), (0, 40)], ids=str)
def test_split_and_resume_equals_one_call(op: Op, backend: str, cuts: tuple[int, ...]) -> None:
    """Outputs, the final state and all gradients, which flow through the state."""
    has(op, backend)
    assert_equivalent(in_pieces(op, backend, *cuts), at_once(op), inputs_of(op, 40))


@every_op
@every_backend
@pytest.mark.parametrize("few", ["qk", "kv", "v"])
def test_grouped_heads_are_repeated_heads(op: Op, backend: str, few: str) -> None:
    """Head h of 4 reads head h // 2 of a tensor with 2."""
    has(op, backend)
    sizes = {axis: 4 for shape in op.signature.inputs for axis in shape.axes} | dict(B=1, R=1, T=20, K=16, V=16, L=9)
    sizes |= {f"H{name}": 2 for name in few}
    inputs = make_inputs(op, Case(f"few {few}", sizes), torch.float32)
    inputs = {name: x for name, x in inputs.items() if name not in ("cu_seqlens", "decay", "key_lengths")}

    def repeated(**inputs: Tensor) -> Any:
        full = {name: torch.stack((x, x), 2).flatten(1, 2) if name in few else x for name, x in inputs.items()}
        return run(op, "reference", full, return_state=True)

    assert_equivalent(lambda **inputs: run(op, backend, inputs, return_state=True), repeated, inputs)


@every_op
def test_spans_continue_each_other(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs are worked on in spans of chunks: here of one chunk each."""
    monkeypatch.setattr(_recurrent, "_SPAN_PAIRS", 1)
    assert_equivalent(lambda **inputs: run(op, "torch", inputs, return_state=True), at_once(op), inputs_of(op, 40))


@every_op
@every_backend
def test_token_by_token_equals_one_call(op: Op, backend: str) -> None:
    has(op, backend)
    assert_equivalent(in_pieces(op, backend, *range(1, 19)), at_once(op), inputs_of(op, 19), grads=False)


@every_op
@every_backend
def test_state_says_its_position_and_is_wide(op: Op, backend: str) -> None:
    has(op, backend)
    inputs = {name: x.bfloat16() for name, x in inputs_of(op, 21).items()}
    o, state = run(op, backend, inputs, return_state=True)
    assert o.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    assert state.position.tolist() == [21, 21] and state.position.dtype == torch.int64
    _, state = run(op, backend, part(inputs, 0, 3), initial_state=state, return_state=True)
    assert state.position.tolist() == [24, 24]


@every_op
@every_backend
def test_autocast_rounds_what_comes_in_alone(op: Op, backend: str) -> None:
    """As the dtype of q, k and v; sums within are as wide as without it."""
    has(op, backend)
    inputs = inputs_of(op, 21)
    rounded = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = run(op, backend, inputs, return_state=True)
    same, memory = run(op, backend, rounded, return_state=True)
    assert o.dtype == torch.bfloat16 and torch.equal(o, same)
    assert all(torch.equal(a, b) for a, b in zip(state, memory, strict=True) if a is not None)


@every_op
@every_backend
def test_packed_equals_separate(op: Op, backend: str) -> None:
    """Outputs, states and gradients, with states to continue from; an empty sequence keeps its own."""
    has(op, backend)
    lengths, bounds = (20, 0, 1, 17), torch.tensor([0, 20, 20, 21, 38])
    first = inputs_of(op, 7, B=4)
    packed = inputs_of(op, 38, B=1)

    def together(**inputs: Tensor) -> Any:
        _, state = run(op, backend, first, return_state=True)
        return run(op, backend, inputs, initial_state=state, return_state=True, cu_seqlens=bounds)

    def separately(**inputs: Tensor) -> Any:
        outs, states = [], []
        for n, length in enumerate(lengths):
            begin = int(bounds[n])
            own = {name: x[n : n + 1].to(inputs[name].dtype) for name, x in first.items()}
            _, state = run(op, "reference", own, return_state=True)
            o, state = run(op, "reference", part(inputs, begin, begin + length), initial_state=state, return_state=True)
            outs.append(o)
            states.append(state)
        return torch.cat(outs, 2), [torch.cat(xs) for xs in zip(*states, strict=True) if xs[0] is not None]

    assert_equivalent(together, separately, packed)


@every_op
@every_backend
def test_what_lies_behind_the_last_packed_token_changes_nothing(op: Op, backend: str) -> None:
    has(op, backend)
    inputs, bounds = inputs_of(op, 30, B=1), torch.tensor([0, 9, 24])
    results = []
    for filler in (0.0, torch.nan):
        leaves = {name: x.clone() for name, x in inputs.items()}
        for x in leaves.values():
            x[:, :, 24:] = filler
            x.requires_grad_()
        o, state = run(op, backend, leaves, cu_seqlens=bounds, return_state=True)
        (o.square().sum() + state.memory.sum()).backward()
        results.append([o, *state[:2], *(x.grad for x in leaves.values())])
    for zero, nan in zip(*results, strict=True):
        assert torch.equal(zero, nan)
    assert not results[0][0][:, :, 24:].any()


@every_op
@every_backend
def test_batch_rows_do_not_meet(op: Op, backend: str) -> None:
    """NaN in one row stays there."""
    has(op, backend)
    inputs = inputs_of(op, 20)
    clean = run(op, backend, inputs)
    spoiled = run(op, backend, {name: torch.cat((x[:1], x[1:] * torch.nan)) for name, x in inputs.items()})
    assert torch.equal(clean[:1], spoiled[:1])


@every_op
def test_state_survives_selection_of_rows(op: Op) -> None:
    """As in beam search: rows of a state may be repeated and reordered."""
    inputs = inputs_of(op, 20)
    _, state = run(op, "torch", part(inputs, 0, 13), return_state=True)
    order = torch.tensor([1, 1, 0])
    chosen = {name: x[order] for name, x in inputs.items()}
    o = run(op, "torch", part(chosen, 13, 20), initial_state=map_state(lambda x: x[order], state))
    assert torch.equal(o, run(op, "torch", part(inputs, 13, 20), initial_state=state)[order])


if not INTERPRET:

    @every_op
    def test_packed_sequences_compile_without_graph_breaks(op: Op) -> None:
        inputs, bounds = inputs_of(op, 30, B=1), torch.tensor([0, 9, 9, 24])
        torch._dynamo.reset()

        def call(**inputs: Tensor) -> Any:
            return run(op, "torch", inputs, cu_seqlens=bounds)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
        assert_equivalent(compiled, lambda **x: run(op, "reference", x, cu_seqlens=bounds), inputs)

    @every_op
    def test_decoding_compiles_without_graph_breaks(op: Op) -> None:
        """One graph serves every step: the position is a tensor."""
        torch._dynamo.reset()
        step = torch.compile(
            lambda x, state: run(op, "torch", x, initial_state=state, return_state=True),
            fullgraph=True,
            backend="aot_eager",
            dynamic=False,
        )

        def decode(**inputs: Tensor) -> Tensor:
            outs, state = [], run(op, "torch", part(inputs, 0, 13), return_state=True)[1]
            for t in range(13, 24):
                with torch.compiler.set_stance("default" if t == 13 else "fail_on_recompile"):
                    o, state = step(part(inputs, t, t + 1), state)
                outs.append(o)
            return torch.cat(outs, 2)

        whole = lambda **inputs: run(op, "reference", inputs)[:, :, 13:]  # noqa: E731
        assert_equivalent(decode, whole, inputs_of(op, 24), grads=False)

    @every_op
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(chunk_size=48), ValueError, "chunk_size is 48, expected a power of two"),
            (dict(scale=float("nan")), ValueError, "scale is nan"),
            (dict(backend="cuda"), ValueError, "backend is 'cuda', choices"),
            (dict(cu_seqlens=torch.tensor([0, 5])), ValueError, "packed sequences need B=1"),
            (dict(k=torch.zeros(2, 2, 20, 8)), ValueError, "k has shape"),
            (dict(v=torch.zeros(2, 2, 20, 16).half()), TypeError, "expected one dtype"),
            (dict(q=torch.zeros(2, 3, 20, 16)), ValueError, "heads"),
            (dict(q=None), TypeError, "q is None"),
        ],
        ids=str,
    )
    def test_wrong_input_is_named(op: Op, change: dict[str, Any], error: type[Exception], message: str) -> None:
        inputs = inputs_of(op, 20)
        with pytest.raises(error, match=message):
            op.function(**{**inputs, **change})
