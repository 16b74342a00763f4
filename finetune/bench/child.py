"""The measuring process: `python -m finetune.bench.child NAME DEVICE SIZES`, started by finetune/bench/__init__.py.

On the CPU it has one thread on one core. It writes JSON lines to its standard output; output of libraries goes to standard
error.

    {"place": …}   the environment: cores, caches, flags, backends, versions
    {"progress": [percent, note]}          {"row": …}   one for each case

It can also measure the peak memory of one side, which needs a fresh process: a fourth argument
names the side, the only message is {"peak": bytes}, and the process exits when its standard input is closed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import provenance
from finetune.bench.measure import COLD, Clock, CPUClock, CUDAClock, cache_bytes, measure, pin

PACKAGES = ("numba", "llvmlite", "libggml-python", "triton", "onebitllms", "torchao")  # in addition to those of provenance
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimddp", "i8mm", "bf16", "sve", "rvv",
)  # fmt: skip
EVERY_S = 0.2
NOISE = "medians; [95 %] is the noise within this run: another run, or a busy machine, can be outside it"


def flags() -> list[str]:
    """The CPU flags that matter here; empty if the system does not report them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = next((line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return [flag for flag in FLAGS if flag in words]


def place(device: str) -> tuple[Clock, dict[str, Any]]:
    """Set this process up for `device`; returns its clock and a description of the environment."""
    about: dict[str, Any] = {
        "device": "", "threads": 1, "versions": provenance.versions((*provenance.PACKAGES, *PACKAGES)),
        "python": platform.python_version(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    if device == "cuda":
        about["device"] = provenance.device_name(torch.device(device))
        about["method"] = f"{about['device']}; events, L2 filled before each call, pairs in alternating order, {NOISE}"
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
        f"processor time, pairs in alternating order, {NOISE}"
    )
    return CPUClock(cache), about


class Progress:
    """Estimates the elapsed fraction of time from the cases that ran, and the shares of those to come.

    A case that is slower here than its share moves the percentage back once, instead of stalling it.
    """

    def __init__(self, shares: list[float], now: Callable[[], float] = time.monotonic) -> None:
        self._ahead, self._now, self._start = sum(shares), now, now()
        self._seconds = self._shares = 0.0  # of the cases that ran

    def begin(self, share: float) -> None:
        self._share, self._began = share, self._now()
        self._first: tuple[float, float] | None = None  # (time, fraction) of the first tick: building does not count
        self._ahead -= share

    def end(self, ran: bool) -> None:
        """ran: not skipped; a skipped case does not count."""
        if ran:
            self._seconds += self._now() - self._began
            self._shares += self._share

    def percent(self, part: float) -> int:
        """The percentage with `part` (0 to 1) of the current case done; 0 while unknown."""
        now = self._now()
        here = now - self._began
        if self._first and part > self._first[1]:
            left = (now - self._first[0]) / (part - self._first[1]) * (1 - part)
            rate = (self._seconds + here + left) / (self._shares + self._share)
        elif self._shares:
            rate = self._seconds / self._shares
            left = max(self._share * rate - here, 0.0)
        else:
            rate = left = math.inf
        if part and not self._first:
            self._first = now, part
        gone = now - self._start
        whole = gone + left + (self._ahead * rate if self._ahead > 0 else 0.0)
        return round(100 * gone / whole) if whole else 0


def main(out: int, name: str, device: str, sizes: str) -> None:
    bench = importlib.import_module(f"finetune.bench.{name}")

    def say(**message: Any) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    clock, about = place(device)
    say(place=about | {"backends": bench.backends_here(device)})
    torch.manual_seed(0)
    cases = bench.cases(device, type(bench.SIZES)(**json.loads(sizes)))
    progress, spoke = Progress([case.share for case in cases]), 0.0

    def ticker(case: Any) -> Callable[[float], None]:
        def tick(part: float) -> None:
            nonlocal spoke
            percent = progress.percent(part)
            if time.monotonic() - spoke >= EVERY_S:
                spoke = time.monotonic()
                say(progress=[percent, case.name])

        return tick

    for case in cases:
        progress.begin(case.share)
        say(progress=[progress.percent(0.0), case.name])
        row = measure(case, clock, ticker(case))
        progress.end(row["ratio"] is not None)
        say(row=row)


def follow() -> None:
    """Exit when standard input is closed, which means that the parent has gone."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def peak(out: int, name: str, device: str, sizes: str, side: str) -> None:
    follow()
    bench = importlib.import_module(f"finetune.bench.{name}")
    place(device)
    peak = bench.peak(device, type(bench.SIZES)(**json.loads(sizes)), side)
    os.write(out, json.dumps({"peak": peak}).encode())


if __name__ == "__main__":
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        (peak if len(sys.argv) > 4 else main)(own, *sys.argv[1:])
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
