"""The training loop, one for all tasks: a task supplies batches and `loss(model, batch) → (sum, count)`, the loop does the rest.

Gradient accumulation is exact because sums and counts are summed: the gradients of the micro-batches' loss sums are added up and
divided once by the number of targets, so any split of the same samples gives the gradient of one large batch (transformers
averaged averages; issue 34191 there).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from eval.model_state import forget, out_of_memory
from finetune.errors import GateError, UserError
from finetune.memory import PeakMemory, keep_freed_memory
from finetune.processes import world_size
from finetune.train import checkpoint, parallel
from finetune.train.checkpoint import Progress
from finetune.train.passes import Passes
from finetune.train.recovery import SPIKE_WINDOW, NoMemory, bad_step, no_memory, wrong
from finetune.train.schedule import Schedule
from finetune.train.signals import caught_signals
from finetune.train.task import Sampler, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.recipe import Train
    from finetune.run_dir import RunDir


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; a checkpoint was written."""


@dataclass(frozen=True)
class _Sums:
    """Sums over all micro-batches of a step and all processes. backward: whether any of them ran a backward pass."""

    loss: float
    count: int
    tokens: int
    backward: bool
    interrupted: bool


@dataclass(frozen=True)
class _Fetched:
    """A micro-batch of a step. index: (epoch, position)."""

    key: Any
    index: list[int]


@dataclass
class Training:
    """Training from `progress` to `total_steps`; checkpoints and metrics go into `folder`.

    `autocast` is the dtype of the matrix products where it is not that of the weights. `offload`: saved activations go to pinned
    CPU memory between forward and backward pass. `evaluate(step)` returns metrics and
    must leave the model and the random generators as they were; so must `before_step(step)`, and `after_step(step)`, whose
    metrics get a line of their own. An optimizer that steps inside the backward pass (`in_backward`) reports the gradient norm
    afterwards; a bad step has changed the weights by then, so the run rolls back to its last checkpoint.
    `went_back(step)` is called after a rollback, when the model, the optimizer and the metrics are those of `step` again.

    If memory runs out, the step restarts with each micro-batch split into twice as many parts. With several processes each takes
    its share of a step's micro-batches; the step is the same.
    """

    model: torch.nn.Module
    task: Task
    settings: Train
    _: KW_ONLY
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    total_steps: int
    folder: RunDir
    progress: Progress
    autocast: torch.dtype | None = None
    offload: bool = False
    evaluate: Callable[[int], dict[str, float]] | None = None
    before_step: Callable[[int], None] | None = None
    after_step: Callable[[int], dict[str, Any]] | None = None
    went_back: Callable[[int], None] | None = None
    show: Callable[[int, int, str], None] | None = None

    def __post_init__(self) -> None:
        self.device = self.accelerator.device
        self.parameters = list(checkpoint.trained(self.model).values())
        self.schedule = Schedule.of(self.settings, self.total_steps)
        self.in_backward = bool(getattr(self.optimizer, "in_backward", False))
        self.sharded = parallel.is_sharded(self.model)
        self.checkpoints = self.folder.path / "checkpoints"
        self.saver = checkpoint.Saver(self.checkpoints, self.settings.keep_checkpoints)
        self.passes = Passes(
            self.model, self.task, self.device, self.autocast, self.offload, in_backward=self.in_backward, sharded=self.sharded
        )
        self.saved = self.progress.step
        self.memory = PeakMemory(self.device)

    def run(self) -> dict[str, Any]:
        """Train.

        Returns:
            seconds, tokens_per_second (of this process's steps), saving_seconds (how long training waited for checkpoints),
            peak_bytes, memory_kind, and the totals of `progress`; `bad_steps` if there were any, `split` if memory ran out,
            and `best` with `train.save_best`.

        Raises:
            GateError: more bad steps (NaN, infinity, a spike) than the recipe allows; the last was not taken.
            NoMemory: not even one sample at a time fits.
            Interrupted: a signal came; the step is finished and saved.
            UserError: a checkpoint cannot be written.
            Errors of reading data (a malformed line, an unreachable hub) after the last step was saved.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        self.memory.reset()
        self.model.train()
        started, tokens_before, self.evaluating = time.monotonic(), self.progress.tokens, 0.0
        self.sampler = Sampler(self.task, self.progress)
        if (self.in_backward or self.settings.on_bad_step == "rollback") and not checkpoint.checkpoints(self.checkpoints):
            self._save(self.progress)  # so that there is a checkpoint to roll back to
        try:
            with caught_signals() as self.interrupted:
                while self.progress.step < self.total_steps:
                    self._step()
            self.saver.wait()
        except Exception:
            self.saver.wait()  # finish the checkpoint being written; a second Ctrl-C is not an Exception and does not wait
            raise
        finally:
            self.sampler.close()
        progress, seconds = self.progress, time.monotonic() - started - self.evaluating
        return {
            "steps": progress.step,
            "seconds": round(seconds, 3),
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised,
            "tokens_per_second": round((progress.tokens - tokens_before) / seconds, 1) if seconds else 0.0,
            "saving_seconds": round(self.saver.waited, 3),
            "peak_bytes": self.memory.peak(),
            "memory_kind": self.memory.kind,
            **({"bad_steps": progress.wrong} if progress.wrong else {}),
            **({"split": progress.split} if progress.split > 1 else {}),
            **({"best": progress.best} if progress.best else {}),
        }

    # -- one step

    def _step(self) -> None:
        settings, progress, started = self.settings, self.progress, time.monotonic()
        step = progress.step + 1
        self.schedule.set_rates(self.optimizer.param_groups, step)
        if self.before_step is not None:
            self.before_step(step)
        finished, self.generators, fetched = replace(progress), checkpoint.generators(), []
        data_error: Exception | None = None
        try:
            fetched = [self._fetch() for _ in range(settings.accumulation)]  # before any pass: an error here changes nothing
        except GateError:
            raise
        except Exception as error:
            data_error = error
        if parallel.any_rank(data_error is not None):
            self._save_unless_saved(finished)  # the last checkpoint may be hours old
            errors = parallel.all_gather_object(str(data_error) if data_error is not None else None)
            raise data_error or UserError("another process could not read its data", where="data", got=next(filter(None, errors)))
        try:
            sums = self._sums(step, [one.key for one in fetched])
        except NoMemory as error:
            if not (self.in_backward or self.sharded):  # the weights are those of the step before
                self._save_before_step(finished)
            raise NoMemory(error.message, where=error.where, got=error.got, hint=self._last_checkpoint()) from None
        mean = sums.loss / max(1, sums.count)
        if self.in_backward:
            unmeasured = 0.0 if math.isfinite(mean) else math.nan  # the optimizer still has the norm of the step before
            norm = self.optimizer.grad_norm() if sums.backward else unmeasured  # type: ignore[attr-defined]
        else:
            parallel.sum_gradients(self.parameters)
            if sums.count:
                parallel.scale_gradients(self.parameters, 1 / sums.count)
            norm = parallel.grad_norm(self.parameters)
        if (reason := wrong(step, mean, norm, progress.recent, settings.spike)) is not None:
            stop = bad_step(reason, self._samples(fetched), mean, norm, self.settings)
            self._skip_or_roll_back(step, fetched, stop, finished)
            return
        if not self.in_backward and settings.max_grad_norm and norm > settings.max_grad_norm:
            parallel.scale_gradients(self.parameters, settings.max_grad_norm / norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step, progress.tokens, progress.supervised = (
            step,
            progress.tokens + sums.tokens,
            progress.supervised + sums.count,
        )
        if settings.spike is not None:
            progress.recent = [*progress.recent, mean][-SPIKE_WINDOW:]
        self._log_step(step, fetched, sums, mean, norm, time.monotonic() - started)
        best = self._evaluate(step)
        self.saver.check()
        interrupted = sums.interrupted or (world_size() == 1 and self.interrupted())  # several processes must decide alike
        if (settings.save_steps and step % settings.save_steps == 0) or step == self.total_steps or interrupted or best:
            self._save(progress)
            if interrupted:
                raise Interrupted(f"stopped after step {step} of {self.total_steps}")

    def _fetch(self) -> _Fetched:
        key = self.sampler.next()
        return _Fetched(key, [self.progress.epoch, self.progress.position - 1])

    def _sums(self, step: int, keys: list[Any]) -> _Sums:
        """Forward and backward passes of a step's micro-batches; the gradients are those of this process's share.

        Raises:
            NoMemory: out of memory, and the micro-batches cannot be made smaller.
        """
        while True:
            failed = ""
            loss, count, tokens, backward = 0.0, 0, 0, False
            try:
                loss, count, tokens, backward = self.passes.run(keys, self.progress.split)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                failed = forget(error)
                if self.sharded:  # the others wait for this one's layers and cannot be notified
                    raise no_memory(step, failed, in_backward=self.in_backward, sharded=True) from None
            sums = [loss, float(count), float(tokens), float(bool(failed)), float(backward), float(self.interrupted())]
            loss, total, read, failures, backwards, interrupted = parallel.all_reduce_sum(sums)
            if not failures:
                return _Sums(loss, int(total), int(read), bool(backwards), bool(interrupted))
            self.optimizer.zero_grad(set_to_none=True)
            self._halve(step, keys, failed or "in another process")
            checkpoint.set_generators(self.generators)

    # -- bad steps

    def _halve(self, step: int, keys: list[Any], got: str) -> None:
        split = self.progress.split
        smaller = any(len(self.task.split(key, 2 * split)) > len(self.task.split(key, split)) for key in keys)
        if self.in_backward or not smaller:
            raise no_memory(step, got, in_backward=self.in_backward, sharded=self.sharded)
        self.progress.split = 2 * split
        self.folder.append({"step": step, "out_of_memory": {"parts": 2 * split, "found": got}})
        self._show(step - 1, f"out of memory: micro-batches are split into {2 * split} parts from step {step} on")

    def _samples(self, fetched: list[_Fetched]) -> list[str]:
        return [str(sample) for one in fetched for sample in self.task.samples(one.key)]

    def _skip_or_roll_back(self, step: int, fetched: list[_Fetched], stop: GateError, finished: Progress) -> None:
        """Continue after a bad step: with the next samples, or from the last checkpoint.

        Raises:
            GateError: the recipe stops here, or too many steps were bad. The steps before it are saved.
        """
        progress, settings = self.progress, self.settings
        back = self.in_backward or settings.on_bad_step == "rollback"
        self.optimizer.zero_grad(set_to_none=True)
        self.saver.wait()
        parallel.wait()  # the first process may have just written one
        path = checkpoint.newest(self.checkpoints)[0] if back else None
        if settings.on_bad_step == "stop" or progress.wrong >= settings.max_bad_steps or (back and path is None):
            if not self.in_backward:  # else the weights have taken the step already
                self._save_before_step(finished)
            raise GateError(stop.message, where=stop.where, got=stop.got, hint=f"{stop.hint}; {self._last_checkpoint()}")
        progress.wrong += 1
        event = {"found": stop.got, "where": stop.where, "samples": self._samples(fetched)}
        if path is None:
            self.folder.append({"step": step, "skipped": event})
            self._show(step - 1, f"step {step} skipped; continuing with the next samples")
            return
        restored, size = checkpoint.load(path, self.model, self.optimizer)
        restored.bad += [index for index in progress.bad + [one.index for one in fetched] if index not in restored.bad]
        restored.wrong, restored.split = progress.wrong, max(progress.split, restored.split)
        events = self.folder.cut_metrics(size, keep=("skipped", "rolled_back", "out_of_memory"))
        for line in [*events, {"step": restored.step, "rolled_back": {"from": step, **event}}]:
            self.folder.append(line)
        if self.went_back is not None:
            self.went_back(restored.step)
        self._show(restored.step, f"step {step} went wrong: rolled back to step {restored.step}; its samples are skipped")
        self.sampler.close()
        self.progress, self.saved = restored, restored.step
        self.sampler = Sampler(self.task, restored)

    # -- metrics and checkpoints

    def _show(self, step: int, note: str) -> None:
        if self.show is not None:
            self.show(step, self.total_steps, note)

    def _log_step(self, step: int, fetched: list[_Fetched], sums: _Sums, mean: float, norm: float, seconds: float) -> None:
        progress = self.progress
        length = self.task.length(progress.epoch)
        digest = hashlib.sha256("\n".join(self._samples(fetched)).encode()).hexdigest()[:16]
        metrics: dict[str, Any] = {
            "step": step,
            "epoch": round(progress.epoch + progress.position / length, 4) if length else progress.epoch,
            "loss": mean,
            **self.task.parts,
            "lr": self.schedule.rate(step),
            "grad_norm": norm,
            "tokens": progress.tokens,
            "supervised": progress.supervised,
            "samples": digest,  # equal where the same samples came in the same order
            "tokens_per_second": round(sums.tokens / seconds, 1),
            "step_seconds": round(seconds, 4),
            "memory_bytes": self.memory.peak(),
            "time": round(time.time(), 3),
        }
        self._log(step, metrics)
        if self.after_step is not None and (extra := self.after_step(step)):
            self.folder.append({"step": step, **extra})
        self._show(step, f"loss {mean:.3f}  {sums.tokens / seconds:.0f} tok/s")

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        self.folder.append(metrics)
        self.accelerator.log(
            {k: v for k, v in metrics.items() if isinstance(v, int | float) and k not in ("step", "time")}, step=step
        )

    def _evaluate(self, step: int) -> bool:
        """Evaluate if due; returns whether this is to be saved as the best so far (not while weights are blended with floats)."""
        settings, last = self.settings, step == self.total_steps
        wanted = settings.save_best
        if self.evaluate is None or not settings.eval_steps or (step % settings.eval_steps != 0 if not last else not wanted):
            return False
        before = time.monotonic()
        measured = {"step": step, **self.evaluate(step)}
        self.evaluating += time.monotonic() - before
        self._log(step, measured)
        best, loss = self.progress.best, measured["eval_loss"]
        if not wanted or "eval_blend" in measured or not math.isfinite(loss) or (best is not None and loss >= best["loss"]):
            return False
        self.progress.best = {"step": step, "loss": loss}
        return True

    def _save(self, reached: Progress) -> None:
        self.saver.save(self.model, self.optimizer, reached, metrics_bytes=self.folder.metrics_bytes())
        self.saved = reached.step

    def _save_before_step(self, finished: Progress) -> None:
        """Save the run as it was before the current step."""
        checkpoint.set_generators(self.generators)
        self._save_unless_saved(finished)

    def _last_checkpoint(self) -> str:
        complete = checkpoint.checkpoints(self.checkpoints)
        return f"the last checkpoint is {complete[-1].name}" if complete else "no checkpoint was written yet"

    def _save_unless_saved(self, finished: Progress) -> None:
        if finished.step > self.saved:
            self._save(finished)
            self.saver.wait()
