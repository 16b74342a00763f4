"""The README's Python example, run exactly as written, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn


def test_readme_example_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "from quant" in block)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = pytest.importorskip("peft")
    namespace = {
        "LoraConfig": peft.LoraConfig,
        "get_peft_model": peft.get_peft_model,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "linear": nn.Linear(8, 8),
        "model": model,
        "batch": {"input_ids": torch.arange(6)[None]},
        "name": str(tiny_model),
    }
    exec(example, namespace)
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    assert (tmp_path / "ternary" / "model.safetensors").is_file()
    layer = namespace["model"].get_submodule("base_model.model.model.layers.0.mlp.up_proj")  # type: ignore[attr-defined]
    assert type(layer).__name__ == "PackedLora"
