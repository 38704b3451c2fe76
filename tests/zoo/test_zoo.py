"""The zoo: what is packaged loads with transformers alone, held-out text stays out, and measuring is right."""

from __future__ import annotations

import copy
import itertools
import json
import lzma
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import effkit
from effkit import zoo
from effkit.attention import GQAConfig, SoftmaxAttentionConfig
from effkit.testing import assert_equivalent
from effkit.zoo.tokenizer import build_tokenizer
from effkit.zoo.train import ARCHITECTURE


@pytest.fixture(scope="module")
def trained():
    return zoo.load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def training():
    return zoo.training_batches(steps=6, rows=2, context=128)


def test_package_holds_a_small_bf16_model_of_the_trained_architecture():
    assert (zoo.MODEL / "model.safetensors").stat().st_size < 10_000_000
    model = AutoModelForCausalLM.from_pretrained(zoo.MODEL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert {key: getattr(model.config, key) for key in ARCHITECTURE if key != "rope_theta"} == {
        key: value for key, value in ARCHITECTURE.items() if key != "rope_theta"
    }
    assert model.config.rope_parameters["rope_theta"] == ARCHITECTURE["rope_theta"]
    ours = zoo.load_model(torch.bfloat16).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


def test_float32_is_the_default_and_exact(trained):
    stored = zoo.load_model(torch.bfloat16).state_dict()
    assert all(torch.equal(value, stored[name].float()) for name, value in trained.state_dict().items())


def test_packaged_tokenizer_is_the_one_that_training_used(tokenizer):
    built, auto = build_tokenizer(), AutoTokenizer.from_pretrained(zoo.MODEL)
    for other in (built, auto):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert (other.padding_side, other.pad_token_id, other.eos_token_id) == ("left", zoo.END, zoo.END)
    assert len(tokenizer) == ARCHITECTURE["vocab_size"]


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "<|end|>" not in text))
def test_tokens_are_bytes_and_decode_back_exactly(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_own_id(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(257)) and vocabulary["<|end|>"] == zoo.END
    assert tokenizer.decode([zoo.END, 65], skip_special_tokens=True) == "A"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "bcd"], return_tensors="pt", padding=True)
    assert batch.input_ids.tolist() == [[zoo.END, zoo.END, 97], [98, 99, 100]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_every_held_out_module_exists_and_none_is_trained_on():
    heldout, train = zoo.stdlib_files("heldout"), zoo.stdlib_files("train")
    assert len(heldout) == len(zoo.HELD_OUT)
    assert not {path.resolve() for path in heldout} & {path.resolve() for path in train}
    assert not {path.read_bytes() for path in heldout} & {path.read_bytes() for path in train}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'test', expected 'train' or 'heldout'"):
        zoo.stdlib_files("test")


@pytest.mark.parametrize("windows", [1, 7, 300])
def test_heldout_windows_are_whole_apart_and_from_the_held_out_modules(windows):
    batches = zoo.heldout_batches(windows, rows=4)
    ids = torch.cat(batches)
    assert ids.shape == (windows, zoo.CONTEXT + 1) and {len(b) for b in batches[:-1]} <= {4}
    text = bytes([zoo.END % 256]).join([b"", *zoo.stdlib_text("heldout")])
    starts, at = [], 0
    for row in ids:
        at = text.index(bytes(i % 256 for i in row.tolist()), at)
        starts.append(at)
    assert all(b - a >= zoo.CONTEXT for a, b in itertools.pairwise(starts))


def test_as_many_windows_as_there_are_and_no_more():
    with pytest.raises(ValueError, match="windows is 1000000, expected 1 to") as error:
        zoo.heldout_batches(1_000_000)
    most = int(str(error.value).split(" to ")[1].split(":")[0])
    assert sum(map(len, zoo.heldout_batches(most))) == most
    with pytest.raises(ValueError, match=f"expected 1 to {most}"):
        zoo.heldout_batches(most + 1)
    with pytest.raises(ValueError, match="rows is 0"):
        zoo.heldout_batches(1, rows=0)


def test_training_batches_repeat_and_come_from_training_modules(training):
    again = zoo.training_batches(steps=6, rows=2, context=128)
    assert all(torch.equal(a, b) for a, b in zip(training, again, strict=True))
    other = zoo.training_batches(steps=6, rows=2, context=128, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(training, other, strict=True))
    text = bytes([zoo.END % 256]).join([b"", *filter(None, zoo.stdlib_text("train"))])
    assert all(bytes(i % 256 for i in row.tolist()) in text for batch in training for row in batch)


@pytest.mark.parametrize("name", ["steps", "rows", "context"])
def test_training_batches_of_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        zoo.training_batches(**{"steps": 1, name: 0})


class Bigrams(nn.Module):
    """A language model whose logits are a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_bits_per_byte_is_the_mean_of_minus_log2_p():
    batches = zoo.heldout_batches(5, rows=2)  # the last batch is smaller: a mean of means would differ
    ids = torch.cat(batches)

    def measured(table: Tensor) -> Tensor:
        return torch.tensor(zoo.bits_per_byte(Bigrams(table), batches), dtype=table.dtype)

    def by_hand(table: Tensor) -> Tensor:
        return -table.log_softmax(-1)[ids[:, :-1], ids[:, 1:]].mean() / math.log(2)

    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))
    assert_equivalent(measured, by_hand, (table,), grads=False)


def test_bits_per_byte_of_nothing_is_refused(trained):
    with pytest.raises(ValueError, match="batches is empty"):
        zoo.bits_per_byte(trained, [])


def test_packaged_model_is_worth_using(trained):
    """It promises less than 0.85 nats per byte; a compressor that sees all held-out text at once needs more."""
    nats = zoo.bits_per_byte(trained, zoo.heldout_batches(32)) * math.log(2)
    text = b"".join(zoo.stdlib_text("heldout"))
    assert nats < 0.85
    assert nats / math.log(2) < 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_log_beside_the_weights_is_of_a_run_that_kept_its_promise(trained):
    first, *_, last = map(json.loads, (zoo.MODEL / "train.jsonl").read_text().splitlines())
    assert first["parameters"] == sum(p.numel() for p in trained.parameters())
    assert last["final_heldout_nats"] < 0.85


def test_exact_attention_leaves_the_trained_model_as_it_is(trained):
    ids = zoo.heldout_batches(2)[0][:, :-1]
    weights = {"embedding": trained.get_input_embeddings().weight.detach()}
    changed = copy.deepcopy(trained)
    effkit.apply(changed, SoftmaxAttentionConfig())

    def logits_of(model: nn.Module):
        return lambda embedding: model.to(embedding.dtype)(inputs_embeds=embedding[ids]).logits

    assert_equivalent(logits_of(changed), logits_of(copy.deepcopy(trained)), weights)


def greedy(model, tokenizer, prompts: list[str], **options) -> list[list[int]]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, min_new_tokens=40, max_new_tokens=40, do_sample=False, **options)
    return ids[:, batch.input_ids.shape[1] :].tolist()


def test_generation_repeats_with_and_without_cache_and_beside_padding(trained, tokenizer):
    prompts = ["def read_lines(path):\n", "import"]
    together = greedy(trained, tokenizer, prompts)
    assert together == greedy(trained, tokenizer, prompts)
    assert together == greedy(trained, tokenizer, prompts, use_cache=False)
    assert together == [greedy(trained, tokenizer, [prompt])[0] for prompt in prompts]


def test_cache_bytes_are_those_of_the_kv_heads(trained):
    ids = zoo.heldout_batches(2)[0][:, :64]
    config = trained.config
    per_head = 2 * config.num_hidden_layers * config.head_dim * 4  # keys and values in float32
    assert zoo.cache_bytes_per_token(trained, ids) == config.num_key_value_heads * per_head
    changed = copy.deepcopy(trained)
    effkit.apply(changed, GQAConfig(num_kv_heads=2))
    assert zoo.cache_bytes_per_token(changed, ids) == 2 * per_head


def test_healing_recovers_a_part_of_what_grouping_lost_and_repeats(trained, training):
    heldout = [batch[:, :129] for batch in zoo.heldout_batches(8)]
    grouped = copy.deepcopy(trained)
    effkit.apply(grouped, GQAConfig(num_kv_heads=4))
    seen: list[int] = []
    healed, again = copy.deepcopy(grouped), copy.deepcopy(grouped)
    bits = zoo.heal(healed, training, on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4, 5, 6] and len(bits) == 6 and not healed.training
    before, after = zoo.bits_per_byte(grouped, heldout), zoo.bits_per_byte(healed, heldout)
    assert zoo.bits_per_byte(trained, heldout) < after < before
    assert zoo.heal(again, training) == bits
    assert all(torch.equal(a, b) for a, b in zip(healed.parameters(), again.parameters(), strict=True))
    assert all(p.grad is None for p in healed.parameters())


def test_healing_refuses_half_precision_weights(training):
    with pytest.raises(TypeError, match=r"trainable weights in torch\.bfloat16, expected float32"):
        zoo.heal(zoo.load_model(torch.bfloat16), training)
