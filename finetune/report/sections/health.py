"""The section of ternary health: code flips, zeros and scales over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from finetune.report.elements import Html, el, figure, join, key, missing, section, table
from finetune.report.folder import RunFiles
from finetune.report.metrics import TernaryStats
from finetune.units import TIGHT, finite_number, fixed, percent, plural

HEALTHY = (
    "A ternary layer learns when codes flip: each step moves a master weight a little, and the layer's output changes "
    "when a weight crosses a boundary. Healthy: between 0.1 % and a few percent of the codes flip in a step, falling with the "
    "learning rate; about 31 % are zero (as for Gaussian weights; 25 % for uniform ones); and the scale (mean magnitude of "
    "the master weights) moves slowly and stays within a few times its first value. If no codes flip, the learning rate is too "
    "low. If codes flip back and forth, or the scale diverges, it is too high."
)


def layer_type(path: str) -> str:
    """'model.layers.3.self_attn.q_proj' → 'q_proj'."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def health_section(run: RunFiles) -> Html | None:
    """Statistics of the ternary codes over the run; None for a run without trained ternary weights."""
    title, stats, known = "Ternary health", run.metrics.ternary, run.record.ternary
    if not stats:
        if not run.trains_ternary and known is None:
            return None
        return section(title, missing(run.record.state, "the codes were not measured (train.health_steps)"))
    from finetune.report import plots
    from quant.health import THRASHING, TURNOVER, WINDOW

    steps = [one.step for one in stats]
    alarms = known.alarms if known is not None else []
    parts: list[Any] = [el("p", el("b", "Alarm, "), alarm, class_="alarm") for alarm in alarms]
    if not alarms:
        checked = (
            f"Checked: frozen weights (fewer than {100 * TURNOVER:g} % of the codes would flip in the whole run, in the model "
            f"or in one layer) and thrashing ones (more than {100 * THRASHING:g} % flip per step), over {WINDOW} measurements."
        )
        if len(stats) < WINDOW:
            checked += f" This run has {plural(len(stats), 'measurement')}, too few for either check."
        sign, state = ("✓", "pass") if len(stats) >= WINDOW else ("!", "warn")
        line = el("li", el("span", sign, class_="badge"), el("div", el("b", "No alarm."), el("span", checked)), class_=state)
        parts.append(el("ul", line, class_="checks"))

    def percents(values: Iterable[float]) -> list[float]:
        return [100 * value for value in values]

    charts = []
    for index, (name, axis, mark) in enumerate(
        [("flips", "codes that flip in a step (%)", THRASHING), ("zeros", "codes that are 0 (%)", 0.31)]
    ):
        layers = [[layer[index] for layer in one.layers.values()] for one in stats]
        svg = plots.spread(
            name, f"Share of {axis[:-4]} over steps, of all codes and from the lowest to the highest layer", steps,
            percents(one.flips if name == "flips" else one.zeros for one in stats),
            (percents(min(values) for values in layers), percents(max(values) for values in layers)),
            y_label=axis, log=name == "flips", mark=100 * mark, alarm=name == "flips",
        )  # fmt: skip
        dashed = f"Dashed: {100 * mark:g} %, " + ("above which codes thrash." if name == "flips" else "a Gaussian's share.")
        charts.append(figure(svg, f"Line: all codes; band: lowest to highest layer. {dashed}"))
    first, last = stats[0], stats[-1]
    groups: dict[str, list[list[float]]] = {}
    for path, values in first.layers.items():
        growth = [one.layers[path][2] / values[2] if path in one.layers and values[2] else math.nan for one in stats]
        groups.setdefault("attention" if "att" in path else "other", []).append(growth)
    named = [(name, colour, variable) for name, colour, variable in (
        ("attention", plots.TRAIN, "train"), ("other", plots.HELD, "held")) if name in groups]  # fmt: skip
    svg = plots.bundle(
        "scales", "Scale of each layer by step, relative to the first measurement", steps,
        [(colour, groups[name]) for name, colour, _ in named], y_label="scale (first: 1)",
    )  # fmt: skip
    labels = {"attention": "attention", "other": "feed-forward and others" if "attention" in groups else "all layers"}
    legend = el("span", *(key(variable, labels[name]) for name, _, variable in named), class_="legend")
    charts.append(figure(svg, join(("One line per layer. ", legend))))
    blends = [(one.step, one.blend) for one in stats if one.blend is not None]
    if blends:
        svg = plots.series(
            "blend", "Share of the ternary weight by step", [float(step) for step, _ in blends], [value for _, value in blends],
            x_label="step", y_label="λ (0: floats, 1: ternary)", zero=True, raw=True,
        )  # fmt: skip
        charts.append(figure(svg, "The share λ of the ternary weight in w + λ (q(w) − w)."))
    turnover = finite_number(known.turnover) if known is not None else None
    text = f"At the last measurement {100 * last.flips:.2g} % of the codes flipped and {percent(last.zeros)} were 0."
    if turnover is not None:
        text += f" In the whole run each code flipped about {turnover:.2g} times (each measurement × the steps between two)."
    summary = el("div", el("p", text), el("p", frozen_layers(stats[-WINDOW:])), class_="told")
    beside = len(charts) % 2 == 1  # the text takes the place of a chart
    parts += [el("div", *charts, summary if beside else None, class_="two"), None if beside else summary]
    parts.append(layer_tables(first, last))
    return section(title, *parts, note=HEALTHY)


def frozen_layers(stats: list[TernaryStats]) -> str:
    """A sentence on layers that stopped flipping, relative to the model's mean, which falls with the learning rate too."""
    window = f"the last {plural(len(stats), 'measurement')}" if len(stats) > 1 else "the last measurement"
    mean = sum(one.flips for one in stats) / len(stats)
    if mean == 0:
        return f"In {window} no code flipped in any layer."
    flips = {path: sum(one.layers[path][0] for one in stats if path in one.layers) / len(stats) for path in stats[-1].layers}
    frozen = [path for path, share in flips.items() if share < mean / 10]
    if frozen:
        return f"Frozen in {window} (fewer flips than a tenth of the model's mean): {', '.join(frozen)}."
    least = min(flips, key=lambda path: flips[path])
    return f"No layer is frozen: the slowest in {window}, {least}, flipped {flips[least] / mean:.2g} times the model's mean."


def layer_tables(first: TernaryStats, last: TernaryStats) -> Html:
    """The last measurement by type of layer, and each layer in a collapsed table."""

    def growth(path: str) -> float:
        before = first.layers.get(path, last.layers[path])[2]
        return last.layers[path][2] / before if before else math.nan

    def span(values: list[float], scale: float, digits: int) -> str:
        low, high = (fixed(scale * value, digits) for value in (min(values), max(values)))
        return low if low == high else f"{low} … {high}"

    by_type: dict[str, list[str]] = {}
    for path in last.layers:
        by_type.setdefault(layer_type(path), []).append(path)
    rows = [
        [
            f"{name}, {len(paths)}{TIGHT}×",
            span([last.layers[path][0] for path in paths], 100, 2),
            span([last.layers[path][1] for path in paths], 100, 1),
            span([growth(path) for path in paths], 1, 2),
        ]
        for name, paths in by_type.items()
    ]
    each = [
        [path, fixed(100 * flips, 3), fixed(100 * zeros, 1), f"{scale:.4g}", f"× {fixed(growth(path), 2)}"]
        for path, (flips, zeros, scale) in last.layers.items()
    ]
    shares = ["flips, %", "zeros, %"]
    return join(
        (
            table(["last measurement", *shares, "scale, first: 1"], rows, "numbers kinds"),
            el(
                "details",
                el("summary", f"Each of {plural(len(each), 'layer')}"),
                table(["layer", *shares, "scale", "since the first"], each, "numbers kinds"),
            ),
        )
    )
