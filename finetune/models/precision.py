"""dtypes of weights and of matrix products, from a recipe and a device."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(device_type: str) -> torch.dtype:
    """bf16 if the device supports it, else fp32."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def weights_dtype(recipe: Recipe, device_type: str, low: torch.dtype | None = None) -> torch.dtype:
    """dtype of the unquantized weights. auto: fp32 if all of them are trained, because bf16 would lose small updates.

    low: the default dtype of a device that is not in this machine.
    """
    if recipe.train.precision == "fp32" or (recipe.model.dtype == "auto" and not recipe.base_frozen):
        return torch.float32
    return (low or default_dtype(device_type)) if recipe.model.dtype == "auto" else DTYPES[recipe.model.dtype]


def autocast_dtype(
    recipe: Recipe, weights_dtype: torch.dtype, device_type: str, low: torch.dtype | None = None
) -> torch.dtype | None:
    """dtype of matrix products if it differs from the weights' dtype, else None.

    auto: bf16 with fp32 weights if all of them are trained and the device supports bf16; a frozen base computes in its own dtype.
    low: the default dtype of a device that is not in this machine.
    """
    precision = recipe.train.precision
    if weights_dtype != torch.float32 or precision == "fp32":
        return None
    wanted = precision == "bf16" or (not recipe.base_frozen and (low or default_dtype(device_type)) == torch.bfloat16)
    return torch.bfloat16 if wanted else None
