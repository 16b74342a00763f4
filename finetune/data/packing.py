"""Batches without padding: samples are packed into one sequence, and position ids restart at 0 with each.

transformers builds block-diagonal attention from such position ids when no attention mask is given (tested: a sample's loss
does not depend on its neighbours). A sequence is filled up with a few ignored tokens to a multiple of `MULTIPLE`, so that there
are few lengths: libraries generate code, and keep memory, for each new one.

The order is a function of (seed, epoch) alone, so that a resumed run sees the same sequences.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from finetune.data.samples import IGNORE, Sample

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
MULTIPLE = 64  # oneDNN takes 20 MB and some 50 ms for each new sequence length of a small model


@dataclass(frozen=True)
class Batch:
    """One micro-batch: input_ids, labels, position_ids are (1, T) int64; `samples` are indices into the training set.

    tokens: how many of the T belong to samples; the rest has no labels, and positions from 0.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    samples: tuple[int, ...]
    tokens: int


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack indices into bins of at most `capacity` tokens, best fit: each goes where it leaves the least space.

    Longer ones (none after truncation) get a bin of their own.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index, length in enumerate(lengths):
        slot = bisect.bisect_left(room, (length, -1))
        if slot < len(room):
            left, number = room.pop(slot)
            bins[number].append(index)
        else:
            left, number = capacity, len(bins)
            bins.append([index])
        bisect.insort(room, (left - length, number))
    return bins


def divide(items: tuple[T, ...], parts: int) -> list[tuple[T, ...]]:
    """Split items into at most `parts` contiguous parts of about equal size."""
    parts = min(parts, len(items))
    cuts = [len(items) * part // parts for part in range(parts + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(cuts)]


class Batches:
    """The micro-batches of every epoch: `epoch(n)` gives them as lists of sample indices, `batch(indices)` as tensors."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        micro_batch: int,
        max_length: int,
        packing: bool,
        seed: int,
        positions: int | None = None,
    ) -> None:
        self.samples, self.micro_batch, self.max_length, self.packing = samples, micro_batch, max_length, packing
        self.seed, self.positions = seed, positions

    def epoch(self, number: int) -> list[tuple[int, ...]]:
        """The micro-batches of an epoch as lists of sample indices, shuffled by (seed, epoch)."""
        shuffled = random.Random(f"{self.seed}/{number}")
        order = list(range(len(self.samples)))
        shuffled.shuffle(order)
        sequences = [[i] for i in order]
        if self.packing:
            packed = pack([len(self.samples[i]) for i in order], self.max_length)
            sequences = [[order[i] for i in sequence] for sequence in packed]
            shuffled.shuffle(sequences)
        groups = [sequences[at : at + self.micro_batch] for at in range(0, len(sequences), self.micro_batch)]
        return [tuple(i for sequence in group for i in sequence) for group in groups]

    def batch(self, indices: tuple[int, ...]) -> Batch:
        import torch

        chosen = [self.samples[i] for i in indices]
        tokens = sum(map(len, chosen))
        rest = -tokens % MULTIPLE
        if self.positions is not None and len(chosen) == 1:  # a model may have tables of that size
            rest = min(rest, max(0, self.positions - tokens))
        return Batch(
            input_ids=torch.tensor([[*(t for sample in chosen for t in sample.input_ids), *[0] * rest]]),
            labels=torch.tensor([[*(label for s in chosen for label in (IGNORE, *s.labels[1:])), *[IGNORE] * rest]]),
            position_ids=torch.tensor([[*(p for sample in chosen for p in range(len(sample))), *range(rest)]]),
            samples=indices,
            tokens=tokens,
        )
