"""Measurements of memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from finetune.memory import PeakMemory, free_bytes, machine_bytes, resident_bytes, usable_bytes


@pytest.mark.alone
def test_peak_memory_counts_from_the_last_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    array = np.ones(128 << 20, np.uint8)
    resident = resident_bytes()
    del array
    memory.reset()
    before = memory.peak()
    if memory.kind == "process RSS":
        assert before < resident - (96 << 20)
    array = np.ones(64 << 20, np.uint8)
    assert memory.peak() >= resident - (128 << 20) + (48 << 20)
    del array


def test_free_memory_is_less_than_usable_memory() -> None:
    assert 0 < resident_bytes() < machine_bytes()
    assert free_bytes() < usable_bytes(torch.device("cpu"))


def test_importing_memory_imports_no_heavy_library() -> None:
    code = "import sys, finetune.memory, finetune.units; print({'psutil', 'torch', 'numpy'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
