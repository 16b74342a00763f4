"""Fine-tuning and quantized training on one 12 GB card, from Python: what the commands do, as functions with typed results.

    import finetune

    result = finetune.run("recipes/quickstart.yaml", {"train.max_steps": 20})
    print(result.state, result.before.loss, "→", result.after.loss, result.folder)

Each function imports what it needs when it is called. None exits or prints (but with `verbose=True`, and one line on stderr when
Ctrl-C stops a run), and none leaves logging, warnings, threads or signal handlers changed. What the command line says as an error
is raised here: `finetune.errors`.
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
    """What a run has made. before, after: held-out losses with their standard errors; None where nothing was held out.

    record: all of run.json.
    """

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
    """Execute a recipe (a file, or the name of a shipped one) as `finetune run` does, in this process.

    Raises:
        UserError: the recipe or what it names is wrong; nothing was written. GateError: a gate refused. Interruption: Ctrl-C;
            what was trained is saved, and `resume=True` goes on.
    """
    from finetune import pipeline
    from finetune.commands.common import checked_recipe

    path, resolved = checked_recipe(str(recipe), _as_typed(overrides))
    command = f"finetune.run({str(recipe)!r}, {dict(overrides or {})!r})"
    made = pipeline.run(resolved, path.stem, resume=resume, force=force, screen=_screen(verbose), command=command)
    return RunResult(made.path, made.record.state, made.record.eval.before, made.record.eval.after, made.record)


def check(recipe: str | Path, overrides: Overrides | None = None) -> Recipe:
    """The recipe with every default, once its keys and the files and packages that it names are found good.

    Raises:
        UserErrors: everything that is wrong with it.
    """
    from finetune.commands.common import checked_recipe

    return checked_recipe(str(recipe), _as_typed(overrides))[1]


def plan(recipe: str | Path, overrides: Overrides | None = None, *, gpu: str | None = None, memory: str | None = None) -> Plan:
    """What a recipe will need: memory by phase and term, time, energy; `fits` says whether it does.

    gpu: such as rtx-4070, else the device that is here. memory: how much of it, such as 12GB, else all.

    Raises:
        UserError: of the recipe, or no such device. Untraceable (a GateError): the model's step cannot be planned.
    """
    from finetune.commands.plan import plan_of

    return plan_of(str(recipe), _as_typed(overrides), gpu=gpu, memory=memory)


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto", merged: bool = True) -> LoadedModel:
    """A run, adapter, checkpoint, model folder, package, .gguf or hub id as (model, tokenizer, …), ready to use.

    merged: of a run, its merged model; else the adapter on its base as it was trained.

    Raises:
        UserError: there is nothing to load.
    """
    from finetune.commands.common import dtype_name
    from finetune.libraries import quiet_libraries
    from finetune.models.load import load_model

    with quiet_libraries():
        return load_model(str(model), dtype=dtype_name(dtype), device=device, merged=merged)


def merge(model: str | Path, out: str | Path, *, dtype: str = "auto", verbose: bool = False) -> MergeRecord:
    """Merge an adapter into a model folder that plain transformers loads; measured before it is kept.

    Raises:
        UserError: nothing to merge, or `out` is in the way. GateError: the merged model is another.
    """
    from finetune.commands.merge import merge_model

    return merge_model(str(model), Path(out), dtype, _screen(verbose))


def export(model: str | Path, to: str, out: str | Path, *, verbose: bool = False) -> ExportRecord:
    """Write a model for another program (`to`: bitnet, gguf-f16, …); kept only if what runs there is the same model.

    Raises:
        UserError: what the format cannot express, or `out` is in the way. GateError: it is another model there.
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
    """Score models by name: loss on a file or on the held-out rows of their runs, harness tasks.

    Raises:
        UserError: nothing to score with, or a model, file or task that is not there.
    """
    from finetune.commands.evaluate import evaluate_models

    return evaluate_models(
        [str(model) for model in models],
        _screen(verbose),
        file=Path(file) if file is not None else None,
        tasks=list(tasks),
        include_path=Path(include_path) if include_path is not None else None,
        limit=limit,
        dtype=dtype,
        command="finetune.evaluate",
    )


def _as_typed(overrides: Overrides | None) -> list[str]:
    """Overrides as the command line takes them: KEY=JSON, which YAML reads."""
    import json

    return [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]


def _screen(verbose: bool) -> Screen:
    from rich.console import Console

    from finetune.screen import Screen

    return Screen(None if verbose else Console(quiet=True))
