"""Training and held-out data of a task: conversations (sft), or a stream of text (pretrain).

Both are read and inspected before any weight is loaded, and have the same interface (`TaskData`): held-out rows, questions for
the model, and the training loop's `Task`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.data.preflight import FAIL, PASS, WARN, Check, Limits, Preflight, Prepared, control_tokens, inspect, prepare
from finetune.errors import UserError
from finetune.recipe import Recipe, Train
from finetune.record import DataRecord, Record, Sample, part_as

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finetune.data.formats import Row
    from finetune.data.rows import Rows
    from finetune.data.stream import Corpus, Source
    from finetune.train.distill import Distillation
    from finetune.train.fast.chunked_loss import LMHead
    from finetune.train.task import Task

Progress = Callable[[int, int], None]
HeldOut = list[tuple[list[int], list[int]]]  # input ids, labels at their own positions
PROMPT_TOKENS = 48  # tokens of a held-out sequence that the model continues


class ConversationsRecord(DataRecord):
    """Counts of conversations: rows read, rows trained, duplicates removed."""

    rows: int
    train_rows: int
    duplicates_removed: int


class TextRecord(DataRecord):
    """A stream of text. revision: commit of a hub dataset; vocabulary: size of the tokenizer."""

    revision: str | None = None
    vocabulary: int


def data_record(record: Record) -> ConversationsRecord | TextRecord | None:
    """The data part of a run's record, as the type of its task; None if the run has not reached it.

    Raises:
        UserError: it does not match that type.
    """
    if record.data is None:
        return None
    if record.kind == "pretrain":
        return part_as(TextRecord, record.data, "data")
    return part_as(ConversationsRecord, record.data, "data")


class TaskData(Protocol):
    """Data of a task. `source` and `digest` identify it; `eos_token_ids`: end tokens that occur in it."""

    source: str
    digest: str
    preflight: Preflight
    eos_token_ids: frozenset[int]

    def lines(self) -> list[str]:
        """A description of the data, for the screen."""

    def warnings(self) -> list[str]:
        """Warnings for the user."""

    def record(self) -> DataRecord:
        """The description for run.json."""

    def held_out(self) -> HeldOut:
        """Held-out rows, which are never trained."""

    def questions(self) -> list[Sample]:
        """Questions for the model before and after training, without answers."""

    def first_rows(self, most: int) -> HeldOut:
        """At most `most` training rows."""

    def highest_id(self) -> int:
        """The highest token id in the data."""

    def task(
        self, settings: Train, device: torch.device, *, packing: bool, head: LMHead | None, teacher: Distillation | None
    ) -> Task:
        """Batches and loss for the training loop. head: the model's, for a loss in chunks."""

    def steps(self, task: Task, settings: Train) -> tuple[int, str]:
        """(optimizer steps, the key that decides them, in words)."""

    def tokens(self, settings: Train) -> float:
        """Approximate number of tokens that training reads."""


def build_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: frozenset[int],
    *,
    limits: Limits,
    source: Source | None = None,
    progress: Progress | None = None,
) -> TaskData:
    """Read and inspect the data of a recipe. source: the stream, if it is already open.

    Raises:
        UserError: the data cannot be read, matches no format, or the template refuses it.
    """
    if recipe.streams_text:
        return Text(recipe, tokenizer, source or open_stream(recipe), limits)
    return Conversations(recipe, tokenizer, eos_token_ids, limits, progress)


def open_stream(recipe: Recipe, revision: str | None = None) -> Source:
    """Open the text stream of a pretraining recipe without reading it. revision: commit of a hub dataset.

    Raises:
        UserError: it does not exist, or has no revisions.
    """
    from finetune.data.stream import open_source

    data = recipe.data
    return open_source(
        name=data.name,
        path=data.path,
        files=data.files,
        split=data.split,
        revision=revision or data.revision,
        text_key=data.text_key,
        skip_bad=data.bad_rows == "skip",
    )


# ---------------------------------------------------------------------------------------------------------- conversations


class Conversations:
    """Conversations from a file, a package or the hub, as samples with labels."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
        limits: Limits,
        progress: Progress | None = None,
    ) -> None:
        from finetune.data.formats import without_reasoning
        from finetune.data.rows import load_rows
        from finetune.data.samples import Encoder, set_template

        self.recipe = recipe
        data = recipe.data
        self.template = set_template(tokenizer, data.template)
        self.rows: Rows = load_rows(
            name=data.name,
            path=data.path,
            files=data.files,
            split=data.split,
            format_=data.format,
            max_rows=data.max_rows,
            skip_bad=data.bad_rows == "skip",
        )
        apart: list[Row] | None = None
        if data.heldout_path is not None:
            loaded = load_rows(name=None, path=data.heldout_path, format_=data.format, skip_bad=data.bad_rows == "skip")
            apart, both = loaded.rows, hashlib.sha256(f"{self.rows.sha256} {loaded.sha256}".encode()).hexdigest()
            self.rows = replace(self.rows, sha256=both)
        if data.reasoning == "drop":
            self.rows = replace(self.rows, rows=[without_reasoning(row) for row in self.rows.rows])
            apart = None if apart is None else [without_reasoning(row) for row in apart]
        encoder = Encoder(
            tokenizer,
            max_length=data.max_length,
            eos_token_ids=eos_token_ids,
            system=data.system,
            loss_on=data.loss_on,
            truncation=data.truncation,
        )
        self.data: Prepared = prepare(
            self.rows.rows, apart, encoder, heldout=data.heldout, dedupe=data.dedupe, seed=recipe.run.seed, progress=progress
        )
        if not self.data.train_rows:
            hint = f"hold out fewer of the {len(self.data.heldout_rows)} rows: data.heldout=0.1"
            raise UserError(
                "all rows are held out, none are left to train on", where="data.heldout", got=f"{data.heldout}", hint=hint
            )
        self.preflight, self.eos_token_ids = inspect(self.data, encoder, limits), frozenset(encoder.ends)
        self.source, self.digest = self.rows.source, self.rows.sha256
        self._positions = limits.positions
        self._has_names = encoder.control.has_names
        self._cut = {sample.where for sample in self.data.heldout if sample.cut}

    def lines(self) -> list[str]:
        rows = self.rows
        return [f"{rows.source}: {len(rows.rows)} rows, format {rows.format} ({rows.reason}); chat template: {self.template}"]

    def warnings(self) -> list[str]:
        skipped, unread = self.rows.skipped, Counter(key for row in self.rows.rows for key in row.unread)
        lines = [f"{len(skipped)} rows match no format and are skipped (data.bad_rows), such as {skipped[0]}"] if skipped else []
        if unread:
            lines.append(
                "keys of the rows that are not read: " + ", ".join(f"{key} ({count})" for key, count in unread.most_common(8))
            )
        unasked = sum(not self._can_be_asked(row) for row in self.data.heldout_rows)
        if unasked and self.recipe.eval.samples:
            why = "they are cut, or hold names of control tokens"
            lines.append(f"{unasked} held-out rows are not asked for answers before and after: {why}")
        return lines

    def record(self) -> ConversationsRecord:
        return ConversationsRecord(
            format=self.rows.format,
            format_reason=self.rows.reason,
            rows=len(self.rows.rows),
            train_rows=len(self.data.train_rows),
            heldout_rows=len(self.data.heldout_rows),
            rows_skipped=len(self.rows.skipped),
            duplicates_removed=self.data.duplicates_removed,
            template=self.template,
        )

    def held_out(self) -> HeldOut:
        return [(list(sample.input_ids), list(sample.labels)) for sample in self.data.heldout]

    def _can_be_asked(self, row: Row) -> bool:
        """Whether a held-out row's prompt surely fits into data.max_length, and would be encoded in use as in training."""
        texts = (message["content"] for message in row.messages if message["role"] != "assistant")
        return row.where not in self._cut and not any(map(self._has_names, texts))

    def questions(self) -> list[Sample]:
        """Held-out conversations up to their last answer, then the recipe's own questions."""
        settings = self.recipe.eval
        questions: list[dict[str, Any]] = []
        for row in filter(self._can_be_asked, self.data.heldout_rows):
            last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=None)
            if last and len(questions) < settings.samples:
                tools = {"tools": list(row.tools)} if row.tools else {}
                questions.append({"prompt": list(row.messages[:last]), "reference": row.messages[last]["content"], **tools})
        for prompt in settings.prompts:
            questions.append({"prompt": [{"role": "user", "content": prompt}], "reference": None})
        if self.recipe.data.system:
            for sample in questions:
                if sample["prompt"][0]["role"] != "system":
                    sample["prompt"].insert(0, {"role": "system", "content": self.recipe.data.system})
        return [Sample(**sample) for sample in questions]

    def first_rows(self, most: int) -> HeldOut:
        return [(list(sample.input_ids), list(sample.labels)) for sample in self.data.train[:most]]

    def highest_id(self) -> int:
        return max(max(s.input_ids) for s in self.data.train)

    def task(
        self, settings: Train, device: torch.device, *, packing: bool, head: LMHead | None, teacher: Distillation | None
    ) -> Task:
        from finetune.data.packing import Batches
        from finetune.train.sft import SupervisedFineTuning

        data = self.recipe.data
        return SupervisedFineTuning(
            Batches(
                self.data.train,
                micro_batch=settings.micro_batch,
                max_length=data.max_length,
                packing=packing,
                seed=self.recipe.run.seed,
                positions=self._positions,
            ),
            device,
            head=head,
            chunk=settings.loss_chunk,
        )

    def steps(self, task: Task, settings: Train) -> tuple[int, str]:
        from finetune.train.task import steps_in

        total = steps_in(task, epochs=settings.epochs, accumulation=settings.accumulation, max_steps=settings.max_steps)
        limit = "train.max_steps" if total == settings.max_steps else f"train.epochs={settings.epochs:g}"
        return total, f"{limit}, {len(self.data.train)} samples in {task.length(0)} sequences per epoch"

    def tokens(self, settings: Train) -> float:
        whole = sum(map(len, self.data.train))
        row = self.recipe.data.max_length if self.recipe.data.packing else whole / max(1, len(self.data.train))
        steps = math.inf if settings.max_steps is None else settings.max_steps
        return min(whole * settings.epochs, steps * settings.micro_batch * settings.accumulation * row)


# ------------------------------------------------------------------------------------------------------------------- text


class Text:
    """A stream of documents, packed into sequences of data.max_length tokens."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source, limits: Limits) -> None:
        from eval.model_state import adds_bos
        from finetune.data.stream import Corpus, open_source
        from finetune.data.tokenizer import batch_encoder

        data = recipe.data
        if tokenizer.eos_token_id is None:
            raise UserError(
                "this tokenizer has no end token to separate documents", where="tokenizer", got=tokenizer.name_or_path
            )
        self.recipe, self.tokenizer = recipe, tokenizer
        self.source, self.digest = source.name, source.digest

        self.adds_bos = adds_bos(tokenizer)
        # A BOS token that is the end token too (OPT) stands between documents already.
        self.bos = tokenizer.bos_token_id if self.adds_bos and data.bos == "auto" else None
        self.bos = None if self.bos == tokenizer.eos_token_id else self.bos
        encode = batch_encoder(tokenizer, self.bos)
        options: dict[str, Any] = {"length": data.max_length, "end": tokenizer.eos_token_id, "seed": recipe.run.seed}
        apart = data.heldout_path is not None
        self.corpus: Corpus = Corpus(source, encode, heldout_rows=0 if apart else int(data.heldout), **options)
        self.rows_held_out = self.corpus.heldout
        if data.heldout_path is not None:
            other = open_source(name=None, path=data.heldout_path, text_key=data.text_key, skip_bad=data.bad_rows == "skip")
            rows = Corpus(other, encode, heldout_rows=0, **options).rows(0, None)
            self.rows_held_out = [row.ids.tolist() for row in rows]
            self.digest = hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest()
            if not self.rows_held_out:
                hint = f"give at least {data.max_length} tokens, or a smaller data.max_length"
                raise UserError(
                    "this file is too short for one held-out sequence",
                    where="data.heldout_path",
                    got=data.heldout_path,
                    hint=hint,
                )
        self.eos_token_ids = frozenset({tokenizer.eos_token_id})
        self.first = self._first_rows(64)
        self.preflight = self._inspect(limits)

    def _first_rows(self, most: int) -> list[list[int]]:
        rows, first = self.corpus.rows(0, None), []
        for row in rows:
            first.append(row.ids.tolist())
            if len(first) == most:
                break
        rows.close()
        return first

    def _inspect(self, limits: Limits) -> Preflight:
        data, checks = self.recipe.data, []
        tokens = sum(map(len, self.first))
        if not self.first:
            checks.append(
                Check(
                    "something to learn",
                    FAIL,
                    f"the text is shorter than one sequence of {data.max_length} tokens: lower data.max_length",
                )
            )
        else:
            characters = sum(len(self.tokenizer.decode(row)) for row in self.first)
            detail = (
                f"every token is trained; {characters / tokens:.2f} characters per token in the first {len(self.first)} sequences"
            )
            checks.append(Check("something to learn", PASS, detail))
            checks += [self._edges(), *self._control_tokens()]
            unknown = self.tokenizer.unk_token_id
            lost = sum(row.count(unknown) for row in self.first) if unknown is not None else 0
            if lost > 0.01 * tokens:
                detail = f"{lost} of {tokens} tokens are {self.tokenizer.unk_token}: the tokenizer does not cover this text"
                checks.append(Check("tokenizer", FAIL, detail))
        if limits.positions is not None and data.max_length > limits.positions:
            detail = (
                f"sequences of {data.max_length} tokens, but the model has {limits.positions} positions: lower data.max_length"
            )
            checks.append(Check("the model's length", FAIL, detail))
        highest = max((max(row) for row in [*self.first, *self.rows_held_out]), default=0)
        if limits.vocabulary is not None and highest >= limits.vocabulary:
            detail = f"the tokenizer has token id {highest}, but the model has {limits.vocabulary} embeddings"
            checks.append(Check("the model's vocabulary", FAIL, detail))
        if self.rows_held_out:
            detail = f"{len(self.rows_held_out)} sequences held out, from documents that are never trained"
            checks.append(Check("train and held-out apart", PASS, detail))
        examples = [[{"text": self.tokenizer.decode(row[:100]), "supervised": True}] for row in self.first[:3]]
        return Preflight(checks, tokens, tokens, 0, {"edges": [], "counts": []}, examples)

    def _edges(self) -> Check:
        """The tokens that documents begin and end with."""
        end, begin = self.tokenizer.eos_token, self.tokenizer.bos_token
        if self.bos is not None:
            return Check("beginning and end of documents", PASS, f"documents begin with {begin} and end with {end}")
        if self.adds_bos and end != begin:
            detail = f"documents do not begin with {begin}, which the tokenizer adds to texts: set data.bos=auto"
            return Check("beginning and end of documents", WARN, detail)
        return Check("beginning and end of documents", PASS, f"documents end with {end}; the tokenizer adds no BOS to texts")

    def _control_tokens(self) -> Iterator[Check]:
        """Names of control tokens in the first sequences, which are encoded as text."""
        text = "".join(str(self.tokenizer.decode(row)) for row in self.first)
        ids = Counter(index for row in self.first for index in row)
        special = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        spelled = Counter({name: text.count(name) - ids[index] for name, index in special.items()})
        return control_tokens(+spelled, Counter())

    def lines(self) -> list[str]:
        name = Path(self.tokenizer.name_or_path).name or "trained on this text"
        sequences = f"sequences of {self.recipe.data.max_length} tokens"
        return [f"{self.source}: text, in {sequences}; tokenizer: {len(self.tokenizer)} tokens ({name})"]

    def warnings(self) -> list[str]:
        count, locations = self.corpus.source.bad, self.corpus.source.skipped
        return [f"{count} rows so far are not text and are skipped (data.bad_rows), such as {locations[0]}"] if count else []

    def record(self) -> TextRecord:
        return TextRecord(
            format="text",
            format_reason=f"packed into sequences of {self.recipe.data.max_length} tokens",
            heldout_rows=len(self.rows_held_out),
            rows_skipped=self.corpus.source.bad,  # so far; grows while the stream is read
            revision=self.corpus.source.revision,
            vocabulary=len(self.tokenizer),
            template=None,
        )

    def held_out(self) -> HeldOut:
        return [(row, [-100, *row[1:]]) for row in self.rows_held_out]

    def questions(self) -> list[Sample]:
        """Starts of held-out sequences, then the recipe's own prompts; the model continues them."""
        settings, length = self.recipe.eval, self.recipe.data.max_length
        begin = min(PROMPT_TOKENS, length // 2)
        questions = [
            Sample(
                prompt=self.tokenizer.decode(row[row[0] == self.bos : begin]),  # generation adds the BOS
                reference=self.tokenizer.decode(row[begin : begin + settings.max_new_tokens]),
            )
            for row in self.rows_held_out[: settings.samples]
        ]
        return questions + [Sample(prompt=prompt, reference=None) for prompt in settings.prompts]

    def first_rows(self, most: int) -> HeldOut:
        return [(row, [-100, *row[1:]]) for row in self.first[:most]]

    def highest_id(self) -> int:
        return max(max(row) for row in self.first)

    def task(
        self, settings: Train, device: torch.device, *, packing: bool, head: LMHead | None, teacher: Distillation | None
    ) -> Task:
        from finetune.train.pretrain import Pretraining

        return Pretraining(
            self.corpus, device, micro_batch=settings.micro_batch, head=head, chunk=settings.loss_chunk, teacher=teacher
        )

    def tokens(self, settings: Train) -> float:
        tokens = math.inf if settings.max_tokens is None else settings.max_tokens
        steps = math.inf if settings.max_steps is None else settings.max_steps
        return min(tokens, steps * settings.micro_batch * settings.accumulation * self.recipe.data.max_length)

    def steps(self, task: Task, settings: Train) -> tuple[int, str]:
        step_tokens = settings.micro_batch * settings.accumulation * self.recipe.data.max_length
        by_tokens = math.ceil(settings.max_tokens / step_tokens) if settings.max_tokens is not None else math.inf
        by_steps = settings.max_steps if settings.max_steps is not None else math.inf
        total = int(min(by_tokens, by_steps))
        return total, f"{'train.max_steps' if by_steps <= by_tokens else 'train.max_tokens'}, {step_tokens} tokens per step"
