"""The same recipe in floats, in a run folder of its own: the baseline by which a ternary model is judged."""

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
    """The float twin of a run that has trained, in a folder within its own; it goes on where it was begun."""
    assert run.record is not None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    recipe = twin_recipe(run.recipe, run.name, run.run_dir, run.record)
    run.screen.say(f"\nthe twin: the same in floats, at a peak learning rate of {recipe.train.lr:g}")
    run_dir = RunDir(run.path / FOLDER)
    force = run.force or (run.checked is not None and run.checked.forced is not None)
    screen = Screen(run.screen.console)
    return RunContext.begin(
        f"{run.name}-twin", absolute(recipe), run_dir, screen, run.command, resume=run_dir.exists, force=force
    )


def twin_recipe(recipe: Recipe, name: str, run_dir: RunDir, record: Record) -> Recipe:
    """The same start, the same tokens in the same order, in floats."""
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
    """The gap between a ternary run and its float twin.

    Raises:
        GateError: the twin has read something else.
    """
    recipe, record, twin = run.recipe, run.record, other.record
    assert record is not None
    assert twin is not None
    ours, its = record.provenance.data, twin.provenance.data
    assert ours is not None
    assert its is not None
    if its.sha256 != ours.sha256:
        got = f"{ours.source} has changed since this run began"
        raise GateError("the twin has not read the same text, so there is no gap to tell", where=str(other.path), got=got)
    assert record.train is not None
    assert twin.train is not None
    told = TwinRecord(path=FOLDER, lr=twin_rate(recipe), seed=recipe.run.seed, loss=None, gap=None)
    if record.eval.after is not None:
        own_result, its_result = saved_result(run.run_dir, "after"), saved_result(other.run_dir, "after")
        told.loss = its_result.loss
        told.gap, told.gap_stderr = paired(its_result, own_result)
        run.screen.say(
            f"\nternary {own_result.loss:.4f}, float twin {told.loss:.4f}: a gap of {told.gap:+.4f} ± {number(told.gap_stderr)} "
            f"nats at {record.train.tokens} tokens each, seed {told.seed}"
        )
    told.tokens_per_second = twin.train.tokens_per_second
    return told
