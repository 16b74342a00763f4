"""The ternary codes over a run: what flips, what is zero, how the scales move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from finetune.report.elements import Html, el, figure, join, key, not_made, section, table
from finetune.report.folder import RunFiles
from finetune.report.metrics import Look
from finetune.units import TIGHT, finite_number, fixed, percent, plural

HEALTHY = (
    "A ternary layer learns by codes that flip: its master weight moves a little with every step, and what it computes changes "
    "when a weight crosses a boundary. Healthy is a share of flips between a tenth of a percent and a few percent a step, which "
    "falls with the learning rate; zeros near 31 % (a Gaussian's share; 25 % for a uniform one); and a scale (mean magnitude of "
    "the master weights) that moves slowly and stays within a few times its beginning. Nothing flips: the learning rate is too "
    "low. Codes flip to and fro, or the scale runs away: it is too high."
)


def kind_of(path: str) -> str:
    """'model.layers.3.self_attn.q_proj' → 'q_proj'."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def health_section(run: RunFiles) -> Html | None:
    """The ternary codes over the run; None for a run that trains none."""
    title, looks, known = "Ternary health", run.metrics.looks, run.record.ternary
    if not looks:
        if not run.trains_ternary and known is None:
            return None
        return section(title, not_made(run.record.state, "no look was taken at the codes (train.health_steps)"))
    from finetune.report import plots
    from quant.health import THRASHING, TURNOVER, WINDOW

    steps = [seen.step for seen in looks]
    alarms = known.alarms if known is not None else []
    parts: list[Any] = [el("p", el("b", "Alarm, "), alarm, class_="alarm") for alarm in alarms]
    if not alarms:
        said = (
            f"Looked for: frozen weights (fewer than {100 * TURNOVER:g} % of the codes would flip in the whole run, in the model "
            f"or in a single layer) and thrashing ones (more than {100 * THRASHING:g} % flip a step), each over {WINDOW} looks."
        )
        if len(looks) < WINDOW:
            said += f" With {plural(len(looks), 'look')} in this run neither could be told."
        sign, state = ("✓", "pass") if len(looks) >= WINDOW else ("!", "warn")
        looked = el("div", el("b", "No alarm."), el("span", said))
        line = el("li", el("span", sign, class_="badge"), looked, class_=state)
        parts.append(el("ul", line, class_="checks"))

    def percents(values: Iterable[float]) -> list[float]:
        return [100 * value for value in values]

    charts = []
    for index, (name, said, mark) in enumerate(
        [("flips", "codes that flip in a step (%)", THRASHING), ("zeros", "codes that are 0 (%)", 0.31)]
    ):
        layers = [[layer[index] for layer in seen.layers.values()] for seen in looks]
        svg = plots.spread(
            name, f"Share of {said[:-4]} over steps, of all codes and from the lowest to the highest layer", steps,
            percents(seen.flips if name == "flips" else seen.zeros for seen in looks),
            (percents(min(values) for values in layers), percents(max(values) for values in layers)),
            y_label=said, log=name == "flips", mark=100 * mark, alarm=name == "flips",
        )  # fmt: skip
        dashed = f"Dashed: {100 * mark:g} %, " + ("above which codes thrash." if name == "flips" else "a Gaussian's share.")
        charts.append(figure(svg, f"Line: all codes; band: lowest to highest layer. {dashed}"))
    first, last = looks[0], looks[-1]
    groups: dict[str, list[list[float]]] = {}
    for path, values in first.layers.items():
        grown = [seen.layers[path][2] / values[2] if path in seen.layers and values[2] else math.nan for seen in looks]
        groups.setdefault("attention" if "att" in path else "other", []).append(grown)
    named = [(name, colour, variable) for name, colour, variable in (
        ("attention", plots.TRAIN, "train"), ("other", plots.HELD, "held")) if name in groups]  # fmt: skip
    svg = plots.bundle(
        "scales", "Scale of each layer by step, relative to the first look", steps,
        [(colour, groups[name]) for name, colour, _ in named], y_label="scale (first look: 1)",
    )  # fmt: skip
    words = {"attention": "attention", "other": "feed-forward and others" if "attention" in groups else "all layers"}
    legend = el("span", *(key(variable, words[name]) for name, _, variable in named), class_="legend")
    charts.append(figure(svg, join(("One line a layer. ", legend))))
    blends = [(seen.step, seen.blend) for seen in looks if seen.blend is not None]
    if blends:
        svg = plots.series(
            "blend", "Share of the ternary weight by step", [float(step) for step, _ in blends], [value for _, value in blends],
            x_label="step", y_label="λ (0: floats, 1: ternary)", zero=True, raw=True,
        )  # fmt: skip
        charts.append(figure(svg, "How far the weights are ternary: w + λ (q(w) − w)."))
    turnover = finite_number(known.turnover) if known is not None else None
    told = f"At the last look {100 * last.flips:.2g} % of the codes flipped and {percent(last.zeros)} were 0."
    if turnover is not None:
        told += f" Over the run about {turnover:.2g} flips a code were counted (each look × the steps between two looks)."
    spoken = el("div", el("p", told), el("p", still_in_words(looks[-WINDOW:])), class_="told")
    beside = len(charts) % 2 == 1  # the words fill the place of a chart
    parts += [el("div", *charts, spoken if beside else None, class_="two"), None if beside else spoken, layer_tables(first, last)]
    return section(title, *parts, note=HEALTHY)


def still_in_words(looks: list[Look]) -> str:
    """Which layers stopped moving, by the looks given: measured by the model's own mean, which the learning rate moves too."""
    seen = f"the last {plural(len(looks), 'look')}" if len(looks) > 1 else "the last look"
    mean = sum(look.flips for look in looks) / len(looks)
    if mean == 0:
        return f"In {seen} not one code flipped in any layer."
    moved = {path: sum(look.layers[path][0] for look in looks if path in look.layers) / len(looks) for path in looks[-1].layers}
    still = [path for path, flips in moved.items() if flips < mean / 10]
    if still:
        return f"Stopped moving in {seen} (less than a tenth of the model's mean): {', '.join(still)}."
    least = min(moved, key=lambda path: moved[path])
    return f"No layer stopped moving: the stillest in {seen}, {least}, flipped {moved[least] / mean:.2g} times the model's mean."


def layer_tables(first: Look, last: Look) -> Html:
    """The last look by kind of layer, and each layer on demand."""

    def grown(path: str) -> float:
        before = first.layers.get(path, last.layers[path])[2]
        return last.layers[path][2] / before if before else math.nan

    def span(values: list[float], scale: float, digits: int) -> str:
        low, high = (fixed(scale * value, digits) for value in (min(values), max(values)))
        return low if low == high else f"{low} … {high}"

    kinds: dict[str, list[str]] = {}
    for path in last.layers:
        kinds.setdefault(kind_of(path), []).append(path)
    rows = [
        [
            f"{kind}, {len(paths)}{TIGHT}×",
            span([last.layers[path][0] for path in paths], 100, 2),
            span([last.layers[path][1] for path in paths], 100, 1),
            span([grown(path) for path in paths], 1, 2),
        ]
        for kind, paths in kinds.items()
    ]
    each = [
        [path, fixed(100 * flips, 3), fixed(100 * zeros, 1), f"{scale:.4g}", f"× {fixed(grown(path), 2)}"]
        for path, (flips, zeros, scale) in last.layers.items()
    ]
    shares = ["flips, %", "zeros, %"]
    return join(
        (
            table(["last look", *shares, "scale, first: 1"], rows, "numbers kinds"),
            el(
                "details",
                el("summary", f"Each of {plural(len(each), 'layer')}"),
                table(["layer", *shares, "scale", "since the first look"], each, "numbers kinds"),
            ),
        )
    )
