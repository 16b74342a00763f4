"""The float twin of a ternary run: the same recipe in floats, in a run folder of its own, as the baseline."""

from __future__ import annotations

import gc

import torch

from finetune.errors import GateError
from finetune.files import TOKENIZER
from finetune.recipe import TERNARY_LR, Export, Quant, Recipe, Tokenizer, Train
from finetune.record import Record, TwinRecord
from finetune.run_dir import RunDir, absolute
from finetune.screen import Screen
from finetune.stages.context import RunContext
from finetune.stages.evaluate import paired, saved_result
from finetune.task_data import TextRecord, data_record
from finetune.units import number

FOLDER = "twin"


def twin_rate(recipe: Recipe) -> float:
    """The twin's peak learning rate."""
    return recipe.train.twin_lr or recipe.train.lr / TERNARY_LR


def begin(run: RunContext) -> RunContext:
    """Start or resume the float twin of a trained run, in a folder inside the run folder."""
    assert run.record is not None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    recipe = twin_recipe(run.recipe, run.name, run.run_dir, run.record)
    run.screen.say(f"\nfloat twin: the same recipe in floats, with a peak learning rate of {recipe.train.lr:g}")
    run_dir = RunDir(run.path / FOLDER)
    force = run.force or (run.checked is not None and run.checked.forced is not None)
    screen = Screen(run.screen.console)
    return RunContext.begin(
        f"{run.name}-twin", absolute(recipe), run_dir, screen, run.command, resume=run_dir.exists, force=force
    )


def twin_recipe(recipe: Recipe, name: str, run_dir: RunDir, record: Record) -> Recipe:
    """The recipe in floats: the same initialization and the same tokens in the same order."""
    train = recipe.train.model_copy(
        update={"lr": twin_rate(recipe), "twin_lr": None, "health_steps": Train().health_steps},
    )
    changes = {
        "about": f"the float twin of {name}",
        "quant": Quant(),
        "twin": False,
        "train": train,
        "export": Export(),
        "run": recipe.run.model_copy(update={"dir": str(run_dir.path / FOLDER)}),
    }
    if recipe.model.config is not None and recipe.tokenizer.name is None:
        changes["tokenizer"] = Tokenizer(name=str((run_dir.path / TOKENIZER).absolute()))
    data = data_record(record)
    if isinstance(data, TextRecord) and (revision := data.revision):
        changes["data"] = recipe.data.model_copy(update={"revision": revision})
    return recipe.model_copy(update=changes)


def compare(run: RunContext, other: RunContext) -> TwinRecord:
    """Compute the gap between a ternary run and its float twin.

    Raises:
        GateError: the twin was trained on different data.
    """
    recipe, record, twin = run.recipe, run.record, other.record
    assert record is not None
    assert twin is not None
    ours, theirs = record.provenance.data, twin.provenance.data
    assert ours is not None
    assert theirs is not None
    if theirs.sha256 != ours.sha256:
        got = f"{ours.source} has changed since this run started"
        raise GateError("the float twin was trained on different data, so the gap is undefined", where=str(other.path), got=got)
    assert record.train is not None
    assert twin.train is not None
    comparison = TwinRecord(path=FOLDER, lr=twin_rate(recipe), seed=recipe.run.seed, loss=None, gap=None)
    if record.eval.after is not None:
        own_result, twin_result = saved_result(run.run_dir, "after"), saved_result(other.run_dir, "after")
        comparison.loss = twin_result.loss
        comparison.gap, comparison.gap_stderr = paired(twin_result, own_result)
        run.screen.say(
            f"\nternary "
            f"{own_result.loss:.4f}, float twin "
            f"{comparison.loss:.4f}: gap {comparison.gap:+.4f} ± {number(comparison.gap_stderr)} "
            f"nats at {record.train.tokens} tokens each (seed {comparison.seed})"
        )
    comparison.tokens_per_second = twin.train.tokens_per_second
    return comparison
