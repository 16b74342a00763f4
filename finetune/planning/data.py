"""Facts about a recipe's data for its plan: the largest micro-batch, tokens, steps, held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.packing import MULTIPLE
from finetune.data.preflight import Limits
from finetune.data.samples import IGNORE
from finetune.errors import UserError
from finetune.models.source import Source
from finetune.planning import hub_metadata
from finetune.planning.step import MicroBatch
from finetune.recipe import Recipe
from finetune.task_data import PROMPT_TOKENS, build_data

if TYPE_CHECKING:
    from finetune.task_data import TaskData

SAMPLE = 4000  # rows that are tokenized; further rows are assumed to be alike
CHARACTERS, TURN = 4, 8  # characters per token; tokens that a template adds to a message
PACKED = 0.97  # share of tokens in a packed sequence, if the samples are unknown


@dataclass(frozen=True)
class Facts:
    """Facts about the data.

    micro: the largest micro-batch; mean_tokens: of a micro-batch; evaluate: the largest batch of held-out rows, None without any;
    prompt: tokens of a question; answers: number of questions.
    """

    micro: MicroBatch
    mean_tokens: float
    steps: int
    tokens_per_step: int
    evaluate: MicroBatch | None
    held_out_tokens: int
    prompt: int
    answers: int
    notes: list[str] = field(default_factory=list)


def facts_of(recipe: Recipe, source: Source, data: TaskData | None = None) -> Facts:
    """Facts about the data: from `data`, else from the data on this machine, else by assumption."""
    if recipe.streams_text:
        return _text(recipe)
    notes: list[str] = []
    known = (data, 1.0) if data is not None else _read(recipe, source, notes)
    if known is None or isinstance(known, hub_metadata.Rows):
        return _assumed(recipe, known, notes)
    return _conversations(recipe, known[0], known[1], notes)


def _answers(recipe: Recipe) -> int:
    return recipe.eval.samples + len(recipe.eval.prompts)


def _text(recipe: Recipe) -> Facts:
    settings, length = recipe.train, recipe.data.max_length
    shape = (settings.micro_batch, length)
    micro = MicroBatch(shape, tuple(range(0, shape[0] * length + 1, length)), shape[0] * (length - 1))
    step_tokens = settings.micro_batch * settings.accumulation * length
    steps = min(
        math.ceil(settings.max_tokens / step_tokens) if settings.max_tokens is not None else math.inf,
        settings.max_steps if settings.max_steps is not None else math.inf,
    )
    rows = int(recipe.data.heldout)
    notes = []
    if recipe.data.heldout_path is not None:
        rows, notes = 64, ["data.heldout_path: assumed to have 64 sequences"]
    evaluate = _evaluation(recipe, length, rows * length, length - 1)
    prompt = min(PROMPT_TOKENS, length // 2)
    return Facts(micro, micro.tokens, int(steps), step_tokens, evaluate, rows * length, prompt, _answers(recipe), notes)


def _evaluation(recipe: Recipe, longest: int, tokens: int, supervised: int) -> MicroBatch | None:
    """The largest batch of held-out rows: eval.batch_tokens, or one longer row."""
    if not tokens:
        return None
    size = min(max(longest, recipe.eval.batch_tokens), max(longest, tokens))
    rows = max(1, size // longest)
    bounds = tuple(range(0, rows * longest + 1, longest))
    return MicroBatch((1, rows * longest), bounds, min(rows * supervised, rows * longest))


def _read(recipe: Recipe, source: Source, notes: list[str]) -> tuple[Any, float] | hub_metadata.Rows | None:
    """(the data with at most SAMPLE rows, the factor to all rows); estimated counts without the model's tokenizer; None if the
    data is not on this machine."""
    from finetune.data.rows import PACKAGE, load_rows
    from finetune.models.config import eos_token_ids, recipe_tokenizer

    data = recipe.data
    if data.path is None and not str(data.name).startswith(PACKAGE):
        return hub_metadata.DATA.get(str(data.name))
    rows = load_rows(
        name=data.name, path=data.path, files=data.files, split=data.split, format_=data.format, max_rows=data.max_rows,
        skip_bad=data.bad_rows == "skip",
    ).rows  # fmt: skip
    try:
        tokenizer = recipe_tokenizer(recipe, source, Path(recipe.run.dir or "runs"))
    except UserError:
        lengths = [
            min(
                data.max_length,
                len(row.text or "") // CHARACTERS + sum(TURN + len(m["content"]) // CHARACTERS for m in row.messages),
            )
            for row in rows
        ]
        notes.append(f"tokens are estimated as {CHARACTERS} characters each: the model's tokenizer is not on this machine")
        return hub_metadata.Rows(len(rows), sum(lengths), max(lengths))
    sampled = recipe
    if len(rows) > SAMPLE:
        sampled = recipe.model_copy(update={"data": data.model_copy(update={"max_rows": SAMPLE})})
        notes.append(f"tokens were counted in {SAMPLE} of {len(rows)} rows")
    return build_data(sampled, tokenizer, eos_token_ids(source, tokenizer), limits=Limits()), max(1.0, len(rows) / SAMPLE)


def _conversations(recipe: Recipe, task_data: Any, scale: float, notes: list[str]) -> Facts:
    from finetune.data.packing import Batches

    settings, data, samples = recipe.train, recipe.data, task_data.data.train
    options: dict[str, Any] = {"micro_batch": settings.micro_batch, "max_length": data.max_length, "packing": data.packing}
    epoch = Batches(samples, seed=recipe.run.seed, **options).epoch(0)

    def bounds_of(key: tuple[int, ...]) -> tuple[int, ...]:
        ends, at = [0], 0
        for index in key:
            at += len(samples[index])
            ends.append(at)
        whole = -(-at // MULTIPLE) * MULTIPLE
        return tuple(ends) if whole == at else (*ends, whole)

    def supervised(key: tuple[int, ...]) -> int:
        return sum(1 for index in key for label in samples[index].labels[1:] if label != IGNORE)

    bounds = max(map(bounds_of, epoch), key=lambda one: (one[-1], max(b - a for a, b in pairwise(one))))
    most = bounds[-1]
    # The order changes with the epoch: a packed sequence may become full, and the longest samples may meet in one micro-batch.
    full = settings.micro_batch * data.max_length
    if data.packing and settings.epochs > 1:
        most = -(-min(full, sum(sorted(map(len, samples), reverse=True)[: 8 * full])) // MULTIPLE) * MULTIPLE
    elif not data.packing:
        longest = sorted(map(len, samples), reverse=True)[: settings.micro_batch]
        if scale > 1:
            longest = [data.max_length] * settings.micro_batch
            notes.append("the longest rows are assumed to have data.max_length tokens")
        most = -(-sum(longest) // MULTIPLE) * MULTIPLE
    if most > bounds[-1]:
        bounds = (*bounds, most)
    trained = max(map(supervised, epoch))
    rows = len(epoch) * scale
    total = math.ceil(rows * settings.epochs / settings.accumulation)
    steps = min(total, settings.max_steps) if settings.max_steps else total
    mean = sum(map(len, samples)) / len(epoch)
    held = task_data.held_out()
    longest_held = max((len(ids) for ids, _ in held), default=0)
    held_tokens = sum(len(ids) for ids, _ in held)
    of_one = max((sum(label != IGNORE for label in labels[1:]) for _, labels in held), default=0)
    return Facts(
        MicroBatch((1, bounds[-1]), bounds, min(bounds[-1], trained)),
        mean,
        steps,
        round(mean * settings.accumulation),
        _evaluation(recipe, longest_held, held_tokens, of_one) if held else None,
        held_tokens,
        min(longest_held or data.max_length, data.max_length),
        _answers(recipe),
        notes,
    )


def _assumed(recipe: Recipe, counts: hub_metadata.Rows | None, notes: list[str]) -> Facts:
    """Facts without the rows: packed sequences are assumed full, single samples as long as the longest."""
    settings, data = recipe.train, recipe.data
    length = settings.micro_batch * data.max_length
    length += -length % MULTIPLE
    held = int(data.heldout) if data.heldout >= 1 or counts is None else int(counts.rows * data.heldout)
    if counts is None:
        if settings.max_steps is None:
            notes.append("the number of rows is unknown before download: planned for 1,000 steps")
        steps, mean, row = settings.max_steps or 1000, length * PACKED, data.max_length
    else:
        tokens = counts.tokens * (1 - held / counts.rows)
        row = min(data.max_length, counts.longest)
        mean = length * PACKED if data.packing else settings.micro_batch * tokens / counts.rows
        steps = math.ceil(tokens / mean * settings.epochs / settings.accumulation)
        steps = min(steps, settings.max_steps) if settings.max_steps else steps
        if not data.packing:
            length = -(-settings.micro_batch * row // MULTIPLE) * MULTIPLE
        notes.append(f"{data.path or data.name}: assumed to have {counts.rows:,} rows with {counts.tokens:,} tokens in total")
    bounds = (*range(0, length, data.max_length), length)
    of_row = counts.tokens // counts.rows if counts else row
    evaluate = _evaluation(recipe, row, held * of_row, row - 1) if held else None
    return Facts(
        MicroBatch((1, length), bounds, length - 1), mean, steps, round(mean * settings.accumulation), evaluate, held * of_row,
        row, _answers(recipe), notes,
    )  # fmt: skip
