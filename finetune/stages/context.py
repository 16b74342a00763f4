"""Context of one run: recipe, run folder, record, and the summary at its end. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from finetune.files import write_atomic
from finetune.processes import is_main_process, world_size
from finetune.recipe import Recipe, dump_recipe
from finetune.record import DataSource, EvalRecord, Phase, PreflightRecord, Provenance, Record, Resumed
from finetune.run_dir import RunDir, check_resumable, choose_dir, same_data, with_fit_changes
from finetune.screen import Screen
from finetune.units import clock, number

if TYPE_CHECKING:
    from finetune.stages.planning import PlannedRun
    from finetune.stages.preflight import Checked
    from finetune.train.fast.patching import FastStep


@dataclass
class RunContext:
    """State of one run. fresh: its folder did not exist before.

    record, checked and planned are set as soon as the run has reached them.
    """

    name: str
    recipe: Recipe
    run_dir: RunDir
    screen: Screen
    command: str
    resume: bool
    force: bool
    fresh: bool
    done: bool = False
    record: Record | None = None
    checked: Checked | None = None
    planned: PlannedRun | None = None
    patches: FastStep | None = None  # while they are installed
    earlier_phases: list[Phase] = field(default_factory=list)  # of the processes before a resume

    @property
    def path(self) -> Path:
        return self.run_dir.path

    @classmethod
    def begin(
        cls, name: str, recipe: Recipe, run_dir: RunDir, screen: Screen, command: str, *, resume: bool, force: bool
    ) -> RunContext:
        """The context of a new or resumed run. command: as typed.

        Raises:
            UserError: the run cannot be resumed.
        """
        context = cls(name, recipe, run_dir, screen, command, resume, force, fresh=not run_dir.path.exists())
        if resume:
            context.recipe = with_fit_changes(recipe, run_dir.read()) if run_dir.exists else recipe
            check_resumable(run_dir, context.recipe)
        return context

    def is_done(self) -> bool:
        """Whether a resumed run has nothing left to do; if so, it says that and makes sure that the report exists."""
        if not self.resume or (record := self.run_dir.read()).state != "done":
            return False
        self.record, self.done = record, True
        self.run_dir.acquire()
        self.run_dir.release()  # removes the lock file of a process that was killed at its very end
        self.screen.say(f"{self.path} is already done")
        if not (self.path / "report.html").exists():
            from finetune.report import write_report

            write_report(self.path)
        return True

    def open_record(self, checked: Checked) -> Record:
        """Read the record again now that the folder is locked, or create it, with the resolved recipe.

        Raises:
            UserError: the data of a resumed run has changed.
        """
        from finetune import provenance

        recipe, run_dir = self.recipe, self.run_dir
        if self.resume:
            record = run_dir.read()
            # Before self.record is set: an error leaves run.json unchanged.
            same_data(record, checked.data.digest, checked.data.record(), run_dir.path)
            record.state, record.error = "running", None
        else:
            collected = provenance.collect(checked.device, recipe.run.seed, self.command)
            record = Record(
                version=Record.model_fields["version"].default,
                name=self.name,
                kind=recipe.kind,
                about=recipe.about,
                state="running",
                error=None,
                provenance=Provenance(**collected, started=now(), finished=None, seconds=0.0, resumed=[]),
                phases=[],
                eval=EvalRecord(),
                samples=[],
            )
            if is_main_process():
                write_atomic(run_dir.path / "recipe.yaml", dump_recipe(recipe))
        record.data = data = checked.data.record()
        record.preflight = PreflightRecord(**checked.data.preflight.as_dict(), forced=checked.forced)
        rows = getattr(data, "rows", None)  # unknown for a stream
        record.provenance.data = DataSource(source=checked.data.source, sha256=checked.data.digest, rows=rows)
        if recipe.run.trackers and record.tracker_id is None:
            record.tracker_id = secrets.token_hex(4)
        self.record, self.earlier_phases = record, record.phases
        self.save()
        return record

    def save(self, *, finished: bool = False) -> None:
        """Write the record with this process's phases so far. finished: set the time at which the run finished."""
        record = self.record
        assert record is not None
        if finished:
            record.provenance.finished = now()
        record.phases = self.earlier_phases + [Phase(**phase, process=os.getpid()) for phase in self.screen.phases]
        record.provenance.seconds = round(sum(phase.seconds for phase in record.phases), 1)
        self.run_dir.write(record)

    def note_resume(self, checkpoint: Path | None) -> None:
        """Record immediately that the run was resumed, and from which checkpoint."""
        assert self.record is not None
        name = checkpoint.name if checkpoint is not None else None
        resumed = Resumed(time=now(), checkpoint=name)
        if world_size() > 1:
            resumed.processes = world_size()
        self.record.provenance.resumed.append(resumed)
        self.save()

    def remove_patches(self) -> None:
        """Give the model and the libraries their own functions back."""
        if self.patches is not None:
            self.patches.remove()
        self.patches = None  # it refers to the model

    def print_summary(self) -> None:
        """Print the result and the next commands, in the main process."""
        record, screen, run_dir = self.record, self.screen, self.path
        if record is None or not self.run_dir.writes:
            return
        before, after = record.eval.before, record.eval.after
        if before is not None and after is not None and record.eval.difference is not None:
            line = (
                f"\nheld-out loss {number(before.loss, 3)} → {number(after.loss, 3)} nats ({record.eval.difference:+.3f} ± "
                f"{number(record.eval.difference_stderr, 3)}), perplexity {number(before.perplexity, 2)} → "
                f"{number(after.perplexity, 2)}; {clock(record.provenance.seconds)} in total"
            )
            screen.say(Text(line, "bold red" if record.eval.got_worse else ""))
            for advice in self._advice(record):
                screen.say(Text(advice, "yellow"))
        screen.say(f"\nreport   {run_dir / 'report.html'}")
        for line in record.next or []:
            screen.say(f"next     {line}")

    def _advice(self, record: Record) -> list[str]:
        """What to do if the model got worse, was better at another step, or is worse than the float model that it was."""
        from finetune.report.folder import RunFiles

        lines, after, baseline = [], record.eval.after, record.eval.float_model
        rate = self.recipe.train.lr
        if record.eval.got_worse:
            lines.append(
                f"the model got worse: lower the learning rate, such as train.lr={min(rate / 10, 2e-4):g}, or train less"
            )
        if baseline is not None and after is not None and baseline.loss is not None and after.loss is not None:
            more = after.loss - baseline.loss
            lines.append(f"the float model had {number(baseline.loss, 3)} nats before it was made ternary ({more:+.3f} now)")
        files = RunFiles.read(self.path)
        partly_float = {entry["step"] for entry in files.metrics.evaluations if entry.get("eval_blend", 1) < 1}
        points = [point for point in files.held_out() if point[0] not in partly_float]
        step, loss, _ = min(points, key=lambda point: point[1], default=(0.0, 0.0, 0.0))
        if len(points) > 2 and loss < points[-1][1]:
            where = f"at step {step:.0f}" if step else "before training"
            lines.append(
                f"the lowest held-out loss was {number(loss, 3)} {where}"
                + ("; train.load_best_at_end=true keeps that model" if step and not self.recipe.train.load_best_at_end else "")
            )
        return lines

    def next_commands(self) -> list[str]:
        """Commands to type after a successful run."""
        recipe, run_dir = self.recipe, self.path
        commands = [f"finetune chat {run_dir}{f' {run_dir}/twin' if recipe.twin else ''}", f"finetune show {run_dir}"]
        if recipe.mergeable and not recipe.run.merge:
            commands.append(f"finetune merge {run_dir} --out {run_dir}/merged")
        return commands


class Done(NamedTuple):
    """A successful run: its folder and run.json."""

    path: Path
    record: Record


def release(stages: Iterable[RunContext]) -> None:
    """Unlock the run folders."""
    for stage in stages:
        stage.remove_patches()
        stage.run_dir.release()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def agreed_dir(recipe: Recipe, name: str, resume: bool) -> Path:
    """The run folder, chosen by the main process and broadcast to the others."""
    if world_size() == 1:
        return choose_dir(recipe, name, resume)
    from finetune.models.device import pick_device
    from finetune.train import parallel

    parallel.init_distributed(pick_device(recipe.run.device).type)
    return Path(parallel.broadcast_object(str(choose_dir(recipe, name, resume)) if is_main_process() else None))


@contextlib.contextmanager
def recipe_threads(recipe: Recipe) -> Iterator[None]:
    """Set torch's number of threads to `run.threads` within the block."""
    import torch

    before = torch.get_num_threads()
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C within the block: partial files are removed, and the end of the run is recorded."""
    before = {}
    for which in (signal.SIGTERM, signal.SIGHUP):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(which) is signal.SIG_DFL:
            before[which] = signal.signal(which, signal.default_int_handler)
    try:
        yield
    finally:
        for which, old in before.items():
            signal.signal(which, old)
