"""What of a model is exported: its linears, as they are or packed; and the model itself as a function, in fp32."""

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


def to_be(
    config: Any, *, ternary: bool | None = None, keep: Sequence[str] = (), rms_norm: bool = False, all_fit: bool = True
) -> nn.Module:
    """The model on `meta` that a run will have trained, by the config of what it begins with and its recipe's `quant`.

    A config of a ternary checkpoint says itself which layers are ternary, and whether they have their master weights.
    all_fit: a layer that would stay in floats for its shape alone is refused, not left.

    Raises:
        UserError: transformers knows no such model, a keep pattern matches nothing, or nothing can become ternary.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        got = f"{config.model_type}: {str(error).splitlines()[0][:200]}"
        raise UserError("this is no causal language model that transformers can build", where="model.name", got=got) from None
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
                raise _no_fours(path, linear.out_features, linear.in_features)
    return model


def _as_stored(model: Any, config: Any) -> bool:
    """Whether `config` is of a ternary checkpoint; the layers of `model` are then what it says."""
    from quant.pretrained import PackedTernaryConfig, TernaryQuantizer, packed_config

    packed = packed_config(config).quantization_config
    if packed["quant_method"] != "packed_ternary":
        return False
    TernaryQuantizer(PackedTernaryConfig(stored=packed["stored"]), pre_quantized=True).preprocess_model(model)
    return True


def _no_fours(path: str, out_features: int, in_features: int) -> UserError:
    return UserError(
        f"packed ternary needs out_features in fours: {out_features} are not",
        where=path,
        got=f"a weight of shape ({out_features}, {in_features})",
        hint=f"model sizes that make it {out_features + -out_features % ROWS_A_BYTE}, or keep this layer in floats (quant.keep)",
    )


def check_layers(model: nn.Module, *, multiple: int = 1) -> None:
    """Refuse layers that no ternary format holds. A model on `meta` is checked by its shapes.

    multiple: in_features of a ternary layer must be one of it.

    Raises:
        UserError: naming the layer and its shape.
    """
    for name, module in model.named_modules():
        kind = getattr(module, "quantized", None)
        if isinstance(kind, str) and not isinstance(module, Ternary):
            raise UserError(
                f"{kind} is no format of this export",
                where=name,
                got=type(module).__name__,
                hint="finetune merge makes a float model of it; --to gguf-f16 takes that",
            )
        if type(module).__module__.startswith("transformers.integrations"):
            raise UserError(
                "this checkpoint is quantized already, and was loaded by plain transformers",
                where=name,
                got=f"{type(module).__module__}.{type(module).__name__}",
                hint="quant.pretrained.load reads its codes as they are; to quantize it again would change it",
            )
        if not isinstance(module, Ternary):
            continue
        out_features, in_features = module.out_features, module.in_features
        if out_features % ROWS_A_BYTE:
            raise _no_fours(name, out_features, in_features)
        if in_features % multiple:
            raise UserError(
                f"this format needs in_features to be a multiple of {multiple}: {in_features} is none",
                where=name,
                got=f"a weight of shape ({out_features}, {in_features})",
                hint=f"a hidden or intermediate size of {in_features + -in_features % multiple}; or --to bitnet, which takes it",
            )
        if isinstance(module, BitLinear) and getattr(module, "blend", 1) != 1:
            raise UserError(
                "this layer is still on its way to ternary",
                where=name,
                got=f"λ = {module.blend}",
                hint="export after the warm-up has ended",
            )
        weight = module.weight
        if isinstance(module, nn.Linear) and not weight.is_meta and looks_ternary(weight):
            raise UserError(
                "this checkpoint is ternary already, as floats: a second quantization would keep the codes and shrink the scale",
                where=name,
                got="weights −c, 0 and c",
                hint="export the packed checkpoint that it came from; --to gguf-f16 takes plain float layers as they are",
            )


def require_ternary(model: nn.Module, format: str) -> None:  # noqa: A002
    """Raise UserError for a model without a ternary layer."""
    if not ternary_layers(model):
        raise UserError(
            f"{format} is a format of ternary models, and this one has no ternary layer",
            where=type(model).__name__,
            hint="train with scheme: ternary; a float model goes --to gguf-f16",
        )


def packed_copy(model: nn.Module) -> Any:
    """A copy on the CPU, in evaluation mode, whose BitLinears are packed; `model` stays as it is. No master weight is copied."""
    packed: dict[int, Any] = {
        id(module): PackedBitLinear.from_linear(module, device="cpu")
        for module in model.modules()
        if isinstance(module, BitLinear)
    }
    return copy.deepcopy(model, packed).to("cpu").eval().requires_grad_(False)


def copied(model: nn.Module) -> Any:
    """A copy on the CPU, in evaluation mode, master weights and all."""
    return copy.deepcopy(model).to("cpu").eval().requires_grad_(False)


def widened(model: Any) -> Any:
    """`model` in fp32; transformers' own `.float()` refuses one that was loaded packed. Codes and scales stay what they are."""
    return nn.Module.float(model)


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode and its floats are fp32; afterwards it is what it was, to the bit.

    Widening bf16 and fp16 loses nothing, so rounding them back gives the same numbers. It takes the memory of the wide copy.
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
            out: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
        return out.float().cpu()

    return logits
