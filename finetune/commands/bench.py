"""`finetune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.commands.common import Overrides


def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="To measure: quant, qlora, bitnet, plan, device.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="qlora: what to train.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows and provenance there.")] = None,
) -> None:
    """Measure this program against others on this machine: the same work in one run, medians of pairs."""
    from finetune.bench import bench_command

    bench_command(name, json_file, recipe=recipe, overrides=overrides)
