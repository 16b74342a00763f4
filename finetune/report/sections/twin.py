"""The float twin of a ternary run, and the gap to it: in a sentence at the top, and with its conditions below the losses."""

from __future__ import annotations

from finetune.record import LossRecord, Record, TrainRecord
from finetune.report.elements import Html, el, figure, join, not_made, table
from finetune.report.folder import RunFiles
from finetune.units import DASH, count, decimals, finite_number, fixed, short, with_error


def gap_in_words(record: Record) -> str | None:
    """The twin's result in a sentence; a gap is one where it is more than two of its standard errors."""
    if (twin := record.twin) is None or (gap := finite_number(twin.gap)) is None:
        return None
    error = finite_number(twin.gap_stderr)
    digits = decimals(error)
    figure = with_error(gap, error, digits, sign=True)
    if error is None or abs(gap) <= 2 * error:
        said = f"no measurable gap ({figure})"
    else:
        said = f"a gap of {figure} nats" + (", the ternary model being ahead" if gap < 0 else "")
    return f"Its float twin, trained on the same tokens, reaches {fixed(twin.loss, digits)}: {said}."


def twin_part(run: RunFiles, twin: RunFiles) -> Html:
    """Ternary and float at equal tokens: the gap, and under which conditions it was measured."""
    from finetune.report import plots

    record, known = run.record, run.record.twin
    if known is None:
        told = not_made(record.state, "the twin has not come to its end", "The comparison with the twin")
        return join((el("h3", "The float twin"), told))
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
    said = (
        f"{equal}, the same rows in the same order, seed {known.seed}. A positive gap means that the ternary model "
        "predicts worse. This is one seed and one learning rate for each: the error is that of the held-out rows alone, and "
        "another seed or a better rate gives another gap."
    )
    below: Html = el("p", said, class_="note")
    losses, twins = ({step: loss for step, loss, _ in each.held_out()} for each in (run, twin))
    both = sorted(set(losses) & set(twins) - {0.0})
    if len(both) >= 3:
        gaps = [losses[step] - twins[step] for step in both]
        svg = plots.gap("gap", "Held-out loss of the ternary model less that of its twin", both, gaps)
        below = el("div", figure(svg, "Ternary less twin at each held-out measurement."), below, class_="two")
    head = ["", "held-out loss, nats per token", "peak learning rate", "tokens", "tokens per second"]
    return join((el("h3", "The gap to the float twin"), table(head, rows, "numbers eval"), below))
