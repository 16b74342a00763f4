"""The schedule: learning rate, weight decay and λ (share of the ternary weight) of every step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from finetune.recipe import Quant, Train
from finetune.train.schedule import Schedule


def test_learning_rate_warms_up_and_decays() -> None:
    cosine = Schedule(100, 1.0, "cosine", warmup=0.1, min_lr=0.1)
    rates = [cosine.rate(step) for step in range(1, 101)]
    assert max(rates) == rates[10] == pytest.approx(1.0, abs=1e-3)
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert dataclasses.replace(cosine, name="linear").rate(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert dataclasses.replace(cosine, name="constant").rate(100) == 1.0


def rate_of_f4a9b44(step: int, total: int, *, peak: float, schedule: str, warmup: float, min_lr: float) -> float:
    """The formula of commit f4a9b44 with its order of operations; runs with checkpoints of that time must resume with it."""
    warmup_steps = round(warmup * total)
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    if schedule == "two_stage":
        second_stage = max(warmup_steps, round(0.5 * total))
        if step <= second_stage:
            return peak * (1 - (1 - 8 / 15) * (step - warmup_steps) / max(1, second_stage - warmup_steps))
        final = min(min_lr, 1 / 3)
        return peak * (final + (1 / 3 - final) * (total - step) / max(1, total - second_stage))
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (min_lr + (1 - min_lr) * decay)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "two_stage"])
def test_rates_are_bit_equal_to_those_of_older_runs(name: Any) -> None:
    """Otherwise older runs would not resume bit-equal."""
    grid = (1, 7, 100, 997), (0.0, 0.03, 0.3), (0.0, 0.1, 0.5), (2e-4, 1e-3 / 3, 1.5e-3)
    for total, warmup, min_lr, peak in itertools.product(*grid):
        train = Train(lr=peak, schedule=name, warmup=warmup, min_lr=min_lr)
        schedule = Schedule.of(train, total)
        for step in range(1, total + 1):
            expected = rate_of_f4a9b44(step, total, peak=peak, schedule=name, warmup=warmup, min_lr=min_lr)
            assert schedule.rate(step) == schedule.rate(step, peak) == expected
            assert peak * schedule.factor(step) == pytest.approx(expected, rel=1e-15)
            assert schedule.decays(step) == (name != "two_stage" or step <= round(total / 2))


def test_each_parameter_group_keeps_its_own_peak_and_decay() -> None:
    schedule = Schedule(10, 1e-3, "two_stage")
    groups: list[dict[str, Any]] = [
        {"peak_lr": 1e-3, "peak_weight_decay": 0.1, "lr": 0.0, "weight_decay": 0.0},
        {"peak_lr": 1.6e-2, "peak_weight_decay": 0.3, "lr": 0.0, "weight_decay": 0.0},  # as in LoRA+
    ]
    for step in range(1, 11):
        schedule.set_rates(groups, step)
        assert groups[0]["lr"] == schedule.rate(step)
        assert groups[1]["lr"] == pytest.approx(16 * schedule.rate(step))
        assert [group["weight_decay"] for group in groups] == ([0.1, 0.3] if step <= 5 else [0.0, 0.0])


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_blend_rises_to_one(shape: Any) -> None:
    schedule = Schedule.of(Train(), 20, Quant(scheme="ternary", warmup=0.5, warmup_shape=shape))
    blend = [schedule.blend(step) for step in range(1, 21)]
    assert all(a < b for a, b in itertools.pairwise(blend[:11]))
    assert 0 < blend[0] < blend[9] < 1
    assert blend[10:] == [1.0] * 10
    assert Schedule.of(Train(), 20).blend(1) == 1.0
