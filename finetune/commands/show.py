"""`finetune show`: a run in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.commands.common import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.record import Record
    from finetune.screen import Screen


def show(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
) -> None:
    """Show the results of a run: state, losses before and after, speed, memory."""
    import json

    from finetune.files import finite
    from finetune.record import read_record
    from finetune.screen import Screen

    record = read_record(run)
    if as_json:
        typer.echo(json.dumps(finite(record.as_dict()), indent=1, ensure_ascii=False))
    else:
        show_run(record, run, Screen())


def show_run(record: Record, path: Path, screen: Screen) -> None:
    """Print a run's state, losses, scores, cost and outputs."""
    from finetune.units import clock, human_bytes, number

    provenance = record.provenance
    screen.say(f"{record.name}: {record.state}  ({provenance.started}, {clock(provenance.seconds)}, {provenance.device})")
    if record.error:
        screen.say(f"  {record.error}")
    if (table := _losses(record)).rows:
        screen.console.print(table)
    twin = record.twin
    if twin is not None and twin.gap is not None and record.train is not None:
        screen.say(
            f"gap      {twin.gap:+.4f} ± {number(twin.gap_stderr)} nats, ternary minus float twin, at "
            f"{record.train.tokens} tokens each (seed {twin.seed})"
        )
    for when, tasks in (record.eval.tasks or {}).items():
        for task, scores in tasks.items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
            screen.say(f"{when:<8} {task}: {shown}")
    if (train := record.train) is not None:
        screen.say(
            f"{train.steps} steps, {train.tokens} tokens, {train.tokens_per_second:.0f} tok/s, "
            f"peak {human_bytes(train.peak_bytes)} ({train.memory_kind})"
        )
    _ternary(record, screen)
    for export in (record.exports or {}).values():
        gate = export.gate
        screen.say(
            f"export   {export.path}: {human_bytes(export.bytes)}, {export.bits_per_weight:.2f} bits per parameter; gate "
            f"{gate.status}, KL {gate.good.kl:.1e} nats, loss {number(gate.good.export_loss)} in {gate.program}"
        )
    for line in record.next or []:
        screen.say(f"next     {line}")
    if (path / "report.html").exists():
        screen.say(f"report   {path / 'report.html'}")


def _losses(record: Record) -> Table:
    from rich.table import Table

    from finetune.units import number

    table = Table(box=None, pad_edge=False)
    for column in ("held-out", "loss (nats)", "±", "perplexity", "rows"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    measured = {"float": record.eval.float_model, "before": record.eval.before, "after": record.eval.after}
    for when, result in measured.items():
        if result is not None:
            perplexity = number(result.perplexity, 2)
            table.add_row(when, number(result.loss), number(result.stderr), perplexity, str(result.rows))
    if record.twin is not None and record.twin.gap is not None:
        table.add_row("float twin", number(record.twin.loss), "", "", "")
    return table


def _ternary(record: Record, screen: Screen) -> None:
    if (ternary := record.ternary) is not None:
        if ternary.looks:
            count = len(ternary.alarms)
            screen.say(
                f"ternary  in the last of "
                f"{ternary.looks} measurements {ternary.flips:.2%} of the codes flipped and {ternary.zeros:.1%} were 0; "
                f"{count or 'no'} alarm{'' if count == 1 else 's'}"
            )
        for alarm in ternary.alarms:
            screen.say(f"alarm    {alarm}")
    merged = record.merge.reternarized if record.merge is not None else None
    if merged is not None:
        screen.say(
            f"merged   to ternary: loss {merged.merged_loss:.4f}, with the adapter {merged.adapter_loss:.4f}, base "
            f"{merged.base_loss:.4f}; {merged.flips:.2%} of the codes changed"
        )
