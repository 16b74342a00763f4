"""The section of generated samples, before and after training."""

from __future__ import annotations

from finetune.record import Sample
from finetune.report.elements import Html, el, missing, section, trimmed
from finetune.report.folder import RunFiles
from finetune.units import plural


def samples_section(run: RunFiles) -> Html:
    record = run.record
    title = "Generated text" if run.on_text else "Answers"
    if not record.samples:
        reason = "the recipe has no samples (eval.samples)"
        return section(title, missing(record.state, reason))
    note = "The same questions, answered before and after training (greedy decoding)."
    if run.on_text:
        note = "Continuations of the same beginnings, before and after training (greedy decoding)."
    return section(title, *map(_sample, record.samples), note=note)


def _sample(sample: Sample) -> Html:
    """A prompt with the outputs before and after training, and the reference from the data."""
    text = isinstance(sample.prompt, str)
    if isinstance(sample.prompt, str):
        prompt = [_turn("text", trimmed(sample.prompt), "turn passage")]
    else:
        prompt = [_turn(message.get("role"), message.get("content"), "turn") for message in sample.prompt]
    # Only an answer is expected to end by itself; a continuation of text is not.
    before_ended, after_ended = (None, None) if text else (sample.before_ended, sample.after_ended)
    prefix = "continuation, " if text else ""
    reference = None
    if sample.reference:
        heading = el("h4", "continuation in the data" if text else "answer in the data")
        reference = el("div", heading, el("div", trimmed(sample.reference), class_="text"), class_="reference")
    return el(
        "article",
        *prompt,
        el(
            "div",
            _answer(f"{prefix}before", sample.before, before_ended, "before"),
            _answer(f"{prefix}after", sample.after, after_ended, "after"),
            class_="pair",
        ),
        reference,
        class_="sample",
    )


def _turn(role: object, content: object, class_: str) -> Html:
    return el("div", el("span", role, class_="role"), el("div", content, class_="text"), class_=class_)


def _answer(title: str, text: str | None, ended: bool | None, class_: str) -> Html:
    mark = el("span", "did not end by itself", class_="mark") if ended is False else None
    if text and text.strip():
        body = el("div", trimmed(text), class_="text")
    else:
        blank = f"only {plural(len(text), 'blank')}" if text else "nothing was generated"
        body = el("p", "missing" if text is None else blank, class_="empty")
    return el("div", el("h4", title, " ", mark), body, class_=class_)
