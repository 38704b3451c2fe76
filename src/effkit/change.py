"""apply(model, config): an edit of a model, with undo and report.

A change is described by a frozen dataclass, a subclass of `ChangeConfig`. Its handler edits the model in place and
returns an `Edit`: what matched and how to take it back. Changes stack, are remembered by the model, and can be saved
and loaded: the folder holds safetensors, the model's config and the list of changes as JSON, nothing pickled.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from effkit.ops import resolve

_REMEMBERED = "_effkit_changes"
_MANIFEST = "effkit.json"


@dataclass(frozen=True)
class ChangeConfig:
    """What to change. Subclasses are frozen dataclasses whose fields are JSON values, validated in __post_init__.

    handler is "module:function", imported on first use, called as function(model, config, data) and returning an Edit.
    It must leave the model as it was when it raises. reload, where given, names the handler that only rebuilds the
    structure when a saved model is loaded (the weights come from the file), e.g. where handler needs data.
    """

    handler: ClassVar[str]
    reload: ClassVar[str | None] = None

    def __str__(self) -> str:
        """The fields that are not as they are by default."""
        own = []
        for entry in dataclasses.fields(self):
            usual = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            if getattr(self, entry.name) != usual:
                own.append(f"{entry.name}={getattr(self, entry.name)!r}")
        return f"{type(self).__name__}({', '.join(own)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON form: {"type": "module:Class", "fields": {...}}."""
        return {"type": f"{type(self).__module__}:{type(self).__qualname__}", "fields": dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ChangeConfig:
        """The config of a JSON form; only subclasses of ChangeConfig inside effkit or already imported modules."""
        module, _, name = data["type"].partition(":")
        cls = getattr(importlib.import_module(module), name, None)
        if not (isinstance(cls, type) and issubclass(cls, ChangeConfig)):
            raise ValueError(f"type is {data['type']!r}, expected a ChangeConfig as 'module:Class'")
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in data["fields"].items()}
        return cls(**fields)


@dataclass
class Edit:
    """What a handler did: the names it matched, and how to undo it (None: the original is gone, with the reason).

    undo holds what it restores as a functools.partial or a `PutBack` does, not a closure: a deep copy of the model then
    undoes itself. final: `apply` calls undo only if a later config fails, and lets go of it, and of what it holds, at
    its end. cannot_save gives the reason why the model, as it is by now, cannot be saved, or None. state gives what
    there is to say of the change besides its config, as JSON, and set_state takes that when a saved model is loaded.
    """

    matched: list[str]
    undo: Callable[[], None] | None
    irreversible: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    final: bool = False
    cannot_save: Callable[[nn.Module], str | None] = field(default=lambda model: None, kw_only=True)
    state: Callable[[nn.Module], Any] = field(default=lambda model: None, kw_only=True)
    set_state: Callable[[nn.Module, Any], None] = field(default=lambda model, state: None, kw_only=True)


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of a model."""

    parameters: int
    bytes: int

    @staticmethod
    def of(model: nn.Module) -> Size:
        tensors = list(model.parameters())
        return Size(sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors))


@dataclass
class Change:
    """One applied change: its config, what it matched, sizes before and after. print() shows the report."""

    model: nn.Module
    config: ChangeConfig
    edit: Edit
    before: Size
    after: Size
    undone: bool = False

    @property
    def matched(self) -> list[str]:
        return self.edit.matched

    def undo(self) -> None:
        """Takes the change back. The last change goes first; RuntimeError where the original is gone."""
        stack: list[Change] = _changes(self.model)
        if self.undone or self not in stack:
            raise RuntimeError(f"{type(self.config).__name__} is not applied: it was undone already")
        if stack[-1] is not self:
            raise RuntimeError(
                f"cannot undo {type(self.config).__name__}: {type(stack[-1].config).__name__} was applied after it, "
                "undo that first"
            )
        if self.edit.undo is None:
            raise RuntimeError(f"cannot undo {type(self.config).__name__}: {self.edit.irreversible}")
        self.edit.undo()
        stack.pop()
        self.undone = True

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.config.to_dict(),
            "matched": self.matched,
            "parameters": [self.before.parameters, self.after.parameters],
            "bytes": [self.before.bytes, self.after.bytes],
            "notes": self.edit.notes,
        }

    def __str__(self) -> str:
        names = ", ".join(self.matched[:4]) + (", ..." if len(self.matched) > 4 else "")
        lines = [
            f"{self.config}",
            f"  matched     {len(self.matched)}: {names}",
            f"  parameters  {self.before.parameters:,} -> {self.after.parameters:,}",
            f"  bytes       {self.before.bytes:,} -> {self.after.bytes:,}",
        ]
        return "\n".join(lines + [f"  {key:11} {value}" for key, value in self.edit.notes.items()])


@dataclass
class Changes:
    """Several changes applied by one call; undo() takes them back in reverse order."""

    changes: list[Change]

    @property
    def matched(self) -> list[str]:
        return [name for change in self.changes for name in change.matched]

    def undo(self) -> None:
        for change in reversed(self.changes):
            change.undo()

    def __iter__(self) -> Any:
        return iter(self.changes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes))


def apply(model: nn.Module, *configs: ChangeConfig, data: Iterable[Any] | None = None) -> Change | Changes:
    """Edits the model in place, one config after the other, and returns what was done.

    data: batches for the configs that calibrate. Raises ValueError where a config matches nothing; whatever is raised,
    the model is as it was before the call.
    """
    if not configs:
        raise TypeError("apply needs at least one config, e.g. effkit.apply(model, effkit.norm.DyTConfig())")
    for config in configs:
        if not isinstance(config, ChangeConfig):
            raise TypeError(f"config is {config!r}, expected an instance of a ChangeConfig such as DyTConfig")
    done: list[Change] = []
    original = _model_record(model)
    try:
        for config in configs:
            done.append(_apply_one(model, config, config.handler, data))
    except BaseException:
        for change in reversed(done):
            if change.edit.undo is not None:
                change.undo()
        raise
    for change in done:
        if change.edit.final:
            change.edit.undo = None
    model.__dict__.setdefault("_effkit_original", original)
    return done[0] if len(done) == 1 else Changes(done)


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The changes of a model, oldest first: type, fields, matched names, sizes before and after, notes."""
    return [change.to_dict() for change in _changes(model)]


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a changed HuggingFace model: model.safetensors, config.json and effkit.json (what `load` needs)."""
    from safetensors.torch import save_model

    record = getattr(model, "_effkit_original", None) or _model_record(model)
    if record is None:
        raise TypeError(f"save needs a HuggingFace model, got {type(model).__name__}; use its state_dict() instead")
    alone = next((name for name, part in model.named_modules() if name and part.__dict__.get(_REMEMBERED)), None)
    if alone is not None:
        raise ValueError(f"save: {alone} was changed by itself; save that, or apply changes to the whole model")
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise ValueError(
            f"save: {sharded} is in parts, on several processes; choices: save the model before it is sharded; "
            "torch.distributed.checkpoint; of adapters alone effkit.peft.save_adapter"
        )
    for change in _changes(model):
        reason = change.edit.cannot_save(model)
        if reason is not None:
            raise ValueError(f"save: {reason}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    record = {**record, "dtype": _dtype(model)}
    changes = [{**change.config.to_dict(), "state": change.edit.state(model)} for change in _changes(model)]
    manifest = {"version": 1, "model": record, "changes": changes}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote: built from its config, changed again, weights loaded strictly; in eval mode."""
    from safetensors.torch import load_file, load_model

    folder = Path(path)
    if not (folder / _MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no {_MANIFEST}: it was not written by effkit.save")
    manifest = json.loads((folder / _MANIFEST).read_text())
    model = _build(manifest["model"])
    for entry in manifest["changes"]:
        config = ChangeConfig.from_dict(entry)
        _apply_one(model, config, config.reload or config.handler, None)
    for change, entry in zip(_changes(model), manifest["changes"], strict=True):
        if entry.get("state") is not None:
            change.edit.set_state(model, entry["state"])
    model.__dict__["_effkit_original"] = manifest["model"]
    # Parameters take the dtype they were saved in before the strict load copies into them.
    stored = load_file(str(folder / "model.safetensors"))
    # Tied ones are stored under one of their names, whichever that is.
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    load_model(model, str(folder / "model.safetensors"), strict=True)
    return model.to(device).eval()


def no_match(what: str, wanted: Sequence[str], available: Iterable[str]) -> ValueError:
    """The error for a config that matches nothing: names what was looked for and the nearest names there are."""
    available = list(available)
    near = list(dict.fromkeys(n for w in wanted for n in difflib.get_close_matches(w, available, n=4, cutoff=0.3)))
    listed = near or list(dict.fromkeys(available))[:8]
    return ValueError(
        f"{what}: nothing in the model matches {list(wanted)}; it has {', '.join(listed) or 'no modules'}"
    )


def pick_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """The numbers of the layers that a config names, in order: negative ones count from the end, None is all."""
    wanted = range(count) if layers is None else layers
    for layer in wanted:
        if not -count <= layer < count:
            raise ValueError(f"layers is {layers}, but there is no {layer}: the model has {count} layers")
    return sorted({layer % count for layer in wanted})


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


class PutBack:
    """Undoes a swap of modules: puts the originals back, by name. A deep copy of the model comes with its own."""

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module]) -> None:
        self.model, self.originals = model, originals

    def __call__(self) -> None:
        for name, module in self.originals.items():
            set_module(self.model, name, module)


def _apply_one(model: nn.Module, config: ChangeConfig, handler: str, data: Iterable[Any] | None) -> Change:
    before = Size.of(model)
    edit: Edit = resolve(handler)(model, config, data)
    return remember(model, config, edit, before)


def remember(model: nn.Module, config: ChangeConfig, edit: Edit, before: Size) -> Change:
    """Enters an edit into the model's list of changes; `apply` does, and what edits a model while it is loaded."""
    change = Change(model, config, edit, before, Size.of(model))
    _changes(model).append(change)
    return change


def _changes(model: nn.Module) -> list[Change]:
    return model.__dict__.setdefault(_REMEMBERED, [])


def _model_record(model: nn.Module) -> dict[str, Any] | None:
    """Class and config of a HuggingFace model as they are now, from which `load` rebuilds the structure."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    # to_diff_dict would drop what equals today's defaults; the full form survives another transformers version.
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("quantization_config", None)  # a change tells of it
    return {
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "config_class": f"{type(config).__module__}:{type(config).__qualname__}",
        "config": values,
    }


def _dtype(model: nn.Module) -> str:
    """The name of the dtype that a model computes in, as far as one can say; FP8 codes are none."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1]
    return str(dtypes[0] if dtypes else torch.get_default_dtype()).removeprefix("torch.")


def _build(record: dict[str, Any]) -> nn.Module:
    """The unchanged model of a record, with arbitrary weights."""
    for key in ("class", "config_class"):
        if not record[key].startswith("transformers."):
            raise ValueError(f"{_MANIFEST}: {key} is {record[key]!r}, only classes of transformers are rebuilt")
    config = resolve(record["config_class"]).from_dict(record["config"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, record.get("dtype", "float32")))  # buffers that need float32 say so
    try:
        return resolve(record["class"])(config)
    finally:
        torch.set_default_dtype(default)
