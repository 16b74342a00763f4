"""Planned memory against measured training steps (finetune/bench/plan.py), and the trace behind the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.bench import bench_command
from finetune.bench import plan as bench
from finetune.bench.plan import Case, Found, Steps
from finetune.models.config import load_config, new_config
from finetune.models.source import source_of
from finetune.planning.data import facts_of
from finetune.planning.step import DeviceSpec, Traced, trace

FEW_STEPS = Steps(profiled=3, warm=0, timed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tokenizer and data of the bench."""
    path = tmp_path_factory.mktemp("bench-plan")
    bench.make_data(path)
    return path


@pytest.fixture
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bench models of two layers, as small as their logits."""
    monkeypatch.setattr(bench, "SIZES", {"S": (64, 2, 4)})
    for path in folder.glob("*-S"):
        shutil.rmtree(path)
    return folder


MEASURED_CASES = [
    Case("llama", "S", "full"),
    Case("llama", "S", "lora", "pairs", more={"train.accumulation": 2}),
    Case("llama", "S", "qlora", checkpointing=True),
    Case("llama", "S", "bitnet", "text"),
    Case("gpt2", "S", "qlora", "single"),
    Case("mixtral", "S", "full", checkpointing=True),
]


@pytest.mark.parametrize("case", MEASURED_CASES, ids=lambda case: case.name)
def test_planned_memory_matches_measured_steps(case: Case, tiny: Path) -> None:
    result = bench.found_of(case, tiny, torch.device("cpu"), FEW_STEPS)
    error = result["planned_bytes"] / result["measured_bytes"] - 1
    assert -bench.UNDER <= error <= bench.OVER, result
    assert len(result["seconds"]) == 1


def trace_recipe(recipe: Any, *, layers: int, whole: bool) -> Traced:
    source = source_of(recipe.model)
    config = load_config(source)
    config.num_hidden_layers = layers
    micro = facts_of(recipe, source).micro
    return trace(
        recipe, source, config, DeviceSpec("cpu", torch.bfloat16, None, False), micro, evaluate=micro, generate=64, whole=whole
    )


def test_trace_of_two_and_four_layers_extrapolates_exactly_to_six(tiny: Path) -> None:
    recipe = bench.recipe_of(Case("llama", "S", "qlora", checkpointing=True), tiny, "cpu")
    extrapolated, full = (trace_recipe(recipe, layers=6, whole=trace_all) for trace_all in (False, True))
    assert (extrapolated.layers, full.layers) == ((4, 6), (6, 6))
    assert extrapolated.static == full.static
    for a, b in (
        (extrapolated.train, full.train),
        (extrapolated.evaluate, full.evaluate),
        (extrapolated.generate, full.generate),
    ):
        assert a is not None
        assert b is not None
        assert {at: moment.total for at, moment in a.moments.items()} == {at: moment.total for at, moment in b.moments.items()}
        assert +a.work == +b.work


def test_model_with_different_layers_is_traced_in_full(tiny: Path) -> None:
    recipe = bench.recipe_of(Case("llama", "S", "full"), tiny, "cpu")
    source = source_of(recipe.model)
    config = new_config({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "use_sliding_window": True, "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"] * 3,
    })  # fmt: skip
    result = trace(recipe, source, config, DeviceSpec("cpu", torch.float32, None, False), facts_of(recipe, source).micro)
    assert (result.uniform, result.layers) == (False, (6, 6))


# ------------------------------------------------------------------------------------------------------------------ the bench


def fake_results(**cases: tuple[int, int, float, float]) -> list[Found]:
    """Results by case name: planned and measured bytes, planned and measured seconds."""
    return [
        Found(
            case=name, planned_bytes=planned, measured_bytes=measured, planned_reserved=None, reserved_bytes=None,
            planned_seconds=planned_seconds, seconds=[seconds] * 3, calibrated=True, busy=0.0, layers=[4, 8], fast=[], terms={},
        )
        for name, (planned, measured, planned_seconds, seconds) in cases.items()
    ]  # fmt: skip


def test_bench_rows_mark_which_targets_are_met() -> None:
    results = fake_results(a=(1030, 1000, 1.0, 1.1), b=(985, 1000, 1.0, 2.0), c=(1001, 1000, 1.0, 0.9))
    rows = {row["case"]: row for row in bench.rows(results, "cpu")}
    assert [rows[f"{name}: memory"]["met"] for name in "abc"] == [True, False, True]
    assert [rows[f"{name}: memory"]["target"] for name in "abc"] == [1.04, 0.99, 1.04]
    assert [rows[f"{name}: time"]["met"] for name in "abc"] == [True, False, True]
    assert rows["memory: median error"]["ours"] == pytest.approx(1.5)
    assert rows["memory: worst error"]["ours"] == pytest.approx(3.0)
    assert rows["memory: worst below"]["ours"] == pytest.approx(1.5)
    assert [rows[f"memory: {name}"]["met"] for name in ("median error", "worst error", "worst below")] == [False, True, False]
    assert (rows["time: within 20%"]["ours"], rows["time: within 20%"]["met"]) == (2, False)
    results[0]["calibrated"] = False
    rows = {row["case"]: row for row in bench.rows(results, "cpu")}
    assert rows["a: time"]["met"] is None
    assert "finetune bench device" in rows["a: time"]["note"]
    assert "time: within 20%" not in rows


def test_failing_case_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("gpt2", "S", "full"), Case("llama", "S", "lora", "single")]
    progress: list[tuple[int, int, str]] = []

    def fake_child(case: Case, folder: Path, device: str, steps: Steps, tick: Callable[[float], None]) -> Found:
        tick(0.5)
        if case is cases[0]:
            raise bench.Lost("exit code 1: no room")
        return fake_results(**{case.name: (1, 1, 1.0, 1.0)})[0]

    monkeypatch.setattr(bench, "make_data", lambda folder: None)
    monkeypatch.setattr(bench, "in_a_child", fake_child)
    results, lost = bench.grid("cpu", lambda *call: progress.append(call), cases, FEW_STEPS)
    assert [result["case"] for result in results] == [cases[1].name]
    assert lost == {cases[0].name: "exit code 1: no room"}
    assert {call[2] for call in progress} >= {case.name for case in cases}


def test_grid_covers_methods_architectures_and_sizes() -> None:
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names) >= 24
    for method in ("full", "lora", "qlora", "bitnet"):
        assert {case.size for case in bench.CASES if case.of == method} == {"S", "M", "L"}, method
        assert {case.checkpointing for case in bench.CASES if case.of == method} == {False, True}, method
    for architecture in ("llama", "gpt2", "mixtral"):
        assert {case.size for case in bench.CASES if case.architecture == architecture} == {"S", "M", "L"}, architecture


@pytest.mark.slow
def test_planned_memory_of_the_full_grid_meets_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only memory has to meet its targets: times depend on the load of this machine, and only have to be present."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "plan.json"
    bench_command("plan", file)
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["failed"] == {}
    assert len(document["cases"]) == len(bench.CASES)
    memory = [row for row in document["rows"] if "memory" in row["case"]]
    assert [row["case"] for row in memory if not row["met"]] == []
    assert all(row["ratio"] > 0 for row in document["rows"] if row["unit"] == "s/step")
