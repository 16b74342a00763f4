"""The one walk over a module tree: linears become quantized linears, and what is left is left for a stated reason.

A swap can go wrong without a word: a layer can be passed by (Mamba reads `dt_proj.weight` and never calls the module),
shared with another one, or be none that we know. So every linear-like module ends up in the report, swapped or with the
reason why not, and `prove_used` asserts that the forward of every swapped module ran.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

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
"""What is kept in floats: heads, embeddings, norms, and the routers of mixtures of experts (`gate`, not `gate_proj`)."""

LINEARS: dict[tuple[str, bool], type[PackedLinear] | type[FakeQuantLinear]] = {  # (scheme, trainable)
    ("nf4", False): NF4Linear,
    ("nf4", True): FakeNF4Linear,
    ("ternary", False): PackedBitLinear,
    ("ternary", True): BitLinear,
}
SCHEMES = tuple(dict.fromkeys(scheme for scheme, _ in LINEARS))
Quantized = PackedLinear | FakeQuantLinear


@dataclass(frozen=True)
class SwapReport:
    """What one swap did. `share`: swapped parameters among all; bytes: parameters and buffers of the whole model."""

    scheme: str
    trainable: bool
    swapped: tuple[str, ...]
    left: dict[str, str]
    share: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        reasons = Counter(self.left.values())
        left = "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "none"
        size = f"{self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB"
        what = f"{self.scheme}, trainable" if self.trainable else self.scheme
        return f"{len(self.swapped)} linears to {what}, {self.share:.1%} of all parameters, {size}\nleft: {left}"


def swap(
    model: nn.Module,
    *,
    scheme: str = "nf4",
    trainable: bool = False,
    keep: Sequence[str] = DEFAULT_KEEP,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: bool,
) -> SwapReport:
    """Replace the linears of `model` by quantized ones, in place and one at a time.

    trainable: fake-quantized linears, which train a float master weight, instead of packed and frozen ones.
    keep: shell patterns (`fnmatch`); a module is kept when one matches its whole dotted path or one of the path's
    components, so `gate` keeps `…mlp.gate` and not `gate_proj`. A given tuple replaces the default: add to DEFAULT_KEEP.
    device: where quantized modules go; everything else stays where it is. progress: called with (modules done, in all).
    options: of the scheme's linear: `double` for nf4.

    Raises ValueError for an unknown scheme, a pattern of one's own that matches no module, a model that is swapped
    already, weights that the scheme refuses, and when there is nothing to swap.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    kind = LINEARS[scheme, trainable]
    names = [name for name, _ in model.named_modules()]
    for pattern in set(keep) - set(DEFAULT_KEEP):
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"keep pattern {pattern!r} matches no module of {type(model).__name__}")
    for name, module in model.named_modules():
        if (mark := getattr(module, "quantized", None)) is not None and isinstance(mark, str):
            raise ValueError(f"{name} is already {mark}: refuse to quantize twice")

    bytes_before, total = _bytes(model), sum(p.numel() for p in model.parameters())
    left = reasons_to_leave(model, keep, scheme)
    paths = [name for name in linear_like(model) if name not in left]
    if not paths:
        found = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "no linear-like module at all"
        raise ValueError(f"nothing to swap in {type(model).__name__} ({found})")
    places: dict[int, list[str]] = {}  # a module that stands in two places stays one module
    for path in paths:
        places.setdefault(id(model.get_submodule(path)), []).append(path)
    weights = 0
    for done, same in enumerate(places.values(), 1):
        linear = as_linear(model.get_submodule(same[0]))
        weights += linear.weight.numel()
        try:
            packed = kind.from_linear(linear, device=device, **options)
        except ValueError as error:
            raise ValueError(f"{same[0]}: {error}") from error
        for path in same:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
        if progress is not None:
            progress(done, len(places))
    return SwapReport(scheme, trainable, tuple(paths), left, weights / total, bytes_before, _bytes(model))


@contextmanager
def prove_used(model: nn.Module, report: SwapReport) -> Iterator[None]:
    """Run a forward pass of `model` inside; raises RuntimeError on leaving when a swapped module took no part in it.

    Wrapping by PEFT does not matter: it is the quantized layers themselves that note their use. Expert layers that no
    token reached count as unused, so prove with a batch that reaches all.
    """
    packed = {plain_path(name): module for name, module in model.named_modules() if isinstance(module, Quantized)}
    if gone := set(report.swapped) - _all_paths(model):
        raise RuntimeError(f"swapped modules are no longer in the model: {_some(gone)}")
    for module in packed.values():
        module.used = False
    yield
    if unused := {name for name, module in packed.items() if not module.used}:
        raise RuntimeError(
            f"{len(unused)} of {len(packed)} swapped modules took no part in the forward pass: {_some(unused)}. "
            "The model reads their weight without calling them, or never reaches them: add them to `keep`."
        )


def reasons_to_leave(model: nn.Module, keep: Sequence[str], scheme: str | None = None) -> dict[str, str]:
    """{path: reason} of the linear-like modules that are not to be swapped, nor, for the same reasons, adapted.

    With a `scheme`, those are added whose shape it cannot hold: they can carry an adapter all the same.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    holders = Counter(id(p) for m in set(model.modules()) for p in m._parameters.values() if p is not None)
    rescaled = getattr(getattr(model, "config", None), "rescale_every", 0) > 0
    left: dict[str, str] = {}
    for path, module in linear_like(model).items():
        parent = model.get_submodule(path.rpartition(".")[0])
        leaf = path.rpartition(".")[2]
        if not path:
            left[path] = "the model itself"
        elif module is head:
            left[path] = "output head"
        elif holders[id(module.weight)] > 1:
            left[path] = "weight shared with another module"
        elif matches(path, keep):
            left[path] = "kept by pattern"
        elif hasattr(parent, "A_log") and leaf in ("dt_proj", "x_proj", "out_proj"):
            left[path] = "state-space mixers read this weight without calling the module"
        elif rescaled and path.endswith((".attention.output", ".feed_forward.value")):
            left[path] = "RWKV divides this weight in place (config.rescale_every)"
        elif not (type(module) is nn.Linear or _is_conv1d(module)):
            left[path] = f"{type(module).__name__} is not exactly nn.Linear"
        elif scheme is not None and (reason := LINEARS[scheme, False].scheme.unfit(as_linear(module).weight.shape)) is not None:
            left[path] = reason
    return left


def linear_like(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of nn.Linear, its subclasses and GPT-2's Conv1D, in each place where they stand."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, nn.Linear) and not isinstance(module, FakeQuantLinear)) or _is_conv1d(module)
    }


def as_linear(module: nn.Module) -> nn.Linear:
    """`module` as an nn.Linear on the same tensors; Conv1D, which keeps its weight as (in, out), is transposed."""
    if isinstance(module, nn.Linear):
        return module
    assert isinstance(module.weight, nn.Parameter)
    in_features, out_features = module.weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern matches the dotted path or one of its components."""
    candidates = [path, *path.split(".")]
    return any(fnmatchcase(candidate, pattern) for candidate in candidates for pattern in patterns)


def plain_path(path: str) -> str:
    """A module's path as it is without PEFT's wrappers."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def _is_conv1d(module: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def _all_paths(model: nn.Module) -> set[str]:
    modules = model.named_modules(remove_duplicate=False)
    return {plain_path(name) for name, module in modules if isinstance(module, Quantized)}


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
