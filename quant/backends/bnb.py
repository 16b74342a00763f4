"""The NF4 backend of bitsandbytes: its functional API on plain tensors, never its Linear4bit.

Linear4bit 0.50.2 repacks its weight in place at the first forward in eval() on AVX512-BF16 CPUs, after which gradients,
state_dict and merges are wrong. The functional API is correct, with one exception that is avoided here: its AVX512 kernel
uses the scale of the wrong block for matrices whose width is a multiple of 16 but not of 64 (for example a 64 × 96 weight).
So every matrix is passed as rows of whole blocks, or as one row.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from quant import nf4

NAME = "bitsandbytes"
DEVICES = ("cpu", "cuda", "xpu")


@functools.cache
def _functional() -> ModuleType | str:
    """bitsandbytes.functional, or why it is not available."""
    # On import it warns about an optional kernel package, which is not used here.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        return f"cannot import bitsandbytes ({error})"
    finally:
        logger.setLevel(level)
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return "bitsandbytes is installed, but its native library did not load"
    return bitsandbytes.functional


def unavailable(device: torch.device) -> str | None:
    if device.type not in DEVICES:
        return f"bitsandbytes is not used on {device.type}"
    functional = _functional()
    return functional if isinstance(functional, str) else None


def describe(device: torch.device) -> str:
    import bitsandbytes

    return f"bitsandbytes {bitsandbytes.__version__} functional ({device.type})"


def scales(packed: nf4.NF4Tensor) -> Tensor:
    functional = _functional()
    assert isinstance(functional, ModuleType)
    if packed.nested_absmax is None or packed.offset is None:
        return packed.absmax
    # Our own table of levels: bitsandbytes caches its table, which goes wrong under fake tensors.
    levels = nf4.table(nf4.DYNAMIC_LEVELS, packed.absmax.device)
    nested = functional.dequantize_blockwise(packed.absmax, absmax=packed.nested_absmax, code=levels, blocksize=nf4.NESTED_BLOCK)
    return nested.add_(packed.offset)


def dequantize(codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
    functional = _functional()
    assert isinstance(functional, ModuleType)
    # The kernel reads raw pointers and ignores strides.
    codes, scales = codes.reshape(-1).contiguous(), scales.contiguous()
    shape = (numel // block, block) if numel % block == 0 else (1, numel + numel % 2)
    state = functional.QuantState(absmax=scales, shape=torch.Size(shape), dtype=dtype, blocksize=block, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).reshape(-1)[:numel]
