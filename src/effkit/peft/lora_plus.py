"""LoRA+: the factor B of an adapter learns faster than A.

    lr(A) = lr      lr(B) = ratio * lr      Hayou et al., arXiv 2402.12354

With Adam and a layer of width n, both factors take part in what is learnt as n grows only if lr(A) falls as 1 / n and
lr(B) stays: at one rate for both, B learns too slowly. The paper recommends a ratio of about 16, larger for tasks far
from what the model knows, and an lr smaller than the best one without it. It costs nothing: groups of an optimizer.

When not to use it: with SingLoRA, whose two factors are one matrix, and (IA)^3, which has none; it changes nothing
there. Against LoRA at its own best learning rate the gain may be small or none: docs/adapter_training.md tunes both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from effkit.peft.adapter import Adapter

GROUPS = ("A", "A_no_decay", "embedding", "B", "B_no_decay")

# The group of an adapter's parameter, where that does not follow from its shape. What decays must pull the model
# back to what it was: the factors of a sum do, DoRA's magnitudes and the factors of (IA)^3 would not.
_OF_ADAPTERS = {
    "lora_B": "B",
    "lora_bias": "B_no_decay",
    "lora_magnitude_vector": "B_no_decay",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "vera_lambda_d": "A",
    "vera_lambda_b": "B",
    "ia3_l": "A_no_decay",
}


def lora_plus_param_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16,
    *,
    weight_decay: float | None = None,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, by which the factors B learn `ratio` times as fast as the factors A.

        torch.optim.AdamW(lora_plus_param_groups(model, lr=1e-4), weight_decay=0.01)

    | name         | lr           | decays | what                                                                      |
    | ------------ | ------------ | ------ | ------------------------------------------------------------------------- |
    | "A"          | lr           | yes    | lora_A, VeRA's lambda_d, SingLoRA's matrix, matrices of whole modules     |
    | "A_no_decay" | lr           | no     | the model's biases, weights of norms and other vectors; (IA)^3            |
    | "embedding"  | embedding_lr | yes    | both factors of LoRA in embeddings                                        |
    | "B"          | ratio * lr   | yes    | lora_B, VeRA's lambda_b                                                   |
    | "B_no_decay" | ratio * lr   | no     | B's bias (LoRAConfig.update_bias), DoRA's magnitudes                      |

    model          with adapters; every parameter that asks for a gradient is in exactly one group, in the order of the
                   model: an optimizer's state_dict fits the groups of the same model made again
    lr             learning rate of A, above 0
    ratio          of the learning rates of B and A, above 0; the paper has it at least 1, and 1 is LoRA
    weight_decay   of the groups that decay; None leaves it to the optimizer. It is always 0 in the others
    embedding_lr   above 0; from the paper's code

    A group without parameters is left out. Raises ValueError for a model that trains nothing and numbers out of range.
    """
    for name, value in {"lr": lr, "ratio": ratio, "embedding_lr": embedding_lr}.items():
        if not value > 0:
            raise ValueError(f"lora_plus_param_groups: {name} is {value!r}, expected a number above 0")
    members: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for parameter, name in _memberships(model):
        members[name].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "lora_plus_param_groups: no parameter of the model asks for a gradient; choices: effkit.apply(model, "
            "LoRAConfig(...)), set_trainable(model, name)"
        )
    rates = {"A": lr, "A_no_decay": lr, "embedding": embedding_lr, "B": ratio * lr, "B_no_decay": ratio * lr}
    groups: list[dict[str, Any]] = []
    for name, parameters in members.items():
        decay = 0.0 if name.endswith("_no_decay") else weight_decay
        if parameters:
            groups.append(
                {"name": name, "params": parameters, "lr": rates[name]}
                | ({} if decay is None else {"weight_decay": decay})
            )
    return groups


def lora_plus_optimizer(
    model: nn.Module,
    optimizer: Callable[..., Optimizer],
    lr: float,
    ratio: float = 16,
    *,
    embedding_lr: float = 1e-6,
    **options: Any,
) -> Optimizer:
    """An optimizer of any class over `lora_plus_param_groups`, e.g. lora_plus_optimizer(model, torch.optim.SGD, 1e-2).

    options are those of its class; a weight_decay among them is that of the groups that decay.
    """
    return optimizer(lora_plus_param_groups(model, lr, ratio, embedding_lr=embedding_lr), lr=lr, **options)


def _memberships(model: nn.Module) -> list[tuple[Tensor, str]]:
    """Every trained parameter once, with the name of its group, in the order of the model."""
    found: dict[int, tuple[Tensor, str]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(id(parameter), (parameter, _group(module, key, parameter)))
    return list(found.values())


def _group(module: nn.Module, key: str, parameter: Tensor) -> str:
    """The group of a module's own parameter. A name says something in an adapter only, a model may have any."""
    shaped = "A" if parameter.ndim > 1 else "A_no_decay"
    return _OF_ADAPTERS.get(key, shaped) if isinstance(module, Adapter) else shaped
