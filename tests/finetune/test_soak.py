"""One long run that is killed, interrupted and gets damaged checkpoints ends bit-equal, and its memory does not grow.

SOAK_MINUTES=60 makes it longer. The memory samples are in samples.json in the test's folder.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.conftest import alpaca, write_jsonl
from tests.finetune.kills import Start, Take, contents, seed

RECIPE = """\
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4}}
adapter: {{rank: 8, dropout: 0.1}}
data: {{path: {rows}, max_length: 128, heldout: 4}}
train: {{epochs: 100000, max_steps: {steps}, save_steps: 50, eval_steps: {every}, accumulation: 2, keep_checkpoints: 3}}
eval: {{samples: 1, max_new_tokens: 4}}
run: {{device: cpu, threads: 1}}
"""
MINUTES = float(os.environ.get("SOAK_MINUTES", "5"))
SAMPLE_SECONDS = 0.25  # seconds between samples
EVAL_STEPS = 170
GROWTH_LIMIT = 1.0  # MiB per 1000 steps (1 KiB a step); measured: 0.1 in the clean run, 0.3 to 0.5 in the others


class MemorySampler:
    """Samples the memory of a start while it trains."""

    def __init__(self, start: Start, run: Path) -> None:
        self.start, self.metrics, self.process = start, run / "metrics.jsonl", psutil.Process(start.pid)
        self.samples: list[tuple[int, int]] = []  # (step, resident bytes)
        self.next_sample = time.monotonic()

    def sample(self) -> bool:
        if time.monotonic() >= self.next_sample and self.start.phase() == "train":
            self.next_sample = time.monotonic() + SAMPLE_SECONDS
            step, before = last_step(self.metrics), self.samples[-1][0] if self.samples else None
            if step is not None and step != before and self.start.code is None:
                self.samples.append((step, self.process.memory_info().rss))
        return False

    def settled_samples(self) -> np.ndarray | None:
        """(steps, MiB) of the second half. None if it is short or may hold the first evaluation, which keeps its memory."""
        half = np.array(self.samples[len(self.samples) // 2 :], dtype=float).reshape(-1, 2)
        if len(half) < 20 or half[0, 0] - self.samples[0][0] < EVAL_STEPS or half[-1, 0] - half[0, 0] < EVAL_STEPS:
            return None
        return half / (1, 2**20)


def growth(samplers: list[MemorySampler]) -> float | None:
    """MiB per 1000 steps: the common least-squares slope of several starts, each with its own intercept."""
    centred = [half - half.mean(0) for sampler in samplers if (half := sampler.settled_samples()) is not None]
    if not centred:
        return None
    steps, memory = np.concatenate(centred).T
    return float(steps @ memory / (steps @ steps) * 1000)


def last_step(metrics: Path) -> int | None:
    """The step of the last complete line."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, IndexError, ValueError):
        return None


def damage(run: Path, kind: str, rng: random.Random) -> Path | None:
    """Damage one file of the newest checkpoint. Returns its path, or None where there is no checkpoint."""
    newest = sorted(run.glob("checkpoints/step-*"))[-1:]
    if not newest:
        return None
    path = rng.choice(sorted(newest[0].iterdir()))
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return path


def shuffled_forever(rng: random.Random, *items: Any) -> Any:
    """All items in random order, repeated forever, so that every item occurs."""
    return itertools.chain.from_iterable(rng.sample(items, len(items)) for _ in itertools.count())


@pytest.mark.slow
def test_soak_run_ends_bit_equal_and_its_memory_does_not_grow(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, recipe = random.Random(seed()), tmp_path / "soak.yaml"
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(60))

    def write_recipe(steps: int) -> None:
        recipe.write_text(RECIPE.format(model=tiny_model, rows=rows, steps=steps, every=EVAL_STEPS))

    write_recipe(200)
    short = Take(str(recipe), tmp_path / "short", rng)
    short.whole()
    lines = [json.loads(line) for line in (short.run / "metrics.jsonl").read_text().splitlines()]
    write_recipe(
        max(200, int(MINUTES / 3 * 60 / statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)))
    )

    samplers: list[MemorySampler] = []
    uninterrupted = Take(str(recipe), tmp_path / "uninterrupted", rng)
    started = time.monotonic()
    with uninterrupted.start(forked=False) as start:
        samplers.append(MemorySampler(start, uninterrupted.run))
        start.wait(MINUTES * 60 * 3, samplers[-1].sample, every=SAMPLE_SECONDS)
        assert uninterrupted.ended(start)
    seconds = time.monotonic() - started

    interrupted = Take(str(recipe), tmp_path / "cut", rng)
    signal_names = shuffled_forever(rng, "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")
    damages = shuffled_forever(rng, "flipped", "truncated", "missing", *[None] * 5)
    waits = shuffled_forever(rng, 0.05, 0.05, 0.05, 0.3)  # as a share of the seconds of the clean run
    events: list[str] = []
    while True:
        assert interrupted.starts < 500, "the run does not end"
        with interrupted.start() as start:
            sampler, signal_name = MemorySampler(start, interrupted.run), next(signal_names)
            samplers.append(sampler)
            start.wait(1 + rng.random() * max(4.0, next(waits) * 2 * seconds), sampler.sample, every=SAMPLE_SECONDS)
            training = start.code is None and start.phase() == "train"
            code = start.send(signal.Signals[signal_name])
            events.append(f"{signal_name} at step {last_step(interrupted.run / 'metrics.jsonl')} → {code}")
            if interrupted.ended(start, -signal.Signals[signal_name], 130):
                break
            if training and code == 130:
                step = last_step(interrupted.run / "metrics.jsonl")
                saved = step is None or (interrupted.run / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
                assert saved, start.said(f"{signal_name}: step {step} is lost")
        if (kind := next(damages)) is not None and (damaged := damage(interrupted.run, kind, rng)):
            interrupted.damaged.add(damaged.parent)
            events.append(f"{kind}: {damaged.relative_to(interrupted.run)}")

    names = [str(sampler.start.log.relative_to(tmp_path).with_suffix("")) for sampler in samplers]
    slopes = {name: growth([sampler]) for name, sampler in zip(names, samplers, strict=True)}
    rounded_slopes = {name: round(slope, 2) for name, slope in slopes.items() if slope is not None}
    clean, resumed = growth(samplers[:1]), growth(samplers[1:])
    sampled = {name: sampler.samples for name, sampler in zip(names, samplers, strict=True)}
    (tmp_path / "samples.json").write_text(json.dumps({"slopes": slopes, "samples": sampled, "story": events}))
    damage_notes = sum(log.read_text().count("damaged checkpoint") for log in interrupted.place.glob("*.log"))
    with capsys.disabled():
        print(
            f"\n{interrupted.starts} starts, {len(events)} events; {damage_notes} damaged checkpoints were reported; "
            f"MiB per 1000 steps: {rounded_slopes}"
        )
        print("\n".join(events), f"\nsamples: {tmp_path / 'samples.json'}")

    # Compare only the last checkpoint: signals cause checkpoints at other steps.
    expected, actual = (
        {path: value for path, value in contents(run).items() if not path.startswith("checkpoints/") or last.name in path}
        for last in [sorted(uninterrupted.run.glob("checkpoints/step-*"))[-1]]
        for run in (uninterrupted.run, interrupted.run)
    )
    assert expected == actual, f"KILL_SEED={seed()}"
    assert not [*interrupted.run.rglob(".*")], "temporary files are left"
    assert any("SIGKILL" in event for event in events)
    assert any("SIGTERM" in event and event.endswith("130") for event in events)
    assert any("SIGINT" in event and event.endswith("130") for event in events)
    assert damage_notes
    assert clean is not None
    assert clean < GROWTH_LIMIT, rounded_slopes
    assert resumed is None or resumed < GROWTH_LIMIT, rounded_slopes  # one start alone can be too short
