"""Two processes over gloo train what one trains: DDP, and fully_shard on dense layers and on layers in four bits.

Each runs this file as a program, once for all cases, since a spawned process could not import it as a test.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import effkit
from effkit.peft import (
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    SingLoRAConfig,
    VeRAConfig,
    delete_adapter,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    set_scale,
)
from effkit.quant import FP8Config, NF4Config
from effkit.testing import assert_equivalent

STEPS, ROWS, TOKENS = 3, 4, 7
ALL = "all-linear"
CONFIGS = {
    "lora": LoRAConfig(rank=3, alpha=6, target_modules=ALL),
    "singlora": SingLoRAConfig(rank=3, target_modules=ALL, ramp_steps=3),
    "vera": VeRAConfig(rank=5, target_modules=ALL, d_initial=1.0),
    "dora": DoRAConfig(rank=3, target_modules=ALL),
    "ia3": IA3Config(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",)),
}
OTHER = LoRAConfig(rank=2, target_modules=ALL, name="other")
BASES = {
    "nf4": NF4Config(block_size=32),
    "nf4, double": NF4Config(block_size=32, double_quant=True),
    "fp8": FP8Config(),
}
CASES = [("ddp", name, "dense") for name in CONFIGS] + [("ddp", "lora", "nf4")]
CASES += [("ddp without broadcasts", "vera", "dense")]
CASES += [("fsdp", name, base) for name in CONFIGS for base in ("dense", "nf4")]
CASES += [("fsdp", "lora", base) for base in ("nf4, double", "fp8")]
CASES += [(way, "lora", base) for way in ("checkpointed fsdp", "fsdp in bfloat16") for base in ("dense", "nf4")]
SAVED = [case for case in CASES if case[0] == "fsdp" and case[1] != "singlora"]  # which is saved as LoRA


def model(name: str, base: str) -> Any:
    """A tiny Llama with adapters whose values are all other than what they start from, always the same."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    net = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, use_cache=False))
    if base in BASES:
        effkit.apply(net, BASES[base])
    effkit.apply(net, CONFIGS[name])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if ".adapters." in key:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net.train()


def batch() -> Tensor:
    return torch.randint(1, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def train(net: nn.Module, ids: Tensor, mean: Callable[[Tensor], Tensor] = lambda loss: loss) -> list[Tensor]:
    """The losses and what the adapters have become; between forward and backward there is a pass without them."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.5)
    losses = []
    for step in range(STEPS):
        set_scale(net, 1 - step / 4)
        loss = net(ids, labels=ids).loss
        with disabled(net), torch.no_grad():
            net(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()))
    return [torch.stack(losses), *map(whole, trained)]


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def shard(net: Any, policy: MixedPrecisionPolicy) -> Any:
    """Decoder layers, then what is left; a policy casts all floats that it shards, so that scales are left out."""
    ignored = {p for key, p in net.named_parameters() if "absmax" in key} if policy.param_dtype else set()
    for layer in net.model.layers:
        fully_shard(layer, mp_policy=policy, ignored_params=ignored)
    return fully_shard(net, mp_policy=policy, ignored_params=ignored)


def work(rank: int, meeting: str, folder: str) -> None:
    """One of two processes: its half of the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def mean(loss: Tensor) -> Tensor:
        dist.all_reduce(loss)
        return loss / 2

    ids = batch().chunk(2)[rank]
    found = {}
    for case in CASES:
        way, name, base = case
        net = model(name, base)
        if way.startswith("ddp"):
            net = DistributedDataParallel(net, broadcast_buffers=way == "ddp")
            with pytest.raises(TypeError, match="LoRAConfig: the model is in DistributedDataParallel"):
                effkit.apply(net, OTHER)
            found[case] = train(net, ids, mean)
            continue
        if "checkpointed" in way:
            checkpoint_layers(net)
        net = shard(net, MixedPrecisionPolicy(torch.bfloat16 if "bfloat16" in way else None))
        before = frozen(net)
        found[case] = train(net, ids, mean)
        assert_same(frozen(net), before)
        if case in SAVED:
            save_adapter(net, place(folder, case))
    refused(net)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def refused(net: Any) -> None:
    """What cannot be done with parts of a model says so."""
    for call, error, words in (
        (lambda: effkit.save(net, "nowhere"), ValueError, r"save: .* is in parts, on several processes"),
        (lambda: merge(net), RuntimeError, r"merge: .* is sharded .* choices: save_adapter"),
        (lambda: effkit.apply(net, OTHER), RuntimeError, r"LoRAConfig: .* is sharded .* before fully_shard"),
    ):
        with pytest.raises(error, match=words):
            call()


def place(folder: str | Path, case: tuple[str, str, str]) -> Path:
    return Path(folder) / "-".join(case)


def checkpoint_layers(net: Any) -> None:
    enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def frozen(net: nn.Module) -> dict[str, Tensor]:
    """The bytes of all parameters that are not trained, as far as they are here."""
    kept = {name: p.detach() for name, p in net.named_parameters() if not p.requires_grad}
    kept = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in kept.items()}
    return {name: p.clone().contiguous().flatten().view(torch.uint8) for name, p in kept.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes have written."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder / "meeting", folder], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return folder


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
    pytest.mark.skipif(torch.__version__ < (2, 12), reason="fully_shard of torch 2.11 cannot shard uint8 parameters"),
]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_they_train_what_one_trains(folder, case):
    """Losses and adapters after some steps on half of a batch each, against one process with all of it."""
    way, name, base = case
    found = torch.load(folder / "found.pt")[case]

    def alone(like: Tensor) -> list[Tensor]:
        with effkit.use_backend("reference"), torch.random.fork_rng():
            expected = train(model(name, base).to(like.dtype), batch())
        return expected if like.dtype == torch.float64 else [part.float() for part in expected]

    dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
    assert_equivalent(lambda like: found, alone, (torch.zeros((), dtype=dtype),), grads=False)


@pytest.mark.parametrize("case", SAVED, ids=", ".join)
def test_their_adapter_is_saved_as_a_whole(folder, case):
    _, name, base = case
    with torch.random.fork_rng():
        net = model(name, base)
    delete_adapter(net, "default")
    load_adapter(net, place(folder, case), trainable=True)
    trained = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
    found = torch.load(folder / "found.pt")[case][1:]
    assert len(trained) == len(found) and all(map(torch.equal, trained, found))


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
