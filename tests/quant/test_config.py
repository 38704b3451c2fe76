"""NF4Config, FP8Config and DequantizeConfig on models: which layers, undo, files, reports, refusals."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import effkit
from effkit.attention import GatedLinearAttentionConfig, LinearAttentionConfig
from effkit.change import ChangeConfig
from effkit.hf.experts import QuantizedExperts
from effkit.norm import DyTConfig
from effkit.quant import (
    DequantizeConfig,
    FP8Config,
    FP8Linear,
    NF4Config,
    NF4Linear,
    dequantize_nf4,
    quantization_report,
    quantize_fp4,
    quantize_nf4,
)
from effkit.quant._selection import matches
from effkit.testing import assert_equivalent

SIZES = dict(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
OPTIONS = dict(max_position_embeddings=64, initializer_range=0.3, pad_token_id=0)
EXPERTS = dict(num_experts_per_tok=2, intermediate_size=64)
IDS = torch.arange(1, 11)[None]
CONFIGS = [
    NF4Config(),
    NF4Config(block_size=32, double_quant=True, quant_type="fp4"),
    FP8Config(),
    FP8Config(granularity="row", format="e5m2", power_of_two=True),
]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | OPTIONS | dict(intermediate_size=96) | options)
    return AutoModelForCausalLM.from_config(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, **OPTIONS, **EXPERTS, num_local_experts=4, experts_implementation="eager")
    return MixtralForCausalLM(config).eval()


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    own = dict(moe_intermediate_size=64, num_experts=4, head_dim=16, tie_word_embeddings=True)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **OPTIONS, **EXPERTS, **own)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=1, n_head=4)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; codes of one byte as integers, since FP8 values cannot be compared."""
    return {
        key: (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).clone()
        for key, tensor in model.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]) for key, tensor in a.items()
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def read(model: Any, x: Tensor) -> Tensor:
    """The logits for embeddings x, in the dtype of x."""
    return model.to(x.dtype)(inputs_embeds=x).logits


class Plain(nn.Module):
    """No HuggingFace model: a layer that fits, one that does not, one that stands in two places, one within another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fits, self.odd = nn.Linear(64, 5), nn.Linear(48, 5)
        self.twice = nn.ModuleList([nn.Linear(128, 64)] * 2)
        self.attention = nn.MultiheadAttention(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fits(self.twice[0](x) + self.twice[1](x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("make", [llama, mixtral, qwen3_moe, gpt2])
def test_change_undo_and_files(make: Any, config: ChangeConfig, tmp_path: Path) -> None:
    """Nothing but the weights of the layers changes, undo gives every bit back, and a file brings every bit back."""
    model = make()
    original, before = state(model), logits(model)
    change = effkit.apply(model, config)
    quantised, after = state(model), logits(model)
    assert change.matched and not torch.equal(before, after)
    for name, tensor in original.items():
        if not any(name.startswith(f"{layer}.") for layer in change.matched):
            assert torch.equal(tensor, quantised[name]), name
    effkit.save(model, tmp_path)
    loaded: Any = effkit.load(tmp_path)
    assert same(state(loaded), quantised) and torch.equal(logits(loaded), after)
    assert not any(
        p.requires_grad for name in change.matched for p in loaded.get_submodule(name).parameters() if p.ndim > 1
    )
    with pytest.raises(RuntimeError, match=r"cannot undo .*: the model was loaded from a file"):
        loaded.__dict__["_effkit_changes"][-1].undo()
    change.undo()
    assert same(state(model), original) and torch.equal(logits(model), before) and effkit.describe(model) == []
    assert not hasattr(model, "hf_quantizer") and "quantization_config" not in model.config.to_dict()


def test_layers_hold_what_the_quantiser_gives() -> None:
    model = llama()
    dense = model.model.layers[1].mlp.gate_proj.weight.detach().clone()
    effkit.apply(model, NF4Config(overrides={"layers.1": {"quant_type": "fp4", "double_quant": True}}))
    layer = model.model.layers[1].mlp.gate_proj
    assert torch.equal(layer.dequantize().weight, dequantize_nf4(quantize_fp4(dense, 64, True)))
    assert model.model.layers[0].mlp.gate_proj.quant_type == "nf4"


def test_what_is_left_alone_and_why() -> None:
    change = effkit.apply(llama(), NF4Config(block_size=64, skip=("layers.0.mlp", "*.v_proj")))
    left = change.edit.notes["left"]
    for reason in (
        "skip has 'layers.0.mlp'",
        "skip has '*.v_proj'",
        "model.layers.1.mlp.down_proj: 96 inputs are no multiple of block_size 64",
        "lm_head: it is the output head",
    ):
        assert reason in left
    assert len(change.matched) == 14 - 3 - 2 - 1
    assert not any("v_proj" in name or "layers.0.mlp" in name for name in change.matched)


def test_a_pattern_that_matches_nothing_is_told() -> None:
    config = NF4Config(skip=("lm_haed", "q_proj"), overrides={"mlp": {"block_size": 32}, "layers.7": None})
    change = effkit.apply(llama(), config)
    assert change.edit.notes["unused"] == "no layer matches 'lm_haed', 'layers.7'"
    assert "unused" not in effkit.apply(llama(), NF4Config(skip=("lm_head",))).edit.notes


def test_the_head_is_quantised_where_it_is_named_and_not_tied() -> None:
    named = NF4Config(overrides={"lm_head": {}})
    model = llama()
    assert "lm_head" in effkit.apply(model, named).matched and type(model.lm_head) is NF4Linear
    tied = effkit.apply(llama(tie_word_embeddings=True), named)
    assert "lm_head" not in tied.matched
    assert "lm_head: its weight is also that of model.embed_tokens" in tied.edit.notes["left"]


def test_the_head_of_a_classifier_is_left() -> None:
    sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    change = effkit.apply(BertForSequenceClassification(BertConfig(**sizes)), NF4Config())
    assert change.edit.notes["left"] == "classifier: it is the output head" and "bert.pooler.dense" in change.matched
    named = effkit.apply(BertForSequenceClassification(BertConfig(**sizes)), NF4Config(overrides={"classifier": {}}))
    assert "classifier" in named.matched


def test_a_model_without_memory_is_quantised_and_loaded_afterwards() -> None:
    dense, model = llama(), llama().to("meta")
    effkit.apply(dense, NF4Config())
    effkit.apply(model, NF4Config(keep_original=False))
    assert all(weight.sqnr_db is None for weight in quantization_report(model).weights)
    model.load_state_dict(dense.state_dict(), assign=True)
    assert same(state(model), state(dense))


def test_layers_that_a_model_keeps_in_float32_are_left() -> None:
    """T5 looks at the dtype of the weight of wo to cast what goes into it."""
    sizes = dict(vocab_size=61, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    change = effkit.apply(T5ForConditionalGeneration(T5Config(**sizes)), NF4Config())
    assert not any(name.endswith("wo") for name in change.matched)
    assert "wo and 0 more" not in change.edit.notes["left"] and "keeps it in float32" in change.edit.notes["left"]


def test_a_plain_module() -> None:
    model = Plain()
    x = torch.randn(3, 128)
    change = effkit.apply(model, NF4Config())
    assert change.matched == ["fits", "twice.0", "twice.1"]
    assert model.twice[0] is model.twice[1] and type(model.twice[1]) is NF4Linear
    assert type(model.attention.out_proj) is not NF4Linear  # its weight is used without its forward
    assert model(x).shape == (3, 5)
    change.undo()
    assert type(model.twice[1]) is nn.Linear and model.twice[0] is model.twice[1]


def test_patterns_name_whole_components() -> None:
    name = "model.layers.11.self_attn.q_proj"
    assert all(matches(p, name) for p in (name, "q_proj", "layers.11", "layers.*.self_attn", "*.q_proj", "model", "*"))
    assert not any(matches(p, name) for p in ("layers.1", "q_pro", "self_att", "layer", "*.k_proj"))


def test_overrides_count_first_and_in_order() -> None:
    config = NF4Config(skip=("mlp",), overrides={"gate_proj": {"block_size": 32}, "layers.0": None, "*": {}})
    change = effkit.apply(llama(), config)
    assert "model.layers.0.mlp.gate_proj" in change.matched and "model.layers.0.self_attn.q_proj" not in change.matched
    sizes = {name: change.model.get_submodule(name).block_size for name in change.matched}
    assert {size for name, size in sizes.items() if name.endswith("gate_proj")} == {32}
    assert {size for name, size in sizes.items() if not name.endswith("gate_proj")} == {64}


def test_a_config_is_json() -> None:
    config = FP8Config(overrides={"layers.*.mlp": {"granularity": "row"}, "k_proj": None}, skip=("q_proj",))
    assert ChangeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NF4Config(block_size=48), ValueError, "block_size is 48, expected a power of two from 32 to 4096"),
        (lambda: NF4Config(quant_type="nf5"), ValueError, "quant_type is 'nf5', choices: nf4, fp4, int4"),
        (lambda: NF4Config(double_quant="yes"), TypeError, "double_quant is 'yes'"),
        (lambda: NF4Config(skip="lm_head"), TypeError, "skip is 'lm_head', expected a tuple of patterns"),
        (lambda: NF4Config(keep_original=1), TypeError, "keep_original is 1"),
        (lambda: NF4Config(overrides={"mlp": 3}), TypeError, "overrides has 'mlp': 3"),
        (lambda: NF4Config(overrides=["mlp"]), TypeError, "overrides is"),
        (
            lambda: NF4Config(overrides={"mlp": {"bits": 3}}),
            ValueError,
            "has \\['bits'\\], choices: block_size",
        ),
        (lambda: NF4Config(overrides={"mlp": {"block_size": 5}}), ValueError, "block_size is 5"),
        (lambda: FP8Config(granularity="rows"), ValueError, "granularity is 'rows', choices: 'tensor', 'row', 'block'"),
        (lambda: FP8Config(format="e3m4"), ValueError, "format is 'e3m4', choices: 'e4m3', 'e5m2'"),
        (lambda: FP8Config(activation="channel"), ValueError, "activation is 'channel', choices: None, 'tensor'"),
        (lambda: FP8Config(recipe="best"), ValueError, "recipe is 'best', choices: None, 'tensorwise'"),
        (lambda: FP8Config(power_of_two=2), TypeError, "power_of_two is 2"),
        (
            lambda: FP8Config(recipe="rowwise", overrides={"mlp": {"recipe": None}}),
            ValueError,
            "overrides\\['mlp'\\] has recipe None, which stores weights in FP8, beside recipe 'rowwise'",
        ),
    ],
)
def test_bad_fields_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_nothing_to_quantise() -> None:
    with pytest.raises(ValueError, match="nothing in the model matches \\['Linear'\\]"):
        effkit.apply(nn.Sequential(nn.ReLU()), NF4Config())
    with pytest.raises(ValueError, match="no layer can be quantised: 0: 48 inputs are no multiple of block_size 64"):
        effkit.apply(nn.Sequential(nn.Linear(48, 4)), NF4Config())
    with pytest.raises(ValueError, match="DequantizeConfig: nothing in the model matches"):
        effkit.apply(Plain(), DequantizeConfig())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    """In a layer, and in a config behind one that would let its originals go."""
    model = llama()
    before = state(model)
    model.model.layers[1].mlp.up_proj.double()
    with pytest.raises(TypeError, match="float64"):
        effkit.apply(model, NF4Config())
    model.model.layers[1].mlp.up_proj.float()
    assert same(state(model), before) and effkit.describe(model) == [] and not hasattr(model, "hf_quantizer")
    with pytest.raises(ValueError, match="no layer can be quantised"):
        effkit.apply(model, NF4Config(keep_original=False), NF4Config(block_size=4096))
    assert same(state(model), before) and effkit.describe(model) == []


def test_without_the_originals_undo_is_refused() -> None:
    change = effkit.apply(llama(), NF4Config(keep_original=False))
    with pytest.raises(RuntimeError, match="cannot undo NF4Config: keep_original was False"):
        change.undo()
    assert "originals" not in change.edit.notes and change.edit.undo is None


def test_a_deep_copy_undoes_itself() -> None:
    for make in (llama, mixtral):
        model = make()
        original = state(model)
        effkit.apply(model, NF4Config())
        quantised = state(model)
        twin = copy.deepcopy(model)
        twin.__dict__["_effkit_changes"][-1].undo()
        assert same(state(twin), original) and same(state(model), quantised)


def test_dequantising_gives_dense_layers_with_the_same_values() -> None:
    for make in (llama, mixtral, gpt2):
        model = make()
        kinds = {name: type(module) for name, module in model.named_modules()}
        change = effkit.apply(model, NF4Config())
        quantised = copy.deepcopy(model)
        back = effkit.apply(model, DequantizeConfig())
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert set(back.matched) == set(change.matched) and not hasattr(model, "hf_quantizer")
        x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
        assert_equivalent(functools.partial(read, quantised), functools.partial(read, copy.deepcopy(model)), {"x": x})
        with pytest.raises(RuntimeError, match="DequantizeConfig was applied after it"):
            change.undo()
        back.undo()
        assert torch.equal(logits(model), logits(quantised)) and model.hf_quantizer is not None
        change.undo()


def test_dequantised_and_stacked_changes_come_back_from_a_file(tmp_path: Path) -> None:
    model = llama()
    mixed = NF4Config(skip=("mlp",)), FP8Config(skip=("self_attn",))
    effkit.apply(model, DyTConfig(), *mixed)
    assert type(model.model.layers[0].mlp.up_proj) is FP8Linear
    with pytest.raises(ValueError, match="FP8Config is the second quantisation of this model"):
        model.save_pretrained(tmp_path)
    effkit.save(model, tmp_path / "mixed")
    assert torch.equal(logits(effkit.load(tmp_path / "mixed")), logits(model))
    effkit.apply(model, DequantizeConfig(keep_original=False))
    effkit.save(model, tmp_path / "dense")
    loaded = effkit.load(tmp_path / "dense")
    assert same(state(loaded), state(model)) and len(effkit.describe(loaded)) == 4


@pytest.mark.parametrize("config", [NF4Config(), FP8Config()], ids=str)
@pytest.mark.parametrize("mixer", [LinearAttentionConfig(), GatedLinearAttentionConfig()], ids=str)
def test_recurrent_attention_after_quantising(config: ChangeConfig, mixer: ChangeConfig, tmp_path: Path) -> None:
    """Its parameters have the dtype that the projections compute in, not that of their codes or scales."""
    first, last = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16)
    effkit.apply(first, config, mixer)
    effkit.apply(last, mixer)
    assert {p.dtype for name, p in first.named_parameters() if ".mixer." in name} == {
        p.dtype for name, p in last.named_parameters() if ".mixer." in name
    }
    assert logits(first).dtype == torch.bfloat16 and logits(first).isfinite().all()
    effkit.save(first, tmp_path)
    assert torch.equal(logits(effkit.load(tmp_path)), logits(first))


def test_tied_weights_and_dtypes_survive_a_file(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    effkit.apply(model, NF4Config(keep_original=False))
    effkit.save(model, tmp_path)
    loaded: Any = effkit.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same(state(loaded), state(model)) and torch.equal(logits(loaded), logits(model))
    effkit.apply(loaded, DequantizeConfig())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_file_that_lacks_a_scale_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    effkit.apply(model, NF4Config())
    effkit.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_absmax"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"up_proj\.weight_absmax"):
        effkit.load(tmp_path)


def experts_pair(config: ChangeConfig) -> tuple[Any, Any]:
    """Quantised experts, and dense ones of the same values, as transformers computes them one by one."""
    model = mixtral()
    effkit.apply(model, config)
    quantised = model.model.layers[0].mlp.experts
    dense = quantised.dequantize()
    assert type(quantised) is QuantizedExperts and type(dense) is MixtralExperts
    return quantised, dense


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_experts_compute_what_dense_ones_do(config: ChangeConfig) -> None:
    """Values and gradients, also for tokens of no expert here and experts of no token."""
    quantised, dense = experts_pair(config)
    index = torch.tensor([[0, 2], [2, 0], [0, 4], [4, 4], [2, 0]])

    def through(experts: Any) -> Any:
        return lambda x, weights: experts.to(x.dtype)(x, index, weights)

    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(5, 64, generator=generator), "weights": torch.rand(5, 2, generator=generator)}
    assert_equivalent(through(quantised), through(dense), inputs, grads=("x", "weights"))


def test_experts_dequantise_only_what_a_token_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised, _ = experts_pair(NF4Config())
    seen: list[int] = []
    forward = NF4Linear.forward
    monkeypatch.setattr(NF4Linear, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    quantised(torch.randn(3, 64), torch.tensor([[1, 3], [3, 1], [1, 3]]), torch.ones(3, 2))
    assert seen == [3, 3, 3, 3]  # two experts, each up and down, three tokens


def test_experts_keep_little_for_the_backward_pass() -> None:
    quantised, _ = experts_pair(NF4Config())
    x = torch.randn(4, 64, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        quantised(x, torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert max(saved.values()) < 64 * 64 * 4  # no dense weight of an expert


def test_experts_are_never_cast() -> None:
    quantised, _ = experts_pair(FP8Config())
    before = state(quantised)
    assert same(state(quantised.to(torch.float16)), before) and same(state(quantised.to("cpu")), before)
    assert quantised.dequantize().down_proj.dtype == torch.float16
    assert quantised(torch.randn(2, 64).half(), torch.tensor([[0], [1]]), torch.ones(2, 1).half()).dtype == torch.half


@pytest.mark.parametrize(("name", "dtype"), [("down_proj", torch.float32), ("gate_up_proj_absmax", torch.float16)])
def test_experts_refuse_tensors_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    quantised, _ = experts_pair(NF4Config())
    given = quantised.state_dict()
    with pytest.raises(RuntimeError, match=f"{name} has dtype {dtype}, expected"):
        quantised.load_state_dict(given | {name: given[name].to(dtype)})


def test_experts_of_another_layout_are_left() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    own = dict(intermediate_size=64, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    change = effkit.apply(GptOssForCausalLM(GptOssConfig(**SIZES, **own)), NF4Config())
    assert "mlp.experts: its experts have more parameters" in change.edit.notes["left"]
    assert not any("experts" in name for name in change.matched)


def test_training_recipes_keep_the_weights(tmp_path: Path) -> None:
    """The parameters stay the same objects, so that an optimizer goes on; nothing is quantised in files."""
    model = llama()
    parameters = dict(model.named_parameters())
    change = effkit.apply(model, FP8Config(recipe="delayed"))
    assert all(parameters[name] is p for name, p in model.named_parameters()) and not hasattr(model, "hf_quantizer")
    F.cross_entropy(model(input_ids=IDS).logits[0], IDS[0]).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None and not quantization_report(model).weights
    effkit.save(model, tmp_path)
    assert same(state(effkit.load(tmp_path)), state(model))
    change.undo()
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_lora_shaped_training_beside_quantised_weights() -> None:
    model = llama(intermediate_size=128)
    effkit.apply(model, NF4Config())
    F.cross_entropy(model(input_ids=IDS).logits[0], IDS[0]).backward()
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "model.embed_tokens.weight" in with_gradients and not any("_proj" in name for name in with_gradients)


def test_the_report_counts_every_byte() -> None:
    for make in (llama, mixtral):
        dense = make()
        model = make()
        change = effkit.apply(model, NF4Config(double_quant=True))
        report = quantization_report(model)
        assert report.bytes == sum(p.nbytes for p in model.parameters()) == change.after.bytes
        assert report.parameters == sum(p.numel() for p in dense.parameters())
        assert json.loads(json.dumps(effkit.describe(model)))[0]["notes"] == change.edit.notes
        for weight in report.weights:
            exact = dense.get_parameter(weight.name).detach().double()
            assert weight.format == "nf4" and weight.shape == exact.shape
            name, _, parameter = weight.name.rpartition(".")
            module: Any = model.get_submodule(name)
            given = module.dequantize().get_parameter(parameter).detach().double()
            noise = 20 * torch.log10(exact.norm() / (exact - given).norm())
            assert weight.sqnr_db is not None and abs(weight.sqnr_db - float(noise)) < 1e-3
        assert f"{report.bits_per_parameter:.3f} a quantised parameter" == change.edit.notes["bits"]
        text = str(report)
        assert all(weight.name in text for weight in report.weights) and "nf4" in text


def test_the_report_of_zeros_and_of_what_is_no_number() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 8))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[2].weight, math.nan)
    notes = effkit.apply(model, NF4Config()).edit.notes
    finite, zeros, lost = (weight.sqnr_db for weight in quantization_report(model).weights)
    assert finite is not None and 15 < finite < 30 and zeros == math.inf and lost is not None and math.isnan(lost)
    assert notes["SQNR"].endswith("nan dB in 2.weight")


def test_bits_per_parameter_of_a_large_layer() -> None:
    """4 + 32 / 64 bits, and with double quantisation 4 + 8 / 64 + 32 / (64 * 256), the offset of 32 bits apart."""
    layer = nn.Sequential(nn.Linear(1024, 256, bias=False))
    for config, bits, more in ((NF4Config(), 4.5, 0), (NF4Config(double_quant=True), 4 + 1 / 8 + 1 / 512, 32)):
        change = effkit.apply(layer, config)
        assert quantization_report(layer).bits_per_parameter == bits + more / (1024 * 256)
        change.undo()
    assert quantize_nf4(layer[0].weight).nbytes * 8 == 4.5 * 1024 * 256
