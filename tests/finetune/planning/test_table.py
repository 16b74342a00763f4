"""The plan in words: figures as they are read, 80 columns, nothing that is not so."""

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
from tests.finetune.planning.made_up import Planner, made_up, recipe


def shown(show: Any, *arguments: Any) -> list[str]:
    """The lines on a screen of 80 columns."""
    text = io.StringIO()
    show(*arguments, Screen(Console(file=text, width=80, highlight=False, soft_wrap=True)))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    return lines


def test_the_verdict_comes_first() -> None:
    plan = replace(made_up(recipe(plan={"price_per_kwh": 0.32}), 12 * GIB), watts=200.0)
    lines = shown(table.show, plan)
    peak = f"{plan.peak_bytes / GIB:.1f}"
    assert lines[0].startswith(f"fits: {peak} of 12.0 GiB, highest in train; ")
    assert f"{plan.price:.2g} at 0.32/kWh" in " ".join(lines[:2])
    tight = shown(table.show, replace(plan, budget_bytes=2 * GIB))
    assert tight[0].startswith(f"does not fit: {peak} of 2.0 GiB, highest in train; ")


def test_without_a_price_there_is_none() -> None:
    lines = " ".join(shown(table.show, made_up(recipe(), 12 * GIB)))
    assert "kWh" in lines
    assert "/kWh" not in lines


def test_phases_terms_and_notes() -> None:
    plan = made_up(recipe(), 12 * GIB)
    lines = shown(table.show, plan)
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


def test_bars_are_as_long_as_their_figures() -> None:
    plan = made_up(recipe(train={"micro_batch": 4}), 12 * GIB)
    lines = shown(table.show, plan)
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert bars["train"] == pytest.approx(table.BAR * plan.peak_bytes / (12 * GIB), abs=1)
    assert bars["load"] == pytest.approx(table.BAR * plan.phase("load").peak_bytes / (12 * GIB), abs=1)
    over = shown(table.show, replace(plan, budget_bytes=GIB))
    assert next(line for line in over if line.startswith("train")).count("█") == table.BAR


def test_host_memory_is_shown_where_it_is_used() -> None:
    lines = shown(table.show, made_up(recipe(model={"offload_layers": "memory"}, train={"checkpointing": True}), 12 * GIB))
    assert any("host GiB" in line for line in lines)


# --------------------------------------------------------------------------------------------------------------------- a fit


def test_a_fit_as_a_diff_with_what_each_change_saves_and_costs() -> None:
    before = recipe(train={"micro_batch": 8, "loss_chunk": 0})
    planner = Planner(int(2.5 * GIB))
    made = fit(before, planner.budget, planner, device_type="cuda")
    lines = shown(table.show_fit, made)
    assert lines[0].startswith(f"fits with changes: {before_peak(before)} → ")
    assert lines[2:11] == [
        " train:", "-  loss_chunk: 0", "+  loss_chunk: 256", "-  micro_batch: 8", "+  micro_batch: 2", "-  accumulation: 1",
        "+  accumulation: 4", "-  checkpointing: false", "+  checkpointing: true",
    ]  # fmt: skip
    (checkpointing,) = (line for line in lines if line.endswith("train.checkpointing=true"))
    step = made.steps[-1]
    saved, peak = (step.peak_bytes[0] - step.peak_bytes[1]), step.peak_bytes[1]
    assert checkpointing.split()[:2] == [gib(saved), gib(peak)]
    assert "(+31%)" in checkpointing


def before_peak(before: Any) -> str:
    return gib(made_up(before, 0).peak_bytes)


def test_a_fit_of_what_fits_changes_nothing() -> None:
    planner = Planner(24 * GIB)
    lines = shown(table.show_fit, fit(recipe(), planner.budget, planner, device_type="cuda"))
    assert lines == [f"fits unchanged: {before_peak(recipe())} of 24.0 GiB"]


def test_what_cannot_fit_says_what_would() -> None:
    planner = Planner(int(0.7 * GIB))
    made = fit(recipe(data={"max_length": 8192}), planner.budget, planner, device_type="cuda")
    said = " ".join(shown(table.show_fit, made))
    assert made.proposal
    assert f"cannot fit into 0.70 GiB: with all changes that help it still needs {gib(made.plan.peak_bytes)} GiB" in said
    assert f"data.max_length={made.proposal} would fit" in said
    assert "max_length:" not in said  # no line of the diff


# --------------------------------------------------------------------------------------------------------------- many recipes


def rows() -> list[dict[str, Any]]:
    big = recipe(adapter={"kind": "none"}, train={"save_steps": 5, "micro_batch": 4}, model={"dtype": "fp32"})
    return [
        row(recipe(train={"micro_batch": 8}), "llama7b-qlora-alpaca", Planner, device_type="cuda"),
        row(big, "smollm2-360m-full-dolly", Planner, device_type="cuda"),
        {"recipe": "gone", "parameters": None, "tokens": None, "plans": {}, "error": "the hub cannot be reached"},
    ]


def test_many_recipes_on_many_budgets() -> None:
    made = rows()
    text = table.markdown(made).splitlines()
    assert text[0] == "| recipe | parameters | tokens | 8 GB | 12 GB | 16 GB | 24 GB |"
    assert len({line.count("|") for line in text[:5]}) == 1
    first = text[2].split(" | ")
    assert first[0] == "| `llama7b-qlora-alpaca`"
    peak = gib(made_up(recipe(train={"micro_batch": 8}), 0).peak_bytes)
    assert first[5].startswith(f"yes: {peak} GiB, ")
    assert first[3].startswith("changed: ")
    assert any(line.startswith("- llama7b-qlora-alpaca on 8 GB: train.micro_batch=4 train.accumulation=2") for line in text)
    assert "- gone: the hub cannot be reached" in text
    assert text[4] == "| `gone` | – | – | – | – | – | – |"
    lines = shown(table.show_many, made)
    assert any(line.split()[-2:] == ["16", "GB"] or line.endswith("24 GB") for line in lines[:1])
    assert sum("changed" in line for line in lines) >= 2
    names = "".join(line[:22].strip() for line in lines[1:8])
    assert "smollm2-360m-full-dolly" in names.replace(" ", "")


def test_a_recipe_that_fits_nowhere_says_what_it_needs() -> None:
    huge = recipe(adapter={"kind": "none"}, model={"dtype": "fp32"},
                  train={"save_steps": 5, "optimizer_in_backward": True, "max_grad_norm": 0, "micro_batch": 512})  # fmt: skip
    made = [row(huge, "huge", Planner, device_type="cuda")]
    answer = made[0]["plans"][8 * GIB]
    assert not answer.fits
    line = table.markdown(made).splitlines()[2]
    assert f"no: needs {gib(answer.plan.peak_bytes)} GiB" in line


def test_the_arithmetic_of_a_claim() -> None:
    said = table.claim(4.32e20, (45, 35), what="d32", device="a 4070", rate=58e12)
    assert said == (
        "d32 in 35–45 days on a 4070 would need 111–143 TFLOP/s; its dense bf16 rate is 58, at which it takes 86 days"
    )
    possible = table.claim(2e18, (2, 2), what="x", device="y", rate=58e12)
    assert possible == "x in 2 days on y would need 12 TFLOP/s; its dense bf16 rate is 58"


# -------------------------------------------------------------------------------------------------------------------- figures


def test_memory_of_a_budget_as_it_is_read() -> None:
    assert table.of(12 * GIB + 1_000_000, 12 * GIB) == "12.001 of 12.000 GiB"
    assert table.card(12 * GIB) == "12 GB"


def test_a_plan_without_steps_is_shown_too() -> None:
    plan: Plan = replace(made_up(recipe(), 12 * GIB), steps=0, step_seconds=0.0, flops=0.0, watts=0.0, notes=[])
    assert shown(table.show, plan)[0].startswith("fits")


def test_tables_and_fits_import_nothing_heavy() -> None:
    code = "import sys, finetune.planning.command; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------------- the recipe, rewritten

WRITTEN = """about: a recipe
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


def test_a_changed_recipe_keeps_its_comments() -> None:
    keys = {"train.micro_batch": 2, "train.accumulation": 2, "model.offload_layers": "memory", "fit": "auto"}
    text, kept = rewrite(WRITTEN, keys)
    assert kept
    assert "  micro_batch: 2 # rows\n  accumulation: 2\n\n# what it answers\n" in text
    assert text.endswith("model:\n  offload_layers: memory\nfit: auto\n") or "fit: auto\n" in text
    assert "# rows are not for commercial use" in text
    content = yaml.safe_load(WRITTEN)
    content["train"] |= {"micro_batch": 2, "accumulation": 2}
    assert yaml.safe_load(text) == content | {"model": {"offload_layers": "memory"}, "fit": "auto"}


@pytest.mark.parametrize(
    "text", ["train: {micro_batch: 4, lr: 0.1}\n", "train:\n  betas:\n    - 0.9\n  micro_batch:\n    4\n", "{}"]
)
def test_a_recipe_written_otherwise_is_changed_all_the_same(text: str) -> None:
    changed, _ = rewrite(text, {"train.micro_batch": 2, "train.checkpointing": "offload", "eval.prompts": ["a # b", "c: d"]})
    train = (yaml.safe_load(text).get("train") or {}) | {"micro_batch": 2, "checkpointing": "offload"}
    assert yaml.safe_load(changed) == {"train": train, "eval": {"prompts": ["a # b", "c: d"]}}


def test_a_diff_names_each_section_once() -> None:
    keys = {"train.micro_batch": (4, 2), "model.offload_layers": ("none", "disk"), "train.checkpointing": (False, "offload"),
            "fit": ("none", "auto")}  # fmt: skip
    assert diff(keys) == [
        "-fit: none", "+fit: auto", " model:", "-  offload_layers: none", "+  offload_layers: disk", " train:",
        "-  micro_batch: 4", "+  micro_batch: 2", "-  checkpointing: false", "+  checkpointing: offload",
    ]  # fmt: skip
