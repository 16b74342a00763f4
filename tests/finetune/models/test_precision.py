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


def recipe(base: dict[str, Any], adapter: str, dtype: str, arithmetic: str) -> Recipe:
    return Recipe.model_validate(
        base | {
            "model": base["model"] | {"dtype": dtype}, "adapter": {"kind": adapter},
            "train": base.get("train", {}) | {"precision": arithmetic},
        }
    )  # fmt: skip


@pytest.mark.parametrize("base", [SFT, TEXT], ids=["sft", "pretrain"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("adapter", "dtype", "arithmetic", "low", "weights", "products"),
    [
        # All weights are trained: fp32 masters, and bf16 products where the device has them.
        ("none", "auto", "auto", BF16, FP32, BF16),
        ("none", "auto", "auto", FP32, FP32, None),
        ("none", "fp32", "auto", BF16, FP32, BF16),
        ("none", "fp32", "auto", FP32, FP32, None),
        ("none", "bf16", "auto", BF16, BF16, None),
        ("none", "auto", "bf16", FP32, FP32, BF16),
        ("none", "auto", "fp32", BF16, FP32, None),
        ("none", "bf16", "fp32", BF16, FP32, None),
        # A frozen base: its dtype is that of the products.
        ("lora", "auto", "auto", BF16, BF16, None),
        ("lora", "auto", "auto", FP32, FP32, None),
        ("lora", "fp32", "auto", BF16, FP32, None),
        ("lora", "fp16", "auto", BF16, FP16, None),
        ("lora", "fp32", "bf16", FP32, FP32, BF16),
        ("lora", "bf16", "bf16", BF16, BF16, None),
        ("lora", "auto", "fp32", BF16, FP32, None),
    ],
)
def test_the_rule(
    base: dict[str, Any], device_type: str, adapter: str, dtype: str, arithmetic: str, low: torch.dtype,
    weights: torch.dtype, products: torch.dtype | None,
) -> None:  # fmt: skip
    said = recipe(base, adapter, dtype, arithmetic)
    held = weights_dtype(said, device_type, low)
    assert (held, autocast_dtype(said, held, device_type, low)) == (weights, products)


def test_a_device_that_is_here_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said = recipe(SFT, "none", "auto", "auto")
    for own, products in ((BF16, BF16), (FP32, None)):
        monkeypatch.setattr(precision, "default_dtype", lambda device_type, own=own: own)
        assert weights_dtype(recipe(SFT, "lora", "auto", "auto"), "cpu") == own
        assert autocast_dtype(said, weights_dtype(said, "cpu"), "cpu") == products


def test_the_shipped_full_fine_tuning_has_bf16_products_without_saying_so() -> None:
    said = read_recipe(find_recipe("smollm2-360m-full-dolly"))
    assert said.train.precision == "auto"
    assert autocast_dtype(said, weights_dtype(said, "cuda", BF16), "cuda", BF16) == BF16


@pytest.mark.parametrize(("words", "products"), [((), BF16), (("train.precision=fp32",), FP32)])
def test_full_fine_tuning_computes_in_bf16_over_fp32_weights(
    finetune: Terminal, tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], products: torch.dtype,
) -> None:  # fmt: skip
    """As on a CPU with bf16 instructions, whether this one has them or not."""
    from finetune.train.loop import Training

    monkeypatch.setattr(precision, "default_dtype", lambda device_type: BF16)
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    run = Training.run

    def watched(training: Any) -> Any:
        linear = next(m for name, m in training.model.named_modules() if name.endswith("o_proj"))
        hook = linear.register_forward_hook(
            lambda module, inputs, output: seen.add((module.weight.dtype, output.dtype)) if module.training else None
        )
        try:
            return run(training)
        finally:
            hook.remove()

    monkeypatch.setattr(Training, "run", watched)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_model}}}\nadapter: {{kind: none}}\n"
        f"data: {{path: {rows_file}, max_length: 64, heldout: 0, max_rows: 8}}\ntrain: {{max_steps: 1}}\neval: {{samples: 0}}\n"
        "run: {device: cpu, dir: made, merge: false}\n"
    )
    code, _, err = finetune("run", str(path), *words)
    assert code == 0, err
    assert seen == {(FP32, products)}
