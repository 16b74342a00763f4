"""The section of the plan, compared with what was measured; absent without a plan."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from finetune.record import PlannedPhase, PlanRecord
from finetune.report.elements import Html, el, figure, join, key, section, table
from finetune.report.folder import RunFiles
from finetune.units import DASH, MINUS, byte_scale, count, duration, short, size

FAR = 3  # a budget this many times the highest phase is not drawn: it would dwarf the bars


def plan_section(run: RunFiles) -> Html | None:
    """Memory by phase and term with the budget, and planned beside actual values; None without a plan."""
    plan = run.record.plan
    if plan is None or not (phases := [phase for phase in plan.phases if phase.peak_bytes]):
        return None
    return section(
        "Plan",
        _picture(plan, phases),
        _changes(plan),
        el("h3", "Planned and actual"),
        _compared(run, plan),
        el(
            "details",
            el("summary", f"What the plan assumes ({count(len(plan.notes))})"),
            el("ul", *(el("li", note) for note in plan.notes)),
        )
        if plan.notes
        else None,
        note=_note(plan, phases),
    )


def _colours(phases: list[PlannedPhase]) -> dict[str, str]:
    """Each term of the phases, in order, with the name of its colour."""
    from finetune.report.plots import TERMS

    named: dict[str, str] = {}
    for name in (name for phase in phases for name in phase.terms):
        colour = next((term for term in TERMS if name.startswith(term)), "context")
        if colour == "weights" and name not in named:  # one colour per format
            formats = sum(other.endswith("weights") for other in named.values())
            colour = ("weights", "more weights", "other weights")[min(formats, 2)]
        named.setdefault(name, colour)
    order = list(TERMS)
    return dict(sorted(named.items(), key=lambda item: order.index(item[1])))


def _picture(plan: PlanRecord, phases: list[PlannedPhase]) -> Html:
    """Memory by phase, each a bar of its terms, with the budget if it is near."""
    from finetune.report import plots

    colours = _colours(phases)
    highest = max(phases, key=lambda phase: phase.peak_bytes)
    near = plan.budget_bytes if 0 < plan.budget_bytes <= FAR * highest.peak_bytes else None
    scale, unit = byte_scale(max(highest.peak_bytes, near or 0))
    bars = []
    for phase in phases:
        parts = [(colour, phase.terms[name] / scale) for name, colour in colours.items() if phase.terms.get(name)]
        figure_ = size(phase.peak_bytes)
        if phase.host_bytes:
            figure_ += f", and {size(phase.host_bytes)} of CPU memory"
        bars.append((phase.name, figure_, parts or [("context", phase.peak_bytes / scale)]))
    label = "Planned memory by phase: " + ", ".join(f"{name} {text}" for name, text, _ in bars)
    mark = (near / scale, f"budget {size(near)}") if near else None
    height = 78 + 52 * len(bars)
    drawn = [
        figure(plots.stacked(f"plan-{class_}", label, (width, height), bars, x_label=unit, mark=mark), class_=class_)
        for class_, width in (("wide", plots.WIDE[0]), ("narrow", plots.NARROW[0]))
    ]
    legend = [  # with the figures of the highest phase
        key(colour.replace(" ", "-"), f"{name} {size(highest.terms[name])}" if highest.terms.get(name) else name)
        for name, colour in colours.items()
    ]
    return join([el("p", *legend, el("em", f"figures: {highest.name}"), class_="legend"), *drawn])


def _memory(value: float | None) -> str:
    """Bytes with three digits, so that a difference of 1 % is visible."""
    if value is None:
        return DASH
    scale, unit = byte_scale(value)
    return f"{short(value / scale)} {unit}"


def _time(value: float | None) -> str:
    return duration(value) if value is None or value >= 60 else f"{short(value)} s"


def _off(planned: float | None, actual: float | None) -> str:
    """Difference of the actual from the planned value, in percent."""
    if not planned or actual is None:
        return DASH
    return f"{100 * (actual / planned - 1):+.1f} %".replace("-", MINUS)


def _compared(run: RunFiles, plan: PlanRecord) -> Html:
    """A table of planned and actual values. The step time is the median, because the first steps warm up."""
    record, train, planned = run.record, run.trained, run.record.planned
    times = [value for value in run.metrics.column("step_seconds")[1:] if math.isfinite(value)]
    step = planned.step_seconds if planned is not None and planned.step_seconds else plan.step_seconds
    done = record.state == "done"
    lines: list[tuple[str, Callable[[float | None], str], float | None, float | None]] = [
        ("peak memory of training", _memory, planned.peak_bytes if planned is not None else None,
         train.peak_bytes if train is not None else None),
        ("an optimizer step (median)", _time, step, statistics.median(times) if times else None),
        ("tokens per second", short, plan.tokens_per_step / step if plan.tokens_per_step and step else None,
         train.tokens_per_second if train is not None else None),
        ("training", duration, planned.seconds if planned is not None else None,
         record.train.seconds if record.train is not None and done else None),
        ("the whole run", duration, plan.seconds, record.provenance.seconds if done else None),
    ]  # fmt: skip
    rows = [
        [name, shown(expected), shown(actual), _off(expected, actual)]
        for name, shown, expected, actual in lines
        if expected is not None or actual is not None
    ]
    return table(["", "planned", "actual", "difference"], rows, "numbers")


def _note(plan: PlanRecord, phases: list[PlannedPhase]) -> str:
    highest = max(phases, key=lambda phase: phase.peak_bytes)
    text = f"Computed before anything was loaded, for {plan.device}: at most {size(highest.peak_bytes)}"
    text += (f" of {size(plan.budget_bytes)}" if plan.budget_bytes else "") + f", highest in {highest.name}"
    if plan.kwh is not None:
        text += f"; {short(plan.kwh)} kWh"
        if plan.price is not None:
            text += f", {short(plan.price)} at {short(plan.price_per_kwh)} a kWh"
    text += "."
    if plan.budget_bytes > FAR * highest.peak_bytes:
        text += " The budget is too large to be drawn."
    return text


def _changes(plan: PlanRecord) -> Html | None:
    """The keys that `fit` changed, if any."""
    if plan.fit is None or not plan.fit.keys:
        return None
    shown = ", ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in plan.fit.keys.items()
    )
    return el("p", "Changed so that it fits: ", el("code", shown), class_="told")
