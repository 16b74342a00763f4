"""What training ternary weights adds to a step: the λ of a warm-up before it, and a look at the codes after it."""

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

DENSE = 50  # looks at the full rate, from the beginning on: codes thrash early (quant/health.py)
MOST = 1000  # looks at an even rate in a run: each is a line with every layer in it
KEPT = 64  # looks that alarms are judged by: quant.health.WINDOW of them, with those that are too slow to be judged between


def looks_at(step: int, total: int, every: int) -> bool:
    """Whether the codes are looked at in step `step` of `total`: each `every` steps at first, then about `MOST` times a run."""
    return step % (every if step <= DENSE * every else max(every, -(-total // MOST))) == 0


class Ternary:
    """Hooks of the loop for a model with ternary master weights, in a training of `total` steps.

    metrics: the run's metrics.jsonl, which holds the looks of a run that goes on. warn: told each new alarm.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, total: int, metrics: Path, warn: Callable[[str], None]) -> None:
        self.model, self.total, self.every, self.warn = model, total, recipe.train.health_steps, warn
        self.schedule = Schedule.of(recipe.train, total, recipe.quant)
        self.watch = Watch(model, lambda: parallel.named_modules(model))
        self.metrics = metrics
        self._read(total)

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what was seen after it, alarms too, has not been."""
        self._read(step)

    def _read(self, until: int) -> None:
        """The state after step `until`, from the looks in metrics.jsonl."""
        self.recent: deque[tuple[float, Health]] = deque(maxlen=KEPT)  # (learning rate, what was seen)
        self.looks, self.last_step, self.turnover = 0, 0, 0.0
        self.alarms: dict[str, str] = {}  # kind → first words of it
        for step, health in self._saved():
            if step <= until:
                self._look(step, health, told=False)

    def _saved(self) -> Iterator[tuple[int, Health]]:
        if not self.metrics.exists():
            return
        weights = {path: layer.weight.numel() for path, layer in self.watch.layers.items()}
        with self.metrics.open(encoding="utf-8") as file:
            for line in file:
                if '"ternary"' in line and "ternary" in (entry := json.loads(line)):
                    seen = entry["ternary"]
                    layers = {path: Layer(v[0], v[1], v[2], weights[path]) for path, v in seen["layers"].items()}
                    yield entry["step"], Health(seen["flips"], seen["zeros"], layers)

    def before(self, step: int) -> None:
        if self.schedule.blend_warmup:
            set_blend(self.model, self.schedule.blend(step))
        if self._looks_at(step):
            self.watch.remember()

    def after(self, step: int) -> dict[str, Any]:
        """Nothing, or what has flipped in this step: a line of metrics."""
        if not self._looks_at(step):
            return {}
        health = self.watch.compare()
        self._look(step, health, told=True)
        layers = {path: [layer.flips, layer.zeros, layer.scale] for path, layer in health.layers.items()}
        warming = {"blend": self.schedule.blend(step)} if self.schedule.blend_warmup else {}
        return {"ternary": {"flips": health.flips, "zeros": health.zeros, **warming, "layers": layers}}

    def end(self) -> None:
        """Training is over: what is measured and written from here on is ternary, however far the warm-up came."""
        set_blend(self.model, 1.0)

    def summary(self) -> dict[str, Any]:
        """What the last look saw, how much has flipped on the way, and all alarms."""
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

    def _look(self, step: int, health: Health, *, told: bool) -> None:
        self.turnover += health.flips * (step - self.last_step)  # one look stands for the steps since the one before
        self.looks, self.last_step = self.looks + 1, step
        self.recent.append((self.schedule.rate(step), health))
        history, rates = [health for _, health in self.recent], [rate for rate, _ in self.recent]
        for alarm in alarms(history, rates, peak=self.schedule.peak, steps=self.total):
            kind = alarm.partition(":")[0].split(" ")[-1]
            if kind not in self.alarms:
                self.alarms[kind] = f"step {step}: {alarm}"
                if told:
                    self.warn(self.alarms[kind])
