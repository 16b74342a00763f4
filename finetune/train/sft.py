"""Supervised fine-tuning: packed samples, cross-entropy on the trained tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eval.perplexity import kept_logits
from finetune.data.packing import Batch, Batches
from finetune.data.samples import IGNORE


class SupervisedFineTuning:
    """The `Kind` of the loop for samples with labels."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.parts: dict[str, float] = {}
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])  # the last one: packing a large epoch takes a while

    def keys(self, epoch: int, position: int, place: None) -> Iterator[tuple[int, ...]]:
        return iter(self._keys(epoch)[position:])

    def length(self, epoch: int) -> int:
        return len(self._keys(epoch))

    def _keys(self, epoch: int) -> list[tuple[int, ...]]:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.batches.epoch(epoch)
        return self._epoch[1]

    def place(self, key: tuple[int, ...]) -> None:
        return None  # the position says it all

    def batch(self, key: tuple[int, ...]) -> Batch:
        batch = self.batches.batch(key)
        return Batch(batch.input_ids.to(self.device), batch.labels.to(self.device), batch.position_ids.to(self.device), key)

    def tokens(self, batch: Batch) -> int:
        return batch.input_ids.numel()

    def samples(self, key: tuple[int, ...]) -> list[str]:
        return [self.batches.samples[index].where for index in key]

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        """Cross-entropy in fp32, summed over trained tokens (nats); logits exist only where a trained token follows."""
        places = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]  # (n,)
        logits = kept_logits(model, batch.input_ids, batch.position_ids, places)  # (n, vocabulary)
        targets = batch.labels[0, places + 1]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()
