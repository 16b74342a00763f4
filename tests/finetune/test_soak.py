"""One long run that everything happens to: killed, told to stop, its newest checkpoint damaged; and its memory does not grow.

SOAK_MINUTES=60 makes it longer. What was sampled of its memory lies in the test's folder, samples.json.
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
EVERY = 0.25  # seconds between samples
EVAL_STEPS = 170
GROWTH = 1.0  # MiB per 1000 steps, 1 KiB a step, that pass for none; measured: 0.1 in the clean run, 0.3 to 0.5 in the others


class Watched:
    """Samples the memory of a start while it trains."""

    def __init__(self, start: Start, run: Path) -> None:
        self.start, self.metrics, self.process = start, run / "metrics.jsonl", psutil.Process(start.pid)
        self.samples: list[tuple[int, int]] = []  # (step, resident bytes)
        self.next = time.monotonic()

    def sample(self) -> bool:
        if time.monotonic() >= self.next and self.start.phase() == "train":
            self.next = time.monotonic() + EVERY
            step, before = last_step(self.metrics), self.samples[-1][0] if self.samples else None
            if step is not None and step != before and self.start.code is None:
                self.samples.append((step, self.process.memory_info().rss))
        return False

    def settled(self) -> np.ndarray | None:
        """(steps, MiB) of the second half; None where that is short, or may hold the first evaluation, whose memory is kept."""
        half = np.array(self.samples[len(self.samples) // 2 :], dtype=float).reshape(-1, 2)
        if len(half) < 20 or half[0, 0] - self.samples[0][0] < EVAL_STEPS or half[-1, 0] - half[0, 0] < EVAL_STEPS:
            return None
        return half / (1, 2**20)


def growth(stretches: list[Watched]) -> float | None:
    """MiB per 1000 steps: the least-squares slope that the stretches have in common, each with a level of its own."""
    apart = [half - half.mean(0) for stretch in stretches if (half := stretch.settled()) is not None]
    if not apart:
        return None
    steps, memory = np.concatenate(apart).T
    return float(steps @ memory / (steps @ steps) * 1000)


def last_step(metrics: Path) -> int | None:
    """The step of the last whole line."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, IndexError, ValueError):
        return None


def damage(run: Path, how: str, rng: random.Random) -> Path | None:
    """Damage one file of the newest checkpoint, as disks and people do; its path, or None where there is no checkpoint."""
    newest = sorted(run.glob("checkpoints/step-*"))[-1:]
    if not newest:
        return None
    path = rng.choice(sorted(newest[0].iterdir()))
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return path


def shuffled(rng: random.Random, *items: Any) -> Any:
    """All of them in any order, and so on for ever: none is left to chance."""
    return itertools.chain.from_iterable(rng.sample(items, len(items)) for _ in itertools.count())


@pytest.mark.slow
def test_soak(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, recipe = random.Random(seed()), tmp_path / "soak.yaml"
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(60))

    def write(steps: int) -> None:
        recipe.write_text(RECIPE.format(model=tiny_model, rows=rows, steps=steps, every=EVAL_STEPS))

    write(200)
    short = Take(str(recipe), tmp_path / "short", rng)
    short.whole()
    lines = [json.loads(line) for line in (short.run / "metrics.jsonl").read_text().splitlines()]
    write(max(200, int(MINUTES / 3 * 60 / statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line))))

    stretches: list[Watched] = []
    whole = Take(str(recipe), tmp_path / "whole", rng)
    begun = time.monotonic()
    with whole.start(forked=False) as start:
        stretches.append(Watched(start, whole.run))
        start.wait(MINUTES * 60 * 3, stretches[-1].sample, every=EVERY)
        assert whole.ended(start)
    seconds = time.monotonic() - begun

    take = Take(str(recipe), tmp_path / "cut", rng)
    ways = shuffled(rng, "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")
    damages = shuffled(rng, "flipped", "truncated", "missing", *[None] * 5)
    waits = shuffled(rng, 0.05, 0.05, 0.05, 0.3)  # times the seconds of the clean run, or a short one at least
    story: list[str] = []
    while True:
        assert take.starts < 500, "no end in sight"
        with take.start() as start:
            watched, way = Watched(start, take.run), next(ways)
            stretches.append(watched)
            start.wait(1 + rng.random() * max(4.0, next(waits) * 2 * seconds), watched.sample, every=EVERY)
            training = start.code is None and start.phase() == "train"
            code = start.send(signal.Signals[way])
            story.append(f"{way} at step {last_step(take.run / 'metrics.jsonl')} → {code}")
            if take.ended(start, -signal.Signals[way], 130):
                break
            if training and code == 130:
                step = last_step(take.run / "metrics.jsonl")
                saved = step is None or (take.run / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
                assert saved, start.said(f"{way}: step {step} is lost")
        if (how := next(damages)) is not None and (damaged := damage(take.run, how, rng)):
            take.damaged.add(damaged.parent)
            story.append(f"{how}: {damaged.relative_to(take.run)}")

    names = [str(stretch.start.log.relative_to(tmp_path).with_suffix("")) for stretch in stretches]
    slopes = {name: growth([stretch]) for name, stretch in zip(names, stretches, strict=True)}
    told = {name: round(slope, 2) for name, slope in slopes.items() if slope is not None}
    clean, resumed = growth(stretches[:1]), growth(stretches[1:])
    sampled = {name: stretch.samples for name, stretch in zip(names, stretches, strict=True)}
    (tmp_path / "samples.json").write_text(json.dumps({"slopes": slopes, "samples": sampled, "story": story}))
    notes = sum(log.read_text().count("damaged checkpoint") for log in take.place.glob("*.log"))
    with capsys.disabled():
        print(
            f"\n{take.starts} starts, {len(story)} events; {notes} damaged checkpoints were told of; MiB per 1000 steps: {told}"
        )
        print("\n".join(story), f"\nsamples: {tmp_path / 'samples.json'}")

    # Of checkpoints the last alone: one that a signal asked for is at a step of its own.
    expected, found = (
        {path: value for path, value in contents(run).items() if not path.startswith("checkpoints/") or last.name in path}
        for last in [sorted(whole.run.glob("checkpoints/step-*"))[-1]]
        for run in (whole.run, take.run)
    )
    assert expected == found, f"KILL_SEED={seed()}"
    assert not [*take.run.rglob(".*")], "left behind"
    assert any("SIGKILL" in event for event in story)
    assert any("SIGTERM" in event and event.endswith("130") for event in story)
    assert any("SIGINT" in event and event.endswith("130") for event in story)
    assert notes
    assert clean is not None
    assert clean < GROWTH, told
    assert resumed is None or resumed < GROWTH, told  # a stretch by itself can be too short to have settled
