"""What is put on a base model: packed or fake-quantized linears, adapters, the device, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.files import atomic_folder
from finetune.models.source import Source, shapes_in
from finetune.models.weights import cast, parameters_of
from finetune.recipe import Adapter, Quant
from quant.swap import DEFAULT_KEEP, SwapReport, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Prepared:
    """swap: what is packed or fake-quantized, None in floats. parameters: those that packed linears stand for."""

    model: Any  # PreTrainedModel or PeftModel
    swap: SwapReport | None
    parameters: int
    trainable: int


def prepare(
    model: Any,
    *,
    quant: Quant,
    adapter: Adapter,
    targets: list[str],
    source: Source,
    device: torch.device,
    checkpointing: bool = False,
    seed: int = 0,
    move: Callable[[Any], object] | None = None,
    trained: Path | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Pack what was not packed while it was read, move the model, attach adapters (or free all weights), set checkpointing.

    Without adapters a scheme's linears train their master weights. `move` puts a model that `device` cannot hold there, in its
    own way, when all is in place. trained: a folder of adapters, else they are fresh; compute_dtype: another dtype of the base
    under them.
    """
    parameters = parameters_of(model)
    with torch.device("meta") if device.type == "meta" else nullcontext():
        report = packed(model, quant, progress) if adapter.base_frozen else _trainable(model, quant, progress)
        if move is None:
            model.to(device)
        model.config.use_cache = False
        wrapped = model
        if trained is not None:
            wrapped = load_adapter(model if compute_dtype is None else cast(model, compute_dtype), trained).to(device).eval()
        elif adapter.base_frozen:
            wrapped = attach(model, adapter, targets, source, seed)
        else:
            model.requires_grad_(True)
            if any(getattr(module, "rms_norm", None) is not None for module in model.modules()):
                fix_norms(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if move is not None:
        move(wrapped)
    return Prepared(wrapped, report, parameters, sum(p.numel() for p in wrapped.parameters() if p.requires_grad))


def packed(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What was packed of the base, None where it is in floats; what was not packed while it was read is packed now.

    Raises:
        UserError: a keep pattern matches nothing, nothing can be packed, or weights are not finite.
    """
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None and getattr(quantizer, "report", None) is not None:
        return quantizer.report
    if quant.scheme == "none":
        return None
    options: dict[str, Any] = {"double": quant.double} if quant.scheme == "nf4" else {}
    try:
        return swap(model, scheme=quant.scheme, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise UserError("the base cannot be quantized", where="quant", got=str(error)) from None


def _trainable(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What of the model trains master weights in a scheme, None where all of it is in floats.

    Raises:
        UserError: a keep pattern matches nothing, a shape does not fit the format, or weights are ternary already.
    """
    if quant.scheme == "none":
        return None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # read from a checkpoint of master weights
        return quantizer.report
    if quant.rms_norm and any(name.endswith("_sub_norm") for name, _ in model.named_modules()):
        got = f"rms_norm, and {type(model).__name__} has sub-norms of its own"
        raise UserError(
            "these are two layouts of one idea", where="quant.rms_norm", got=got, hint="model_type: llama, or rms_norm off"
        )
    eps = getattr(model.config, "rms_norm_eps", 1e-6)
    options: dict[str, Any] = {"norm_eps": eps} if quant.rms_norm else {}
    try:
        return swap(model, scheme=quant.scheme, trainable=True, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise UserError("this model cannot be trained in ternary", where="quant", got=str(error)) from None


def fix_norms(model: Any) -> None:
    """Fix the norms before linears that normalize by themselves at one, untrained: RMSNorm of RMSNorm(x) is RMSNorm(x) but for ε.

    So the layout of BitNet's training tips, which removes them, keeps the shape of the architecture that plain transformers
    loads. The last norm, before the head, stays.

    Raises:
        UserError: the blocks have other norms than Llama's two.
    """
    layers: Any = next((m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)), [])
    for layer in layers:
        norms: dict[str, Any] = {n: child for n, child in layer.named_children() if "norm" in type(child).__name__.lower()}
        if norms.keys() != {"input_layernorm", "post_attention_layernorm"}:
            got = f"{type(layer).__name__} with {', '.join(norms) or 'no norm'}"
            raise UserError("it is not known which norms of these blocks stand before linears", where="quant.rms_norm", got=got)
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


def check_adapter(folder: Path) -> None:
    """Look at an adapter's weights, before its base is loaded.

    Raises:
        UserError: they are damaged, or no safetensors.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would take adapter_model.bin, a pickle
        got = ", ".join(sorted(file.name for file in folder.glob("adapter_model*"))) or "no weights"
        hint = "save it as safetensors, which is what PEFT does by itself"
        raise UserError("an adapter is read from adapter_model.safetensors alone", where=str(folder), got=got, hint=hint)
    shapes_in(weights, str(folder))


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` with the trained adapters of PEFT's `folder`, which `check_adapter` found good.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, OSError) as error:
        got = f"{type(error).__name__}: {error}"
        hint = "fetch the adapter again, or update peft"
        raise UserError(
            "the adapter's config cannot be read", where=str(folder / "adapter_config.json"), got=got, hint=hint
        ) from None
    register_peft(config)
    try:
        return PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError("the adapter does not fit its base model", where=str(folder), got=str(error).splitlines()[0]) from None


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """PEFT's own files; `folder` is complete or absent."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)  # with the template that it was trained with
