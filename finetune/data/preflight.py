"""The preflight: checks tokens and labels of the user's own data before any weight is loaded.

It checks what goes wrong most often and is noticed last: whether every answer ends with a trained token, whether there is one
BOS, how many tokens are trained, how many truncation removes, whether train and held-out overlap. A check fails if training
cannot work, and warns if a part of the data does not teach what it seems to.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.data.formats import Row, answers
from finetune.data.samples import IGNORE, Encoder, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKED_ROWS = 32  # that are compared with the template's own marks
PASS, WARN, FAIL = "pass", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One check. status: pass, warn or fail; detail: a sentence with the numbers."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Limits:
    """Limits of the model, from its configuration: number of positions and of embeddings; None if unknown."""

    positions: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Samples for training and evaluation. `train_rows` and `heldout_rows` are the rows that they were encoded from."""

    train: list[Sample]
    heldout: list[Sample]
    train_rows: list[Row]
    heldout_rows: list[Row]
    duplicates_removed: int = 0
    dropped: int = 0  # samples longer than max_length under truncation: drop
    idle: list[str] = field(default_factory=list)  # locations of samples without a trained token, which are left out


@dataclass(frozen=True)
class Preflight:
    """Results of all checks, token counts of the training set, and decoded examples (see `decode`)."""

    checks: list[Check]
    tokens: int
    supervised_tokens: int
    rows_truncated: int
    length_histogram: dict[str, list[int]]
    examples: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAIL]

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": [check.__dict__ for check in self.checks],
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / max(1, self.tokens),
            "rows_truncated": self.rows_truncated,
            "length_histogram": self.length_histogram,
            "examples": self.examples,
        }


def prepare(
    rows: Sequence[Row],
    heldout_rows: Sequence[Row] | None,
    encoder: Encoder,
    *,
    heldout: int | float,
    dedupe: bool,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Remove duplicates, split, encode.

    Rows with the same question stay on one side of the split, so a held-out question was never trained; where too many rows
    begin alike for that (chats that open with "Hi"), those with the same text besides the answers do; else single rows are held
    out, and a check tells. `heldout` is a number of rows, or a share below 1; `heldout_rows` replaces the split. Samples without
    a trained token are left out of both sides.
    """
    kept: list[Row] = list({row.key: row for row in reversed(rows)}.values())[::-1] if dedupe else list(rows)
    removed = len(rows) - len(kept)
    heldout_part: list[Row] = list(heldout_rows or [])
    if heldout_rows is None and heldout:
        target = round(heldout * len(kept)) if heldout < 1 else int(heldout)
        for together in (lambda row: row.question, lambda row: row.asked, lambda row: row.where):
            if len(heldout_part) < target:
                chosen = _hold_out(kept, together, target - len(heldout_part), seed)
                heldout_part += chosen
                held = {id(row) for row in chosen}
                kept = [row for row in kept if id(row) not in held]
    done, total = 0, len(kept) + len(heldout_part)
    dropped, idle = 0, list[str]()

    def encode(side: list[Row]) -> tuple[list[Sample], list[Row]]:
        nonlocal done, dropped
        samples, rows, every = list[Sample](), list[Row](), list[Sample]()
        for row in side:
            encoded = encoder.encode(row)
            dropped += not encoded
            every += encoded
            useful = [sample for sample in encoded if sample.supervised]
            idle.extend(sample.where for sample in encoded if not sample.supervised)
            samples += useful
            rows += [row] if useful or not encoded else []
            done += 1
            if progress is not None:
                progress(done, total)
        return (samples, rows) if samples else (every, side)  # where nothing is trained, the checks fail

    train, train_rows = encode(kept)
    held_out, heldout_rows = encode(heldout_part)
    return Prepared(train, held_out, train_rows, heldout_rows, removed, dropped, idle)


def _hold_out(rows: Sequence[Row], together: Callable[[Row], str], most: int, seed: int) -> list[Row]:
    """At most `most` rows in a random order; those for which `together` is equal are taken all or not at all."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(together(row), []).append(row)
    names = sorted(groups)
    random.Random(f"split/{seed}").shuffle(names)
    chosen: list[Row] = []
    for name in names:
        if len(chosen) >= most:
            break
        if len(chosen) + len(groups[name]) <= most:  # a large group would overshoot: the next may fit
            chosen += groups[name]
    return chosen


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def inspect(prepared: Prepared, encoder: Encoder, limits: Limits = Limits()) -> Preflight:
    """All checks on all samples that will be trained, and three decoded examples."""
    train = prepared.train
    return Preflight(
        [
            *_labels(prepared, encoder),
            *_ends(train, encoder),
            *_template(encoder),
            *_marks(prepared, encoder),
            *_beginnings(train, encoder),
            *control_tokens(encoder.control.spelled, encoder.control.kept, encoder.control.where),
            *_lengths(prepared, encoder),
            *_limits(prepared, limits),
            *_split(prepared),
        ],
        sum(map(len, train)),
        sum(sample.supervised for sample in train),
        sum(bool(sample.cut) for sample in train),
        histogram([len(sample) for sample in train]),
        [decode(sample, encoder.tokenizer) for sample in _typical(train)],
    )


def _labels(prepared: Prepared, encoder: Encoder) -> Iterator[Check]:
    """There is something to learn, and no answer is empty."""
    train = prepared.train
    tokens, supervised = sum(map(len, train)), sum(sample.supervised for sample in train)
    texts = [(row.where, answer) for row in prepared.train_rows for answer in answers(row)]
    texts += [(row.where, row.text) for row in prepared.train_rows if row.text is not None]
    empty = [where for where, text in texts if not text.strip()]
    if not supervised:
        yield Check("something to learn", FAIL, "no token of this data is trained: all labels are ignored")
    elif texts and len(empty) == len(texts):
        detail = f"all {len(empty)} answers are empty: the model would learn to answer nothing"
        yield Check("something to learn", FAIL, detail)
    else:
        yield Check("something to learn", PASS, f"{_share(supervised, tokens)} tokens are trained")
    total = len(train) + len(prepared.heldout) + len(prepared.idle)
    mostly_idle = len(prepared.idle) > total / 2
    if supervised and encoder.long_prompts:
        count, (where, _) = len(encoder.long_prompts), encoder.long_prompts[0]
        detail = (
            f"{count} samples are left out, such as {where}: their prompts alone fill data.max_length={encoder.max_length}; "
            f"data.max_length={max(length for _, length in encoder.long_prompts)} would keep them whole"
        )
        yield Check("prompts too long", FAIL if mostly_idle else WARN, detail)
    without = len(prepared.idle) - len(encoder.long_prompts)
    if supervised and without:
        long = {where for where, _ in encoder.long_prompts}
        where = next((where for where in prepared.idle if where not in long), prepared.idle[0])
        detail = f"{_share(without, total)} samples have no trained token and are left out, such as {where}"
        yield Check("rows without an answer", FAIL if mostly_idle else WARN, detail)
    if empty and len(empty) < len(texts):
        yield Check("empty answers", WARN, f"{_share(len(empty), len(texts))} answers are empty, such as {empty[0]}")


def _ends(train: Sequence[Sample], encoder: Encoder) -> Iterator[Check]:
    """Answers end with an end token that is trained."""
    turns, ended = sum(sample.answers - sample.cut_ends for sample in train), sum(sample.ended for sample in train)
    if not any(sample.answers for sample in train):
        return
    names = sorted(str(encoder.tokenizer.decode([token])) for token in encoder.ends)
    if ended and ended == turns:
        whole = "answers that are not cut" if any(sample.cut_ends for sample in train) else "answers"
        yield Check("end token trained", PASS, f"all {turns} {whole} end with a trained {' or '.join(names)}")
    elif ended == 0:
        yield Check(
            "end token trained",
            FAIL,
            f"none of {sum(sample.answers for sample in train)} answers ends with a trained end-of-sequence token: the model "
            "would never stop generating. The chat template (data.template) must write the end token after an answer"
            + (", and data.max_length leave it room" if any(sample.cut_ends for sample in train) else ""),
        )
    else:
        yield Check("end token trained", WARN, f"{_share(ended, turns)} answers end with a trained end token")


def _template(encoder: Encoder) -> Iterator[Check]:
    """The template writes the text of every turn."""
    for part, rows in encoder.left_out.items():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        yield Check("text in the template", WARN, f"the chat template writes nothing of {part}: {rows[0]}{more}")


def _marks(prepared: Prepared, encoder: Encoder) -> Iterator[Check]:
    """Where the template marks what is generated, that is what is trained."""
    if encoder.loss_on != "answers":
        return
    rows = [row for row in prepared.train_rows if row.text is None and any(answers(row))][:MARKED_ROWS]
    agree = [(row.where, result) for row in rows if (result := encoder.agrees_with_marks(row)) is not None]
    wrong = [where for where, result in agree if not result]
    if wrong:
        detail = f"in {_share(len(wrong), len(agree))} rows, such as {wrong[0]}, other tokens are trained than the template marks"
        yield Check("generation marks", WARN, f"{detail} by {{% generation %}}: see the examples below")
    elif agree:
        yield Check("generation marks", PASS, f"the template's {{% generation %}} marks the same tokens in {len(agree)} rows")


def _beginnings(train: Sequence[Sample], encoder: Encoder) -> Iterator[Check]:
    """There is one BOS, and no token across a prompt and its answer."""
    if encoder.adds_bos:
        counts = [sample.bos for sample in train]
        wrong = sum(count != 1 for count in counts)
        detail = f"{_share(wrong, len(train))} samples begin with {max(counts)} BOS tokens instead of one: fix the template"
        yield (
            Check("one BOS", FAIL, detail) if wrong else Check("one BOS", PASS, "every sample begins with exactly one BOS token")
        )
    merged = sum(sample.merged for sample in train)
    if merged:
        detail = f"in {merged} answers the first token also holds the end of the prompt"
        yield Check("prompt and answer apart", WARN, detail)


def control_tokens(spelled: Counter[str], kept: Counter[str], where: Mapping[str, str] = {}) -> Iterator[Check]:
    """Names of control tokens in the texts, with their counts: those encoded as text, and those that keep their ids."""

    def listed(counter: Counter[str]) -> str:
        first = next((f", such as {where[name]}" for name in counter if name in where), "")
        return ", ".join(f"{name} ({count})" for name, count in counter.most_common(8)) + first

    if spelled:
        yield Check("control tokens in text", WARN, f"these names in the texts are encoded as text: {listed(spelled)}")
    if kept:
        yield Check("tokens in text", PASS, f"these names in the texts are encoded as tokens: {listed(kept)}")


def _lengths(prepared: Prepared, encoder: Encoder) -> Iterator[Check]:
    """What data.max_length cuts or drops."""
    truncated = [sample for sample in prepared.train if sample.cut]
    if prepared.dropped:
        detail = f"{prepared.dropped} rows are longer than data.max_length={encoder.max_length} and were dropped"
        yield Check("too long", WARN, detail)
    if truncated:
        cut, cut_supervised = sum(s.cut for s in truncated), sum(s.cut_supervised for s in truncated)
        ends = sum(s.cut_ends for s in truncated)
        yield Check(
            "truncation",
            WARN,
            f"{_share(len(truncated), len(prepared.train))} samples are cut at {encoder.max_length} tokens: {cut} tokens lost, "
            f"{cut_supervised} of them trained, {ends} end tokens. A cut answer teaches the model not to stop: raise "
            "data.max_length, or set data.truncation=drop",
        )
    elif not prepared.dropped:
        yield Check("truncation", PASS, f"no sample is longer than data.max_length={encoder.max_length}")


def _limits(prepared: Prepared, limits: Limits) -> Iterator[Check]:
    """The model's limits; beyond them a GPU fails with "device-side assert"."""
    everything = [*prepared.train, *prepared.heldout]
    longest = max(map(len, everything), default=0)
    highest = max((max(sample.input_ids) for sample in everything if len(sample)), default=0)
    if limits.positions is not None and longest > limits.positions:
        detail = f"samples have up to {longest} tokens, the model has {limits.positions} positions: lower data.max_length"
        yield Check("the model's length", FAIL, detail)
    if limits.vocabulary is not None and highest >= limits.vocabulary:
        detail = (
            f"the tokenizer gives token id {highest}, the model has {limits.vocabulary} embeddings: they do not belong together"
        )
        yield Check("the model's vocabulary", FAIL, detail)


def _split(prepared: Prepared) -> Iterator[Check]:
    """Duplicates were removed, and train and held-out rows are apart."""
    if prepared.duplicates_removed:
        detail = f"{prepared.duplicates_removed} rows are duplicates of an earlier one and were removed"
        yield Check("duplicates", WARN, detail)
    if not prepared.heldout:
        return
    trained, questions = {row.key for row in prepared.train_rows}, {row.asked for row in prepared.train_rows}
    count = len(prepared.heldout_rows)
    both = sum(row.key in trained for row in prepared.heldout_rows)
    asked = sum(row.asked in questions for row in prepared.heldout_rows)
    name = "train and held-out apart"
    if both:
        yield Check(name, FAIL, f"{_share(both, count)} held-out rows are in the training data too: their loss is too low")
    elif asked:
        yield Check(name, WARN, f"{_share(asked, count)} held-out questions are in the training data too")
    else:
        yield Check(name, PASS, f"{len(prepared.train_rows)} training rows, {count} held out")
    if not sum(sample.supervised for sample in prepared.heldout):
        yield Check("held-out rows measure something", FAIL, "no token of the held-out rows belongs to an answer")


def _typical(samples: Sequence[Sample]) -> list[Sample]:
    """A short, a medium and a long sample with trained tokens."""
    candidates = sorted((s for s in samples if s.supervised), key=len) or list(samples)
    return [candidates[round(q * (len(candidates) - 1))] for q in (0.1, 0.5, 0.9)] if candidates else []


def decode(sample: Sample, tokenizer: PreTrainedTokenizerBase, most: int = 400) -> list[dict[str, Any]]:
    """A sample as pieces of text, each trained or not: [{"text", "supervised"}, …], of at most `most` tokens."""
    pieces: list[dict[str, Any]] = []
    start = 0
    ids, flags = sample.input_ids[:most], [label != IGNORE for label in sample.labels[:most]]
    for i in range(1, len(ids) + 1):
        if i == len(ids) or flags[i] != flags[start]:
            pieces.append({"text": tokenizer.decode(list(ids[start:i])), "supervised": flags[start]})
            start = i
    return pieces


def histogram(lengths: Sequence[int], bins: int = 24) -> dict[str, list[int]]:
    """Counts of sample lengths (tokens) in equal bins: {"edges": bins + 1, "counts": bins}."""
    if not lengths:
        return {"edges": [], "counts": []}
    low, high = min(lengths), max(lengths) + 1
    bins = min(bins, high - low)
    edges = [low + (high - low) * i // bins for i in range(bins + 1)]
    counts = [0] * bins
    for length in lengths:
        counts[max(i for i in range(bins) if edges[i] <= length)] += 1
    return {"edges": edges, "counts": counts}
