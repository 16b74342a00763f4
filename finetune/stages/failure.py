"""Handling a failed or stopped run: no partial files, the reason in its record, and an error that says what to type."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import GateError, Interruption, UserError
from finetune.files import DiskError, disk_error
from finetune.run_dir import with_checkpoint
from finetune.stages.context import RunContext


def on_failure(contexts: Sequence[RunContext], error: BaseException) -> BaseException:
    """Record in each run folder how it ended, and return the error to raise.

    contexts: the run and the stages that were started in it; the error came from the last one.
    """
    if not contexts:
        return error
    run, last = contexts[0], contexts[-1]
    if isinstance(error, Exception) and "torch" in sys.modules and (stop := _out_of_memory(last, error)) is not None:
        error = stop
    elif isinstance(error, Exception) and not isinstance(error, UserError) and (refused := disk_error(error)) is not None:
        error = refused
    if isinstance(error, DiskError) and _has_trained(run):
        error = with_checkpoint(error, run.path)
    for context in reversed(contexts):
        _record(context, error, run.path)
    if isinstance(error, KeyboardInterrupt) and run.record is not None and run.run_dir.exists:
        return Interruption("stopped", hint=f"finetune resume {run.path}")
    if isinstance(error, Interruption):
        return Interruption(error.message, hint=f"finetune resume {run.path}")  # the run, not the stage inside it
    return error


def _has_trained(context: RunContext) -> bool:
    return (context.run_dir.path / "checkpoints").is_dir() or context.run_dir.metrics.exists()


def _record(context: RunContext, error: BaseException, resumable: Path) -> None:
    """Remove the folder of a run that has not trained; otherwise record why the run ended."""
    path, record = context.run_dir.path, context.record
    if record is None or context.done or not context.run_dir.writes:
        return
    stopped = isinstance(error, KeyboardInterrupt | Interruption)
    if context.fresh and not _has_trained(context) and (stopped or isinstance(error, UserError)):
        shutil.rmtree(path, ignore_errors=True)
        return
    record.state, record.error = "stopped" if stopped else "failed", str(error) or type(error).__name__
    record.next = [f"finetune resume {resumable}"]
    try:
        context.save()
        from finetune.report import write_report

        write_report(path)
    except Exception as second:  # the first error is the one to show
        context.screen.warn(f"could not record how the run ended: {second}")


def _out_of_memory(context: RunContext, error: Exception) -> GateError | None:
    """The GateError for running out of memory when the batch cannot be halved further; None for any other error."""
    from eval.model_state import forget, out_of_memory
    from finetune.stages.planning import with_what_would_fit
    from finetune.train.loop import NoMemory

    if isinstance(error, NoMemory):
        stop: GateError = error
    elif out_of_memory(error):
        path = context.run_dir.path
        trained = context.record is not None and (path / "checkpoints").is_dir()
        hint = f"free some memory; finetune resume {path} continues from the last checkpoint" if trained else None
        stop = GateError(f"out of memory in phase {context.screen.now!r}", where=str(path), got=forget(error), hint=hint)
    else:
        return None
    if context.planned is None or context.checked is None:
        return stop
    return with_what_would_fit(stop, context.planned, context.name, context.checked)
