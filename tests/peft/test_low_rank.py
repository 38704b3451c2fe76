"""LoRA's linear layer: what it equals, what it keeps for the backward pass, and a dropout that is a function."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from effkit.ops import INTERPRET, BackendUnavailable
from effkit.peft import _dropout, lora_linear
from effkit.peft._dropout import drop_below, dropped, dropped_reference, keep_pieces, keep_probability
from effkit.quant import linear_4bit, quantize_nf4
from effkit.testing import DTYPES, assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
FAST = [backend for backend in BACKENDS if backend != "reference"]
backends, fast = pytest.mark.parametrize("backend", BACKENDS), pytest.mark.parametrize("backend", FAST)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

SHAPES = dict(x=(3, 5, 40), a=(6, 40), b=(24, 6), weight=(24, 40), bias=(24,))


def inputs(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """x, both factors and a dense layer, all random; shapes replace those of SHAPES."""
    generator = torch.Generator().manual_seed(0)
    wanted = {**SHAPES, **shapes}
    return {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in wanted.items()}


def lora(**arguments: Any) -> Tensor:
    """lora_linear with scale 0.7 and, where there is dropout, seed 3, unless given."""
    seed = torch.tensor(3) if arguments.get("dropout") else None
    return lora_linear(**{"scale": torch.tensor(0.7), "seed": seed, **arguments})


def gradients(wanted: tuple[str, ...], **arguments: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of these tensors."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    y = lora(**{**arguments, **leaves})
    return (y.detach(), *torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y)))


def merged(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer with the update in its weight."""
    return F.linear(x, weight + torch.tensor(0.7).to(x.dtype) * (b @ a), bias)


class TestEquals:
    @backends
    @every_dtype
    def test_the_layer_of_the_merged_weight(self, dtype: torch.dtype, backend: str) -> None:
        """W + s B A, written out; with the gradients of a weight and a bias that are trained as well."""
        assert_equivalent(lambda **tensors: lora(**tensors, backend=backend), merged, inputs(dtype))

    @backends
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("off", ["b", "scale", "rank"])
    @every_dtype
    def test_the_base_bit_for_bit_where_the_update_is_nothing(
        self, dtype: torch.dtype, off: str, dropout: float, backend: str
    ) -> None:
        tensors = inputs(dtype, **dict(a=(0, 40), b=(24, 0)) if off == "rank" else {})
        tensors |= {"b": torch.zeros_like(tensors["b"])} if off == "b" else {}
        tensors |= {"scale": torch.zeros(())} if off == "scale" else {}
        bare = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert torch.equal(lora(**tensors, dropout=dropout, backend=backend), bare)
        beside = {name: tensor for name, tensor in tensors.items() if name not in ("weight", "bias")}
        assert torch.equal(lora(**beside, base=bare, dropout=dropout, backend=backend), bare)

    @fast
    def test_the_same_in_pieces(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Masks come a few rows at a time: here fewer than there are."""
        monkeypatch.setattr(_dropout, "_PIECE", 80)
        tensors = inputs()

        def call(backend: str) -> Any:
            return lambda **tensors: lora(**tensors, dropout=0.4, backend=backend)

        assert_equivalent(call(backend), call("reference"), tensors)

    @backends
    def test_master_copies(self, backend: str) -> None:
        """Factors in float32 beside x in bfloat16: rounded for the products, with gradients in their own dtype."""
        tensors = inputs(torch.bfloat16)
        wide = {name: tensors[name].float() + 1e-4 for name in ("a", "b")}

        def call(backend: str) -> Any:
            return lambda **tensors: lora(**tensors, dropout=0.2, backend=backend)

        assert_equivalent(call(backend), call("reference"), {**tensors, **wide})
        y, da, db = gradients(("a", "b"), **{**tensors, **wide}, backend=backend)
        assert (y.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        rounded = {name: factor.bfloat16() for name, factor in wide.items()}
        assert torch.equal(y, lora(**{**tensors, **rounded}, backend=backend))

    @backends
    def test_autocast(self, backend: str) -> None:
        """As nn.Linear: products in bfloat16, whatever the parameters are; gradients in their dtype."""
        tensors = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(tuple(tensors), **tensors, backend=backend)
        half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        expected = gradients(tuple(half), **half, backend=backend)
        assert found[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found[1:])
        for mine, other in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(mine.bfloat16(), other)

    @fast
    def test_autocast_in_the_backward_pass_alone(self, backend: str) -> None:
        """Dtypes are those of the forward pass, as autocast asks for the two to be computed."""
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
        y = lora(**leaves, dropout=0.2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y), retain_graph=True)
        expected = torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y))
        assert all(map(torch.equal, found, expected))

    def test_checkpointing(self) -> None:
        """What is computed twice has the same mask twice."""
        tensors = inputs()
        leaves = {name: tensors[name].requires_grad_() for name in ("x", "a", "b")}

        def layer(x: Tensor) -> Tensor:
            return lora(**{**tensors, "x": x}, dropout=0.3)

        again = checkpoint(layer, tensors["x"], use_reentrant=False)
        plain = layer(tensors["x"])
        for y in (again, plain):
            y.sum().backward()
            found = [leaf.grad.clone() for leaf in leaves.values()]
            for leaf in leaves.values():
                leaf.grad = None
            if y is again:
                first = found
        assert torch.equal(again, plain) and all(map(torch.equal, first, found))


class Kept:
    """Bytes that a call keeps for its backward pass beside the parameters, each memory counted once."""

    def __init__(self, parameters: tuple[Tensor, ...], call: Any) -> None:
        known, sizes = {tensor.untyped_storage().data_ptr() for tensor in parameters}, {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.nbytes() > 8:  # not the seed
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            call()
        self.bytes = sum(sizes.values())


class TestKeeps:
    """For T tokens of K features in half precision: 2 T K for x and 2 T R for its product with A, and nothing else."""

    T, K, M, R = 50, 64, 96, 4

    def kept(
        self, trained: str, dropout: float, backend: str, base: bool = False, wide: bool = True, call: Any = lora
    ) -> int:
        shapes = dict(x=(self.T, self.K), a=(self.R, self.K), b=(self.M, self.R), weight=(self.M, self.K))
        tensors = inputs(torch.bfloat16, **shapes, bias=(self.M,))
        tensors |= {name: tensors[name].float() for name in ("a", "b") if wide}
        for name in trained:
            tensors[name].requires_grad_()
        if base:
            tensors["base"] = F.linear(tensors["x"].detach(), tensors.pop("weight"), tensors.pop("bias"))
        parameters = tuple(tensor for name, tensor in tensors.items() if name not in ("x", "base"))
        return Kept(parameters, lambda: call(**tensors, dropout=dropout, backend=backend)).bytes

    @fast
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize("base", [False, True])
    def test_the_input_and_its_product(self, base: bool, wide: bool, dropout: float, backend: str) -> None:
        assert self.kept("xab", dropout, backend, base, wide) == 2 * self.T * (self.K + self.R)

    @fast
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_no_input_where_a_is_frozen(self, dropout: float, backend: str) -> None:
        """LoRA-FA; and no product where b is."""
        assert self.kept("xb", dropout, backend) == 2 * self.T * self.R
        assert self.kept("xa", dropout, backend) == 2 * self.T * self.K
        assert self.kept("x", dropout, backend) == 0

    @fast
    def test_compiled_code_keeps_no_more(self, backend: str) -> None:
        """The mask is computed again there, too. (Master copies are kept rounded: R (K + M) numbers.)"""
        torch._dynamo.reset()
        compiled = torch.compile(lora, fullgraph=True, backend="aot_eager")
        found = self.kept("xab", 0.1, backend, wide=False, call=compiled)
        assert found == 2 * self.T * (self.K + self.R)

    def test_beside_four_bits(self) -> None:
        """QLoRA: what is packed, and the two."""
        tensors = inputs(x=(self.T, self.K), a=(self.R, self.K), b=(self.M, self.R), weight=(self.M, self.K))
        q = quantize_nf4(tensors["weight"])
        packed, scales = q.packed.view(self.M, -1), q.absmax.view(self.M, -1)
        x, a, b = (tensors[name].requires_grad_() for name in ("x", "a", "b"))
        found = Kept((a, b, packed, scales), lambda: lora(x=x, a=a, b=b, base=linear_4bit(x, packed, scales)))
        assert found.bytes == 4 * self.T * (self.K + self.R)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wanted", "products"), [("b", 1), ("a", 2), ("x", 3), ("ab", 3), ("xab", 5)])
def test_computes_what_is_asked_for(wanted: str, products: int) -> None:
    """d_down = dy b; then db = dy^T down, da = d_down^T x, and dx = d_down a plus dy W."""
    tensors = inputs()
    leaves = {name: tensors[name].requires_grad_() for name in wanted}
    y = lora(**tensors, backend="torch")
    with Products() as counted:
        torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y))
    assert counted.count == products


def mask(rows: int, columns: int, p: float, seed: int = 0) -> Tensor:
    """1 where an element is kept, from the definition."""
    return (dropped_reference(torch.ones(rows, columns), torch.tensor(seed), p) > 0).double()


class TestMask:
    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 6), (7, 5), (0, 4), (3, 0), (64, 129)])
    @every_dtype
    def test_pieces_are_the_definition(
        self, dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_dropout, "_PIECE", 200)
        seed = torch.tensor(-(1 << 40) - 5)
        x = inputs(dtype, x=(rows, columns))["x"]
        pieces = [keep.clone() for _, keep in keep_pieces(rows, columns, dtype, seed, 0.3)]
        whole = torch.cat(pieces) if pieces else x
        assert torch.equal(whole.double(), mask(rows, columns, 0.3, int(seed)))
        assert torch.equal(dropped(x, seed, 0.3), dropped_reference(x, seed, 0.3))

    @pytest.mark.skipif(not INTERPRET, reason="the kernel runs in the interpreter")
    @pytest.mark.interpreter
    @pytest.mark.parametrize("seed", [0, 1, -1, (1 << 40) + 3])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_kernels_are_the_definition(self, dtype: torch.dtype, seed: int) -> None:
        import effkit.kernels.low_rank  # noqa: F401 - defines the operator

        seeds = torch.tensor(seed).to(dtype)
        found = torch.ops.effkit.lora_masked(torch.ones(70, 1), torch.ones(1, 67), seeds, 0.3)
        assert torch.equal(found.double(), mask(70, 67, 0.3, int(seeds)))

    def test_is_a_function_of_seed_row_and_column(self) -> None:
        """Whatever else is there. All 64 bits of a seed count, however it is stored."""
        full = mask(40, 50, 0.5)
        assert torch.equal(mask(30, 33, 0.5), full[:30, :33])
        x = torch.ones(8, 5, 50)
        assert torch.equal(dropped_reference(x, torch.tensor(0), 0.5) > 0, full.view(x.shape) > 0)
        assert torch.equal(dropped(x, torch.tensor(9, dtype=torch.int32), 0.5), dropped(x, torch.tensor(9), 0.5))
        assert not torch.equal(mask(40, 50, 0.5, 1 << 32), full)

    @pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
    def test_rate(self, p: float) -> None:
        """Of all, of each row and of each column, within what chance allows; kept values grow by its inverse."""
        keep = mask(1000, 1024, p)
        assert abs(keep_probability(p) - (1 - p)) <= 2**-17
        for axis, size, bound in ((None, keep.numel(), 4), (0, 1000, 5), (1, 1024, 5)):
            rate = keep.mean() if axis is None else keep.mean(axis)
            deviation = (p * (1 - p) / size) ** 0.5
            assert (rate - keep_probability(p)).abs().max() < bound * max(deviation, 1 / size)
        x = torch.ones(2, 300)
        assert dropped_reference(x, torch.tensor(0), p).max() == 1 / torch.tensor(keep_probability(p))

    def test_neighbours_rows_and_seeds_know_nothing_of_each_other(self) -> None:
        """Correlations within 4 / sqrt(n), and of four corners of a rectangle, which a sum of two keys would show."""
        z = (mask(512, 1024, 0.5) - 0.5) * 2
        other = (mask(512, 1024, 0.5, 1) - 0.5) * 2
        products = {
            "columns": z[:, 1:] * z[:, :-1],
            "pairs of columns": z[:, 2:] * z[:, :-2],
            "rows": z[1:] * z[:-1],
            "diagonals": z[1:, 1:] * z[:-1, :-1],
            "seeds": z * other,
            "seeds, shifted": z[1:] * other[:-1],
            "corners": z[1:, 2:] * z[:-1, 2:] * z[1:, :-2] * z[:-1, :-2],
        }
        for name, product in products.items():
            assert abs(product.mean()) < 4 / product.numel() ** 0.5, name

    @pytest.mark.parametrize("seed", [0, 1])
    def test_rows_and_columns_cannot_be_exchanged(self, seed: int) -> None:
        """Their keys are not the same numbers: the mask of one half of the columns is not symmetric, at no seed."""
        z = (mask(256, 512, 0.5, seed)[:, ::2] - 0.5) * 2
        above = torch.ones(256, 256).triu(1).bool()
        assert abs((z * z.T)[above].mean()) < 4 / int(above.sum()) ** 0.5

    def test_compiled_with_a_seed_that_the_compiler_knows(self) -> None:
        """In the C++ that it writes, products of known numbers must not overflow."""
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: dropped_reference(x, torch.tensor(3), 0.2), fullgraph=True)
        x = torch.ones(15, 40)
        assert torch.equal(compiled(x) > 0, mask(15, 40, 0.2, 3) > 0)

    def test_extremes(self) -> None:
        """Less than the smallest step is nothing; close to 1 something is kept, and finite."""
        assert mask(50, 50, 1e-6).min() == 1 and keep_probability(1e-6) == 1
        assert keep_probability(1 - 1e-9) == 2**-16 and drop_below(1 - 1e-9) == 2**15 - 1


class TestTransforms:
    @fast
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # addmm_ on a batch of gradients
    def test_vmap_and_jacobian(self, dropout: float, backend: str) -> None:
        tensors = inputs(x=(3, 40))
        rest = {name: tensor for name, tensor in tensors.items() if name != "x"}

        def call(x: Tensor, a: Tensor, backend: str = backend) -> Tensor:
            return lora(x=x, **{**rest, "a": a}, dropout=dropout, backend=backend)

        x, a = tensors["x"], tensors["a"]

        def each(x: Tensor, a: Tensor) -> Tensor:
            return torch.stack([call(row, factor, "reference") for row, factor in zip(x, a, strict=True)])

        def jacobians(x: Tensor, a: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            return torch.func.jacrev(call, (0, 1))(x, a, backend)

        def per_sample(x: Tensor, a: Tensor, backend: str = backend) -> Tensor:
            slope = torch.func.grad(lambda a, x: call(x, a, backend).square().sum())
            return torch.func.vmap(slope, in_dims=(None, 0))(a, x)

        x, a = tensors["x"], tensors["a"]
        assert_equivalent(torch.func.vmap(call), each, (x, torch.stack((a, 2 * a, -a))), grads=False)
        alone = torch.func.vmap(call, in_dims=(0, None))
        assert_equivalent(alone, lambda x, a: each(x, a.expand(3, 6, 40)), (x, a), grads=False)
        assert_equivalent(jacobians, lambda x, a: jacobians(x, a, "reference"), (x[0], a), grads=False)
        assert_equivalent(per_sample, lambda x, a: per_sample(x, a, "reference"), (x, a), grads=False)

    def test_second_derivative(self) -> None:
        """The reference has one; others say that they have none."""
        tensors = inputs(torch.float64, x=(2, 4), a=(2, 4), b=(3, 2), weight=(3, 4), bias=(3,))
        leaves = [tensors[name].requires_grad_() for name in ("x", "a", "b")]

        def call(backend: str, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            factors = {**tensors, "x": x, "a": a, "b": b}
            return lora(**factors, dropout=0.3, backend=backend)

        assert torch.autograd.gradgradcheck(lambda *leaves: call("reference", *leaves), leaves)
        (slope,) = torch.autograd.grad(call("torch", *leaves).square().sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    @fast
    @pytest.mark.parametrize("of", ["a", "b"])
    def test_compiled_gradients_of_transposed_factors(self, of: str, backend: str) -> None:
        """Laid out as the compiler was told."""
        torch._dynamo.reset()
        tensors = inputs()
        tensors[of] = tensors[of].T.contiguous().T
        leaves = {name: tensors[name].requires_grad_() for name in ("x", "a", "b")}

        def call(x: Tensor, a: Tensor, b: Tensor, backend: str = backend) -> Tensor:
            return lora(**{**tensors, "x": x, "a": a, "b": b}, dropout=0.2, backend=backend)

        compiled = torch.compile(call, fullgraph=True)
        assert_equivalent(compiled, lambda x, a, b: call(x, a, b, "reference"), tuple(leaves.values()))

    @fast
    def test_compiles_once_for_all_scales_and_seeds(self, backend: str) -> None:
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(lora_linear, fullgraph=True, backend=counter)
        tensors = inputs()
        for scale, seed in ((0.5, 1), (0.0, 2), (2.0, 1 << 40)):
            arguments = dict(scale=torch.tensor(scale), seed=torch.tensor(seed), dropout=0.2, backend=backend)
            assert (
                torch.equal(compiled(**tensors, **arguments), lora_linear(**tensors, **arguments)) or backend == "torch"
            )
        assert counter.frame_count == 1


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(a=torch.zeros(6, 41)), ValueError, r"a has shape \[6, 41\], expected \[R, K\] with K=40 from x"),
    (dict(b=torch.zeros(24, 5)), ValueError, r"b has shape \[24, 5\], expected \[M, R\] with R=6 from a"),
    (dict(scale=0.5), TypeError, "scale is float, expected a tensor"),
    (dict(scale=torch.ones((), requires_grad=True)), ValueError, r"scale asks for a gradient.*scale\.detach"),
    (dict(x=torch.zeros(3, 40, dtype=torch.int64)), TypeError, "x has dtype torch.int64, choices: torch.float16"),
    (dict(dropout=1.0), ValueError, r"dropout is 1.0, expected a probability in \[0, 1\)"),
    (dict(dropout=0.1, seed=None), ValueError, r"dropout is 0.1 and seed None, expected an integer tensor"),
    (dict(dropout=0.1, seed=torch.tensor(1.0)), TypeError, "seed has dtype torch.float32, choices: torch.int32"),
    (dict(weight=None, bias=None), ValueError, "weight and base are not given, expected one of them"),
    (dict(base=torch.zeros(3, 5, 24)), ValueError, "weight and base are both given, expected one of them"),
    (dict(weight=None, base=torch.zeros(3, 5, 24)), ValueError, "bias is given beside base"),
    (dict(a=torch.zeros(6, 40, device="meta")), ValueError, "a is on meta, expected cpu as x"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"lora_linear: {message}"):
        lora(**{**inputs(), **wrong})


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [dict(rank=129), dict(dtype=torch.float64)], ids=str)
def test_what_the_kernels_cannot(wrong: dict[str, Any]) -> None:
    rank = wrong.get("rank", 6)
    tensors = inputs(wrong.get("dtype", torch.float32), a=(rank, 40), b=(24, rank))
    with pytest.raises(BackendUnavailable, match=r"ranks up to 128, a has 129|torch\.float64"):
        lora(**tensors, backend="triton")
