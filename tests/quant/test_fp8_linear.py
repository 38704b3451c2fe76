"""What FP8 products and FP8Linear for inference promise beyond equality with their references on the ledger's cases."""

import copy
import functools
import io
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.ops import INTERPRET, Op, get_op
from effkit.quant import FP8Linear, decode_fp8, dequantize_fp8, encode_fp8, linear_fp8, matmul_fp8, quantize_fp8
from effkit.quant.fp8_matmul import matmul_fp8_reference, scaled_mm
from effkit.testing import assert_equivalent, make_inputs

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
in_the_ordinary_process = pytest.mark.skipif(INTERPRET, reason="nothing that a kernel computes")
GRANULARITIES = ("tensor", "row", "block")
granularities = pytest.mark.parametrize("granularity", GRANULARITIES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr(got: Tensor, wanted: Tensor) -> float:
    """Signal to noise in dB."""
    return 20 * torch.log10(wanted.norm() / (got - wanted).norm()).item()


def dense(out_features: int, in_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias)
    with torch.no_grad():
        layer.weight.copy_(draw(out_features, in_features, seed=1))
        if bias:
            layer.bias.copy_(draw(out_features, seed=2))
    return layer


class TestProducts:
    @backends
    @granularities
    def test_the_identity_reads_the_weight(self, backend: str, granularity: str) -> None:
        """Each element comes back with its own scale, rounded once."""
        codes, scale = encode_fp8(draw(200, 300), granularity=granularity)
        weight = decode_fp8(codes, scale, granularity=granularity)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = linear_fp8(torch.eye(300, dtype=dtype), codes, scale, backend=backend)
            assert torch.equal(y, weight.T.to(dtype))

    @backends
    def test_each_block_of_both_operands_has_its_scale(self, backend: str) -> None:
        """One nonzero in a row of a: nothing is summed, so that the result has the bits of the weight."""
        a = torch.zeros(7, 300)
        places = torch.tensor([0, 1, 127, 128, 200, 256, 299])
        a[torch.arange(7), places] = 0.5
        b = quantize_fp8(draw(150, 300, seed=3), "block")
        a_scale = 2.0 ** torch.arange(-10, 11).reshape(7, 3)
        a_codes, _ = encode_fp8(a, torch.ones(7, 3), granularity="block", block=(1, 128))
        y = matmul_fp8(a_codes, a_scale, b.codes, b.scale, backend=backend)
        decoded = decode_fp8(b.codes.view(torch.uint8), b.scale, granularity="block")
        assert torch.equal(y, (0.5 * a_scale[torch.arange(7), places // 128])[:, None] * decoded[:, places].T)

    @backends
    def test_not_a_number_spoils_its_row_alone(self, backend: str) -> None:
        codes, scale = encode_fp8(draw(5, 200), granularity="row")
        codes[3, 150] = 0xFF
        weight = quantize_fp8(draw(9, 200, seed=1), "row")
        y = matmul_fp8(codes, scale, weight.codes, weight.scale, backend=backend)
        assert torch.equal(y.isnan().all(1), torch.arange(5) == 3) and torch.equal(y.isnan().any(1), y.isnan().all(1))

    @backends
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, on rows beyond the matrix
    def test_infinity_of_e5m2(self, backend: str) -> None:
        codes = torch.full((1, 64), 0x3C, dtype=torch.uint8)  # ones
        infinite = codes.clone()
        infinite[0, 5] = 0xFC
        one = torch.ones(())
        y = matmul_fp8(infinite, one, codes, one, a_format="e5m2", b_format="e5m2", backend=backend)
        assert y.item() == -torch.inf

    @backends
    def test_float8_tensors_are_their_codes(self, backend: str) -> None:
        x = quantize_fp8(draw(5, 48), "row", "e5m2")
        w = quantize_fp8(draw(7, 48, seed=1), "row")
        y = matmul_fp8(x.codes, x.scale, w.codes, w.scale, backend=backend)
        codes = x.codes.view(torch.uint8), w.codes.view(torch.uint8)
        assert torch.equal(y, matmul_fp8(codes[0], x.scale, codes[1], w.scale, a_format="e5m2", backend=backend))

    @in_the_ordinary_process
    def test_blocks_that_share_a_scale_are_one_tensor(self) -> None:
        """A scale for all, for each row and for each block, all the same number: three spellings of one product."""
        a, b = encode_fp8(draw(9, 300))[0], encode_fp8(draw(140, 300, seed=1))[0]
        s = torch.tensor(0.25)
        y = matmul_fp8(a, s, b, s)
        for shape_a, shape_b in (((9, 1), (140, 1)), ((9, 3), (2, 3)), ((9, 3), (140, 3))):
            assert torch.equal(matmul_fp8(a, s.expand(shape_a), b, s.expand(shape_b)), y)

    @in_the_ordinary_process
    @pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")])
    def test_torch_scaled_mm_computes_the_same(self, formats: tuple[str, str]) -> None:
        """torch's own operator, which on a CPU multiplies in float32 and rounds once."""
        a, b = (quantize_fp8(draw(*s, seed=1), format=f) for s, f in zip(((33, 64), (48, 64)), formats, strict=True))
        theirs = torch._scaled_mm(a.codes, b.codes.t(), a.scale, b.scale, out_dtype=torch.bfloat16)
        assert_equivalent(
            lambda a_scale, b_scale, bias: theirs,
            lambda a_scale, b_scale, bias: matmul_fp8(a.codes, a_scale, b.codes, b_scale, bias),
            {"a_scale": a.scale, "b_scale": b.scale, "bias": torch.zeros(48, dtype=torch.bfloat16)},
            grads=False,
        )

    @in_the_ordinary_process
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", ["vector", "tensor", "rows", "rows and tensor", "gradients", "one"])
    def test_the_way_through_scaled_mm(self, case: str, dtype: torch.dtype) -> None:
        """What CUDA devices with FP8 products take, with its padding and scales, through torch's operator for CPUs."""
        op = get_op("matmul_fp8")
        inputs = make_inputs(op, op.case(case), dtype)
        inputs = {name: x.reshape(-1, x.shape[-1]) if name == "a" else x for name, x in inputs.items()}
        format = {"a_format": op.case(case).options.get("a_format", "e4m3")}
        assert_equivalent(
            lambda bias, **tensors: scaled_mm(bias=bias, dtype=bias.dtype, **tensors, **format),
            lambda bias, **tensors: matmul_fp8_reference(bias=bias, dtype=bias.dtype, **tensors, **format),
            inputs,
            grads=False,
        )

    @in_the_ordinary_process
    def test_scaled_mm_is_preferred_where_it_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By itself the op takes torch where both backends can run; asked for, the kernel."""
        op = replace(get_op("matmul_fp8"), prefer_torch=lambda **_: "faster")
        monkeypatch.setattr(Op, "why_not_triton", lambda self, arguments: None)
        assert str(op.choose(None, {})) == "matmul_fp8: torch (faster)"
        assert op.choose("triton", {}).backend == replace(op, prefer_torch=None).choose(None, {}).backend == "triton"
        inputs = make_inputs(get_op("matmul_fp8"), get_op("matmul_fp8").case("rows"), torch.float32)
        assert get_op("matmul_fp8").prefer_torch(**inputs, a_format="e4m3", b_format="e4m3") is None  # not on a CPU

    @in_the_ordinary_process
    def test_wrong_arguments(self) -> None:
        codes, one = torch.zeros(5, 300, dtype=torch.uint8), torch.ones(())
        with pytest.raises(
            ValueError, match=r"a_scale has shape \[5, 2\], choices for .* \[5, 300\]: \[\], \[5, 1\], \[5"
        ):
            matmul_fp8(codes, torch.ones(5, 2), codes, one)
        several = codes.expand(3, 5, 300)
        for shape in ((5, 3, 1), (15, 1), (3, 1, 3)):  # the last is that of blocks of 128 rows, which are a weight's
            message = rf"a_scale has shape {re.escape(str(list(shape)))}, choices for a of shape \[3, 5, 300\]: \[\], "
            with pytest.raises(ValueError, match=message + r"\[3, 5, 1\], \[3, 5, 3\]"):
                matmul_fp8(several, torch.ones(shape), codes, one)
        with pytest.raises(ValueError, match=r"b_scale has shape \[3, 1\]"):
            matmul_fp8(codes, one, codes, torch.ones(3, 1))
        with pytest.raises(TypeError, match=r"a has dtype torch.int8, choices: torch.uint8, torch.float8_e4m3fn"):
            matmul_fp8(codes.to(torch.int8), one, codes, one)
        with pytest.raises(ValueError, match=r"b has format 'e3m4', choices: 'e4m3', 'e5m2'"):
            matmul_fp8(codes, one, codes, one, b_format="e3m4")
        with pytest.raises(TypeError, match=r"a_scale has dtype torch\.bfloat16"):
            matmul_fp8(codes, one.bfloat16(), codes, one)
        with pytest.raises(TypeError, match=r"dtype is torch\.int32"):
            matmul_fp8(codes, one, codes, one, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"b has shape \[5, 299\], expected \[M, K\] with K=300 from a"):
            matmul_fp8(codes, one, codes[:, 1:], one)
        with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
            linear_fp8(torch.ones(3, 300, dtype=torch.int64), codes, one)
        with pytest.raises(ValueError, match="activation is 'column', choices: None, 'tensor', 'row', 'block'"):
            linear_fp8(torch.ones(3, 300), codes, one, activation="column")


class TestQuantisedActivations:
    @backends
    @pytest.mark.parametrize("activation", GRANULARITIES)
    def test_result_and_gradient(self, activation: str, backend: str) -> None:
        """Forward the product of two FP8 matrices; backward as if x had not been rounded."""
        x, dy = draw(3, 5, 150).requires_grad_(), draw(3, 5, 70, seed=4)
        w = quantize_fp8(draw(70, 150, seed=1), "block")
        y = linear_fp8(x, w.codes, w.scale, activation=activation, backend=backend)
        block = (1, 128) if activation == "block" else None
        codes, scale = encode_fp8(x, granularity=activation, block=block)
        assert torch.equal(y, matmul_fp8(codes, scale, w.codes, w.scale, dtype=x.dtype, backend=backend))
        (dx,) = torch.autograd.grad(y, x, dy)
        plain = linear_fp8(x, w.codes, w.scale, backend="torch")
        assert torch.equal(dx, torch.autograd.grad(plain, x, dy)[0])

    @in_the_ordinary_process
    @pytest.mark.parametrize("activation", [None, *GRANULARITIES])
    def test_mapped_over_a_batch(self, activation: str | None) -> None:
        """vmap of the result, and of its gradient, is what each gives alone: a scale of a tensor is of one tensor."""
        layer, xs = FP8Linear.from_module(dense(24, 150), activation=activation), draw(3, 5, 150)
        xs[1] *= 100
        block = (1, 128) if activation == "block" else None
        seen = xs if activation is None else [dequantize_fp8(quantize_fp8(x, activation, block=block)) for x in xs]
        weight, bias = layer.dequantize().weight.detach(), layer.bias.detach()
        assert_equivalent(
            lambda *_: torch.vmap(layer)(xs).detach(),
            lambda *each: torch.stack([F.linear(x, *each[3:]) for x in each[:3]]),
            (*seen, weight, bias),
            grads=False,
        )
        slopes = torch.vmap(torch.func.grad(lambda x: layer(x).sum()))(xs)
        assert torch.equal(slopes, slopes[:1, :1].expand(3, 5, 150))

    @in_the_ordinary_process
    def test_rounding_x_costs_three_decibels(self) -> None:
        """Two operands with the error of one each: 10 log10 2 below the weight alone."""
        layer, x = dense(256, 1024), draw(64, 1024)
        alone = sqnr(FP8Linear.from_module(layer)(x), layer(x))
        both = sqnr(FP8Linear.from_module(layer, activation="row")(x), layer(x))
        assert alone > 31 and 28 < both < alone - 2.5


@in_the_ordinary_process
class TestLayer:
    @granularities
    @pytest.mark.parametrize(("m", "k"), [(5, 7), (72, 576), (130, 257), (256, 128)])
    def test_any_width(self, m: int, k: int, granularity: str) -> None:
        """Widths that are no multiple of 16 or 128 have scales for what is left over."""
        layer = dense(m, k)
        quantised = FP8Linear.from_module(layer, granularity=granularity)
        q = quantize_fp8(layer.weight, granularity)
        assert torch.equal(quantised.weight.view(torch.uint8), q.codes.view(torch.uint8))
        assert torch.equal(quantised.weight_scale_inv.reshape(q.scale.shape), q.scale)
        x = draw(3, k)
        back = quantised.dequantize()
        assert type(back) is nn.Linear and torch.equal(quantised(x), back(x))
        assert sqnr(back.weight, layer.weight) > 30 and back.bias is layer.bias

    def test_empty_batch(self) -> None:
        for activation in (None, *GRANULARITIES):
            layer = FP8Linear.from_module(dense(20, 30), activation=activation)
            assert layer(torch.zeros(0, 30)).shape == (0, 20) and layer(torch.zeros(2, 0, 30)).shape == (2, 0, 20)

    def test_one_byte_a_weight(self) -> None:
        layer = FP8Linear.from_module(dense(256, 512, bias=False))
        assert sum(p.numel() * p.element_size() for p in layer.parameters()) == 256 * 512 + 4 * 2 * 4
        assert not any(p.requires_grad for p in layer.parameters())

    def test_backward_keeps_neither_x_nor_a_dense_weight(self) -> None:
        kept: list[Tensor] = []
        layer = FP8Linear.from_module(dense(64, 128, bias=False))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            y = layer(draw(10, 128).requires_grad_())
        assert sum(x.nbytes for x in kept) == 64 * 128 + 4 and y.requires_grad

    def test_gradients_are_those_of_the_dense_layer(self) -> None:
        layer = FP8Linear.from_module(dense(140, 300), granularity="row")
        assert_equivalent(
            layer, lambda x: F.linear(x, layer.dequantize().weight.detach().to(x.dtype), layer.bias.to(x.dtype)),
            (draw(4, 5, 300),),
        )  # fmt: skip

    def test_casts_leave_codes_and_scales_alone(self) -> None:
        layer = FP8Linear.from_module(dense(130, 200), granularity="row")
        before = {name: x.clone() for name, x in layer.state_dict().items()}
        for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
            after = cast().state_dict()
            assert after["weight"].dtype == torch.float8_e4m3fn and after["weight_scale_inv"].dtype == torch.float32
            assert layer.dequantize().weight.dtype == layer.bias.dtype == layer.dtype
        for name in ("weight", "weight_scale_inv"):
            assert torch.equal(after[name].float(), before[name].float())
        assert layer.to("meta").weight.device.type == "meta" and layer.weight_scale_inv.device.type == "meta"

    @granularities
    def test_state_copies_and_files(self, granularity: str) -> None:
        layer, x = FP8Linear.from_module(dense(130, 200), granularity=granularity), draw(3, 200)
        other = FP8Linear(200, 130, granularity=granularity)
        other.load_state_dict(layer.state_dict())
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (other, copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), layer(x))

    def test_a_checkpoint_of_block_fp8_loads_as_it_is(self) -> None:
        """Names, dtypes and shapes are those of DeepSeek's and transformers' files."""
        codes, scale = encode_fp8(draw(576, 320), granularity="block")
        file = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}
        with torch.device("meta"):
            layer = FP8Linear(320, 576, bias=False)
        layer.load_state_dict(file, assign=True)
        assert torch.equal(layer.dequantize().weight, decode_fp8(codes, scale, granularity="block"))

    def test_what_would_have_to_be_cast_is_refused(self) -> None:
        layer = FP8Linear.from_module(dense(16, 32))
        before, x = copy.deepcopy(layer), draw(3, 32)
        for name, dtype in (("weight", torch.bfloat16), ("weight_scale_inv", torch.bfloat16)):
            file = layer.state_dict()
            file[name] = file[name].to(dtype)
            with pytest.raises(RuntimeError, match=f"{name} has dtype torch.bfloat16, expected torch.float"):
                layer.load_state_dict(file)
        with pytest.raises(RuntimeError, match="size mismatch for weight_scale_inv"):
            layer.load_state_dict({**layer.state_dict(), "weight_scale_inv": torch.ones(2, 1)})
        assert torch.equal(layer(x), before(x))

    @pytest.mark.parametrize("activation", [None, "row"])
    def test_compiles_without_graph_breaks(self, activation: str | None) -> None:
        layer, x = FP8Linear.from_module(dense(33, 65), activation=activation), draw(7, 65).requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        assert torch.equal(y, layer(x))
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, layer(x))))

    @pytest.mark.slow
    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
    @pytest.mark.parametrize("k", [140, 300])
    def test_compiled_to_machine_code(self, k: int) -> None:
        """Blocks with columns left over, where torch's compiler for CPUs can go wrong."""
        layer, x = FP8Linear.from_module(dense(33, k)), draw(7, k)
        weight, bias = layer.dequantize().weight.detach(), layer.bias.detach()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)
        assert_equivalent(compiled, lambda x: F.linear(x, weight.to(x.dtype), bias.to(x.dtype)), (x,))
        encode = functools.partial(encode_fp8, granularity="block", block=(1, 128))
        assert all(map(torch.equal, torch.compile(encode, fullgraph=True)(x), encode(x)))

    def test_under_autocast(self) -> None:
        layer = FP8Linear.from_module(dense(8, 16))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(draw(3, 16)).dtype == torch.bfloat16

    def test_a_new_layer_is_a_linear_layer_quantised(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = FP8Linear(64, 32)
            torch.manual_seed(0)
            plain = nn.Linear(64, 32)
        assert isinstance(layer, nn.Linear) and torch.equal(layer.bias, plain.bias)
        assert sqnr(layer.dequantize().weight, plain.weight) > 30

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="granularity is 'column', choices: 'tensor', 'row', 'block'"):
            FP8Linear(4, 4, granularity="column")
        with pytest.raises(ValueError, match="activation is 'all', choices: None, 'tensor', 'row', 'block'"):
            FP8Linear(4, 4, activation="all")
        with pytest.raises(ValueError, match="format is 'e2m1', choices: 'e4m3', 'e5m2'"):
            FP8Linear(4, 4, format="e2m1")
        with pytest.raises(ValueError, match="recipe is 'fast', choices: 'tensorwise'"):
            FP8Linear(4, 4, recipe="fast")
        with pytest.raises(TypeError, match="expected a layer with a floating weight"):
            FP8Linear.from_module(FP8Linear(4, 4))
        with pytest.raises(ValueError, match=r"x has shape \[3, 5\], expected \[\*N, K\]|weight has shape"):
            FP8Linear(4, 4)(torch.ones(3, 5))
