"""`finetune show`: a run in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.files import human_bytes
from finetune.screen import clock, number


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
    for when in ("before", "after", "merged"):
        if when in record["eval"]:
            result = record["eval"][when]
            table.add_row(
                when,
                number(result["loss"]),
                number(result["stderr"]),
                number(result["perplexity"], 2),
                str(result["rows"]),
            )
    if table.rows:
        console.print(table)
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
    for line in record.get("next", []):
        console.print(f"next     {line}", markup=False)
    if (path / "report.html").exists():
        console.print(f"report   {path / 'report.html'}", markup=False)
