"""What is measured of memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from finetune.memory import PeakMemory, free_bytes, machine_bytes, resident_bytes, usable_bytes


def test_the_peak_is_that_since_the_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    many = np.ones(128 << 20, np.uint8)
    held = resident_bytes()
    del many
    memory.reset()
    before = memory.peak()
    if memory.kind == "process RSS":
        assert before < held - (96 << 20)
    many = np.ones(64 << 20, np.uint8)
    assert memory.peak() >= held - (128 << 20) + (48 << 20)
    del many


def test_what_is_free_and_what_can_be_had() -> None:
    assert 0 < resident_bytes() < machine_bytes()
    assert free_bytes() < usable_bytes(torch.device("cpu"))


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, finetune.memory, finetune.units; print({'psutil', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
