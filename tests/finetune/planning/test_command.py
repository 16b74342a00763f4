"""The command `finetune plan`: output, written files and errors, with plans from a formula."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from finetune.cli import app
from finetune.errors import GateError, UserError, UserErrors
from finetune.files import MARK, write_json
from finetune.planning.devices import parse_bytes
from finetune.recipe import dump_recipe, read_recipe
from finetune.run_dir import RunDir, check_resumable
from finetune.units import GIB
from tests.finetune.planning.made_up import formula_plan


@pytest.fixture
def plan_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Replaces the estimate by the formula, and returns the list of its calls."""
    calls: list[dict[str, Any]] = []

    def plan(recipe: Any, name: str, device: Any, *, budget_bytes: int | None = None, progress: Any = None) -> Any:
        calls.append({"recipe": recipe, "name": name, "device": device, "budget": budget_bytes})
        return formula_plan(recipe, device.memory_bytes if budget_bytes is None else budget_bytes)

    monkeypatch.setitem(sys.modules, "finetune.planning.estimate", types.SimpleNamespace(plan=plan))  # type: ignore[arg-type]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return calls


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model:\n  name: some/model\n  dtype: bf16\ndata:\n  path: {tmp_path / 'rows.jsonl'}\n"
        "train:\n  micro_batch: 8 # rows\n  loss_chunk: 0\n"
    )
    return path


def run_command(*arguments: Any, code: int = 0) -> Result:
    """Runs `finetune plan …` and checks the exit code, which main() would take from the exception."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    error = result.exception
    exit_code = error.exit_code if isinstance(error, UserError | GateError) else result.exit_code
    assert exit_code == code, result.output + str(error)
    return result


def test_json_has_the_fields_that_scripts_rely_on(plan_calls: list[Any], recipe_path: Path) -> None:
    answer = json.loads(run_command(recipe_path, "--gpu", "rtx-4090", "--json").stdout)
    plan = formula_plan(read_recipe(recipe_path), 24 * GIB)
    assert answer["peak_bytes"] == plan.peak_bytes
    assert answer["fits"] is True
    assert answer["seconds"] == plan.seconds
    assert answer["terms"] == plan.highest.terms
    assert [phase["name"] for phase in answer["phases"]] == ["load", "evaluate", "train", "save"]
    assert "fit" not in answer
    (call,) = plan_calls
    assert (call["name"], call["device"].key, call["budget"]) == ("mine", "rtx-4090", 24 * GIB)


def test_recipe_that_does_not_fit_is_shown_and_exits_3(plan_calls: list[Any], recipe_path: Path) -> None:
    result = run_command(recipe_path, "--gpu", "rtx-4060", "--json", code=3)
    assert json.loads(result.stdout)["fits"] is False
    assert "--fit 8GB" in str(result.exception)
    assert "does not fit: " in run_command(recipe_path, "--gpu", "rtx-4060", code=3).stdout


def test_overrides_reach_the_plan(plan_calls: list[Any], recipe_path: Path) -> None:
    run_command(recipe_path, "train.micro_batch=2", "--gpu", "4090")
    assert plan_calls[0]["recipe"].train.micro_batch == 2


def test_fit_changes_the_recipe_and_writes_it(plan_calls: list[Any], recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits.yaml"
    result = run_command(recipe_path, "train.lr=3e-4", "--gpu", "4090", "--fit", "2.5GB", "--out", out)
    assert "+  checkpointing: true" in result.stdout
    assert "wrote " in result.stdout
    text = out.read_text()
    assert "  micro_batch: 2 # rows\n" in text
    changed = read_recipe(out)
    assert (changed.train.micro_batch, changed.train.accumulation, changed.train.lr) == (2, 4, 3e-4)
    assert formula_plan(changed, 0).peak_bytes <= 2.5 * GIB
    assert {entry["budget"] for entry in plan_calls} == {int(2.5 * GIB)}
    run_command(recipe_path, "--gpu", "4090", "--fit", "2.5GB", "--out", out, code=2)  # an existing file is not overwritten


def test_fit_as_json(plan_calls: list[Any], recipe_path: Path) -> None:
    answer = json.loads(run_command(recipe_path, "--gpu", "4090", "--fit", "2.5GB", "--json").stdout)
    assert answer["fits"] is True
    assert answer["fit"]["keys"]["train.checkpointing"] is True
    assert answer["fit"]["before"]["peak_bytes"] > answer["peak_bytes"]
    assert answer["budget_bytes"] == int(2.5 * GIB)


def test_failed_fit_exits_3_and_writes_nothing(plan_calls: list[Any], recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits.yaml"
    result = run_command(recipe_path, "--gpu", "4090", "--fit", "100MB", "--out", out, "--json", code=3)
    assert json.loads(result.stdout)["fit"]["smallest_bytes"] > 100 << 20
    assert "with all changes that help it still needs" in str(result.exception)
    assert not out.exists()


# --------------------------------------------------------------------------------------------------------- keys of the recipe


def with_keys(recipe_path: Path, **keys: Any) -> Path:
    recipe_path.write_text(yaml.safe_dump(yaml.safe_load(recipe_path.read_text()) | keys))
    return recipe_path


def test_command_line_overrides_plan_gpu_and_plan_memory(plan_calls: list[Any], recipe_path: Path) -> None:
    path = with_keys(recipe_path, plan={"gpu": "rtx-3060", "memory": "11.5GiB"})
    run_command(path, code=3)
    assert (plan_calls[-1]["device"].key, plan_calls[-1]["budget"]) == ("rtx-3060", int(11.5 * GIB))
    run_command(path, "--gpu", "rtx-4090", "--fit", "20 GB")
    assert (plan_calls[-1]["device"].key, plan_calls[-1]["budget"]) == ("rtx-4090", 20 * GIB)


def test_default_device_is_the_local_one(plan_calls: list[Any], recipe_path: Path) -> None:
    run_command(recipe_path, "run.device=cpu", "plan.memory=64GB")
    assert plan_calls[0]["device"].type == "cpu"


def test_fit_auto_fits_the_recipe(plan_calls: list[Any], recipe_path: Path) -> None:
    plain = with_keys(recipe_path, plan={"gpu": "rtx-4090", "memory": "2.5GB"})
    run_command(plain, code=3)
    assert "fits with changes" in run_command(plain, "fit=auto").stdout


def test_price_is_shown(plan_calls: list[Any], recipe_path: Path) -> None:
    output = run_command(with_keys(recipe_path, plan={"gpu": "rtx-4090", "price_per_kwh": 0.4})).stdout
    assert "at 0.4/kWh" in " ".join(output.split())


def test_changed_plan_settings_do_not_prevent_resume(recipe_path: Path, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    recipe = read_recipe(recipe_path)
    folder.path.mkdir()
    (folder.path / "recipe.yaml").write_text(dump_recipe(recipe))
    write_json(folder.path / MARK, {})
    check_resumable(
        folder, read_recipe(recipe_path, ["plan.gpu=rtx-4090", "plan.price_per_kwh=0.3", "plan.memory=8GB", "fit=auto"])
    )
    with pytest.raises(UserError, match="a different recipe"):
        check_resumable(folder, read_recipe(recipe_path, ["train.micro_batch=2"]))


@pytest.mark.parametrize("memory", ["12", "lots", "-3GB", "12 apples"])
def test_invalid_plan_memory_is_an_error(recipe_path: Path, memory: str) -> None:
    with pytest.raises(UserErrors, match=r"plan\.memory"):
        read_recipe(with_keys(recipe_path, plan={"memory": memory}))


@pytest.mark.parametrize("memory", ["12GB", "11.5GiB", "8 gb", "900 MiB", "12G", "0.5tb"])
def test_every_valid_plan_memory_can_be_parsed(recipe_path: Path, memory: str) -> None:
    assert read_recipe(with_keys(recipe_path, plan={"memory": memory})).plan.memory == memory
    assert parse_bytes(memory) > 0


# ------------------------------------------------------------------------------------------------------------------ the table


def test_table_has_all_shipped_recipes_and_the_claims(plan_calls: list[Any]) -> None:
    answer = json.loads(run_command("--table", "--json").stdout)
    names = {row["recipe"] for row in answer["rows"]}
    assert {"nanochat-d32", "llama7b-qlora-alpaca", "bitnet-1.3b", "quickstart"} <= names
    assert answer["device"] == "rtx-4070"
    for row in answer["rows"]:
        assert list(row["plans"]) == [str(size * GIB) for size in (8, 12, 16, 24)]
        assert all(plan["budget_bytes"] == int(budget) for budget, plan in row["plans"].items())
    assert len(answer["claims"]) == 1
    assert "nanochat d32 in 35–45 days on a 4070 would need" in answer["claims"][0]
    text = run_command("--table").stdout
    assert "| `nanochat-d32` |" in text
    assert answer["claims"][0] in text


def test_table_shows_the_other_recipes_when_one_cannot_be_planned(plan_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(recipe: Any, name: str, device: Any, *, budget_bytes: int, progress: Any = None) -> Any:
        if name == "nanochat-d32":
            raise UserError("the hub cannot be reached")
        return formula_plan(recipe, budget_bytes)

    monkeypatch.setattr(sys.modules["finetune.planning.estimate"], "plan", plan)
    text = run_command("--table").stdout
    assert "- nanochat-d32: the hub cannot be reached" in text
    assert "| `quickstart` |" in text
    assert "would need" not in text  # no claim without a plan


def test_conflicting_or_invalid_arguments_exit_2(plan_calls: list[Any], recipe_path: Path, tmp_path: Path) -> None:
    run_command(code=2)
    run_command("--table", "--fit", "8GB", code=2)
    run_command(recipe_path, "--out", tmp_path / "x.yaml", code=2)
    run_command(recipe_path, "--gpu", "rtx-9999", code=2)
