"""The short causal convolution that recurrent layers put in front of their state: every channel by itself.

    y[t, c] = act(bias[c] + sum_{j < W} weight[c, 0, j] * x[t - W + 1 + j, c])        x = 0 before the first token

(Gu and Dao, arXiv 2312.00752, section 3.4; So et al., arXiv 2109.08668, on queries, keys and values.) It lets a layer
compare neighbours, which a decaying sum over the past is bad at. What it carries from token to token is its last W - 1
inputs.

Cost: 2 W operations an element, W reads of x and one write of y. The sum is W shifted products instead of a call of
conv1d: nothing is transposed, a single token costs its W products, and torch.compile makes one loop of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._blocks import wide_dtype
from effkit.attention._recurrent import check_packing
from effkit.shapes import parse


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, x [B, T, C] -> y [B, T, C].

    channels      C
    kernel_size   W, how many tokens an output sees, its own included
    activation    "silu" or None
    bias          whether there is an offset [C]

    weight [C, 1, W] and bias [C] are those of nn.Conv1d(C, C, W, groups=C), in its order and with its initial values.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        activation: str | None = "silu",
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("kernel_size", kernel_size)):
            if value < 1:
                raise ValueError(f"ShortConvolution: {name} is {value!r}, expected at least 1")
        if activation not in ("silu", None):
            raise ValueError(f"ShortConvolution: activation is {activation!r}, choices: 'silu', None")
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.kernel_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, C] in x's dtype and the state after the last token, [B, W - 1, C]: the last W - 1 inputs.

        state: that of an earlier call, which x continues; None for zeros. cu_seqlens [N], int32 or int64, packs
        sequences along T of a single row, each with a state of its own (N - 1 rows); rows past the last give zeros.
        Sums are in float32 (float64 for float64).
        """
        sequences = self._check(x, state, cu_seqlens)
        before = x.new_zeros(sequences, self.kernel_size - 1, x.shape[2]) if state is None else state.to(x.dtype)
        if cu_seqlens is not None:
            return self._packed(x, before, cu_seqlens.long())
        past = torch.cat((before, x), dim=1)
        return self._convolve(past).to(x.dtype), past[:, x.shape[1] :]

    def _packed(self, x: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """All sequences in one row, each behind its own state: no window reaches the sequence before."""
        sequences, width = before.shape[:2]
        token = torch.arange(x.shape[1], device=x.device)
        sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp_max(sequences - 1)
        place = token + (sequence + 1) * width  # of each token in the row
        exists = (token < cu_seqlens[-1])[:, None]
        states = (torch.arange(sequences, device=x.device) * width)[:, None] + torch.arange(width, device=x.device)
        row = x.new_zeros(x.shape[1] + sequences * width, x.shape[2])
        row = row.index_copy(0, place, torch.where(exists, x[0], 0.0))
        row = row.index_copy(0, (states + cu_seqlens[:-1, None]).flatten(), before.flatten(0, 1))
        y = self._convolve(row[None])[0, place - width]
        return torch.where(exists, y, 0.0).to(x.dtype)[None], row[states + cu_seqlens[1:, None]]

    def _convolve(self, x: Tensor) -> Tensor:
        """Windows of x [B, W - 1 + T, C]: y [B, T, C], wide."""
        T = x.shape[1] - self.kernel_size + 1
        x, weight = x.to(wide_dtype(x.dtype)), self.weight.to(wide_dtype(x.dtype))
        y = x[:, :T] * weight[:, 0, 0]
        for j in range(1, self.kernel_size):
            y = torch.addcmul(y, x[:, j : j + T], weight[:, 0, j])
        if self.bias is not None:
            y = y + self.bias
        return y if self.activation is None else F.silu(y)

    def _check(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> int:
        """Whether everything fits together; returns the number of sequences."""
        name = "ShortConvolution"
        sizes = _SHAPES.check(name, dict(x=x, state=state, weight=self.weight, cu_seqlens=cu_seqlens))
        sequences = x.shape[0]
        if cu_seqlens is not None:
            readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
            check_packing(name, cu_seqlens, x.shape[0], x.shape[1], readable)
            sequences = len(cu_seqlens) - 1
        if state is not None and tuple(state.shape[:2]) != (sequences, self.kernel_size - 1):
            raise ValueError(
                f"{name}: state has shape {list(state.shape)}, expected [{sequences}, {self.kernel_size - 1}, "
                f"{sizes['C']}]: the last {self.kernel_size - 1} inputs of each row or packed sequence"
            )
        return sequences

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation!r}, "
            f"bias={self.bias is not None}"
        )


_SHAPES = parse("x [B, T, C], state [R, P, C]?, weight [C, 1, W], cu_seqlens [N]? -> y [B, T, C], state [R, P, C]")
