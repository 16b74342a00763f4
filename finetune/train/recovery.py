"""What is wrong with a step: a loss or a gradient that is not finite, a spike of the loss, memory that ran out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.errors import GateError

if TYPE_CHECKING:
    from finetune.recipe import Train

SPIKE_WINDOW, SPIKE_FEWEST = 64, 16  # losses that a spike is judged by, and fewer than which judge none
SPREAD_LEAST = 0.01  # of the median: the least that counts as the spread of losses


def spike(loss: float, recent: Sequence[float]) -> float:
    """How many spreads a loss lies above the median of the recent ones; 0.0 where there are too few to tell.

    The spread is 1.4826 times the median absolute deviation: the standard deviation of normal numbers, which outliers leave alone
    (Rousseeuw and Croux, Alternatives to the Median Absolute Deviation, 1993, section 1).
    """
    if len(recent) < SPIKE_FEWEST:
        return 0.0
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(one - median) for one in recent)
    return (loss - median) / max(spread, SPREAD_LEAST * abs(median), 1e-12)


class NoMemory(GateError):
    """Out of memory with micro-batches that cannot be made smaller."""


def wrong(step: int, mean: float, norm: float, recent: Sequence[float], threshold: float | None) -> str | None:
    """What is wrong with a step of this mean loss and gradient norm, or None.

    recent: losses of the steps before. threshold: spreads beyond which a loss is a spike; None: none is.
    """
    finite = math.isfinite(mean) and math.isfinite(norm)
    if not finite:
        return f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step} is not finite"
    many = spike(mean, recent) if threshold is not None else 0.0
    if threshold is None or many <= threshold:
        return None
    return f"the loss of step {step} is a spike, {many:.1f} spreads above the last {len(recent)}"


def bad_step(what: str, samples: Sequence[str], mean: float, norm: float, settings: Train) -> GateError:
    """The stop of a run whose step went wrong. what: as `wrong` says; samples: those of the step."""
    return GateError(
        f"{what}; the step was not taken",
        where=f"samples {', '.join(samples)}"[:400],
        got=f"loss {mean}, gradient norm {norm}",
        hint=f"look at these samples; --resume with more than {settings.max_bad_steps} train.max_bad_steps leaves them out; or "
        f"begin anew with a lower train.lr (it was {settings.lr:g})",
    )


def no_memory(step: int, found: str, *, in_backward: bool, sharded: bool) -> NoMemory:
    """The stop of a run that is out of memory in a step which cannot be repeated in smaller parts."""
    why = "with one sample at a time"
    if sharded:
        why = "in one of several processes with sharded layers, where a step cannot be repeated"
    elif in_backward:
        why = "and with train.optimizer_in_backward a step cannot be repeated in parts"
    return NoMemory(f"out of memory in step {step}, {why}", where="train", got=found)
