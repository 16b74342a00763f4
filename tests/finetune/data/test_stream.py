"""Streamed text: rows equal a naive reference, a cursor resumes at the same row, and errors name file and line."""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.data import stream
from finetune.data.stream import Corpus, Cursor, Document, Source, open_source
from finetune.errors import UserError

LENGTH, EOS = 32, 1
KINDS = ["jsonl", "txt", "parquet", "folder", "package", "hub_jsonl", "hub_parquet", "hub_txt"]


def encode(texts: list[str]) -> list[list[int]]:
    """Each character is a token. Token 1 is EOS."""
    return [[ord(character) + 2 for character in text] for text in texts]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"d{seed}-{n} " + "".join(rng.choices("abcé \n", k=rng.randrange(5, 120))) + "." for n in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def write_parquet(path: Path, documents: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": list(range(len(documents))), "text": documents})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def write_text(path: Path, documents: list[str]) -> None:
    path.write_text("\n\n".join(documents), encoding="utf-8")


def write_once(write: Any, path: Path, documents: list[str]) -> None:
    """Write a file only if it does not exist, because `datasets` takes the modification time as its version."""
    if not path.exists():
        write(path, documents)


@pytest.fixture
def make_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make_source(kind) opens a new source of that kind: the same 400 or so documents each time, in blocks of about 4 kB."""
    monkeypatch.setattr(stream, "PIECE", 100)
    monkeypatch.setattr(stream, "LONG_PIECE", 400)

    def open_kind(kind: str, **changes: Any) -> Source:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {"path": str(folder)}
        if kind in ("jsonl", "txt", "parquet"):
            write = {"jsonl": write_jsonl, "txt": write_text, "parquet": write_parquet}[kind]
            write_once(write, folder / f"a.{kind}", texts(400))
            settings = {"path": str(folder / f"a.{kind}")}
        elif kind == "folder":
            (folder / "b").mkdir(exist_ok=True)
            write_once(write_jsonl, folder / "c.jsonl", texts(150, 1))
            write_once(write_text, folder / "b" / "a.txt", texts(120, 2))
            write_once(write_parquet, folder / "a.parquet", texts(130, 3))
            (folder / "empty.txt").write_text("\n\n")
            (folder / "notes.md").write_text("not read")
        elif kind == "package":
            info = folder / "someplays-1.0.dist-info"
            info.mkdir(exist_ok=True)
            (folder / "plays").mkdir(exist_ok=True)
            write_once(write_text, folder / "plays" / "a_new.txt", texts(200, 4))
            write_once(write_text, folder / "plays" / "b_new.txt", texts(200, 5))
            write_once(write_text, folder / "plays" / "a_old.txt", texts(200, 6))
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someplays\nVersion: 1.0\n")
            files = ["plays/a_new.txt", "plays/b_new.txt", "plays/a_old.txt", "someplays-1.0.dist-info/METADATA"]
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
            if str(folder) not in sys.path:
                monkeypatch.syspath_prepend(str(folder))
            settings = {"name": "package:someplays", "files": ["plays/*_new.txt"]}
        else:  # a folder stands in for a hub dataset
            ending = kind.removeprefix("hub_")
            write = {"jsonl": write_jsonl, "txt": write_text, "parquet": write_parquet}[ending]
            for number in range(3):
                write_once(write, folder / f"{number}.{ending}", texts(130, number))
            settings = {"name": str(folder), "files": [f"*.{ending}"]}
        return open_source(**({"block_bytes": 4000} | settings | changes))

    return open_kind


def corpus(source: Source, *, seed: int = 0, heldout: int = 4, length: int = LENGTH) -> Corpus:
    return Corpus(source, encode, length=length, end=EOS, seed=seed, heldout_rows=heldout)


def reference_rows(source: Source, heldout: set[str], *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of an epoch, computed in the simplest way."""
    rows = []
    for number, block in enumerate(source.blocks()):
        rng = random.Random(f"{seed}/{epoch}/{number}")
        documents = [document.text for document in block.documents if document.text not in heldout]
        rng.shuffle(documents)
        tokens = [token for text in documents for token in (*(ord(character) + 2 for character in text), EOS)]
        sequences = [tokens[at : at + LENGTH] for at in range(0, len(tokens) - LENGTH + 1, LENGTH)]
        order = list(range(len(sequences)))
        rng.shuffle(order)
        rows += [sequences[at] for at in order]
    return rows


def position(row: Any) -> Any:
    """The location and cursor of a row, without the block's state, which the hub may give in two forms."""
    return row.where, {key: value for key, value in row.after.items() if key != "block"}


def ids(rows: Any) -> list[list[int]]:
    return [row.ids.tolist() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_reference_and_resume_from_any_cursor(make_source: Any, kind: str) -> None:
    source = make_source(kind)
    blocks = list(source.blocks())
    assert len(blocks) > 3
    documents = [document for block in blocks for document in block.documents]
    stream_corpus = corpus(source)
    rows = list(stream_corpus.rows(1))
    assert ids(rows) == reference_rows(make_source(kind), stream_corpus._held, seed=0, epoch=1)
    assert {len(row.ids) for row in rows} == {LENGTH}
    assert rows[0].ids.dtype == "int32"
    assert all(row.where in {document.where for document in documents} for row in rows)
    # Blocks: reading from the cursor of a block gives that block and all that follow.
    for at in range(len(blocks)):
        cursor = json.loads(json.dumps(blocks[at].cursor))
        assert next(make_source(kind).blocks(cursor)).documents == blocks[at].documents
    assert [b.documents for b in make_source(kind).blocks(blocks[2].cursor)] == [b.documents for b in blocks[2:]]
    # Rows: resume at both sides of block borders and at random positions, then once more from the resumed stream.
    borders = [at for at in range(1, len(rows)) if rows[at].after["number"] != rows[at - 1].after["number"]]
    assert len(borders) == len(blocks) - 1
    random_positions = random.Random(kind).sample(range(len(rows)), 6)
    for at in {*borders[:3], *(border - 1 for border in borders[:3]), *random_positions, len(rows) - 1}:
        cursor = json.loads(json.dumps(rows[at].after))
        fresh = corpus(make_source(kind))
        rest = list(fresh.rows(1, cursor))
        assert ids(rest) == ids(rows[at + 1 :])
        assert [position(row) for row in rest] == [position(row) for row in rows[at + 1 :]]
        if len(rest) > 50:
            later_cursor = json.loads(json.dumps(rest[40].after))
            assert ids(corpus(make_source(kind)).rows(1, later_cursor)) == ids(rest[41:])


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_come_from_documents_that_no_epoch_trains(make_source: Any, kind: str) -> None:
    first, second = corpus(make_source(kind)), corpus(make_source(kind))
    assert first.heldout == second.heldout
    assert [len(row) for row in first.heldout] == [LENGTH] * 4
    documents = list(next(make_source(kind).blocks()).documents)
    random.Random("split/0").shuffle(documents)
    heldout, tokens = [], []
    for document in documents:
        if len(tokens) < 4 * LENGTH:
            heldout.append(document.text)
            tokens += [*encode([document.text])[0], EOS]
    assert [token for row in first.heldout for token in row] == tokens[: 4 * LENGTH]
    assert 0 < len(heldout) < len(documents)
    for epoch in range(2):
        assert ids(first.rows(epoch)) == reference_rows(make_source(kind), set(heldout), seed=0, epoch=epoch)


def test_duplicates_of_held_out_documents_are_not_trained(tmp_path: Path) -> None:
    repeated = texts(100)
    write_jsonl(tmp_path / "a.jsonl", [*repeated, *texts(100, 7), *repeated])
    duplicated = corpus(open_source(path=str(tmp_path / "a.jsonl"), block_bytes=4000))
    assert duplicated.heldout
    list(duplicated.rows(0))
    assert duplicated.read["documents"] == 300 - 2 * len(duplicated._held)


def test_row_names_the_document_in_which_it_starts(tmp_path: Path) -> None:
    documents = [f"{n:02d}" + "x" * (LENGTH - 3) for n in range(20)]  # each fills one row with its EOS
    write_jsonl(tmp_path / "a.jsonl", documents)
    rows = list(corpus(open_source(path=str(tmp_path / "a.jsonl")), heldout=2).rows(0))
    assert len(rows) == 18
    for row in rows:
        assert row.where == f"a.jsonl:{int(''.join(chr(token - 2) for token in row.ids[:2])) + 1}"


def test_seeds_and_epochs_give_other_orders_of_the_same_tokens(make_source: Any) -> None:
    first_seed = corpus(make_source("jsonl"), heldout=0)
    assert first_seed.heldout == []
    epoch_0, epoch_1, epoch_0_again = ids(first_seed.rows(0)), ids(first_seed.rows(1)), ids(first_seed.rows(0))
    other_seed = corpus(make_source("jsonl"), seed=1, heldout=0)
    assert epoch_0 == epoch_0_again
    assert epoch_0 != epoch_1
    assert epoch_0 != ids(other_seed.rows(0))
    assert corpus(make_source("jsonl")).heldout != corpus(make_source("jsonl"), seed=1).heldout
    dropped = first_seed.read["dropped"]
    assert first_seed.read["tokens"] == 3 * sum(len(text) + 1 for text in texts(400))
    assert first_seed.read["documents"] == 1200
    assert first_seed.read["characters"] == 3 * sum(map(len, texts(400)))
    assert dropped == first_seed.read["tokens"] - LENGTH * (len(epoch_0) + len(epoch_1) + len(epoch_0_again))


def test_real_text_is_split_into_pieces_at_line_ends(shared: Path) -> None:
    source = open_source(path=str(shared / "data" / "tinyshakespeare.txt"), block_bytes=200_000)
    blocks = list(source.blocks())
    text = "".join(d.text for block in blocks for d in block.documents)
    original = (shared / "data" / "tinyshakespeare.txt").read_text()
    assert text.replace("\n", "") == original.replace("\n", "")
    lengths = [len(d.text) for block in blocks for d in block.documents]
    assert min(lengths[:-1]) > 0.9 * stream.PIECE
    assert max(lengths) < 2 * stream.PIECE
    lines = original.split("\n")
    for document in blocks[2].documents:
        assert lines[int(document.where.split(":")[1]) - 1] == document.text.split("\n")[0]


def test_text_pieces_end_at_blank_lines_and_have_a_maximum_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 20)
    monkeypatch.setattr(stream, "LONG_PIECE", 60)
    monkeypatch.setattr(stream, "LONG_LINE", 16)
    path = tmp_path / "a.txt"

    def pieces(text: str) -> list[tuple[str, str]]:
        path.write_bytes(text.encode())
        return [(d.where, d.text) for block in open_source(path=str(path)).blocks() for d in block.documents]

    lines = "\ufeff\r\n  one\r\ntwo\r\n\r\nthree four five six\r\n\r\n\r\nseven\r\n"
    assert pieces(lines) == [("a.txt:2", "  one\ntwo\n\nthree four five six"), ("a.txt:8", "seven")]
    unbroken = "".join(f"line {n}\n" for n in range(40))
    actual = pieces(unbroken)
    assert "".join(text + "\n" for _, text in actual) == unbroken
    assert max(len(text) for _, text in actual) <= 76
    for text in ("é😀" * 200, "word " * 100, "x" * 300):  # a single line
        actual = pieces(text)
        assert "".join(piece for _, piece in actual) == text
        assert len(actual) > 3


class SlowSource(Source):
    """A source that pauses before each document, and raises `error` after the last one if given."""

    def __init__(self, error: BaseException | None = None, pause: float = 0.0) -> None:
        super().__init__("slow", "0", text_key="text", skip_bad=False, block_bytes=600)
        self.error, self.pause, self.yielded, self.closed = error, pause, 0, 0

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, Any]]:
        try:
            for number, text in enumerate(texts(200)):
                time.sleep(self.pause)
                self.yielded = number
                yield Document(f"slow:{number}", text), lambda number=number: {"n": number}
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_blocks_are_prefetched_and_no_thread_stays_alive() -> None:
    source = SlowSource()
    slow_corpus = corpus(source, heldout=0)
    rows = slow_corpus.rows(0)
    assert background_threads() == []
    next(rows)
    in_three_blocks = sum(len(block.documents) for block in itertools.islice(SlowSource().blocks(), 3))
    deadline = time.monotonic() + 5
    while source.yielded < in_three_blocks - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert source.yielded == in_three_blocks - 1, "not exactly the block in use and two more were read"
    assert len(background_threads()) == 1
    rows.close()
    assert background_threads() == []
    assert source.closed == 2  # the iterators of the held-out rows and of these rows
    abandoned = slow_corpus.rows(0)
    next(abandoned)
    del abandoned
    gc.collect()
    assert background_threads() == []
    list(slow_corpus.rows(0))
    assert background_threads() == []


@pytest.mark.alone
def test_closing_does_not_wait_for_a_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 50)
    source = SlowSource()
    source.block_bytes = 3000
    first = len(next(source.blocks()).documents)
    encoded: list[str] = []

    def encode_slowly(batch: list[str]) -> list[list[int]]:
        if len(encoded) > first:
            time.sleep(0.2)
        encoded.extend(batch)
        return encode(batch)

    slow_corpus = Corpus(source, encode_slowly, length=LENGTH, end=EOS, seed=0, heldout_rows=0)
    encoded.clear()
    rows = slow_corpus.rows(0)
    next(rows)  # the first block is fast, the others take some seconds each
    deadline = time.monotonic() + 5
    while len(encoded) <= first and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    rows.close()
    assert time.monotonic() - started < 1
    assert background_threads() == []
    assert len(encoded) < first + 10


def test_order_does_not_depend_on_timing() -> None:
    assert ids(corpus(SlowSource()).rows(0)) == ids(corpus(SlowSource(pause=0.002)).rows(0))
    rows = []
    for row in corpus(SlowSource()).rows(0):
        rows.append(row.ids.tolist())
        if len(rows) % 50 == 0:
            time.sleep(0.02)
    assert rows == ids(corpus(SlowSource()).rows(0))


def test_error_in_the_prefetch_thread_is_raised_at_its_row() -> None:
    error = UserError("broken", where="slow:200")
    failing_corpus = corpus(SlowSource(error))
    count = len(list(corpus(SlowSource()).rows(0)))
    rows = failing_corpus.rows(0)
    received: list[Any] = []
    with pytest.raises(UserError) as caught:
        received.extend(row for row in rows)
    assert caught.value is error
    assert count - 40 <= len(received) <= count  # the incomplete last block is missing
    assert background_threads() == []


def test_cursor_of_changed_data_or_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, texts(200))
    source = open_source(path=str(path), block_bytes=4000)
    rows = list(corpus(source).rows(0))
    cursor = rows[len(rows) // 2].after
    for changes in ({"seed": 1}, {"length": 16}):
        with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
            next(corpus(open_source(path=str(path), block_bytes=4000), **changes).rows(0, cursor))
    with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
        next(corpus(source).rows(1, cursor))
    digest = source.digest
    assert open_source(path=str(path)).digest == digest
    write_jsonl(path, texts(60))
    shorter = open_source(path=str(path), block_bytes=4000)
    assert shorter.digest != digest
    with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
        next(corpus(shorter).rows(0, rows[-1].after))


def test_digests_depend_on_names_and_contents(make_source: Any, tmp_path: Path) -> None:
    assert len({make_source(kind).digest for kind in KINDS}) == len(KINDS)
    assert [make_source(kind).digest for kind in KINDS] == [make_source(kind).digest for kind in KINDS]
    assert make_source("package", files=["*"]).digest != make_source("package").digest


def read(path: Path, **settings: Any) -> tuple[Source, list[Document]]:
    source = open_source(path=str(path), **settings)
    return source, [document for block in source.blocks() for document in block.documents]


BROKEN = [
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": "x"\n', ["a.jsonl:3", "not JSON", "bad_rows=skip"]),
    ("a.jsonl", b'{"text": "fine"}\n{"txet": "x"}\n', ["a.jsonl:2", 'no key "text"', "data.text_key=txet"]),
    ("a.jsonl", b'{"text": "fine"}\n{"id": 1, "url": "u", "content": "long"}\n', ["a.jsonl:2", "data.text_key=content"]),
    ("a.jsonl", b'{"text": "fine"}\n{"text": ["x"]}\n', ["a.jsonl:2", "list"]),
    ("a.jsonl", b'{"text": "fine"}\n17\n', ["a.jsonl:2", "int: '17'"]),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "\\ud800"}\n', ["a.jsonl:2", "surrogate"]),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', ["a.jsonl:2", "byte 0xff", "UTF-8"]),
    ("a.jsonl", b'{"text": "fine"}\n' + b"[" * 200_000 + b"\n", ["a.jsonl:2"]),
    ("a.txt", b"fine\n\nb\xe9d\n", ["a.txt:3", "byte 0xe9 at column 2", "iconv"]),
]


@pytest.mark.parametrize(("name", "content", "messages"), BROKEN)
def test_bad_rows_are_errors_with_their_line_or_skipped_and_counted(
    tmp_path: Path, name: str, content: bytes, messages: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(message in str(caught.value) for message in messages)
    source, documents = read(path, skip_bad=True)
    assert [document.text for document in documents] == ["fine"]
    list(source.blocks())  # a second pass does not count them again
    assert source.bad == 1
    assert source.skipped[0].startswith(messages[0])


def test_consecutive_bad_lines_are_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text"\n{"text": "\xff"}\n{}\n{"text"\n{"text": 1}\n\xff\n{"text": "  "}\n')
    source, documents = read(path, skip_bad=True)
    assert [document.where for document in documents] == ["a.jsonl:1"]
    assert source.bad == 6
    assert len(source.skipped) == 5


def test_jsonl_accepts_strings_crlf_bom_and_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ["a\u2028b\x85c", {"text": "x\r\ny"}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert [(d.where, d.text) for d in read(path)[1]] == [("a.jsonl:1", "a\u2028b\x85c"), ("a.jsonl:2", "x\ny")]


def test_parquet_errors_for_wrong_columns_nulls_and_damage(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"content": ["one", None, "three"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    with pytest.raises(UserError, match=r"data\.text_key=content"):
        read(path)
    with pytest.raises(UserError, match=r"a\.parquet\[1\]"):
        read(path, text_key="content")
    source, documents = read(path, text_key="content", skip_bad=True)
    assert [(d.where, d.text) for d in documents] == [("a.parquet[0]", "one"), ("a.parquet[2]", "three")]
    assert source.bad == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read the parquet file"):
        read(path, text_key="content")


def test_wrong_text_key_is_an_error_even_when_bad_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    monkeypatch.setattr(stream, "HOPELESS", 50)
    with pytest.raises(UserError, match="first 50 rows have no text") as caught:
        read(tmp_path / "a.jsonl", text_key="txt", skip_bad=True)
    assert "data.text_key=text" in str(caught.value)


def test_sources_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", texts(3))
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "none").mkdir()
    for settings, message in [
        ({"path": str(tmp_path / "rwos.jsonl")}, "did you mean"),
        ({"path": str(tmp_path / "a.csv")}, "cannot be streamed"),
        ({"path": str(tmp_path / "none")}, "holds no .txt"),
        ({"path": str(tmp_path), "files": ["*.txt"]}, r"it has: rows\.jsonl"),
        ({"name": "package:no-such-package"}, "not installed"),
        ({"name": "nobody/no-such-dataset"}, r"data\.name"),
        ({}, "the recipe has no data"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(**settings)
    source = open_source(path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read"):
        list(source.blocks())


def test_too_little_text_is_refused_with_a_setting_that_works(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no text"):
        corpus(open_source(path=str(path)))
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"1 skipped, such as a\.jsonl:1"):
        corpus(open_source(path=str(path), skip_bad=True))
    write_jsonl(path, texts(10))
    total = sum(len(text) + 1 for text in texts(10))
    with pytest.raises(UserError, match=f"has {total:,} tokens in 10 documents") as caught:
        corpus(open_source(path=str(path)), heldout=total // LENGTH)
    possible = int(str(caught.value).split("data.heldout=")[1].split(",")[0].split(" ")[0])
    assert len(corpus(open_source(path=str(path)), heldout=possible).heldout) == possible > 0
    with pytest.raises(UserError, match=r"data\.heldout"):
        corpus(open_source(path=str(path)), heldout=possible + 1)
    with pytest.raises(UserError, match="does not fill one sequence"):
        next(corpus(open_source(path=str(path)), heldout=0, length=total + 1).rows(0))


# --------------------------------------------------------------------------------------------------------------- revisions


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with one dataset `a/b`, read from a folder: hub.main is its newest commit, hub.requested the revisions asked for."""
    import datasets

    write_jsonl(tmp_path / "a.jsonl", texts(40))
    load_local = datasets.load_dataset_builder

    class Hub:
        main, requested = "1" * 40, []  # type: ignore[var-annotated]

        def load(self, name: str, data_files: Any = None, revision: str | None = None) -> Any:
            self.requested.append(revision)
            if revision is not None and revision not in (self.main, "1" * 40, "v1"):
                raise FileNotFoundError(f"Revision '{revision}' doesn't exist for dataset '{name}' on the Hub.")
            builder = load_local(str(tmp_path), data_files=data_files)
            builder.hash = "1" * 40 if revision == "v1" else revision or self.main
            return builder

    fake_hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset_builder", fake_hub.load)
    return fake_hub


def test_new_hub_commit_does_not_change_a_run_with_a_known_revision(hub: Any) -> None:
    first = open_source(name="a/b")
    assert first.revision == "1" * 40
    assert hub.requested == [None, "1" * 40]  # the commit that was resolved is the one that is read
    hub.main = "2" * 40  # a new commit, as after an edit of the README
    newer = open_source(name="a/b")
    assert newer.revision == "2" * 40
    assert newer.digest != first.digest
    pinned = open_source(name="a/b", revision=first.revision)
    assert (pinned.revision, pinned.digest) == (first.revision, first.digest)
    assert [d.text for b in pinned.blocks() for d in b.documents] == [d.text for b in first.blocks() for d in b.documents]


def test_tag_is_resolved_to_its_commit(hub: Any) -> None:
    assert open_source(name="a/b", revision="v1").revision == "1" * 40
    assert hub.requested == ["v1", "1" * 40]
    with pytest.raises(UserError, match=r"cannot load the dataset[\s\S]*revision v9[\s\S]*doesn't exist"):
        open_source(name="a/b", revision="v9")


@pytest.mark.parametrize("kind", KINDS)
def test_sources_outside_the_hub_have_no_revision(make_source: Any, kind: str) -> None:
    assert make_source(kind).revision is None
    with pytest.raises(UserError, match="only a dataset on the hub has revisions"):
        make_source(kind, revision="main")
