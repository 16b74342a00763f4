"""How much memory there is, how much this process has, and what it had at most."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h


def machine_bytes() -> int:
    """Bytes of this machine's memory, or of the share of it that its container may take."""
    import psutil

    total = psutil.virtual_memory().total
    if sys.platform == "linux":
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                total = min(total, int(Path(path).read_text(encoding="utf-8")))
            except (OSError, ValueError):  # no such limit, or "max"
                continue
    return total


def resident_bytes() -> int:
    """Bytes of the machine's memory that this process has (RSS)."""
    import psutil

    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of the device's memory that nobody has: of a CUDA card, else of the machine."""
    import psutil

    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def usable_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that this process can have: free ones, and those that it has."""
    if device.type == "cuda":
        import torch

        return free_bytes(device) + torch.cuda.memory_reserved(device)
    return free_bytes() + resident_bytes()


class PeakMemory:
    """Most memory since `reset`: of the allocator on CUDA, elsewhere of the process (RSS). kind: which of them, in words."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.kind = "CUDA allocated" if self.cuda else "process RSS"

    def reset(self) -> None:
        """Start measuring again; where a system cannot do that, `kind` says so."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins again
        except OSError:
            self.kind = "process RSS since its start"

    def peak(self) -> int:
        """Bytes."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as far as it can be told to: the next step needs it again, page by page from the system.

    Blocks of up to 32 MiB, the most that it takes for this, come from its heap, whose end is not given back. (Measured on the
    quickstart, twice each: 1.33 and 1.43 instead of 1.65 million page faults; no other time than the machine's noise.)
    """
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 32 << 20)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> bool:
    """Give back to the system what was freed: glibc keeps it, and many freed weights lie between others that are not.

    Returns:
        Whether this can be done: with glibc alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return trim is not None
