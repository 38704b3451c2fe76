"""What Smooth-SwiGLU promises beyond equality with its reference on the ledger's cases."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.ops import INTERPRET, use_backend
from effkit.quant import (
    FP8Linear,
    SmoothSwiGLU,
    decode_fp8,
    encode_fp8,
    encode_smooth_fp8,
    from_fp8_codes,
    merge_smooth_scales,
    smooth_swiglu,
)
from effkit.quant.fp8_swiglu import smooth_linear
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_maxima(*maxima: float) -> tuple[Tensor, Tensor]:
    """gate and up [3, C] whose h has these maxima: silu(64) is 64."""
    up = torch.tensor(maxima) / 64 * torch.tensor([[0.0], [-1.0], [0.5]])
    return torch.full_like(up, 64.0), up


def with_outlier(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """gate and up [128, 256] of which one channel is aligned and has grown."""
    gate, up = draw(128, 256, seed=1), draw(128, 256, seed=2)
    gate[:, 7] = up[:, 7] = 400 * up[:, 7]
    return gate.to(dtype), up.to(dtype)


def decibels(signal: Tensor, noise: Tensor) -> float:
    return 20 * math.log10(signal.detach().norm() / noise.detach().norm())


class TestTheScales:
    @backends
    @pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's
    def test_powers_of_two_by_hand(self, backend: str) -> None:
        table = {
            1.0: 1.0,
            1.0 + 2**-23: 0.5,
            2.0: 0.5,
            3.0: 0.25,
            0.5: 2.0,
            0.75: 1.0,
            448.0: 2.0**-9,
            2.0**100: 2.0**-100,
            2.0**-100: 2.0**100,
            2.0**127: 2.0**-126,  # the smallest that is a normal number
            2.0**-120: 2.0**120,
            2.0**-126: 2.0**126,  # the largest whose inverse is one
            2.0**-140: 2.0**126,
            0.0: 1.0,
            math.inf: 1.0,
            math.nan: 1.0,
        }
        gate, up = with_maxima(*table)
        up[0] = 0  # also where it was inf * 0
        _, scale = smooth_swiglu(gate, up, backend=backend)
        assert scale.tolist() == list(table.values())

    @backends
    @dtypes
    def test_each_channel_peaks_between_a_half_and_one(self, backend: str, dtype: torch.dtype) -> None:
        size = torch.exp2(torch.linspace(-30, 30, 61))
        h, scale = smooth_swiglu(draw(29, 61).to(dtype), (draw(29, 61, seed=1) * size).to(dtype), backend=backend)
        peak = (h * scale).abs().amax(0)
        assert ((peak > 0.5) & (peak <= 1)).all() and torch.equal(torch.frexp(scale).mantissa, torch.full((61,), 0.5))

    @backends
    @dtypes
    def test_scaling_and_its_inverse_lose_nothing(self, backend: str, dtype: torch.dtype) -> None:
        """Without quantisers the scales change no bit, neither of h nor of what the down projection makes of it."""
        h, scale = smooth_swiglu(*with_outlier(dtype), backend=backend)
        smoothed, weight = h * scale.to(dtype), draw(64, 256, seed=3).to(dtype)
        normal = smoothed.abs() >= torch.finfo(dtype).tiny  # all but where silu of a large negative gate underflows
        assert torch.equal((smoothed / scale.to(dtype))[normal], h[normal]) and normal.float().mean() > 0.99
        assert torch.equal(F.linear(smoothed, weight / scale.to(dtype)), F.linear(h, weight))

    @backends
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
    def test_a_channel_is_its_own_affair(self, backend: str) -> None:
        gate, up = draw(9, 33), draw(9, 33, seed=1)
        h, scale = smooth_swiglu(gate, up, backend=backend)
        spoilt = up.clone()
        spoilt[4, 5], spoilt[:, 6] = math.nan, 1e30
        other_h, other_scale = smooth_swiglu(gate, spoilt, backend=backend)
        others = [c for c in range(33) if c not in (5, 6)]
        assert torch.equal(other_h[:, others], h[:, others]) and torch.equal(other_scale[others], scale[others])

    @backends
    def test_gradients_are_those_of_swiglu(self, backend: str) -> None:
        inputs = {"gate": draw(7, 65), "up": draw(7, 65, seed=1)}

        def plain(gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(gate) * up

        assert_equivalent(lambda gate, up: smooth_swiglu(gate, up, backend=backend)[0], plain, inputs)
        assert not smooth_swiglu(inputs["gate"].requires_grad_(), inputs["up"], backend=backend)[1].requires_grad

    @backends
    def test_gradients_of_gradients(self, backend: str) -> None:
        def twice(function: Any) -> Any:
            def of(gate: Tensor, up: Tensor) -> Any:
                leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
                first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
                return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves)

            return of

        ours, plain = twice(lambda g, u: smooth_swiglu(g, u, backend=backend)[0]), twice(lambda g, u: F.silu(g) * u)
        assert_equivalent(ours, plain, {"gate": draw(5, 9), "up": draw(5, 9, seed=1)}, grads=False)

    @pytest.mark.parametrize("backend", BACKENDS[-1:])
    def test_members_of_a_batch_have_scales_of_their_own(self, backend: str) -> None:
        gate, up = draw(3, 5, 9), draw(3, 5, 9, seed=1)
        mapped = torch.func.vmap(lambda g, u: smooth_swiglu(g, u, backend=backend))(gate, up)
        for i in range(3):
            alone = smooth_swiglu(gate[i], up[i], backend=backend)
            assert torch.equal(mapped[0][i], alone[0]) and torch.equal(mapped[1][i], alone[1])

    def test_errors(self) -> None:
        x = draw(3, 4)
        with pytest.raises(ValueError, match=r"smooth_swiglu: up has shape \[3, 5\], expected \[\*N, C\] with C=4"):
            smooth_swiglu(x, draw(3, 5))
        with pytest.raises(TypeError, match=r"gate has dtype torch.int64"):
            smooth_swiglu(x.long(), x)
        with pytest.raises(TypeError, match=r"up has dtype torch.bfloat16, expected torch.float32 as gate"):
            smooth_swiglu(x, x.bfloat16())


class TestTheCodes:
    @backends
    @dtypes
    @pytest.mark.parametrize("format", ["e4m3", "e5m2"])
    def test_equal_those_of_the_smoothed_tensor(self, backend: str, dtype: torch.dtype, format: str) -> None:
        """One pass gives what scaling and quantising with the constant scale give; nothing saturates."""
        h, channel_scale = smooth_swiglu(*with_outlier(dtype), backend=backend)
        codes, scale = encode_smooth_fp8(h, channel_scale, format=format, backend=backend)
        assert torch.equal(codes, encode_fp8(h.float() * channel_scale, scale, format=format, backend=backend)[0])
        peak = from_fp8_codes(codes, format).abs().amax(0) * scale
        assert ((peak >= 0.5) & (peak <= 1)).all()

    @backends
    def test_an_outlier_does_not_touch_the_others(self, backend: str) -> None:
        """Their codes are the same with and without it, bit for bit; a single scale loses them."""
        h, channel_scale = smooth_swiglu(*with_outlier(), backend=backend)
        others = [c for c in range(256) if c != 7]
        codes, scale = encode_smooth_fp8(h, channel_scale, backend=backend)
        calm, _ = encode_smooth_fp8(h[:, others], channel_scale[others], backend=backend)
        assert torch.equal(codes[:, others], calm)

        smooth = decode_fp8(codes, scale) / channel_scale
        plain = decode_fp8(*encode_fp8(h))
        alone = decode_fp8(*encode_fp8(h[:, others]))
        sqnr = [decibels(h[:, others], x - h[:, others]) for x in (plain[:, others], smooth[:, others], alone)]
        zeros = [float((x == 0).float().mean()) for x in (plain[:, others], smooth[:, others], alone)]
        assert sqnr[0] < 20 < 31 < sqnr[1] and sqnr[1] > sqnr[2] - 0.5
        assert zeros[0] > 0.4 > 0.002 > zeros[1]

    def test_errors(self) -> None:
        h, scale = draw(3, 4), torch.ones(4)
        with pytest.raises(ValueError, match=r"channel_scale has shape \[3\], expected \[C\] with C=4 from h"):
            encode_smooth_fp8(h, torch.ones(3))
        with pytest.raises(TypeError, match=r"h has dtype torch.float64, choices: torch.float16"):
            encode_smooth_fp8(h.double(), scale)
        with pytest.raises(TypeError, match=r"channel_scale has dtype torch.bfloat16, expected torch.float32"):
            encode_smooth_fp8(h, scale.bfloat16())
        with pytest.raises(ValueError, match="format is 'e3m4', choices: 'e4m3', 'e5m2'"):
            encode_smooth_fp8(h, scale, format="e3m4")


if not INTERPRET:

    class TestMergedScales:
        @dtypes
        def test_outputs_stay_what_they_were(self, dtype: torch.dtype) -> None:
            x, (gate, up) = draw(37, 32).to(dtype), draw(2, 64, 32, seed=1).to(dtype)
            up[3] *= 1000
            down = draw(32, 64, seed=2).to(dtype)

            def output(up: Tensor, down: Tensor) -> Tensor:
                return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

            _, scale = smooth_swiglu(F.linear(x, gate), F.linear(x, up))
            merged = merge_smooth_scales(up, down, scale)
            assert [weight.dtype for weight in merged] == [dtype, dtype] and not torch.equal(merged[0], up)
            assert torch.equal(output(*merged), output(up, down))
            _, left = smooth_swiglu(F.linear(x, gate), F.linear(x, merged[0]))
            assert torch.equal(left, torch.ones(64))  # every channel has the same size now

        def test_errors(self) -> None:
            with pytest.raises(ValueError, match=r"shapes \[4, 3\], \[3, 4\] and \[3\], expected up_weight \[C, K\]"):
                merge_smooth_scales(draw(4, 3), draw(3, 4), torch.ones(3))
            with pytest.raises(ValueError, match=r"down_weight has shape \[3, 5\], expected \[D, C\] with C=4"):
                merge_smooth_scales(draw(4, 3), draw(3, 5), torch.ones(4))
            with pytest.raises(TypeError, match=r"up_weight has dtype torch.float8_e4m3fn, choices: torch.float16"):
                merge_smooth_scales(draw(4, 3).to(torch.float8_e4m3fn), draw(3, 4), torch.ones(4))
            with pytest.raises(TypeError, match=r"down_weight has dtype torch.uint8, choices: torch.float16"):
                merge_smooth_scales(draw(4, 3), draw(3, 4).to(torch.uint8), torch.ones(4))


class StraightThrough(torch.autograd.Function):
    """A quantiser that gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return decode_fp8(*encode_fp8(x.float(), scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class QuantisedGradient(torch.autograd.Function):
    """Nothing on the way forward, e5m2 on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return decode_fp8(*encode_fp8(dy.float(), format="e5m2"), format="e5m2").to(dy.dtype)


class TestTheDownProjection:
    @backends
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_equation_of_quantised_operands(self, bias: bool, backend: str) -> None:
        gate, up = with_outlier()
        h, channel_scale = smooth_swiglu(gate[:17], up[:17])
        inputs = {"h": h, "weight": draw(33, 256, seed=3)} | ({"bias": draw(33, seed=4)} if bias else {})

        def equation(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            x = StraightThrough.apply(h * channel_scale, torch.tensor(2.0**-8))
            y = QuantisedGradient.apply(F.linear(x, StraightThrough.apply(weight / channel_scale)))
            return y if bias is None else y + bias

        def ours(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return smooth_linear(h, channel_scale, weight, bias)

        with use_backend(backend):
            assert_equivalent(ours, equation, inputs)

    def test_keeps_a_byte_for_each_element(self) -> None:
        h, channel_scale = smooth_swiglu(draw(64, 96), draw(64, 96, seed=1))
        weight = draw(32, 96, seed=2).requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            smooth_linear(h.requires_grad_(), channel_scale, weight)
        assert sum(x.nbytes for x in kept if x.data_ptr() != weight.data_ptr()) == h.numel() + channel_scale.nbytes

    def test_several_axes_and_no_rows(self) -> None:
        h, channel_scale = smooth_swiglu(draw(2, 3, 32), draw(2, 3, 32, seed=1))
        weight = draw(16, 32, seed=2)
        flat = smooth_linear(h.flatten(0, 1), channel_scale, weight)
        assert torch.equal(smooth_linear(h, channel_scale, weight), flat.reshape(2, 3, 16))
        assert smooth_linear(h[:0], channel_scale, weight).shape == (0, 3, 16)

    def test_compiles_in_one_piece(self) -> None:
        h, channel_scale = smooth_swiglu(draw(8, 32), draw(8, 32, seed=1))
        inputs = h, draw(16, 32, seed=2), draw(16, seed=3)

        def results(function: Any) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = function(leaves[0], channel_scale, *leaves[1:])
            return [y, *torch.autograd.grad(y.square().sum(), leaves)]

        compiled = torch.compile(smooth_linear, fullgraph=True, backend="aot_eager")
        for eager, traced in zip(results(smooth_linear), results(compiled), strict=True):
            assert torch.equal(eager, traced)


class GatedMLP(nn.Module):
    """As in Llama."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False, act_fn: Any = F.silu) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def per_tensor(mlp: GatedMLP) -> GatedMLP:
    """All three projections in FP8 with one scale for each tensor."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, FP8Linear.from_module(getattr(mlp, name), recipe="tensorwise"))
    return mlp


class TestTheModule:
    @pytest.mark.parametrize("bias", [False, True])
    def test_takes_over_the_parameters_of_an_mlp(self, bias: bool) -> None:
        mlp = GatedMLP(16, 32, bias).eval()
        new = SmoothSwiGLU.from_module(mlp)
        assert not new.training and new.state_dict().keys() == mlp.state_dict().keys()
        assert all(a is b for a, b in zip(new.parameters(), mlp.parameters(), strict=True))
        x = draw(64, 16)
        assert decibels(mlp(x), new(x) - mlp(x)) > 20
        assert SmoothSwiGLU(16, 32, bias).state_dict().keys() == mlp.state_dict().keys()

    def test_takes_over_that_of_llama(self) -> None:
        transformers = pytest.importorskip("transformers")
        from transformers.models.llama.modeling_llama import LlamaMLP

        mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)).to(
            torch.bfloat16
        )
        y = SmoothSwiGLU.from_module(mlp)(draw(2, 3, 16).bfloat16())
        assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 16)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match="mlp is Linear, expected linear layers gate_proj, up_proj and down_proj"):
            SmoothSwiGLU.from_module(nn.Linear(3, 4))
        quantised = GatedMLP(4, 8)
        quantised.down_proj = FP8Linear.from_module(quantised.down_proj)  # for inference
        with pytest.raises(TypeError, match=r"mlp is GatedMLP, expected .* with floating weights"):
            SmoothSwiGLU.from_module(quantised)
        with pytest.raises(ValueError, match="expected SiLU"):
            SmoothSwiGLU.from_module(GatedMLP(4, 8, act_fn=F.gelu))
        with pytest.raises(ValueError, match="gradient_format is 'e3m4', choices: 'e4m3', 'e5m2'"):
            SmoothSwiGLU(4, 8, gradient_format="e3m4")
        with pytest.raises(ValueError, match="recipe is 'smooth', choices"):
            SmoothSwiGLU(4, 8, recipe="smooth")


class TestTheOutlierOfTrillionTokens:
    """Late in training the gate and up weights of a channel align and grow. Here they start so, in two layers.

    That channel itself is held, as its growth takes many thousands of steps; the others learn those of a teacher.
    """

    HIDDEN, INTERMEDIATE, GROWTH = 32, 64, 1000.0

    def layers(self, change: float) -> nn.ModuleList:
        mlps = nn.ModuleList([GatedMLP(self.HIDDEN, self.INTERMEDIATE) for _ in range(2)])
        with torch.no_grad():
            for i, mlp in enumerate(mlps):
                for j, layer in enumerate((mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
                    layer.weight.copy_(draw(*layer.weight.shape, seed=10 * i + j) / layer.in_features**0.5)
                gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
                up[0] = gate[0]
                for weight in (gate, up):
                    weight[0] *= self.GROWTH
                    weight[1:] += change * draw(*weight[1:].shape, seed=100 + i) / self.HIDDEN**0.5
                down[:, 0] /= self.GROWTH**2
        return mlps

    def train(self, mlps: nn.ModuleList, steps: int) -> tuple[list[float], list[Tensor]]:
        """The losses, and the gradients of the first step without those of the outlier."""

        def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
            for layer in layers:
                x = x + layer(F.rms_norm(x, x.shape[-1:]))
            return x

        teacher, losses = self.layers(0.3), []
        optimizer = torch.optim.AdamW(mlps.parameters(), lr=3e-3, weight_decay=0)
        for step in range(steps):
            x = draw(128, self.HIDDEN, seed=1000 + step)
            with torch.no_grad():
                target = run(teacher, x)
            loss = (run(mlps, x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in mlps.named_parameters():
                (parameter.grad[:, 0] if "down" in name else parameter.grad[0]).zero_()
            losses.append(loss.item())
            if step == 0:
                gradients = [parameter.grad.clone() for parameter in mlps.parameters()]
            optimizer.step()
        return losses, gradients

    @pytest.mark.slow
    def test_plain_fp8_fails_and_smooth_swiglu_learns(self) -> None:
        mlps = {
            "float32": self.layers(0),
            "plain": nn.ModuleList([per_tensor(mlp) for mlp in self.layers(0)]),
            "smooth": nn.ModuleList([SmoothSwiGLU.from_module(mlp) for mlp in self.layers(0)]),
        }
        losses, gradients = {}, {}
        for name, layers in mlps.items():
            losses[name], gradients[name] = self.train(layers, 40)
        start, end = losses["float32"][0], {name: sum(values[-5:]) / 5 for name, values in losses.items()}
        # The loss of plain FP8 starts at several times that of the others, and stays there.
        assert losses["plain"][0] > 3 * start and min(losses["plain"]) > 3 * start
        # Smooth-SwiGLU starts where float32 starts and comes as far, up to a floor that rounding leaves.
        assert losses["smooth"][0] < 1.05 * start and end["smooth"] - end["float32"] < 0.05 * start
        # Gradients: with plain FP8 those of the down projections point anywhere, with Smooth-SwiGLU where they should.
        for exact, plain, smooth in zip(gradients["float32"], gradients["plain"], gradients["smooth"], strict=True):
            noise = [decibels(exact, exact - other) for other in (plain, smooth)]
            assert noise[0] < 3 < 12 < noise[1]
