"""Run folders of commit f4a9b44 (tests/fixtures/run-f4a9b44): they are shown, reported, merged, scored and gone on with."""

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
CLOSE = 1e-4  # nats: another processor or torch sums in another order
Older = Callable[[str], Path]


@pytest.fixture
def older(tmp_path: Path) -> Older:
    """Puts the data, the base and one of the run folders where the test may change them."""

    def put(name: str) -> Path:
        shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
        for path in (path for suffix in ("json", "yaml") for path in tmp_path.rglob(f"*.{suffix}")):
            text = path.read_text(encoding="utf-8")
            if "@FIXTURE@" in text:
                path.write_text(text.replace("@FIXTURE@", str(tmp_path)), encoding="utf-8")
        return tmp_path / name

    return put


def same_machine() -> bool:
    """Whether numbers come out as on the machine that made the fixture, to the last bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    known = [
        next((line.partition(":")[2].split() for line in lines if line.startswith(key)), []) for key in ("model name", "flags")
    ]
    return hashlib.sha256(json.dumps([torch.__version__, *known]).encode()).hexdigest() == EXPECTED["machine"]


def digest(path: Path) -> str:
    """Of names, dtypes, shapes and bytes of the tensors in a file."""
    result = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


def losses(run: Path) -> dict[str, Any]:
    """What expected.json tells of a run: the loss of every step and on held-out rows."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {"steps": {str(line["step"]): line["loss"] for line in lines if "loss" in line}}
    if held_out := {str(line["step"]): line["eval_loss"] for line in lines if "eval_loss" in line}:
        result["while_training"] = held_out
    measured = record_of(run)["eval"]
    return result | {when: {key: measured[when][key] for key in ("loss", "stderr")} for when in ("before", "after")}


def compare(found: dict[str, Any], expected: dict[str, Any], besides: Iterable[str] = ()) -> None:
    expected = {key: value for key, value in expected.items() if key not in besides}
    if same_machine():
        assert found == expected
        return
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=CLOSE), key


def done(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, f"{out}\n{err}"
    return out


@pytest.mark.drawn
def test_a_run_is_shown_and_reported(finetune: Terminal, older: Older) -> None:
    run = older("lora-done")
    before = losses(run)
    out = done(finetune("show", str(run)))
    assert "lora: done" in out
    assert "5.5459" in out
    assert "6 steps" in out
    shown = json.loads(done(finetune("show", str(run), "--json")))
    assert shown["eval"] == record_of(run)["eval"]
    assert "is already done" in done(finetune("resume", str(run)))
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "5.5459" in report
    assert "a run of an older version" in report
    assert losses(run) == before


def test_an_adapter_is_merged_and_scored(finetune: Terminal, older: Older) -> None:
    run = older("lora-done")
    expected = EXPECTED["lora"]["after"]["loss"]
    assert digest(run / "adapter/adapter_model.safetensors") == EXPECTED["lora"]["weights"]
    done(finetune("merge", str(run), "--out", "merged"))
    done(finetune("eval", str(run), "--json", "held-out.json"))
    (scores,) = json.loads(Path("held-out.json").read_text()).values()
    assert scores["loss"]["loss"] == pytest.approx(expected, abs=CLOSE)
    done(finetune("eval", str(run), "merged", "--file", str(run.parent / "rows.jsonl"), "--json", "file.json"))
    adapter, merged = (scores["loss"]["loss"] for scores in json.loads(Path("file.json").read_text()).values())
    assert merged == pytest.approx(adapter, abs=1e-6)


def test_a_killed_run_goes_on_to_the_same_end(finetune: Terminal, older: Older) -> None:
    run = older("lora-cut")
    done(finetune("resume", str(run)))
    compare(losses(run), EXPECTED["lora"], besides=["weights"])
    if same_machine():
        assert digest(run / "adapter/adapter_model.safetensors") == EXPECTED["lora"]["weights"]
    record = record_of(run)
    assert record["state"] == "done"
    assert [resumed["from"] for resumed in record["provenance"]["resumed"]] == ["step-000004"]
    assert record["merge"]["gate"]["status"] == "pass"


def test_a_killed_ternary_run_goes_on_and_trains_its_twin(finetune: Terminal, older: Older) -> None:
    run = older("ternary-cut")
    out = done(finetune("resume", str(run)))
    expected = EXPECTED["ternary"]
    compare(losses(run), expected, besides=["weights", "twin"])
    compare(losses(run / "twin"), expected["twin"], besides=["gap", "gap_stderr"])
    if same_machine():
        assert digest(run / "checkpoints/step-000004/weights.safetensors") == expected["weights"]
    record = record_of(run)
    assert [resumed["from"] for resumed in record["provenance"]["resumed"]] == ["step-000002"]
    for key in ("gap", "gap_stderr"):
        assert record["twin"][key] == pytest.approx(expected["twin"][key], abs=CLOSE)
    assert f"{expected['twin']['gap']:+.3f}"[:-1] in out
