"""Evaluation before and after training: held-out loss, answers to questions, harness tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.generation import generate, longest_answer, prompt_ids
from eval.perplexity import IGNORED, LossResult, evaluate_loss, loss_of, paired_difference
from finetune.errors import UserError
from finetune.processes import rank, world_size
from finetune.recipe import Recipe
from finetune.record import LossRecord, Record, Sample, When
from finetune.run_dir import RunDir
from finetune.screen import Screen
from finetune.stages.context import RunContext
from finetune.stages.preflight import Checked
from finetune.task_data import HeldOut
from finetune.train import parallel
from finetune.train.fast import chunked_loss
from finetune.units import number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.train.fast.patching import FastStep


def held_out_loss(
    recipe: Recipe, model: Any, rows: HeldOut, patches: FastStep | None, progress: Callable[[int, int], None] | None = None
) -> LossResult:
    """The loss on held-out rows, split across processes."""
    head = patches.head if patches is not None else None
    of_tokens = chunked_loss.evaluator(head, recipe.train.loss_chunk) if head is not None else None
    shares = [rows[number :: world_size()] for number in range(world_size())]
    supervised = [any(label != IGNORED for _, labels in share for label in labels[1:]) for share in shares]
    # Sharded layers must run in all processes together, so each evaluates all rows.
    own = shares[rank()] if all(supervised) and not parallel.is_sharded(model) else rows
    result = evaluate_loss(
        model,
        own,
        batch_tokens=recipe.eval.batch_tokens,
        of_tokens=of_tokens,
        retry=not parallel.is_sharded(model),
        progress=progress,
    )
    if world_size() == 1:
        return result
    if len(own) == len(rows):  # all processes need the same bits, because save_best compares this loss
        return loss_of(*parallel.broadcast_object([result.row_loss_sums, result.row_tokens]))
    parts = parallel.all_gather_object([result.row_loss_sums, result.row_tokens])
    sums, tokens = ([parts[at % world_size()][which][at // world_size()] for at in range(len(rows))] for which in (0, 1))
    return loss_of(sums, tokens)


def measure(when: When, run: RunContext, checked: Checked, model: Any, patches: FastStep | None) -> LossRecord:
    """Measure the held-out loss, print it, and write it to eval/WHEN.json with losses by row."""
    name = "evaluate the float model" if when == "float" else f"evaluate {when}"
    with run.screen.phase(name) as progress:
        result = held_out_loss(
            run.recipe, model, checked.held_out, patches, lambda done, total: progress(done, total, "held-out rows")
        )
    run.run_dir.write_json(f"eval/{when}.json", result.as_dict(by_row=True))
    record = LossRecord.model_validate(result.as_dict())
    run.screen.say(
        f"  held-out loss {when}: {result.loss:.4f} ± {number(record.stderr)} nats, perplexity {result.perplexity:.2f}"
    )
    return record


def saved_result(run_dir: RunDir, when: When) -> LossResult:
    """Read the result that `measure` has written."""
    saved = json.loads((run_dir.path / "eval" / f"{when}.json").read_text(encoding="utf-8"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return LossResult(**values)


def difference(run_dir: RunDir) -> tuple[float | None, float | None]:
    """(after − before, its standard error), paired by row; (None, None) in processes that do not write."""
    if not run_dir.writes:
        return None, None
    return paired(saved_result(run_dir, "before"), saved_result(run_dir, "after"))


def paired(before: LossResult, after: LossResult) -> tuple[float, float | None]:
    """(after − before, its standard error or None), paired by row."""
    value, error = paired_difference(before, after)
    return value, error if math.isfinite(error) else None


def answers(
    when: When, run: RunContext, checked: Checked, model: Any, patches: FastStep | None, questions: list[Sample]
) -> list[Sample]:
    """Generate the model's answers to the questions, and write them to samples/samples.json too."""
    questions = [question for question in questions if _leaves_room(question, model, checked.inputs.tokenizer, run.screen)]
    if not questions:
        return []
    with run.screen.phase(f"answers {when}") as progress, without_patches(patches):
        generated = generate(
            model,
            checked.inputs.tokenizer,
            [question.prompt for question in questions],
            max_new_tokens=run.recipe.eval.max_new_tokens,
            tools=[question.tools for question in questions],
            retry=not parallel.is_sharded(model),
            progress=lambda done, total: progress(done, total, "answers"),
        )
    samples = [
        question.model_copy(update={when: answer.text, f"{when}_ended": answer.ended})
        for question, answer in zip(questions, generated, strict=True)
    ]
    run.run_dir.write_json("samples/samples.json", [sample.model_dump(exclude_unset=True) for sample in samples])
    return samples


def _leaves_room(question: Sample, model: Any, tokenizer: Any, screen: Screen) -> bool:
    """Whether the model has positions left for an answer; tells if not."""
    try:
        return longest_answer(model, prompt_ids(tokenizer, question.prompt, question.tools), 1) == 1
    except ValueError as error:
        screen.warn(f"a question is not asked: {error}")
        return False


def score(when: When, run: RunContext, checked: Checked, model: Any, patches: FastStep | None, record: Record) -> None:
    """Score the recipe's harness tasks, unless the record has scores for `when`."""
    settings = run.recipe.eval
    if not settings.tasks or when in (record.eval.tasks or {}):
        return
    with without_patches(patches):
        scores = score_tasks(
            model,
            checked.inputs.tokenizer,
            settings.tasks,
            run.screen,
            include_path=settings.include_path,
            limit=settings.limit,
            name=f"tasks {when}",
        )
    record.eval.tasks = (record.eval.tasks or {}) | {when: scores}
    run.run_dir.write_json(f"eval/tasks-{when}.json", scores)
    run.save()


def without_patches(patches: FastStep | None) -> AbstractContextManager[None]:
    """Disable the patches within the block, for generation."""
    return patches.paused() if patches is not None else nullcontext()


def score_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    screen: Screen,
    *,
    include_path: str | None,
    limit: int | None,
    name: str = "tasks",
) -> dict[str, Any]:
    """Run lm-evaluation-harness with progress on the screen; returns {task: {metric: value}}.

    Raises:
        UserError: the harness is not installed, or a task is unknown.
    """
    from eval.harness import UnknownTask, run_tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError("no such task folder", where="include_path", got=include_path)
    with screen.phase(name) as progress:
        try:
            return run_tasks(
                model,
                tokenizer,
                tasks,
                include_path=Path(include_path) if include_path else None,
                limit=limit,
                progress=lambda done, total: progress(done, total, "requests"),
            )
        except ImportError as error:
            raise UserError(str(error), where="eval.tasks", hint="pip install -e '.[eval]'") from None
        except UnknownTask as error:
            raise UserError(str(error), where="eval.tasks") from None
