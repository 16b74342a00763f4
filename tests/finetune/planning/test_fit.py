"""A recipe made to fit: what costs least comes first, nothing unneeded stays, nothing forbidden is tried."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from finetune.errors import UserError
from finetune.planning.fit import fit, levers
from finetune.planning.result import Plan
from finetune.recipe import Recipe
from finetune.units import GIB
from tests.finetune.planning.made_up import Planner, made_up, recipe

FULL = {"adapter": {"kind": "none"}, "train": {"save_steps": 100}}


def fitted(before: Recipe, gib: float, kind: Any = "cuda") -> Any:
    planner = Planner(int(gib * GIB))
    made = fit(before, planner.budget, planner, device_type=kind)
    dumped = [asked.model_dump_json() for asked in planner.asked]
    assert len(dumped) == len(set(dumped)), "a recipe was planned twice"
    return made, planner


def test_what_fits_is_left_alone_and_planned_once() -> None:
    before = recipe()
    made, planner = fitted(before, 24)
    assert made.fits
    assert (made.recipe, made.steps, made.keys) == (before, [], {})
    assert len(planner.asked) == 1


def test_the_chunked_loss_comes_first() -> None:
    made, _ = fitted(recipe(train={"loss_chunk": 0}), 3.4)
    assert made.keys == {"train.loss_chunk": (0, 256)}


def test_the_largest_micro_batch_that_fits_with_the_same_rows_a_step() -> None:
    before = recipe(train={"micro_batch": 12, "accumulation": 2})
    made, planner = fitted(before, 7)
    train = made.recipe.train
    assert set(made.keys) == {"train.micro_batch", "train.accumulation"}
    assert train.micro_batch * train.accumulation == 24
    fits = [n for n in (6, 4, 3, 2, 1) if made_up(recipe(train={"micro_batch": n}), 0).peak_bytes <= 7 * GIB]
    assert train.micro_batch == fits[0]
    assert 1 < train.micro_batch < 6  # or this test would show nothing
    assert len(planner.asked) <= 7


def test_an_earlier_change_that_turned_out_unnecessary_goes() -> None:
    """With one row at once it does not fit, with checkpointing it does, and then without giving up any row."""
    before = recipe(train={"micro_batch": 2})
    budget = made_up(recipe(train={"micro_batch": 2, "checkpointing": True}), 0).peak_bytes
    assert made_up(recipe(train={"micro_batch": 1}), 0).peak_bytes > budget
    made, _ = fitted(before, budget / GIB)
    assert made.keys == {"train.checkpointing": (False, True)}
    assert made.recipe.train.micro_batch == 2


def test_a_change_is_taken_back_as_far_as_it_can_be() -> None:
    before = recipe(train={"micro_batch": 64})
    budget = made_up(recipe(train={"micro_batch": 8, "checkpointing": True}), 0).peak_bytes
    assert made_up(recipe(), 0).peak_bytes > budget  # one row at once is not enough, so all were given up at first
    made, _ = fitted(before, budget / GIB)
    assert made.keys["train.micro_batch"] == (64, 8)
    assert made.keys["train.accumulation"] == (1, 8)
    assert made.keys["train.checkpointing"] == (False, True)


@pytest.mark.parametrize("gib", [2.1, 2.2, 2.3, 2.5, 2.8, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_no_change_could_be_left_out(gib: float, kind: str) -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0}, eval={"batch_tokens": 8192})
    made, _ = fitted(before, gib, kind)
    assert made.fits, made.smallest_bytes / GIB
    groups = [list(step.keys) for step in made.steps]
    for left_out in range(len(groups)):
        content = before.model_dump()
        for key in itertools.chain(*(group for n, group in enumerate(groups) if n != left_out)):
            section, leaf = key.split(".")
            content[section][leaf] = made.keys[key][1]
        try:
            other = Recipe.model_validate(content)
        except ValueError:
            continue  # layers cannot be streamed without checkpointing
        assert made_up(other, 0).peak_bytes > gib * GIB, groups[left_out]


def test_each_step_says_what_it_saved_and_cost() -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0})
    made, planner = fitted(before, 2.6)
    assert len(made.steps) >= 2
    assert made.steps[0].peak_bytes[0] == planner(before).peak_bytes
    assert made.steps[-1].peak_bytes[1] == made.plan.peak_bytes == planner(made.recipe).peak_bytes
    for step, after in itertools.pairwise(made.steps):
        assert step.peak_bytes[1] == after.peak_bytes[0]
        assert step.seconds[1] == after.seconds[0]
    assert all(step.peak_bytes[1] < step.peak_bytes[0] for step in made.steps)
    assert made.steps[-1].seconds[1] == made.plan.seconds > made.before.seconds
    assert made.before.peak_bytes > 2.6 * GIB


def test_evaluation_is_made_smaller_where_it_is_the_highest() -> None:
    before = recipe(train={"micro_batch": 2, "loss_chunk": 0}, eval={"batch_tokens": 262_144})
    assert made_up(before, 0).highest.name == "evaluate"
    made, planner = fitted(before, 5)
    assert set(made.keys) == {"eval.batch_tokens"}
    assert made.keys["eval.batch_tokens"][1] == 65536  # the largest that fits
    # What acts on training alone could not have helped, and was not planned.
    assert all((asked.train.loss_chunk, asked.train.micro_batch) == (0, 2) for asked in planner.asked)


def test_nothing_is_offloaded_or_paged_on_a_cpu() -> None:
    made, planner = fitted(recipe(train={"micro_batch": 4}), 0.1, "cpu")
    assert not made.fits
    for asked in planner.asked:
        assert asked.train.checkpointing != "offload"
        assert asked.train.optimizer != "paged_adamw_8bit"
        assert asked.model.offload_layers in ("none", "disk")
    assert made.recipe.model.offload_layers == "disk"


def test_on_a_gpu_layers_are_streamed_from_memory_with_checkpointing() -> None:
    made, _ = fitted(recipe(), 1.5)
    assert made.fits
    assert made.keys["model.offload_layers"] == ("none", "memory")
    assert made.recipe.train.checkpointing
    assert made.steps[-1].keys["model.offload_layers"] == ("none", "memory")


def test_layers_are_streamed_where_the_weights_alone_are_too_much() -> None:
    """Checkpointing helps nothing by itself there, and comes along."""

    def plan_of(recipe: Recipe) -> Plan:
        plan = made_up(recipe, GIB)
        return replace(plan, phases=[plan.phase("load")])

    made = fit(recipe(), GIB, plan_of, device_type="cuda")
    assert made.fits
    assert made.keys == {"model.offload_layers": ("none", "memory"), "train.checkpointing": (False, True)}
    assert len(made.steps) == 1


def test_what_helps_nothing_is_left_alone_even_where_nothing_fits() -> None:
    """A row of 128 tokens has no more logits than a chunk of 256."""
    before = recipe(data={"max_length": 128}, train={"loss_chunk": 0}, eval={"batch_tokens": 128})
    made, _ = fitted(before, 0.1)
    assert not made.fits
    assert set(made.keys) == {"train.checkpointing", "train.optimizer", "model.offload_layers"}


def test_of_two_unnecessary_changes_the_costlier_goes() -> None:
    before = recipe(data={"max_length": 512}, train={"loss_chunk": 0, "checkpointing": True}, eval={"batch_tokens": 256})
    streamed = {"model": {"offload_layers": "disk"}, "data": {"max_length": 512}}
    either = [
        made_up(recipe(**streamed, train={"checkpointing": True, **train}), 0).peak_bytes
        for train in ({"loss_chunk": 256}, {"loss_chunk": 0, "optimizer": "adamw_8bit"})
    ]
    made, _ = fitted(before, max(either) / GIB, "cpu")
    assert made.keys == {"train.loss_chunk": (0, 256), "model.offload_layers": ("none", "disk")}


def test_where_nothing_is_enough_the_smallest_is_told_and_a_length_proposed() -> None:
    before = recipe(data={"max_length": 4096}, train={"checkpointing": "offload", "optimizer": "paged_adamw_8bit"},
                    model={"offload_layers": "memory"}, eval={"batch_tokens": 256})  # fmt: skip
    peak = made_up(before, 0).peak_bytes
    made, _ = fitted(before, 0.75 * peak / GIB)
    assert not made.fits
    assert made.smallest_bytes == made.plan.peak_bytes == peak
    assert made.recipe.data.max_length == 4096  # proposed, never changed
    assert made.proposal is not None
    assert made_up(before.model_copy(update={"data": before.data.model_copy(update={"max_length": made.proposal})}),
                   0).peak_bytes <= 0.75 * peak  # fmt: skip
    longer = before.model_copy(update={"data": before.data.model_copy(update={"max_length": made.proposal + 512})})
    assert made_up(longer, 0).peak_bytes > 0.75 * peak
    hopeless, _ = fitted(before, 0.01)
    assert hopeless.proposal is None
    assert hopeless.smallest_bytes == peak


def test_what_cannot_fit_is_as_small_as_any_combination() -> None:
    """Against all combinations of all changes."""
    before = recipe(train={"micro_batch": 4, "loss_chunk": 0}, eval={"batch_tokens": 8192})
    made, planner = fitted(before, 0.05)
    keys = {"train.loss_chunk": (0, 256), "train.micro_batch": (4, 2, 1), "train.checkpointing": (False, True, "offload"),
            "train.optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"), "model.offload_layers": ("none", "memory"),
            "eval.batch_tokens": (8192, 256)}  # fmt: skip
    least = min(
        made_up(candidate, 0).peak_bytes
        for values in itertools.product(*keys.values())
        if (candidate := _with(before, dict(zip(keys, values, strict=True)))) is not None
    )
    assert made.smallest_bytes == least
    assert len(planner.asked) < 25


def _with(before: Recipe, keys: dict[str, Any]) -> Recipe | None:
    content = before.model_dump()
    for key, value in keys.items():
        section, leaf = key.split(".")
        content[section][leaf] = value
    try:
        return Recipe.model_validate(content)
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------- the recipe's own rules


def test_rows_stay_where_the_step_is_taken_in_the_backward_pass() -> None:
    train = {"micro_batch": 8, "optimizer_in_backward": True, "max_grad_norm": 0, "save_steps": 10}
    made, planner = fitted(recipe(adapter={"kind": "none"}, train=train), 5)
    assert all((asked.train.micro_batch, asked.train.accumulation) == (8, 1) for asked in planner.asked)
    assert "train.micro_batch" not in made.keys


def test_a_step_in_the_backward_pass_in_place_of_fewer_rows() -> None:
    before = recipe(adapter={"kind": "none"}, train={"micro_batch": 2, "max_grad_norm": 0, "save_steps": 10, "optimizer":
                    "paged_adamw_8bit", "stochastic_rounding": True, "checkpointing": True})  # fmt: skip
    made, _ = fitted(before, 2.6)
    assert made.fits
    assert made.keys == {"train.optimizer_in_backward": (False, True), "train.on_bad_step": ("skip", "rollback")}


def test_weights_lose_their_fp32_copy_only_where_the_dtype_allows_it() -> None:
    small = 7.5
    asked_for = recipe(**FULL, model={"dtype": "fp32"})
    made, planner = fitted(asked_for, small)
    assert not any(asked.train.stochastic_rounding for asked in planner.asked)
    left_open = recipe(**FULL, model={"dtype": "auto"})
    made, _ = fitted(left_open, small)
    assert made.fits
    assert made.keys["train.stochastic_rounding"] == (False, True)
    assert made.keys["model.dtype"] == ("auto", "bf16")


def test_a_frozen_base_has_no_weights_to_round_and_full_training_no_layers_to_stream() -> None:
    adapters = {lever.name for lever in levers(recipe(), "cuda")}
    full = {lever.name for lever in levers(recipe(**FULL), "cuda")}
    assert not adapters & {"weights", "gradients"}
    assert "layers" in adapters
    assert "layers" not in full
    assert {"weights", "gradients"} <= full


def test_with_a_teacher_only_what_the_schema_takes() -> None:
    before = Recipe.model_validate(
        {
            "kind": "pretrain", "model": {"name": "some/model"}, "quant": {"scheme": "ternary"},
            "distill": {"teacher": "other/model"}, "data": {"path": "text.txt"},
            "train": {"max_steps": 10, "micro_batch": 4},
        }
    )  # fmt: skip
    made, planner = fitted(before, 1)
    assert all(asked.train.loss_chunk == 256 for asked in planner.asked)
    assert not made.fits


def test_what_cannot_run_here_is_skipped_and_said() -> None:
    planner = Planner(int(1.5 * GIB), model__offload_layers="memory")
    made = fit(recipe(), planner.budget, planner, device_type="cuda")
    assert not made.fits
    assert made.recipe.model.offload_layers == "none"
    assert any("no offload_layers: memory here" in reason for reason in made.refused)


def test_a_mistake_in_the_recipe_itself_is_told() -> None:
    with pytest.raises(UserError, match="no optimizer"):
        fit(recipe(), GIB, Planner(GIB, train__optimizer="adamw"), device_type="cuda")


def test_as_json() -> None:
    import json

    made, _ = fitted(recipe(train={"micro_batch": 4}), 2.6)
    kept = json.loads(json.dumps(made.as_dict()))
    assert kept["fits"] is True
    assert kept["keys"] == {key: new for key, (_, new) in made.keys.items()}
    assert kept["changes"][0]["peak_bytes"] == list(made.steps[0].peak_bytes)
    assert kept["before"]["peak_bytes"] == made.before.peak_bytes


def test_a_plan_comes_back_from_json() -> None:
    plan = made_up(recipe(), 12 * GIB)
    assert Plan.of_dict(plan.as_dict()) == plan
