"""bitsandbytes' format without bitsandbytes: what is refused, and that a refusal changes nothing.

tests/peers/test_bitsandbytes_files.py compares with the library itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import effkit
from effkit.hf import bitsandbytes_state_dict, load_bitsandbytes, load_bitsandbytes_state_dict, save_bitsandbytes
from effkit.hf.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from effkit.quant import DequantizeConfig, FP8Config, NF4Config, NF4Linear, dequantize_nf4, quantize_int4, quantize_nf4

SIZES = dict(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
STATE = "0.weight.quant_state.bitsandbytes__nf4"


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    own = dict(intermediate_size=64, max_position_embeddings=32, tie_word_embeddings=True)
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**SIZES | own | options)).eval()


def stored(double: bool = False) -> dict[str, Tensor]:
    """The state dict of one layer, 128 to 16 with bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16))
    effkit.apply(model, NF4Config(double_quant=double))
    return bitsandbytes_state_dict(model)


def as_json(values: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def with_state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Changes values in the JSON object; None takes one out."""

    def edit(tensors: dict[str, Tensor]) -> None:
        values = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = as_json({key: value for key, value in values.items() if value is not None})

    return edit


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


def replaced(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, make(tensors[key]))


def test_the_format_is_as_documented() -> None:
    tensors = stored(double=True)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if key != STATE} == {
        "0.bias": (torch.float32, (16,)),
        "0.weight": (torch.uint8, (1024, 1)),
        "0.weight.absmax": (torch.uint8, (32,)),
        "0.weight.quant_map": (torch.float32, (16,)),
        "0.weight.nested_absmax": (torch.float32, (1,)),
        "0.weight.nested_quant_map": (torch.float32, (256,)),
    }
    text = bytes(tensors[STATE].tolist()).decode()
    assert text.startswith(
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [16, 128], "nested_blocksize": 256, '
        '"nested_dtype": "float32", "nested_offset": 0.0'
    )
    assert len(stored()[STATE]) == len('{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [16, 128]}')


@pytest.mark.parametrize("shape", [(16, 128), (3, 5), (7,), (2, 33, 2)])
@pytest.mark.parametrize("double", [False, True])
def test_every_shape_comes_back(shape: tuple[int, ...], double: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantize_nf4(x, 64, double)
    again = from_bitsandbytes(to_bitsandbytes(q))
    assert again.shape == q.shape and again.dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(again), dequantize_nf4(q))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without("0.weight"), "the checkpoint has no 0.weight: it is incomplete"),
        (without("0.weight.absmax"), "the checkpoint has no 0.weight.absmax: it is incomplete"),
        (without("0.weight.quant_map"), "the checkpoint has no 0.weight.quant_map"),
        (without("0.weight.nested_absmax"), "the checkpoint has no 0.weight.nested_absmax"),
        (without("0.weight.nested_quant_map"), "the checkpoint has no 0.weight.nested_quant_map"),
        (without("0.bias"), r"1 tensors do not fit the model, the first is 0.bias: shape None, expected \(16,\)"),
        (without(STATE), "the checkpoint has 0.weight.absmax but no 0.weight.quant_state.bitsandbytes__nf4 or fp4"),
        (replaced("0.weight", lambda t: t[:5]), "0.weight has 5 elements, expected 1024 for the shape"),
        (replaced("0.weight.absmax", lambda t: t[:5]), "0.weight.absmax has 5 elements, expected 32"),
        (replaced("0.weight.absmax", Tensor.float), "0.weight.absmax has dtype torch.float32, expected torch.uint8"),
        (replaced("0.weight.nested_absmax", lambda t: t[:0]), "nested_absmax has 0 elements, expected 1"),
        (replaced("0.weight.quant_map", lambda t: t * 2), "0.weight.quant_map is another table than that of its type"),
        (replaced("0.weight.nested_quant_map", Tensor.abs), "0.weight.nested_quant_map is another table"),
        (replaced(STATE, lambda t: t[:20]), "bitsandbytes__nf4 holds no JSON"),
        (replaced(STATE, Tensor.float), "bitsandbytes__nf4 holds no JSON"),
        (replaced("0.weight.nested_absmax", Tensor.int), "nested_absmax has dtype torch.int32, expected torch.float32"),
        (replaced(STATE, lambda t: as_json({"a": 1})), r"bitsandbytes__nf4 has \['a'\], expected \['blocksize'"),
        (with_state(quant_type="nf5"), "quant_type is 'nf5', expected that of the key"),
        (with_state(dtype="float64"), "dtype is 'float64', choices: float32, float16, bfloat16"),
        (with_state(dtype=["float32"]), r"dtype is \['float32'\], choices: float32, float16, bfloat16"),
        (with_state(nested_dtype="x"), "nested_dtype is 'x', choices: float32, float16, bfloat16"),
        (with_state(nested_offset="0"), "nested_offset is '0', expected a number"),
        (with_state(nested_offset=[16]), r"nested_offset is \[16\], expected a number"),
        (with_state(shape=2048), "shape is 2048, expected a list of sizes"),
        (with_state(shape=[-16, -128]), r"shape is \[-16, -128\], expected a list of sizes"),
        (with_state(shape=[16.0, 128.0]), r"shape is \[16.0, 128.0\], expected a list of sizes"),
        (with_state(blocksize=48), "blocksize is 48, expected a power of two from 32 to 4096"),
        (with_state(shape=[16, 64]), "0.weight has 1024 elements, expected 512 for the shape"),
        (with_state(shape=[32, 64]), "tensors do not fit the model"),
        (with_state(nested_blocksize=128), "nested_blocksize is 128, expected 256"),
        (with_state(nested_offset=None), r"has \['blocksize', 'dtype', 'nested_blocksize'"),
    ],
)
def test_what_is_broken_is_named_and_changes_nothing(
    break_it: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = stored(double=True)
    break_it(tensors)
    model = nn.Sequential(nn.Linear(128, 16))
    before, layer = {key: tensor.clone() for key, tensor in model.state_dict().items()}, model[0]
    with pytest.raises(ValueError, match=message):
        load_bitsandbytes_state_dict(model, tensors)
    assert model[0] is layer and effkit.describe(model) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_unknown_type_in_a_key() -> None:
    tensors = stored()
    tensors["0.weight.quant_state.bitsandbytes__int8"] = tensors.pop(STATE)
    with pytest.raises(ValueError, match=r"expected one of \['0.weight.quant_state.bitsandbytes__nf4', "):
        load_bitsandbytes_state_dict(nn.Sequential(nn.Linear(128, 16)), tensors)


def test_a_name_stands_for_one_layer_alone() -> None:
    """One of several components may end in another's name, or begin with it."""

    def make() -> nn.Sequential:
        linear = (nn.Linear(64, 64) for _ in range(4))
        deep = nn.Sequential(next(linear), nn.Sequential(next(linear), next(linear)))
        return nn.Sequential(next(linear), nn.Identity(), deep)

    model, again = make(), make()
    effkit.apply(model, NF4Config(overrides={"2.1.0": {}, "2.1.1": None, "2.0": None, "0": {}}))
    load_bitsandbytes_state_dict(again, bitsandbytes_state_dict(model))
    kinds = {name: type(module) for name, module in again.named_modules() if isinstance(module, nn.Linear)}
    assert kinds == {"0": NF4Linear, "2.0": nn.Linear, "2.1.0": NF4Linear, "2.1.1": nn.Linear}


def test_the_storage_that_config_json_names_is_that_of_the_codes(tmp_path: Path) -> None:
    model = llama()
    effkit.apply(model, NF4Config())
    save_bitsandbytes(model, tmp_path / "1")
    path = tmp_path / "1" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "1" / "model.safetensors")
    codes = [key.removesuffix(".absmax") for key in tensors if key.endswith(".absmax")]
    for key in codes:
        tensors[key] = tensors[key].flatten().view(torch.bfloat16)[:, None]
    save_file(tensors, tmp_path / "1" / "model.safetensors", {"format": "pt"})
    load_bitsandbytes(tmp_path / "1").save_pretrained(tmp_path / "2")
    again = load_file(tmp_path / "2" / "model.safetensors")
    assert codes and all(again[key].dtype == torch.bfloat16 for key in codes)
    assert again.keys() == tensors.keys() and all(again[key].shape == tensors[key].shape for key in again)
    assert all(torch.equal(again[key].view(torch.uint8), tensors[key].view(torch.uint8)) for key in codes)


@pytest.mark.parametrize("double", [False, True])
def test_a_model_through_its_folder(double: bool, tmp_path: Path) -> None:
    """Tied weights, generation settings, effkit.save, inference in between: the same tensors all the way."""
    model = llama()
    model.generation_config.max_new_tokens = 17
    effkit.apply(model, NF4Config(double_quant=double))
    save_bitsandbytes(model, tmp_path / "1")
    loaded = load_bitsandbytes(tmp_path / "1")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.generation_config.max_new_tokens == 17 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {key: tensor.dtype for key, tensor in loaded.state_dict().items()} == {
        key: tensor.dtype for key, tensor in model.state_dict().items()
    }
    loaded.save_pretrained(tmp_path / "2")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in "12"]
    assert configs[0] == configs[1] and configs[0]["quant_method"] == "bitsandbytes"
    effkit.save(loaded, tmp_path / "3")
    again: Any = effkit.load(tmp_path / "3")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    loaded.dequantize()
    effkit.apply(model, DequantizeConfig())
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_what_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="the model has no NF4Linear"):
        save_bitsandbytes(model, tmp_path)
    change = effkit.apply(model, NF4Config(quant_type="int4"))
    with pytest.raises(ValueError, match=r"q_proj\.weight is int4, which bitsandbytes does not know; choices: nf4"):
        save_bitsandbytes(model, tmp_path)
    assert model.hf_quantizer.quantization_config.quant_type == "int4"
    change.undo()
    change = effkit.apply(model, NF4Config(overrides={"mlp": {"block_size": 32}}))
    with pytest.raises(ValueError, match="weights have 2 combinations of block size, double quantisation and type"):
        save_bitsandbytes(model, tmp_path)
    change.undo()
    effkit.apply(model, NF4Config(skip=("mlp",)), FP8Config(skip=("self_attn",)))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj is a FP8Linear, for which bitsandbytes has no format"):
        save_bitsandbytes(model, tmp_path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, NF4Linear)
    with pytest.raises(ValueError, match="weight is int4"):
        to_bitsandbytes(quantize_int4(torch.randn(64)))


def test_folders_of_another_kind(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config is None, expected bitsandbytes' with load_in_4bit"):
        load_bitsandbytes(tmp_path)
    effkit.apply(model, NF4Config())
    save_bitsandbytes(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights of LlamaForCausalLM: .*model\.norm\.weight"):
        load_bitsandbytes(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architectures is None"):
        load_bitsandbytes(tmp_path)
