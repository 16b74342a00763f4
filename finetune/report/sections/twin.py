"""The gap between a ternary run and its float twin: a sentence for the top, and a table below the losses."""

from __future__ import annotations

from finetune.record import LossRecord, Record, TrainRecord
from finetune.report.elements import Html, el, figure, join, missing, table
from finetune.report.folder import RunFiles
from finetune.units import DASH, count, decimals, finite_number, fixed, short, with_error


def gap_sentence(record: Record) -> str | None:
    """The twin's result in a sentence; a gap counts as measurable beyond two of its standard errors."""
    if (twin := record.twin) is None or (gap := finite_number(twin.gap)) is None:
        return None
    error = finite_number(twin.gap_stderr)
    digits = decimals(error)
    figure = with_error(gap, error, digits, sign=True)
    if error is None or abs(gap) <= 2 * error:
        gap_text = f"no measurable gap ({figure})"
    else:
        gap_text = f"a gap of {figure} nats" + (", in favour of the ternary model" if gap < 0 else "")
    return f"Its float twin, trained on the same tokens, reaches {fixed(twin.loss, digits)}: {gap_text}."


def twin_part(run: RunFiles, twin: RunFiles) -> Html:
    """The gap between ternary and float at equal tokens, and the conditions of the comparison."""
    from finetune.report import plots

    record, known = run.record, run.record.twin
    if known is None:
        reason = missing(record.state, "the twin did not finish", "The comparison with the twin")
        return join((el("h3", "The float twin"), reason))
    after, its, error = record.eval.after, twin.record.eval.after, finite_number(known.gap_stderr)
    errors = [finite_number(result.stderr) for result in (after, its) if result is not None]
    digits = decimals(error, *errors)

    def row(name: str, result: LossRecord | None, lr: float | None, train: TrainRecord | None) -> list[str]:
        loss = with_error(result.loss, result.stderr, digits) if result is not None else DASH
        rate = f"{lr:g}" if lr is not None else DASH
        return [name, loss, rate, *((count(train.tokens), short(train.tokens_per_second)) if train is not None else (DASH, DASH))]

    rows = [
        row("ternary", after, run.peak_rate(), record.train),
        row("float twin", its, known.lr, twin.record.train),
        ["gap, paired by row", with_error(known.gap, error, digits, sign=True), "", "", ""],
    ]
    ours, theirs = (count(train.tokens) if train is not None else DASH for train in (record.train, twin.record.train))
    equal = f"{ours} tokens each" if ours == theirs else f"{ours} and {theirs} tokens"
    conditions = (
        f"{equal}, the same rows in the same order, seed {known.seed}. A positive gap means that the ternary model "
        "predicts worse. The error covers the sampling of held-out rows only: there is one seed and one learning rate for each "
        "model, and others give another gap."
    )
    below: Html = el("p", conditions, class_="note")
    losses, twins = ({step: loss for step, loss, _ in each.held_out()} for each in (run, twin))
    both = sorted(set(losses) & set(twins) - {0.0})
    if len(both) >= 3:
        gaps = [losses[step] - twins[step] for step in both]
        svg = plots.gap("gap", "Held-out loss of the ternary model minus that of its twin", both, gaps)
        below = el("div", figure(svg, "Ternary minus twin at each held-out measurement."), below, class_="two")
    head = ["", "held-out loss, nats per token", "peak learning rate", "tokens", "tokens per second"]
    return join((el("h3", "The gap to the float twin"), table(head, rows, "numbers eval"), below))
