"""A run that is killed at any moment resumes to equal weights, optimizer, metrics and samples. KILL_SEED=N repeats a failure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import alpaca, story, write_jsonl
from tests.finetune.kills import Report, Take, differences, kill_until_done, seed, tracker_steps

SFT = """\
model: {{name: {model}, dtype: {dtype}}}
data: {{path: {rows}, max_length: 128, heldout: 4}}
eval: {{samples: 1, max_new_tokens: 4}}
"""
LORA = (
    SFT
    + """\
quant: {{scheme: nf4}}
adapter: {{rank: 8, dropout: 0.1}}
train: {{epochs: 50, max_steps: 30, save_steps: 3, eval_steps: 7, accumulation: 2}}
run: {{device: cpu, threads: 1, trackers: [{trackers}]}}
fast: {{compile: {compiled}}}
"""
)
LOW_MEMORY = (
    SFT
    + """\
adapter: {{kind: none}}
train: {{epochs: 50, max_steps: 20, save_steps: 3, eval_steps: 7, optimizer: adamw_8bit, stochastic_rounding: true,
  optimizer_in_backward: true, max_grad_norm: 0}}
run: {{device: cpu, threads: 1}}
"""
)
BITNET = """\
kind: pretrain
model:
  config: {{model_type: bitnet, hidden_size: 256, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, hidden_act: silu, max_position_embeddings: 64, tie_word_embeddings: true}}
tokenizer: {{train: 300}}
quant: {{scheme: ternary}}
twin: true
data: {{path: {text}, max_length: 32, heldout: 6}}
train: {{max_steps: 20, micro_batch: 2, accumulation: 2, save_steps: 3, eval_steps: 7, health_steps: 2, precision: fp32}}
eval: {{samples: 1, prompts: ["The miller"], max_new_tokens: 4}}
run: {{device: cpu, threads: 1}}
"""
CASES = {
    "lora": (LORA, {"dtype": "fp32", "compiled": "false", "trackers": ""}),
    "compiled": (LORA, {"dtype": "fp32", "compiled": "true", "trackers": ""}),
    "bitnet": (BITNET, {}),
    "short": (LORA.replace("max_steps: 30", "max_steps: 15"), {"dtype": "fp32", "compiled": "false", "trackers": ""}),
    "low-memory": (LOW_MEMORY, {"dtype": "bf16"}),
    "tracked": (LORA, {"dtype": "fp32", "compiled": "false", "trackers": "tensorboard"}),
}
KILLS, IN_SAVES = 24, 5  # at least, in each case


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, request: pytest.FixtureRequest) -> str:
    """The path of the recipe of the case in the test's parameter."""
    rows, text = write_jsonl(tmp_path / "rows.jsonl", alpaca(60)), tmp_path / "story.txt"
    text.write_text(story(120_000))
    template, changes = CASES[request.param]
    path = tmp_path / "tiny.yaml"
    path.write_text(template.format(model=tiny_model, rows=rows, text=text, **changes))
    return str(path)


@pytest.mark.parametrize("recipe", ["short"], indirect=True)
def test_resume_is_bit_equal_after_a_few_kills(recipe: str, tmp_path: Path) -> None:
    rng, report = random.Random(seed()), Report()
    uninterrupted = Take(recipe, tmp_path / "whole", rng)
    uninterrupted.whole(forked=True)
    while len(report.kills) < 3:
        take = Take(recipe, tmp_path / f"cut-{report.runs}", rng)
        report += kill_until_done(take, seconds=2.0, unforked_share=0)
        assert differences(uninterrupted.run, take.run) == [], f"{take.place}, KILL_SEED={seed()}"
    print(report)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [case for case in CASES if case != "short"], indirect=True)
def test_resume_is_bit_equal_after_kills_at_any_moment(
    recipe: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 24 kills, 5 of them inside a save; 120 and 25 over the five cases. Each run has a new folder."""
    wrong_trackers: list[str] = []
    rng, report, case = random.Random(seed()), Report(), request.node.callspec.params["recipe"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}  # only the first start compiles
    uninterrupted = Take(recipe, tmp_path / "whole", rng, environment)
    uninterrupted.whole()
    seconds = Take(recipe, tmp_path / "again", rng, environment).whole(forked=True)
    assert differences(uninterrupted.run, tmp_path / "again" / "run") == [], "a forked start differs from a new interpreter"
    while len(report.kills) < KILLS or report.in_saves < IN_SAVES:
        take = Take(recipe, tmp_path / f"cut-{report.runs}", rng, environment)
        report += kill_until_done(take, seconds=seconds)
        assert differences(uninterrupted.run, take.run) == [], f"{take.place}, KILL_SEED={seed()}"
        if case == "tracked" and tracker_steps(take.run / "tiny") != tracker_steps(uninterrupted.run / "tiny"):
            wrong_trackers.append(take.place.name)
    with capsys.disabled():
        print(f"\n{case}: {report}")
    assert not wrong_trackers, f"the tracker does not have each step once: {wrong_trackers} in {tmp_path}, KILL_SEED={seed()}"
