"""Measurements of ternary codes during training: their steps, bounded history, and state after resume and rollback."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.recipe import Quant, Train
from finetune.train import ternary
from finetune.train.ternary import DENSE, KEPT, MOST, Ternary, looks_at
from quant import BitLinear, health


def recipe(**train: Any) -> Any:
    """The parts of a recipe that Ternary reads."""
    settings: Any = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0, "health_steps": 1} | train
    return SimpleNamespace(quant=Quant(scheme="ternary"), train=Train(**settings))


class Run:
    """Ternary weights that move at random, with metrics as the loop writes them."""

    def __init__(self, folder: Path, total: int, **train: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(BitLinear(16, 8), BitLinear(8, 8))
        self.metrics, self.total, self.alarms = folder / "metrics.jsonl", total, []  # type: ignore[var-annotated]
        self.recipe = recipe(**train)
        self.watch = self.resumed_watch()

    def resumed_watch(self) -> Ternary:
        return Ternary(self.model, self.recipe, self.total, self.metrics, self.alarms.append)

    def train_steps(self, first: int, last: int, noise: float = 0.01) -> None:
        for step in range(first, last + 1):
            torch.manual_seed(step)
            self.watch.before(step)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter += noise * torch.randn_like(parameter)
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
                if figures := self.watch.after(step):
                    file.write(json.dumps({"step": step, **figures}) + "\n")


def state(watch: Ternary) -> dict[str, Any]:
    return {**watch.summary(), "recent": list(watch.recent), "last": watch.last_step, "all": dict(watch.alarms)}


@pytest.mark.parametrize(("total", "every"), [(1_600_000, 5), (1999, 1), (100_003, 7), (10, 20)])
def test_measurements_are_dense_at_first_and_bounded_in_number(total: int, every: int) -> None:
    steps = [step for step in range(1, total + 1) if looks_at(step, total, every)]
    assert steps[:DENSE] == [every * n for n in range(1, DENSE + 1) if every * n <= total]
    assert len(steps) <= DENSE + MOST
    if total > 10 * DENSE * every:
        assert len(steps) > MOST / 2
        assert max(b - a for a, b in zip(steps[DENSE:], steps[DENSE + 1 :], strict=False)) == max(every, -(-total // MOST))


def test_short_run_is_measured_every_health_steps() -> None:
    assert [step for step in range(1, 5001) if looks_at(step, 5000, 5)] == list(range(5, 5001, 5))


def test_history_of_measurements_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    real_alarms = health.alarms
    monkeypatch.setattr(
        ternary, "alarms", lambda history, *a, **k: (lengths.append(len(history)), real_alarms(history, *a, **k))[1]
    )
    run = Run(tmp_path, 3 * KEPT)
    run.train_steps(1, 3 * KEPT)
    assert run.watch.summary()["looks"] == 3 * KEPT
    assert len(run.watch.recent) == max(lengths) == KEPT
    assert max(lengths) >= 4 * health.WINDOW


def test_turnover_weights_measurements_by_the_steps_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary, "DENSE", 3)
    monkeypatch.setattr(ternary, "MOST", 4)
    run = Run(tmp_path, 40, health_steps=2)
    run.train_steps(1, 40)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    flips = {line["step"]: line["ternary"]["flips"] for line in lines if "ternary" in line}
    assert list(flips) == [2, 4, 6, 10, 20, 30, 40]
    expected = sum(flips[step] * width for step, width in zip(flips, (2, 2, 2, 4, 10, 10, 10), strict=True))
    assert run.watch.summary()["turnover"] == pytest.approx(expected)
    assert expected > 0


def test_resume_restores_the_state_and_repeats_no_alarm(tmp_path: Path) -> None:
    run = Run(tmp_path, 200)
    run.train_steps(1, 90, noise=0.3)  # thrashing, one alarm
    assert len(run.alarms) == 1
    assert "thrashing" in run.alarms[0]
    assert state(run.resumed_watch()) == state(run.watch)
    assert len(run.alarms) == 1  # no second alarm


def test_rollback_forgets_measurements_of_undone_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, 200, health_steps=2)
    run.train_steps(1, 20, noise=0.0)
    size, before = run.metrics.stat().st_size, state(run.watch)
    run.train_steps(21, 40, noise=0.5)
    assert state(run.watch) != before
    assert any("thrashing" in alarm for alarm in run.alarms)
    with run.metrics.open("r+") as file:  # as the training loop does
        file.truncate(size)
    run.watch.rewind(20)
    assert state(run.watch) == before
    run.train_steps(21, 40, noise=0.0)
    assert run.watch.summary()["looks"] == 20
    assert not any("thrashing" in alarm for alarm in run.watch.summary()["alarms"])


def test_rewind_works_without_truncated_metrics(tmp_path: Path) -> None:
    run = Run(tmp_path, 200)
    run.train_steps(1, 8)
    before = state(run.watch)
    run.train_steps(9, 12)
    run.watch.rewind(8)
    assert state(run.watch) == before
    run.watch.rewind(0)
    assert run.watch.summary() == {"looks": 0, "alarms": []}
