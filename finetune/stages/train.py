"""Training: setting up the loop, resuming it, running it, and recording its result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.assembly import TrainingSetup, set_up_training, teacher_of
from finetune.errors import GateError, Interruption, UserError
from finetune.models.build import BuiltModel
from finetune.planning import local
from finetune.processes import is_main_process, rank, world_size
from finetune.record import Best, Record, TernaryRecord, TrainRecord
from finetune.stages.context import RunContext
from finetune.stages.evaluate import held_out_loss
from finetune.stages.preflight import Checked
from finetune.train import checkpoint, optim, parallel
from finetune.train.checkpoint import Progress
from finetune.train.fast.patching import FastStep
from finetune.train.loop import Interrupted
from finetune.train.ternary import Ternary
from finetune.units import human_bytes
from quant import BypassedError, prove_used


def set_up(run: RunContext, checked: Checked, built: BuiltModel, patches: FastStep) -> tuple[TrainingSetup, dict[str, int]]:
    """Set up the loop and check it on one micro-batch; returns it with the bytes of training by type, without activations.

    Raises:
        GateError: quantized linears are bypassed in the forward pass. UserError: teacher or optimizer is not available.
    """
    recipe, screen = run.recipe, run.screen
    teacher = teacher_of(
        recipe,
        built.model,
        device=checked.device,
        dtype=built.dtype,
        vocabulary=checked.inputs.tokenizer.get_vocab(),
        phase=screen.phase,
    )
    setup = set_up_training(recipe, built, patches, checked.data, checked.device, teacher=teacher)
    settings = setup.settings
    sizes = optim.memory_of(
        checkpoint.trained(built.model).values(),
        name=settings.optimizer,
        stochastic_rounding=settings.stochastic_rounding,
        in_backward=settings.optimizer_in_backward,
    )
    screen.say("  training memory without activations: " + ", ".join(f"{k} {human_bytes(v)}" for k, v in sizes.items() if v))
    for note in setup.notes:
        screen.warn(note)
    _prove_swap(setup, built)
    set_seed(recipe.run.seed + rank())  # python, numpy and torch; a different dropout in each process
    return setup, sizes


def _prove_swap(setup: TrainingSetup, built: BuiltModel) -> None:
    """Raise GateError if a swapped module does not run in a forward pass: the model would not use the weights it trains."""
    if built.swap is None:
        return
    model, task = built.model, setup.task
    model.eval()  # dropout would draw random numbers, which would change a resumed run
    try:
        with torch.no_grad(), prove_used(model, built.swap):
            sampler = task.sampler(0, 0, None)
            task.loss(model, task.batch(next(sampler)))
            if (close := getattr(sampler, "close", None)) is not None:
                close()
    except BypassedError as error:
        raise GateError("packed linears are bypassed", where="quant", got=str(error), hint="add them to quant.keep") from None


def resume(run: RunContext, checked: Checked, setup: TrainingSetup) -> Progress:
    """Restore model, optimizer, random state and metrics from the newest complete checkpoint, and record the resume.

    Raises:
        UserError: all checkpoints are damaged.
    """
    folder, screen = run.path / "checkpoints", run.screen
    checkpoint.sweep(folder)
    with screen.phase("checkpoint"):
        path, notes = checkpoint.newest(folder)
    for damaged in notes:
        screen.warn(f"damaged checkpoint {damaged}; using the previous one")
    if path is None and notes:
        hint = f"restore one from a copy; to start over: rm -r {folder}, then finetune resume {run.path}"
        raise UserError("every checkpoint of this run is damaged", where=str(folder), got="; ".join(notes), hint=hint)
    run.note_resume(path)
    if path is None:
        screen.say("  no checkpoint yet: starting from the beginning")
        run.run_dir.cut_metrics(0)
        return Progress()
    progress, size = checkpoint.load(path, setup.model, setup.optimizer)
    if run.recipe.train.optimizer.startswith("paged") and checked.device.type == "cuda":
        screen.warn("the optimizer states are restored to GPU memory; they are paged again only in a new run")
    run.run_dir.cut_metrics(size)
    screen.say(f"  resuming after step {progress.step}")
    return progress


def _accelerator(run: RunContext, device: torch.device, progress: Progress) -> Any:
    """An Accelerator with the recipe's trackers; a resumed run continues in the same tracker run from its checkpoint on."""
    recipe, record = run.recipe, run.record
    assert record is not None
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=list(recipe.run.trackers) or None, project_dir=str(run.path))
    if recipe.run.trackers:
        options = {
            "tensorboard": {"purge_step": progress.step + 1} if record.provenance.resumed else {},
            "wandb": {"id": record.tracker_id, "resume": "allow"},
            "trackio": {"name": f"{run.name}-{record.tracker_id}", "resume": "allow"},
        }
        accelerator.init_trackers(
            run.name,
            config=_flat(recipe.model_dump(mode="json")),
            init_kwargs={name: options[name] for name in recipe.run.trackers},
        )
    return accelerator


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            result |= _flat(item, f"{prefix}{key}.")
        else:
            result[prefix + key] = item if isinstance(item, str | int | float | bool) else str(item)
    return result


@dataclass
class Trained:
    """Result of training. ternary: of the ternary weights, if they were trained."""

    figures: TrainRecord
    ternary: TernaryRecord | None


def train(run: RunContext, checked: Checked, setup: TrainingSetup, patches: FastStep, progress: Progress) -> Trained:
    """Run the training loop, with evaluations and measurements of ternary codes as the recipe says.

    Raises:
        Interruption: a signal; the step was finished and saved. Also what the loop raises.
    """
    recipe, run_dir, screen = run.recipe, run.run_dir, run.screen
    accelerator = _accelerator(run, checked.device, progress)
    rows, total, watch = checked.held_out, setup.total_steps, None
    if recipe.trains_quantized:
        watch = Ternary(setup.model, recipe, total, run_dir.metrics, screen.warn)

    def evaluate(step: int) -> dict[str, float]:
        result = held_out_loss(
            recipe, setup.model, rows, patches, lambda done, of: shown(step, total, f"evaluating {done}/{of} held-out rows")
        )
        measured = {"eval_loss": result.loss, "eval_stderr": result.stderr, "eval_perplexity": result.perplexity}
        return measured | ({"eval_blend": λ} if watch is not None and (λ := watch.schedule.blend(step)) < 1 else {})

    screen.say(f"  {total} steps ({setup.limit})")
    with screen.phase("train") as shown:
        try:
            figures = setup.loop(
                accelerator=accelerator,
                folder=run_dir,
                progress=progress,
                evaluate=evaluate if rows else None,
                before_step=watch.before if watch else None,
                after_step=watch.after if watch else None,
                went_back=watch.rewind if watch else None,
                show=shown,
            ).run()
        except Interrupted as stop:
            raise Interruption(str(stop), hint=f"finetune resume {run_dir.path}") from None
    trained = TrainRecord.model_validate(figures)
    if world_size() > 1:
        trained.processes, trained.parallel = world_size(), recipe.run.parallel
    if setup.settings.load_best_at_end and trained.best is not None:
        _take_best(trained.best, trained.steps, setup.model, run_dir.path, screen.say, screen.warn)
    for tracker in accelerator.trackers:  # end_training would also shut down the process group
        tracker.finish()
    if watch is not None:
        watch.end()
    if setup.teacher is not None:
        setup.teacher.detach()  # its hooks on the model would keep it alive
    return Trained(trained, TernaryRecord.model_validate(watch.summary()) if watch is not None else None)


def _take_best(best: Best, last: int, model: Any, run_dir: Path, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Load the weights with the lowest held-out loss from their checkpoint."""
    path = run_dir / "checkpoints" / f"{checkpoint.PREFIX}{best.step:06d}"
    if best.step != last and (wrong := checkpoint.damage(path)) is not None:
        warn(f"the best checkpoint, {path.name}, is damaged ({wrong}): using the last weights")
        return
    if best.step != last:
        checkpoint.load_weights(path, model)
    say(f"  best held-out loss {best.loss:.4f} after step {best.step} of {last}: using these weights")


def note(run: RunContext, checked: Checked, record: Record, trained: Trained) -> None:
    """Record and print the result of training, and calibrate later plans on this machine with it."""
    screen, figures, plan = run.screen, trained.figures, run.planned.plan if run.planned is not None else None
    record.data = checked.data.record()  # the number of skipped rows of a stream is known only now
    for line in checked.data.warnings():
        screen.warn(line)
    if trained.ternary is not None:
        record.ternary = trained.ternary
    # A resumed process measures only its own steps; one that resumes after the last step measures none.
    if figures.tokens_per_second or record.train is None:
        record.train = figures
    planned = f", planned {human_bytes(record.planned.peak_bytes)}" if plan is not None and record.planned is not None else ""
    screen.say(
        f"  {figures.steps} steps, {figures.tokens} tokens, {figures.tokens_per_second:.0f} tok/s, "
        f"peak {human_bytes(figures.peak_bytes)} ({figures.memory_kind}{planned})"
    )
    if plan is not None and record.planned is not None and world_size() == 1:
        metrics = run.run_dir.metrics
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        took = [seconds for line in lines if (seconds := json.loads(line).get("step_seconds"))]
        if len(took) > 1:
            local.note(
                plan,
                run.recipe,
                steps=len(took),
                planned_bytes=int(record.planned.peak_bytes),
                peak_bytes=figures.peak_bytes,
                step_seconds=statistics.median(took[1:]),  # the first compiles
            )


def unshard(built: BuiltModel, device: torch.device) -> None:
    """Gather a sharded model in the main process, which saves the weights."""
    if parallel.is_sharded(built.model):
        parallel.restore(built.model)
        if is_main_process():
            built.model.to(device)
