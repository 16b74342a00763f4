"""`finetune plan` from the door: what is printed, written and refused, with plans by a formula."""

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
from tests.finetune.planning.made_up import made_up


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the estimate was asked for."""
    seen: list[dict[str, Any]] = []

    def plan(recipe: Any, name: str, device: Any, *, budget_bytes: int | None = None, progress: Any = None) -> Any:
        seen.append({"recipe": recipe, "name": name, "device": device, "budget": budget_bytes})
        return made_up(recipe, device.memory_bytes if budget_bytes is None else budget_bytes)

    monkeypatch.setitem(sys.modules, "finetune.planning.estimate", types.SimpleNamespace(plan=plan))  # type: ignore[arg-type]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return seen


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model:\n  name: some/model\n  dtype: bf16\ndata:\n  path: {tmp_path / 'rows.jsonl'}\n"
        "train:\n  micro_batch: 8 # rows\n  loss_chunk: 0\n"
    )
    return path


def command(*arguments: Any, code: int = 0) -> Result:
    """`finetune plan …`; an error's exit code, as main() makes it of the exception."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    error = result.exception
    stopped = error.exit_code if isinstance(error, UserError | GateError) else result.exit_code
    assert stopped == code, result.output + str(error)
    return result


def test_json_has_what_scripts_rely_on_and_nothing_else(asked: list[Any], written: Path) -> None:
    answer = json.loads(command(written, "--gpu", "rtx-4090", "--json").stdout)
    plan = made_up(read_recipe(written), 24 * GIB)
    assert answer["peak_bytes"] == plan.peak_bytes
    assert answer["fits"] is True
    assert answer["seconds"] == plan.seconds
    assert answer["terms"] == plan.highest.terms
    assert [phase["name"] for phase in answer["phases"]] == ["load", "evaluate", "train", "save"]
    assert "fit" not in answer
    (once,) = asked
    assert (once["name"], once["device"].key, once["budget"]) == ("mine", "rtx-4090", 24 * GIB)


def test_what_does_not_fit_is_shown_and_exits_3(asked: list[Any], written: Path) -> None:
    result = command(written, "--gpu", "rtx-4060", "--json", code=3)
    assert json.loads(result.stdout)["fits"] is False
    assert "--fit 8GB" in str(result.exception)
    assert "does not fit: " in command(written, "--gpu", "rtx-4060", code=3).stdout


def test_overrides_reach_the_plan(asked: list[Any], written: Path) -> None:
    command(written, "train.micro_batch=2", "--gpu", "4090")
    assert asked[0]["recipe"].train.micro_batch == 2


def test_fit_changes_the_recipe_and_writes_it(asked: list[Any], written: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits.yaml"
    result = command(written, "train.lr=3e-4", "--gpu", "4090", "--fit", "2.5GB", "--out", out)
    assert "+  checkpointing: true" in result.stdout
    assert "wrote " in result.stdout
    text = out.read_text()
    assert "  micro_batch: 2 # rows\n" in text
    changed = read_recipe(out)
    assert (changed.train.micro_batch, changed.train.accumulation, changed.train.lr) == (2, 4, 3e-4)
    assert made_up(changed, 0).peak_bytes <= 2.5 * GIB
    assert {entry["budget"] for entry in asked} == {int(2.5 * GIB)}
    command(written, "--gpu", "4090", "--fit", "2.5GB", "--out", out, code=2)  # it is not overwritten


def test_fit_in_json(asked: list[Any], written: Path) -> None:
    answer = json.loads(command(written, "--gpu", "4090", "--fit", "2.5GB", "--json").stdout)
    assert answer["fits"] is True
    assert answer["fit"]["keys"]["train.checkpointing"] is True
    assert answer["fit"]["before"]["peak_bytes"] > answer["peak_bytes"]
    assert answer["budget_bytes"] == int(2.5 * GIB)


def test_a_fit_that_fails_exits_3_and_writes_nothing(asked: list[Any], written: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits.yaml"
    result = command(written, "--gpu", "4090", "--fit", "100MB", "--out", out, "--json", code=3)
    assert json.loads(result.stdout)["fit"]["smallest_bytes"] > 100 << 20
    assert "with all changes that help it still needs" in str(result.exception)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------ the keys of the recipe


def with_keys(written: Path, **keys: Any) -> Path:
    written.write_text(yaml.safe_dump(yaml.safe_load(written.read_text()) | keys))
    return written


def test_plan_gpu_and_plan_memory_are_read_and_the_command_line_wins(asked: list[Any], written: Path) -> None:
    path = with_keys(written, plan={"gpu": "rtx-3060", "memory": "11.5GiB"})
    command(path, code=3)
    assert (asked[-1]["device"].key, asked[-1]["budget"]) == ("rtx-3060", int(11.5 * GIB))
    command(path, "--gpu", "rtx-4090", "--fit", "20 GB")
    assert (asked[-1]["device"].key, asked[-1]["budget"]) == ("rtx-4090", 20 * GIB)


def test_without_a_name_the_device_is_the_one_here(asked: list[Any], written: Path) -> None:
    command(written, "run.device=cpu", "plan.memory=64GB")
    assert asked[0]["device"].type == "cpu"


def test_fit_auto_in_a_recipe_fits_it(asked: list[Any], written: Path) -> None:
    plain = with_keys(written, plan={"gpu": "rtx-4090", "memory": "2.5GB"})
    command(plain, code=3)
    assert "fits with changes" in command(plain, "fit=auto").stdout


def test_the_price_is_told(asked: list[Any], written: Path) -> None:
    said = command(with_keys(written, plan={"gpu": "rtx-4090", "price_per_kwh": 0.4})).stdout
    assert "at 0.4/kWh" in " ".join(said.split())


def test_another_plan_does_not_make_it_another_run(written: Path, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    begun = read_recipe(written)
    folder.path.mkdir()
    (folder.path / "recipe.yaml").write_text(dump_recipe(begun))
    write_json(folder.path / MARK, {})
    check_resumable(folder, read_recipe(written, ["plan.gpu=rtx-4090", "plan.price_per_kwh=0.3", "plan.memory=8GB", "fit=auto"]))
    with pytest.raises(UserError, match="a different recipe"):
        check_resumable(folder, read_recipe(written, ["train.micro_batch=2"]))


@pytest.mark.parametrize("memory", ["12", "lots", "-3GB", "12 apples"])
def test_what_is_no_amount_of_memory(written: Path, memory: str) -> None:
    with pytest.raises(UserErrors, match=r"plan\.memory"):
        read_recipe(with_keys(written, plan={"memory": memory}))


@pytest.mark.parametrize("memory", ["12GB", "11.5GiB", "8 gb", "900 MiB", "12G", "0.5tb"])
def test_what_the_recipe_takes_the_plan_understands(written: Path, memory: str) -> None:
    assert read_recipe(with_keys(written, plan={"memory": memory})).plan.memory == memory
    assert parse_bytes(memory) > 0


# ------------------------------------------------------------------------------------------------------------------ the table


def test_the_table_of_all_recipes_answers_the_claims(asked: list[Any]) -> None:
    answer = json.loads(command("--table", "--json").stdout)
    names = {row["recipe"] for row in answer["rows"]}
    assert {"nanochat-d32", "llama7b-qlora-alpaca", "bitnet-1.3b", "quickstart"} <= names
    assert answer["device"] == "rtx-4070"
    for row in answer["rows"]:
        assert list(row["plans"]) == [str(size * GIB) for size in (8, 12, 16, 24)]
        assert all(plan["budget_bytes"] == int(budget) for budget, plan in row["plans"].items())
    assert len(answer["claims"]) == 1
    assert "nanochat d32 in 35–45 days on a 4070 would need" in answer["claims"][0]
    text = command("--table").stdout
    assert "| `nanochat-d32` |" in text
    assert answer["claims"][0] in text


def test_one_recipe_that_cannot_be_planned_does_not_hide_the_others(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(recipe: Any, name: str, device: Any, *, budget_bytes: int, progress: Any = None) -> Any:
        if name == "nanochat-d32":
            raise UserError("the hub cannot be reached")
        return made_up(recipe, budget_bytes)

    monkeypatch.setattr(sys.modules["finetune.planning.estimate"], "plan", plan)
    text = command("--table").stdout
    assert "- nanochat-d32: the hub cannot be reached" in text
    assert "| `quickstart` |" in text
    assert "would need" not in text  # nothing is claimed of what was not planned


def test_what_does_not_go_together(asked: list[Any], written: Path, tmp_path: Path) -> None:
    command(code=2)
    command("--table", "--fit", "8GB", code=2)
    command(written, "--out", tmp_path / "x.yaml", code=2)
    command(written, "--gpu", "rtx-9999", code=2)
