"""Commands after a ternary training run: export with master weights, eval, merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.record import read_record
from tests.conftest import Terminal, alpaca, story, write_jsonl
from tests.finetune.test_pretrain import RECIPE

SHORT = ("eval.samples=0", "eval.prompts=[]")


@pytest.fixture
def recipe(tmp_path: Path, finetune: Terminal) -> Path:
    """A pretraining recipe that has run in folder `base`, with a packed `merged` model and a checkpoint."""
    (tmp_path / "story.txt").write_text(story(40_000))
    path = tmp_path / "ternary.yaml"
    path.write_text(RECIPE.replace("health_steps: 2, ", "").format(text=tmp_path / "story.txt"))
    code, _, err = finetune("run", str(path), "run.dir=base", "train.max_steps=2", *SHORT)
    assert code == 0, err
    return path


def test_export_of_master_weights_and_eval_on_rows_of_text(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    from quant.pretrained import load

    # merged/ is packed, so the master weights come from the newest checkpoint.
    code, out, err = finetune("export", "base", "--to", "bitnet-online", "--out", "online")
    assert code == 0, err
    assert "online: " in out
    config = json.loads((tmp_path / "online" / "config.json").read_text())
    assert config["quantization_config"]["quantization_mode"] == "online"
    online, packed = load(tmp_path / "online"), load(tmp_path / "base" / "merged")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(online(ids).logits, packed(ids).logits)

    # A pretrained model is scored on texts, also when they come in rows.
    write_jsonl(tmp_path / "texts.jsonl", [{"text": story(90, seed)} | alpaca(1)[0] for seed in range(3)])
    code, _, err = finetune("eval", "base", "--file", "texts.jsonl", "--json", "scores.json")
    assert code == 0, err
    loss = json.loads((tmp_path / "scores.json").read_text())["base"]["loss"]
    assert (loss["rows"], loss["on"]) == (3, "texts.jsonl, texts")
    write_jsonl(tmp_path / "questions.jsonl", [{"text": "The fox."}, *alpaca(2)])
    code, _, err = finetune("eval", "base", "--file", "questions.jsonl")
    assert code == 2
    assert "2 of 3 rows, the first questions.jsonl:2" in err
    assert "give a .txt" in err
    assert "data." not in err


def test_lora_adapters_merge_back_to_ternary(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    overrides = ("model.config=null", "model.name=base/merged", "tokenizer.train=4096", "adapter.kind=lora", "train.lr=5e-3",
             "train.max_steps=4", "run.merge=false", *SHORT)  # fmt: skip
    code, _, err = finetune("run", str(recipe), "run.dir=adapted", *overrides)
    assert code == 0, err
    assert read_record(tmp_path / "adapted").merge is None
    code, _, err = finetune("merge", "adapted", "--out", "again", "--dtype", "fp32")
    assert (code, "is merged to ternary" in err) == (2, True)
    code, out, err = finetune("merge", "adapted", "--out", "again")
    assert code == 0, err
    assert "merged to ternary: loss" in out
    assert "of the codes changed" in out
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quantization_mode"] == "offline"
    code, _, err = finetune("export", "again", "--to", "gguf-tq2_0", "--out", "again.gguf")
    assert code == 0, err
    code, _, err = finetune("export", "adapted", "--to", "bitnet-online", "--out", "online")
    assert (code, "it has no master weights" in err) == (2, True)


def test_write_ternary_returns_the_model_that_it_wrote(
    tmp_path: Path, words: object, rows: list[tuple[list[int], list[int]]]
) -> None:
    """A run exports the returned model to other formats, so it must equal the written one."""
    from peft import LoraConfig, get_peft_model

    from finetune.exporters import export
    from finetune.merging import ternary_in_words, write_ternary
    from quant import pack, register_peft
    from quant.pretrained import load
    from tests.finetune.exporters.conftest import built

    base = built("bitnet", len(words))  # type: ignore[arg-type]
    pack(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"], init_lora_weights=False)
    register_peft(config)
    options = {"rows": rows, "device": torch.device("cpu"), "progress": lambda done, total, what: None}
    model, figures = write_ternary(get_peft_model(base, config), words, tmp_path / "out", batch_tokens=512, **options)  # type: ignore[arg-type]
    assert {"adapter_loss", "base_loss", "float_loss", "merged_loss", "flips", "gate", "bytes"} <= figures.keys()
    assert f"{figures['merged_loss']:.4f}" in ternary_in_words(figures)
    written, ids = load(tmp_path / "out"), torch.tensor([rows[0][0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, written(ids).logits)
    assert export(model, words, tmp_path / "out.gguf", format="gguf-tq2_0", rows=rows)["gate"]["status"] == "pass"
