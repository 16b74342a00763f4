"""Forward and backward passes of a step's micro-batches."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finetune.processes import rank, world_size
from finetune.train import parallel
from finetune.train.task import Task


@dataclass(frozen=True)
class Passes:
    """Runs this process's share of a step's micro-batches; gradients are added to those that are there.

    autocast: dtype of the matrix products where it is not that of the weights. offload: what the forward pass keeps for the
    backward pass goes to pinned CPU memory in between. in_backward: the optimizer steps inside the backward pass. sharded: the
    layers are, so that all processes must run equally many passes.
    """

    model: torch.nn.Module
    task: Task
    device: torch.device
    autocast: torch.dtype | None
    offload: bool
    in_backward: bool
    sharded: bool

    def run(self, keys: list[Any], split: int) -> tuple[float, int, int, bool]:
        """(sum of losses, targets, tokens, whether there was a backward pass); split: parts in which each micro-batch goes."""
        loss_sum, count, tokens, backward = torch.zeros((), device=self.device), 0, 0, False
        own, idle = self._share(keys, split)
        for part in own:
            batch = self.task.batch(part)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None), self._kept():
                loss, targets = self.task.loss(self.model, batch)
            if (targets or self.sharded) and not (self.in_backward and not math.isfinite(float(loss.detach()))):
                (loss / targets if self.in_backward else loss).backward()
                backward = True
            if targets:
                loss_sum += loss.detach()
            del loss  # and with it what its graph still has, before the next pass begins
            count += targets
            tokens += self.task.tokens(batch)
        if idle:
            parallel.idle(self.model)
        return float(loss_sum), count, tokens, backward

    def _share(self, keys: list[Any], split: int) -> tuple[list[Any], bool]:
        """This process's parts of the micro-batches, dealt out in turn; and whether others have one more.

        Layers that are sharded run in all processes or in none.
        """
        many, mine = world_size(), rank()
        ways = split * (many // math.gcd(len(keys) * split, many))  # so that there is something to deal out
        parts = [part for key in keys for part in self.task.split(key, ways)]
        return parts[mine::many], mine >= len(parts) % many > 0

    def _kept(self) -> AbstractContextManager[object]:
        pinned = self.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()
