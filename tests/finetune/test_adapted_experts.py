"""Adapters on the experts of a mixture, whose weights transformers keeps in one tensor for each layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig

import finetune
from finetune.models.architecture import adapter_parameters, adapter_targets, architecture_of, parts_without_adapters
from finetune.models.load import load_model
from finetune.models.source import Source
from finetune.recipe import Adapter
from quant import split_experts, swap, to_float
from tests.conftest import VOCABULARY, alpaca, write_jsonl

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral() -> MixtralConfig:
    return MixtralConfig(**SIZES, num_local_experts=4)


def deepseek() -> DeepseekV2Config:
    """Dense layers and shared experts, whose names PEFT takes for those of the routed experts of transformers 4."""
    heads = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
    return DeepseekV2Config(**SIZES, **heads, **experts, first_k_dense_replace=1, n_group=1, topk_group=1)


def test_split_experts_compute_the_same_and_fuse_again() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(mixtral(), dtype=torch.float32).eval()
    ids = torch.arange(2, 42)[None]
    before, weights = model(input_ids=ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    split_experts(model, ["model.layers.0.mlp.experts"])
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts.down_proj.3"), torch.nn.Linear)
    to_float(model)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {name: tuple(p.shape) for name, p in weights.items()}
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_experts_in_floats_beside_quantized_linears_count_as_used() -> None:
    from quant import prove_used

    model: Any = AutoModelForCausalLM.from_config(mixtral(), dtype=torch.float32).eval()
    report = swap(model, keep=("lm_head", "gate", "experts"))
    split_experts(model, [f"model.layers.{n}.mlp.experts" for n in range(2)])
    with prove_used(model, report):
        model(input_ids=torch.arange(8)[None])


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 8), (["experts"], 16), (["q_proj", "experts"], 18), (["gate_up_proj"], 8),
     (["model.layers.1.mlp.experts.down_proj.2"], 1)],
)  # fmt: skip
def test_experts_are_adapted_where_they_are_named(targets: Any, count: int) -> None:
    info = architecture_of(Source("m", "m"), mixtral())
    adapter = Adapter(targets=targets, rank=4)
    chosen = adapter_targets(adapter, info)
    assert len(chosen) == len(set(chosen)) == count
    assert (parts_without_adapters(info, chosen) is None) == (targets != "all-linear")
    if targets == ["experts"]:
        assert adapter_parameters(adapter, info, chosen) == 2 * 4 * 4 * ((64 + 128) + (64 + 64))


@pytest.mark.parametrize("scheme", ["none", "nf4"])
@pytest.mark.parametrize(
    ("config", "targets"), [(mixtral, ["q_proj", "experts"]), (deepseek, "all-linear"), (deepseek, ["experts"])]
)
def test_adapters_of_a_mixture_are_trained_merged_and_opened(
    config: Any, targets: Any, scheme: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.stages import planning

    monkeypatch.setattr(planning, "default_planner", None)
    torch.manual_seed(0)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(model)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, model)
    recipe = {
        "model": {"name": str(model), "dtype": "fp32"}, "quant": {"scheme": scheme},
        "adapter": {"rank": 4, "targets": targets},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", alpaca(24))), "heldout": 4, "max_length": 256},
        "train": {"max_steps": 3, "lr": 5e-3, "epochs": 9}, "eval": {"samples": 0},
        "run": {"device": "cpu", "threads": 1, "dir": str(tmp_path / "run")},
    }  # fmt: skip
    written = tmp_path / "r.yaml"
    written.write_text(json.dumps(recipe))
    record = finetune.run(written).record
    assert record.eval.difference is not None
    assert record.eval.difference < -0.05
    assert record.merge is not None
    assert record.merge.gate is not None
    assert record.merge.gate.status == "pass"
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as file:
        moved = {key: bool(file.get_tensor(key).any()) for key in file.keys() if "lora_B" in key}  # noqa: SIM118
    routed = {key for key in moved if ".experts." in key}
    assert bool(routed) == ("experts" in targets)
    assert sum(moved[key] for key in routed) >= len(routed) / 2  # an expert that no token chose has not moved
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "outside")
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        by_run, merged, outside = (
            load_model(str(tmp_path / name)).model(input_ids=ids).logits for name in ("run/adapter", "run/merged", "outside")
        )
    assert torch.allclose(by_run, merged, atol=1e-4)
    if scheme == "none":  # outside of its run an adapter is on the base as it is stored
        assert torch.allclose(outside, merged, atol=1e-4)
