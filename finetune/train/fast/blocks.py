"""Recognizes RMSNorms and gated MLPs by comparing their outputs on random inputs with the formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eval.model_state import evaluating
from finetune.train import trace_context
from finetune.train.fast import kernels

SAME = 1e-4  # relative difference up to which two results are the same, in fp32
SAME_LOW = 3e-2  # in 16 bits, where one of them rounds more often


def difference(ours: Tensor, own: Tensor) -> float:
    """Relative difference of two results; 0.0 in a trace, infinite if shapes differ."""
    if ours.shape != own.shape:
        return float("inf")
    if trace_context.current() is not None:
        return 0.0
    return float((ours.float() - own.float()).norm() / own.float().norm().clamp(min=1e-30))


def as_fast_as_it_gets(block: nn.Module) -> bool:
    """Whether a block has nothing to fuse: a LayerNorm, a linear, or two linears with one activation in between."""
    if isinstance(block, nn.LayerNorm) or _shape(block) is not None or not any(True for _ in block.parameters()):
        return True
    children = [child for child in block.children() if any(True for _ in child.parameters())]
    return len(children) == 2 and all(_shape(child) is not None for child in children)


def like_norm(module: Any) -> bool:
    """Whether a module looks like an RMSNorm: one vector of weights, and an ε."""
    alone = not any(True for _ in module.children()) and not isinstance(module, nn.LayerNorm)
    return alone and [p.ndim for p in module.parameters()] == [1] and hasattr(module, "weight") and _epsilon(module) is not None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def as_norm(module: Any) -> Callable[..., Any] | None:
    """A faster forward of `module` if it is an RMSNorm with gain w or 1 + w, else None."""
    eps = _epsilon(module)
    assert eps is not None
    x = _random((3, module.weight.shape[0]), module.weight.device)
    try:
        with torch.no_grad():
            own = module(x)
            for one in (False, True):
                if difference(kernels.rms_norm.__wrapped__(x, module.weight, eps, one), own) < SAME:  # type: ignore[attr-defined]
                    return functools.partial(_norm, module, functools.partial(kernels.rms_norm, eps=eps, one=one))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return None


def _norm(module: Any, norm: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    y = norm(x, module.weight)
    y.recompute_fn = norm, (x, module.weight)  # type: ignore[attr-defined]
    return y


def as_gated(module: Any, gates: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Callable[..., Any] | None:
    """A faster forward of `module` if it is down(activation(gate) · up), with gate and up separate or in one linear, else None.

    A norm may precede `down` (BitNet b1.58 2B4T). gates: compiled functions by activation, shared by equal ones.
    """
    children = dict(module.named_children())
    linears = {name: shape for name, child in children.items() if (shape := _shape(child)) is not None}
    others = {name: child for name, child in children.items() if name not in linears}
    norms = [name for name, child in others.items() if any(True for _ in child.parameters())]
    activations = [child for name, child in others.items() if name not in norms and not isinstance(child, nn.Dropout)]
    if len(others) != len(norms) + 1 or len(activations) != 1 or len(norms) > 1 or len(linears) not in (2, 3):
        return None
    activation: Any = activations[0]
    fuse = gates.setdefault(repr(activation), kernels.gated(activation))
    names, shapes = list(linears), list(linears.values())
    inner = shapes[-1][1]
    hidden = shapes[0][1]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        product = fuse(gate, up)
        product.recompute_fn = fuse, (gate, up)  # type: ignore[attr-defined]
        return getattr(module, norms[0])(product) if norms else product

    def separate(x: Tensor) -> Tensor:
        return getattr(module, names[2])(gated(getattr(module, names[0])(x), getattr(module, names[1])(x)))

    def merged(x: Tensor) -> Tensor:
        return getattr(module, names[1])(gated(*getattr(module, names[0])(x).chunk(2, dim=-1)))

    if len(names) == 3 and shapes[0] == shapes[1] == (inner, hidden):
        candidate = separate
    elif len(names) == 2 and shapes[0] == (2 * inner, hidden):
        candidate = merged
    else:
        return None
    low = _input_dtype(children[names[0]])
    x = _random((1, 3, hidden), next(module.parameters()).device).to(low)
    before = kernels.switch(False)
    try:
        with torch.no_grad(), evaluating(module):
            if difference(candidate(x), module(x)) < (SAME if low == torch.float32 else SAME_LOW):
                return candidate
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        kernels.switch(before)
    return None


def _shape(module: Any) -> tuple[int, int] | None:
    """(out, in) features of a linear, packed or not, with or without an adapter; None for other modules."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    features = getattr(base, "out_features", None), getattr(base, "in_features", None)
    return features if all(isinstance(n, int) for n in features) else None  # type: ignore[return-value]


def _input_dtype(module: Any) -> torch.dtype:
    """The dtype of a linear's input: a packed one accepts any, a plain one needs its weight's."""
    weight = getattr(module.get_base_layer() if hasattr(module, "get_base_layer") else module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random fp32 numbers from a generator of its own; torch's global one does not move."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
