"""Adapters in peft's folder format, against folders written by hand: nothing here needs peft (tests/peers does)."""

from __future__ import annotations

import copy
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import effkit
from effkit.peft import (
    LoRAConfig,
    SingLoRAConfig,
    VeRAConfig,
    activate,
    active_adapters,
    adapter_names,
    adapters_of,
    advance_ramp,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    set_scale,
)
from effkit.peft.dora import DoRAConfig
from effkit.peft.ia3 import IA3Config
from effkit.quant import NF4Config, NF4Linear
from effkit.testing import assert_equivalent

LLAMA = "base_model.model.model.layers.{}."
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
SIZES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (48, 32)}  # (in, out)
ENDS = ["q_proj", "v_proj", "down_proj"]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ENDS}


def draw(*shape: int, seed: str = "") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode()))) / 4


def write(folder: Path, said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def each_layer() -> Any:
    """(key of the layer, its name, inputs, outputs) of every layer that LORA targets."""
    for i in range(2):
        for layer in LAYERS:
            yield LLAMA.format(i) + layer, f"model.layers.{i}.{layer}", *SIZES[layer]


def lora(rank: int = 4, seed: str = "") -> dict[str, torch.Tensor]:
    shapes = {f"{key}.lora_A.weight": (rank, K) for key, _, K, _ in each_layer()}
    shapes |= {f"{key}.lora_B.weight": (M, rank) for key, _, _, M in each_layer()}
    return {key: draw(*shape, seed=key + seed) for key, shape in shapes.items()}


def judge(mine: nn.Module, theirs: nn.Module, ids: torch.Tensor) -> None:
    """Logits, times a factor so that there is something to differentiate."""
    double = {id(model): copy.deepcopy(model).double() for model in (mine, theirs)}

    def logits(model: nn.Module) -> Any:
        return lambda factor: factor * (model if factor.dtype == torch.float32 else double[id(model)])(ids).logits

    assert_equivalent(logits(mine), logits(theirs), (torch.linspace(0.5, 1.5, 96),))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def golden(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any]:
    """A file's contents, and what they make of the weight [M, K] and bias of a layer: (weight, key, name) -> both."""
    t: dict[str, torch.Tensor] = {}
    if kind == "LoRA":
        t = lora()
        return LORA, t, lambda w, key, name: (w + 1.5 * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"], None)
    if kind == "patterns":
        # The first that fits counts; alpha / sqrt(r), and a bias of B that is scaled as well.
        said = {**LORA, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "lora_bias": True}
        said |= {"alpha_pattern": {r"layers\.1\.self_attn\..*": 8, "q_proj": 5}}
        for key, name, K, M in each_layer():
            r = 2 if name.endswith("v_proj") else 4
            t |= {f"{key}.lora_A.weight": draw(r, K, seed=name), f"{key}.lora_B.weight": draw(M, r, seed=name)}
            t |= {f"{key}.lora_B.bias": draw(M, seed=name)}

        def scaled(w, key, name):
            alpha = 8 if "layers.1.self_attn" in name else 5 if name.endswith("q_proj") else 6
            s = alpha / (2 if name.endswith("v_proj") else 4) ** 0.5
            return w + s * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"], s * t[f"{key}.lora_B.bias"]

        return said, t, scaled
    if kind == "DoRA":
        t = lora() | {f"{key}.lora_magnitude_vector": draw(M, seed=key).abs() + 0.1 for key, _, _, M in each_layer()}

        def stretched(w, key, name):
            v = w + 1.5 * t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"]
            return t[f"{key}.lora_magnitude_vector"][:, None] * v / v.norm(dim=1, keepdim=True), None

        return {**LORA, "use_dora": True}, t, stretched
    if kind == "VeRA":
        generator = torch.Generator().manual_seed(3)
        a = nn.init.kaiming_uniform_(torch.empty(5, 48), generator=generator)
        b = nn.init.kaiming_uniform_(torch.empty(32, 5), generator=generator)
        t = {"base_model.vera_A": a, "base_model.vera_B": b}
        for key, _, _, M in each_layer():
            t |= {f"{key}.vera_lambda_b": draw(M, seed=key), f"{key}.vera_lambda_d": draw(5, seed=key)}

        def vera(w, key, name):
            left = t[f"{key}.vera_lambda_b"][:, None] * b[: w.shape[0]]
            return w + left @ (t[f"{key}.vera_lambda_d"][:, None] * a[:, : w.shape[1]]), None

        return {"peft_type": "VERA", "r": 5, "target_modules": ENDS, "projection_prng_key": 3}, t, vera
    for key, name, K, M in each_layer():
        t[f"{key}.ia3_l"] = 1 + (draw(1, K, seed=key) if name.endswith("down_proj") else draw(M, 1, seed=key))
    said = {"peft_type": "IA3", "target_modules": ENDS, "feedforward_modules": ["down_proj"]}
    return said, t, lambda w, key, name: (w * t[f"{key}.ia3_l"], None)


@pytest.mark.parametrize("kind", ["LoRA", "patterns", "DoRA", "VeRA", "(IA)^3"])
def test_a_folder_written_by_hand_is_what_it_says(kind, make, ids, tmp_path):
    """The model computes with weights made by hand; written again, the file holds the same."""
    said, tensors, changed = golden(kind)
    mine, theirs = make("llama"), make("llama")
    load_adapter(mine, write(tmp_path / "theirs", said, tensors))
    with torch.no_grad():
        for key, name, _, _ in each_layer():
            layer = theirs.get_submodule(name)
            weight, bias = changed(layer.weight, key, name)
            layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    judge(mine, theirs, ids)
    save_adapter(mine, tmp_path / "mine")
    again = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert said.items() <= again.items()
    assert same_tensors(load_file(tmp_path / "mine" / "adapter_model.safetensors"), tensors)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[key].dtype and torch.equal(t, b[key]) for key, t in a.items())


def test_biases_embeddings_and_whole_modules(make, ids, tmp_path):
    """GPT-2's transposed layers; biases of the model under the names that peft gives them; an embedding; the head."""
    key = "base_model.model.transformer."
    tensors, theirs, mine = {}, make("gpt2"), make("gpt2")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                new = draw(len(parameter), seed=name)
                adapted = name.endswith("c_attn.bias")
                tensors[f"base_model.model.{name.replace('bias', 'base_layer.bias') if adapted else name}"] = new
                parameter.copy_(new)
        for i in range(2):
            a, b, layer = draw(3, 32, seed=str(i)), draw(96, 3, seed=str(i)), theirs.transformer.h[i].attn.c_attn
            tensors |= {f"{key}h.{i}.attn.c_attn.lora_A.weight": a, f"{key}h.{i}.attn.c_attn.lora_B.weight": b}
            layer.weight += 2 * (b @ a).T
        a, b = draw(3, 96), draw(32, 3)
        tensors |= {f"{key}wte.lora_embedding_A": a, f"{key}wte.lora_embedding_B": b}
        theirs.lm_head.weight = nn.Parameter(draw(96, 32))  # no longer that of the embedding
        theirs.transformer.wte.weight += 2 * (b @ a).T
        tensors["base_model.model.lm_head.weight"] = theirs.lm_head.weight.detach()
        tensors[f"{key}wte.base_layer.weight"] = mine.transformer.wte.weight.detach()  # peft likes to store it
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "wte"], "bias": "all"}
    said |= {"modules_to_save": ["lm_head"], "fan_in_fan_out": True}
    load_adapter(mine, write(tmp_path / "theirs", said, tensors))
    judge(mine, theirs, ids)
    save_adapter(mine, tmp_path / "mine")
    del tensors[f"{key}wte.base_layer.weight"]
    assert same_tensors(load_file(tmp_path / "mine" / "adapter_model.safetensors"), tensors)
    with disabled(mine):
        assert torch.equal(logits(mine, ids), logits(make("gpt2"), ids))


def test_keys_and_description(make, tmp_path):
    """The listings of a tiny Llama, tensor by tensor."""
    every = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    shapes = {"k": (32, 16), "v": (32, 16), "g": (32, 48), "u": (32, 48), "d": (48, 32)}
    wanted: dict[str, list[int]] = {}
    for i in range(2):
        for name in every:
            K, M = shapes.get(name.partition(".")[2][0], (32, 32))
            wanted[LLAMA.format(i) + name + ".lora_A.weight"] = [4, K]
            wanted[LLAMA.format(i) + name + ".lora_B.weight"] = [M, 4]
    model = make("llama").to(torch.bfloat16)
    effkit.apply(model, LoRAConfig(rank=4, alpha=2.0, target_modules="all-linear"))
    save_adapter(model, tmp_path / "deep" / "lora")
    with safe_open(tmp_path / "deep" / "lora" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == wanted  # noqa: SIM118
        assert {file.get_slice(key).get_dtype() for key in wanted} == {"F32"}  # whatever the model's
    text = (tmp_path / "deep" / "lora" / "adapter_config.json").read_text()
    said = json.loads(text)
    assert text == json.dumps(said, indent=2, sort_keys=True)
    assert said["target_modules"] == sorted(name.partition(".")[2] for name in every)  # not the word "all-linear"
    assert (said["r"], said["inference_mode"], said["use_dora"]) == (4, True, False) and '"lora_alpha": 2,' in text

    for config, count in ((VeRAConfig(rank=8, target_modules=tuple(ENDS)), 14), (IA3Config(), 6)):
        model = make("llama")
        effkit.apply(model, config)
        save_adapter(model, tmp_path / "other")
        assert len(load_file(tmp_path / "other" / "adapter_model.safetensors")) == count


Q = LLAMA.format(0) + "self_attn.q_proj"
BROKEN: dict[str, tuple[dict[str, Any], Any, str]] = {
    "prefix": (
        {},
        lambda t: {key.removeprefix("base_model."): v for key, v in t.items()},
        "missing: .*extra: model.mod",
    ),
    "a missing key": ({}, lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, r"missing: .*\[32, 4\]"),
    "an extra key": ({}, lambda t: {**t, f"{Q}.lora_C.weight": draw(2)}, r"extra: .*q_proj.lora_C.weight \[2\]"),
    "another adapter": ({}, lambda t: {**t, f"{Q}.ia3_l": draw(32, 1)}, "extra: .*ia3_l"),
    "a layer that is no target": (
        {"target_modules": ["q_proj", "v_proj"]},
        lambda t: t,
        "extra: .*down_proj.lora_A.weight",
    ),
    "a shape": ({}, lambda t: {**t, f"{Q}.lora_A.weight": draw(4, 31)}, r"\[4, 31\], expected \[4, 32\]"),
    "a dtype": (
        {},
        lambda t: {**t, f"{Q}.lora_A.weight": draw(4, 32).to(torch.int8)},
        "is torch.int8, expected one such",
    ),
    "the rank": ({"r": 5}, lambda t: t, r"shape: .*\[4, 32\], expected \[5, 32\].*and \d+ more"),
    "weights of another model": ({}, lambda t: {**t, f"{Q}.base_layer.weight": draw(32, 32)}, "not what the model has"),
    "a layer that is not there": ({"target_modules": ["qq_proj"]}, lambda t: t, "nothing in the model matches"),
    "no type": ({"peft_type": None}, lambda t: t, "peft_type is None, choices: 'LORA', 'VERA', 'IA3'"),
    "another type": ({"peft_type": "OFT"}, lambda t: t, "peft_type is 'OFT', choices"),
    "a wrong value": ({"lora_dropout": 1.5}, lambda t: t, "dropout is 1.5"),
    "a wrong word": ({"bias": "vera_only"}, lambda t: t, "bias is 'vera_only'"),
    "weights that are changed": (
        {"init_lora_weights": "pissa_niter_4"},
        lambda t: t,
        "init_lora_weights is 'pissa_niter",
    ),
    **{
        f"option {key}": ({key: value}, lambda t: t, f"{key} is {re.escape(repr(value))}, which is not implemented")
        for key, value in {
            "use_qalora": True,
            "use_bdlora": {"nblocks": 2},
            "alora_invocation_tokens": [1, 2],
            "layer_replication": [[0, 1]],
            "target_parameters": ["experts.gate_up_proj"],
            "trainable_token_indices": [3],
            "megatron_config": {"x": 1},
            "ensure_weight_tying": True,
        }.items()
    },
}


def state(model: nn.Module) -> Any:
    """Everything that loading could change."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        effkit.describe(model),
        active_adapters(model),
    )


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_raises_and_changes_nothing(name, make, tmp_path):
    model = make("llama")
    effkit.apply(model, LoRAConfig(name="first", target_modules=("o_proj", "q_proj")))
    said, broken, message = BROKEN[name]
    folder = write(tmp_path, {**LORA, **said}, broken(lora()))
    before = state(model)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_adapter(model, folder)
    assert state(model) == before


def test_files_that_are_not_there(make, tmp_path):
    model = make("llama")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json$"):
        load_adapter(model, tmp_path)
    write(tmp_path / "sql", LORA, lora())
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json; .*: sql"):
        load_adapter(model, tmp_path)
    (tmp_path / "sql" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(model, tmp_path / "sql")
    (tmp_path / "sql" / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match="a pickle, which is never read; convert it"):
        load_adapter(model, tmp_path / "sql")
    (tmp_path / "sql" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_adapter(model, tmp_path / "sql")
    (tmp_path / "sql" / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, expected an object"):
        load_adapter(model, tmp_path / "sql")


def test_what_is_not_known_is_kept(make, tmp_path):
    """Notes silently, unknown keys with a warning where they are set; both are written again."""
    notes = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "revision": "c", "megatron_core": "m.c"}
    notes |= {"exclude_modules": None, "layers_pattern": None, "bias": "none", "rank_pattern": {}}
    notes |= {"init_lora_weights": "gaussian", "eva_config": None, "use_qalora": False, "corda_config": None}
    unknown = {"use_news": True, "news_config": None, "more_news": False}
    model = make("llama")
    with pytest.warns(UserWarning, match="use_news is True") as caught:
        load_adapter(model, write(tmp_path / "theirs", {**LORA, **notes, **unknown}, lora()))
    assert len(caught) == 1 and caught[0].filename == __file__
    save_adapter(copy.deepcopy(model), tmp_path / "mine")
    said = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert {**LORA, **notes, **unknown}.items() <= said.items()


def test_defaults_are_those_of_peft(make, tmp_path):
    """A file may say no more than its type and layers: rank and alpha are 8."""
    model = make("llama")
    load_adapter(model, write(tmp_path, {"peft_type": "LORA", "target_modules": ENDS}, lora(8)))
    part = adapters_of(model, "default")["model.layers.0.mlp.down_proj"]
    assert part.lora_A.shape == (8, 48) and part.scale == 1.0
    said = {
        "peft_type": "LORA",
        "target_modules": ENDS,
        "r": 4,
        "layers_pattern": "",
        "bias": None,
        "exclude_modules": "",
    }
    load_adapter(model, write(tmp_path, said, lora(4)), "other")
    assert adapters_of(model, "other")["model.layers.0.mlp.down_proj"].scale == 2.0


def test_a_change_like_others(make, ids, tmp_path):
    """Undo, describe, effkit.save; what is trained."""
    folder, model = write(tmp_path / "theirs", LORA, lora()), make("llama")
    before = logits(model, ids)
    change = load_adapter(model, folder, "sql")
    assert len(change.matched) == 6 and adapter_names(model) == ["sql"] and str(folder) in str(change)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    after = logits(model, ids)
    assert not torch.equal(after, before)
    effkit.save(model, tmp_path / "whole")
    assert torch.equal(logits(effkit.load(tmp_path / "whole"), ids), after)
    change.undo()
    assert torch.equal(logits(model, ids), before) and effkit.describe(model) == []
    load_adapter(model, folder, trainable=True, dtype="bfloat16")
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and set(trained.values()) == {torch.bfloat16}


def test_adapters_of_two_folders(make, ids, tmp_path):
    """Each by its name; which one is written where none is named."""
    alone = {}
    for name in ("a", "b"):
        write(tmp_path / name, {**LORA, "lora_alpha": 4 if name == "a" else 8}, lora(seed=name))
        model = make("llama")
        load_adapter(model, tmp_path / name)
        alone[name] = logits(model, ids)
    model = make("llama")
    load_adapter(model, tmp_path / "a", "a")
    load_adapter(model, tmp_path / "b", "b")
    assert torch.equal(logits(model, ids), alone["b"])
    with pytest.raises(ValueError, match="name is 'a', which the model has already"):
        load_adapter(model, tmp_path / "b", "a")
    activate(model, "a")
    assert torch.equal(logits(model, ids), alone["a"])
    save_adapter(model, tmp_path / "on")
    save_adapter(model, tmp_path / "off", "b")
    for folder, name in (("on", "a"), ("off", "b")):
        files = (load_file(tmp_path / which / "adapter_model.safetensors") for which in (folder, name))
        assert same_tensors(*files)
    activate(model, "a", "b")
    with pytest.raises(ValueError, match=r"name is None and 2 adapters are on, choices: \['a', 'b'\]"):
        save_adapter(model, tmp_path / "neither")
    with pytest.raises(ValueError, match=r"no adapter 'c' in the model, choices: \['a', 'b'\]"):
        save_adapter(model, tmp_path / "neither", "c")
    assert not (tmp_path / "neither").exists()


def test_states_do_not_matter(make, tmp_path):
    """On or off, merged, half as strong or training: the file is the same."""
    model = make("llama")
    effkit.apply(model, SingLoRAConfig(rank=3, ramp_steps=4, target_modules="all-linear"))
    advance_ramp(model, 3)
    files = []

    def keep() -> None:
        save_adapter(model, tmp_path)
        files.append(
            (load_file(tmp_path / "adapter_model.safetensors"), (tmp_path / "adapter_config.json").read_text())
        )

    keep()
    model.train()
    keep()
    assert adapters_of(model, "default")["model.layers.0.mlp.up_proj"].training
    set_scale(model, 0.5)
    keep()
    with disabled(model):
        keep()
    model.eval()
    merge(model)
    keep()
    first = files[0]
    assert json.loads(first[1])["lora_alpha"] == 3 * 3 / 4  # alpha = r, three of four steps
    assert all(same_tensors(tensors, first[0]) and text == first[1] for tensors, text in files)


def test_as_lora(make, ids, tmp_path):
    """VeRA and SingLoRA compute the same as the LoRA that they are written as; others add no product."""
    for config in (
        VeRAConfig(rank=5, target_modules=tuple(ENDS)),
        SingLoRAConfig(rank=3, alpha=5, ramp_steps=1, target_modules=tuple(ENDS), modules_to_save=("lm_head",)),
    ):
        model, again = make("llama"), make("llama")
        effkit.apply(model, config)
        scatter(model)
        model.eval()
        advance_ramp(model) if isinstance(config, SingLoRAConfig) else None
        save_adapter(model, tmp_path, as_lora=True)
        load_adapter(again, tmp_path)
        assert isinstance(effkit.describe(again)[0]["fields"]["rank"], int)
        judge(again, model, ids)
    for config in (DoRAConfig(rank=2), IA3Config()):
        model = make("llama")
        effkit.apply(model, config)
        with pytest.raises(TypeError, match="adds no product"):
            save_adapter(model, tmp_path, as_lora=True)


def scatter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(draw(*parameter.shape, seed=name))


def test_patterns_mean_the_same_in_a_file(make, ids, tmp_path):
    """A file sorts its keys, and the first pattern that fits counts: where that differs, layers are named."""
    patterns = {"down_proj": 2, r".*1\..*": 3}
    model, again = make("llama"), make("llama")
    effkit.apply(model, LoRAConfig(rank=4, rank_pattern=patterns, alpha_pattern=patterns, target_modules=tuple(ENDS)))
    scatter(model)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"][r"^model\.layers\.1\.mlp\.down_proj"] == 2


def test_choices_that_peft_lacks_are_written_as_names(make, tmp_path):
    """VeRA's files have no exclude_modules, those of (IA)^3 no layers_to_transform."""
    said = {}
    for name, config in {
        "ends": VeRAConfig(rank=2, target_modules=(*ENDS, "k_proj"), exclude_modules=("k_proj",)),
        "names": VeRAConfig(rank=2, target_modules=tuple(ENDS), exclude_modules=r".*1\..*"),
        "ia3": IA3Config(target_modules=tuple(ENDS), feedforward_modules=("down_proj",), layers_to_transform=(1,)),
    }.items():
        model = make("llama")
        change = effkit.apply(model, config)
        save_adapter(model, tmp_path)
        said[name] = json.loads((tmp_path / "adapter_config.json").read_text())
        assert load_adapter(make("llama"), tmp_path).matched == change.matched
    assert said["ends"]["target_modules"] == sorted(ENDS) and "exclude_modules" not in said["ends"]
    assert said["names"]["target_modules"] == [f"model.layers.0.{name}" for name in LAYERS]
    assert said["ia3"]["feedforward_modules"] == ".*(down_proj)"  # no longer one of the targets' names

    # A whole name that is the end of another is no choice for a list.
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "in": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    again = copy.deepcopy(model)
    effkit.apply(model, VeRAConfig(rank=2, target_modules=("proj",), exclude_modules=("in.proj",)))
    save_adapter(model, tmp_path)
    assert load_adapter(again, tmp_path).matched == ["proj"]


def test_quantised_models(make, ids, tmp_path):
    """The same folder into a model in four bits: the update is the same, in float32."""
    folder, model = write(tmp_path, LORA, lora()), make("llama", hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match="shape"):
        load_adapter(model, folder)
    model = make("llama")
    effkit.apply(model, NF4Config(block_size=32, skip=("down_proj",)))
    load_adapter(model, folder)
    part = adapters_of(model, "default")["model.layers.1.self_attn.v_proj"]
    assert isinstance(model.model.layers[1].self_attn.v_proj, NF4Linear)
    assert torch.equal(part.lora_A, lora()[LLAMA.format(1) + "self_attn.v_proj.lora_A.weight"])
    assert not torch.equal(logits(model, ids), logits(make("llama"), ids))


def test_dtypes_of_files(make, tmp_path):
    model = make("llama")
    load_adapter(model, write(tmp_path / "theirs", LORA, lora()))
    save_adapter(model, tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert same_tensors(stored, {key: tensor.bfloat16() for key, tensor in lora().items()})
    half = make("llama").to(torch.bfloat16)
    load_adapter(half, tmp_path / "half")
    assert {p.dtype for p in adapters_of(half, "default")["model.layers.0.mlp.down_proj"].parameters()} == {
        torch.float32
    }
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, expected None or a floating dtype"):
        save_adapter(model, tmp_path / "x", dtype=torch.int8)
    with torch.no_grad():
        adapters_of(model, "default")["model.layers.0.mlp.down_proj"].lora_B[3, 1] = 1e6
    with pytest.raises(
        ValueError, match=r"dtype is torch\.float16, too narrow for values of .*down_proj\.lora_B\.weight"
    ):
        save_adapter(model, tmp_path / "x", dtype=torch.float16)
    assert not (tmp_path / "x").exists()


def test_heads_that_a_classifier_does_not_have(tmp_path):
    """peft names all usual heads for a classifier, among them those that the model lacks."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.score = nn.Linear(4, 4), nn.Linear(4, 2)

    said = {"peft_type": "LORA", "r": 1, "target_modules": ["proj"], "modules_to_save": ["classifier", "score"]}
    key = "base_model.model."
    tensors = {f"{key}proj.lora_A.weight": draw(1, 4), f"{key}proj.lora_B.weight": draw(4, 1)}
    tensors |= {f"{key}score.weight": draw(2, 4), f"{key}score.bias": draw(2)}
    model = Classifier()
    assert load_adapter(model, write(tmp_path, said, tensors)).matched == ["proj", "score"]
    assert torch.equal(adapters_of(model, "default")["score"].copy.bias, tensors[f"{key}score.bias"])
    with pytest.raises(ValueError, match=r"missing: base_model\.model\.score\.bias"):
        load_adapter(Classifier(), write(tmp_path, said, {k: t for k, t in tensors.items() if "score.bias" not in k}))


def test_projections_are_those_of_their_key(make, tmp_path):
    """A file that disagrees with its key, or lacks what it says it holds, is refused; a wider pair is taken as is."""
    said, tensors, _ = golden("VeRA")
    for wrong, message in (
        ({**tensors, "base_model.vera_A": draw(5, 48)}, r"base_model\.vera_A is not what its key draws"),
        (
            {key: t for key, t in tensors.items() if key != "base_model.vera_B"},
            r"missing: base_model\.vera_B \[32, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(make("llama"), write(tmp_path / "wrong", said, wrong))
    without = {key: t for key, t in tensors.items() if "base_model.vera" not in key}
    a, b = make("llama"), make("llama")
    load_adapter(a, write(tmp_path / "a", said, tensors))
    load_adapter(b, write(tmp_path / "b", {**said, "save_projection": False}, without))
    parts = [adapters_of(model, "default")["model.layers.0.mlp.down_proj"].projections for model in (a, b)]
    assert torch.equal(parts[0].vera_A, parts[1].vera_A) and torch.equal(parts[0].vera_B, parts[1].vera_B)
    save_adapter(b, tmp_path / "c")
    assert same_tensors(load_file(tmp_path / "c" / "adapter_model.safetensors"), without)

    wide = make("llama")
    effkit.apply(wide, VeRAConfig(rank=3, target_modules=tuple(ENDS), in_features=64, out_features=100))
    save_adapter(wide, tmp_path / "wide")
    load_adapter(a, tmp_path / "wide", "wide")
    assert adapters_of(a, "wide")["model.layers.0.mlp.down_proj"].projections.vera_A.shape == (3, 64)


def test_the_meta_device_holds_no_values(make, tmp_path):
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_adapter(make("llama").to("meta"), write(tmp_path, LORA, lora()))


def test_rank_0_is_not_written(make, tmp_path):
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=4, rank_pattern={"v_proj": 0}))
    with pytest.raises(ValueError, match="rank is 0, expected at least 1 in a file"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sharded_parameters_are_written_whole(make, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model = make("llama")
    load_adapter(model, write(tmp_path / "theirs", LORA, lora()))
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        save_adapter(model, tmp_path / "mine")
    finally:
        distributed.destroy_process_group()
    assert same_tensors(load_file(tmp_path / "mine" / "adapter_model.safetensors"), lora())
