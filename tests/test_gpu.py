"""Tests that need a CUDA GPU: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import alpaca, story, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "bitsandbytes", "triton"])
def test_nf4_dequantizes_to_the_same_bits_as_on_the_cpu(dtype: torch.dtype, backend: str) -> None:
    from quant import NF4Linear, backends

    torch.manual_seed(0)
    packed = NF4Linear.from_linear(torch.nn.Linear(320, 192, dtype=dtype))
    with backends.use("reference"):
        expected = packed.dequantize()
    with backends.use(backend):
        assert torch.equal(packed.to("cuda").dequantize().cpu(), expected)


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bitlinear_forward_and_backward_match_the_cpu(backend: str, norm_eps: float | None) -> None:
    import copy

    from quant import BitLinear, backends, weights_changed

    torch.manual_seed(0)
    layer = BitLinear.from_linear(torch.nn.Linear(320, 192), norm_eps=norm_eps)
    x, grad = torch.randn(40, 320), torch.randn(40, 192)

    def step(layer: BitLinear, device: str) -> list[torch.Tensor]:
        layer, inputs = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        weights_changed()
        output = layer(inputs)
        output.backward(grad.to(device))
        return [t.detach().cpu() for t in (output, inputs.grad, *(p.grad for p in layer.parameters())) if t is not None]

    with backends.use("reference"):
        expected = step(layer, "cpu")
    with backends.use(backend):
        for actual, reference in zip(step(layer, "cuda"), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_run_and_resume_on_cuda(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    from finetune import cli

    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(40))
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{name: {tiny_model}, dtype: bf16}}\nquant: {{scheme: nf4}}\nadapter: {{rank: 8}}\n"
        f"data: {{path: {rows}, max_length: 256, heldout: 6}}\n"
        f"train: {{epochs: 20, max_steps: 12, save_steps: 6, checkpointing: true, optimizer: {optimizer}}}\n"
        "eval: {samples: 1, max_new_tokens: 4}\nrun: {device: cuda, dir: run}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune", "run", "tiny.yaml"])
    cli.main()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["train"]["memory_kind"] == "CUDA allocated"
    assert record["eval"]["after"]["loss"] < record["eval"]["before"]["loss"]
    assert record["merge"]["gate"]["status"] == "pass"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    monkeypatch.setattr(sys, "argv", ["finetune", "resume", "run"])
    cli.main()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "done"


def test_ternary_pretraining_lowers_the_loss_and_its_exports_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.pipeline import run
    from finetune.recipe import read_recipe, shipped_recipes

    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(story(400_000))
    tiny = next(path for path in shipped_recipes() if path.stem == "bitnet-tiny")
    overrides = [
        "data.path=story.txt",
        "data.files=[]",
        "tokenizer.train=300",
        "train.max_steps=30",
        "data.heldout=8",
        "run.device=cuda",
    ]
    record = run(read_recipe(tiny, overrides), "ternary").record.as_dict()
    assert record["eval"]["after"]["loss"] < record["eval"]["before"]["loss"] - 1
    assert {export["gate"]["status"] for export in record["exports"].values()} == {"pass"}


def test_full_training_of_1_9b_parameters_fits_in_12_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the shipped recipe nanochat-d32: weights, 8-bit optimizer states and the largest gradient fit."""
    from finetune.pipeline import run
    from finetune.recipe import read_recipe, shipped_recipes

    monkeypatch.chdir(tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 12 * 2**30 / total))
    (tmp_path / "story.txt").write_text(story(2_000_000))
    d32 = next(path for path in shipped_recipes() if path.stem == "nanochat-d32")
    overrides = [
        "data.path=story.txt", "tokenizer.name=null", "tokenizer.train=300", "model.config.vocab_size=65536", "run.device=cuda",
        "train.max_steps=3", "train.micro_batch=1", "data.heldout=2", "eval.samples=0", "eval.prompts=[]",
    ]  # fmt: skip
    try:
        record = run(read_recipe(d32, overrides), "d32").record.as_dict()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert record["model"]["parameters"] > 1.8e9
    assert record["train"]["steps"] == 3
    assert record["train"]["peak_bytes"] < 12 * 2**30


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])  # varlen flash attention; tiles, because varlen has no soft cap
def test_fast_step_gradients_match_the_plain_step_on_cuda(family: str) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    from finetune.train.fast import patching
    from finetune.train.fast.chunked_loss import LMHead, fused_linear_cross_entropy, head_of
    from quant import linear_targets, register_peft, swap

    sizes = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).to(torch.bfloat16)
    swap(model, scheme="nf4")
    config = LoraConfig(r=8, target_modules=linear_targets(model), task_type="CAUSAL_LM", init_lora_weights=False)
    register_peft(config)
    model = get_peft_model(model.to("cuda"), config).train()
    lengths = (100, 37, 256, 119)
    ids = torch.randint(0, 512, (1, sum(lengths)), device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]

    def gradients(head: LMHead | None) -> torch.Tensor:
        model.zero_grad()
        if head is None:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        else:
            loss, _ = fused_linear_cross_entropy(model, head, ids, positions)
        loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients(None)
    with patching.patched(model) as report:
        assert {r.name for r in report.patches} >= {
            "attention without padding",
            "groups of adapters",
            "norms",
            "gated activations",
        }
        fast = gradients(head_of(model)[0])
    assert float((fast - plain).norm() / plain.norm()) < 0.05


def test_offloaded_checkpoints_give_the_same_loss_on_cuda(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.pipeline import run
    from finetune.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(40))
    losses = {}
    for kind in (True, "offload"):
        recipe = {
            "model": {"name": str(tiny_model), "dtype": "bf16"}, "quant": {"scheme": "nf4"},
            "data": {"path": str(rows), "max_length": 256, "heldout": 6}, "eval": {"samples": 0},
            "train": {"max_steps": 3, "checkpointing": kind}, "run": {"device": "cuda", "dir": f"run-{kind}", "merge": False},
        }  # fmt: skip
        losses[kind] = run(Recipe.model_validate(recipe), "offload").record.as_dict()["eval"]["after"]["loss"]
    assert losses["offload"] == pytest.approx(losses[True], abs=5e-3)
