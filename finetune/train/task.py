"""The protocol of a task (a kind of training) in the loop, and the order of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch

from finetune.errors import GateError
from finetune.train.checkpoint import Progress


class Task(Protocol):
    """What a kind of training supplies. `parts`: the terms of the last loss, for the metrics; often empty."""

    parts: dict[str, float]

    def sampler(self, epoch: int, position: int, cursor: Any) -> Iterator[Any]:
        """Keys of an epoch's micro-batches from `position` on: a function of the seed, the epoch and the position alone.

        cursor: what `cursor` returned for the last one before it, None at the beginning. Closing the iterator ends its work.
        """

    def length(self, epoch: int) -> int | None:
        """Micro-batches of an epoch, or None if unknown."""

    def cursor(self, key: Any) -> Any:
        """The position in the stream after this micro-batch, as JSON; None for a task without a stream."""

    def batch(self, key: Any) -> Any:
        """The micro-batch behind a key."""

    def split(self, key: Any, parts: int) -> list[Any]:
        """Split a micro-batch's samples, in order, into at most `parts` keys; fewer if it has fewer samples."""

    def tokens(self, batch: Any) -> int:
        """Number of tokens that the model reads in it."""

    def samples(self, key: Any) -> Sequence[Hashable]:
        """Names of the samples in it, for messages."""

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """(sum of the losses over targets, number of targets)."""


def steps_in(task: Task, *, epochs: float, accumulation: int, max_steps: int | None) -> int:
    """Optimizer steps of `epochs` passes. An epoch's last, smaller group continues into the next epoch."""
    whole = int(epochs)
    micro_batches = sum(task.length(number) or 0 for number in range(whole))
    if epochs > whole:
        micro_batches += math.ceil((epochs - whole) * (task.length(whole) or 0))
    steps = max(1, math.ceil(micro_batches / accumulation))
    return min(steps, max_steps) if max_steps is not None else steps


class Sampler:
    """Iterates over the keys of micro-batches from `progress` on, and advances it."""

    def __init__(self, task: Task, progress: Progress) -> None:
        self.task, self.progress = task, progress
        self.epoch: Iterator[Any] = task.sampler(progress.epoch, progress.position, progress.cursor)

    def next(self) -> Any:
        progress = self.progress
        while True:
            try:
                key = next(self.epoch)
            except StopIteration:
                if not progress.position:
                    raise GateError(f"epoch {progress.epoch + 1} of the data has nothing to train on", where="data") from None
                progress.epoch, progress.position, progress.cursor = progress.epoch + 1, 0, None
                self.epoch = self.task.sampler(progress.epoch, 0, None)
                continue
            here = [progress.epoch, progress.position]
            progress.position += 1
            progress.cursor = self.task.cursor(key)
            if here not in progress.bad:
                return key

    def close(self) -> None:
        close = getattr(self.epoch, "close", None)  # a stream reads ahead in a thread
        if close is not None:
            close()
