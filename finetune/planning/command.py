"""`finetune plan`: a recipe (or all that ship) on a device, as tables or JSON; where asked, made to fit."""

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

BUDGETS = tuple(size << 30 for size in (8, 12, 16, 24))  # of the table: cards that people have
TABLE_GPU = "rtx-4070"
# What circulates about training times: recipe, what it is called, days from and to, device, what it is called. Each is answered
# under the table, where its recipe stands in it.
CLAIMS = (("nanochat-d32", "nanochat d32", (35.0, 45.0), "rtx-4070", "a 4070"),)


def device_for(recipe: Recipe, gpu: str | None) -> Device:
    """The device to plan for: asked for, of the recipe, or the one that is here.

    Raises:
        UserError: it is not in the table, or run.device asks for one that is not here.
    """
    from finetune.planning.devices import device, present

    if (name := gpu or recipe.plan.gpu) is not None:
        return device(name)
    from finetune.models.device import pick_device

    return present(pick_device(recipe.run.device))


def budget_of(recipe: Recipe, asked: str | None, device: Device) -> int:
    """Bytes that may be used of `device`: as asked (--fit), as the recipe says, or all."""
    from finetune.planning.devices import parse_bytes

    text = asked or recipe.plan.memory
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
    """Plan one recipe; with `budget`, or where the recipe says fit: auto, make it fit. `screen` is not for the JSON.

    Raises:
        GateError: it does not fit; what was planned has been shown. UserError: of the user's.
    """
    from finetune.planning.estimate import plan

    wanted = budget is not None or recipe.fit == "auto"
    if out is not None and not wanted:
        raise UserError("there is no changed recipe to write", where="--out", got="no --fit", hint="add --fit 12GB")
    if out is not None and out.exists():
        raise UserError("there is something already", where="--out", got=str(out), hint="give a new name, or remove it")
    device = device_for(recipe, gpu)
    limit = budget_of(recipe, budget, device)
    made: Fit | None = None
    with screen.phase("plan") as progress:
        if wanted:
            tried = 0

            def plan_of(other: Recipe) -> Plan:
                nonlocal tried
                progress(tried, tried + 1, "recipes tried")
                tried += 1
                return plan(other, path.stem, device, budget_bytes=limit)

            made = fit(recipe, limit, plan_of, kind=device.type)
            planned = made.plan
        else:
            planned = plan(recipe, path.stem, device, budget_bytes=limit, progress=progress)
    if as_json:
        answer = planned.as_dict() | ({"fit": made.as_dict()} if made is not None else {})
        print(json.dumps(finite(answer), indent=1, ensure_ascii=False))
    else:
        show(planned, screen)
        if made is not None:
            screen.say("")
            show_fit(made, screen)
    if planned.fits and out is not None and made is not None:
        write_changed(made, path, overrides, out, screen)
    if not planned.fits:
        _refuse(planned, made, path)


def write_changed(made: Fit, path: Path, overrides: list[str], out: Path, screen: Screen) -> None:
    """The recipe of `path`, with overrides and what was changed, as `out`."""
    given = {key: yaml.safe_load(text) if text else None for key, _, text in (item.partition("=") for item in overrides)}
    text, kept = rewrite(path.read_text(encoding="utf-8"), given | {key: new for key, (_, new) in made.keys.items()})
    if Recipe.model_validate(yaml.safe_load(text)) != made.recipe:
        raise AssertionError("the recipe that was written is not the one that was planned")
    write_atomic(out, text)
    screen.say(f"written to {out}" + ("" if kept else "; its comments could not be kept"))


def _refuse(planned: Plan, made: Fit | None, path: Path) -> None:
    if made is not None:
        shorter = f"data.max_length={made.proposal}" if made.proposal else None
        raise GateError("no change makes it fit", where=str(path), got=cannot(made), hint=shorter or "a device with more memory")
    got = f"{gib(planned.peak_bytes)} GiB in {planned.highest.name}; there are {gib(planned.budget_bytes)} GiB"
    hint = f"finetune plan {path} --fit {card(planned.budget_bytes).replace(' ', '')}"
    raise GateError("it does not fit", where=str(path), got=got, hint=hint)


# ----------------------------------------------------------------------------------------------------------------- the table


def plan_table(recipes: list[tuple[Path, Recipe]], *, gpu: str | None, as_json: bool, screen: Screen) -> None:
    """Recipes × BUDGETS at the rates of one device: as they ship where they fit, else changed; then what claims come to.

    Raises:
        UserError: the device is not in the table.
    """
    from finetune.planning.devices import device
    from finetune.planning.estimate import plan

    chosen = device(gpu or TABLE_GPU)
    rows: list[dict[str, Any]] = []
    with screen.phase("plan") as progress:
        for number, (path, recipe) in enumerate(recipes):
            progress(number, len(recipes), path.stem)

            def plan_at(limit: int, name: str = path.stem) -> PlanOf:
                return lambda other: plan(other, name, chosen, budget_bytes=limit)

            rows.append(row(recipe, path.stem, plan_at, kind=chosen.type))
    said = claims(rows)
    if as_json:
        shown = [entry | {"plans": {str(limit): _as_dict(answer) for limit, answer in entry["plans"].items()}} for entry in rows]
        print(json.dumps(finite({"device": chosen.key, "rows": shown, "claims": said}), indent=1, ensure_ascii=False))
        return
    if screen.console.is_terminal:
        screen.say(f"at the rates of {chosen.name}")
        show_many(rows, screen)
    else:
        print(f"At the rates of {chosen.name}.\n\n{markdown(rows)}")
    for line in said:
        screen.say(line)


def row(recipe: Recipe, name: str, plan_at: Callable[[int], PlanOf], *, kind: str) -> dict[str, Any]:
    """One line of the table: the recipe with each of BUDGETS. plan_at: budget → what plans with it."""
    plans: dict[int, Plan | Fit] = {}
    try:
        for limit in BUDGETS:
            made = fit(recipe, limit, plan_at(limit), kind=kind)
            plans[limit] = made if made.steps or not made.fits else made.plan
    except UserError as mistake:
        return {"recipe": name, "parameters": None, "tokens": None, "plans": {}, "error": mistake.message}
    first = plans[BUDGETS[-1]]
    first = first.before if isinstance(first, Fit) else first
    return {"recipe": name, "parameters": first.parameters, "tokens": first.tokens, "plans": plans, "flops": first.flops}


def _as_dict(answer: Plan | Fit) -> dict[str, Any]:
    return answer.plan.as_dict() | {"fit": answer.as_dict()} if isinstance(answer, Fit) else answer.as_dict()


def claims(rows: list[dict[str, Any]]) -> list[str]:
    """The arithmetic of each claim whose recipe was planned."""
    from finetune.planning.devices import device

    flops = {entry["recipe"]: entry["flops"] for entry in rows if not entry.get("error")}
    return [
        claim(flops[recipe], days, what=what, device=called, rate=device(gpu).rates["bf16"])
        for recipe, what, days, gpu, called in CLAIMS
        if recipe in flops
    ]


def all_recipes() -> list[tuple[Path, Recipe]]:
    return [(path, read_recipe(path)) for path in shipped_recipes()]
