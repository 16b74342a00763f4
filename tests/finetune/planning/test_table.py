"""Plans and fits as text within 80 columns, tables of recipes, and recipes rewritten with their comments."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import yaml
from rich.console import Console

from finetune.planning import table
from finetune.planning.command import row
from finetune.planning.fit import fit
from finetune.planning.result import Plan
from finetune.planning.rewrite import diff, rewrite
from finetune.screen import Screen
from finetune.units import GIB, gib
from tests.finetune.planning.made_up import Planner, formula_plan, recipe


def screen_lines(show: Any, *arguments: Any) -> list[str]:
    """What `show` prints on a screen of 80 columns."""
    text = io.StringIO()
    show(*arguments, Screen(Console(file=text, width=80, highlight=False, soft_wrap=True)))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    return lines


def test_first_line_is_the_verdict() -> None:
    plan = replace(formula_plan(recipe(plan={"price_per_kwh": 0.32}), 12 * GIB), watts=200.0)
    lines = screen_lines(table.show, plan)
    peak = f"{plan.peak_bytes / GIB:.1f}"
    assert lines[0].startswith(f"fits: {peak} of 12.0 GiB, highest in train; ")
    assert f"{plan.price:.2g} at 0.32/kWh" in " ".join(lines[:2])
    tight = screen_lines(table.show, replace(plan, budget_bytes=2 * GIB))
    assert tight[0].startswith(f"does not fit: {peak} of 2.0 GiB, highest in train; ")


def test_no_cost_is_shown_without_a_price() -> None:
    lines = " ".join(screen_lines(table.show, formula_plan(recipe(), 12 * GIB)))
    assert "kWh" in lines
    assert "/kWh" not in lines


def test_plan_shows_phases_terms_and_notes() -> None:
    plan = formula_plan(recipe(), 12 * GIB)
    lines = screen_lines(table.show, plan)
    for phase in plan.phases:
        (line,) = (line for line in lines if line.startswith(f"{phase.name} "))
        assert f" {gib(phase.peak_bytes)} " in line
    head = next(n for n, line in enumerate(lines) if line.startswith("in train"))
    terms = [line.split("  ")[0] for line in lines[head + 1 :]]
    assert terms[: len(plan.highest.terms)] == list(plan.highest.terms)
    shares = [int(line.split("%")[0].split()[-1]) for line in lines if "%" in line]
    assert abs(sum(shares) - 100) <= len(shares)
    assert lines[-1] == "· Lengths are those of the worst batch: every row is full."
    assert "host GiB" not in "".join(lines)


def test_bar_lengths_are_proportional_to_memory() -> None:
    plan = formula_plan(recipe(train={"micro_batch": 4}), 12 * GIB)
    lines = screen_lines(table.show, plan)
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert bars["train"] == pytest.approx(table.BAR * plan.peak_bytes / (12 * GIB), abs=1)
    assert bars["load"] == pytest.approx(table.BAR * plan.phase("load").peak_bytes / (12 * GIB), abs=1)
    over = screen_lines(table.show, replace(plan, budget_bytes=GIB))
    assert next(line for line in over if line.startswith("train")).count("█") == table.BAR


def test_host_memory_is_shown_when_it_is_used() -> None:
    lines = screen_lines(
        table.show, formula_plan(recipe(model={"offload_layers": "memory"}, train={"checkpointing": True}), 12 * GIB)
    )
    assert any("host GiB" in line for line in lines)


# ----------------------------------------------------------------------------------------------------------------------- fits


def test_fit_shows_a_diff_and_the_memory_and_time_of_each_change() -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0})
    planner = Planner(int(2.5 * GIB))
    result = fit(before, planner.budget, planner, device_type="cuda")
    lines = screen_lines(table.show_fit, result)
    assert lines[0].startswith(f"fits with changes: {before_peak(before)} → ")
    assert lines[2:11] == [
        " train:", "-  loss_chunk: 0", "+  loss_chunk: 256", "-  micro_batch: 8", "+  micro_batch: 2", "-  accumulation: 1",
        "+  accumulation: 4", "-  checkpointing: false", "+  checkpointing: true",
    ]  # fmt: skip
    (checkpointing,) = (line for line in lines if line.endswith("train.checkpointing=true"))
    step = result.steps[-1]
    saved, peak = (step.peak_bytes[0] - step.peak_bytes[1]), step.peak_bytes[1]
    assert checkpointing.split()[:2] == [gib(saved), gib(peak)]
    assert "(+31%)" in checkpointing


def before_peak(before: Any) -> str:
    return gib(formula_plan(before, 0).peak_bytes)


def test_fit_of_a_recipe_that_fits_shows_no_changes() -> None:
    planner = Planner(24 * GIB)
    lines = screen_lines(table.show_fit, fit(recipe(), planner.budget, planner, device_type="cuda"))
    assert lines == [f"fits unchanged: {before_peak(recipe())} of 24.0 GiB"]


def test_failed_fit_shows_a_length_that_would_fit() -> None:
    planner = Planner(int(0.7 * GIB))
    result = fit(recipe(data={"max_length": 8192}), planner.budget, planner, device_type="cuda")
    output = " ".join(screen_lines(table.show_fit, result))
    assert result.proposal
    assert f"cannot fit into 0.70 GiB: with all changes that help it still needs {gib(result.plan.peak_bytes)} GiB" in output
    assert f"data.max_length={result.proposal} would fit" in output
    assert "max_length:" not in output  # no diff is shown


# ---------------------------------------------------------------------------------------------------------- tables of recipes


def rows() -> list[dict[str, Any]]:
    big = recipe(adapter={"kind": "none"}, train={"save_steps": 5, "micro_batch": 4}, model={"dtype": "fp32"})
    return [
        row(recipe(train={"micro_batch": 8}), "llama7b-qlora-alpaca", Planner, device_type="cuda"),
        row(big, "smollm2-360m-full-dolly", Planner, device_type="cuda"),
        {"recipe": "gone", "parameters": None, "tokens": None, "plans": {}, "error": "the hub cannot be reached"},
    ]


def test_table_of_recipes_and_budgets() -> None:
    table_rows = rows()
    text = table.markdown(table_rows).splitlines()
    assert text[0] == "| recipe | parameters | tokens | 8 GB | 12 GB | 16 GB | 24 GB |"
    assert len({line.count("|") for line in text[:5]}) == 1
    first = text[2].split(" | ")
    assert first[0] == "| `llama7b-qlora-alpaca`"
    peak = gib(formula_plan(recipe(train={"micro_batch": 8}), 0).peak_bytes)
    assert first[5].startswith(f"yes: {peak} GiB, ")
    assert first[3].startswith("changed: ")
    assert any(line.startswith("- llama7b-qlora-alpaca on 8 GB: train.micro_batch=4 train.accumulation=2") for line in text)
    assert "- gone: the hub cannot be reached" in text
    assert text[4] == "| `gone` | – | – | – | – | – | – |"
    lines = screen_lines(table.show_many, table_rows)
    assert any(line.split()[-2:] == ["16", "GB"] or line.endswith("24 GB") for line in lines[:1])
    assert sum("changed" in line for line in lines) >= 2
    names = "".join(line[:22].strip() for line in lines[1:8])
    assert "smollm2-360m-full-dolly" in names.replace(" ", "")


def test_table_shows_the_memory_needed_by_a_recipe_that_fits_nowhere() -> None:
    huge = recipe(adapter={"kind": "none"}, model={"dtype": "fp32"},
                  train={"save_steps": 5, "optimizer_in_backward": True, "max_grad_norm": 0, "micro_batch": 512})  # fmt: skip
    table_rows = [row(huge, "huge", Planner, device_type="cuda")]
    result = table_rows[0]["plans"][8 * GIB]
    assert not result.fits
    line = table.markdown(table_rows).splitlines()[2]
    assert f"no: needs {gib(result.plan.peak_bytes)} GiB" in line


def test_claim_states_the_required_rate() -> None:
    claim = table.claim(4.32e20, (45, 35), what="d32", device="a 4070", rate=58e12)
    assert claim == (
        "d32 in 35–45 days on a 4070 would need 111–143 TFLOP/s; its dense bf16 rate is 58, at which it takes 86 days"
    )
    possible = table.claim(2e18, (2, 2), what="x", device="y", rate=58e12)
    assert possible == "x in 2 days on y would need 12 TFLOP/s; its dense bf16 rate is 58"


# -------------------------------------------------------------------------------------------------------------------- figures


def test_memory_is_formatted_in_gib_and_card_sizes_in_gb() -> None:
    assert table.of(12 * GIB + 1_000_000, 12 * GIB) == "12.001 of 12.000 GiB"
    assert table.card(12 * GIB) == "12 GB"


def test_plan_without_steps_can_be_shown() -> None:
    plan: Plan = replace(formula_plan(recipe(), 12 * GIB), steps=0, step_seconds=0.0, flops=0.0, watts=0.0, notes=[])
    assert screen_lines(table.show, plan)[0].startswith("fits")


def test_plan_command_imports_no_heavy_library() -> None:
    code = "import sys, finetune.planning.command; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------- rewriting recipes

RECIPE_TEXT = """about: a recipe
# rows are not for commercial use
data:
  path: rows.jsonl
train: # how
  lr: 1.0e-4 # measured
  micro_batch: 4 # rows

# what it answers
eval:
  samples: 3
"""


def test_rewritten_recipe_keeps_its_comments() -> None:
    keys = {"train.micro_batch": 2, "train.accumulation": 2, "model.offload_layers": "memory", "fit": "auto"}
    text, comments_kept = rewrite(RECIPE_TEXT, keys)
    assert comments_kept
    assert "  micro_batch: 2 # rows\n  accumulation: 2\n\n# what it answers\n" in text
    assert text.endswith("model:\n  offload_layers: memory\nfit: auto\n") or "fit: auto\n" in text
    assert "# rows are not for commercial use" in text
    content = yaml.safe_load(RECIPE_TEXT)
    content["train"] |= {"micro_batch": 2, "accumulation": 2}
    assert yaml.safe_load(text) == content | {"model": {"offload_layers": "memory"}, "fit": "auto"}


@pytest.mark.parametrize(
    "text", ["train: {micro_batch: 4, lr: 0.1}\n", "train:\n  betas:\n    - 0.9\n  micro_batch:\n    4\n", "{}"]
)
def test_recipes_in_other_yaml_styles_are_rewritten_too(text: str) -> None:
    changed, _ = rewrite(text, {"train.micro_batch": 2, "train.checkpointing": "offload", "eval.prompts": ["a # b", "c: d"]})
    train = (yaml.safe_load(text).get("train") or {}) | {"micro_batch": 2, "checkpointing": "offload"}
    assert yaml.safe_load(changed) == {"train": train, "eval": {"prompts": ["a # b", "c: d"]}}


def test_diff_names_each_section_once() -> None:
    keys = {"train.micro_batch": (4, 2), "model.offload_layers": ("none", "disk"), "train.checkpointing": (False, "offload"),
            "fit": ("none", "auto")}  # fmt: skip
    assert diff(keys) == [
        "-fit: none", "+fit: auto", " model:", "-  offload_layers: none", "+  offload_layers: disk", " train:",
        "-  micro_batch: 4", "+  micro_batch: 2", "-  checkpointing: false", "+  checkpointing: offload",
    ]  # fmt: skip
