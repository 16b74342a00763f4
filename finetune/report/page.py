"""The page of a run: one HTML file, readable before anything else is, on a laptop and a phone, by day and by night.

It reads only the run folder (run.json, metrics.jsonl, recipe.yaml, and those of its twin) and loads nothing: no network, no
script, plots as inline SVG; a content policy in the page says so to the browser. Every element is made by `el`, which escapes
whatever is not already an element, so text out of the data can never become markup. What a run did not make is shown as not
made, with the reason.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.files import human_bytes, read_run, write_atomic

NAME = "report.html"
STYLE = Path(__file__).with_name("page.css")
MINUS, DASH, TIGHT = "−", "–", "\N{NO-BREAK SPACE}"


# --------------------------------------------------------------------------------------------------------------- elements


class Html(str):
    """Text that is markup already."""


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are not Html are escaped; None is nothing; attributes: `class_` is class, None is none."""
    known = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    shown = "".join(f' {key}="{html.escape(str(value))}"' for key, value in known)
    if name == "meta":
        return Html(f"<meta{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None))


# ---------------------------------------------------------------------------------------------------------------- numbers


def pick(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for "a.b", or None where there is no such thing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def number(value: Any) -> float | None:
    """A finite number, or None; "nan" and "inf" are how run folders write what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def decimals(*errors: float | None) -> int:
    """Digits behind the point that standard errors justify: 2 … 4."""
    known = [error for error in errors if error]
    return min(4, max(2, -math.floor(math.log10(min(known))))) if known else 3


def fixed(value: Any, digits: int, *, sign: bool = False) -> str:
    known = number(value)
    if known is None:
        return DASH
    return f"{known:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def with_error(value: Any, error: Any, digits: int, *, sign: bool = False) -> str:
    """'2.45 ± 0.06'; without ± where the error is unknown."""
    return fixed(value, digits, sign=sign) + (f"{TIGHT}±{TIGHT}{fixed(error, digits)}" if number(error) is not None else "")


def digits_of(value: float | None) -> int:
    """Digits behind the point that leave about three in all."""
    return 0 if value is None or abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def short(value: Any) -> str:
    """Three digits: 24.8 · 1,234 · 3.1e+09."""
    known = number(value)
    if known is None:
        return DASH
    if abs(known) >= 1e7:
        return f"{known:.2e}"
    return fixed(known, digits_of(known))


def count(value: Any) -> str:
    known = number(value)
    return DASH if known is None else f"{known:,.0f}"


def many(value: Any) -> str:
    """134515008 → '134.5 M'."""
    known = number(value)
    if known is None:
        return DASH
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if known >= max(scale, 1e4):
            return f"{fixed(known / scale, 2 if known < 10 * scale else 1)} {unit}"
    return count(known)


def scientific(value: Any) -> str:
    """0.0000448 → '4.5e-05'; 0 stays 0."""
    known = number(value)
    return DASH if known is None else "0" if known == 0 else f"{known:.3g}" if known >= 1e-3 else f"{known:.1e}"


def percent(value: Any) -> str:
    known = number(value)
    return DASH if known is None else f"{100 * known:.{0 if known >= 0.995 else 1}f} %"


def size(value: Any) -> str:
    known = number(value)
    return DASH if known is None else human_bytes(known)


def duration(value: Any) -> str:
    """192 → '3 min 12 s'."""
    seconds = number(value)
    if seconds is None:
        return DASH
    if seconds < 59.95:
        parts = [f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}", "s"]
    else:
        minutes, rest = divmod(round(seconds), 60)
        hours = [f"{minutes // 60}", "h", f"{minutes % 60:02d}", "min"]
        parts = hours if minutes >= 60 else [f"{minutes}", "min", f"{rest:02d}", "s"]
    return TIGHT.join(parts)


def moment(value: Any) -> str | None:
    """'2026-01-05T09:12:44+00:00' → '2026-01-05 09:12:44 UTC'."""
    return str(value).replace("T", " ").replace("+00:00", " UTC") if value else None


def plural(value: Any, word: str) -> str:
    return f"{count(value)} {word}{'' if value == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------------------ parts


def section(title: str, *content: Any, note: Any = None) -> Html:
    name = re.sub(r"\W+", "-", title.lower())
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *content, id=name)


def not_made(record: dict[str, Any], reason: str, what: str | None = None) -> Html:
    """Why a part (or `what` of it) is missing; `reason` is that of a run which did all it should."""
    state = record.get("state")
    if state == "failed":
        reason = "the run failed before it; the error stands above"
    elif state == "stopped":
        reason = "the run was stopped before it"
    elif state == "running":
        reason = "the run had not come to it when this page was written"
    return el("p", el("b", f"{what} not made" if what else "Not made"), f": {reason}.", class_="none")


def table(head: list[str], rows: list[list[Any]], class_: str | None = None) -> Html:
    """The first column names the rows."""
    cells = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    top = el("thead", el("tr", *(el("th", title, scope="col") for title in head)))
    return el("div", el("table", top, el("tbody", *cells), class_=class_), class_="scroll")


def facts(rows: list[tuple[str, Any]]) -> Html:
    """Name and value; rows without a value are left out."""
    return el("dl", *(join((el("dt", name), el("dd", value))) for name, value in rows if value not in (None, "")), class_="facts")


def figure(svg: str, caption: Any = None, class_: str | None = None) -> Html:
    return el("figure", Html(svg), el("figcaption", caption) if caption else None, class_=class_)


def key(variable: str, text: str) -> Html:
    return el("span", el("i", style=f"background:var(--{variable})"), text)


# ---------------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Look:
    """A look at the ternary codes after a step: shares of them; each layer by its path: (flips, zeros, scale)."""

    step: int
    flips: float
    zeros: float
    blend: float | None
    layers: dict[str, tuple[float, float, float]]


def look(entry: dict[str, Any]) -> Look:
    """A line of metrics as a Look; raises ValueError, KeyError or TypeError where it is none."""
    seen = entry["ternary"]
    values = (seen["flips"], seen["zeros"], *(value for layer in seen["layers"].values() for value in layer))
    if not seen["layers"] or any(number(value) is None for value in values):
        raise ValueError("not a number")
    layers = {path: (float(flips), float(zeros), float(scale)) for path, (flips, zeros, scale) in seen["layers"].items()}
    return Look(int(entry["step"]), float(seen["flips"]), float(seen["zeros"]), number(seen.get("blend")), layers)


class Metrics:
    """metrics.jsonl: training steps, evaluations and looks at ternary codes in order, and rollbacks.

    A step that was written twice counts as it was last.
    """

    def __init__(self, path: Path) -> None:
        steps: dict[int, dict[str, Any]] = {}
        evaluations: dict[int, dict[str, Any]] = {}
        looks: dict[int, Look] = {}
        self.rollbacks: list[dict[str, Any]] = []
        self.unreadable = 0  # lines, such as the last one of a process that was killed
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                step = int(entry["step"])
                if "ternary" in entry:
                    looks[step] = look(entry)
                elif "rolled_back" in entry:
                    self.rollbacks.append({"step": step, **entry["rolled_back"]})
                else:
                    (evaluations if "eval_loss" in entry else steps)[step] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                self.unreadable += bool(line.strip())
        self.steps = [steps[step] for step in sorted(steps)]
        self.evaluations = [evaluations[step] for step in sorted(evaluations)]
        self.looks = [looks[step] for step in sorted(looks)]

    def column(self, name: str) -> list[float]:
        """NaN where a step has no finite value."""
        return [math.nan if (value := number(entry.get(name))) is None else value for entry in self.steps]

    def has(self, name: str) -> bool:
        return any(math.isfinite(value) for value in self.column(name))

    def summary(self) -> dict[str, Any] | None:
        """What `train` in run.json says of a run that ended well, for one that did not."""
        if not self.steps:
            return None
        last, seconds = self.steps[-1], sum(value for value in self.column("step_seconds") if math.isfinite(value))
        tokens = number(last.get("tokens"))
        return {
            "steps": len(self.steps),
            "tokens": tokens,
            "supervised_tokens": last.get("supervised"),
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "peak_bytes": last.get("memory_bytes"),
        }

    def clock(self) -> tuple[list[float], str]:
        """Training time after each step (pauses of a resumed run left out), and its unit."""
        total, times = 0.0, []
        for seconds in self.column("step_seconds"):
            total += seconds if math.isfinite(seconds) else 0.0
            times.append(total)
        scale, unit = (3600, "h") if total >= 7200 else (60, "min") if total >= 600 else (1, "s")
        return [time / scale for time in times], unit


def held_out(record: dict[str, Any], metrics: Metrics) -> list[tuple[float, float, float]]:
    """(step, loss, standard error or NaN) of every evaluation: before, during, after."""
    points = [(entry["step"], entry["eval_loss"], entry.get("eval_stderr")) for entry in metrics.evaluations]
    if before := pick(record, "eval.before"):
        points.insert(0, (0, before.get("loss"), before.get("stderr")))
    last = pick(record, "train.steps")
    if (after := pick(record, "eval.after")) and last is not None:
        points = [point for point in points if point[0] != last]
        points.append((last, after.get("loss"), after.get("stderr")))
    made = []
    for step, loss, error in points:
        value, spread = number(loss), number(error)
        if value is not None:
            made.append((float(step), value, math.nan if spread is None else spread))
    return made


@dataclass(frozen=True)
class Twin:
    """The float twin's own run folder."""

    record: dict[str, Any]
    metrics: Metrics


def twin_of(run_dir: Path) -> Twin | None:
    """What the twin has left in the run's folder `twin`; None where there is none (yet)."""
    folder = run_dir / "twin"
    return Twin(read_run(folder), Metrics(folder / "metrics.jsonl")) if (folder / "run.json").is_file() else None


# --------------------------------------------------------------------------------------------------------------- sections


def gap_in_words(record: dict[str, Any]) -> str | None:
    """The twin's result in a sentence; a gap is one where it is more than two of its standard errors."""
    gap, error = number(pick(record, "twin.gap")), number(pick(record, "twin.gap_stderr"))
    if gap is None:
        return None
    digits = decimals(error)
    figure = with_error(gap, error, digits, sign=True)
    if error is None or abs(gap) <= 2 * error:
        said = f"no measurable gap ({figure})"
    else:
        said = f"a gap of {figure} nats" + (", the ternary model being ahead" if gap < 0 else "")
    return f"Its float twin, trained on the same tokens, reaches {fixed(pick(record, 'twin.loss'), digits)}: {said}."


def verdict(record: dict[str, Any], metrics: Metrics) -> str:
    """The result in one sentence; 'fell' only where the difference is more than two of its standard errors."""
    before, after = pick(record, "eval.before"), pick(record, "eval.after")
    difference, error = number(pick(record, "eval.difference")), number(pick(record, "eval.difference_stderr"))
    device = str(pick(record, "provenance.device") or "").partition(": ")[2] or pick(record, "provenance.device")
    taken = duration(pick(record, "provenance.seconds")) + (f" on {device}" if device else "")
    if before and after and difference is not None:
        digits = decimals(number(before.get("stderr")), number(after.get("stderr")), error)
        certain = error is not None and abs(difference) > 2 * error
        verb = "did not change measurably:" if not certain else "fell" if difference < 0 else "rose"
        compared = [gap_in_words(record)]
        if float_loss := pick(record, "eval.float.loss"):
            compared.append(f"The float model that it came from has {fixed(float_loss, digits)}.")
        result = (
            f"Held-out loss {verb} from {with_error(before.get('loss'), before.get('stderr'), digits)} to "
            f"{with_error(after.get('loss'), after.get('stderr'), digits)} nats "
            f"({with_error(difference, error, digits, sign=True)}) over {plural(after.get('rows'), 'row')}; "
            f"perplexity {short(before.get('perplexity'))} → {short(after.get('perplexity'))}; {taken}."
        )
        return " ".join([result, *filter(None, compared)])
    state = record.get("state")
    steps = len(metrics.steps)
    said = [f"Trained {plural(steps, 'step')}." if steps else None]
    if before:
        loss = with_error(before.get("loss"), before.get("stderr"), decimals(number(before.get("stderr"))))
        said.append(f"Held-out loss before training: {loss} nats over {plural(before.get('rows'), 'row')}.")
    if state == "done":
        said.append("Nothing was held out, so nothing was measured.")
    else:
        said.append(
            {
                "failed": "The run failed; it has no result.",
                "stopped": "The run was stopped; it has no result yet.",
                "running": "The run was still going on when this page was written.",
            }.get(str(state), f"The run's state is {state}.")
        )
    return " ".join([*filter(None, said), f"{taken[:1].upper()}{taken[1:]}."])


def header(record: dict[str, Any], metrics: Metrics) -> Html:
    state = str(record.get("state"))
    error = record.get("error")
    forced = pick(record, "preflight.forced")
    why = "What went wrong" if state == "failed" else "Why it ended"
    alarms, there = pick(record, "ternary.alarms") or [], el("a", "Ternary health", href="#ternary-health")
    return el(
        "header",
        el("p", " · ".join(filter(None, ("finetune", record.get("kind")))), class_="eyebrow"),
        el("h1", record.get("name") or "unnamed", " ", el("span", state, class_=f"state {state}")),
        el("p", record["about"], class_="about") if record.get("about") else None,
        el("p", verdict(record, metrics), class_="verdict"),
        el("div", el("h2", why), el("pre", error), class_="alarm", role="alert") if error else None,
        el("p", el("b", "Trained with --force, against the preflight: "), forced, class_="alarm") if forced else None,
        el("p", el("b", f"{plural(len(alarms), 'alarm')} of the ternary weights"), ": see ", there, class_="alarm")
        if alarms
        else None,
    )


def tiles(record: dict[str, Any], metrics: Metrics) -> Html:
    made: list[tuple[str, str, str]] = []  # (what, figure, what it means)
    before, after = pick(record, "eval.before"), pick(record, "eval.after")
    if before and after:
        error = number(pick(record, "eval.difference_stderr"))
        digits = decimals(error)
        made.append(
            (
                "Held-out loss",
                with_error(pick(record, "eval.difference"), error, digits, sign=True),
                f"nats per token, {fixed(before.get('loss'), digits)} → {fixed(after.get('loss'), digits)}",
            )
        )
        gap, gap_error = number(pick(record, "twin.gap")), number(pick(record, "twin.gap_stderr"))
        if gap is not None:
            figure = with_error(gap, gap_error, decimals(gap_error), sign=True)
            made.append(("Gap to the float twin", figure, "nats per token, at equal tokens"))
        else:
            perplexities = (short(result.get("perplexity")) for result in (before, after))
            made.append(("Perplexity", " → ".join(perplexities), "before → after, held out"))
    if model := pick(record, "model"):
        share = (number(model.get("trainable")) or 0) / (number(model.get("parameters")) or math.inf)
        made.append(("Trained parameters", many(model.get("trainable")), f"{percent(share)} of {many(model.get('parameters'))}"))
    if train := pick(record, "train") or metrics.summary():
        seen = f"{many(train.get('tokens'))} read, {plural(train.get('steps'), 'step')}"
        made.append(("Tokens learned from", many(train.get("supervised_tokens")), seen))
        made.append(("Speed", short(train.get("tokens_per_second")), "tokens per second"))
        made.append(("Peak memory", size(train.get("peak_bytes")), str(train.get("memory_kind") or "")))
    if not made:
        return Html("")
    return el(
        "div",
        *(
            el("div", el("p", what), el("p", value, class_="value"), el("p", meaning, class_="sub"))
            for what, value, meaning in made
        ),
        class_="tiles",
    )


def loss_section(record: dict[str, Any], metrics: Metrics, twin: Twin | None, recipe: dict[str, Any]) -> Html:
    from finetune.report import plots

    held = held_out(record, metrics)
    # With a teacher the trained loss has parts; the held-out one is the cross-entropy alone.
    part = "ce" if metrics.has("ce") else "loss"
    losses, steps = metrics.column(part), metrics.column("step")
    if not metrics.has(part) and len(held) < 2:
        return section("Loss", not_made(record, "no training step was recorded"), rollback_part(metrics))
    window = plots.smoothing_window(len(losses))
    smoothed = f" (faint: every step; line: mean over {window} steps)" if window > 1 else ""
    other = None
    if twin is not None:
        other = (twin.metrics.column("step"), twin.metrics.column("loss"), held_out(twin.record, twin.metrics))
        legend = [key("train", "ternary"), key("twin", "float twin"), el("em", f"lines: training{smoothed}")]
        if held:
            legend.append(el("em", "points: held-out, ± 1 standard error over rows"))
    else:
        training = "training, cross-entropy" if part == "ce" else "training"
        legend = [key("train", training + smoothed)]
        if held:
            legend.append(key("held", "held-out, ± 1 standard error over rows"))
    level = number(pick(record, "eval.float.loss"))
    if level is not None:
        legend.append(key("muted", "dashed: the float model that it came from"))
    notes = []
    if broken := sum(not math.isfinite(value) for value in losses):
        notes.append(f"{broken} of {plural(len(losses), 'step')} without a finite loss: a gap in the line.")
    if metrics.unreadable:
        notes.append(f"{plural(metrics.unreadable, 'line')} of metrics.jsonl could not be read.")
    if held and pick(record, "eval.difference") is not None:
        notes.append(
            "The held-out rows are the same each time, so the difference between two points is known more exactly than each "
            "point: the table below has its error."
        )
    return section(
        "Loss",
        el("p", *legend, class_="legend"),
        figure(plots.loss("loss-wide", plots.WIDE, steps, losses, held, twin=other, level=level), class_="wide"),
        figure(plots.loss("loss-narrow", plots.NARROW, steps, losses, held, twin=other, level=level), class_="narrow"),
        el("p", " ".join(notes), class_="note") if notes else None,
        twin_part(record, metrics, twin, recipe) if twin is not None else None,
        distillation_part(metrics),
        rollback_part(metrics),
    )


def twin_part(record: dict[str, Any], metrics: Metrics, twin: Twin, recipe: dict[str, Any]) -> Html:
    """Ternary and float at equal tokens: the gap, and under which conditions it was measured."""
    from finetune.report import plots

    known = pick(record, "twin") or {}
    if not known:
        told = not_made(record, "the twin has not come to its end", "The comparison with the twin")
        return join((el("h3", "The float twin"), told))
    gap, error = number(known.get("gap")), number(known.get("gap_stderr"))
    after, its = pick(record, "eval.after") or {}, pick(twin.record, "eval.after") or {}
    digits = decimals(error, number(after.get("stderr")), number(its.get("stderr")))

    def row(name: str, result: dict[str, Any], lr: Any, train: dict[str, Any]) -> list[Any]:
        rate = f"{number(lr):g}" if number(lr) is not None else DASH
        loss = with_error(result.get("loss"), result.get("stderr"), digits)
        return [name, loss, rate, count(train.get("tokens")), short(train.get("tokens_per_second"))]

    rows = [
        row("ternary", after, pick(recipe, "train.lr"), pick(record, "train") or {}),
        row("float twin", its, known.get("lr"), pick(twin.record, "train") or {}),
        ["gap, paired by row", with_error(gap, error, digits, sign=True), "", "", ""],
    ]
    tokens = (number(pick(record, "train.tokens")), number(pick(twin.record, "train.tokens")))
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


def rollback_part(metrics: Metrics) -> Html | None:
    """Steps that went wrong in a run whose optimizer steps inside the backward pass, and from where it went on."""
    if not metrics.rollbacks:
        return None
    rows = []
    for entry in metrics.rollbacks:
        found, where = (entry.get(name) or DASH for name in ("found", "where"))
        rows.append([count(entry.get("from")), count(entry.get("step")), found, where])
    said = f"The run went back to a checkpoint {plural(len(rows), 'time')} and left the rows of the bad step out."
    head = ["step that went wrong", "back to step", "found", "left out"]
    return join((el("h3", "Steps taken back"), el("p", said, class_="note"), table(head, rows)))


def eval_section(record: dict[str, Any]) -> Html:
    measured = {name: result for name in ("float", "before", "after", "merged") if (result := pick(record, f"eval.{name}"))}
    parts: list[Html] = []
    if measured:
        difference, error = pick(record, "eval.difference"), pick(record, "eval.difference_stderr")
        digits = decimals(number(error), *(number(result.get("stderr")) for result in measured.values()))
        rows: list[list[Any]] = []
        named = {"before": "before training", "after": "after training", "merged": "merged model"}
        if "float" in measured:
            named |= {"float": "the float model", "before": "made ternary, not trained", "after": "ternary, trained"}
        for name, result in measured.items():
            perplexity, spread = number(result.get("perplexity")), number(result.get("stderr"))
            # The error of exp(x) is exp(x) times that of x, while the latter is small.
            around = perplexity * spread if perplexity and spread and spread < 0.5 else None
            rows.append(
                [
                    named[name],
                    with_error(result.get("loss"), spread, digits),
                    with_error(perplexity, around, digits_of(perplexity)),
                    count(result.get("rows")),
                    count(result.get("tokens")),
                ]
            )
        if number(difference) is not None:
            ratio = math.exp(number(difference) or 0.0) - 1
            change = f"{100 * ratio:+.0f} %".replace("-", MINUS)
            place = list(measured).index("after") + 1 if "after" in measured else len(rows)
            rows.insert(place, ["difference, paired by row", with_error(difference, error, digits, sign=True), change, "", ""])
        parts.append(table(["held-out rows", "loss, nats per token", "perplexity", "rows", "tokens"], rows, "numbers eval"))
        if "after" not in measured:
            parts.append(not_made(record, "there is no measurement", "After training"))
        if "merged" in measured and measured["merged"].get("rows") != pick(record, "eval.after.rows"):
            parts.append(
                el(
                    "p",
                    "The merged model was measured on fewer rows; the merge gate below compares like with like.",
                    class_="note",
                )
            )
    else:
        parts.append(not_made(record, "no rows were held out"))
    scored = pick(record, "eval.tasks") or {}
    task_rows = []
    for task in sorted({task for scores in scored.values() for task in scores}):
        both = [pick(scored, when) or {} for when in ("before", "after")]
        known = [scores.get(task) or {} for scores in both]
        for metric in sorted({name for scores in known for name in scores}):
            name, _, filter_ = metric.partition(",")
            if name.endswith("_stderr") or name in ("version", "n") or not any(number(s.get(metric)) is not None for s in known):
                continue
            error = f"{name}_stderr" + (f",{filter_}" if filter_ else "")
            values = [with_error(scores.get(metric), scores.get(error), 3) for scores in known]
            questions = next((scores["n"] for scores in known if scores.get("n") is not None), None)
            task_rows.append([task, metric, *values, count(questions)])
    if task_rows:
        parts.append(el("h3", "Tasks"))
        parts.append(table(["task", "metric", "before", "after", "rows"], task_rows, "numbers tasks"))
    note = "Loss is the mean cross-entropy of the supervised tokens; ± is one standard error over rows." if measured else None
    return section("Before and after", *parts, note=note)


def trimmed(text: Any) -> str:
    """Without empty lines before and after: a row of text may begin anywhere, and a young model write a screenful of them."""
    return re.sub(r"\A\s*\n|\s+\Z", "", str(text))


def answer(title: str, text: Any, ended: Any, class_: str) -> Html:
    mark = el("span", "did not end by itself", class_="mark") if ended is False else None
    if text and str(text).strip():
        said = el("div", trimmed(text), class_="text")
    else:
        blank = f"nothing but {plural(len(str(text)), 'blank')}" if text else "nothing was generated"
        said = el("p", "not made" if text is None else blank, class_="empty")
    return el("div", el("h4", title, " ", mark), said, class_=class_)


def samples_section(record: dict[str, Any]) -> Html:
    samples = record.get("samples") or []
    plain = record.get("kind") == "pretrain"
    title = "Text it writes" if plain else "Answers"
    if not samples:
        return section(title, not_made(record, f"the recipe asks for no {'samples' if plain else 'answers'}"))
    shown = []
    for sample in samples:
        given = sample.get("prompt") or []
        text = isinstance(given, str)
        prompt = []
        for message in [{"role": "text", "content": given}] if text else given:
            said = el("div", trimmed(message.get("content")) if text else message.get("content"), class_="text")
            prompt.append(
                el("div", el("span", message.get("role"), class_="role"), said, class_="turn passage" if text else "turn")
            )
        reference = el("div", trimmed(sample["reference"]), class_="text") if sample.get("reference") else None
        # A text has no end to come to: only an answer is told that it found none.
        before, after = (None if text else sample.get(f"{when}_ended") for when in ("before", "after"))
        goes_on = "goes on, " if text else ""
        shown.append(
            el(
                "article",
                *prompt,
                el(
                    "div",
                    answer(f"{goes_on}before", sample.get("before"), before, "before"),
                    answer(f"{goes_on}after", sample.get("after"), after, "after"),
                    class_="pair",
                ),
                el("div", el("h4", "how the data goes on" if text else "what the data says"), reference, class_="reference")
                if reference
                else None,
                class_="sample",
            )
        )
    note = "The same questions, answered before and after training (greedy decoding)."
    if plain:
        note = "How the model goes on with the same beginnings, before and after training (greedy decoding)."
    return section(title, *shown, note=note)


def preflight_section(record: dict[str, Any]) -> Html:
    preflight = record.get("preflight")
    plain = record.get("kind") == "pretrain"
    title = "Text it learns from" if plain else "Labels"
    if not preflight:
        return section(title, not_made(record, "there was no preflight"))
    from finetune.report import plots

    marks = {"pass": "✓", "warn": "!", "fail": "✗"}
    checks = [
        el(
            "li",
            el("span", marks.get(str(check.get("status")), "?"), class_="badge", title=check.get("status")),
            el("div", el("b", check.get("name")), el("span", check.get("detail"))),
            class_=check.get("status"),
        )
        for check in preflight.get("checks") or []
    ]
    parts: list[Any] = [el("ul", *checks, class_="checks")]
    charts = []
    share = number(preflight.get("supervised_share"))
    if share is not None and not (plain and share == 1):
        supervised = f"{count(preflight.get('supervised_tokens'))} of {count(preflight.get('tokens'))} tokens are trained"
        cut = number(preflight.get("rows_truncated"))
        bar = el("i", style=f"width:{100 * min(1.0, share):.2f}%")
        charts.append(
            el(
                "div",
                el("p", percent(share), class_="value"),
                el("p", supervised, class_="sub"),
                el("div", bar, class_="share", role="img", aria_label=supervised),
                el("p", key("good", "trained"), key("rule", "context only"), class_="legend"),
                el("p", f"{plural(cut, 'row')} cut at the maximum length" if cut else "No row was cut.", class_="sub")
                if cut is not None
                else None,
                class_="shares",
            )
        )
    edges, counts = (pick(preflight, f"length_histogram.{name}") or [] for name in ("edges", "counts"))
    if counts and len(edges) == len(counts) + 1:
        label = f"Sample lengths from {edges[0]} to {edges[-1] - 1} tokens"
        svg = plots.histogram("lengths", label, edges, counts, x_label="tokens in a sample", y_label="samples")
        charts.append(figure(svg))
    if charts:
        parts.append(el("div", *charts, class_="two"))
    examples = preflight.get("examples") or []
    if examples:
        parts.append(el("h3", "Out of its rows" if plain else "Your own rows: what is marked is trained"))
        for example in examples:
            marked = "span" if plain else "mark"  # of a text every token is trained
            shown = [(marked if piece.get("supervised") else "span", piece.get("text")) for piece in example]
            pieces = [el(name, trimmed(text) if plain else text) for name, text in shown]
            parts.append(el("div", *pieces, class_="example text"))
    note = "The gate before training: what the model is asked to learn, measured on the data itself."
    return section(title, *parts, note=note)


def speed_section(record: dict[str, Any], metrics: Metrics) -> Html:
    if not metrics.steps:
        return section("Speed and memory", not_made(record, "no training step was recorded"))
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
        top = max(value for value in metrics.column("memory_bytes") if math.isfinite(value))
        scale, name = (1 << 30, "GiB") if top >= 1 << 30 else (1 << 20, "MiB")
        svg = plots.series(
            "memory", "Peak memory so far over training time", times, [value / scale for value in metrics.column("memory_bytes")],
            x_label=f"training time ({unit})", y_label=f"peak memory so far ({name})", zero=True, raw=True,
        )  # fmt: skip
        parts.append(figure(svg))
    kind = pick(record, "train.memory_kind")
    note = f"Each optimizer step with its own time; evaluations are not counted. Memory is {kind}." if kind else None
    return section("Speed and memory", el("div", *parts, class_="two"), note=note)


def optimizer_section(record: dict[str, Any], metrics: Metrics) -> Html:
    title = "Learning rate and gradient norm"
    if not (metrics.has("lr") or metrics.has("grad_norm")):
        return section(title, not_made(record, "no training step was recorded"))
    from finetune.report import plots

    steps, parts = metrics.column("step"), []
    if metrics.has("lr"):
        rates = metrics.column("lr")
        top = max(value for value in rates if math.isfinite(value))
        power = math.floor(math.log10(top)) if top > 0 else 0
        raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
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


def time_section(record: dict[str, Any]) -> Html:
    spent: dict[str, float] = {}
    for phase in record.get("phases") or []:
        spent[str(phase.get("name"))] = spent.get(str(phase.get("name")), 0.0) + (number(phase.get("seconds")) or 0.0)
    total = sum(spent.values())
    if not total:
        return section("Where the time went", not_made(record, "no phase was recorded"))
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
    resumed = len(pick(record, "provenance.resumed") or [])
    note = f"{duration(total)} in all" + (f", over {resumed + 1} processes: it was resumed." if resumed else ".")
    return section("Where the time went", el("ol", *rows, class_="phases"), note=note)


def merge_section(record: dict[str, Any]) -> Html:
    merge = record.get("merge")
    if not merge:
        return section("Merge gate", not_made(record, "the recipe asks for no merged model (run.merge)"))
    written = f"{merge.get('path')}/" + (f", {size(merge['bytes'])}" if merge.get("bytes") is not None else "")
    gate = merge.get("gate")
    if figures := merge.get("reternarized"):
        return reternarized_section(figures, written)
    if not gate and pick(record, "exports.bitnet.path") == merge.get("path"):
        said = (
            f"{merge.get('path')}/ is the trained model in the bitnet format: the codes of its master weights, two bits each, "
            "and the rest in floats. Plain transformers loads it, and finetune chat and eval use it. Nothing had to be merged; "
            "the gate that compared it with the trained model stands under Exports."
        )
        return section("Merged model", el("p", said), facts([("written to", written)]))
    if not gate:
        said = ": the merged model was written but not measured against the trained one, for want of held-out rows."
        return section("Merge gate", el("p", el("b", "Not compared"), said, class_="none"), facts([("written to", written)]))
    trained, merged, limit = (number(gate.get(name)) for name in ("adapter_loss", "merged_loss", "limit"))
    difference = None if trained is None or merged is None else merged - trained
    passed = gate.get("status") == "pass"
    rows = f" on {plural(gate['rows'], 'row')}" if gate.get("rows") is not None else ""
    status = el("span", "✓" if passed else "✗", class_="badge")
    said = f"The merged model is {'' if passed else 'not '}the trained one, within the limit."
    return section(
        "Merge gate",
        el("ul", el("li", status, el("div", el("b", said)), class_="pass" if passed else "fail"), class_="checks"),
        facts(
            [
                ("trained model", f"{fixed(trained, 4)} nats per token{rows}"),
                ("merged model", f"{fixed(merged, 4)} nats per token, the same rows"),
                ("computed in", f"{gate['arithmetic']} on {gate['device']}" if "arithmetic" in gate else None),
                ("difference", f"{fixed(difference, 4, sign=True)} nats; allowed ± {limit:g}" if limit is not None else None),
                ("written to", written),
            ]
        ),
        note="The merged weights were reloaded from disk by plain transformers and measured again.",
    )


def reternarized_section(figures: dict[str, Any], written: str) -> Html:
    """Adapters merged into a ternary base: what rounding to three values left of them."""
    names = {
        "base_loss": "the base, without the adapter",
        "adapter_loss": "trained: the adapter on its base",
        "float_loss": "merged, in floats",
        "merged_loss": "merged, ternary again",
    }
    base, trained, merged = (number(figures.get(name)) for name in ("base_loss", "adapter_loss", "merged_loss"))
    rows: list[list[Any]] = []
    for name, said in names.items():
        loss = number(figures.get(name))
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
    turnover = number(pick(record, "ternary.turnover"))
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
        bits = number(figures.get("bits_per_weight"))
        same = number(good.get("same_top"))
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


def provenance_section(record: dict[str, Any]) -> Html:
    def at(path: str) -> Any:
        return pick(record, path)

    def code(value: Any) -> Html | None:
        return el("code", value) if value not in (None, "") else None

    swap = at("model.swap") or None
    quantized = (
        f"{count(swap.get('swapped'))} linears in {swap.get('scheme')} ({percent(swap.get('share'))} of the parameters): "
        f"{size(swap.get('bytes_before'))} → {size(swap.get('bytes_after'))}; {swap.get('backend')}"
        if swap
        else "none"
        if at("model")
        else None
    )
    if swap and trains_ternary(record):
        quantized = (
            f"{count(swap.get('swapped'))} linears are trained to be ternary ({percent(swap.get('share'))} of the parameters); "
            f"{swap.get('backend')}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in (at("provenance.versions") or {}).items())
    resumptions = at("provenance.resumed") or []
    resumed = "; ".join(f"{moment(entry.get('time'))} from {entry.get('from') or 'the beginning'}" for entry in resumptions)
    rows = at("data.rows")
    data = None
    if rows is not None:
        data = f"{plural(rows, 'row')} ({at('data.format')}: {at('data.format_reason')})"
    elif at("data.format"):
        data = f"{at('data.format')}, {at('data.format_reason')}"
    split = None
    if at("data.heldout_rows") is not None and at("data.train_rows") is None:  # a stream: who knows how many rows it has
        split = f"{plural(at('data.heldout_rows'), 'row')} held out"
        split += f", {plural(skipped, 'document')} skipped" if (skipped := at("data.rows_skipped")) else ""
    if at("data.train_rows") is not None:
        split = f"{count(at('data.train_rows'))} trained, {count(at('data.heldout_rows'))} held out"
        split += f", {plural(removed, 'duplicate')} removed" if (removed := at("data.duplicates_removed")) else ""
        split += f", {count(at('data.rows_skipped'))} skipped" if at("data.rows_skipped") else ""
    trained = None
    if at("model"):
        trained = count(at("model.trainable")) + (f", in {count(at('model.adapters'))} adapters" if at("model.adapters") else "")
    groups: list[tuple[str, list[tuple[str, Any]]]] = [
        (
            "Model",
            [
                ("from", code(at("provenance.model.source"))),
                ("sha-256", code(at("provenance.model.sha256"))),
                ("architecture", at("model.architecture")),
                ("parameters", count(at("model.parameters")) if at("model") else None),
                ("trained", trained),
                ("quantized", quantized),
            ],
        ),
        (
            "Data",
            [
                ("from", code(at("provenance.data.source"))),
                ("sha-256", code(at("provenance.data.sha256"))),
                ("rows", data),
                ("split", split),
                ("vocabulary", plural(at("data.vocabulary"), "token") if at("data.vocabulary") else None),
                ("chat template", at("data.template")),
            ],
        ),
        (
            "Run",
            [
                ("command", code(at("provenance.command"))),
                ("started", moment(at("provenance.started"))),
                ("finished", moment(at("provenance.finished")) or "not finished"),
                ("resumed", resumed),
                ("seed", at("provenance.seed")),
                ("commit", code(at("provenance.commit"))),
                ("device", at("provenance.device")),
                ("platform", at("provenance.platform")),
                ("python", at("provenance.python")),
                ("versions", versions),
            ],
        ),
    ]
    parts = [join((el("h3", title), facts(rows))) for title, rows in groups if any(value not in (None, "") for _, value in rows)]
    return section("Provenance", *parts)


def recipe_section(record: dict[str, Any], recipe: str | None) -> Html:
    if recipe is None:
        return section("Recipe", not_made(record, "there is no recipe.yaml in the folder"))
    return section("Recipe", el("details", el("summary", "The whole recipe, with every default"), el("pre", recipe)))


def settings(recipe: str | None) -> dict[str, Any]:
    """The recipe's text as it was meant; empty where it cannot be read."""
    import yaml

    try:
        read = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}


def next_section(record: dict[str, Any]) -> Html:
    commands = record.get("next") or []
    if not commands:
        return section("What to type next", not_made(record, "the run names nothing"))
    return section("What to type next", el("pre", "\n".join(map(str, commands)), class_="commands"))


# ------------------------------------------------------------------------------------------------------------------- page


def page(run_dir: Path) -> str:
    """The page's text. The same folder gives the same bytes."""
    record = read_run(run_dir)
    metrics = Metrics(run_dir / "metrics.jsonl")
    recipe_file = run_dir / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.exists() else None
    twin = twin_of(run_dir)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        # The browser is told what the page promises: nothing is loaded, nothing runs.
        Html("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"),
        el("title", f"{record.get('name') or 'run'} · {record.get('state')}"),
        Html(f"<style>{STYLE.read_text(encoding='utf-8')}</style>"),
    )
    body = el(
        "body",
        el(
            "main",
            header(record, metrics),
            tiles(record, metrics),
            loss_section(record, metrics, twin, settings(recipe)),
            eval_section(record),
            health_section(record, metrics),
            samples_section(record),
            preflight_section(record),
            speed_section(record, metrics),
            optimizer_section(record, metrics),
            time_section(record),
            merge_section(record),
            exports_section(record),
            provenance_section(record),
            recipe_section(record, recipe),
            next_section(record),
        ),
    )
    text = "<!doctype html>\n" + el("html", head, "\n", body, lang="en") + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can carry half a surrogate pair, a file cannot


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder, complete or not at all, and return its path.

    Raises:
        Mistake: `run_dir` is no run folder, or its run.json cannot be read.
    """
    path = run_dir / NAME
    write_atomic(path, page(run_dir))
    return path
