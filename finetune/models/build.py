"""The assembly of a model: base → sub-norms → packed or fake-quantized linears → adapters → checkpointing, offload, sharding.

Runs, plans (on `meta`, without weights), benchmarks and commands that load a run all build their model here, so they cannot
differ. The teacher of a distillation is built here too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.models.architecture import adapter_targets, architecture_of
from finetune.models.config import load_config, load_tokenizer, set_eos_token_ids
from finetune.models.prepare import prepare
from finetune.models.source import Source, find_model
from finetune.models.sub_norms import converted_config, insert_sub_norms
from finetune.models.weights import load_weights
from finetune.processes import world_size
from finetune.recipe import Recipe
from finetune.screen import Shown
from finetune.train import offload, parallel
from quant.swap import SwapReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.train.distill import Distillation

Phases = Callable[[str], AbstractContextManager[Shown]]


@contextmanager
def silently(name: str) -> Iterator[Shown]:
    """A phase without a screen."""

    def shown(done: int, total: int, note: str = "") -> None:
        return None

    yield shown


@dataclass
class BuiltModel:
    """A model ready for training or inference, and how it was built.

    swap: the packed or fake-quantized linears, None if all are in floats; targets: modules with adapters; parameters: with those
    that packed linears represent; offloaded: the frozen layers that are offloaded.
    """

    model: Any  # PreTrainedModel or PeftModel
    architecture: str
    swap: SwapReport | None
    targets: list[str]
    parameters: int
    trainable: int
    dtype: torch.dtype
    offloaded: offload.Streamed | None = None


def build_model(
    recipe: Recipe,
    source: Source,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    targets: list[str] | None = None,
    eos_token_ids: Iterable[int] = (),
    calibration: Sequence[torch.Tensor] = (),
    training: bool = True,
    scratch_dir: Path | None = None,
    adapter: Path | None = None,
    compute_dtype: torch.dtype | None = None,
    measure_float: Callable[[Any], None] | None = None,
    phase: Phases = silently,
) -> BuiltModel:
    """Build the model of a recipe.

    device: on `meta` no weights are read. dtype: of the unquantized weights. targets: of the adapters, if known. calibration:
    input ids (1, T) for the gains of sub-norms. training: apply the recipe's gradient checkpointing, offloading and sharding.
    scratch_dir: for layers offloaded to disk. adapter: a folder of trained adapters, else new ones. compute_dtype: another dtype
    for a base under a trained adapter. measure_float: called with a pretrained float model before it is made ternary.

    Raises:
        UserError: weights or adapters cannot be read, do not fit, or cannot be quantized as the recipe says.
    """
    on_meta = device.type == "meta"
    placed = training and not on_meta
    disk = offload.Scratch(scratch_dir) if placed and scratch_dir and recipe.model.offload_layers == "disk" else None
    with phase("weights") as progress:
        if on_meta:
            model = _meta_base(recipe, source, config, dtype)
        else:
            model = load_weights(
                source,
                config,
                dtype=dtype,
                attention=recipe.model.attention,
                quant=recipe.quant,
                frozen=recipe.base_frozen,
                seed=recipe.run.seed,
                put=disk.put if disk is not None else None,
                progress=progress,
            )
    was_float = recipe.model.name is not None and getattr(model, "hf_quantizer", None) is None
    if measure_float and was_float and recipe.trains_quantized:
        measure_float(model.to(device))  # type: ignore[arg-type]
    offloaded: list[offload.Streamed] = []
    with phase("prepare") as progress:
        if recipe.quant.sub_norms and not on_meta:
            model = insert_sub_norms(model, [ids.to(model.device) for ids in calibration])
        if targets is None:
            targets = adapter_targets(recipe.adapter, architecture_of(source, model.config)) if recipe.base_frozen else []
        architecture = type(model).__name__
        prepared = prepare(
            model,
            quant=recipe.quant,
            adapter=recipe.adapter,
            targets=targets,
            source=source,
            device=device,
            checkpointing=training and bool(recipe.train.checkpointing),
            seed=recipe.run.seed,
            move=_mover(recipe, device, disk, offloaded) if placed else None,
            trained=adapter,
            compute_dtype=compute_dtype,
            progress=lambda done, total: progress(done, total, "linears"),
        )
        set_eos_token_ids(prepared.model, eos_token_ids)
    return BuiltModel(
        model=prepared.model,
        architecture=architecture,
        swap=prepared.swap,
        targets=targets,
        parameters=prepared.parameters,
        trainable=prepared.trainable,
        dtype=dtype,
        offloaded=offloaded[0] if offloaded else None,
    )


def _mover(
    recipe: Recipe, device: torch.device, disk: offload.Scratch | None, offloaded: list[offload.Streamed]
) -> Callable[[Any], None] | None:
    """A function that offloads or shards a model larger than the device, or None. offloaded: receives the offloaded layers."""
    if recipe.model.offload_layers != "none":
        return lambda model: offloaded.append(offload.stream(model, device, disk))
    if world_size() > 1 and recipe.run.parallel == "fsdp":
        return lambda model: parallel.shard(model, device)
    return None


def _meta_base(recipe: Recipe, source: Source, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The base model on `meta`, in its final layout."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # packed as the recipe says; `check_scheme` has verified that this is the same
    attention = {} if recipe.model.attention == "auto" else {"attn_implementation": recipe.model.attention}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code, **attention)
        if recipe.quant.sub_norms:
            model = AutoModelForCausalLM.from_config(converted_config(model), dtype=dtype, **attention)
    return model.eval()


def build_teacher(
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
    config: Any = None,
    vocabulary: dict[str, int] | None = None,
    phase: Phases = silently,
) -> Any:
    """Load the float teacher of the recipe, or return None. On `meta` it has no weights.

    dtype: of its weights. config: its config, needed on `meta`. vocabulary: the student's, which must be equal.

    Raises:
        UserError: it cannot be read, or has a different vocabulary.
    """
    name = recipe.distill.teacher
    if name is None:
        return None
    if device.type == "meta":
        from transformers import AutoModelForCausalLM

        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    source = find_model(name, where="distill.teacher")
    with phase("teacher") as progress:
        if vocabulary is not None and load_tokenizer(source).get_vocab() != vocabulary:
            raise UserError("teacher and student have different vocabularies", where="distill.teacher", got=name)
        teacher: Any = load_weights(source, load_config(source), dtype=dtype, attention=recipe.model.attention, progress=progress)
        return teacher.to(device)


def distillation(recipe: Recipe, teacher: Any, student: Any) -> Distillation | None:
    """The distillation losses of `student`, attached to it; None without a teacher."""
    from finetune.train.distill import Distillation

    if teacher is None:
        return None
    weights = recipe.distill
    losses = Distillation(
        teacher,
        logits=weights.logits,
        relations=weights.relations,
        temperature=weights.temperature,
        layer=weights.layer,
        split_heads=None,
    )
    losses.attach(student)
    return losses
