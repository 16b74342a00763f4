"""Compares two sides: the same work in turn, with cold caches, and the median of the ratios of pairs.

A machine's speed varies: clocks change, other programs come and go. So a ratio is taken within a pair of two calls
milliseconds apart, on the same fresh inputs; the order of the sides alternates; and the median of all pairs is
reported, with the interval that holds it in 95 % of resamples (bootstrap: Efron, Annals of Statistics 7, 1979). The first pairs,
in which code is compiled and allocators grow, do not count, and in the first one both sides must give the same result.

Before each call the last-level cache (the L2 of a GPU) is filled with other data, so that weights and inputs come from
memory, as they do in a model with more than one layer. It is filled by reading, because written data would be flushed
to memory while the clock runs. A product of a millisecond is preceded by the same product with other weights and inputs,
untimed, as in a model, so that its code is in the caches: loading it would be half the time.

On the CPU there is one thread on one core, and time is CPU time, kernel included: on an idle machine it equals wall time,
on a busy one it excludes other processes. No environment variables are set for either side:
allocators and libraries have their defaults.
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
COLD = 2  # how many times the cache's size is read to evict it
ASSUMED_CACHE = 64 << 20  # bytes, if the system does not report it
ALIKE = 0.1  # relative difference above which two results are not the same work

Timed = Callable[[], object]
Side = Callable[..., Timed]  # fresh inputs → the timed call


class Skip(Exception):
    """This case cannot be measured here; the message says why, and what to install."""


class Row(TypedDict):
    """One line of the result; None for missing values, as in a skipped case."""

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
    backend: str | None  # backend of our side
    note: str


@dataclass(frozen=True)
class Pairing:
    """Two sides to time. `within` is entered around all calls; `before`, on other weights and inputs, runs ahead of each call.

    work: units of work of one call, for rates ("tokens/s": tokens). note: known only after the sides are built.
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
    """Two amounts that are not timed here. note: as in a Pairing."""

    ours: float
    baseline: float
    backend: str
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One case. `build` creates weights and layers, or raises Skip. unit: "ms", "products/s", "tokens/s", or one of amounts.

    name, against: at most 23 letters, so that the table fits into 80 columns; shapes and details go into `note`.
    share: relative duration of the case, building included, for the progress display only.
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
        """Evict the cache by filling it with other data."""

    def time(self, call: Timed) -> tuple[float, object]:
        """Seconds of `call`, and its result."""


def cache_bytes(core: int) -> tuple[int, str]:
    """The size of the last-level cache of a CPU core, and the file that reports it."""
    levels = {}
    for folder in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
        try:
            size = (folder / "size").read_text().strip()
            levels[int((folder / "level").read_text())] = (int(size.removesuffix("K")) << 10, str(folder / "size"))
        except (OSError, ValueError):
            continue
    return levels[max(levels)] if levels else (ASSUMED_CACHE, "assumed: the system does not report it")


class CPUClock:
    def __init__(self, cache: int) -> None:
        self._filler = torch.ones(COLD * cache // 4)  # not zeros, for which the system need not allocate pages

    def evict(self) -> None:
        self._filler.sum()

    def time(self, call: Timed) -> tuple[float, object]:
        start = time.process_time()
        result = call()
        return time.process_time() - start, result


class CUDAClock:
    """Times kernels with events. Filling the cache takes longer than a launch, so launches are not timed."""

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
    """Seconds of our side and of the other, pair by pair; `tick` gets the fraction that is done.

    Raises:
        Skip: the other side failed. RuntimeError: the sides compute different results.
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
    """Raise RuntimeError unless both are equal tensors (or tuples of them), up to quantization and rounding."""
    mine, other = (result if isinstance(result, tuple) else (result,) for result in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        a, b = a.reshape(-1).float(), b.reshape(-1).float()
        difference = float((a - b).norm() / b.norm())
        if not difference < ALIKE:
            raise RuntimeError(f"the two sides compute different results: relative difference {difference:.3g}")


def measure(case: Case, clock: Clock, tick: Callable[[float], None]) -> Row:
    """Measure a case."""
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
    """Pin this process to one core, the last allowed one (the first serves interrupts); None if unsupported."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core
