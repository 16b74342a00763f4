"""The training loop. One for every kind: a kind gives batches and `loss(model, batch) → (sum, count)`, the loop does the rest.

Gradient accumulation is exact because sums and counts are summed: the gradients of the micro-batches' loss sums are added up and
divided once by the number of targets, so any division of the same samples gives the gradient of one large batch (transformers
averaged averages; issue 34191 there).
"""

from __future__ import annotations

import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.errors import GateStop
from finetune.train import checkpoint
from finetune.train.checkpoint import Progress
from finetune.train.schedule import decays, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.files import RunFolder
    from finetune.recipe import Train


class Kind(Protocol):
    """What a kind of training supplies. `parts`: what the last loss was made of, for the metrics; often nothing."""

    parts: dict[str, float]

    def keys(self, epoch: int, position: int, place: Any) -> Iterator[Any]:
        """Keys of an epoch's micro-batches from `position` on: a function of the seed, the epoch and the position alone.

        place: what `place` gave for the last one before it, None at the beginning. Closing the iterator ends its work.
        """

    def length(self, epoch: int) -> int | None:
        """Micro-batches of an epoch, or None where nobody knows."""

    def place(self, key: Any) -> Any:
        """Where the stream goes on behind this micro-batch, as JSON; None for a kind that needs no such thing."""

    def batch(self, key: Any) -> Any:
        """The micro-batch behind a key."""

    def tokens(self, batch: Any) -> int:
        """How many tokens the model reads in it."""

    def samples(self, key: Any) -> Sequence[Hashable]:
        """Names of the samples in it, for messages."""

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """(sum of the losses over targets, number of targets)."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; a checkpoint was written."""


def steps_in(kind: Kind, *, epochs: float, accumulation: int, max_steps: int | None) -> int:
    """Optimizer steps of `epochs` passes. An epoch's last, smaller group goes on into the next epoch."""
    whole = int(epochs)
    micro_batches = sum(kind.length(number) or 0 for number in range(whole))
    if epochs > whole:
        micro_batches += math.ceil((epochs - whole) * (kind.length(whole) or 0))
    steps = max(1, math.ceil(micro_batches / accumulation))
    return min(steps, max_steps) if max_steps is not None else steps


class _Keys:
    """The keys of the micro-batches that come next; moves `progress` on."""

    def __init__(self, kind: Kind, progress: Progress) -> None:
        self.kind, self.progress = kind, progress
        self.epoch: Iterator[Any] = kind.keys(progress.epoch, progress.position, progress.place)

    def next(self) -> Any:
        progress = self.progress
        while True:
            try:
                key = next(self.epoch)
            except StopIteration:
                if not progress.position:
                    raise GateStop(f"epoch {progress.epoch + 1} of the data holds no row to train on", where="data") from None
                progress.epoch, progress.position, progress.place = progress.epoch + 1, 0, None
                self.epoch = self.kind.keys(progress.epoch, 0, None)
                continue
            here = [progress.epoch, progress.position]
            progress.position += 1
            progress.place = self.kind.place(key)
            if here not in progress.bad:
                return key

    def close(self) -> None:
        close = getattr(self.epoch, "close", None)  # a stream reads ahead in a thread
        if close is not None:
            close()


class Memory:
    """Peak memory since `reset`: of the process (RSS) on a CPU, of the allocator on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.kind = "CUDA allocated" if self.cuda else "process RSS"

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins again
        except OSError:
            self.kind = "process RSS since its start"

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C or SIGTERM only sets a flag (the step is finished and saved); a second one ends at once."""
    caught = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = True
        print("\nfinishing this step, then saving (again: ends at once)", file=sys.stderr)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals belong to somebody else
        yield lambda: False
        return
    try:
        yield lambda: caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as far as it can be told to: the next step needs it again, page by page from the system.

    Blocks of up to 32 MiB, the most that it takes for this, come from its heap, whose end is not given back. (Measured on the
    quickstart, twice each: 1.33 and 1.43 instead of 1.65 million page faults; no other time than the machine's noise.)
    """
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 32 << 20)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


MOST_ROLLBACKS = 3  # in one process; a model that goes wrong more often has a cause that skipping rows does not mend


def train(
    model: torch.nn.Module,
    kind: Kind,
    settings: Train,
    *,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    folder: RunFolder,
    progress: Progress,
    autocast: torch.dtype | None = None,
    offload: bool = False,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], dict[str, Any]] | None = None,
    went_back: Callable[[int], None] | None = None,
    show: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Train from `progress` to `total_steps`; checkpoints and metrics go into `folder`.

    `autocast` is the dtype of the matrix products where it is not that of the weights. `offload`: what the forward pass keeps for
    the backward pass goes to pinned CPU memory in between. `evaluate(step)` returns metrics and
    must leave the model and the random generators as they were; so must `before_step(step)`, and `after_step(step)`, whose
    metrics get a line of their own. An optimizer that steps inside the backward pass (`in_backward`) gives the gradient's norm
    afterwards; a step that went wrong then has changed the weights, and the run goes back to its last checkpoint.
    `went_back(step)` is told so, when the model, the optimizer and the metrics are those of `step` again.

    Returns:
        seconds, tokens_per_second (of this process's steps), peak_bytes, memory_kind, and the totals of `progress`; where the
        run went back, `rollbacks`: how many micro-batches are left out for it.

    Raises:
        GateStop: the loss or the gradient is not finite; the model has not taken that step.
        Interrupted: a signal came; the step is finished and saved.
        What fetching a micro-batch raises (a line that is no row, a hub that cannot be reached): the last step is saved.
    """
    parameters = list(checkpoint.trained(model).values())
    decay_of_groups = [group["weight_decay"] for group in optimizer.param_groups]
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    in_backward = bool(getattr(inner, "in_backward", False))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    memory = Memory(accelerator.device)
    memory.reset()
    model.train()
    begun, tokens_before, evaluating, rollbacks = time.monotonic(), progress.tokens, 0.0, 0
    keys = _Keys(kind, progress)

    def save(reached: Progress) -> None:
        checkpoint.save(
            folder.path / "checkpoints",
            accelerator.unwrap_model(model),
            inner,
            reached,
            metrics_bytes=folder.metrics_bytes(),
            keep=settings.keep_checkpoints,
        )

    def wrong(step: int, fetched: list[tuple[Any, list[int], Any]], mean: float, norm: float) -> GateStop:
        return GateStop(
            f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step} is not finite; the step was not taken",
            where=f"samples {', '.join(str(s) for key, _, _ in fetched for s in kind.samples(key))}"[:400],
            found=f"loss {mean}, gradient norm {norm}",
            do=f"look at these samples, or begin anew with a lower train.lr (it was {settings.lr:g}); "
            f"the last checkpoint is step {saved}",
        )

    def go_back(step: int, places: list[list[int]], stop: GateStop) -> Progress:
        """The weights have taken a bad step: put back the last checkpoint, and leave the step's micro-batches out."""
        nonlocal rollbacks
        rollbacks += 1
        path, _ = checkpoint.newest(folder.path / "checkpoints")
        if path is None or rollbacks > MOST_ROLLBACKS:
            raise stop
        restored, size = checkpoint.load(path, accelerator.unwrap_model(model), inner)
        restored.bad += [place for place in progress.bad + places if place not in restored.bad]
        folder.cut_metrics(size)
        folder.append({"step": restored.step, "rolled_back": {"from": step, "found": stop.found, "where": stop.where}})
        if went_back is not None:
            went_back(restored.step)
        if show is not None:
            show(restored.step, total_steps, f"step {step} went wrong: back to step {restored.step}, without its rows")
        return restored

    pinned = accelerator.device.type == "cuda"

    def kept() -> AbstractContextManager[object]:
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned) if offload else nullcontext()

    def fetch() -> list[tuple[Any, list[int], Any]]:
        """The step's micro-batches: (key, its place, batch). All before the first is used: should one fail, nothing has moved."""
        fetched = []
        for _ in range(settings.accumulation):
            key = keys.next()
            fetched.append((key, [progress.epoch, progress.position - 1], kind.batch(key)))
        return fetched

    saved = progress.step
    if in_backward and not checkpoint.checkpoints(folder.path / "checkpoints"):
        save(progress)  # something to go back to
    try:
        with _signals() as interrupted:
            while progress.step < total_steps:
                started = time.monotonic()
                step = progress.step + 1
                lr = learning_rate(
                    step,
                    total_steps,
                    peak=settings.lr,
                    schedule=settings.schedule,
                    warmup=settings.warmup,
                    min_lr=settings.min_lr,
                )
                decaying = decays(step, total_steps, schedule=settings.schedule)
                for group, decay in zip(optimizer.param_groups, decay_of_groups, strict=True):
                    group["lr"], group["weight_decay"] = lr, decay if decaying else 0.0
                if before_step is not None:
                    before_step(step)
                finished = replace(progress)
                try:
                    fetched = fetch()
                except GateStop:
                    raise
                except Exception:
                    if finished.step > saved:  # hours of work, perhaps: how often is saved is up to the recipe
                        save(finished)
                    raise
                loss_sum, count, tokens, backward = torch.zeros((), device=accelerator.device), 0, 0, False
                for _, _, batch in fetched:
                    with torch.autocast(accelerator.device.type, dtype=autocast, enabled=autocast is not None), kept():
                        loss, targets = kind.loss(model, batch)
                    if targets and not (in_backward and not math.isfinite(float(loss.detach()))):
                        accelerator.backward(loss / targets if in_backward else loss)
                        backward = True
                    if targets:
                        loss_sum += loss.detach()
                    del loss  # and with it what its graph still has, before the next pass begins
                    count += targets
                    tokens += kind.tokens(batch)
                mean = float(loss_sum) / max(1, count)
                if in_backward:
                    none = 0.0 if math.isfinite(mean) else math.nan  # the optimizer still has the norm of the step before
                    norm = inner.grad_norm() if backward else none
                    if not (math.isfinite(mean) and math.isfinite(norm)):
                        keys.close()
                        progress = go_back(step, [place for _, place, _ in fetched], wrong(step, fetched, mean, norm))
                        saved = progress.step
                        keys = _Keys(kind, progress)
                        continue
                else:
                    gradients = [p.grad for p in parameters if p.grad is not None]
                    if count:
                        torch._foreach_div_(gradients, float(count))
                    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
                    if not (math.isfinite(mean) and math.isfinite(norm)):
                        raise wrong(step, fetched, mean, norm)
                    if settings.max_grad_norm and norm > settings.max_grad_norm:
                        torch._foreach_mul_(gradients, settings.max_grad_norm / norm)
                    del gradients  # else they live on through the next step's passes, beside its own
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.step, progress.tokens, progress.supervised = (
                    step,
                    progress.tokens + tokens,
                    progress.supervised + count,
                )
                seconds = time.monotonic() - started
                length = kind.length(progress.epoch)
                metrics: dict[str, Any] = {
                    "step": step,
                    "epoch": round(progress.epoch + progress.position / length, 4) if length else progress.epoch,
                    "loss": mean,
                    **kind.parts,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens": progress.tokens,
                    "supervised": progress.supervised,
                    "tokens_per_second": round(tokens / seconds, 1),
                    "step_seconds": round(seconds, 4),
                    "memory_bytes": memory.peak(),
                    "time": round(time.time(), 3),
                }
                folder.append(metrics)
                accelerator.log({k: v for k, v in metrics.items() if k not in ("step", "time")}, step=step)
                if after_step is not None and (seen := after_step(step)):
                    folder.append({"step": step, **seen})
                if show is not None:
                    show(step, total_steps, f"loss {mean:.3f}  {tokens / seconds:.0f} tok/s")
                if evaluate is not None and settings.eval_steps and step % settings.eval_steps == 0 and step < total_steps:
                    before = time.monotonic()
                    measured = {"step": step, **evaluate(step)}
                    evaluating += time.monotonic() - before
                    folder.append(measured)
                    accelerator.log({k: v for k, v in measured.items() if k != "step"}, step=step)
                if (settings.save_steps and step % settings.save_steps == 0) or step == total_steps or interrupted():
                    save(progress)
                    saved = step
                    if interrupted() and step < total_steps:
                        raise Interrupted(f"stopped after step {step} of {total_steps}")
    finally:
        keys.close()
    seconds = time.monotonic() - begun - evaluating
    return {
        "steps": progress.step,
        "seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "tokens_per_second": round((progress.tokens - tokens_before) / seconds, 1) if seconds else 0.0,
        "peak_bytes": memory.peak(),
        "memory_kind": memory.kind,
        **({"rollbacks": len(progress.bad)} if progress.bad else {}),
    }
