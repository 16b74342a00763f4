"""Real runs in processes of their own that are killed at any moment and started again, as a user would, until they are done.

    take = Take("tiny.yaml", place, rng)         # the run is place/run, what each start said place/start-NNN.log
    report = kill_until_done(take, seconds=4.0)  # how long a whole run takes; checks the folder after every kill
    assert differences(whole, take.run) == []    # beside the folder of a run that nobody stopped

Only the outside is seen: the command line, the run's folder, processes and signals. Most starts are forks of a server that has
imported the libraries (tests/support/starts.py); some are plain `python -m finetune.cli`, which have another order of sets as
well.
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

PLAIN_SECONDS = 4.0  # what the imports of a plain start take
CLOCK = ("tokens_per_second", "step_seconds", "memory_bytes", "time")
SAVE, MARK = (
    ".step-",
    ".finetune-new",
)  # begin and end of the names under which a file or folder is written, beside its place (finetune/files.py)


def seed() -> int:
    return int(os.environ.get("KILL_SEED", "1"))


class Start(starts.Start):
    """A start whose failures say how to repeat them."""

    def said(self, what: str) -> str:
        return f"{super().said(what)}\nKILL_SEED={seed()}"


# ------------------------------------------------------------------------------------------------------- one run, many starts


class Take:
    """One run that is started again and again until it is done; decides what its user types next."""

    def __init__(self, recipe: str, place: Path, rng: random.Random, environment: Mapping[str, str] = {}) -> None:
        self.place, self.rng, self.environment = place, rng, environment
        self.run = place / "run"
        self.anew = ["run", recipe, "run.dir=run"]
        self.words, self.starts, self.refused = self.anew, 0, 0
        self.damaged: set[Path] = set()  # checkpoints that a test has damaged itself

    def start(self, *, forked: bool = True) -> Start:
        self.place.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        log = self.place / f"start-{self.starts:03d}.log"
        return Start(self.words, self.place, log, forked=forked, environment=self.environment)

    def ended(self, start: Start, *allowed: int) -> bool:
        """Whether the run is done, once a start has ended; chooses the next words.

        Raises:
            AssertionError: it ended with another code than 0, those allowed, or 2 for what a user can mend by typing `run`;
                or it left what is neither complete nor absent.
        """
        if start.code == 0:
            assert json.loads((self.run / "run.json").read_text())["state"] == "done", start.said("exit code 0, and not done")
            return True
        if start.code == 2 and start.words is not self.anew:  # killed before there was a record: nothing to resume
            assert not (self.run / "run.json").exists(), start.said("refused to resume")
            self.refused += 1
            self.words = self.anew
            return False
        assert start.code in allowed, start.said("ended badly")
        if wrong := unsound(self.run, self.damaged):
            raise AssertionError(start.said(f"after {start.code} in '{start.phase()}': {wrong}"))
        self.words = self.rng.choice([[*self.anew, "--resume"], ["resume", "run"]])
        return False

    def whole(self, *, forked: bool = False) -> float:
        """Run it without a stop; returns the seconds."""
        begun = time.monotonic()
        with self.start(forked=forked) as start:
            start.wait(600)
            assert self.ended(start)
        return time.monotonic() - begun


@dataclass
class Report:
    """What kills hit. `kills`: the phase and the names of what was being written, of each."""

    kills: list[tuple[str, list[str]]] = field(default_factory=list)
    runs: int = 0
    starts: int = 0
    refused: int = 0  # nothing to resume: killed before run.json
    seconds: float = 0.0

    @property
    def in_saves(self) -> int:
        return sum(any(name.startswith(SAVE) for name in names) for _, names in self.kills)

    @property
    def in_writes(self) -> int:
        return sum(any(not name.startswith(SAVE) for name in names) for _, names in self.kills)

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
    take: Take, *, seconds: float, inside_saves: float = 0.35, inside_writes: float = 0.15, plain: float = 0.08
) -> Report:
    """Kill each start of a run that takes `seconds`, until one gets through.

    A share of the kills waits for one of the next checkpoints, or for anything else, to be written, and comes up to 20 ms after
    that began; the others come at a moment that is uniform over the whole of a run. plain: share of the starts that are no forks.
    """
    report, rng, begun = Report(runs=1), take.rng, time.monotonic()
    while True:
        assert take.starts < 200, f"{take.place}: no end in sight"
        aim, forked, left_over = rng.random(), rng.random() >= plain, writing(take.run)
        with take.start(forked=forked) as start:
            if aim < inside_saves + inside_writes:
                saves = aim < inside_saves
                if start.wait(600, _under_way(take.run, left_over, rng.randint(1, 3), saves), every=0.0002):
                    start.wait(rng.random() ** 2 * (0.02 if saves else 0.002), every=0.0002)
            else:
                start.wait(rng.random() * (seconds if forked else seconds + PLAIN_SECONDS))
            if start.send(signal.SIGKILL) == -signal.SIGKILL:
                hit = sorted({name for name, _ in writing(take.run) - left_over})
                report.kills.append((start.phase(), hit))
            if take.ended(start, -signal.SIGKILL):
                break
    report.starts, report.refused, report.seconds = take.starts, take.refused, time.monotonic() - begun
    return report


def _under_way(run: Path, left_over: set[tuple[str, int]], number: int, saves: bool) -> Callable[[], bool]:
    """A question that is answered yes while the `number`-th save (or other write) from now on, or a later one, is under way."""
    met: set[str] = set()

    def asked() -> bool:
        new = {name for name, _ in writing(run) - left_over if name.startswith(SAVE) == saves}
        met.update(new)
        return bool(new) and len(met) >= number

    return asked


# -------------------------------------------------------------------------------------------------------------- the folder


def writing(run: Path) -> set[tuple[str, int]]:
    """(name, when it changed) of what is being written in a run's folder, or was when it was killed."""
    found = set()
    for folder, folders, files in os.walk(run):
        for name in folders + files:
            if name.endswith(MARK):
                with contextlib.suppress(FileNotFoundError):
                    found.add((name, os.stat(os.path.join(folder, name)).st_mtime_ns))
        folders[:] = [name for name in folders if not name.endswith(MARK)]
    return found


def unsound(run: Path, but: Collection[Path] = ()) -> str | None:
    """What of a run's folder is neither complete nor absent, but for those checkpoints, or None."""
    for path in [*run.rglob("run.json"), *run.glob("eval/*.json"), *run.glob("samples/*.json")]:
        json.loads(path.read_text())
    for path in run.rglob("checkpoints/step-*"):
        if path in but:
            continue
        if not (path / "manifest.json").exists():
            return f"{path} has no manifest"
        for name, facts in json.loads((path / "manifest.json").read_text()).items():
            if not (path / name).exists() or hashlib.sha256((path / name).read_bytes()).hexdigest() != facts["sha256"]:
                return f"{path / name} is not what the manifest says"
    return None


def contents(run: Path) -> dict[str, Any]:
    """All that a run leaves, by its path in the folder, without clocks and without what a tracker wrote."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        value: Any = hashlib.sha256(path.read_bytes()).hexdigest()
        if "tfevents" in path.name or path.name == "hparams.yml":
            continue
        if path.name == "report.html":
            value = "· done</title>" in path.read_text()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            value = [{key: item for key, item in line.items() if key not in CLOCK} for line in lines]
        elif path.name in ("run.json", "state.json", "manifest.json", "adapter_config.json"):
            value = json.loads(path.read_text())
        elif path.name == "recipe.yaml":
            value = path.read_text().replace(str(run), "")  # a twin's names the tokenizer of its run
        if path.name == "run.json":
            told = ("kind", "state", "error", "eval", "samples", "data", "preflight", "model", "merge", "exports", "ternary")
            value = {key: value.get(key) for key in told} | {"tokens": value["train"]["tokens"]}
        elif path.name == "state.json":
            del value["metrics_bytes"]  # the lines have clocks in them
        elif path.name == "manifest.json":
            del value["state.json"]
        elif path.name == "adapter_config.json":
            value["target_modules"].sort()  # PEFT writes a set
        found[str(path.relative_to(run))] = value
    return found


def differences(whole: Path, cut: Path) -> list[str]:
    """Where the folder of a run that was stopped differs from that of one that was not; nothing half-written counts as equal."""
    expected, found = contents(whole), contents(cut)
    wrong = [f"{path}: only in one of them" for path in sorted(expected.keys() ^ found.keys())]
    wrong += [f"left behind: {path}" for path in cut.rglob(".*")]
    return wrong + [f"{path} differs" for path in sorted(expected.keys() & found.keys()) if expected[path] != found[path]]


def tracked(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar in a folder of event files, as tensorboard's own reader has them."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()[SCALARS]}
