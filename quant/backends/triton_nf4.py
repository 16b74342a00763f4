"""The NF4 backend for NVIDIA GPUs in Triton.

Two fused functions beyond those of every NF4 backend: `dequantize_packed` undoes the double quantization in the same launch, and
`linear` multiplies a few rows without writing a float weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant import nf4
from quant.backends.triton import DEVICES, NAME, describe, unavailable

FEW = 16  # rows of x that `linear` accepts at most

__all__ = ["DEVICES", "FEW", "NAME", "dequantize", "dequantize_packed", "describe", "linear", "scales", "unavailable"]


def scales(packed: nf4.NF4Tensor) -> Tensor:
    from quant.backends import triton_kernels

    return triton_kernels.nf4_scales(packed)


def dequantize(codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
    from quant.backends import triton_kernels

    return triton_kernels.nf4_weights(codes.reshape(-1).contiguous(), scales.contiguous(), numel, block, dtype)


def dequantize_packed(packed: nf4.NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, in its shape."""
    from quant.backends import triton_kernels

    return triton_kernels.nf4_dequantize(packed, dtype)


def linear(x: Tensor, packed: nf4.NF4Tensor) -> Tensor:
    """x (n ≤ 16, k) · Wᵀ → (n, out) in the dtype of x, within the bound of `triton_kernels.nf4_linear`."""
    from quant.backends import triton_kernels

    return triton_kernels.nf4_linear(x.contiguous(), packed)
