"""LoRA+: who is in which group, with which rate and decay; training, saved and resumed."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effkit
from effkit.peft import (
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    SingLoRAConfig,
    VeRAConfig,
    lora_plus_optimizer,
    lora_plus_param_groups,
    set_trainable,
)

RATES = {"A": 1e-3, "A_no_decay": 1e-3, "embedding": 1e-6, "B": 1.6e-2, "B_no_decay": 1.6e-2}


class Toy(nn.Module):
    """Every kind of parameter there is, and traps for a rule that looks for names."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.lora_B = nn.Linear(6, 8)  # a layer of the model with an unlucky name
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, ids):
        return self.head(self.norm(F.silu(self.lora_B(self.embed(ids)))))


def groups_of(model, *arguments, **options):
    """{parameter's name: name of its group}, once it is certain that each is in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = lora_plus_param_groups(model, *(arguments or (1e-3,)), **options)
    found = [(names[id(parameter)], group["name"]) for group in groups for parameter in group["params"]]
    assert len(found) == len(dict(found))
    assert dict(found).keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {group["name"]: group["lr"] for group in groups}.items() <= RATES.items()
    return dict(found)


def loss_of(model):
    ids = torch.arange(22).view(2, 11) % 11
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def trained(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_groups_of_lora():
    """In a layer, an embedding, with a bias of B, the biases of the model, a norm and a matrix trained as a whole."""
    model = Toy()
    config = LoRAConfig(rank=2, target_modules=("embed",), modules_to_save=("norm", "head"), name="first")
    effkit.apply(model, config)
    assert groups_of(model) == {
        "embed.adapters.first.lora_embedding_A": "embedding",
        "embed.adapters.first.lora_embedding_B": "embedding",
        "norm.adapters.first.copy.weight": "A_no_decay",
        "norm.adapters.first.copy.bias": "A_no_decay",
        "head.adapters.first.copy.weight": "A",
        "head.adapters.first.copy.bias": "A_no_decay",
    }
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B",), bias="all", update_bias=True, name="second"))
    assert groups_of(model) == {
        "lora_B.adapters.second.lora_A": "A",
        "lora_B.adapters.second.lora_B": "B",
        "lora_B.adapters.second.lora_bias": "B_no_decay",
        "lora_B.adapters.second.bias": "A_no_decay",
        "norm.adapters.second.bias": "A_no_decay",
        "head.adapters.second.bias": "A_no_decay",
    }
    # What the model's own parameters are called says nothing.
    model.lora_B.weight.requires_grad_(True)
    assert groups_of(model)["lora_B.weight"] == "A"


@pytest.mark.parametrize(
    "config, expected",
    [
        (VeRAConfig(rank=3, target_modules=("head",)), {"vera_lambda_d": "A", "vera_lambda_b": "B"}),
        (SingLoRAConfig(rank=3, target_modules=("head",)), {"singlora_A": "A"}),
        (IA3Config(target_modules=("head",), feedforward_modules=()), {"ia3_l": "A_no_decay"}),
        (
            DoRAConfig(rank=3, target_modules=("head",)),
            {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "B_no_decay"},
        ),
        (LoRAConfig(rank=3, target_modules=("head",), train_a=False), {"lora_B": "B"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_groups_of_others(config, expected):
    model = Toy()
    effkit.apply(model, config)
    assert groups_of(model) == {f"head.adapters.default.{name}": group for name, group in expected.items()}


def test_only_what_is_trained_is_in_a_group_and_in_one():
    model = Toy()
    model.again = model.lora_B  # one layer under two names
    with pytest.raises(ValueError, match="no parameter of the model asks for a gradient"):
        lora_plus_param_groups(model.requires_grad_(False), 1e-3)
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B",), name="a"))
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B",), name="b"))
    assert {name.split(".")[2] for name in groups_of(model)} == {"b"}
    set_trainable(model, "a", "b")
    assert [len(group["params"]) for group in lora_plus_param_groups(model, 1e-3)] == [2, 2]


def test_numbers():
    model = Toy()
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("embed", "lora_B"), update_bias=False, bias="lora_only"))
    groups = lora_plus_param_groups(model, 1e-4, 4, weight_decay=0.1, embedding_lr=3e-5)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("A", 1e-4, 0.1),
        ("A_no_decay", 1e-4, 0.0),
        ("embedding", 3e-5, 0.1),
        ("B", 4e-4, 0.1),
    ]
    for name, options in {"lr": dict(lr=0.0), "ratio": dict(lr=1.0, ratio=-1), "embedding_lr": dict(lr=1.0)}.items():
        value = options.get(name, 0)
        with pytest.raises(ValueError, match=rf"{name} is {value}, expected a number above 0"):
            lora_plus_param_groups(model, **{**options, name: value})


def test_weight_decay_of_the_optimizer_is_honoured():
    """However it is given: a plain one goes to the groups that decay."""
    model = Toy()
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B",), bias="lora_only"))
    decays = []
    for optimizer in (
        torch.optim.AdamW(lora_plus_param_groups(model, 1e-3, weight_decay=0.25)),
        torch.optim.AdamW(lora_plus_param_groups(model, 1e-3), weight_decay=0.25),
        lora_plus_optimizer(model, torch.optim.AdamW, 1e-3, weight_decay=0.25),
    ):
        decays.append({group["name"]: group["weight_decay"] for group in optimizer.param_groups})
    assert decays == 3 * [{"A": 0.25, "A_no_decay": 0.0, "B": 0.25}]


def test_the_rule():
    """A step of plain gradient descent: A - lr dA, B - ratio lr dB."""
    model = Toy()
    effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B",), init="random"))
    part = model.lora_B.adapters["default"]
    before = [part.lora_A.detach().clone(), part.lora_B.detach().clone()]
    optimizer = lora_plus_optimizer(model, torch.optim.SGD, 0.125, ratio=4)
    trained(model, optimizer, 1)
    assert torch.equal(part.lora_A.detach(), before[0].sub(part.lora_A.grad, alpha=0.125))
    assert torch.equal(part.lora_B.detach(), before[1].sub(part.lora_B.grad, alpha=0.5))


def test_a_ratio_of_one_is_lora():
    losses = []
    for plus in (True, False):
        model = Toy()
        effkit.apply(model, LoRAConfig(rank=2, target_modules=("lora_B", "head")))
        own = [p for p in model.parameters() if p.requires_grad]
        groups = lora_plus_param_groups(model, 0.01, ratio=1) if plus else own
        losses.append(trained(model, torch.optim.AdamW(groups, lr=0.01, foreach=False), 5))
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, effkit.quant.AdamWFP8])
def test_resumes(kind):
    """The state dict, saved without pickled code, goes on in the same model made again as if nothing had happened."""

    def make():
        model = Toy()
        effkit.apply(model, LoRAConfig(rank=2, target_modules=("embed", "lora_B"), bias="all", update_bias=False))
        return model, lora_plus_optimizer(model, kind, 0.01, weight_decay=0.1, embedding_lr=0.01)

    model, optimizer = make()
    trained(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    expected = trained(model, optimizer, 3)
    file.seek(0)
    again, other = make()
    for part, state in zip((again, other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert [group["name"] for group in other.param_groups] == ["A", "A_no_decay", "embedding", "B"]
    assert torch.equal(trained(again, other, 3), expected)
