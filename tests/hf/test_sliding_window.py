"""SlidingWindowConfig on HuggingFace models, against transformers' eager attention under a mask written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call

import effkit
from effkit.attention import SlidingWindowConfig, SoftmaxAttentionConfig
from effkit.testing import assert_equivalent

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # so that attention decides the logits
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
LENGTH, PADDING, NEW = 19, 7, 9
CONFIGS = [
    SlidingWindowConfig(window=4),
    SlidingWindowConfig(window=1, layers=(0, -1)),
    SlidingWindowConfig(window=4, sink_tokens=2),
    SlidingWindowConfig(window=3, sink_tokens=3, layers=(1,)),
    SlidingWindowConfig(window=50),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.window}-{c.sink_tokens}-{c.layers}")


def eager_llama() -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**SIZES, attn_implementation="eager")).eval()


def windowed(model: Any, config: SlidingWindowConfig) -> Any:
    twin = copy.deepcopy(model)
    effkit.apply(twin, config)
    return twin


def windowed_by_hand(model: Any, config: SlidingWindowConfig) -> Any:
    """The eager model whose chosen layers get a mask of their own, for rows without padding."""
    twin = copy.deepcopy(model)
    layers = range(3) if config.layers is None else [layer % 3 for layer in config.layers]

    def own_mask(module: nn.Module, args: Any, kwargs: Any) -> Any:
        t = kwargs["hidden_states"].shape[1]
        i, j = torch.arange(t)[:, None], torch.arange(t)
        sees = (j <= i) & ((j > i - config.window) | (j < config.sink_tokens))
        dtype = kwargs["hidden_states"].dtype
        return args, {**kwargs, "attention_mask": torch.zeros(t, t, dtype=dtype).masked_fill(~sees, -1e9)[None, None]}

    for layer in layers:
        twin.model.layers[layer].self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)
    return twin


def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask of two rows, the second of them padded on the left."""
    ids = torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids * mask, mask


def row() -> Tensor:
    """Ids of the row without padding."""
    return batch()[0][:1]


def by_row(ids: Tensor) -> Callable[[Any], Tensor]:
    """Logits of each row alone, without the padding of the second."""

    def compute(model: Any) -> Tensor:
        rows = (model(ids[:1]).logits[0], model(ids[1:, PADDING:]).logits[0])
        return torch.cat(rows)

    return compute


class Call(nn.Module):
    """A computation with a model as a module, so that it becomes a function of the model's parameters."""

    def __init__(self, model: nn.Module, compute: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self) -> Tensor:
        return self.compute(self.model)


def assert_same(
    mine: Any, theirs: Any, compute: Callable[[Any], Tensor], reference: Callable[[Any], Tensor], grads: bool = False
) -> None:
    candidate, yardstick = Call(mine, compute), Call(theirs, reference)
    assert_equivalent(
        lambda **values: functional_call(candidate, values, ()),
        lambda **values: functional_call(yardstick, values, ()),
        {name: value.detach() for name, value in yardstick.named_parameters()},
        grads=grads,
    )


@configs
def test_logits_and_every_gradient(config: SlidingWindowConfig) -> None:
    (ids, mask), model = batch(), eager_llama()
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def padded(m: Any) -> Tensor:
        return m(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]

    assert_same(windowed(model, config), windowed_by_hand(model, config), padded, by_row(ids), grads=True)


def generate(model: Any, **options: Any) -> Any:
    ids, mask = batch()
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


@configs
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(config: SlidingWindowConfig, cache: str) -> None:
    """With and without a cache the same tokens, and logits that are those of one pass over each row."""
    model = eager_llama()
    mine, by_hand = windowed(model, config), windowed_by_hand(model, config)
    tokens = generate(mine, use_cache=False)
    assert torch.equal(generate(mine, cache_implementation=cache), tokens)

    def step_by_step(m: Any) -> Tensor:
        out = generate(m, cache_implementation=cache, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits, dim=1)

    def in_one_pass(m: Any) -> Tensor:
        rows = (tokens[:1], tokens[1:, PADDING:])
        return torch.stack([m(row, use_cache=False).logits[0, -1 - NEW : -1] for row in rows])

    assert_same(mine, by_hand, step_by_step, in_one_pass)


@configs
def test_beams(config: SlidingWindowConfig) -> None:
    mine = windowed(eager_llama(), config)
    assert torch.equal(generate(mine, num_beams=3), generate(mine, num_beams=3, use_cache=False))


@configs
@pytest.mark.parametrize("given", [True, False])
def test_several_tokens_at_once(config: SlidingWindowConfig, given: bool) -> None:
    """Pieces of a prompt through a cache that the user has made, or the model."""
    (ids, mask), model = batch(), eager_llama()
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def in_pieces(m: Any) -> Tensor:
        cache, pieces = hf.DynamicCache() if given else None, []
        for start, end in ((0, 8), (8, 9), (9, 15), (15, LENGTH)):
            part = slice(start, end)
            out = m(ids[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache,
                    use_cache=True)  # fmt: skip
            cache = out.past_key_values
            pieces.append(out.logits)
        return torch.cat(pieces, dim=1)[mask.bool()]

    assert_same(windowed(model, config), windowed_by_hand(model, config), in_pieces, by_row(ids))


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (SlidingWindowConfig(window=4), [3, 3, 3]),
        (SlidingWindowConfig(window=1, layers=(0, 2)), [0, LENGTH + NEW - 1, 0]),
        (SlidingWindowConfig(window=4, sink_tokens=2), [PADDING + 2 + 3] * 3),
    ],
)
def test_the_cache_holds_what_the_window_can_see(config: SlidingWindowConfig, held: list[int]) -> None:
    """However many tokens are read; the padding before the sinks stays with them."""
    cache = generate(windowed(eager_llama(), config), return_dict_in_generate=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == held
    assert cache.get_seq_length() == LENGTH + NEW - 1
    with pytest.raises(RuntimeError, match="forgotten all but"):
        cache.crop(-1)


def test_a_cache_that_has_forgotten_nothing_can_be_cropped() -> None:
    def after_a_crop(m: Any) -> Tensor:
        cache = m(row(), use_cache=True).past_key_values
        cache.crop(-4)
        return m(row()[:, -4:], past_key_values=cache, use_cache=True).logits

    mine = windowed(eager_llama(), SlidingWindowConfig(window=30))
    assert_same(mine, mine, after_a_crop, lambda m: m(row(), use_cache=False).logits[:, -4:])


@pytest.mark.parametrize("window", [3, 12])
def test_the_smaller_of_two_windows_wins(window: int) -> None:
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=6, attn_implementation="eager")).eval()
    narrow = copy.deepcopy(model)
    narrow.config.sliding_window = min(window, 6)
    mine = windowed(model, SlidingWindowConfig(window=window))
    assert_same(mine, narrow, lambda m: m(row()).logits, lambda m: m(row()).logits)
    assert torch.equal(generate(mine), generate(narrow))


def test_apply_and_undo() -> None:
    """Windows stack, layer by layer, and undo takes them back bit for bit, in a deep copy as well."""
    model, ids = eager_llama(), row()
    before = model(ids).logits
    first = effkit.apply(model, SlidingWindowConfig(window=4, layers=(0,)))
    assert first.matched == ["model.layers.0.self_attn"]
    one = model(ids).logits
    second = effkit.apply(model, SlidingWindowConfig(window=2, sink_tokens=1, layers=(-1,)))
    assert second.matched == ["model.layers.2.self_attn"]
    both = model(ids).logits
    at_once = eager_llama()
    effkit.apply(at_once, SlidingWindowConfig(window=2, sink_tokens=1, layers=(2,)))
    effkit.apply(at_once, SlidingWindowConfig(window=4, layers=(0,)))
    assert torch.equal(at_once(ids).logits, both)
    twin, change_of_twin = copy.deepcopy((model, second))
    change_of_twin.undo()
    assert torch.equal(twin(ids).logits, one) and torch.equal(model(ids).logits, both)
    second.undo()
    assert torch.equal(model(ids).logits, one)
    first.undo()
    assert torch.equal(model(ids).logits, before) and model.config._attn_implementation == "eager"
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(type(layer).__name__ == "DynamicLayer" for layer in model(ids).past_key_values.layers)


def test_exact_attention_afterwards_has_no_window() -> None:
    model, ids = eager_llama(), row()
    effkit.apply(model, SoftmaxAttentionConfig())
    dense = model(ids).logits
    effkit.apply(model, SlidingWindowConfig(window=3))
    effkit.apply(model, SoftmaxAttentionConfig())
    out = model(ids)
    assert torch.equal(out.logits, dense)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [LENGTH] * 3


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = eager_llama(), row()
    effkit.apply(model, SlidingWindowConfig(window=4, sink_tokens=2, layers=(0, 2)))
    effkit.save(model, tmp_path)
    loaded = effkit.load(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert effkit.describe(loaded)[0]["fields"]["layers"] in ((0, 2), [0, 2])


def test_what_cannot_have_a_window() -> None:
    model, ids = eager_llama(), row()
    with pytest.raises(ValueError, match=r"layers is \(1, 3\), but there is no 3: the model has 3 layers"):
        effkit.apply(model, SlidingWindowConfig(window=4, layers=(1, 3)))
    assert model.config._attn_implementation == "eager" and not model._forward_pre_hooks
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    with pytest.raises(ValueError, match="attends in both directions"):
        effkit.apply(hf.BertForMaskedLM(hf.BertConfig(**sizes)).eval(), SlidingWindowConfig(window=4))
    own = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=6)).eval()
    with pytest.raises(ValueError, match="sink_tokens is 2, but the layer has a window of the model's own"):
        effkit.apply(own, SlidingWindowConfig(window=4, sink_tokens=2))
    assert not own._forward_pre_hooks and torch.equal(own(ids).logits, copy.deepcopy(own)(ids).logits)


@pytest.mark.filterwarnings("default:effkit attention takes memory:UserWarning")
def test_holes_in_the_padding() -> None:
    """A window narrows the mask that is then a tensor, through the cache as well; sinks are refused."""
    model, (ids, mask) = eager_llama(), batch()
    mask[0, 4:6] = 0
    mine = windowed(model, SlidingWindowConfig(window=4))

    def at_once(m: Any) -> Tensor:
        return m(ids, attention_mask=mask, use_cache=False).logits[:, 12:]

    def in_two(m: Any) -> Tensor:
        cache = m(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        return m(ids[:, 12:], attention_mask=mask, past_key_values=cache).logits

    with pytest.warns(UserWarning, match="padding between the tokens of a row"):
        assert_same(mine, mine, in_two, at_once)
    refused = pytest.raises(ValueError, match="sink_tokens is 1, but the layer has a mask that is a tensor")
    with pytest.warns(UserWarning, match="padding between"), refused:
        windowed(model, SlidingWindowConfig(window=4, sink_tokens=1))(ids, attention_mask=mask)
