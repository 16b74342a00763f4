"""The device table, the times estimated from it, and the calibration that `finetune bench device` saves."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UserError
from finetune.memory import machine_bytes
from finetune.planning import devices
from finetune.planning.devices import Calibration, attention_flops, device, parse_bytes
from finetune.units import GIB


@pytest.fixture(autouse=True)
def isolated_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the tests away from the user's calibrations and device files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def calibration(**changes: Any) -> Calibration:
    """Invented figures: rates are sqrt(m · n · k) in two layouts; each elementwise curve has two points."""
    gemm = [
        {"dtype": "bf16", "layout": layout, "m": m, "n": n, "k": k, "flops_per_second": scale * math.sqrt(m * n * k)}
        for layout, scale in (("nt", 1e6), ("tn", 0.5e6))
        for m in (1, 64, 4096)
        for n in (64, 4096)
        for k in (64, 4096)
    ]
    attention = [
        {
            "dtype": "bf16",
            "length": length,
            "heads": heads,
            "kv_heads": 3,
            "width": 64,
            "forward": 1e9 * heads,
            "both": 2e9 * heads,
        }
        for heads in (9, 32)
        for length in (64, 1024)
    ]
    fields: dict[str, Any] = {
        "device": "a test", "date": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2.13.0"}, "threads": 2, "gemm": gemm,
        "bandwidth_bytes_per_second": 2e10, "read_bytes_per_second": 3e10, "fresh_seconds_per_byte": 0.0,
        "elementwise": {"add bf16": [[1e6, 1e11], [1e8, 1e9]], "silu bf16": [[1e6, 2e10], [1e8, 2e9]]},
        "launch_seconds": 1e-6, "step": {"busy": 1.25, "operation": 4e-5},
        "dequantize": {"nf4": 1e9}, "quantize": {"ternary": 5e8},
        "attention": attention, "optimizer": {"adamw fp32": 1e9}, "optimizer_tensor": {"adamw fp32": 1e-5},
    }  # fmt: skip
    return Calibration(**(fields | changes))


# ----------------------------------------------------------------------------------------------------------- the device table


def test_every_device_has_positive_figures_and_a_source() -> None:
    entries = devices.devices()
    assert len(entries) == len(devices.TABLE)  # no duplicate keys
    for key, entry in entries.items():
        assert key == entry.key
        figures = (entry.memory_bytes, entry.bandwidth, entry.watts, entry.context_bytes, *entry.rates.values())
        assert all(figure > 0 for figure in figures), key
        assert entry.source.startswith("https://"), key
        assert entry.context_bytes < entry.memory_bytes / 4
        assert {"fp16", "fp32"} <= entry.rates.keys()
        assert ("bf16" in entry.rates) == (key not in ("t4", "m1", "m1-max")), key
        assert (entry.capability is None) == (entry.type == "mps")


@pytest.mark.parametrize(
    ("key", "bf16", "int8"),  # TFLOP/s of the whitepapers' tables, dense, bf16 with fp32 accumulation
    [("rtx-4070", 58.3, 233.2), ("rtx-4090", 165.2, 660.6), ("rtx-4080", 97.5, 389.9), ("rtx-3090", 71, 284),
     ("rtx-3080", 59.5, 238), ("rtx-3070", 40.6, 162.6), ("rtx-5090", 209.5, 838)],
)  # fmt: skip
def test_geforce_rates_are_those_of_the_whitepapers(key: str, bf16: float, int8: float) -> None:
    card = device(key)
    assert card.rates["bf16"] == card.rates["fp16"] == pytest.approx(bf16 * 1e12, rel=0.004)
    assert card.rates["int8"] == pytest.approx(int8 * 1e12, rel=0.004)
    assert card.rates["fp32"] == pytest.approx(card.rates["bf16"] / 2)


@pytest.mark.parametrize(
    ("name", "key"),
    [("rtx-4070", "rtx-4070"), ("RTX 4070", "rtx-4070"), ("4070", "rtx-4070"),
     ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
     ("4060 ti 16gb", "rtx-4060-ti-16gb"), ("4060ti 8 GB", "rtx-4060-ti"), ("3080", "rtx-3080"), ("3080 12GB", "rtx-3080-12gb"),
     ("4090 laptop", "rtx-4090-laptop"), ("A100 80GB", "a100-80gb"), ("h100 sxm", "h100-sxm"), ("M1 Max", "m1-max"),
     ("T4", "t4")],
)  # fmt: skip
def test_common_spellings_of_a_name_find_the_device(name: str, key: str) -> None:
    assert device(name).key == key


def test_unknown_device_name_is_a_user_error_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"did you mean .*rtx-4070") as caught:
        device("rtx-407")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="known: cpu, rtx-3060,"):
        device("a toaster")
    with pytest.raises(UserError, match="one of a100-40gb, a100-80gb"):
        device("A100")


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"), ("NVIDIA A100 80GB PCIe", 79.2, "a100-80gb"), ("Tesla T4", 14.6, "t4"),
     ("NVIDIA H100 80GB HBM3", 79.2, "h100-sxm"), ("NVIDIA H100 PCIe", 79.2, "h100-pcie"), ("NVIDIA H200", 139.8, "h200"),
     ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx-4060-ti-16gb"), ("NVIDIA GeForce RTX 4060 Ti", 7.7, "rtx-4060-ti"),
     ("NVIDIA GeForce RTX 4070 Laptop GPU", 7.7, "rtx-4070-laptop")],
)  # fmt: skip
def test_driver_names_match_entries_of_the_table(name: str, gib: float, key: str) -> None:
    match = devices.match(name, int(gib * GIB), 40, (8, 0))
    assert match.key == key
    assert match.memory_bytes == int(gib * GIB)


def test_card_missing_from_the_table_is_estimated_from_its_multiprocessors() -> None:
    match = devices.match("NVIDIA RTX 2000 Ada Generation", 16 * GIB, 22, (8, 9))
    assert (match.key, match.memory_bytes, match.capability) == ("nvidia-rtx-2000-ada-generation", 16 * GIB, "8.9")
    assert match.rates["bf16"] == pytest.approx(2 * 2 * 22 * 128 * 1.7e9)
    assert "bf16" not in devices.match("GeForce GTX 1660", 6 * GIB, 22, (7, 5)).rates
    assert "not in the table" in match.source


def test_user_defined_devices_are_read_from_a_file() -> None:
    path = devices.own_path()
    path.parent.mkdir(parents=True)
    path.write_text(
        "my-card: {name: Mine, memory: 20GB, bandwidth: 600, bf16: 80, fp32: 40, watts: 250, source: 'https://x.y'}\n"
    )
    mine = device("my-card")
    assert (mine.name, mine.memory_bytes, mine.bandwidth, mine.rates) == ("Mine", 20 * GIB, 600e9, {"bf16": 80e12, "fp32": 40e12})
    assert device("4070").key == "rtx-4070"
    for content, message in (
        ("my-card: {memory: 20GB, bf16: 80, watts: 250}", "missing: bandwidth"),
        ("my-card: {memory: 20GB, bandwith: 600, bandwidth: 600, bf16: 80, watts: 250}", "unknown: bandwith"),
        ("my-card: {memory: 20GB, bandwidth: -600, bf16: 80, watts: 250}", "positive"),
        ("- my-card", "not a mapping"),
        ("my-card: {", "not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            device("my-card")


def test_device_table_imports_no_heavy_library(repository: Path) -> None:
    heavy = "{'torch', 'yaml', 'numpy'}"
    code = f"import sys; from finetune.planning import devices; devices.device('4070'); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "count"),
    [("12GB", 12 * GIB), ("11.5GiB", 23 * GIB // 2), (" 8 gb ", 8 * GIB), ("512M", GIB // 2), ("1t", 1024 * GIB)],
)
def test_parse_bytes_counts_in_powers_of_two(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["12", "", "GB", "-3GB", "0GB", "twelve GB", "12GBs", "1e3GB", "nan GB"])
def test_parse_bytes_rejects_invalid_amounts(text: str) -> None:
    with pytest.raises(UserError, match="not an amount of memory"):
        parse_bytes(text)


# -------------------------------------------------------------------------------------------- estimates without a calibration


def test_uncalibrated_times_are_bound_by_compute_or_bandwidth() -> None:
    card = device("rtx-4070")
    large = card.gemm_seconds("bf16", 4096, 4096, 4096)
    assert large == pytest.approx(2 * 4096**3 / (card.rates["bf16"] * devices.REACHED["bf16"]))
    vector = card.gemm_seconds("bf16", 1, 4096, 4096)
    assert vector == pytest.approx(2 * 4096 * 4096 / (504e9 * 0.8), rel=0.01)  # the weight is read once
    assert card.gemm_seconds("bf16", 2, 2, 2) == devices.SHORTEST_KERNEL_S
    assert card.gemm_seconds("ternary", 4096, 4096, 4096) == pytest.approx(card.gemm_seconds("int8", 4096, 4096, 4096), rel=0.2)
    assert card.memory_seconds(1e9) == pytest.approx(1 / (504 * 0.8))
    assert card.attention_seconds("bf16", 2048, 32, 64, backward=True) > 3 * card.attention_seconds("bf16", 2048, 32, 64)
    # fp32 AdamW reads weight, gradient and two moments, and writes three of them; 8-bit moments take fewer bytes.
    assert card.optimizer_seconds("adamw", 10**8) == pytest.approx(28e8 / (504e9 * 0.8))
    assert card.optimizer_seconds("adamw_8bit", 10**8) < 0.7 * card.optimizer_seconds("adamw", 10**8)
    assert card.together(0.0, 10) == pytest.approx(10 * devices.OPERATION_S["cuda"])
    assert card.together(1.0, 10) == 1.0  # a GPU computes while the host launches kernels


def test_unsupported_dtype_is_an_error_that_suggests_another() -> None:
    with pytest.raises(UserError, match=r"does not support bf16(.|\n)*model.dtype=fp16"):
        device("t4").gemm_seconds("bf16", 64, 64, 64)


# ----------------------------------------------------------------------------------------------- estimates with a calibration


def test_gemm_times_are_interpolated_between_measured_shapes() -> None:
    measured = calibration()

    def seconds(m: float, n: float, k: float) -> float:
        return 2 * m * n * k / (1e6 * math.sqrt(m * n * k))

    for shape in ((64, 64, 64), (4096, 64, 4096), (300, 700, 2000), (17, 100, 64)):
        assert measured.gemm_seconds("bf16", *shape) == pytest.approx(seconds(*shape))  # interpolation is exact for a power law
        assert measured.gemm_seconds("bf16", *shape, layout="tn") == pytest.approx(2 * seconds(*shape))
        assert measured.gemm_seconds("bf16", *shape, layout="nn") == pytest.approx(seconds(*shape))  # not measured, so as nt
    assert measured.gemm_seconds("bf16", 64, 64, 0) == 0
    # Beyond the grid the rate of its edge applies: four times the work takes four times as long.
    assert measured.gemm_seconds("bf16", 4096, 4 * 4096, 4096) == pytest.approx(4 * seconds(4096, 4096, 4096))
    assert measured.gemm_seconds("bf16", 64, 32, 64) == pytest.approx(seconds(64, 64, 64) / 2)
    with_page_faults = calibration(fresh_seconds_per_byte=1e-9)
    assert with_page_faults.gemm_seconds("bf16", 300, 700, 2000) == measured.gemm_seconds("bf16", 300, 700, 2000)
    difference = with_page_faults.gemm_seconds("bf16", 4096, 8192, 64) - measured.gemm_seconds("bf16", 4096, 8192, 64)
    assert difference == pytest.approx(2 * 4096 * 8192 * 1e-9)


def test_missing_gemm_shape_takes_the_rate_of_its_neighbour() -> None:
    complete = calibration()
    points = [p for p in complete.gemm if (p["layout"], p["m"], p["n"], p["k"]) != ("nt", 4096, 4096, 4096)]
    measured = calibration(gemm=points)
    edge = max(p["flops_per_second"] for p in points if p["layout"] == "nt")
    assert measured.gemm_seconds("bf16", 4096, 4096, 4096) == pytest.approx(2 * 4096**3 / edge)


def test_unmeasured_dtype_is_an_error() -> None:
    with pytest.raises(UserError, match=r"fp64 were not measured(.|\n)*bench device"):
        calibration().gemm_seconds("fp64", 64, 64, 64)
    assert calibration().measured("ternary") is None
    int8 = [{**point, "dtype": "int8"} for point in calibration().gemm]
    assert calibration(gemm=int8).measured("ternary") == "int8"


def test_elementwise_times_follow_the_curve_of_their_operator() -> None:
    measured = calibration()
    assert measured.elementwise_seconds(1e6) == pytest.approx(1e-5)
    assert measured.elementwise_seconds(1e3) == pytest.approx(1e-8)  # below the curve its first rate applies
    assert measured.elementwise_seconds(1e10) == pytest.approx(10)
    assert measured.elementwise_seconds(1e7) == pytest.approx(1e7 / 1e10)  # half way on a logarithmic scale
    assert measured.elementwise_seconds(1e8, "silu") == pytest.approx(0.05)
    assert measured.elementwise_seconds(1e8, "tanh") == measured.elementwise_seconds(1e8, "add")
    assert measured.elementwise_seconds(0) == 0


def test_calibrated_device_uses_its_measurements() -> None:
    measured = calibration()
    card = dataclasses.replace(device("rtx-4070"), measured=measured)
    assert card.gemm_seconds("bf16", 64, 64, 64, "tn") == measured.gemm_seconds("bf16", 64, 64, 64, "tn")
    assert card.gemm_seconds("fp32", 4096, 4096, 4096) == device("rtx-4070").gemm_seconds(
        "fp32", 4096, 4096, 4096
    )  # was not measured
    assert card.memory_seconds(1e6) == measured.elementwise_seconds(1e6)
    assert card.operation_seconds == 4e-5
    assert card.together(1.0, 1000) == pytest.approx(1.25 + 0.04 if card.type == "cpu" else 1.25)
    assert card.dequantize_seconds("nf4", 10**9) == 1
    assert card.dequantize_seconds("ternary", 10**9) == device("rtx-4070").dequantize_seconds("ternary", 10**9)
    assert card.quantize_seconds("ternary", 10**9) == 2
    assert card.optimizer_seconds("adamw", 10**9, tensors=100) == pytest.approx(1.001)
    # Attention: the measured rate of the nearest heads × width.
    assert card.attention_seconds("bf16", 256, 10, 64) == pytest.approx(attention_flops(256, 10, 64) / 9e9)
    assert card.attention_seconds("bf16", 256, 32, 64, backward=True) == pytest.approx(3.5 * attention_flops(256, 32, 64) / 64e9)


def test_calibration_round_trips_through_its_file(isolated_folders: Path) -> None:
    measured = calibration()
    path = devices.save_calibration("rtx-4070", measured)
    assert path == isolated_folders / "cache" / "finetune12g" / "device-rtx-4070.json" == devices.calibration_path("rtx-4070")
    assert device("4070").measured == measured
    assert device("4080").measured is None
    # A file of another format version is ignored; a damaged one is an error.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": devices.FORMAT + 1}))
    assert device("4070").measured is None
    for damaged in (json.dumps({"format": devices.FORMAT}), "{", "[]"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="finetune bench device"):
            device("4070")


# ---------------------------------------------------------------------------------------------------------------- this machine


def test_cpu_device_uses_estimates_until_it_is_calibrated() -> None:
    import torch

    estimated = device("cpu")
    assert estimated == devices.present("cpu")
    assert (estimated.type, estimated.measured, estimated.capability) == ("cpu", None, None)
    assert f"{torch.get_num_threads()}-thread" in estimated.key
    assert 0 < estimated.memory_bytes == machine_bytes()
    assert estimated.source.startswith("estimated from its instruction set")
    assert all(estimated.gemm_seconds(dtype, 64, 64, 64) > 0 for dtype in ("bf16", "fp32", "int8", "ternary"))
    devices.save_calibration(estimated.key, calibration())
    calibrated = devices.present("cpu")
    assert calibrated.measured is not None
    assert calibrated.bandwidth == 2e10
    assert calibrated.rates["bf16"] == calibrated.measured.rates()["bf16"] == pytest.approx(1e6 * 4096**1.5)
    assert calibrated.rates["fp32"] == estimated.rates["fp32"]  # not measured, so still the estimate
    assert calibrated.source == "measured 2026-01-01T00:00:00+00:00"


def test_absent_device_is_an_error() -> None:
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a cuda or mps device")
    for kind in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"no {kind} device"):
            devices.present(kind)
    assert devices.present().type == "cpu"


def test_bench_device_measures_and_saves_a_calibration(
    isolated_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune import cli
    from finetune.bench import device as bench

    small = bench.Sizes(
        gemm=(1, 16, 64), coarse=(32, 64), gemm_seconds=0.2, rounds=2, results=(4096, 65536), beyond=0, weights=(64, 128),
        lengths=(16, 32),
        heads=((2, 1, 16),), tokens=64, parameters=65536, repeats=2,
        too_busy=9.0, steps=(),
    )  # fmt: skip
    monkeypatch.setattr(bench.device_command, "__defaults__", (small,))
    json_path = isolated_folders / "found.json"
    calibration_file = devices.calibration_path(devices.present("cpu").key)
    calibration_file.parent.mkdir(parents=True)
    calibration_file.write_text("{")  # a damaged file must not prevent a new measurement
    monkeypatch.setattr(sys, "argv", ["finetune", "bench", "device", "--json", str(json_path)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 0
    output = capsys.readouterr().out
    assert "saved for finetune plan in" in output
    cpu = devices.present("cpu")
    measured = cpu.measured
    assert measured is not None
    layouts = {(point["dtype"], point["layout"]) for point in measured.gemm}
    assert layouts >= {("bf16", "nt"), ("bf16", "nn"), ("fp32", "tn"), ("int8", "nt"), ("fp16", "nt"), ("ternary", "nt")}
    shapes = {
        (point["m"], point["n"], point["k"]) for point in measured.gemm if point["dtype"] == "fp32" and point["layout"] == "nt"
    }
    assert shapes == {(m, n, k) for m in (1, 16, 64) for n in (16, 64) for k in (16, 64)}
    assert all(math.isfinite(point["flops_per_second"]) and point["flops_per_second"] > 0 for point in measured.gemm)
    for rates in (measured.dequantize, measured.quantize, measured.optimizer):
        assert rates
        assert all(rate > 0 for rate in rates.values())
    assert measured.dequantize.keys() == {"nf4", "nf4-double", "ternary"}
    assert [len(curve) for curve in measured.elementwise.values()] == [2] * len(measured.elementwise)
    assert len(measured.attention) == 4
    assert measured.launch_seconds > 0 < measured.step["operation"]
    assert cpu.gemm_seconds("bf16", 100, 50, 50) > 0
    document = json.loads(json_path.read_text())
    assert document["name"] == "device"
    assert {"case", "ours", "baseline", "ratio", "unit", "target"} <= document["rows"][0].keys()
    assert all(row["baseline"] is None for row in document["rows"])  # CPUs are not in the table


def test_calibration_of_a_busy_machine_is_not_saved(isolated_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from finetune.bench import device as bench
    from finetune.screen import Screen

    monkeypatch.setattr(bench, "measure", lambda *args: calibration(others=0.3))
    screen = Screen(Console(file=io.StringIO()))
    with pytest.raises(UserError, match="30% of it"):
        bench.device_command(isolated_folders / "found.json", screen)
    assert list(isolated_folders.iterdir()) == []
    monkeypatch.setattr(bench, "measure", lambda *args: calibration(others=0.1))
    bench.device_command(None, screen)
    assert devices.present("cpu").measured == calibration(others=0.1)


def test_bench_rows_compare_measured_rates_with_the_table() -> None:
    from finetune.bench import device as bench

    table = device("rtx-4070")
    rows = {row["case"]: row for row in bench.rows(calibration(), table)}
    product = rows["product bf16"]
    assert (product["unit"], product["baseline"]) == ("GFLOP/s", table.rates["bf16"] / 1e9)
    assert product["ratio"] == pytest.approx(1e6 * 4096**1.5 / table.rates["bf16"])
    assert rows["memory, copy"]["ratio"] == pytest.approx(20 / 504)
    assert rows["call of an operator"]["ratio"] is None


@pytest.mark.slow
def test_real_steps_measure_overhead_of_calls_and_slowdown_of_arithmetic(isolated_folders: Path) -> None:
    from dataclasses import replace

    import torch

    from finetune.bench import device as bench

    measured = bench._in_steps(torch.device("cpu"), calibration(), bench.SIZES, lambda part: None)
    assert measured["busy"] >= 1
    assert measured["operation"] >= calibration().launch_seconds
    assert bench._in_steps(torch.device("cpu"), calibration(), replace(bench.SIZES, steps=()), print) == calibration().step
