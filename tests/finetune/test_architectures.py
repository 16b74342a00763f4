"""Full fine-tuning of every accepted architecture takes the same steps as a plain loop of transformers and torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import finetune
from finetune.data.preflight import Limits
from finetune.recipe import Recipe
from finetune.task_data import Conversations
from tests.conftest import VOCABULARY, alpaca, write_jsonl

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
OLDER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
ROTARY = {"head_dim": 16}
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "dropout", "activation_dropout", "layerdrop", "resid_pdrop", "residual_dropout", "hidden_dropout_prob",
     "attention_probs_dropout_prob"), 0.0,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 12}, "ministral": ROTARY, "qwen2": {}, "qwen3": ROTARY,
    "qwen3_moe": EXPERTS | ROTARY, "gemma": ROTARY, "gemma2": ROTARY | {"sliding_window": 12, "query_pre_attn_scalar": 16},
    "gemma3_text": ROTARY | {"sliding_window": 12, "query_pre_attn_scalar": 16}, "phi": {}, "phi3": {},
    "gpt2": OLDER, "gpt_neox": {}, "gptj": OLDER | {"rotary_dim": 8}, "codegen": OLDER | {"rotary_dim": 8},
    "gpt_bigcode": OLDER, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "stablelm": {}, "starcoder2": {}, "cohere": {},
    "cohere2": {"sliding_window": 12}, "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": 12},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "granite": {}, "granitemoe": LOCAL_EXPERTS,
    "granitemoehybrid": LOCAL_EXPERTS | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16} | MAMBA,
    "mixtral": LOCAL_EXPERTS, "gpt_oss": LOCAL_EXPERTS | ROTARY | {"sliding_window": 12},
    "llama4_text": LOCAL_EXPERTS | ROTARY | {"intermediate_size_mlp": 96, "attention_chunk_size": 16},
    "ernie4_5": ROTARY, "glm": ROTARY, "glm4": ROTARY, "smollm3": {}, "exaone4": {"sliding_window": 12}, "helium": ROTARY,
    "jamba": {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16} | MAMBA,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16} | MAMBA,
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 12, "block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "minimax": LOCAL_EXPERTS | ROTARY, "nemotron": {}, "persimmon": {},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}, "biogpt": {}, "apertus": {}, "arcee": {},
    "seed_oss": ROTARY, "bitnet": {},
}  # fmt: skip
# Their rows are not packed: recurrent layers, ALiBi, and positions or masks of their own.
ALONE = (
    "opt", "bloom", "mpt", "granitemoehybrid", "gpt_oss", "jamba", "falcon_h1", "recurrent_gemma", "bamba", "lfm2", "minimax",
    "xglm", "biogpt",
)  # fmt: skip
STEPS, LR, ROWS = 4, 1e-3, 8


def settings_of(family: str) -> dict[str, Any]:
    known = set(CONFIG_MAPPING[family]().to_dict()) | set(CONFIG_MAPPING[family].attribute_map)
    return {key: value for key, value in (SIZES | NO_DROPOUT | FAMILIES[family]).items() if key in known}


def plain_losses(folder: Path, samples: list[Any]) -> list[float]:
    """The loss of each step: all samples, each alone, in one AdamW step."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    tokens, losses = sum(sample.supervised for sample in samples), []
    for _ in range(STEPS):
        total = 0.0
        for sample in samples:
            logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, torch.tensor(sample.labels[1:]), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_takes_the_steps_of_a_plain_loop(family: str, packing: bool, tmp_path: Path, tokenizer_folder: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    config = CONFIG_MAPPING[family](**settings_of(family))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, model)
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(ROWS))
    recipe = {
        "model": {"name": str(model), "dtype": "fp32"}, "quant": {"scheme": "none"}, "adapter": {"kind": "none"},
        "data": {"path": str(rows), "heldout": 0, "max_length": 512, "packing": packing},
        "train": {
            "epochs": STEPS, "accumulation": 1 if packing else ROWS, "lr": LR, "schedule": "constant", "warmup": 0.0,
            "precision": "fp32",
        },
        "eval": {"samples": 0}, "run": {"device": "cpu", "threads": 1, "merge": False, "dir": str(tmp_path / "run")},
    }  # fmt: skip
    written = tmp_path / "r.yaml"
    written.write_text(json.dumps(recipe))
    finetune.run(written)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    if packing and len(losses) != STEPS:
        assert len(losses) == STEPS * ROWS
        assert family in ALONE
        return
    tokenizer: Any = AutoTokenizer.from_pretrained(model)  # of the class that belongs to the family
    data = Conversations(Recipe.model_validate(recipe), tokenizer, frozenset({2}), Limits())
    expected = plain_losses(model, data.data.train)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert losses[-1] < losses[0]
