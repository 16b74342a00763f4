"""`finetune plan`: plans of one recipe or all shipped ones, as tables or JSON; with --fit, changed to fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.errors import GateError, UserError
from finetune.files import finite, write_atomic
from finetune.planning.fit import Fit, PlanOf, fit
from finetune.planning.result import Plan
from finetune.planning.rewrite import rewrite
from finetune.planning.table import cannot, card, claim, markdown, show, show_fit, show_many
from finetune.recipe import Recipe, read_recipe, shipped_recipes
from finetune.screen import Screen
from finetune.units import gib

if TYPE_CHECKING:
    from finetune.planning.devices import Device

BUDGETS = tuple(size << 30 for size in (8, 12, 16, 24))  # common sizes of GPU memory
TABLE_GPU = "rtx-4070"
# Public claims about training times: recipe, its name, days from and to, device, its name. The table checks each if it has the
# recipe.
CLAIMS = (("nanochat-d32", "nanochat d32", (35.0, 45.0), "rtx-4070", "a 4070"),)


def device_for(recipe: Recipe, gpu: str | None) -> Device:
    """The device to plan for: `gpu`, the recipe's, or this machine's.

    Raises:
        UserError: it is not in the table, or run.device is not available.
    """
    from finetune.planning.devices import device, present

    if (name := gpu or recipe.plan.gpu) is not None:
        return device(name)
    from finetune.models.device import pick_device

    return present(pick_device(recipe.run.device))


def budget_of(recipe: Recipe, budget: str | None, device: Device) -> int:
    """Bytes of the device's memory to use: `budget` (--fit), the recipe's limit, or all."""
    from finetune.planning.devices import parse_bytes

    text = budget or recipe.plan.memory
    return device.memory_bytes if text is None else parse_bytes(text)


def plan_recipe(
    recipe: Recipe,
    path: Path,
    overrides: list[str],
    *,
    gpu: str | None,
    budget: str | None,
    as_json: bool,
    out: Path | None,
    screen: Screen,
) -> None:
    """Plan one recipe and show the plan; with `budget` or fit: auto change the recipe until it fits. JSON goes to stdout.

    Raises:
        GateError: it does not fit; the plan has been shown. UserError: wrong options, recipe or device.
    """
    from finetune.planning.estimate import plan

    fits_it = budget is not None or recipe.fit == "auto"
    if out is not None and not fits_it:
        raise UserError("--out needs --fit", where="--out", got="no --fit", hint="add --fit 12GB")
    if out is not None and out.exists():
        raise UserError("the output exists already", where="--out", got=str(out), hint="give a new name, or remove it")
    device = device_for(recipe, gpu)
    limit = budget_of(recipe, budget, device)
    fitted: Fit | None = None
    with screen.phase("plan") as progress:
        if fits_it:
            tried = 0

            def plan_of(other: Recipe) -> Plan:
                nonlocal tried
                progress(tried, tried + 1, "recipes tried")
                tried += 1
                return plan(other, path.stem, device, budget_bytes=limit)

            fitted = fit(recipe, limit, plan_of, device_type=device.type)
            planned = fitted.plan
        else:
            planned = plan(recipe, path.stem, device, budget_bytes=limit, progress=progress)
    if as_json:
        answer = planned.as_dict() | ({"fit": fitted.as_dict()} if fitted is not None else {})
        print(json.dumps(finite(answer), indent=1, ensure_ascii=False))
    else:
        show(planned, screen)
        if fitted is not None:
            screen.say("")
            show_fit(fitted, screen)
    if planned.fits and out is not None and fitted is not None:
        write_changed(fitted, path, overrides, out, screen)
    if not planned.fits:
        _refuse(planned, fitted, path)


def write_changed(fitted: Fit, path: Path, overrides: list[str], out: Path, screen: Screen) -> None:
    """Write the recipe of `path` to `out`, with overrides and the changes that make it fit."""
    given = {key: yaml.safe_load(text) if text else None for key, _, text in (item.partition("=") for item in overrides)}
    text, kept = rewrite(path.read_text(encoding="utf-8"), given | {key: new for key, (_, new) in fitted.keys.items()})
    if Recipe.model_validate(yaml.safe_load(text)) != fitted.recipe:
        raise AssertionError("the written recipe differs from the planned one")
    write_atomic(out, text)
    screen.say(f"wrote {out}" + ("" if kept else ", without the original's comments"))


def _refuse(planned: Plan, fitted: Fit | None, path: Path) -> None:
    if fitted is not None:
        shorter = f"data.max_length={fitted.proposal}" if fitted.proposal else None
        raise GateError(
            "no change of the recipe makes it fit",
            where=str(path),
            got=cannot(fitted),
            hint=shorter or "a device with more memory",
        )
    got = f"{gib(planned.peak_bytes)} GiB in {planned.highest.name}; {gib(planned.budget_bytes)} GiB available"
    hint = f"finetune plan {path} --fit {card(planned.budget_bytes).replace(' ', '')}"
    raise GateError("the recipe does not fit into memory", where=str(path), got=got, hint=hint)


# ----------------------------------------------------------------------------------------------------------------- the table


def plan_table(recipes: list[tuple[Path, Recipe]], *, gpu: str | None, as_json: bool, screen: Screen) -> None:
    """Plan recipes × BUDGETS at the rates of one device, changed where they do not fit; then check the claims.

    Raises:
        UserError: the device is not in the table.
    """
    from finetune.planning.devices import device
    from finetune.planning.estimate import plan

    chosen = device(gpu or TABLE_GPU)
    lines: list[dict[str, Any]] = []
    with screen.phase("plan") as progress:
        for number, (path, recipe) in enumerate(recipes):
            progress(number, len(recipes), path.stem)

            def plan_at(limit: int, name: str = path.stem) -> PlanOf:
                return lambda other: plan(other, name, chosen, budget_bytes=limit)

            lines.append(row(recipe, path.stem, plan_at, device_type=chosen.type))
    checked_claims = claims(lines)
    if as_json:
        shown = [entry | {"plans": {str(limit): _as_dict(answer) for limit, answer in entry["plans"].items()}} for entry in lines]
        print(json.dumps(finite({"device": chosen.key, "rows": shown, "claims": checked_claims}), indent=1, ensure_ascii=False))
        return
    if screen.console.is_terminal:
        screen.say(f"at the rates of {chosen.name}")
        show_many(lines, screen)
    else:
        print(f"At the rates of {chosen.name}.\n\n{markdown(lines)}")
    for line in checked_claims:
        screen.say(line)


def row(recipe: Recipe, name: str, plan_at: Callable[[int], PlanOf], *, device_type: str) -> dict[str, Any]:
    """One line of the table: the recipe with each of BUDGETS. plan_at: from a budget to a planner."""
    plans: dict[int, Plan | Fit] = {}
    try:
        for limit in BUDGETS:
            fitted = fit(recipe, limit, plan_at(limit), device_type=device_type)
            plans[limit] = fitted if fitted.steps or not fitted.fits else fitted.plan
    except UserError as error:
        return {"recipe": name, "parameters": None, "tokens": None, "plans": {}, "error": error.message}
    first = plans[BUDGETS[-1]]
    first = first.before if isinstance(first, Fit) else first
    return {"recipe": name, "parameters": first.parameters, "tokens": first.tokens, "plans": plans, "flops": first.flops}


def _as_dict(answer: Plan | Fit) -> dict[str, Any]:
    return answer.plan.as_dict() | {"fit": answer.as_dict()} if isinstance(answer, Fit) else answer.as_dict()


def claims(lines: list[dict[str, Any]]) -> list[str]:
    """A sentence for each claim whose recipe was planned, with its arithmetic."""
    from finetune.planning.devices import device

    flops = {entry["recipe"]: entry["flops"] for entry in lines if not entry.get("error")}
    return [
        claim(flops[recipe], days, what=what, device=called, rate=device(gpu).rates["bf16"])
        for recipe, what, days, gpu, called in CLAIMS
        if recipe in flops
    ]


def all_recipes() -> list[tuple[Path, Recipe]]:
    return [(path, read_recipe(path)) for path in shipped_recipes()]
