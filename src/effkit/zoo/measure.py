"""What the demo and the quality tests measure on the zoo model: bits per byte, bytes of cache; and a short healing.

Bits per byte is the mean next-byte cross entropy in bits over fixed windows of the held-out modules, each of CONTEXT
predictions from an empty context. Comparisons are paired: every model sees the same windows of the same interpreter's
library. Between interpreters the text differs, and with it the number.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.change import Change, PutBack
from effkit.zoo.train import CONTEXT, batch_of, corpus

_TREES = 4_000_000  # bytes of syntax trees to train on: parsing all modules would take seconds


def heldout_batches(windows: int = 48, rows: int = 8, kind: str = "source") -> list[Tensor]:
    """Evenly spaced windows of the held-out modules that do not overlap: int64 [rows, CONTEXT + 1] each.

    The first CONTEXT tokens of a row are the input, the last CONTEXT what is to be predicted. kind is "source", or
    "tree" for the syntax trees of the modules.
    """
    ids = corpus("heldout", kind)
    most = (len(ids) - 1) // CONTEXT
    if not 1 <= windows <= most:
        raise ValueError(f"windows is {windows!r}, expected 1 to {most}: the held-out modules hold no more")
    if rows < 1:
        raise ValueError(f"rows is {rows!r}, expected at least 1 window per batch")
    # Integer arithmetic: neighbours are at least CONTEXT apart for every choice of windows.
    starts = torch.arange(windows) * (len(ids) - CONTEXT - 1) // max(windows - 1, 1)
    return list(ids[starts[:, None] + torch.arange(CONTEXT + 1)].split(rows))


def training_batches(
    steps: int, rows: int = 8, context: int = CONTEXT, seed: int = 0, kind: str = "source"
) -> list[Tensor]:
    """`steps` batches of random windows of the training modules, never of held-out ones: int64 [rows, context + 1].

    kind is "source", or "tree" for the syntax trees of a choice of the modules, always the same, of some megabytes.
    """
    for name, value in {"steps": steps, "rows": rows, "context": context}.items():
        if value < 1:
            raise ValueError(f"{name} is {value!r}, expected at least 1")
    ids, generator = corpus("train", kind, None if kind == "source" else _TREES), torch.Generator().manual_seed(seed)
    return [batch_of(ids, rows, context, generator) for _ in range(steps)]


@torch.no_grad()
def bits_per_byte(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Mean next-byte cross entropy in bits over the batches, int64 [rows, length + 1], in the model's own dtype."""
    nats, count = 0.0, 0
    for batch in batches:
        nats += float(_cross_entropy(model, batch, reduction="sum"))
        count += batch[:, 1:].numel()
    if not count:
        raise ValueError("batches is empty: there is nothing to measure")
    return nats / count / math.log(2)


def heal(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the changed model in place, one AdamW step per batch, and returns the bits per byte of every step.

    The learning rate climbs to `lr` over the first tenth of the steps and falls linearly to zero over the rest. An
    `optimizer` steps in the place of AdamW on all that is trainable, each of its groups up to its own learning rate.
    on_step(step, bits) is called after every step, from 1. The model must hold float32 weights.
    """

    def report(step: int, nats: float) -> None:
        if on_step is not None:
            on_step(step, nats / math.log(2))

    was_training = model.training
    model.train()
    if optimizer is None:
        optimizer = _adamw(model.parameters(), lr)
    nats = _train(optimizer, functools.partial(_cross_entropy, model), batches, report)
    model.train(was_training)
    return [each / math.log(2) for each in nats]


def distill(
    change: Change,
    batches: Sequence[Tensor],
    *,
    lr: float = 5e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the modules that a change has put into the model to give what those before them gave, and nothing else.

    Copies of the original modules stand in the model while it reads a batch, as `heal` does; each new module then
    learns, from the input of the original it stands for, its output. So no error of one layer reaches the next, and no
    gradient passes through the rest of the model. What is minimised, and returned for every step, is the mean over the
    modules of |new - old|^2 / |old|^2. Schedule, on_step and dtype as in `heal`, which is the next step.
    """
    swap = change.edit.undo
    if not isinstance(swap, PutBack):
        raise TypeError(f"change is one of {type(change.config).__name__}, expected one that replaces whole modules")
    old = {name: copy.deepcopy(module).eval() for name, module in swap.originals.items()}
    new = nn.ModuleList(change.model.get_submodule(name) for name in old)

    def loss(batch: Tensor) -> Tensor:
        errors = [
            F.mse_loss(_first(module(*args, **kwargs)), target) / target.square().mean()
            for module, (args, kwargs, target) in zip(new, _calls(change.model, old, batch), strict=True)
        ]
        return torch.stack(errors).mean()

    return _train(_adamw(new.parameters(), lr), loss, batches, on_step)


@torch.no_grad()
def _calls(model: nn.Module, modules: dict[str, nn.Module], batch: Tensor) -> list[tuple[Any, Any, Tensor]]:
    """What the modules are called with, and what they give, while they stand in the model and it reads a batch."""
    calls: dict[nn.Module, tuple[Any, Any, Tensor]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = args, kwargs, _first(output)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules.values()]
    put_back = PutBack(model, {name: model.get_submodule(name) for name in modules})
    try:
        PutBack(model, modules)()
        model(input_ids=batch[:, :-1].to(_device(model)), use_cache=False)
    finally:
        put_back()
        for handle in handles:
            handle.remove()
    return [calls[module] for module in modules.values()]


def _adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What heals: AdamW on those parameters that are trainable, without weight decay."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def _train(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    on_step: Callable[[int, float], None] | None,
) -> list[float]:
    """One step of the optimizer per batch, with the schedule of `heal`; the losses."""
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    wrong = {p.dtype for p in trainable} - {torch.float32}
    if wrong:
        raise TypeError(f"model has trainable weights in {wrong.pop()}, expected float32: small steps would be lost")
    rates = [group["lr"] for group in optimizer.param_groups]
    warmup = max(1, len(batches) // 10)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min((step + 1) / warmup, 1 - step / len(batches))
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, losses[-1])
    optimizer.zero_grad()
    return losses


def _first(output: Any) -> Tensor:
    """The tensor of a module's output, the first where there are several."""
    return output[0] if isinstance(output, tuple) else output


def saved_bytes(model: nn.Module, batch: Tensor) -> int:
    """Bytes that one pass over a batch, int64 [rows, length + 1], keeps for its backward pass, the loss included.

    Each storage counts once and as a whole; the model's own parameters and buffers do not.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = _cross_entropy(model, batch)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    del loss  # until here, lest what it keeps makes room for something else at the same place
    return sum(size for place, size in kept.items() if place not in own)


@torch.no_grad()
def cache_bytes_per_token(model: nn.Module, ids: Tensor) -> float:
    """Bytes that the model's cache really holds after reading ids, int64 [rows, length], divided by their number."""
    cache: Any = model(input_ids=ids.to(_device(model)), use_cache=True).past_key_values
    tensors = {id(tensor): tensor for layer in cache.layers for tensor in _tensors(vars(layer))}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / ids.numel()


def _cross_entropy(model: nn.Module, batch: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross entropy in nats, from float32 logits or wider."""
    batch = batch.to(_device(model))
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples: a cache layer's keys and values, or another technique's state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
