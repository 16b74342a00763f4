"""`finetune show`: a run in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.units import clock, human_bytes, number


def show_run(record: dict[str, Any], path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    provenance = record["provenance"]
    console.print(
        f"{record['name']}: {record['state']}  ({provenance['started']}, {clock(provenance['seconds'])}, {provenance['device']})"
    )
    if record.get("error"):
        console.print(f"  {record['error']}", markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("held-out", "loss (nats)", "±", "perplexity", "rows"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for when in ("float", "before", "after", "merged"):
        if when in record["eval"]:
            result = record["eval"][when]
            table.add_row(
                when,
                number(result["loss"]),
                number(result["stderr"]),
                number(result["perplexity"], 2),
                str(result["rows"]),
            )
    twin = record.get("twin") or {}
    if twin.get("gap") is not None:
        table.add_row("float twin", number(twin["loss"]), "", "", "")
    if table.rows:
        console.print(table)
    if twin.get("gap") is not None:
        console.print(
            f"gap      {twin['gap']:+.4f} ± {number(twin['gap_stderr'])} nats, ternary less float twin, at "
            f"{record['train']['tokens']} tokens each, seed {twin['seed']}"
        )
    for when, tasks in record["eval"].get("tasks", {}).items():
        for task, scores in tasks.items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
            console.print(f"{when:<8} {task}: {shown}", markup=False)
    if "train" in record:
        train = record["train"]
        console.print(
            f"{train['steps']} steps, {train['tokens']} tokens, {train['tokens_per_second']:.0f} tok/s, "
            f"peak {human_bytes(train['peak_bytes'])} ({train['memory_kind']})"
        )
    if "ternary" in record:
        seen = record["ternary"]
        if seen["looks"]:
            console.print(
                f"ternary  at the last of {seen['looks']} looks {seen['flips']:.2%} of the codes flipped, {seen['zeros']:.1%} "
                f"were 0; {len(seen['alarms']) or 'no'} alarm{'' if len(seen['alarms']) == 1 else 's'}"
            )
        for alarm in seen["alarms"]:
            console.print(f"alarm    {alarm}", markup=False)
    merged = (record.get("merge") or {}).get("reternarized")
    if merged:
        console.print(
            f"merged   ternary again: loss {merged['merged_loss']:.4f}, with the adapter {merged['adapter_loss']:.4f}, without "
            f"it {merged['base_loss']:.4f}; {merged['flips']:.2%} of the codes changed"
        )
    for export in record.get("exports", {}).values():
        gate, good = export["gate"], export["gate"]["good"]
        console.print(
            f"export   {export['path']}: {human_bytes(export['bytes'])}, {export['bits_per_weight']:.2f} bits a parameter; gate "
            f"{gate['status']}, KL {good['kl']:.1e} nats, loss {number(good['export_loss'])} in {gate['program']}",
            markup=False,
        )
    for line in record.get("next", []):
        console.print(f"next     {line}", markup=False)
    if (path / "report.html").exists():
        console.print(f"report   {path / 'report.html'}", markup=False)
