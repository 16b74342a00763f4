"""What a kind of training supplies to the loop, and the order in which its micro-batches come."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch

from finetune.errors import GateError
from finetune.train.checkpoint import Progress


class Task(Protocol):
    """What a kind of training supplies. `parts`: what the last loss was made of, for the metrics; often nothing."""

    parts: dict[str, float]

    def sampler(self, epoch: int, position: int, cursor: Any) -> Iterator[Any]:
        """Keys of an epoch's micro-batches from `position` on: a function of the seed, the epoch and the position alone.

        cursor: what `cursor` gave for the last one before it, None at the beginning. Closing the iterator ends its work.
        """

    def length(self, epoch: int) -> int | None:
        """Micro-batches of an epoch, or None where nobody knows."""

    def cursor(self, key: Any) -> Any:
        """Where the stream goes on behind this micro-batch, as JSON; None for a kind that needs no such thing."""

    def batch(self, key: Any) -> Any:
        """The micro-batch behind a key."""

    def split(self, key: Any, parts: int) -> list[Any]:
        """The samples of a micro-batch, in their order, as keys of at most so many; fewer where it has fewer samples."""

    def tokens(self, batch: Any) -> int:
        """How many tokens the model reads in it."""

    def samples(self, key: Any) -> Sequence[Hashable]:
        """Names of the samples in it, for messages."""

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """(sum of the losses over targets, number of targets)."""


def steps_in(task: Task, *, epochs: float, accumulation: int, max_steps: int | None) -> int:
    """Optimizer steps of `epochs` passes. An epoch's last, smaller group goes on into the next epoch."""
    whole = int(epochs)
    micro_batches = sum(task.length(number) or 0 for number in range(whole))
    if epochs > whole:
        micro_batches += math.ceil((epochs - whole) * (task.length(whole) or 0))
    steps = max(1, math.ceil(micro_batches / accumulation))
    return min(steps, max_steps) if max_steps is not None else steps


class Sampler:
    """The keys of the micro-batches that come next; moves `progress` on."""

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
                    raise GateError(f"epoch {progress.epoch + 1} of the data holds no row to train on", where="data") from None
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
