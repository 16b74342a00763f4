"""What was planned, and beside it what came of it. A run without a plan has none of it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from finetune.report.elements import (
    Html,
    el,
    figure,
    join,
    key,
    pick,
    section,
    table,
)
from finetune.report.metrics import Metrics
from finetune.units import (
    DASH,
    MINUS,
    byte_scale,
    count,
    duration,
    finite_number,
    short,
    size,
)

FAR = 3  # a budget so many times the highest phase would make the picture one of the budget


def planned_peak(record: dict[str, Any]) -> float | None:
    """Bytes that training was to take at most, as they are measured while it goes on."""
    return finite_number(pick(record, "planned.peak_bytes"))


def _phases(record: dict[str, Any]) -> list[dict[str, Any]]:
    phases = pick(record, "plan.phases")
    found = phases if isinstance(phases, list) else []
    return [phase for phase in found if isinstance(phase, dict) and finite_number(phase.get("peak_bytes"))]


def _colours(phases: list[dict[str, Any]]) -> dict[str, str]:
    """Each term of the phases, in their order, with the name of its colour."""
    from finetune.report.plots import TERMS

    named: dict[str, str] = {}
    for name in (name for phase in phases for name in phase.get("terms") or {}):
        kind = next((term for term in TERMS if name.startswith(term)), "context")
        if kind == "weights" and name not in named:  # of one format after the other
            formats = sum(colour.endswith("weights") for colour in named.values())
            kind = ("weights", "more weights", "other weights")[min(formats, 2)]
        named.setdefault(name, kind)
    order = list(TERMS)
    return dict(sorted(named.items(), key=lambda item: order.index(item[1])))


def _picture(record: dict[str, Any], phases: list[dict[str, Any]]) -> Html:
    """Memory by phase, each a bar of its terms, with the budget where it is near."""
    from finetune.report import plots

    colours = _colours(phases)
    highest = max(phases, key=lambda phase: float(phase["peak_bytes"]))
    peak, budget = float(highest["peak_bytes"]), finite_number(pick(record, "plan.budget_bytes"))
    near = budget if budget and budget <= FAR * peak else None
    scale, unit = byte_scale(max(peak, near or 0))
    bars = []
    for phase in phases:
        terms = phase.get("terms") or {}
        parts = [(colour, float(terms[name]) / scale) for name, colour in colours.items() if finite_number(terms.get(name))]
        figure_ = size(phase["peak_bytes"])
        if finite_number(phase.get("host_bytes")):
            figure_ += f", and {size(phase['host_bytes'])} of the CPU's"
        bars.append((str(phase.get("name")), figure_, parts or [("context", float(phase["peak_bytes"]) / scale)]))
    label = "Planned memory by phase: " + ", ".join(f"{name} {said}" for name, said, _ in bars)
    mark = (near / scale, f"budget {size(near)}") if near else None
    height = 78 + 52 * len(bars)
    drawn = [
        figure(plots.stacked(f"plan-{class_}", label, (width, height), bars, x_label=unit, mark=mark), class_=class_)
        for class_, width in (("wide", plots.WIDE[0]), ("narrow", plots.NARROW[0]))
    ]
    at_peak = highest.get("terms") or {}  # what the legend's figures are of
    legend = [
        key(colour.replace(" ", "-"), f"{name} {size(at_peak[name])}" if finite_number(at_peak.get(name)) else name)
        for name, colour in colours.items()
    ]
    return join([el("p", *legend, el("em", f"figures: {highest.get('name')}"), class_="legend"), *drawn])


def _memory(value: float | None) -> str:
    """Three digits: what differs by a hundredth is seen to."""
    if value is None:
        return DASH
    scale, unit = byte_scale(value)
    return f"{short(value / scale)} {unit}"


def _time(value: float | None) -> str:
    return duration(value) if value is None or value >= 60 else f"{short(value)} s"


def _off(planned: float | None, actual: float | None) -> str:
    """How far what came lies from what was planned."""
    if not planned or actual is None:
        return DASH
    return f"{100 * (actual / planned - 1):+.1f} %".replace("-", MINUS)


def _compared(record: dict[str, Any], metrics: Metrics) -> Html:
    """Planned beside actual. A step is a median one: the first ones warm up."""
    train = pick(record, "train") or metrics.summary() or {}
    times = [value for value in metrics.column("step_seconds")[1:] if math.isfinite(value)]
    step = finite_number(pick(record, "planned.step_seconds")) or finite_number(pick(record, "plan.step_seconds"))
    tokens = finite_number(pick(record, "plan.tokens_per_step"))
    done = record.get("state") == "done"
    lines = [
        ("peak memory of training", _memory, planned_peak(record), finite_number(train.get("peak_bytes"))),
        ("an optimizer step (median)", _time, step, statistics.median(times) if times else None),
        ("tokens per second", short, tokens / step if tokens and step else None, finite_number(train.get("tokens_per_second"))),
        ("training", duration, finite_number(pick(record, "planned.seconds")),
         finite_number(train.get("seconds")) if done else None),
        ("the whole run", duration, finite_number(pick(record, "plan.seconds")),
         finite_number(pick(record, "provenance.seconds")) if done else None),
    ]  # fmt: skip
    rows = [
        [what, shown(planned), shown(actual), _off(planned, actual)]
        for what, shown, planned, actual in lines
        if planned is not None or actual is not None
    ]
    return table(["", "planned", "actual", "difference"], rows, "numbers")


def _note(record: dict[str, Any], phases: list[dict[str, Any]]) -> str:
    highest = max(phases, key=lambda phase: float(phase["peak_bytes"]))
    budget = finite_number(pick(record, "plan.budget_bytes"))
    said = f"Before anything was loaded, for {pick(record, 'plan.device')}: at most {size(highest['peak_bytes'])}"
    said += f" of {size(budget)}, highest in {highest.get('name')}" if budget else f", highest in {highest.get('name')}"
    if (kwh := finite_number(pick(record, "plan.kwh"))) is not None:
        said += f"; {short(kwh)} kWh"
        if (price := finite_number(pick(record, "plan.price"))) is not None:
            said += f", {short(price)} at {short(pick(record, 'plan.price_per_kwh'))} a kWh"
    said += "."
    if budget and budget > FAR * float(highest["peak_bytes"]):
        said += " The budget lies far beyond the picture."
    return said


def _changes(record: dict[str, Any]) -> Html | None:
    """What `fit` changed, where it did."""
    keys = pick(record, "plan.fit.keys")
    if not isinstance(keys, dict) or not keys:
        return None
    shown = ", ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items())
    return el("p", "Changed so that it fits: ", el("code", shown), class_="told")


def plan_section(record: dict[str, Any], metrics: Metrics) -> Html | None:
    """Memory by phase and term with the budget, and planned beside actual; None where nothing was planned.

    record: `plan` is the plan as JSON; `planned` what is compared with `train`: {peak_bytes, step_seconds, seconds} of training.
    """
    phases = _phases(record)
    if not phases:
        return None
    notes = [str(note) for note in pick(record, "plan.notes") or []]
    return section(
        "Plan",
        _picture(record, phases),
        _changes(record),
        el("h3", "Planned and actual"),
        _compared(record, metrics),
        el(
            "details",
            el("summary", f"What the plan assumes ({count(len(notes))})"),
            el("ul", *(el("li", note) for note in notes)),
        )
        if notes
        else None,
        note=_note(record, phases),
    )
