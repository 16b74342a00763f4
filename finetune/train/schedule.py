"""Schedules over steps: learning rate, weight decay, and the λ of the quantization warm-up.

All are pure functions of the step: they have no state to save.

`two_stage` is the schedule of BitNet b1.58 (The Era of 1-bit LLMs: Training Tips, Code and FAQ, section 2; BitNet b1.58 2B4T,
arXiv 2504.12285, section 3.1, which uses 1.5e-3 → 8e-4, then 5e-4 → 0, and a weight decay of 0.1, then 0): ternary weights
tolerate a high learning rate, and settle only when it is cut; decay, which pulls master weights towards the border between two
codes, stops then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe import Quant, Train

STAGES = 0.5  # of all steps, where the second stage begins
FIRST_ENDS, SECOND_BEGINS = 8 / 15, 1 / 3  # of the peak


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `total` optimizer steps, which count from 1.

    name: of the curve; warmup: share of the steps over which the rate rises; min_lr: the final rate as a share of the peak.
    blend_warmup, blend_shape: of λ, as the recipe's quant section has them.
    """

    total: int
    peak: float
    name: str = "constant"
    warmup: float = 0.0
    min_lr: float = 0.0
    blend_warmup: float = 0.0
    blend_shape: str = "linear"

    @classmethod
    def of(cls, train: Train, total: int, quant: Quant | None = None) -> Schedule:
        """The schedule of a recipe's sections."""
        blend = {} if quant is None else {"blend_warmup": quant.warmup, "blend_shape": quant.warmup_shape}
        return cls(total, train.lr, train.schedule, train.warmup, train.min_lr, **blend)  # type: ignore[arg-type]

    def factor(self, step: int) -> float:
        """Learning rate of that step as a share of the peak."""
        return self.rate(step, 1.0)

    def rate(self, step: int, peak: float | None = None) -> float:
        """Learning rate of that step, for a group whose peak is `peak`; without it, the recipe's peak."""
        share, parts = self._share(step)
        return (self.peak if peak is None else peak) * share / parts

    def decays(self, step: int) -> bool:
        """Whether weight decay applies in this step: always, except in the second stage of `two_stage`."""
        return self.name != "two_stage" or step <= round(STAGES * self.total)

    def set_rates(self, groups: Iterable[dict[str, Any]], step: int) -> None:
        """Set the rate and the decay of that step in an optimizer's groups (optim.py), each from its own peak."""
        for group in groups:
            group["lr"] = self.rate(step, group["peak_lr"])
            group["weight_decay"] = group["peak_weight_decay"] if self.decays(step) else 0.0

    def blend(self, step: int) -> float:
        """λ of w + λ(q(w) − w): from near 0 to 1 over the first `blend_warmup` share of the steps, then 1.

        λ warm-up: "Fine-tuning LLMs to 1.58bit: extreme quantization made easy" (Hugging Face, 2024), which tries such shapes.
        """
        rising = round(self.blend_warmup * self.total)
        if step > rising:
            return 1.0
        share = step / (rising + 1)
        if self.blend_shape == "cosine":
            return 0.5 * (1 - math.cos(math.pi * share))
        if self.blend_shape == "exponential":
            return (1 - math.exp(-5 * share)) / (1 - math.exp(-5))
        return share

    def _share(self, step: int) -> tuple[float, int]:
        """(a, b): the rate is peak · a / b, in this order, which decides its last bit.

        It rises linearly over the first `warmup` share of the steps, then falls to `min_lr`·peak along the curve.
        """
        total, min_lr = self.total, self.min_lr
        rising = round(self.warmup * total)
        if step <= rising:
            return step, rising + 1
        if self.name == "constant":
            return 1.0, 1
        if self.name == "two_stage":
            turn = max(rising, round(STAGES * total))
            if step <= turn:
                return 1 - (1 - FIRST_ENDS) * (step - rising) / max(1, turn - rising), 1
            low = min(min_lr, SECOND_BEGINS)
            return low + (SECOND_BEGINS - low) * (total - step) / max(1, total - turn), 1
        share = (step - rising) / max(1, total - rising)
        left = 0.5 * (1 + math.cos(math.pi * share)) if self.name == "cosine" else 1 - share
        return min_lr + (1 - min_lr) * left, 1
