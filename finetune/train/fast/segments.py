"""The bounds of samples in packed sequences, and the tiles in which their attention is computed (attention.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A tile's sides are multiples of this: oneDNN generates code for each shape of a product (0.4 ms on the machine below), and
# rounding keeps the shapes few. Extra rows of a tile belong to the next sample, and are computed there again.
ALIGN = 16
# One more tile costs as much as this many scores, forward and backward (measured on 2 cores of an EPYC 9005).
TILE = 80_000


class Tile(NamedTuple):
    """Queries `start` … `end` of the flattened tokens against keys `begin` … `end`. real: how many of the queries count.

    bias: (end − start, 1, columns) fp32, 0 where a query sees a key and −∞ where not, for the last `columns` keys; all queries
    see the keys before these.
    """

    begin: int
    start: int
    end: int
    real: int
    bias: Tensor


class Group(NamedTuple):
    """Samples that fill tokens `begin` … `end` of the flattened tokens, and their tiles: one tile, or one sample."""

    begin: int
    end: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Segments:
    """The bounds of samples in sequences (B, T), flattened to B·T tokens: sample i is bounds[i] … bounds[i + 1]."""

    bounds: tuple[int, ...]
    shape: tuple[int, int]
    device: torch.device
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def longest(self) -> int:
        return max(end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def offsets(self) -> Tensor:
        """`bounds` as int32 on the device, as kernels for variable lengths need them (cu_seqlens)."""
        if "offsets" not in self._plans:
            self._plans["offsets"] = torch.tensor(self.bounds, dtype=torch.int32, device=self.device)
        return self._plans["offsets"]

    def plan(self, heads: int, window: int | None) -> tuple[Group, ...]:
        """The tiles, in order, for `heads` query heads at a time."""
        if (heads, window) not in self._plans:
            self._plans[heads, window] = tuple(_plan(self.bounds, heads, window, self.device))
        return self._plans[heads, window]


# ------------------------------------------------------------------------------------------------------------------- the plan


def _aligned(count: float) -> int:
    return math.ceil(count / ALIGN) * ALIGN


def _plan(bounds: tuple[int, ...], heads: int, window: int | None, device: torch.device) -> Iterator[Group]:
    """Groups of one tile or one sample each.

    Two samples of a and b tokens in one tile compute 2·a·b unused scores, in two tiles they cost one more tile. A sample of
    L tokens in n tiles computes about L²/2·(1 + 1/n) scores; the sum with n·TILE is least for n = L / √(2·TILE).
    """
    budget = TILE / heads
    best = math.sqrt(2 * budget)  # queries per tile
    biases: dict[Any, Tensor] = {}
    at = 0
    while at + 1 < len(bounds):
        begin, end, first = bounds[at], bounds[at + 1], at
        at += 1
        while at + 1 < len(bounds) and bounds[at + 1] - begin <= best and 2 * (end - begin) * (bounds[at + 1] - end) < budget:
            at += 1
            end = bounds[at]
        queries = _aligned((end - begin) / max(1, round((end - begin) / best)))
        yield Group(
            begin,
            end,
            tuple(
                _tile(start, min(queries, end - start), bounds[first : at + 1], window, device, biases)
                for start in range(begin, end, queries)
            ),
        )


def _tile(
    start: int, real: int, bounds: tuple[int, ...], window: int | None, device: torch.device, biases: dict[Any, Tensor]
) -> Tile:
    """A tile of queries start … start + real, of the samples at `bounds`."""
    queries = _aligned(real)
    begin = bounds[0] if window is None else max(bounds[0], start - _aligned(window - 1))
    rows = range(start, start + queries)
    # The first key that each query sees, counted from `begin`; queries beyond `real` repeat the last one.
    sees = [max(b for b in bounds[:-1] if b <= row) - begin for row in rows] if len(bounds) > 2 else [bounds[0] - begin] * queries
    if window is not None:
        sees = [max(first, row - window + 1 - begin) for first, row in zip(sees, rows, strict=True)]
    before = start - begin
    if max(sees) <= 0:
        before, sees = 0, [0] * queries  # all see every key before the tile's own queries
    key = (before, tuple(sees))
    if key not in biases:
        columns = torch.arange(before + queries, device=device)
        visible = (columns <= columns[before:, None]) & (columns >= torch.tensor(sees, device=device)[:, None])
        biases[key] = torch.where(visible, 0.0, -math.inf)[:, None]
    return Tile(begin, start, start + queries, real, biases[key])
