"""Planning a run before anything is loaded, and suggesting a recipe that fits if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune.errors import GateError
from finetune.memory import resident_bytes, usable_bytes
from finetune.planning.devices import parse_bytes, present
from finetune.planning.estimate import Untraceable, plan
from finetune.planning.fit import Fit, fit
from finetune.planning.result import Plan
from finetune.planning.rewrite import scalar
from finetune.planning.table import cannot, verdict
from finetune.processes import world_size
from finetune.recipe import Recipe
from finetune.record import FitRecord, Planned, PlanRecord, Record
from finetune.stages.context import RunContext
from finetune.stages.preflight import Checked
from finetune.train import parallel
from finetune.units import gib, human_bytes

Planner = Callable[[Recipe, str, Checked, int], Plan]


def plan_of(recipe: Recipe, name: str, checked: Checked, limit: int) -> Plan:
    """Plan a recipe on this machine's device, with `limit` bytes of its memory.

    Raises:
        Untraceable: the model's step cannot be traced.
    """
    device = present(checked.device)
    return plan(recipe, name, device, budget_bytes=limit, data=checked.data, config=checked.inputs.config)


default_planner: Planner | None = plan_of  # None: runs are not planned


@dataclass
class PlannedRun:
    """The recipe after `fit: auto`, its plan (None if there is none) and the changes."""

    recipe: Recipe
    plan: Plan | None = None
    fit: Fit | None = None


def plan_run(run: RunContext, checked: Checked, saved: Record | None) -> PlannedRun:
    """Plan the run; with `fit: auto` change the recipe until it fits.

    saved: the record of a resumed run, which keeps its changes.

    Raises:
        GateError: it does not fit, without --force.
    """
    recipe, name, screen = run.recipe, run.name, run.screen
    if (planner := default_planner) is None:
        return PlannedRun(recipe)
    device = present(checked.device)
    limit = (
        parse_bytes(recipe.plan.memory)
        if recipe.plan.memory is not None
        else min(device.memory_bytes, usable_bytes(checked.device) // (world_size() if device.type == "cpu" else 1))
    )
    limit = min(parallel.all_gather_object(limit))
    try:
        with screen.phase("plan"):
            if recipe.fit == "auto" and saved is None:
                fitted = fit(recipe, limit, lambda other: planner(other, name, checked, limit), device_type=device.type)
                planned = PlannedRun(fitted.recipe, fitted.plan, fitted)
            else:
                planned = PlannedRun(recipe, planner(recipe, name, checked, limit))
    except Untraceable as error:
        screen.warn(f"no plan: {error.message} ({error.got})")
        return PlannedRun(recipe)
    assert planned.plan is not None
    screen.say(f"  {verdict(planned.plan)}")
    for change in planned.fit.steps if planned.fit is not None else []:
        for key, (old, new) in change.keys.items():
            screen.say(f"  fit: {key} {old} → {new}: {change.why}")
    if planned.plan.fits:
        return planned
    got = f"{gib(planned.plan.peak_bytes)} GiB in {planned.plan.highest.name}; {gib(limit)} GiB available"
    if world_size() > 1 and recipe.run.parallel == "fsdp":
        screen.warn(f"the plan assumes one process with the whole model, which would not fit: {got}")
        return planned
    if run.force:
        screen.warn(f"--force: starting although the plan does not fit: {got}")
        return planned
    raise GateError(
        "this run would not fit into memory",
        where=device.name,
        got=cannot(planned.fit) if planned.fit is not None else got,
        hint=f"finetune plan RECIPE --fit "
        f"{gib(limit)}GB shows changes that fit; fit=auto applies them; use --force to start anyway",
    )


def note(record: Record, planned: PlannedRun, device: torch.device) -> None:
    """Record the plan and the figures that training is compared with; keep the changes of fit: auto from the run's start."""
    if planned.plan is None:
        return
    plan = planned.plan
    fitted = record.plan.fit if record.plan is not None else None
    if planned.fit is not None:
        fitted = FitRecord.model_validate(planned.fit.as_dict())
    training = plan.phase("train")
    context, waste = (training.terms.get(term, 0) for term in ("context", "fragmentation"))
    # As the loop measures it: on a CPU the whole process, including its current memory; on a GPU the allocated bytes.
    other = resident_bytes() - context if device.type == "cpu" else -context - waste
    record.plan = PlanRecord.model_validate(plan.as_dict() | ({"fit": fitted} if fitted is not None else {}))
    record.planned = Planned(peak_bytes=training.peak_bytes + other, step_seconds=plan.step_seconds, seconds=training.seconds)


def with_what_would_fit(stop: GateError, planned: PlannedRun, name: str, checked: Checked) -> GateError:
    """`stop` (out of memory) with changes that would fit according to the plan."""
    if planned.plan is None or (planner := default_planner) is None:
        return stop
    limit = int(0.9 * min(planned.plan.peak_bytes, planned.plan.budget_bytes))  # the real need was higher than planned
    device_type = "cpu" if checked.device.type == "cpu" else "cuda"
    try:
        fitted = fit(planned.recipe, limit, lambda other: planner(other, name, checked, limit), device_type=device_type)
    except Exception:  # memory is low: report the error without a suggestion
        return stop
    if not fitted.plan.fits:
        return type(stop)(stop.message, where=stop.where, got=f"{stop.got}; {cannot(fitted)}", hint=stop.hint)
    keys = " ".join(f"{key}={scalar(new)}" for change in fitted.steps for key, (_, new) in change.keys.items())
    saves = f"planned {human_bytes(fitted.plan.peak_bytes)} instead of {human_bytes(planned.plan.peak_bytes)}"
    hint = f"{keys} ({saves}), in a new run.dir" + (f"; {stop.hint}" if stop.hint else "")
    return type(stop)(stop.message, where=stop.where, got=stop.got, hint=hint)
