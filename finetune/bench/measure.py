"""How two sides are compared: the same work in turn, caches cold, and the median of the ratios of pairs.

One machine is not equally fast for long: clocks change, neighbours come and go. So a ratio is taken within a pair, of two calls
that lie milliseconds apart, on the same fresh inputs; which side goes first alternates; and of all pairs the median is
given, with the interval that holds it in 95 % of resamples (bootstrap: Efron, Annals of Statistics 7, 1979). The first pairs,
in which things are compiled and allocators grow, do not count, and in the first of them both sides must give the same result.

Before each call the last-level cache (the L2 of a GPU) is filled with something else, so that weights and inputs come from
memory, as they do in a model with more than one layer. It is filled by reading: what was written would have to go back to
memory while the clock runs. A product of a millisecond is then preceded by the same product with other weights and inputs,
untimed, as in that model: what is in the caches then is the program itself, which would be half the time.

On the CPU there is one thread on one core, and time is the processor's, kernel included: on an idle machine it is the wall's,
on a busy one it leaves out what other processes took of the core. Nothing is set in the environment for either side:
allocators and libraries are as they come.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

WARM_UP = 3  # pairs that do not count
RESAMPLES = 4000
COLD = 2  # so many times the size of the cache is read
ASSUMED_CACHE = 64 << 20  # bytes, where the system does not say
ALIKE = 0.1  # relative difference of two results beyond which they are not the same work

Timed = Callable[[], object]
Side = Callable[..., Timed]  # fresh inputs → what is timed


class Skip(Exception):
    """This case cannot be measured here; the text says why, and what to type."""


class Row(TypedDict):
    """One line of the result; None where there is nothing, as in a case that was skipped."""

    case: str
    ours: float | None  # in `unit`: the median of a side, or an amount
    baseline: float | None
    ratio: float | None  # ours / baseline: the median over pairs, not the ratio of the medians
    unit: str
    target: float | None  # for `ratio`
    better: Literal["lower", "higher"]
    low: float | None  # the interval of `ratio`; None for what is counted, not timed
    high: float | None
    pairs: int
    met: bool | None
    against: str
    backend: str | None  # who computed our side
    note: str


@dataclass(frozen=True)
class Pairing:
    """Two sides to time. `within` is entered around all of it; `before`, on other weights and inputs, runs ahead of each call.

    work: what one call does, in what a rate counts ("tokens/s": tokens). note: what is only known once the sides are made.
    """

    fresh: Callable[[], tuple[Tensor, ...]]
    ours: Side
    baseline: Side
    pairs: int
    backend: str
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    before: tuple[Side, Side] | None = None
    work: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Amounts:
    """Two numbers that need no clock of ours. note: as in a Pairing."""

    ours: float
    baseline: float
    backend: str
    note: str = ""


@dataclass(frozen=True)
class Case:
    """`build` makes what is needed (weights, layers), or raises Skip. unit: "ms", "products/s", "tokens/s", or one of amounts.

    name, against: 23 letters at most, so that the table has room at 80 columns; shapes and what is counted go into `note`.
    share: about how long the case takes, building included, against the others of its device; for the time left alone.
    """

    name: str
    against: str
    unit: str
    target: float | None
    build: Callable[[], Pairing | Amounts]
    share: float = 1.0
    note: str = ""

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher" if self.unit.endswith("/s") else "lower"


def interval(ratios: list[float], *, seed: int = 0) -> tuple[float, float, float]:
    """The median of `ratios`, and the 2.5th and 97.5th percentile of the medians of resamples."""
    values = np.asarray(ratios)
    medians = np.median(np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


class Clock(Protocol):
    def evict(self) -> None:
        """Fill the cache with what nobody needs."""

    def time(self, call: Timed) -> tuple[float, object]:
        """Seconds that `call` took, and its result."""


def cache_bytes(core: int) -> tuple[int, str]:
    """The size of the last-level cache of a CPU's core, and where it was read."""
    levels = {}
    for folder in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
        try:
            size = (folder / "size").read_text().strip()
            levels[int((folder / "level").read_text())] = (int(size.removesuffix("K")) << 10, str(folder / "size"))
        except (OSError, ValueError):
            continue
    return levels[max(levels)] if levels else (ASSUMED_CACHE, "assumed: the system does not say")


class CPUClock:
    def __init__(self, cache: int) -> None:
        self._filler = torch.ones(COLD * cache // 4)  # not zeros, which the system need not give memory

    def evict(self) -> None:
        self._filler.sum()

    def time(self, call: Timed) -> tuple[float, object]:
        start = time.process_time()
        result = call()
        return time.process_time() - start, result


class CUDAClock:
    """Events around the kernels. Filling the cache takes longer than launching, so that launches are not timed."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._filler = torch.ones(max(4 * cache, ASSUMED_CACHE) // 4, device="cuda")

    def evict(self) -> None:
        torch.cuda.synchronize()
        self._filler.sum()

    def time(self, call: Timed) -> tuple[float, object]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


def pairs(pairing: Pairing, clock: Clock, tick: Callable[[float], None]) -> tuple[list[float], list[float]]:
    """Seconds of our side and of the other, pair by pair; `tick` gets the part that is done.

    Raises:
        Skip: the other side failed. RuntimeError: the sides do not compute the same.
    """
    times: tuple[list[float], list[float]] = ([], [])
    total = pairing.pairs + WARM_UP
    with pairing.within():
        inputs = pairing.fresh()
        try:
            theirs = pairing.baseline(*inputs)()
        except Exception as error:
            raise Skip(f"the other side failed with {type(error).__name__}: {error}") from error
        _alike(pairing.ours(*inputs)(), theirs)
        del theirs
        gc.collect()
        gc.disable()
        try:
            for turn in range(total):
                inputs = pairing.fresh()
                for side in (0, 1) if turn % 2 else (1, 0):
                    call = (pairing.ours, pairing.baseline)[side](*inputs)
                    ahead = pairing.before[side](*pairing.fresh()) if pairing.before else None
                    clock.evict()
                    if ahead:
                        ahead()
                    seconds, result = clock.time(call)
                    del result, call, ahead
                    if turn >= WARM_UP:
                        times[side].append(seconds)
                tick((turn + 1) / total)
        finally:
            gc.enable()
    return times


def _alike(ours: object, theirs: object) -> None:
    """Raise RuntimeError unless both are the same tensors (or tuples of them), up to what quantizing and rounding do."""
    mine, other = (result if isinstance(result, tuple) else (result,) for result in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        a, b = a.reshape(-1).float(), b.reshape(-1).float()
        difference = float((a - b).norm() / b.norm())
        if not difference < ALIKE:
            raise RuntimeError(f"the two sides do not compute the same: relative difference {difference:.3g}")


def measure(case: Case, clock: Clock, tick: Callable[[float], None]) -> Row:
    """The row of `case`."""
    row: Row = {
        "case": case.name, "ours": None, "baseline": None, "ratio": None, "unit": case.unit, "target": case.target,
        "better": case.better, "low": None, "high": None, "pairs": 0, "met": None, "against": case.against, "backend": None,
        "note": case.note,
    }  # fmt: skip
    try:
        contest = case.build()
        row["backend"] = contest.backend
        row["note"] = "; ".join(filter(None, (case.note, contest.note)))
        if isinstance(contest, Amounts):
            row["ours"], row["baseline"], row["ratio"] = contest.ours, contest.baseline, contest.ours / contest.baseline
        else:
            ours, baseline = pairs(contest, clock, tick)
            row["pairs"] = len(ours)
            higher = case.better == "higher"
            ratios = [b / a if higher else a / b for a, b in zip(ours, baseline, strict=True)]
            row["ratio"], row["low"], row["high"] = interval(ratios)
            middle = statistics.median(ours), statistics.median(baseline)
            row["ours"], row["baseline"] = (contest.work / m if higher else m * 1e3 for m in middle)
    except Skip as why:
        row["note"] = f"skipped: {why}"
        return row
    if case.target is not None and row["ratio"] is not None:
        row["met"] = row["ratio"] >= case.target if case.better == "higher" else row["ratio"] <= case.target
    return row


def pin() -> int | None:
    """Keep this process on one core, the last that it may use (the first serves interrupts); None where that cannot be asked."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core
