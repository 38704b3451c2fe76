"""Merging: merged equals unmerged, the base comes back bit for bit, and what cannot be taken back says so."""

import copy

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import effkit
from effkit.peft import (
    LoRAConfig,
    MergeConfig,
    activate,
    adapter_names,
    adapters_of,
    disabled,
    is_merged,
    merge,
    merge_and_unload,
    unmerge,
)
from effkit.peft.engine import adapted_layers, merged_layers
from effkit.testing import assert_equivalent

ALL = dict(target_modules="all-linear", init="random")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(params=["llama", "gpt2"])
def model(request, make):
    model = make(request.param)
    effkit.apply(model, LoRAConfig(rank=3, alpha=6, bias="lora_only", update_bias=request.param == "gpt2", **ALL))
    for part in adapters_of(model, "default").values():
        for name in ("bias", "lora_bias"):
            if getattr(part, name) is not None:
                torch.nn.init.normal_(getattr(part, name), generator=torch.Generator().manual_seed(2))
    return model


def test_merged_equals_unmerged(model):
    """Each merged layer against the adapted one, judged."""
    layers = adapted_layers(model)
    report = merge(model)
    for path, layer in layers.items():
        merged = model.get_submodule(path)
        assert type(merged) is layer.plain and not hasattr(merged, "adapters")
        sizes = layer.dense_form()[0].shape
        x = torch.randn(3, sizes[1], generator=torch.Generator().manual_seed(3))
        assert_equivalent(
            lambda x, layer=layer: layer.to(x.dtype)(x), lambda x, merged=merged: merged.to(x.dtype)(x), dict(x=x)
        )
    assert list(report.layers) == list(layers)
    assert all(row.kept > 0.999 and row.error < 0.001 for row in report.layers.values())  # float32 keeps it all
    assert "kept of update" in str(report) and len(str(report).splitlines()) == 1 + len(layers)


def test_there_and_back(model, ids):
    """Ten rounds in half precision change nothing; disabled() looks through the merged weights."""
    model.bfloat16()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapted = logits(model, ids)
    activate(model)
    base = logits(model, ids)
    activate(model, "default")
    for _ in range(10):
        merge(model)
        assert is_merged(model) and adapter_names(model) == ["default"]
        merged = logits(model, ids)
        with disabled(model):
            assert torch.equal(logits(model, ids), base)
        assert is_merged(model) and torch.equal(logits(model, ids), merged)
        unmerge(model)
    assert not is_merged(model) and torch.equal(logits(model, ids), adapted)
    now = dict(model.named_parameters())
    assert now.keys() == weights.keys() and all(torch.equal(p, weights[name]) for name, p in now.items())


def test_for_good(model, ids, tmp_path):
    effkit.apply(model, LoRAConfig(rank=2, name="other", **ALL))
    merge(model)
    expected = logits(model, ids)
    unmerge(model)
    assert merge_and_unload(model) is model
    assert torch.equal(logits(model, ids), expected) and not adapted_layers(model) and not merged_layers(model)
    assert adapter_names(model) == []
    assert not any("adapters" in name for name in model.state_dict())
    with pytest.raises(RuntimeError, match="it was for good"):
        unmerge(model)
    with pytest.raises(RuntimeError, match="cannot undo MergeConfig: the adapters are part of the weights"):
        model._effkit_changes[-1].undo()
    effkit.save(model, tmp_path / "effkit")
    assert torch.equal(logits(effkit.load(tmp_path / "effkit"), ids), expected)
    model.save_pretrained(tmp_path / "transformers")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "transformers"), ids), expected)


def test_merged_keeps_what_the_layer_has(make, ids):
    """Hooks, mode and a module that stands in two places."""
    model = make("llama")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("q_proj",), init="random"))
    adapted = logits(model, ids)
    merge(model)
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    assert first is second and not first.training
    seen.clear()
    assert not torch.equal(logits(model, ids), logits(make("llama"), ids)) and len(seen) == 2
    unmerge(model)
    assert model.model.layers[1].self_attn.q_proj is model.model.layers[0].self_attn.q_proj
    assert torch.equal(logits(model, ids), adapted)


def test_modules_to_save_of_several_layers(ids):
    """RoBERTa's classifier, which is no layer itself: disabled, merged and taken back, also by its own names."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**sizes)).eval()
    base = logits(model, ids)
    change = effkit.apply(model, LoRAConfig(rank=2, modules_to_save=("classifier",), init="random"))
    with torch.no_grad():
        adapters_of(model, "default")["classifier"].copy.dense.weight.add_(1)
    adapted = logits(model, ids)
    assert isinstance(model.classifier.dense, torch.nn.Linear) and not torch.equal(adapted, base)
    with disabled(model):
        assert torch.equal(logits(model, ids), base)
    merge(model)
    model.train()
    model.eval()
    with disabled(model):
        assert torch.equal(logits(model, ids), base) and not model.classifier.dropout.training
    unmerge(model)
    assert torch.equal(logits(model, ids), adapted) and not is_merged(model)
    change.undo()
    assert torch.equal(logits(model, ids), base)


def test_cast_while_merged(model, ids):
    """What is kept follows the model into another dtype."""
    cast = copy.deepcopy(model).double()
    merge(model)
    model.double()
    with disabled(model), disabled(cast):
        assert torch.equal(logits(model, ids), logits(cast, ids))
    unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(logits(model, ids), logits(cast, ids))


def test_a_tied_head_comes_apart(make, ids, tmp_path):
    model = make("llama", tie_word_embeddings=True)
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lm_head", "q_proj"), init="random"))
    embeddings = model.model.embed_tokens.weight.clone()
    merge_and_unload(model)
    expected = logits(model, ids)
    assert torch.equal(model.model.embed_tokens.weight, embeddings) and model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), ids), expected)


def test_wrong_uses(make, ids, tmp_path):
    model = make("llama")
    with pytest.raises(RuntimeError, match="nothing is merged"):
        unmerge(model)
    with pytest.raises(ValueError, match=r"no adapter is on; choices: activate\(model, name\), one of \[\]"):
        merge(model)
    with pytest.raises(TypeError, match="names is 'default', expected a tuple"):
        MergeConfig(names="default")
    rows = torch.nn.Sequential(torch.nn.Embedding(9, 4, max_norm=1.0))
    effkit.apply(rows, LoRAConfig(target_modules=("0",)))
    with pytest.raises(ValueError, match=r"merge: 0 has max_norm 1.0, which would shorten rows"):
        merge(rows)
    assert not is_merged(rows)
    change = effkit.apply(model, LoRAConfig(rank=2, **ALL))
    part = adapters_of(model, "default")["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        part.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"weight of model.layers.1.mlp.up_proj would hold values that are not finite"):
        merge_and_unload(model)
    assert len(adapted_layers(model)) == 14 and not is_merged(model)
    with torch.no_grad():
        part.lora_B[0, 0] = 0.0
    merge(model)
    for call in (
        lambda: merge(model),
        lambda: activate(model, "default"),
        lambda: effkit.apply(model, LoRAConfig(name="b")),
        change.undo,
    ):
        with pytest.raises(RuntimeError, match="merged into the weights; choices: unmerge"):
            call()
    with pytest.raises(ValueError, match="save: adapters are merged into the weights; choices: unmerge"):
        effkit.save(model, tmp_path)
    assert not any(tmp_path.iterdir())
    effkit.apply(model, MergeConfig())  # what is merged stays so, for good
    assert adapter_names(model) == []


def test_biases_that_transformers_would_not_load(make, ids, tmp_path):
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=2, update_bias=True, init="random", target_modules=("q_proj", "v_proj")))
    for part in adapters_of(model, "default").values():
        torch.nn.init.normal_(part.lora_bias, generator=torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match=r"q_proj and 3 more layers have a bias now.*choices: effkit\.save"):
        merge_and_unload(model)
    effkit.save(model, tmp_path)
    assert torch.equal(logits(effkit.load(tmp_path), ids), logits(model, ids))
