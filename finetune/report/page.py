"""The page of a run: one HTML file, readable before anything else is, on a laptop and a phone, by day and by night.

It reads only the run folder (run.json, metrics.jsonl, recipe.yaml, and those of its twin) and loads nothing: no network, no
script, plots as inline SVG; a content policy in the page says so to the browser. Every element is made by `el`, which escapes
whatever is not already an element, so text out of the data can never become markup. What a run did not make is shown as not
made, with the reason.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from finetune.files import write_atomic
from finetune.record import read_record
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
from finetune.report.metrics import Metrics, Twin, held_out, twin_of
from finetune.report.plan import plan_section, planned_peak
from finetune.report.ternary import (
    distillation_part,
    exports_section,
    gap_in_words,
    health_section,
    reternarized_section,
    trains_ternary,
    twin_part,
)
from finetune.units import (
    DASH,
    MINUS,
    byte_scale,
    count,
    decimals,
    digits_of,
    duration,
    finite_number,
    fixed,
    many,
    moment,
    percent,
    plural,
    short,
    size,
    with_error,
)

NAME = "report.html"
STYLE = Path(__file__).with_name("page.css")


# --------------------------------------------------------------------------------------------------------------- sections


def verdict(record: dict[str, Any], metrics: Metrics) -> str:
    """The result in one sentence; 'fell' only where the difference is more than two of its standard errors."""
    before, after = pick(record, "eval.before"), pick(record, "eval.after")
    difference, error = finite_number(pick(record, "eval.difference")), finite_number(pick(record, "eval.difference_stderr"))
    device = str(pick(record, "provenance.device") or "").partition(": ")[2] or pick(record, "provenance.device")
    taken = duration(pick(record, "provenance.seconds")) + (f" on {device}" if device else "")
    if before and after and difference is not None:
        digits = decimals(finite_number(before.get("stderr")), finite_number(after.get("stderr")), error)
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
        loss = with_error(before.get("loss"), before.get("stderr"), decimals(finite_number(before.get("stderr"))))
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
        error = finite_number(pick(record, "eval.difference_stderr"))
        digits = decimals(error)
        made.append(
            (
                "Held-out loss",
                with_error(pick(record, "eval.difference"), error, digits, sign=True),
                f"nats per token, {fixed(before.get('loss'), digits)} → {fixed(after.get('loss'), digits)}",
            )
        )
        gap, gap_error = finite_number(pick(record, "twin.gap")), finite_number(pick(record, "twin.gap_stderr"))
        if gap is not None:
            figure = with_error(gap, gap_error, decimals(gap_error), sign=True)
            made.append(("Gap to the float twin", figure, "nats per token, at equal tokens"))
        else:
            perplexities = (short(result.get("perplexity")) for result in (before, after))
            made.append(("Perplexity", " → ".join(perplexities), "before → after, held out"))
    if model := pick(record, "model"):
        share = (finite_number(model.get("trainable")) or 0) / (finite_number(model.get("parameters")) or math.inf)
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
        return section("Loss", not_made(record, "no training step was recorded"), events_part(metrics))
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
    level = finite_number(pick(record, "eval.float.loss"))
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
        events_part(metrics),
    )


def events_part(metrics: Metrics) -> Html | None:
    """Steps that went wrong on the way, with what was left out for them, and where memory ran out."""
    back, skipped, memory = (metrics.events[name] for name in ("rolled_back", "skipped", "out_of_memory"))
    parts: list[Html] = []
    if back or skipped:
        rows = [
            [count(entry.get("from", entry["step"])), how, entry.get("found") or DASH, entry.get("where") or DASH]
            for entries, told in ((back, "back to step {}"), (skipped, "begun again with the next samples"))
            for entry in entries
            for how in [told.format(count(entry["step"]))]
        ]
        said = f"{plural(len(rows), 'step')} went wrong and {'was' if len(rows) == 1 else 'were'} not taken."
        if back:
            said += f" The run went back to a checkpoint {plural(len(back), 'time')} and left the rows of the bad step out."
        parts += [el("h3", "Steps that went wrong"), el("p", said, class_="note")]
        parts.append(table(["step", "what was done", "found", "left out"], rows))
    if memory:
        rows = [[count(entry["step"]), count(entry.get("parts")), entry.get("found") or DASH] for entry in memory]
        said = (
            "From these steps on each micro-batch went through the model in so many parts, one after the other: the same samples "
            "in the same order, and the same step but for rounding."
        )
        parts += [el("h3", "Out of memory"), el("p", said, class_="note")]
        parts.append(table(["step", "parts", "found"], rows))
    return join(parts) if parts else None


def eval_section(record: dict[str, Any]) -> Html:
    measured = {name: result for name in ("float", "before", "after", "merged") if (result := pick(record, f"eval.{name}"))}
    parts: list[Html] = []
    if measured:
        difference, error = pick(record, "eval.difference"), pick(record, "eval.difference_stderr")
        digits = decimals(finite_number(error), *(finite_number(result.get("stderr")) for result in measured.values()))
        rows: list[list[Any]] = []
        named = {"before": "before training", "after": "after training", "merged": "merged model"}
        if "float" in measured:
            named |= {"float": "the float model", "before": "made ternary, not trained", "after": "ternary, trained"}
        for name, result in measured.items():
            perplexity, spread = finite_number(result.get("perplexity")), finite_number(result.get("stderr"))
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
        if finite_number(difference) is not None:
            ratio = math.exp(finite_number(difference) or 0.0) - 1
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
            if name.endswith("_stderr") or name in ("version", "n"):
                continue
            if all(finite_number(scores.get(metric)) is None for scores in known):
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
    share = finite_number(preflight.get("supervised_share"))
    if share is not None and not (plain and share == 1):
        supervised = f"{count(preflight.get('supervised_tokens'))} of {count(preflight.get('tokens'))} tokens are trained"
        cut = finite_number(preflight.get("rows_truncated"))
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
        planned = planned_peak(record)
        top = max([value for value in metrics.column("memory_bytes") if math.isfinite(value)] + [planned or 0])
        scale, name = byte_scale(top)
        svg = plots.series(
            "memory", "Peak memory so far over training time", times, [value / scale for value in metrics.column("memory_bytes")],
            x_label=f"training time ({unit})", y_label=f"peak memory so far ({name})", zero=True, raw=True,
            mark=planned / scale if planned else None,
        )  # fmt: skip
        parts.append(figure(svg, "dashed: the peak that was planned" if planned else None))
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
        spent[str(phase.get("name"))] = spent.get(str(phase.get("name")), 0.0) + (finite_number(phase.get("seconds")) or 0.0)
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
    trained, merged, limit = (finite_number(gate.get(name)) for name in ("adapter_loss", "merged_loss", "limit"))
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
                ("the step", "; ".join(at("model.fast") or []) or None),
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
    record = read_record(run_dir).as_dict()
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
            plan_section(record, metrics),
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
