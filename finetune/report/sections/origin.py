"""The sections of provenance, the recipe, and the commands to type next."""

from __future__ import annotations

from typing import Any

from finetune.report.elements import Html, el, facts, join, missing, section
from finetune.report.folder import RunFiles
from finetune.task_data import ConversationsRecord, TextRecord
from finetune.units import count, moment, percent, plural, size

Rows = list[tuple[str, Any]]


def provenance_section(run: RunFiles) -> Html:
    groups = [("Model", _model(run)), ("Data", _data(run)), ("Run", _run(run))]
    parts = [join((el("h3", title), facts(rows))) for title, rows in groups if any(value not in (None, "") for _, value in rows)]
    return section("Provenance", *parts)


def recipe_section(run: RunFiles) -> Html:
    if run.recipe is None:
        return section("Recipe", missing(run.record.state, "there is no recipe.yaml in the folder"))
    return section("Recipe", el("details", el("summary", "The resolved recipe, with all defaults"), el("pre", run.recipe)))


def next_section(run: RunFiles) -> Html:
    commands = run.record.next
    if not commands:
        return section("What to type next", missing(run.record.state, "the run suggests nothing"))
    return section("What to type next", el("pre", "\n".join(commands), class_="commands"))


def _code(value: str | None) -> Html | None:
    return el("code", value) if value else None


def _model(run: RunFiles) -> Rows:
    source, model = run.record.provenance.model, run.record.model
    rows: Rows = [("from", _code(source.source) if source is not None else None)]
    if model is None:
        return rows
    quantized = "none"
    if (swap := model.swap) is not None and run.trains_ternary:
        quantized = (
            f"{count(swap.swapped)} linears are trained in ternary ({percent(swap.share)} of the parameters); {swap.backend}"
        )
    elif swap is not None:
        quantized = (
            f"{count(swap.swapped)} linears in {swap.scheme} ({percent(swap.share)} of the parameters): "
            f"{size(swap.bytes_before)} → {size(swap.bytes_after)}; {swap.backend}"
        )
    rows += [
        ("architecture", model.architecture),
        ("parameters", count(model.parameters)),
        ("trained", count(model.trainable) + (f", in {count(model.adapters)} adapters" if model.adapters else "")),
        ("quantized", quantized),
        ("patches", "; ".join(model.fast or [])),
    ]
    return rows


def _data(run: RunFiles) -> Rows:
    source, data = run.record.provenance.data, run.data
    rows: Rows = []
    if source is not None:
        rows = [("from", _code(source.source)), ("sha-256", _code(source.sha256))]
    if isinstance(data, ConversationsRecord):
        split = f"{count(data.train_rows)} trained, {count(data.heldout_rows)} held out"
        split += f", {plural(data.duplicates_removed, 'duplicate')} removed" if data.duplicates_removed else ""
        split += f", {count(data.rows_skipped)} skipped" if data.rows_skipped else ""
        rows += [("rows", f"{plural(data.rows, 'row')} ({data.format}: {data.format_reason})"), ("split", split)]
    if isinstance(data, TextRecord):  # a stream: the number of rows is unknown
        split = f"{plural(data.heldout_rows, 'row')} held out"
        split += f", {plural(data.rows_skipped, 'document')} skipped" if data.rows_skipped else ""
        rows += [("rows", f"{data.format}, {data.format_reason}"), ("split", split)]
        rows.append(("vocabulary", plural(data.vocabulary, "token")))
    if data is not None:
        rows.append(("chat template", data.template))
    return rows


def _run(run: RunFiles) -> Rows:
    origin = run.record.provenance
    return [
        ("command", _code(origin.command)),
        ("started", moment(origin.started)),
        ("finished", moment(origin.finished) or "not finished"),
        ("resumed", "; ".join(f"{moment(entry.time)} from {entry.checkpoint or 'the beginning'}" for entry in origin.resumed)),
        ("seed", origin.seed),
        ("commit", _code(origin.commit)),
        ("device", origin.device),
        ("platform", origin.platform),
        ("python", origin.python),
        ("versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
    ]
