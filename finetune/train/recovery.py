"""Bad steps: a loss or gradient that is not finite, a loss spike, out of memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.errors import GateError

if TYPE_CHECKING:
    from finetune.recipe import Train

SPIKE_WINDOW, SPIKE_FEWEST = 64, 16  # losses that a spike is measured against: at most, at least
SPREAD_LEAST = 0.01  # of the median: the smallest standard deviation assumed


def spike(loss: float, recent: Sequence[float]) -> float:
    """Standard deviations by which a loss lies above the median of the recent ones; 0.0 if there are too few.

    The deviation is 1.4826 times the median absolute deviation: that of a normal distribution, robust to outliers
    (Rousseeuw and Croux, Alternatives to the Median Absolute Deviation, 1993, section 1).
    """
    if len(recent) < SPIKE_FEWEST:
        return 0.0
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(one - median) for one in recent)
    return (loss - median) / max(deviation, SPREAD_LEAST * abs(median), 1e-12)


class NoMemory(GateError):
    """Out of memory with micro-batches that cannot be made smaller."""


def wrong(step: int, mean: float, norm: float, recent: Sequence[float], threshold: float | None) -> str | None:
    """What is wrong with a step of this mean loss and gradient norm, or None.

    recent: losses of the steps before. threshold: standard deviations beyond which a loss is a spike; None: never.
    """
    finite = math.isfinite(mean) and math.isfinite(norm)
    if not finite:
        return f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step} is not finite"
    deviations = spike(mean, recent) if threshold is not None else 0.0
    if threshold is None or deviations <= threshold:
        return None
    above = f"{deviations:.1f} standard deviations above the median of the last {len(recent)} losses"
    return f"the loss of step {step} is a spike: {above}"


def bad_step(what: str, samples: Sequence[str], mean: float, norm: float, settings: Train) -> GateError:
    """The error of a bad step. what: the reason that `wrong` returned; samples: those of the step."""
    return GateError(
        f"{what}; the step was not taken",
        where=f"samples {', '.join(samples)}"[:400],
        got=f"loss {mean}, gradient norm {norm}",
        hint=f"look at these samples; to skip them, --resume with train.max_bad_steps above {settings.max_bad_steps}; or "
        f"start again with a lower train.lr (it was {settings.lr:g})",
    )


def no_memory(step: int, got: str, *, in_backward: bool, sharded: bool) -> NoMemory:
    """The error of a step that ran out of memory and cannot be repeated in smaller parts."""
    why = "with one sample at a time"
    if sharded:
        why = "in one of several processes with sharded layers, where a step cannot be repeated"
    elif in_backward:
        why = "and with train.optimizer_in_backward a step cannot be repeated in smaller parts"
    return NoMemory(f"out of memory in step {step}, {why}", where="train", got=got)
