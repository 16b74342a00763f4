"""Changing a recipe until its plan fits into a memory budget.

Cheap changes are tried first: a chunked loss, smaller micro-batches (same batch per step), gradient checkpointing, 8-bit
optimizer states, weights without an fp32 copy, the optimizer in the backward pass; then optimizer states, activations and layers
in CPU memory. Changes are added in that order until the plan fits; then unnecessary ones are removed, the most expensive
first. The data is never changed: a shorter data.max_length is only proposed to the user.

A plan takes seconds. Therefore a change with several values (micro-batches of 8, 4, 2, 1) is tried at its last value first and
then bisected, a change is tried only if it affects the highest phase, and no recipe is planned twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetune.errors import UserError
from finetune.planning.result import Plan
from finetune.recipe import Recipe, Train, differences

SHORTEST = 64  # the shortest data.max_length to propose, in tokens
EIGHTHS = 8  # proposed values of data.max_length are multiples of this fraction of the recipe's
PlanOf = Callable[[Recipe], Plan]


@dataclass(frozen=True)
class Change:
    """A change of a recipe. keys: {key: (old, new)}; peak_bytes, seconds of the run: (before, after), after earlier changes."""

    keys: dict[str, tuple[Any, Any]]
    why: str
    peak_bytes: tuple[int, int]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """Result of fitting a recipe.

    recipe, plan: after all `steps`, which are all changes that help if it does not fit. before: the original plan.
    smallest_bytes: the lowest peak that was reached, if it does not fit. proposal: a data.max_length (tokens) with which it would
    fit, or None. refused: changes that are not possible here, with the reason.
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
        """{key: (old, new)} of all changed keys."""
        changed: dict[str, tuple[Any, Any]] = {}
        for step in self.steps:
            for key, (old, new) in step.keys.items():
                changed[key] = (changed[key][0] if key in changed else old, new)
        return changed

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `changes`: the steps; `keys`: the values to write into the recipe."""
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
    """A change that lowers memory.

    name: of levers with the same name only one is active; a later one replaces an earlier. rungs: new values by key, from the
    smallest change to the largest. phases: those it affects; empty: all. needs: keys that are set to true with it. instead_of:
    names of levers that it excludes.
    """

    name: str
    rungs: tuple[dict[str, Any], ...]
    why: str
    phases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    instead_of: tuple[str, ...] = ()


def levers(recipe: Recipe, device_type: str) -> list[Lever]:
    """Possible changes of `recipe` on such a device, the cheapest first. The schema may still refuse one."""
    train, batch = recipe.train, recipe.train.micro_batch
    possible: list[Lever] = []
    chunk = Train.model_fields["loss_chunk"].default
    if train.loss_chunk == 0 or train.loss_chunk > chunk:
        why = f"chunked loss: logits of only {chunk} tokens exist at a time"
        possible.append(Lever("chunk", ({"train.loss_chunk": chunk},), why, ("train",)))
    smaller = [recipe.eval.batch_tokens >> n for n in range(1, 12)]
    rungs = tuple({"eval.batch_tokens": n} for n in smaller if n >= min(recipe.data.max_length, 256))
    if rungs:
        possible.append(Lever("evaluation", rungs, "smaller batches in evaluation; its results stay the same", ("evaluate",)))
    rungs = tuple(
        {"train.micro_batch": n, "train.accumulation": train.accumulation * batch // n}
        for n in range(batch - 1, 0, -1)
        if batch % n == 0
    )
    if rungs:
        why = f"smaller micro-batches; still {batch * train.accumulation} sequences per step"
        possible.append(Lever("rows", rungs, why, ("train",)))
    if not train.checkpointing:
        why = "activations are recomputed in the backward pass"
        possible.append(Lever("checkpointing", ({"train.checkpointing": True},), why, ("train",)))
    if train.optimizer == "adamw":
        why = "Adam's states take 2 instead of 8 bytes per parameter"
        possible.append(Lever("states", ({"train.optimizer": "adamw_8bit"},), why))
    if not recipe.base_frozen:
        if not train.stochastic_rounding:
            # an explicit dtype is kept
            keys: dict[str, Any] = {"model.dtype": "bf16"} if recipe.model.dtype == "auto" else {}
            why = "bf16 weights without an fp32 copy, with stochastic rounding"
            possible.append(Lever("weights", (keys | {"train.stochastic_rounding": True},), why))
        if not train.optimizer_in_backward:
            why = "each gradient is applied and freed during the backward pass"
            keys = {"train.optimizer_in_backward": True}  # cannot skip a bad step
            if train.on_bad_step == "skip":
                keys |= {"train.on_bad_step": "rollback"}
            possible.append(Lever("gradients", (keys,), why, ("train",), instead_of=("rows",)))
    if device_type == "cuda" and train.optimizer != "paged_adamw_8bit":
        why = "Adam's states take 2 bytes per parameter and may be paged out to CPU memory"
        possible.append(Lever("states", ({"train.optimizer": "paged_adamw_8bit"},), why))
    if device_type == "cuda" and train.checkpointing != "offload":
        why = "activations are recomputed, and each layer's input is kept in CPU memory"
        possible.append(Lever("checkpointing", ({"train.checkpointing": "offload"},), why, ("train",)))
    if recipe.base_frozen and recipe.model.offload_layers == "none":
        location, where = ("memory", "in CPU memory") if device_type == "cuda" else ("disk", "on disk")
        why = f"frozen layers are kept {where} and loaded one ahead"
        possible.append(Lever("layers", ({"model.offload_layers": location},), why, needs=("train.checkpointing",)))
    return possible


# ---------------------------------------------------------------------------------------------------------------- the search

Pulled = dict[int, int]  # {index of a lever: index of its rung}


class _Search:
    """The search for a combination of levers that fits; plans are cached by recipe."""

    def __init__(self, recipe: Recipe, budget_bytes: int, plan_of: PlanOf, device_type: str) -> None:
        self.recipe, self.budget, self.plan_of = recipe, budget_bytes, plan_of
        self.levers = levers(recipe, device_type)
        self.plans: dict[str, Plan | None] = {}
        self.refused: dict[str, str] = {}
        self.first = plan_of(recipe)  # errors of the recipe itself are raised here
        self.plans[recipe.model_dump_json()] = self.first

    def build(self, pulled: Pulled) -> Recipe | None:
        """The recipe with these levers applied; None if the schema refuses it."""
        content = self.recipe.model_dump()
        for index in sorted(pulled):
            lever = self.levers[index]
            for key in lever.needs:
                section, leaf = key.split(".")
                content[section][leaf] = content[section][leaf] or True
            for key, value in lever.rungs[pulled[index]].items():
                section, leaf = key.split(".")
                content[section][leaf] = value
        try:
            return Recipe.model_validate(content)
        except ValidationError:
            return None

    def planned(self, recipe: Recipe | None) -> Plan | None:
        """The recipe's plan; None if there is no recipe, or it cannot run on this device."""
        if recipe is None:
            return None
        key = recipe.model_dump_json()
        if key not in self.plans:
            try:
                self.plans[key] = self.plan_of(recipe)
            except UserError as error:
                self.plans[key] = None
                changed = ", ".join(f"{name}={new}" for name, (_, new) in differences(self.recipe, recipe).items())
                self.refused[error.message] = f"{changed}: {error.message}"
        return self.plans[key]

    def plan(self, pulled: Pulled) -> Plan | None:
        return self.planned(self.build(pulled))

    def fits(self, plan: Plan | None) -> bool:
        return plan is not None and plan.peak_bytes <= self.budget

    def least(self, recipes: Sequence[Recipe | None]) -> int:
        """The index of the first recipe that fits, by bisection; memory decreases along `recipes`, and the last one fits."""
        low, high = 0, len(recipes) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.planned(recipes[middle])):
                high = middle
            else:
                low = middle + 1
        return high

    def add(self) -> Pulled:
        """Apply levers that help, one after another, until the plan fits; start again when another phase becomes the highest."""
        pulled: Pulled = {}
        plan, moved = self.first, True
        while moved and not self.fits(plan):
            moved = False
            for index, lever in enumerate(self.levers):
                same = [other for other in pulled if self.levers[other].name == lever.name]
                if any(other >= index for other in same) or (lever.phases and plan.highest.name not in lever.phases):
                    continue
                kept = {
                    other: rung
                    for other, rung in pulled.items()
                    if other not in same and self.levers[other].name not in lever.instead_of
                }
                last = len(lever.rungs) - 1
                tried = self.plan(kept | {index: last})
                if tried is None or _load(tried, self.budget) >= _load(plan, self.budget):
                    continue
                if self.fits(tried):
                    return kept | {index: self.least([self.build(kept | {index: rung}) for rung in range(last + 1)])}
                pulled, plan, moved = kept | {index: last}, tried, True
        return pulled

    def remove(self, pulled: Pulled) -> Pulled:
        """Undo levers that are not needed, the most expensive first: completely, or as far as possible."""
        for index in sorted(pulled, reverse=True):
            rest = {other: rung for other, rung in pulled.items() if other != index}
            family = [(other, rung) for other in range(index + 1) if self.levers[other].name == self.levers[index].name
                      for rung in range(len(self.levers[other].rungs))]  # fmt: skip
            family = family[: family.index((index, pulled[index])) + 1]
            ways = [rest | {other: rung} for other, rung in family]
            if not any(key in self.levers[index].rungs[0] for other in rest for key in self.levers[other].needs):
                ways.insert(0, rest)
            pulled = ways[self.least([self.build(way) for way in ways])]
        return pulled

    def steps(self, pulled: Pulled) -> list[Change]:
        """The changes one after another, with their savings and costs. Levers that only work together form one step."""
        changes: list[Change] = []
        done: Pulled = {}
        recipe, plan, why = self.recipe, self.first, ""
        for index in sorted(pulled):
            done = done | {index: pulled[index]}
            why = f"{why}; {self.levers[index].why}" if why else self.levers[index].why
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
    """What a change must lower to help: the peak, then the sum of all phases' excess over the budget."""
    return plan.peak_bytes, sum(max(0, phase.peak_bytes - budget_bytes) for phase in plan.phases)


def fit(recipe: Recipe, budget_bytes: int, plan_of: PlanOf, *, device_type: str) -> Fit:
    """Change `recipe` until its plan fits into `budget_bytes`.

    plan_of: plans a recipe on the target device. device_type: cuda, cpu or mps, which decides the possible changes.

    Raises:
        UserError: from plan_of, for the unchanged recipe.
    """
    search = _Search(recipe, budget_bytes, plan_of, device_type)
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
