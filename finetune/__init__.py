"""Python API of the fine-tuning suite: what the commands do, as functions with typed results.

    import finetune

    result = finetune.run("recipes/quickstart.yaml", {"train.max_steps": 20})
    print(result.state, result.before.loss, "→", result.after.loss, result.folder)

Each function imports what it needs when it is called. None exits the process, prints (unless `verbose=True`; Ctrl-C prints one
line on stderr), or leaves logging, warnings, threads or signal handlers changed. What the command line prints as an error is
raised as an exception of `finetune.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from finetune.commands.evaluate import Scores
    from finetune.models.load import LoadedModel
    from finetune.planning.result import Plan
    from finetune.recipe import Recipe
    from finetune.record import ExportRecord, LossRecord, MergeRecord, Record
    from finetune.screen import Screen

__all__ = ["RunResult", "check", "evaluate", "export", "load", "merge", "plan", "run"]

Overrides = Mapping[str, Any]  # {"section.key": value}


class RunResult(NamedTuple):
    """Result of a run. before, after: held-out losses with standard errors, None if nothing was held out; record: run.json."""

    folder: Path
    state: str
    before: LossRecord | None
    after: LossRecord | None
    record: Record


def run(
    recipe: str | Path,
    overrides: Overrides | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    verbose: bool = False,
) -> RunResult:
    """Run a recipe (a file, or the name of a shipped one) as `finetune run` does, in this process.

    Raises:
        UserError: the recipe, or something it names, is wrong; nothing was written. GateError: a gate refused.
        Interruption: Ctrl-C; training is saved, and `resume=True` continues it.
    """
    from finetune import pipeline
    from finetune.commands.common import checked_recipe

    path, resolved = checked_recipe(str(recipe), _as_typed(overrides))
    command = f"finetune.run({str(recipe)!r}, {dict(overrides or {})!r})"
    done = pipeline.run(resolved, path.stem, resume=resume, force=force, screen=_screen(verbose), command=command)
    return RunResult(done.path, done.record.state, done.record.eval.before, done.record.eval.after, done.record)


def check(recipe: str | Path, overrides: Overrides | None = None) -> Recipe:
    """Check a recipe's keys and the files and packages that it names; returns it with every default filled in.

    Raises:
        UserErrors: all errors in it.
    """
    from finetune.commands.common import checked_recipe

    return checked_recipe(str(recipe), _as_typed(overrides))[1]


def plan(recipe: str | Path, overrides: Overrides | None = None, *, gpu: str | None = None, memory: str | None = None) -> Plan:
    """Estimate what a recipe needs: memory by phase and term, time, energy, and whether it fits (`fits`).

    gpu: such as rtx-4070; None: this machine's device. memory: its limit, such as 12GB; None: all of it.

    Raises:
        UserError: the recipe is wrong, or the device is unknown. Untraceable (a GateError): the model's step cannot be traced.
    """
    from finetune.commands.plan import plan_of

    return plan_of(str(recipe), _as_typed(overrides), gpu=gpu, memory=memory)


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto", merged: bool = True) -> LoadedModel:
    """Load a run, adapter, checkpoint, model folder, package, .gguf file or hub id as (model, tokenizer, …), ready to use.

    merged: take a run's merged model; False: the adapter on its base, as trained.

    Raises:
        UserError: nothing to load there.
    """
    from finetune.commands.common import dtype_name
    from finetune.libraries import quiet_libraries
    from finetune.models.load import load_model

    with quiet_libraries():
        return load_model(str(model), dtype=dtype_name(dtype), device=device, merged=merged)


def merge(model: str | Path, out: str | Path, *, dtype: str = "auto", verbose: bool = False) -> MergeRecord:
    """Merge an adapter into a model folder that plain transformers loads; kept only if its loss is the trained model's.

    Raises:
        UserError: nothing to merge, or `out` exists. GateError: the merged model differs from the trained one.
    """
    from finetune.commands.merge import merge_model

    return merge_model(str(model), Path(out), dtype, _screen(verbose))


def export(model: str | Path, to: str, out: str | Path, *, verbose: bool = False) -> ExportRecord:
    """Export a model for another program (`to`: bitnet, gguf-f16, …); kept only if its logits there are the model's.

    Raises:
        UserError: the format cannot express the model, or `out` exists. GateError: the exported model differs.
    """
    from finetune.commands.export import export_model

    return export_model(str(model), to, Path(out), _screen(verbose))


def evaluate(
    *models: str | Path,
    file: str | Path | None = None,
    tasks: Iterable[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    verbose: bool = False,
) -> dict[str, Scores]:
    """Evaluate models: loss on a file or on the held-out rows of their runs, and harness tasks. Returns {model: scores}.

    Raises:
        UserError: nothing to evaluate on, or no such model, file or task.
    """
    from finetune.commands.evaluate import evaluate_models

    return evaluate_models(
        [str(model) for model in models],
        _screen(verbose),
        file=Path(file) if file is not None else None,
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        include_path=Path(include_path) if include_path is not None else None,
        limit=limit,
        dtype=dtype,
        command="finetune.evaluate",
    )


def _as_typed(overrides: Overrides | None) -> list[str]:
    """Overrides in the form of the command line: KEY=JSON, which is valid YAML."""
    import json

    from finetune.errors import UserError

    for key in overrides or {}:
        if "=" in key:
            raise UserError(
                "an override is {'section.key': value}", where="overrides", got=repr(key), hint="such as {'train.lr': 1e-4}"
            )
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in (overrides or {}).items()]


def _screen(verbose: bool) -> Screen:
    from rich.console import Console

    from finetune.screen import Screen

    return Screen(None if verbose else Console(quiet=True))
