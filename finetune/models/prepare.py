"""Preparing a base model: packed or fake-quantized linears, adapters, device, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from finetune.errors import UserError
from finetune.files import atomic_folder
from finetune.models.source import Source, shapes_in
from finetune.models.weights import cast, parameters_of
from finetune.recipe import Adapter, Quant
from quant.experts import looks_fused
from quant.swap import DEFAULT_KEEP, SwapReport, split_experts, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Prepared:
    """A prepared model. swap: packed or fake-quantized linears, None in floats; parameters: with those in packed linears."""

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
    """Quantize the linears, move the model to `device`, attach adapters (or unfreeze all weights), set up checkpointing.

    Without adapters a scheme's linears train their master weights. move: offloads or shards a model larger than the device, as
    the last step. trained: a folder of adapters, else new ones; compute_dtype: another dtype for the base under them.
    """
    parameters = parameters_of(model)
    with torch.device("meta") if device.type == "meta" else nullcontext():
        report = packed(model, quant, progress) if adapter.base_frozen else _trainable(model, quant, progress)
        if move is None:
            model.to(device)
        model.config.use_cache = trained is not None  # a model in training keeps no keys and values
        wrapped = model
        if trained is not None:
            wrapped = load_adapter(model if compute_dtype is None else cast(model, compute_dtype), trained).to(device).eval()
        elif adapter.base_frozen:
            _split_targeted(model, targets)
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
    """Pack the base unless it was packed while loading; returns what was packed, None if the base stays in floats.

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
    """Fake-quantize the linears; returns which, None if the model is trained in floats.

    Raises:
        UserError: a keep pattern matches nothing, a shape does not fit the format, or weights are already ternary.
    """
    if quant.scheme == "none":
        return None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # loaded from a checkpoint of master weights
        return quantizer.report
    if quant.rms_norm and any(name.endswith("_sub_norm") for name, _ in model.named_modules()):
        got = f"rms_norm, but {type(model).__name__} already has sub-norms"
        raise UserError(
            "rms_norm and sub-norms exclude each other",
            where="quant.rms_norm",
            got=got,
            hint="model_type: llama, or rms_norm off",
        )
    eps = getattr(model.config, "rms_norm_eps", 1e-6)
    options: dict[str, Any] = {"norm_eps": eps} if quant.rms_norm else {}
    try:
        return swap(model, scheme=quant.scheme, trainable=True, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise UserError("this model cannot be trained in ternary", where="quant", got=str(error)) from None


def fix_norms(model: Any) -> None:
    """Fix the gains of norms before linears with a norm inside at one: RMSNorm(RMSNorm(x)) is RMSNorm(x) but for ε.

    BitNet's training tips remove these norms; fixing them keeps an architecture that plain transformers loads. The last norm,
    before the head, is still trained.

    Raises:
        UserError: the blocks do not have exactly Llama's two norms.
    """
    layers: Any = next((m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)), [])
    for layer in layers:
        norms: dict[str, Any] = {n: child for n, child in layer.named_children() if "norm" in type(child).__name__.lower()}
        if norms.keys() != {"input_layernorm", "post_attention_layernorm"}:
            got = f"{type(layer).__name__} with {', '.join(norms) or 'no norm'}"
            raise UserError("unknown norms in these blocks: rms_norm supports Llama's two", where="quant.rms_norm", got=got)
        for norm in norms.values():
            torch.nn.init.ones_(norm.weight)
            norm.requires_grad_(False)


def attach(model: PreTrainedModel, adapter: Adapter, targets: list[str], source: Source, seed: int) -> Any:
    """Attach new LoRA adapters to exactly the modules in `targets`."""
    from peft import LoraConfig, get_peft_model

    from quant import assert_wrapped, register_peft

    suffixes = sorted({target.rpartition(".")[2] for target in targets})
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=suffixes if named == set(targets) else targets,  # short form in adapter_config.json if it is unambiguous
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    register_peft(config)
    torch.manual_seed(seed)
    with _exact_targets():
        wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = source.name
    assert_wrapped(wrapped, targets)
    return wrapped


@contextmanager
def _exact_targets() -> Iterator[None]:
    """Keep PEFT from replacing targets by those of fused experts, for paths that are modules of the model as it is.

    It takes the names of dense layers and of shared experts (DeepSeek) for those of routed experts in transformers 4.
    """
    module = "peft.utils.transformers_weight_conversion"
    with mock.patch(f"{module}.convert_peft_config_for_transformers", return_value=None):
        yield


def _split_targeted(model: Any, targets: Iterable[str]) -> None:
    """Split the fused experts that have a linear among `targets`."""
    above = {target.rpartition(".")[0].rpartition(".")[0] for target in targets} - {""}
    split_experts(model, [path for path, module in model.named_modules() if path in above and looks_fused(module)])


def check_adapter(folder: Path) -> None:
    """Check an adapter's weights before its base is loaded.

    Raises:
        UserError: they are damaged, or not safetensors.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would load adapter_model.bin, a pickle
        got = ", ".join(sorted(file.name for file in folder.glob("adapter_model*"))) or "no weights"
        hint = "save it as safetensors, which is PEFT's default"
        raise UserError("adapters are only read from adapter_model.safetensors", where=str(folder), got=got, hint=hint)
    shapes_in(weights, str(folder))


def load_adapter(model: Any, folder: Path) -> Any:
    """Attach the trained adapters in `folder` to `model`. Call `check_adapter` first.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, OSError) as error:
        got = f"{type(error).__name__}: {error}"
        hint = "download the adapter again, or update peft"
        raise UserError(
            "cannot read the adapter's config", where=str(folder / "adapter_config.json"), got=got, hint=hint
        ) from None
    register_peft(config)
    keys = shapes_in(folder / "adapter_model.safetensors", str(folder))
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    _split_targeted(model, adapted)
    exact = adapted <= {path for path, _ in model.named_modules()}
    try:
        with _exact_targets() if exact else nullcontext():
            return PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError("the adapter does not fit its base model", where=str(folder), got=str(error).splitlines()[0]) from None


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save PEFT's adapter files and the tokenizer; `folder` is complete or absent."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)  # with the chat template of training
