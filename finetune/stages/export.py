"""Exporting the trained model for other programs; the equivalence gate compares each export with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


def export_all(run: RunContext, checked: Checked, built: BuiltModel, model: Any) -> Iterator[tuple[str, ExportRecord]]:
    """Export the model in each of the recipe's `export.formats`; yields (format, record). model: unused if it was merged.

    Raises:
        GateError: an exported model differs from the trained one.
    """
    recipe, run_dir = run.recipe, run.path
    if not recipe.export.formats:
        return
    if recipe.quant.scheme != "ternary":  # the trained model was consumed by the merge: read the merged folder
        merged = find_model(str(run_dir / "merged"))
        model = load_weights(merged, load_config(merged), dtype=built.dtype, attention="auto")
    for name in recipe.export.formats:
        suffix = FORMATS[name].suffix
        file = f"{run.name}-{name.removeprefix('gguf-').upper()}{suffix}" if suffix else name
        record = export_one(
            name,
            model,
            checked.inputs.tokenizer,
            run_dir / "export" / file,
            rows=checked.held_out or checked.data.first_rows(8),
            gate_tokens=recipe.export.gate_tokens,
            device=checked.device,
            run_dir=run_dir,
            screen=run.screen,
        )
        yield name, record


def export_one(
    name: str,
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
    """Export `model` in the format `name`. run_dir: base of the path in the record.

    Raises:
        GateError: the exported model differs; nothing is kept.
    """
    with screen.phase(f"export {name}") as progress:
        figures = export(
            model,
            tokenizer,
            out,
            format=name,
            rows=rows,
            device=device,
            gate_tokens=gate_tokens,
            progress=progress,
        )
    if run_dir is not None:
        figures["path"] = os.path.relpath(figures["path"], run_dir)
    screen.say(f"  {in_words(figures)}")
    return ExportRecord.model_validate(figures)
