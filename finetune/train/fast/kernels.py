"""Elementwise functions of the step, each one pass over memory: written in plain torch, compiled by torch.compile.

    rms_norm      w · x / √(mean(x²) + ε), or (1 + w) · … (Gemma); computed in fp32, rounded once
    gated         act(gate) · up (SwiGLU, GeGLU); computed in fp32, rounded once
    cross_entropy, cross_entropy_with_gradient   of a chunk of logits; reads them twice and writes them once

One source serves every device: Inductor generates C++ on the CPU and Triton on CUDA. Sizes are dynamic, so that any
sequence length uses the same code: a graph is compiled once for each function, dtype and need of gradients. The backward pass is
derived by the compiler, which also decides what to recompute instead of saving it (norms and activations).

Compiling takes some ten seconds the first time on a machine (later the cache is used), so callers switch it on if the run is
long enough: `switch`. While it is off these are the plain functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from finetune.train import trace_context

P = ParamSpec("P")
R = TypeVar("R")

_on = False
_limit: int | None = None  # torch's own, while compilation is on

# One more graph for each dtype, rank, need of gradients and autocast: Gemma 3 norms its heads as well as its hidden states.
# Beyond torch's own limit of 8 it would run without compilation, and log a line.
GRAPHS = 64


def switch(on: bool) -> bool:
    """Switch compilation on or off in this process; returns the previous setting."""
    global _on, _limit
    before, _on = _on, on
    config = torch._dynamo.config
    if on and _limit is None:
        _limit, config.recompile_limit = config.recompile_limit, max(GRAPHS, config.recompile_limit)
    elif not on and _limit is not None:
        config.recompile_limit, _limit = _limit, None
    return before


def switched_on() -> bool:
    return _on


@functools.cache
def unavailable(device: str) -> str | None:
    """Why torch.compile does not work here, or None if it does: it needs a C++ compiler on the CPU, Triton on CUDA."""

    def probe(x: Tensor) -> Tensor:
        return x.exp() + (1.0 if torch.compiler.is_compiling() else 0.0)

    try:
        result = torch.compile(probe, dynamic=True)(torch.zeros(64, device=device))
    except Exception as error:  # any error of a compiler
        return f"torch.compile fails on {device}: {str(error).strip().splitlines()[0][:200]}"
    return None if bool((result == 2).all()) else "torch.compile is switched off"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled for any sizes while compilation is on (`switch`), else unchanged.

    Captured variables and arguments that are not tensors are constants to the compiler: another value compiles another graph.
    """
    compiled_function: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled_function
        if not _on:
            return function(*args, **kwargs)
        if (tracing := trace_context.current()) is not None:
            return tracing.fused(function)(*args, **kwargs)
        if compiled_function is None:
            compiled_function = torch.compile(function, dynamic=True)
        return compiled_function(*args, **kwargs)

    return call


@compiled
def rms_norm(x: Tensor, weight: Tensor, eps: float, one: bool) -> Tensor:
    """x (…, d), weight (d,) → (…, d) in the dtype of x. one: the gain is 1 + weight.

    Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """
    floats, gain = x.float(), weight.float()
    normed = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (gain + 1 if one else gain)).to(x.dtype)


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up), both (…, d) → activation(gate) · up, in their dtype.

    GLU Variants Improve Transformer, arXiv 2002.05202, section 2.
    """

    def gate_and_up(gate: Tensor, up: Tensor) -> Tensor:
        return (activation(gate.float()) * up.float()).to(gate.dtype)

    return compiled(gate_and_up)


def _capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.float() * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@compiled
def cross_entropy(logits: Tensor, index: Tensor, scale: float, softcap: float | None) -> Tensor:
    """logits (n, V), index (n,) int64 → −log softmax(softcap · tanh(scale · logits / softcap))[index], (n,) fp32."""
    z = _capped(logits, scale, softcap)
    return torch.logsumexp(z, 1) - z.gather(1, index[:, None])[:, 0]


@compiled
def _softmax_gradient(
    logits: Tensor, index: Tensor, weight: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (n,), the gradient (n, V) without the −1 of the right class, the right classes' logits (n,))."""
    z = _capped(logits, scale, softcap)
    highest = z.amax(1, keepdim=True)
    total = torch.exp(z - highest).sum(1, keepdim=True).log() + highest
    right = z.gather(1, index[:, None])
    gradient = torch.exp(z - total) * (weight * scale)[:, None]
    if softcap is not None:
        gradient = gradient * (1 - (z / softcap).pow(2))
    return (total - right)[:, 0], gradient.to(logits.dtype), right[:, 0]


def cross_entropy_with_gradient(
    logits: Tensor, index: Tensor, weight: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The losses times weight (n,) fp32, and their gradient with respect to the logits, in their dtype.

    The right class's p − 1 is computed separately, from its loss: comparing every element with the target takes as long
    as everything else.
    """
    losses, gradient, right = _softmax_gradient(logits, index, weight, scale, softcap)
    own = torch.expm1(-losses) * weight * scale
    if softcap is not None:
        own = own * (1 - (right / softcap).pow(2))
    gradient[torch.arange(len(index), device=index.device), index] = own.to(gradient.dtype)
    return losses * weight, gradient
