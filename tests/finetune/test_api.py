"""The Python API: seven functions with typed results that print nothing, never exit and leave the process unchanged."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.errors import GateError, Interruption, UserError, UserErrors
from finetune.run_dir import RunDir
from tests.conftest import REPOSITORY, alpaca, story, write_jsonl

API = ("check", "evaluate", "export", "load", "merge", "plan", "run")
RECIPE = """\
model: {{name: {model}, dtype: fp32}}
adapter: {{rank: 4}}
data: {{path: {rows}, max_length: 128, heldout: 6}}
train: {{max_steps: 8, lr: 1.0e-2}}
eval: {{samples: 1, max_new_tokens: 2}}
run: {{device: cpu, threads: 1, merge: false}}
"""


@pytest.fixture(scope="module")
def libraries() -> None:
    """Import libraries beforehand: the first import of each adds loggers and warning filters, which is not tested here."""
    for name in ("accelerate", "bitsandbytes", "datasets", "matplotlib.pyplot", "peft", "transformers"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("api")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(model=tiny_model, rows=write_jsonl(folder / "rows.jsonl", alpaca(40))))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> finetune.RunResult:
    """The result of a finished run."""
    from finetune.stages import planning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "default_planner", None)
        patch.setattr("finetune.report.plots.draw", lambda *values, **options: "<svg></svg>")
        return finetune.run(recipe, {"train.max_steps": 4, "run.dir": str(recipe.parent / "trained")})


def process_state() -> dict[str, Any]:
    """State of the whole process that the API must not change."""
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    return {
        "logging": {
            name: (
                logger.level,
                [handler for handler in logger.handlers if "pytest" not in type(handler).__module__],
                logger.disabled,
            )
            for name, logger in {"": logging.root, **loggers}.items()
        },
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "torch threads": torch.get_num_threads(),
        "threads": set(threading.enumerate()),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "hooks": (sys.excepthook, threading.excepthook),
    }


@pytest.fixture(autouse=True)
def process_stays_unchanged(
    libraries: None,
    trained: finetune.RunResult,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """After every test, whether its calls succeed or fail: nothing was printed, and the state of the process is unchanged."""
    monkeypatch.chdir(tmp_path)
    before = process_state()
    capfd.readouterr()
    yield
    after = process_state()
    new_loggers = after["logging"].keys() - before["logging"].keys()  # loggers of modules imported by the test
    assert {name: logger for name, logger in after["logging"].items() if name not in new_loggers} == before["logging"]
    assert {key: value for key, value in after.items() if key != "logging"} == {
        key: value for key, value in before.items() if key != "logging"
    }
    assert capfd.readouterr() == ("", "")


PROGRAM = """
import json, logging, os, pkgutil, signal, sys, threading, time, types

started = time.process_time()
import finetune
facts = {"seconds": time.process_time() - started, "modules": list(sys.modules)}

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(which) for which in SIGNALS]
result = finetune.run(sys.argv[1], {"run.dir": "fresh", "train.max_steps": 2})
finetune.load(result.folder)
finetune.evaluate(result.folder)
finetune.merge(result.folder, "merged")
import transformers
facts |= {
    "signals": before == [signal.getsignal(which) for which in SIGNALS],
    "threads": [thread.name for thread in threading.enumerate()],
    "root": [logging.root.level, len(logging.root.handlers)],
    "transformers": [transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()],
}

for module in pkgutil.walk_packages(finetune.__path__, "finetune."):
    __import__(module.name)
facts["functions"] = [name for name in finetune.__all__ if isinstance(getattr(finetune, name), types.FunctionType)]
from finetune.errors import Stop
arguments = {"export": ["nowhere", "bitnet", "out"], "merge": ["nowhere", "out"]}
facts["raised"] = []
for name in facts["functions"]:
    try:
        getattr(finetune, name)(*arguments.get(name, ["nowhere"]))
    except Stop as error:
        facts["raised"].append(name)
open("facts.json", "w").write(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def program(recipe: Path) -> dict[str, Any]:
    """Facts from a fresh process with progress bars enabled, since tqdm's would start a thread that stays alive."""
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PROGRAM, str(recipe)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, env=environment)
    assert process.returncode == 0, process.stderr
    facts = json.loads((recipe.parent / "facts.json").read_text())
    return facts | {"printed": process.stdout + process.stderr}


def test_import_is_fast_and_imports_no_heavy_library(program: dict[str, Any]) -> None:
    assert not {"torch", "transformers", "pydantic", "yaml", "numpy", "rich", "typer"} & set(program["modules"])
    assert program["seconds"] <= 0.1


def test_no_submodule_shadows_a_function_of_the_api(program: dict[str, Any]) -> None:
    assert sorted(program["functions"]) == sorted(program["raised"]) == sorted(API)


def test_api_calls_leave_signals_threads_and_logging_unchanged(program: dict[str, Any]) -> None:
    assert program["printed"] == ""
    assert program["signals"]
    assert program["threads"] == ["MainThread"]
    assert program["root"] == [logging.WARNING, 0]
    assert program["transformers"] == [logging.WARNING, True]


def test_run_returns_folder_state_losses_and_record(recipe: Path) -> None:
    result = finetune.run(recipe, {"train.max_steps": 4, "train.lr": 2e-3, "run.dir": "made"})
    assert (result.folder, result.state) == (Path("made"), "done")
    assert result.before is not None
    assert result.after is not None
    assert result.before.loss != result.after.loss
    assert result.after.stderr > 0
    assert result.record.train is not None
    assert result.record.train.steps == 4
    assert "finetune.run(" in result.record.provenance.command
    resumed = finetune.run(recipe, {"train.max_steps": 4, "train.lr": 2e-3, "run.dir": "made"}, resume=True)
    assert resumed[:4] == result[:4]


def test_verbose_run_prints_its_progress(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    finetune.run(recipe, {"train.max_steps": 1, "run.dir": "spoken"}, verbose=True)
    assert "held-out loss before" in capfd.readouterr().out


def test_check_returns_the_recipe_and_plan_says_whether_it_fits(recipe: Path) -> None:
    checked = finetune.check(recipe, {"train.lr": 1e-4, "data.max_length": 64})
    assert (checked.train.lr, checked.data.max_length) == (1e-4, 64)
    plan = finetune.plan(recipe, gpu="rtx-4070", memory="8GB")
    assert plan.fits
    assert 0 < plan.peak_bytes < 8 << 30
    assert not finetune.plan(recipe, gpu="rtx-4070", memory="0.1GB").fits


def test_load_returns_a_model_and_evaluate_scores(trained: finetune.RunResult, tiny_model: Path) -> None:
    loaded = finetune.load(trained.folder)
    ids = loaded.tokenizer("What is 2 plus 5?", return_tensors="pt")
    assert torch.isfinite(loaded.model(**ids).logits).all()
    rows = write_jsonl(Path("rows.jsonl"), alpaca(6))
    scores = finetune.evaluate(trained.folder, tiny_model, file=rows)
    assert list(scores) == [str(trained.folder), str(tiny_model)]
    losses = [score.loss.loss for score in scores.values() if score.loss is not None]
    assert losses[0] != losses[1]
    (heldout,) = finetune.evaluate(trained.folder).values()
    assert heldout.loss is not None
    assert trained.after is not None
    assert heldout.loss.loss == pytest.approx(trained.after.loss, abs=1e-5)


def test_merge_and_export_pass_their_gates(trained: finetune.RunResult) -> None:
    merged = finetune.merge(trained.folder, "merged")
    assert merged.gate is not None
    assert merged.gate.status == "pass"
    assert Path("merged/model.safetensors").is_file()
    exported = finetune.export("merged", "gguf-f16", "tiny.gguf")
    assert exported.gate.status == "pass"
    assert exported.bytes == Path("tiny.gguf").stat().st_size


MISTAKES: dict[str, tuple[Callable[[Path, Path], Any], type[Exception]]] = {
    "no such recipe": (lambda recipe, run: finetune.run("nowhere"), UserError),
    "several mistakes": (lambda recipe, run: finetune.check(recipe, {"train.lr": "fast", "train.speed": 3}), UserErrors),
    "no such data": (lambda recipe, run: finetune.run(recipe, {"data.path": "nothing.jsonl"}), UserErrors),
    "answers without an end": (lambda recipe, run: finetune.run(recipe, {"data.max_length": 45}), GateError),
    "another run's folder": (lambda recipe, run: finetune.run(recipe, {"run.dir": str(run)}), UserError),
    "another run": (lambda recipe, run: finetune.run(recipe, {"run.dir": str(run), "train.lr": 1.0}, resume=True), UserError),
    "no such device": (lambda recipe, run: finetune.plan(recipe, gpu="abacus"), UserError),
    "no such model": (lambda recipe, run: finetune.load("nowhere"), UserError),
    "no such dtype": (lambda recipe, run: finetune.load(run, dtype="int3"), UserError),
    "merged into another run": (lambda recipe, run: finetune.merge(run, run), UserError),
    "an adapter exported": (lambda recipe, run: finetune.export(run, "bitnet", "out"), UserError),
    "no such format": (lambda recipe, run: finetune.export(run, "tape", "out"), UserError),
    "no such file": (lambda recipe, run: finetune.evaluate(run, file="nowhere.txt"), UserError),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_the_documented_errors(mistake: str, recipe: Path, trained: finetune.RunResult) -> None:
    call, error = MISTAKES[mistake]
    with pytest.raises(error):
        call(recipe, trained.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_run_raises_interruption_and_can_resume(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    append = RunDir.append

    def append_and_interrupt(run: RunDir, metrics: dict[str, Any]) -> None:
        append(run, metrics)
        if metrics["step"] == 2 and "loss" in metrics:
            signal.raise_signal(number)

    settings = {"train.max_steps": 4, "train.eval_steps": None, "run.dir": "cut"}
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", append_and_interrupt)
        with pytest.raises(Interruption):
            finetune.run(recipe, settings)
    out, err = capfd.readouterr()  # one line for the user who typed Ctrl-C
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert finetune.run(recipe, settings, resume=True).state == "done"


def test_readme_examples_run(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    examples = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import finetune" in block]
    assert examples
    shutil.copy(recipe, "my.yaml")
    Path("test.txt").write_text(story(2_000), encoding="utf-8")
    for example in examples:
        exec(example, {})
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == sum(example.count("print(") for example in examples)
    assert "done" in out
    assert err == ""
    assert Path("my-model/model.safetensors").is_file()
    assert Path("runs/my/run.json").is_file()
