"""`finetune run`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.commands.common import Force, Overrides, Processes, RecipeName, checked_recipe, leave_processes, spawned, typed


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint.")] = False,
    force: Force = False,
    processes: Processes = 1,
) -> None:
    """Run a recipe: check, preflight, plan, load, evaluate, train, evaluate, merge, export, report."""
    path, resolved = checked_recipe(recipe, overrides)
    if processes > 1:
        spawned(processes, ["run", recipe, *(overrides or []), *["--resume"] * resume, *["--force"] * force])
    from finetune import pipeline

    pipeline.run(resolved, path.stem, resume=resume, force=force, command=typed())
    leave_processes()
