"""Which layers a config means. tests/peers/test_peft_matching.py compares with peft itself."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import effkit
from effkit.peft import LoRAConfig
from effkit.peft.matching import USUAL_TARGETS, find_saved, find_targets, first_match


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.q_proj, self.q = nn.Linear(4, 4), nn.Linear(4, 4)
        self.proj = nn.Linear(4, 4)
        if experts:
            self.experts = nn.ModuleList(Block() for _ in range(experts))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(experts=2)])
        self.proj = nn.Linear(4, 4)
        self.head_proj = nn.Linear(4, 4)


def targets(model=None, **fields):
    return sorted(find_targets(model or Net(), LoRAConfig(**fields), USUAL_TARGETS))


def test_ends_of_names():
    assert targets(target_modules=("q_proj",)) == [
        "layers.0.q_proj",
        "layers.1.experts.0.q_proj",
        "layers.1.experts.1.q_proj",
        "layers.1.q_proj",
    ]
    assert "head_proj" not in targets(target_modules=["proj"]) and "proj" in targets(target_modules=["proj"])
    assert targets(target_modules={"layers.0.q"}) == ["layers.0.q"]


def test_expressions_are_of_whole_names():
    assert targets(target_modules=r"layers\.\d\.q") == ["layers.0.q", "layers.1.q"]
    with pytest.raises(ValueError, match="nothing in the model matches"):
        targets(target_modules="q_proj")


def test_excluded():
    assert targets(target_modules=("q",), exclude_modules=("experts.0.q", "layers.0.q")) == [
        "layers.1.experts.1.q",
        "layers.1.q",
    ]
    assert targets(target_modules=("q",), exclude_modules=".*experts.*") == ["layers.0.q", "layers.1.q"]


def test_numbers_of_layers():
    """The first number counts, not an expert's; a whole name in the list stands in spite of its number."""
    second = ["layers.1.experts.0.q", "layers.1.experts.1.q", "layers.1.q"]
    model = nn.ModuleDict({"model": Net()})
    inner = [f"model.{name}" for name in second]
    assert targets(model, target_modules=("q",), layers_to_transform=1) == inner
    assert targets(model, target_modules=("q",), layers_to_transform=[1], layers_pattern="layers") == inner
    assert targets(target_modules=("q",), layers_to_transform=(1,), layers_pattern=("blocks", "layers")) == second
    whole = targets(model, target_modules=("q", "model.layers.0.q"), layers_to_transform=(1,))
    assert whole == sorted([*inner, "model.layers.0.q"])
    experts = targets(target_modules=("q",), layers_to_transform=(0,), layers_pattern=("experts",))
    assert experts == ["layers.1.experts.0.q"]


def test_all_linear_leaves_the_head(make):
    for kind, head in (("llama", "lm_head"), ("gpt2", "lm_head")):
        model = make(kind)
        found = targets(model, target_modules="ALL-linear")
        assert head not in found and len(found) == (14 if kind == "llama" else 8)
        # A second adapter finds the same layers, not what is inside the first.
        effkit.apply(model, LoRAConfig(target_modules="all-linear"))
        assert targets(model, target_modules="all-linear") == found
        assert len(targets(model, target_modules="all-linear", exclude_modules=("0.mlp.up_proj", "mlp.c_fc"))) < len(
            found
        )


def test_experts_in_one_parameter_are_no_linear_layers():
    """Of a mixture of experts as transformers holds it attention alone is all-linear."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    found = targets(MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2)), target_modules="all-linear")
    assert [name.rpartition(".")[2] for name in found] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_what_is_trained_as_a_whole_is_no_target():
    assert targets(target_modules=("q",), modules_to_save=("experts",)) == ["layers.0.q", "layers.1.q"]
    assert sorted(find_saved(Net(), ("proj",))) == sorted(
        ["proj", "head_proj", *(f"layers.{i}.{p}" for i in (0, 1) for p in ("proj", "q_proj"))]
        + [f"layers.1.experts.{i}.{p}" for i in (0, 1) for p in ("proj", "q_proj")]
    )


def test_usual_targets(make):
    assert {name.rpartition(".")[2] for name in targets(make("llama"))} == {"q_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in targets(make("gpt2"))} == {"c_attn"}
    with pytest.raises(ValueError, match="there is no usual choice for model type 'None'"):
        targets(Net())


def test_near_names_are_named():
    with pytest.raises(ValueError, match=r"nothing in the model matches \['qproj'\]; it has q_proj"):
        targets(target_modules=("qproj",))


def test_first_match():
    patterns = {r"layers\.1\.q": 1, "q": 2, ".*proj": 3}
    assert [first_match(patterns, name, 0) for name in ("layers.1.q", "layers.0.q", "xq", "a.q_proj")] == [1, 2, 0, 3]


def test_a_regular_module_need_not_be_a_model():
    net = Net()
    effkit.apply(net, LoRAConfig(target_modules=("q",), rank=2, init="random"))
    x = torch.randn(3, 4)
    layer = net.layers[0].q
    assert not torch.equal(layer(x), layer.base(x))
