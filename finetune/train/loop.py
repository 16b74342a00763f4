"""The training loop. One for every kind: a kind gives batches and `loss(model, batch) → (sum, count)`, the loop does the rest.

Gradient accumulation is exact because sums and counts are summed: the gradients of the micro-batches' loss sums are added up and
divided once by the number of targets, so any division of the same samples gives the gradient of one large batch (transformers
averaged averages; issue 34191 there).
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.errors import GateStop
from finetune.train import checkpoint
from finetune.train.checkpoint import Progress
from finetune.train.optim import learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.files import RunFolder
    from finetune.recipe import Train


class Kind(Protocol):
    """What a kind of training supplies."""

    def epoch(self, number: int) -> Sequence[Any]:
        """Keys of an epoch's micro-batches: a function of the seed and the epoch's number alone."""

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
    micro_batches = sum(len(kind.epoch(number)) for number in range(whole))
    if epochs > whole:
        micro_batches += math.ceil((epochs - whole) * len(kind.epoch(whole)))
    steps = max(1, math.ceil(micro_batches / accumulation))
    return min(steps, max_steps) if max_steps is not None else steps


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
    evaluate: Callable[[int], dict[str, float]] | None = None,
    show: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Train from `progress` to `total_steps`; checkpoints and metrics go into `folder`.

    `autocast` is the dtype of the matrix products where it is not that of the weights. `evaluate(step)` returns metrics and
    must leave the model and the random generators as they were.

    Returns:
        seconds, tokens_per_second (of this process's steps), peak_bytes, memory_kind, and the totals of `progress`.

    Raises:
        GateStop: the loss or the gradient is not finite; the model has not taken that step.
        Interrupted: a signal came; the step is finished and saved.
    """
    parameters = list(checkpoint.trained(model).values())
    memory = Memory(accelerator.device)
    memory.reset()
    model.train()
    begun, tokens_before, evaluating = time.monotonic(), progress.tokens, 0.0
    keys = list(kind.epoch(progress.epoch))

    def next_key() -> Any:
        nonlocal keys
        while progress.position >= len(keys):
            progress.epoch, progress.position = progress.epoch + 1, 0
            keys = list(kind.epoch(progress.epoch))
        key = keys[progress.position]
        progress.position += 1
        return key

    def save() -> None:
        checkpoint.save(
            folder.path / "checkpoints",
            accelerator.unwrap_model(model),
            getattr(optimizer, "optimizer", optimizer),
            progress,
            metrics_bytes=folder.metrics_bytes(),
            keep=settings.keep_checkpoints,
        )

    saved = progress.step
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
            for group in optimizer.param_groups:
                group["lr"] = lr
            group_keys = [next_key() for _ in range(settings.accumulation)]
            loss_sum, count, tokens = torch.zeros((), device=accelerator.device), 0, 0
            for key in group_keys:
                batch = kind.batch(key)
                with torch.autocast(accelerator.device.type, dtype=autocast, enabled=autocast is not None):
                    loss, targets = kind.loss(model, batch)
                if targets:
                    accelerator.backward(loss)
                    loss_sum += loss.detach()
                count += targets
                tokens += kind.tokens(batch)
            gradients = [p.grad for p in parameters if p.grad is not None]
            if count:
                torch._foreach_div_(gradients, float(count))
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
            mean = float(loss_sum) / max(1, count)
            if not (math.isfinite(mean) and math.isfinite(norm)):
                raise GateStop(
                    f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step} is not finite; the step was not taken",
                    where=f"samples {', '.join(str(s) for key in group_keys for s in kind.samples(key))}"[:400],
                    found=f"loss {mean}, gradient norm {norm}",
                    do=f"look at these samples, or begin anew with a lower train.lr (it was {settings.lr:g}); "
                    f"the last checkpoint is step {saved}",
                )
            if settings.max_grad_norm and norm > settings.max_grad_norm:
                torch._foreach_mul_(gradients, settings.max_grad_norm / norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step, progress.tokens, progress.supervised = (
                step,
                progress.tokens + tokens,
                progress.supervised + count,
            )
            seconds = time.monotonic() - started
            metrics: dict[str, Any] = {
                "step": step,
                "epoch": round(progress.epoch + progress.position / max(1, len(keys)), 4),
                "loss": mean,
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
            if show is not None:
                show(step, total_steps, f"loss {mean:.3f}  {tokens / seconds:.0f} tok/s")
            if evaluate is not None and settings.eval_steps and step % settings.eval_steps == 0 and step < total_steps:
                before = time.monotonic()
                measured = {"step": step, **evaluate(step)}
                evaluating += time.monotonic() - before
                folder.append(measured)
                accelerator.log({k: v for k, v in measured.items() if k != "step"}, step=step)
            if (settings.save_steps and step % settings.save_steps == 0) or step == total_steps or interrupted():
                save()
                saved = step
                if interrupted() and step < total_steps:
                    raise Interrupted(f"stopped after step {step} of {total_steps}")
    seconds = time.monotonic() - begun - evaluating
    return {
        "steps": progress.step,
        "seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "tokens_per_second": round((progress.tokens - tokens_before) / seconds, 1) if seconds else 0.0,
        "peak_bytes": memory.peak(),
        "memory_kind": memory.kind,
    }
