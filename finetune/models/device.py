"""The device that a recipe asks for."""

from __future__ import annotations

import torch

from finetune.errors import UserError


def pick_device(requested: str) -> torch.device:
    """The device for auto, cpu or cuda.

    Raises:
        UserError: cuda is requested, but torch finds no CUDA device.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device",
            where="run.device",
            got=f"torch {torch.__version__} finds none",
            hint="run.device=auto; or update the driver (CUDA 13.0 needs 580 or newer), see nvidia-smi",
        )
    return torch.device("cuda" if requested == "cuda" or (requested == "auto" and torch.cuda.is_available()) else "cpu")
