"""The section of held-out losses and task scores, before and after training."""

from __future__ import annotations

import math
from typing import Any

from finetune.record import EvalRecord
from finetune.report.elements import Html, el, missing, section, table
from finetune.report.folder import RunFiles
from finetune.units import MINUS, count, decimals, digits_of, finite_number, with_error


def eval_section(run: RunFiles) -> Html:
    result, state = run.record.eval, run.record.state
    parts: list[Html] = []
    note = None
    if losses := _loss_rows(result):
        parts.append(table(["held-out rows", "loss, nats per token", "perplexity", "rows", "tokens"], losses, "numbers eval"))
        if result.after is None:
            parts.append(missing(state, "it was not measured", "After training"))
        note = "Loss is the mean cross-entropy of the supervised tokens; ± is one standard error over rows."
    else:
        parts.append(missing(state, "no rows were held out"))
    if tasks := _task_rows(result):
        parts.append(el("h3", "Tasks"))
        parts.append(table(["task", "metric", "before", "after", "rows"], tasks, "numbers tasks"))
    return section("Before and after", *parts, note=note)


def _loss_rows(result: EvalRecord) -> list[list[Any]]:
    """Each measurement, and the difference that training made."""
    named = ("float model", "ternary, before training", "ternary, after training")
    if result.float_model is None:
        named = ("", "before training", "after training")
    every = zip(named, (result.float_model, result.before, result.after), strict=True)
    measured = [(name, loss) for name, loss in every if loss is not None]
    difference, error = finite_number(result.difference), result.difference_stderr
    digits = decimals(finite_number(error), *(finite_number(loss.stderr) for _, loss in measured))
    rows: list[list[Any]] = []
    for name, loss in measured:
        perplexity, spread = finite_number(loss.perplexity), finite_number(loss.stderr)
        # The error of exp(x) is exp(x) times that of x, if the latter is small.
        around = perplexity * spread if perplexity and spread and spread < 0.5 else None
        shown = with_error(perplexity, around, digits_of(perplexity))
        rows.append([name, with_error(loss.loss, spread, digits), shown, count(loss.rows), count(loss.tokens)])
    if rows and difference is not None:
        change = f"{100 * (math.exp(difference) - 1):+.0f} %".replace("-", MINUS)
        rows.append(["difference, paired by row", with_error(difference, error, digits, sign=True), change, "", ""])
    return rows


def _task_rows(result: EvalRecord) -> list[list[Any]]:
    """Each metric of each task, before and after, without the harness's own bookkeeping."""
    scored = result.tasks or {}
    rows: list[list[Any]] = []
    for task in sorted({task for scores in scored.values() for task in scores}):
        known = [scored.get("before", {}).get(task, {}), scored.get("after", {}).get(task, {})]
        for metric in sorted({name for scores in known for name in scores}):
            name, _, filter_ = metric.partition(",")
            if name.endswith("_stderr") or name in ("version", "n"):
                continue
            if all(finite_number(scores.get(metric)) is None for scores in known):
                continue
            error = f"{name}_stderr" + (f",{filter_}" if filter_ else "")
            values = [with_error(scores.get(metric), scores.get(error), 3) for scores in known]
            questions = next((scores["n"] for scores in known if scores.get("n") is not None), None)
            rows.append([task, metric, *values, count(questions)])
    return rows
