"""Fewer bits for weights, activations and optimizer moments."""

__all__: list[str] = []
