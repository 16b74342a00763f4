"""What the model answers, or how it goes on, before and after training."""

from __future__ import annotations

from finetune.record import Sample
from finetune.report.elements import Html, el, not_made, section, trimmed
from finetune.report.folder import RunFiles
from finetune.units import plural


def samples_section(run: RunFiles) -> Html:
    record = run.record
    title = "Text it writes" if run.on_text else "Answers"
    if not record.samples:
        reason = f"the recipe asks for no {'samples' if run.on_text else 'answers'}"
        return section(title, not_made(record.state, reason))
    note = "The same questions, answered before and after training (greedy decoding)."
    if run.on_text:
        note = "How the model goes on with the same beginnings, before and after training (greedy decoding)."
    return section(title, *map(_sample, record.samples), note=note)


def _sample(sample: Sample) -> Html:
    """A question, or the beginning of a text, with what the model made of it and what the data says."""
    text = isinstance(sample.prompt, str)
    if isinstance(sample.prompt, str):
        prompt = [_turn("text", trimmed(sample.prompt), "turn passage")]
    else:
        prompt = [_turn(message.get("role"), message.get("content"), "turn") for message in sample.prompt]
    # A text has no end to come to: only an answer is told that it found none.
    before_ended, after_ended = (None, None) if text else (sample.before_ended, sample.after_ended)
    goes_on = "goes on, " if text else ""
    reference = None
    if sample.reference:
        says = el("h4", "how the data goes on" if text else "what the data says")
        reference = el("div", says, el("div", trimmed(sample.reference), class_="text"), class_="reference")
    return el(
        "article",
        *prompt,
        el(
            "div",
            _answer(f"{goes_on}before", sample.before, before_ended, "before"),
            _answer(f"{goes_on}after", sample.after, after_ended, "after"),
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
        said = el("div", trimmed(text), class_="text")
    else:
        blank = f"nothing but {plural(len(text), 'blank')}" if text else "nothing was generated"
        said = el("p", "not made" if text is None else blank, class_="empty")
    return el("div", el("h4", title, " ", mark), said, class_=class_)
