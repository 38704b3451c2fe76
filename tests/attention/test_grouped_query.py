"""The grouped-query layer, mean pooling of heads, and GQAConfig on HuggingFace models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkit
from effkit.attention import GQAConfig, GroupedQueryAttention, KVCache, mha_to_gqa, rotary_embedding, similar_heads
from effkit.quant import NF4Config
from effkit.testing import assert_equivalent


def tiny(name: str = "Llama", **changes: Any) -> Any:
    """A tiny random model of a HuggingFace family with 8 query and 4 key/value heads."""
    import transformers

    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def layer(**changes: Any) -> GroupedQueryAttention:
    torch.manual_seed(0)
    return GroupedQueryAttention(**{**dict(hidden_size=24, num_heads=6, num_kv_heads=2, bias=True), **changes})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pooling_is_the_mean_of_each_group() -> None:
    weight = draw(12, 5)
    pooled = mha_to_gqa(weight, num_heads=6, num_kv_heads=3)
    for group in range(3):
        for row in range(2):
            assert torch.equal(pooled[2 * group + row], (weight[4 * group + row] + weight[4 * group + 2 + row]) / 2)
    assert torch.equal(mha_to_gqa(weight[:, 0], 6, 3), pooled[:, 0])
    assert torch.equal(mha_to_gqa(weight, 6, 6), weight)
    assert mha_to_gqa(weight.bfloat16(), 6, 1).dtype == torch.bfloat16


def test_pooling_commutes_with_rotary_embedding() -> None:
    positions = torch.arange(7)

    def keys(x: Tensor, weight: Tensor) -> Tensor:
        return rotary_embedding((x @ weight.T).unflatten(1, (-1, 8)).transpose(0, 1)[None], positions, 10000.0)

    assert_equivalent(
        lambda x, weight: keys(x, mha_to_gqa(weight, 4, 2)),
        lambda x, weight: keys(x, weight).unflatten(1, (2, 2)).mean(2),
        (draw(7, 16), draw(4 * 8, 16, seed=1)),
    )


@pytest.mark.parametrize(("heads", "groups"), [(6, 4), (6, 0), (6, 12)])
def test_pooling_refuses_other_numbers(heads: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"num_kv_heads is {groups}, expected a divisor of num_heads: \[1, 2, 3, 6\]"):
        mha_to_gqa(draw(12, 5), heads, groups)
    with pytest.raises(ValueError, match=r"weight has shape \[13, 5\]"):
        mha_to_gqa(draw(13, 5), 6, 3)


def test_similar_heads_meet_in_one_group() -> None:
    base = draw(2, 8 * 16)
    noisy = [base[i % 2] + 0.01 * draw(8 * 16, seed=i + 1) for i in range(4)]  # 0 like 2, 1 like 3
    weight = torch.stack(noisy).view(4 * 8, 16)
    order = similar_heads(weight, weight, num_heads=4, num_groups=2)
    assert order.tolist() == [0, 2, 1, 3]


def test_layer_equals_multi_head_attention_with_repeated_heads() -> None:
    x, gqa = draw(2, 9, 24), layer()
    mha = layer(num_kv_heads=6)

    def repeat(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)

    state = {n: repeat(p) if n.startswith(("k_", "v_")) else p for n, p in gqa.state_dict().items()}
    mha.load_state_dict(state)
    assert_equivalent(lambda x: gqa.to(x.dtype)(x), lambda x: mha.to(x.dtype)(x), (x,))


@pytest.mark.parametrize("window", [None, 4])
def test_cache_equals_one_pass(window: int | None) -> None:
    x, module = draw(2, 12, 24), layer(window=window)

    def stepwise(x: Tensor) -> Tensor:
        cache = KVCache()
        parts = [module.to(x.dtype)(part, cache=cache) for part in x.split([5, 1, 1, 3, 2], dim=1)]
        assert len(cache) == 12
        return torch.cat(parts, 1)

    assert_equivalent(stepwise, lambda x: module.to(x.dtype)(x), (x,))


def test_packed_equals_separate() -> None:
    x, module = draw(1, 12, 24), layer()

    def packed(x: Tensor) -> Tensor:
        return module.to(x.dtype)(x, cu_seqlens=torch.tensor([0, 5, 12]))

    assert_equivalent(packed, lambda x: torch.cat([module.to(x.dtype)(p) for p in x.split([5, 7], 1)], 1), (x,))


def test_layer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads is 6, expected a multiple of num_kv_heads=4"):
        layer(num_kv_heads=4)
    with pytest.raises(ValueError, match="hidden_size is 25"):
        layer(hidden_size=25)
    with pytest.raises(ValueError, match="head_dim is 5, a rotary embedding needs an even width"):
        layer(head_dim=5)
    with pytest.raises(ValueError, match="cache is given together with"):
        layer()(draw(1, 3, 24), cache=KVCache(), key_lengths=torch.tensor([3]))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_config_converts_and_survives_save_and_load(family: str, kv_heads: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    key = model.model.layers[0].self_attn.k_proj
    change = effkit.apply(model, GQAConfig(num_kv_heads=kv_heads))
    assert len(change.matched) == 2 and change.after.parameters < change.before.parameters
    assert model.config.num_key_value_heads == kv_heads
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, mha_to_gqa(key.weight, 4, kv_heads))
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == kv_heads
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()(ids).logits, logits)
    effkit.save(model, tmp_path / "effkit")
    assert torch.equal(effkit.load(tmp_path / "effkit")(ids).logits, logits)


def test_undo_restores_the_very_model() -> None:
    model = tiny(attention_bias=True)
    ids = torch.arange(8)[None]
    before, modules = model(ids).logits, dict(model.named_modules())
    change = effkit.apply(model, GQAConfig(num_kv_heads=1, permute=True))
    assert not torch.equal(model(ids).logits, before)
    change.undo()
    assert torch.equal(model(ids).logits, before) and model.config.num_key_value_heads == 4
    assert all(module is modules[name] for name, module in model.named_modules())


def test_permuting_pools_what_is_alike() -> None:
    """Heads 0 and 2 are equal, and 1 and 3: pooled together they leave the model's function as it is."""

    def twins() -> Any:
        model = tiny(attention_bias=True)
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "k_proj"):
                    for part in (module.k_proj.weight, module.k_proj.bias, module.v_proj.weight, module.v_proj.bias):
                        part[16:] = part[:16]
        return model

    ids = torch.arange(8)[None]
    permuted, plain = twins(), twins()
    effkit.apply(permuted, GQAConfig(num_kv_heads=2, permute=True))
    effkit.apply(plain, GQAConfig(num_kv_heads=2))
    embed = lambda model: model.get_input_embeddings()(ids).detach()  # noqa: E731

    def logits(model: Any) -> Any:
        return lambda x: model.to(x.dtype)(inputs_embeds=x).logits

    assert_equivalent(logits(permuted), logits(twins()), (embed(permuted),), grads=False)
    with pytest.raises(AssertionError):
        assert_equivalent(logits(plain), logits(twins()), (embed(plain),), grads=False)


def test_config_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads is 0, expected an int >= 1"):
        GQAConfig(num_kv_heads=0)
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"num_kv_heads is 3, the model can have one of \[1, 2, 4\]"):
        effkit.apply(model, GQAConfig(num_kv_heads=3))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    effkit.apply(model, NF4Config(block_size=32))
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a NF4Linear, whose rows cannot be pooled"):
        effkit.apply(model, GQAConfig(num_kv_heads=2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM fuses its projections"):
        effkit.apply(tiny("GPTNeoX"), GQAConfig(num_kv_heads=2))
    with pytest.raises(ValueError, match=r"nothing in the model matches .*it has 0"):
        effkit.apply(nn.Sequential(nn.Linear(2, 2)), GQAConfig(num_kv_heads=2))
