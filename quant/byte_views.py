"""fp32 scales as bytes, so that no cast of a module changes them and all parts of a packed weight are uint8."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(scales: Tensor) -> Tensor:
    """fp32 of any shape → uint8 (4 · numel,)."""
    return scales.reshape(-1).contiguous().view(torch.uint8)


def as_floats(raw: Tensor) -> Tensor:
    """The inverse: uint8 (4 · n,) → fp32 (n,), a view if the bytes are aligned."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)
