"""The plan of a recipe on a device as plain data, for `finetune plan`, `run.json` and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# The terms of memory, in the order of display. Weights are named by their format: weights (nf4), weights (bf16), …
TERMS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",  # kept by the forward pass for the backward pass
    "logits",
    "workspace",  # temporary within a pass
    "cache",  # keys and values, while generating
    "context",  # driver and libraries; on a CPU the process
    "fragmentation",
)


@dataclass(frozen=True)
class Phase:
    """One phase of a run: load, evaluate, generate, train, save, merge.

    peak_bytes: on the training device; host_bytes: in CPU memory, if that is separate; terms: parts of peak_bytes; seconds: of
    the whole phase, None if unknown.
    """

    name: str
    peak_bytes: int
    seconds: float | None
    terms: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run of `recipe` needs on `device`.

    budget_bytes: usable memory of the device; step_seconds: one optimizer step of `tokens_per_step` tokens; flops: of the whole
    training, without recomputation; watts: of the device under load; notes: assumptions and reasons, a sentence each; traced:
    details of the trace: layers traced, layers of the model, whether they are alike, operations and compute seconds per step.
    """

    recipe: str
    device: str
    budget_bytes: int
    phases: list[Phase]
    parameters: int
    trainable: int
    steps: int
    tokens_per_step: int
    step_seconds: float
    flops: float
    watts: float
    price_per_kwh: float | None
    notes: list[str] = field(default_factory=list)
    traced: dict[str, Any] = field(default_factory=dict)

    @property
    def highest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.highest.peak_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @property
    def seconds(self) -> float:
        return sum(phase.seconds or 0.0 for phase in self.phases)

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def kwh(self) -> float:
        return self.watts * self.seconds / 3.6e6

    @property
    def price(self) -> float | None:
        return None if self.price_per_kwh is None else self.kwh * self.price_per_kwh

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON, with peak_bytes, fits, terms (of the highest phase), seconds, tokens, kwh and price."""
        return asdict(self) | {
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "terms": self.highest.terms,
            "peak_phase": self.highest.name,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "kwh": self.kwh,
            "price": self.price,
        }

    @staticmethod
    def of_dict(saved: dict[str, Any]) -> Plan:
        """The inverse of `as_dict`."""
        names = Plan.__dataclass_fields__
        phases = [Phase(**phase) for phase in saved["phases"]]
        return Plan(**{key: value for key, value in saved.items() if key in names} | {"phases": phases})
