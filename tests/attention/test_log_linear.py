"""Log-linear attention: its levels are a Fenwick tree, and what follows from that for both techniques."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention import (
    GatedDeltaNet,
    LevelScales,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    LogLinearState,
    Mamba2,
    gated_delta_rule,
    log_linear_attention,
    log_linear_gated_delta_rule,
    ssd,
)
from effkit.attention._fenwick import aligned_pieces, level, levels_for, past_blocks
from effkit.ops import INTERPRET, get_op
from effkit.testing import assert_equivalent

BACKENDS = ["triton"] if INTERPRET else ["reference", "torch"]
OPS = (log_linear_attention, log_linear_gated_delta_rule)
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def backends() -> list[Any]:
    marks = [pytest.mark.interpreter] if INTERPRET else []
    return [pytest.param(name, marks=marks) for name in BACKENDS]


every_backend = pytest.mark.parametrize("backend", backends())


def has(op: Callable[..., Any], backend: str) -> None:
    if backend == "triton" and get_op(op.__name__).triton is None:
        pytest.skip(f"{op.__name__} has no kernel")


def tensors(op: Callable[..., Any], T: int, L: int = 8, B: int = 2, H: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, 16, generator=generator) for _ in "qkv")
    inputs = dict(q=q, k=F.normalize(k, dim=-1), v=v, g=-torch.rand(B, H, T, generator=generator))
    if op is log_linear_gated_delta_rule:
        inputs["beta"] = torch.rand(B, H, T, generator=generator)
    return inputs | dict(level_scales=torch.rand(B, H, T, L, generator=generator))


def part(inputs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, :, begin:end] for name, x in inputs.items()}


def greedy_level(t: int, s: int) -> int:
    """Cut [0, t) from the right by the lowest set bit of what is left: the block of 2^i tokens is level i + 1."""
    while t > s:
        size = t & -t
        if s >= t - size:
            return size.bit_length()
        t -= size
    return 0


@every_backend
def test_definition_of_the_delta_rule(backend: str) -> None:
    """Each source on its own: what is left of beta_s k_s v_s^T after all later steps, weighed by its level."""
    has(log_linear_gated_delta_rule, backend)

    def by_source(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, level_scales: Tensor) -> Any:
        sources: list[Tensor] = []  # [B, H, K, V] for each token so far
        outs = []
        for t in range(q.shape[2]):
            key, b, decay = k[:, :, t, :, None], beta[:, :, t, None, None], g[:, :, t, None, None].exp()
            sources = [decay * (S - b * key @ (key.mT @ S)) for S in sources]
            sources.append(b * key @ v[:, :, t, None])
            weights = [level_scales[:, :, t, greedy_level(t, s), None, None] for s in range(t + 1)]
            outs.append(q[:, :, t, None] @ sum(w * S for w, S in zip(weights, sources, strict=True)))
        return torch.cat(outs, 2)

    assert_equivalent(
        lambda **x: log_linear_gated_delta_rule(**x, chunk_size=16, backend=backend),
        by_source,
        tensors(log_linear_gated_delta_rule, 37),
    )


@every_op
@every_backend
@pytest.mark.parametrize("T", [1, 2, 12, 17, 32])
def test_state_holds_the_blocks_of_the_last_token(op: Callable[..., Any], backend: str, T: int) -> None:
    """Without decay, and with keys that do not erase each other, sums over blocks; zeros at the other levels."""
    has(op, backend)
    inputs = tensors(op, T)
    inputs |= dict(g=torch.zeros_like(inputs["g"]), k=torch.eye(32)[:T].repeat(2, 2, 1, 1), q=torch.zeros(2, 2, T, 32))
    levels = inputs.pop("level_scales")

    def memory(**inputs: Tensor) -> Tensor:
        return op(**inputs, level_scales=levels, chunk_size=16, return_state=True, backend=backend)[1].memory

    def sums(k: Tensor, v: Tensor, beta: Tensor | None = None, **others: Tensor) -> Tensor:
        k = k if beta is None else beta[..., None] * k
        blocks = past_blocks(T - 1)
        own = [blocks.get(i, slice(0, 0)) for i in range(8)]
        return torch.stack([k[:, :, tokens].mT @ v[:, :, tokens] for tokens in own], 2)

    assert_equivalent(memory, sums, inputs, grads=("v",))


@every_op
@every_backend
def test_levels_that_are_off_hide_their_tokens(op: Callable[..., Any], backend: str) -> None:
    """With levels 0 to 2 alone a token sees the aligned four that it is in; for the delta rule sources, not erasure."""
    has(op, backend)
    inputs = tensors(op, 40)
    inputs["level_scales"] = inputs["level_scales"] * (torch.arange(8) < 3)
    changed = {**inputs, "v": inputs["v"].clone()}
    changed["v"][:, :, 16:20] += 1
    same, other = (op(**x, chunk_size=16, backend=backend) for x in (inputs, changed))
    assert torch.equal(same[:, :, :16], other[:, :, :16]) and torch.equal(same[:, :, 20:], other[:, :, 20:])
    assert (same[:, :, 16:20] != other[:, :, 16:20]).all()


@every_backend
def test_all_scales_one_is_ssd(backend: str) -> None:
    has(log_linear_attention, backend)

    def together(level_scales: Tensor, **inputs: Tensor) -> Any:
        o, state = log_linear_attention(
            **inputs, level_scales=torch.ones_like(level_scales), chunk_size=16, return_state=True, backend=backend
        )
        return o, state.memory.sum(2), state.position

    def at_once(level_scales: Tensor, **inputs: Tensor) -> Any:
        o, state = ssd(**inputs, return_state=True, backend="reference")
        return o, state.memory, state.position

    assert_equivalent(together, at_once, tensors(log_linear_attention, 70), grads=("q", "k", "v", "g"))


@every_backend
def test_all_scales_one_is_the_gated_delta_rule(backend: str) -> None:
    has(log_linear_gated_delta_rule, backend)

    def together(level_scales: Tensor, **inputs: Tensor) -> Any:
        o, state = log_linear_gated_delta_rule(
            **inputs, level_scales=torch.ones_like(level_scales), chunk_size=16, return_state=True, backend=backend
        )
        return o, state.memory.sum(2), state.position

    def at_once(level_scales: Tensor, **inputs: Tensor) -> Any:
        o, state = gated_delta_rule(**inputs, scale=1.0, return_state=True, backend="reference")
        return o, state.memory, state.position

    inputs = tensors(log_linear_gated_delta_rule, 70)
    assert_equivalent(together, at_once, inputs, grads=("q", "k", "v", "g", "beta"))


@every_op
@every_backend
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes_agree(op: Callable[..., Any], backend: str, chunk_size: int) -> None:
    has(op, backend)
    assert_equivalent(
        lambda **x: op(**x, chunk_size=chunk_size, backend=backend),
        lambda **x: op(**x, backend="reference"),
        tensors(op, 100, B=1, H=1),
    )


@every_op
@every_backend
def test_more_levels_than_needed_change_nothing(op: Callable[..., Any], backend: str) -> None:
    has(op, backend)
    inputs = tensors(op, 21, L=6)
    more = {**inputs, "level_scales": F.pad(inputs["level_scales"], (0, 5), value=7.0)}
    (o, state), (same, larger) = (op(**x, backend=backend, return_state=True) for x in (inputs, more))
    assert torch.equal(o, same) and torch.equal(state.memory, larger.memory[:, :, :6])
    assert not larger.memory[:, :, 6:].any()


@every_op
@every_backend
@pytest.mark.parametrize("length", [1, 21])
def test_rows_at_different_positions(op: Callable[..., Any], backend: str, length: int) -> None:
    """Rows that have read 17, 3, 40, 17 and 0 tokens go on together, as each would alone."""
    has(op, backend)
    read = (17, 3, 40, 17, 0)
    inputs = tensors(op, 40 + length, B=5)

    def rows(states_of: str, together: bool, **inputs: Tensor) -> Any:
        parts = [{name: x[n : n + 1] for name, x in inputs.items()} for n in range(5)]
        states = [
            op(**part(x, 0, end), backend=states_of, chunk_size=16, return_state=True)[1]
            for x, end in zip(parts, read, strict=True)
        ]
        rest = [part(x, end, end + length) for x, end in zip(parts, read, strict=True)]
        if together:
            state = LogLinearState(*(torch.cat(xs) for xs in zip(*states, strict=True)))
            joined = {name: torch.cat([x[name] for x in rest]) for name in inputs}
            return op(**joined, initial_state=state, return_state=True, backend=states_of, chunk_size=16)
        found = [
            op(**x, initial_state=s, return_state=True, backend="reference") for x, s in zip(rest, states, strict=True)
        ]
        return torch.cat([o for o, _ in found]), [torch.cat(xs) for xs in zip(*(s for _, s in found), strict=True)]

    assert_equivalent(
        lambda **x: rows(backend, True, **x), lambda **x: rows("reference", False, **x), inputs, grads=length > 1
    )


@every_op
@every_backend
def test_every_cut(op: Callable[..., Any], backend: str) -> None:
    has(op, backend)
    inputs = tensors(op, 40, B=1)

    def cut(at: int) -> Callable[..., Any]:
        def call(**inputs: Tensor) -> Any:
            first, state = op(**part(inputs, 0, at), chunk_size=8, backend="torch", return_state=True)
            rest, state = op(
                **part(inputs, at, 40), chunk_size=16, backend=backend, return_state=True, initial_state=state
            )
            return torch.cat((first, rest), 2), state

        return call

    for at in range(0, 40, 3 if INTERPRET else 1):
        whole = lambda **x: op(**x, return_state=True, backend="reference")  # noqa: E731
        assert_equivalent(cut(at), whole, inputs, grads=False)


if not INTERPRET:

    def test_levels_are_the_blocks_of_a_fenwick_tree() -> None:
        t = torch.arange(130)
        found = level(t[:, None], t).tril()
        assert found.tolist() == [[greedy_level(a, b) if b <= a else 0 for b in range(130)] for a in range(130)]

    def test_blocks_of_the_past_cover_it_once() -> None:
        for last in range(130):
            blocks = past_blocks(last)
            tokens = [s for own in blocks.values() for s in range(own.start, own.stop)]
            assert sorted(tokens) == list(range(last + 1))
            for i, own in blocks.items():
                assert {greedy_level(last, s) for s in range(own.start, own.stop)} == {i}
        assert past_blocks(-1) == {}

    def test_number_of_levels() -> None:
        for T in range(1, 130):
            assert levels_for(T) == 1 + max(greedy_level(t, 0) for t in range(T))
        assert levels_for(0) == 1

    @pytest.mark.parametrize("longest", [16, 64])
    def test_pieces_are_aligned(longest: int) -> None:
        for position in range(50):
            for T in range(70):
                at = position
                for length, chunk in aligned_pieces(position, T, 16, longest):
                    assert length <= longest and chunk <= 16
                    assert at % chunk == 0 and (length % chunk == 0 or length < chunk)
                    size = 1 << (length - 1).bit_length()
                    assert at % size == 0 and (length == size or length < chunk)
                    at += length
                assert at == position + T

    @every_op
    def test_training_memory_grows_with_the_length_alone(op: Callable[..., Any]) -> None:
        """What autograd keeps for each token, without what the levels read."""

        def kept_per_token(T: int) -> float:
            inputs = {name: x.requires_grad_() for name, x in tensors(op, T, L=12, B=1, H=8).items()}
            storages: dict[int, int] = {}

            def pack(x: Tensor) -> Tensor:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = op(**inputs, chunk_size=16, backend="torch")
            assert result.requires_grad
            return sum(storages.values()) / T

        short, long = kept_per_token(256), kept_per_token(2048)
        assert long < 1.1 * short

    @every_op
    def test_torch_path_has_second_derivatives_and_composes(op: Callable[..., Any]) -> None:
        inputs = {name: x.double()[..., :3] if x.ndim == 4 else x.double() for name, x in tensors(op, 5, B=1).items()}
        inputs["level_scales"] = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        call = lambda *x: op(*x, chunk_size=2, backend="torch")  # noqa: E731
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
        found = torch.func.grad(lambda x: op(**x, chunk_size=2, backend="torch").sum())(inputs)
        assert all(map(torch.equal, found.values(), torch.autograd.grad(call(*leaves).sum(), leaves)))

    def test_a_step_of_decoding_never_looks_right_past_the_last_level() -> None:
        """Where the position is not read on the host, as under torch.compile."""
        inputs = tensors(log_linear_attention, 8, L=4)
        _, state = log_linear_attention(**inputs, return_state=True)
        step = torch.compile(log_linear_attention, fullgraph=True, backend="aot_eager")
        one = part(inputs, 0, 1)
        o = step(**one, initial_state=state._replace(position=torch.tensor([7, 8])))
        assert o[0].isfinite().all() and o[1].isnan().all()
        with pytest.raises(
            ValueError, match=r"L=4 levels, expected at least 5: bit_length\(9 - 1\) \+ 1 for a sequence"
        ):
            log_linear_attention(**one, initial_state=state)

    def test_queries_and_keys_can_be_normalised_inside() -> None:
        inputs = tensors(log_linear_gated_delta_rule, 20)
        inputs["k"] = 3 * inputs["k"]

        def before(q: Tensor, k: Tensor, **others: Tensor) -> Tensor:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
            return log_linear_gated_delta_rule(q, k, **others, backend="reference")

        assert_equivalent(lambda **x: log_linear_gated_delta_rule(**x, qk_l2norm=True, backend="torch"), before, inputs)
        with pytest.warns(UserWarning, match="log_linear_gated_delta_rule: beta .* outside of") as caught:
            log_linear_gated_delta_rule(**inputs)
        assert caught[0].filename == __file__

    @every_op
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(level_scales=torch.ones(2, 2, 20, 5)), ValueError, "L=5 levels, expected at least 6"),
            (dict(level_scales=torch.ones(2, 1, 20, 6)), ValueError, "level_scales has shape"),
            (dict(level_scales=None), TypeError, "level_scales is None"),
            (dict(initial_state=torch.zeros(2, 2, 8, 16, 16)), TypeError, "is a Tensor, expected a LogLinearState"),
            (
                dict(initial_state=LogLinearState(torch.zeros(2, 2, 7, 16, 16), torch.zeros(2, dtype=torch.int64))),
                ValueError,
                "initial_state has shape",
            ),
            (
                dict(initial_state=LogLinearState(torch.zeros(2, 2, 8, 16, 16), torch.zeros(1, dtype=torch.int64))),
                ValueError,
                r"position has shape \[1\], expected \[2\]",
            ),
            (
                dict(initial_state=LogLinearState(torch.zeros(2, 2, 8, 16, 16), torch.tensor([0, 120]))),
                ValueError,
                "L=8 levels, expected at least 9",
            ),
        ],
        ids=str,
    )
    def test_wrong_input_is_named(
        op: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"{op.__name__}: .*{message}"):
            op(**{**tensors(op, 20), **change})

    def test_packed_sequences_need_levels_for_the_longest_alone() -> None:
        inputs, bounds = tensors(log_linear_attention, 20, L=4, B=1), torch.tensor([0, 8, 16, 20])
        log_linear_attention(**inputs, cu_seqlens=bounds)
        with pytest.raises(ValueError, match="L=4 levels, expected at least 5"):
            log_linear_attention(**inputs, cu_seqlens=torch.tensor([0, 9, 20]))

    def test_weights_of_levels_start_near_ln_2_and_follow_the_paper() -> None:
        torch.manual_seed(0)
        scales = LevelScales(12, 3, max_length=100)
        assert scales.L.shape == (3, 8) and (scales.L == 1).all()
        x = torch.randn(2, 5, 12)
        assert torch.equal(scales(0 * x), torch.full((2, 3, 5, 8), 2.0).log())

        def expected(x: Tensor, L: Tensor, weight: Tensor) -> Tensor:
            return F.softplus(L[:, None] * (x @ weight.mT).unflatten(2, (3, 8)).transpose(1, 2))

        def called(x: Tensor, L: Tensor, weight: Tensor) -> Tensor:
            return torch.func.functional_call(scales, {"L": L, "proj.weight": weight}, (x,))

        assert_equivalent(called, expected, (x, torch.randn(3, 8), scales.proj.weight.detach()))
        with pytest.raises(ValueError, match="max_length is 0, expected"):
            LevelScales(12, 3, max_length=0)

    @pytest.mark.parametrize(
        ("plain", "module"),
        [
            (
                lambda: Mamba2(12, state_size=5, head_dim=4, chunk_size=16),
                lambda: LogLinearMamba2(12, max_length=64, state_size=5, head_dim=4, chunk_size=16),
            ),
            (
                lambda: GatedDeltaNet(12, 3, num_v_heads=6, head_dim=5, chunk_size=16, norm_eps=0.0),
                lambda: LogLinearGatedDeltaNet(12, 3, max_length=64, num_v_heads=6, head_dim=5, norm_eps=0.0),
            ),
        ],
        ids=["Mamba2", "GatedDeltaNet"],
    )
    def test_layer_whose_levels_weigh_alike_is_the_plain_one(plain: Any, module: Any) -> None:
        """The norm of GatedDeltaNet takes out that its queries are scaled and those of the log-linear layer are not."""

        class Ones(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.new_ones(len(x), 6, x.shape[1], 7)

        torch.manual_seed(0)
        one, other = plain(), module()
        missing = other.load_state_dict(one.state_dict(), strict=False)
        assert missing.missing_keys == ["level_scales.L", "level_scales.proj.weight"] and not missing.unexpected_keys
        other.level_scales = Ones()
        x = torch.randn(2, 37, 12)
        assert_equivalent(lambda x: other.to(x.dtype)(x), lambda x: one.to(x.dtype)(x), (x,))

    def test_a_layer_refuses_what_is_longer_than_its_levels() -> None:
        module = LogLinearMamba2(12, max_length=16, head_dim=4)
        _, state = module(torch.randn(1, 10, 12), return_state=True)
        module(torch.randn(1, 6, 12), state=state)
        with pytest.raises(ValueError, match="L=5 levels, expected at least 6"):
            module(torch.randn(1, 7, 12), state=state)
