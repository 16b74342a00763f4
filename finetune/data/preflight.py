"""The preflight: checks tokens and labels of the user's own data before any weight is loaded.

It checks what goes wrong most often and is noticed last: whether every answer ends with a trained token, whether there is one
BOS, how many tokens are trained, how many truncation removes, whether train and held-out overlap. A check fails if training
cannot work, and warns if a part of the data does not teach what it seems to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.data.rows import Row, answers
from finetune.data.samples import IGNORE, Encoder, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    Rows with the same question stay on one side of the split, so a held-out question was never trained. `heldout` is a
    number of rows, or a share below 1; `heldout_rows` replaces the split.
    """
    import random

    kept: list[Row] = list({row.key: row for row in reversed(rows)}.values())[::-1] if dedupe else list(rows)
    removed = len(rows) - len(kept)
    heldout_part: list[Row] = list(heldout_rows or [])
    if heldout_rows is None and heldout:
        target = round(heldout * len(kept)) if heldout < 1 else int(heldout)
        groups: dict[str, list[Row]] = {}
        for row in kept:
            groups.setdefault(row.question, []).append(row)
        names = sorted(groups)
        random.Random(f"split/{seed}").shuffle(names)
        chosen: set[str] = set()
        for name in names:
            if len(heldout_part) >= target:
                break
            if len(heldout_part) + len(groups[name]) <= target:  # a large group would overshoot: the next may fit
                chosen.add(name)
                heldout_part += groups[name]
        kept = [row for row in kept if row.question not in chosen]
    done, total = 0, len(kept) + len(heldout_part)
    dropped = 0

    def encode(side: list[Row]) -> list[Sample]:
        nonlocal done, dropped
        samples: list[Sample] = []
        for row in side:
            encoded = encoder.encode(row)
            dropped += not encoded
            samples += encoded
            done += 1
            if progress is not None:
                progress(done, total)
        return samples

    return Prepared(encode(kept), encode(heldout_part), kept, heldout_part, removed, dropped)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def inspect(prepared: Prepared, encoder: Encoder, limits: Limits = Limits()) -> Preflight:
    """All checks on all samples that will be trained, and three decoded examples."""
    train = prepared.train
    tokens, supervised = sum(map(len, train)), sum(sample.supervised for sample in train)
    checks: list[Check] = []

    def check(name: str, status: str, detail: str) -> None:
        checks.append(Check(name, status, detail))

    # Something to learn.
    without = [sample for sample in train if not sample.supervised]
    share = f"{_share(supervised, tokens)} tokens are trained"
    texts = [answer for row in prepared.train_rows for answer in answers(row)] + [
        row.text for row in prepared.train_rows if row.text is not None
    ]
    empty = sum(not text.strip() for text in texts)
    if not supervised:
        check("something to learn", FAIL, "no token of this data is trained: all labels are ignored")
    elif texts and empty == len(texts):
        check("something to learn", FAIL, f"all {empty} answers are empty: the model would learn to answer nothing")
    else:
        check("something to learn", PASS, share)
    if supervised and without:
        check(
            "rows without an answer",
            WARN,
            f"{_share(len(without), len(train))} samples have no trained token, such as {without[0].where}",
        )
    if empty and empty < len(texts):
        first = next(
            r.where for r in prepared.train_rows if any(not a.strip() for a in (*answers(r), *([r.text] if r.text else [])))
        )
        check("empty answers", WARN, f"{_share(empty, len(texts))} answers are empty, such as {first}")

    # The end of an answer.
    turns, ended = sum(sample.answers for sample in train), sum(sample.ended for sample in train)
    if turns:
        names = sorted(str(encoder.tokenizer.decode([token])) for token in encoder.ends)
        if ended == turns:
            check("end token trained", PASS, f"all {turns} answers end with a trained {' or '.join(names)}")
        elif ended == 0:
            check(
                "end token trained",
                FAIL,
                f"none of {turns} answers ends with an end-of-sequence token: the model would never stop generating. "
                "The chat template (data.template) must write the end token after an answer",
            )
        else:
            check("end token trained", WARN, f"{_share(ended, turns)} answers end with a trained end token")

    # The beginning.
    if encoder.adds_bos:
        counts = [sample.bos for sample in train]
        wrong = sum(count != 1 for count in counts)
        if wrong:
            check(
                "one BOS",
                FAIL,
                f"{_share(wrong, len(train))} samples begin with {max(counts)} BOS tokens instead of one: fix the template",
            )
        else:
            check("one BOS", PASS, "every sample begins with exactly one BOS token")
    merged = sum(sample.merged for sample in train)
    if merged:
        check("prompt and answer apart", WARN, f"in {merged} answers the first token also holds the end of the prompt")

    # Length.
    truncated = [sample for sample in train if sample.cut]
    if prepared.dropped:
        check(
            "too long",
            WARN,
            f"{prepared.dropped} rows are longer than data.max_length={encoder.max_length} and were dropped",
        )
    if truncated:
        cut, cut_supervised = sum(s.cut for s in truncated), sum(s.cut_supervised for s in truncated)
        ends = sum(s.cut_ends for s in truncated)
        check(
            "truncation",
            WARN,
            f"{_share(len(truncated), len(train))} samples are cut at {encoder.max_length} tokens: {cut} tokens lost, "
            f"{cut_supervised} of them trained, {ends} end tokens. A cut answer teaches the model not to stop: raise "
            "data.max_length, or set data.truncation=drop",
        )
    elif not prepared.dropped:
        check("truncation", PASS, f"no sample is longer than data.max_length={encoder.max_length}")

    # The model's limits; beyond them a GPU fails with "device-side assert".
    everything = [*train, *prepared.heldout]
    longest = max(map(len, everything), default=0)
    highest = max((max(sample.input_ids) for sample in everything if len(sample)), default=0)
    if limits.positions is not None and longest > limits.positions:
        check(
            "the model's length",
            FAIL,
            f"samples have up to {longest} tokens, the model has {limits.positions} positions: lower data.max_length",
        )
    if limits.vocabulary is not None and highest >= limits.vocabulary:
        check(
            "the model's vocabulary",
            FAIL,
            f"the tokenizer gives token id {highest}, the model has {limits.vocabulary} embeddings: they do not belong together",
        )

    # The split.
    if prepared.duplicates_removed:
        check("duplicates", WARN, f"{prepared.duplicates_removed} rows are duplicates of an earlier one and were removed")
    if prepared.heldout:
        trained = {row.key for row in prepared.train_rows}
        both = sum(row.key in trained for row in prepared.heldout_rows)
        questions = {row.question for row in prepared.train_rows}
        asked = sum(row.question in questions for row in prepared.heldout_rows)
        if both:
            check(
                "train and held-out apart",
                FAIL,
                f"{_share(both, len(prepared.heldout_rows))} held-out rows are in the training data too: their loss is too low",
            )
        elif asked:
            check(
                "train and held-out apart",
                WARN,
                f"{_share(asked, len(prepared.heldout_rows))} held-out questions are in the training data too",
            )
        else:
            check(
                "train and held-out apart",
                PASS,
                f"{len(prepared.train_rows)} training rows, {len(prepared.heldout_rows)} held out",
            )
        if not sum(sample.supervised for sample in prepared.heldout):
            check("held-out rows measure something", FAIL, "no token of the held-out rows belongs to an answer")

    return Preflight(
        checks,
        tokens,
        supervised,
        len(truncated),
        histogram([len(s) for s in train]),
        [decode(s, encoder.tokenizer) for s in _typical(train)],
    )


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
