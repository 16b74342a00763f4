"""The sections of speed and memory, learning rate and gradient norm by step, and time by phase."""

from __future__ import annotations

import math

from finetune.report.elements import Html, el, figure, missing, section
from finetune.report.folder import RunFiles
from finetune.units import byte_scale, duration, finite_number, percent

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def speed_section(run: RunFiles) -> Html:
    record, metrics = run.record, run.metrics
    if not metrics.steps:
        return section("Speed and memory", missing(record.state, "no training step was recorded"))
    from finetune.report import plots

    times, unit = metrics.clock()
    parts = []
    if metrics.has("tokens_per_second"):
        svg = plots.series(
            "speed", "Tokens per second over training time", times, metrics.column("tokens_per_second"),
            x_label=f"training time ({unit})", y_label="tokens per second", zero=True,
        )  # fmt: skip
        parts.append(figure(svg))
    if metrics.has("memory_bytes"):
        planned = record.planned.peak_bytes if record.planned is not None else None
        top = max([value for value in metrics.column("memory_bytes") if math.isfinite(value)] + [planned or 0])
        scale, name = byte_scale(top)
        svg = plots.series(
            "memory", "Peak memory so far over training time", times, [value / scale for value in metrics.column("memory_bytes")],
            x_label=f"training time ({unit})", y_label=f"peak memory so far ({name})", zero=True, raw=True,
            mark=planned / scale if planned else None,
        )  # fmt: skip
        parts.append(figure(svg, "dashed: the planned peak" if planned else None))
    note = None
    if record.train is not None:
        kind = record.train.memory_kind
        note = f"Times of optimizer steps, without evaluations. Memory is {kind}."
    return section("Speed and memory", el("div", *parts, class_="two"), note=note)


def optimizer_section(run: RunFiles) -> Html:
    title, metrics = "Learning rate and gradient norm", run.metrics
    if not (metrics.has("lr") or metrics.has("grad_norm")):
        return section(title, missing(run.record.state, "no training step was recorded"))
    from finetune.report import plots

    steps, parts = metrics.column("step"), []
    if metrics.has("lr"):
        rates = metrics.column("lr")
        top = max(value for value in rates if math.isfinite(value))
        power = math.floor(math.log10(top)) if top > 0 else 0
        raised = str(power).translate(SUPERSCRIPT)
        svg = plots.series(
            "rate", "Learning rate by step", steps, [rate / 10.0**power for rate in rates],
            x_label="step", y_label=f"learning rate (× 10{raised})" if power else "learning rate", zero=True, raw=True,
        )  # fmt: skip
        parts.append(figure(svg))
    if metrics.has("grad_norm"):
        svg = plots.series(
            "gradient", "Gradient norm by step", steps, metrics.column("grad_norm"),
            x_label="step", y_label="gradient norm (before clipping)", zero=True,
        )  # fmt: skip
        parts.append(figure(svg))
    return section(title, el("div", *parts, class_="two"))


def time_section(run: RunFiles) -> Html:
    record = run.record
    spent: dict[str, float] = {}
    for phase in record.phases:
        spent[phase.name] = spent.get(phase.name, 0.0) + (finite_number(phase.seconds) or 0.0)
    total = sum(spent.values())
    if not total:
        return section("Where the time went", missing(record.state, "no phase was recorded"))
    most = max(spent.values())
    rows = [
        el(
            "li",
            el("span", name, class_="name"),
            el("span", el("i", style=f"width:{100 * seconds / most:.2f}%"), class_="track"),
            el("span", duration(seconds), class_="time"),
            el("span", percent(seconds / total), class_="part"),
        )
        for name, seconds in spent.items()
    ]
    resumed = len(record.provenance.resumed)
    note = f"{duration(total)} in all" + (f", over {resumed + 1} processes, because it was resumed." if resumed else ".")
    return section("Where the time went", el("ol", *rows, class_="phases"), note=note)
