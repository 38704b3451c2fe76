"""What AdamW with moments in FP8 promises beyond equality with its reference on the ledger's cases."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effkit.ops import INTERPRET
from effkit.quant import AdamWFP8, adamw_fp8_step, from_fp8_codes
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_moments(param: Tensor, block_size: int = 256) -> dict[str, Tensor]:
    """What the first step starts from."""
    codes, scale = torch.zeros(param.shape, dtype=torch.uint8), torch.ones(-(-param.numel() // block_size))
    return {"m": codes, "m_scale": scale, "v": codes.clone(), "v_scale": scale.clone()}


def stepped(param: Tensor, optimizer_of: Any, steps: int = 1, **options: Any) -> Tensor:
    """A copy of param after some steps on gradients of its dtype."""
    own = nn.Parameter(param.clone())
    optimizer = optimizer_of([own], lr=0.02, **options)
    for step in range(steps):
        own.grad = draw(*param.shape, seed=step).to(param.dtype)
        optimizer.step()
    return own.detach()


class TestTheStep:
    @backends
    def test_first_step_is_that_of_adamw(self, backend: str) -> None:
        """Before the first step there is nothing that could have been rounded."""

        def ours(param: Tensor) -> Tensor:
            return adamw_fp8_step(
                param, draw(*param.shape).to(param.dtype), **no_moments(param), step=1, lr=0.02, backend=backend
            )[0]

        def theirs(param: Tensor) -> Tensor:
            return stepped(param, torch.optim.AdamW)

        assert_equivalent(ours, theirs, {"param": draw(9, 65, seed=7)}, grads=False)

    @backends
    def test_v_never_rounds_to_zero_unless_it_may(self, backend: str) -> None:
        """1 / sqrt(v) would turn that into steps without bound. What had no gradient at all stays at zero."""
        param, grad = draw(2, 256), torch.logspace(0, -20, 512).reshape(2, 256)
        grad[1, 100:] = 0
        codes = {}
        for round_up in (True, False):
            results = adamw_fp8_step(
                param, grad, **no_moments(param), step=1, betas=(0.9, 0.0), round_up_v=round_up, backend=backend
            )
            codes[round_up] = results[3]
        kept, lost = codes[True], codes[False]
        assert torch.equal(kept != 0, grad != 0)
        assert (lost == 0)[0, 220:].all() and torch.equal(kept, torch.where(grad != 0, lost.clamp(min=1), lost))

    @backends
    def test_moments_are_within_half_a_unit(self, backend: str) -> None:
        """e4m3 keeps m to 1 / 16, e5m2 v to 1 / 8, as far as numbers are normal: 15 and 30 binades."""
        param, grad = draw(4, 256), draw(4, 256, seed=1)
        _, m, m_scale, v, v_scale = adamw_fp8_step(param, grad, **no_moments(param), step=1, backend=backend)
        exact = 0.1 * grad, 0.001 * grad.square()
        for codes, scale, format, moment, unit in (
            (m, m_scale, "e4m3", exact[0], 2**-4),
            (v, v_scale, "e5m2", exact[1], 2**-3),
        ):
            stored = from_fp8_codes(codes, format) * scale[:, None]
            least = 2.0 ** (-6 if format == "e4m3" else -14) * scale[:, None]
            normal = moment.abs() >= 1.01 * least
            assert normal.float().mean() > 0.98
            assert ((stored - moment).abs() <= 1.001 * unit * moment.abs())[normal].all()

    @backends
    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_place(self, backend: str, layout: str, dtype: torch.dtype) -> None:
        param, grad = draw(9, 65).to(dtype), draw(9, 65, seed=1).to(dtype)
        if layout == "transposed":
            param = draw(65, 9).to(dtype).t()
        state = no_moments(param)
        new = adamw_fp8_step(param, grad, **state, step=1, backend=backend)
        old = [param, *state.values()]
        same = adamw_fp8_step(param, grad, **state, step=1, inplace=True, backend=backend)
        for target, result, expected in zip(old, same, new, strict=True):
            assert result.data_ptr() == target.data_ptr() and result.stride() == target.stride()
            assert torch.equal(target, expected)

    def test_errors(self) -> None:
        p, state = draw(3, 100), no_moments(draw(3, 100))
        for changed, error, message in (
            (dict(m=state["m"][:2]), ValueError, r"m has shape \[2, 100\], expected \[\*N\] with \*N=\[3, 100\]"),
            (dict(m=p), TypeError, r"m has dtype torch.float32, expected torch.uint8"),
            (dict(v_scale=torch.ones(3)), ValueError, r"v_scale has shape \[3\], expected \[G\] with G=2 from m_scale"),
            (
                dict(m_scale=torch.ones(3), v_scale=torch.ones(3)),
                ValueError,
                r"m_scale has shape \[3\], expected \[2\] for 300 elements in blocks of 256",
            ),
            (dict(v_scale=torch.ones(2).half()), TypeError, r"v_scale has dtype torch.float16, expected torch.float32"),
            (dict(grad=p.half()), TypeError, r"grad has dtype torch.float16, expected torch.float32"),
            (dict(param=p.double()), TypeError, r"param has dtype torch.float64, choices: torch.float16"),
            (dict(step=0), ValueError, "step is 0, expected an integer from 1 on"),
            (dict(block_size=48), ValueError, "block_size is 48, choices: 32, 64, 128"),
            (
                dict(formats=("e4m3", "fp8")),
                ValueError,
                r"formats is \('e4m3', 'fp8'\), expected two of 'e4m3', 'e5m2'",
            ),
            (dict(betas=(0.9, 1.0)), ValueError, r"betas is \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
            (dict(lr=math.nan), ValueError, "lr is nan, expected a finite number from 0 on"),
            (dict(lr=torch.tensor(0.1)), TypeError, "lr is a tensor, expected a number"),
        ):
            with pytest.raises(error, match=f"adamw_fp8_step: {message}"):
                adamw_fp8_step(**{"param": p, "grad": p, **state, "step": 1, **changed})


if INTERPRET:

    @pytest.mark.interpreter
    def test_the_operator_that_writes_in_place_passes_opcheck() -> None:
        param = draw(3, 100)
        scalars = [0.9, 0.1, 0.99, 0.01, 1.0, 1.0, 1e-8, 0.1]
        adamw_fp8_step(param, param, **no_moments(param), step=1, backend="triton")  # defines the operators
        arguments = (param, draw(3, 100), *no_moments(param).values(), 256, ["e4m3", "e5m2"], True, scalars)
        torch.library.opcheck(torch.ops.effkit.adamw_fp8_step_, arguments)

    @pytest.mark.interpreter
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_backends_stay_together_over_many_steps(dtype: torch.dtype) -> None:
        param = draw(5, 131).to(dtype)
        runs = [stepped(param, AdamWFP8, 8, min_elements=0, backend=backend) for backend in ("torch", "triton")]
        assert torch.equal(*runs)


class TestTheOptimizer:
    def test_small_parameters_are_those_of_adamw(self) -> None:
        for shape in ((9, 65), (5000,)):
            options = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
            assert_equivalent(
                lambda p, options=options: stepped(p.float(), AdamWFP8, 5, **options),
                lambda p, options=options: stepped(p, torch.optim.AdamW, 5, **options),
                (draw(*shape, seed=3),),
                grads=False,
            )

    def test_bytes_of_state(self) -> None:
        large, small = nn.Parameter(torch.ones(128, 100)), nn.Parameter(torch.ones(100))
        optimizer = AdamWFP8([large, small])
        large.grad, small.grad = draw(128, 100), draw(100)
        optimizer.step()
        kept = [{name: x for name, x in optimizer.state[p].items() if isinstance(x, Tensor)} for p in (large, small)]
        assert sum(x.nbytes for x in kept[0].values()) == (2 + 2 * 4 / 256) * large.numel()
        assert kept[0]["exp_avg"].dtype == torch.float8_e4m3fn and kept[0]["exp_avg_sq"].dtype == torch.float8_e5m2
        assert {x.dtype for x in kept[1].values()} == {torch.float32} and kept[1].keys() == {"exp_avg", "exp_avg_sq"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(self, dtype: torch.dtype) -> None:
        """torch would cast codes and scales to the parameter's dtype."""

        def made() -> tuple[list[nn.Parameter], AdamWFP8]:
            params = [nn.Parameter(draw(70, 65).to(dtype)), nn.Parameter(draw(70).to(dtype))]
            return params, AdamWFP8([{"params": params[:1], "block_size": 64}, {"params": params[1:], "lr": 0.1}])

        def train(params: list[nn.Parameter], optimizer: AdamWFP8, steps: range) -> None:
            for step in steps:
                for param in params:
                    param.grad = draw(*param.shape, seed=step).to(dtype)
                optimizer.step()

        (params, optimizer), (others, loaded) = made(), made()
        train(params, optimizer, range(3))
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), params], file)
        file.seek(0)
        state, saved = torch.load(file, weights_only=True)
        with torch.no_grad():
            for param, value in zip(others, saved, strict=True):
                param.copy_(value)
        loaded.load_state_dict(state)
        for old, new in zip(params, others, strict=True):
            assert loaded.state[new].keys() == optimizer.state[old].keys() and loaded.state[new]["step"] == 3
            for name, value in loaded.state[new].items():
                if name != "step":
                    expected = optimizer.state[old][name]
                    assert value.dtype == expected.dtype and torch.equal(value.float(), expected.float())
        train(params, optimizer, range(3, 6))
        train(others, loaded, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        assert state["state"][0]["step"] == 3 and not torch.equal(
            state["state"][0]["exp_avg"].float(), loaded.state[others[0]]["exp_avg"].float()
        )

    def test_a_copy_goes_on(self) -> None:
        param = nn.Parameter(draw(80, 80))
        optimizer = AdamWFP8([param], backend="torch")
        for step in range(2):
            param.grad = draw(80, 80, seed=step)
            optimizer.step()
        twin, other = copy.deepcopy((param, optimizer))
        param.grad, twin.grad = draw(80, 80, seed=2), draw(80, 80, seed=2)
        optimizer.step()
        other.step()
        assert other.backend == "torch" and torch.equal(param, twin)

    def test_a_state_of_another_optimizer_is_refused(self) -> None:
        params = [nn.Parameter(draw(80, 80)), nn.Parameter(draw(80))]
        optimizer, dense = AdamWFP8(params), torch.optim.AdamW(params, lr=0.5, amsgrad=True)
        for param in params:
            param.grad = torch.ones_like(param)
        dense.step()
        with pytest.raises(ValueError, match="a group lacks block_size, formats, round_up_v, min_elements: expected"):
            optimizer.load_state_dict(dense.state_dict())
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3

    def test_a_step_that_fails_is_not_counted(self) -> None:
        param = nn.Parameter(draw(80, 80))
        param.grad = draw(80, 80)
        optimizer = AdamWFP8([param], backend="cuda")
        with pytest.raises(ValueError, match="'cuda'"):
            optimizer.step()
        assert optimizer.state[param]["step"] == 0

    def test_groups_schedules_and_closures(self) -> None:
        first, second, idle = (nn.Parameter(torch.ones(80, 80)) for _ in range(3))
        optimizer = AdamWFP8([{"params": [first]}, {"params": [second, idle], "lr": 0.5, "formats": ("e5m2", "e5m2")}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        seen = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (first * second).sum()
            loss.backward()
            seen.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == seen[0] == 6400
        schedule.step()
        assert optimizer.param_groups[1]["lr"] == 0.25
        assert optimizer.state[second]["exp_avg"].dtype == torch.float8_e5m2
        assert idle not in optimizer.state and torch.equal(idle, torch.ones(80, 80))
        assert (1 - first[0, 0]).item() < (1 - second[0, 0]).item()

    def test_a_step_between_forward_and_backward_is_noticed(self) -> None:
        param = nn.Parameter(draw(80, 80))
        param.grad = draw(80, 80)
        loss = param.square().sum()
        AdamWFP8([param]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_refuses_what_it_cannot_do(self) -> None:
        with pytest.raises(TypeError, match=r"a parameter has dtype torch.complex64, choices: torch.float16"):
            AdamWFP8([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
        with pytest.raises(TypeError, match=r"a parameter has dtype torch.float64, choices"):
            AdamWFP8([nn.Parameter(torch.ones(3, dtype=torch.float64))])
        sharded = nn.Parameter(torch.ones(3))
        sharded.placements = ()  # what tells a DTensor
        with pytest.raises(TypeError, match="a parameter is a DTensor, whose state could not be saved"):
            AdamWFP8([sharded])
        for options, message in (
            (dict(block_size=48), "block_size is 48"),
            (dict(lr=-1.0), "lr is -1.0"),
            (dict(betas=(0.9,)), r"betas is \(0.9,\)"),
        ):
            with pytest.raises(ValueError, match=f"AdamWFP8: {message}"):
                AdamWFP8([nn.Parameter(torch.ones(3))], **options)
        for options, message in (
            (dict(lr="high"), "lr is 'high', expected a number"),
            (dict(betas=0.9), "betas is 0.9, expected two numbers"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"AdamWFP8: {message}"):
                AdamWFP8([nn.Parameter(torch.ones(3))], **options)
        optimizer = AdamWFP8([nn.Parameter(torch.ones(3))])
        with pytest.raises(ValueError, match="formats is"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "formats": "e4m3"})
        assert len(optimizer.param_groups) == 1

    def test_sparse_gradients_are_refused_before_anything_changes(self) -> None:
        dense, table = nn.Parameter(torch.ones(5, 3)), nn.Embedding(7, 3, sparse=True)
        (dense.sum() + table(torch.tensor([1, 2])).sum()).backward()
        optimizer = AdamWFP8([dense, table.weight])
        with pytest.raises(TypeError, match=r"a gradient has layout torch.sparse_coo, expected torch.strided"):
            optimizer.step()
        assert torch.equal(dense, torch.ones(5, 3)) and not optimizer.state


class TestFeaturesOfManySizes:
    """A regression whose features have sizes from 1 / 40 to 50: so have their gradients, within one block."""

    def final_loss(self, optimizer_of: Any, steps: int = 100, lr: float = 1e-2) -> float:
        sizes = torch.exp(1.5 * draw(256, seed=1))
        wanted = draw(8, 256, seed=2) / sizes / 16  # outputs of variance 1
        weight = nn.Parameter(torch.zeros(8, 256))
        optimizer = optimizer_of([weight], lr=lr, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            loss = (draw(128, 256, seed=10 + step) * sizes @ (weight - wanted).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(((weight - wanted) * sizes).square().sum(1).mean().detach())  # over all inputs

    def test_v_wants_range_and_not_digits(self) -> None:
        def fp8(*formats: str, round_up_v: bool = False) -> float:
            options = dict(formats=formats, round_up_v=round_up_v, min_elements=0)
            return self.final_loss(lambda params, **kw: AdamWFP8(params, **options, **kw))

        exact = self.final_loss(torch.optim.AdamW)
        assert exact < 0.1  # of the 1 that weights of zero have
        assert fp8("e4m3", "e5m2", round_up_v=True) < 1.1 * exact and fp8("e5m2", "e5m2") < 1.1 * exact
        assert fp8("e4m3", "e4m3") > 10  # worse than nothing: it diverges
        assert fp8("e4m3", "e4m3", round_up_v=True) < 1  # small steps where v was rounded up: slow, but sound
