"""The command line on a tiny Llama, in one process: the files that each command writes, and the errors for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import merging
from finetune.models.load import load_model
from finetune.recipe import read_recipe
from finetune.run_dir import choose_dir
from tests.conftest import VOCABULARY, Terminal, alpaca, story, tiny_llama, write_jsonl
from tests.support.starts import Start

RECIPE = """\
about: "a tiny run"
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4}}
adapter: {{rank: 4}}
data: {{path: {rows}, max_length: 128, heldout: 6}}
train: {{max_steps: 4, lr: 1.0e-3, save_steps: 2, eval_steps: 2}}
eval: {{samples: 1, prompts: ["Hello?"], max_new_tokens: 4}}
run: {{device: cpu}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows_file))
    return path


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------------- whole workflow


@pytest.mark.planned
@pytest.mark.drawn
def test_run_show_eval_merge_and_chat(finetune: Terminal, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = finetune("run", str(recipe))
    assert code == 0, err
    run = tmp_path / "runs" / "tiny"
    assert entries(run) == {
        "recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "merged", "eval", "samples", "report.html",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert out.rstrip().splitlines()[-3:] == [
        "report   runs/tiny/report.html", "next     finetune chat runs/tiny", "next     finetune show runs/tiny",
    ]  # fmt: skip
    assert "⟦" in out  # marks the trained tokens in the printed examples
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "done"
    assert record["preflight"]["supervised_share"] > 0
    assert record["model"]["swap"]["swapped"] == record["model"]["adapters"] == 14
    assert record["eval"]["after"]["loss"] < record["eval"]["before"]["loss"]
    assert record["merge"]["gate"]["status"] == "pass"
    assert {"before", "after", "reference"} <= set(record["samples"][0])
    assert record["provenance"]["data"]["rows"] == 40
    assert len(record["provenance"]["data"]["sha256"]) == 64
    assert read_recipe(run / "recipe.yaml").train.max_steps == 4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2]

    # Plain transformers loads the merged model without this package, and its logits equal the trained model's.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert not any(type(module).__module__.startswith(("quant", "peft")) for module in merged.modules())
    trained = load_model(str(run), merged=False)
    ids = torch.tensor([AutoTokenizer.from_pretrained(run / "merged")("What is 3 plus 6?")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained.model(ids).logits, rtol=1e-4, atol=1e-5)
    last_checkpoint = load_model(str(run / "checkpoints" / "step-000004"))
    with torch.no_grad():
        assert torch.equal(last_checkpoint.model(ids).logits, trained.model(ids).logits)

    code, out, err = finetune("show", str(run), "--json")
    assert code == 0, err
    assert json.loads(out)["eval"]["after"] == record["eval"]["after"]
    code, out, _ = finetune("show", str(run))
    assert code == 0
    assert "after" in out
    assert "perplexity" in out

    code, _, err = finetune("eval", str(run), str(run / "adapter"), "--json", "scores.json")
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores[str(run / "adapter")]["loss"]["loss"] == pytest.approx(record["eval"]["after"]["loss"], rel=1e-5)
    assert scores[str(run)]["loss"]["loss"] == pytest.approx(record["merge"]["gate"]["merged_loss"], rel=1e-5)

    (tmp_path / "text.txt").write_text("One plus two is three. " * 50)
    code, _, err = finetune("eval", str(run / "merged"), "--file", "text.txt", "--json", "text.json")
    assert code == 0, err
    from eval.perplexity import evaluate_loss, text_rows

    rows = text_rows(AutoTokenizer.from_pretrained(run / "merged"), "One plus two is three. " * 50, length=1024)
    expected = evaluate_loss(merged, rows)
    assert json.loads((tmp_path / "text.json").read_text())[str(run / "merged")]["loss"]["loss"] == pytest.approx(
        expected.loss, rel=1e-2
    )

    code, out, err = finetune("merge", str(run), "--out", "again")
    assert code == 0, err
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (run / "merged" / file).read_bytes()
    code, _, err = finetune("merge", str(run), "--out", "again")
    assert code == 2
    assert "not empty" in err

    inputs = iter(["Hi", "/new", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(inputs))
    code, out, err = finetune("chat", str(run), str(run / "adapter"), "--max-new-tokens", "3", "--temperature", "0")
    assert code == 0, err
    assert out.count("[") == 4

    # A second run of the same name gets the next number. Resuming a finished run says that it is done.
    code, out, _ = finetune("run", str(recipe), "train.max_steps=1", "run.merge=false")
    assert code == 0
    assert (tmp_path / "runs" / "tiny-2" / "adapter").is_dir()
    assert "finetune merge runs/tiny-2" in out
    code, out, _ = finetune("resume", str(run))
    assert code == 0
    assert "is already done" in out


def test_full_fine_tuning_without_held_out_rows(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, out, err = finetune(
        "run", str(recipe), "quant.scheme=none", "adapter.kind=none", "data.heldout=0", "eval.prompts=[]", "run.dir=full"
    )
    assert code == 0, err
    assert "not compared" in out
    assert entries(tmp_path / "full") >= {"merged", "run.json", "report.html"}
    record = json.loads((tmp_path / "full" / "run.json").read_text())
    assert record["model"]["trainable"] == record["model"]["parameters"]
    assert record["eval"] == {}


def test_full_fine_tuning_passes_the_merge_gate(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, _, err = finetune("run", str(recipe), "quant.scheme=none", "adapter.kind=none", "run.dir=full")
    assert code == 0, err
    record = json.loads((tmp_path / "full" / "run.json").read_text())
    assert record["merge"]["gate"]["merged_loss"] == pytest.approx(record["eval"]["after"]["loss"], rel=1e-5)


def test_lora_adapts_the_conv1d_layers_of_gpt2(finetune: Terminal, recipe: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "gpt2")
    code, _, err = finetune("run", str(recipe), f"model.name={tmp_path / 'gpt2'}", "run.dir=g")
    assert code == 0, err
    record = json.loads((tmp_path / "g" / "run.json").read_text())
    assert record["model"]["adapters"] == 8
    assert record["merge"]["gate"]["status"] == "pass"


def test_base_model_gets_the_default_chat_template_and_saves_it(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink()
    code, out, err = finetune("run", str(recipe), f"model.name={base}", "run.dir=b")
    assert code == 0, err
    assert "alpaca (the tokenizer has no template)" in out
    from transformers import AutoTokenizer

    assert "### Response" in AutoTokenizer.from_pretrained(tmp_path / "b" / "merged").chat_template


def test_trackers_write_and_a_missing_tracker_is_refused(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, _, err = finetune("run", str(recipe), "run.trackers=[tensorboard]", "run.dir=t", "run.merge=false")
    assert code == 0, err
    assert list((tmp_path / "t").rglob("*tfevents*"))
    code, _, err = finetune("run", str(recipe), "run.trackers=[wandb]", "run.dir=w")
    assert code == 2
    assert "pip install wandb" in err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_resume_after_a_crash_is_bit_equal(
    finetune: Terminal, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """The run fails in step 4 of 5, after the checkpoint of step 3."""
    from finetune.train import sft

    options = ["train.max_steps=5", "train.save_steps=3", "adapter.dropout=0.1", f"data.packing={packing}"]
    assert finetune("run", str(recipe), *options, "run.dir=whole")[0] == 0
    loss, calls = sft.SupervisedFineTuning.loss, iter(range(100))

    def fail_in_step_4(self: Any, model: Any, batch: Any) -> Any:
        if next(calls) == 4:  # the first forward pass verifies the quantized model
            raise RuntimeError("gone")
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sft.SupervisedFineTuning, "loss", fail_in_step_4)
        with pytest.raises(RuntimeError):
            finetune("run", str(recipe), *options, "run.dir=cut")
    failed_record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert failed_record["state"] == "failed"
    assert (tmp_path / "cut" / "report.html").exists()
    code, out, err = finetune("run", str(recipe), *options, "run.dir=cut", "--resume")
    assert code == 0, err
    assert "resuming after step 3" in out
    for file in (
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "checkpoints/step-000005/optimizer.safetensors",
    ):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file

    def record(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / name / "run.json").read_text())

    assert record("whole")["eval"] == record("cut")["eval"]
    assert record("cut")["provenance"]["resumed"][0]["from"] == "step-000003"
    code, _, err = finetune("run", str(recipe), *options, "run.dir=cut", "--resume", "train.lr=5e-4")
    assert code == 2
    assert "train.lr was 0.001, is 0.0005" in err


def test_resume_is_refused_when_the_data_has_changed(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """Other data is split differently, so rows of the training split would land in the held-out split."""
    assert finetune("run", str(recipe), "run.dir=r", "run.merge=false")[0] == 0
    write_jsonl(tmp_path / "rows.jsonl", alpaca(50))
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    code, _, err = finetune("resume", "r")
    assert code == 2
    assert "the data has changed" in err
    assert json.loads((tmp_path / "r" / "run.json").read_text()) == record | {"state": "stopped"}
    assert finetune("eval", "r/adapter")[0] == 2
    code, out, err = finetune("merge", "r", "--out", "m")  # the merge gate needs no data of the run
    assert code == 0, err
    assert "on a passage of prose" in out


def test_run_loads_from_another_directory_and_in_another_dtype(
    finetune: Terminal, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "here")
    assert finetune("run", str(recipe), "model.name=here", "data.path=rows.jsonl", "run.dir=r", "run.merge=false")[0] == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    code, _, err = finetune("eval", "../r/adapter", "--json", "a.json")
    assert code == 0, err

    loaded, loaded_bf16 = load_model("../r/adapter"), load_model("../r/adapter", dtype="bf16")
    dtypes = {p.dtype for name, p in loaded_bf16.model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    assert dtypes == {torch.bfloat16}
    (inv_freq,) = {name for name, _ in loaded_bf16.model.named_buffers() if name.endswith("rotary_emb.inv_freq")}
    assert torch.equal(loaded_bf16.model.get_buffer(inv_freq), loaded.model.get_buffer(inv_freq))
    shutil.copytree(tmp_path / "r" / "adapter", tmp_path / "alone")
    adapter_only = load_model(str(tmp_path / "alone"))
    assert "loaded as stored" in (adapter_only.note or "")


def test_resume_picks_the_newest_run_of_the_same_name(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-long"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    resolved = read_recipe(recipe)
    assert choose_dir(resolved, "tiny", True) == Path("runs/tiny-10")
    assert choose_dir(resolved, "tiny", False) == Path("runs/tiny-11")


def test_code_of_a_model_runs_only_with_trust_remote_code(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model, folder)
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'it-ran')!r}).touch()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(finetune, recipe, f"model.name={folder}")
    assert "trust_remote_code" in message
    assert not (tmp_path / "it-ran").exists()
    code, _, err = finetune(
        "run", str(recipe), f"model.name={folder}", "model.trust_remote_code=true", "run.dir=r", "run.merge=false"
    )
    assert code == 0, err
    assert (tmp_path / "it-ran").exists()


# ---------------------------------------------------------------------------------------------------------- refused input


def refused(finetune: Terminal, recipe: Path, *arguments: str, code: int = 2) -> str:
    """Start a run that must be refused and must leave no files. Returns the error message."""
    before = entries(finetune.folder)
    exit_code, _, err = finetune("run", str(recipe), *arguments)
    assert exit_code == code, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert entries(finetune.folder) - {"runs"} == before - {"runs"}
    assert not list(finetune.folder.glob("runs/*"))
    return err


def test_recipe_errors_name_the_key_and_suggest_a_fix(finetune: Terminal, recipe: Path) -> None:
    assert "did you mean train.max_steps" in refused(finetune, recipe, "train.max_setps=3")
    assert "allowed: a whole number" in refused(finetune, recipe, "train.max_steps=many")
    assert finetune("check", str(recipe), "data.packin=1")[0] == 2
    assert finetune("check", str(recipe))[:2] == (0, f"{recipe}: no errors\n")
    code, _, err = finetune("check", str(recipe), "data.path=nowhere.jsonl", "model.name=./nothing")
    assert code == 2
    assert "2 errors" in err
    assert "command line, data.path" in err
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "rosw.jsonl"))
    code, _, err = finetune("check", str(recipe))
    assert code == 2
    assert "tiny.yaml:5, data.path" in err
    assert "did you mean" in err
    recipe.write_text(recipe.read_text().replace("rosw.jsonl", "rows.jsonl"))
    assert "quickstart" in finetune("run", "quikstart")[2]


def test_missing_models_data_and_devices_are_refused(finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    assert "did you mean" in refused(finetune, recipe, "data.path=rowz.jsonl")
    assert "model folder" in refused(finetune, recipe, "model.name=./nothing/here")
    assert "unknown model, or the hub" in refused(finetune, recipe, "model.name=nobody/nothing")
    assert "not installed" in refused(finetune, recipe, "model.name=package:nothing")
    assert "is only for hub models" in refused(finetune, recipe, "model.revision=v2")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(finetune, recipe, "model.name=empty")
    (tmp_path / "a.gguf").write_bytes(b"not a gguf")
    assert "not a GGUF file" in refused(finetune, recipe, "model.name=a.gguf")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(finetune, recipe, "run.device=cuda")


def test_damaged_missing_or_pickled_weights_are_refused(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot read this safetensors file" in refused(finetune, recipe, f"model.name={broken}")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, weights, metadata={"format": "pt"})
    assert "weights are missing, and would stay random" in refused(finetune, recipe, f"model.name={broken}")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "not finite" in refused(finetune, recipe, f"model.name={broken}")
    weights.unlink()
    torch.save({}, broken / "pytorch_model.bin")  # a pickle is not opened
    assert "weights in pickle files are not loaded" in refused(finetune, recipe, f"model.name={broken}")


def test_quantized_model_is_not_quantized_again(finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A checkpoint in bitsandbytes NF4 trains as stored. quant.scheme=none is refused for it, and so is an fp4 checkpoint."""
    from transformers import AutoModelForCausalLM

    from quant import swap
    from quant.pretrained import attach_quantizer

    nf4_model = tmp_path / "packed"
    shutil.copytree(tiny_model, nf4_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    swap(model)
    attach_quantizer(model).save_pretrained(nf4_model)
    config = json.loads((nf4_model / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert "already quantized" in refused(finetune, recipe, f"model.name={nf4_model}", "quant.scheme=none")
    (nf4_model / "config.json").write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | {"bnb_4bit_quant_type": "fp4"}})
    )
    assert "only nf4 can be read" in refused(finetune, recipe, f"model.name={nf4_model}")
    (nf4_model / "config.json").write_text(json.dumps(config))
    losses = []
    for name, source in (("on-packed", nf4_model), ("on-floats", tiny_model)):
        code, _, err = finetune("run", str(recipe), f"model.name={source}", f"run.dir={tmp_path / name}")
        assert code == 0, err
        record = json.loads((tmp_path / name / "run.json").read_text())
        losses.append([record["eval"][when]["loss"] for when in ("before", "after")])
        assert (tmp_path / name / "merged" / "config.json").is_file()
    assert losses[0] == losses[1]


def test_mixture_of_experts_is_quantized_trained_and_merged(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, dtype="float32", **sizes
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    code, _, err = finetune("run", str(recipe), f"model.name={tmp_path / 'moe'}", "adapter.rank=2")
    assert code == 0, err
    record = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert record["model"]["swap"]["swapped"] == 2 * (4 + 2 * 4)  # attention, and two matrices per expert
    assert record["merge"]["gate"]["status"] == "pass"


def test_unavailable_quant_backend_is_refused(finetune: Terminal, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_BACKEND", "numbba")
    for arguments in (("run", str(recipe)), ("bench", "quant")):
        code, _, err = finetune(*arguments)
        assert code == 2
        assert err.startswith("error: this backend is not available")
        assert "numba" in err
        assert "Traceback" not in err


def test_bad_rows_are_reported_with_file_and_line(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    valid_rows = rows.read_text()
    rows.write_text(valid_rows + '{"instruction": "broken\n')
    assert "rows.jsonl:41" in refused(finetune, recipe)
    write_jsonl(rows, [{"foo": n} for n in range(9)])
    message = refused(finetune, recipe)
    assert "9 of 9 rows match no known format" in message
    assert "rows.jsonl:5" in message
    assert "4 more" in message


def test_data_gates_refuse_a_run_and_force_overrides_them(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """Data without trained tokens is an error. Held-out rows in the training data stop at a gate; --force overrides it."""
    empty = write_jsonl(tmp_path / "empty.jsonl", [row | {"output": ""} for row in alpaca(20)])
    assert "answers are empty" in refused(finetune, recipe, f"data.path={empty}")
    questions = [{"messages": [{"role": "user", "content": f"q {n}"}]} for n in range(20)]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    assert "no token of this data is trained" in refused(finetune, recipe, "data.path=questions.jsonl")
    write_jsonl(tmp_path / "heldout.jsonl", alpaca(4))
    assert "in the training data too" in refused(finetune, recipe, "data.heldout_path=heldout.jsonl", code=3)
    code, _, err = finetune("run", str(recipe), "data.heldout_path=heldout.jsonl", "run.dir=forced", "--force", "run.merge=false")
    assert code == 0, err
    record = json.loads((tmp_path / "forced" / "run.json").read_text())
    assert "in the training data too" in record["preflight"]["forced"]
    (tmp_path / "forced" / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    code, _, err = finetune("resume", "forced")  # a resumed run needs no second --force
    assert code == 0, err
    assert "data.heldout=0.1" in refused(finetune, recipe, "data.heldout=100")


def test_force_does_not_start_a_run_without_training_data(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [{"messages": [{"role": "user", "content": f"q {n}"}]} for n in range(20)])
    assert "no training data" in refused(finetune, recipe, "data.path=questions.jsonl", "--force")


def test_unknown_adapter_targets_and_quant_patterns_are_refused(finetune: Terminal, recipe: Path) -> None:
    message = refused(finetune, recipe, "adapter.targets=[q_porj]")
    assert "did you mean q_proj" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert "output head" in refused(finetune, recipe, "adapter.targets=[lm_head]")
    assert "matches no module" in refused(finetune, recipe, "quant.keep=['*.nothing']")


def test_folder_of_another_run_is_not_overwritten(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    assert finetune("run", str(recipe), "run.dir=mine", "run.merge=false", "train.max_steps=1")[0] == 0
    before = (tmp_path / "mine" / "run.json").read_bytes()
    code, _, err = finetune("run", str(recipe), "run.dir=mine")
    assert code == 2
    assert "belongs to another run" in err
    assert (tmp_path / "mine" / "run.json").read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    code, _, err = finetune("run", str(recipe), "run.dir=photos")
    assert code == 2
    assert "not empty" in err
    code, _, err = finetune("run", str(recipe), "run.dir=new", "--resume")
    assert code == 2
    assert "no run to resume" in err


def test_run_without_enough_disk_space_is_refused(finetune: Terminal, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=10**6))
    message = refused(finetune, recipe)
    assert "not enough disk space" in message
    assert "976.6 KiB free" in message


def test_merged_model_that_fails_the_gate_is_not_kept(
    finetune: Terminal, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_float = merging.into_float

    def corrupt_into_float(model: Any, dtype: torch.dtype) -> Any:
        float_model = into_float(model, dtype)
        with torch.no_grad():
            float_model.model.layers[0].mlp.down_proj.weight.mul_(30)
            float_model.model.norm.weight.mul_(30)
        return float_model

    monkeypatch.setattr(merging, "into_float", corrupt_into_float)
    code, _, err = finetune("run", str(recipe), "run.dir=spoilt")
    assert code == 3
    assert "differs from the trained one" in err
    assert "merged" not in entries(tmp_path / "spoilt")
    assert (tmp_path / "spoilt" / "adapter").is_dir()
    assert json.loads((tmp_path / "spoilt" / "run.json").read_text())["state"] == "failed"


def test_show_chat_and_eval_refuse_what_they_cannot_open(finetune: Terminal, tmp_path: Path, tiny_model: Path) -> None:
    import lm_eval.tasks

    assert finetune("show", str(tmp_path))[0] == 2
    assert finetune("chat", str(tmp_path / "nothing"))[0] == 2
    (tmp_path / "a.txt").write_text("x")
    code, _, err = finetune("chat", "a.txt")
    assert code == 2
    assert "not a model: this is a single file" in err
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    (tmp_path / "runs" / "quick" / "run.json").write_text("{}")
    code, _, err = finetune("chat", "runs/quikc")
    assert code == 2
    assert "did you mean runs/quick?" in err
    tasks = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the thousands of default tasks take seconds to read
    finetune.monkeypatch.setattr(lm_eval.tasks, "TaskManager", tasks)
    code, _, err = finetune("eval", str(tiny_model), "--tasks", "no_such_task")
    assert code == 2
    assert "no_such_task" in err


def test_state_space_models_train_one_sample_at_a_time(
    finetune: Terminal, recipe: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Mamba carries its state across packed samples and has no position ids: the run trains one sample at a time and says so."""
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)).save_pretrained(
        tmp_path / "m"
    )
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "m")
    code, out, err = finetune(
        "run",
        str(recipe),
        f"model.name={tmp_path / 'm'}",
        "run.dir=mamba",
        "train.max_steps=1",
        "eval.prompts=[]",
        "eval.samples=0",
    )
    assert code == 0, err
    assert "one sample at a time" in out


def test_each_shipped_recipe_trains_and_merges(tiny_model: Path, tmp_path: Path, finetune: Terminal, rows_file: Path) -> None:
    """Each shipped recipe runs with its own settings, but on a tiny model and little data."""
    from finetune.recipe import shipped_recipes

    text = tmp_path / "story.txt"
    text.write_text(story(60_000))
    count = 0
    for path in shipped_recipes():
        count += 1
        recipe = read_recipe(path)
        overrides = [f"model.name={tiny_model}", f"data.path={rows_file}"]
        if recipe.kind == "pretrain":
            shape = {
                "hidden_size": 256,
                "intermediate_size": 256,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }
            if recipe.model.config is not None and recipe.model.config["model_type"] == "gpt2":
                shape = {"n_embd": 64, "n_layer": 1, "n_head": 4}
            overrides = [*(f"model.config.{key}={value}" for key, value in shape.items() if recipe.model.config is not None),
                         f"data.path={text}", "data.max_length=64", "train.accumulation=1", "train.micro_batch=1"]  # fmt: skip
            if recipe.model.config is not None:
                overrides += [f"tokenizer.name={tiny_model}"] if recipe.tokenizer.name else ["tokenizer.train=300"]
            overrides += [f"model.name={tiny_model}", f"distill.teacher={tiny_model}"] if recipe.distill.teacher else []
        code, _, err = finetune(
            "run", str(path), *overrides, "data.heldout=4", "train.max_steps=1", "eval.max_new_tokens=2",
            f"run.dir=shelf/{path.stem}",
        )  # fmt: skip
        assert code == 0, (path, err)
        assert (tmp_path / "shelf" / path.stem / "merged" / "config.json").exists()
    assert count >= 4


# ----------------------------------------------------------------------------------------------------------- memory planning


@pytest.mark.planned
def test_run_records_planned_and_actual_peak_memory(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, out, err = finetune("run", str(recipe), "run.dir=planned", "train.epochs=30", "train.max_steps=24", "run.merge=false")
    assert code == 0, err
    record = json.loads((tmp_path / "planned" / "run.json").read_text())
    assert "fits: " in out
    assert {phase["name"] for phase in record["plan"]["phases"]} == {"load", "evaluate", "generate", "train", "save", "merge"}
    planned, actual = record["planned"]["peak_bytes"], record["train"]["peak_bytes"]
    assert 0.5 < planned / actual < 1.5  # with a tiny model, this is mostly the memory of the process itself
    assert "planned" in out.split("peak ")[-1]
    error_lines = (Path(os.environ["XDG_CACHE_HOME"]) / "finetune12g" / "errors.jsonl").read_text().splitlines()
    assert json.loads(error_lines[-1])["planned_peak"] == planned
    assert json.loads(error_lines[-1])["step"] > 0


@pytest.mark.planned
def test_run_that_would_not_fit_needs_force(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    error = refused(finetune, recipe, "plan.memory=300MB", "run.dir=small", code=3)
    assert "would not fit" in error
    assert "0.29" in error
    assert not (tmp_path / "small").exists()
    code, out, err = finetune("run", str(recipe), "plan.memory=300MB", "run.dir=small", "--force", "run.merge=false")
    assert code == 0, err
    assert "--force: starting although the plan does not fit" in out + err


@pytest.mark.planned
def test_fit_auto_changes_the_recipe_and_a_resumed_run_keeps_the_change(
    finetune: Terminal, recipe: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    wide_vocabulary_model = tiny_llama(tmp_path / "wide", tokenizer_folder, vocab_size=49152)  # the logits do not fit
    options = ["fit=auto", "train.micro_batch=8", "data.packing=false", "train.loss_chunk=0", "run.dir=fitted", "run.merge=false"]
    options += ["data.heldout=0", "eval.samples=0", "eval.prompts=[]", f"model.name={wide_vocabulary_model}"]
    code, plan, err = finetune("plan", str(recipe), *options[1:], "--json")
    assert code == 0, err
    memory = f"plan.memory={json.loads(plan)['peak_bytes'] - 1 >> 10}KiB"
    code, out, err = finetune("run", str(recipe), *options, memory)
    assert code == 0, err
    assert "fit: train.loss_chunk 0 → 256" in out
    record = json.loads((tmp_path / "fitted" / "run.json").read_text())
    assert record["plan"]["fits"]
    assert record["plan"]["fit"]["keys"]["train.loss_chunk"] == 256
    assert "loss_chunk: 256" in (tmp_path / "fitted" / "recipe.yaml").read_text()
    (tmp_path / "fitted" / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    code, out, err = finetune("run", str(recipe), *options, memory, "--resume")
    assert code == 0, err
    assert "fit: " not in out


# ----------------------------------------------------------------------------------------------------- failures and signals


@pytest.mark.planned
def test_out_of_memory_with_one_sample_suggests_settings_that_fit(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    from finetune.train import trace_context
    from finetune.train.sft import SupervisedFineTuning

    def run_out_of_memory(self: Any, model: Any, batch: Any) -> Any:
        if model.training and trace_context.current() is None:  # not while the planner traces the model
            torch.empty(1 << 50)  # more than the system can allocate
        return original_loss(self, model, batch)

    original_loss = SupervisedFineTuning.loss
    finetune.monkeypatch.setattr(SupervisedFineTuning, "loss", run_out_of_memory)
    code, out, err = finetune("run", str(recipe), "run.dir=large", "data.max_length=128")
    assert code == 3, (out, err)
    assert "out of memory in step 1, with one sample at a time" in err
    assert "allocate" in err
    assert "(by the plan" in err or "cannot fit into" in err, err


def test_out_of_memory_while_merging_is_reported_and_resumable(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    def run_out_of_memory(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 50)

    finetune.monkeypatch.setattr("finetune.merging.write_gated", run_out_of_memory)
    code, _, err = finetune("run", str(recipe), "run.dir=merged-not")
    assert code == 3, err
    assert "out of memory in phase 'merge'" in err
    assert "finetune resume" in err
    assert "Traceback" not in err
    finetune.monkeypatch.undo()
    finetune.monkeypatch.chdir(tmp_path)
    assert finetune("resume", str(tmp_path / "merged-not"))[0] == 0


def test_load_best_at_end_uses_the_best_checkpoint(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = ["train.max_steps=6", "train.eval_steps=2", "run.merge=false"]
    negative_after_step_2 = lambda self, step, peak=None: 0.01 if step <= 2 else -0.01  # noqa: E731
    finetune.monkeypatch.setattr("finetune.train.schedule.Schedule.rate", negative_after_step_2)
    code, out, err = finetune(
        "run", str(recipe), *options, "train.load_best_at_end=true", "train.keep_checkpoints=1", "run.dir=best"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "best" / "run.json").read_text())
    best = record["train"]["best"]
    assert best["step"] == 2
    assert f"after step {best['step']} of 6: using these weights" in out
    assert record["eval"]["after"]["loss"] == pytest.approx(best["loss"], abs=1e-6)
    folders = sorted(path.name for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert folders == [f"step-{best['step']:06d}", "step-000006"]
    best_weights = load_file(tmp_path / "best" / "checkpoints" / folders[0] / "weights.safetensors")
    adapter_weights = load_file(tmp_path / "best" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapter_weights[name.replace(".default", "")]) for name, tensor in best_weights.items())
    code, _, err = finetune("run", str(recipe), "train.save_best=true", "train.eval_steps=null", "run.dir=none")
    assert code == 2
    assert "train.eval_steps" in err


def test_tracker_has_each_step_once_after_a_resume(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ["train.max_steps=5", "train.save_steps=2", "run.trackers=[tensorboard]", "run.merge=false", "run.dir=tracked"]
    from finetune.run_dir import RunDir

    append = RunDir.append

    def append_and_crash(self: Any, metrics: dict[str, Any]) -> None:
        append(self, metrics)
        if metrics["step"] == 4:
            raise RuntimeError("power cut")

    with finetune.monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", append_and_crash)
        with pytest.raises(RuntimeError):
            finetune("run", str(recipe), *options)
    assert finetune("run", str(recipe), *options, "--resume")[0] == 0
    folder = min((path.parent for path in (tmp_path / "tracked").rglob("events.out.tfevents.*")), key=lambda path: len(str(path)))
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_sigterm_before_training_leaves_no_run_folder(recipe: Path, tmp_path: Path) -> None:
    """A separate process gets SIGTERM while it loads its data."""
    with Start(["run", str(recipe), "run.dir=ended", "run.threads=1"], tmp_path, tmp_path / "ended.log") as start:
        assert start.wait(60, until=lambda: start.phase() == "data"), start.said("the data phase did not start")
        assert start.send(signal.SIGTERM) == 130, start.said("wrong exit code after SIGTERM")
    assert "Traceback" not in start.log.read_text()
    assert not (tmp_path / "ended").exists()


def test_second_ctrl_c_stops_at_once_and_keeps_saved_checkpoints(recipe: Path, tmp_path: Path) -> None:
    options = [
        "train.epochs=400",
        "run.threads=1",
        "train.accumulation=60",  # one second per step, and the first Ctrl-C waits for the end of the step
        "train.max_steps=4",
        "train.save_steps=1",
        "run.merge=false",
        "eval.samples=0",
        "eval.prompts=[]",
    ]
    manifest = tmp_path / "cut" / "checkpoints" / "step-000001" / "manifest.json"
    with Start(["run", str(recipe), *options, "run.dir=cut"], tmp_path, tmp_path / "cut.log") as start:
        assert start.wait(100, until=manifest.exists), start.said("no checkpoint was saved")
        os.kill(start.pid, signal.SIGINT)
        assert start.wait(60, until=lambda: "a second Ctrl-C stops at once" in start.log.read_text()), start.said(
            "no answer to the first Ctrl-C"
        )
        assert start.send(signal.SIGINT) == 130, start.said("wrong exit code after the second Ctrl-C")
    output = start.log.read_text()
    assert f"finetune resume {tmp_path / 'cut'}" in output or "finetune resume cut" in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < 4, "training went on to the last step"
    assert next(path.name for path in sorted(manifest.parents[1].iterdir()) if path.name.startswith("step")) == "step-000001"
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["state"] == "stopped"
