"""The reference NF4 backend in torch: runs on every device, `meta` included."""

from __future__ import annotations

import torch
from torch import Tensor

from quant import nf4

NAME = "reference"
DEVICES: tuple[str, ...] = ()


def unavailable(device: torch.device) -> str | None:
    return None


def describe(device: torch.device) -> str:
    return f"torch {torch.__version__} reference ({device.type})"


def scales(packed: nf4.NF4Tensor) -> Tensor:
    return nf4.dequantize_scales(packed)


def dequantize(codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
    return nf4.dequantize_codes(codes, scales, numel, block=block, dtype=dtype)
