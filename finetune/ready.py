"""What a run, and a benchmark that trains as a run does, put together alike between a recipe and its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import model as models
from finetune.errors import Mistake
from finetune.files import RunFolder
from finetune.material import Material, gather, open_stream
from finetune.models.precision import autocast_dtype, weights_dtype
from finetune.recipe import Recipe, Train
from finetune.use import tokenizer_of

if TYPE_CHECKING:
    from finetune.model import Prepared, Skeleton, Source
    from finetune.train.fast.patching import FastStep
    from finetune.train.kind import Kind
    from finetune.train.offload import Streamed


def optimizer_of(settings: Train, model: Any, device_type: str) -> tuple[torch.optim.Optimizer, str | None]:
    """The recipe's optimizer of what `model` trains, and what the user should know of it."""
    from finetune.train import checkpoint, optim

    return optim.build(
        checkpoint.trained(model),
        name=settings.optimizer,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        device=device_type,
        stochastic_rounding=settings.stochastic_rounding,
        in_backward=settings.step_in_backward,
    )


def batching(recipe: Recipe, model: Any, material: Material) -> tuple[Train, bool]:
    """(settings, packing) as `model` can take them: one that lets samples in a row see each other gets a single one at a time,
    and as many more micro-batches to a step."""  # fmt: skip
    from eval.perplexity import rows_stay_apart

    settings, packing = recipe.train, recipe.data.packing
    if recipe.kind != "sft" or not (packing or settings.micro_batch > 1):
        return settings, packing
    model.eval()
    with torch.no_grad():
        if rows_stay_apart(model, highest_id=material.highest_id()):
            return settings, packing
    many = settings.accumulation * settings.micro_batch
    return settings.model_copy(update={"micro_batch": 1, "accumulation": many}), False


@dataclass
class Ready:
    """All that the loop takes."""

    source: Source
    config: Any
    material: Material
    bones: Skeleton
    targets: list[str]
    dtype: torch.dtype
    prepared: Prepared
    streamed: Streamed | None
    fast: FastStep
    settings: Train
    kind: Kind
    accelerator: Any
    model: Any
    optimizer: Any
    autocast: torch.dtype | None

    def train(self, folder: RunFolder, steps: int, **told: Any) -> dict[str, Any]:
        """The loop from the first step on. told: more of its arguments."""
        from finetune.train.checkpoint import Progress
        from finetune.train.loop import Training

        return Training(
            self.model, self.kind, self.settings, accelerator=self.accelerator, optimizer=self.optimizer, total_steps=steps,
            folder=folder, progress=Progress(), autocast=self.autocast, offload=self.settings.checkpointing == "offload", **told,
        ).run()  # fmt: skip


def ready(recipe: Recipe, device: torch.device, folder: Path, changes: dict[str, Any] | None = None) -> Ready:
    """`recipe`, loaded and prepared on `device` as `finetune run` does it (finetune/run.py), with nothing said or measured.

    folder: for what streams from disk. changes: of the settings, where they are used. Compiling is not asked whether it pays.

    Raises:
        Mistake: the recipe cannot be trained, or nothing of its data is.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from finetune.train import offload
    from finetune.train.fast import patching

    source = models.source_of(recipe.model)
    stream = open_stream(recipe) if recipe.kind == "pretrain" else None
    tokenizer = tokenizer_of(recipe, source, folder, stream)
    config = models.load_config(source, tokenizer)
    frozen = recipe.adapter.kind == "lora"
    models.check_scheme(source, config, recipe.quant, frozen=frozen)
    material = gather(recipe, tokenizer, models.stop_ids(source, tokenizer), limits=models.limits(config), source=stream)
    if not material.preflight.supervised_tokens:
        raise Mistake("there is nothing to train on", where=material.source, found="no token is supervised")
    bones = models.skeleton(source, config)
    targets = models.adapter_targets(recipe.adapter, bones) if frozen else []
    dtype = weights_dtype(recipe, device.type)
    offload.check(recipe.model.stream, device)
    disk = offload.Scratch(folder) if recipe.model.stream == "disk" else None
    model = models.load_weights(
        source, config, dtype=dtype, attention=recipe.model.attention, quant=recipe.quant, frozen=frozen, seed=recipe.run.seed,
        put=disk.put if disk is not None else None,
    )  # fmt: skip
    streamed = None

    def move(whole: Any) -> None:
        nonlocal streamed
        streamed = offload.stream(whole, device, disk)

    prepared = models.prepare(
        model, quant=recipe.quant, adapter=recipe.adapter, targets=targets, source=source, device=device,
        checkpointing=bool(recipe.train.checkpointing), seed=recipe.run.seed,
        move=move if recipe.model.stream != "none" else None,
    )  # fmt: skip
    found = patching.apply_patches(prepared.model, recipe, device)
    settings, packing = batching(recipe, prepared.model, material)
    settings = settings.model_copy(update=changes or {})
    kind = material.kind(settings, device, packing=packing, head=found.head, teacher=None)
    optimizer, _ = optimizer_of(settings, prepared.model, device.type)
    set_seed(recipe.run.seed)
    accelerator = Accelerator(cpu=device.type == "cpu")
    return Ready(
        source, config, material, bones, targets, dtype, prepared, streamed, found, settings, kind,
        accelerator, prepared.model, optimizer, autocast_dtype(recipe, dtype, device.type),
    )  # fmt: skip
