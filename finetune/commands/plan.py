"""`finetune plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.commands.common import Overrides, checked_recipe
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.planning.result import Plan


def plan_of(name: str, overrides: list[str], *, gpu: str | None, memory: str | None) -> Plan:
    """Plan a recipe. gpu: default the recipe's, or this machine's device. memory: such as 12GB; default the recipe's, or all.

    Raises:
        UserError: the recipe is wrong, or the device is unknown. Untraceable: the model's step cannot be traced.
    """
    from finetune.libraries import quiet_libraries
    from finetune.planning.command import budget_of, device_for
    from finetune.planning.estimate import plan as estimate

    path, recipe = checked_recipe(name, overrides)
    with quiet_libraries():
        device = device_for(recipe, gpu)
        return estimate(recipe, path.stem, device, budget_bytes=budget_of(recipe, memory, device))


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Device to plan for, such as rtx-4070; default: this machine's.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--fit", metavar="MEMORY", help="Change the recipe until it fits into this memory, such as 12GB."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the plan, as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With --fit: write the changed recipe to this file.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="All shipped recipes (or RECIPE) with 8, 12, 16 and 24 GB.")] = False,
) -> None:
    """Plan a recipe without loading weights: memory by phase and term, time, energy. Exit code 3: it does not fit."""
    checked = checked_recipe(recipe, overrides) if recipe is not None else None
    if table and (budget is not None or out is not None):
        option = "--fit" if budget is not None else "--out"
        raise UserError("--table has fixed budgets and writes no recipe", where="--table", got=option, hint=f"leave out {option}")
    if not table and checked is None:
        hint = "finetune recipes lists the shipped ones; or give --table"
        raise UserError("no recipe given", where="RECIPE", hint=hint)
    from rich.console import Console

    from finetune.libraries import quiet_libraries
    from finetune.planning.command import all_recipes, plan_recipe, plan_table
    from finetune.screen import Screen

    console = Console(highlight=False, soft_wrap=True, stderr=True) if as_json else None
    screen = Screen(console)
    with quiet_libraries():
        if table:
            plan_table([checked] if checked is not None else all_recipes(), gpu=gpu, as_json=as_json, screen=screen)
        elif checked is not None:
            path, resolved = checked
            plan_recipe(resolved, path, overrides or [], gpu=gpu, budget=budget, as_json=as_json, out=out, screen=screen)
