"""Shape lines: "x [*N, C], weight [C]?, alpha [] -> y [*N, C]".

One string per op says what goes in and what comes out. It is printed in the docs, drives the inputs of the tests and
checks what users pass. A name is an axis, `*N` any number of axes, a number a fixed size, `?` an optional tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_TENSOR = re.compile(r"\s*(\w+)\s*\[([^\]]*)\](\??)\s*")


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a shape line."""

    name: str
    axes: tuple[str, ...]
    optional: bool

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(self.axes)}]{'?' if self.optional else ''}"


@dataclass(frozen=True)
class Signature:
    """A parsed shape line: what goes in, what comes out."""

    line: str
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]

    def check(self, op: str, tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
        """The size of each named axis; raises ValueError naming tensor, shape, expectation and where that came from.

        Axes spelled `*N` may differ in number but must be equal wherever they appear.
        """
        sizes: dict[str, int] = {}
        stars: dict[str, tuple[int, ...]] = {}
        source: dict[str, str] = {}
        for shape in self.inputs:
            tensor = tensors.get(shape.name)
            if tensor is None:
                if not shape.optional:
                    raise TypeError(f"{op}: {shape.name} is None, expected a tensor {_bracket(shape.axes)}")
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{op}: {shape.name} is {type(tensor).__name__}, expected a tensor {_bracket(shape.axes)}"
                )
            actual, axes = tuple(tensor.shape), shape.axes
            star = axes and axes[0].startswith("*")
            named = axes[1:] if star else axes
            if len(actual) < len(named) or (not star and len(actual) != len(named)):
                raise ValueError(
                    f"{op}: {shape.name} has shape {list(actual)}, expected {_bracket(axes)} ({self.line})"
                )
            lead = len(actual) - len(named)
            if star and stars.setdefault(axes[0], actual[:lead]) != actual[:lead]:
                raise ValueError(
                    f"{op}: {shape.name} has shape {list(actual)}, expected {_bracket(axes)} with "
                    f"{axes[0]}={list(stars[axes[0]])} from {source[axes[0]]} ({self.line})"
                )
            if star:
                source.setdefault(axes[0], shape.name)
            for axis, size in zip(named, actual[lead:], strict=True):
                expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
                if size != expected:
                    origin = "" if axis.isdigit() else f" with {axis}={expected} from {source[axis]}"
                    raise ValueError(
                        f"{op}: {shape.name} has shape {list(actual)}, expected {_bracket(axes)}{origin} ({self.line})"
                    )
                source.setdefault(axis, shape.name)
        return sizes

    def shape_of(self, name: str, sizes: Mapping[str, int | tuple[int, ...]]) -> tuple[int, ...]:
        """The concrete shape of an input, e.g. sizes {"*N": (2, 3), "C": 5} make "x [*N, C]" (2, 3, 5)."""
        found = next(shape for shape in self.inputs if shape.name == name)
        result: tuple[int, ...] = ()
        for axis in found.axes:
            size = int(axis) if axis.isdigit() else sizes[axis]
            result += size if isinstance(size, tuple) else (size,)
        return result


def parse(line: str) -> Signature:
    """Parses a shape line; raises ValueError where it is malformed."""
    left, arrow, right = line.partition("->")
    if not arrow:
        raise ValueError(f"shape line {line!r} has no '->'")
    return Signature(line, _tensors(left, line), _tensors(right, line))


def _tensors(text: str, line: str) -> tuple[TensorShape, ...]:
    shapes = []
    for part in re.split(r",(?![^\[]*\])", text):
        match = _TENSOR.fullmatch(part)
        if match is None:
            raise ValueError(f"shape line {line!r}: cannot read {part.strip()!r}, expected name [axis, ...]")
        axes = tuple(axis.strip() for axis in match[2].split(",") if axis.strip())
        if any(axis.startswith("*") for axis in axes[1:]):
            raise ValueError(f"shape line {line!r}: in {match[1]!r} a star axis must come first")
        shapes.append(TensorShape(match[1], axes, match[3] == "?"))
    return tuple(shapes)


def _bracket(axes: tuple[str, ...]) -> str:
    return f"[{', '.join(axes)}]"
