"""The same recipe in one process and in two (gloo): the same course, whoever started them, and on from one to two and back."""

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

STEPS = 6  # with a checkpoint after each third
NUMBERS = itertools.count()  # of the logs
CLOSE = {"lora": 2e-4, "qlora": 2e-4, "bitnet": 5e-3}  # nats; fp32 sums in another order: of ternary weights a few flip


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
    return Start(list(words), work, work / f"start-{next(NUMBERS)}.log")


def start_plainly(work: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Without a fork: as a user does, or by another launcher."""
    command = [sys.executable, *(launcher or ("-m", "finetune.cli")), *words]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def whole(work: Path, kind: str) -> Path:
    """The run in one process, made once."""
    if not (work / f"{kind}-one" / "report.html").exists():
        start(work, "run", f"{kind}.yaml", f"run.dir={kind}-one").succeed()
    return work / f"{kind}-one"


def lines(run: Path) -> list[dict[str, Any]]:
    found = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if (run / "metrics.jsonl").exists()
        else []
    )
    return [line for line in found if "loss" in line]


def same(one: Path, other: Path) -> None:
    """The same samples in the same order, the same losses and weights but for the order of sums."""
    close = CLOSE[one.name.partition("-")[0]]
    a, b = lines(one), lines(other)
    assert [line["samples"] for line in a] == [line["samples"] for line in b]
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], abs=close)
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    ours, theirs = load_file(one / last), load_file(other / last)
    assert ours.keys() == theirs.keys()
    far = sum((ours[name] - theirs[name]).norm() ** 2 for name in ours) / sum(ours[name].norm() ** 2 for name in ours)
    assert far**0.5 < 1e-2
    records = [json.loads((run / "run.json").read_text()) for run in (one, other)]
    assert records[0]["eval"]["after"]["loss"] == pytest.approx(records[1]["eval"]["after"]["loss"], abs=close)
    assert records[0]["samples"] == records[1]["samples"]
    assert (one / "merged" / "model.safetensors").stat().st_size == (other / "merged" / "model.safetensors").stat().st_size
    assert not list(other.rglob(".*.finetune-*"))


def killed_after(process: Start, run: Path, step: int) -> None:
    """Killed as soon as the checkpoint of `step` is whole."""
    whole_one = run / "checkpoints" / f"step-{step:06d}" / "manifest.json"
    assert process.wait(200, until=whole_one.exists), process.said(f"no checkpoint of step {step}")
    assert process.send(signal.SIGKILL) == -signal.SIGKILL


def test_from_one_process_to_two_and_back(work: Path) -> None:
    one, run = whole(work, "qlora"), work / "there-and-back"
    first, second = STEPS // 3, 2 * STEPS // 3
    killed_after(start(work, "run", "qlora.yaml", f"run.dir={run}"), run, first)
    killed_after(start(work, "run", "qlora.yaml", f"run.dir={run}", "--resume", "--processes", "2"), run, second)
    start(work, "run", "qlora.yaml", f"run.dir={run}", "--resume").succeed()
    same(one, run)
    resumed = json.loads((run / "run.json").read_text())["provenance"]["resumed"]
    assert [entry.get("processes", 1) for entry in resumed] == [2, 1]
    assert [entry["from"] for entry in resumed] == [f"step-{first:06d}", f"step-{second:06d}"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "bitnet"])
def test_two_processes_train_as_one(work: Path, kind: str, parallel: str) -> None:
    run = work / f"{kind}-{parallel}"
    out = done(start_plainly(work, "run", f"{kind}.yaml", f"run.dir={run}", f"run.parallel={parallel}", "--processes", "2"))
    assert out.count("held-out loss after") == 1, "one of them speaks"
    same(whole(work, kind), run)
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
def test_who_starts_them_does_not_matter(work: Path, launcher: tuple[str, ...]) -> None:
    run = work / launcher[1].partition(".")[0]
    done(start_plainly(work, "run", "qlora.yaml", f"run.dir={run}", "run.parallel=fsdp", launcher=launcher))
    same(whole(work, "qlora"), run)
    assert json.loads((run / "run.json").read_text())["train"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bitnet"])
def test_sharded_from_one_to_two_and_back(work: Path, kind: str) -> None:
    run = work / f"{kind}-sharded"
    words = ("run", f"{kind}.yaml", f"run.dir={run}")
    killed_after(start(work, *words), run, STEPS // 3)
    killed_after(start(work, *words, "run.parallel=fsdp", "--resume", "--processes", "2"), run, 2 * STEPS // 3)
    start(work, *words, "--resume").succeed()
    same(whole(work, kind), run)


@pytest.mark.slow
def test_ctrl_c_stops_all_of_them_at_the_same_step(work: Path) -> None:
    run = work / "interrupted"
    process = start_plainly(work, "run", "qlora.yaml", f"run.dir={run}", "--processes", "2")
    end = time.monotonic() + 200
    while time.monotonic() < end and len(lines(run)) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "finetune resume" in err
    done(start_plainly(work, "run", "qlora.yaml", f"run.dir={run}", "--resume", "--processes", "2"))
    same(whole(work, "qlora"), run)


def test_more_processes_than_rows_are_refused(work: Path) -> None:
    process = start_plainly(
        work, "run", "lora.yaml", "train.micro_batch=1", "train.accumulation=1", "run.dir=few", "--processes", "2"
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "more processes than sequences" in err
    assert err.count("error:") == 1
    assert not (work / "few").exists()
