"""The sections of a ternary run: its twin and the gap, a teacher, the health of its codes, what it was exported to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from finetune.report.elements import (
    Html,
    el,
    facts,
    figure,
    join,
    key,
    not_made,
    pick,
    section,
    table,
)
from finetune.report.metrics import Look, Metrics, Twin, held_out
from finetune.units import (
    DASH,
    TIGHT,
    count,
    decimals,
    finite_number,
    fixed,
    percent,
    plural,
    scientific,
    short,
    size,
    with_error,
)


def gap_in_words(record: dict[str, Any]) -> str | None:
    """The twin's result in a sentence; a gap is one where it is more than two of its standard errors."""
    gap, error = finite_number(pick(record, "twin.gap")), finite_number(pick(record, "twin.gap_stderr"))
    if gap is None:
        return None
    digits = decimals(error)
    figure = with_error(gap, error, digits, sign=True)
    if error is None or abs(gap) <= 2 * error:
        said = f"no measurable gap ({figure})"
    else:
        said = f"a gap of {figure} nats" + (", the ternary model being ahead" if gap < 0 else "")
    return f"Its float twin, trained on the same tokens, reaches {fixed(pick(record, 'twin.loss'), digits)}: {said}."


def twin_part(record: dict[str, Any], metrics: Metrics, twin: Twin, recipe: dict[str, Any]) -> Html:
    """Ternary and float at equal tokens: the gap, and under which conditions it was measured."""
    from finetune.report import plots

    known = pick(record, "twin") or {}
    if not known:
        told = not_made(record, "the twin has not come to its end", "The comparison with the twin")
        return join((el("h3", "The float twin"), told))
    gap, error = finite_number(known.get("gap")), finite_number(known.get("gap_stderr"))
    after, its = pick(record, "eval.after") or {}, pick(twin.record, "eval.after") or {}
    digits = decimals(error, finite_number(after.get("stderr")), finite_number(its.get("stderr")))

    def row(name: str, result: dict[str, Any], lr: Any, train: dict[str, Any]) -> list[Any]:
        rate = f"{finite_number(lr):g}" if finite_number(lr) is not None else DASH
        loss = with_error(result.get("loss"), result.get("stderr"), digits)
        return [name, loss, rate, count(train.get("tokens")), short(train.get("tokens_per_second"))]

    rows = [
        row("ternary", after, pick(recipe, "train.lr"), pick(record, "train") or {}),
        row("float twin", its, known.get("lr"), pick(twin.record, "train") or {}),
        ["gap, paired by row", with_error(gap, error, digits, sign=True), "", "", ""],
    ]
    tokens = (finite_number(pick(record, "train.tokens")), finite_number(pick(twin.record, "train.tokens")))
    equal = f"{count(tokens[0])} tokens each" if tokens[0] == tokens[1] else f"{count(tokens[0])} and {count(tokens[1])} tokens"
    said = (
        f"{equal}, the same rows in the same order, seed {known.get('seed')}. A positive gap means that the ternary model "
        "predicts worse. This is one seed and one learning rate for each: the error is that of the held-out rows alone, and "
        "another seed or a better rate gives another gap."
    )
    ours, theirs = ({step: loss for step, loss, _ in held_out(r, m)} for r, m in ((record, metrics), (twin.record, twin.metrics)))
    both = sorted(set(ours) & set(theirs) - {0.0})
    below: Html = el("p", said, class_="note")
    if len(both) >= 3:
        gaps = [ours[step] - theirs[step] for step in both]
        svg = plots.gap("gap", "Held-out loss of the ternary model less that of its twin", both, gaps)
        below = el("div", figure(svg, "Ternary less twin at each held-out measurement."), below, class_="two")
    head = ["", "held-out loss, nats per token", "peak learning rate", "tokens", "tokens per second"]
    return join((el("h3", "The gap to the float twin"), table(head, rows, "numbers eval"), below))


PARTS = {
    "ce": ("cross-entropy of the text", "TRAIN"),
    "distill_logits": ("divergence from the teacher's next tokens", "HELD"),
    "distill_relations": ("divergence of attention relations", "THIRD"),
}


def distillation_part(metrics: Metrics) -> Html | None:
    """What the loss consists of when there is a teacher."""
    there = {name: metrics.column(name) for name in PARTS if metrics.has(name)}
    if len(there) < 2:
        return None
    from finetune.report import plots

    stretch = max(1, len(metrics.steps) // 10)

    def mean(values: list[float]) -> float | None:
        known = [value for value in values if math.isfinite(value)]
        return sum(known) / len(known) if known else None

    rows, groups, legend = [], [], []
    for name, values in there.items():
        said, colour = PARTS[name]
        rows.append([said, *(DASH if v is None else f"{v:.3g}" for v in (mean(values[:stretch]), mean(values[-stretch:])))])
        positive = [value if math.isfinite(value) and value > 0 else math.nan for value in values]
        if any(math.isfinite(value) for value in positive):
            smoothed = plots.smooth(positive, plots.smoothing_window(len(positive))).tolist()
            groups.append((getattr(plots, colour), [smoothed]))
            legend.append(key(colour.lower(), said))
    svg = plots.bundle(
        "parts", "Parts of the loss by step", metrics.column("step"), groups, y_label="each part, before its weight", log=True
    )
    heads = ["part", f"first {plural(stretch, 'step')}", f"last {plural(stretch, 'step')}"]
    body = el("div", figure(svg), table(heads, rows, "numbers"), class_="two")
    return join((el("h3", "What the teacher adds"), el("p", *legend, class_="legend"), body))


def reternarized_section(figures: dict[str, Any], written: str) -> Html:
    """Adapters merged into a ternary base: what rounding to three values left of them."""
    names = {
        "base_loss": "the base, without the adapter",
        "adapter_loss": "trained: the adapter on its base",
        "float_loss": "merged, in floats",
        "merged_loss": "merged, ternary again",
    }
    base, trained, merged = (finite_number(figures.get(name)) for name in ("base_loss", "adapter_loss", "merged_loss"))
    rows: list[list[Any]] = []
    for name, said in names.items():
        loss = finite_number(figures.get(name))
        apart = loss - trained if loss is not None and trained is not None and name != "adapter_loss" else None
        rows.append([said, fixed(loss, 4), fixed(apart, 4, sign=True) if apart is not None else ""])
    told = [f"{percent(figures.get('flips'))} of the ternary codes changed."]
    if base is not None and trained is not None and merged is not None and base > trained:
        kept = (base - merged) / (base - trained)
        left = percent(kept) if kept > 0 else "nothing"
        told.append(
            f"The adapter had gained {fixed(base - trained, 4)} nats; after rounding to three values {left} of that is left."
        )
    told.append("Three values a weight cannot hold a small update: the adapter on its base stays the trained model.")
    gate = pick(figures, "gate.status")
    written_right = "What was written is what was merged: plain transformers computes the same from it."
    wrong = "Plain transformers computes something else from what was written."
    return section(
        "Merged and ternary again",
        table(["", f"loss, nats per token, {plural(figures.get('rows'), 'row')}", "against the trained model"], rows, "numbers"),
        el("p", " ".join(told), class_="told"),
        el("ul", gate_line(gate == "pass", written_right if gate == "pass" else wrong), class_="checks") if gate else None,
        facts([("written to", written)]),
        note="The adapter was added to the weights of its ternary base, and the sum was made ternary again.",
    )


def gate_line(passed: bool, said: str) -> Html:
    status = el("span", "✓" if passed else "✗", class_="badge")
    return el("li", status, el("div", el("b", said)), class_="pass" if passed else "fail")


# ---------------------------------------------------------------------------------------------------------- ternary weights


HEALTHY = (
    "A ternary layer learns by codes that flip: its master weight moves a little with every step, and what it computes changes "
    "when a weight crosses a boundary. Healthy is a share of flips between a tenth of a percent and a few percent a step, which "
    "falls with the learning rate; zeros near 31 % (a Gaussian's share; 25 % for a uniform one); and a scale (mean magnitude of "
    "the master weights) that moves slowly and stays within a few times its beginning. Nothing flips: the learning rate is too "
    "low. Codes flip to and fro, or the scale runs away: it is too high."
)


def trains_ternary(record: dict[str, Any]) -> bool:
    return pick(record, "model.swap.scheme") == "ternary" and not pick(record, "model.adapters")


def kind_of(path: str) -> str:
    """'model.layers.3.self_attn.q_proj' → 'q_proj'."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def health_section(record: dict[str, Any], metrics: Metrics) -> Html | None:
    """The ternary codes over the run; None for a run that trains none."""
    title, looks = "Ternary health", metrics.looks
    if not looks:
        if not trains_ternary(record) and not record.get("ternary"):
            return None
        return section(title, not_made(record, "no look was taken at the codes (train.health_steps)"))
    from finetune.report import plots
    from quant.health import THRASHING, TURNOVER, WINDOW

    steps = [seen.step for seen in looks]
    alarms = pick(record, "ternary.alarms") or []
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
    turnover = finite_number(pick(record, "ternary.turnover"))
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


# ----------------------------------------------------------------------------------------------------------------- exports


def exports_section(record: dict[str, Any]) -> Html | None:
    """What was written for other programs, and what the gate measured; None for a run that exports nothing."""
    exports = record.get("exports") or {}
    if not exports:
        return section("Exports", not_made(record, "the recipe asks for none")) if trains_ternary(record) else None
    head = ["export", "size", "computes what it should", "apart from the trained model", "loss, nats", "perplexity"]

    def cell(label: str, main: Any, below: Any = None) -> Html:
        return el("td", el("div", main, el("span", below, class_="sub") if below else None), data_label=label)

    rows, commands = [], []
    for name, figures in exports.items():
        gate = figures.get("gate") or {}
        correct, good = gate.get("correct") or {}, gate.get("good") or {}
        passed, program = gate.get("status") == "pass", gate.get("program") or "its program"
        badge = el("span", "✓" if passed else "✗", class_="badge", title=gate.get("status"))
        path, called = str(figures.get("path")), name.upper() if name.startswith("gguf") else name
        state = "pass" if passed else "fail"
        bits = finite_number(figures.get("bits_per_weight"))
        same = finite_number(good.get("same_top"))
        losses = [fixed(good.get(f"{whose}_loss"), 4) for whose in ("trained", "export")]
        perplexities = [short(good.get(f"{whose}_perplexity")) for whose in ("trained", "export")]
        rows.append(
            el(
                "tr",
                el(
                    "th",
                    el("div", badge, el("b", called), None if passed else ": refused by the gate"),
                    el("code", path),
                    el("span", f"run by {program}", class_="sub"),
                    scope="row",
                ),
                cell(head[1], size(figures.get("bytes")), f"{fixed(bits, 2)} bits a parameter" if bits is not None else None),
                cell(
                    head[2],
                    "exactly" if correct.get("error") == 0 else f"error {scientific(correct.get('error'))}",
                    f"allowed {scientific(correct.get('limit'))}; {plural(gate.get('tokens'), 'token')}",
                ),
                cell(
                    head[3],
                    f"KL {scientific(good.get('kl'))} nats",
                    f"same next token {percent(same)}" if same is not None else None,
                ),
                cell(head[4], losses[1], f"trained:{TIGHT}{losses[0]}"),
                cell(head[5], perplexities[1], f"trained:{TIGHT}{perplexities[0]}"),
                class_=state,
            )
        )
        if str(figures.get("format", name)).startswith("gguf"):
            commands.append(f"llama-cli -m {path}    # llama.cpp; checked with {program}")
        else:
            commands.append(f'AutoModelForCausalLM.from_pretrained("{path}")    # {program}')
    top = el("thead", el("tr", *(el("th", title, scope="col") for title in head)))
    note = (
        "Each export was loaded by the program that is to run it, and given the same tokens as the trained model. It computes "
        "what it should if its logits are those of its own arithmetic, to the relative error that is shown; what that arithmetic "
        "changes is the distance from the trained model (KL divergence of the next token, mean)."
    )
    return section(
        "Exports",
        el("div", el("table", top, el("tbody", *rows), class_="exports"), class_="scroll"),
        el("h3", "How to run them, from the run's folder"),
        el("pre", "\n".join(commands), class_="commands"),
        note=note,
    )
