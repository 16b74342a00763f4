"""Run folders of commit f4a9b44 (tests/fixtures/run-f4a9b44) work with show, resume, merge, eval and the report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Terminal, record_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-f4a9b44"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4  # nats: other processors and torch versions sum in another order
CopyRun = Callable[[str], Path]


@pytest.fixture
def copy_run(tmp_path: Path) -> CopyRun:
    """A function that copies the fixture into the test's folder and returns the folder of a run."""

    def copy(name: str) -> Path:
        shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
        for path in (path for suffix in ("json", "yaml") for path in tmp_path.rglob(f"*.{suffix}")):
            text = path.read_text(encoding="utf-8")
            if "@FIXTURE@" in text:
                path.write_text(text.replace("@FIXTURE@", str(tmp_path)), encoding="utf-8")
        return tmp_path / name

    return copy


def same_machine() -> bool:
    """Whether this machine gives bit-equal numbers: it has the processor and torch that made the fixture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    cpu = [
        next((line.partition(":")[2].split() for line in lines if line.startswith(key)), []) for key in ("model name", "flags")
    ]
    return hashlib.sha256(json.dumps([torch.__version__, *cpu]).encode()).hexdigest() == EXPECTED["machine"]


def digest(path: Path) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of the tensors in a file."""
    result = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


def losses(run: Path) -> dict[str, Any]:
    """The figures that expected.json has of a run: losses of all steps and of held-out rows."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {"steps": {str(line["step"]): line["loss"] for line in lines if "loss" in line}}
    if evaluations := {str(line["step"]): line["eval_loss"] for line in lines if "eval_loss" in line}:
        result["while_training"] = evaluations
    evaluation = record_of(run)["eval"]
    return result | {when: {key: evaluation[when][key] for key in ("loss", "stderr")} for when in ("before", "after")}


def compare(actual: dict[str, Any], expected: dict[str, Any], ignore: Iterable[str] = ()) -> None:
    expected = {key: value for key, value in expected.items() if key not in ignore}
    if same_machine():
        assert actual == expected
        return
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        assert actual[key] == pytest.approx(values, abs=TOLERANCE), key


def output_of(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, f"{out}\n{err}"
    return out


@pytest.mark.drawn
def test_older_run_is_shown_and_reported(finetune: Terminal, copy_run: CopyRun) -> None:
    run = copy_run("lora-done")
    before = losses(run)
    output = output_of(finetune("show", str(run)))
    assert "lora: done" in output
    assert "5.5459" in output
    assert "6 steps" in output
    json_output = json.loads(output_of(finetune("show", str(run), "--json")))
    assert json_output["eval"] == record_of(run)["eval"]
    assert "is already done" in output_of(finetune("resume", str(run)))
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "5.5459" in report
    assert "a run of an older version" in report
    assert losses(run) == before


def test_adapter_of_an_older_run_is_merged_and_scored(finetune: Terminal, copy_run: CopyRun) -> None:
    run = copy_run("lora-done")
    expected = EXPECTED["lora"]["after"]["loss"]
    assert digest(run / "adapter/adapter_model.safetensors") == EXPECTED["lora"]["weights"]
    output_of(finetune("merge", str(run), "--out", "merged"))
    output_of(finetune("eval", str(run), "--json", "held-out.json"))
    (scores,) = json.loads(Path("held-out.json").read_text()).values()
    assert scores["loss"]["loss"] == pytest.approx(expected, abs=TOLERANCE)
    output_of(finetune("eval", str(run), "merged", "--file", str(run.parent / "rows.jsonl"), "--json", "file.json"))
    adapter, merged = (scores["loss"]["loss"] for scores in json.loads(Path("file.json").read_text()).values())
    assert merged == pytest.approx(adapter, abs=1e-6)


def test_killed_older_run_resumes_to_the_same_losses_and_weights(finetune: Terminal, copy_run: CopyRun) -> None:
    run = copy_run("lora-cut")
    output_of(finetune("resume", str(run)))
    compare(losses(run), EXPECTED["lora"], ignore=["weights"])
    if same_machine():
        assert digest(run / "adapter/adapter_model.safetensors") == EXPECTED["lora"]["weights"]
    record = record_of(run)
    assert record["state"] == "done"
    assert [resumed["from"] for resumed in record["provenance"]["resumed"]] == ["step-000004"]
    assert record["merge"]["gate"]["status"] == "pass"


def test_killed_older_ternary_run_resumes_and_trains_its_twin(finetune: Terminal, copy_run: CopyRun) -> None:
    run = copy_run("ternary-cut")
    output = output_of(finetune("resume", str(run)))
    expected = EXPECTED["ternary"]
    compare(losses(run), expected, ignore=["weights", "twin"])
    compare(losses(run / "twin"), expected["twin"], ignore=["gap", "gap_stderr"])
    if same_machine():
        assert digest(run / "checkpoints/step-000004/weights.safetensors") == expected["weights"]
    record = record_of(run)
    assert [resumed["from"] for resumed in record["provenance"]["resumed"]] == ["step-000002"]
    for key in ("gap", "gap_stderr"):
        assert record["twin"][key] == pytest.approx(expected["twin"][key], abs=TOLERANCE)
    assert f"{expected['twin']['gap']:+.3f}"[:-1] in output


@pytest.mark.parametrize("command", [("resume",), ("eval",)])
def test_run_whose_rows_an_older_version_split_otherwise_is_not_continued(
    copy_run: CopyRun, finetune: Terminal, command: tuple[str, ...]
) -> None:
    """Chats that all began alike were not held out at all by f4a9b44."""
    run = copy_run("lora-cut")
    record = record_of(run)
    (run / "run.json").write_text(json.dumps(record | {"data": record["data"] | {"heldout_rows": 0}}))
    before = (run / "run.json").read_bytes()
    code, _, err = finetune(*command, str(run))
    assert code == 2, err
    assert "this version splits the rows otherwise" in err
    assert f"heldout_rows 0, now {record['data']['heldout_rows']}" in err
    assert "start a new run" in err
    assert (run / "run.json").read_bytes() == before
