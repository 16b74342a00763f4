"""Building a run's model with models/build.py, patching it for speed, and reporting both."""

from __future__ import annotations

from typing import Any

import torch

from finetune.assembly import calibration_ids
from finetune.models.build import BuiltModel, build_model
from finetune.models.precision import weights_dtype
from finetune.recipe import Recipe
from finetune.record import ModelRecord, ModelSource, OffloadRecord, Record, SwapRecord
from finetune.stages.context import RunContext
from finetune.stages.evaluate import measure
from finetune.stages.preflight import Checked
from finetune.train import offload
from finetune.train.fast.patching import FastStep, apply_patches
from finetune.units import human_bytes
from quant import backends


def build(run: RunContext, checked: Checked, record: Record) -> tuple[BuiltModel, ModelRecord]:
    """Build the model of a run. A pretrained float model is evaluated once before it is made ternary, as the baseline.

    Raises:
        UserError: weights are missing or damaged, or cannot be quantized as the recipe says.
    """
    recipe, screen, run_dir = run.recipe, run.screen, run.path

    def measure_float(model: Any) -> None:
        if checked.held_out and record.eval.float_model is None:
            record.eval.float_model = measure("float", run, checked, model, None)
            run.save()

    if recipe.model.offload_layers == "disk" and (file_system := offload.is_memory(run_dir)):
        screen.warn(f"model.offload_layers: {run_dir} is on {file_system}, which is in memory, not on disk; give another run.dir")
    inputs, eos_token_ids = checked.inputs, checked.inputs.eos_token_ids | checked.data.eos_token_ids
    built = build_model(
        recipe,
        inputs.source,
        inputs.config,
        device=checked.device,
        dtype=weights_dtype(recipe, checked.device.type),
        targets=checked.targets,
        eos_token_ids=eos_token_ids,
        calibration=calibration_ids(checked.data),
        scratch_dir=run_dir,
        measure_float=measure_float,
        phase=screen.phase,
    )
    swap = _swap_record(recipe, built, checked.device)
    if swap is not None and built.swap is not None:
        screen.say(
            f"  {swap.swapped} linears in {swap.scheme} ({swap.share:.0%} of the parameters): "
            f"{human_bytes(swap.bytes_before)} → {human_bytes(swap.bytes_after)}; {swap.backend}\n"
            f"  left in floats: {built.swap.left_in_words}"
        )
    layers = OffloadRecord.model_validate(built.offloaded.figures()) if built.offloaded is not None else None
    if layers is not None:
        screen.say(
            f"  {layers.layers} layers offloaded to {layers.source}: {human_bytes(layers.bytes)} in total, "
            f"the largest {human_bytes(layers.largest_layer_bytes)}"
        )
    return built, ModelRecord(
        architecture=checked.info.architecture,
        parameters=built.parameters,
        trainable=built.trainable,
        swap=swap,
        streamed=layers,
        adapters=len(built.targets),
        dtype=str(built.dtype).removeprefix("torch."),
        eos_token_ids=sorted(eos_token_ids),
    )


def _swap_record(recipe: Recipe, built: BuiltModel, device: torch.device) -> SwapRecord | None:
    if built.swap is None:
        return None
    return SwapRecord(
        scheme=built.swap.scheme,
        swapped=len(built.swap.swapped),
        left=built.swap.left,
        share=built.swap.share,
        bytes_before=built.swap.bytes_before,
        bytes_after=built.swap.bytes_after,
        backend=backends.describe(device, scheme=recipe.quant.scheme),
    )


def model_source(checked: Checked, built: BuiltModel) -> ModelSource:
    return ModelSource(source=checked.inputs.source.name, parameters=built.parameters)


def patch(run: RunContext, checked: Checked, built: BuiltModel) -> FastStep:
    """Patch the model with faster implementations of the same computation, and print which were applied or skipped."""
    with run.screen.phase("fast step"):
        work = built.parameters * checked.data.tokens(run.recipe.train)
        patches = apply_patches(built.model, run.recipe, checked.device, work=work)
    for line in patches.in_words():
        run.screen.say(f"  {line}")
    return patches
