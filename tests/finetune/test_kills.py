"""Killed anywhere, a run goes on to the very same end: weights, optimizer, metrics, answers. KILL_SEED=N repeats a failure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import alpaca, story, write_jsonl
from tests.finetune.kills import Report, Take, differences, kill_until_done, seed, tracked

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
KILLS, IN_SAVES = 24, 5  # at least, of each case


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, request: pytest.FixtureRequest) -> str:
    """The path of the recipe that the test is named for."""
    rows, text = write_jsonl(tmp_path / "rows.jsonl", alpaca(60)), tmp_path / "story.txt"
    text.write_text(story(120_000))
    template, changes = CASES[request.param]
    path = tmp_path / "tiny.yaml"
    path.write_text(template.format(model=tiny_model, rows=rows, text=text, **changes))
    return str(path)


@pytest.mark.parametrize("recipe", ["short"], indirect=True)
def test_a_few_kills(recipe: str, tmp_path: Path) -> None:
    rng, report = random.Random(seed()), Report()
    whole = Take(recipe, tmp_path / "whole", rng)
    whole.whole(forked=True)
    while len(report.kills) < 3:
        take = Take(recipe, tmp_path / f"cut-{report.runs}", rng)
        report += kill_until_done(take, seconds=2.0, plain=0)
        assert differences(whole.run, take.run) == [], f"{take.place}, KILL_SEED={seed()}"
    print(report)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [case for case in CASES if case != "short"], indirect=True)
def test_killed_anywhere_it_ends_the_same(
    recipe: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 24 kills, 5 of them inside a save; over the five cases 120 and 25. Runs that got through begin anew elsewhere."""
    mistold: list[str] = []
    rng, report, case = random.Random(seed()), Report(), request.node.callspec.params["recipe"]
    made = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}  # machine code is made by the first start alone
    whole = Take(recipe, tmp_path / "whole", rng, made)
    whole.whole()
    seconds = Take(recipe, tmp_path / "again", rng, made).whole(forked=True)
    assert differences(whole.run, tmp_path / "again" / "run") == [], "a fork of the server is no plain process"
    while len(report.kills) < KILLS or report.in_saves < IN_SAVES:
        take = Take(recipe, tmp_path / f"cut-{report.runs}", rng, made)
        report += kill_until_done(take, seconds=seconds)
        assert differences(whole.run, take.run) == [], f"{take.place}, KILL_SEED={seed()}"
        if case == "tracked" and tracked(take.run / "tiny") != tracked(whole.run / "tiny"):
            mistold.append(take.place.name)
    with capsys.disabled():
        print(f"\n{case}: {report}")
    assert not mistold, f"what the tracker shows is not each step once: {mistold} in {tmp_path}, KILL_SEED={seed()}"
