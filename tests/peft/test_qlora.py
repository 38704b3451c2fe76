"""QLoRA: LoRA on layers in four or eight bits, in training, merged, in files."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import effkit
from effkit.peft import (
    LoRAConfig,
    MergeConfig,
    activate,
    active_adapters,
    adapter_names,
    delete_adapter,
    disabled,
    merge,
    merge_and_unload,
    save_adapter,
    set_scale,
    unmerge,
)
from effkit.quant import DequantizeConfig, FP8Config, FP8Linear, NF4Config, NF4Linear, quantization_report
from effkit.testing import assert_equivalent

LORA = LoRAConfig(rank=3, alpha=6, target_modules="all-linear", init="random")
BASES = [
    NF4Config(block_size=32),
    NF4Config(block_size=32, double_quant=True),
    FP8Config(granularity="row"),
]
each_base = pytest.mark.parametrize("base", BASES, ids=["nf4", "nf4, double", "fp8"])
WIDE = dict(hidden_size=64, intermediate_size=64)  # whole blocks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The bytes of all quantised weights and their scales."""
    return {
        name: parameter.detach().clone().view(torch.uint8)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and "_proj.weight" in name
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_base
def test_equals_lora_on_the_dequantized_weight(base, dtype):
    """y, and the gradients of x, A and B."""
    model = nn.Sequential(nn.Linear(64, 40))
    effkit.apply(model, base, LORA)
    layer = model[0]
    dense = layer.dequantize()

    def quantized(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        values = {"adapters.default.lora_A": a, "adapters.default.lora_B": b}
        return torch.func.functional_call(layer, values, (x,))

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, dense.weight.detach().to(x.dtype), dense.bias.detach().to(x.dtype))
        return y + (2 * (x @ a.T)) @ b.T

    factors = (part.detach().to(dtype) for part in (layer.adapters["default"].lora_A, layer.adapters["default"].lora_B))
    assert_equivalent(quantized, reference, (random(2, 9, 64).to(dtype), *factors))


@each_base
def test_keeps_x_and_what_has_the_rank(base):
    """Beside the packed weight: 2 T (K + R) bytes in half precision, no dense weight."""
    model = nn.Sequential(nn.Linear(128, 96, bias=False))
    effkit.apply(model, base, LORA)
    x = random(11, 128).bfloat16().requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.ndim and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sum(kept.values()) == 2 * 11 * (128 + 3)


@each_base
def test_training_moves_the_factors_alone(make, ids, base):
    model = make("llama", **WIDE).bfloat16()
    effkit.apply(model, base, LoRAConfig(rank=4, target_modules="all-linear", dropout=0.1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("adapters" in name and p.dtype == torch.float32 for name, p in trained.items())
    before = codes(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = []
        for _ in range(8):
            loss = model.train()(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert before and codes(model).keys() == before.keys()
    assert_same(codes(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_base
def test_merged_equals_unmerged(base, dtype):
    """A merged layer is dense, of the layer's dtype, with the dequantised weight plus the update, rounded once."""
    model = nn.Sequential(nn.Linear(64, 40)).to(dtype)
    effkit.apply(model, base, LORA)
    layer, x = model[0], random(9, 64).to(dtype)
    report = merge(model)
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype and report.layers["0"].kind == "Linear"

    def unmerged(x: Tensor) -> Tensor:
        factors = {name: p.detach().to(x.dtype) for name, p in layer.named_parameters() if "lora" in name}
        return torch.func.functional_call(layer, factors, (x,))

    assert_equivalent(lambda x: model[0](x), unmerged, (x,), grads=False)
    unmerge(model)
    assert model[0] is layer


def merged_into_four_bits(ratio: float, requantize: bool) -> float | tuple[float, float]:
    """Share kept and error of an update of this size against a Gaussian weight, which is in half precision."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(random(256, 256, seed=1))
    model.bfloat16()
    effkit.apply(model, NF4Config(), LoRAConfig(rank=16, target_modules=("0",), init="random"))
    adapter, base = model[0].adapters["default"], model[0].dequantize().weight.float()
    with torch.no_grad():
        adapter.lora_B *= ratio * base.norm() / (adapter.lora_B @ adapter.lora_A).norm()
    row = merge(model, requantize=requantize).layers["0"]
    assert row.kind == ("NF4Linear" if requantize else "Linear")
    # What the report says, from what is there.
    update = adapter.lora_B @ adapter.lora_A
    new = model[0].dequantize().weight if requantize else model[0].weight
    error = ((new.float() - base - update).norm() / update.norm()).item()
    assert_equivalent(lambda _: torch.tensor(row.error), lambda x: torch.tensor(error, dtype=x.dtype), (update,), False)
    return row.kept, row.error


def test_four_bits_forget_small_updates():
    """Why merging gives a layer in 16 bits: of an update of 3 % of the weight 4 bits keep next to nothing."""
    kept = {ratio: merged_into_four_bits(ratio, True)[0] for ratio in (0.3, 0.1, 0.03)}
    assert kept[0.03] < 0.1 < 0.8 < kept[0.1] < 0.9 < kept[0.3] < 1
    share, error = merged_into_four_bits(0.03, False)
    assert share > 0.99 and error <= 0.06


def test_requantized_for_a_while_and_for_good(make, ids, tmp_path):
    """The format is that of the layer; unmerge gives back every byte."""
    model = make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32, double_quant=True, quant_type="fp4"), LORA)
    expected, before = logits(model, ids), codes(model)
    merge(model, requantize=True)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is NF4Linear
    assert (layer.block_size, layer.double_quant, layer.quant_type) == (32, True, "fp4")
    assert codes(model).keys() == {name for name in before if "adapters" not in name}
    unmerge(model)
    assert_same(codes(model), before)
    assert torch.equal(logits(model, ids), expected)
    merge_and_unload(model, requantize=True)
    assert quantization_report(model).weights and adapter_names(model) == []
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "transformers")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "transformers"), ids), expected)


@each_base
def test_conv1d_requantized(make, ids, base):
    """GPT-2's layers, whose weights are transposed, and which can be taken out of their codes again."""
    model = make("gpt2", n_embd=64)
    effkit.apply(model, base, LORA)
    expected = logits(model, ids)
    report = merge(model, requantize=True)
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) in (NF4Linear, FP8Linear) and (layer.in_features, layer.out_features) == (64, 256)
    assert all(row.error < 1 for row in report.layers.values())
    unmerge(model)
    assert torch.equal(logits(model, ids), expected)
    merge_and_unload(model, requantize=True)
    weight = model.transformer.h[0].mlp.c_fc.dequantize().weight
    effkit.apply(model, DequantizeConfig())
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is Conv1D and torch.equal(layer.weight, weight.T)


def test_fp8_requantized():
    model = nn.Sequential(nn.Linear(64, 40))
    effkit.apply(model, FP8Config(granularity="row", format="e5m2", power_of_two=True), LORA)
    merge_and_unload(model, requantize=True)
    assert type(model[0]) is FP8Linear
    assert (model[0].granularity, model[0].format, model[0].power_of_two) == ("row", "e5m2", True)


@each_base
def test_saved_and_loaded(make, ids, base, tmp_path):
    """effkit.save keeps an adapted model as it is, and a merged one as a dense one."""
    model = make("llama", **WIDE)
    for parameter in model.parameters():  # not the frequencies of the positions, which no file holds
        parameter.data = parameter.data.bfloat16()
    dense = logits(model, ids)
    change = effkit.apply(model, base, LORA)
    expected = logits(model, ids)
    effkit.save(model, tmp_path / "adapted")
    again = effkit.load(tmp_path / "adapted")
    assert torch.equal(logits(again, ids), expected)
    assert_same(codes(again), codes(model))
    with disabled(model), disabled(again):
        assert torch.equal(logits(again, ids), logits(model, ids))
    twin = copy.deepcopy(model)
    merge_and_unload(twin)
    effkit.save(twin, tmp_path / "merged")
    assert torch.equal(logits(effkit.load(tmp_path / "merged"), ids), logits(twin, ids))
    change.undo()
    assert torch.equal(logits(model, ids), dense)


def test_what_is_on_is_saved(make, ids, tmp_path):
    """Which of several adapters is on, and how much of it; merged for good, which layers are dense after that."""
    model = make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32), replace(LORA, name="a", target_modules=("q_proj",)))
    effkit.apply(model, replace(LORA, name="b", seed=1))
    activate(model, "a")
    set_scale(model, 0.5)
    expected = logits(model, ids)
    effkit.save(model, tmp_path / "adapted")
    again = effkit.load(tmp_path / "adapted")
    assert active_adapters(again) == ["a"] and torch.equal(logits(again, ids), expected)
    with pytest.raises(ValueError, match=r"names is \(\), but the model has several adapters; choices: \['a', 'b'\]"):
        effkit.apply(model, MergeConfig())
    merge_and_unload(model)
    effkit.save(model, tmp_path / "merged")
    again = effkit.load(tmp_path / "merged")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(again.model.layers[0].self_attn.k_proj) is NF4Linear


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("base", [None, *BASES[1:]], ids=["dense", "nf4, double", "fp8"])
def test_merged_for_good_is_a_plain_model(make, ids, kind, tied, base, tmp_path):
    """save_pretrained of a merged model holds dense weights alone: transformers loads it, and needs nothing else."""
    sizes = dict(n_embd=64) if kind == "gpt2" else WIDE
    model = make(kind, tie_word_embeddings=tied, **sizes)
    plain = dict(model.named_parameters()).keys()
    effkit.apply(model, *[base] * (base is not None), LORA)
    assert getattr(model.config, "quantization_config", None) is None or base is not None
    merge_and_unload(model)
    expected = logits(model, ids)
    assert dict(model.named_parameters()).keys() == plain
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), expected)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("form", ["effkit nf4", "effkit fp8", "bitsandbytes"])
def test_merged_in_part(make, ids, form, tmp_path):
    """Layers without adapters stay in their format: config.json says which are dense, and the file loads again."""
    model = make("llama", **WIDE)
    effkit.apply(model, FP8Config() if form == "effkit fp8" else NF4Config(block_size=64))
    if form == "bitsandbytes":
        effkit.hf.save_bitsandbytes(model, tmp_path)
        model = effkit.hf.load_bitsandbytes(tmp_path)
    effkit.apply(model, replace(LORA, target_modules=("q_proj", "v_proj")))
    merge(model)
    with pytest.raises(ValueError, match="adapters are merged for a while"):
        model.save_pretrained(tmp_path)
    merge_and_unload(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    load = effkit.hf.load_bitsandbytes if form == "bitsandbytes" else type(model).from_pretrained
    again = load(tmp_path)
    assert torch.equal(logits(again, ids), expected)
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(again.model.layers[0].self_attn.k_proj) is type(model.model.layers[0].self_attn.k_proj) is not nn.Linear


def test_save_pretrained_of_an_adapted_model(make, ids, tmp_path):
    """The base comes back, in four bits; the adapter does not: it is saved by save_adapter, or all by effkit.save."""
    model = make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32), LORA)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {name for name in model.state_dict() if "adapters" in name}
    assert not info["missing_keys"]
    with disabled(model):
        assert torch.equal(logits(again, ids), logits(model, ids))


def test_order_of_changes(make, ids, tmp_path):
    """Quantise before adapting; nothing takes adapters away without saying so."""
    model = make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32), LORA)
    expected = logits(model, ids)
    for call in (
        lambda: effkit.apply(model, DequantizeConfig()),
        lambda: model.dequantize(),
        lambda: effkit.hf.save_bitsandbytes(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj .* adapters"):
            call()
        assert torch.equal(logits(model, ids), expected)
    delete_adapter(model, "default")
    effkit.apply(model, DequantizeConfig())
    effkit.apply(model, LoRAConfig(target_modules=("q_proj",), modules_to_save=("lm_head",)))
    change = effkit.apply(model, NF4Config(block_size=32, overrides={"lm_head": {}}))
    assert not any("q_proj" in name or "lm_head" in name for name in change.matched)


def test_the_adapter_alone(make, ids, tmp_path):
    """An adapter that was trained beside four bits fits the dense model, too."""
    model, dense = make("llama", **WIDE), make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32), LORA)
    save_adapter(model, tmp_path)
    effkit.peft.load_adapter(dense, tmp_path)
    effkit.peft.load_adapter(again := quantized(make), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not torch.equal(logits(dense, ids), logits(model, ids))
    parts = [effkit.peft.adapters_of(m, "default") for m in (dense, model)]
    assert all(torch.equal(part.lora_B, parts[1][path].lora_B) for path, part in parts[0].items())


def quantized(make) -> nn.Module:
    model = make("llama", **WIDE)
    effkit.apply(model, NF4Config(block_size=32))
    return model
