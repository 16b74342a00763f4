"""Reads metrics.jsonl, the log of a run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.units import finite_number


@dataclass(frozen=True)
class TernaryStats:
    """Ternary codes after a step: shares of all codes that flipped and that are 0; per layer (flips, zeros, scale)."""

    step: int
    flips: float
    zeros: float
    blend: float | None
    layers: dict[str, tuple[float, float, float]]


def ternary_stats(entry: dict[str, Any]) -> TernaryStats:
    """Parse a line of metrics; raises ValueError, KeyError or TypeError for an invalid one."""
    raw = entry["ternary"]
    values = (raw["flips"], raw["zeros"], *(value for layer in raw["layers"].values() for value in layer))
    if not raw["layers"] or any(finite_number(value) is None for value in values):
        raise ValueError("not a number")
    layers = {path: (float(flips), float(zeros), float(scale)) for path, (flips, zeros, scale) in raw["layers"].items()}
    return TernaryStats(int(entry["step"]), float(raw["flips"]), float(raw["zeros"]), finite_number(raw.get("blend")), layers)


@dataclass(frozen=True)
class TrainedSoFar:
    """The part of `train` in run.json that the metrics of an unfinished run give; None for unknown values."""

    steps: int
    tokens: float | None
    supervised_tokens: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    memory_kind: str = ""


EVENTS = ("rolled_back", "skipped", "out_of_memory")


class Metrics:
    """metrics.jsonl: training steps, evaluations and statistics of ternary codes in order, and bad steps.

    If a step was written twice, the last entry counts.
    """

    def __init__(self, path: Path) -> None:
        steps: dict[int, dict[str, Any]] = {}
        evaluations: dict[int, dict[str, Any]] = {}
        ternary: dict[int, TernaryStats] = {}
        self.events: dict[str, list[dict[str, Any]]] = {name: [] for name in EVENTS}
        self.unreadable = 0  # lines, such as the last one of a killed process
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                step = int(entry["step"])
                if "ternary" in entry:
                    ternary[step] = ternary_stats(entry)
                elif event := next((name for name in EVENTS if name in entry), None):
                    self.events[event].append({"step": step, **entry[event]})
                else:
                    (evaluations if "eval_loss" in entry else steps)[step] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                self.unreadable += bool(line.strip())
        self.steps = [steps[step] for step in sorted(steps)]
        self.evaluations = [evaluations[step] for step in sorted(evaluations)]
        self.ternary = [ternary[step] for step in sorted(ternary)]

    def column(self, name: str) -> list[float]:
        """A value of each step, NaN if it is not finite."""
        return [math.nan if (value := finite_number(entry.get(name))) is None else value for entry in self.steps]

    def has(self, name: str) -> bool:
        return any(math.isfinite(value) for value in self.column(name))

    def so_far(self) -> TrainedSoFar | None:
        """Totals of training so far; None before its first step."""
        if not self.steps:
            return None
        last, seconds = self.steps[-1], sum(value for value in self.column("step_seconds") if math.isfinite(value))
        tokens = finite_number(last.get("tokens"))
        return TrainedSoFar(
            steps=len(self.steps),
            tokens=tokens,
            supervised_tokens=finite_number(last.get("supervised")),
            tokens_per_second=tokens / seconds if tokens and seconds else None,
            peak_bytes=finite_number(last.get("memory_bytes")),
        )

    def clock(self) -> tuple[list[float], str]:
        """Training time after each step (without pauses of a resumed run), and its unit."""
        total, times = 0.0, []
        for seconds in self.column("step_seconds"):
            total += seconds if math.isfinite(seconds) else 0.0
            times.append(total)
        scale, unit = (3600, "h") if total >= 7200 else (60, "min") if total >= 600 else (1, "s")
        return [time / scale for time in times], unit
