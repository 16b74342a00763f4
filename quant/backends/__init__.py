"""Who computes what, where: one switch, which says what it chose and why.

A backend turns packed weights back into floats. The table lists, for each scheme, its backends from best to last resort;
the first one that works on the device is taken. `QUANT_BACKEND` or `use(name)` forces one, and a forced backend that is
not available is an error. All backends of a scheme give the same bits.

bitsandbytes is imported inside this folder alone, and only when a switch is asked.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from quant.nf4 import NF4Tensor

VARIABLE = "QUANT_BACKEND"


class Backend(Protocol):
    """A module with these functions; `codes` and `scales` may be any run of whole blocks of the packed weight."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve `device`; None when it can."""

    def describe(self, device: torch.device) -> str:
        """What computes, with its version and the device's type."""

    def scales(self, packed: NF4Tensor) -> Tensor:
        """fp32 (blocks,)."""

    def dequantize(self, codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
        """(numel,) in `dtype`."""


TABLE = {"nf4": {"bitsandbytes": "quant.backends.bnb", "reference": "quant.backends.reference"}}  # best first

_forced: str | None = None  # not a context variable: a backward pass may run in autograd's own threads
_chosen: dict[tuple[str, torch.device, str | None], tuple[Backend, str]] = {}


def select(device: torch.device | str, backend: str | None = None, *, scheme: str = "nf4") -> Backend:
    """The backend for `scheme` on `device`: `backend`, else `use(…)`, else `QUANT_BACKEND`, else the best that works.

    Raises ValueError for a name that the scheme does not have, RuntimeError when a named backend is not available.
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
    name = backend or _forced or os.environ.get(VARIABLE) or None
    key = (scheme, device, name)
    if key not in _chosen:
        _chosen[key] = _look(device, name, scheme)
    return _chosen[key]


def _look(device: torch.device, name: str | None, scheme: str) -> tuple[Backend, str]:
    rows = TABLE[scheme]
    if name is not None and name not in rows:
        raise ValueError(f"{scheme} has no backend {name!r}; it has {', '.join(rows)}")
    reasons: list[str] = []
    for row in [name] if name else rows:
        module: Backend = importlib.import_module(rows[row])
        why = module.unavailable(device)
        if why is None:
            return module, "; ".join(reasons) or ("forced" if name else "")
        if name:
            raise RuntimeError(f"backend {name!r} was asked for and is not available: {why}")
        reasons.append(why)
    raise RuntimeError(f"no backend for {scheme} on {device}: {'; '.join(reasons)}")
