"""What a run has written down on its way: metrics.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.units import finite_number


@dataclass(frozen=True)
class Look:
    """A look at the ternary codes after a step: shares of them; each layer by its path: (flips, zeros, scale)."""

    step: int
    flips: float
    zeros: float
    blend: float | None
    layers: dict[str, tuple[float, float, float]]


def look(entry: dict[str, Any]) -> Look:
    """A line of metrics as a Look; raises ValueError, KeyError or TypeError where it is none."""
    seen = entry["ternary"]
    values = (seen["flips"], seen["zeros"], *(value for layer in seen["layers"].values() for value in layer))
    if not seen["layers"] or any(finite_number(value) is None for value in values):
        raise ValueError("not a number")
    layers = {path: (float(flips), float(zeros), float(scale)) for path, (flips, zeros, scale) in seen["layers"].items()}
    return Look(int(entry["step"]), float(seen["flips"]), float(seen["zeros"]), finite_number(seen.get("blend")), layers)


@dataclass(frozen=True)
class TrainedSoFar:
    """What of `train` in run.json can be told of a run that did not end well; None where its last step does not say."""

    steps: int
    tokens: float | None
    supervised_tokens: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    memory_kind: str = ""


EVENTS = ("rolled_back", "skipped", "out_of_memory")


class Metrics:
    """metrics.jsonl: training steps, evaluations and looks at ternary codes in order, and what went wrong on the way.

    A step that was written twice counts as it was last.
    """

    def __init__(self, path: Path) -> None:
        steps: dict[int, dict[str, Any]] = {}
        evaluations: dict[int, dict[str, Any]] = {}
        looks: dict[int, Look] = {}
        self.events: dict[str, list[dict[str, Any]]] = {name: [] for name in EVENTS}
        self.unreadable = 0  # lines, such as the last one of a process that was killed
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                step = int(entry["step"])
                if "ternary" in entry:
                    looks[step] = look(entry)
                elif event := next((name for name in EVENTS if name in entry), None):
                    self.events[event].append({"step": step, **entry[event]})
                else:
                    (evaluations if "eval_loss" in entry else steps)[step] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                self.unreadable += bool(line.strip())
        self.steps = [steps[step] for step in sorted(steps)]
        self.evaluations = [evaluations[step] for step in sorted(evaluations)]
        self.looks = [looks[step] for step in sorted(looks)]

    def column(self, name: str) -> list[float]:
        """NaN where a step has no finite value."""
        return [math.nan if (value := finite_number(entry.get(name))) is None else value for entry in self.steps]

    def has(self, name: str) -> bool:
        return any(math.isfinite(value) for value in self.column(name))

    def so_far(self) -> TrainedSoFar | None:
        """How far training came; None before its first step."""
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
        """Training time after each step (pauses of a resumed run left out), and its unit."""
        total, times = 0.0, []
        for seconds in self.column("step_seconds"):
            total += seconds if math.isfinite(seconds) else 0.0
            times.append(total)
        scale, unit = (3600, "h") if total >= 7200 else (60, "min") if total >= 600 else (1, "s")
        return [time / scale for time in times], unit
