"""A model's architecture without weights: parameters, linear layers, and which of them get adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError, nearest
from finetune.models.source import Source
from finetune.recipe import Adapter
from quant.experts import expert_linears, looks_fused
from quant.swap import DEFAULT_KEEP, as_linear, linear_like, reasons_to_leave

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ArchitectureInfo:
    """Architecture of a config. linears: {path: (out, in)}; left: {path: why it gets neither quantization nor adapters}.

    experts: {path: (out, in)} of each expert's linears, where those of a layer are one tensor that can be split.
    unreached: linears that text does not pass (a vision tower's), which get no adapters. without_adapters: {part of the model:
    its parameters}, of such parts, and of experts that are one tensor.
    """

    architecture: str
    parameters: int
    linears: dict[str, tuple[int, int]]
    left: dict[str, str]
    experts: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreached: frozenset[str] = frozenset()
    without_adapters: dict[str, int] = field(default_factory=dict)


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
    beside = _beside_text(model)
    fused = {path: module for path, module in model.named_modules() if looks_fused(module)}
    size = sum(p.numel() for module in fused.values() for p in module.parameters(recurse=False))
    return ArchitectureInfo(
        type(model).__name__,
        parameters,
        linears,
        reasons_to_leave(model, DEFAULT_KEEP),
        {f"{path}.{name}": shape for path, module in fused.items() for name, shape in expert_linears(module).items()},
        frozenset(path for path in linears if path.startswith(tuple(f"{part}." for part in beside))),
        beside | ({"experts": size} if size else {}),
    )


def _beside_text(model: Any) -> dict[str, int]:
    """{path: parameters} of the modules beside the text decoder of a model that has several, such as a vision tower."""
    if model.config.get_text_config() is model.config:
        return {}
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    head, beside = model.get_output_embeddings(), dict[str, int]()
    while path:
        above = path.rpartition(".")[0]
        for name, module in model.get_submodule(above).named_children():
            if module is not head and name != path.rpartition(".")[2] and (size := sum(p.numel() for p in module.parameters())):
                beside[f"{above}.{name}".removeprefix(".")] = size
        path = above
    return beside


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    linear = as_linear(module)
    return linear.out_features, linear.in_features


def adapter_targets(adapter: Adapter, info: ArchitectureInfo) -> list[str]:
    """Full paths of the modules that get adapters.

    Raises:
        UserError: a target matches no module, or one that cannot get an adapter; the hint names those that can.
    """
    able = [name for name in info.linears if name not in info.left and name not in info.unreached]
    if adapter.targets == "all-linear":
        return able
    chosen: set[str] = set()
    experts: set[str] = set()
    leaves = sorted({name.rpartition(".")[2] for name in able})
    for target in adapter.targets:
        matched = {name for name in info.linears if name == target or name.endswith("." + target)}
        matched -= info.unreached if target not in info.linears else set()  # a whole path is meant
        of_experts = {path for path in info.experts if target in (path, *path.split(".")[-3:-1])}
        experts |= of_experts
        if of_experts and not matched:
            continue
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
    return [name for name in (*info.linears, *info.experts) if name in chosen or name in experts]


def parts_without_adapters(info: ArchitectureInfo, targets: list[str]) -> str | None:
    """The parts of the model that get no adapters, with their shares of the parameters, in words."""
    adapted = any(target in info.experts for target in targets)
    sizes = {name: size for name, size in info.without_adapters.items() if name != "experts" or not adapted}
    if not sizes:
        return None
    parts = ", ".join(f"{name} ({size / info.parameters:.1%})" for name, size in sizes.items())
    reasons = ["adapter.targets takes experts too, which is much slower"] * ("experts" in sizes and bool(info.experts))
    reasons += ["these experts cannot be split"] * ("experts" in sizes and not info.experts)
    reasons += ["text does not pass the others"] * (len(sizes) > ("experts" in sizes))
    return f"adapters leave out parts of the model, with these shares of its parameters: {parts}; {', '.join(reasons)}"


def adapter_parameters(adapter: Adapter, info: ArchitectureInfo, targets: list[str]) -> int:
    """Trainable parameters of the adapters: A (r, in), B (out, r), and DoRA's magnitude (out)."""
    shapes = [info.linears.get(target) or info.experts[target] for target in targets]
    return sum(adapter.rank * (out + inputs) + (out if adapter.dora else 0) for out, inputs in shapes)
