"""Where the results come from, the recipe, and what to type next."""

from __future__ import annotations

from typing import Any

from finetune.report.elements import Html, el, facts, join, not_made, section
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
        return section("Recipe", not_made(run.record.state, "there is no recipe.yaml in the folder"))
    return section("Recipe", el("details", el("summary", "The whole recipe, with every default"), el("pre", run.recipe)))


def next_section(run: RunFiles) -> Html:
    commands = run.record.next
    if not commands:
        return section("What to type next", not_made(run.record.state, "the run names nothing"))
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
            f"{count(swap.swapped)} linears are trained to be ternary ({percent(swap.share)} of the parameters); {swap.backend}"
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
        ("the step", "; ".join(model.fast or [])),
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
    if isinstance(data, TextRecord):  # a stream: who knows how many rows it has
        split = f"{plural(data.heldout_rows, 'row')} held out"
        split += f", {plural(data.rows_skipped, 'document')} skipped" if data.rows_skipped else ""
        rows += [("rows", f"{data.format}, {data.format_reason}"), ("split", split)]
        rows.append(("vocabulary", plural(data.vocabulary, "token")))
    if data is not None:
        rows.append(("chat template", data.template))
    return rows


def _run(run: RunFiles) -> Rows:
    came = run.record.provenance
    return [
        ("command", _code(came.command)),
        ("started", moment(came.started)),
        ("finished", moment(came.finished) or "not finished"),
        ("resumed", "; ".join(f"{moment(entry.time)} from {entry.checkpoint or 'the beginning'}" for entry in came.resumed)),
        ("seed", came.seed),
        ("commit", _code(came.commit)),
        ("device", came.device),
        ("platform", came.platform),
        ("python", came.python),
        ("versions", ", ".join(f"{name} {version}" for name, version in came.versions.items())),
    ]
