"""Plans from a simple memory formula, for tests of code that uses plans."""

from __future__ import annotations

from finetune.errors import UserError
from finetune.planning.result import Phase, Plan
from finetune.recipe import Recipe

VOCABULARY, LAYERS, WIDTH = 32_000, 16, 2048
PARAMETERS, ADAPTERS = 1_000_000_000, 20_000_000


def recipe(**sections: object) -> Recipe:
    """A LoRA recipe with these keys changed, such as train={"micro_batch": 4}."""
    content: dict[str, object] = {
        "model": {"name": "some/model", "dtype": "bf16"},
        "data": {"path": "rows.jsonl", "max_length": 1024},
    }
    for name, keys in sections.items():
        content[name] = {**content.get(name, {}), **keys} if isinstance(keys, dict) else keys  # type: ignore[dict-item]
    return Recipe.model_validate(content)


class Planner:
    """A `plan_of` that records the recipes it plans. `impossible`: values (section__key=value) that raise a UserError."""

    def __init__(self, budget_bytes: int, **impossible: object) -> None:
        self.budget, self.impossible, self.recipes = budget_bytes, impossible, []  # type: ignore[var-annotated]

    def __call__(self, recipe: Recipe) -> Plan:
        self.recipes.append(recipe)
        for name, value in self.impossible.items():
            section, leaf = name.split("__")
            if getattr(getattr(recipe, section), leaf) == value:
                raise UserError(f"no {leaf}: {value} here")
        return formula_plan(recipe, self.budget)


def formula_plan(recipe: Recipe, budget_bytes: int) -> Plan:
    """A model of 1 B parameters: weights, optimizer states, activations and logits, with the recipe's settings."""
    train, full = recipe.train, recipe.adapter.kind == "none"
    rows = train.micro_batch * recipe.data.max_length
    trainable = PARAMETERS if full else ADAPTERS
    low_precision = train.stochastic_rounding or not full
    base = PARAMETERS * (2 if low_precision else 4)
    frozen = base if recipe.model.offload_layers == "none" else base // LAYERS * 2
    weights = {"weights (bf16)": frozen} | ({} if full else {"adapters": 4 * ADAPTERS})
    states = trainable * {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}[train.optimizer]
    gradients = trainable * (2 if full and low_precision else 4) // (LAYERS if train.optimizer_in_backward else 1)
    stored = {False: 17, True: 1, "offload": 0}[train.checkpointing]
    activations = rows * WIDTH * 2 * LAYERS * stored + (rows * WIDTH * 2 * 17 if train.checkpointing else 0)
    logits = 4 * VOCABULARY * (min(rows, train.loss_chunk) if train.loss_chunk else rows) * 2
    terms = weights | {"gradients": gradients, "optimizer": states, "activations": activations, "logits": logits}
    evaluation = max(recipe.eval.batch_tokens, recipe.data.max_length) * WIDTH * 2 * 8
    step = 1.0 * train.accumulation * rows / 1024 * (1.33 if train.checkpointing else 1) + 0.05 * train.accumulation
    step += 0.5 * (train.checkpointing == "offload") + 1.0 * (recipe.model.offload_layers != "none")
    phases = [
        Phase("load", sum(weights.values()), 10.0, weights),
        Phase(
            "evaluate",
            sum(weights.values()) + states + evaluation,
            30.0,
            weights | {"optimizer": states, "workspace": evaluation},
        ),
        Phase("train", sum(terms.values()), 100 * step, terms, base - frozen),
        Phase("save", sum(weights.values()), 1.0, weights),
    ]
    return Plan(
        recipe="made-up", device="rtx-4070", budget_bytes=budget_bytes, phases=phases, parameters=PARAMETERS, trainable=trainable,
        steps=100, tokens_per_step=rows * train.accumulation, step_seconds=step, flops=6.0 * PARAMETERS * 100 * rows, watts=200.0,
        price_per_kwh=recipe.plan.price_per_kwh, notes=["Lengths are those of the worst batch: every row is full."],
        traced={"layers": 4, "of": LAYERS, "extrapolated": True},
    )  # fmt: skip
