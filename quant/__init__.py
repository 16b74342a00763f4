"""Quantized linear layers: schemes (formats) and linears, swapped into models. Usable alone: `from quant import …`.

    scheme     master weight, straight-through     packed, frozen
    nf4        FakeNF4Linear                       NF4Linear
    ternary    BitLinear                           PackedBitLinear

Importing it loads torch only: bitsandbytes, triton and llvmlite load with the first multiplication that needs them,
peft with `register_peft`, transformers with `quant.pretrained`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from quant import nf4, ternary
from quant.linear import BitLinear, FakeNF4Linear, FakeQuantLinear, NF4Linear, PackedBitLinear, PackedLinear, set_blend
from quant.swap import BypassedError, SwapReport, pack, prove_used, split_experts, swap, to_float
from quant.weight_cache import weights_changed

if TYPE_CHECKING:
    from quant.plugins import assert_wrapped, linear_targets, load_peft, register_peft

__all__ = [
    "BitLinear",
    "BypassedError",
    "FakeNF4Linear",
    "FakeQuantLinear",
    "NF4Linear",
    "PackedBitLinear",
    "PackedLinear",
    "SwapReport",
    "assert_wrapped",
    "linear_targets",
    "load_peft",
    "nf4",
    "pack",
    "prove_used",
    "register_peft",
    "set_blend",
    "split_experts",
    "swap",
    "ternary",
    "to_float",
    "weights_changed",
]

_PLUGINS = {"assert_wrapped", "linear_targets", "load_peft", "register_peft"}


def __getattr__(name: str) -> Any:
    if name in _PLUGINS:
        from quant.backends import bnb

        bnb.unavailable(torch.device("cpu"))  # imports bitsandbytes, as peft would, without its warning about optional kernels
        return getattr(importlib.import_module("quant.plugins"), name)
    raise AttributeError(f"module 'quant' has no attribute {name!r}")
