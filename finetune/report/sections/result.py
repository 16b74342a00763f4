"""The top of the page: the result in one sentence, warnings, and the main figures."""

from __future__ import annotations

import math

from finetune.record import Record
from finetune.report.elements import Html, el
from finetune.report.folder import RunFiles
from finetune.report.sections.twin import gap_sentence
from finetune.units import (
    decimals,
    duration,
    finite_number,
    fixed,
    many,
    percent,
    plural,
    short,
    size,
    with_error,
)


def verdict(run: RunFiles) -> str:
    """The result in one sentence; 'fell' only if the difference is more than two of its standard errors."""
    record = run.record
    measured, provenance = record.eval, record.provenance
    difference, error = finite_number(measured.difference), finite_number(measured.difference_stderr)
    device = provenance.device.partition(": ")[2] or provenance.device
    taken = duration(provenance.seconds) + (f" on {device}" if device else "")
    if (before := measured.before) is None or (after := measured.after) is None or difference is None:
        return _without_result(run, taken)
    digits = decimals(finite_number(before.stderr), finite_number(after.stderr), error)
    certain = measured.got_worse or (error is not None and abs(difference) > 2 * error)
    verb = "did not change measurably:" if not certain else "fell" if difference < 0 else "rose"
    result = (
        f"Held-out loss {verb} from {with_error(before.loss, before.stderr, digits)} to "
        f"{with_error(after.loss, after.stderr, digits)} nats "
        f"({with_error(difference, error, digits, sign=True)}) over {plural(after.rows, 'row')}; "
        f"perplexity {short(before.perplexity)} → {short(after.perplexity)}; {taken}."
    )
    compared = [gap_sentence(record)]
    if measured.float_model is not None:
        compared.append(f"The float model before ternarization has {fixed(measured.float_model.loss, digits)}.")
    return " ".join([result, *filter(None, compared)])


def _without_result(run: RunFiles, taken: str) -> str:
    record, steps, before = run.record, len(run.metrics.steps), run.record.eval.before
    result_of = {
        "done": "No data was held out, so nothing was measured.",
        "failed": "The run failed; it has no result.",
        "stopped": "The run was stopped; it has no result yet.",
        "running": "The run was still in progress when this page was written.",
    }
    sentences = [f"Trained {plural(steps, 'step')}."] if steps else []
    if before is not None:
        loss = with_error(before.loss, before.stderr, decimals(finite_number(before.stderr)))
        sentences.append(f"Held-out loss before training: {loss} nats over {plural(before.rows, 'row')}.")
    return " ".join([*sentences, result_of[record.state], f"{taken[:1].upper()}{taken[1:]}."])


def header(run: RunFiles) -> Html:
    record = run.record
    forced = record.preflight.forced if record.preflight is not None else None
    alarms = record.ternary.alarms if record.ternary is not None else []
    why = "Error" if record.state == "failed" else "Why it stopped"
    link = el("a", "Ternary health", href="#ternary-health")
    return el(
        "header",
        el("p", f"finetune · {record.kind}", class_="eyebrow"),
        el("h1", record.name, " ", el("span", record.state, class_=f"state {record.state}")),
        el("p", record.about, class_="about") if record.about else None,
        el("p", verdict(run), class_="verdict"),
        el("div", el("h2", why), el("pre", record.error), class_="alarm", role="alert") if record.error else None,
        el("p", el("b", "The model got worse"), ": a lower learning rate or fewer steps may help.", class_="alarm")
        if record.eval.got_worse
        else None,
        el("p", el("b", "Trained with --force despite the preflight: "), forced, class_="alarm") if forced else None,
        el("p", el("b", f"{plural(len(alarms), 'alarm')} of the ternary weights"), ": see ", link, class_="alarm")
        if alarms
        else None,
    )


def tiles(run: RunFiles) -> Html | None:
    """The main figures, each with its meaning."""
    figures = _losses(run.record)
    if (model := run.record.model) is not None:
        share = model.trainable / (model.parameters or math.inf)
        figures.append(("Trained parameters", many(model.trainable), f"{percent(share)} of {many(model.parameters)}"))
    if (train := run.trained) is not None:
        read = f"{many(train.tokens)} read, {plural(train.steps, 'step')}"
        figures.append(("Trained tokens", many(train.supervised_tokens), read))
        figures.append(("Speed", short(train.tokens_per_second), "tokens per second"))
        figures.append(("Peak memory", size(train.peak_bytes), train.memory_kind))
    if not figures:
        return None
    return el(
        "div",
        *(
            el("div", el("p", name), el("p", value, class_="value"), el("p", meaning, class_="sub"))
            for name, value, meaning in figures
        ),
        class_="tiles",
    )


def _losses(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the losses."""
    before, after, twin = record.eval.before, record.eval.after, record.twin
    if before is None or after is None:
        return []
    error = finite_number(record.eval.difference_stderr)
    digits = decimals(error)
    change = with_error(record.eval.difference, error, digits, sign=True)
    figures = [("Held-out loss", change, f"nats per token, {fixed(before.loss, digits)} → {fixed(after.loss, digits)}")]
    if twin is not None and finite_number(twin.gap) is not None:
        gap = with_error(twin.gap, twin.gap_stderr, decimals(finite_number(twin.gap_stderr)), sign=True)
        return [*figures, ("Gap to the float twin", gap, "nats per token, at equal tokens")]
    perplexities = f"{short(before.perplexity)} → {short(after.perplexity)}"
    return [*figures, ("Perplexity", perplexities, "before → after, held out")]
