"""Grouped LoRA: each row of a batch has an adapter of its own, in training as well as in inference.

    y[i] = base[i] + scale[e] (x[i] a[e]^T) b[e]^T        e = rows[i], nothing is added where it is -1

LoRA (Hu et al., arXiv 2106.09685) keeps one base model for many tasks; serving, and training, them together is a batch
whose rows differ in their adapter. Punica (Chen et al., arXiv 2310.18547) multiplies segments of rows that share one;
here such products have their gradients, too: of base, x and the factors of every adapter.

Cost: 2 B T R (K + M) operations forward and twice that backward, as for one adapter; x and base are read, y is written,
and adapters that no row has are not touched. Kept for the backward pass are x, S = x a^T [B, T, R] and the parameters.

When not to use it: for a single adapter, which `lora_linear` computes together with the layer. Ranks that differ are
padded with zeros to the largest, which costs as much as if all had it. A row's result may differ in its last bits from
that of the same row in another batch, as in any product of matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention._recurrent import may_read
from effkit.ops import Case, Op, register
from effkit.peft._arguments import FLOATS, INTEGERS
from effkit.peft.adapter import Adapter
from effkit.peft.engine import adapted_layers, adapters_of, refuse_merged
from effkit.quant.nf4_linear import as_autocast


def grouped_lora_reference(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The equation, row by row."""
    each = []
    for i, e in enumerate(rows.tolist()):
        down, up = a[e].to(x.dtype), b[e].to(x.dtype)
        each.append(base[i] if e < 0 else base[i] + scale[e] * ((x[i] @ down.T) @ up.T))
    return torch.stack(each) if each else base.clone()


def grouped_lora_torch(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Where the rows can be read, a product for each run of rows that share an adapter; else each row gets a copy."""
    if may_read(rows):
        return _GroupedLoRA.apply(base, x, rows, a, b, scale)[0]
    return _gathered(base, x, rows, a, b, scale)


def grouped_lora(
    base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, backend: str | None = None
) -> Tensor:
    """LoRA with an adapter for each row of the batch.

        y[i] = base[i] + scale[e] (x[i] a[e]^T) b[e]^T,    e = rows[i]        arXiv 2106.09685, 2310.18547

    base [B, T, M]    what the layer itself computes, any float dtype
    x [B, T, K]       its input: float16, bfloat16, float32 or float64, any strides
    rows [B]          int32 or int64: each row's adapter, -1 for none
    a [E, R, K]       the first factors (lora_A); any float dtype, rounded to that of x. Lower ranks end with zeros
    b [E, M, R]       the second ones (lora_B)
    scale [E]         what the products are multiplied with, e.g. alpha / r; any float dtype
    backend           "reference", "torch", "triton" or None for the fastest that can

    Returns y [B, T, M] in x's dtype, or that of torch.autocast; rows without an adapter are those of base, bit for bit.
    base, x, a and b have gradients, each in its own dtype; an adapter that no row has gets zeros. What is NaN in one
    row stays with that row and its adapter. scale has no gradient. Second derivatives: backend="reference".

    Raises ValueError or TypeError for arguments that do not fit, BackendUnavailable for a backend that cannot run. Rows
    out of range raise on a CPU. On CUDA they are not read by the host: triton then makes such rows NaN, and torch fails
    with a device-side assertion.
    """
    tensors = dict(base=base, x=x, rows=rows, a=a, b=b, scale=scale)
    sizes = GROUPED_LORA.check(**tensors)
    for name, tensor in tensors.items():
        choices = INTEGERS if name == "rows" else FLOATS
        if tensor.dtype not in choices:
            raise TypeError(f"grouped_lora: {name} has dtype {tensor.dtype}, choices: {', '.join(map(str, choices))}")
        if tensor.device != x.device:
            raise ValueError(f"grouped_lora: {name} is on {tensor.device}, expected {x.device} as x")
    if scale.requires_grad:
        raise ValueError("grouped_lora: scale asks for a gradient, which it does not get: pass scale.detach()")
    if not sizes["E"]:
        raise ValueError("grouped_lora: a holds no adapters (E=0), expected at least one")
    places = rows.tolist() if may_read(rows) else [-1]
    if not -1 <= min(places, default=-1) <= max(places, default=-1) < sizes["E"]:
        raise ValueError(f"grouped_lora: rows is {places}, expected -1 to {sizes['E'] - 1}, with E={sizes['E']}")
    x = as_autocast(x)
    return GROUPED_LORA.run(backend, base=base.to(x.dtype), x=x, rows=rows, a=a, b=b, scale=scale)


@contextmanager
def adapter_rows(
    model: nn.Module, rows: Sequence[str | None] | Tensor, names: Sequence[str] = ()
) -> Iterator[nn.Module]:
    """Within the block each row of the batch has an adapter of its own, in training and generation too.

    rows    the name of each row's adapter, None for the model without any; or int32 or int64 [B], with names: each
            row's place in names, -1 for none
    names   with a tensor of rows: the adapters that it counts

    All layers must get the batch along their first axis. Adapters may differ in rank and in which layers they have.
    They need factors: LoRA, VeRA and SingLoRA in linear layers have them, DoRA, (IA)^3, embeddings, trained biases and
    copies of modules have not. Within the block the adapters of the rows are on, afterwards those that were before: do
    not `activate` others meanwhile. With activation checkpointing the backward pass belongs into the block, too, and
    with SingLoRA, whose ramp counts the steps of adapters that are on, the optimizer's step.

    Raises ValueError or TypeError for rows, names and adapters that do not fit. While it lasts, a layer raises
    ValueError for another number of rows, and where an adapter in training mode has dropout.
    """
    refuse_merged(model, "adapter_rows")
    rows, names = _as_tensor(rows, names)
    parts = [adapter for name in names for adapter in adapters_of(model, name).values()]
    layers = adapted_layers(model)
    for path, layer in layers.items():
        for name in names:
            if name in layer.adapters:
                _check_adapter(path, name, layer.adapters[name])
    now = [(layer, _Rows(layer, rows, names)) for layer in layers.values()]
    before = [(layer, layer.rows) for layer in layers.values()]
    switches = [(adapter, adapter.on) for adapter in parts]
    try:
        for adapter in parts:
            adapter.switch(True)
        for layer, own in now:
            layer.rows = own
        yield model
    finally:
        for layer, own in before:
            layer.rows = own
        for adapter, on in switches:
            adapter.switch(on)


class _Rows:
    """The forward of a layer whose rows differ in their adapters.

    rows has the place of each row's adapter in names, -1 where it has none or the layer lacks it; kept are the factors
    of all in one tensor each, as long as they do not change.
    """

    def __init__(self, layer: Any, rows: Tensor, names: Sequence[str]) -> None:
        self.names = [name for name in names if name in layer.adapters]
        places = [self.names.index(name) if name in self.names else -1 for name in (*names, None)]
        device = layer.adapters[self.names[0]].gate.device if self.names else rows.device
        self.rows = torch.tensor(places)[rows.long()].to(device)
        self.kept: dict[str, Any] = {}

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        y = layer.base(*args, **kwargs)
        if not self.names:
            return y
        (x,), rows, adapters = args, self.rows, [layer.adapters[name] for name in self.names]
        _check_pass(adapters, x, len(rows))
        tokens = math.prod(x.shape[1:-1])
        base, x = (t.reshape(len(rows), tokens, t.shape[-1]) for t in (y, x))
        a, b, scale = _stacked(adapters, as_autocast(x).dtype, self.kept)
        return grouped_lora(base, x, rows, a, b, scale).view(y.shape)


def _stacked(adapters: list[Adapter], dtype: torch.dtype, kept: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [E, R, K] and [E, M, R], lower ranks padded with zeros, and scales; made once if nothing is trained."""
    once = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    source = [x for adapter in adapters for x in (*adapter.buffers(), *adapter.parameters())] if once else []
    stamp: list[Any] = [dtype, *(adapter.training for adapter in adapters)]
    stamp += [(id(x), x.data_ptr(), None if x.is_inference() else x._version) for x in source]
    if once and kept.get("stamp") == stamp:
        return kept["stacked"]
    factors = [adapter.factors() for adapter in adapters]
    rank = max(len(a) for a, _, _ in factors)
    a = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a, _, _ in factors])
    b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b, _ in factors])
    scale = torch.stack([scale for _, _, scale in factors])
    if once:
        a, b = a.to(dtype), b.to(dtype)
        kept |= {"stamp": stamp, "source": source, "stacked": (a, b, scale)}  # while held, an id is nobody else's
    return a, b, scale


def _as_tensor(rows: Sequence[str | None] | Tensor, names: Sequence[str]) -> tuple[Tensor, Sequence[str]]:
    """Rows as places in names."""
    if not isinstance(rows, Tensor):
        if names:
            raise ValueError(f"adapter_rows: names is {list(names)}, expected none where rows are names themselves")
        names = list(dict.fromkeys(name for name in rows if name is not None))
        return torch.tensor([-1 if name is None else names.index(name) for name in rows], dtype=torch.int64), names
    if rows.dtype not in INTEGERS or rows.ndim != 1:
        raise TypeError(f"adapter_rows: rows is {rows.dtype} {list(rows.shape)}, expected names, or int32 or int64 [B]")
    if len(rows) and not -1 <= int(rows.min()) <= int(rows.max()) < len(names):
        raise ValueError(f"adapter_rows: rows is {rows.tolist()}, expected -1 to {len(names) - 1}, places in {names}")
    return rows.cpu(), names


def _check_adapter(path: str, name: str, adapter: Adapter) -> None:
    if adapter.bias is not None or getattr(adapter, "lora_bias", None) is not None:
        raise TypeError(f"adapter_rows: adapter {name!r} has a bias in {path}, where rows can have factors only")
    try:
        adapter.factors()
    except TypeError as error:
        raise TypeError(f"adapter_rows: adapter {name!r} in {path}: {error}") from None


def _check_pass(adapters: list[Adapter], x: Tensor, B: int) -> None:
    """What may change from one forward pass to the next."""
    if x.shape[0] != B:
        raise ValueError(f"adapter_rows: a layer got x {list(x.shape)}, expected a first axis of {B} rows")
    for adapter in adapters:
        dropout: Any = getattr(adapter, "dropout", 0.0)
        if adapter.training and dropout:
            raise ValueError(
                f"adapter_rows: adapter {adapter.config.name!r} has dropout {dropout:g}, which rows of several "
                "adapters do not have; choices: model.eval(), or an adapter without dropout"
            )


def _gathered(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Batched products with a copy of its factors for each row: no value is read, and a compiler sees all of it."""
    none = (rows < 0)[:, None, None]
    own = rows.clamp_min(0)
    wide = torch.promote_types(x.dtype, torch.float32)  # gradients of rows that share an adapter are summed in it
    down, up = (factor.to(wide)[own].to(x.dtype) for factor in (a, b))
    s = torch.where(none, 0, x) @ down.mT  # a row that has none adds nothing to gradients either, whatever it holds
    return torch.where(none, base, base + ((s @ up.mT).to(wide) * scale[own, None, None]).to(x.dtype))


class _GroupedLoRA(torch.autograd.Function):
    """Returns y, and S of the tokens in the order of `_Segments`."""

    @staticmethod
    def forward(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        segments, scales = _Segments(rows, x.shape[1]), scale.tolist()
        y, tokens = segments.ordered(base, copy=True), segments.ordered(x).flatten(0, 1)
        s = x.new_zeros(len(tokens), a.shape[1])
        for e, x_own, s_own, y_own in segments.each(tokens, s, y.flatten(0, 1)):
            torch.mm(x_own, a[e].to(x.dtype).T, out=s_own)
            y_own.addmm_(s_own, b[e].to(x.dtype).T, alpha=scales[e])
        return segments.restored(y), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        keep(ctx, *inputs[1:], s=output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, a, b, scale, s = ctx.saved_tensors
        _, wants_x, _, wants_a, wants_b, _ = ctx.needs_input_grad
        segments, scales = _Segments(rows, dy.shape[1]), scale.tolist()
        g = segments.ordered(dy).flatten(0, 1)
        ds = g.new_empty(len(g), a.shape[1])
        wide = torch.promote_types(dy.dtype, torch.float32)
        dx = da = db = None
        if wants_x or wants_a:
            for e, g_own, ds_own in segments.each(g, ds):
                torch.mm(g_own, b[e].to(g.dtype), out=ds_own).mul_(scales[e])
        if wants_x:
            dx = g.new_zeros(*dy.shape[:2], a.shape[2])
            for e, ds_own, dx_own in segments.each(ds, dx.flatten(0, 1)):
                torch.mm(ds_own, a[e].to(g.dtype), out=dx_own)
            dx = segments.restored(dx)
        if wants_a:
            da = a.new_zeros(a.shape, dtype=wide)
            for e, ds_own, x_own in segments.each(ds, segments.ordered(x).flatten(0, 1)):
                da[e] += ds_own.T @ x_own
        if wants_b:
            db = b.new_zeros(b.shape, dtype=wide)
            for e, g_own, s_own in segments.each(g, s):
                db[e] += (g_own.T @ s_own).mul_(scales[e])
        return dy, dx, None, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return one_by_one(_GroupedLoRA.apply, info.batch_size, in_dims, inputs)


def keep(ctx: Any, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, s: Tensor) -> None:
    """Saves what the gradients need: x for that of a, S for that of b, neither for that of x."""
    _, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
    ctx.save_for_backward(x if wants_a else None, rows, a, b, scale, s if wants_b else None)


def one_by_one(apply: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """An op of several results under vmap."""
    each = [
        apply(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return results, (0,) * len(results)


class _Segments:
    """The tokens of neighbouring rows with one adapter, T of each row.

    With few tokens the rows are put in the order of their adapters first: a small product costs more than copying its
    tokens. With many, which do not gain from larger products, they stay where they are.
    """

    def __init__(self, rows: Tensor, T: int) -> None:
        adapters, self.order = rows.tolist(), None
        if T < _FEW:
            places = sorted(range(len(adapters)), key=adapters.__getitem__)
            self.order, adapters = torch.tensor(places, dtype=torch.int64), [adapters[i] for i in places]
        runs = [(e, sum(1 for _ in same)) for e, same in itertools.groupby(adapters)]
        self.adapters, self.sizes = [e for e, _ in runs], [T * count for _, count in runs]

    def ordered(self, x: Tensor, copy: bool = False) -> Tensor:
        """x with its rows in order; copy: never x itself."""
        if self.order is not None:
            return x.index_select(0, self.order)
        return x.clone(memory_format=torch.contiguous_format) if copy else x

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def each(self, *tokens: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each adapter, and its part of these tensors; tokens without one are left out."""
        parts = zip(self.adapters, *(x.split(self.sizes) for x in tokens), strict=True)
        return (part for part in parts if part[0] >= 0)


_FEW = 16  # tokens of a row


def _supports(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            return f"{name} has dtype torch.float64, the kernel computes in float32"
    if tensors["a"].shape[1] > 128:
        return f"a has rank {tensors['a'].shape[1]}, the kernel takes up to 128"
    return None


def _case(name: str, rows: tuple[int, ...], T: int, K: int, M: int, R: int, E: int, **rest: Any) -> Case:
    sizes = {"B": len(rows), "T": T, "K": K, "M": M, "R": R, "E": E}
    return Case(name, sizes, ints={"rows": rows}, **rest)


def _flops(case: Case) -> float:
    sizes: Any = case.sizes
    return 2 * sizes["B"] * sizes["T"] * sizes["R"] * (sizes["K"] + sizes["M"])


def _traffic(case: Case) -> float:
    """x and base are read, y is written, and the factors that are used are read."""
    sizes: Any = case.sizes
    used = len(set(case.ints["rows"]) - {-1})
    return sizes["B"] * sizes["T"] * (sizes["K"] + 2 * sizes["M"]) + used * sizes["R"] * (sizes["K"] + sizes["M"])


def _float32(x: Tensor) -> Tensor:
    return x.float()


_ZIPF = (0, 2, 0, 1, 0, 0, 3, 1, 0, 2, 0, 1, 0, 5, 0, 1, 0, 0, 2)
_CASES = (
    _case("one", (0,), 1, 1, 1, 1, 1),
    _case("no rows", (), 3, 8, 8, 2, 2),
    _case("no tokens", (1, 0), 0, 8, 8, 2, 2),
    _case("no feature in", (1, 0), 3, 0, 8, 2, 2),
    _case("no feature out", (1, 0), 3, 8, 0, 2, 2),
    _case("rank 0", (1, 0), 3, 8, 8, 0, 2),
    _case("none", (-1, -1), 5, 17, 13, 3, 2),
    _case("one adapter", (0, 0, 0), 17, 33, 29, 3, 1),
    _case("unsorted", (2, 0, -1, 2, 1), 7, 33, 29, 3, 3),
    _case("unsorted, many tokens", (2, 0, -1, 2, 1), 19, 33, 29, 5, 3),
    _case("most without rows", (4, 1, 4), 21, 16, 24, 4, 7),
    _case("decoding", _ZIPF, 1, 65, 67, 8, 6),
    _case("decoding, deep", (1, 0), 1, 530, 270, 8, 2),
    _case("Zipf", _ZIPF, 5, 31, 37, 4, 6),
    _case("neighbours", (1, 1, -1, 0, 0), 33, 40, 24, 16, 2),
    _case("full tiles", (1, 0), 64, 64, 64, 16, 2),
    _case("one past a tile", (1, 0), 65, 65, 129, 17, 2),
    _case("deep", (0, 1), 70, 300, 70, 8, 2),
    _case("rank 128", (1, 0), 18, 48, 40, 128, 2),
    _case("transposed", (1, 0, -1), 18, 33, 20, 6, 2, layout="transposed"),
    _case("strided", (1, 0, -1), 6, 33, 20, 6, 2, layout="strided"),
    _case("large scales", (1, 0), 16, 32, 32, 4, 2, gain={"scale": 20.0}),
    _case("a layer", tuple(i * i % 9 - 1 for i in range(16)), 300, 4096, 4096, 16, 8, large=True),
    _case("a layer, decoding", tuple(i * i % 33 - 1 for i in range(200)), 1, 4096, 11008, 64, 32, large=True),
)
_BENCH = (
    _case("8 x 256, 4 adapters", (0, 1, 2, 3) * 2, 256, 1024, 1024, 16, 4),
    _case("32 x 1, 8 adapters", tuple(range(8)) * 4, 1, 1024, 1024, 16, 8, forward_only=True),
    _case("16 x 1024, 8 adapters", tuple(range(8)) * 2, 1024, 4096, 4096, 16, 8, large=True),
    _case("256 x 1, 64 adapters", tuple(range(64)) * 4, 1, 4096, 4096, 16, 64, large=True, forward_only=True),
)

GROUPED_LORA = register(
    Op(
        name="grouped_lora",
        area="peft",
        summary="an adapter for each row of a batch, in training too (grouped LoRA)",
        paper="https://arxiv.org/abs/2310.18547",
        shapes="base [B, T, M], x [B, T, K], rows [B], a [E, R, K], b [E, M, R], scale [E] -> y [B, T, M]",
        function=grouped_lora,
        reference=grouped_lora_reference,
        torch=grouped_lora_torch,
        triton="effkit.kernels.grouped_lora:grouped_lora",
        supports=_supports,
        cases=_CASES,
        bench=_BENCH,
        grads=("base", "x", "a", "b"),
        flops=_flops,
        traffic=_traffic,
        draw={"scale": _float32},
        rivals={"loop of adapters": "effkit.rivals:loop_of_adapters"},
    )
)
