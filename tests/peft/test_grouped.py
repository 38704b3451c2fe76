"""Grouped LoRA: rows and their adapters keep to themselves, what is kept, and models whose rows differ in theirs."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import effkit
from effkit.ops import INTERPRET, get_op
from effkit.peft import (
    DoRAConfig,
    LoRAConfig,
    SingLoRAConfig,
    VeRAConfig,
    activate,
    active_adapters,
    adapter_rows,
    adapters_of,
    advance_ramp,
    disabled,
    grouped_lora,
    lora_linear,
    merge,
    set_scale,
)
from effkit.peft.grouped import _gathered, grouped_lora_reference
from effkit.quant import NF4Config
from effkit.testing import assert_equivalent

# "gathered" is what torch does where rows cannot be read: on CUDA and for a compiler.
BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["torch", "gathered"]
FACTORS = ("base", "x", "a", "b")


def call(backend):
    if backend == "gathered":
        return _gathered
    return lambda *args: grouped_lora(*args, backend=backend)


def draw(rows, T=19, K=33, M=21, R=5, E=3, dtype=torch.float32, factors=None):
    """The arguments, those with a gradient first asked for one."""
    g = torch.Generator().manual_seed(0)
    shapes = dict(base=(len(rows), T, M), x=(len(rows), T, K), a=(E, R, K), b=(E, M, R))
    own = dict(a=factors or dtype, b=factors or dtype)
    drawn = {name: torch.randn(shape, generator=g).to(own.get(name, dtype)) for name, shape in shapes.items()}
    scale = torch.rand(E, generator=g) + 0.5
    return dict(
        base=drawn["base"],
        x=drawn["x"],
        rows=torch.tensor(rows, dtype=torch.int64),
        a=drawn["a"],
        b=drawn["b"],
        scale=scale,
    )


def gradients(fn, inputs):
    """y and the gradients of base, x, a, b for a fixed cotangent."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in FACTORS}
    y = fn(*{**inputs, **leaves}.values())
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return y.detach(), dict(zip(FACTORS, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


def bits(x):
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
class TestRows:
    @pytest.mark.parametrize("T", [1, 19])
    def test_each_row_is_a_layer_with_that_adapters_matrix(self, backend, T):
        """Against the materialised update of each row, a second reference."""
        inputs = draw((2, -1, 0, 2, 2, 1), T)

        def materialised(base, x, rows, a, b, scale):
            update = scale[:, None, None].to(a.dtype) * (b @ a)
            padded = torch.cat((update, torch.zeros_like(update[:1])))
            return base + x @ padded[rows].mT

        assert_equivalent(call(backend), materialised, tuple(inputs.values()), grads=("0", "1", "3", "4"))

    @pytest.mark.parametrize("T", [1, 19])
    def test_a_row_without_an_adapter_is_its_base_bit_for_bit(self, backend, T):
        inputs = draw((-1, 1, -1, -1), T)
        inputs["base"][0] = -0.0
        inputs["base"][2, :, :3] = torch.tensor([torch.nan, -torch.inf, 1e-42])
        inputs["x"][2:] = torch.nan
        y, grads = gradients(call(backend), inputs)
        none = inputs["rows"] < 0
        assert torch.equal(bits(y[none]), bits(inputs["base"][none]))
        assert torch.equal(grads["x"][none], torch.zeros_like(grads["x"][none]))
        assert all(grads[name].isfinite().all() for name in FACTORS)
        assert torch.equal(grads["a"][[0, 2]], torch.zeros_like(grads["a"][[0, 2]]))
        assert torch.equal(grads["b"][[0, 2]], torch.zeros_like(grads["b"][[0, 2]]))
        assert grads["a"][1].any() and grads["b"][1].any()

    @pytest.mark.parametrize("T", [1, 19])
    def test_all_rows_without_an_adapter(self, backend, T):
        inputs = draw((-1, -1), T)
        y, grads = gradients(call(backend), inputs)
        assert torch.equal(y, inputs["base"]) and not any(grads[name].any() for name in ("x", "a", "b"))

    @pytest.mark.parametrize("T", [1, 19])
    def test_nan_stays_with_its_row_and_adapter(self, backend, T):
        """An adapter whose training fails takes no other with it."""
        inputs = draw((0, 1, 2, 1), T)
        clean, clean_grads = gradients(call(backend), inputs)
        inputs["a"][1, 0, 0] = inputs["x"][1, 0, 0] = torch.nan
        y, grads = gradients(call(backend), inputs)
        assert y[[1, 3]].isnan().any() and torch.equal(y[[0, 2]], clean[[0, 2]])
        assert grads["b"][1].isnan().any() and grads["x"][3].isnan().any()
        assert torch.equal(grads["x"][[0, 2]], clean_grads["x"][[0, 2]])
        for name in ("a", "b"):
            assert torch.equal(grads[name][[0, 2]], clean_grads[name][[0, 2]])

    def test_zeros_pad_lower_ranks(self, backend):
        """Padding adds nothing, and has no gradient, so that it stays zero in training."""
        inputs = draw((0, 1, 0))
        inputs["a"][1, 2:] = inputs["b"][1, :, 2:] = 0
        _, grads = gradients(call(backend), inputs)
        assert not grads["a"][1, 2:].any() and not grads["b"][1, :, 2:].any()
        lower = {**inputs, "a": inputs["a"][1:, :2], "b": inputs["b"][1:, :, :2], "scale": inputs["scale"][1:]}
        lower = {name: value[1:2] if name in ("base", "x") else value for name, value in lower.items()}
        lower["rows"] = torch.tensor([0])

        def padded(base, x, rows, a, b, scale):
            full = inputs["a"].to(a.dtype).index_put((torch.tensor(1),), nn.functional.pad(a[0], (0, 0, 0, 3)))
            right = inputs["b"].to(b.dtype).index_put((torch.tensor(1),), nn.functional.pad(b[0], (0, 3)))
            return call(backend)(base, x, rows + 1, full, right, inputs["scale"])

        assert_equivalent(padded, grouped_lora_reference, tuple(lower.values()), grads=("0", "1", "3", "4"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("T", [1, 19])
    def test_master_copies(self, backend, dtype, T):
        """Factors in float32 beside x in half precision: rounded for the products, with gradients in float32."""
        inputs = draw((2, 0, -1, 0), T, dtype=dtype, factors=torch.float32)
        grads = ("0", "1", "3", "4")
        assert_equivalent(call(backend), grouped_lora_reference, tuple(inputs.values()), grads)
        rounded = {**inputs, "a": inputs["a"].to(dtype), "b": inputs["b"].to(dtype)}
        y, of_masters = gradients(call(backend), inputs)
        same, of_rounded = gradients(call(backend), rounded)
        assert torch.equal(y, same) and of_masters["a"].dtype == torch.float32 and of_rounded["b"].dtype == dtype
        assert torch.equal(of_masters["a"].to(dtype), of_rounded["a"])

    def test_both_kinds_of_integers(self, backend):
        inputs = draw((2, -1, 0))
        small = {**inputs, "rows": inputs["rows"].int()}
        assert torch.equal(call(backend)(*inputs.values()), call(backend)(*small.values()))

    def test_gradients_one_by_one(self, backend):
        """Gradients that nobody asks for are not computed, and do not disturb the others."""
        inputs = draw((1, 0, -1))
        _, every = gradients(call(backend), inputs)
        for name in FACTORS:
            alone = {**inputs, name: inputs[name].detach().requires_grad_()}
            y = call(backend)(*alone.values())
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            assert torch.equal(alone[name].grad, every[name])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "gathered"])
class TestPromises:
    @pytest.mark.parametrize("T", [1, 19])
    def test_keeps_x_and_s_only(self, backend, T):
        inputs = draw((1, 0, -1, 1), T)
        leaves = {name: value.requires_grad_() if name in FACTORS else value for name, value in inputs.items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            y = grouped_lora(**leaves, backend=backend)
        given = {value.data_ptr() for name, value in leaves.items() if name != "base"}
        own = [x for x in kept if x.data_ptr() not in given]
        assert inputs["base"].data_ptr() not in {x.data_ptr() for x in kept} and y.requires_grad
        s = 4 * 4 * T * 5
        plan = 4 * (4 + 3 + 2) if backend == "triton" else 0  # int32: rows in order, ends of groups
        assert sum(x.numel() * x.element_size() for x in own) == s + plan

    def test_one_adapter_is_lora_linear(self, backend):
        inputs = draw((0, 0), E=1)

        def grouped(base, x, a, b):
            return grouped_lora(base, x, inputs["rows"], a[None], b[None], inputs["scale"], backend=backend)

        def single(base, x, a, b):
            return lora_linear(x, a, b, inputs["scale"][0].to(x.dtype), base=base, backend="reference")

        assert_equivalent(grouped, single, (inputs["base"], inputs["x"], inputs["a"][0], inputs["b"][0]))

    def test_vmap(self, backend):
        """Over several batches of x and base at once, and over several sets of factors."""
        inputs = draw((1, -1, 0), T=3)

        def of_all(x, a):
            return grouped_lora(inputs["base"], x, inputs["rows"], a, inputs["b"], inputs["scale"], backend=backend)

        xs, factors = torch.stack((inputs["x"], -inputs["x"])), torch.stack((inputs["a"], inputs["a"] + 1))
        for dims in ((0, None), (0, 0)):
            args = (xs, factors if dims[1] == 0 else inputs["a"])
            each = [of_all(xs[i], factors[i] if dims[1] == 0 else inputs["a"]) for i in range(2)]
            assert torch.equal(torch.func.vmap(of_all, dims)(*args), torch.stack(each))

    def test_second_derivatives_are_refused(self, backend):
        inputs = {name: v.requires_grad_() if name in FACTORS else v for name, v in draw((1, 0)).items()}
        (first,) = torch.autograd.grad(
            grouped_lora(**inputs, backend=backend).square().sum(), inputs["x"], create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

    def test_compiled_code_takes_other_rows(self, backend):
        """fullgraph, and what is compiled for one set of rows serves the next."""
        torch._dynamo.reset()
        counter = CompileCounter()

        @torch.compile(backend=counter, fullgraph=True)
        def compiled(**inputs):
            return grouped_lora(**inputs, backend=backend)

        inputs = draw((1, -1, 0))
        for rows in ((1, -1, 0), (2, 2, 2), (-1, -1, -1)):
            given = {**inputs, "rows": torch.tensor(rows)}
            assert_equivalent(compiled, grouped_lora_reference, given, grads=FACTORS)
        assert counter.frame_count == 1


if INTERPRET:

    @pytest.mark.interpreter
    @pytest.mark.parametrize(("B", "E"), [(0, 1), (1, 1), (7, 3), (64, 62), (65, 9), (130, 70)])
    def test_the_plan_of_the_kernels(B, E):
        """The rows in a stable order of their adapters, then those without one, and where each of these groups ends."""
        rows = torch.randint(-1, E, (B,), generator=torch.Generator().manual_seed(B))
        get_op("grouped_lora").implementation("triton")  # imports the kernels
        plan = torch.ops.effkit.grouped_lora_plan(rows, E)
        groups = torch.where(rows < 0, E, rows)
        assert torch.equal(plan[:B].long(), groups.argsort(stable=True))
        assert torch.equal(plan[B:].long(), groups.bincount(minlength=E + 2).cumsum(0))

    @pytest.mark.interpreter
    @pytest.mark.parametrize("T", [1, 19])
    def test_the_kernel_makes_rows_out_of_range_nan(T):
        """Where the host does not read them: nothing else is touched, and no adapter is guessed."""
        inputs = draw((1, 3, -2, 0), T)
        kernel = get_op("grouped_lora").implementation("triton")
        y = kernel(**inputs)
        assert y[[1, 2]].isnan().all() and y[[0, 3]].isfinite().all()
        valid = {**inputs, "rows": torch.tensor((1, -1, -1, 0))}
        assert torch.equal(y[[0, 3]], kernel(**valid)[[0, 3]])

else:

    def test_under_autocast():
        """As a linear layer: x and factors in autocast's dtype, and y, too; gradients come back in their own."""
        inputs = {name: v.requires_grad_() if name in FACTORS else v for name, v in draw((1, -1, 0)).items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = grouped_lora(**inputs)
        half = {name: v.detach().bfloat16() if name in FACTORS else v for name, v in inputs.items()}
        assert torch.equal(y, grouped_lora(**half))
        y.float().sum().backward()
        assert all(inputs[name].grad.dtype == torch.float32 for name in FACTORS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(rows=torch.tensor((0, 3, 1))), r"rows is \[0, 3, 1\], expected -1 to 2, with E=3"),
            (dict(rows=torch.tensor((0, -2, 1))), r"rows is \[0, -2, 1\], expected -1 to 2"),
            (dict(rows=torch.tensor((0, 1))), r"rows has shape \[2\], expected \[B\] with B=3 from base"),
            (dict(rows=torch.ones(3)), "rows has dtype torch.float32, choices: torch.int32, torch.int64"),
            (dict(x=torch.ones(3, 19, 33, dtype=torch.int64)), "x has dtype torch.int64, choices: torch.float16"),
            (dict(a=torch.ones(3, 5, 32)), r"a has shape \[3, 5, 32\], expected \[E, R, K\] with K=33 from x"),
            (dict(b=torch.ones(3, 21, 4)), r"b has shape \[3, 21, 4\], expected \[E, M, R\] with R=5 from a"),
            (dict(scale=torch.ones(3, requires_grad=True)), r"scale asks for a gradient.*scale.detach\(\)"),
            (dict(b=torch.ones(3, 21, 5, device="meta")), "b is on meta, expected cpu as x"),
        ],
    )
    def test_wrong_arguments(change, message):
        with pytest.raises((TypeError, ValueError), match=message):
            grouped_lora(**draw((0, 2, 1)) | change)

    def test_no_adapters_at_all():
        with pytest.raises(ValueError, match=r"a holds no adapters \(E=0\)"):
            grouped_lora(**draw((), E=0))


NAMES = ["wide", None, "narrow", "wide", "part"]


@pytest.fixture
def adapted(make):
    """A function: a model with three adapters that differ in rank, scale and layers."""

    def build(kind):
        model = make(kind)
        first = "q_proj" if kind == "llama" else "c_attn"
        effkit.apply(model, LoRAConfig(rank=5, alpha=9, target_modules="all-linear", init="random", name="wide"))
        effkit.apply(
            model, LoRAConfig(rank=2, alpha=7, target_modules="all-linear", init="random", name="narrow", seed=1)
        )
        effkit.apply(model, LoRAConfig(rank=4, target_modules=(first,), init="random", name="part", seed=2))
        return model

    return build


@pytest.fixture
def five(ids):
    """Token ids [5, 7]."""
    return torch.randint(1, 96, (5, 7), generator=torch.Generator().manual_seed(3))


def one_by_one(model, x, names, run=lambda model, x: model(x)):
    """Each row on its own, with its adapter active."""
    results = []
    for row, name in zip(x.split(1), names, strict=True):
        activate(model, *(() if name is None else (name,)))
        results.append(run(model, row))
    return torch.cat(results)


def assert_rows_are_alone(model, ids, names, grads=False, places=()):
    """Logits of all rows together and, if so asked, the gradient of every factor of every adapter, are those of
    each row by itself. places: the same rows as arguments of adapter_rows."""
    models = {torch.float32: model, torch.float64: copy.deepcopy(model).double()}

    def logits(factors):
        return lambda model, ids: torch.func.functional_call(model, factors, (ids,)).logits

    def together(**factors):
        own = models[next(iter(factors.values())).dtype]
        with adapter_rows(own, *(places or (names,))):
            return logits(factors)(own, ids)

    def apart(**factors):
        return one_by_one(models[next(iter(factors.values())).dtype], ids, names, logits(factors))

    factors = {name: p.detach() for name, p in model.named_parameters() if ".adapters." in name}
    assert_equivalent(together, apart, factors, grads)


@pytest.mark.skipif(INTERPRET, reason="of models, not of kernels")
class TestModels:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_each_row_is_as_with_its_adapter_alone(self, adapted, five, kind):
        assert_rows_are_alone(adapted(kind), five, NAMES, grads=True)

    def test_of_one_adapter_and_of_none(self, adapted, five):
        model = adapted("llama")
        with torch.no_grad():
            with disabled(model):
                base = model(five).logits
            with adapter_rows(model, [None] * 5):
                assert torch.equal(model(five).logits, base)

    def test_which_adapters_are_on_does_not_matter_and_stays(self, adapted, five):
        model = adapted("llama")
        seen = []
        for names in ((), ("wide",), ("narrow", "part")):
            activate(model, *names)
            gates = {name: buffer for name, buffer in model.named_buffers() if name.endswith("gate")}
            with torch.no_grad(), adapter_rows(model, NAMES):
                seen.append(model(five).logits)
            assert active_adapters(model) == list(names)
            after = {name: buffer for name, buffer in model.named_buffers() if name.endswith("gate")}
            assert all(torch.equal(after[name], gate) for name, gate in gates.items())
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])

    def test_places_in_a_list_of_names(self, adapted, five):
        places = torch.tensor((1, -1, 2, 1, 0), dtype=torch.int32)
        assert_rows_are_alone(adapted("llama"), five, NAMES, places=(places, ("part", "wide", "narrow")))

    def test_blocks_nest_and_end(self, adapted, five):
        model = adapted("llama")
        with torch.no_grad():
            with adapter_rows(model, NAMES):
                outer = model(five).logits
                with adapter_rows(model, [None] * 5):
                    assert not torch.equal(model(five).logits, outer)
                assert torch.equal(model(five).logits, outer)
            activate(model)
            assert all(module.rows is None for module in model.modules() if hasattr(module, "rows"))
            with disabled(model):
                base = model(five).logits
            assert torch.equal(model(five).logits, base)
            with pytest.raises(RuntimeError, match="inside"), adapter_rows(model, NAMES):
                raise RuntimeError("inside")
            assert torch.equal(model(five).logits, base)

    def test_generate(self, adapted, five):
        """The same tokens as each row alone, with the cache and without."""
        model = adapted("llama")

        def tokens(model, ids, **options):
            return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)

        alone = one_by_one(model, five, NAMES, tokens)
        for options in ({}, {"use_cache": False}):
            with adapter_rows(model, NAMES):
                assert torch.equal(tokens(model, five, **options), alone)

    def test_what_is_kept_between_passes_is_never_stale(self, adapted, five):
        """Without gradients the stacked factors are made once; every change is seen all the same."""
        model = adapted("llama")
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        with torch.no_grad(), adapter_rows(model, NAMES):
            seen = [model(five).logits]
            kept = layer.rows.kept["stacked"]
            model(five)
            assert layer.rows.kept["stacked"] is kept
            layer.adapters["wide"].lora_B.mul_(2)
            seen.append(model(five).logits)
            layer.adapters["wide"].lora_B.data = layer.adapters["wide"].lora_B.data * 2
            seen.append(model(five).logits)
            layer.adapters["narrow"].lora_A = nn.Parameter(layer.adapters["narrow"].lora_A * 2)
            seen.append(model(five).logits)
            set_scale(model, 0.5, "part")
            seen.append(model(five).logits)
            fresh = copy.deepcopy(model)
        for i, first in enumerate(seen):
            assert not any(torch.equal(first, other) for other in seen[:i])
        with torch.no_grad(), adapter_rows(fresh, NAMES):
            assert torch.equal(fresh(five).logits, seen[-1])

    def test_a_step_trains_the_adapters_of_its_rows(self, adapted, five):
        """Several adapters are trained at once, and one that no row has keeps still."""
        model = adapted("llama")
        for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
            parameter.requires_grad_()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2), []
        for _ in range(4):
            with adapter_rows(model, ["wide", "part", "wide", "part", None]):
                loss = model(five, labels=five).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if ".wide." in name or ".part." in name}

    def test_activation_checkpointing(self, adapted, five):
        model = adapted("llama")
        activate(model)
        factors = [p.requires_grad_() for name, p in model.named_parameters() if ".adapters." in name]

        def loss(ids):
            return model(ids, labels=ids).loss

        with adapter_rows(model, NAMES):
            plain = torch.autograd.grad(loss(five), factors)
            repeated = torch.autograd.grad(checkpoint(loss, five, use_reentrant=False), factors)
        assert all(torch.equal(one, other) for one, other in zip(plain, repeated, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_layers_take_other_rows(self, dtype):
        """Adapters in float32 beside layers in half precision, too."""
        torch._dynamo.reset()
        with torch.random.fork_rng():
            exact = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        model = copy.deepcopy(exact).to(dtype)
        for each in (exact, model):
            for rank, name in ((2, "one"), (3, "two")):
                config = LoRAConfig(rank=rank, target_modules="0|2", init="random", name=name, seed=rank)
                effkit.apply(each, config)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.linspace(-1, 1, 72, dtype=dtype).view(3, 3, 8)
        for rows in ((0, -1, 1), (1, 0, 0), (0, 1, 0)):
            names = [("one", "two", None)[place] for place in rows]
            for run in (compiled, model):
                with adapter_rows(model, torch.tensor(rows), ("one", "two")):
                    y = run(x)
                assert_equivalent(
                    lambda x, y=y: y,
                    lambda x, names=names: one_by_one(exact if x.dtype == torch.float64 else model, x, names),
                    (x,),
                    grads=False,
                )
        assert counter.frame_count == 1

    def test_any_layers_and_any_adapters_with_factors(self, make, five):
        """Layers in four bits, and rows with LoRA, VeRA and SingLoRA."""
        model = make("llama", hidden_size=64, intermediate_size=64)
        effkit.apply(model, NF4Config(block_size=32))
        effkit.apply(model, LoRAConfig(rank=3, target_modules="all-linear", init="random", name="lora"))
        effkit.apply(model, VeRAConfig(rank=6, target_modules=("q_proj", "v_proj"), name="vera"))
        effkit.apply(model, SingLoRAConfig(rank=4, ramp_steps=10, target_modules=("k_proj",), name="single"))
        for part in adapters_of(model, "vera").values():
            part.vera_lambda_b.data.fill_(0.5)
        advance_ramp(model, 4)
        names = ["vera", "lora", None, "single", "lora"]
        assert_rows_are_alone(model, five, names)
        with torch.no_grad(), adapter_rows(model, names):
            before = model(five).logits
            advance_ramp(model)
            after = model(five).logits
        assert not torch.equal(before[3], after[3])
        assert torch.equal(before[[0, 1, 2, 4]], after[[0, 1, 2, 4]])


@pytest.mark.skipif(INTERPRET, reason="of models, not of kernels")
class TestRefusals:
    def test_dropout_while_training(self, make, five):
        model = make("llama")
        effkit.apply(model, LoRAConfig(rank=2, dropout=0.1, name="a"))
        with adapter_rows(model, ["a"] * 5):
            model(five)
            model.train()
            with pytest.raises(ValueError, match=r"adapter 'a' has dropout 0.1, .*choices: model.eval\(\)"):
                model(five)

    def test_another_number_of_rows(self, adapted, five):
        model = adapted("llama")
        with adapter_rows(model, NAMES), pytest.raises(ValueError, match=r"x \[2, 7, 32\], expected .* of 5 rows"):
            model(five[:2])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (DoRAConfig(rank=2, target_modules=("q_proj",), name="a"), "in model.layers.0.self_attn.q_proj: DoRA has"),
            (LoRAConfig(rank=2, target_modules=("embed_tokens",), name="a"), "in model.embed_tokens: .*embedding"),
            (LoRAConfig(rank=2, update_bias=True, name="a"), "adapter 'a' has a bias in model.layers.0"),
            (LoRAConfig(rank=2, modules_to_save=("lm_head",), name="a"), "in lm_head: TrainedCopy has no factors"),
        ],
    )
    def test_adapters_that_are_no_factors(self, make, config, message):
        model = make("llama")
        effkit.apply(model, config)
        with pytest.raises(TypeError, match=message), adapter_rows(model, ["a"]):
            pass
        assert active_adapters(model) == ["a"]
        assert all(module.rows is None for module in model.modules() if hasattr(module, "rows"))

    def test_names_and_rows(self, adapted):
        model = adapted("llama")
        for rows, names, message in (
            (["wide", "thin"], (), r"no adapter 'thin' in the model, choices: \['wide', 'narrow', 'part'\]"),
            (["wide"], ("wide",), "expected none where rows are names themselves"),
            (torch.tensor((0, 1)), ("wide",), r"rows is \[0, 1\], expected -1 to 0"),
            (torch.zeros(2), ("wide",), r"rows is torch.float32 \[2\], expected names, or int32 or int64"),
        ):
            with pytest.raises((ValueError, TypeError), match=message), adapter_rows(model, rows, names):
                pass
        activate(model, "wide")
        merge(model)
        with pytest.raises(RuntimeError, match=r"adapter_rows: .*merged"), adapter_rows(model, ["wide"]):
            pass
