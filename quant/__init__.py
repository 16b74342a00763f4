"""Quantized linear layers: schemes (formats) and linears, swapped into models. Usable alone: `from quant import …`.

Importing it costs torch and nothing more: bitsandbytes loads with the first dequantization, peft with `register_peft`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quant import nf4
from quant.linear import NF4Linear
from quant.swap import SwapReport, prove_used, swap

if TYPE_CHECKING:
    from quant.plugins import assert_wrapped, linear_targets, load_peft, register_peft

__all__ = [
    "NF4Linear",
    "SwapReport",
    "assert_wrapped",
    "linear_targets",
    "load_peft",
    "nf4",
    "prove_used",
    "register_peft",
    "swap",
]

_PLUGINS = {"assert_wrapped", "linear_targets", "load_peft", "register_peft"}


def __getattr__(name: str) -> Any:
    if name in _PLUGINS:
        return getattr(importlib.import_module("quant.plugins"), name)
    raise AttributeError(f"module 'quant' has no attribute {name!r}")
