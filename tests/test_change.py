"""apply, undo, describe, save and load: what every change promises, with a change made for the test."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import effkit
from effkit.attention import GQAConfig, SoftmaxAttentionConfig
from effkit.change import ChangeConfig, Edit
from effkit.norm import DyTConfig


@dataclass(frozen=True)
class HalveConfig(ChangeConfig):
    """Halves every weight; breaks after the first one when told to; cannot be undone when told so."""

    breaks: bool = False
    final: bool = False
    handler: ClassVar[str] = f"{__name__}:halve"


def scale_all(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def halve(model: nn.Module, config: HalveConfig, data: Iterable[Any] | None) -> Edit:
    if config.breaks:
        raise ValueError("broken on purpose")
    scale_all(model, 0.5)
    return Edit(["all"], None if config.final else lambda: scale_all(model, 2.0), "the original is gone")


@pytest.fixture(autouse=True)
def _handler_of_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest imports this file under a name of its own, which import_module would not find."""
    from effkit import change

    real = change.resolve
    monkeypatch.setattr(change, "resolve", lambda path: halve if path == HalveConfig.handler else real(path))


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, pad_token_id=0)).eval()


def state(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_changes_stack_and_come_off_in_reverse() -> None:
    target = model()
    before = state(target)
    first = effkit.apply(target, GQAConfig(num_kv_heads=2))
    both = effkit.apply(target, DyTConfig(), HalveConfig())
    assert [entry["type"].rpartition(":")[2] for entry in effkit.describe(target)] == [
        "GQAConfig", "DyTConfig", "HalveConfig",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="cannot undo GQAConfig: HalveConfig was applied after it"):
        first.undo()
    both.undo()
    first.undo()
    assert same(before, state(target)) and effkit.describe(target) == []
    with pytest.raises(RuntimeError, match="GQAConfig is not applied: it was undone already"):
        first.undo()


def test_a_failing_config_takes_the_earlier_ones_back() -> None:
    target = model()
    before = state(target)
    with pytest.raises(ValueError, match="broken on purpose"):
        effkit.apply(target, GQAConfig(num_kv_heads=1), HalveConfig(breaks=True))
    assert same(before, state(target)) and effkit.describe(target) == [] and target.config.num_key_value_heads == 4


@pytest.mark.parametrize("config", [GQAConfig(num_kv_heads=2), DyTConfig(), SoftmaxAttentionConfig()])
def test_a_deep_copy_undoes_itself(config: ChangeConfig) -> None:
    target = model()
    original = state(target)
    effkit.apply(target, config)
    changed = state(target)
    twin = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
    twin.__dict__["_effkit_changes"][-1].undo()
    assert same(state(twin), original) and effkit.describe(twin) == []
    assert state(target).keys() == changed.keys() and len(effkit.describe(target)) == 1


def test_what_cannot_be_undone_says_so() -> None:
    change = effkit.apply(model(), HalveConfig(final=True))
    with pytest.raises(RuntimeError, match="cannot undo HalveConfig: the original is gone"):
        change.undo()


def test_report_and_description() -> None:
    target = model()
    change = effkit.apply(target, GQAConfig(num_kv_heads=1))
    assert "matched     2: model.layers.0.self_attn" in str(change) and "4 -> 1" in str(change)
    (entry,) = effkit.describe(target)
    assert entry["fields"] == {"num_kv_heads": 1, "permute": False}
    assert entry["parameters"][0] - entry["parameters"][1] == 2 * 2 * 12 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bring_the_changed_model_back(tmp_path: Path, dtype: torch.dtype) -> None:
    target = model().to(dtype)
    effkit.apply(target, GQAConfig(num_kv_heads=2), DyTConfig())
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.01)
    effkit.save(target, tmp_path)
    loaded = effkit.load(tmp_path)
    assert same(state(target), state(loaded)) and next(loaded.parameters()).dtype == dtype
    assert [e["fields"] for e in effkit.describe(loaded)] == [e["fields"] for e in effkit.describe(target)]
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, target(ids).logits)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}
    effkit.save(loaded, tmp_path / "again")
    assert same(state(target), state(effkit.load(tmp_path / "again")))


def test_loading_is_strict(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = model()
    effkit.apply(target, DyTConfig())
    effkit.save(target, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "alpha" in name))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="alpha"):
        effkit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no effkit\.json"):
        effkit.load(tmp_path / "nowhere")


def test_wrong_use() -> None:
    with pytest.raises(TypeError, match="apply needs at least one config"):
        effkit.apply(model())
    with pytest.raises(TypeError, match="config is 'dyt', expected an instance of a ChangeConfig"):
        effkit.apply(model(), "dyt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="save needs a HuggingFace model, got Linear"):
        effkit.save(nn.Linear(2, 2), "nowhere")
    target = model()
    effkit.apply(target.model, DyTConfig())
    with pytest.raises(ValueError, match="save: model was changed by itself"):
        effkit.save(target, "nowhere")
    with pytest.raises(ValueError, match="type is 'os:path', expected a ChangeConfig"):
        ChangeConfig.from_dict({"type": "os:path", "fields": {}})
