"""Optimizers and the learning-rate schedule, a pure function of the step: nothing of it needs saving."""

from __future__ import annotations

import math
from typing import Any

import torch

from finetune.errors import Mistake


def learning_rate(step: int, total: int, *, peak: float, schedule: str, warmup: float, min_lr: float) -> float:
    """Learning rate of optimizer step `step` (1 … total).

    It rises linearly over the first `warmup` share of the steps, then falls to `min_lr`·peak along `schedule`.
    """
    rising = round(warmup * total)
    if step <= rising:
        return peak * step / (rising + 1)
    if schedule == "constant":
        return peak
    share = (step - rising) / max(1, total - rising)
    left = 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - share
    return peak * (min_lr + (1 - min_lr) * left)


def build(
    parameters: dict[str, torch.nn.Parameter],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: str,
) -> tuple[torch.optim.Optimizer, str | None]:
    """The optimizer over named parameters, and a note where it is not quite what was asked for.

    Matrices decay, vectors (norms, biases) do not. 8-bit states: Dettmers et al., arXiv 2110.02861.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True), None
    try:
        import bitsandbytes
    except ImportError:
        raise Mistake(
            "8-bit optimizers need bitsandbytes",
            where="train.optimizer",
            found=name,
            do="pip install bitsandbytes, or train.optimizer=adamw",
        ) from None
    note = None
    if name == "paged_adamw_8bit" and device == "cpu":
        note = "paged_adamw_8bit: there is nothing to page on a CPU, adamw_8bit it is"
        name = "adamw_8bit"
    kind = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    return kind(groups, lr=lr, betas=betas, eps=eps), note
