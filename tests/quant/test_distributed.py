"""DDP and FSDP2 on two processes: the same losses as one process on the whole batch, for every linear."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.starts import run_together

pytestmark = pytest.mark.alone

WORKER = """
import os, sys, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from quant import swap

warnings.filterwarnings("error", category=UserWarning, module=r"torch\\.distributed\\.fsdp")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
inputs = torch.randn(world, 6, 64)

def net(scheme, trainable):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    swap(model, scheme=scheme, trainable=trainable, keep=("4",))
    return model

def train(model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = sum(model(x).pow(2).mean() for x in batches) / len(batches)
        loss.backward()
        total = loss.detach().clone()
        if len(batches) == 1:
            dist.all_reduce(total)
            total /= world
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses

mesh = init_device_mesh("cpu", (world,))
for scheme in ("nf4", "ternary"):
    for trainable in (False, True):
        alone = train(net(scheme, trainable), list(inputs))
        spread = {"ddp": (train(DistributedDataParallel(net(scheme, trainable)), [inputs[rank]]), 1e-6)}
        for name, policy, bound in (
            ("fsdp", MixedPrecisionPolicy(), 1e-6),
            ("fsdp bf16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 2e-3),
        ):
            model = net(scheme, trainable)
            for part in (model[0], model[2], model):
                fully_shard(part, mesh=mesh, mp_policy=policy)
            shards = {n: p.to_local().numel() / p.numel() for n, p in model[0].named_parameters()}
            assert all(abs(share - 0.5) < 0.02 for share in shards.values()), shards
            spread[name] = train(model, [inputs[rank]]), bound
        for name, (losses, bound) in spread.items():
            assert all(abs(a - b) <= bound for a, b in zip(alone, losses)), (scheme, trainable, name, alone, losses)
dist.destroy_process_group()
print("done")
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (program := tmp_path / "worker.py").write_text(WORKER)
    for printed in run_together(program, [], tmp_path):
        assert printed.endswith("done\n"), printed
