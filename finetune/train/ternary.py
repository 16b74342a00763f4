"""Hooks for training ternary weights: sets the λ of the warm-up before a step, and measures code flips after it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.recipe import Recipe
from finetune.train import parallel
from finetune.train.schedule import Schedule
from quant import set_blend
from quant.health import Health, Layer, Watch, alarms

DENSE = 50  # measurements at the full rate at the beginning: codes thrash early (quant/health.py)
MOST = 1000  # measurements at an even rate in a run: each is a line with every layer in it
KEPT = 64  # measurements kept for alarms: quant.health.WINDOW of them, and those at a learning rate too low to be judged


def looks_at(step: int, total: int, every: int) -> bool:
    """Whether code flips are measured in step `step` of `total`: every `every` steps at first, then about `MOST` times a run."""
    return step % (every if step <= DENSE * every else max(every, -(-total // MOST))) == 0


class Ternary:
    """Hooks of the loop for a model with ternary master weights, in a run of `total` steps.

    metrics: the run's metrics.jsonl, with the measurements before a resume. warn: called with each new alarm.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, total: int, metrics: Path, warn: Callable[[str], None]) -> None:
        self.model, self.total, self.every, self.warn = model, total, recipe.train.health_steps, warn
        self.schedule = Schedule.of(recipe.train, total, recipe.quant)
        self.watch = Watch(model, lambda: parallel.named_modules(model))
        self.metrics = metrics
        self._read(total)

    def rewind(self, step: int) -> None:
        """Forget the measurements and alarms after `step`, to which the run was rolled back."""
        self._read(step)

    def _read(self, until: int) -> None:
        """Set the state after step `until`, from the measurements in metrics.jsonl."""
        self.recent: deque[tuple[float, Health]] = deque(maxlen=KEPT)  # (learning rate, measurement)
        self.looks, self.last_step, self.turnover = 0, 0, 0.0
        self.alarms: dict[str, str] = {}  # name → the first message
        for step, health in self._saved():
            if step <= until:
                self._add(step, health, warn=False)

    def _saved(self) -> Iterator[tuple[int, Health]]:
        if not self.metrics.exists():
            return
        weights = {path: layer.weight.numel() for path, layer in self.watch.layers.items()}
        with self.metrics.open(encoding="utf-8") as file:
            for line in file:
                if '"ternary"' in line and "ternary" in (entry := json.loads(line)):
                    values = entry["ternary"]
                    layers = {path: Layer(v[0], v[1], v[2], weights[path]) for path, v in values["layers"].items()}
                    yield entry["step"], Health(values["flips"], values["zeros"], layers)

    def before(self, step: int) -> None:
        if self.schedule.blend_warmup:
            set_blend(self.model, self.schedule.blend(step))
        if self._looks_at(step):
            self.watch.remember()

    def after(self, step: int) -> dict[str, Any]:
        """The code flips of this step as a line of metrics; empty when they are not measured."""
        if not self._looks_at(step):
            return {}
        health = self.watch.compare()
        self._add(step, health, warn=True)
        layers = {path: [layer.flips, layer.zeros, layer.scale] for path, layer in health.layers.items()}
        warming = {"blend": self.schedule.blend(step)} if self.schedule.blend_warmup else {}
        return {"ternary": {"flips": health.flips, "zeros": health.zeros, **warming, "layers": layers}}

    def end(self) -> None:
        """Set λ to 1: everything evaluated and saved after training is fully ternary, even if the warm-up was cut short."""
        set_blend(self.model, 1.0)

    def summary(self) -> dict[str, Any]:
        """The last measurement, the turnover of the whole run, and all alarms."""
        if not self.looks:
            return {"looks": 0, "alarms": []}
        last = self.recent[-1][1]
        return {
            "flips": last.flips,
            "zeros": last.zeros,
            "turnover": self.turnover,
            "looks": self.looks,
            "alarms": list(self.alarms.values()),
        }

    def _looks_at(self, step: int) -> bool:
        return looks_at(step, self.total, self.every)

    def _add(self, step: int, health: Health, *, warn: bool) -> None:
        self.turnover += health.flips * (step - self.last_step)  # one measurement stands for the steps since the last
        self.looks, self.last_step = self.looks + 1, step
        self.recent.append((self.schedule.rate(step), health))
        history, rates = [health for _, health in self.recent], [rate for rate, _ in self.recent]
        for alarm in alarms(history, rates, peak=self.schedule.peak, steps=self.total):
            name = alarm.partition(":")[0].split(" ")[-1]
            if name not in self.alarms:
                self.alarms[name] = f"step {step}: {alarm}"
                if warn:
                    self.warn(self.alarms[name])
