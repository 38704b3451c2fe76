"""Recurrent attention inside HuggingFace models: what a cache, padding and packing must not change, and what undo does.

A swapped model is compared with itself on each row alone, in one pass, without a cache.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import effkit
from effkit import attention, zoo
from effkit.attention._fenwick import level
from effkit.hf.mixers import Sizes, make_mixer
from effkit.hf.recurrent import RecurrentAttention
from effkit.testing import assert_equivalent

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # so that attention decides the logits
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4, use_sliding_window=True)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, dict(sliding_window=4)),
    "qwen2": (hf.Qwen2Config, WINDOWS),
    "qwen3": (hf.Qwen3Config, WINDOWS | dict(head_dim=16)),
}
CONFIGS = {
    "linear": attention.LinearAttentionConfig,
    "elu": functools.partial(attention.LinearAttentionConfig, feature_map="elu+1"),
    "retention": attention.RetentionConfig,
    "ssd": attention.SSDConfig,
    "gla": attention.GatedLinearAttentionConfig,
    "delta": attention.DeltaRuleConfig,
    "gated_delta": attention.GatedDeltaRuleConfig,
    "log_linear": attention.LogLinearAttentionConfig,
}
LAYERS = {"all": None, "first": (0,), "last": (-1,)}
LENGTH = 11


def original(family: str = "llama", implementation: str = "sdpa", **options: Any) -> Any:
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**SMALL | own | options, attn_implementation=implementation)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def swapped(config: Any, family: str = "llama", implementation: str = "sdpa") -> Any:
    """A model with a change, whose new parameters are moved from their start so that gates depend on the text."""
    model = original(family, implementation)
    effkit.apply(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass(frozen=True)
class Batch:
    """Two rows of tokens; in a padded one the second row is shorter."""

    ids: Tensor
    mask: Tensor

    @staticmethod
    def of(padding: str) -> Batch:
        ids = torch.randint(2, 61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        if padding != "none":
            mask[1, {"left": slice(5), "right": slice(7, None), "holes": slice(3, 5)}[padding]] = 0
        return Batch(ids * mask, mask)

    def logits(self, model: Any, **options: Any) -> Tensor:
        """Logits of the real tokens."""
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        out = model(self.ids, attention_mask=self.mask, position_ids=positions, use_cache=False, **options)
        return out.logits[self.mask.bool()]

    def logits_by_row(self, model: Any) -> Tensor:
        """The same, each row by itself without padding."""
        rows = [ids[mask.bool()][None] for ids, mask in zip(self.ids, self.mask, strict=True)]
        return torch.cat([model(row, use_cache=False).logits[0] for row in rows])

    def logits_in_pieces(self, model: Any, cuts: tuple[int, ...], cache: Any = None) -> Tensor:
        """The same from several passes over a cache, the first up to cuts[0], and so on."""
        cache = hf.DynamicCache(config=model.config) if cache is None else cache
        positions, pieces = (self.mask.cumsum(1) - 1).clamp_min(0), []
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            ids, own = self.ids[:, start:end], positions[:, start:end]
            out = model(ids, attention_mask=self.mask[:, :end], position_ids=own, past_key_values=cache)
            pieces.append(out.logits)
        assert cache.get_seq_length() == LENGTH
        return torch.cat(pieces, dim=1)[self.mask.bool()]


class Call(nn.Module):
    """A computation with a model as a module, so that it becomes a function of the model's parameters."""

    def __init__(self, model: nn.Module, compute: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self) -> Tensor:
        return self.compute(self.model)


def assert_same(
    mine: nn.Module,
    compute: Callable[[Any], Tensor],
    reference: Callable[[Any], Tensor],
    theirs: nn.Module | None = None,
    grads: tuple[str, ...] = (),
) -> None:
    """The judge's word that compute(mine) is reference(theirs), and the gradients by parameters of these names."""
    candidate, yardstick = Call(mine, compute), Call(mine if theirs is None else theirs, reference)
    parameters = {name: value.detach() for name, value in yardstick.named_parameters()}
    wanted = tuple(name for name in parameters if any(part in name for part in grads))
    assert_equivalent(
        lambda **values: functional_call(candidate, values, ()),
        lambda **values: functional_call(yardstick, values, ()),
        parameters,
        grads=wanted or False,
    )


class Softmax(nn.Module):
    """A mixer that is what the original module computes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), None


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_norms_and_rotation_are_those_of_the_model(family: str) -> None:
    """With softmax for a mixer the model is the original one."""
    model = original(family, sliding_window=None, layer_types=None)
    mine = copy.deepcopy(model)
    for layer in mine.model.layers:
        layer.self_attn = RecurrentAttention(layer.self_attn, Softmax())
    batch = Batch.of("none")
    assert_same(mine, batch.logits, batch.logits, model, grads=("layers.0.self_attn",))


@pytest.mark.parametrize("name", [name for name in CONFIGS if "delta" not in name])
def test_mixers_are_means_under_positive_weights(name: str) -> None:
    """o = sum_s w v / sum_s w with the weights that the config's docstring states."""
    module = swapped(CONFIGS[name]()).model.layers[0].self_attn
    mixer, generator = module.mixer, torch.Generator().manual_seed(0)
    shapes = dict(q=(2, 4, 9, 8), k=(2, 2, 9, 8), v=(2, 2, 9, 8), x=(2, 9, 32))
    inputs = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    t = torch.arange(9)

    def equation(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        m = copy.deepcopy(mixer).to(q.dtype)
        q, k, v = m.q_map(q), m.k_map(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        decay = torch.zeros(2, 4, 9, q.shape[3], dtype=q.dtype)
        if name == "retention":
            decay = m.decay[:, None, None].expand(decay.shape)
        elif name in ("ssd", "log_linear"):
            decay = m.decay(x)[..., None].expand(decay.shape)
        elif name == "gla":
            decay = F.logsigmoid(m.gate(x)).unflatten(2, (4, -1)).transpose(1, 2)
        c = decay.cumsum(2)
        weights = torch.einsum("bhtd, bhsd, bhtsd -> bhts", q, k, (c[:, :, :, None] - c[:, :, None]).exp()).tril()
        if name == "log_linear":
            scales = F.softplus(m.level(x)).unflatten(2, (4, -1)).transpose(1, 2)
            levels = level(t[:, None], t).tril().expand(2, 4, 9, 9)
            weights = weights * scales.gather(3, levels)
        return (weights @ v) / (weights.sum(3, keepdim=True) + 1e-6)

    def mixed(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return mixer(q, k, v, x, initial_state=None, return_state=False, cu_seqlens=None)[0]

    assert_equivalent(mixed, equation, inputs)


def test_what_the_configs_start_from() -> None:
    """Gates start as fixed decays, and level scales at 1; without decays all are linear attention."""
    module: Any = original().model.layers[0].self_attn
    assert Sizes.of(module) == Sizes(32, 4, 2, 8, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in ((2, 4, 9, 8), (2, 2, 9, 8), (2, 9, 32)))

    def mixed(config: Any) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
            mixer = make_mixer(config, module).to(q.dtype)
            return mixer(q, k, k.flip(3), x, initial_state=None, return_state=False, cu_seqlens=None)[0]

        return call

    fixed = attention.RetentionConfig(half_lives=(2.0, 100.0))
    decays = [-math.log(2) / (2 * 50 ** (head / 3)) for head in range(4)]
    buffer: Any = make_mixer(fixed, module).decay
    assert_equivalent(lambda x: buffer, lambda x: torch.tensor(decays, dtype=x.dtype), (torch.zeros(4),), grads=False)
    for kind in (attention.SSDConfig, attention.GatedLinearAttentionConfig, attention.LogLinearAttentionConfig):
        assert_equivalent(mixed(kind(half_lives=(2.0, 100.0))), mixed(fixed), inputs)
    flat = attention.RetentionConfig(half_lives=(1e30, 1e30))
    assert_equivalent(mixed(flat), mixed(attention.LinearAttentionConfig()), inputs)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_pass(name: str, layers: str) -> None:
    """A prompt with padding, a single token, several tokens, a single one again."""
    batch = Batch.of("left")
    model = swapped(CONFIGS[name](layers=LAYERS[layers]))
    assert_same(model, lambda m: batch.logits_in_pieces(m, (6, 7, 10)), batch.logits_by_row)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "effkit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_of_transformers_tells_tokens_from_padding(family: str, implementation: str) -> None:
    """Windows, padding at the first tokens of a cache, and padding behind a row while others go on."""
    config = attention.LogLinearAttentionConfig(layers=(0,))
    model, reference = swapped(config, family, implementation), swapped(config, family)
    for padding in ("left", "right"):
        batch = Batch.of(padding)
        in_pieces = functools.partial(batch.logits_in_pieces, cuts=(1, 4, 6, 7))
        for compute in (batch.logits, in_pieces):
            assert_same(model, compute, batch.logits_by_row, reference)


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_changes_no_gradient(padding: str) -> None:
    batch, model = Batch.of(padding), swapped(attention.SSDConfig())
    assert_same(model, batch.logits, batch.logits_by_row, grads=("self_attn",))


def test_nan_in_padding_changes_nothing() -> None:
    model, batch = swapped(attention.GatedDeltaRuleConfig()), Batch.of("left")
    before = batch.logits(model), batch.logits_in_pieces(model, (3, 8))
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = math.nan
    after = batch.logits(model), batch.logits_in_pieces(model, (3, 8))
    for mine, theirs in zip(after, before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "effkit"])
def test_packed_sequences(implementation: str) -> None:
    """position_ids that restart separate the sequences of a row."""
    ids, lengths = Batch.of("none").ids[:1], (2, 5, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = swapped(attention.LogLinearAttentionConfig(), implementation=implementation)

    def by_sequence(m: Any) -> Tensor:
        return torch.cat([m(piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)], dim=1)

    def packed(m: Any) -> Tensor:
        return m(ids, position_ids=positions, use_cache=False).logits

    assert_same(model, packed, by_sequence, grads=("self_attn",))


def test_flash_attention_packs_by_positions_alone() -> None:
    """It gets no mask: the module then looks at the positions itself."""
    model = swapped(attention.RetentionConfig())
    layer = model.model.layers[0].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = "flash_attention_2"
    ids, positions = Batch.of("none").ids[:1], torch.cat((torch.arange(4), torch.arange(7)))[None]

    def attend(m: Any, where: slice, positions: Tensor) -> Tensor:
        x = m.model.embed_tokens(ids[:, where])
        return m.model.layers[0].self_attn(x, m.model.rotary_emb(x, positions), position_ids=positions)[0]

    def apart(m: Any) -> Tensor:
        return torch.cat([attend(m, where, positions[:, where]) for where in (slice(4), slice(4, None))], dim=1)

    assert_same(model, lambda m: attend(m, slice(None), positions), apart)


def generate(model: Any, batch: Batch, **options: Any) -> Any:
    return model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("layers", ["all", "first"])
@pytest.mark.parametrize("name", ["linear", "log_linear", "gated_delta"])
def test_generate_with_and_without_cache(name: str, layers: str) -> None:
    batch, model = Batch.of("left"), swapped(CONFIGS[name](layers=LAYERS[layers]))
    tokens = generate(model, batch, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(generate(model, batch, cache_implementation=cache), tokens)
    alone = generate(model, Batch(batch.ids[1:, 5:], batch.mask[1:, 5:]))
    assert torch.equal(alone[0, -6:], tokens[1, -6:])
    assert torch.equal(generate(model, batch, num_beams=3), generate(model, batch, num_beams=3, use_cache=False))


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_windows_and_static_caches(family: str) -> None:
    """The caches of windows and of a fixed size ask the swapped layer for the form of their masks."""
    batch = Batch.of("left")
    for layers in ((0,), (1,)):
        model = swapped(attention.SSDConfig(layers=layers), family)
        tokens = generate(model, batch, use_cache=False)
        for cache in ("dynamic", "static"):
            assert torch.equal(generate(model, batch, cache_implementation=cache), tokens)


@torch.no_grad()
def test_the_state_does_not_grow_and_copies_go_their_own_way() -> None:
    batch, model = Batch.of("none"), swapped(attention.LinearAttentionConfig())
    cache = model(batch.ids).past_key_values
    held = [x.shape for x in cache.layers[0].state if x is not None]
    twin, twin_model = copy.deepcopy(cache), copy.deepcopy(model)
    more = model(batch.ids, past_key_values=cache).logits
    assert [x.shape for x in cache.layers[0].state if x is not None] == held
    assert cache.get_seq_length() == 2 * LENGTH and twin.get_seq_length() == LENGTH
    assert torch.equal(twin_model(batch.ids, past_key_values=twin).logits, more)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(batch.ids, past_key_values=cache).logits, model(batch.ids).logits)


def test_rows_of_a_cache_are_selected_and_repeated() -> None:
    batch, model = Batch.of("left"), swapped(attention.LogLinearAttentionConfig())
    token = torch.tensor([[5], [7], [9], [11]])

    def next_logits(m: Any, rows: list[int], select: Callable[[Any], Any] | None) -> Tensor:
        """The logits of one more token in these rows: of a cache that was changed to hold them, or that never did."""
        first = slice(None) if select else rows
        cache = m(batch.ids[first], attention_mask=batch.mask[first]).past_key_values
        if select:
            select(cache)
        mask = torch.cat((batch.mask[rows], torch.ones(len(rows), 1, dtype=torch.int64)), dim=1)
        return m(token[: len(rows)], attention_mask=mask, past_key_values=cache).logits

    cases: list[tuple[Callable[[Any], Any], list[int]]] = [
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ]
    for select, rows in cases:
        changed = functools.partial(next_logits, rows=rows, select=select)
        assert_same(model, changed, functools.partial(next_logits, rows=rows, select=None))


@pytest.mark.parametrize("name", ["linear", "delta", "log_linear"])
def test_apply_and_undo(name: str) -> None:
    model, batch = original("qwen3"), Batch.of("left")
    before, logits = dict(model.named_modules()), batch.logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    change = effkit.apply(model, CONFIGS[name](layers=(-1,)))
    assert change.matched == ["model.layers.1.self_attn"]
    assert not torch.equal(batch.logits(model), logits)
    assert model.model.layers[1].self_attn.q_proj is before["model.layers.1.self_attn.q_proj"]
    assert model.state_dict().keys() > weights.keys()
    change.undo()
    assert dict(model.named_modules()) == before
    assert torch.equal(batch.logits(model), logits)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_copy_of_a_changed_model_is_undone_by_itself() -> None:
    model, batch = original(), Batch.of("none")
    logits = batch.logits(model)
    effkit.apply(model, attention.SSDConfig())
    twin = copy.deepcopy(model)
    twin.__dict__["_effkit_changes"][0].undo()
    assert torch.equal(batch.logits(twin), logits)
    assert not torch.equal(batch.logits(model), logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, batch = swapped(CONFIGS[name](layers=(0,))), Batch.of("left")
    effkit.save(model, tmp_path)
    loaded = effkit.load(tmp_path)
    assert torch.equal(batch.logits(loaded), batch.logits(model))
    assert effkit.describe(loaded) == effkit.describe(model)


@pytest.mark.parametrize("window_first", [True, False])
def test_hybrids_stack(window_first: bool) -> None:
    """A window on one layer, a state on another, plain attention in the third; undone in reverse."""
    model, batch = original(num_hidden_layers=3), Batch.of("left")
    logits = batch.logits(model)
    configs = attention.SlidingWindowConfig(window=4, layers=(2,)), attention.RetentionConfig(layers=(0,))
    changes: Any = effkit.apply(model, *(configs if window_first else reversed(configs)))
    assert sorted(changes.matched) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert_same(model, lambda m: batch.logits_in_pieces(m, (6, 7, 10)), batch.logits_by_row)
    changes.undo()
    assert torch.equal(batch.logits(model), logits)


def test_a_window_on_a_layer_with_a_state_is_refused() -> None:
    model = swapped(attention.RetentionConfig(layers=(0,)))
    with pytest.raises(ValueError, match=r"layers is \(0,\), but model.layers.0.self_attn has a recurrent state"):
        effkit.apply(model, attention.SlidingWindowConfig(window=4, layers=(0,)))
    assert effkit.apply(model, attention.SlidingWindowConfig(window=4)).matched == ["model.layers.1.self_attn"]


def test_half_precision() -> None:
    model, batch = swapped(attention.SSDConfig()).to(torch.bfloat16), Batch.of("left")
    cache = hf.DynamicCache(config=model.config)
    assert batch.logits_in_pieces(model, (6,), cache).dtype == torch.bfloat16
    assert cache.layers[0].state.memory.dtype == torch.float32
    exact = copy.deepcopy(model).float()

    def in_pieces(ids: Tensor) -> Tensor:
        return batch.logits_in_pieces(model, (6,)).float()

    with torch.no_grad():
        difference = (in_pieces(batch.ids) - batch.logits(exact)).abs().max()
        alike = (batch.logits(model).float() - batch.logits(exact)).abs().max()
    assert difference < 2 * alike


@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiles_into_one_graph(padding: str) -> None:
    batch, model = Batch.of(padding), swapped(attention.SSDConfig(layers=(0,)))

    def compiled(m: Any) -> Tensor:
        return batch.logits(torch.compile(m, fullgraph=True, backend="aot_eager"))

    assert_same(model, compiled, batch.logits_by_row, grads=("mixer", "q_proj"))


def test_packed_sequences_raise_while_compiled() -> None:
    model = torch.compile(swapped(attention.SSDConfig()), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="packed sequences are not possible"):
        model(torch.ones(1, 4, dtype=torch.int64), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # in later versions; the new name is not in 5.17
def test_gradient_checkpointing() -> None:
    batch, model = Batch.of("left"), swapped(attention.LinearAttentionConfig(layers=(0,))).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(dict(use_reentrant=False))
    # Recomputed outside of the call that puts the judge's parameters in place, so each of them must have a gradient.
    assert_same(twin, batch.logits, batch.logits_by_row, model, grads=("",))


def test_distilled_modules_come_closer_and_nothing_else_changes() -> None:
    model = original()
    change = effkit.apply(model, attention.LinearAttentionConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = list(torch.randint(2, 61, (30, 4, 16), generator=torch.Generator().manual_seed(0)))
    steps: list[tuple[int, float]] = []
    losses = zoo.distill(change, batches, lr=1e-2, on_step=lambda *step: steps.append(step))
    assert steps == list(enumerate(losses, 1))
    assert sum(losses[-5:]) < sum(losses[:5])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("self_attn" not in name), name
    assert all(isinstance(layer.self_attn, RecurrentAttention) for layer in model.model.layers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_distillation_copies_the_original_as_it_was() -> None:
    """Projections are shared, and are trained: the second step must still compare with the first weights."""
    batch = torch.randint(2, 61, (4, 16), generator=torch.Generator().manual_seed(0))
    model, calls = original(), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        model(batch[:, :-1], use_cache=False)
    two_steps, one_step = (effkit.apply(original(), attention.SSDConfig()) for _ in range(2))
    losses = zoo.distill(two_steps, [batch, batch])
    assert zoo.distill(one_step, [batch]) == losses[:1]
    errors = [
        F.mse_loss(layer.self_attn(*args, **kwargs)[0], output[0]) / output[0].square().mean()
        for layer, (args, kwargs, output) in zip(one_step.model.model.layers, calls, strict=True)
    ]
    assert float(torch.stack(errors).mean().detach()) == losses[1]


def test_distillation_brings_a_trained_model_back_a_long_way() -> None:
    """Of what is lost where every layer is swapped, without one step of language modelling."""
    model, heldout = zoo.load_model(), zoo.heldout_batches(windows=4, rows=4)
    trained = zoo.bits_per_byte(model, heldout)
    change = effkit.apply(model, attention.SSDConfig())
    swapped = zoo.bits_per_byte(model, heldout)
    zoo.distill(change, zoo.training_batches(steps=10, rows=2, context=256))
    assert trained < zoo.bits_per_byte(model, heldout) < (trained + swapped) / 2


def test_distill_needs_modules_that_replaced_others() -> None:
    change = effkit.apply(original(), attention.GQAConfig(num_kv_heads=1))
    with pytest.raises(TypeError, match="change is one of GQAConfig"):
        zoo.distill(change, [])


def test_what_is_refused() -> None:
    model, batch = original(), Batch.of("none")
    with pytest.raises(ValueError, match=r"layers is \(2,\), but there is no 2: the model has 2 layers"):
        effkit.apply(model, attention.SSDConfig(layers=(2,)))
    old = model(batch.ids).past_key_values
    change = effkit.apply(model, attention.SSDConfig(layers=(0,)))
    with pytest.raises(ValueError, match=r"layers is None, but model.layers.0.self_attn is recurrent already"):
        effkit.apply(model, attention.SSDConfig())
    with pytest.raises(ValueError, match="holds keys and values of 11 tokens at layer 0"):
        model(batch.ids, past_key_values=old)
    with pytest.raises(RuntimeError, match="a recurrent state cannot forget"):
        generate(model, Batch(batch.ids[:1], batch.mask[:1]), prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="output_attentions is True"):
        model(batch.ids, output_attentions=True)
    with pytest.raises(ValueError, match="packs several sequences in a row"):
        visible = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
        visible[..., 2:, :2] = False
        model(batch.ids[:1, :4], attention_mask=visible)
    new = model(batch.ids).past_key_values
    change.undo()
    with pytest.raises(RuntimeError, match="holds a recurrent state, but the model now has softmax attention"):
        model(batch.ids, past_key_values=new)
    dropping = original(attention_dropout=0.1).train()
    effkit.apply(dropping, attention.SSDConfig())
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        dropping(batch.ids)


def test_other_models_are_refused() -> None:
    config = hf.GPTNeoXConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"nothing in the model matches .*; it has GPTNeoXAttention"):
        effkit.apply(hf.GPTNeoXForCausalLM(config), attention.LinearAttentionConfig())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("linear", dict(layers=()), r"layers is \(\)"),
        ("linear", dict(layers=[1]), r"layers is \[1\]"),
        ("ssd", dict(layers=(True,)), r"layers is \(True,\)"),
        ("linear", dict(feature_map="identity"), "feature_map is 'identity'"),
        ("delta", dict(backend="cuda"), "backend is 'cuda'"),
        ("retention", dict(half_lives=(0.0, 1.0)), "half_lives is"),
        ("gla", dict(gate_rank=0), "gate_rank is 0"),
        ("log_linear", dict(max_length=0), "max_length is 0"),
    ],
)
def test_config_errors(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIGS[name](**arguments)
