"""The same recipe in one process and in two (gloo): equal training, by any launcher, also when a resume changes their number."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import alpaca, story, write_jsonl
from tests.support.starts import Start

pytestmark = pytest.mark.alone

STEPS = 6  # with a checkpoint after each third of them
LOG_NUMBERS = itertools.count()  # for the names of log files
LOSS_TOLERANCE = {"lora": 2e-4, "qlora": 2e-4, "bitnet": 5e-3}  # nats; another order of fp32 sums flips a few ternary weights


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    rows, text = write_jsonl(folder / "rows.jsonl", alpaca(80)), folder / "text.txt"
    text.write_text(story(60_000), encoding="utf-8")
    common = f"train: {{max_steps: {STEPS}, lr: 1.0e-3, save_steps: {STEPS // 3}, accumulation: 3, micro_batch: 2}}\n"
    tail = "eval: {samples: 1, max_new_tokens: 4}\nrun: {device: cpu, threads: 1}\n"
    lora = (
        f"model: {{name: {tiny_model}, dtype: fp32}}\nadapter: {{rank: 4}}\ndata: {{path: {rows}, max_length: 64, heldout: 6}}\n"
    )
    (folder / "lora.yaml").write_text(lora + common + tail)
    (folder / "qlora.yaml").write_text(lora + "quant: {scheme: nf4}\n" + common + tail)
    (folder / "bitnet.yaml").write_text(
        "kind: pretrain\nquant: {scheme: ternary}\ntokenizer: {train: 300}\n"
        "model: {config: {model_type: bitnet, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2}}\n"
        f"data: {{path: {text}, max_length: 64, heldout: 6}}\n" + common.replace("train: {", "train: {precision: fp32, ") + tail
    )
    return folder


def start(work: Path, *words: str) -> Start:
    return Start(list(words), work, work / f"start-{next(LOG_NUMBERS)}.log")


def start_unforked(work: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a new interpreter as a user would, or through another launcher."""
    command = [sys.executable, *(launcher or ("-m", "finetune.cli")), *words]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_success(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def run_in_one_process(work: Path, kind: str) -> Path:
    """The run folder of training in one process, which is trained at the first call."""
    if not (work / f"{kind}-one" / "report.html").exists():
        start(work, "run", f"{kind}.yaml", f"run.dir={kind}-one").succeed()
    return work / f"{kind}-one"


def step_metrics(run: Path) -> list[dict[str, Any]]:
    metrics = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if (run / "metrics.jsonl").exists()
        else []
    )
    return [line for line in metrics if "loss" in line]


def assert_equal_runs(expected_run: Path, actual_run: Path) -> None:
    """Both runs train the same samples in the same order. Losses and weights differ only by the order of sums."""
    tolerance = LOSS_TOLERANCE[expected_run.name.partition("-")[0]]
    expected_metrics, actual_metrics = step_metrics(expected_run), step_metrics(actual_run)
    assert [line["samples"] for line in expected_metrics] == [line["samples"] for line in actual_metrics]
    assert [line["loss"] for line in expected_metrics] == pytest.approx([line["loss"] for line in actual_metrics], abs=tolerance)
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    expected, actual = load_file(expected_run / last), load_file(actual_run / last)
    assert expected.keys() == actual.keys()
    squared_error = sum((expected[name] - actual[name]).norm() ** 2 for name in expected) / sum(
        expected[name].norm() ** 2 for name in expected
    )
    assert squared_error**0.5 < 1e-2
    records = [json.loads((run / "run.json").read_text()) for run in (expected_run, actual_run)]
    assert records[0]["eval"]["after"]["loss"] == pytest.approx(records[1]["eval"]["after"]["loss"], abs=tolerance)
    assert records[0]["samples"] == records[1]["samples"]
    assert (expected_run / "merged" / "model.safetensors").stat().st_size == (
        actual_run / "merged" / "model.safetensors"
    ).stat().st_size
    assert not list(actual_run.rglob(".*.finetune-*"))


def kill_after_checkpoint(process: Start, run: Path, step: int) -> None:
    """Send SIGKILL as soon as the checkpoint of `step` is complete."""
    manifest = run / "checkpoints" / f"step-{step:06d}" / "manifest.json"
    assert process.wait(200, until=manifest.exists), process.said(f"no checkpoint of step {step}")
    assert process.send(signal.SIGKILL) == -signal.SIGKILL


def test_resume_from_one_process_to_two_and_back_trains_the_same(work: Path) -> None:
    expected_run, run = run_in_one_process(work, "qlora"), work / "there-and-back"
    first, second = STEPS // 3, 2 * STEPS // 3
    kill_after_checkpoint(start(work, "run", "qlora.yaml", f"run.dir={run}"), run, first)
    kill_after_checkpoint(start(work, "run", "qlora.yaml", f"run.dir={run}", "--resume", "--processes", "2"), run, second)
    start(work, "run", "qlora.yaml", f"run.dir={run}", "--resume").succeed()
    assert_equal_runs(expected_run, run)
    resumed = json.loads((run / "run.json").read_text())["provenance"]["resumed"]
    assert [entry.get("processes", 1) for entry in resumed] == [2, 1]
    assert [entry["from"] for entry in resumed] == [f"step-{first:06d}", f"step-{second:06d}"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "bitnet"])
def test_two_processes_train_like_one(work: Path, kind: str, parallel: str) -> None:
    run = work / f"{kind}-{parallel}"
    out = wait_for_success(
        start_unforked(work, "run", f"{kind}.yaml", f"run.dir={run}", f"run.parallel={parallel}", "--processes", "2")
    )
    assert out.count("held-out loss after") == 1, "not exactly one process printed the result"
    assert_equal_runs(run_in_one_process(work, kind), run)
    trained = json.loads((run / "run.json").read_text())["train"]
    assert (trained["processes"], trained["parallel"]) == (2, parallel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "finetune.cli"),
        (
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "29612",
            "-m",
            "finetune.cli",
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_torchrun_and_accelerate_launch_train_like_one_process(work: Path, launcher: tuple[str, ...]) -> None:
    run = work / launcher[1].partition(".")[0]
    wait_for_success(start_unforked(work, "run", "qlora.yaml", f"run.dir={run}", "run.parallel=fsdp", launcher=launcher))
    assert_equal_runs(run_in_one_process(work, "qlora"), run)
    assert json.loads((run / "run.json").read_text())["train"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bitnet"])
def test_resume_from_one_process_to_fsdp_and_back_trains_the_same(work: Path, kind: str) -> None:
    run = work / f"{kind}-sharded"
    words = ("run", f"{kind}.yaml", f"run.dir={run}")
    kill_after_checkpoint(start(work, *words), run, STEPS // 3)
    kill_after_checkpoint(start(work, *words, "run.parallel=fsdp", "--resume", "--processes", "2"), run, 2 * STEPS // 3)
    start(work, *words, "--resume").succeed()
    assert_equal_runs(run_in_one_process(work, kind), run)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_the_same_step(work: Path) -> None:
    run = work / "interrupted"
    process = start_unforked(work, "run", "qlora.yaml", f"run.dir={run}", "--processes", "2")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(step_metrics(run)) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "finetune resume" in err
    wait_for_success(start_unforked(work, "run", "qlora.yaml", f"run.dir={run}", "--resume", "--processes", "2"))
    assert_equal_runs(run_in_one_process(work, "qlora"), run)


def test_more_processes_than_rows_are_refused(work: Path) -> None:
    process = start_unforked(
        work, "run", "lora.yaml", "train.micro_batch=1", "train.accumulation=1", "run.dir=few", "--processes", "2"
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "more processes than sequences" in err
    assert err.count("error:") == 1
    assert not (work / "few").exists()
