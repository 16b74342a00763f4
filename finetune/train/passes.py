"""Forward and backward passes over a step's micro-batches."""

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
    """Runs this process's share of a step's micro-batches; gradients accumulate.

    autocast: dtype of the matrix products where it is not that of the weights. offload: saved activations go to pinned CPU
    memory between forward and backward pass. in_backward: the optimizer steps inside the backward pass. sharded: the
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
        """(sum of losses, targets, tokens, whether there was a backward pass); split: parts of each micro-batch."""
        loss_sum, count, tokens, backward = torch.zeros((), device=self.device), 0, 0, False
        own, idle = self._share(keys, split)
        for part in own:
            batch = self.task.batch(part)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None), self._saved_tensors():
                loss, targets = self.task.loss(self.model, batch)
            if (targets or self.sharded) and not (self.in_backward and not math.isfinite(float(loss.detach()))):
                (loss / targets if self.in_backward else loss).backward()
                backward = True
            if targets:
                loss_sum += loss.detach()
            del loss  # free its graph before the next pass
            count += targets
            tokens += self.task.tokens(batch)
        if idle:
            parallel.idle(self.model)
        return float(loss_sum), count, tokens, backward

    def _share(self, keys: list[Any], split: int) -> tuple[list[Any], bool]:
        """This process's parts of the micro-batches, assigned round-robin; and whether others have one more.

        Layers that are sharded run in all processes or in none.
        """
        processes, own_rank = world_size(), rank()
        ways = split * (processes // math.gcd(len(keys) * split, processes))  # so that each process gets equally many
        parts = [part for key in keys for part in self.task.split(key, ways)]
        return parts[own_rank::processes], own_rank >= len(parts) % processes > 0

    def _saved_tensors(self) -> AbstractContextManager[object]:
        pinned = self.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()
