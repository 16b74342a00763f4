"""`finetune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.commands.common import Dtype, dtype_name, open_model, rows_to_compare_on
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.record import MergeRecord
    from finetune.screen import Screen


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint or an adapter folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to create.")],
    dtype: Dtype = "auto",
) -> None:
    """Merge an adapter into a model folder that plain transformers loads; kept only if its loss is the trained model's."""
    from finetune.screen import Screen

    screen = Screen()
    merge_model(model, out, dtype, screen)
    screen.say(f"next     finetune chat {out}")


def merge_model(name: str, out: Path, dtype: str, screen: Screen) -> MergeRecord:
    """Merge an adapter (of a run, a checkpoint or a folder) into `out`, gated; a ternary base stays ternary.

    Raises:
        UserError: nothing to merge, or `out` exists. GateError: the merged model differs from the trained one.
    """
    from finetune.libraries import quiet_libraries

    dtype = dtype_name(dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("the output folder is not empty", where="--out", got=str(out), hint="give a new folder, or remove it")
    with quiet_libraries(screen):
        from finetune.models.precision import DTYPES
        from finetune.recipe import Eval
        from finetune.stages import merge as stage
        from quant import PackedBitLinear

        # The trained model is loaded as it was trained; only the merged one gets --dtype.
        loaded = open_model(name, "auto", screen, merged=False)
        if not hasattr(loaded.model, "merge_and_unload"):
            raise UserError(
                "no adapter to merge",
                where="MODEL",
                got=loaded.what,
                hint="give a run with an adapter, or an adapter folder",
            )
        ternary = any(isinstance(module, PackedBitLinear) for module in loaded.model.modules())
        if ternary and dtype != "auto":
            got = f"{dtype}, but the base of {loaded.what} is ternary"
            raise UserError("an adapter on a ternary base is merged to ternary", where="--dtype", got=got, hint="leave it out")
        settings = loaded.recipe.eval if loaded.recipe is not None else Eval()
        rows = rows_to_compare_on(loaded, screen, "the merge is measured on")[: max(1, settings.merge_rows)]
        device = next(loaded.model.parameters()).device
        if ternary:
            return stage.merge_ternary(
                loaded.model,
                loaded.tokenizer,
                out,
                rows=rows,
                limit=settings.merge_limit,
                batch_tokens=settings.batch_tokens,
                device=device,
                trained=loaded.what,
                screen=screen,
            )[1]
        return stage.merge(
            loaded.model,
            loaded.tokenizer,
            out,
            dtype=DTYPES.get(dtype, loaded.model.get_base_model().dtype),
            rows=rows,
            limit=settings.merge_limit,
            batch_tokens=settings.batch_tokens,
            device=device,
            screen=screen,
        )
