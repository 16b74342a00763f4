"""run.json: records round-trip, older layouts are read, and unreadable records are refused with a short message."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune.errors import UserError
from finetune.record import VERSION, LossRecord, PlanRecord, Record, read_record, write_record
from finetune.task_data import ConversationsRecord, TextRecord, data_record
from tests.conftest import Terminal, alpaca, record_of, write_jsonl

RECIPE = """\
about: "a tiny run"
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4}}
adapter: {{rank: 2}}
data: {{path: {rows}, max_length: 128, heldout: 2}}
train: {{max_steps: 1, save_steps: null}}
eval: {{samples: 1, max_new_tokens: 1}}
run: {{device: cpu, threads: 1, merge: false, dir: {run}}}
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a real run."""
    from finetune import pipeline
    from finetune.recipe import read_recipe

    folder = tmp_path_factory.mktemp("record")
    rows = write_jsonl(folder / "rows.jsonl", alpaca(8))
    (folder / "tiny.yaml").write_text(RECIPE.format(model=tiny_model, rows=rows, run=folder / "made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        pipeline.run(read_recipe(folder / "tiny.yaml"), "tiny")
    return folder / "made"


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run folder without weights, whose record a test may change."""
    (tmp_path / "run").mkdir()
    for name in ("run.json", "recipe.yaml", "metrics.jsonl"):
        shutil.copy(run_folder / name, tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, key: str, value: Any = None, *, remove: bool = False) -> None:
    """Set or remove the value of `key` ("train.steps", "samples.0") in run.json."""
    record = part = record_of(run)
    *parents, last = key.split(".")
    for name in parents:
        part = part[int(name)] if isinstance(part, list) else part[name]
    if remove:
        del part[last]
    else:
        part[last] = value
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- reading and writing


def test_reading_and_writing_a_record_gives_the_same_bytes(run_folder: Path, run: Path) -> None:
    record = read_record(run)
    assert record.version == VERSION
    write_record(run, record)
    assert (run / "run.json").read_bytes() == (run_folder / "run.json").read_bytes()


def test_only_fields_that_were_set_are_written(run: Path) -> None:
    record = record_of(run)
    assert "merge" in record  # the run has set it to None
    assert not {"twin", "exports", "ternary", "tracker_id", "plan"} & set(record)
    assert "float" not in record["eval"]
    before = LossRecord(loss=2.0, stderr=None, perplexity=math.exp(2.0), tokens=3, rows=1)
    assert before.model_dump(exclude_unset=True)["stderr"] is None
    changed = read_record(run)
    changed.eval.float_model = before
    write_record(run, changed)
    assert record_of(run)["eval"]["float"]["loss"] == 2.0  # run.json keeps the name `float`


def test_unknown_keys_survive_reading_and_writing(run: Path) -> None:
    change(run, "of_a_later_task", {"images": [1, 2]})
    change(run, "eval.sharpness", 0.5)
    change(run, "samples.0.picture", "a.png")
    before = record_of(run)
    write_record(run, read_record(run))
    assert record_of(run) == before
    assert read_record(run).model_extra == {"of_a_later_task": {"images": [1, 2]}}


def test_record_of_version_1_is_read(run: Path) -> None:
    expected = record_of(run)
    del expected["version"]
    expected["eval"]["merged"] = expected["eval"]["after"]
    for version_1 in (expected, expected | {"format": 1}):
        (run / "run.json").write_text(json.dumps(version_1), encoding="utf-8")
        record = read_record(run)
        assert record.version == VERSION
        assert not {"format", "merged"} & (set(record.as_dict()) | set(record.as_dict()["eval"]))
        assert record.eval.after is not None
        assert record.eval.after.loss == expected["eval"]["after"]["loss"]


@pytest.mark.parametrize("version", [VERSION + 1, 0, "two", 1.5, None])
def test_unknown_version_is_refused(run: Path, version: Any) -> None:
    change(run, "version", version)
    with pytest.raises(UserError) as raised:
        read_record(run)
    assert f"version {version}; this program reads versions 1 to {VERSION}" in str(raised.value)


def test_nan_infinity_and_none_survive_as_valid_json(run: Path) -> None:
    record = read_record(run)
    assert record.train is not None
    assert record.eval.after is not None
    record.eval.difference, record.eval.difference_stderr = math.nan, math.inf
    record.train.tokens_per_second = -math.inf
    record.eval.after.stderr = None
    write_record(run, record)
    saved = json.loads((run / "run.json").read_text(), parse_constant=pytest.fail)  # JSON knows no NaN
    assert (saved["eval"]["difference"], saved["eval"]["difference_stderr"]) == ("nan", "inf")
    loaded = read_record(run)
    assert loaded.eval.difference is not None
    assert math.isnan(loaded.eval.difference)
    assert loaded.eval.difference_stderr == math.inf
    assert loaded.train is not None
    assert loaded.train.tokens_per_second == -math.inf
    assert loaded.eval.after is not None
    assert loaded.eval.after.stderr is None


def test_integers_stay_integers(run: Path) -> None:
    phase = {"name": "train", "peak_bytes": 3 << 40, "seconds": 1.0, "terms": {"weights (nf4)": 5}, "host_bytes": 0}
    plan = {"device": "cpu", "budget_bytes": 4 << 40, "phases": [phase], "peak_bytes": 3 << 40, "fits": True,
            "tokens_per_step": 128, "step_seconds": 0.5, "seconds": 1.0, "notes": []}  # fmt: skip
    record = read_record(run)
    record.plan = PlanRecord.model_validate(plan)
    write_record(run, record)
    assert json.dumps(record_of(run)["plan"]) == json.dumps(plan)
    assert all(isinstance(edge, int) for edge in record_of(run)["preflight"]["length_histogram"]["edges"])


def test_assignments_are_validated(run: Path) -> None:
    record = read_record(run)
    with pytest.raises(ValidationError):
        record.state = "finished"  # type: ignore[assignment]


def test_data_record_has_the_type_of_its_task(run: Path) -> None:
    record = read_record(run)
    data = data_record(record)
    assert isinstance(data, ConversationsRecord)
    assert (data.rows, data.train_rows, data.heldout_rows) == (8, 6, 2)
    record.kind = "pretrain"
    with pytest.raises(UserError, match="vocabulary is missing"):
        data_record(record)
    record.data = TextRecord(format="text", format_reason="", heldout_rows=1, rows_skipped=0, vocabulary=300)
    assert data_record(record) == record.data
    record.data = None
    assert data_record(record) is None


# ----------------------------------------------------------------------------------------------------- unreadable records

REMOVED = object()
INVALID: dict[str, Any] = {
    "name": REMOVED,
    "kind": REMOVED,
    "state": "finished",
    "provenance": REMOVED,
    "provenance.started": REMOVED,
    "phases": None,
    "eval": REMOVED,
    "eval.after.loss": "low",
    "samples": {"prompt": "Hello"},
    "preflight.checks.0.status": "green",
    "model.swap.share": REMOVED,
    "train.steps": "many",
    "data.format": REMOVED,
    "next": "finetune show",
}


def report(folder: Path) -> None:
    from finetune.report import write_report

    write_report(folder)


@pytest.mark.parametrize("key", INVALID)
@pytest.mark.parametrize(
    "command",
    [
        "show run",
        "show run --json",
        "resume run",
        "merge run --out merged",
        "eval run",
        "chat run",
        "export run --to bitnet --out out",
    ],
)
def test_commands_refuse_an_invalid_record_with_a_short_message(finetune: Terminal, run: Path, command: str, key: str) -> None:
    change(run, key, INVALID[key], remove=INVALID[key] is REMOVED)
    before = (run / "run.json").read_bytes()
    code, out, err = finetune(*command.split())
    assert code == 2, err
    assert "cannot read the run's record" in err
    assert f"{key} is missing" in err if INVALID[key] is REMOVED else f"{key}: " in err
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 6
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("key", [*INVALID, "data.rows", "data.train_rows"])
def test_report_refuses_an_invalid_record(run: Path, key: str) -> None:
    value = INVALID.get(key, REMOVED)
    change(run, key, value, remove=value is REMOVED)
    with pytest.raises(UserError, match="cannot read the run's record") as raised:
        report(run)
    assert key.removeprefix("data.") in str(raised.value)
    assert not (run / "report.html").exists()


def truncate(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize("damage", [truncate, lambda _: "[]", lambda _: "", lambda _: "\x00", lambda _: "[" * 100_000])
def test_damaged_record_is_refused(run: Path, damage: Callable[[str], str]) -> None:
    file = run / "run.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the run's record"):
        read_record(run)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", ""])
def test_run_name_that_is_a_path_is_refused(run: Path, name: str) -> None:
    change(run, "name", name)
    with pytest.raises(UserError, match="not a plain file name"):
        read_record(run)


def test_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        read_record(tmp_path)


def test_new_record_needs_its_required_fields() -> None:
    with pytest.raises(ValidationError):
        Record(name="a", kind="sft", state="running")  # type: ignore[call-arg]
