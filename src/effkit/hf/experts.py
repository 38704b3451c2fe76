"""Mixture-of-experts layers with quantised weights: all experts in one tensor, dequantised one by one where needed.

transformers holds the experts of a layer as two parameters, gate_up_proj [E, 2 I, C] and down_proj [E, C, I], and each
token passes through the k experts that its router has chosen:

    y = sum over k of w_k  down_k(act(gate_k x) * up_k x)

Here each of the two is E quantised linear layers, whose parameters are stacked along a first axis. A token costs the
dequantisation of its experts alone, and the gradient for x dequantises them again instead of keeping them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("gate_up_proj", "down_proj")


def why_not(module: Any) -> str | None:
    """Why the experts of a module cannot be stacked linear layers with a gate, or None."""
    own = {name for name, _ in module.named_parameters()}
    if own != set(PROJECTIONS):
        return f"its experts have more parameters, {sorted(own - set(PROJECTIONS))}"
    (_, two, inputs), (_, outputs, inner) = (getattr(module, name).shape for name in PROJECTIONS)
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return "its experts are not two projections with a gate"
    if module.is_transposed or not module.is_concatenated or (inputs, two) != (outputs, 2 * inner):
        return "its experts are stored transposed or interleaved"
    return None


class QuantizedExperts(nn.Module):
    """y = sum over the chosen experts of weight * down(act(gate x) * up x), as the module it stands for computes it.

    Parameters are those of the quantised linear layer with `weight` replaced by gate_up_proj or down_proj, for example
    gate_up_proj uint8 [E, 2 I, C / 2] and gate_up_proj_absmax float32 [E, 2 I, C / 64], without gradients.
    """

    def __init__(self, dense: Any, make: Callable[[str, int], nn.Module]) -> None:
        """dense is the module to replace; make(projection, expert) gives the quantised layer of one of its experts."""
        super().__init__()
        self.num_experts = dense.gate_up_proj.shape[0]
        self._layers: dict[str, Any] = {}  # how to read a slice; in a dict, so that they are no submodules
        for projection in PROJECTIONS:
            layers = [make(projection, expert) for expert in range(self.num_experts)]
            for name, _ in layers[0].named_parameters():
                stacked = torch.stack([layer.get_parameter(name).detach() for layer in layers])
                self.register_parameter(_renamed(name, projection), nn.Parameter(stacked, requires_grad=False))
            self._layers[projection] = layers[0].to("meta")
        self._dense = (_emptied(dense),)  # what the experts were; in a tuple for the same reason
        self.train(dense.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [N, C], the experts of each token top_k_index [N, k] and their weights [N, k] -> [N, C]."""
        y = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # how transformers marks those that live on another device
                continue
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            inner = self._dense[0]._apply_gate(self._layer("gate_up_proj", expert)(hidden_states[token]))
            outer = self._layer("down_proj", expert)(inner) * top_k_weights[token, place, None]
            y.index_add_(0, token, outer.to(y.dtype))
        return y

    def dequantize(self) -> nn.Module:
        """The module that this one stands for, with the values that it computes with."""
        dense = _emptied(self._dense[0])
        for projection in PROJECTIONS:
            experts: list[Any] = [self._layer(projection, expert) for expert in range(self.num_experts)]
            weights = torch.stack([layer.dequantize().weight.detach() for layer in experts])
            setattr(dense, projection, nn.Parameter(weights))
        return dense.train(self.training)

    def quantized_experts(self) -> list[tuple[str, nn.Module, list[Tensor]]]:
        """Each of the two projections: its name, the layer of an expert, and the parameters of all."""
        return [
            (name, layer, [p for key, p in self.named_parameters() if key.startswith(name)])
            for name, layer in self._layers.items()
        ]

    def _layer(self, projection: str, expert: int) -> nn.Module:
        """The quantised layer of one expert, whose parameters are slices of this module's."""
        layer = copy.copy(self._layers[projection])
        names = list(layer._parameters)
        layer._parameters = {
            name: None if layer._parameters[name] is None else getattr(self, _renamed(name, projection))[expert]
            for name in names
        }
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        """Moves the parameters and casts none: codes are no numbers, and scales are float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        device = next(self.parameters()).device
        for layer in self._layers.values():
            layer.dtype = fn(torch.empty(0, dtype=layer.dtype, device=device)).dtype
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As every module, but refuses what would have to be cast: numbers as codes, scales in half precision."""
        for name, parameter in self.named_parameters():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != parameter.dtype:
                args[-1].append(f"{prefix}{name} has dtype {given.dtype}, expected {parameter.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, " + ", ".join(f"{k}=({v})" for k, v in self._layers.items())


def _renamed(name: str, projection: str) -> str:
    return projection + name.removeprefix("weight")


def _emptied(module: Any) -> Any:
    """The module without its parameters."""
    shell = copy.copy(module)
    shell._parameters = {}
    return shell
