from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.models import precision
from finetune.models.precision import autocast_dtype, weights_dtype
from finetune.recipe import Recipe, find_recipe, read_recipe
from tests.conftest import Terminal

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SFT: dict[str, Any] = {"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}}
TEXT = SFT | {"kind": "pretrain", "train": {"max_steps": 1}}


def recipe(base: dict[str, Any], adapter: str, dtype: str, train_precision: str) -> Recipe:
    return Recipe.model_validate(
        base | {
            "model": base["model"] | {"dtype": dtype}, "adapter": {"kind": adapter},
            "train": base.get("train", {}) | {"precision": train_precision},
        }
    )  # fmt: skip


@pytest.mark.parametrize("base", [SFT, TEXT], ids=["sft", "pretrain"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("adapter", "dtype", "train_precision", "device_dtype", "weights", "autocast"),
    [
        # Full fine-tuning: fp32 master weights, and bf16 matrix products where the device supports bf16.
        ("none", "auto", "auto", BF16, FP32, BF16),
        ("none", "auto", "auto", FP32, FP32, None),
        ("none", "fp32", "auto", BF16, FP32, BF16),
        ("none", "fp32", "auto", FP32, FP32, None),
        ("none", "bf16", "auto", BF16, BF16, None),
        ("none", "auto", "bf16", FP32, FP32, BF16),
        ("none", "auto", "fp32", BF16, FP32, None),
        ("none", "bf16", "fp32", BF16, FP32, None),
        # A frozen base: matrix products run in its dtype.
        ("lora", "auto", "auto", BF16, BF16, None),
        ("lora", "auto", "auto", FP32, FP32, None),
        ("lora", "fp32", "auto", BF16, FP32, None),
        ("lora", "fp16", "auto", BF16, FP16, None),
        ("lora", "fp32", "bf16", FP32, FP32, BF16),
        ("lora", "bf16", "bf16", BF16, BF16, None),
        ("lora", "auto", "fp32", BF16, FP32, None),
    ],
)
def test_dtypes_of_weights_and_autocast(
    base: dict[str, Any], device_type: str, adapter: str, dtype: str, train_precision: str, device_dtype: torch.dtype,
    weights: torch.dtype, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    config = recipe(base, adapter, dtype, train_precision)
    actual_weights = weights_dtype(config, device_type, device_dtype)
    assert (actual_weights, autocast_dtype(config, actual_weights, device_type, device_dtype)) == (weights, autocast)


def test_dtypes_default_to_those_of_the_local_device(monkeypatch: pytest.MonkeyPatch) -> None:
    full = recipe(SFT, "none", "auto", "auto")
    for device_dtype, autocast in ((BF16, BF16), (FP32, None)):
        monkeypatch.setattr(precision, "default_dtype", lambda device_type, device_dtype=device_dtype: device_dtype)
        assert weights_dtype(recipe(SFT, "lora", "auto", "auto"), "cpu") == device_dtype
        assert autocast_dtype(full, weights_dtype(full, "cpu"), "cpu") == autocast


def test_shipped_full_fine_tuning_recipe_autocasts_to_bf16() -> None:
    shipped = read_recipe(find_recipe("smollm2-360m-full-dolly"))
    assert shipped.train.precision == "auto"
    assert autocast_dtype(shipped, weights_dtype(shipped, "cuda", BF16), "cuda", BF16) == BF16


@pytest.mark.parametrize(("overrides", "output_dtype"), [((), BF16), (("train.precision=fp32",), FP32)])
def test_full_fine_tuning_computes_in_bf16_with_fp32_weights(
    finetune: Terminal, tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...], output_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Simulates a CPU with bf16 instructions."""
    from finetune.train.loop import Training

    monkeypatch.setattr(precision, "default_dtype", lambda device_type: BF16)
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    original_run = Training.run

    def recording_run(training: Any) -> Any:
        linear = next(m for name, m in training.model.named_modules() if name.endswith("o_proj"))
        hook = linear.register_forward_hook(
            lambda module, inputs, output: dtypes.add((module.weight.dtype, output.dtype)) if module.training else None
        )
        try:
            return original_run(training)
        finally:
            hook.remove()

    monkeypatch.setattr(Training, "run", recording_run)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_model}}}\nadapter: {{kind: none}}\n"
        f"data: {{path: {rows_file}, max_length: 64, heldout: 0, max_rows: 8}}\ntrain: {{max_steps: 1}}\neval: {{samples: 0}}\n"
        "run: {device: cpu, dir: made, merge: false}\n"
    )
    code, _, err = finetune("run", str(path), *overrides)
    assert code == 0, err
    assert dtypes == {(FP32, output_dtype)}
