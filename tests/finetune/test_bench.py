"""`finetune bench`: its statistics, paired timing, result rows, child process and JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import finetune.bench as bench
from finetune import cli
from finetune.bench import baselines, bitnet, quant
from finetune.bench.child import Progress
from finetune.bench.measure import (
    WARM_UP,
    Amounts,
    Case,
    CPUClock,
    Pairing,
    Row,
    Skip,
    Timed,
    cache_bytes,
    interval,
    measure,
    pairs,
)
from finetune.screen import Screen, Shown

TINY = quant.Sizes(nf4=(128, 192), ternary=(128, 64), vector=(256, 64), tokens=16, few_tokens=4, pairs=2, short_pairs=2)

TINY_BITNET = bitnet.Sizes(cpu=bitnet.Shape(256, 256, 2, 4, 320, 2, 32), pairs=2, generated=8, generations=2)
CASES = [(quant, quant.SIZES), (bitnet, bitnet.SIZES)]


class ScriptedClock:
    """A clock that takes each time from the value that the call returns."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def evict(self) -> None:
        self.calls.append("evict")

    def time(self, call: Timed) -> tuple[float, object]:
        result = call()
        assert isinstance(result, torch.Tensor)
        self.calls.append("ours" if result[0] == 1 else "baseline")
        return float(result[1]), result


def scripted_pairing(ours: list[float], baseline: list[float], count: int) -> Pairing:
    """A pairing whose sides take these times in turn. The first call of each side only compares results."""
    times = {1.0: iter([1.0, *ours]), 1.01: iter([1.0, *baseline])}

    def side(mark: float) -> Any:
        return lambda: lambda: torch.tensor([mark, next(times[mark])])

    return Pairing(tuple, side(1.0), side(1.01), count, "script")


def test_interval_matches_the_standard_error_of_a_normal_median() -> None:
    values = np.random.default_rng(3).normal(2.0, 0.5, 400)
    median, low, high = interval(values.tolist())
    assert median == pytest.approx(float(np.median(values)))
    # The standard error of a normal sample's median is 1.2533 σ / √n; the interval is 1.96 standard errors to each side.
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.5 / 20, rel=0.25)
    assert low < median < high
    assert interval([1.5] * 30) == (1.5, 1.5, 1.5)
    assert interval(values.tolist()) == (median, low, high)  # deterministic


def test_interval_covers_the_true_median_at_its_stated_rate() -> None:
    samples = np.random.default_rng(0).lognormal(0.0, 0.3, (120, 31))
    covered = sum(low <= 1.0 <= high for _, low, high in map(interval, samples.tolist()))
    assert 105 <= covered <= 120  # 114 expected


def test_pairs_alternate_evict_the_cache_and_drop_the_warm_up() -> None:
    clock, progress = ScriptedClock(), list[float]()
    warm_up_times = [100.0] * WARM_UP
    ours, baseline = pairs(
        scripted_pairing([*warm_up_times, 2.0, 3.0, 4.0], [*warm_up_times, 4.0, 4.0, 4.0], 3), clock, progress.append
    )
    assert (ours, baseline) == ([2.0, 3.0, 4.0], [4.0, 4.0, 4.0])
    assert progress[-1] == 1.0
    assert clock.calls[::2] == ["evict"] * 2 * (3 + WARM_UP)
    sides = clock.calls[1::2]
    assert sides[:4] in (["ours", "baseline", "baseline", "ours"], ["baseline", "ours", "ours", "baseline"])


def test_calls_before_the_timed_one_are_untimed_and_use_other_inputs() -> None:
    inputs, events = list[torch.Tensor](), list[tuple[str, int]]()

    def make_input() -> tuple[torch.Tensor, ...]:
        inputs.append(torch.ones(2))
        return (inputs[-1],)

    def side(name: str) -> Any:
        def prepare(x: torch.Tensor) -> Timed:
            number = next(i for i, candidate in enumerate(inputs) if candidate is x)
            return lambda: events.append((name, number)) or x  # type: ignore[func-returns-value]

        return prepare

    class RecordingClock(ScriptedClock):
        def evict(self) -> None:
            events.append(("evict", -1))

        def time(self, call: Timed) -> tuple[float, object]:
            events.append(("time", -1))
            return 1.0, call()

    pairs(
        Pairing(make_input, side("a"), side("b"), 1, "", before=(side("a before"), side("b before"))),
        RecordingClock(),
        lambda part: None,
    )
    names = [name for name, _ in events]
    assert names[:2] == ["b", "a"]  # the comparison of results
    assert set(zip(*[iter(names[2:])] * 4, strict=True)) == {
        ("evict", "a before", "time", "a"),
        ("evict", "b before", "time", "b"),
    }
    timed_inputs = [number for name, number in events[2:] if name in ("a", "b")]
    assert timed_inputs[::2] == timed_inputs[1::2]  # both sides of a pair get the same input…
    assert len(set(timed_inputs)) == len(timed_inputs) // 2  # …and each pair gets its own
    untimed_inputs = [number for name, number in events if name.endswith("before")]
    assert not set(untimed_inputs) & set(timed_inputs)
    assert len(set(untimed_inputs)) == len(untimed_inputs)


@pytest.mark.parametrize(
    ("unit", "target", "ratio", "met"),
    [("ms", 0.8, 0.75, True), ("ms", 0.7, 0.75, False), ("products/s", 1.3, 4 / 3, True), ("products/s", 1.4, 4 / 3, False)],
)
def test_row_reports_the_median_of_the_ratios_of_pairs(unit: str, target: float, ratio: float, met: bool) -> None:
    warm_up = [1.0] * WARM_UP
    # Ratios 0.5, 0.75 and 1: their median is not the ratio of the medians.
    pairing = scripted_pairing([*warm_up, 2.0, 3.0, 40.0], [*warm_up, 4.0, 4.0, 40.0], 3)
    row = measure(Case("c", "b", unit, target, lambda: pairing), ScriptedClock(), lambda part: None)
    assert row["ratio"] == pytest.approx(ratio)
    assert row["met"] is met
    assert row["better"] == ("lower" if unit == "ms" else "higher")
    assert row["ours"] == pytest.approx(3000.0 if unit == "ms" else 1 / 3)  # the median of this side
    assert row["pairs"] == 3
    assert row["low"] is not None
    assert row["high"] is not None
    assert row["low"] <= ratio <= row["high"]


def test_sides_with_different_results_are_an_error() -> None:
    x = torch.ones(4)
    different = Pairing(lambda: (x,), lambda x: lambda: x, lambda x: lambda: 2 * x, 2, "")
    with pytest.raises(RuntimeError, match=r"compute different results: relative difference 0\.5"):
        measure(Case("c", "b", "ms", None, lambda: different), CPUClock(1 << 10), lambda part: None)
    nan = Pairing(lambda: (x,), lambda x: lambda: x * float("nan"), lambda x: lambda: x, 2, "")
    with pytest.raises(RuntimeError, match="compute different results"):
        measure(Case("c", "b", "ms", None, lambda: nan), CPUClock(1 << 10), lambda part: None)


def test_skipped_case_becomes_a_row_with_the_reason() -> None:
    def not_installed() -> Amounts:
        raise Skip("it is not installed, pip install it")

    row = measure(Case("c", "b", "ms", 1.0, not_installed), ScriptedClock(), lambda part: None)
    assert row.keys() == Row.__annotations__.keys()
    assert row["note"] == "skipped: it is not installed, pip install it"
    assert (row["ours"], row["ratio"], row["met"], row["target"]) == (None, None, None, 1.0)

    def broken(x: torch.Tensor) -> Timed:
        raise OSError("no such symbol")

    pairing = Pairing(lambda: (torch.ones(1),), lambda x: lambda: x, broken, 2, "")
    row = measure(Case("c", "b", "ms", 1.0, lambda: pairing), ScriptedClock(), lambda part: None)
    assert row["note"] == "skipped: the other side failed with OSError: no such symbol"


@pytest.mark.parametrize(
    ("ratio", "bounds", "verdict"),
    [
        (1.0, (0.9, 1.05), "≤ 1.1: met"),
        (1.0, (0.9, 1.2), "≤ 1.1: met, unsure"),
        (1.2, (1.15, 1.3), "≤ 1.1: missed"),
        (None, None, "skipped"),
    ],
)
def test_verdict_names_the_target_and_whether_it_was_met(
    ratio: float | None, bounds: tuple[float, float] | None, verdict: str
) -> None:
    def amounts() -> Amounts:
        if ratio is None:
            raise Skip("why")
        return Amounts(ratio, 1.0, "")

    row = measure(Case("c", "b", "ms", 1.1, amounts), ScriptedClock(), lambda part: None)
    row["low"], row["high"] = bounds or (None, None)
    assert bench.verdict(row) == verdict


def test_cache_size_comes_from_sysfs_or_is_assumed() -> None:
    size, source = cache_bytes(0)
    assert size >= 1 << 20
    assert source.startswith(("/sys/devices/system/cpu/cpu0/cache/", "assumed"))
    assert cache_bytes(10**6) == (64 << 20, "assumed: the system does not report it")


def test_kept_for_backward_counts_each_storage_once_without_parameters() -> None:
    x = torch.randn(16, 128, dtype=torch.bfloat16)
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    assert quant.kept_for_backward(linear, x) == x.nbytes
    assert quant.kept_for_backward(nn.Sequential(linear, nn.ReLU()), x) == x.nbytes + 16 * 64 * 2


def test_bitsandbytes_path_dequantizes_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, x = torch.randn(64, 128), torch.randn(4, 128, requires_grad=True)
    multiply = baselines.bitsandbytes_functional(weight)
    spy = Mock(wraps=functional.dequantize_4bit)
    monkeypatch.setattr(functional, "dequantize_4bit", spy)
    multiply(x).sum().backward()
    assert spy.call_count == 2
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(4, -1), atol=5.0)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("libggml", baselines.GGMLMatrix),
        ("bitsandbytes", baselines.bitsandbytes_functional),
        ("onebitllms", baselines.onebitllms_linear),
        ("torchao", baselines.torchao_linear),
    ],
)
def test_missing_package_skips_with_its_install_command(package: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Skip, match="pip install " + package):
        make(torch.zeros(64, 256))


def test_cases_differ_in_name_or_baseline() -> None:
    for (module, sizes), device in itertools.product(CASES, ("cpu", "cuda")):
        cases = module.cases(device, sizes)
        assert len({(case.name, case.against) for case in cases}) == len(cases)
        assert all(len(word) <= 23 for case in cases for word in (case.name, case.against))
        assert all(case.note for case in cases)  # the note gives the shapes
    assert all(count >= 30 for count in (quant.SIZES.pairs, quant.SIZES.short_pairs))


def test_unknown_benchmark_name_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in (("qant", "did you mean quant? available: quant"), ("speed", "available: quant")):
        monkeypatch.setattr(sys, "argv", ["finetune", "bench", name])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        assert exited.value.code == 2
        assert message in capsys.readouterr().err


def test_missing_benchmark_name_lists_the_benchmarks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "bench"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert all(f"finetune bench {name}: {about}" in error for name, about in bench.NAMES.items())


def test_unwritable_json_file_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_child", lambda *args: pytest.fail("measured all the same"))
    (tmp_path / "file").write_text("")
    refused = {
        tmp_path: "a folder",
        tmp_path / "file" / "below.json": "is not a folder",
        tmp_path / "no such" / "x.json": f"mkdir -p '{tmp_path / 'no such'}'",
        tmp_path / ("x" * 250 + ".json"): "cannot create a file",
        Path("/dev/null"): "not a regular file",
    }
    if sys.platform == "linux":
        refused[Path("/proc/x.json")] = "cannot create a file in /proc"  # root passes the permission check there
    for path, reason in refused.items():
        monkeypatch.setattr(sys, "argv", ["finetune", "bench", "quant", "--json", str(path)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        assert exited.value.code == 2
        error = capsys.readouterr().err
        assert "cannot write the results there" in error
        assert reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no file was created or left


def placeholder_row(case: Case) -> Row:
    """A row with figures of the greatest width."""
    ratio, timed = case.target or 0.1234, case.unit in ("ms", "products/s", "tokens/s")
    return {
        "case": case.name, "ours": 0.12345, "baseline": 12345.0, "ratio": ratio, "unit": case.unit, "target": case.target,
        "better": case.better, "low": 0.9123 * ratio if timed else None, "high": 1.1234 * ratio if timed else None,
        "pairs": 31, "met": False, "against": case.against, "backend": "b", "note": case.note,
    }  # fmt: skip


@pytest.mark.parametrize(("bench_module", "sizes"), CASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_fits_into_80_columns(device: str, bench_module: Any, sizes: Any) -> None:
    rows = [placeholder_row(case) for case in bench_module.cases(device, sizes)]
    file = io.StringIO()
    bench._show(rows, Screen(Console(file=file, width=80, highlight=False, soft_wrap=True)))
    lines = file.getvalue().splitlines()
    table, notes = lines[: 2 * len(rows) + 2], lines[2 * len(rows) + 2 :]
    assert all(len(line) <= 80 for line in table)
    assert "…" not in file.getvalue()
    for number, (row, first, second) in enumerate(zip(rows, table[2::2], table[3::2], strict=True), 1):
        assert first.split()[0] == str(number)
        assert row["case"] in first
        assert first.rstrip().endswith(row["better"])
        assert row["against"] in second
        assert (row["low"] is None) or f"[{row['low']:.3g}, {row['high']:.3g}]" in second
        if row["target"] is None:
            assert second.rstrip().endswith("for context only")
        else:
            assert f"{'≤' if row['better'] == 'lower' else '≥'} {row['target']:.3g}: missed" in second
            assert second.rstrip().endswith("unsure") == (row["low"] is not None)
    for note in notes[:-1]:
        numbers, text = note.split(": ", 1)
        assert [rows[int(number) - 1]["note"] for number in numbers.split(", ")] == [text] * len(numbers.split(", "))
    assert notes[-1] == "unsure: the target is within the interval"


def test_progress_is_proportional_to_elapsed_time() -> None:
    now = 0.0
    progress = Progress([4.0, 4.0, 2.0], lambda: now)
    reports: list[tuple[float, int]] = []
    # The second case is much slower than its share predicts.
    for share, build, pair in ((4.0, 6.0, 1.0), (4.0, 3.0, 10.0), (2.0, 0.0, 3.0)):
        progress.begin(share)
        now += build
        for turn in range(1, 11):
            now += pair
            reports.append((now, progress.percent(turn / 10)))
        progress.end(True)
    total = now
    assert reports[-1][1] == 100
    assert reports[0][1] == 0  # building time precedes the first pair, so there is no estimate yet
    assert reports[1][1] == pytest.approx(100 * 8 / 40, abs=1)  # 16 s for a share of 4, so 40 s for all
    late = [(when, percent) for when, percent in reports if when >= 39]  # from the second pair of the slow case on
    assert all(percent == pytest.approx(100 * when / total, abs=3) for when, percent in late)
    assert all(0 < after - before <= 10 for (_, before), (_, after) in itertools.pairwise(late))  # no standstill, no jump


def test_skipped_cases_do_not_affect_the_time_estimate() -> None:
    now = 0.0
    progress = Progress([1.0, 1.0, 1.0], lambda: now)
    progress.begin(1.0)
    now += 10.0
    progress.end(True)
    progress.begin(1.0)
    progress.end(False)
    progress.begin(1.0)
    assert progress.percent(0.0) == 50


def test_packed_weight_layout_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a layer. Otherwise the kernel row would mostly time the layout conversion (220 of 221 ms at 4096 × 11008)."""
    from quant.backends import aten

    monkeypatch.setattr(baselines, "GGMLMatrix", Mock())
    spy = Mock(wraps=aten._int4pack)
    monkeypatch.setattr(aten, "_int4pack", spy)
    pairing = quant._vector_kernel(dataclasses.replace(TINY, vector=(256, 64)), "aten")
    with torch.no_grad():
        for _ in range(3):
            pairing.ours(*pairing.fresh())()
    assert spy.call_count == 1


@pytest.mark.alone
def test_quant_benchmark_runs_end_to_end_with_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quant, "SIZES", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "quant.json"
    monkeypatch.setattr(sys, "argv", ["finetune", "bench", "quant", "--json", str(file)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert not exited.value.code
    document = json.loads(file.read_text(encoding="utf-8"))
    rows = document["rows"]
    assert [row["case"] for row in rows] == [case.name for case in quant.cases("cpu", TINY)]
    assert len({row["case"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == Row.__annotations__.keys()
        if row["ratio"] is None:
            assert row["note"].startswith("skipped: ")
            continue
        assert row["backend"]
        assert row["ratio"] > 0
        assert (row["met"] is None) == (row["target"] is None)
        if row["unit"] in ("ms", "products/s"):
            assert row["pairs"] == 2
            assert row["low"] <= row["ratio"] <= row["high"]
    untimed_rows = {row["unit"]: row for row in rows if row["pairs"] == 0 and row["ratio"] is not None}
    assert untimed_rows["bits a weight"]["met"] is True
    assert untimed_rows["bits a weight"]["ours"] == 2 + 32 / (128 * 64)
    assert untimed_rows["MiB"]["ours"] == (16 * 128 + 4 * 16) / 2**20  # int8 activations with one scale per row
    assert untimed_rows["MiB"]["baseline"] == 2 * 16 * 128 / 2**20
    device = document["provenance"]["devices"]["cpu"]
    assert device["threads"] == 1
    assert "(1 thread)" in device["device"]
    assert device["evicted_bytes"] == 2 * device["cache_bytes"]
    assert set(device["backends"]) == {"nf4", "ternary"}
    assert document["provenance"]["versions"]["torch"]
    assert document["provenance"]["command"] == f"finetune bench quant --json {file}"
    output = capsys.readouterr().out
    assert "llama.cpp" in output
    assert ": met" in output or ": missed" in output
    assert "pairs in alternating order" in output
    assert "another run, or a busy machine, can be outside it" in output
    assert "goals of this project; a missed one does not mean that your machine is at fault" in output
    assert [path.name for path in file.parent.iterdir()] == ["quant.json"]


def test_ctrl_c_leaves_the_old_file_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = list[subprocess.Popen[str]]()

    class RecordedPopen(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            children.append(self)

    monkeypatch.setattr(quant, "SIZES", dataclasses.replace(TINY, pairs=10**6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)

    class InterruptedScreen(Screen):
        @contextlib.contextmanager
        def phase(self, name: str) -> Iterator[Shown]:
            def interrupt(done: int, total: int, note: str = "") -> None:
                raise KeyboardInterrupt

            yield interrupt

    monkeypatch.setattr(bench, "Screen", InterruptedScreen)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (folder := tmp_path / "results").mkdir()
    file = folder / "quant.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        bench.bench_command("quant", file)
    assert file.read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["quant.json"]
    (child,) = children
    assert child.poll() is not None
    assert not list(temporary.glob("finetune-bench-*"))


def test_failing_child_process_reports_its_error() -> None:
    with pytest.raises(RuntimeError, match="no_such_size"):
        list(bench._child("quant", "cpu", {"no_such_size": 1}))


def test_rate_is_the_work_of_a_call_over_its_time() -> None:
    pairing = dataclasses.replace(
        scripted_pairing([*[1.0] * WARM_UP, 2.0], [*[1.0] * WARM_UP, 4.0], 1), work=60.0, note="seen late"
    )
    row = measure(Case("c", "b", "tokens/s", None, lambda: pairing, note="known"), ScriptedClock(), lambda part: None)
    assert (row["ours"], row["baseline"], row["ratio"], row["better"]) == (30.0, 15.0, 2.0, "higher")
    assert row["note"] == "known; seen late"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not compile: that takes longer than these tests."""
    monkeypatch.setattr(baselines, "compiles", lambda device: False)


def bitnet_case(name: str, against: str) -> Case:
    return next(c for c in bitnet.cases("cpu", TINY_BITNET) if (c.name, c.against) == (name, against))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("side", ["bf16", "AutoBitLinear", "formula"])
def test_ternary_step_is_timed_against_each_baseline(side: str) -> None:
    row = measure(bitnet_case("ternary step", side), CPUClock(1 << 10), lambda part: None)
    assert row["ratio"] is not None
    assert 0.01 < row["ratio"] < 100
    assert row["pairs"] == 2
    assert row["backend"]
    assert row["note"].endswith("theirs runs eagerly") == (side == "AutoBitLinear")


def test_all_sides_start_with_equal_weights_and_train_all_of_them() -> None:
    shape = TINY_BITNET.cpu
    ids = bitnet.batch(shape, "cpu")
    models = {side: bitnet.build_model(shape, "cpu", side) for side in ("ours", "bf16", "AutoBitLinear", "formula")}
    states = {side: {k: v.clone() for k, v in model.state_dict().items()} for side, model in models.items()}
    with torch.compiler.set_stance("force_eager"):
        for side, model in models.items():
            assert states[side].keys() == states["bf16"].keys()
            assert all(torch.equal(value, states["bf16"][name]) for name, value in states[side].items())
            bitnet.Steps(model, torch.bfloat16)(ids)
            assert all(not torch.equal(value, states[side][name]) for name, value in model.named_parameters()), side


def activations_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_quantized_activations", lambda x: x)


def inverted_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_ternary", lambda w: (w * (scale := 1 / w.abs().mean())).round().clamp(-1, 1) * scale)


def one_layer_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_layers = baselines._body
    monkeypatch.setattr(baselines, "_body", lambda m: {k: v for k, v in linear_layers(m).items() if not k.endswith("k_proj")})


def halved_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:  # the loss stays correct
        weight = baselines._ternary(self.weight).detach() + 0.5 * (self.weight - self.weight.detach())
        return nn.functional.linear(baselines._quantized_activations(x).detach() + (x - x.detach()), weight)

    monkeypatch.setattr(baselines.StraightThrough, "forward", forward)


def other_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def negate_one_weight(model: Any) -> None:
        baselines.straight_through(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.neg_()

    monkeypatch.setitem(bitnet.SIDES, "formula", negate_one_weight)


@pytest.mark.parametrize(
    "introduce_fault",
    [activations_not_quantized, inverted_scale, one_layer_not_quantized, halved_gradient, other_initial_weights],
)
def test_sides_that_train_different_models_are_an_error(introduce_fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    introduce_fault(monkeypatch)
    with pytest.raises(RuntimeError, match=r"the two sides train different models: the (loss|gradients) differ by"):
        measure(bitnet_case("ternary step", "formula"), CPUClock(1 << 10), lambda part: None)


def test_failing_baseline_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.StraightThrough, "forward", Mock(side_effect=OSError("no such kernel")))
    row = measure(bitnet_case("ternary step", "formula"), CPUClock(1 << 10), lambda part: None)
    assert row["note"] == "skipped: the other side failed with OSError: no such kernel"


def test_compiles_is_false_without_a_working_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    for compile_ in (no_compiler, lambda function: function):  # the second: torch.compile is switched off
        monkeypatch.setattr(torch, "compile", compile_)
        baselines.compiles.cache_clear()
        assert not baselines.compiles("cpu")
    baselines.compiles.cache_clear()


@pytest.mark.usefixtures("eager")
def test_peak_memory_of_each_side_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = list[str]()

    def measure_peak(device: str, sizes: Any, side: str) -> int:
        sides.append(side)
        return {"ours": 3, "bf16": 4, "AutoBitLinear": 6, "formula": 5}[side] << 20

    monkeypatch.setattr(bitnet, "in_a_child", measure_peak)
    cases = [case for case in bitnet.cases("cpu", TINY_BITNET) if case.name == "peak memory"]
    rows = [measure(case, CPUClock(1 << 10), lambda part: None) for case in cases]
    assert [(row["ours"], row["baseline"], row["ratio"], row["met"]) for row in rows] == [
        (3, 4, 0.75, True), (3, 6, 0.5, True), (3, 5, 0.6, True),
    ]  # fmt: skip
    assert sorted(sides) == ["AutoBitLinear", "bf16", "formula", "ours"]


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.alone
def test_peak_memory_covers_weights_gradients_and_optimizer() -> None:
    sizes = dataclasses.replace(TINY_BITNET, cpu=TINY_BITNET.cpu._replace(hidden=512, intermediate=1024))
    parameters = sum(p.numel() for p in bitnet.build_model(sizes.cpu, "cpu", "bf16").parameters())
    # In bytes: at least the fp32 weights, gradients and two moments.
    assert 12 * parameters < bitnet.peak("cpu", sizes, "bf16") < 40 * parameters


def test_memory_of_missing_onebitllms_skips_with_its_install_command() -> None:
    with pytest.raises(Skip, match="pip install onebitllms"):
        bitnet.in_a_child("cuda", TINY_BITNET, "onebitllms")


def test_exports_are_measured_in_size_and_speed() -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    cases = bitnet.cases("cpu", TINY_BITNET)[6:]
    rows = [measure(case, CPUClock(1 << 10), lambda part: None) for case in cases]
    assert [(row["case"], row["against"]) for row in rows] == [
        ("bitnet folder", "bf16 safetensors"), ("GGUF TQ2_0", "GGUF F16"), ("GGUF TQ1_0", "GGUF F16"),
        ("TQ2_0 generation", "GGUF F16"),
    ]  # fmt: skip
    ratios = [row["ratio"] or 0 for row in rows]
    assert ratios[2] < ratios[1] < 0.4  # few of the weights of so small a model are ternary
    assert 0.1 < ratios[0] < 0.3
    assert 0.01 < ratios[3] < 100
    table, body = 320 * 256, 2 * 7 * 256**2
    assert (rows[0]["baseline"] or 0) * 2**20 == pytest.approx(2 * (table + body), rel=0.02)
    assert (rows[0]["ours"] or 0) * 2**20 == pytest.approx(2 * table + body / 4, rel=0.05)


def test_rows_without_llama_cpp_give_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("GGUF TQ2_0", "TQ2_0 generation"):
        row = measure(bitnet_case(name, "GGUF F16"), CPUClock(1 << 10), lambda part: None)
        assert row["ratio"] is None
        assert row["note"].endswith("is not installed, pip install 'finetune12g[export]'")


@pytest.mark.slow
def test_bitnet_benchmark_runs_end_to_end_with_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitnet, "SIZES", TINY_BITNET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    file = tmp_path / "bitnet.json"
    bench.bench_command("bitnet", file)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["against"]) for row in rows] == [
        (case.name, case.against) for case in bitnet.cases("cpu", TINY_BITNET)
    ]
    for row in rows:
        assert row["ratio"] is not None or "pip install" in row["note"]
    compiled = [row for row in rows if row["against"] == "AutoBitLinear"]
    assert all(row["note"].endswith("theirs runs eagerly") for row in compiled)
    assert not list(temporary.glob("finetune-bench-*"))


@pytest.mark.slow
def test_memory_child_exits_when_its_parent_is_gone() -> None:
    sizes = json.dumps(dataclasses.asdict(dataclasses.replace(TINY_BITNET, cpu=bitnet.CPU._replace(tokens=4096))))
    command = [sys.executable, "-P", "-m", "finetune.bench.child", "bitnet", "cpu", sizes, "bf16"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) == 1
    with pytest.raises(Skip, match=r"the steps of nobody failed in a process of their own \(exit code 1\)"):
        bitnet.in_a_child("cpu", TINY_BITNET, "nobody")
