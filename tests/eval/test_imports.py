"""Importing eval imports neither finetune nor quant; heavy libraries are imported on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import eval.generation, eval.harness, eval.perplexity
print(eval.__file__)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_eval_imports_neither_our_packages_nor_heavy_libraries() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    file, modules = result.stdout.splitlines()
    assert Path(file).parent == Path(__file__).resolve().parents[2] / "eval"  # and not tests/eval
    assert not {"finetune", "quant", "transformers", "lm_eval", "peft"} & set(modules.split())
