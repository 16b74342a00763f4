"""`finetune recipes` and `finetune schema`."""

from __future__ import annotations

import typer


def recipes() -> None:
    """List the shipped recipes."""
    from finetune.recipe import read_recipe, shipped_recipes

    for path in shipped_recipes():
        typer.echo(f"{path.stem:<28} {read_recipe(path).about}")


def schema() -> None:
    """Print the JSON Schema of recipes: every key with its type, default, unit and effect."""
    import json

    from finetune.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))
