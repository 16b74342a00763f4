"""From a recipe to the arguments of the training loop, in steps: inputs → data → model → batches, loss, optimizer.

A run evaluates and saves between the steps (finetune/stages/); a benchmark calls `assemble`, which takes them all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.models.architecture import ArchitectureInfo, adapter_targets, architecture_of
from finetune.models.build import BuiltModel, build_model, build_teacher, distillation
from finetune.models.config import check_scheme, eos_token_ids, limits, load_config, recipe_tokenizer
from finetune.models.precision import autocast_dtype, default_dtype, weights_dtype
from finetune.models.source import Source, source_of
from finetune.recipe import Recipe, Train
from finetune.run_dir import RunDir
from finetune.screen import Shown
from finetune.task_data import TaskData, build_data, open_stream
from finetune.train import checkpoint, offload, optim
from finetune.train.checkpoint import Progress
from finetune.train.fast.patching import FastStep, apply_patches
from finetune.train.loop import Training
from finetune.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.stream import Source as TextSource
    from finetune.train.distill import Distillation


@dataclass
class Inputs:
    """Model, tokenizer and config of a recipe, opened; no weights are read. stream: the text source, if text is streamed."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    config: Any  # PretrainedConfig
    eos_token_ids: frozenset[int]
    stream: TextSource | None


def open_inputs(recipe: Recipe, run_dir: Path, *, revision: str | None = None, progress: Shown | None = None) -> Inputs:
    """Open model, tokenizer and text stream of a recipe.

    run_dir: where the run keeps a tokenizer that it trained. revision: commit of the stream's dataset.

    Raises:
        UserError: one of them is missing, unreadable, or does not support what the recipe asks for.
    """
    source = source_of(recipe.model)
    stream = open_stream(recipe, revision) if recipe.streams_text else None
    tokenizer = recipe_tokenizer(recipe, source, run_dir, stream, progress)
    config = load_config(source, tokenizer)
    check_scheme(source, config, recipe.quant, frozen=recipe.base_frozen, twin=recipe.twin)
    return Inputs(source, tokenizer, config, eos_token_ids(source, tokenizer), stream)


def open_data(recipe: Recipe, inputs: Inputs, progress: Shown | None = None) -> TaskData:
    """Read and inspect the data of a recipe.

    Raises:
        UserError: it cannot be read, matches no format, or the template refuses it.
    """
    shown = None if progress is None else lambda done, total: progress(done, total, "rows")
    return build_data(
        recipe, inputs.tokenizer, inputs.eos_token_ids, limits=limits(inputs.config), source=inputs.stream, progress=shown
    )


def architecture(recipe: Recipe, inputs: Inputs) -> tuple[ArchitectureInfo, list[str]]:
    """(the model's architecture, paths of the modules that get adapters).

    Raises:
        UserError: it is not a causal language model, or a target matches no module.
    """
    info = architecture_of(inputs.source, inputs.config)
    return info, adapter_targets(recipe.adapter, info) if recipe.base_frozen else []


def batching(recipe: Recipe, model: Any, data: TaskData) -> tuple[Train, bool]:
    """(training settings, packing) that suit `model`.

    A model that mixes the samples of a sequence (a recurrent one) gets one sample at a time, and more micro-batches per step.
    """
    from eval.perplexity import rows_stay_apart

    settings, packing = recipe.train, recipe.data.packing
    if recipe.streams_text or not (packing or settings.micro_batch > 1):
        return settings, packing
    model.eval()
    with torch.no_grad():
        longest = recipe.data.max_length * settings.micro_batch
        if rows_stay_apart(model, highest_id=data.highest_id(), longest=longest):
            return settings, packing
    accumulation = settings.accumulation * settings.micro_batch
    return settings.model_copy(update={"micro_batch": 1, "accumulation": accumulation}), False


def teacher_of(recipe: Recipe, model: Any, *, device: torch.device, dtype: torch.dtype, **options: Any) -> Distillation | None:
    """Distillation of the recipe's teacher into `model`, or None. dtype: of the student's weights; options: for `build_teacher`.

    Raises:
        UserError: the teacher cannot be read, or does not match the student.
    """
    teacher_dtype = default_dtype(device.type) if recipe.model.dtype == "auto" else dtype
    return distillation(recipe, build_teacher(recipe, device=device, dtype=teacher_dtype, **options), model)


@dataclass
class TrainingSetup:
    """What the training loop needs besides its outputs. limit: the key that sets `total_steps`, in words; notes: for the user."""

    model: Any
    task: Task
    settings: Train
    optimizer: torch.optim.Optimizer
    total_steps: int
    limit: str
    autocast: torch.dtype | None
    teacher: Distillation | None
    notes: list[str]

    def loop(
        self, *, accelerator: Any, folder: RunDir, progress: Progress, total_steps: int | None = None, **hooks: Any
    ) -> Training:
        """The training loop, starting at `progress`."""
        return Training(
            self.model,
            self.task,
            self.settings,
            accelerator=accelerator,
            optimizer=self.optimizer,
            total_steps=total_steps or self.total_steps,
            folder=folder,
            progress=progress,
            autocast=self.autocast,
            offload=self.settings.checkpointing == "offload",
            **hooks,
        )


def set_up_training(
    recipe: Recipe,
    built: BuiltModel,
    patches: FastStep | None,
    data: TaskData,
    device: torch.device,
    *,
    teacher: Distillation | None = None,
    changes: dict[str, Any] | None = None,
) -> TrainingSetup:
    """Batches, loss and optimizer for a built model. changes: overrides of the training settings.

    Raises:
        UserError: the optimizer is not available, or does not support these weights.
    """
    settings, packing = batching(recipe, built.model, data)
    notes = []
    if settings is not recipe.train:
        notes.append(
            f"{built.architecture} mixes the samples of a packed batch, or reads none of this length: training on one sample "
            f"at a time, {settings.accumulation} per step"
        )
    settings = settings.model_copy(update=changes or {})
    task = data.task(settings, device, packing=packing, head=patches.head if patches is not None else None, teacher=teacher)
    total, limit = data.steps(task, settings)
    optimizer, note = optim.build(
        checkpoint.trained(built.model),
        name=settings.optimizer,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        device=device.type,
        stochastic_rounding=settings.stochastic_rounding,
        in_backward=settings.optimizer_in_backward,
    )
    autocast = autocast_dtype(recipe, built.dtype, device.type)
    return TrainingSetup(
        built.model, task, settings, optimizer, total, limit, autocast, teacher, [*notes, *([note] if note else [])]
    )


@dataclass
class Assembly:
    """All parts of a recipe, ready to train."""

    inputs: Inputs
    data: TaskData
    info: ArchitectureInfo
    built: BuiltModel
    patches: FastStep
    setup: TrainingSetup

    def train(self, folder: RunDir, steps: int, **hooks: Any) -> dict[str, Any]:
        """Run the training loop for `steps` steps. hooks: further arguments of the loop."""
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=torch.device(self.built.model.device).type == "cpu")
        return self.setup.loop(accelerator=accelerator, folder=folder, progress=Progress(), total_steps=steps, **hooks).run()


def assemble(recipe: Recipe, device: torch.device, run_dir: Path, changes: dict[str, Any] | None = None) -> Assembly:
    """Load and prepare `recipe` on `device` as `finetune run` does, without output or evaluation.

    run_dir: for layers offloaded to disk. changes: overrides of the training settings. With fast.compile: auto it compiles
    however short the run is.

    Raises:
        UserError: the recipe cannot be trained, or its data has no supervised token.
    """
    from accelerate.utils import set_seed

    inputs = open_inputs(recipe, run_dir)
    data = open_data(recipe, inputs)
    if not data.preflight.supervised_tokens:
        raise UserError("no training data", where=data.source, got="no token is supervised")
    info, targets = architecture(recipe, inputs)
    offload.check(recipe.model.offload_layers, device)
    built = build_model(
        recipe,
        inputs.source,
        inputs.config,
        device=device,
        dtype=weights_dtype(recipe, device.type),
        targets=targets,
        eos_token_ids=inputs.eos_token_ids | data.eos_token_ids,
        calibration=calibration_ids(data),
        scratch_dir=run_dir,
    )
    patches = apply_patches(built.model, recipe, device)
    teacher = teacher_of(recipe, built.model, device=device, dtype=built.dtype, vocabulary=inputs.tokenizer.get_vocab())
    setup = set_up_training(recipe, built, patches, data, device, teacher=teacher, changes=changes)
    set_seed(recipe.run.seed)
    return Assembly(inputs, data, info, built, patches, setup)


def calibration_ids(data: TaskData) -> list[torch.Tensor]:
    """Input ids (1, T) of the first rows, for calibrating the gains of sub-norms."""
    return [torch.tensor([ids]) for ids, _ in data.first_rows(8)]
