"""The reference ternary backend in torch: runs on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from quant import ternary

NAME = "reference"
DEVICES: tuple[str, ...] = ()
EXACT_IN_FP32 = 2**24 // 128  # in_features up to which partial sums of int8 × ternary are exact in fp32


def unavailable(device: torch.device) -> str | None:
    return None


def describe(device: torch.device) -> str:
    return f"torch {torch.__version__} reference ({device.type})"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = ternary.ternarize(weight)
    return ternary.pack(codes), scale


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    return ternary.quantize_activations(x)


def linear(codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
    exact = torch.float32 if codes.shape[1] <= EXACT_IN_FP32 else torch.float64
    product = codes.to(exact) @ ternary.unpack(packed).to(exact).t()
    return (product.float() / (scales * scale)).to(dtype)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (ternary.unpack(packed) / scale).to(dtype)
