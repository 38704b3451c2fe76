"""What DyT promises beyond equality with its reference on the ledger's cases."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkit
from effkit.change import ChangeConfig
from effkit.norm import DyT, DyTConfig, dynamic_tanh
from effkit.norm.dyt import dynamic_tanh_reference
from effkit.ops import INTERPRET, BackendUnavailable
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
HALF = [torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(0.7), draw(channels, seed=1), draw(channels, seed=2)


def with_backend(backend: str) -> Any:
    def fn(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return dynamic_tanh(x, alpha, weight, bias, backend=backend)

    return fn


class TestTheFunction:
    @backends
    def test_output_stays_within_the_weight(self, backend: str) -> None:
        """What makes it squash outliers: no input leads further than `weight` from 0."""
        x, (alpha, weight, _) = 1e4 * draw(7, 33), parameters(33)
        y = dynamic_tanh(x, alpha, weight, backend=backend)
        assert (y.abs() <= weight.abs()).all()
        far = x.abs() > 100
        assert torch.equal(y[far], (x.sign() * weight)[far])

    @backends
    def test_an_element_depends_on_itself_alone(self, backend: str) -> None:
        """Unlike a norm: a row computed alone, and with its neighbours turned to NaN, has the same bits."""
        x, (alpha, weight, bias) = draw(5, 48), parameters(48)
        y = dynamic_tanh(x, alpha, weight, bias, backend=backend)
        assert torch.equal(dynamic_tanh(x[2:3], alpha, weight, bias, backend=backend), y[2:3])
        spoilt = x.clone()
        spoilt[:, ::2] = math.nan
        assert torch.equal(dynamic_tanh(spoilt, alpha, weight, bias, backend=backend)[:, 1::2], y[:, 1::2])

    @backends
    def test_slope_at_zero_is_alpha_times_weight(self, backend: str) -> None:
        alpha, weight, bias = parameters(19)
        x = torch.zeros(3, 19, requires_grad=True)
        y = dynamic_tanh(x, alpha, weight, bias, backend=backend)
        assert torch.equal(y, bias.expand(3, 19))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (alpha * weight).expand(3, 19))

    @backends
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's
    def test_strange_values_go_through_as_in_tanh(self, backend: str, dtype: torch.dtype) -> None:
        x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, 1e-30, -1e-5, 60000.0]], dtype=dtype)
        y = dynamic_tanh(x, torch.tensor(1.0), backend=backend)
        assert y[0, 0].isnan() and y[0, 1:4].tolist() == [1.0, -1.0, 0.0] and y[0, 6] == 1.0
        assert torch.equal(y[0, 4:6], x[0, 4:6])  # the smallest values pass unchanged, none is lost

    @backends
    @pytest.mark.parametrize("scale", [1e-6, 1e-4, 1 / 64, 0.03, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_small_values_keep_their_digits(self, backend: str, scale: float, dtype: torch.dtype) -> None:
        x, alpha = (scale * draw(40, 33)).to(dtype), torch.tensor(1.0)
        assert_equivalent(with_backend(backend), dynamic_tanh_reference, (x, alpha))

    @backends
    @pytest.mark.parametrize(
        "dtypes",
        [
            (torch.bfloat16, torch.float32, torch.float32, torch.float32),
            (torch.float16, torch.float32, torch.float16, torch.bfloat16),
            (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16),
        ],
        ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes),
    )
    def test_parameters_of_other_dtypes(self, backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
        inputs = (draw(9, 40), *parameters(40))
        inputs = tuple(tensor.to(dtype) for tensor, dtype in zip(inputs, dtypes, strict=True))
        assert dynamic_tanh(*inputs, backend=backend).dtype == dtypes[0]
        assert_equivalent(with_backend(backend), dynamic_tanh_reference, inputs)

    @backends
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[..., :40],
            lambda x: x[..., 40:].permute(2, 0, 1, 3),
            lambda x: x[:, 1:4, :, :40],
            lambda x: x[1:3, 1:4, ::2, :40],
            lambda x: x[..., ::2],
            lambda x: x[:1, :, :, :40].expand(4, 6, 5, 40),
            lambda x: x[:, 0, 0].reshape(-1)[:60].unfold(0, 40, 1),
            lambda x: x[..., 0, :40].transpose(1, 2)[:, :40, :5],
        ],
        ids=["slice", "permuted", "inner", "no two strides", "stepped", "expanded", "overlapping", "columns"],
    )
    def test_any_strides(self, backend: str, view: Any) -> None:
        x = view(draw(4, 6, 5, 80))
        assert_equivalent(with_backend(backend), dynamic_tanh_reference, (x, *parameters(x.shape[-1])))

    @backends
    def test_gradient_of_a_transposed_result(self, backend: str) -> None:
        """The gradient that arrives has other strides than x."""

        def through(fn: Any) -> Any:
            return lambda x, *rest: (fn(x, *rest).transpose(0, 1) * draw(5, 4, 33, seed=3).to(x.dtype)).sum(0)

        inputs = (draw(4, 5, 33), *parameters(33))
        assert_equivalent(through(with_backend(backend)), through(dynamic_tanh_reference), inputs)

    @backends
    def test_alpha_of_one_element(self, backend: str) -> None:
        x, (alpha, weight, bias) = draw(3, 8), parameters(8)
        one = alpha.reshape(1).requires_grad_()
        y = dynamic_tanh(x, one, weight, bias, backend=backend)
        assert torch.equal(y, dynamic_tanh(x, alpha, weight, bias, backend=backend))
        assert torch.autograd.grad(y.sum(), one)[0].shape == (1,)

    @backends
    def test_the_gradient_can_be_differentiated(self, backend: str) -> None:
        def twice(fn: Any) -> Any:
            def penalty(*inputs: Tensor) -> Tensor:
                leaves = [tensor.detach().requires_grad_() if not tensor.requires_grad else tensor for tensor in inputs]
                grads = torch.autograd.grad(fn(*leaves).square().sum(), leaves, create_graph=True)
                return torch.cat([grad.flatten() for grad in grads])

            return penalty

        inputs = (draw(5, 12), *parameters(12))
        assert_equivalent(twice(with_backend(backend)), twice(dynamic_tanh_reference), inputs)

    @backends
    @pytest.mark.parametrize("dims", [(0, None, None, None), (1, None, None, None), (None, 0, 0, None)])
    def test_vmap(self, backend: str, dims: tuple[int | None, ...]) -> None:
        x, (alpha, weight, bias) = draw(4, 3, 12), parameters(12)
        if dims[1] is not None:
            x, alpha, weight = x[0], torch.tensor([0.3, 0.5]), draw(2, 12)
        mapped, reference = (torch.vmap(fn, dims) for fn in (with_backend(backend), dynamic_tanh_reference))
        assert_equivalent(mapped, reference, (x, alpha, weight, bias))

    @backends
    def test_gradients_of_each_sample(self, backend: str) -> None:
        def per_sample(fn: Any) -> Any:
            grad = torch.func.grad(lambda x, *rest: fn(x, *rest).square().sum(), argnums=(1, 2, 3))
            return torch.vmap(grad, (0, None, None, None))

        inputs = (draw(3, 5, 12), *parameters(12))
        assert_equivalent(per_sample(with_backend(backend)), per_sample(dynamic_tanh_reference), inputs, grads=False)

    @pytest.mark.parametrize("backend", [p for p in BACKENDS if p != "reference"])
    def test_saves_its_inputs_and_nothing_else(self, backend: str) -> None:
        x, rest = draw(6, 32).requires_grad_(), [p.requires_grad_() for p in parameters(32)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            dynamic_tanh(x, *rest, backend=backend)
        pointers = {tensor.data_ptr() for tensor in (x, *rest)}
        assert saved and {tensor.data_ptr() for tensor in saved} <= pointers

    def test_float64_second_derivatives(self) -> None:
        inputs = [tensor.double().requires_grad_() for tensor in (draw(3, 4), *parameters(4))]
        assert torch.autograd.gradgradcheck(with_backend("torch"), inputs)

    def test_the_torch_path_computes_in_chunks(self) -> None:
        """More elements than one chunk holds."""
        inputs = (draw(401, 701), *parameters(701))
        assert_equivalent(with_backend("torch"), dynamic_tanh_reference, inputs)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(weight=torch.zeros(7)), ValueError, r"weight has shape \[7\], expected \[C\] with C=8 from x"),
            (dict(bias=torch.zeros(1, 8)), ValueError, r"bias has shape \[1, 8\], expected \[C\]"),
            (dict(alpha=torch.zeros(8)), ValueError, r"alpha has shape \[8\], expected \[\]"),
            (dict(alpha=0.5), TypeError, r"alpha is float, expected a tensor \[\]"),
            (dict(x=torch.tensor(1.0)), ValueError, r"x has shape \[\], expected \[\*N, C\]"),
            (dict(x=torch.zeros(2, 8, dtype=torch.int64)), TypeError, "x has dtype torch.int64, choices: .*bfloat16"),
            (dict(weight=torch.zeros(8, dtype=torch.cfloat)), TypeError, "weight has dtype torch.complex64, choices"),
            (dict(bias=torch.zeros(8, device="meta")), ValueError, "bias is on meta, expected cpu as x"),
            (dict(backend="cuda"), ValueError, "backend is 'cuda', choices: 'reference', 'torch', 'triton'"),
        ],
        ids=str,
    )
    def test_errors(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments = dict(x=torch.zeros(2, 8), alpha=torch.tensor(0.5)) | change
        with pytest.raises(error, match=f"dynamic_tanh: {message}"):
            dynamic_tanh(**arguments)

    def test_the_kernel_says_why_it_cannot(self) -> None:
        with pytest.raises(BackendUnavailable, match="not on a CUDA device and TRITON_INTERPRET is not set"):
            dynamic_tanh(torch.zeros(2, 8), torch.tensor(0.5), backend="triton")

    @pytest.mark.interpreter
    def test_float64_is_refused_by_the_kernel(self) -> None:
        with pytest.raises(BackendUnavailable, match=r"x has dtype torch\.float64, the kernel computes in float32"):
            dynamic_tanh(torch.zeros(2, 8).double(), torch.tensor(0.5), backend="triton")


class RMSNorm(nn.Module):
    """What HuggingFace models carry; `offset` is how Gemma stores its gain."""

    def __init__(self, channels: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(draw(channels)), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class TestTheModule:
    def test_starts_as_the_paper_says(self) -> None:
        layer = DyT(16)
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            "alpha": (1,),
            "weight": (16,),
            "bias": (16,),
        }
        assert layer.alpha.item() == 0.5 and (layer.weight == 1).all() and (layer.bias == 0).all()
        x = draw(3, 16)
        assert torch.equal(layer(x), dynamic_tanh(x, layer.alpha, layer.weight, layer.bias))
        assert str(layer) == "DyT(16, alpha0=0.5, weight=True, bias=True)"

    def test_on_the_meta_device_and_back(self) -> None:
        layer = DyT(4, 0.25, bias=False, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
        layer.reset_parameters()
        assert layer.alpha.item() == 0.25 and (layer.weight == 1).all() and layer.bias is None
        assert layer(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16

    @pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6)])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_keeps_what_a_norm_has(self, norm: nn.Module, dtype: torch.dtype) -> None:
        norm = norm.to(dtype).eval()
        bias: Any = getattr(norm, "bias", None)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(draw(6))
        norm.weight.requires_grad_(False)
        new = DyT.from_module(norm, 0.3)
        assert torch.equal(new.weight, norm.weight) and new.weight is not norm.weight
        assert not new.weight.requires_grad and not new.training
        assert (new.bias is None) == (bias is None) and (bias is None or torch.equal(new.bias, bias))
        assert {p.dtype for p in new.parameters()} == {dtype} and new.alpha0 == 0.3

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_no_gain_where_the_norm_has_none(self, norm: Any) -> None:
        new = DyT.from_module(norm(6, elementwise_affine=False), dtype=torch.bfloat16)
        assert new.weight is None and new.bias is None and new.alpha.dtype == torch.bfloat16

    @pytest.mark.parametrize("offset", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_a_gain_stored_as_an_offset_becomes_plain(self, offset: float, dtype: torch.dtype) -> None:
        norm = RMSNorm(64, offset).to(dtype)
        assert torch.equal(DyT.from_module(norm).weight, norm.weight + offset)

    def test_refuses_what_is_no_norm_over_the_last_axis(self) -> None:
        with pytest.raises(ValueError, match=r"normalises over shape \[4, 6\], expected one axis \[C\]"):
            DyT.from_module(nn.LayerNorm((4, 6)))
        with pytest.raises(
            ValueError, match="RMSNorm turns a row of ones into its weight plus 7, expected plus 0 or 1"
        ):
            DyT.from_module(RMSNorm(8, 7.0))

    @pytest.mark.parametrize("alpha0", [0.0, -1.0, math.nan, math.inf])
    def test_alpha0_out_of_range(self, alpha0: float) -> None:
        with pytest.raises(ValueError, match=f"alpha0 is {alpha0}, expected a finite number above 0"):
            DyT(4, alpha0)

    def test_no_channels(self) -> None:
        with pytest.raises(ValueError, match="channels is 0, expected at least 1"):
            DyT(0)

    def test_alpha_learns_the_scale_of_its_input(self) -> None:
        """Fitted to the outputs of a norm, alpha shrinks for wide inputs and grows for narrow ones."""
        ends = []
        for std in (0.5, 4.0):
            x = std * draw(64, 16)
            target = nn.functional.layer_norm(x, (16,))
            layer = DyT(16)
            optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
            for _ in range(60):
                optimiser.zero_grad()
                (layer(x) - target).square().mean().backward()
                optimiser.step()
            ends.append(layer.alpha.item())
        assert ends[0] > 0.5 > ends[1] > 0


class TestTheConfig:
    @pytest.mark.parametrize(
        "config",
        [DyTConfig(), DyTConfig(0.3), DyTConfig((0.8, 0.2), target=("layers.0.",)), DyTConfig(query_key_norms=True)],
    )
    def test_json_round_trip(self, config: DyTConfig) -> None:
        assert ChangeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            (dict(alpha0=-0.5), ValueError, "alpha0 is -0.5, expected a finite number above 0"),
            (dict(alpha0=(0.5, 0.0)), ValueError, "alpha0 is 0.0, expected a finite number above 0"),
            (dict(alpha0=(0.5,)), ValueError, r"alpha0 is \(0.5,\), expected a number or a pair"),
            (dict(alpha0="0.5"), TypeError, "alpha0 is '0.5', expected a number"),
            (dict(alpha0=True), TypeError, "alpha0 is True, expected a number"),
            (dict(target="norm"), TypeError, "target is 'norm', expected a tuple of parts of module names"),
            (dict(target=()), TypeError, r"target is \(\), expected a tuple"),
        ],
        ids=str,
    )
    def test_errors(self, fields: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            DyTConfig(**fields)

    @pytest.mark.parametrize(
        ("place", "names"),
        [
            (
                0.8,
                "input_layernorm self_attn_layer_norm attention_norm pre_attention_layernorm ln_1 ln1 norm1 norm_1 "
                "layer_norm1 layer_norm_1 layernorm_before rms_norm1 encoder_attn_layer_norm attn_ln",
            ),
            (
                0.2,
                "post_attention_layernorm ln_2 ln_f norm norm2 final_layer_norm pre_feedforward_layernorm LayerNorm "
                "layernorm_after post_feedforward_layernorm_1 post_self_attn_layernorm ffn_norm ln_q norm_f",
            ),
        ],
    )
    def test_names_in_front_of_attention(self, place: float, names: str) -> None:
        config = DyTConfig((0.8, 0.2))
        for name in names.split():
            assert config.alpha0_of(f"model.layers.3.{name}") == place, name
            assert config.takes(f"model.layers.3.{name}"), name

    @pytest.mark.parametrize(
        "name", ["q_norm", "k_norm", "v_norm", "q_layernorm", "query_layernorm", "kv_a_layernorm", "q_a_layernorm"]
    )
    def test_norms_inside_attention_are_kept_unless_asked_for(self, name: str) -> None:
        assert not DyTConfig().takes(f"layers.0.self_attn.{name}")
        assert DyTConfig(query_key_norms=True).takes(f"layers.0.self_attn.{name}")
        assert DyTConfig((0.8, 0.2), query_key_norms=True).alpha0_of(f"layers.0.self_attn.{name}") == 0.8


def block(**norms: nn.Module) -> nn.Module:
    return nn.ModuleDict({"body": nn.ModuleDict({"linear": nn.Linear(8, 8), **norms})})


class TestAppliedToAnyModel:
    def test_replaces_keeps_and_undoes(self) -> None:
        model = block(input_layernorm=RMSNorm(8), q_norm=RMSNorm(4), norm2=nn.LayerNorm(8), group=nn.GroupNorm(2, 8))
        before = dict(model.named_modules())
        change = effkit.apply(model, DyTConfig((0.8, 0.2)))
        assert change.matched == ["body.input_layernorm", "body.norm2"]
        assert change.edit.notes == {"norms kept": ["body.q_norm"]}
        assert [m.alpha0 for m in model.modules() if isinstance(m, DyT)] == [0.8, 0.2]
        assert effkit.describe(model)[0]["parameters"][1] - effkit.describe(model)[0]["parameters"][0] == 2
        change.undo()
        assert dict(model.named_modules()) == before

    def test_target(self) -> None:
        model = block(input_layernorm=RMSNorm(8), norm2=nn.LayerNorm(8))
        assert effkit.apply(model, DyTConfig(target=("norm2",))).matched == ["body.norm2"]

    def test_a_norm_under_two_names_stays_one(self) -> None:
        shared = nn.LayerNorm(8)
        model = block(first=shared, second=shared)
        assert effkit.apply(model, DyTConfig()).matched == ["body.first", "body.second"]
        body = model.get_submodule("body")
        assert body.first is body.second and isinstance(body.first, DyT)

    def test_leaves_the_model_alone_when_it_fails(self) -> None:
        model = block(first=nn.LayerNorm(8), second=nn.LayerNorm((2, 8)))
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=r"normalises over shape \[2, 8\]"):
            effkit.apply(model, DyTConfig())
        assert dict(model.named_modules()) == before and effkit.describe(model) == []

    def test_no_match_names_what_there_is(self) -> None:
        with pytest.raises(
            ValueError, match=r"nothing in the model matches \['LayerNorm', 'RMSNorm'\]; it has .*Linear"
        ):
            effkit.apply(block(), DyTConfig())
        with pytest.raises(ValueError, match=r"matches \['input_norm'\]; it has body.input_layernorm"):
            effkit.apply(block(input_layernorm=RMSNorm(8)), DyTConfig(target=("input_norm",)))

    def test_a_norm_without_parameters_goes_where_the_model_is(self) -> None:
        model = block(norm=nn.LayerNorm(8, elementwise_affine=False)).to(torch.bfloat16)
        effkit.apply(model, DyTConfig())
        assert model.get_submodule("body.norm").alpha.dtype == torch.bfloat16


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A HuggingFace model of random weights, norms included."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    heads = dict(num_key_value_heads=2, head_dim=8)
    config = {
        "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **sizes),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes),
        "bert": lambda: transformers.BertConfig(is_decoder=True, **sizes | dict(pad_token_id=0)),
        "qwen3": lambda: transformers.Qwen3Config(**heads, **sizes),
        "gemma2": lambda: transformers.Gemma2Config(**heads, **sizes),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(built.parameters()):
            if parameter.ndim == 1:
                parameter.copy_(draw(*parameter.shape, seed=seed))
    return built


class TestAppliedToHuggingFaceModels:
    IDS = torch.arange(14).reshape(2, 7)

    @pytest.mark.parametrize(
        ("kind", "norms", "kept"),
        [("llama", 5, 0), ("gpt_neox", 5, 0), ("bert", 6, 0), ("qwen3", 5, 4), ("gemma2", 9, 0)],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_apply_save_load_undo(self, kind: str, norms: int, kept: int, dtype: torch.dtype, tmp_path: Path) -> None:
        model = tiny(kind, dtype)
        original, modules = model(self.IDS).logits, dict(model.named_modules())
        change = effkit.apply(model, DyTConfig((0.8, 0.2)))
        assert len(change.matched) == norms and len(change.edit.notes["norms kept"]) == kept
        changed = model(self.IDS).logits
        assert changed.dtype == dtype and changed.isfinite().all() and not torch.equal(changed, original)
        effkit.save(model, tmp_path)
        loaded = effkit.load(tmp_path)
        assert torch.equal(loaded(self.IDS).logits, changed)
        assert [entry["fields"] for entry in effkit.describe(loaded)] == [
            entry["fields"] for entry in effkit.describe(model)
        ]
        change.undo()
        assert torch.equal(model(self.IDS).logits, original) and dict(model.named_modules()) == modules

    @pytest.mark.parametrize(("kind", "offset"), [("llama", 0), ("qwen3", 0), ("gemma2", 1)])
    def test_gain(self, kind: str, offset: int) -> None:
        model = tiny(kind)
        name = "model.layers.1.input_layernorm"
        weight = model.get_submodule(name).weight
        effkit.apply(model, DyTConfig())
        assert torch.equal(model.get_submodule(name).weight, weight + offset)

    def test_trains(self) -> None:
        """A changed model takes gradients everywhere and learns a batch."""
        model = tiny("llama")
        effkit.apply(model, DyTConfig((0.8, 0.2)))
        optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for _ in range(6):
            optimiser.zero_grad()
            loss = model(self.IDS, labels=self.IDS).loss
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimiser.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
