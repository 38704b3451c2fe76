"""Adapters in models: what apply changes and takes back, switching, what is trained, wrong input."""

import copy
import io

import pytest
import torch
from torch import nn

import effkit
from effkit.peft import (
    LoRAConfig,
    activate,
    active_adapters,
    adapter_names,
    adapters_of,
    delete_adapter,
    disabled,
    set_scale,
    set_trainable,
)
from effkit.peft.adapter import Adapted
from effkit.peft.engine import adapted_layers
from effkit.testing import assert_equivalent

ALL = dict(target_modules="all-linear", init="random")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_apply_and_undo(make, ids, kind):
    model = make(kind)
    names, before = dict(model.named_parameters()), logits(model, ids)
    change = effkit.apply(model, LoRAConfig(rank=3, alpha=6, **ALL))
    assert len(change.matched) == len(adapted_layers(model)) == (14 if kind == "llama" else 8)
    assert not torch.equal(logits(model, ids), before)
    # Names and objects of the model's own parameters stay; adapters come beside them.
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in names.items())
    assert {name for name, p in now.items() if p.requires_grad} == now.keys() - names.keys()
    assert all(isinstance(model.get_submodule(name), Adapted) for name in change.matched)
    change.undo()
    assert dict(model.named_parameters()).keys() == names.keys() and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert torch.equal(logits(model, ids), before)


def test_starts_as_it_was(make, ids):
    """B = 0, rank 0 and no adapter that is on give the base bit for bit."""
    model = make("llama")
    before = logits(model, ids)
    for config in (LoRAConfig(rank=4), LoRAConfig(rank=0, init="random"), LoRAConfig(rank=4, init="gaussian")):
        change = effkit.apply(model, config)
        assert torch.equal(logits(model, ids), before)
        change.undo()


def test_the_layer_is_the_materialised_sum(make):
    """Layers of each kind against a dense layer with W + 2 B A, gradients of x, A and B included."""
    for kind, path in (("llama", "model.layers.0.mlp.down_proj"), ("gpt2", "transformer.h.1.attn.c_attn")):
        model = make(kind).double()
        effkit.apply(model, LoRAConfig(rank=3, alpha=6, **ALL))
        layer = model.get_submodule(path)
        adapter = layer.adapters["default"]
        weight, bias = (layer.weight, None) if kind == "llama" else (layer.weight.T, layer.bias)

        def reference(x, a, b, weight=weight, bias=bias):
            return nn.functional.linear(x, weight.to(x.dtype) + 2 * b @ a, None if bias is None else bias.to(x.dtype))

        def adapted(x, a, b, layer=layer, adapter=adapter):
            in_dtype = copy.deepcopy(layer).to(x.dtype)
            return torch.func.functional_call(adapter, {"lora_A": a, "lora_B": b}, (in_dtype, x, None))

        inputs = dict(x=torch.randn(2, 5, weight.shape[1]), a=adapter.lora_A.detach(), b=adapter.lora_B.detach())
        assert_equivalent(adapted, reference, {name: value.double() for name, value in inputs.items()})


def test_several_adapters(make, ids):
    model = make("llama")
    base = logits(model, ids)
    effkit.apply(model, LoRAConfig(rank=2, **ALL))
    first = logits(model, ids)
    second_change = effkit.apply(model, LoRAConfig(rank=3, name="second", init="random", seed=1))
    assert adapter_names(model) == ["default", "second"] and active_adapters(model) == ["second"]
    assert set(adapters_of(model, "second")) == set(second_change.matched) and len(second_change.matched) == 4
    second = logits(model, ids)
    activate(model, "default")
    assert torch.equal(logits(model, ids), first)
    activate(model)
    assert torch.equal(logits(model, ids), base) and active_adapters(model) == []
    activate(model, "default", "second")
    both = logits(model, ids)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    with disabled(model):
        assert torch.equal(logits(model, ids), base)
        with disabled(model):
            assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), both)
    set_scale(model, 0.0, "default")
    assert torch.equal(logits(model, ids), second)
    set_scale(model, 1.0, "default")
    assert torch.equal(logits(model, ids), both)
    activate(model, "second")
    with disabled(model):
        assert active_adapters(model) == []
    assert active_adapters(model) == ["second"] and torch.equal(logits(model, ids), second)
    second_change.undo()
    assert adapter_names(model) == active_adapters(model) == ["default"]  # as before the second one came
    assert torch.equal(logits(model, ids), first)
    delete_adapter(model, "default")
    assert torch.equal(logits(model, ids), base) and effkit.describe(model) == []


def test_what_is_trained(make):
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=4, train_a=False))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith("adapters.default.lora_B") for name in trained)
    effkit.apply(model, LoRAConfig(rank=4, name="second"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second.lora_" in name for name in trained)
    set_trainable(model, "default")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith("adapters.default.lora_B") for name in trained)


def test_counts_by_formula(make):
    """rank (K + M) a layer, and Llama-2-7B's number at rank 16."""
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=4, target_modules="all-linear"))
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * sum(map(sum, sizes))
    with torch.device("meta"):
        model = make("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=32, vocab_size=32000)  # fmt: skip
        effkit.apply(model, LoRAConfig(rank=16, target_modules="all-linear"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 39_976_960


def test_patterns_and_scales():
    config = LoRAConfig(rank=4, alpha=8, rank_pattern={"q_proj": 16, r"0\.v_proj": 0}, alpha_pattern={"k_proj": 2})
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 16 and config.scale_of("a.q_proj") == 0.5
    assert config.rank_of("x.0.v_proj") == 0 and config.scale_of("x.0.v_proj") == 0
    assert config.rank_of("1.v_proj") == 4 and config.scale_of("k_proj") == 0.5 and config.scale_of("o_proj") == 2
    stabilised = LoRAConfig(rank=4, alpha=8, rank_stabilized=True)
    assert stabilised.scale_of("any") == 4


def test_patterns_that_fit_nothing_are_named(make):
    with pytest.warns(UserWarning, match="LoRAConfig: alpha_pattern has 'q_porj', which fits no target"):
        effkit.apply(make("llama"), LoRAConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_porj": 4}))


def test_modules_to_save_and_biases(make, ids):
    model = make("gpt2")
    base, weights = logits(model, ids), {name: p.clone() for name, p in model.named_parameters()}
    effkit.apply(model, LoRAConfig(rank=2, modules_to_save=("ln_f",), bias="all"))
    assert torch.equal(logits(model, ids), base)
    assert isinstance(model.transformer.ln_f.adapters["default"].copy, nn.LayerNorm)
    trained = [p for p in model.parameters() if p.requires_grad]
    biases = [
        name for name, p in model.named_parameters() if name.endswith("adapters.default.bias") and p.requires_grad
    ]
    assert len(biases) == 2 * 6  # two norms, four linear layers in each of two blocks
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    trained_logits = logits(model, ids)
    assert not torch.equal(trained_logits, base)
    with disabled(model):  # peft leaves trained biases in
        assert torch.equal(logits(model, ids), base)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    effkit.peft.merge(model)
    merged = dict(model.named_parameters())
    assert not torch.equal(merged["transformer.h.0.mlp.c_fc.bias"], weights["transformer.h.0.mlp.c_fc.bias"])


def test_the_same_module_in_two_adapters(make, ids):
    """Each adapter trains a copy of the model's own module, not of another adapter's, nor with one in it."""
    model = make("llama")
    base = logits(model, ids)
    for name in ("one", "two"):
        effkit.apply(model, LoRAConfig(target_modules=("q_proj",), modules_to_save=("lm_head", "mlp"), name=name))
        assert torch.equal(logits(model, ids), base)
        parts = adapters_of(model, name)
        assert [key for key, _ in parts["lm_head"].named_parameters()] == ["copy.weight"]
        with torch.no_grad():
            parts["lm_head"].copy.weight.mul_(2)
    effkit.apply(model, LoRAConfig(target_modules=("o_proj", "gate_proj"), name="three", init="random"))
    effkit.apply(model, LoRAConfig(target_modules=("q_proj",), modules_to_save=("mlp",), name="four"))
    assert torch.equal(logits(model, ids), base)


def test_embeddings(make, ids):
    """The layer is an embedding of E + 2 (B A)^T, and so is the merged one; the tied output head stays as it was."""
    model = make("llama", tie_word_embeddings=True)
    head = model.lm_head.weight.clone()
    effkit.apply(model, LoRAConfig(rank=3, alpha=6, target_modules=("embed_tokens",), init="random"))
    layer, adapter = model.model.embed_tokens, model.model.embed_tokens.adapters["default"]

    def adapted(a, b):
        factors = {"lora_embedding_A": a, "lora_embedding_B": b}
        return torch.func.functional_call(adapter, factors, (copy.deepcopy(layer).to(a.dtype), ids, None))

    def reference(a, b):
        return nn.functional.embedding(ids, layer.weight.to(a.dtype) + 2 * (b @ a).T)

    factors = dict(a=adapter.lora_embedding_A.detach(), b=adapter.lora_embedding_B.detach())
    assert_equivalent(adapted, reference, factors)
    effkit.peft.merge(model)
    weight = model.model.embed_tokens.weight.detach()
    assert_equivalent(lambda a, b: nn.functional.embedding(ids, weight.to(a.dtype)), reference, factors, grads=False)
    assert torch.equal(model.lm_head.weight, head)


def test_saved_loaded_copied_pickled(make, ids, tmp_path):
    for kind in ("llama", "gpt2"):
        model = make(kind)
        effkit.apply(model, LoRAConfig(rank=2, **ALL))
        effkit.apply(model, LoRAConfig(rank=3, name="second", rank_pattern={"up_proj|c_fc": 1}, **ALL))
        expected = logits(model, ids)
        effkit.save(model, tmp_path / kind)
        again = effkit.load(tmp_path / kind)
        assert torch.equal(logits(again, ids), expected) and active_adapters(again) == ["second"]
        copied = copy.deepcopy(model)
        copied._effkit_changes[-1].undo()
        assert adapter_names(copied) == ["default"] and adapter_names(model) == ["default", "second"]
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        assert torch.equal(logits(torch.load(stream, weights_only=False), ids), expected)


def test_what_is_trained_is_saved(make, tmp_path):
    model = make("llama")
    for name in ("one", "two"):
        effkit.apply(model, LoRAConfig(rank=2, train_a=name == "two", name=name))
    for trained in (["one"], ["one", "two"], []):
        set_trainable(model, *trained)
        effkit.save(model, tmp_path)
        flags = {key: p.requires_grad for key, p in model.named_parameters()}
        assert any(flags.values()) is bool(trained)
        assert {key: p.requires_grad for key, p in effkit.load(tmp_path).named_parameters()} == flags


def test_base_weights_keep_their_names(make, tmp_path):
    """A checkpoint of the base loads into an adapted model, and the other way round the base is found."""
    model = make("llama")
    state = make("llama").state_dict()
    effkit.apply(model, LoRAConfig(rank=2))
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(".adapters.default." in key for key in result.missing_keys)


def test_dtypes(make, ids):
    """Adapters are float32 on half-precision layers unless asked otherwise; gates keep their dtype in every cast."""
    model = make("llama").bfloat16()
    effkit.apply(model, LoRAConfig(rank=2, alpha=3, init="random"))
    parts = adapters_of(model, "default").values()
    assert all(part.lora_A.dtype == torch.float32 for part in parts)
    assert logits(model, ids).dtype == torch.bfloat16
    model.to(torch.float16)
    assert all(part.gain.dtype == torch.float32 and part.gain == 1.5 for part in parts)
    assert all(part.lora_A.dtype == torch.float16 for part in parts)
    other = make("llama").bfloat16()
    effkit.apply(other, LoRAConfig(rank=2, dtype="bfloat16"))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


def test_the_pending_backward_survives_a_switch(make, ids):
    """A forward, another one without adapters, then the backward of the first: the gradients are those of the first."""
    model = make("llama")
    effkit.apply(model, LoRAConfig(rank=2, **ALL))
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    loss = model(ids, labels=ids).loss
    with disabled(model):
        logits(model, ids)
    set_scale(model, 0.3)
    got = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_what_would_overlook_adapters_says_so(make):
    """Quantising leaves adapted layers alone and gives the reason, pooling heads refuses them."""
    model = make("llama", num_key_value_heads=4)
    effkit.apply(model, LoRAConfig(rank=2))
    change = effkit.apply(model, effkit.quant.NF4Config(block_size=32, skip=("mlp.down_proj",)))
    assert "self_attn.q_proj" in change.edit.notes["left"] and "it has adapters" in change.edit.notes["left"]
    assert not any("q_proj" in name or "v_proj" in name for name in change.matched)
    with pytest.raises(ValueError, match=r"self_attn.q_proj has adapters.*merge_and_unload"):
        effkit.apply(model, effkit.attention.GQAConfig(num_kv_heads=2))


class OwnRows(nn.Embedding):
    """As OPT's positions: what comes in is a mask."""

    def forward(self, mask):
        return super().forward(mask.cumsum(-1))


def test_layers_that_adapters_would_not_reach_are_refused():
    """torch's encoder reads the weights of its layers itself in inference."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match=r"self_attn\.out_proj: nn.MultiheadAttention reads the weights"):
        effkit.apply(encoder, LoRAConfig(target_modules=("out_proj",)))
    config = LoRAConfig(target_modules=("linear1", "linear2"), init="random")
    with pytest.raises(TypeError, match=r"linear1: in inference nn\.TransformerEncoderLayer.*set_fastpath_enabled"):
        effkit.apply(encoder, config)
    assert not adapted_layers(encoder)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        effkit.apply(encoder, config)
        with torch.no_grad():
            adapted = encoder(x)
            with disabled(encoder):  # computed in the same way
                plain = encoder(x)
        assert not torch.equal(adapted, plain)
        assert_equivalent(lambda x: encoder(x), lambda x: adapted.to(x.dtype), {"x": x}, grads=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(TypeError, match="0: OwnRows finds its rows in its own way"):
        effkit.apply(nn.Sequential(OwnRows(4, 4)), LoRAConfig(target_modules=("0",)))


def test_reports_are_short(make):
    change = effkit.apply(make("llama"), LoRAConfig(rank=4, target_modules=["q_proj"]))
    assert str(change).splitlines()[0] == "LoRAConfig(target_modules=('q_proj',), rank=4)"
    assert "trainable   512 of" in str(change)


def test_one_seed_one_start(make):
    """Values depend on the seed and on a layer's name, not on the other layers or the global generator."""
    one, two = make("llama"), make("llama")
    effkit.apply(one, LoRAConfig(rank=2, target_modules=("q_proj",)))
    torch.rand(3)
    effkit.apply(two, LoRAConfig(rank=2, target_modules=("q_proj", "o_proj")))
    path = "model.layers.1.self_attn.q_proj"
    a, b = (adapters_of(model, "default")[path].lora_A for model in (one, two))
    assert torch.equal(a, b)
    assert not torch.equal(a, adapters_of(one, "default")["model.layers.0.self_attn.q_proj"].lora_A)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (dict(rank=-1), ValueError, "rank is -1"),
        (dict(rank=2.5), ValueError, "rank is 2.5"),
        (dict(rank_pattern={"q": -2}), ValueError, r"rank_pattern\['q'\] is -2"),
        (dict(rank_pattern=[("q", 2)]), TypeError, "rank_pattern is"),
        (dict(rank_pattern={"(": 2}), ValueError, r"rank_pattern or alpha_pattern is '\(', which is no regular"),
        (dict(alpha="8"), ValueError, "alpha is '8', expected a finite number"),
        (dict(alpha=float("nan")), ValueError, "alpha is nan"),
        (dict(alpha_pattern={"q": True}), ValueError, r"alpha_pattern\['q'\] is True"),
        (dict(seed="a"), TypeError, "seed is 'a'"),
        (dict(rank_stabilized="no"), TypeError, "rank_stabilized is 'no', choices: True, False"),
        (dict(target_modules="("), ValueError, r"target_modules is '\(', which is no regular expression"),
        (dict(dropout="0.1"), ValueError, "dropout is '0.1'"),
        (dict(dtype="float8_e5m2"), ValueError, "dtype is 'float8_e5m2', choices: None, 'float16'"),
        (dict(dropout=1.0), ValueError, "dropout is 1.0, expected 0 <= dropout < 1"),
        (dict(init="zero"), ValueError, "init is 'zero', choices: 'default'"),
        (dict(bias="some"), ValueError, "bias is 'some', choices: 'none'"),
        (dict(name="a.b"), ValueError, "name is 'a.b'"),
        (dict(name="type"), ValueError, "name is 'type'"),
        (dict(dtype="int8"), ValueError, "dtype is 'int8'"),
        (dict(target_modules=()), ValueError, "target_modules is empty"),
        (dict(target_modules=(1,)), TypeError, "target_modules is"),
        (dict(target_modules=".*q", layers_to_transform=[0]), ValueError, "layers_to_transform is"),
        (dict(layers_pattern="layers"), ValueError, "without layers_to_transform"),
    ],
)
def test_wrong_configs(config, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**config)


def test_wrong_uses_change_nothing(make, ids):
    model = make("llama")
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    def refused(error, words, call):
        with pytest.raises(error, match=words):
            call()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert not adapted_layers(model)

    def apply(**fields):
        return lambda: effkit.apply(model, LoRAConfig(**fields))

    refused(ValueError, "nothing in the model matches.*q_proj", apply(target_modules=("q_prj",)))
    refused(TypeError, "LlamaMLP, expected nn.Linear", apply(target_modules=("mlp",)))
    refused(ValueError, "modules_to_save", apply(modules_to_save=("head9",)))
    both = "q_proj is a target, but {} is trained as a whole"  # "self_attn" would leave its q_proj out
    refused(ValueError, both.format(".*q_proj"), apply(modules_to_save=("_proj",)))
    refused(ValueError, both.format(".*self_attn"), apply(modules_to_save=("_attn",)))
    refused(ValueError, "update_bias is True", apply(target_modules=("embed_tokens",), update_bias=True))
    refused(
        ValueError,
        "modules_to_save names .*act_fn, SiLU.*, which has no parameters",
        apply(modules_to_save=("act_fn",)),
    )
    model.model.layers[0].mlp.base = "its own"
    refused(ValueError, "LlamaMLP has an attribute 'base' of its own", apply(modules_to_save=("mlp",)))
    del model.model.layers[0].mlp.base
    model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    refused(ValueError, "its forward was replaced", apply())
    del model.model.layers[0].self_attn.q_proj.forward
    model.config.model_type = "unheard-of"
    refused(ValueError, "no usual choice for model type 'unheard-of'", apply())

    effkit.apply(model, LoRAConfig(target_modules=("q_proj",)))
    with pytest.raises(ValueError, match=r"name is 'default', which the model has already"):
        effkit.apply(model, LoRAConfig(target_modules=("k_proj",)))
    with pytest.raises(ValueError, match=r"no adapter 'defualt' in the model, choices: \['default'\]"):
        activate(model, "defualt")
    with pytest.raises(TypeError, match="factor is '2'"):
        set_scale(model, "2")
    with pytest.raises(ValueError, match="factor is nan, expected a finite number"):
        set_scale(model, float("nan"))
    assert active_adapters(model) == ["default"] and len(adapted_layers(model)) == 2
