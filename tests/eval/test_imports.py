"""eval stands alone: neither finetune nor quant, and the heavy libraries only when they are used."""

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


def test_eval_stands_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    file, modules = done.stdout.splitlines()
    assert Path(file).parent == Path(__file__).resolve().parents[2] / "eval"  # not the tests
    assert not {"finetune", "quant", "transformers", "lm_eval", "peft"} & set(modules.split())
