"""`finetune bench device`: measures products, memory passes and small operators on this machine, for the plan.

It measures the device that a run uses: CUDA with events, and the queue filled ahead so that launches are not timed; else the
CPU with wall time and as many threads as a run has. The overhead of a call is measured separately and subtracted.
Weights differ in each call and fill the last cache twice, as in a model of more than one layer; activations are reused,
because in a model too they have just been written. All products run once, then all of them again, while time is left: so a
burst of other work affects one call of each shape, not all calls of one.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import provenance
from finetune.bench.measure import Row, cache_bytes
from finetune.errors import UserError
from finetune.files import write_json
from finetune.memory import keep_freed_memory
from finetune.planning.devices import LARGE, Calibration, Device, attention_flops, present, save_calibration
from finetune.screen import Screen, Shown
from finetune.train import optim
from finetune.train.fast import attention
from finetune.units import MIB, significant
from quant import nf4, ops, ternary

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
PACKAGES = ("torch", "bitsandbytes", "llvmlite", "triton")
BUSY = 0.05  # share of the machine that other programs may use without a warning
TOGETHER_S = 1e-4  # shorter calls are timed in batches
ENOUGH_S = 0.25  # limit of repeating a call


@dataclass(frozen=True)
class Sizes:
    """gemm: sizes of m, n and k, in all combinations up to `gemm_flops` per product. coarse: for int8, fp16 and ternary products.
    call_seconds: limit of a call, predicted from a smaller one; gemm_seconds: after which no further round begins. results: bytes
    of elementwise results, around 32 MiB: glibc returns larger blocks at once. The largest is at least `beyond` last caches.
    weights: (out, in) of quantized and dequantized weights. lengths, heads: of attention, (heads, kv heads, width), in sequences
    of `tokens`. parameters: of the optimizer's step. repeats: of everything except products.
    too_busy: share of the machine used by other programs above which the measurement is discarded. (A third of two cores
    made attention up to twenty times slower: its threads wait for each other at the end of each small loop.)
    """

    gemm: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    gemm_flops: float = 4e10
    coarse: tuple[int, ...] = (64, 512, 4096)
    call_seconds: float = 0.4
    gemm_seconds: float = 20.0
    rounds: int = 5
    results: tuple[int, ...] = (128 << 10, 2 * MIB, 12 * MIB, 28 * MIB, 40 * MIB, 128 * MIB)
    beyond: int = 2
    weights: tuple[int, int] = (2048, 5632)
    lengths: tuple[int, ...] = (64, 256, 1024)
    heads: tuple[tuple[int, int, int], ...] = ((9, 3, 64), (32, 8, 128))
    tokens: int = 1024
    parameters: int = 4 * MIB
    repeats: int = 7
    steps: tuple[tuple[str, str, str, str, bool], ...] = (
        ("llama", "S", "lora", "pairs", False),
        ("llama", "M", "full", "packed", False),
    )
    too_busy: float = 0.15


SIZES = Sizes()
Product = tuple[str, str, tuple[int, int, int], Callable[[], object]]  # dtype, layout, (m, n, k), a call


def quiet(times: list[float]) -> float:
    """The lower quartile: other programs only lengthen times. On an idle machine it is nearly the median."""
    return sorted(times)[(len(times) - 1) // 4]


class Watch:
    """Times calls on one device, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.launch = 0.0  # overhead of a call on the CPU; on CUDA it is not timed

    def together(self, call: Callable[[], object], count: int) -> float:
        """Seconds per call of `count` consecutive calls."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000 * min(count, 200))  # clock cycles: some 10 µs per call, for the host to get ahead
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def one(self, call: Callable[[], object]) -> float:
        """Seconds of a call that has run before, without the overhead; short calls are timed in batches."""
        seconds = self.together(call, 1)
        if seconds < TOGETHER_S:
            seconds = self.together(call, min(100, math.ceil(TOGETHER_S / max(seconds, 1e-6))))
        return max(seconds - self.launch, seconds / 10)

    def typical(self, call: Callable[[], object], repeats: int) -> float:
        """Typical seconds of a call, from `repeats` calls or as many as time allows."""
        call()  # compiles, allocates, loads libraries
        self.wait()
        began = time.monotonic()
        times: list[float] = []
        while len(times) < repeats and (not times or time.monotonic() - began < ENOUGH_S):
            times.append(self.one(call))
        return quiet(times)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Pool:
    """Random numbers of one dtype, as a source of matrices that were not used recently."""

    def __init__(self, dtype: torch.dtype, count: int, device: torch.device) -> None:
        if dtype == torch.int8:
            self.numbers = torch.randint(-127, 128, (count,), dtype=dtype, device=device)
        else:
            self.numbers = torch.randn(count, device=device).to(dtype)
        self.at = 0

    def take(self, rows: int, columns: int) -> Tensor:
        """A matrix (rows, columns), a different one at each call while there are any."""
        size = rows * columns
        start = self.at if self.at + size <= self.numbers.numel() else 0
        self.at = start + -(-size // 64) * 64  # aligned to cache lines
        return self.numbers[start : start + size].view(rows, columns)


def last_cache(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else cache_bytes(0)[0]


# ------------------------------------------------------------------------------------------------------------------ products


def _factors(a: Tensor, pool: Pool, layout: str, shape: tuple[int, int, int]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns (m, k) and (k, n) in the memory layout `layout`."""
    m, n, k = shape
    left = a[: m * k].view(m, k) if layout[0] == "n" else a[: m * k].view(k, m).t()
    return lambda: (left, pool.take(k, n) if layout[1] == "n" else pool.take(n, k).t())


def _multiplication(multiply: Callable[..., Tensor], factors: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
    return lambda: multiply(*factors())


def _gemms(watch: Watch, sizes: Sizes, tick: Callable[[float], None]) -> list[dict[str, Any]]:
    cache = min(2 * last_cache(watch.device), 256 * MIB)
    cases: list[Product] = []
    for dtype, (axis, layouts) in _axes(watch, sizes).items():
        torch_dtype, largest = DTYPES[dtype], max(axis) ** 2
        a = Pool(torch_dtype, largest, watch.device).numbers
        pool = Pool(torch_dtype, max(largest, cache // torch_dtype.itemsize), watch.device)
        multiply: Callable[..., Tensor] = torch._int_mm if dtype == "int8" else torch.mm
        shapes = [shape for shape in product(axis, axis, axis) if 2.0 * math.prod(shape) <= sizes.gemm_flops]
        if not watch.cuda:  # the cost of new pages is measured separately
            shapes = [(m, n, k) for m, n, k in shapes if m * n * (2 if torch_dtype.itemsize == 2 else 4) < LARGE]
        for shape, layout in product(shapes, layouts):
            # With one row there is only the forward pass, in generation; n and k are widths.
            if min(shape[1:]) > 1 and (shape[0] > 1 or layout == "nt"):
                cases.append((dtype, layout, shape, _multiplication(multiply, _factors(a, pool, layout, shape))))
    cases += _ternary_products(watch, sizes)
    cases.sort(key=lambda case: math.prod(case[2]))
    return _rounds(watch, sizes, cases, tick)


def _axes(watch: Watch, sizes: Sizes) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """dtype → sizes and layouts, for the dtypes that the device can multiply."""
    all_layouts = ("nt", "nn", "tn")
    axes = {"fp32": (sizes.gemm, all_layouts), "bf16": (sizes.gemm, all_layouts), "int8": (sizes.coarse, ("nt",))}
    axes["fp16"] = (sizes.gemm if watch.cuda else sizes.coarse, all_layouts if watch.cuda else ("nt",))
    if watch.cuda and torch.cuda.get_device_capability(watch.device) < (8, 0):
        del axes["bf16"]
    return axes


def _ternary_products(watch: Watch, sizes: Sizes) -> list[Product]:
    """Products of frozen ternary layers, on quantized activations."""
    low = _low(watch)
    cases: list[Product] = []
    for n, k in product(sizes.coarse, repeat=2):
        weight = ternary.quantize(torch.randn(n, k, device=watch.device)).parts()
        for m in sizes.coarse:
            if 2.0 * m * n * k <= sizes.gemm_flops:
                inputs = list(torch.ops.quant12g.activations("ternary", torch.randn(m, k, device=watch.device).to(low)))

                def call(inputs: list[Tensor] = inputs, weight: list[Tensor] = weight, n: int = n, k: int = k) -> object:
                    return torch.ops.quant12g.linear("ternary", inputs, None, weight, True, n, k, low)

                cases.append(("ternary", "nt", (m, n, k), call))
    return cases


def _low(watch: Watch) -> torch.dtype:
    half = watch.cuda and torch.cuda.get_device_capability(watch.device) < (8, 0)
    return torch.float16 if half else torch.bfloat16


def _rounds(
    watch: Watch, sizes: Sizes, cases: list[Product],
    tick: Callable[[float], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rates of the products that fit the time; cases: sorted by work."""
    began = time.monotonic()
    times: dict[int, list[float]] = {}
    last: dict[tuple[str, str], float] = {}  # FLOP/s of the last product of that dtype and layout
    for turn in range(sizes.rounds):
        for index, (dtype, layout, shape, call) in enumerate(cases):
            flops, key = 2.0 * math.prod(shape), (dtype, layout)
            if turn == 0:
                late = time.monotonic() - began > sizes.gemm_seconds / 2  # on a slow machine: skip large ones
                if flops / last.get(key, math.inf) > sizes.call_seconds * (0.05 if late else 1.0):
                    continue
                call()
                watch.wait()
            elif index not in times:
                continue
            times.setdefault(index, []).append(watch.one(call))
            last[key] = flops / times[index][-1]
            tick(min((time.monotonic() - began) / sizes.gemm_seconds, 1.0))
            if turn and time.monotonic() - began > sizes.gemm_seconds:
                break
        if time.monotonic() - began > sizes.gemm_seconds:
            break
    rates = []
    for index, seconds in sorted(times.items()):
        dtype, layout, (m, n, k), _ = cases[index]
        rate = 2.0 * m * n * k / quiet(seconds)
        rates.append({"dtype": dtype, "layout": layout, "m": m, "n": n, "k": k, "flops_per_second": rate})
    return rates


# --------------------------------------------------------------------------------------------------------- memory and calls


def _elementwise(watch: Watch, sizes: Sizes, tick: Callable[[float], None]) -> dict[str, list[list[float]]]:
    """Each operator at each size; inputs are in the caches as far as they fit, results are newly allocated."""
    low, results = _low(watch), (*sizes.results[:-1], _beyond(watch, sizes))
    name = "bf16" if low == torch.bfloat16 else "fp16"
    # operator → dtype, bytes moved per element, x → call; the mean's result is counted like its input
    operators: dict[str, tuple[torch.dtype, int, Callable[[Tensor], Callable[[], object]]]] = {
        f"add {name}": (low, 6, lambda x: partial(torch.add, x, x.clone())),
        "add fp32": (torch.float32, 12, lambda x: partial(torch.add, x, x.clone())),
        f"mul {name}": (low, 4, lambda x: partial(torch.mul, x, 0.5)),
        f"silu {name}": (low, 4, lambda x: partial(torch.nn.functional.silu, x)),
        "silu fp32": (torch.float32, 8, lambda x: partial(torch.nn.functional.silu, x)),
        f"to_fp32 {name}": (low, 6, lambda x: x.float),
        f"to_{name} fp32": (torch.float32, 6, lambda x: partial(x.to, low)),
        f"copy {name}": (low, 4, lambda x: x.clone),
        f"transpose {name}": (low, 4, lambda x: x.t().contiguous),
        "rsqrt fp32": (torch.float32, 8, lambda x: partial(torch.rsqrt, x)),
        "mean fp32": (torch.float32, 4, lambda x: partial(torch.mean, x, -1)),
        "softmax fp32": (torch.float32, 8, lambda x: partial(torch.softmax, x, -1)),
    }
    columns = 1024
    curves: dict[str, list[list[float]]] = {}
    for number, (op, (dtype, per, make)) in enumerate(operators.items()):
        curves[op] = []
        itemsize = 4 if op.startswith("to_fp32") else 2 if op.startswith("to_") else dtype.itemsize
        for result in results:
            rows = max(1, result // itemsize // columns)
            call = make(torch.full((rows, columns), 0.7, dtype=dtype, device=watch.device))
            size = float(rows * columns * per)
            curves[op].append([size, size / watch.typical(call, sizes.repeats)])
        tick((number + 1) / len(operators))
    return curves


def _beyond(watch: Watch, sizes: Sizes) -> int:
    return max(sizes.results[-1], sizes.beyond * last_cache(watch.device))


def _bandwidth(watch: Watch, sizes: Sizes) -> tuple[float, float]:
    """bytes/s of a copy into allocated memory, reads and writes counted, and of reading."""
    size = _beyond(watch, sizes)
    a, b = torch.ones(size // 4, device=watch.device), torch.zeros(size // 4, device=watch.device)
    return 2 * size / watch.typical(lambda: b.copy_(a), sizes.repeats), size / watch.typical(a.sum, sizes.repeats)


def _fresh(watch: Watch, sizes: Sizes) -> float:
    """Extra seconds per byte of a result over 32 MiB, for new pages; 0 on CUDA."""
    if watch.cuda:
        return 0.0
    count = (LARGE + 8 * MIB) // 4
    kept = torch.ones(count)
    new = watch.typical(lambda: torch.ones(count), sizes.repeats) - watch.typical(lambda: kept.fill_(1.0), sizes.repeats)
    return max(0.0, new / (4 * count))


def _launch(watch: Watch, repeats: int) -> float:
    """Host seconds of one operator on 64 numbers."""
    x, y = torch.ones(64, device=watch.device), torch.ones(64, device=watch.device)

    def once(count: int = 500) -> float:  # CUDA queues a thousand launches before the host has to wait
        watch.wait()
        start = time.perf_counter()
        for _ in range(count):
            torch.add(x, y)
        return (time.perf_counter() - start) / count

    once()
    return quiet([once() for _ in range(3 * repeats)])


# -------------------------------------------------------------------------------------------------------- functions of training


def _quantized(watch: Watch, sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """weights/s of the schemes, for dequantizing and quantizing."""
    out, inner = sizes.weights
    low, count = _low(watch), out * inner
    weight = (torch.randn(out, inner, device=watch.device) * 0.02).to(low)
    packed = {
        "nf4": nf4.quantize(weight, double=False).parts(),
        "nf4-double": nf4.quantize(weight).parts(),
        "ternary": ternary.quantize(weight).parts(),
    }
    from_codes = {
        scheme: count
        / watch.typical(
            lambda scheme=scheme, parts=parts: torch.ops.quant12g.dequantize(scheme, parts, True, out, inner, low),  # type: ignore[misc]
            sizes.repeats,
        )
        for scheme, parts in packed.items()
    }
    master = weight.float()
    to_codes = {
        scheme: count / watch.typical(lambda scheme=scheme: ops.ARITHMETIC[scheme].pack(master), max(3, sizes.repeats // 2))  # type: ignore[misc]
        for scheme in packed
    }
    to_codes["ternary rows"] = count / watch.typical(lambda: torch.ops.quant12g.activations("ternary", weight), sizes.repeats)
    return from_codes, to_codes


def _attention(watch: Watch, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Packed attention of as many samples of one length as `tokens` holds."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32} if _low(watch) == torch.bfloat16 else {"fp16": torch.float16}
    for (heads, kv_heads, width), length, (name, dtype) in product(sizes.heads, sizes.lengths, names.items()):
        samples = max(1, sizes.tokens // length)
        position_ids = torch.arange(length).repeat(samples)[None]
        segments = attention.segments_of(position_ids, (1, samples * length), watch.device)

        def fresh(heads: int, dtype: torch.dtype = dtype, tokens: int = samples * length, width: int = width) -> Tensor:
            return torch.randn(1, tokens, heads, width, device=watch.device).to(dtype).transpose(1, 2).requires_grad_()

        q, k, v = fresh(heads), fresh(kv_heads), fresh(kv_heads)
        scale = width**-0.5
        grad = attention.packed_attention(q, k, v, segments, scale=scale).detach()

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, segments: Any = segments, scale: float = scale) -> Tensor:
            return attention.packed_attention(q, k, v, segments, scale=scale)

        def both(forward: Any = forward, of: tuple[Tensor, ...] = (q, k, v), grad: Tensor = grad) -> object:
            return torch.autograd.grad(forward(), of, grad)

        point: dict[str, Any] = {"dtype": name, "length": length, "heads": heads, "kv_heads": kv_heads, "width": width}
        for which, call, backward in (("forward", forward, False), ("both", both, True)):
            flops = samples * attention_flops(length, heads, width, backward=backward)
            point[which] = flops / watch.typical(call, max(3, sizes.repeats // 2))
        yield point


def _optimizers(watch: Watch, sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """parameters/s for a large matrix, and the extra seconds per tensor for small ones."""
    rates: dict[str, float] = {}
    tensors: dict[str, float] = {}
    low = _low(watch)
    variants = [("fp32", torch.float32, False)] + (
        [("bf16", low, False), ("bf16 rounded", low, True)] if low is torch.bfloat16 else []
    )
    for name, (label, dtype, rounded) in product(("adamw", "adamw_8bit"), variants):
        if name == "adamw_8bit" and not _has_bitsandbytes():
            continue

        def stepper(shapes: list[tuple[int, int]], name: str = name, dtype: torch.dtype = dtype, rounded: bool = rounded) -> Any:
            parameters = {}
            for number, shape in enumerate(shapes):
                one = torch.nn.Parameter(torch.randn(shape, device=watch.device).to(dtype))
                one.grad = torch.randn_like(one)
                parameters[str(number)] = one
            optimizer, _ = optim.build(
                parameters, name=name, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, device=watch.device.type,
                stochastic_rounding=rounded,
            )  # fmt: skip
            return optimizer.step

        key = f"{name} {label}"
        rates[key] = sizes.parameters / watch.typical(stepper([(sizes.parameters // 1024, 1024)]), max(3, sizes.repeats // 2))
        many, shape = 64, (16, 1024)
        seconds = watch.typical(stepper([shape] * many), max(3, sizes.repeats // 2))
        tensors[key] = max(0.0, seconds / many - math.prod(shape) / rates[key])
    return rates, tensors


def _has_bitsandbytes() -> bool:
    return "bitsandbytes" in provenance.versions(["bitsandbytes"])


# ---------------------------------------------------------------------------------------------------------------- the command


def measure(device: torch.device, sizes: Sizes, progress: Shown | None = None) -> Calibration:
    """Measure `device` completely."""
    from finetune.bench.qlora import Bystanders

    if device.type == "cpu":
        keep_freed_memory()  # as in a run
    watch, bystanders = Watch(device), Bystanders([])

    def tick(start: float, share: float, note: str) -> Callable[[float], None]:
        """A progress callback for a share of the whole (100), as measured on two cores of an EPYC 9005."""

        def tell(part: float) -> None:
            if progress is not None:
                progress(round(start + share * part), 100, note)

        tell(0.0)
        return tell

    torch.manual_seed(0)
    with torch.no_grad():
        tick(0, 5, "calls")
        launch = _launch(watch, sizes.repeats)
    watch.launch = 0.0 if watch.cuda else launch
    with torch.no_grad():
        gemm = _gemms(watch, sizes, tick(5, 55, "products"))
        bandwidth, read = _bandwidth(watch, sizes)
        fresh = _fresh(watch, sizes)
        elementwise = _elementwise(watch, sizes, tick(60, 20, "memory"))
        tick(80, 5, "codes")
        from_codes, to_codes = _quantized(watch, sizes)
    tick(85, 8, "attention")
    attention_points = list(_attention(watch, sizes))
    tick(93, 7, "optimizers")
    rates, tensors = _optimizers(watch, sizes)
    isolated = Calibration(
        device=provenance.device_name(device),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=provenance.versions(PACKAGES),
        threads=torch.get_num_threads(),
        gemm=gemm,
        bandwidth_bytes_per_second=bandwidth,
        read_bytes_per_second=read,
        fresh_seconds_per_byte=fresh,
        elementwise=elementwise,
        launch_seconds=launch,
        step={"busy": 1.0, "operation": launch},
        dequantize=from_codes,
        quantize=to_codes,
        attention=attention_points,
        optimizer=rates,
        optimizer_tensor=tensors,
        others=bystanders.share(),
    )
    step = _in_steps(device, isolated, sizes, tick(100, 0, "real steps"))
    return replace(isolated, step=step)


def _in_steps(device: torch.device, isolated: Calibration, sizes: Sizes, tell: Callable[[float], None]) -> dict[str, float]:
    """Cost of operators and arithmetic inside real training steps (cases of `finetune bench plan`), where caches hold other data,
    and Python and autograd surround each call. Fits factors to the measured steps with the smallest relative error:
    seconds = busy · isolated arithmetic + operation · operators (on a GPU the larger of the two)."""
    import numpy as np

    from finetune.bench import plan as grid
    from finetune.planning.estimate import fresh_plan

    if not sizes.steps:
        return isolated.step
    here = replace(present(device, measured=False), measured=isolated)
    lines = []
    with tempfile.TemporaryDirectory(prefix="finetune-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        grid.make_data(folder)
        for number, (architecture, size, of, rows_, checkpointing) in enumerate(sizes.steps):
            case = grid.Case(architecture, size, of, rows_, checkpointing=checkpointing)
            recipe = grid.recipe_of(case, folder, device.type)
            done = grid.in_a_child(case, folder, device.type, grid.Steps(1, 2, 7), lambda part: None, cache=folder)
            seconds = done["seconds"]
            traced = fresh_plan(recipe, case.name, here).traced
            took = statistics.median(seconds) - traced["update_seconds"]
            lines.append((traced["busy_seconds"], traced["operations"], max(took, traced["update_seconds"] / 10)))
            tell((number + 1) / len(sizes.steps))
    busy, operations, seconds_ = np.array(lines, dtype=float).T
    if device.type == "cpu":
        factors, *_ = np.linalg.lstsq(np.stack([busy, operations], 1) / seconds_[:, None], np.ones(len(lines)), rcond=None)
        factor, operation = float(factors[0]), float(factors[1])
        if operation < isolated.launch_seconds:  # all time is arithmetic
            factor, operation = float(np.median(seconds_ / busy)), isolated.launch_seconds
        elif factor < 1:
            factor, operation = 1.0, float(np.median(np.maximum(seconds_ - busy, 0) / operations))
    else:  # the host's part is visible in the step with the least arithmetic
        factor, operation = 1.0, float(np.min(seconds_ / operations))
    return {"busy": factor, "operation": operation}


def rows(measured: Calibration, table: Device) -> list[Row]:
    """Measured values beside those of the table of devices (None if it has none)."""
    known = table.type != "cpu"  # the table's values for a CPU are a guess

    def row(case: str, ours: float, theirs: float | None, unit: str, note: str = "") -> Row:
        better = "lower" if unit in ("µs", "ms", "×") else "higher"
        return {
            "case": case, "ours": ours, "baseline": theirs, "ratio": ours / theirs if theirs else None, "unit": unit,
            "target": None, "better": better, "low": None, "high": None, "pairs": 0, "met": None,  # type: ignore[typeddict-item]
            "against": f"table: {table.key}" if theirs else "", "backend": None, "note": note,
        }  # fmt: skip

    listed = []
    for dtype in dict.fromkeys(point["dtype"] for point in measured.gemm):
        points = [point for point in measured.gemm if point["dtype"] == dtype]
        best = max(points, key=lambda point: point["flops_per_second"])
        theirs = table.rates.get(dtype, None) if known else None
        note = f"{best['m']}×{best['k']}·{best['k']}×{best['n']} {best['layout']}"
        listed.append(row(f"product {dtype}", best["flops_per_second"] / 1e9, theirs and theirs / 1e9, "GFLOP/s", note))
    for what, speed in (("copy", measured.bandwidth_bytes_per_second), ("read", measured.read_bytes_per_second)):
        listed.append(row(f"memory, {what}", speed / 1e9, table.bandwidth / 1e9 if known else None, "GB/s"))
    for op, curve in measured.elementwise.items():
        for size, rate in (curve[min(1, len(curve) - 1)], curve[-1]):
            listed.append(row(f"{op}, {size / MIB:.3g} MiB", rate / 1e9, None, "GB/s"))
    if measured.fresh_seconds_per_byte:
        listed.append(row("memory, new pages", 1e-9 / measured.fresh_seconds_per_byte, None, "GB/s", "results over 32 MiB"))
    listed.append(row("call of an operator", measured.launch_seconds * 1e6, None, "µs"))
    listed.append(row("an operator in a step", measured.step["operation"] * 1e6, None, "µs"))
    listed.append(row("arithmetic in a step", measured.step["busy"], None, "×", "relative to isolated calls"))
    for verb, speeds in (("dequantize", measured.dequantize), ("quantize", measured.quantize)):
        listed += [row(f"{verb} {scheme}", speed / 1e6, None, "M/s") for scheme, speed in speeds.items()]
    for point in measured.attention:
        shape = f"{point['heads']} × {point['width']}, {point['length']}, {point['dtype']}"
        listed.append(row(f"attention {shape}", point["forward"] / 1e9, None, "GFLOP/s", "forward"))
        listed.append(row(f"attention {shape}", point["both"] / 1e9, None, "GFLOP/s", "forward and backward"))
    listed += [row(f"step {name}", rate / 1e6, None, "M/s", "parameters") for name, rate in measured.optimizer.items()]
    return listed


def show(table_rows: list[Row], table: Device, screen: Screen) -> None:
    from rich.table import Table

    known = any(row["baseline"] is not None for row in table_rows)
    columns = ["quantity", "measured", *([f"table: {table.key}", "share"] if known else []), ""]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        shown.add_column(column, justify="right" if column not in ("quantity", "") else "left")
    for row in table_rows:
        assert row["ours"] is not None
        beside = []
        if known:
            says, unit = (row["baseline"], row["ratio"]), row["unit"]
            beside = ["–", "–"] if says[0] is None or says[1] is None else [f"{significant(says[0], 3)} {unit}", f"{says[1]:.0%}"]
        shown.add_row(row["case"], f"{significant(row['ours'], 3)} {row['unit']}", *beside, row["note"])
    screen.console.print(shown, soft_wrap=False)


def device_command(json_file: Path | None, screen: Screen, sizes: Sizes = SIZES) -> None:
    """Measure the device that a run uses, save the result for the plan, show it, and write `json_file`.

    Raises:
        UserError: other programs used too much of the machine; the result is not saved.
    """
    import sys

    table = present(measured=False)  # ignores an old, possibly damaged measurement
    torch_device = torch.device(table.type)
    with screen.phase(f"device {table.key}") as progress:
        measured = measure(torch_device, sizes, progress)
    table_rows = rows(measured, table)
    show(table_rows, table, screen)
    if measured.others > sizes.too_busy:
        raise UserError(
            "this machine was too busy; the measurement was not saved",
            where=table.name,
            got=f"other programs used {measured.others:.0%} of it",
            hint="run finetune bench device when nothing else is running",
        )
    path = save_calibration(table.key, measured)
    screen.say(f"{table.name}: saved for finetune plan in {path}")
    if measured.others > BUSY:
        screen.warn(f"other programs used {measured.others:.0%} of this machine: measure again on an idle one")
    if json_file is not None:
        collected = provenance.collect(torch_device, 0, " ".join(sys.argv))
        write_json(json_file, {"name": "device", "rows": table_rows, "calibration": str(path), "provenance": collected})
        screen.say(f"written to {json_file}")
