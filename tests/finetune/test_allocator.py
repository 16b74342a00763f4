"""The allocator: a command that trains starts itself again with mimalloc, unless the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import allocator

pytestmark = pytest.mark.skipif(
    not allocator.environment({"PATH": ""}), reason="not where mimalloc is preloaded: Linux on x86-64, no NVIDIA driver"
)
# What `finetune WORDS` does up to its command, and what the process then has.
PROBE = """
import os, sys
from finetune import allocator
sys.argv[0] = "finetune"
allocator.restart_with_mimalloc()
print(allocator.name(), os.getpid(), *sys.argv[1:], "LD_PRELOAD" in os.environ, os.environ.get("FINETUNE_ALLOCATOR"))
"""


def probe(tmp_path: Path, *words: str, **environment: str) -> tuple[list[str], int]:
    """(what the process prints, its id when it was started)"""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", allocator.CHOICE)}
    command = [sys.executable, str(script), *words]
    process = subprocess.Popen(command, env=clean | environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()
    return out.split(), process.pid


def test_training_command_gets_mimalloc_in_the_same_process_and_leaves_it_to_no_other(tmp_path: Path) -> None:
    for command in ("run", "resume"):
        printed, pid = probe(tmp_path, command, "a b", "--force")
        assert printed == ["mimalloc", str(pid), command, "a", "b", "--force", "False", "None"]


@pytest.mark.parametrize(
    ("command", "environment"),
    [("show", {}), ("run", {"FINETUNE_ALLOCATOR": "glibc"}), ("run", {"LD_PRELOAD": "libm.so.6"})],
)
def test_other_commands_and_users_choices_keep_their_allocator(tmp_path: Path, command: str, environment: dict[str, str]) -> None:
    printed, _ = probe(tmp_path, command, **environment)
    assert printed[0] == "the"  # system's malloc
    assert printed[-2:] == [str("LD_PRELOAD" in environment), environment.get("FINETUNE_ALLOCATOR", "None")]
