"""Adapting to another kind of text: what is read, what is measured, and that only adapters are left changed."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import effkit
from effkit import zoo
from effkit.peft import LoRAConfig, is_merged

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "adapt.py"


@pytest.fixture(scope="module")
def batches():
    return zoo.training_batches(steps=3, rows=1, context=48, kind="tree")


@pytest.fixture(scope="module")
def heldout():
    return [batch[:, :65] for batch in zoo.heldout_batches(2, rows=1, kind="tree")]


@pytest.fixture(scope="module")
def base():
    return zoo.load_model()


def text_of(batches):
    return [bytes(id % 256 for id in row.tolist()) for batch in batches for row in batch]


def test_trees_are_those_of_the_modules():
    for path, tree in zip(zoo.stdlib_files("heldout"), zoo.stdlib_text("heldout", kind="tree"), strict=True):
        assert tree == ast.dump(ast.parse(path.read_bytes())).encode() and b"\n" not in tree
    some = zoo.stdlib_text("train", limit=100_000, kind="tree")
    assert sum(map(len, some)) >= 100_000 > sum(map(len, some[:-1]))


def test_held_out_trees_are_not_trained_on(batches, heldout):
    end = bytes([zoo.END % 256])
    text = end.join([b"", *zoo.stdlib_text("heldout", kind="tree")])
    assert all(row in text for row in text_of(heldout)) and not any(row in text for row in text_of(batches))
    again = zoo.training_batches(steps=3, rows=1, context=48, kind="tree")
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_unknown_kind_is_refused():
    for function in (zoo.heldout_batches, lambda kind: zoo.training_batches(1, kind=kind)):
        with pytest.raises(ValueError, match="kind is 'binary', choices: 'source', 'tree'"):
            function(kind="binary")


class Squares(nn.Module):
    """Logits W h^2 + bias of an embedding h."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(257, 6), nn.Linear(6, 257)
        self.embed.weight.requires_grad_(not frozen)
        self.linear.weight.requires_grad_(not frozen)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.linear(self.embed(input_ids).square()))


def test_saved_bytes_are_those_of_the_activations(batches):
    """With all trained h and its square are kept as well; weights never count, and the ids are kept for the loss."""
    trained, frozen = (zoo.saved_bytes(Squares(frozen), batches[0]) for frozen in (False, True))
    assert trained - frozen == 48 * (6 * 4 + 6 * 4)


def test_healing_with_an_optimizer_of_ones_own(base, batches):
    losses = []
    for own in (False, True):
        model = copy.deepcopy(base)
        effkit.apply(model, LoRAConfig(rank=2, target_modules=("v_proj",)))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0) if own else None
        losses.append(zoo.heal(model, batches, lr=0.01, optimizer=optimizer))
    assert losses[0] == losses[1]


def test_adapting(base, batches, heldout):
    """Lower held-out loss, by adapters alone, which stand apart from the weights at the end; and the same again."""
    results = []
    for _ in range(2):
        model = copy.deepcopy(base)
        effkit.apply(model, LoRAConfig(rank=4, target_modules=("q_proj", "down_proj")))
        results.append(zoo.adapt(model, batches, heldout, lr=3e-3, ratio=4, every=2))
        assert not is_merged(model) and not model.training
        own = model.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())
    result, again = (dataclasses.replace(each, seconds=0.0) for each in results)
    assert result == again
    assert result.trainable == 6 * 4 * (2 * 256 + 704 + 256)
    assert list(result.curve) == [0, 2, 3] and result.curve[0] == zoo.bits_per_byte(base, heldout) > result.curve[3]
    assert result.steps_to(result.curve[0]) == 0 and result.steps_to(0.0) is None
    assert result.merge_error is not None and 0 <= result.merge_error < result.largest_logit


def test_a_model_without_adapters_is_trained_as_a_whole(base, batches, heldout):
    model = copy.deepcopy(base)
    result = zoo.adapt(model, batches[:1], heldout, lr=1e-4)
    assert result.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert list(result.curve) == [0, 1] and result.merge_error is None


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("adapt_benchmark", BENCHMARK)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_rows(benchmark):
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(), "run python benchmarks/adapt.py --tables"
