"""The process that measures: `python -m finetune.bench.child NAME DEVICE SIZES`, started by finetune/bench/__init__.py.

On the CPU it has one thread, and keeps to one core. It speaks JSON lines on its standard output, which is no one else's: what
libraries print goes to standard error.

    {"place": …}   what a reader of the figures must know: cores, caches, flags, backends, versions
    {"progress": [percent, note]}          {"row": …}   one for each case
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import provenance
from finetune.bench.measure import COLD, Clock, CPUClock, CUDAClock, cache_bytes, measure, pin

PACKAGES = ("numba", "llvmlite", "libggml-python", "triton", "onebitllms", "torchao")  # beside those of provenance
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimddp", "i8mm", "bf16", "sve", "rvv",
)  # fmt: skip
EVERY_S = 0.2


def flags() -> list[str]:
    """What of the CPU's instructions makes a difference here; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = next((line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return [flag for flag in FLAGS if flag in words]


def place(device: str) -> tuple[Clock, dict[str, Any]]:
    """The clock for `device`, once this process is settled there, and where it is."""
    about: dict[str, Any] = {
        "device": "", "threads": 1, "versions": provenance.versions((*provenance.PACKAGES, *PACKAGES)),
        "python": platform.python_version(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    if device == "cuda":
        about["device"] = provenance.device_name(torch.device(device))
        about["method"] = f"{about['device']}; events, L2 filled before each call, pairs in alternating order"
        return CUDAClock(), about
    core = pin()
    torch.set_num_threads(1)
    cache, source = cache_bytes(core or 0)
    about["device"] = provenance.device_name(torch.device(device))
    about |= {
        "core": core, "flags": flags(), "capability": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": cache, "cache_read_from": source, "evicted_bytes": COLD * cache,
    }  # fmt: skip
    about["method"] = (
        f"{about['device']}, {'core ' + str(core) if core is not None else 'not pinned to a core'}; caches cold "
        f"({COLD * cache >> 20} MiB read before each call; last level {cache >> 20} MiB, {source}), "
        "processor time, pairs in alternating order, medians"
    )
    return CPUClock(cache), about


def main(out: int, name: str, device: str, sizes: str) -> None:
    bench = importlib.import_module(f"finetune.bench.{name}")

    def say(**message: Any) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    clock, about = place(device)
    say(place=about | {"backends": bench.backends_here(device)})
    torch.manual_seed(0)
    cases = bench.cases(device, type(bench.SIZES)(**json.loads(sizes)))
    whole, before = sum(case.share for case in cases), 0.0
    spoke = 0.0

    def ticker(case: Any) -> Callable[[float], None]:
        def tick(part: float) -> None:
            nonlocal spoke
            if time.monotonic() - spoke >= EVERY_S:
                spoke = time.monotonic()
                say(progress=[round(100 * (before + part * case.share) / whole), case.name])

        return tick

    for case in cases:
        say(row=measure(case, clock, ticker(case)))
        before += case.share


if __name__ == "__main__":
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        main(own, *sys.argv[1:])
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
