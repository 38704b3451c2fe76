"""What quantising a model has cost and saved: bytes, bits per parameter, and the signal over the noise of each weight.

SQNR = 20 log10(|w| / |w - dequantised|) in dB        6 dB halve the error
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightReport:
    """One quantised weight: name, format, dense shape, bytes with all scales; sqnr_db where the original was seen."""

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    sqnr_db: float | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class QuantizationReport:
    """All quantised weights of a model, and how much is left beside them. print() shows a table."""

    weights: tuple[WeightReport, ...]
    dense_parameters: int
    dense_bytes: int

    @property
    def parameters(self) -> int:
        """Parameters that the model stands for, those of quantised weights counted one by one."""
        return self.dense_parameters + sum(weight.parameters for weight in self.weights)

    @property
    def bytes(self) -> int:
        return self.dense_bytes + sum(weight.bytes for weight in self.weights)

    @property
    def bits_per_parameter(self) -> float:
        """Of the quantised weights alone."""
        parameters = sum(weight.parameters for weight in self.weights)
        return 8 * sum(weight.bytes for weight in self.weights) / parameters if parameters else math.nan

    def __str__(self) -> str:
        width = max([len("weight"), *(len(weight.name) for weight in self.weights)])
        lines = [f"{'weight':{width}}  format    {'shape':>18}  {'bytes':>13}  {'bits':>6}  SQNR dB"]
        for weight in self.weights:
            shape = " x ".join(map(str, weight.shape))
            sqnr = "-" if weight.sqnr_db is None else f"{weight.sqnr_db:.2f}"
            lines.append(
                f"{weight.name:{width}}  {weight.format:8}  {shape:>18}  {weight.bytes:13,}  "
                f"{weight.bits_per_parameter:6.3f}  {sqnr:>7}"
            )
        lines.append(
            f"{len(self.weights)} quantised weights at {self.bits_per_parameter:.3f} bits, {self.dense_parameters:,} "
            f"other parameters in {self.dense_bytes:,} bytes; {self.parameters:,} parameters in {self.bytes:,} bytes"
        )
        return "\n".join(lines)


@torch.no_grad()
def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """20 log10(|exact| / |exact - approximate|) in dB; infinite where they are equal, zeros included."""
    noise = torch.linalg.vector_norm(exact.float() - approximate.float())
    if noise == 0:
        return math.inf
    return float(20 * torch.log10(torch.linalg.vector_norm(exact.float()) / noise))
