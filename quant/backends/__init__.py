"""Selects the backend of a scheme on a device, and says which one and why.

The table lists the backends of each scheme in order of preference; the first one that works on the device is used.
`use(name)` or the environment variable QUANT_BACKEND forces one for every scheme that has it, and a forced backend that is not
available is an error. All backends of a scheme give the same bits, unless one documents an error bound.

bitsandbytes, triton and llvmlite are imported only in this folder, and only when a backend is selected.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from quant.nf4 import NF4Tensor

VARIABLE = "QUANT_BACKEND"


class BackendError(ValueError):
    """A requested backend does not exist, or is not available on the device."""


class Backend(Protocol):
    """A module with these functions, and with those of its scheme."""

    NAME: str
    DEVICES: tuple[str, ...]  # supported device types; empty: all

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`; None if it can."""

    def describe(self, device: torch.device) -> str:
        """The library that computes, with its version and the device's type."""


class NF4Backend(Backend, Protocol):
    """`codes` and `scales` may be any consecutive whole blocks of the packed weight."""

    def scales(self, packed: NF4Tensor) -> Tensor:
        """fp32 (blocks,)."""

    def dequantize(self, codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
        """(numel,) in `dtype`."""

    # Optional: dequantize_packed(packed, dtype), all in one launch; FEW and linear(x (n, in), packed),
    # which multiplies up to that many rows of x without writing a float weight.


class TernaryBackend(Backend, Protocol):
    """Formulas and layout: quant/ternary.py. n rows, k = in_features."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (out, k) fp32, bf16 or fp16 → packed uint8 (out/4, k), scale fp32 (); 0 or NaN if not all are finite."""

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, k) fp32, bf16 or fp16 → codes int8 (n, k), scales fp32 (n, 1)."""

    def linear(self, codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
        """codes · tᵀ, in integers, / (scales · scale), in fp32 → (n, out) in `dtype`. packed: uint8 (out/4, k); scale: fp32 ().

        A copy in another layout may be cached for a `frozen` weight only (quant/weight_cache.py).
        """

    def dequantize(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """(out, k) in `dtype`, rounded once from fp32."""

    # Optional: norm_quantize_activations(x, weight, eps), RMSNorm and quantize_activations in one pass.


TABLE = {  # best first
    "nf4": {
        "bitsandbytes": "quant.backends.bnb",
        "triton": "quant.backends.triton_nf4",
        "reference": "quant.backends.reference_nf4",
    },
    "ternary": {
        "numba": "quant.backends.numba_cpu",
        "aten": "quant.backends.aten",
        "triton": "quant.backends.triton",  # after the CPU backends, because triton only interprets there
        "reference": "quant.backends.reference_ternary",
    },
}

_forced: str | None = None  # not a context variable: a backward pass may run in autograd's own threads
_chosen: dict[tuple[str, torch.device, str | None], tuple[Backend, str]] = {}


@overload
def select(device: torch.device | str, backend: str | None = None, *, scheme: Literal["nf4"] = "nf4") -> NF4Backend: ...
@overload
def select(device: torch.device | str, backend: str | None = None, *, scheme: Literal["ternary"]) -> TernaryBackend: ...
def select(device: torch.device | str, backend: str | None = None, *, scheme: str = "nf4") -> Any:
    """The backend for `scheme` on `device`: `backend`, else `use(…)`, else `QUANT_BACKEND`, else the best that works.

    Raises BackendError for an unknown name (for `backend`: one that this scheme does not have), and for a named
    backend that is not available.
    """
    return _choose(torch.device(device), backend, scheme)[0]


def describe(device: torch.device | str, backend: str | None = None, *, scheme: str = "nf4") -> str:
    """One line: the backend that `select` returns here, and why if that is not the preferred one."""
    device = torch.device(device)
    chosen, reason = _choose(device, backend, scheme)
    return chosen.describe(device) + (f": {reason}" if reason else "")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force `backend` inside the block, for the whole process."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _choose(device: torch.device, backend: str | None, scheme: str) -> tuple[Backend, str]:
    name = backend
    if name is None and (forced := _forced or os.environ.get(VARIABLE)):
        if not any(forced in backends for backends in TABLE.values()):
            known = sorted({name for backends in TABLE.values() for name in backends})
            raise BackendError(f"unknown backend {forced!r}; {VARIABLE} may be {', '.join(known)}")
        name = forced if forced in TABLE[scheme] else None
    key = (scheme, device, name)
    if key not in _chosen:
        _chosen[key] = _find(device, name, scheme)
    return _chosen[key]


def _find(device: torch.device, name: str | None, scheme: str) -> tuple[Backend, str]:
    table = TABLE[scheme]
    if name is not None and name not in table:
        raise BackendError(f"{scheme} has no backend {name!r}; it has {', '.join(table)}")
    reasons: list[str] = []
    for candidate in [name] if name else table:
        module: Backend = importlib.import_module(table[candidate])
        if name is None and module.DEVICES and device.type not in module.DEVICES:
            continue
        why = module.unavailable(device)
        if why is None:
            return module, "; ".join(reasons) or ("forced" if name else "")
        if name:
            raise BackendError(f"backend {name!r} is not available: {why}")
        reasons.append(why)
    raise RuntimeError(f"no backend for {scheme} on {device}: {'; '.join(reasons)}")
