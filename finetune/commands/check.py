"""`finetune check`."""

from __future__ import annotations

import typer

from finetune.commands.common import Overrides, RecipeName, checked_recipe


def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show all errors in a recipe's keys, then in the files and packages that it names, each with file:line."""
    path, _ = checked_recipe(recipe, overrides)
    typer.echo(f"{path}: no errors")
