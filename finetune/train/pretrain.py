"""Pretraining: sequences of equal length from a stream of text, cross-entropy on every next token.

Documents are concatenated in a sequence and attend to each other, as in GPT-2 and its successors; an end token separates
them. All sequences are full, so nothing is padded, and attention is plainly causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.packing import divide
from finetune.train.fast.chunked_loss import CHUNK, LMHead, fused_linear_cross_entropy

if TYPE_CHECKING:
    from finetune.data.stream import Corpus, PackedSequence
    from finetune.train.distill import Distillation


class Pretraining:
    """The `Task` of the loop for sequences of text. With `head`, logits exist for `chunk` tokens at a time."""

    def __init__(
        self,
        corpus: Corpus,
        device: torch.device,
        *,
        micro_batch: int,
        head: LMHead | None = None,
        chunk: int = CHUNK,
        teacher: Distillation | None = None,
    ) -> None:
        self.corpus, self.device, self.micro_batch, self.teacher = corpus, device, micro_batch, teacher
        self.head, self.chunk = head, chunk
        self.parts: dict[str, float] = {}

    def sampler(self, epoch: int, position: int, cursor: Any) -> Iterator[tuple[PackedSequence, ...]]:
        sequences = self.corpus.rows(epoch, cursor)
        try:
            group: list[PackedSequence] = []
            for sequence in sequences:
                group.append(sequence)
                if len(group) == self.micro_batch:
                    yield tuple(group)
                    group = []
            if group:
                yield tuple(group)
        finally:
            sequences.close()

    def length(self, epoch: int) -> None:
        return None  # unknown before the stream was read once

    def cursor(self, key: tuple[PackedSequence, ...]) -> Any:
        return key[-1].after

    def batch(self, key: tuple[PackedSequence, ...]) -> torch.Tensor:
        """Token ids (sequences, length)."""
        return torch.stack([torch.as_tensor(row.ids) for row in key]).to(self.device, torch.int64)

    def split(self, key: tuple[PackedSequence, ...], parts: int) -> list[tuple[PackedSequence, ...]]:
        return divide(key, parts)

    def tokens(self, batch: torch.Tensor) -> int:
        return batch.numel()

    def samples(self, key: tuple[PackedSequence, ...]) -> list[str]:
        return [row.where for row in key]

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Cross-entropy in fp32, summed over all next tokens (nats), plus the teacher's losses."""
        if self.teacher is not None:
            losses = self.teacher.loss(model, batch)
            parts = {"ce": losses.ce, "distill_logits": losses.logits, "distill_relations": losses.relations}
            self.parts = {name: float(value) / losses.count for name, value in parts.items()}
            return losses.total, losses.count
        if self.head is not None:
            return fused_linear_cross_entropy(model, self.head, batch, chunk=self.chunk)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        targets = batch[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        return loss, targets.numel()
