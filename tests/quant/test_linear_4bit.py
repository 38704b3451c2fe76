"""A linear layer in four bits is the dense layer of its dequantised weight, and keeps nothing that is not packed."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import effkit.quant.nf4_linear as nf4_linear
from effkit.ops import INTERPRET
from effkit.quant import NF4Linear, dequantize_nf4, linear_4bit, quantize_nf4
from effkit.testing import DTYPES, assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(out_features: int = 48, in_features: int = 128, bias: bool = True) -> nn.Linear:
    """A linear layer that leaves the global generator alone."""
    layer = nn.Linear(in_features, out_features, bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(random(out_features, in_features) / in_features**0.5)
        if bias:
            layer.bias.copy_(random(out_features, seed=1))
    return layer


def quantised(out_features: int = 48, in_features: int = 128, **options: Any) -> NF4Linear:
    bias = options.pop("bias", True)
    return NF4Linear.from_module(dense(out_features, in_features, bias), **options)


def backward(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output and the gradient of x."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@backends
@every_dtype
@pytest.mark.parametrize("options", [{}, {"double_quant": True, "block_size": 32}, {"quant_type": "fp4"}], ids=str)
def test_is_the_dense_layer_of_its_weight(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Output and gradients of x and bias, against F.linear on what `dequantize` gives."""
    layer = quantised(**options)
    weight = layer.dequantize().weight.detach()

    def in_four_bits(x: Tensor, bias: Tensor) -> Tensor:
        scales = (layer.weight_nested_absmax, layer.weight_nested_offset)
        options = dict(block_size=layer.block_size, quant_type=layer.quant_type, backend=backend)
        return linear_4bit(x, layer.weight, layer.weight_absmax, bias, *scales, **options)

    inputs = (random(5, 7, 128, dtype=dtype), random(48, seed=2, dtype=dtype))
    assert_equivalent(in_four_bits, lambda x, bias: F.linear(x, weight.to(x.dtype), bias), inputs)


def test_weight_is_that_of_the_quantiser() -> None:
    linear = dense()
    layer = NF4Linear.from_module(linear, double_quant=True)
    expected = dequantize_nf4(quantize_nf4(linear.weight.detach(), 64, True))
    assert torch.equal(layer.dequantize().weight, expected)
    assert layer.bias is linear.bias and layer.dequantize().bias is linear.bias


class Kept:
    """Bytes that a pass keeps for its backward pass, each memory counted once."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor):
            layer(x)
        self.bytes = sum(self.sizes.values())

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("double_quant", [False, True])
def test_keeps_what_is_packed_and_nothing_else(double_quant: bool) -> None:
    layer = quantised(256, 512, double_quant=double_quant)
    x = random(1000, 512).requires_grad_()
    assert Kept(layer, x).bytes == layer.quantized().nbytes < Kept(dense(256, 512), x).bytes / 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_keeps_no_more(backend: str) -> None:
    """A compiler that finds the weight decoded twice would decode it once and keep it."""
    layer = quantised(64, 128)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert Kept(compiled, random(5, 128).requires_grad_()).bytes == layer.quantized().nbytes


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


def test_never_holds_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward decode a piece at a time: rows of the weight, columns of it."""
    monkeypatch.setattr(nf4_linear, "_PIECE", 8)
    layer = quantised(64, 512)
    weight, inputs = layer.dequantize().weight.detach(), (random(3, 512), layer.bias.detach())
    with Largest() as largest:
        backward(layer, inputs[0])
    assert largest.elements <= 64 * 512 // 8

    def in_pieces(x: Tensor, bias: Tensor) -> Tensor:
        return linear_4bit(x, layer.weight, layer.weight_absmax, bias)

    assert_equivalent(in_pieces, lambda x, bias: F.linear(x, weight.to(x.dtype), bias), inputs)


def test_decodes_only_for_a_gradient_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantised()
    y = layer(random(3, 128))
    monkeypatch.setattr(nf4_linear, "product", lambda *_: pytest.fail("the weight was decoded"))
    (gradient,) = torch.autograd.grad(y, layer.bias, torch.ones_like(y))
    assert torch.equal(gradient, torch.full((48,), 3.0))


def test_second_derivative() -> None:
    layer = quantised(6, 64).double()
    x = random(2, 64, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), x)


@backends
def test_gradient_of_a_gradient(backend: str) -> None:
    """What a penalty on a gradient differentiates."""
    layer = quantised(40, 128)

    def slope(f: Any, x: Tensor) -> Tensor:
        return torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]

    def in_four_bits(x: Tensor) -> Tensor:
        return slope(lambda x: linear_4bit(x, layer.weight, layer.weight_absmax, backend=backend), x)

    weight = layer.dequantize().weight.detach()
    assert_equivalent(in_four_bits, lambda x: slope(lambda x: F.linear(x, weight.to(x.dtype)), x), (random(3, 128),))


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p != "reference"])
def test_function_transforms(backend: str) -> None:
    """vmap over tokens and over layers, and the jacobian."""
    layer, other = quantised(6, 64), quantised(6, 64, quant_type="int4")
    x = random(5, 64)

    def call(x: Tensor, weight: Tensor = layer.weight, absmax: Tensor = layer.weight_absmax) -> Tensor:
        return linear_4bit(x, weight, absmax, backend=backend)

    def jacobian(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(call))(x)

    weight = layer.dequantize().weight.detach()
    assert_equivalent(torch.func.vmap(call), lambda x: F.linear(x, weight.to(x.dtype)), (x,), grads=False)
    assert_equivalent(jacobian, lambda x: weight.to(x.dtype).expand(5, 6, 64), (x,), grads=False)
    weights, scales = torch.stack((layer.weight, other.weight)), torch.stack((layer.weight_absmax,) * 2)
    each = torch.func.vmap(call, in_dims=(None, 0, 0))(x, weights, scales)
    assert torch.equal(each, torch.stack([call(x, weight) for weight in weights]))


def test_compiles_as_a_module() -> None:
    layer = quantised(double_quant=True, cache_dequant="all")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_equivalent(compiled, layer, (random(3, 128),))


@pytest.mark.parametrize("transposed", [False, True])
def test_operator_of_compiled_code(transposed: bool) -> None:
    layer = quantised(double_quant=True)
    scales = (layer.weight_nested_absmax, layer.weight_nested_offset.reshape(()))
    x, bias = (random(3, 48), None) if transposed else (random(3, 128), layer.bias.detach())
    arguments = (x, layer.weight, layer.weight_absmax, bias, *scales, 64, "nf4", "torch", transposed)
    torch.library.opcheck(torch.ops.effkit.linear_4bit_product, arguments)


@pytest.mark.parametrize("cache", ["none", "all"])
def test_autocast_computes_as_a_dense_layer_would(cache: str) -> None:
    layer = quantised(cache_dequant=cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(random(3, 128))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(random(3, 128).bfloat16()))


class TestCache:
    """cache_dequant="all" changes the speed and nothing else."""

    @every_dtype
    def test_bits(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nf4_linear, "_PIECE", 64)
        plain, cached = quantised(128, 256), quantised(128, 256, cache_dequant="all")
        for _ in range(2):
            for ours, theirs in zip(
                backward(cached, random(5, 256, dtype=dtype)), backward(plain, random(5, 256, dtype=dtype)), strict=True
            ):
                assert ours.dtype == dtype and torch.equal(ours, theirs)

    def test_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = quantised(cache_dequant="all")
        layer(random(3, 128))
        monkeypatch.setattr(nf4_linear, "dequantize_nf4", lambda *_, **__: pytest.fail("decoded again"))
        layer(random(3, 128))

    def test_made_in_inference_it_serves_training(self) -> None:
        layer = quantised(cache_dequant="all")
        with torch.inference_mode():
            layer(random(3, 128))
        assert torch.equal(backward(layer, random(3, 128))[1], backward(quantised(), random(3, 128))[1])

    @pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "requantised", "data"])
    def test_follows_the_parameters(self, change: str) -> None:
        layer, other = quantised(cache_dequant="all"), quantised(quant_type="int4").float()
        x = random(3, 128)
        before = layer(x)
        with torch.no_grad():
            if change == "in place":
                layer.weight.copy_(other.weight)
            elif change == "replaced":
                layer.weight = copy.deepcopy(other.weight)
            elif change == "loaded":
                layer.load_state_dict(other.state_dict())
            elif change == "requantised":
                layer.quantize_(-dense().weight)
            else:
                layer.weight.data = other.weight.data.clone()
        fresh = linear_4bit(x, layer.weight, layer.weight_absmax, layer.bias)
        assert torch.equal(layer(x), fresh) and not torch.equal(before, fresh)

    def test_is_nobodys_but_the_layers(self) -> None:
        """Not in the state dict, a copy, a pickle; gone after a move."""
        layer = quantised(cache_dequant="all")
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer(random(3, 128))
        after = layer.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert layer._cached is not None
        assert copy.deepcopy(layer)._cached is None and pickle.loads(pickle.dumps(layer))._cached is None
        assert layer.to(torch.bfloat16)._cached is None


class TestModule:
    def test_a_new_layer_is_a_linear_layer(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = NF4Linear(128, 48)
            torch.manual_seed(0)
            expected = NF4Linear.from_module(nn.Linear(128, 48))
        assert isinstance(layer, nn.Linear)
        for ours, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert repr(layer) == ("NF4Linear(128, 48, bias=True, block_size=64, double_quant=False, quant_type='nf4')")

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_parameters(self, double_quant: bool) -> None:
        layer = NF4Linear(128, 48, double_quant=double_quant, device="meta", dtype=torch.bfloat16)
        found = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
        expected = {
            "weight": ((48, 64), torch.uint8, False),
            "weight_absmax": ((48, 2), torch.uint8 if double_quant else torch.float32, False),
            "bias": ((48,), torch.bfloat16, True),
        }
        if double_quant:
            expected["weight_nested_absmax"] = ((1,), torch.float32, False)
            expected["weight_nested_offset"] = ((1,), torch.float32, False)
        assert found == expected and not list(layer.buffers())

    def test_from_module_keeps_what_is_not_the_weight(self) -> None:
        linear = dense(bias=False).eval().bfloat16()
        layer = NF4Linear.from_module(linear, quant_type="fp4")
        assert layer.bias is None and not layer.training and layer.dtype == torch.bfloat16
        back = layer.dequantize()
        assert type(back) is nn.Linear and back.bias is None and back.weight.dtype == torch.bfloat16
        meta = NF4Linear.from_module(nn.Linear(128, 48, device="meta"))
        assert all(parameter.is_meta for parameter in meta.parameters())
        assert meta(torch.zeros(3, 128, device="meta")).shape == (3, 48)

    @pytest.mark.parametrize(
        "cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.bfloat16]
    )
    def test_casts_reach_the_bias_alone(self, cast: Any) -> None:
        layer, before = quantised(double_quant=True), quantised(double_quant=True)
        cast(layer)
        for name, parameter in before.named_parameters():
            mine = layer.get_parameter(name)
            assert torch.equal(mine.to(parameter.dtype), parameter.to(mine.dtype).to(parameter.dtype))
            assert name == "bias" or mine.dtype == parameter.dtype
        assert layer.bias.dtype == layer.dtype != torch.float32
        assert layer(random(3, 128, dtype=torch.float16)).dtype == torch.float16

    @pytest.mark.parametrize("options", [{}, {"double_quant": True}], ids=str)
    def test_copies_and_saves(self, options: dict[str, Any]) -> None:
        layer = quantised(**options)
        x = random(3, 128)
        empty = NF4Linear(128, 48, device="meta", **options)
        empty.load_state_dict(layer.state_dict(), assign=True)
        filled = NF4Linear(128, 48, device="meta", **options).to_empty(device="cpu")
        filled.load_state_dict(layer.state_dict())
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty, filled):
            assert torch.equal(again(x), layer(x))
            assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in layer.parameters()]

    def test_loading_is_strict(self) -> None:
        layer, nested = quantised(), quantised(double_quant=True)
        before = copy.deepcopy(layer.state_dict())
        halved = {name: value.half() if "absmax" in name else value for name, value in before.items()}
        with pytest.raises(RuntimeError, match=r"weight_absmax has dtype torch\.float16, expected torch\.float32"):
            layer.load_state_dict(halved)
        with pytest.raises(RuntimeError, match=r"weight_absmax has dtype torch\.uint8, expected torch\.float32"):
            layer.load_state_dict(nested.state_dict())
        with pytest.raises(RuntimeError, match=r"weight_absmax has dtype torch\.float32, expected torch\.uint8"):
            nested.load_state_dict(before)
        with pytest.raises(RuntimeError, match=r"weight has dtype torch\.float32, expected torch\.uint8"):
            layer.load_state_dict(dense().state_dict())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(in_features=100), ValueError, "NF4Linear: 100 input features are no multiple of block_size 64"),
        (dict(block_size=48), ValueError, "NF4Linear: block_size is 48, choices: 32, 64"),
        (dict(quant_type="nf5"), ValueError, "NF4Linear: quant_type is 'nf5', choices: 'nf4', 'fp4', 'int4'"),
        (dict(double_quant="no"), TypeError, "NF4Linear: double_quant is 'no', expected True or False"),
        (dict(cache_dequant="layer"), ValueError, "NF4Linear: cache_dequant is 'layer', choices: 'none', 'all'"),
    ],
    ids=str,
)
def test_bad_layers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NF4Linear(**{"in_features": 128, "out_features": 48, **options})


def test_a_dense_weight_must_fit() -> None:
    with pytest.raises(ValueError, match=r"quantize_: dense has shape \[128, 48\], expected \[48, 128\]"):
        quantised().quantize_(dense().weight.detach().T)


def test_a_quantised_layer_is_not_quantised_again() -> None:
    with pytest.raises(TypeError, match=r"from_module: linear is NF4Linear.*expected a layer with a floating weight"):
        NF4Linear.from_module(quantised())


BYTES, SCALES = torch.zeros(48, 64, dtype=torch.uint8), torch.zeros(48, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(x=torch.zeros(3, 128).int()), TypeError, "x has dtype torch.int32, choices: torch.float16"),
        (dict(weight=BYTES.float()), TypeError, "weight has dtype torch.float32, choices: torch.uint8"),
        (dict(weight=BYTES[:, :63]), ValueError, r"weight has shape \[48, 63\], expected \[48, 64\] for 128 input"),
        (dict(weight=BYTES[:47]), ValueError, r"absmax has shape \[48, 2\], expected \[M, G\] with M=47 from weight"),
        (dict(absmax=SCALES[:, :1]), ValueError, r"absmax has shape \[48, 1\], expected \[48, 2\] for 128 input"),
        (dict(absmax=SCALES.bfloat16()), TypeError, "absmax has dtype torch.bfloat16, choices: torch.float32"),
        (dict(absmax=SCALES.byte()), TypeError, "absmax has dtype torch.uint8, choices: torch.float32"),
        (dict(nested_absmax=torch.zeros(1)), ValueError, "nested_absmax and nested_offset belong together"),
        (
            dict(nested_absmax=torch.zeros(1), nested_offset=torch.zeros(1)),
            TypeError,
            "absmax has dtype torch.float32, choices: torch.uint8",
        ),
        (
            dict(absmax=SCALES.byte(), nested_absmax=torch.zeros(2), nested_offset=torch.zeros(())),
            ValueError,
            r"nested_absmax has shape \[2\], expected \[1\], one for each 256 of 96 scales",
        ),
        (dict(block_size=48), ValueError, "block_size is 48, choices: 32, 64"),
        (dict(block_size=256), ValueError, "128 input features are no multiple of block_size 256"),
        (dict(quant_type="e2m1"), ValueError, "quant_type is 'e2m1', choices: 'nf4', 'fp4', 'int4'"),
        (dict(bias=torch.zeros(47)), ValueError, r"bias has shape \[47\], expected \[M\] with M=48"),
        (dict(bias=torch.zeros(48, device="meta")), ValueError, "bias is on meta, expected cpu as x"),
    ],
    ids=str,
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 128), "weight": BYTES, "absmax": SCALES, **changed}
    with pytest.raises(error, match=f"linear_4bit: {message}"):
        linear_4bit(**arguments)
