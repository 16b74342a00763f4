"""A recipe and a budget of memory → a recipe that fits.

What costs least is tried first: the loss in chunks, fewer rows at once (the same rows a step), activations computed again,
states in 8 bits, weights without an fp32 copy, gradients of one layer at a time; then states, activations and layers that wait in
the CPU's memory. Changes are added in that order until the plan fits; then each that turned out unnecessary goes, the costliest
first. What is learnt from is never changed: a shorter data.max_length is proposed, and left to the user.

A plan takes seconds. So of a ladder (8, 4, 2, 1 rows at once) the last rung is looked at first and the highest that fits is
found by bisection, a change is tried only where it acts on the phase that is highest, and no recipe is planned twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetune.errors import UserError
from finetune.planning.result import Plan
from finetune.recipe import Recipe, Train, differences

SHORTEST = 64  # tokens: no shorter data.max_length is proposed
EIGHTHS = 8  # a proposed data.max_length is so many parts of the recipe's, or fewer
PlanOf = Callable[[Recipe], Plan]


@dataclass(frozen=True)
class Change:
    """keys: what changed, with (old, new). peak_bytes, seconds (of the whole run): (before, after) it, the earlier ones done."""

    keys: dict[str, tuple[Any, Any]]
    why: str
    peak_bytes: tuple[int, int]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """A recipe made to fit.

    recipe, plan: with all `steps` taken; where it does not fit, with every change that helps. before: the plan as it was.
    smallest_bytes: where it does not fit, the least that any combination needs. proposal: a data.max_length (tokens) with which
    it would then fit; None where none would. refused: changes that cannot be made here, with the reason.
    """

    recipe: Recipe
    plan: Plan
    before: Plan
    steps: list[Change]
    fits: bool
    budget_bytes: int
    proposal: int | None = None
    smallest_bytes: int | None = None
    refused: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        """Every key that is another than it was, with (old, new)."""
        changed: dict[str, tuple[Any, Any]] = {}
        for step in self.steps:
            for key, (old, new) in step.keys.items():
                changed[key] = (changed[key][0] if key in changed else old, new)
        return changed

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `changes` are the steps; `keys` what is to be written into the recipe."""
        changes = [
            {
                "keys": {key: {"old": old, "new": new} for key, (old, new) in step.keys.items()},
                "why": step.why,
                "peak_bytes": list(step.peak_bytes),
                "seconds": list(step.seconds),
            }
            for step in self.steps
        ]
        return {
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "keys": {key: new for key, (_, new) in self.keys.items()},
            "changes": changes,
            "before": {"peak_bytes": self.before.peak_bytes, "seconds": self.before.seconds},
            "smallest_bytes": self.smallest_bytes,
            "proposal": {"data.max_length": self.proposal} if self.proposal is not None else None,
            "refused": self.refused,
        }


# ---------------------------------------------------------------------------------------------------------------- the levers


@dataclass(frozen=True)
class Lever:
    """Something that lowers memory.

    name: of levers with one name only one is pulled, a later one in place of an earlier. rungs: keys with their new values, from
    the least change to the most. phases: where it acts; empty: everywhere. needs: keys that must be true beside it, and are made
    so. instead_of: names of levers that cannot be pulled beside it.
    """

    name: str
    rungs: tuple[dict[str, Any], ...]
    why: str
    phases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    instead_of: tuple[str, ...] = ()


def levers(recipe: Recipe, kind: str) -> list[Lever]:
    """What could be changed in `recipe` on such a device, the cheapest first. The schema still has its say on each."""
    train, batch = recipe.train, recipe.train.micro_batch
    found: list[Lever] = []
    chunk = Train.model_fields["loss_chunk"].default
    if train.loss_chunk == 0 or train.loss_chunk > chunk:
        why = f"logits of {chunk} tokens exist at once, not of all"
        found.append(Lever("chunk", ({"train.loss_chunk": chunk},), why, ("train",)))
    smaller = [recipe.eval.batch_tokens >> n for n in range(1, 12)]
    rungs = tuple({"eval.batch_tokens": n} for n in smaller if n >= min(recipe.data.max_length, 256))
    if rungs:
        found.append(Lever("evaluation", rungs, "evaluation reads fewer rows at once; what it measures stays", ("evaluate",)))
    rungs = tuple(
        {"train.micro_batch": n, "train.accumulation": train.accumulation * batch // n}
        for n in range(batch - 1, 0, -1)
        if batch % n == 0
    )
    if rungs:
        why = f"the same {batch * train.accumulation} rows a step, fewer of them at once"
        found.append(Lever("rows", rungs, why, ("train",)))
    if not train.checkpointing:
        why = "activations are computed again in the backward pass"
        found.append(Lever("checkpointing", ({"train.checkpointing": True},), why, ("train",)))
    if train.optimizer == "adamw":
        why = "Adam's states take 2 bytes a parameter, not 8"
        found.append(Lever("states", ({"train.optimizer": "adamw_8bit"},), why))
    if not recipe.base_frozen:
        if not train.stochastic_rounding:
            # `auto` leaves the choice to us; a dtype that was asked for is kept.
            keys: dict[str, Any] = {"model.dtype": "bf16"} if recipe.model.dtype == "auto" else {}
            why = "weights are bf16 without an fp32 copy, and updates rounded stochastically"
            found.append(Lever("weights", (keys | {"train.stochastic_rounding": True},), why))
        if not train.optimizer_in_backward:
            why = "each gradient is used and freed at once"
            keys = {"train.optimizer_in_backward": True}  # which cannot take a step back
            if train.on_bad_step == "skip":
                keys |= {"train.on_bad_step": "rollback"}
            found.append(Lever("gradients", (keys,), why, ("train",), instead_of=("rows",)))
    if kind == "cuda" and train.optimizer != "paged_adamw_8bit":
        why = "Adam's states take 2 bytes a parameter, and may wait in the CPU's memory"
        found.append(Lever("states", ({"train.optimizer": "paged_adamw_8bit"},), why))
    if kind == "cuda" and train.checkpointing != "offload":
        why = "activations are computed again, and each layer's input waits in the CPU's memory"
        found.append(Lever("checkpointing", ({"train.checkpointing": "offload"},), why, ("train",)))
    if recipe.base_frozen and recipe.model.offload_layers == "none":
        place, where = ("memory", "in the CPU's memory") if kind == "cuda" else ("disk", "on the disk")
        why = f"the frozen layers wait {where} and come one ahead"
        found.append(Lever("layers", ({"model.offload_layers": place},), why, needs=("train.checkpointing",)))
    return found


# ---------------------------------------------------------------------------------------------------------------- the search

Pulled = dict[int, int]  # lever, by its place among all → rung


class _Search:
    def __init__(self, recipe: Recipe, budget_bytes: int, plan_of: PlanOf, kind: str) -> None:
        self.recipe, self.budget, self.plan_of = recipe, budget_bytes, plan_of
        self.levers = levers(recipe, kind)
        self.plans: dict[str, Plan | None] = {}
        self.refused: dict[str, str] = {}
        self.first = plan_of(recipe)  # what is wrong with the recipe itself is told as it is
        self.plans[recipe.model_dump_json()] = self.first

    def build(self, pulled: Pulled) -> Recipe | None:
        """The recipe with these levers pulled; None where the schema refuses it."""
        content = self.recipe.model_dump()
        for place in sorted(pulled):
            lever = self.levers[place]
            for key in lever.needs:
                section, leaf = key.split(".")
                content[section][leaf] = content[section][leaf] or True
            for key, value in lever.rungs[pulled[place]].items():
                section, leaf = key.split(".")
                content[section][leaf] = value
        try:
            return Recipe.model_validate(content)
        except ValidationError:
            return None

    def planned(self, recipe: Recipe | None) -> Plan | None:
        """Its plan; None where there is no such recipe, or it cannot be run on this device."""
        if recipe is None:
            return None
        key = recipe.model_dump_json()
        if key not in self.plans:
            try:
                self.plans[key] = self.plan_of(recipe)
            except UserError as mistake:
                self.plans[key] = None
                made = ", ".join(f"{name}={new}" for name, (_, new) in differences(self.recipe, recipe).items())
                self.refused[mistake.message] = f"{made}: {mistake.message}"
        return self.plans[key]

    def plan(self, pulled: Pulled) -> Plan | None:
        return self.planned(self.build(pulled))

    def fits(self, plan: Plan | None) -> bool:
        return plan is not None and plan.peak_bytes <= self.budget

    def least(self, recipes: Sequence[Recipe | None]) -> int:
        """The place of the first that fits, of recipes that need ever less; the last one is known to fit."""
        low, high = 0, len(recipes) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.planned(recipes[middle])):
                high = middle
            else:
                low = middle + 1
        return high

    def add(self) -> Pulled:
        """Pull one lever after the other until it fits, those that help; again where another phase has become the highest."""
        pulled: Pulled = {}
        plan, moved = self.first, True
        while moved and not self.fits(plan):
            moved = False
            for place, lever in enumerate(self.levers):
                same = [other for other in pulled if self.levers[other].name == lever.name]
                if any(other >= place for other in same) or (lever.phases and plan.highest.name not in lever.phases):
                    continue
                kept = {
                    other: rung
                    for other, rung in pulled.items()
                    if other not in same and self.levers[other].name not in lever.instead_of
                }
                last = len(lever.rungs) - 1
                tried = self.plan(kept | {place: last})
                if tried is None or _load(tried, self.budget) >= _load(plan, self.budget):
                    continue
                if self.fits(tried):
                    return kept | {place: self.least([self.build(kept | {place: rung}) for rung in range(last + 1)])}
                pulled, plan, moved = kept | {place: last}, tried, True
        return pulled

    def remove(self, pulled: Pulled) -> Pulled:
        """Of what fits, take back what is not needed, the costliest first: wholly, or as far as it can be."""
        for place in sorted(pulled, reverse=True):
            rest = {other: rung for other, rung in pulled.items() if other != place}
            family = [(other, rung) for other in range(place + 1) if self.levers[other].name == self.levers[place].name
                      for rung in range(len(self.levers[other].rungs))]  # fmt: skip
            family = family[: family.index((place, pulled[place])) + 1]
            ways = [rest | {other: rung} for other, rung in family]
            if not any(key in self.levers[place].rungs[0] for other in rest for key in self.levers[other].needs):
                ways.insert(0, rest)
            pulled = ways[self.least([self.build(way) for way in ways])]
        return pulled

    def steps(self, pulled: Pulled) -> list[Change]:
        """The levers one after the other, each with what it saved and cost. Two that go together only are one step."""
        changes: list[Change] = []
        done: Pulled = {}
        recipe, plan, why = self.recipe, self.first, ""
        for place in sorted(pulled):
            done = done | {place: pulled[place]}
            why = f"{why}; {self.levers[place].why}" if why else self.levers[place].why
            changed = self.build(done)
            after = self.planned(changed)
            if changed is None or after is None:
                continue
            changes.append(
                Change(differences(recipe, changed), why, (plan.peak_bytes, after.peak_bytes), (plan.seconds, after.seconds))
            )
            recipe, plan, why = changed, after, ""
        return changes

    def shorter(self, recipe: Recipe) -> int | None:
        """The longest data.max_length below the recipe's with which it fits, or None."""
        length = recipe.data.max_length
        parts = {length * part // EIGHTHS for part in range(1, EIGHTHS)}
        lengths = sorted({part // SHORTEST * SHORTEST for part in parts} - {0, length}, reverse=True)

        recipes = [recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": n})}) for n in lengths]
        if not recipes or not self.fits(self.planned(recipes[-1])):
            return None
        return lengths[self.least(recipes)]


def _load(plan: Plan, budget_bytes: int) -> tuple[int, int]:
    """What a change must lower to help: the peak; of equal ones, what all phases need above the budget."""
    return plan.peak_bytes, sum(max(0, phase.peak_bytes - budget_bytes) for phase in plan.phases)


def fit(recipe: Recipe, budget_bytes: int, plan_of: PlanOf, *, kind: str) -> Fit:
    """Change `recipe` until its plan fits into `budget_bytes`.

    plan_of: recipe → plan, on the device that is planned for. kind: of that device (cuda, cpu, mps),
    which decides what there is to change.

    Raises:
        UserError: of plan_of, for the recipe as it is.
    """
    search = _Search(recipe, budget_bytes, plan_of, kind)
    if search.fits(search.first):
        return Fit(recipe, search.first, search.first, [], True, budget_bytes)
    pulled = search.add()
    changed = search.build(pulled)
    plan = search.planned(changed)
    assert changed is not None
    assert plan is not None
    if search.fits(plan):
        pulled = search.remove(pulled)
        changed = search.build(pulled)
        plan = search.planned(changed)
        assert changed is not None
        assert plan is not None
        return Fit(changed, plan, search.first, search.steps(pulled), True, budget_bytes, refused=[*search.refused.values()])
    proposal = search.shorter(changed)
    return Fit(
        recipe=changed,
        plan=plan,
        before=search.first,
        steps=search.steps(pulled),
        fits=False,
        budget_bytes=budget_bytes,
        proposal=proposal,
        smallest_bytes=plan.peak_bytes,
        refused=[*search.refused.values()],
    )
