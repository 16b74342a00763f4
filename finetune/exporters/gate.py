"""The equivalence gate: an export is kept only if the other program computes the trained model.

The same token ids go through three functions, and the gate has two halves:

    trained       the model in this process
    simulation    the trained model with the target's arithmetic (its rounding of activations and weights), built from
                  the trained model and never from the written file
    target        the written file, loaded and run by the other program

    correct       target = simulation, tightly: any difference is a bug (in an activation, a norm, a scale, the weights)
    good          target ≈ trained: the cost of the target's arithmetic, in nats. Reported; only extreme values are refused

Both halves are needed. A correct export can answer differently (llama.cpp's rounding of activations alone can turn
an answer into another language), and a wrong one can be close enough to look like rounding.

The error of `correct` is relative: the root mean square of the difference of the logits over that of the simulation's logits,
both without their mean over the vocabulary, to which softmax is invariant. KL would not do: a hardly trained model predicts
nothing with a wrong activation as well as with the right one, and its KL would pass anything.

The tolerance is measured in the same run. If an activation is on the border between two codes, the order of sums
decides, and from there on the two round differently: in a deep model the simulation then agrees with the target no better
than with the trained model. So the distance between trained and simulation, which does not depend on the written file, is the
reference: the `noise` of the arithmetic.

This module is independent of formats, files and models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import GateError

Logits = Callable[[list[int]], Tensor]  # token ids of a row (n) → logits (n, vocabulary), float
Rows = Sequence[tuple[list[int], list[int]]]  # input ids, labels (the label AT each position, −100 where none)

IGNORED = -100


@dataclass(frozen=True)
class Bounds:
    """Tolerances. factor: allowed error in multiples of the arithmetic's noise; floor, ceiling: bounds of that limit, relative.
    kl: allowed nats per token between target and trained, which only a model that the target's arithmetic breaks exceeds."""

    factor: float
    floor: float
    ceiling: float
    kl: float


@dataclass(frozen=True)
class Verdict:
    """The gate's measurements. kl in nats per token; losses in nats per supervised token, NaN without any."""

    error: float  # simulation to target
    worst_error: float  # of one row
    noise: float  # trained to simulation, measured in the same way
    kl: float  # trained ‖ target
    worst_kl: float  # of one token
    simulation_kl: float  # trained ‖ simulation: the cost of the target's arithmetic, independent of the written file
    same_top: float  # share of tokens where trained and target agree on the likeliest next
    trained_loss: float
    export_loss: float
    rows: int
    tokens: int
    bounds: Bounds

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return min(max(self.bounds.factor * self.noise, self.bounds.floor), self.bounds.ceiling)

    @property
    def reason(self) -> str | None:
        """Why the export is refused; None if it passes."""
        if not self.error <= self.limit:  # NaN is refused too
            return (
                f"its logits differ by {self.error:.2g} (relative) from a simulation of the target's arithmetic, the limit is "
                f"{self.limit:.2g}"
            )
        if not self.kl <= self.bounds.kl:
            return (
                f"its KL divergence from the trained model is {self.kl:.3g} nats per token, the limit is {self.bounds.kl:.3g}: "
                "the target computes correctly, but its arithmetic is too coarse for this model"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": "pass" if self.reason is None else "fail",
            "correct": {"error": self.error, "worst_row": self.worst_error, "noise": self.noise, "limit": self.limit},
            "good": {
                "kl": self.kl,
                "worst_token": self.worst_kl,
                "limit": self.bounds.kl,
                "arithmetic_kl": self.simulation_kl,
                "same_top": self.same_top,
                "trained_loss": self.trained_loss,
                "export_loss": self.export_loss,
                "trained_perplexity": _exp(self.trained_loss),
                "export_perplexity": _exp(self.export_loss),
            },
            "rows": self.rows,
            "tokens": self.tokens,
        }


def compare(
    rows: Rows,
    *,
    trained: Logits,
    target: Logits,
    bounds: Bounds,
    simulation: Logits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Run `rows` through all functions and compare the logits.

    simulation: None if the target's arithmetic is that of the trained model. progress: called with (rows done, total).

    Raises:
        ValueError: no row has a token.
        GateError: the target's vocabulary has a different size.
    """
    rows = [(ids, labels) for ids, labels in rows if ids]
    if not rows:
        raise ValueError("no rows to compare on")
    squares, error, noise, worst_row = 0.0, 0.0, 0.0, 0.0
    kls: list[Tensor] = []
    simulated_kl, same, tokens, supervised = 0.0, 0, 0, 0
    losses = [0.0, 0.0]
    for done, (ids, labels) in enumerate(rows, 1):
        ours, theirs = _logits(trained, ids), _logits(target, ids)
        expected = ours if simulation is None else _logits(simulation, ids)
        if theirs.shape != ours.shape:
            raise GateError("the export has a different vocabulary", got=f"{theirs.shape[-1]} tokens, not {ours.shape[-1]}")
        row_error, row_squares = _squares(expected - theirs), _squares(expected)
        squares, error, noise = squares + row_squares, error + row_error, noise + _squares(expected - ours)
        worst_row = _max(worst_row, _ratio(row_error, row_squares))
        log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        kls.append(_kl(log_ours, log_theirs).double())
        simulated_kl += 0.0 if simulation is None else float(_kl(log_ours, expected.log_softmax(-1)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ids)
        goal = torch.tensor(labels[1:], dtype=torch.long)
        supervised += int((goal != IGNORED).sum())
        for i, log in enumerate((log_ours, log_theirs)):
            losses[i] += float(F.nll_loss(log[:-1], goal, ignore_index=IGNORED, reduction="sum"))
        if progress is not None:
            progress(done, len(rows))
    kl = torch.cat(kls)
    return Verdict(
        error=_ratio(error, squares),
        worst_error=worst_row,
        noise=_ratio(noise, squares),
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        simulation_kl=simulated_kl / tokens,
        same_top=same / tokens,
        trained_loss=losses[0] / supervised if supervised else math.nan,
        export_loss=losses[1] / supervised if supervised else math.nan,
        rows=len(rows),
        tokens=tokens,
        bounds=bounds,
    )


def require_pass(verdict: Verdict, *, where: str, hint: str | None = None) -> None:
    """Raise GateError, with the figures, if the export does not match the trained model."""
    if (reason := verdict.reason) is None:
        return
    raise GateError(
        f"the export does not match the trained model and was not kept: {reason}",
        where=where,
        got=(
            f"over {verdict.tokens} tokens: error {verdict.error:.3g}, KL {verdict.kl:.3g} nats (arithmetic alone "
            f"{verdict.simulation_kl:.3g}), loss {verdict.export_loss:.4f} against {verdict.trained_loss:.4f}, same next token "
            f"{verdict.same_top:.1%}"
        ),
        hint=hint,
    )


def _logits(function: Logits, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return function(ids).detach().float().cpu()


def _squares(x: Tensor) -> float:
    """The sum of squares of x (n, vocabulary) without its mean over the vocabulary."""
    return float((x - x.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))


def _ratio(error: float, squares: float) -> float:
    return math.sqrt(error / squares) if squares > 0 else (0.0 if error == 0 else math.inf)


def _max(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities (n, vocabulary) → (n,), nats."""
    return (p.exp() * (p - q)).sum(-1)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
