"""`finetune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.commands.common import Overrides


def bench(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="What to measure: quant, qlora, bitnet, plan or device.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="qlora: the recipe to train.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results and provenance to this file.")] = None,
) -> None:
    """Benchmark this program against others on this machine: the same work in one run, medians of pairs."""
    from finetune.bench import bench_command

    bench_command(name, json_file, recipe=recipe, overrides=overrides)
