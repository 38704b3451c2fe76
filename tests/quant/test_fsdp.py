"""Two processes that share an NF4 model, sharded by fully_shard over gloo, train what one process trains.

Each runs this file as a program, since a spawned process could not import it as a test.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from effkit.quant import NF4Linear
from effkit.testing import assert_equivalent

WIDTH, HIDDEN, RANK, TOKENS, STEPS = 64, 130, 4, 8, 4  # 130 rows, and the scales' offset, do not halve


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Adapted(nn.Module):
    """A frozen layer in four bits beside two trained factors: y = base(x) + up(down(x))."""

    def __init__(self, in_features: int, out_features: int, double_quant: bool, seed: int) -> None:
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias=False, device="meta").to_empty(device="cpu")
        dense.weight.data.copy_(random(out_features, in_features, seed=seed) / in_features**0.5)
        self.base = NF4Linear.from_module(dense, block_size=32, double_quant=double_quant)
        self.down = nn.Parameter(random(RANK, in_features, seed=seed + 1) / in_features**0.5)
        self.up = nn.Parameter(random(out_features, RANK, seed=seed + 2) / RANK**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def model(dtype: torch.dtype) -> nn.Sequential:
    in_width = HIDDEN // 32 * 32  # what the second layer sees of the first one's 130 features
    first, second = Adapted(WIDTH, HIDDEN, True, seed=0), Adapted(in_width, WIDTH, False, seed=10)
    return nn.Sequential(first, nn.Tanh(), Narrow(in_width), second).to(dtype)


class Narrow(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.width]


def train(net: nn.Module, x: Tensor, target: Tensor, mean: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """The loss before each step of gradient descent on the factors, averaged over the processes by `mean`."""
    factors = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(mean(loss.detach()))
    return torch.stack(losses)


def in_one_process(x: Tensor, target: Tensor) -> Tensor:
    return train(model(x.dtype), x, target)


def work(rank: int, meeting: str, found: str) -> None:
    """One of two processes: its half of the tokens, its half of every parameter."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    net = model(torch.float32)
    for layer in (net[0], net[3]):
        fully_shard(layer)
    fully_shard(net)
    weights = [layer.base.weight for layer in (net[0], net[3])]
    assert all(isinstance(weight, DTensor) and weight.dtype == torch.uint8 for weight in weights)
    held = sum(weight.to_local().numel() for weight in weights)
    assert 2 * held == sum(weight.numel() for weight in weights), "a process holds half of the bytes"

    def mean(loss: Tensor) -> Tensor:
        dist.all_reduce(loss)
        return loss / 2

    before = [weight.to_local().clone() for weight in weights]
    x, target = (data.chunk(2)[rank] for data in batch())
    losses = train(net, x, target, mean)
    assert all(torch.equal(weight.to_local(), old) for weight, old in zip(weights, before, strict=True))
    with pytest.raises(TypeError, match=r"absmax has dtype torch\.bfloat16"):
        in_half_precision(leave_scales_out=False)
    assert in_half_precision(leave_scales_out=True).dtype == torch.bfloat16
    if rank == 0:
        torch.save(losses, found)
    dist.barrier()
    dist.destroy_process_group()


def in_half_precision(leave_scales_out: bool) -> Tensor:
    """A pass under a policy that casts all parameters that it shards: scales must be left out."""
    layer = Adapted(WIDTH, WIDTH, False, seed=0)
    ignored = {layer.base.weight_absmax} if leave_scales_out else None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return fully_shard(layer, mp_policy=policy, ignored_params=ignored)(batch()[0])


def batch() -> tuple[Tensor, Tensor]:
    return random(TOKENS, WIDTH, seed=20), random(TOKENS, WIDTH, seed=21)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="fully_shard of torch 2.11 cannot shard uint8 parameters")
def test_two_processes_train_to_the_loss_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), tmp_path / "meeting", tmp_path / "losses.pt"], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    losses = torch.load(tmp_path / "losses.pt")
    assert losses[-1] < losses[0]
    assert_equivalent(lambda x, target: losses, in_one_process, batch(), grads=False)


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
