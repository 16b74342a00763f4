"""What `import quant` resolves to and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import quant, quant.linear, quant.swap, quant.nf4, quant.backends
print(quant.__file__)
heavy = {"finetune", "eval", "bitsandbytes", "triton", "transformers", "peft"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
from quant import swap, nf4, prove_used, SwapReport, NF4Linear
print(callable(swap), callable(prove_used), nf4.__name__)
from quant import register_peft, linear_targets, assert_wrapped
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
assert not _global_optimizer_post_hooks and not _global_optimizer_pre_hooks
print(sorted({"finetune", "eval", "trl"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_import_is_ours_and_light() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file, heavy, callables, after = done.stdout.splitlines()
    assert Path(file) == ROOT / "quant" / "__init__.py"
    assert heavy == "[]"
    assert callables == "True True quant.nf4"
    assert after == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    import quant

    with pytest.raises(AttributeError, match="no attribute 'swpa'"):
        _ = quant.swpa
