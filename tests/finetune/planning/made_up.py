"""Plans by a formula that anyone can follow, for tests of what is done with plans."""

from __future__ import annotations

from finetune.errors import UserError
from finetune.planning.result import Phase, Plan
from finetune.recipe import Recipe

VOCABULARY, LAYERS, WIDTH = 32_000, 16, 2048
PARAMETERS, ADAPTERS = 1_000_000_000, 20_000_000


def recipe(**sections: object) -> Recipe:
    """A LoRA recipe with these keys: train={"micro_batch": 4}, …"""
    content: dict[str, object] = {
        "model": {"name": "some/model", "dtype": "bf16"},
        "data": {"path": "rows.jsonl", "max_length": 1024},
    }
    for name, keys in sections.items():
        content[name] = {**content.get(name, {}), **keys} if isinstance(keys, dict) else keys  # type: ignore[dict-item]
    return Recipe.model_validate(content)


class Planner:
    """plan_of, and how often it was asked. `impossible`: keys and values with which nothing runs here."""

    def __init__(self, budget_bytes: int, **impossible: object) -> None:
        self.budget, self.impossible, self.asked = budget_bytes, impossible, []  # type: ignore[var-annotated]

    def __call__(self, recipe: Recipe) -> Plan:
        self.asked.append(recipe)
        for name, value in self.impossible.items():
            section, leaf = name.split("__")
            if getattr(getattr(recipe, section), leaf) == value:
                raise UserError(f"no {leaf}: {value} here")
        return made_up(recipe, self.budget)


def made_up(recipe: Recipe, budget_bytes: int) -> Plan:
    """Weights of a model with 1 B parameters, its states, activations and logits, each as the recipe says."""
    train, full = recipe.train, recipe.adapter.kind == "none"
    rows = train.micro_batch * recipe.data.max_length
    trainable = PARAMETERS if full else ADAPTERS
    narrow = train.stochastic_rounding or not full
    base = PARAMETERS * (2 if narrow else 4)
    frozen = base if recipe.model.offload_layers == "none" else base // LAYERS * 2
    weights = {"weights (bf16)": frozen} | ({} if full else {"adapters": 4 * ADAPTERS})
    states = trainable * {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}[train.optimizer]
    gradients = trainable * (2 if full and narrow else 4) // (LAYERS if train.optimizer_in_backward else 1)
    kept = {False: 17, True: 1, "offload": 0}[train.checkpointing]
    activations = rows * WIDTH * 2 * LAYERS * kept + (rows * WIDTH * 2 * 17 if train.checkpointing else 0)
    logits = 4 * VOCABULARY * (min(rows, train.loss_chunk) if train.loss_chunk else rows) * 2
    terms = weights | {"gradients": gradients, "optimizer": states, "activations": activations, "logits": logits}
    reading = max(recipe.eval.batch_tokens, recipe.data.max_length) * WIDTH * 2 * 8
    step = 1.0 * train.accumulation * rows / 1024 * (1.33 if train.checkpointing else 1) + 0.05 * train.accumulation
    step += 0.5 * (train.checkpointing == "offload") + 1.0 * (recipe.model.offload_layers != "none")
    phases = [
        Phase("load", sum(weights.values()), 10.0, weights),
        Phase("evaluate", sum(weights.values()) + states + reading, 30.0, weights | {"optimizer": states, "workspace": reading}),
        Phase("train", sum(terms.values()), 100 * step, terms, base - frozen),
        Phase("save", sum(weights.values()), 1.0, weights),
    ]
    return Plan(
        recipe="made-up", device="rtx-4070", budget_bytes=budget_bytes, phases=phases, parameters=PARAMETERS, trainable=trainable,
        steps=100, tokens_per_step=rows * train.accumulation, step_seconds=step, flops=6.0 * PARAMETERS * 100 * rows, watts=200.0,
        price_per_kwh=recipe.plan.price_per_kwh, notes=["Lengths are those of the worst batch: every row is full."],
        traced={"layers": 4, "of": LAYERS, "extrapolated": True},
    )  # fmt: skip
