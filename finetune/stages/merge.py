"""Saving the trained weights: adapter files, and a merged model folder for plain transformers, gated by its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import merging
from finetune.files import atomic_folder
from finetune.models.build import BuiltModel
from finetune.models.prepare import save_adapter
from finetune.record import ExportRecord, LossRecord, MergeGate, MergeRecord, Reternarized
from finetune.screen import Screen
from finetune.stages.context import RunContext
from finetune.stages.export import export_one
from finetune.stages.preflight import Checked
from finetune.task_data import HeldOut
from finetune.units import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Merged:
    """Result of saving the trained weights. model: the source of further exports."""

    model: Any
    record: MergeRecord | None
    exports: dict[str, ExportRecord]


def finish(run: RunContext, checked: Checked, built: BuiltModel, after: LossRecord | None) -> Merged:
    """Save adapter and merged model of a run, as its recipe says.

    after: the trained model's held-out loss, in the arithmetic of training.

    Raises:
        GateError: the merged model differs from the trained one.
    """
    recipe, run_dir, screen = run.recipe, run.path, run.screen
    model, tokenizer, data = built.model, checked.inputs.tokenizer, checked.data
    if recipe.writes_adapter:
        with screen.phase("save adapter"):
            save_adapter(model, tokenizer, run_dir / "adapter")
    if recipe.mergeable and not recipe.run.merge:
        return Merged(model, None, {})
    if built.offloaded is not None:
        built.offloaded.restore()
    out = run_dir / "merged"
    if recipe.trains_quantized:
        exported = export_one(
            "bitnet",
            model,
            tokenizer,
            out,
            rows=checked.held_out or data.first_rows(8),
            gate_tokens=recipe.export.gate_tokens,
            device=checked.device,
            run_dir=run_dir,
            screen=screen,
        )
        return Merged(model, MergeRecord(path="merged", gate=None, bytes=exported.bytes), {"bitnet": exported})
    rows = checked.held_out[: recipe.eval.merge_rows]
    if recipe.mergeable and recipe.quant.scheme == "ternary":
        model, record = merge_ternary(
            model,
            tokenizer,
            out,
            rows=rows or data.first_rows(8),
            batch_tokens=recipe.eval.batch_tokens,
            limit=recipe.eval.merge_limit,
            device=checked.device,
            trained=run_dir / "adapter",
            screen=screen,
        )
        return Merged(model, record, {})
    record = merge(
        model,
        tokenizer,
        out,
        name="merge" if recipe.mergeable else "save model",
        dtype=built.dtype,
        rows=rows,
        limit=recipe.eval.merge_limit,
        batch_tokens=recipe.eval.batch_tokens,
        device=checked.device,
        own=after,
        screen=screen,
    )
    return Merged(model, record, {})


def merge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    dtype: torch.dtype,
    rows: HeldOut,
    limit: float,
    batch_tokens: int,
    device: torch.device,
    screen: Screen,
    name: str = "merge",
    own: LossRecord | None = None,
) -> MergeRecord:
    """Write the trained model (consumed) as a plain model to the folder `out`, gated by its loss on `rows` if there are any.

    own: the trained model's loss as measured after training.

    Raises:
        GateError: the written model differs; `out` is not created.
    """
    if not rows:
        with screen.phase("save model"), atomic_folder(out) as temporary:
            merging.write_folder(merging.into_float(model, dtype), tokenizer, temporary)
        screen.warn("the merged model was not compared with the trained one: no held-out rows, or eval.merge_rows is 0")
        return MergeRecord(path=out.name, gate=None)
    expected = own.loss if own is not None and own.rows == len(rows) else None
    with screen.phase(name) as progress:
        figures = merging.write_gated(
            model,
            tokenizer,
            out,
            dtype=dtype,
            rows=rows,
            limit=limit,
            batch_tokens=batch_tokens,
            device=device,
            progress=progress,
            expected=expected,
        )
    gate = MergeGate.model_validate(figures)
    screen.say(
        f"  merged into {out}: {human_bytes(figures['bytes'])}; loss {gate.merged_loss:.4f} against the trained model's "
        f"{gate.adapter_loss:.4f} on {gate.rows} rows, both in {gate.arithmetic} (the gate allows {gate.limit} nats)"
    )
    if expected is not None and abs(expected - gate.adapter_loss) > gate.limit:
        screen.warn(
            f"this model is sensitive to rounding: its loss is "
            f"{gate.adapter_loss:.3f} in {gate.arithmetic} and {expected:.3f} in "
            f"{str(dtype).removeprefix('torch.')}, in which it was trained and evaluated"
        )
    return MergeRecord(path=out.name, gate=gate, bytes=figures["bytes"])


def merge_ternary(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    rows: HeldOut,
    batch_tokens: int,
    limit: float,
    device: torch.device,
    trained: Path | str,
    screen: Screen,
) -> tuple[Any, MergeRecord]:
    """Merge adapters into ternary weights, and print what that costs in loss; the adapter is kept.

    trained: where the adapter is; on its base it is the trained model.

    Raises:
        GateError: plain transformers computes other logits from the written folder.
    """
    with screen.phase("merge") as progress:
        model, figures = merging.write_ternary(
            model, tokenizer, out, rows=rows, batch_tokens=batch_tokens, device=device, progress=progress
        )
    screen.say(f"  {out}: {merging.ternary_in_words(figures)}")
    if abs(figures["merged_loss"] - figures["adapter_loss"]) > limit:
        screen.warn(
            "the merged model differs from the trained one: rounding back to ternary lost most of the adapter's update. "
            f"Use {trained} on its base instead"
        )
    record = MergeRecord(path=out.name, gate=None, bytes=figures["bytes"], reternarized=Reternarized.model_validate(figures))
    return model, record
