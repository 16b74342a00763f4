"""The trained model for other programs, each compared with it by the equivalence gate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.exporters import FORMATS, export, in_words
from finetune.models.build import BuiltModel
from finetune.models.config import load_config
from finetune.models.source import find_model
from finetune.models.weights import load_weights
from finetune.record import ExportRecord
from finetune.screen import Screen
from finetune.stages.context import RunContext
from finetune.stages.preflight import Checked
from finetune.task_data import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_all(run: RunContext, checked: Checked, built: BuiltModel, model: Any) -> dict[str, ExportRecord]:
    """What the recipe's `export.formats` ask for, by format. model: the trained one, where that was not merged away.

    Raises:
        GateError: what runs elsewhere is another model.
    """
    recipe, run_dir = run.recipe, run.path
    if not recipe.export.formats:
        return {}
    if recipe.quant.scheme != "ternary":  # the trained model was merged away: what was written, and gated, is it
        merged = find_model(str(run_dir / "merged"))
        model = load_weights(merged, load_config(merged), dtype=built.dtype, attention="auto")
    records: dict[str, ExportRecord] = {}
    for wanted in recipe.export.formats:
        suffix = FORMATS[wanted].suffix
        file = f"{run.name}-{wanted.removeprefix('gguf-').upper()}{suffix}" if suffix else wanted
        records[wanted] = export_one(
            wanted,
            model,
            checked.inputs.tokenizer,
            run_dir / "export" / file,
            rows=checked.held_out or checked.data.first_rows(8),
            gate_tokens=recipe.export.gate_tokens,
            device=checked.device,
            run_dir=run_dir,
            screen=run.screen,
        )
    return records


def export_one(
    wanted: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    rows: HeldOut,
    gate_tokens: int,
    device: torch.device,
    screen: Screen,
    run_dir: Path | None = None,
) -> ExportRecord:
    """`model` in the format `wanted`. run_dir: the path in the record is told from there.

    Raises:
        GateError: what runs elsewhere is another model; nothing is kept.
    """
    with screen.phase(f"export {wanted}") as progress:
        figures = export(
            model,
            tokenizer,
            out,
            format=wanted,
            rows=rows,
            device=device,
            gate_tokens=gate_tokens,
            progress=progress,
        )
    if run_dir is not None:
        figures["path"] = os.path.relpath(figures["path"], run_dir)
    screen.say(f"  {in_words(figures)}")
    return ExportRecord.model_validate(figures)
