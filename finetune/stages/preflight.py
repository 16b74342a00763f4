"""Cheap checks before anything is loaded or written: device, model, data, labels, adapter targets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import allocator, provenance
from finetune.assembly import Inputs, architecture, open_data, open_inputs
from finetune.errors import GateError, UserError
from finetune.exporters import check
from finetune.files import TOKENIZER, atomic_folder
from finetune.models.architecture import ArchitectureInfo, adapter_parameters, parts_without_adapters
from finetune.models.config import recipe_tokenizer
from finetune.models.device import pick_device
from finetune.models.sub_norms import converted_config
from finetune.processes import is_main_process, world_size
from finetune.recipe import Recipe, doubts, dump_recipe
from finetune.record import Record
from finetune.screen import Screen
from finetune.stages.context import RunContext
from finetune.task_data import HeldOut, TaskData, TextRecord, data_record
from finetune.train import offload, optim, parallel


@dataclass
class Checked:
    """Result of the checks. trainable: number of parameters; forced: the failed checks that --force overrode."""

    device: torch.device
    inputs: Inputs
    data: TaskData
    held_out: HeldOut
    info: ArchitectureInfo
    targets: list[str]
    trainable: int
    forced: str | None


def preflight(run: RunContext, record: Record | None) -> Checked:
    """Check the device, model and data of a run. record: of a resumed run.

    Raises:
        UserError: something that the recipe names is missing, damaged or unsupported. GateError: labels are wrong, without
            --force.
    """
    recipe, screen = run.recipe, run.screen
    device = _device(recipe, screen)
    with screen.phase("tokenizer") as progress:
        saved = data_record(record) if record is not None else None
        revision = saved.revision if isinstance(saved, TextRecord) else None
        inputs = open_inputs(recipe, run.path, revision=revision, progress=progress)
        _check_exports(recipe, inputs)
    with screen.phase("data") as progress:
        data = open_data(recipe, inputs, progress)
    for line in data.lines():
        screen.say(f"  {line}")
    for line in data.warnings():
        screen.warn(line)
    screen.preflight(data.preflight.checks, data.preflight.examples)
    forced_before = record is not None and record.preflight is not None and record.preflight.forced is not None
    forced = _gate(data, screen, force=run.force or forced_before)
    with screen.phase("architecture"):
        info, targets = architecture(recipe, inputs)
        trainable = adapter_parameters(recipe.adapter, info, targets) if targets else info.parameters
    if targets and (left_out := parts_without_adapters(info, targets)) is not None:
        screen.warn(left_out)
    for line in doubts(recipe, is_float=not getattr(inputs.config, "quantization_config", None)):
        screen.warn(line)
    return Checked(device, inputs, data, data.held_out(), info, targets, trainable, forced)


def _device(recipe: Recipe, screen: Screen) -> torch.device:
    """Choose the device of this process and check that it supports what the recipe asks for."""
    require_trackers(recipe.run.trackers)
    device = parallel.init_distributed(pick_device(recipe.run.device).type)
    offload.check(recipe.model.offload_layers, device)
    several = f", {world_size()} processes ({recipe.run.parallel})" if world_size() > 1 else ""
    memory = f"; memory by {allocator.name()}" if device.type == "cpu" else ""
    screen.say(f"  {provenance.device_name(device)}{several}{memory}")
    if recipe.train.checkpointing == "offload" and device.type == "cpu":
        raise UserError(
            "checkpointing: offload needs a GPU: on a CPU, activations are already in its memory",
            where="train.checkpointing",
            got="offload",
            hint="train.checkpointing=true",
        )
    if device.type == "cpu" and recipe.run.device == "auto" and Path("/proc/driver/nvidia").exists():
        screen.warn(f"torch {torch.__version__} cannot use the installed NVIDIA driver (CUDA 13.0 needs 580 or newer)")
    return device


def require_trackers(names: Iterable[str]) -> None:
    """Raise UserError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError("this tracker is not installed", where="run.trackers", got=name, hint=f"pip install {name}")


def check_processes(recipe: Recipe, processes: int) -> None:
    """Raise UserError for settings that several processes do not support, before anything is loaded."""
    train, run = recipe.train, recipe.run
    if processes == 1:
        return
    for refused in optim.refusals(
        train.optimizer,
        stochastic_rounding=train.stochastic_rounding,
        in_backward=train.optimizer_in_backward,
        world_size=processes,
        sharded=run.parallel == "fsdp",
    ):
        raise refused.error()
    if recipe.fit == "auto":
        raise UserError(
            "fit: auto works with one process only",
            where="fit",
            got=f"{processes} processes",
            hint="fit=none; finetune plan --fit shows the changes to make",
        )
    if train.micro_batch * train.accumulation < processes:
        raise UserError(
            "more processes than sequences in a step",
            where="train.accumulation",
            got=f"micro_batch {train.micro_batch} × accumulation {train.accumulation}, {processes} processes",
            hint=f"train.accumulation={-(-processes // train.micro_batch)}; micro-batches are split across processes, the global "
            "batch size stays the same",
        )


def _check_exports(recipe: Recipe, inputs: Inputs) -> None:
    """Raise UserError for an export format that the trained model will not fit, before it is trained."""
    from transformers import AutoModelForCausalLM

    config, ternary = inputs.config, recipe.quant.scheme == "ternary"
    if recipe.quant.sub_norms:
        with torch.device("meta"):
            config = converted_config(AutoModelForCausalLM.from_config(config))
    for name in [*(["bitnet"] if ternary else []), *recipe.export.formats]:
        check(
            config,
            name,
            ternary=ternary,
            keep=recipe.quant.keep,
            rms_norm=recipe.quant.rms_norm,
            tokenizer=inputs.tokenizer,
        )


def _gate(data: TaskData, screen: Screen, *, force: bool) -> str | None:
    """Stop on failed checks; returns the reasons that --force overrode, or None.

    Raises:
        GateError: a check failed, without --force.
    """
    failed = data.preflight.failed
    if not failed:
        return None
    reasons = "; ".join(f"{one.name}: {one.detail}" for one in failed)
    nothing = any(one.name == "something to learn" for one in failed)
    hopeless = not data.preflight.supervised_tokens or any(one.name == "the model's vocabulary" for one in failed)
    if force and not hopeless:
        screen.warn(f"--force: {reasons}")
        return reasons
    raise (UserError if nothing else GateError)(
        "no training data" if nothing else "the preflight checks refuse this data",
        where=data.source,
        got=reasons,
        hint="fix the data or the template" + ("" if hopeless else "; --force trains anyway and records the failed checks"),
    )


def describe(run: RunContext, checked: Checked) -> None:
    """Print the run folder and what is trained."""
    info = checked.info
    run.screen.say(f"  into {run.path}")
    run.screen.say(
        f"  {info.architecture}, {info.parameters / 1e6:.1f} M parameters, {checked.trainable / 1e6:.2f} M trained"
        + (f" in {len(checked.targets)} adapters" if checked.targets else "")
    )


def keep_tokenizer(run: RunContext, checked: Checked) -> None:
    """Save a tokenizer that the run trained to its folder, and load it from there, as a resumed run does."""
    if run.recipe.model.config is None or run.recipe.tokenizer.name is not None:
        return
    folder = run.path / TOKENIZER
    if is_main_process() and not folder.exists():
        with atomic_folder(folder) as temporary:
            checked.inputs.tokenizer.save_pretrained(temporary)
    parallel.wait()
    checked.inputs.tokenizer = recipe_tokenizer(run.recipe, checked.inputs.source, run.path)


def agree(recipe: Recipe, checked: Checked) -> None:
    """Raise GateError if the processes have read different data, tokenizers or recipes."""
    vocabulary = json.dumps(checked.inputs.tokenizer.get_vocab(), sort_keys=True)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in (vocabulary, dump_recipe(recipe))]
    gathered: list[list[Any]] = parallel.all_gather_object([checked.data.digest, *digests])
    for what, values in zip(("data", "tokenizer", "recipe"), zip(*gathered, strict=True), strict=True):
        if len(set(values)) > 1:
            got = ", ".join(f"process {number}: {value[:12]}…" for number, value in enumerate(values))
            raise GateError(f"the processes have different versions of the {what}", where=checked.data.source, got=got)
