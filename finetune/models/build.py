"""THE assembly of a model: base → sub-norms → packed or fake-quantized linears → adapters → checkpointing, offload, shards.

A run, its plan (on `meta`, without weights), a benchmark that trains, and whatever opens a run's result build their model here,
so that they cannot differ. The teacher of a distillation and the fast step's patches, which go on top, are here too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import Mistake
from finetune.files import atomic_folder
from finetune.models.architecture import adapter_targets, architecture_of
from finetune.models.config import load_config, load_tokenizer, set_stops
from finetune.models.source import Source, find_model, shapes_in
from finetune.models.sub_norms import converted_config, insert_sub_norms
from finetune.models.weights import cast, load_weights, parameters_of
from finetune.processes import world
from finetune.recipe import Adapter, Quant, Recipe
from finetune.screen import Shown
from finetune.train import offload, parallel
from quant.swap import DEFAULT_KEEP, SwapReport, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.train.distill import Distillation

Phases = Callable[[str], AbstractContextManager[Shown]]


@contextmanager
def silently(name: str) -> Any:
    """Phases of who has no screen."""
    yield lambda done, total, note="": None


@dataclass
class BuiltModel:
    """A model ready to train or to answer, and what was done to it.

    swap: what is packed or fake-quantized, None in floats. targets: modules with adapters. parameters: those that packed linears
    stand for. offloaded: the frozen layers that lie elsewhere.
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
    stop_ids: Iterable[int] = (),
    calibration: Sequence[torch.Tensor] = (),
    training: bool = True,
    scratch_dir: Path | None = None,
    adapter: Path | None = None,
    compute_dtype: torch.dtype | None = None,
    measure_float: Callable[[Any], None] | None = None,
    phase: Phases = silently,
) -> BuiltModel:
    """The model of a recipe.

    device: where it goes; on `meta` no weights are read. dtype: of the unquantized weights. targets: of the adapters, where they
    are known already. calibration: input ids (1, T) by which the gains of sub-norms are measured. training: with gradient
    checkpointing, offloaded layers and shards, as the recipe says. scratch_dir: for layers that are offloaded to the disk.
    adapter: a folder of trained adapters, else fresh ones. compute_dtype: another dtype for a base under a trained adapter.
    measure_float: told a pretrained float model before it is made ternary.

    Raises:
        Mistake: weights or adapters cannot be read, do not fit, or cannot be quantized as the recipe says.
    """
    on_meta = device.type == "meta"
    disk = offload.Scratch(scratch_dir) if training and recipe.model.stream == "disk" and not on_meta and scratch_dir else None
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
    if measure_float is not None and recipe.trains_quantized and was_float:
        measure_float(model.to(device))
    with phase("prepare") as progress:
        if recipe.quant.sub_norms and not on_meta:
            model = insert_sub_norms(model, [ids.to(model.device) for ids in calibration])
        if targets is None:
            targets = adapter_targets(recipe.adapter, architecture_of(source, model.config)) if recipe.base_frozen else []
        built = _prepared(
            recipe,
            model,
            source,
            targets,
            device=device,
            dtype=dtype,
            training=training,
            disk=disk,
            adapter=adapter,
            compute_dtype=compute_dtype,
            progress=lambda done, total: progress(done, total, "linears"),
        )
    set_stops(built.model, stop_ids)
    return built


def _meta_base(recipe: Recipe, source: Source, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The base without weights, in the layout that it will have."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # packed as the recipe says, which `check_scheme` found to be the same
    chosen = {} if recipe.model.attention == "auto" else {"attn_implementation": recipe.model.attention}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code, **chosen)
        if recipe.quant.sub_norms:
            model = AutoModelForCausalLM.from_config(converted_config(model), dtype=dtype, **chosen)
    return model.eval()


def _prepared(
    recipe: Recipe,
    model: Any,
    source: Source,
    targets: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    disk: offload.Scratch | None,
    adapter: Path | None,
    compute_dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> BuiltModel:
    """`model`, read, with all that the recipe puts on it."""
    offloads = training and device.type != "meta" and recipe.model.stream != "none"
    shards = training and device.type != "meta" and world() > 1 and recipe.run.parallel == "fsdp"
    parameters = parameters_of(model)
    with torch.device("meta") if device.type == "meta" else nullcontext():
        report = packed(model, recipe.quant, progress) if recipe.base_frozen else _trainable(model, recipe.quant, progress)
        if not (offloads or shards):
            model.to(device)
        model.config.use_cache = False
        wrapped = model
        if adapter is not None:
            wrapped = load_adapter(model if compute_dtype is None else cast(model, compute_dtype), adapter)
        elif recipe.base_frozen:
            wrapped = attach(model, recipe.adapter, targets, source, recipe.run.seed)
        else:
            model.requires_grad_(True)
            if any(getattr(module, "rms_norm", None) is not None for module in model.modules()):
                fix_norms(model)
    if training and recipe.train.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    offloaded = offload.stream(wrapped, device, disk) if offloads else None
    if shards:
        parallel.shard(wrapped, device)
    elif adapter is not None:
        wrapped.to(device).eval()
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return BuiltModel(wrapped, type(model).__name__, report, targets, parameters, trainable, dtype, offloaded)


def packed(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What was packed of the base, None where it is in floats; what was not packed while it was read is packed now.

    Raises:
        Mistake: a keep pattern matches nothing, nothing can be packed, or weights are not finite.
    """
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None and getattr(quantizer, "report", None) is not None:
        return quantizer.report
    if quant.scheme == "none":
        return None
    options: dict[str, Any] = {"double": quant.double} if quant.scheme == "nf4" else {}
    try:
        return swap(model, scheme=quant.scheme, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise Mistake("the base cannot be quantized", where="quant", found=str(error)) from None


def _trainable(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What of the model trains master weights in a scheme, None where all of it is in floats.

    Raises:
        Mistake: a keep pattern matches nothing, a shape does not fit the format, or weights are ternary already.
    """
    if quant.scheme == "none":
        return None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # read from a checkpoint of master weights
        return quantizer.report
    if quant.rms_norm and any(name.endswith("_sub_norm") for name, _ in model.named_modules()):
        found = f"rms_norm, and {type(model).__name__} has sub-norms of its own"
        raise Mistake(
            "these are two layouts of one idea", where="quant.rms_norm", found=found, do="model_type: llama, or rms_norm off"
        )
    eps = getattr(model.config, "rms_norm_eps", 1e-6)
    options: dict[str, Any] = {"norm_eps": eps} if quant.rms_norm else {}
    try:
        return swap(model, scheme=quant.scheme, trainable=True, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise Mistake("this model cannot be trained in ternary", where="quant", found=str(error)) from None


def fix_norms(model: Any) -> None:
    """Fix the norms before linears that normalize by themselves at one, untrained: RMSNorm of RMSNorm(x) is RMSNorm(x) but for ε.

    So the layout of BitNet's training tips, which removes them, keeps the shape of the architecture that plain transformers
    loads. The last norm, before the head, stays.

    Raises:
        Mistake: the blocks have other norms than Llama's two.
    """
    layers: Any = next((m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)), [])
    for layer in layers:
        norms: dict[str, Any] = {n: child for n, child in layer.named_children() if "norm" in type(child).__name__.lower()}
        if norms.keys() != {"input_layernorm", "post_attention_layernorm"}:
            found = f"{type(layer).__name__} with {', '.join(norms) or 'no norm'}"
            raise Mistake("it is not known which norms of these blocks stand before linears", where="quant.rms_norm", found=found)
        for norm in norms.values():
            torch.nn.init.ones_(norm.weight)
            norm.requires_grad_(False)


def attach(model: PreTrainedModel, adapter: Adapter, targets: list[str], source: Source, seed: int) -> Any:
    """Fresh LoRA adapters on `targets`; those wrapped are those asked for."""
    from peft import LoraConfig, get_peft_model

    from quant import assert_wrapped, register_peft

    suffixes = sorted({target.rpartition(".")[2] for target in targets})
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=suffixes if named == set(targets) else targets,  # short in adapter_config.json where that says it all
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    register_peft(config)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = source.name
    assert_wrapped(wrapped, targets)
    return wrapped


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` with the trained adapters of PEFT's `folder`.

    Raises:
        Mistake: they are damaged, are no safetensors, or do not fit.
    """
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would take adapter_model.bin, a pickle
        found = ", ".join(sorted(file.name for file in folder.glob("adapter_model*"))) or "no weights"
        do = "save it as safetensors, which is what PEFT does by itself"
        raise Mistake("an adapter is read from adapter_model.safetensors alone", where=str(folder), found=found, do=do)
    shapes_in(weights, str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, OSError) as error:
        found = f"{type(error).__name__}: {error}"
        do = "fetch the adapter again, or update peft"
        raise Mistake(
            "the adapter's config cannot be read", where=str(folder / "adapter_config.json"), found=found, do=do
        ) from None
    register_peft(config)
    try:
        return PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise Mistake("the adapter does not fit its base model", where=str(folder), found=str(error).splitlines()[0]) from None


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """PEFT's own files; `folder` is complete or absent."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)  # with the template that it was trained with


def build_teacher(
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
    config: Any = None,
    vocabulary: dict[str, int] | None = None,
    phase: Phases = silently,
) -> Any:
    """The float model that the recipe learns from, or None. On `meta` it has no weights.

    dtype: where the recipe leaves it open. config: its own, read already, on `meta`. vocabulary: of the student, which must be
    the same.

    Raises:
        Mistake: it cannot be read, or has another vocabulary.
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
            raise Mistake("teacher and student read different tokens", where="distill.teacher", found=name)
        teacher: Any = load_weights(source, load_config(source), dtype=dtype, attention=recipe.model.attention, progress=progress)
        return teacher.to(device)


def distillation(recipe: Recipe, teacher: Any, student: Any) -> Distillation | None:
    """The losses of `student` beside its teacher, attached; None without one."""
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
