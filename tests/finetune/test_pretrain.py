"""Pretraining from the command line: ternary models from scratch with a twin, exports, resume, and adapters on the result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.recipe import read_recipe
from finetune.run_dir import RunDir
from finetune.stages.context import RunContext
from tests.conftest import Terminal, record_of, story

RECIPE = """\
about: "a tiny ternary model"
kind: pretrain
model:
  config: {{model_type: bitnet, hidden_size: 256, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, hidden_act: silu, max_position_embeddings: 64, tie_word_embeddings: true}}
tokenizer: {{train: 300}}
quant: {{scheme: ternary}}
data: {{path: {text}, max_length: 32, heldout: 6}}
train: {{max_steps: 6, micro_batch: 4, save_steps: 2, eval_steps: 3, health_steps: 2, precision: fp32}}
eval: {{samples: 1, prompts: ["The miller"], max_new_tokens: 4}}
run: {{device: cpu, threads: 1}}
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(story(40_000))
    return path


@pytest.fixture
def recipe(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "ternary.yaml"
    path.write_text(RECIPE.format(text=text))
    return path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


WALL_CLOCK = ("tokens_per_second", "step_seconds", "memory_bytes", "time")


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in metrics_of(run)]


@pytest.mark.drawn
def test_ternary_model_from_scratch_with_twin_chat_eval_and_export(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    exit_code, output, error = finetune("run", str(recipe), "twin=true", "export.formats=[gguf-tq2_0]", "run.dir=made")
    assert exit_code == 0, error
    run = tmp_path / "made"
    record = record_of(run)
    assert record["state"] == "done"
    assert record["model"]["swap"]["scheme"] == "ternary"
    assert record["train"]["tokens"] == 6 * 4 * 32
    assert record["train"]["supervised_tokens"] == 6 * 4 * 31

    # The twin trains in floats on the same rows in the same order, at half the learning rate.
    twin = record_of(run / "twin")
    assert twin["model"]["swap"] is None
    assert record["twin"]["gap"] == pytest.approx(record["eval"]["after"]["loss"] - twin["eval"]["after"]["loss"], abs=1e-6)
    assert record["twin"]["gap_stderr"] > 0
    assert record["twin"]["seed"] == 17
    recipe_of_run, recipe_of_twin = read_recipe(run / "recipe.yaml"), read_recipe(run / "twin" / "recipe.yaml")
    assert (recipe_of_run.train.lr, recipe_of_twin.train.lr) == (1.2e-3, 6e-4)
    assert recipe_of_twin.run.seed == recipe_of_run.run.seed
    assert ": gap " in output

    # Ternary health was measured; plain transformers and llama.cpp run the exports.
    measurements = [line["ternary"] for line in metrics_of(run) if "ternary" in line]
    assert len(measurements) == 3
    assert all(
        0 < measurement["flips"] < 0.5 and 0.2 < measurement["zeros"] < 0.5 and len(measurement["layers"]) == 14
        for measurement in measurements
    )
    assert record["ternary"]["looks"] == 3
    for name in ("bitnet", "gguf-tq2_0"):
        figures = record["exports"][name]
        assert figures["gate"]["status"] == "pass"
        assert (run / figures["path"]).exists()
    assert json.loads((run / "merged" / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"

    # The trained model chats by continuing text, and `eval` gives the loss on held-out rows that the record has.
    prompts = iter(["The fox", "/quit"])
    finetune.monkeypatch.setattr("builtins.input", lambda _: next(prompts))
    exit_code, output, error = finetune("chat", "made", "made/twin", "--max-new-tokens", "3")
    assert exit_code == 0, error
    assert output.count("was trained on plain text") == 2
    exit_code, _, error = finetune("eval", "made", "--json", "scores.json")
    assert exit_code == 0, error
    scores = json.loads((tmp_path / "scores.json").read_text())["made"]
    assert scores["loss"]["loss"] == pytest.approx(record["eval"]["after"]["loss"], abs=1e-4)
    exit_code, _, error = finetune("export", "made", "--to", "gguf-tq1_0", "--out", "again.gguf")
    assert exit_code == 0, error
    assert (tmp_path / "again.gguf").stat().st_size < (run / record["exports"]["gguf-tq2_0"]["path"]).stat().st_size
    page = (run / "report.html").read_text()
    for heading in ("Ternary health", "float twin", "TQ2_0"):
        assert heading in page


def test_resume_after_interruption_is_bit_equal(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """The interruption is at step 6 of 7, two steps after the last checkpoint and in the middle of the stream."""
    exit_code, _, error = finetune("run", str(recipe), "run.dir=uninterrupted", "train.max_steps=7")
    assert exit_code == 0, error
    interrupted: list[bool] = []
    append = RunDir.append

    def append_or_interrupt(self: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 6 and "loss" in metrics and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        append(self, metrics)

    finetune.monkeypatch.setattr(RunDir, "append", append_or_interrupt)
    exit_code, _, _ = finetune("run", str(recipe), "run.dir=cut", "train.max_steps=7")
    assert exit_code == 130
    exit_code, _, error = finetune("resume", "cut")
    assert exit_code == 0, error
    assert record_of(tmp_path / "cut")["provenance"]["resumed"][0]["from"] == "step-000004"
    assert without_clock(tmp_path / "cut") == without_clock(tmp_path / "uninterrupted")
    weights = [
        (tmp_path / name / "checkpoints" / "step-000007" / "weights.safetensors").read_bytes()
        for name in ("cut", "uninterrupted")
    ]
    assert weights[0] == weights[1]


def test_low_memory_training_rolls_back_a_bad_step(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    from finetune.train.pretrain import Pretraining

    loss_of, bad_rows = Pretraining.loss, []

    def loss_with_nan(self: Any, model: Any, batch: torch.Tensor) -> Any:
        value, count = loss_of(self, model, batch)
        rows = batch.tolist()
        if model.training and len(bad_rows) == 0 and self.steps_seen == 4:
            bad_rows.append(rows)
        self.steps_seen += model.training
        return (value * float("nan"), count) if rows in bad_rows else (value, count)

    finetune.monkeypatch.setattr(Pretraining, "loss", loss_with_nan)
    finetune.monkeypatch.setattr(Pretraining, "steps_seen", 0, raising=False)
    low_memory = (
        "model.dtype=bf16", "train.stochastic_rounding=true", "train.optimizer_in_backward=true", "train.max_grad_norm=0",
        "train.optimizer=adamw_8bit", "train.checkpointing=true", "train.precision=auto",
    )  # fmt: skip
    exit_code, output, error = finetune("run", str(recipe), "run.dir=low", *low_memory)
    assert exit_code == 0, (output, error)
    lines = metrics_of(tmp_path / "low")
    rollbacks = [line for line in lines if "rolled_back" in line]
    assert [(line["step"], line["rolled_back"]["from"]) for line in rollbacks] == [(4, 5)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert record_of(tmp_path / "low")["train"]["bad_steps"] == 1
    state = json.loads((tmp_path / "low" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["bad"] == [[0, 4]]
    assert state["position"] == 7  # six micro-batches trained, one skipped


def test_pretrained_model_becomes_ternary_with_warmup_and_teacher(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """With λ warm-up, sub-norms and a teacher; the record also has the loss of the float model."""
    overrides = (
        "model.config=null", f"model.name={tiny_model}", "tokenizer.train=4096", "quant.sub_norms=true", "quant.warmup=0.5",
        f"distill.teacher={tiny_model}", "train.max_steps=4", "train.lr=1e-3",
    )  # fmt: skip
    exit_code, _, error = finetune("run", str(recipe), "run.dir=turned", *overrides)
    assert exit_code == 0, error
    run = tmp_path / "turned"
    record = record_of(run)
    assert set(record["eval"]) >= {"float", "before", "after"}
    steps = [line for line in metrics_of(run) if "loss" in line]
    assert all({"ce", "distill_logits", "distill_relations"} <= line.keys() for line in steps)
    assert [line["ternary"]["blend"] for line in metrics_of(run) if "ternary" in line] == [pytest.approx(2 / 3), 1.0]
    config = json.loads((run / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["hidden_act"] == "silu"


def test_lora_on_a_ternary_base_merges_back_to_ternary(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    exit_code, _, error = finetune("run", str(recipe), "run.dir=base", "eval.samples=0", "eval.prompts=[]")
    assert exit_code == 0, error
    overrides = (
        "model.config=null", "model.name=base/merged", "tokenizer.train=4096", "train.health_steps=5", "adapter.kind=lora",
        "train.lr=5e-3", "eval.samples=0", "eval.prompts=[]", "train.max_steps=24",
    )  # fmt: skip
    exit_code, output, error = finetune("run", str(recipe), "run.dir=adapted", *overrides)
    assert exit_code == 0, error
    record = record_of(tmp_path / "adapted")
    assert record["model"]["swap"]["scheme"] == "ternary"
    assert record["model"]["adapters"] == 14
    merged = record["merge"]["reternarized"]
    assert merged["adapter_loss"] < merged["base_loss"] - 0.01
    assert abs(merged["float_loss"] - merged["adapter_loss"]) < 0.1
    assert 0 < merged["flips"] < 0.5
    assert merged["gate"]["status"] == "pass"
    assert "of the codes changed" in output
    # The adapter on its base has the loss of the trained model.
    exit_code, _, error = finetune("eval", "adapted/adapter", "--json", "scores.json")
    assert exit_code == 0, error
    loss = json.loads((tmp_path / "scores.json").read_text())["adapted/adapter"]["loss"]["loss"]
    assert loss == pytest.approx(record["eval"]["after"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.config.hiden_size=64",), "hidden_size"),
        (("model.config.model_type=bitnett",), "bitnet"),
        (("model.config.num_hidden_layers=two",), "model.config"),
        (("train.max_steps=null",), "train.max_tokens"),
        (("train.epochs=2",), "train.epochs"),
        (("train.optimizer_in_backward=true", "train.max_grad_norm=0", "train.accumulation=2"), "accumulation"),
        (("train.optimizer_in_backward=true",), "max_grad_norm"),
        (("train.stochastic_rounding=true",), "bf16"),
        (("quant.warmup=0.2",), "random weights"),
        (("adapter.kind=lora",), "adapter.kind: none"),
        (("quant.scheme=none", "twin=true"), "twin"),
        (("data.heldout=0.1",), "data.heldout"),
        (("data.max_length=128",), "64 positions"),
        (("model.config.intermediate_size=384", "export.formats=[gguf-tq2_0]"), "256"),
        (("model.config.hidden_act=relu2", "export.formats=[gguf-tq2_0]"), "relu2"),
        (("model.config.intermediate_size=258",), "258"),
        (("quant.rms_norm=true",), "sub-norms"),
        (("distill.logits=2",), "distill.teacher"),
        (("quant.warmup_shape=cosine",), "without quant.warmup"),
        (("train.max_tokens=.inf",), "train.max_tokens"),
        (("quant.scheme=none", "export.formats=[gguf-tq2_0]", "train.health_steps=5"), "gguf-f16"),
        (("data.max_rows=5",), "data.max_rows"),
        (("train.optimizer_in_backward=true", "train.max_grad_norm=0", "train.save_steps=null"), "save_steps"),
        (("tokenizer.train=100",), "257"),
        (("data.path=nowhere.txt",), "nowhere.txt"),
    ],
)
def test_impossible_recipe_is_refused_before_anything_is_written(
    finetune: Terminal, recipe: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    exit_code, output, error = finetune("run", str(recipe), "run.dir=refused", *overrides)
    assert exit_code in (2, 3), (output, error)
    assert message in error, error
    assert "train …" not in output
    assert {path.name for path in tmp_path.iterdir()} == before


def test_ternary_checkpoint_is_not_quantized_again(finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    exit_code, _, error = finetune("run", str(recipe), "run.dir=base", "train.max_steps=1", "eval.samples=0", "eval.prompts=[]")
    assert exit_code == 0, error
    overrides = ("model.config=null", "model.name=base/merged", "tokenizer.train=4096", "run.dir=refused", "train.health_steps=5")
    exit_code, _, error = finetune("run", str(recipe), *overrides)
    assert exit_code == 2
    assert "already ternary" in error
    exit_code, _, error = finetune("run", str(recipe), *overrides, "adapter.kind=lora", "quant.scheme=nf4")
    assert exit_code == 2
    assert "already quantized" in error
    exit_code, _, error = finetune("run", str(recipe), *overrides, f"model.name={tiny_model}", "adapter.kind=lora")
    assert exit_code == 2
    assert re.search(r"trained in ternary", error)
    assert not (tmp_path / "refused").exists()


def test_rms_norm_layout_of_bitnet_training_tips_is_exported(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """quant.rms_norm: a norm in each linear, and the block's norms fixed at one; plain transformers computes the same."""
    exit_code, _, error = finetune("run", str(recipe), "run.dir=tips", "model.config.model_type=llama", "quant.rms_norm=true")
    assert exit_code == 0, error
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "tips" / "merged" / "model.safetensors")
    assert torch.equal(weights["model.layers.0.input_layernorm.weight"], torch.ones(256))
    assert not torch.equal(weights["model.layers.0.self_attn.q_proj.rms_norm.weight"], torch.ones(256))
    assert record_of(tmp_path / "tips")["exports"]["bitnet"]["gate"]["status"] == "pass"


def test_float_model_is_exported_to_gguf(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    overrides = (
        "quant.scheme=none",
        "model.config.model_type=llama",
        "export.formats=[gguf-f16]",
        "train.health_steps=5",
        "data.heldout=4",
    )
    exit_code, _, error = finetune("run", str(recipe), "run.dir=floats", *overrides)
    assert exit_code == 0, error
    figures = record_of(tmp_path / "floats")["exports"]["gguf-f16"]
    assert figures["gate"]["status"] == "pass"
    assert (tmp_path / "floats" / figures["path"]).is_file()


def test_heldout_text_from_another_file_and_no_heldout_text(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(story(4_000, seed=1))
    exit_code, _, error = finetune("run", str(recipe), "run.dir=apart", "data.heldout_path=other.txt")
    assert exit_code == 0, error
    exit_code, _, error = finetune(
        "run", str(recipe), "run.dir=none", "data.heldout=0", "export.formats=[gguf-tq2_0]", "eval.samples=0"
    )
    assert exit_code == 0, error
    assert "before" not in record_of(tmp_path / "none")["eval"]


def test_ternary_model_and_optimizer_are_freed_before_the_twin_trains(finetune: Terminal, recipe: Path) -> None:
    import gc

    from finetune import pipeline
    from quant import BitLinear

    def count_alive() -> int:
        gc.collect()
        return sum(isinstance(object_, BitLinear | torch.optim.Optimizer) for object_ in gc.get_objects())

    execute, alive = pipeline.execute, [count_alive()]  # alive from earlier tests

    def execute_and_count(run: RunContext) -> None:
        if run.name.endswith("-twin"):
            alive.append(count_alive())
        execute(run)

    finetune.monkeypatch.setattr(pipeline, "execute", execute_and_count)
    exit_code, _, error = finetune("run", str(recipe), "twin=true", "run.dir=made", "train.max_steps=2")
    assert exit_code == 0, error
    assert alive[1] == alive[0]


def test_check_finds_misspelled_keys_of_model_config(finetune: Terminal, recipe: Path) -> None:
    exit_code, _, error = finetune("check", str(recipe))
    assert exit_code == 0, error
    recipe.write_text(recipe.read_text().replace("hidden_act", "hiden_act"))
    exit_code, _, error = finetune("check", str(recipe))
    assert exit_code == 2
    assert "ternary.yaml:4, model.config.hiden_act" in error
    assert "did you mean hidden_act?" in error


def test_teacher_is_detached_after_training(finetune: Terminal, recipe: Path, tiny_model: Path) -> None:
    from finetune.train.distill import Distillation

    detached = []
    detach = Distillation.detach
    finetune.monkeypatch.setattr(Distillation, "detach", lambda self: (detached.append(True), detach(self))[1])
    overrides = (
        "model.config=null", f"model.name={tiny_model}", "tokenizer.train=4096", f"distill.teacher={tiny_model}",
        "run.dir=taught", "train.max_steps=1", "eval.samples=0", "eval.prompts=[]",
    )  # fmt: skip
    exit_code, _, error = finetune("run", str(recipe), *overrides)
    assert exit_code == 0, error
    assert detached[-1:] == [True]
