"""The section of the loss by step, with the float twin, the teacher's terms, and bad steps."""

from __future__ import annotations

import math

from finetune.report.elements import Html, el, figure, join, key, missing, section, table
from finetune.report.folder import RunFiles
from finetune.report.metrics import Metrics
from finetune.report.sections.twin import twin_part
from finetune.units import DASH, count, finite_number, plural


def loss_section(run: RunFiles) -> Html:
    from finetune.report import plots

    record, metrics, twin, held = run.record, run.metrics, run.twin, run.held_out()
    # With a teacher the training loss has several terms; the held-out loss is the cross-entropy alone.
    part = "ce" if metrics.has("ce") else "loss"
    losses, steps = metrics.column(part), metrics.column("step")
    if not metrics.has(part) and len(held) < 2:
        return section("Loss", missing(record.state, "no training step was recorded"), events_part(metrics))
    window = plots.smoothing_window(len(losses))
    smoothed = f" (faint: every step; line: mean over {window} steps)" if window > 1 else ""
    other = None
    if twin is not None:
        other = (twin.metrics.column("step"), twin.metrics.column("loss"), twin.held_out())
        legend = [key("train", "ternary"), key("twin", "float twin"), el("em", f"lines: training{smoothed}")]
        if held:
            legend.append(el("em", "points: held-out, ± 1 standard error over rows"))
    else:
        training = "training, cross-entropy" if part == "ce" else "training"
        legend = [key("train", training + smoothed)]
        if held:
            legend.append(key("held", "held-out, ± 1 standard error over rows"))
    level = finite_number(record.eval.float_model.loss) if record.eval.float_model is not None else None
    if level is not None:
        legend.append(key("muted", "dashed: the float model before ternarization"))
    notes = []
    if broken := sum(not math.isfinite(value) for value in losses):
        notes.append(f"{broken} of {plural(len(losses), 'step')} had no finite loss: a gap in the line.")
    if metrics.unreadable:
        notes.append(f"{plural(metrics.unreadable, 'line')} of metrics.jsonl could not be read.")
    if held and record.eval.difference is not None:
        notes.append(
            "The held-out rows are the same each time, so the difference between two points is more precise than each "
            "point: the table below has its standard error."
        )
    return section(
        "Loss",
        el("p", *legend, class_="legend"),
        figure(plots.loss("loss-wide", plots.WIDE, steps, losses, held, twin=other, level=level), class_="wide"),
        figure(plots.loss("loss-narrow", plots.NARROW, steps, losses, held, twin=other, level=level), class_="narrow"),
        el("p", " ".join(notes), class_="note") if notes else None,
        twin_part(run, twin) if twin is not None else None,
        distillation_part(metrics),
        events_part(metrics),
    )


def events_part(metrics: Metrics) -> Html | None:
    """Bad steps with the samples skipped for them, and steps that ran out of memory."""
    back, skipped, memory = (metrics.events[name] for name in ("rolled_back", "skipped", "out_of_memory"))
    parts: list[Html] = []
    if back or skipped:
        rows = [
            [count(entry.get("from", entry["step"])), how, entry.get("found") or DASH, entry.get("where") or DASH]
            for entries, action in ((back, "rolled back to step {}"), (skipped, "skipped; continued with the next samples"))
            for entry in entries
            for how in [action.format(count(entry["step"]))]
        ]
        text = f"{plural(len(rows), 'bad step')} {'was' if len(rows) == 1 else 'were'} not taken."
        if back:
            text += f" The run was rolled back to a checkpoint {plural(len(back), 'time')}; samples of the bad step were skipped."
        parts += [el("h3", "Bad steps"), el("p", text, class_="note")]
        parts.append(table(["step", "action", "found", "samples skipped"], rows))
    if memory:
        rows = [[count(entry["step"]), count(entry.get("parts")), entry.get("found") or DASH] for entry in memory]
        text = (
            "From these steps on each micro-batch was split into this many parts, which ran one after the other: the same "
            "samples in the same order, and the same step up to rounding."
        )
        parts += [el("h3", "Out of memory"), el("p", text, class_="note")]
        parts.append(table(["step", "parts", "found"], rows))
    return join(parts) if parts else None


PARTS = {
    "ce": ("cross-entropy of the text", "TRAIN"),
    "distill_logits": ("divergence from the teacher's next tokens", "HELD"),
    "distill_relations": ("divergence of attention relations", "THIRD"),
}


def distillation_part(metrics: Metrics) -> Html | None:
    """The terms of the loss with a teacher."""
    columns = {name: metrics.column(name) for name in PARTS if metrics.has(name)}
    if len(columns) < 2:
        return None
    from finetune.report import plots

    stretch = max(1, len(metrics.steps) // 10)

    def mean(values: list[float]) -> float | None:
        known = [value for value in values if math.isfinite(value)]
        return sum(known) / len(known) if known else None

    rows, groups, legend = [], [], []
    for name, values in columns.items():
        label, colour = PARTS[name]
        rows.append([label, *(DASH if v is None else f"{v:.3g}" for v in (mean(values[:stretch]), mean(values[-stretch:])))])
        positive = [value if math.isfinite(value) and value > 0 else math.nan for value in values]
        if any(math.isfinite(value) for value in positive):
            smoothed = plots.smooth(positive, plots.smoothing_window(len(positive))).tolist()
            groups.append((getattr(plots, colour), [smoothed]))
            legend.append(key(colour.lower(), label))
    svg = plots.bundle(
        "parts", "Parts of the loss by step", metrics.column("step"), groups, y_label="each part, before its weight", log=True
    )
    heads = ["part", f"first {plural(stretch, 'step')}", f"last {plural(stretch, 'step')}"]
    body = el("div", figure(svg), table(heads, rows, "numbers"), class_="two")
    return join((el("h3", "What the teacher adds"), el("p", *legend, class_="legend"), body))
