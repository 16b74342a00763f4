"""Which dtype weights are held in, and which one matrix products are computed in, by a recipe and a device."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(device_type: str) -> torch.dtype:
    """bf16 where the device computes in it, else fp32."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def weights_dtype(recipe: Recipe, device_type: str, low: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the unquantized weights. auto is fp32 where all of them are trained: in bf16 small updates would vanish.

    low: the default dtype of a device that is not here.
    """
    if recipe.train.precision == "fp32" or (recipe.model.dtype == "auto" and not recipe.base_frozen):
        return torch.float32
    return (low or default_dtype(device_type)) if recipe.model.dtype == "auto" else DTYPES[recipe.model.dtype]


def autocast_dtype(
    recipe: Recipe, weights_dtype: torch.dtype, device_type: str, low: torch.dtype | None = None
) -> torch.dtype | None:
    """The dtype of the matrix products where it is not that of the weights, else None.

    auto: bf16 over fp32 weights where all of them are trained and the device computes in bf16; products with a frozen base are
    in its own dtype. low: the default dtype of a device that is not here.
    """
    precision = recipe.train.precision
    if weights_dtype != torch.float32 or precision == "fp32":
        return None
    wanted = precision == "bf16" or (not recipe.base_frozen and (low or default_dtype(device_type)) == torch.bfloat16)
    return torch.bfloat16 if wanted else None
