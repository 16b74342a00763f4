"""Pretraining as a user types it: a ternary model from scratch with its twin, exports, going on, adapters on what came out."""

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
    path.write_text(story(120_000))
    return path


@pytest.fixture
def recipe(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "ternary.yaml"
    path.write_text(RECIPE.format(text=text))
    return path


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CLOCK = ("tokens_per_second", "step_seconds", "memory_bytes", "time")


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines_of(run)]


@pytest.mark.drawn
def test_from_scratch_with_its_twin_and_out_again(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, out, err = finetune("run", str(recipe), "twin=true", "export.formats=[gguf-tq2_0]", "run.dir=made")
    assert code == 0, err
    run = tmp_path / "made"
    record = record_of(run)
    assert record["state"] == "done"
    assert record["model"]["swap"]["scheme"] == "ternary"
    assert record["train"]["tokens"] == 6 * 4 * 32
    assert record["train"]["supervised_tokens"] == 6 * 4 * 31

    # The twin has read the same rows in the same order, in floats, at half the rate.
    twin = record_of(run / "twin")
    assert twin["model"]["swap"] is None
    assert record["twin"]["gap"] == pytest.approx(record["eval"]["after"]["loss"] - twin["eval"]["after"]["loss"], abs=1e-6)
    assert record["twin"]["gap_stderr"] > 0
    assert record["twin"]["seed"] == 17
    ours, its = read_recipe(run / "recipe.yaml"), read_recipe(run / "twin" / "recipe.yaml")
    assert (ours.train.lr, its.train.lr) == (1.2e-3, 6e-4)
    assert its.run.seed == ours.run.seed
    assert ": gap " in out

    # Health was watched, and plain transformers and llama.cpp run what came out.
    looks = [line["ternary"] for line in lines_of(run) if "ternary" in line]
    assert len(looks) == 3
    assert all(0 < look["flips"] < 0.5 and 0.2 < look["zeros"] < 0.5 and len(look["layers"]) == 14 for look in looks)
    assert record["ternary"]["looks"] == 3
    for name in ("bitnet", "gguf-tq2_0"):
        figures = record["exports"][name]
        assert figures["gate"]["status"] == "pass"
        assert (run / figures["path"]).exists()
    assert json.loads((run / "merged" / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"

    # What came out is used: packed, going on with text; and it reads its own held-out rows with the loss that was told.
    said = iter(["The fox", "/quit"])
    finetune.monkeypatch.setattr("builtins.input", lambda _: next(said))
    code, out, err = finetune("chat", "made", "made/twin", "--max-new-tokens", "3")
    assert code == 0, err
    assert out.count("was trained on plain text") == 2
    code, _, err = finetune("eval", "made", "--json", "scores.json")
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())["made"]
    assert scores["loss"]["loss"] == pytest.approx(record["eval"]["after"]["loss"], abs=1e-4)
    code, _, err = finetune("export", "made", "--to", "gguf-tq1_0", "--out", "again.gguf")
    assert code == 0, err
    assert (tmp_path / "again.gguf").stat().st_size < (run / record["exports"]["gguf-tq2_0"]["path"]).stat().st_size
    page = (run / "report.html").read_text()
    for word in ("Ternary health", "float twin", "TQ2_0"):
        assert word in page


def test_it_goes_on_where_it_was_stopped(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """Bit for bit, in the middle of the stream, from a checkpoint that is no multiple of anything."""
    code, _, err = finetune("run", str(recipe), "run.dir=whole", "train.max_steps=7")
    assert code == 0, err
    seen: list[bool] = []
    plain = RunDir.append

    def killed(self: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 6 and "loss" in metrics and not seen:
            seen.append(True)
            raise KeyboardInterrupt
        plain(self, metrics)

    finetune.monkeypatch.setattr(RunDir, "append", killed)
    code, _, _ = finetune("run", str(recipe), "run.dir=cut", "train.max_steps=7")
    assert code == 130
    code, _, err = finetune("resume", "cut")
    assert code == 0, err
    assert record_of(tmp_path / "cut")["provenance"]["resumed"][0]["from"] == "step-000004"
    assert without_clock(tmp_path / "cut") == without_clock(tmp_path / "whole")
    both = [(tmp_path / name / "checkpoints" / "step-000007" / "weights.safetensors").read_bytes() for name in ("cut", "whole")]
    assert both[0] == both[1]


def test_low_memory_training_rolls_back_a_bad_step(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    from finetune.train.pretrain import Pretraining

    plain, bad = Pretraining.loss, []

    def loss(self: Any, model: Any, batch: torch.Tensor) -> Any:
        value, count = plain(self, model, batch)
        rows = batch.tolist()
        if model.training and len(bad) == 0 and self.steps_seen == 4:
            bad.append(rows)
        self.steps_seen += model.training
        return (value * float("nan"), count) if rows in bad else (value, count)

    finetune.monkeypatch.setattr(Pretraining, "loss", loss)
    finetune.monkeypatch.setattr(Pretraining, "steps_seen", 0, raising=False)
    low = ("model.dtype=bf16", "train.stochastic_rounding=true", "train.optimizer_in_backward=true", "train.max_grad_norm=0",
           "train.optimizer=adamw_8bit", "train.checkpointing=true", "train.precision=auto")  # fmt: skip
    code, out, err = finetune("run", str(recipe), "run.dir=low", *low)
    assert code == 0, (out, err)
    lines = lines_of(tmp_path / "low")
    back = [line for line in lines if "rolled_back" in line]
    assert [(line["step"], line["rolled_back"]["from"]) for line in back] == [(4, 5)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert record_of(tmp_path / "low")["train"]["bad_steps"] == 1
    state = json.loads((tmp_path / "low" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["bad"] == [[0, 4]]
    assert state["position"] == 7  # six were trained, one left out


def test_from_a_pretrained_model(finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """λ warm-up, sub-norms and a teacher: the float model's loss stands beside what became of it."""
    words = ("model.config=null", f"model.name={tiny_model}", "tokenizer.train=4096", "quant.sub_norms=true", "quant.warmup=0.5",
             f"distill.teacher={tiny_model}", "train.max_steps=4", "train.lr=1e-3")  # fmt: skip
    code, _, err = finetune("run", str(recipe), "run.dir=turned", *words)
    assert code == 0, err
    run = tmp_path / "turned"
    record = record_of(run)
    assert set(record["eval"]) >= {"float", "before", "after"}
    steps = [line for line in lines_of(run) if "loss" in line]
    assert all({"ce", "distill_logits", "distill_relations"} <= line.keys() for line in steps)
    assert [line["ternary"]["blend"] for line in lines_of(run) if "ternary" in line] == [pytest.approx(2 / 3), 1.0]
    config = json.loads((run / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["hidden_act"] == "silu"


def test_adapters_on_a_ternary_base(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    code, _, err = finetune("run", str(recipe), "run.dir=base", "eval.samples=0", "eval.prompts=[]")
    assert code == 0, err
    words = ("model.config=null", "model.name=base/merged", "tokenizer.train=4096", "train.health_steps=5",
             "adapter.kind=lora", "train.lr=5e-3",
             "eval.samples=0", "eval.prompts=[]", "train.max_steps=24")  # fmt: skip
    code, out, err = finetune("run", str(recipe), "run.dir=adapted", *words)
    assert code == 0, err
    record = record_of(tmp_path / "adapted")
    assert record["model"]["swap"]["scheme"] == "ternary"
    assert record["model"]["adapters"] == 14
    merged = record["merge"]["reternarized"]
    assert merged["adapter_loss"] < merged["base_loss"] - 0.01
    assert abs(merged["float_loss"] - merged["adapter_loss"]) < 0.1
    assert 0 < merged["flips"] < 0.5
    assert merged["gate"]["status"] == "pass"
    assert "of the codes changed" in out
    # The adapter on its base is still the trained model.
    code, _, err = finetune("eval", "adapted/adapter", "--json", "scores.json")
    assert code == 0, err
    loss = json.loads((tmp_path / "scores.json").read_text())["adapted/adapter"]["loss"]["loss"]
    assert loss == pytest.approx(record["eval"]["after"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
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
def test_what_cannot_be_is_said_before_any_work(
    finetune: Terminal, recipe: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = finetune("run", str(recipe), "run.dir=refused", *words)
    assert code in (2, 3), (out, err)
    assert said in err, err
    assert "train …" not in out
    assert {path.name for path in tmp_path.iterdir()} == before


def test_ternary_checkpoints_are_not_made_ternary_again(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    code, _, err = finetune("run", str(recipe), "run.dir=base", "train.max_steps=1", "eval.samples=0", "eval.prompts=[]")
    assert code == 0, err
    again = ("model.config=null", "model.name=base/merged", "tokenizer.train=4096", "run.dir=refused", "train.health_steps=5")
    code, _, err = finetune("run", str(recipe), *again)
    assert code == 2
    assert "already ternary" in err
    code, _, err = finetune("run", str(recipe), *again, "adapter.kind=lora", "quant.scheme=nf4")
    assert code == 2
    assert "already quantized" in err
    code, _, err = finetune("run", str(recipe), *again, f"model.name={tiny_model}", "adapter.kind=lora")
    assert code == 2
    assert re.search(r"trained in ternary", err)
    assert not (tmp_path / "refused").exists()


def test_the_layout_of_the_training_tips(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """A norm inside each linear, the block's own fixed at one: plain transformers computes the same."""
    code, _, err = finetune("run", str(recipe), "run.dir=tips", "model.config.model_type=llama", "quant.rms_norm=true")
    assert code == 0, err
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "tips" / "merged" / "model.safetensors")
    assert torch.equal(weights["model.layers.0.input_layernorm.weight"], torch.ones(256))
    assert not torch.equal(weights["model.layers.0.self_attn.q_proj.rms_norm.weight"], torch.ones(256))
    assert record_of(tmp_path / "tips")["exports"]["bitnet"]["gate"]["status"] == "pass"


def test_a_float_model_goes_to_llama_cpp_too(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    words = (
        "quant.scheme=none",
        "model.config.model_type=llama",
        "export.formats=[gguf-f16]",
        "train.health_steps=5",
        "data.heldout=4",
    )
    code, _, err = finetune("run", str(recipe), "run.dir=floats", *words)
    assert code == 0, err
    figures = record_of(tmp_path / "floats")["exports"]["gguf-f16"]
    assert figures["gate"]["status"] == "pass"
    assert (tmp_path / "floats" / figures["path"]).is_file()


def test_held_out_text_from_a_file_of_its_own(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(story(4_000, seed=1))
    code, _, err = finetune("run", str(recipe), "run.dir=apart", "data.heldout_path=other.txt")
    assert code == 0, err
    code, _, err = finetune("run", str(recipe), "run.dir=none", "data.heldout=0", "export.formats=[gguf-tq2_0]", "eval.samples=0")
    assert code == 0, err
    assert "before" not in record_of(tmp_path / "none")["eval"]


def test_nothing_of_the_ternary_model_is_held_while_the_twin_trains(finetune: Terminal, recipe: Path) -> None:
    import gc

    from finetune import pipeline
    from quant import BitLinear

    def count() -> int:
        gc.collect()
        return sum(isinstance(thing, BitLinear | torch.optim.Optimizer) for thing in gc.get_objects())

    plain, alive = pipeline.execute, [count()]  # what earlier tests have left

    def spied(run: RunContext) -> None:
        if run.name.endswith("-twin"):
            alive.append(count())
        plain(run)

    finetune.monkeypatch.setattr(pipeline, "execute", spied)
    code, _, err = finetune("run", str(recipe), "twin=true", "run.dir=made", "train.max_steps=2")
    assert code == 0, err
    assert alive[1] == alive[0]


def test_check_finds_what_is_misspelt_in_a_configuration(finetune: Terminal, recipe: Path) -> None:
    code, _, err = finetune("check", str(recipe))
    assert code == 0, err
    recipe.write_text(recipe.read_text().replace("hidden_act", "hiden_act"))
    code, _, err = finetune("check", str(recipe))
    assert code == 2
    assert "ternary.yaml:4, model.config.hiden_act" in err
    assert "did you mean hidden_act?" in err


def test_a_teacher_is_let_go_when_it_has_taught(finetune: Terminal, recipe: Path, tiny_model: Path) -> None:
    from finetune.train.distill import Distillation

    let_go = []
    plain = Distillation.detach
    finetune.monkeypatch.setattr(Distillation, "detach", lambda self: (let_go.append(True), plain(self))[1])
    words = ("model.config=null", f"model.name={tiny_model}", "tokenizer.train=4096", f"distill.teacher={tiny_model}",
             "run.dir=taught", "train.max_steps=1", "eval.samples=0", "eval.prompts=[]")  # fmt: skip
    code, _, err = finetune("run", str(recipe), *words)
    assert code == 0, err
    assert let_go[-1:] == [True]
