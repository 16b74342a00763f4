"""The section of the preflight: checks, share of trained tokens, lengths, and example rows with their trained parts marked."""

from __future__ import annotations

from finetune.record import CheckRecord, Piece, PreflightRecord
from finetune.report.elements import Html, el, figure, key, missing, section, trimmed
from finetune.report.folder import RunFiles
from finetune.units import count, percent, plural

MARKS = {"pass": "✓", "warn": "!", "fail": "✗"}


def preflight_section(run: RunFiles) -> Html:
    preflight, plain = run.record.preflight, run.on_text
    title = "Training text" if plain else "Labels"
    if preflight is None:
        return section(title, missing(run.record.state, "there was no preflight"))
    parts = [el("ul", *map(_check, preflight.checks), class_="checks")]
    charts = [] if plain and preflight.supervised_share == 1 else [_shares(preflight)]
    if (lengths := _lengths(preflight)) is not None:
        charts.append(lengths)
    if charts:
        parts.append(el("div", *charts, class_="two"))
    if preflight.examples:
        parts.append(el("h3", "Examples" if plain else "Your own rows: marked text is trained"))
        parts += [_example(example, plain) for example in preflight.examples]
    note = "The gate before training: which tokens are trained, measured on your data."
    return section(title, *parts, note=note)


def _check(check: CheckRecord) -> Html:
    badge = el("span", MARKS[check.status], class_="badge", title=check.status)
    return el("li", badge, el("div", el("b", check.name), el("span", check.detail)), class_=check.status)


def _shares(preflight: PreflightRecord) -> Html:
    """Shares of the data that are trained, and that are cut."""
    share, cut = preflight.supervised_share, preflight.rows_truncated
    supervised = f"{count(preflight.supervised_tokens)} of {count(preflight.tokens)} tokens are trained"
    bar = el("i", style=f"width:{100 * min(1.0, share):.2f}%")
    return el(
        "div",
        el("p", percent(share), class_="value"),
        el("p", supervised, class_="sub"),
        el("div", bar, class_="share", role="img", aria_label=supervised),
        el("p", key("good", "trained"), key("rule", "context only"), class_="legend"),
        el("p", f"{plural(cut, 'row')} cut at the maximum length" if cut else "No row was cut.", class_="sub"),
        class_="shares",
    )


def _lengths(preflight: PreflightRecord) -> Html | None:
    from finetune.report import plots

    edges, counts = preflight.length_histogram.edges, preflight.length_histogram.counts
    if not counts or len(edges) != len(counts) + 1:
        return None
    label = f"Sample lengths from {edges[0]} to {edges[-1] - 1} tokens"
    return figure(plots.histogram("lengths", label, edges, counts, x_label="tokens in a sample", y_label="samples"))


def _example(example: list[Piece], plain: bool) -> Html:
    trained = "span" if plain else "mark"  # in plain text every token is trained
    pieces = [el(trained if piece.supervised else "span", trimmed(piece.text) if plain else piece.text) for piece in example]
    return el("div", *pieces, class_="example text")
