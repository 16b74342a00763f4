"""Training data of plain text: token ids are Python ints, and counts of skipped rows are current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.preflight import Limits
from finetune.data.tokenizer import train_tokenizer
from finetune.recipe import Recipe
from finetune.task_data import Text, open_stream

LINES = [f"The {word} fox jumps over {n} lazy dogs and {n * 7} hens." for n in range(300) for word in ("quick", "old")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(LINES, 300)


def write(path: Path, lines: list[str], bad_at: int | None = None) -> None:
    rows = [json.dumps({"text": line}) for line in lines]
    if bad_at is not None:
        rows.insert(bad_at, json.dumps({"words": "none"}))
    path.write_text("\n".join(rows) + "\n")


def text_data(tmp_path: Path, tokenizer: Any, bad_at: int | None = None, **data: Any) -> Text:
    write(tmp_path / "a.jsonl", LINES, bad_at)
    write(tmp_path / "b.jsonl", [f"Other words, {n}." for n in range(80)])
    recipe = Recipe.model_validate(
        {
            "kind": "pretrain",
            "model": {"name": "x"},
            "adapter": {"kind": "none"},
            "data": {"path": str(tmp_path / "a.jsonl"), "max_length": 16} | data,
            "train": {"max_steps": 3},
        }
    )
    return Text(recipe, tokenizer, open_stream(recipe), Limits(None, None))


@pytest.mark.parametrize("separate", [False, True])
def test_rows_are_lists_of_python_ints(tmp_path: Path, tokenizer: Any, separate: bool) -> None:
    heldout = {"heldout_path": str(tmp_path / "b.jsonl")} if separate else {"heldout": 0}
    data = text_data(tmp_path, tokenizer, **heldout)
    rows = [*data.first_rows(5), *data.held_out()]
    assert len(data.held_out()) > 0 or not separate
    for ids, labels in rows:
        assert {type(number) for number in [*ids, *labels]} == {int}
        assert torch.tensor([ids]).dtype == torch.int64
        torch.nn.functional.cross_entropy(torch.zeros(16, 300), torch.tensor(ids))
        json.dumps([ids, labels])
    assert type(data.highest_id()) is int


def test_skipped_rows_are_counted_when_the_record_is_made(tmp_path: Path, tokenizer: Any) -> None:
    """The stream is read during training, so the count at the end is higher than the one before."""
    data = text_data(tmp_path, tokenizer, bad_at=len(LINES) - 2, heldout=2, bad_rows="skip")
    data.corpus.source.bad = 0  # as in a long file, whose later blocks have not been read
    at_first = data.record().rows_skipped
    data.corpus.source._furthest = (-1, -1)
    list(data.corpus.rows(0))
    assert (at_first, data.record().rows_skipped) == (0, 1)
    assert data.record().revision is None
