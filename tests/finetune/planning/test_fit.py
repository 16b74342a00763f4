"""Fitting a recipe into memory: cheap changes come first, unneeded ones are dropped, invalid ones are not tried."""

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
from tests.finetune.planning.made_up import Planner, formula_plan, recipe

FULL = {"adapter": {"kind": "none"}, "train": {"save_steps": 100}}


def run_fit(before: Recipe, gib: float, device_type: Any = "cuda") -> Any:
    planner = Planner(int(gib * GIB))
    result = fit(before, planner.budget, planner, device_type=device_type)
    planned = [recipe_.model_dump_json() for recipe_ in planner.recipes]
    assert len(planned) == len(set(planned)), "a recipe was planned twice"
    return result, planner


def test_recipe_that_fits_is_unchanged_and_planned_once() -> None:
    before = recipe()
    result, planner = run_fit(before, 24)
    assert result.fits
    assert (result.recipe, result.steps, result.keys) == (before, [], {})
    assert len(planner.recipes) == 1


def test_chunked_loss_is_the_first_change() -> None:
    result, _ = run_fit(recipe(train={"loss_chunk": 0}), 3.4)
    assert result.keys == {"train.loss_chunk": (0, 256)}


def test_largest_micro_batch_that_fits_with_the_same_rows_per_step() -> None:
    before = recipe(train={"micro_batch": 12, "accumulation": 2})
    result, planner = run_fit(before, 7)
    train = result.recipe.train
    assert set(result.keys) == {"train.micro_batch", "train.accumulation"}
    assert train.micro_batch * train.accumulation == 24
    fits = [n for n in (6, 4, 3, 2, 1) if formula_plan(recipe(train={"micro_batch": n}), 0).peak_bytes <= 7 * GIB]
    assert train.micro_batch == fits[0]
    assert 1 < train.micro_batch < 6  # otherwise this test proves nothing
    assert len(planner.recipes) <= 7


def test_earlier_change_that_becomes_unnecessary_is_dropped() -> None:
    """A micro-batch of 1 does not fit; with checkpointing it does, and then the original micro-batch fits as well."""
    before = recipe(train={"micro_batch": 2})
    budget = formula_plan(recipe(train={"micro_batch": 2, "checkpointing": True}), 0).peak_bytes
    assert formula_plan(recipe(train={"micro_batch": 1}), 0).peak_bytes > budget
    result, _ = run_fit(before, budget / GIB)
    assert result.keys == {"train.checkpointing": (False, True)}
    assert result.recipe.train.micro_batch == 2


def test_change_is_reverted_as_far_as_memory_allows() -> None:
    before = recipe(train={"micro_batch": 64})
    budget = formula_plan(recipe(train={"micro_batch": 8, "checkpointing": True}), 0).peak_bytes
    assert formula_plan(recipe(), 0).peak_bytes > budget  # even a micro-batch of 1 is too much, so the search starts from it
    result, _ = run_fit(before, budget / GIB)
    assert result.keys["train.micro_batch"] == (64, 8)
    assert result.keys["train.accumulation"] == (1, 8)
    assert result.keys["train.checkpointing"] == (False, True)


@pytest.mark.parametrize("gib", [2.1, 2.2, 2.3, 2.5, 2.8, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_every_change_is_necessary(gib: float, device_type: str) -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0}, eval={"batch_tokens": 8192})
    result, _ = run_fit(before, gib, device_type)
    assert result.fits, result.smallest_bytes / GIB
    groups = [list(step.keys) for step in result.steps]
    for omitted in range(len(groups)):
        content = before.model_dump()
        for key in itertools.chain(*(group for n, group in enumerate(groups) if n != omitted)):
            section, leaf = key.split(".")
            content[section][leaf] = result.keys[key][1]
        try:
            other = Recipe.model_validate(content)
        except ValueError:
            continue  # streamed layers require checkpointing
        assert formula_plan(other, 0).peak_bytes > gib * GIB, groups[omitted]


def test_each_step_records_its_memory_and_time() -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0})
    result, planner = run_fit(before, 2.6)
    assert len(result.steps) >= 2
    assert result.steps[0].peak_bytes[0] == planner(before).peak_bytes
    assert result.steps[-1].peak_bytes[1] == result.plan.peak_bytes == planner(result.recipe).peak_bytes
    for step, after in itertools.pairwise(result.steps):
        assert step.peak_bytes[1] == after.peak_bytes[0]
        assert step.seconds[1] == after.seconds[0]
    assert all(step.peak_bytes[1] < step.peak_bytes[0] for step in result.steps)
    assert result.steps[-1].seconds[1] == result.plan.seconds > result.before.seconds
    assert result.before.peak_bytes > 2.6 * GIB


def test_eval_batch_shrinks_when_evaluation_has_the_peak() -> None:
    before = recipe(train={"micro_batch": 2, "loss_chunk": 0}, eval={"batch_tokens": 262_144})
    assert formula_plan(before, 0).highest.name == "evaluate"
    result, planner = run_fit(before, 5)
    assert set(result.keys) == {"eval.batch_tokens"}
    assert result.keys["eval.batch_tokens"][1] == 65536  # the largest that fits
    # Changes that affect only training would not help, so they were not planned.
    assert all((planned.train.loss_chunk, planned.train.micro_batch) == (0, 2) for planned in planner.recipes)


def test_cpu_fit_uses_no_activation_offload_and_no_paged_optimizer() -> None:
    result, planner = run_fit(recipe(train={"micro_batch": 4}), 0.1, "cpu")
    assert not result.fits
    for planned in planner.recipes:
        assert planned.train.checkpointing != "offload"
        assert planned.train.optimizer != "paged_adamw_8bit"
        assert planned.model.offload_layers in ("none", "disk")
    assert result.recipe.model.offload_layers == "disk"


def test_gpu_fit_streams_layers_from_memory_with_checkpointing() -> None:
    result, _ = run_fit(recipe(), 1.5)
    assert result.fits
    assert result.keys["model.offload_layers"] == ("none", "memory")
    assert result.recipe.train.checkpointing
    assert result.steps[-1].keys["model.offload_layers"] == ("none", "memory")


def test_layers_are_streamed_when_the_weights_alone_do_not_fit() -> None:
    """Checkpointing saves nothing by itself here, but streaming requires it."""

    def plan_of(recipe: Recipe) -> Plan:
        plan = formula_plan(recipe, GIB)
        return replace(plan, phases=[plan.phase("load")])

    result = fit(recipe(), GIB, plan_of, device_type="cuda")
    assert result.fits
    assert result.keys == {"model.offload_layers": ("none", "memory"), "train.checkpointing": (False, True)}
    assert len(result.steps) == 1


def test_useless_changes_are_not_made_even_when_nothing_fits() -> None:
    """With rows of 128 tokens, a chunk of 256 saves no logits."""
    before = recipe(data={"max_length": 128}, train={"loss_chunk": 0}, eval={"batch_tokens": 128})
    result, _ = run_fit(before, 0.1)
    assert not result.fits
    assert set(result.keys) == {"train.checkpointing", "train.optimizer", "model.offload_layers"}


def test_costlier_of_two_redundant_changes_is_dropped() -> None:
    before = recipe(data={"max_length": 512}, train={"loss_chunk": 0, "checkpointing": True}, eval={"batch_tokens": 256})
    with_streaming = {"model": {"offload_layers": "disk"}, "data": {"max_length": 512}}
    peaks = [
        formula_plan(recipe(**with_streaming, train={"checkpointing": True, **train}), 0).peak_bytes
        for train in ({"loss_chunk": 256}, {"loss_chunk": 0, "optimizer": "adamw_8bit"})
    ]
    result, _ = run_fit(before, max(peaks) / GIB, "cpu")
    assert result.keys == {"train.loss_chunk": (0, 256), "model.offload_layers": ("none", "disk")}


def test_failed_fit_reports_the_smallest_peak_and_proposes_a_length() -> None:
    before = recipe(data={"max_length": 4096}, train={"checkpointing": "offload", "optimizer": "paged_adamw_8bit"},
                    model={"offload_layers": "memory"}, eval={"batch_tokens": 256})  # fmt: skip
    peak = formula_plan(before, 0).peak_bytes
    result, _ = run_fit(before, 0.75 * peak / GIB)
    assert not result.fits
    assert result.smallest_bytes == result.plan.peak_bytes == peak
    assert result.recipe.data.max_length == 4096  # only proposed, not changed
    assert result.proposal is not None
    assert formula_plan(before.model_copy(update={"data": before.data.model_copy(update={"max_length": result.proposal})}),
                   0).peak_bytes <= 0.75 * peak  # fmt: skip
    longer = before.model_copy(update={"data": before.data.model_copy(update={"max_length": result.proposal + 512})})
    assert formula_plan(longer, 0).peak_bytes > 0.75 * peak
    hopeless, _ = run_fit(before, 0.01)
    assert hopeless.proposal is None
    assert hopeless.smallest_bytes == peak


def test_failed_fit_is_as_small_as_the_best_combination_of_changes() -> None:
    """Compared with all combinations of all changes."""
    before = recipe(train={"micro_batch": 4, "loss_chunk": 0}, eval={"batch_tokens": 8192})
    result, planner = run_fit(before, 0.05)
    choices = {"train.loss_chunk": (0, 256), "train.micro_batch": (4, 2, 1), "train.checkpointing": (False, True, "offload"),
            "train.optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"), "model.offload_layers": ("none", "memory"),
            "eval.batch_tokens": (8192, 256)}  # fmt: skip
    smallest = min(
        formula_plan(candidate, 0).peak_bytes
        for values in itertools.product(*choices.values())
        if (candidate := _with(before, dict(zip(choices, values, strict=True)))) is not None
    )
    assert result.smallest_bytes == smallest
    assert len(planner.recipes) < 25


def _with(before: Recipe, keys: dict[str, Any]) -> Recipe | None:
    content = before.model_dump()
    for key, value in keys.items():
        section, leaf = key.split(".")
        content[section][leaf] = value
    try:
        return Recipe.model_validate(content)
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------------------- rules of the recipe


def test_optimizer_in_backward_keeps_the_micro_batch() -> None:
    train = {"micro_batch": 8, "optimizer_in_backward": True, "max_grad_norm": 0, "save_steps": 10}
    result, planner = run_fit(recipe(adapter={"kind": "none"}, train=train), 5)
    assert all((planned.train.micro_batch, planned.train.accumulation) == (8, 1) for planned in planner.recipes)
    assert "train.micro_batch" not in result.keys


def test_optimizer_in_backward_is_preferred_to_a_smaller_micro_batch() -> None:
    before = recipe(adapter={"kind": "none"}, train={"micro_batch": 2, "max_grad_norm": 0, "save_steps": 10, "optimizer":
                    "paged_adamw_8bit", "stochastic_rounding": True, "checkpointing": True})  # fmt: skip
    result, _ = run_fit(before, 2.6)
    assert result.fits
    assert result.keys == {"train.optimizer_in_backward": (False, True), "train.on_bad_step": ("skip", "rollback")}


def test_fp32_weights_become_bf16_only_where_model_dtype_allows() -> None:
    budget = 7.5
    fp32_requested = recipe(**FULL, model={"dtype": "fp32"})
    result, planner = run_fit(fp32_requested, budget)
    assert not any(planned.train.stochastic_rounding for planned in planner.recipes)
    auto_dtype = recipe(**FULL, model={"dtype": "auto"})
    result, _ = run_fit(auto_dtype, budget)
    assert result.fits
    assert result.keys["train.stochastic_rounding"] == (False, True)
    assert result.keys["model.dtype"] == ("auto", "bf16")


def test_lora_and_full_training_have_different_levers() -> None:
    adapters = {lever.name for lever in levers(recipe(), "cuda")}
    full = {lever.name for lever in levers(recipe(**FULL), "cuda")}
    assert not adapters & {"weights", "gradients"}
    assert "layers" in adapters
    assert "layers" not in full
    assert {"weights", "gradients"} <= full


def test_fit_with_a_teacher_changes_only_what_the_schema_allows() -> None:
    before = Recipe.model_validate(
        {
            "kind": "pretrain", "model": {"name": "some/model"}, "quant": {"scheme": "ternary"},
            "distill": {"teacher": "other/model"}, "data": {"path": "text.txt"},
            "train": {"max_steps": 10, "micro_batch": 4},
        }
    )  # fmt: skip
    result, planner = run_fit(before, 1)
    assert all(planned.train.loss_chunk == 256 for planned in planner.recipes)
    assert not result.fits


def test_changes_that_cannot_run_here_are_skipped_and_reported() -> None:
    planner = Planner(int(1.5 * GIB), model__offload_layers="memory")
    result = fit(recipe(), planner.budget, planner, device_type="cuda")
    assert not result.fits
    assert result.recipe.model.offload_layers == "none"
    assert any("no offload_layers: memory here" in reason for reason in result.refused)


def test_error_in_the_recipe_itself_is_raised() -> None:
    with pytest.raises(UserError, match="no optimizer"):
        fit(recipe(), GIB, Planner(GIB, train__optimizer="adamw"), device_type="cuda")


def test_fit_serializes_to_json() -> None:
    import json

    result, _ = run_fit(recipe(train={"micro_batch": 4}), 2.6)
    content = json.loads(json.dumps(result.as_dict()))
    assert content["fits"] is True
    assert content["keys"] == {key: new for key, (_, new) in result.keys.items()}
    assert content["changes"][0]["peak_bytes"] == list(result.steps[0].peak_bytes)
    assert content["before"]["peak_bytes"] == result.before.peak_bytes


def test_plan_round_trips_through_its_dict() -> None:
    plan = formula_plan(recipe(), 12 * GIB)
    assert Plan.of_dict(plan.as_dict()) == plan
