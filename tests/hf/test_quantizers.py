"""Quantised weights in transformers' own verbs: from_pretrained, save_pretrained, dequantize, generate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import effkit
from effkit.hf import FP8QuantizationConfig, NF4QuantizationConfig
from effkit.quant import (
    DequantizeConfig,
    FP8Config,
    FP8Linear,
    NF4Config,
    NF4Linear,
    dequantize_nf4,
    quantization_report,
    quantize_nf4,
)

SMALL = dict(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    eos_token_id=None,
)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "tied": (hf.LlamaConfig, dict(tie_word_embeddings=True)),
    "mixtral": (hf.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64)),
    "qwen3_moe": (hf.Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16)),
}
CONFIGS = {
    "nf4": (NF4Config(), NF4QuantizationConfig()),
    "double": (NF4Config(block_size=32, double_quant=True), NF4QuantizationConfig(block_size=32, double_quant=True)),
    "mixed": (
        NF4Config(skip=("q_proj",), overrides={"layers.1": {"quant_type": "fp4"}}),
        NF4QuantizationConfig(skip=["q_proj"], overrides={"layers.1": {"quant_type": "fp4"}}),
    ),
    "fp8": (FP8Config(), FP8QuantizationConfig()),
    "fp8_row": (FP8Config(granularity="row", format="e5m2"), FP8QuantizationConfig(granularity="row", format="e5m2")),
}
IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of each family."""
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def checkpoint(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(kind(**SMALL | own), dtype=dtype).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(path, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; codes of one byte as integers, since FP8 values cannot be compared."""
    return {k: t.view(torch.uint8) if t.element_size() == 1 else t for k, t in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = state(a), state(b)
    return left.keys() == right.keys() and all(
        tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]) for key, tensor in left.items()
    )


def trained(model: nn.Module) -> set[str]:
    """The modules with a parameter that takes gradients."""
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


PAIRS = [*((family, "double") for family in FAMILIES), *(("qwen3_moe", name) for name in CONFIGS if name != "double")]


@pytest.mark.parametrize(("folder", "name"), PAIRS, indirect=["folder"])
def test_quantised_on_the_way_in_as_by_apply_and_saved_twice(folder: Path, name: str, tmp_path: Path) -> None:
    change, config = CONFIGS[name]
    model = load(folder, quantization_config=config)
    applied = load(folder)
    matched = effkit.apply(applied, change).matched
    assert same(model, applied) and torch.equal(logits(model), logits(applied))
    (entry,) = effkit.describe(model)
    assert entry["matched"] == matched and entry["fields"] == effkit.describe(applied)[0]["fields"] | {
        "keep_original": False
    }
    assert trained(model).isdisjoint(matched)
    for original, path in ((model, tmp_path / "1"), (applied, tmp_path / "2")):
        original.save_pretrained(path)
        once = load(path)
        assert trained(once).isdisjoint(matched) and trained(once)
        once.save_pretrained(path / "again")
        assert same(once, model) and same(load(path / "again"), model) and torch.equal(logits(once), logits(model))
        stored, again = load_file(path / "model.safetensors"), load_file(path / "again" / "model.safetensors")
        assert stored.keys() == again.keys()


def test_a_loaded_model_is_known_to_effkit(folder: Path, tmp_path: Path) -> None:
    model = load(folder, quantization_config=NF4QuantizationConfig())
    assert quantization_report(model).bits_per_parameter == 4.5
    effkit.save(model, tmp_path)
    assert same(effkit.load(tmp_path), model) and same(load(tmp_path), model)
    quantised = logits(model)
    change = effkit.apply(model, DequantizeConfig())
    assert "quantization_config" not in model.config.to_dict()
    change.undo()
    assert torch.equal(logits(model), quantised) and model.config.quantization_config.block_size == 64
    with pytest.raises(RuntimeError, match="the original weights were not kept"):
        model.__dict__["_effkit_changes"][-1].undo()


def test_dequantize_is_transformers_verb_for_it(folder: Path, tmp_path: Path) -> None:
    model = load(folder, quantization_config=NF4QuantizationConfig())
    model(input_ids=IDS)  # what inference does to others' weights
    dense = load(folder)
    expected = {
        name: dequantize_nf4(quantize_nf4(tensor)) if f"{name}_absmax" in state(model) and tensor.ndim == 2 else tensor
        for name, tensor in dense.state_dict().items()
        if tensor.ndim < 3
    }
    model.dequantize()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())
    assert {type(m) for m in model.modules()} == {type(m) for m in dense.modules()}
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    model.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)


def test_float16(tmp_path: Path) -> None:
    """Scales stay in float32, whatever the model is loaded in or cast to; dequantising gives the model's dtype."""
    model = load(checkpoint("llama", tmp_path), dtype=torch.float16, quantization_config=NF4QuantizationConfig())
    layer = model.model.layers[0].mlp.up_proj
    assert logits(model).dtype == torch.float16 and layer.weight_absmax.dtype == torch.float32
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised", dtype=torch.float16)
    assert same(again, model) and logits(load(tmp_path / "quantised", dtype=torch.bfloat16)).dtype == torch.bfloat16
    before = state(layer)["weight_absmax"].clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight_absmax, before) and logits(model).dtype == torch.bfloat16
    model.dequantize()
    assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.float16}


def test_generate_and_gradients(folder: Path) -> None:
    model = load(folder, quantization_config=NF4QuantizationConfig())
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 14)
    assert torch.equal(ids[0, 10], logits(model)[0, -1].argmax())
    model.train()
    F.cross_entropy(model(input_ids=IDS).logits[0], IDS[0]).backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.hf_quantizer.is_trainable


def test_conv1d_layers_are_stored_like_others(tmp_path: Path) -> None:
    """GPT-2's layers hold their weight transposed; dequantised they do so again."""
    torch.manual_seed(0)
    dense = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=1, n_head=4)).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=NF4QuantizationConfig())
    layer = model.transformer.h[0].attn.c_attn
    expected = dequantize_nf4(quantize_nf4(dense.transformer.h[0].attn.c_attn.weight.T))
    assert type(layer) is NF4Linear and torch.equal(layer.dequantize().weight, expected)
    model.save_pretrained(tmp_path / "quantised")
    assert same(load(tmp_path / "quantised"), model)
    model.dequantize()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, expected.T)
    model.save_pretrained(tmp_path / "back")
    assert same(load(tmp_path / "back"), model)


def test_config_json_holds_the_fields(tmp_path: Path) -> None:
    model = load(checkpoint("llama", tmp_path), quantization_config=CONFIGS["mixed"][1])
    model.save_pretrained(tmp_path / "quantised")
    stored = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "effkit_nf4",
        "block_size": 64,
        "double_quant": False,
        "quant_type": "nf4",
        "skip": ["q_proj"],
        "overrides": {"layers.1": {"quant_type": "fp4"}},
    }
    assert NF4QuantizationConfig(**stored).to_dict() == stored


def test_a_classifier_on_a_base_model(tmp_path: Path) -> None:
    """Its head is in no checkpoint of the base model: it starts untrained, and dense."""
    dense = checkpoint("llama", tmp_path)
    load(dense, quantization_config=NF4QuantizationConfig()).save_pretrained(tmp_path / "q")
    make = hf.AutoModelForSequenceClassification.from_pretrained
    first = make(dense, quantization_config=NF4QuantizationConfig(), num_labels=3)
    second = make(tmp_path / "q", num_labels=3)
    for model in (first, second):
        assert type(model.score) is nn.Linear and model.score.weight.requires_grad
        model(input_ids=IDS).logits.sum().backward()
    quantised = [{key: t for key, t in model.state_dict().items() if "score" not in key} for model in (first, second)]
    assert all(torch.equal(tensor, quantised[1][key]) for key, tensor in quantised[0].items())


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model = load(checkpoint("qwen3_moe", tmp_path), quantization_config=NF4QuantizationConfig(double_quant=True))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(load(tmp_path / "sharded"), model)


def test_stacked_experts_take_four_bits(tmp_path: Path) -> None:
    """They are most of a mixture of experts, and others leave them dense."""
    for family in ("mixtral", "qwen3_moe"):
        model = load(checkpoint(family, tmp_path / family), quantization_config=NF4QuantizationConfig())
        experts = [weight for weight in quantization_report(model).weights if ".experts." in weight.name]
        assert len(experts) == 4 and all(weight.bits_per_parameter == 4.5 for weight in experts)


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NF4QuantizationConfig: no field \\['bits'\\], choices: skip, overrides"):
        NF4QuantizationConfig(bits=4)
    with pytest.raises(ValueError, match="block_size is 48"):
        NF4QuantizationConfig(block_size=48)
    with pytest.raises(ValueError, match="no field \\['recipe'\\]"):
        FP8QuantizationConfig(recipe="delayed")
    with pytest.raises(ValueError, match="quant_method is 'effkit_fp8', expected 'effkit_nf4'"):
        NF4QuantizationConfig(quant_method="effkit_fp8")
    with pytest.raises(ValueError, match="no layer can be quantised"):
        load(checkpoint("llama", tmp_path), quantization_config=NF4QuantizationConfig(block_size=1024))


def test_a_truncated_checkpoint_is_not_loaded_silently(tmp_path: Path) -> None:
    """transformers alone gives a missing scale arbitrary values, and in some versions takes one of another shape."""
    load(checkpoint("llama", tmp_path), quantization_config=NF4QuantizationConfig()).save_pretrained(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight_absmax"
    save_file(tensors | {key: tensors[key][:5].clone()}, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|up_proj\.weight_absmax has shape"):
        load(tmp_path / "q")
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    save_file(rest, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint has no model\.layers\.0\.mlp\.up_proj\.weight_absmax"):
        load(tmp_path / "q")


def test_imported_twice(tmp_path: Path) -> None:
    """In a process of its own: here the classes would be others afterwards than those that modules hold."""
    code = "import importlib, effkit.hf.quantizers as plugin; importlib.reload(plugin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_second_quantisation_is_not_said_by_config_json(tmp_path: Path) -> None:
    model = load(checkpoint("llama", tmp_path), quantization_config=NF4QuantizationConfig(skip=["mlp"]))
    change = effkit.apply(model, FP8Config())
    assert type(model.model.layers[0].mlp.up_proj) is FP8Linear
    with pytest.raises(ValueError, match="second quantisation of this model"):
        model.save_pretrained(tmp_path / "both")
    effkit.save(model, tmp_path / "saved")
    assert same(effkit.load(tmp_path / "saved"), model)
    change.undo()
    model.save_pretrained(tmp_path / "one")
    assert same(load(tmp_path / "one"), model)
