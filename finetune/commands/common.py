"""Shared by several commands: their arguments, checking a recipe, loading a model, held-out rows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.models.load import LoadedModel
    from finetune.recipe import Recipe
    from finetune.screen import Screen
    from finetune.task_data import HeldOut

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides of keys, such as train.lr=1e-4.")
]
Force = Annotated[bool, typer.Option("--force", help="Start even if preflight or plan refuse; the reason is recorded.")]
Processes = Annotated[
    int, typer.Option("--processes", metavar="N", min=1, help="Train with N processes on this machine, one GPU each.")
]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]

# Text for comparing models without held-out data; any text will do, because both models read the same.
PASSAGE = (
    "A river is born where water gathers faster than the ground can drink it. High in the hills a spring fills a hollow, spills "
    "over its edge, and finds the steepest way down. Other streams join it; each brings sand, leaves and the colour of its own "
    "soil. In the plain the river slows, lays down what it carried, and begins to wander in wide bends. Farmers have always "
    "lived beside it, because the mud is rich and the water is near, and they have always feared it, because once in a lifetime "
    "it remembers its old bed and takes the fields back. Where it meets the sea the two waters mix twice a day, and the birds "
    "that feed on the mud know the hour of the tide better than any clock."
)


def checked_recipe(name: str, overrides: list[str] | None = None) -> tuple[Path, Recipe]:
    """Read a recipe and check its keys and the files and packages that it names; returns (its path, the recipe).

    Raises:
        UserErrors: all errors in it.
    """
    from finetune.recipe import find_recipe, locator, read_recipe

    path = find_recipe(name)
    recipe = read_recipe(path, overrides)
    from finetune.sources import check_sources

    check_sources(recipe, str(path), locator(path, overrides))
    return path, recipe


def dtype_name(name: str) -> str:
    """--dtype in the spelling of recipes.

    Raises:
        UserError: unknown dtype.
    """
    from finetune.recipe import canonical_value

    dtype = canonical_value("model.dtype", name)
    if dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError("unknown dtype", where="--dtype", got=name, hint="use auto, bf16, fp16 or fp32")
    return str(dtype)


def typed() -> str:
    """The command line of this process."""
    return shlex.join(["finetune", *sys.argv[1:]])


def spawned(count: int, arguments: list[str]) -> None:
    """Run this command in `count` processes, and exit with their exit code."""
    from finetune import processes

    if processes.world_size() > 1:
        raise UserError(
            "this process was already started by a launcher",
            where="--processes",
            got=f"{count}, with WORLD_SIZE={processes.world_size()}",
            hint="leave --processes out, or start without the launcher",
        )
    sys.exit(processes.spawn(arguments, count))


def leave_processes() -> None:
    """Shut down the process group after a successful run."""
    from finetune import processes

    if processes.world_size() > 1:
        from finetune.train import parallel

        parallel.shutdown()


def open_model(name: str, dtype: str, screen: Screen, *, merged: bool = True) -> LoadedModel:
    """`load_model` with its progress and note on the screen."""
    from finetune.models.load import load_model

    with screen.phase(f"model {Path(name).name}") as progress:
        loaded = load_model(name, dtype=dtype, merged=merged, progress=progress)
    if loaded.note:
        screen.warn(loaded.note)
    return loaded


def rows_of_run(loaded: LoadedModel) -> HeldOut:
    """The held-out rows of a model's run.

    Raises:
        UserError: the run's data is missing or has changed.
    """
    from finetune.data.preflight import Limits
    from finetune.models.config import eos_token_ids
    from finetune.models.source import source_of
    from finetune.record import read_record
    from finetune.run_dir import same_data
    from finetune.task_data import build_data

    assert loaded.recipe is not None
    assert loaded.run is not None
    recipe = loaded.recipe
    tokens = eos_token_ids(source_of(recipe.model), loaded.tokenizer)
    data = build_data(recipe, loaded.tokenizer, tokens, limits=Limits())
    same_data(read_record(loaded.run), data.digest, data.record(), loaded.run)
    return data.held_out()


def rows_to_compare_on(loaded: LoadedModel, screen: Screen, what: str) -> HeldOut:
    """Held-out rows of the model's run if available, else a passage of prose. what: uses them, for the note."""
    from eval.perplexity import text_rows
    from eval.positions import positions_of

    rows = None
    if loaded.recipe is not None:
        try:
            rows = rows_of_run(loaded)
        except UserError as error:
            screen.warn(f"the run's held-out rows are not available ({error.message}); {what} a passage of prose instead")
    return rows or text_rows(loaded.tokenizer, PASSAGE, length=min(1024, positions_of(loaded.model.config) or 1024))
