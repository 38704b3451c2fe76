"""What the delta rules promise beyond equality with their reference. Their layers: test_layers.py."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effkit.attention import GatedDeltaNet, delta_rule, gated_delta_rule, ssd
from effkit.ops import INTERPRET, BackendUnavailable
from effkit.testing import assert_equivalent

BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter)] if INTERPRET else ["reference", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def tensors(T: int = 40, H: int = 2, K: int = 16, gain: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, T, width, generator=generator) for width in (K, K, 24))
    g, beta = (torch.randn(1, H, T, generator=generator) for _ in range(2))
    return dict(q=q, k=F.normalize(k, dim=-1), v=v, g=-gain * g.abs(), beta=beta.sigmoid())


def gated(backend: str, **options: Any) -> Any:
    return lambda **inputs: gated_delta_rule(**inputs, backend=backend, **options)


@backends
@pytest.mark.parametrize("gain", [0.0, 0.3, 10.0])
def test_weights_are_products_of_transitions(backend: str, gain: float) -> None:
    """What token i reads of token j, written out: q_i (A_i ... A_{j+1}) beta_j k_j, A = exp(g) (I - beta k k^T)."""

    def written_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        outer = k[..., :, None] * k[..., None, :]
        steps = g.exp()[..., None, None] * (torch.eye(k.shape[-1]) - beta[..., None, None] * outer)
        outs = []
        for i in range(q.shape[2]):
            row, o = q[:, :, i], torch.zeros_like(v[:, :, 0])
            for j in range(i, -1, -1):
                weight = beta[:, :, j] * (row * k[:, :, j]).sum(-1)
                o = o + weight[..., None] * v[:, :, j]
                row = (row[..., None, :] @ steps[:, :, j])[..., 0, :]
            outs.append(o / math.sqrt(q.shape[-1]))
        return torch.stack(outs, 2)

    assert_equivalent(gated(backend, chunk_size=16), written_out, tensors(20, gain=gain))


@backends
def test_a_token_is_a_step_of_gradient_descent(backend: str) -> None:
    """From a decayed memory, with step size beta, on the squared error of reading v under k."""
    x, memory = tensors(1), torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(1))

    def step(memory: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        memory = (g.exp()[..., None] * memory).detach().requires_grad_()
        error = ((k @ memory - v) ** 2).sum() / 2
        return (memory - beta[..., None] * torch.autograd.grad(error, memory)[0]).detach()

    def ours(memory: Tensor, **inputs: Tensor) -> Tensor:
        return gated_delta_rule(**inputs, initial_state=memory, return_state=True, backend=backend)[1].memory

    assert_equivalent(ours, step, dict(memory=memory, **x), grads=False)


@backends
def test_a_key_that_comes_again_replaces_its_value(backend: str) -> None:
    """16 keys at right angles, each written three times: with beta = 1 every one reads the last value, and it alone."""
    x = tensors(48)
    keys = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    k = torch.cat([keys[torch.randperm(16, generator=torch.Generator().manual_seed(n))] for n in range(3)])[None, None]

    def read(v: Tensor) -> Tensor:
        values = k.to(v.dtype).expand(1, 2, -1, -1)
        _, state = delta_rule(values, values, v, torch.ones(1, 2, 48), return_state=True, backend=backend)
        return values[:, :, 32:] @ state.memory

    assert_equivalent(read, lambda v: v[:, :, 32:], (x["v"],))


@backends
def test_keys_at_right_angles_make_it_ssd(backend: str) -> None:
    """No key finds anything under it: there is nothing to correct, and values only add up."""
    x = tensors(16)
    keys = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    x["k"] = keys.expand(1, 2, 16, 16)

    def additive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return ssd(q, k, beta[..., None] * v, g, scale=0.25, return_state=True, backend="reference")

    assert_equivalent(gated(backend, return_state=True), additive, x, grads=("q", "v", "beta"))


@backends
def test_no_decay_is_the_delta_rule(backend: str) -> None:
    def without(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return delta_rule(q, k, v, beta, return_state=True, backend="reference")

    assert_equivalent(gated(backend, return_state=True), without, tensors(gain=0.0), grads=("q", "k", "v", "beta"))


@backends
def test_beta_zero_leaves_a_memory_that_decays(backend: str) -> None:
    x = {**tensors(), "beta": torch.zeros(1, 2, 40)}
    memory = torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(1))

    def decayed(memory: Tensor, q: Tensor, g: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        total = g.cumsum(2).exp()[..., None]
        return total * (q @ memory) / 4, total[:, :, -1:] * memory

    def ours(memory: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, state = gated_delta_rule(**inputs, initial_state=memory, return_state=True, backend=backend)
        return o, state.memory

    assert_equivalent(ours, decayed, dict(memory=memory, **x), grads=("memory", "q", "g"))


@backends
def test_beta_two_reflects(backend: str) -> None:
    """Negative eigenvalues: what stands under a key changes its sign, and the rest stays."""
    memory = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    key = F.one_hot(torch.tensor([[[5]]]), 16).float()
    zero, two = torch.zeros(1, 1, 1, 16), torch.full((1, 1, 1), 2.0)
    _, state = delta_rule(key, key, zero, two, initial_state=memory, return_state=True, backend=backend)
    assert torch.equal(state.memory[..., 5, :], -memory[..., 5, :])
    _, state = delta_rule(key, key, zero, two, initial_state=state, return_state=True, backend=backend)
    assert torch.equal(state.memory, memory)


@backends
@pytest.mark.parametrize("strength", [0.5, 1.9])
def test_the_same_key_all_along(backend: str, strength: float) -> None:
    """The worst system of a chunk: powers of M reach 1e27, its inverse no more than 2."""
    x = tensors(64, H=1)
    x["k"] = x["k"][:, :, :1].expand(-1, -1, 64, -1)
    x["beta"] = torch.full((1, 1, 64), strength)
    assert_equivalent(gated(backend, return_state=True), gated("reference", return_state=True), x)


@backends
def test_l2norm_is_that_of_the_caller(backend: str) -> None:
    x = tensors(gain=0.3)
    x["k"] = 7 * x["k"]

    def by_hand(q: Tensor, k: Tensor, **others: Tensor) -> Tensor:
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        return gated_delta_rule(q, k, **others, backend="reference")

    assert_equivalent(gated(backend, qk_l2norm=True), by_hand, x)


def test_keys_that_are_not_normalised_warn_and_grow() -> None:
    x = tensors(64, gain=0.0)
    long = {**x, "k": 4 * torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(2))}
    with pytest.warns(UserWarning, match=r"gated_delta_rule: beta \|k\|\^2 is .* outside of \[0, 2\]") as caught:
        _, state = gated_delta_rule(**long, return_state=True)
    assert caught[0].filename == __file__ and len(caught) == 1
    assert not state.memory.isfinite().all() or state.memory.abs().max() > 1e18
    with pytest.warns(UserWarning, match="delta_rule: beta"):
        delta_rule(x["q"], x["k"], x["v"], 3 * torch.ones(1, 2, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = gated_delta_rule(**long, qk_l2norm=True, return_state=True)
        assert state.memory.abs().max() < 20
        gated_delta_rule(**{**x, "beta": 2 * torch.ones(1, 2, 64)})  # a reflection lengthens nothing
        gated_delta_rule(**{name: part.bfloat16() for name, part in x.items()})
        packed = {
            name: torch.cat((part[:, :, :60], torch.full_like(part[:, :, 60:], 9.0)), 2) for name, part in x.items()
        }
        gated_delta_rule(**{**packed, "g": -packed["g"].abs()}, cu_seqlens=torch.tensor([0, 30, 60]))
        torch.func.vmap(lambda rows: gated_delta_rule(**rows))({name: part[None] for name, part in long.items()})


def test_state_follows_values_that_change() -> None:
    """A memory of sums keeps the mean of all values under a key, this one the newest: the reason for the rule."""
    key = F.one_hot(torch.zeros(1, 1, 30, dtype=torch.long), 16).float()
    v = torch.arange(30.0).view(1, 1, 30, 1).expand(-1, -1, -1, 8)
    o = delta_rule(key, key, v, torch.full((1, 1, 30), 0.9), scale=1.0)
    assert (o[:, :, 5:] - v[:, :, 5:]).abs().max() < 0.2


def test_second_derivatives() -> None:
    x = {name: part.double() for name, part in tensors(20, H=1, K=4).items()}
    leaves = [part[..., :4].requires_grad_() if part.ndim == 4 else part.requires_grad_() for part in x.values()]
    names = list(x)

    def op(*parts: Tensor) -> Tensor:
        return gated_delta_rule(**dict(zip(names, parts, strict=True)), chunk_size=8, backend="torch")

    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


@pytest.mark.interpreter
def test_kernels_have_no_second_derivative() -> None:
    x = {name: part.requires_grad_() for name, part in tensors(20, H=1).items()}
    (dq,) = torch.autograd.grad(gated_delta_rule(**x, backend="triton").sum(), x["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(chunk_size=128), "chunk_size is 128, the kernels have 16, 32, 64"),
        (dict(q=torch.zeros(1, 2, 40, 272), k=torch.zeros(1, 2, 40, 272)), "keys of width 272"),
        ({name: part.double() for name, part in tensors().items()}, "float64 has no kernel"),
    ],
    ids=["chunk", "width", "float64"],
)
def test_what_kernels_cannot_do_is_said(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        gated_delta_rule(**{**tensors(), **change}, backend="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_wider_than_keys_on_kernels(dtype: torch.dtype) -> None:
    """Values have no limit: here three tiles of them."""
    x = tensors(33, H=1)
    x["v"] = torch.randn(1, 1, 33, 150, generator=torch.Generator().manual_seed(3))
    x = {name: part.to(dtype) for name, part in x.items()}
    assert_equivalent(gated("triton", return_state=True), gated("reference", return_state=True), x)


@pytest.mark.interpreter
def test_kernels_map_over_a_batch() -> None:
    x = {name: torch.stack([part, part.flip(2)]) for name, part in tensors(20).items()}

    def mapped(backend: str) -> Any:
        return lambda **x: torch.func.vmap(lambda rows: gated_delta_rule(**rows, backend=backend))(x)

    assert_equivalent(mapped("triton"), mapped("reference"), x)


def test_layer_starts_with_decays_and_steps_in_range() -> None:
    module = GatedDeltaNet(64, 512, head_dim=1)
    step, rate = F.softplus(module.dt_bias), module.A_log.exp()
    assert 0.0009 < step.min() < 0.002 and 0.05 < step.max() < 0.11
    assert 0.009 < rate.min() < 1 and 15 < rate.max() <= 16.1


def test_layer_reads_its_own_definition() -> None:
    """Equations of the docstring, token by token, heads in groups."""
    torch.manual_seed(0)
    module = GatedDeltaNet(12, 2, num_v_heads=4, head_dim=5, head_v_dim=3, allow_neg_eigval=True)
    x = torch.randn(2, 21, 12)

    def expected(x: Tensor, **named: Tensor) -> Tensor:
        p = {name.replace("/", "."): value for name, value in named.items()}
        mixed = F.linear(x, p["in_proj_qkv.weight"])
        mixed = F.silu(F.conv1d(F.pad(mixed.mT, (3, 0)), p["conv1d.weight"], groups=32).mT)
        q, k, v = (
            part.unflatten(2, (-1, width)) for part, width in zip(mixed.split((10, 10, 12), -1), (5, 5, 3), strict=True)
        )
        q, k = ((y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(2, 2) for y in (q, k))
        beta = 2 * F.linear(x, p["in_proj_b.weight"]).sigmoid()
        g = -p["A_log"].exp() * F.softplus(F.linear(x, p["in_proj_a.weight"]) + p["dt_bias"])
        memory, outs = x.new_zeros(2, 4, 5, 3), []
        for t in range(x.shape[1]):
            memory = g[:, t].exp()[..., None, None] * memory
            error = v[:, t] - (k[:, t, :, None] @ memory)[..., 0, :]
            memory = memory + (beta[:, t, :, None] * k[:, t])[..., None] * error[..., None, :]
            outs.append((q[:, t, :, None] @ memory)[..., 0, :] / math.sqrt(5))
        o = torch.stack(outs, 1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm.weight"]
        return F.linear(o.flatten(2) * F.silu(F.linear(x, p["in_proj_z.weight"])), p["out_proj.weight"])

    def ours(x: Tensor, **named: Tensor) -> Tensor:
        return torch.func.functional_call(module, {n.replace("/", "."): value for n, value in named.items()}, (x,))

    parameters = {name.replace(".", "/"): value.detach() for name, value in module.named_parameters()}
    assert_equivalent(ours, expected, dict(x=x, **parameters))
