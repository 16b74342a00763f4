"""What changes from step to step, as pure functions of the step: nothing of it needs saving.

`two_stage` is the schedule of BitNet b1.58 (The Era of 1-bit LLMs: Training Tips, Code and FAQ, section 2; BitNet b1.58 2B4T,
arXiv 2504.12285, section 3.1, which gives 1.5e-3 → 8e-4, then 5e-4 → 0, and a weight decay of 0.1, then 0): ternary weights
bear a high learning rate, and settle only when it is cut; decay, which pulls master weights towards the border between two
codes, stops with it.
"""

from __future__ import annotations

import math

STAGES = 0.5  # of all steps, where the second stage begins
FIRST_ENDS, SECOND_BEGINS = 8 / 15, 1 / 3  # of the peak


def learning_rate(step: int, total: int, *, peak: float, schedule: str, warmup: float, min_lr: float) -> float:
    """Learning rate of optimizer step `step` (1 … total).

    It rises linearly over the first `warmup` share of the steps, then falls to `min_lr`·peak along `schedule`.
    """
    rising = round(warmup * total)
    if step <= rising:
        return peak * step / (rising + 1)
    if schedule == "constant":
        return peak
    if schedule == "two_stage":
        turn = max(rising, round(STAGES * total))
        if step <= turn:
            return peak * (1 - (1 - FIRST_ENDS) * (step - rising) / max(1, turn - rising))
        low = min(min_lr, SECOND_BEGINS)
        return peak * (low + (SECOND_BEGINS - low) * (total - step) / max(1, total - turn))
    share = (step - rising) / max(1, total - rising)
    left = 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - share
    return peak * (min_lr + (1 - min_lr) * left)


def decays(step: int, total: int, *, schedule: str) -> bool:
    """Whether weight decay acts in this step: always, but in the second stage of `two_stage`."""
    return schedule != "two_stage" or step <= round(STAGES * total)


def blend(step: int, total: int, *, warmup: float, shape: str) -> float:
    """λ of w + λ(q(w) − w) in step `step` (1 … total): from near 0 to 1 over the first `warmup` share of the steps, then 1.

    λ warm-up: "Fine-tuning LLMs to 1.58bit: extreme quantization made easy" (Hugging Face, 2024), which tries such shapes.
    """
    rising = round(warmup * total)
    if step > rising:
        return 1.0
    share = step / (rising + 1)
    if shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * share))
    if shape == "exponential":
        return (1 - math.exp(-5 * share)) / (1 - math.exp(-5))
    return share
