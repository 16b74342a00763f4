"""A model's architecture without weights: parameters, linear layers, and which of them get adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.errors import UserError, nearest
from finetune.models.source import Source
from finetune.recipe import Adapter
from quant.swap import DEFAULT_KEEP, as_linear, linear_like, reasons_to_leave

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ArchitectureInfo:
    """Architecture of a config. linears: {path: (out, in)}; left: {path: why it gets neither quantization nor adapters}."""

    architecture: str
    parameters: int
    linears: dict[str, tuple[int, int]]
    left: dict[str, str]


def architecture_of(source: Source, config: PretrainedConfig) -> ArchitectureInfo:
    """Build the model on `meta` and describe it.

    Raises:
        UserError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            "not a causal language model that transformers supports",
            where="model.name",
            got=f"{source.name} ({config.model_type}): {str(error).splitlines()[0][:200]}",
        ) from None
    linears = {path: _shape(module) for path, module in linear_like(model).items()}
    parameters = sum(p.numel() for p in model.parameters())
    return ArchitectureInfo(type(model).__name__, parameters, linears, reasons_to_leave(model, DEFAULT_KEEP))


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    linear = as_linear(module)
    return linear.out_features, linear.in_features


def adapter_targets(adapter: Adapter, info: ArchitectureInfo) -> list[str]:
    """Full paths of the modules that get adapters.

    Raises:
        UserError: a target matches no module, or one that cannot get an adapter; the hint names those that can.
    """
    able = [name for name in info.linears if name not in info.left]
    if adapter.targets == "all-linear":
        return able
    chosen: set[str] = set()
    leaves = sorted({name.rpartition(".")[2] for name in able})
    for target in adapter.targets:
        matched = {name for name in info.linears if name == target or name.endswith("." + target)}
        unable = next((name for name in matched if name in info.left), None)
        near = nearest(target, leaves)
        if not matched or unable:
            raise UserError(
                f"adapter target cannot be wrapped: {info.left[unable]}" if unable else "adapter target matches no module",
                where="adapter.targets",
                got=unable or target,
                hint=(f"did you mean {near}? " if near and not unable else "") + f"{info.architecture} has: {', '.join(leaves)}",
            )
        chosen |= matched
    return [name for name in able if name in chosen]


def adapter_parameters(adapter: Adapter, info: ArchitectureInfo, targets: list[str]) -> int:
    """Trainable parameters of the adapters: A (r, in), B (out, r), and DoRA's magnitude (out)."""
    shapes = [info.linears[target] for target in targets]
    return sum(adapter.rank * (out + inputs) + (out if adapter.dora else 0) for out, inputs in shapes)
