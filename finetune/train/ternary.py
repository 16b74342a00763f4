"""What training ternary weights adds to a step: the λ of a warm-up before it, and a look at the codes after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.recipe import Recipe
from finetune.train.schedule import blend, learning_rate
from quant import set_blend
from quant.health import Health, Layer, Watch, alarms


class Ternary:
    """Hooks of the loop for a model with ternary master weights, in a training of `total` steps.

    metrics: the run's metrics.jsonl, which holds the looks of a run that goes on. warn: told each new alarm.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, total: int, metrics: Path, warn: Callable[[str], None]) -> None:
        self.model, self.total, self.quant, self.train, self.warn = model, total, recipe.quant, recipe.train, warn
        self.watch = Watch(model)
        self.looks: list[tuple[float, Health]] = []  # (learning rate, what was seen)
        self.alarms: dict[str, str] = {}  # kind → first words of it
        weights = {path: layer.weight.numel() for path, layer in self.watch.layers.items()}
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
            entry = json.loads(line)
            if "ternary" in entry:
                seen = entry["ternary"]
                layers = {path: Layer(v[0], v[1], v[2], weights[path]) for path, v in seen["layers"].items()}
                self._look(entry["step"], Health(seen["flips"], seen["zeros"], layers), told=False)

    def before(self, step: int) -> None:
        if self.quant.warmup:
            set_blend(self.model, self._blend(step))
        if step % self.train.health_steps == 0:
            self.watch.remember()

    def after(self, step: int) -> dict[str, Any]:
        """Nothing, or what has flipped in this step: a line of metrics."""
        if step % self.train.health_steps:
            return {}
        health = self.watch.compare()
        self._look(step, health, told=True)
        layers = {path: [layer.flips, layer.zeros, layer.scale] for path, layer in health.layers.items()}
        warming = {"blend": self._blend(step)} if self.quant.warmup else {}
        return {"ternary": {"flips": health.flips, "zeros": health.zeros, **warming, "layers": layers}}

    def end(self) -> None:
        """Training is over: what is measured and written from here on is ternary, however far the warm-up came."""
        set_blend(self.model, 1.0)

    def summary(self) -> dict[str, Any]:
        """What the last look saw, how much has flipped on the way, and all alarms."""
        if not self.looks:
            return {"looks": 0, "alarms": []}
        last = self.looks[-1][1]
        turnover = sum(health.flips for _, health in self.looks) * self.train.health_steps
        return {
            "flips": last.flips,
            "zeros": last.zeros,
            "turnover": turnover,
            "looks": len(self.looks),
            "alarms": list(self.alarms.values()),
        }

    def _blend(self, step: int) -> float:
        return blend(step, self.total, warmup=self.quant.warmup, shape=self.quant.warmup_shape)

    def _look(self, step: int, health: Health, *, told: bool) -> None:
        settings = self.train
        lr = learning_rate(
            step,
            self.total,
            peak=settings.lr,
            schedule=settings.schedule,
            warmup=settings.warmup,
            min_lr=settings.min_lr,
        )
        self.looks.append((lr, health))
        history, rates = [health for _, health in self.looks], [rate for rate, _ in self.looks]
        for alarm in alarms(history, rates, peak=settings.lr, steps=self.total):
            kind = alarm.partition(":")[0].split(" ")[-1]
            if kind not in self.alarms:
                self.alarms[kind] = f"step {step}: {alarm}"
                if told:
                    self.warn(self.alarms[kind])
