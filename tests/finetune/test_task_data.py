"""Training data of plain text: token ids are Python ints, and counts of skipped rows are current."""

from __future__ import annotations

import itertools
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


def with_bos(tokenizer: Any, bos: str = "<bos>") -> Any:
    """A copy that begins texts with a BOS token."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([bos])
    backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token, bos_token=bos)


def beginnings(data: Text) -> Any:
    return next(check for check in data.preflight.checks if check.name == "beginning and end of documents")


@pytest.mark.parametrize("separate", [False, True])
def test_documents_begin_with_the_bos_token_that_the_tokenizer_adds(tmp_path: Path, tokenizer: Any, separate: bool) -> None:
    own = with_bos(tokenizer)
    bos, end = own.bos_token_id, own.eos_token_id
    data = text_data(tmp_path, own, **({"heldout_path": str(tmp_path / "b.jsonl")} if separate else {"heldout": 4}))
    rows = [ids for ids, _ in [*data.first_rows(64), *data.held_out()]]
    followers = {row[at + 1] for row in rows for at, token in enumerate(row[:-1]) if token == end}
    before = {row[at - 1] for row in rows for at, token in enumerate(row) if token == bos and at}
    assert followers == {bos}
    assert before == {end}
    assert "begin with <bos> and end with <|endoftext|>" in beginnings(data).detail
    for question in data.questions():
        assert not question.prompt.startswith("<bos>"), "generation adds it"


def test_bos_none_leaves_documents_without_one_and_warns(tmp_path: Path, tokenizer: Any) -> None:
    own = with_bos(tokenizer)
    data = text_data(tmp_path, own, heldout=4, bos="none")
    assert not any(own.bos_token_id in ids for ids, _ in [*data.first_rows(64), *data.held_out()])
    assert (beginnings(data).status, "set data.bos=auto" in beginnings(data).detail) == ("warn", True)


def test_a_bos_token_that_is_the_end_token_stands_once_between_documents(tmp_path: Path, tokenizer: Any) -> None:
    own = with_bos(tokenizer, tokenizer.eos_token)
    for ids, _ in text_data(tmp_path, own, heldout=0).first_rows(64):
        assert all(pair != (own.eos_token_id, own.eos_token_id) for pair in itertools.pairwise(ids))


def test_names_of_control_tokens_in_documents_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    lines = [line + " The end is <|endoftext|> here." for line in LINES[:40]]
    path = tmp_path / "c.jsonl"
    write(path, lines)
    data = text_data(tmp_path, tokenizer, path=str(path), heldout=0)
    (check,) = (check for check in data.preflight.checks if check.name == "control tokens in text")
    assert check.status == "warn"
    assert "<|endoftext|> (" in check.detail


def test_older_runs_keep_documents_without_bos() -> None:
    from finetune.recipe.translate import translate

    assert translate({"kind": "pretrain", "data": {"path": "x"}})["data"]["bos"] == "none"
    assert translate({"kind": "pretrain", "data": {"path": "x", "bos": "auto"}})["data"]["bos"] == "auto"
    assert "bos" not in translate({"kind": "sft", "data": {"path": "x"}})["data"]
