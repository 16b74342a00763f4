"""What is told of recipes that nobody means and of runs that made the model worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Recipe, doubts, read_recipe
from finetune.record import EvalRecord
from tests.conftest import Terminal, record_of, write_jsonl

ALL_WEIGHTS = {"adapter": {"kind": "none"}}
TERNARY = ALL_WEIGHTS | {"kind": "pretrain", "quant": {"scheme": "ternary"}}
CONFIG = {"model": {"config": {"model_type": "llama"}}, "tokenizer": {"train": 300}}


def recipe_of(lr: float = 2e-4, **sections: Any) -> Recipe:
    values: dict[str, Any] = {"model": {"name": "x"}, "data": {"path": "rows.jsonl"}, "train": {"lr": lr, "max_steps": 1}}
    return Recipe.model_validate(values | sections)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (recipe_of(2e5), "far above the rates of adapters"),
        (recipe_of(2e-2), "far above the rates of adapters"),
        (recipe_of(2e-9), "far below the rates of adapters"),
        (recipe_of(2e-3, **ALL_WEIGHTS), "far above the rates of all weights of a trained model"),
        (recipe_of(0.1, **(TERNARY | CONFIG)), "far above the rates of a model from scratch"),
        (recipe_of(1e-3, **TERNARY), "loses nearly all that it knows"),
    ],
)
def test_rates_and_rounding_that_destroy_a_model_are_told(recipe: Recipe, expected: str) -> None:
    (line,) = doubts(recipe, is_float=True)
    assert expected in line


def test_warm_up_teacher_and_ternary_bases_need_no_word() -> None:
    for more in ({"quant": {"scheme": "ternary", "warmup": 0.2}}, {"distill": {"teacher": "y"}}):
        assert not doubts(recipe_of(1e-3, **(TERNARY | more)), is_float=True)
    assert not doubts(recipe_of(1e-3, **TERNARY), is_float=False)


def test_shipped_recipes_raise_no_doubt(repository: Path) -> None:
    for path in sorted((repository / "recipes").glob("*.yaml")):
        assert not doubts(read_recipe(path), is_float=True), path.name


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [
        (1.0, 0.4, True),
        (1.0, 0.6, False),
        (-1.0, 0.1, False),
        (0.2, None, True),
        (0.1, None, False),
        (None, None, False),
        (0.0, 0.0, False),
    ],
)
def test_loss_got_worse_only_beyond_its_error(difference: float | None, error: float | None, expected: bool) -> None:
    assert EvalRecord(difference=difference, difference_stderr=error).got_worse == expected


def test_run_that_made_the_model_worse_says_so_and_what_to_lower(finetune: Terminal, tiny_model: Path, tmp_path: Path) -> None:
    """Two equal answers are learnt first, and then a rate that destroys the model is reached."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "fox fox fox fox fox fox"} for n in range(24)]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name: {tiny_model}, dtype: fp32}}\nquant: {{scheme: none}}\nadapter: {{rank: 4}}\n"
        f"data: {{path: {write_jsonl(tmp_path / 'rows.jsonl', rows)}, heldout: 4, max_length: 64, packing: false}}\n"
        "train: {lr: 0.05, epochs: 20, max_steps: 10, eval_steps: 5, warmup: 0}\neval: {samples: 0}\n"
        "run: {device: cpu, threads: 1, merge: false, dir: run}\n"
    )
    finetune.monkeypatch.setattr("finetune.train.schedule.Schedule.rate", lambda self, step, peak=None: 5e-3 if step < 6 else 1e3)
    code, out, err = finetune("run", str(recipe))
    assert code == 0, err
    record = record_of(tmp_path / "run")
    assert record["eval"]["after"]["loss"] > record["eval"]["before"]["loss"], "the test's run must get worse"
    assert "the model got worse: lower the learning rate, such as train.lr=0.0002" in out
    assert "at step 5; train.load_best_at_end=true keeps that model" in out
    assert "train.lr=0.05 is far above the rates of adapters" in out + err
    assert "The model got worse" in (tmp_path / "run" / "report.html").read_text()
