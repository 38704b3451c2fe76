"""4-bit checkpoints between effkit and bitsandbytes with transformers: each reads what the other has written.

bitsandbytes runs in processes of its own: transformers takes it wherever it can be imported. There, two methods of
transformers are replaced that ask for a further package, which placing a model on devices would need, not this.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import effkit
from effkit.hf import bitsandbytes_state_dict, load_bitsandbytes, load_bitsandbytes_state_dict, save_bitsandbytes
from effkit.hf.bitsandbytes import read_state_dict, to_bitsandbytes
from effkit.quant import NF4Config, NF4Linear, Quantized4bit, dequantize_nf4

PACKAGES = Path(sys.prefix) / "peers"
if importlib.util.find_spec("bitsandbytes") is None and not (PACKAGES / "bitsandbytes").exists():
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
IDS = torch.arange(1, 9)[None]
THEIRS = """
import copy, sys
from pathlib import Path
import torch, bitsandbytes
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

Bnb4BitHfQuantizer.validate_environment = lambda self, *args, **kwargs: None
Bnb4BitHfQuantizer.update_device_map = lambda self, device_map: device_map

def dense_values(weight):
    # As one row: where blocks straddle rows, its code for the CPU begins a block with each row, which none has done.
    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return bitsandbytes.functional.dequantize_4bit(weight.data, state).view(shape)

def write_dense_values(model, path):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    save_file({f"{name}.weight": dense_values(m.weight) for name, m in layers.items()}, path)
"""
WRITE = """
folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
dense = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32)).to(torch.bfloat16)
dense.save_pretrained(folder / "dense")
for kind in ("nf4", "fp4"):
    for double in (False, True):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
        model = LlamaForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
        model.save_pretrained(folder / f"{kind}-{double}")
        write_dense_values(model, folder / f"{kind}-{double}" / "values.safetensors")
for storage in (torch.uint8, torch.float32):
    layer = bitsandbytes.nn.Linear4bit(128, 16, quant_type="fp4", compress_statistics=True, quant_storage=storage)
    save_file(layer.to("cpu").state_dict(), folder / f"layer-{storage}.safetensors")
"""
READ = """
for path in map(Path, sys.argv[1:]):
    model = LlamaForCausalLM.from_pretrained(path)
    write_dense_values(model, path / "values.safetensors")
    save_file(model.state_dict(), path / "theirs.safetensors")
"""


def run_theirs(code: str, *arguments: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", THEIRS + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=arguments[0].parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that bitsandbytes has written: a dense model, and that model in each kind of 4 bits."""
    folder = tmp_path_factory.mktemp("bitsandbytes") / "models"
    run_theirs(WRITE, folder)
    return folder


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_what_they_wrote_is_read_bit_for_bit(written: Path, kind: str, double: bool, tmp_path: Path) -> None:
    """Values, and every tensor under its key when it is written again, also after inference."""
    folder = written / f"{kind}-{double}"
    values, stored = load_file(folder / "values.safetensors"), load_file(folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"blocks straddle rows: model\.layers\.0\.mlp\.down_proj\.weight"):
        model = load_bitsandbytes(folder)
    for name, value in values.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        dense = module.dequantize() if isinstance(module, NF4Linear) else module
        assert torch.equal(dense.weight, value) and dense.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model(input_ids=IDS)
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    for key, tensor in stored.items():
        if "down_proj" not in key:
            assert torch.equal(again[key], tensor) and again[key].shape == tensor.shape, key
    assert not any("down_proj.weight." in key for key in again)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_state_dict_is_read_and_written_byte_for_byte(written: Path, kind: str, double: bool) -> None:
    """Also tensors whose blocks straddle rows."""
    stored = load_file(written / f"{kind}-{double}" / "model.safetensors")
    values = load_file(written / f"{kind}-{double}" / "values.safetensors")
    quantized, others = read_state_dict(stored)
    assert quantized.keys() == values.keys() and others.keys().isdisjoint(quantized)
    for name, q in quantized.items():
        assert torch.equal(dequantize_nf4(q), values[name]) and (q.nested is not None) == double
    assert same(stored, others | written_back(quantized))


def test_other_storage_dtypes_hold_the_same_bytes(written: Path) -> None:
    """The codes seen as float32, for the sake of sharding; a layer of its own, with a bias."""
    layers = [nn.Sequential(nn.Linear(128, 16)) for _ in range(2)]
    for layer, storage in zip(layers, (torch.uint8, torch.float32), strict=True):
        stored = load_file(written / f"layer-{storage}.safetensors")
        assert stored["weight"].dtype == storage
        load_bitsandbytes_state_dict(layer, {f"0.{key}": tensor for key, tensor in stored.items()})
        assert isinstance(layer[0], NF4Linear) and layer[0].double_quant and layer[0].quant_type == "fp4"
        assert torch.equal(layer[0].bias, stored["bias"])
        again = bitsandbytes_state_dict(layer)
        assert torch.equal(again["0.weight"], stored["weight"].view(torch.uint8).view(-1, 1))


def test_what_is_written_here_they_read(written: Path, tmp_path: Path) -> None:
    """A model quantised here, of each kind: their values are these, and they hold the same tensors."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for kind, double in KINDS:
        model = AutoModelForCausalLM.from_pretrained(written / "dense")
        effkit.apply(model, NF4Config(quant_type=kind, double_quant=double, skip=("o_proj",)))
        folders[tmp_path / f"{kind}-{double}"] = model
        save_bitsandbytes(model, tmp_path / f"{kind}-{double}")
        assert model.hf_quantizer.quantization_config.quant_method == "effkit_nf4"  # it stays what it was
    run_theirs(READ, *folders)
    for folder, model in folders.items():
        layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
        values = load_file(folder / "values.safetensors")
        assert {name.removesuffix(".weight") for name in values} == layers.keys()
        assert all(torch.equal(values[f"{name}.weight"], layer.dequantize().weight) for name, layer in layers.items())
        assert same(load_file(folder / "model.safetensors"), load_file(folder / "theirs.safetensors"))


def written_back(quantized: dict[str, Quantized4bit]) -> dict[str, Tensor]:
    return {key: tensor for name, q in quantized.items() for key, tensor in to_bitsandbytes(q, name).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        tensor.dtype == b[key].dtype and tensor.shape == b[key].shape and torch.equal(tensor, b[key])
        for key, tensor in a.items()
    )
