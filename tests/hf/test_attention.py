"""Exact attention inside HuggingFace models, against transformers' own eager attention.

Eager attention of a padded batch is NaN in float64 (its mask holds the smallest float64, its softmax is float32). So
the reference of a padded batch is eager attention on every row by itself, without padding.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call

import effkit
import effkit.hf
from effkit.attention import SoftmaxAttentionConfig
from effkit.testing import assert_equivalent

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,  # so that attention decides the logits
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GROUPED = dict(num_key_value_heads=2)
SLIDING = dict(sliding_window=8)
MIXED = dict(layer_types=["sliding_attention", "full_attention"], **SLIDING)
DECODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralConfig, GROUPED | SLIDING),
    "qwen2": (hf.Qwen2Config, GROUPED | MIXED | dict(use_sliding_window=True)),
    "qwen3": (hf.Qwen3Config, GROUPED | MIXED | dict(use_sliding_window=True, head_dim=16)),
    "gemma2": (hf.Gemma2Config, GROUPED | MIXED | dict(head_dim=16, attn_logit_softcapping=3.0)),
    "gemma3": (hf.Gemma3TextConfig, GROUPED | MIXED | dict(head_dim=16)),
    "phi3": (hf.Phi3Config, GROUPED | SLIDING),
    "gpt_neox": (hf.GPTNeoXConfig, {}),
    "gpt_oss": (hf.GptOssConfig, GROUPED | MIXED | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
}
FAMILIES = [*DECODERS, "bert"]
LENGTH = 21  # past the window, and no power of two
PADDING = ["none", "left", "right"]


def eager_model(family: str, **options: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    if family == "bert":
        config = hf.BertConfig(**SMALL | options, attn_implementation="eager")
        return hf.BertForMaskedLM(config).eval()
    kind, own = DECODERS[family]
    config = kind(**SMALL | own | options, attn_implementation="eager")
    return hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()  # float64 experts too


def effkit_model(model: hf.PreTrainedModel, **options: Any) -> hf.PreTrainedModel:
    twin = copy.deepcopy(model)
    effkit.apply(twin, SoftmaxAttentionConfig(**options))
    return twin


@dataclass(frozen=True)
class Batch:
    """Two rows of tokens; in a padded one the second row is shorter."""

    ids: Tensor
    mask: Tensor

    @staticmethod
    def of(padding: str) -> Batch:
        ids = torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        if padding != "none":
            mask[1, slice(9) if padding == "left" else slice(12, None)] = 0
        return Batch(ids * mask, mask)

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp_min(0)

    def logits(self, model: Any) -> Tensor:
        """Logits of the real tokens."""
        out = model(self.ids, attention_mask=self.mask, position_ids=self.positions)
        return out.logits[self.mask.bool()]

    def logits_by_row(self, model: Any) -> Tensor:
        """The same, each row by itself without the padding at its ends."""
        rows = []
        for i, mask in enumerate(self.mask):
            real = slice(int(mask.argmax()), int(mask.nonzero()[-1]) + 1)
            rows.append(Batch(self.ids[i : i + 1, real], self.mask[i : i + 1, real]).logits(model))
        return torch.cat(rows)


class Call(nn.Module):
    """A computation with a model as a module, so that it becomes a function of the model's parameters."""

    def __init__(self, model: nn.Module, compute: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self) -> Tensor:
        return self.compute(self.model)


def assert_same(
    mine: nn.Module,
    theirs: nn.Module,
    compute: Callable[[Any], Tensor],
    reference: Callable[[Any], Tensor] | None = None,
    grads: bool = False,
) -> None:
    """The judge's word that compute(mine) is reference(theirs), and so are the gradients by every parameter."""
    candidate, yardstick = Call(mine, compute), Call(theirs, reference or compute)
    parameters = {name: value.detach() for name, value in yardstick.named_parameters()}
    # A key bias without rotation moves all scores of a query alike: its gradient is zero, and computed, noise.
    wanted = tuple(name for name in parameters if not name.endswith("attention.self.key.bias"))
    assert_equivalent(
        lambda **values: functional_call(candidate, values, ()),
        lambda **values: functional_call(yardstick, values, ()),
        parameters,
        grads=wanted if grads else False,
    )


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient(family: str, padding: str) -> None:
    batch, model = Batch.of(padding), eager_model(family)
    assert_same(effkit_model(model), model, batch.logits, batch.logits_by_row, grads=True)


def generate(model: Any, batch: Batch, **options: Any) -> Any:
    return model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=6, do_sample=False, **options)


@functools.cache
def eager_tokens(family: str) -> Tensor:
    return generate(eager_model(family), Batch.of("left"))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate(family: str, cache: str) -> None:
    """The tokens of eager attention, from logits that are those of one pass over all tokens, row by row."""
    batch, model = Batch.of("left"), eager_model(family)
    tokens = eager_tokens(family)
    mine = effkit_model(model)
    assert torch.equal(generate(mine, batch, cache_implementation=cache), tokens)

    def step_by_step(m: Any) -> Tensor:
        out = generate(m, batch, cache_implementation=cache, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits, dim=1)

    def in_one_pass(m: Any) -> Tensor:
        rows = [row[len(row) - length :][None] for row, length in zip(tokens, batch.mask.sum(1) + 6, strict=True)]
        return torch.stack([m(row).logits[0, -7:-1] for row in rows])

    assert_same(mine, model, step_by_step, in_one_pass)


def test_beam_search() -> None:
    batch, model = Batch.of("left"), eager_model("gemma3")
    assert torch.equal(generate(effkit_model(model), batch, num_beams=3), generate(model, batch, num_beams=3))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_prefill_in_chunks(family: str, static: bool) -> None:
    """A cache filled in pieces gives the logits of one pass; a static one moves its counter while masks are in use."""
    batch, model = Batch.of("left"), eager_model(family)

    def in_chunks(m: Any) -> Tensor:
        cache = hf.StaticCache(m.config, max_cache_len=30) if static else hf.DynamicCache(config=m.config)
        pieces = []
        for start, end in ((0, 5), (5, 6), (6, 17), (17, LENGTH)):
            ids, positions = batch.ids[:, start:end], batch.positions[:, start:end]
            out = m(ids, attention_mask=batch.mask[:, :end], position_ids=positions, past_key_values=cache)
            pieces.append(out.logits)
        return torch.cat(pieces, dim=1)[batch.mask.bool()]

    assert_same(effkit_model(model), model, in_chunks, batch.logits_by_row)


@pytest.mark.parametrize(("family", "padding"), [("gemma3", "none"), ("llama", "left")])
def test_compiles_into_one_graph(family: str, padding: str) -> None:
    batch, model = Batch.of(padding), eager_model(family)

    def compiled(m: Any) -> Tensor:
        return batch.logits(torch.compile(m, fullgraph=True, backend="eager"))

    assert_same(effkit_model(model), model, compiled, batch.logits_by_row, grads=True)


def test_generate_compiles_with_a_static_cache() -> None:
    batch, model = Batch.of("left"), eager_model("gemma3")
    compiling = hf.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    tokens = generate(effkit_model(model), batch, cache_implementation="static", compile_config=compiling)
    assert torch.equal(tokens, eager_tokens("gemma3"))


def test_holes_in_the_padding_raise_while_compiled() -> None:
    batch = Batch.of("none")
    batch.mask[0, 5] = 0
    mine = torch.compile(effkit_model(eager_model("llama")), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="padding between the tokens of a row"):
        mine(batch.ids, attention_mask=batch.mask)


def test_packed_sequences() -> None:
    """position_ids that restart separate the sequences of a row, and cost no [T, S] mask."""
    ids, lengths, model = Batch.of("none").ids[:1], (3, 11, 7), eager_model("gemma3")
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def by_sequence(m: Any) -> Tensor:
        return torch.cat([m(piece).logits for piece in ids.split(lengths, dim=1)], dim=1)

    def packed(m: Any) -> Tensor:
        return m(ids, position_ids=positions, use_cache=False).logits

    assert_same(effkit_model(model), model, packed, by_sequence, grads=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # in later versions; the new name is not in 5.17
def test_gradient_checkpointing() -> None:
    batch, model = Batch.of("left"), eager_model("mistral")
    mine = effkit_model(model).train()
    mine.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert_same(mine, model, batch.logits, batch.logits_by_row, grads=True)


DENSE = pytest.mark.filterwarnings("default:effkit attention takes memory:UserWarning")


@DENSE
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_holes_in_the_padding(family: str) -> None:
    """No number describes this mask: it becomes a tensor, with a warning, for softcaps and sinks as well."""
    batch, model = Batch.of("left"), eager_model(family)
    batch.mask[0, 4:6] = 0
    with pytest.warns(UserWarning, match="padding between the tokens of a row"):
        mine = effkit_model(model)
        batch.logits(mine)
    assert_same(mine, model, batch.logits, batch.logits_by_row, grads=True)


@DENSE
def test_packed_sequences_in_several_rows() -> None:
    batch, model = Batch.of("none"), eager_model("mistral")
    positions = torch.cat((torch.arange(9), torch.arange(LENGTH - 9))).expand(2, -1)
    mine = effkit_model(model)

    def packed(m: Any) -> Tensor:
        return m(batch.ids, position_ids=positions, use_cache=False).logits

    with pytest.warns(UserWarning, match="packed sequences"):
        packed(mine)
    assert_same(mine, model, packed, grads=True)


@DENSE
def test_chunks_and_windows_in_both_directions() -> None:
    batch = Batch.of("none")
    sizes = SMALL | dict(num_key_value_heads=2, head_dim=16)
    chunked = hf.Llama4TextConfig(
        **sizes, attention_chunk_size=8, intermediate_size_mlp=40, num_local_experts=1, attn_implementation="eager"
    )
    torch.manual_seed(0)
    for config in (chunked, hf.ModernBertConfig(**SMALL, local_attention=8, attn_implementation="eager")):
        kind = hf.AutoModelForMaskedLM if config.model_type == "modernbert" else hf.AutoModelForCausalLM
        model = kind.from_config(config).eval()
        mine = effkit_model(model)
        with pytest.warns(UserWarning, match="none of causal"):
            batch.logits(mine)
        assert_same(mine, model, batch.logits)


def test_encoder_and_decoder() -> None:
    """Cross attention, and a padded source."""
    batch, targets = Batch.of("right"), Batch.of("left").ids[:, -7:]
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in dict(ffn_dim=32, layers=1).items()}
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    config = hf.BartConfig(vocab_size=97, d_model=32, init_std=0.3, attn_implementation="eager", **sizes, **heads)
    torch.manual_seed(0)
    model = hf.BartModel(config).eval()
    mine = copy.deepcopy(model)
    change = effkit.apply(mine, SoftmaxAttentionConfig())
    attention = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"]
    assert change.matched == attention

    def padded(m: Any) -> Tensor:
        return m(batch.ids, attention_mask=batch.mask, decoder_input_ids=targets).last_hidden_state

    def by_row(m: Any) -> Tensor:
        sources = [ids[mask.bool()] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        pairs = zip(sources, targets, strict=True)
        return torch.cat([m(s[None], decoder_input_ids=t[None]).last_hidden_state for s, t in pairs])

    with torch.no_grad():
        assert_same(mine, model, padded, by_row)


def test_a_model_of_images_is_tried_on_given_data() -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4, attn_implementation="eager")).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mine = copy.deepcopy(model)
    with pytest.raises(ValueError, match="data is None, but ViTModel takes pixel_values"):
        effkit.apply(mine, SoftmaxAttentionConfig())
    effkit.apply(mine, SoftmaxAttentionConfig(), data=[dict(pixel_values=images)])
    assert_same(mine, model, lambda m: m(images).last_hidden_state)


def test_apply_and_undo() -> None:
    batch, model = Batch.of("left"), eager_model("gemma2").train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    before = batch.logits(model)
    change = effkit.apply(model, SoftmaxAttentionConfig(window=3))
    assert change.matched == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [module.training for module in model.modules()] == training
    assert model.config._attn_implementation == "effkit"
    json.loads(model.config.to_json_string())
    inner = effkit.apply(model, SoftmaxAttentionConfig(window=2))
    narrow = batch.logits(model)
    twin, change_of_twin = copy.deepcopy((model, inner))
    change_of_twin.undo()
    assert torch.equal(batch.logits(model), narrow) and not torch.equal(batch.logits(twin), narrow)
    inner.undo()
    assert torch.equal(batch.logits(model), batch.logits(twin))
    change.undo()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(batch.logits(model), before)


@DENSE
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [3, 50])
def test_a_window_for_every_layer(window: int, holes: bool) -> None:
    """The smaller of the given window and the layer's own."""
    batch = Batch.of("left")
    batch.mask[0, 4:6] -= int(holes)
    wide, narrow = eager_model("mistral"), eager_model("mistral", sliding_window=min(window, 8))
    mine = effkit_model(wide, window=window)
    assert_same(mine, narrow, batch.logits, batch.logits_by_row)
    if not holes:
        for cache in ("dynamic", "static"):
            assert torch.equal(generate(mine, batch, cache_implementation=cache), generate(narrow, batch))


def test_a_saved_model_keeps_its_window(tmp_path: Any) -> None:
    batch, model = Batch.of("left"), eager_model("llama")
    effkit.apply(model, SoftmaxAttentionConfig(window=3))
    effkit.save(model, tmp_path)
    assert torch.equal(batch.logits(effkit.load(tmp_path)), batch.logits(model))


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4),
        hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        hf.MPNetConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32),
        hf.DebertaV2Config(
            vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
        ),
        hf.T5Config(vocab_size=97, d_model=32, num_layers=1, d_ff=32, num_heads=4, d_kv=8),
    ],
    ids=lambda config: config.model_type,
)
def test_families_that_would_stay_eager_raise(config: Any) -> None:
    model = hf.AutoModel.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot take effkit attention"):
        effkit.apply(model, SoftmaxAttentionConfig())
    assert model.config._attn_implementation == before and model.training
    model(**model.dummy_inputs)


def test_what_is_not_computed_raises() -> None:
    batch, model = Batch.of("none"), effkit_model(eager_model("llama", attention_dropout=0.1))
    with pytest.raises(ValueError, match=r"dropout is 0\.1.*choices"):
        batch.logits(model.train())
    model.eval()
    with pytest.raises(ValueError, match=r"output_attentions is True.*choices"):
        model(batch.ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask is a 4-D torch\.float32 tensor.*choices"):
        model(batch.ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 21, 21\], expected"):
        model(batch.ids, attention_mask=torch.ones(2, LENGTH, LENGTH))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is given.*position_ids"):
        model(batch.ids, cu_seq_lens_q=torch.tensor([0, LENGTH]))
    layer, cache = model.model.layers[0].self_attn, hf.DynamicCache()
    states = torch.zeros(1, 3, 32)
    rotation = model.model.rotary_emb(states, torch.arange(3)[None])
    layer(states, rotation, None, cache)
    with pytest.raises(ValueError, match="attention_mask is None with 3 queries and 6 keys"):
        layer(states, rotation, None, cache)
    with pytest.raises(ValueError, match="window is 4, but BertSelfAttention attends in both directions"):
        effkit_model(eager_model("bert"), window=4)
    with pytest.raises(TypeError, match="model is a Linear, expected a transformers PreTrainedModel"):
        effkit.apply(nn.Linear(2, 2), SoftmaxAttentionConfig())
    with pytest.raises(effkit.BackendUnavailable, match="triton"):
        effkit_model(eager_model("llama"), backend="triton")


@pytest.mark.parametrize("place", [0, -1])
def test_padded_ids_without_a_mask_raise(place: int) -> None:
    model = eager_model("llama", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    change = effkit.apply(model, SoftmaxAttentionConfig())
    ids = torch.arange(3, 11).reshape(2, 4)
    model(ids)
    ids[1, place] = 0
    with pytest.raises(ValueError, match="attention_mask is None, but input_ids have the padding token 0"):
        model(ids)
    with pytest.raises(ValueError, match="attention_mask is None"):
        copy.deepcopy(model)(input_ids=ids)
    model(ids, attention_mask=torch.ones_like(ids))
    change.undo()
    model(ids)  # as transformers does by itself


def test_a_padding_token_that_ends_texts_proves_nothing() -> None:
    effkit_model(eager_model("llama", pad_token_id=2, eos_token_id=[2, 3]))(torch.tensor([[2, 5, 6]]))


@DENSE
def test_a_boolean_mask_of_the_user() -> None:
    batch, model = Batch.of("none"), eager_model("gemma2")
    visible = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    mine = effkit_model(model)
    with pytest.warns(UserWarning, match="4-D mask"):
        mine(batch.ids, attention_mask=visible)
    hidden = torch.zeros(visible.shape).masked_fill(~visible, -1e30)
    assert_same(
        mine,
        model,
        lambda m: m(batch.ids, attention_mask=visible).logits,
        lambda m: m(batch.ids, attention_mask=hidden.to(m.dtype)).logits,
    )
