"""Replaces linears, experts and convolutions of a model by quantized layers, and reports why others were skipped.

    nn.Linear, GPT-2's Conv1D      →  one of the four linears (quant/linear.py)
    fused experts, 3-D parameters  →  QuantizedExperts, of such linears (quant/experts.py)
    nn.Conv2d                      →  BitConv2d, in ternary and for training (quant/conv.py)

A swap can fail silently: a layer's weight can be read without calling it (Mamba's `dt_proj.weight`), be shared with another
layer, or the layer can be of an unknown class. So the report lists every such module, swapped or with the reason
why not, and `prove_used` asserts that the forward of every swapped module ran. `pack` converts trained layers to packed ones.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quant import conv, experts
from quant.conv import BitConv2d
from quant.experts import QuantizedExperts
from quant.linear import BitLinear, FakeNF4Linear, FakeQuantLinear, NF4Linear, PackedBitLinear, PackedLinear

DEFAULT_KEEP = (
    "lm_head",
    "embed*",
    "*norm*",
    "router",
    "gate",
    "shared_expert_gate",
    "score",
    "classifier",
)
"""Modules kept in floats: heads, embeddings, norms, and the routers of mixtures of experts (`gate`, not `gate_proj`)."""

LINEARS: dict[tuple[str, bool], type[PackedLinear] | type[FakeQuantLinear]] = {  # (scheme, trainable)
    ("nf4", False): NF4Linear,
    ("nf4", True): FakeNF4Linear,
    ("ternary", False): PackedBitLinear,
    ("ternary", True): BitLinear,
}
SCHEMES = tuple(dict.fromkeys(scheme for scheme, _ in LINEARS))
OPTIONS = {"nf4": ("double",), "ternary": ("norm_eps",)}  # of the linears of a scheme
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Quantized = PackedLinear | FakeQuantLinear | BitConv2d


@dataclass(frozen=True)
class SwapReport:
    """The result of a swap. `share`: swapped weights among all parameters; bytes: parameters and buffers of the whole model.

    `swapped`: path of every quantized layer, each expert's too; `left`: path → reason of every candidate that was skipped.
    """

    scheme: str
    trainable: bool
    swapped: tuple[str, ...]
    left: dict[str, str]
    share: float
    bytes_before: int
    bytes_after: int

    @property
    def left_in_words(self) -> str:
        """The modules left in floats, counted by reason."""
        return "; ".join(f"{count} × {reason}" for reason, count in Counter(self.left.values()).items()) or "none"

    def __str__(self) -> str:
        size = f"{self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB"
        scheme = f"{self.scheme}, trainable" if self.trainable else self.scheme
        return f"{len(self.swapped)} layers to {scheme}, {self.share:.1%} of all parameters, {size}\nleft: {self.left_in_words}"


def swap(
    model: nn.Module,
    *,
    scheme: str = "nf4",
    trainable: bool = False,
    keep: Sequence[str] = DEFAULT_KEEP,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SwapReport:
    """Replace linears, fused experts and convolutions of `model` by quantized layers, in place, one module at a time.

    trainable: fake-quantized layers with a float master weight, instead of packed, frozen ones.
    keep: shell patterns (`fnmatch`); a module is kept when one matches its whole dotted path or one of the path's
    components, so `gate` keeps `…mlp.gate` and not `gate_proj`. A given tuple replaces the default: add to DEFAULT_KEEP.
    device: of quantized modules; everything else is not moved. progress: called with (modules done, total).
    options: of the scheme's linear: `double` for nf4, `norm_eps` for ternary.

    Raises ValueError for an unknown scheme or option, a custom pattern that matches no module, a model that is swapped
    already or has adapters, weights that the scheme refuses, and if there is nothing to swap.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap needs an nn.Module, not {model!r}")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if unknown := sorted(options.keys() - set(OPTIONS[scheme])):
        raise ValueError(f"{scheme} has no option {unknown[0]!r}; it has: {', '.join(OPTIONS[scheme])}")
    linear_class = LINEARS[scheme, trainable]
    _refuse_text(keep)
    names = [name for name, _ in model.named_modules()]
    for pattern in set(keep) - set(DEFAULT_KEEP):
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"keep pattern {pattern!r} matches no module of {type(model).__name__}")
    for name, module in model.named_modules():
        if (mark := getattr(module, "quantized", None)) is not None and isinstance(mark, str):
            raise ValueError(f"{name or type(model).__name__} is already {mark} and cannot be quantized again")
    if adapted := [name for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")]:  # PEFT's mark
        raise ValueError(f"this model has adapters: swap it first, then attach them ({adapted[0] or type(model).__name__})")

    bytes_before, total = _bytes(model), sum(p.numel() for p in model.parameters())
    left = reasons_to_leave(model, keep, scheme, trainable)
    groups = _paths_by_module(model, [path for path in multiplying(model) if path not in left])
    if not groups and isinstance(model, nn.Linear | nn.Conv2d):
        constructor = f"{linear_class.__name__}.from_linear" if isinstance(model, nn.Linear) else "BitConv2d.from_conv"
        raise ValueError(f"the model itself is a {type(model).__name__}, and swap replaces modules inside it: use {constructor}")
    if not groups:
        reasons = (
            "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in left.items())
            or "no linear-like module at all"
        )
        raise ValueError(f"nothing to swap in {type(model).__name__} ({reasons})")
    convolutions = [paths[0] for paths in groups if isinstance(model.get_submodule(paths[0]), nn.Conv2d)]
    if convolutions and options.get("norm_eps") is not None:
        raise ValueError(f"{convolutions[0]}: convolutions have no option 'norm_eps'")
    weights, swapped = 0, []
    for done, paths in enumerate(groups, 1):
        module = model.get_submodule(paths[0])
        weights += sum(p.numel() for p in _matrices(module))
        try:
            quantized: nn.Module
            if isinstance(module, nn.Conv2d):
                quantized = BitConv2d.from_conv(module, device=device)
            elif experts.looks_fused(module):
                quantized = QuantizedExperts.from_experts(module, linear_class, device=device, **options)
            else:
                quantized = linear_class.from_linear(as_linear(module), device=device, **options)
        except ValueError as error:
            raise ValueError(f"{paths[0]}: {error}{_halfway(done, 'swapped')}") from error
        del module  # frees its floats before the next one
        _replace(model, paths, quantized)
        swapped += [f"{path}.{name}" if name else path for path in paths for name in _quantized_in(quantized)]
        if progress is not None:
            progress(done, len(groups))
    _make_savable(model)
    return SwapReport(scheme, trainable, tuple(swapped), left, weights / total, bytes_before, _bytes(model))


def _make_savable(model: nn.Module) -> None:
    """Attach a quantizer to a transformers model, so that it saves quantized layers in their standard format."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        from quant.pretrained import quantizer_for

        model.hf_quantizer = quantizer_for(model)


def pack(model: nn.Module, *, progress: Callable[[int, int], None] | None = None) -> SwapReport:
    """Replace every fake-quantized linear of `model` by the packed linear of its scheme, in place, after training.

    The model computes the same, bit for bit, but has no master weights. Convolutions have no packed form and
    are listed in `left`. progress: called with (layers done, total).

    Raises ValueError if there is no fake-quantized linear, one has an adapter, or weights are not finite.
    """
    trained = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_trained(module)}
    if wrapped := [name for name in trained if name.endswith(".base_layer")]:
        raise ValueError(f"{wrapped[0]} has an adapter: merge or unload it first")
    left = {name: "convolutions have no packed form" for name, module in trained.items() if isinstance(module, BitConv2d)}
    groups = _paths_by_module(model, [name for name in trained if name not in left])
    schemes = {module.quantized for module in trained.values() if isinstance(module, FakeQuantLinear)}
    del trained
    if not groups:
        raise ValueError(f"nothing to pack in {type(model).__name__}: it has no fake-quantized linear")
    bytes_before, total, weights = _bytes(model), sum(p.numel() for p in model.parameters()), 0
    for done, paths_of_layer in enumerate(groups, 1):
        layer = model.get_submodule(paths_of_layer[0])
        assert isinstance(layer, FakeQuantLinear)
        weights += layer.weight.numel()
        linear_class = LINEARS[layer.quantized, False]
        options = {"double": layer.double_quantized} if isinstance(layer, FakeNF4Linear) else {}
        try:
            packed = linear_class.from_linear(layer, device=None, **options)
        except ValueError as error:
            raise ValueError(f"{paths_of_layer[0]}: {error}{_halfway(done, 'packed')}") from error
        del layer
        _replace(model, paths_of_layer, packed)
        if progress is not None:
            progress(done, len(groups))
    paths = tuple(path for paths_of_layer in groups for path in paths_of_layer)
    return SwapReport(" and ".join(sorted(schemes)), False, paths, left, weights / total, bytes_before, _bytes(model))


def to_float(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace packed layers by float ones, in place, as in the architecture: nn.Linear, GPT-2's Conv1D, fused experts.

    The weights are dequantized to `dtype` (default: each layer's). Use it to save a float model,
    for example after PEFT's merge_and_unload.

    Raises ValueError if there are master weights (call `pack` first), or a layer has its own norm.
    """
    if trained := [name for name, module in model.named_modules() if _is_trained(module)]:
        raise ValueError(f"{trained[0]} has a master weight: call pack(model) first")
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            _replace(model, [path], module.to_linear(dtype))
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts):
            _replace(model, [path], module.to_experts(dtype))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    pytorch_utils: Any = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is None or not hasattr(model, "config"):
        return
    with torch.device("meta"):
        plain = type(model)(model.config)
    for path, original in plain.named_modules():
        linear = model.get_submodule(path)
        if isinstance(original, pytorch_utils.Conv1D) and isinstance(linear, nn.Linear):
            back = pytorch_utils.Conv1D(linear.out_features, linear.in_features)
            back.weight = nn.Parameter(linear.weight.detach().t().contiguous())
            back.bias = linear.bias
            _replace(model, [path], back)


def split_experts(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace the fused experts at `paths` by a linear for each expert and projection, in place; `to_float` fuses them again."""
    for path in paths:
        _replace(model, [path], experts.split(model.get_submodule(path)))


class BypassedError(RuntimeError):
    """The model computes without some of its swapped modules."""


@contextmanager
def prove_used(model: nn.Module, report: SwapReport) -> Iterator[None]:
    """Run a forward pass of `model` inside the block; raises BypassedError at its end if a swapped module was not used.

    Wrapping (PEFT, DDP, torch.compile) does not matter, because the quantized layers record their use. Experts
    are checked as one module, because the router decides which of them get tokens.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Quantized)}
    if gone := {plain_path(path) for path in report.swapped} - _all_paths(model):
        raise RuntimeError(f"swapped modules are no longer in the model: {_some(gone)}. Is this the swapped model?")
    for layer in layers:
        layer.used = False
    mixtures = {module: name for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
    inside = {module for mixture in mixtures for module in mixture.modules()}
    proven = {module: name for module, name in layers.items() if module not in inside} | mixtures
    yield
    unused = {plain_path(name) for module, name in proven.items() if not module.used}
    if unused and len(unused) == len(proven):
        raise RuntimeError("no swapped module was used: call the model inside the prove_used block")
    if unused:
        raise BypassedError(
            f"{len(unused)} of {len(proven)} swapped modules were not used in the forward pass: {_some(unused)}. "
            "The model reads their weight without calling them, or never reaches them: add them to `keep`."
        )


def reasons_to_leave(model: nn.Module, keep: Sequence[str], scheme: str | None = None, trainable: bool = False) -> dict[str, str]:
    """{path: reason} of the modules that must not be swapped; without a `scheme`, of the linears that must not get adapters.

    The reasons are the same, except that a scheme does not support every shape, an adapter keeps the module with its hooks,
    and experts and convolutions are considered for a swap only.
    """
    _refuse_text(keep)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    holders = Counter(id(p) for m in set(model.modules()) for p in m._parameters.values() if p is not None)
    rescaled = getattr(getattr(model, "config", None), "rescale_every", 0) > 0
    candidates = linear_like(model) if scheme is None else multiplying(model)
    in_fp32 = _kept_in_fp32(model, candidates)
    left: dict[str, str] = {}
    for path, module in candidates.items():
        above, _, leaf = path.rpartition(".")
        parent, grandparent = model.get_submodule(above), model.get_submodule(above.rpartition(".")[0])
        if not path:
            left[path] = "the model itself"
        elif module is head:
            left[path] = "output head"
        elif any(holders[id(weight)] > 1 for weight in _matrices(module)):
            left[path] = "weight shared with another module"
        elif matches(path, keep):
            left[path] = "kept by pattern"
        elif hasattr(parent, "A_log") and leaf in ("dt_proj", "x_proj", "out_proj"):
            left[path] = "state-space mixers read this weight without calling the module"
        elif isinstance(parent, nn.TransformerEncoderLayer) or isinstance(grandparent, nn.TransformerEncoderLayer):
            left[path] = "nn.TransformerEncoderLayer reads this weight without calling the module"
        elif path in in_fp32:
            left[path] = "the model keeps it in fp32"
        elif rescaled and path.endswith((".attention.output", ".feed_forward.value")):
            left[path] = "RWKV divides this weight in place (config.rescale_every)"
        elif (reason := _unsupported(module, scheme, trainable)) is not None:
            left[path] = reason
    return left


def multiplying(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the candidates of a swap, by every path: `linear_like`, fused experts and convolutions, not quantized."""
    linears = linear_like(model)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name in linears or (isinstance(module, _ConvNd) and not isinstance(module, BitConv2d)) or experts.looks_fused(module)
    }


def linear_like(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of nn.Linear, its subclasses and GPT-2's Conv1D, by every path of a module."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, nn.Linear) and not isinstance(module, FakeQuantLinear)) or _is_conv1d(module)
    }


def as_linear(module: nn.Module) -> nn.Linear:
    """`module` itself, or for a Conv1D, which keeps its weight as (in, out), an nn.Linear with a transposed copy of it."""
    if isinstance(module, nn.Linear):
        return module
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern matches the dotted path or one of its components."""
    candidates = [path, *path.split(".")]
    return any(fnmatchcase(candidate, pattern) for candidate in candidates for pattern in patterns)


def plain_path(path: str) -> str:
    """A module's path without the wrappers of torch.compile, DistributedDataParallel and PEFT."""
    path = ".".join(part for part in path.split(".") if part != "_orig_mod")
    return path.removeprefix("module.").removeprefix("base_model.model.").removesuffix(".base_layer")


def _unsupported(module: nn.Module, scheme: str | None, trainable: bool) -> str | None:
    """Why the class, the weight's shape or the hooks of a module prevent a swap; None if they do not."""
    if isinstance(module, _ConvNd):
        assert scheme is not None
        return conv.reason_to_leave(module, scheme, trainable) or _modified(module)
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        assert scheme is not None
        return experts.reason_to_leave(module, LINEARS[scheme, trainable].scheme) or _modified(module)
    if not (type(module) is nn.Linear or _is_conv1d(module)):
        return f"{type(module).__name__} is not exactly nn.Linear"
    assert isinstance(module.weight, Tensor)
    shape = module.weight.shape[::-1] if _is_conv1d(module) else module.weight.shape
    return None if scheme is None else LINEARS[scheme, trainable].scheme.unfit(torch.Size(shape)) or _modified(module)


def _modified(module: nn.Module) -> str | None:
    """Hooks and other modifications of a module that a swap would lose; None without any."""
    if any(getattr(module, hooks) for hooks in HOOKS):
        return f"this {type(module).__name__} has hooks"
    if "forward" in vars(module):
        return f"this {type(module).__name__} has a replaced forward (hooks)"
    if hasattr(module, "weight") and module._parameters.get("weight") is None:
        return f"this {type(module).__name__} computes its weight (a parametrization or a norm)"
    return None


def _kept_in_fp32(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """The `paths` that transformers' models list in `_keep_in_fp32_modules`: T5 reads the dtype of such a weight.

    A name matches one or several consecutive components of a path, anywhere inside the model that lists it.
    """
    patterns = [
        (f"{path}." if path else "", f"*.{pattern}.*")
        for path, module in model.named_modules()
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for pattern in getattr(module, attribute, None) or ()
    ]
    return {
        path
        for path in paths
        for inside, pattern in patterns
        if path.startswith(inside) and fnmatchcase(f".{path.removeprefix(inside)}.weight.", pattern)
    }


def _refuse_text(keep: Sequence[str]) -> None:
    if isinstance(keep, str):
        raise ValueError(f"keep must be a list of patterns: use [{keep!r}] instead of {keep!r}")


def _halfway(done: int, what: str) -> str:
    return f" (the model is partly {what} now: load it again)" if done > 1 else ""


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module` itself that are weights, not biases."""
    return [p for p in module._parameters.values() if p is not None and p.dim() > 1]


def _paths_by_module(model: nn.Module, paths: Iterable[str]) -> list[list[str]]:
    """`paths` grouped by module, so that a shared module stays one module."""
    groups: dict[int, list[str]] = {}
    for path in paths:
        groups.setdefault(id(model.get_submodule(path)), []).append(path)
    return list(groups.values())


def _replace(model: nn.Module, paths: list[str], module: nn.Module) -> None:
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _quantized_in(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, Quantized)]


def _is_trained(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantLinear | BitConv2d)


def _is_conv1d(module: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # imported already if the model has one
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def _all_paths(model: nn.Module) -> set[str]:
    modules = model.named_modules(remove_duplicate=False)
    return {plain_path(name) for name, module in modules if isinstance(module, Quantized)}


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
