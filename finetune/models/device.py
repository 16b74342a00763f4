"""The device that a recipe asks for."""

from __future__ import annotations

import torch

from finetune.errors import UserError


def pick_device(asked: str) -> torch.device:
    """auto, cpu or cuda as a device.

    Raises:
        UserError: cuda is asked for and torch sees none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device",
            where="run.device",
            got=f"torch {torch.__version__} sees none",
            hint="run.device=auto; or update the driver (CUDA 13.0 needs 580 or newer), see nvidia-smi",
        )
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")
