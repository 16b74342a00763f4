"""Copies of a model for export, packed or not; checks of its layers; and the model as a function in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import UserError
from quant import BitLinear, PackedBitLinear, swap, weights_changed
from quant.swap import DEFAULT_KEEP, as_linear
from quant.ternary import ROWS_A_BYTE, looks_ternary, unfit

Ternary = BitLinear | PackedBitLinear


def ternary_layers(model: nn.Module) -> dict[str, Ternary]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Ternary)}


def planned_model(
    config: Any, *, ternary: bool | None = None, keep: Sequence[str] = (), rms_norm: bool = False, all_fit: bool = True
) -> nn.Module:
    """The model, on `meta`, that a run will train, from the config of its base and its recipe's `quant`.

    The config of a ternary checkpoint says which layers are ternary, and whether they have master weights.
    all_fit: refuse a layer that would stay in floats only because of its shape.

    Raises:
        UserError: transformers does not know the model, a keep pattern matches nothing, or nothing can become ternary.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        got = f"{config.model_type}: {str(error).splitlines()[0][:200]}"
        raise UserError("transformers cannot build a causal language model of this", where="model.name", got=got) from None
    try:
        if ternary is not False and getattr(config, "quantization_config", None) and _as_stored(model, config):
            return model
        if not ternary:
            return model
        options: dict[str, Any] = {"norm_eps": getattr(config, "rms_norm_eps", 1e-6)} if rms_norm else {}
        report = swap(model, scheme="ternary", trainable=True, keep=(*DEFAULT_KEEP, *keep), **options)
    except ValueError as error:
        raise UserError("this model cannot be trained in ternary", where="quant", got=str(error)) from None
    for path, reason in report.left.items() if all_fit else ():
        module = model.get_submodule(path)
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2:
            linear = as_linear(module)
            if reason == unfit(linear.weight.shape):
                raise _rows_error(path, linear.out_features, linear.in_features)
    return model


def _as_stored(model: Any, config: Any) -> bool:
    """Whether `config` is of a ternary checkpoint; if so, the layers of `model` are replaced as it says."""
    from quant.pretrained import PackedTernaryConfig, TernaryQuantizer, packed_config

    packed = packed_config(config).quantization_config
    if packed["quant_method"] != "packed_ternary":
        return False
    TernaryQuantizer(PackedTernaryConfig(stored=packed["stored"]), pre_quantized=True).preprocess_model(model)
    return True


def _rows_error(path: str, out_features: int, in_features: int) -> UserError:
    return UserError(
        f"packed ternary needs out_features to be a multiple of {ROWS_A_BYTE}",
        where=path,
        got=f"a weight of shape ({out_features}, {in_features})",
        hint=f"choose sizes that make it {out_features + -out_features % ROWS_A_BYTE}, or keep this layer in floats (quant.keep)",
    )


def check_layers(model: nn.Module, *, multiple: int = 1) -> None:
    """Raise for layers that no ternary format can store. A model on `meta` is checked by its shapes.

    multiple: in_features of a ternary layer must be a multiple of it.

    Raises:
        UserError: naming the layer and its shape.
    """
    for name, module in model.named_modules():
        scheme = getattr(module, "quantized", None)
        if isinstance(scheme, str) and not isinstance(module, Ternary):
            raise UserError(
                f"{scheme} layers cannot be exported to this format",
                where=name,
                got=type(module).__name__,
                hint="convert it to a float model with finetune merge, then export --to gguf-f16",
            )
        if type(module).__module__.startswith("transformers.integrations"):
            raise UserError(
                "this checkpoint is quantized already, and was loaded with plain transformers",
                where=name,
                got=f"{type(module).__module__}.{type(module).__name__}",
                hint="load it with quant.pretrained.load, which keeps its codes; quantizing it again would change it",
            )
        if not isinstance(module, Ternary):
            continue
        out_features, in_features = module.out_features, module.in_features
        if out_features % ROWS_A_BYTE:
            raise _rows_error(name, out_features, in_features)
        if in_features % multiple:
            raise UserError(
                f"this format needs in_features to be a multiple of {multiple}: {in_features} is not",
                where=name,
                got=f"a weight of shape ({out_features}, {in_features})",
                hint=f"choose a hidden or intermediate size of {in_features + -in_features % multiple}; or export --to bitnet",
            )
        if isinstance(module, BitLinear) and getattr(module, "blend", 1) != 1:
            raise UserError(
                "this layer is still in its warm-up to ternary",
                where=name,
                got=f"λ = {module.blend}",
                hint="export after the warm-up has ended",
            )
        weight = module.weight
        if isinstance(module, nn.Linear) and not weight.is_meta and looks_ternary(weight):
            raise UserError(
                "this checkpoint is ternary already, as floats: quantizing it again would keep the codes and shrink the scale",
                where=name,
                got="weights −c, 0 and c",
                hint="export the packed checkpoint that it came from; --to gguf-f16 stores plain float layers unchanged",
            )


def require_ternary(model: nn.Module, format: str) -> None:  # noqa: A002
    """Raise UserError for a model without a ternary layer."""
    if not ternary_layers(model):
        raise UserError(
            f"{format} is for ternary models, and this one has no ternary layer",
            where=type(model).__name__,
            hint="train with quant.scheme=ternary, or export a float model --to gguf-f16",
        )


def packed_copy(model: nn.Module) -> Any:
    """A copy on the CPU, in evaluation mode, whose BitLinears are packed. No master weight is copied."""
    packed: dict[int, Any] = {
        id(module): PackedBitLinear.from_linear(module, device="cpu")
        for module in model.modules()
        if isinstance(module, BitLinear)
    }
    return copy.deepcopy(model, packed).to("cpu").eval().requires_grad_(False)


def copied(model: nn.Module) -> Any:
    """A copy on the CPU, in evaluation mode, with master weights."""
    return copy.deepcopy(model).to("cpu").eval().requires_grad_(False)


def widened(model: Any) -> Any:
    """`model` in fp32, codes and scales unchanged; transformers' own `.float()` refuses packed models."""
    return nn.Module.float(model)


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and fp32 inside the block, and restore it bit for bit after it.

    Widening bf16 and fp16 is lossless, so rounding back gives the same numbers. It needs the memory of the fp32 copy.
    """
    training = {module: module.training for module in model.modules()}
    narrow = [(p, p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    try:
        model.eval()
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        weights_changed()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)
        for module, mode in training.items():
            module.training = mode
        weights_changed()


def function(model: nn.Module, device: torch.device | None = None) -> Callable[[list[int]], Tensor]:
    """token ids (n) → logits (n, vocabulary), fp32 on the CPU, of a causal language model of transformers on `device`."""
    device = device or next(model.parameters()).device

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits_: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
        return logits_.float().cpu()

    return logits
