"""Calibrating plans with this machine's own runs: each run notes the error of its plan, and later plans are corrected.

~/.cache/finetune12g/errors.jsonl (or under $XDG_CACHE_HOME): a line per run, {device, kind, planned and actual peak, planned and
actual seconds per step}. A plan's step time is multiplied by the median of actual/planned over the last runs of its kind on its
device. Memory is not corrected: an error there is a bug to be found; the report shows both.
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

LAST = 8  # most runs to use
FEWEST = 2  # fewest runs for a correction
ENOUGH = 20  # fewest steps of a run; shorter ones measure only the start-up


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune12g"


def kind_of(recipe: Recipe) -> str:
    """The kind of a run, for grouping: runs of one kind have similar errors."""
    return f"{recipe.kind} {recipe.adapter.kind} {recipe.quant.scheme} {'recomputed' if recipe.train.checkpointing else 'kept'}"


def note(plan: Plan, recipe: Recipe, *, steps: int, planned_bytes: int, peak_bytes: int, step_seconds: float) -> None:
    """Append a run's error, with both peaks as the run measures memory. Does nothing if the cache is not writable."""
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
    """The noted errors, without incomplete lines."""
    noted = []
    try:
        lines = (folder() / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            noted.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return noted


def corrected(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with step times corrected by this machine's runs of the same kind."""
    own = [e for e in errors() if e["device"] == plan.device and e["kind"] == kind_of(recipe) and e["planned_step"] > 0][-LAST:]
    if len(own) < FEWEST:
        return plan
    factor = statistics.median(e["step"] / e["planned_step"] for e in own)
    phases = [
        replace(phase, seconds=None if phase.seconds is None else phase.seconds * factor) if phase.name == "train" else phase
        for phase in plan.phases
    ]
    reason = f"step times are multiplied by {factor:.2f}, from {len(own)} runs of this kind on this device"
    return replace(
        plan, phases=phases, step_seconds=plan.step_seconds * factor, notes=[*plan.notes, reason],
        traced=plan.traced | {"uncorrected": plan.step_seconds},
    )  # fmt: skip
