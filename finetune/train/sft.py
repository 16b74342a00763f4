"""Supervised fine-tuning: packed samples, cross-entropy on the supervised tokens only."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eval.perplexity import kept_logits
from finetune.data.packing import Batch, Batches, divide
from finetune.data.samples import IGNORE
from finetune.train.fast.chunked_loss import CHUNK, LMHead, fused_linear_cross_entropy


class SupervisedFineTuning:
    """The `Task` of the loop for samples with labels. With `head`, logits exist for `chunk` tokens at a time."""

    def __init__(self, batches: Batches, device: torch.device, *, head: LMHead | None = None, chunk: int = CHUNK) -> None:
        self.batches, self.device, self.head, self.chunk = batches, device, head, chunk
        self.parts: dict[str, float] = {}
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])  # cached: packing a large epoch takes a while

    def sampler(self, epoch: int, position: int, cursor: None) -> Iterator[tuple[int, ...]]:
        return iter(self._keys(epoch)[position:])

    def length(self, epoch: int) -> int:
        return len(self._keys(epoch))

    def _keys(self, epoch: int) -> list[tuple[int, ...]]:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.batches.epoch(epoch)
        return self._epoch[1]

    def cursor(self, key: tuple[int, ...]) -> None:
        return None  # the position is enough

    def batch(self, key: tuple[int, ...]) -> Batch:
        batch = self.batches.batch(key)
        ids, labels, positions = (t.to(self.device) for t in (batch.input_ids, batch.labels, batch.position_ids))
        return Batch(ids, labels, positions, key, batch.tokens)

    def split(self, key: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
        return divide(key, parts)

    def tokens(self, batch: Batch) -> int:
        return batch.tokens

    def samples(self, key: tuple[int, ...]) -> list[str]:
        return [self.batches.samples[index].where for index in key]

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        """Cross-entropy in fp32, summed over supervised tokens (nats); logits exist only where a supervised token follows."""
        if self.head is not None:
            return fused_linear_cross_entropy(
                model, self.head, batch.input_ids, batch.position_ids, batch.labels, chunk=self.chunk
            )
        positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]  # (n,)
        logits = kept_logits(model, batch.input_ids, batch.position_ids, positions)  # (n, vocabulary)
        targets = batch.labels[0, positions + 1]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()
