"""Who computes what, where: one switch, which says what it chose and why.

The table lists, for each scheme, its backends from best to last resort; the first one that works on the device is taken.
`use(name)` or the environment's QUANT_BACKEND forces one for every scheme that has it, and a forced backend that is not
available is an error. All backends of a scheme give the same bits, save where one states a bound.

bitsandbytes, triton and numba are imported inside this folder alone, and only when a switch is asked.
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
    """A backend that was asked for does not exist, or cannot serve here."""


class Backend(Protocol):
    """A module with these functions, and with those of its scheme."""

    NAME: str
    DEVICES: tuple[str, ...]  # types of devices that it is for; empty: all

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve `device`; None when it can."""

    def describe(self, device: torch.device) -> str:
        """What computes, with its version and the device's type."""


class NF4Backend(Backend, Protocol):
    """`codes` and `scales` may be any run of whole blocks of the packed weight."""

    def scales(self, packed: NF4Tensor) -> Tensor:
        """fp32 (blocks,)."""

    def dequantize(self, codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
        """(numel,) in `dtype`."""

    # Besides, where it has them: dequantize_packed(packed, dtype), all in one launch; FEW and linear(x (n, in), packed),
    # which multiplies that many rows of whole blocks without writing a float weight.


class TernaryBackend(Backend, Protocol):
    """Formulas and layout: quant/ternary.py. n rows, k = in_features."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (out, k) fp32, bf16 or fp16 → packed uint8 (out/4, k), scale fp32 (); 0 or NaN if not all are finite."""

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, k) fp32, bf16 or fp16 → codes int8 (n, k), scales fp32 (n, 1)."""

    def linear(self, codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
        """codes · tᵀ, in integers, / (scales · scale), in fp32 → (n, out) in `dtype`. packed: uint8 (out/4, k); scale: fp32 ().

        Only for a `frozen` weight may a copy in another layout be kept (quant/weight_cache.py).
        """

    def dequantize(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """(out, k) in `dtype`, rounded once from fp32."""

    # Besides, where it has it: norm_quantize_rows(x, weight, eps), RMSNorm and quantize_rows in one pass.


TABLE = {  # best first
    "nf4": {
        "bitsandbytes": "quant.backends.bnb",
        "triton": "quant.backends.triton_nf4",
        "reference": "quant.backends.reference_nf4",
    },
    "ternary": {
        "numba": "quant.backends.numba_cpu",
        "aten": "quant.backends.aten",
        "triton": "quant.backends.triton",  # after those of the CPU, where it would only be interpreted
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

    Raises BackendError for a name that no scheme has (for `backend`: that this scheme does not have), and for a named
    backend that is not available.
    """
    return _choose(torch.device(device), backend, scheme)[0]


def describe(device: torch.device | str, backend: str | None = None, *, scheme: str = "nf4") -> str:
    """One line: which backend `select` takes here, and why when that is not the best one."""
    device = torch.device(device)
    chosen, reason = _choose(device, backend, scheme)
    return chosen.describe(device) + (f": {reason}" if reason else "")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force `backend` within the block, for the whole process."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _choose(device: torch.device, backend: str | None, scheme: str) -> tuple[Backend, str]:
    name = backend
    if name is None and (forced := _forced or os.environ.get(VARIABLE)):
        if not any(forced in rows for rows in TABLE.values()):
            known = sorted({name for rows in TABLE.values() for name in rows})
            raise BackendError(f"no scheme has a backend {forced!r}; {VARIABLE} may be {', '.join(known)}")
        name = forced if forced in TABLE[scheme] else None
    key = (scheme, device, name)
    if key not in _chosen:
        _chosen[key] = _look(device, name, scheme)
    return _chosen[key]


def _look(device: torch.device, name: str | None, scheme: str) -> tuple[Backend, str]:
    rows = TABLE[scheme]
    if name is not None and name not in rows:
        raise BackendError(f"{scheme} has no backend {name!r}; it has {', '.join(rows)}")
    reasons: list[str] = []
    for row in [name] if name else rows:
        module: Backend = importlib.import_module(rows[row])
        if name is None and module.DEVICES and device.type not in module.DEVICES:
            continue
        why = module.unavailable(device)
        if why is None:
            return module, "; ".join(reasons) or ("forced" if name else "")
        if name:
            raise BackendError(f"backend {name!r} was asked for and is not available: {why}")
        reasons.append(why)
    raise RuntimeError(f"no backend for {scheme} on {device}: {'; '.join(reasons)}")
