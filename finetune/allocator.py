"""The allocator of the process: mimalloc in place of glibc's malloc, where memory would otherwise grow during training.

Rows of many lengths leave holes in glibc's heap that later rows do not fit into: a run of 250 steps took two thirds more than
planned, and other allocators keep it at its plan and are faster (README, "Memory"). An allocator must be there before the first
allocation, so a command starts itself once again with LD_PRELOAD, in the same process. It never does so against the user's own
LD_PRELOAD, beside an NVIDIA driver (there the memory that matters is the card's, and it was not tried), or with
FINETUNE_ALLOCATOR=glibc.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

CHOICE = "FINETUNE_ALLOCATOR"  # set by the user to glibc, or here for the restarted command
LIBRARY = "cmeel.prefix/lib/libmimalloc.so"  # of the wheel cmeel-mimalloc, in site-packages
OPTIONS = {"MIMALLOC_PURGE_DELAY": "1000"}  # ms that freed pages are kept for the next step
COMMANDS = ("run", "resume")
KNOWN = {"mi_version": "mimalloc", "tc_version": "tcmalloc", "mallctl": "jemalloc"}  # a function of each → its name


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment so that a new process has mimalloc; empty where that is not wanted or not possible."""
    import sysconfig

    library = Path(sysconfig.get_path("purelib")) / LIBRARY
    wanted = sys.platform == "linux" and not given.get("LD_PRELOAD") and not given.get(CHOICE)
    splits = any(character in str(library) for character in " :")  # the loader would, and has no escape
    if not wanted or splits or Path("/proc/driver/nvidia").exists() or not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), CHOICE: "mimalloc"} | {name: given.get(name, value) for name, value in OPTIONS.items()}


def restart_with_mimalloc() -> None:
    """Replace this process by the same command with mimalloc, if it is one that trains; else return.

    Call it first. In the restarted process it removes what it has set: programs that a command starts do not inherit it.
    """
    if os.environ.get(CHOICE) == "mimalloc":
        for name in ("LD_PRELOAD", CHOICE):
            os.environ.pop(name, None)
    elif sys.argv[1:2] and sys.argv[1] in COMMANDS and (added := environment(os.environ)):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)


def name() -> str:
    """The name of this process's allocator."""
    loaded = ctypes.CDLL(None)
    return next((name for function, name in KNOWN.items() if hasattr(loaded, function)), "the system's malloc")
