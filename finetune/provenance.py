"""Provenance of a result: versions, commit, device."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from finetune import allocator

PACKAGES = (
    "finetune12g", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers",
)  # fmt: skip


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """{package: version} of the installed packages."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The git commit of this program, with a trailing + if files were changed; None if it runs from a wheel."""
    top = Path(__file__).parent.parent
    if not (top / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", top, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", top, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(
            line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        )
    return f"cpu: {name} ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() != 1 else ''})"


def collect(device: torch.device, seed: int, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "device": device_name(device),
        "allocator": allocator.name(),
        "seed": seed,
    }
