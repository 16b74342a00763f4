"""`finetune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.commands.common import open_model, rows_to_compare_on
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.record import ExportRecord
    from finetune.screen import Screen


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder or a hub id.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="bitnet, bitnet-online, gguf-tq2_0, gguf-tq1_0 or gguf-f16.")],
    out: Annotated[Path, typer.Option("--out", help="The folder or .gguf file to create.")],
) -> None:
    """Export a model for another program; kept only if its logits there are the model's."""
    from finetune.screen import Screen

    export_model(model, to, out, Screen())


def export_model(name: str, to: str, out: Path, screen: Screen) -> ExportRecord:
    """Export a model for another program, gated by a comparison of logits.

    Raises:
        UserError: nothing to export, a model that the format cannot express, or `out` exists. GateError: the exported model
            differs.
    """
    from finetune.exporters import check, get_format
    from finetune.libraries import quiet_libraries

    get_format(to)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("the output exists already", where="--out", got=str(out), hint="give a new name, or remove it")
    with quiet_libraries(screen):
        from finetune.exporters import GATE_TOKENS
        from finetune.stages.export import export_one

        online = to == "bitnet-online"
        loaded = open_model(name, "auto", screen, merged=not online)  # merged/ is packed, checkpoints have master weights
        if hasattr(loaded.model, "merge_and_unload"):
            hint = f"finetune merge {name} --out DIR, then export DIR"
            hint += " --to bitnet (it has no master weights)" if online else ""
            raise UserError("an adapter cannot be exported", where="MODEL", got=loaded.what, hint=hint)
        check(loaded.model, to, tokenizer=loaded.tokenizer)
        return export_one(
            to,
            loaded.model,
            loaded.tokenizer,
            out,
            rows=rows_to_compare_on(loaded, screen, "the gate reads"),
            gate_tokens=GATE_TOKENS,
            device=next(loaded.model.parameters()).device,
            screen=screen,
        )
