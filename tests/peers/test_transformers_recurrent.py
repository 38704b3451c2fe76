"""The recurrent ops and layers against transformers' own: the gated delta rule and layer of Qwen, that of Mamba-2."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from effkit.attention import GatedDeltaNet, Mamba2
from effkit.ops import Case, get_op
from effkit.testing import assert_equivalent, make_inputs

qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")

GATED_DELTA_RULE = get_op("gated_delta_rule")


def delta_rule_cases() -> list[Any]:
    cases = [case for case in GATED_DELTA_RULE.cases if not case.ints and not case.large]
    return [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
        for case in cases
        if case.sizes["B"] > 0 and case.sizes["T"] > 0 and not ("chunk" in name and case.name == "strong gates")
    ]


@pytest.mark.parametrize(("name", "case"), delta_rule_cases())
def test_gated_delta_rule(name: str, case: Case) -> None:
    """Their function itself, behind the decorator that looks for kernels of other packages.

    The chunked form adds decays up in float32. With strong gates that costs its values, else only its gradients more
    than the bound that the rounding of the recurrence gives: those two are left to the recurrent form.
    """
    function, normalize = inspect.unwrap(getattr(qwen3_next, name)), bool(case.options.get("qk_l2norm"))

    def theirs(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        most = max(q.shape[1], k.shape[1], v.shape[1])
        q, k, v = (x.repeat_interleave(most // x.shape[1], dim=1).transpose(1, 2) for x in (q, k, v))
        o, memory = function(
            q, k, v, g=g.transpose(1, 2), beta=beta.transpose(1, 2), initial_state=initial_state,
            output_final_state=True, use_qk_l2norm_in_kernel=normalize,
        )  # fmt: skip
        return o.transpose(1, 2), memory

    def ours(**tensors: Tensor) -> tuple[Tensor, ...]:
        o, state = GATED_DELTA_RULE.function(**tensors, return_state=True, qk_l2norm=normalize, backend="reference")
        return o, state.memory

    inputs = make_inputs(GATED_DELTA_RULE, case, torch.float32)
    assert_equivalent(theirs, ours, inputs, grads="recurrent" in name)


def mixers(n_groups: int = 2) -> tuple[Any, Any, Mamba2]:
    """The configuration, their mixer, and ours with its weights."""
    from transformers import Mamba2Config

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, state_size=10, n_groups=n_groups, num_hidden_layers=1, chunk_size=16
    )
    theirs = mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in (theirs.norm.weight, theirs.D):
            parameter.add_(torch.randn_like(parameter) / 4)
    ours = Mamba2(24, head_dim=8, state_size=10, n_groups=n_groups, norm_eps=config.layer_norm_epsilon, chunk_size=16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return config, theirs, ours


def named(module: Any) -> dict[str, Tensor]:
    """Parameters under names that may be arguments."""
    return {name.replace(".", "/"): parameter.detach() for name, parameter in module.named_parameters()}


def restored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("/", "."): x for name, x in tensors.items()}


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2_mixer(n_groups: int) -> None:
    """Its weights load as they are; outputs and the gradients of all parameters agree. Their scan is in float32."""
    _, theirs, ours = mixers(n_groups)
    x = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
    assert_equivalent(
        lambda x, **parameters: functional_call(theirs, restored(parameters), (x,)),
        lambda x, **parameters: functional_call(ours, restored(parameters), (x,)),
        {"x": x, **named(ours)},
    )


def their_steps(config: Any, module: Any) -> Any:
    """Prefill, then token by token, with their cache."""
    from transformers import DynamicCache

    def call(x: Tensor) -> Tensor:
        cache = DynamicCache(config=config)
        return torch.cat([module(part, cache_params=cache) for part in x.split([20, *[1] * 7], dim=1)], dim=1)

    return call


def our_steps(module: Any) -> Any:
    """The same with our state."""

    def call(x: Tensor) -> Tensor:
        layer, outs, state = module.to(x.dtype), [], None
        for part in x.split([20, *[1] * 7], dim=1):
            y, state = layer(part, state=state, return_state=True)
            outs.append(y)
        return torch.cat(outs, dim=1)

    return call


def test_mamba2_mixer_decodes_the_same() -> None:
    config, theirs, ours = mixers()
    x = torch.randn(2, 27, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equivalent(their_steps(config, theirs), our_steps(ours), (x,), grads=False)


def delta_nets() -> tuple[Any, Any, GatedDeltaNet]:
    """The configuration of Qwen 3.5, its layer, and ours with its weights."""
    from transformers import Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=10,
        linear_value_head_dim=6, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = qwen3_5.Qwen3_5GatedDeltaNet(config, layer_idx=0).eval()
    with torch.no_grad():
        theirs.norm.weight.add_(torch.randn_like(theirs.norm.weight) / 4)
    ours = GatedDeltaNet(24, 2, num_v_heads=4, head_dim=10, head_v_dim=6, norm_eps=config.rms_norm_eps, chunk_size=16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return config, theirs, ours


def test_gated_delta_net() -> None:
    """Its weights load as they are; outputs and the gradients of all parameters agree. Their sums are in float32."""
    _, theirs, ours = delta_nets()
    x = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
    assert_equivalent(
        lambda x, **parameters: functional_call(theirs, restored(parameters), (x,)),
        lambda x, **parameters: functional_call(ours, restored(parameters), (x,)),
        {"x": x, **named(ours)},
    )


def test_gated_delta_net_decodes_the_same() -> None:
    config, theirs, ours = delta_nets()
    x = torch.randn(2, 27, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equivalent(their_steps(config, theirs), our_steps(ours), (x,), grads=False)
