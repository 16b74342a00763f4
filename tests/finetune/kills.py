"""Kills real runs in separate processes at random moments and starts them again, as a user would, until they are done.

    take = Take("tiny.yaml", place, rng)                # the run folder is place/run; the logs are place/start-NNN.log
    report = kill_until_done(take, seconds=4.0)         # seconds: of an uninterrupted run; checks the folder after every kill
    assert differences(uninterrupted, take.run) == []   # compare with the folder of an uninterrupted run

Only the command line, the run's folder, processes and signals are used. Most starts are forks of a server that has imported the
libraries (tests/support/starts.py). Some are new interpreters (`python -m finetune.cli`), which also order sets differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import starts

IMPORT_SECONDS = 4.0  # of a new interpreter
TIMING_KEYS = ("tokens_per_second", "step_seconds", "memory_bytes", "time")
# finetune/files.py writes each file or folder under a temporary name next to its final one.
CHECKPOINT_PREFIX, TEMPORARY_SUFFIX = ".step-", ".finetune-new"


def seed() -> int:
    return int(os.environ.get("KILL_SEED", "1"))


class Start(starts.Start):
    """A start whose failure messages give the seed that repeats them."""

    def said(self, what: str) -> str:
        return f"{super().said(what)}\nKILL_SEED={seed()}"


# ------------------------------------------------------------------------------------------------------- one run, many starts


class Take:
    """One run that is started until it is done. It chooses the command line of the next start."""

    def __init__(self, recipe: str, place: Path, rng: random.Random, environment: Mapping[str, str] = {}) -> None:
        self.place, self.rng, self.environment = place, rng, environment
        self.run = place / "run"
        self.run_arguments = ["run", recipe, "run.dir=run"]
        self.arguments, self.starts, self.refused = self.run_arguments, 0, 0
        self.damaged: set[Path] = set()  # checkpoints that a test damaged on purpose

    def start(self, *, forked: bool = True) -> Start:
        self.place.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        log = self.place / f"start-{self.starts:03d}.log"
        return Start(self.arguments, self.place, log, forked=forked, environment=self.environment)

    def ended(self, start: Start, *allowed: int) -> bool:
        """Whether the run is done after an ended start. If not, choose the command line of the next start.

        Raises:
            AssertionError: the exit code is not 0, one of those allowed, or 2 because there was no run to resume yet;
                or the run folder contains something incomplete.
        """
        if start.code == 0:
            assert json.loads((self.run / "run.json").read_text())["state"] == "done", start.said(
                "exit code 0, but the run is not done"
            )
            return True
        if start.code == 2 and start.arguments is not self.run_arguments:  # killed before run.json existed: nothing to resume
            assert not (self.run / "run.json").exists(), start.said("refused to resume a run that has a record")
            self.refused += 1
            self.arguments = self.run_arguments
            return False
        assert start.code in allowed, start.said("unexpected exit code")
        if damage := find_damage(self.run, self.damaged):
            raise AssertionError(start.said(f"exit code {start.code} in phase '{start.phase()}': {damage}"))
        self.arguments = self.rng.choice([[*self.run_arguments, "--resume"], ["resume", "run"]])
        return False

    def whole(self, *, forked: bool = False) -> float:
        """Run without interruption; return the seconds."""
        started = time.monotonic()
        with self.start(forked=forked) as start:
            start.wait(600)
            assert self.ended(start)
        return time.monotonic() - started


@dataclass
class Report:
    """Where kills hit. kills: for each, the phase and the temporary names of what was being written."""

    kills: list[tuple[str, list[str]]] = field(default_factory=list)
    runs: int = 0
    starts: int = 0
    refused: int = 0  # starts with nothing to resume, after a kill before run.json existed
    seconds: float = 0.0

    @property
    def in_saves(self) -> int:
        return sum(any(name.startswith(CHECKPOINT_PREFIX) for name in names) for _, names in self.kills)

    @property
    def in_writes(self) -> int:
        return sum(any(not name.startswith(CHECKPOINT_PREFIX) for name in names) for _, names in self.kills)

    def __iadd__(self, other: Report) -> Report:
        self.kills += other.kills
        self.runs, self.starts = self.runs + other.runs, self.starts + other.starts
        self.refused, self.seconds = self.refused + other.refused, self.seconds + other.seconds
        return self

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {count}" for name, count in Counter(phase for phase, _ in self.kills).most_common())
        return (
            f"{self.runs} runs, {self.starts} starts, {len(self.kills)} kills: {self.in_saves} inside a save, {self.in_writes} "
            f"inside another write; {self.refused} had nothing to resume; {self.seconds:.0f} s; by phase: {phases}"
        )


def kill_until_done(
    take: Take, *, seconds: float, inside_saves: float = 0.35, inside_writes: float = 0.15, unforked_share: float = 0.08
) -> Report:
    """Kill each start of a run that takes `seconds`, until one finishes before its kill.

    The shares inside_saves and inside_writes of the kills hit a checkpoint save or another write, up to 20 ms after it starts.
    The others come at a time that is uniform over a run. unforked_share: of the starts, new interpreters instead of forks.
    """
    report, rng, started = Report(runs=1), take.rng, time.monotonic()
    while True:
        assert take.starts < 200, f"{take.place}: not done after 200 starts"
        draw, forked, left_over = rng.random(), rng.random() >= unforked_share, temporary_files(take.run)
        with take.start(forked=forked) as start:
            if draw < inside_saves + inside_writes:
                saves = draw < inside_saves
                if start.wait(600, _write_in_progress(take.run, left_over, rng.randint(1, 3), saves), every=0.0002):
                    start.wait(rng.random() ** 2 * (0.02 if saves else 0.002), every=0.0002)
            else:
                start.wait(rng.random() * (seconds if forked else seconds + IMPORT_SECONDS))
            if start.send(signal.SIGKILL) == -signal.SIGKILL:
                hit = sorted({name for name, _ in temporary_files(take.run) - left_over})
                report.kills.append((start.phase(), hit))
            if take.ended(start, -signal.SIGKILL):
                break
    report.starts, report.refused, report.seconds = take.starts, take.refused, time.monotonic() - started
    return report


def _write_in_progress(run: Path, left_over: set[tuple[str, int]], number: int, saves: bool) -> Callable[[], bool]:
    """A condition: the `number`-th checkpoint save (or other write) from now on, or a later one, is in progress."""
    names_so_far: set[str] = set()

    def in_progress() -> bool:
        new = {name for name, _ in temporary_files(run) - left_over if name.startswith(CHECKPOINT_PREFIX) == saves}
        names_so_far.update(new)
        return bool(new) and len(names_so_far) >= number

    return in_progress


# -------------------------------------------------------------------------------------------------------------- the folder


def temporary_files(run: Path) -> set[tuple[str, int]]:
    """(name, modification time) of the files and folders in a run's folder that are being written, or were at a kill."""
    temporary = set()
    for folder, folders, files in os.walk(run):
        for name in folders + files:
            if name.endswith(TEMPORARY_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    temporary.add((name, os.stat(os.path.join(folder, name)).st_mtime_ns))
        folders[:] = [name for name in folders if not name.endswith(TEMPORARY_SUFFIX)]
    return temporary


def find_damage(run: Path, ignored: Collection[Path] = ()) -> str | None:
    """The first incomplete checkpoint in a run's folder, outside those in `ignored`, or None. JSON files must be readable."""
    for path in [*run.rglob("run.json"), *run.glob("eval/*.json"), *run.glob("samples/*.json")]:
        json.loads(path.read_text())
    for path in run.rglob("checkpoints/step-*"):
        if path in ignored:
            continue
        if not (path / "manifest.json").exists():
            return f"{path} has no manifest"
        for name, facts in json.loads((path / "manifest.json").read_text()).items():
            if not (path / name).exists() or hashlib.sha256((path / name).read_bytes()).hexdigest() != facts["sha256"]:
                return f"{path / name} is not what the manifest says"
    return None


def contents(run: Path) -> dict[str, Any]:
    """The contents of a run's files by relative path, without times and without tracker files."""
    values: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        value: Any = hashlib.sha256(path.read_bytes()).hexdigest()
        if "tfevents" in path.name or path.name == "hparams.yml":
            continue
        if path.name == "report.html":
            value = "· done</title>" in path.read_text()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            value = [{key: item for key, item in line.items() if key not in TIMING_KEYS} for line in lines]
        elif path.name in ("run.json", "state.json", "manifest.json", "adapter_config.json"):
            value = json.loads(path.read_text())
        elif path.name == "recipe.yaml":
            value = path.read_text().replace(str(run), "")  # the recipe of a twin names the tokenizer in the folder of its run
        if path.name == "run.json":
            keys = ("kind", "state", "error", "eval", "samples", "data", "preflight", "model", "merge", "exports", "ternary")
            value = {key: value.get(key) for key in keys} | {"tokens": value["train"]["tokens"]}
        elif path.name == "state.json":
            del value["metrics_bytes"]  # depends on the times in the lines
        elif path.name == "manifest.json":
            del value["state.json"]
        elif path.name == "adapter_config.json":
            value["target_modules"].sort()  # PEFT writes a set, in any order
        values[str(path.relative_to(run))] = value
    return values


def differences(uninterrupted: Path, interrupted: Path) -> list[str]:
    """How the folder of an interrupted run differs from that of an uninterrupted one; temporary files count as differences."""
    expected, actual = contents(uninterrupted), contents(interrupted)
    messages = [f"{path}: only in one of the folders" for path in sorted(expected.keys() ^ actual.keys())]
    messages += [f"temporary file: {path}" for path in interrupted.rglob(".*")]
    return messages + [f"{path} differs" for path in sorted(expected.keys() & actual.keys()) if expected[path] != actual[path]]


def tracker_steps(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar in a folder of event files, read with tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()[SCALARS]}
