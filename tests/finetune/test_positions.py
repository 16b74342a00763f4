"""A model with few positions: rows, answers, texts and conversations end at its last one, and the user is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Terminal, alpaca, record_of, write_jsonl

POSITIONS = 64


@pytest.fixture
def gpt2(tmp_path: Path, tokenizer_folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, eos_token_id=2, bos_token_id=1)
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder)
    return folder


def test_answers_end_at_the_last_position_and_questions_without_room_are_not_asked(
    finetune: Terminal, gpt2: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca(12))
    words: dict[str, Any] = {
        "model.name": gpt2, "data.path": rows, "data.max_length": POSITIONS, "data.heldout": 2, "train.max_steps": 1,
        "eval.samples": 1, "eval.max_new_tokens": 500, "eval.prompts": json.dumps(["What is 1 plus 1? " * 20]),
        "run.device": "cpu", "run.dir": "run", "adapter.rank": 2, "quant.scheme": "none",
    }  # fmt: skip
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name: x}\ndata: {path: x}\n")
    code, out, err = finetune("run", str(recipe), *(f"{key}={value}" for key, value in words.items()))
    assert code == 0, (out, err)
    samples = record_of(tmp_path / "run")["samples"]
    assert len(samples) == 1
    assert samples[0]["before"]
    assert "a question is not asked: the prompt has" in out + err
    assert f"the model {POSITIONS} positions" in out + err


def test_rows_and_texts_of_a_file_are_cut_at_the_positions_and_that_is_said(
    finetune: Terminal, gpt2: Path, tmp_path: Path
) -> None:
    finetune.monkeypatch.setenv("COLUMNS", "500")
    rows = [*alpaca(3), {"instruction": "Go on.", "input": "", "output": "plus " * 200}]
    code, out, err = finetune("eval", str(gpt2), "--file", str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert code == 0, err
    assert f"1 of 4 rows cut at {POSITIONS} tokens" in " ".join(out.split())
    (tmp_path / "text.txt").write_text("What is 1 plus 2? " * 100)
    code, out, err = finetune("eval", str(gpt2), "--file", str(tmp_path / "text.txt"))
    assert code == 0, err
    assert f"in windows of {POSITIONS} tokens" in " ".join(out.split())


def test_chat_says_that_a_conversation_fills_the_positions(
    finetune: Terminal, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["plus " * 200, "/new", "Hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = finetune("chat", str(gpt2))
    assert code == 0, err
    assert f"the model {POSITIONS} positions, which leaves no answer; /new starts over" in out


def test_merge_stops_where_the_trained_model_has_another_loss_than_after_training(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    """The fast step's attention could differ from the model's own at lengths that its trial did not reach."""
    from transformers import AutoModelForCausalLM

    from finetune.errors import GateError
    from finetune.merging import write_gated

    ids = tokenizer("What is 1 plus 4? It is 5.")["input_ids"]
    options: dict[str, Any] = {
        "dtype": torch.float32, "rows": [(ids, ids)], "limit": 0.01, "batch_tokens": 64, "device": torch.device("cpu"),
        "progress": lambda done, total, what: None,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(GateError, match="another loss than it had after training"):
        write_gated(model, tokenizer, tmp_path / "merged", **options, expected=3.0)
    assert not (tmp_path / "merged").exists()
    figures = write_gated(model, tokenizer, tmp_path / "first", **options)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert write_gated(model, tokenizer, tmp_path / "second", **options, expected=figures["adapter_loss"])["status"] == "pass"
