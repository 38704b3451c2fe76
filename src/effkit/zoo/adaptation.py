"""Adapting the zoo model to a kind of text that it has never read: syntax trees of the standard library's modules.

    model = zoo.load_model()
    effkit.apply(model, LoRAConfig(rank=8, target_modules="all-linear"))
    batches = zoo.training_batches(80, rows=4, context=256, kind="tree")
    print(zoo.adapt(model, batches, zoo.heldout_batches(8, kind="tree"), lr=1e-2))

Training reads trees of the training modules, held-out bits per byte are those of trees of the held-out modules.
`benchmarks/adapt.py` does this with every kind of adapter; docs/adapter_training.md shows what came of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effkit.peft.engine import adapted_layers
from effkit.peft.lora_plus import lora_plus_optimizer
from effkit.peft.merging import merge, unmerge
from effkit.zoo.measure import bits_per_byte, heal, saved_bytes


@dataclass(frozen=True)
class Adaptation:
    """What came of a training.

    trainable     numbers that were trained
    saved_bytes   kept for the backward pass of the first batch, see `zoo.saved_bytes`
    curve         {steps: held-out bits per byte after so many}, from 0 to the last
    merge_error   the largest difference of a logit, on the first held-out batch, once the adapters are merged into the
                  weights; None for a model without adapters. largest_logit is what it is to be compared with
    seconds       of training, measuring left out
    """

    trainable: int
    saved_bytes: int
    curve: dict[int, float]
    merge_error: float | None
    largest_logit: float
    seconds: float

    def steps_to(self, bits: float) -> int | None:
        """The steps after which held-out bits per byte were first measured as at most this; None if never."""
        return next((step for step, measured in self.curve.items() if measured <= bits), None)


def adapt(
    model: nn.Module,
    batches: Sequence[Tensor],
    heldout: Sequence[Tensor],
    *,
    lr: float,
    ratio: float = 1.0,
    every: int = 10,
) -> Adaptation:
    """Trains what is trainable in the model, in place, and measures it.

    batches    int64 [rows, length + 1] each: one step of AdamW each, with the schedule of `zoo.heal`
    heldout    what bits per byte are measured on, before, after every `every` steps and at the end
    lr, ratio  of `effkit.peft.lora_plus_param_groups`; a ratio of 1 is one learning rate for all

    Adapters are merged for a moment at the end, and taken apart again.
    """
    optimizer = lora_plus_optimizer(model, torch.optim.AdamW, lr, ratio, betas=(0.9, 0.95), weight_decay=0.0)
    model.eval()
    curve = {0: bits_per_byte(model, heldout)}
    kept, measuring = saved_bytes(model, batches[0]), 0.0

    def measure(step: int, _: float) -> None:
        nonlocal measuring
        if step % every == 0 or step == len(batches):
            start = time.perf_counter()
            curve[step] = bits_per_byte(model.eval(), heldout)
            model.train()
            measuring += time.perf_counter() - start

    start = time.perf_counter()
    heal(model, batches, optimizer=optimizer, on_step=measure)
    seconds = time.perf_counter() - start - measuring
    trainable = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return Adaptation(trainable, kept, curve, *_merged(model, heldout[0]), seconds)


@torch.no_grad()
def _merged(model: nn.Module, batch: Tensor) -> tuple[float | None, float]:
    """The largest difference that merging makes to a logit, and the largest logit."""

    def logits() -> Tensor:
        return model(input_ids=batch[:, :-1].to(next(model.parameters()).device), use_cache=False).logits

    apart = logits()
    if not adapted_layers(model):
        return None, float(apart.abs().max())
    merge(model)
    together = logits()
    unmerge(model)
    return float((together - apart).abs().max()), float(apart.abs().max())
