"""The plan's memory against real steps, found in another way (finetune/bench/plan.py), and what the trace is made of."""

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

FEW = Steps(profiled=3, warm=0, timed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bench has its tokenizer and rows."""
    made = tmp_path_factory.mktemp("bench-plan")
    bench.make_data(made)
    return made


@pytest.fixture
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models of two layers, as small as their logits."""
    monkeypatch.setattr(bench, "SIZES", {"S": (64, 2, 4)})
    for path in folder.glob("*-S"):
        shutil.rmtree(path)
    return folder


REAL = [
    Case("llama", "S", "full"),
    Case("llama", "S", "lora", "pairs", more={"train.accumulation": 2}),
    Case("llama", "S", "qlora", checkpointing=True),
    Case("llama", "S", "bitnet", "text"),
    Case("gpt2", "S", "qlora", "single"),
    Case("mixtral", "S", "full", checkpointing=True),
]


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_planned_memory_is_that_of_real_steps(case: Case, tiny: Path) -> None:
    found = bench.found_of(case, tiny, torch.device("cpu"), FEW)
    off = found["planned_bytes"] / found["measured_bytes"] - 1
    assert -bench.UNDER <= off <= bench.OVER, found
    assert len(found["seconds"]) == 1


def traced(recipe: Any, *, layers: int, whole: bool) -> Traced:
    source = source_of(recipe.model)
    config = load_config(source)
    config.num_hidden_layers = layers
    micro = facts_of(recipe, source).micro
    return trace(
        recipe, source, config, DeviceSpec("cpu", torch.bfloat16, None, False), micro, evaluate=micro, generate=64, whole=whole
    )


def test_two_and_four_layers_tell_exactly_of_six(tiny: Path) -> None:
    recipe = bench.recipe_of(Case("llama", "S", "qlora", checkpointing=True), tiny, "cpu")
    short, whole = (traced(recipe, layers=6, whole=all_of_them) for all_of_them in (False, True))
    assert (short.layers, whole.layers) == ((4, 6), (6, 6))
    assert short.static == whole.static
    for a, b in ((short.train, whole.train), (short.evaluate, whole.evaluate), (short.generate, whole.generate)):
        assert a is not None
        assert b is not None
        assert {at: moment.total for at, moment in a.moments.items()} == {at: moment.total for at, moment in b.moments.items()}
        assert +a.work == +b.work


def test_a_model_of_unlike_layers_is_traced_whole(tiny: Path) -> None:
    recipe = bench.recipe_of(Case("llama", "S", "full"), tiny, "cpu")
    source = source_of(recipe.model)
    config = new_config({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "use_sliding_window": True, "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"] * 3,
    })  # fmt: skip
    found = trace(recipe, source, config, DeviceSpec("cpu", torch.float32, None, False), facts_of(recipe, source).micro)
    assert (found.uniform, found.layers) == (False, (6, 6))


# ------------------------------------------------------------------------------------------------------------------ the bench


def made_up(**of: tuple[int, int, float, float]) -> list[Found]:
    """Cases: planned and measured bytes, planned and measured seconds."""
    return [
        Found(
            case=name, planned_bytes=planned, measured_bytes=measured, planned_reserved=None, reserved_bytes=None,
            planned_seconds=said, seconds=[seconds] * 3, calibrated=True, busy=0.0, layers=[4, 8], fast=[], terms={},
        )
        for name, (planned, measured, said, seconds) in of.items()
    ]  # fmt: skip


def test_rows_say_what_is_within_the_targets() -> None:
    found = made_up(a=(1030, 1000, 1.0, 1.1), b=(985, 1000, 1.0, 2.0), c=(1001, 1000, 1.0, 0.9))
    rows = {row["case"]: row for row in bench.rows(found, "cpu")}
    assert [rows[f"{name}: memory"]["met"] for name in "abc"] == [True, False, True]
    assert [rows[f"{name}: memory"]["target"] for name in "abc"] == [1.04, 0.99, 1.04]
    assert [rows[f"{name}: time"]["met"] for name in "abc"] == [True, False, True]
    assert rows["memory: median error"]["ours"] == pytest.approx(1.5)
    assert rows["memory: worst error"]["ours"] == pytest.approx(3.0)
    assert rows["memory: worst below"]["ours"] == pytest.approx(1.5)
    assert [rows[f"memory: {name}"]["met"] for name in ("median error", "worst error", "worst below")] == [False, True, False]
    assert (rows["time: within 20%"]["ours"], rows["time: within 20%"]["met"]) == (2, False)
    found[0]["calibrated"] = False
    rows = {row["case"]: row for row in bench.rows(found, "cpu")}
    assert rows["a: time"]["met"] is None
    assert "finetune bench device" in rows["a: time"]["note"]
    assert "time: within 20%" not in rows


def test_a_case_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("gpt2", "S", "full"), Case("llama", "S", "lora", "single")]
    said: list[tuple[int, int, str]] = []

    def in_a_child(case: Case, folder: Path, device: str, steps: Steps, tick: Callable[[float], None]) -> Found:
        tick(0.5)
        if case is cases[0]:
            raise bench.Lost("exit code 1: no room")
        return made_up(**{case.name: (1, 1, 1.0, 1.0)})[0]

    monkeypatch.setattr(bench, "make_data", lambda folder: None)
    monkeypatch.setattr(bench, "in_a_child", in_a_child)
    found, lost = bench.grid("cpu", lambda *told: said.append(told), cases, FEW)
    assert [one["case"] for one in found] == [cases[1].name]
    assert lost == {cases[0].name: "exit code 1: no room"}
    assert {told[2] for told in said} >= {case.name for case in cases}


def test_the_grid_is_what_was_asked_for() -> None:
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names) >= 24
    for of in ("full", "lora", "qlora", "bitnet"):
        assert {case.size for case in bench.CASES if case.of == of} == {"S", "M", "L"}, of
        assert {case.checkpointing for case in bench.CASES if case.of == of} == {False, True}, of
    for architecture in ("llama", "gpt2", "mixtral"):
        assert {case.size for case in bench.CASES if case.architecture == architecture} == {"S", "M", "L"}, architecture


@pytest.mark.slow
def test_the_whole_grid_meets_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory; times depend on what else this machine does, and are only there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "plan.json"
    bench_command("plan", file)
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["failed"] == {}
    assert len(document["cases"]) == len(bench.CASES)
    memory = [row for row in document["rows"] if "memory" in row["case"]]
    assert [row["case"] for row in memory if not row["met"]] == []
    assert all(row["ratio"] > 0 for row in document["rows"] if row["unit"] == "s/step")
