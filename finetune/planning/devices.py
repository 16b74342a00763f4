"""Devices to plan for: a table of GPUs, and this machine as measured by `finetune bench device`.

The table has the vendors' figures. Times of matrix products and memory traffic come from a measurement (`Calibration`) if there
is one, else from the table's rates times the share that is usually reached (`REACHED`). Callers use `gemm_seconds`,
`memory_seconds` and similar methods, and `together` for a whole pass.

Rates are dense (no sparsity), with fp32 accumulation as torch uses it. For GeForce cards they are derived from CUDA cores and
boost clock, as in the appendices of the whitepapers (Ampere GA102, Ada, RTX Blackwell):

    fp32          2 · cores · clock     one multiply-add per core and clock
    bf16, fp16    2 · fp32              the tensor cores do 4 · fp32 with fp16 accumulation, and half of that with fp32: an
                                        RTX 4070 has 29.1, 58.3 (not 116.6) and, with int8, 233
    int8          8 · fp32

and in data centre chips fp32 accumulation costs nothing. fp32 is without TF32, which is torch's default. A "12 GB" card has
12 GiB; GB/s and TFLOP/s are powers of ten.

Users can add a device as a line of ~/.config/finetune12g/devices.yaml (or under $XDG_CONFIG_HOME), rates in TFLOP/s, bandwidth
in GB/s:

    my-card: {name: My Card, memory: 12GB, bandwidth: 504, bf16: 58.3, fp16: 58.3, fp32: 29.1, int8: 233, watts: 200,
              source: "https://…"}

Measurements are in ~/.cache/finetune12g/device-KEY.json (or under $XDG_CACHE_HOME).
"""

from __future__ import annotations

import bisect
import difflib
import functools
import itertools
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import write_json
from finetune.memory import machine_bytes
from finetune.units import GIB

FORMAT = 2  # version of the measurement file

# Share of a rate that a large product reaches, if nothing was measured. bf16: 80 % (H100) to 87 % (A100) of it in the best
# shape (github.com/stas00/ml-engineering, compute/accelerator, MAMF), 77 to 99 % on an RTX 4090 from 1024 × 1024 to 10240 ×
# 10240 (zzc0721/torch-performance-test-data#78), where fp32 reached 56 to 65 %; the shapes of a model are rarely the best ones.
# int8: 200 and some of the 284 of an RTX 4070 SUPER (hibagus/CUDA_Bench#2).
REACHED = {"bf16": 0.75, "fp16": 0.75, "fp32": 0.6, "int8": 0.6}
BANDWIDTH_REACHED = 0.8  # by elementwise kernels on large tensors
ATTENTION_REACHED = (0.5, 0.45)  # of the rate, forward and both passes: 50 to 73 % on an A100 (arXiv 2307.08691), long samples
SHORTEST_KERNEL_S = 2e-6
# Host time per operator in a training step, with the overhead of Python and autograd. A loop of nothing else takes 1 µs per
# operator, a real step 38 µs, because its caches are cold (two cores of an EPYC 9005, 38 real steps:
# finetune/bench/MEASURED.md); a desktop core is assumed to be twice as fast.
OPERATION_S = {"cuda": 1.5e-5, "mps": 3e-5, "cpu": 3.5e-5}
BUSY = 1.2  # time of products and memory traffic within a CPU step, relative to the same operations alone

# Memory of a CUDA process besides tensors: 300 to 430 MiB with lazily loaded modules (pytorch/pytorch#107667; 426 on Ada with
# CUDA 13.0, unslothai/unsloth-zoo#1053). On a card without ECC the driver keeps 0.24 GiB (11.76 of 12) to 0.36 (23.64 of 24)
# for itself. torch does not count that as memory; the table counts the whole card, so it is added.
CONTEXT = 430 << 20
WITHHELD = 0.015
LARGE = 32 << 20  # bytes from which glibc maps a block from the system and returns it when freed
CPU_CONTEXT = 520 << 20  # a process after the imports of a run: 516 MiB resident (torch 2.13, Linux)

# {dtype: its substitute if it was not measured}: the product of a ternary layer is an integer product.
STANDS_FOR = {"ternary": "int8"}


def _log_between(points: list[tuple[float, float]], at: float) -> float:
    """Log-log interpolation at `at` through points (x, y), constant outside."""
    index = bisect.bisect_left(points, (at, -math.inf))
    if index in (0, len(points)):
        return points[min(index, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[index - 1 : index + 1]
    share = math.log(at / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


@dataclass(frozen=True)
class Calibration:
    """Measurements of a device (medians).

    gemm: {dtype, layout, m, n, k, flops_per_second} of (m, k) · (k, n), without call overhead. layout of the factors: n
    row-major, t column-major; nt is a linear's forward pass, nn its input's gradient, tn its weight's gradient. dtype: bf16,
    fp16, fp32, int8, or ternary: the whole product of a ternary layer with quantized activations.
    bandwidth, read: bytes/s of a large copy (both directions counted), and of reading. fresh_seconds_per_byte: extra time for a
    CPU result of over 32 MiB, whose pages are newly mapped.
    elementwise: {"add bf16": [[bytes moved per call, bytes/s], …]} of an eager operator with its allocations, smallest first:
    the first fit in the caches, the last do not.
    launch_seconds: host time of a small operator in a loop. step: of real training steps; `busy`: time of arithmetic relative to
    the same alone, `operation`: host seconds per operator.
    dequantize, quantize: weights/s by scheme, as in the training step; "ternary rows": activations/s.
    attention: {dtype, length, heads, kv_heads, width, forward, both}: FLOP/s of packed attention (counted by `attention_flops`),
    of the forward pass and of both passes. optimizer: parameters/s by "adamw fp32" …; optimizer_tensor: seconds per tensor.
    others: share of the machine used by other programs meanwhile.
    """

    device: str
    date: str
    versions: dict[str, str]
    threads: int
    gemm: list[dict[str, Any]]
    bandwidth_bytes_per_second: float
    read_bytes_per_second: float
    fresh_seconds_per_byte: float
    elementwise: dict[str, list[list[float]]]
    launch_seconds: float
    step: dict[str, float]
    dequantize: dict[str, float]
    quantize: dict[str, float]
    attention: list[dict[str, Any]]
    optimizer: dict[str, float]
    optimizer_tensor: dict[str, float]
    others: float = 0.0

    @functools.cached_property
    def _grids(self) -> dict[tuple[str, str], dict[tuple[int, int, int], float]]:
        grids: dict[tuple[str, str], dict[tuple[int, int, int], float]] = {}
        for point in self.gemm:
            shape = (point["m"], point["n"], point["k"])
            grids.setdefault((point["dtype"], point["layout"]), {})[shape] = math.log(point["flops_per_second"])
        return grids

    @functools.cached_property
    def _cached_seconds(self) -> dict[tuple[str, str, int, int, int], float]:
        return {}

    def rates(self) -> dict[str, float]:
        """{dtype: the highest measured rate}."""
        highest: dict[str, float] = {}
        for point in self.gemm:
            highest[point["dtype"]] = max(highest.get(point["dtype"], 0.0), point["flops_per_second"])
        return highest

    def measured(self, dtype: str) -> str | None:
        """The name under which products of `dtype` were measured, or None."""
        known = {dtype for dtype, _ in self._grids}
        return next((name for name in (dtype, STANDS_FOR.get(dtype, dtype)) if name in known), None)

    def gemm_seconds(self, dtype: str, m: int, n: int, k: int, layout: str = "nt") -> float:
        """Seconds of (m, k) · (k, n) without call overhead: log-log interpolation between measured shapes, else the nearest rate.

        A layout that was not measured counts as nt.

        Raises:
            UserError: this dtype was not measured.
        """
        name = self.measured(dtype)
        if name is None:
            known = sorted({dtype for dtype, _ in self._grids})
            raise UserError(f"matrix products in "
                f"{dtype} were not measured on this device", where=self.device, got=", ".join(known),
                          hint="finetune bench device")  # fmt: skip
        if not m * n * k:
            return 0.0
        key = (name, layout if (name, layout) in self._grids else "nt", m, n, k)
        if key not in self._cached_seconds:
            size = m * n * (2 if name in ("bf16", "fp16", "ternary") else 4)
            fresh = self.fresh_seconds_per_byte * size if size >= LARGE else 0.0
            self._cached_seconds[key] = 2.0 * m * n * k / math.exp(self._log_rate(self._grids[key[0], key[1]], (m, n, k))) + fresh
        return self._cached_seconds[key]

    @staticmethod
    def _log_rate(grid: dict[tuple[int, int, int], float], shape: tuple[int, int, int]) -> float:
        """Log-linear interpolation in the three sizes; missing grid points take the nearest measured shape."""
        corners: list[list[tuple[int, float]]] = []
        for axis, size in enumerate(shape):
            known = sorted({point[axis] for point in grid})
            size = min(max(size, known[0]), known[-1])
            above = bisect.bisect_left(known, size)
            if known[above] == size:
                corners.append([(size, 1.0)])
            else:
                low, high = known[above - 1 : above + 1]
                share = math.log(size / low) / math.log(high / low)
                corners.append([(low, 1 - share), (high, share)])
        total = 0.0
        for (m, a), (n, b), (k, c) in itertools.product(*corners):
            point = (m, n, k)
            if point not in grid:
                point = min(grid, key=lambda one: sum(math.log(x / y) ** 2 for x, y in zip(one, (m, n, k), strict=True)))
            total += a * b * c * grid[point]
        return total

    def elementwise_seconds(self, count: float, op: str = "add", dtype: str = "bf16") -> float:
        """Seconds of an eager operator that moves `count` bytes, without call overhead. Unmeasured operators count as add."""
        if count <= 0:
            return 0.0
        names = (f"{op} {dtype}", f"add {dtype}", "add bf16", next(iter(self.elementwise)))
        points = self.elementwise[next(name for name in names if name in self.elementwise)]
        return count / _log_between([(size, rate) for size, rate in points], count)

    def attention_seconds(self, dtype: str, length: int, heads: int, width: int, *, backward: bool = False) -> float | None:
        """Seconds for one sample of `length` tokens: forward, or with `backward` both passes. None if not measured."""
        known = [point for point in self.attention if point["dtype"] == dtype]
        if not known:
            return None
        shapes = {(point["heads"], point["width"]) for point in known}
        shape = min(shapes, key=lambda one: abs(math.log(one[0] * one[1] / (heads * width))))
        direction = "both" if backward else "forward"
        points = sorted((p["length"], p[direction]) for p in known if (p["heads"], p["width"]) == shape)
        return attention_flops(length, heads, width, backward=backward) / _log_between(points, length)


def attention_flops(length: int, heads: int, width: int, *, backward: bool = False) -> float:
    """FLOP of causal attention on one sample: 2 · length² · heads · width, for both passes 3.5 times that (arXiv 2307.08691)."""
    return (7.0 if backward else 2.0) * length * length * heads * width


@dataclass(frozen=True)
class Device:
    """A device. rates: FLOP/s by dtype (int8: integer operations/s); missing dtypes are not supported.

    watts: the board's limit (for a Mac the whole machine's maximum); context_bytes: typical memory of driver and libraries.
    """

    key: str
    name: str
    type: str  # cuda, cpu, mps
    memory_bytes: int
    bandwidth: float
    rates: dict[str, float]
    watts: float
    capability: str | None
    source: str
    context_bytes: int
    measured: Calibration | None = field(default=None, repr=False)

    def rate(self, dtype: str) -> float:
        """FLOP/s from the table.

        Raises:
            UserError: the device does not support this dtype.
        """
        for name in (dtype, STANDS_FOR.get(dtype, dtype)):
            if name in self.rates:
                return self.rates[name]
        hint = "model.dtype=fp16" if dtype == "bf16" and "fp16" in self.rates else f"one of {', '.join(self.rates)}"
        raise UserError(f"{self.name} does not support {dtype}", where=self.key, got=dtype, hint=hint)

    def gemm_seconds(self, dtype: str, m: int, n: int, k: int, layout: str = "nt") -> float:
        """Seconds of (m, k) · (k, n): as measured (`Calibration.gemm_seconds`), else the longer of arithmetic and memory traffic
        at the usual share of the table's rates.

        Raises:
            UserError: the device does not support this dtype.
        """
        if self.measured is not None and self.measured.measured(dtype) is not None:
            return self.measured.gemm_seconds(dtype, m, n, k, layout)
        rate = self.rate(dtype) * REACHED[dtype if dtype in REACHED else STANDS_FOR[dtype]]
        size = {"fp32": 4, "int8": 1, "ternary": 1}.get(dtype, 2)
        moved = (m * k + k * n) * size + m * n * max(size, 2)
        return max(2.0 * m * n * k / rate, self._moving(moved)) if m * n * k else 0.0

    def memory_seconds(self, count: float, op: str = "add", dtype: str = "bf16") -> float:
        """Seconds of an eager elementwise operator (names as in `Calibration.elementwise`) that moves `count` bytes."""
        if self.measured is not None:
            return self.measured.elementwise_seconds(count, op, dtype)
        return self._moving(count) if count > 0 else 0.0

    def _moving(self, count: float) -> float:
        shortest = SHORTEST_KERNEL_S if self.type != "cpu" else 0.0
        return max(count / (self.bandwidth * BANDWIDTH_REACHED), shortest)

    @property
    def operation_seconds(self) -> float:
        """Host seconds per operator in a training step."""
        return self.measured.step["operation"] if self.measured is not None else OPERATION_S[self.type]

    def together(self, busy: float, operations: float) -> float:
        """Seconds of a pass with `busy` seconds of computing and so many operations. A GPU computes while the host launches."""
        factor = self.measured.step["busy"] if self.measured is not None else BUSY if self.type == "cpu" else 1.0
        host = operations * self.operation_seconds
        return busy * factor + host if self.type == "cpu" else max(busy * factor, host)

    def attention_seconds(self, dtype: str, length: int, heads: int, width: int, *, backward: bool = False) -> float:
        """Seconds of causal attention on one sample of `length` tokens, forward or both passes; add up packed samples."""
        if self.measured is not None:
            seconds = self.measured.attention_seconds(dtype, length, heads, width, backward=backward)
            if seconds is not None:
                return seconds
        return attention_flops(length, heads, width, backward=backward) / (self.rate(dtype) * ATTENTION_REACHED[backward])

    def dequantize_seconds(self, scheme: str, weights: int) -> float:
        """Seconds of codes to bf16: as measured, else the time to move codes (at most a byte) and floats."""
        if self.measured is not None and scheme in self.measured.dequantize:
            return weights / self.measured.dequantize[scheme]
        return self._moving(2.5 * weights)

    def quantize_seconds(self, scheme: str, numbers: int) -> float:
        """Seconds of floats to codes ("ternary", "nf4": weights; "ternary rows": activations), else of three passes over bf16."""
        if self.measured is not None and scheme in self.measured.quantize:
            return numbers / self.measured.quantize[scheme]
        return self._moving(6.0 * numbers)

    def optimizer_seconds(self, name: str, parameters: int, tensors: int = 1, dtype: str = "fp32") -> float:
        """Seconds of one step of "adamw", "adamw_8bit", … over `parameters` in `tensors`: as measured, else the time to read
        weight, gradient and two moments, and to write weight and moments."""
        if self.measured is not None:
            unpaged = name.removeprefix("paged_")
            for key in (f"{unpaged} {dtype}", f"{unpaged} fp32"):
                if key in self.measured.optimizer:
                    return parameters / self.measured.optimizer[key] + tensors * self.measured.optimizer_tensor.get(key, 0.0)
        size, moments = (2 if dtype in ("bf16", "fp16") else 4), (2 if "8bit" in name else 2 * 4)
        return self._moving(parameters * (3 * size + 2 * moments)) + tensors * (self.operation_seconds if "8bit" in name else 0.0)


# ------------------------------------------------------------------------------------------------------------------ the table

_CARDS = "https://www.nvidia.com/en-us/geforce/graphics-cards/"
_LAPTOPS = "https://www.nvidia.com/de-de/geforce/gaming-laptops/compare/"
_CENTRE = "https://www.nvidia.com/en-us/data-center/"
_MACS = "https://arxiv.org/abs/2502.05317"  # table 1; Apple publishes no rates after the M2


def _cuda(
    key: str, name: str, gib: float, bandwidth: float, rates: dict[str, float], watts: float, capability: str, source: str
) -> Device:
    """gib: of the whole card; bandwidth: GB/s; rates: TFLOP/s."""
    # gib is already without the memory that ECC takes on GDDR6; the driver's part is in the context.
    memory = round(gib * GIB)
    numbers = {dtype: rate * 1e12 for dtype, rate in rates.items()}
    return Device(
        key, name, "cuda", memory, bandwidth * 1e9, numbers, watts, capability, source, CONTEXT + int(WITHHELD * memory)
    )


def geforce_rates(cores: int, clock: float) -> dict[str, float]:
    """TFLOP/s of a GeForce card from the RTX 30 series on; clock in GHz."""
    fp32 = 2 * cores * clock / 1e3
    return {"bf16": 2 * fp32, "fp16": 2 * fp32, "fp32": fp32, "int8": 8 * fp32}


def _rtx(name: str, gib: int, bandwidth: float, cores: int, clock: float, watts: float, page: str) -> Device:
    """A GeForce card; clock: boost, GHz. The key is the name, with the memory if two cards share a name."""
    model, _, twin = name.partition(" / ")
    key = "-".join(f"rtx {model} {twin}".lower().split())
    capability = {"3": "8.6", "4": "8.9", "5": "12.0"}[name[0]]
    source = _LAPTOPS if page == "laptop" else f"{_CARDS}{name[0]}0-series/{page}/"
    full = f"GeForce RTX {model}{' ' + twin if twin else ''}{' GPU' if page == 'laptop' else ''}"
    return _cuda(key, full, gib, bandwidth, geforce_rates(cores, clock), watts, capability, source)


def _centre(
    key: str, gib: float, bandwidth: float, tflops: tuple[float | None, float, float, float], watts: float, cap: str, page: str
) -> Device:
    """A data centre card; tflops: bf16 (None: not supported), fp16, fp32, int8."""
    rates = {dtype: rate for dtype, rate in zip(("bf16", "fp16", "fp32", "int8"), tflops, strict=True) if rate is not None}
    name = key.upper().replace("-", " ").replace("PCIE", "PCIe").replace("GB", " GB")
    return _cuda(key, f"NVIDIA {name}", gib, bandwidth, rates, watts, cap, f"{_CENTRE}{page}/")


def _mac(key: str, gib: int, bandwidth: float, cores: int, gflops: float, watts: float, *, bf16: bool = True) -> Device:
    """An Apple chip with its largest memory; gflops: fp32, per GPU core. 16-bit floats have the same rate.

    The GPU may use two thirds of a Mac's memory up to 36 GB, three quarters beyond, unless iogpu.wired_limit_mb is raised.
    """
    rate = cores * gflops * 1e9
    rates = {"bf16": rate, "fp16": rate, "fp32": rate}
    if not bf16:
        del rates["bf16"]
    memory = int(gib * GIB * (2 / 3 if gib <= 36 else 3 / 4))
    name = "Apple " + key.upper().replace("MAX", "Max").replace("-", " ")
    return Device(key, name, "mps", memory, bandwidth * 1e9, rates, watts, None, _MACS, 300 << 20)


TABLE: tuple[Device, ...] = (
    #    name           GiB  GB/s   cores  clock  watts
    _rtx("3060", 12, 360, 3584, 1.777, 170, "rtx-3060-3060ti"),
    _rtx("3060 Ti", 8, 448, 4864, 1.665, 200, "rtx-3060-3060ti"),
    _rtx("3070", 8, 448, 5888, 1.725, 220, "rtx-3070-3070ti"),
    _rtx("3070 Ti", 8, 608, 6144, 1.770, 290, "rtx-3070-3070ti"),
    _rtx("3080", 10, 760, 8704, 1.710, 320, "rtx-3080-3080ti"),
    _rtx("3080 / 12GB", 12, 912, 8960, 1.710, 350, "rtx-3080-3080ti"),
    _rtx("3080 Ti", 12, 912, 10240, 1.665, 350, "rtx-3080-3080ti"),
    _rtx("3090", 24, 936, 10496, 1.695, 350, "rtx-3090-3090ti"),
    _rtx("3090 Ti", 24, 1008, 10752, 1.860, 450, "rtx-3090-3090ti"),
    _rtx("4060", 8, 272, 3072, 2.460, 115, "rtx-4060-4060ti"),
    _rtx("4060 Ti", 8, 288, 4352, 2.535, 160, "rtx-4060-4060ti"),
    _rtx("4060 Ti / 16GB", 16, 288, 4352, 2.535, 165, "rtx-4060-4060ti"),
    _rtx("4070", 12, 504, 5888, 2.475, 200, "rtx-4070-family"),
    _rtx("4070 Super", 12, 504, 7168, 2.475, 220, "rtx-4070-family"),
    _rtx("4070 Ti", 12, 504, 7680, 2.610, 285, "rtx-4070-family"),
    _rtx("4070 Ti Super", 16, 672, 8448, 2.610, 285, "rtx-4070-family"),
    _rtx("4080", 16, 717, 9728, 2.505, 320, "rtx-4080-family"),
    _rtx("4080 Super", 16, 736, 10240, 2.550, 320, "rtx-4080-family"),
    _rtx("4090", 24, 1008, 16384, 2.520, 450, "rtx-4090"),
    # Laptops: clock and power at the upper end of the range; many have less.
    _rtx("4050 Laptop", 6, 192, 2560, 2.370, 115, "laptop"),
    _rtx("4060 Laptop", 8, 256, 3072, 2.370, 115, "laptop"),
    _rtx("4070 Laptop", 8, 256, 4608, 2.175, 115, "laptop"),
    _rtx("4080 Laptop", 12, 432, 7424, 2.280, 150, "laptop"),
    _rtx("4090 Laptop", 16, 576, 9728, 2.040, 150, "laptop"),
    _rtx("5060", 8, 448, 3840, 2.497, 145, "rtx-5060-family"),
    _rtx("5060 Ti", 8, 448, 4608, 2.572, 180, "rtx-5060-family"),
    _rtx("5060 Ti / 16GB", 16, 448, 4608, 2.572, 180, "rtx-5060-family"),
    _rtx("5070", 12, 672, 6144, 2.512, 250, "rtx-5070-family"),
    _rtx("5070 Ti", 16, 896, 8960, 2.452, 300, "rtx-5070-family"),
    _rtx("5080", 16, 960, 10752, 2.617, 360, "rtx-5080"),
    _rtx("5090", 32, 1792, 21760, 2.407, 575, "rtx-5090"),
    # Memory without ECC's part: 15360, 23028 and 23034 MiB in nvidia-smi (modal-labs/modal-client#2797); H200: in torch.
    _centre("t4", 15.0, 320, (None, 65, 8.1, 130), 70, "7.5", "tesla-t4"),
    _centre("a10", 22.49, 600, (125, 125, 31.2, 250), 150, "8.6", "products/a10-gpu"),
    _centre("l4", 22.49, 300, (121, 121, 30.3, 242), 72, "8.9", "l4"),
    _centre("a100-40gb", 40, 1555, (312, 312, 19.5, 624), 400, "8.0", "a100"),
    _centre("a100-80gb", 80, 2039, (312, 312, 19.5, 624), 400, "8.0", "a100"),
    _centre("h100-pcie", 79.6, 2000, (756, 756, 51, 1513), 350, "9.0", "h100"),
    _centre("h100-sxm", 79.6, 3350, (989, 989, 67, 1979), 700, "9.0", "h100"),
    _centre("h200", 139.8, 4800, (989, 989, 67, 1979), 700, "9.0", "h200"),
    # Watts: maximum of a Mac mini or Mac Studio (support.apple.com/103253 and 102027); for an M3 Max that of an M2 Max.
    _mac("m1", 16, 67, 8, 326, 39, bf16=False),  # bf16 came with the M2
    _mac("m1-max", 64, 400, 32, 326, 115, bf16=False),
    _mac("m2", 24, 100, 10, 357, 50),
    _mac("m2-max", 96, 400, 38, 357, 145),
    _mac("m3-max", 128, 400, 40, 353, 145),
    _mac("m4", 32, 120, 10, 426, 65),
    _mac("m4-max", 128, 546, 40, 426, 145),
)


# -------------------------------------------------------------------------------------------------------------------- lookups


def _base(variable: str, otherwise: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / otherwise) / "finetune12g"


def own_path() -> Path:
    """The file of the user's own devices."""
    return _base("XDG_CONFIG_HOME", ".config") / "devices.yaml"


def devices() -> dict[str, Device]:
    """{key: device} of the table and the user's own file, which takes precedence; a UserError if that file is not valid."""
    return {one.key: one for one in TABLE} | _own(own_path())


def _own(path: Path) -> dict[str, Device]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    import yaml

    form = "KEY: {name: …, memory: 12GB, bandwidth: 504, bf16: 58.3, fp32: 29.1, watts: 200, source: https://…}"
    try:
        lines = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError("the file of your own devices is not valid YAML", where=str(path), got=str(error), hint=form) from None
    if not isinstance(lines, dict):
        raise UserError("the file of your own devices is not a mapping", where=str(path), got=type(lines).__name__, hint=form)
    own = {}
    for key, line in lines.items():
        try:
            values = dict(line)
            rates = {dtype: float(values.pop(dtype)) for dtype in REACHED if dtype in values}
            memory = parse_bytes(str(values.pop("memory"))) / GIB
            numbers = [float(values.pop(word)) for word in ("bandwidth", "watts")]
            if not rates or min(*numbers, *rates.values()) <= 0:
                raise ValueError("rates, bandwidth and watts are required and must be positive")
            name, source = str(values.pop("name", key)), str(values.pop("source", f"{path}"))
            capability = str(values.pop("capability", "8.0"))
            if values:
                raise ValueError(f"unknown: {', '.join(map(str, values))}")
        except (KeyError, TypeError, ValueError) as error:
            got = f"missing: {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise UserError("invalid entry in the file of your own devices", where=f"{path}: {key}", got=got, hint=form) from None
        own[str(key)] = _cuda(str(key), name, memory, numbers[0], rates, numbers[1], capability, source)
    return own


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _chip(name: str) -> str:
    """The part of a name that identifies the chip: without vendor, memory and form factor."""
    text = re.sub(r"\b\d+\s*gb\b|hbm\d\w*|sxm\d?|pcie|nvidia|geforce|tesla|apple|rtx|\bgpu\b", " ", name.lower())
    return _letters(text)


def device(name: str) -> Device:
    """The device with this name, and its measurement if there is one: "rtx-4070", "RTX 4070", "4070", "4060 ti 16gb", "cpu".

    Raises:
        UserError: no device has this name, or several do.
    """
    short = _letters(re.sub("nvidia|geforce|apple|rtx", "", name.lower()))
    if short == "cpu":
        return present("cpu")
    known = devices()
    keys = {_letters(key): key for key in known}
    exact = next((keys[word] for word in (_letters(name), short, f"rtx{short}") if word in keys), None)
    fits = [exact] if exact else [key for key, one in known.items() if _chip(one.name) == _chip(name)]
    if len(fits) > 1 and (size := re.search(r"(\d+)\s*gb", name.lower())):
        fits = [key for key in fits if round(known[key].memory_bytes / GIB) == int(size[1])] or fits
    if len(fits) == 1:
        return _with_measurement(known[fits[0]])
    listed = ", ".join(known)
    if fits:
        raise UserError("several devices match this name", where="--gpu", got=name, hint=f"use one of {', '.join(fits)}")
    close = difflib.get_close_matches(f"rtx{short}", keys, n=3) or difflib.get_close_matches(_letters(name), keys, n=3)
    meant = f"did you mean {' or '.join(keys[word] for word in close)}? " if close else ""
    raise UserError("unknown device", where="--gpu", got=name, hint=f"{meant}known: cpu, {listed}; add your own in {own_path()}")


def present(torch_device: Any = None, *, measured: bool = True) -> Device:
    """This machine's device (None: CUDA if available, else the CPU, as for a run), with the memory that the system reports.

    measured: with its measurement, if there is one.

    Raises:
        UserError: the device does not exist, or its measurement is damaged.
    """
    import torch

    chosen = torch.device(torch_device if torch_device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and torch.cuda.is_available():
        device_here = _present_cuda(chosen.index or 0)
    elif chosen.type == "cpu":
        device_here = _present_cpu()
    elif chosen.type == "mps" and torch.backends.mps.is_available():
        device_here = _present_mps()
    else:
        hint = "use the CPU, or --gpu NAME"
        raise UserError(f"no {chosen.type} device", where="device", got=f"torch {torch.__version__}", hint=hint)
    if not measured:
        return device_here
    device_here = _with_measurement(device_here)
    if device_here.type != "cpu" or device_here.measured is None:
        return device_here
    return replace(
        device_here,
        bandwidth=device_here.measured.bandwidth_bytes_per_second,
        rates=device_here.rates | device_here.measured.rates(),
        source=f"measured {device_here.measured.date}",
    )


def _present_cuda(index: int) -> Device:
    import torch

    about = torch.cuda.get_device_properties(index)
    return match(about.name, about.total_memory, about.multi_processor_count, (about.major, about.minor))


def match(name: str, memory: int, processors: int, capability: tuple[int, int]) -> Device:
    """The table's device called `name` with about `memory` bytes.

    An unknown one is estimated from its multiprocessors as a GeForce card with 1.7 GHz, 250 W and, like an RTX 4070, 17 GB/s of
    bandwidth per TFLOP/s of fp32; `finetune bench device` is more accurate.
    """

    def differs(one: Device) -> tuple[bool, int]:
        return ("pcie" in one.name.lower()) != ("pcie" in name.lower()), abs(one.memory_bytes - memory)

    of_chip = [one for one in TABLE if one.type == "cuda" and _chip(one.name) == _chip(name)]
    if of_chip:
        return replace(min(of_chip, key=differs), memory_bytes=memory, context_bytes=CONTEXT)
    rates = geforce_rates(128 * processors, 1.7)
    if capability < (8, 0):
        del rates["bf16"]
    key, of = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), f"{capability[0]}.{capability[1]}"
    estimated = _cuda(
        key, name, memory / GIB, rates["fp32"] * 17, rates, 250, of, "not in the table: estimated from its multiprocessors"
    )
    return replace(estimated, memory_bytes=memory, context_bytes=CONTEXT)


def _present_mps() -> Device:
    import subprocess

    import torch

    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    entry = next((one for one in TABLE if one.type == "mps" and _chip(one.name) == _chip(name)), None)
    if entry is None:
        raise UserError("this chip is not in the table of devices", where="device", got=name, hint=f"add it in {own_path()}")
    return replace(entry, memory_bytes=torch.mps.recommended_max_memory())


def _present_cpu() -> Device:
    """The CPU with torch's number of threads. Without a measurement its rates are estimated from its instruction set."""
    import psutil
    import torch

    from finetune import provenance

    threads = torch.get_num_threads()
    name = provenance.device_name(torch.device("cpu")).removeprefix("cpu: ")
    key = "cpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    flags = _cpu_flags()
    frequency = psutil.cpu_freq()
    clock = (frequency.max or frequency.current) * 1e6 if frequency else 3e9
    # fp32 operations per cycle: two units of 512, 256 or (on any 64-bit core) 128 bits.
    fp32 = threads * clock * (64 if "avx512f" in flags else 32 if "avx2" in flags else 16)
    bf16 = 16 if "amx_bf16" in flags else 2 if flags & {"avx512_bf16", "bf16"} else 0.5
    int8 = 32 if "amx_int8" in flags else 4 if flags & {"avx512_vnni", "avx_vnni", "i8mm"} else 1
    rates = {"bf16": bf16 * fp32, "fp16": fp32 / 64, "fp32": fp32, "int8": int8 * fp32}
    # 10 GB/s per thread, at most two channels of DDR4-3200; watts: about a desktop's ten per core.
    bandwidth, watts = min(10e9 * threads, 50e9), 10.0 * threads
    source = "estimated from its instruction set: finetune bench device measures it"
    return Device(key, name, "cpu", machine_bytes(), bandwidth, rates, watts, None, source, CPU_CONTEXT)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []))


_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory: '12GB', '11.5GiB', '8 gb' → bytes. GB means GiB, as in the name of a "12 GB" card.

    Raises:
        UserError: not an amount of memory.
    """
    match_ = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])i?b?\s*", text, re.IGNORECASE)
    count = round(float(match_[1]) * (1 << _UNITS[match_[2].lower()])) if match_ else 0
    if count <= 0:
        raise UserError("not an amount of memory", where="memory", got=repr(text), hint="write it as 12GB or 11.5GiB")
    return count


# --------------------------------------------------------------------------------------------------------------- measurements


def calibration_path(key: str) -> Path:
    return _base("XDG_CACHE_HOME", ".cache") / f"device-{key}.json"


def save_calibration(key: str, measured: Calibration) -> Path:
    path = calibration_path(key)
    write_json(path, {"format": FORMAT} | asdict(measured))
    return path


def load_calibration(key: str) -> Calibration | None:
    """The measurement of a device; None if there is none, or it is of another version of this program.

    Raises:
        UserError: the file is damaged.
    """
    path = calibration_path(key)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("format") != FORMAT:
            return None
        return Calibration(**{one.name: saved[one.name] for one in fields(Calibration)})
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        got = f"missing: {error.args[0]}" if isinstance(error, KeyError) else str(error)
        hint = f"finetune bench device writes a new one, or delete it: rm {path}"
        raise UserError("cannot read the measurement of this device", where=str(path), got=got, hint=hint) from None


def _with_measurement(one: Device) -> Device:
    return replace(one, measured=load_calibration(one.key))
