"""What this machine's own runs have said about plans: each run adds how far its plan was off, and the next plan is corrected.

~/.cache/finetune12g/errors.jsonl (or below $XDG_CACHE_HOME): a line a run, {device, kind, planned and actual peak, planned and
actual seconds a step}. A plan's step time is multiplied by the median of actual/planned of the last runs of its kind on its
device. Memory is not: where a plan is wrong there, that is a fault to be found; the report shows both.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.planning.result import Plan
from finetune.recipe import Recipe

LAST = 8  # runs that count
FEWEST = 2  # before a correction is made
ENOUGH = 20  # steps of a run, below which its speed is that of its beginning


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune12g"


def kind_of(recipe: Recipe) -> str:
    """Runs of one kind are off in the same way: what is trained, in what form, whether compiled and recomputed."""
    return f"{recipe.kind} {recipe.adapter.kind} {recipe.quant.scheme} {'recomputed' if recipe.train.checkpointing else 'kept'}"


def note(plan: Plan, recipe: Recipe, *, steps: int, planned_bytes: int, peak_bytes: int, step_seconds: float) -> None:
    """Add a run's error, both peaks as the run measures its own. A machine whose cache cannot be written to learns nothing."""
    if steps < ENOUGH:
        return
    line = {
        "time": round(time.time()),
        "device": plan.device,
        "kind": kind_of(recipe),
        "planned_peak": planned_bytes,
        "peak": peak_bytes,
        "planned_step": plan.traced.get("uncorrected", plan.step_seconds),
        "step": step_seconds,
    }
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with open(folder() / "errors.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return


def errors() -> list[dict[str, Any]]:
    """What runs have noted; a line that was cut off is left out."""
    found = []
    try:
        lines = (folder() / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def corrected(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with its times as this machine's own runs of the kind say."""
    own = [e for e in errors() if e["device"] == plan.device and e["kind"] == kind_of(recipe) and e["planned_step"] > 0][-LAST:]
    if len(own) < FEWEST:
        return plan
    factor = statistics.median(e["step"] / e["planned_step"] for e in own)
    phases = [
        replace(phase, seconds=None if phase.seconds is None else phase.seconds * factor) if phase.name == "train" else phase
        for phase in plan.phases
    ]
    said = f"step times are multiplied by {factor:.2f}, from {len(own)} runs of this kind on this device"
    return replace(
        plan, phases=phases, step_seconds=plan.step_seconds * factor, notes=[*plan.notes, said],
        traced=plan.traced | {"uncorrected": plan.step_seconds},
    )  # fmt: skip
