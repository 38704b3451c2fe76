"""Which layers a config quantises: the common part of NF4Config and FP8Config, and their patterns."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from effkit.change import ChangeConfig


@dataclass(frozen=True)
class QuantizationConfig(ChangeConfig):
    """What the configs of quantised weights share: which layers, and whether the originals are kept.

    A pattern names a layer or a part of the model that holds it, in whole components: "mlp", "layers.3", "*.q_proj",
    "layers.*.self_attn". `*` stands for anything, dots included.

    skip           patterns of layers to leave as they are, besides the output head
    overrides      {pattern: fields of this config} for layers that are to be quantised otherwise, or {pattern: None}
                   for those left alone. The first pattern that matches counts, before `skip` and before the rule that
                   keeps the output head: {"lm_head": {}} quantises it like the others
    keep_original  keep the original modules, so that the change can be undone; False frees their memory
    """

    skip: tuple[str, ...] = field(default=(), kw_only=True)
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict, kw_only=True)
    keep_original: bool = field(default=True, kw_only=True)
    handler: ClassVar[str] = "effkit.quant.config:quantize"
    reload: ClassVar[str] = "effkit.quant.config:rebuild"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.skip, tuple) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"{name}: skip is {self.skip!r}, expected a tuple of patterns such as ('lm_head',)")
        if not isinstance(self.keep_original, bool):
            raise TypeError(f"{name}: keep_original is {self.keep_original!r}, expected True or False")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"{name}: overrides is {self.overrides!r}, expected {{pattern: fields or None}}")
        own = {entry.name for entry in dataclasses.fields(self)} - {
            entry.name for entry in dataclasses.fields(QuantizationConfig)
        }
        for pattern, fields in self.overrides.items():
            if not isinstance(pattern, str) or not (fields is None or isinstance(fields, Mapping)):
                raise TypeError(f"{name}: overrides has {pattern!r}: {fields!r}, expected a pattern: fields or None")
            unknown = sorted(set(fields or ()) - own)
            if unknown:
                raise ValueError(f"{name}: overrides[{pattern!r}] has {unknown}, choices: {', '.join(sorted(own))}")
            self._with(fields or {})  # whose own check names what is wrong with it

    def of_layer(self, name: str) -> QuantizationConfig | str | None:
        """The config of one layer: its own by an override, this one, or why it is left alone."""
        for pattern, fields in self.overrides.items():
            if matches(pattern, name):
                return f"overrides[{pattern!r}] is None" if fields is None else self._with(fields)
        return next((f"skip has {pattern!r}" for pattern in self.skip if matches(pattern, name)), None)

    def _with(self, fields: Mapping[str, Any]) -> QuantizationConfig:
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return dataclasses.replace(self, skip=(), overrides={}, **fields)

    @property
    def stores(self) -> bool:
        """Whether quantised weights are what is stored."""
        return True

    def why_not(self, out_features: int, in_features: int) -> str | None:
        """Why the format cannot hold a weight of this shape, or None."""
        return None

    def layer(self, linear: nn.Linear) -> nn.Module:
        """The quantised layer of a dense one."""
        raise NotImplementedError


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of whole components names a module or a part of the model that holds it."""
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")
