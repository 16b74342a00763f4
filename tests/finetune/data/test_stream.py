"""Streams against a naive reference, places that give the same rows again, and mistakes with the line they stand on."""

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

LENGTH, END = 32, 1
KINDS = ["jsonl", "txt", "parquet", "folder", "package", "hub_jsonl", "hub_parquet", "hub_txt"]


def encode(texts: list[str]) -> list[list[int]]:
    """Characters are tokens; 1 is the end's."""
    return [[ord(character) + 2 for character in text] for text in texts]


def texts(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [f"d{seed}-{n} " + "".join(drawn.choices("abcé \n", k=drawn.randrange(5, 120))) + "." for n in range(count)]


def write_jsonl(path: Path, some: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")


def write_parquet(path: Path, some: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": list(range(len(some))), "text": some})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def write_text(path: Path, some: list[str]) -> None:
    path.write_text("\n\n".join(some), encoding="utf-8")


def once(write: Any, path: Path, some: list[str]) -> None:
    """Not again: a folder's files tell their version to `datasets` by the time of their change."""
    if not path.exists():
        write(path, some)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make(kind) → a new source of that kind over about 400 documents in blocks of about 4 kB; the same data each time."""
    monkeypatch.setattr(stream, "PIECE", 100)
    monkeypatch.setattr(stream, "LONG_PIECE", 400)

    def made(kind: str, **changes: Any) -> Source:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        given: dict[str, Any] = {"path": str(folder)}
        if kind in ("jsonl", "txt", "parquet"):
            write = {"jsonl": write_jsonl, "txt": write_text, "parquet": write_parquet}[kind]
            once(write, folder / f"a.{kind}", texts(400))
            given = {"path": str(folder / f"a.{kind}")}
        elif kind == "folder":
            (folder / "b").mkdir(exist_ok=True)
            once(write_jsonl, folder / "c.jsonl", texts(150, 1))
            once(write_text, folder / "b" / "a.txt", texts(120, 2))
            once(write_parquet, folder / "a.parquet", texts(130, 3))
            (folder / "empty.txt").write_text("\n\n")
            (folder / "notes.md").write_text("not read")
        elif kind == "package":
            info = folder / "someplays-1.0.dist-info"
            info.mkdir(exist_ok=True)
            (folder / "plays").mkdir(exist_ok=True)
            once(write_text, folder / "plays" / "a_new.txt", texts(200, 4))
            once(write_text, folder / "plays" / "b_new.txt", texts(200, 5))
            once(write_text, folder / "plays" / "a_old.txt", texts(200, 6))
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someplays\nVersion: 1.0\n")
            files = ["plays/a_new.txt", "plays/b_new.txt", "plays/a_old.txt", "someplays-1.0.dist-info/METADATA"]
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
            if str(folder) not in sys.path:
                monkeypatch.syspath_prepend(str(folder))
            given = {"name": "package:someplays", "files": ["plays/*_new.txt"]}
        else:  # a folder is opened as a hub dataset is
            ending = kind.removeprefix("hub_")
            write = {"jsonl": write_jsonl, "txt": write_text, "parquet": write_parquet}[ending]
            for number in range(3):
                once(write, folder / f"{number}.{ending}", texts(130, number))
            given = {"name": str(folder), "files": [f"*.{ending}"]}
        return open_source(**({"block_bytes": 4000} | given | changes))

    return made


def corpus(source: Source, *, seed: int = 0, heldout: int = 4, length: int = LENGTH) -> Corpus:
    return Corpus(source, encode, length=length, end=END, seed=seed, heldout_rows=heldout)


def naive(source: Source, held: set[str], *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of an epoch, told again in the simplest words."""
    rows = []
    for number, block in enumerate(source.blocks()):
        drawn = random.Random(f"{seed}/{epoch}/{number}")
        documents = [document.text for document in block.documents if document.text not in held]
        drawn.shuffle(documents)
        line = [token for text in documents for token in (*(ord(character) + 2 for character in text), END)]
        cut = [line[at : at + LENGTH] for at in range(0, len(line) - LENGTH + 1, LENGTH)]
        order = list(range(len(cut)))
        drawn.shuffle(order)
        rows += [cut[at] for at in order]
    return rows


def at_row(row: Any) -> Any:
    """Where a row stands. The hub's state of one cursor can be written in two ways."""
    return row.where, {key: value for key, value in row.after.items() if key != "block"}


def ids(rows: Any) -> list[list[int]]:
    return [row.ids.tolist() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_reference_and_any_place_gives_the_rest(make: Any, kind: str) -> None:
    source = make(kind)
    blocks = list(source.blocks())
    assert len(blocks) > 3
    everything = [document for block in blocks for document in block.documents]
    made = corpus(source)
    rows = list(made.rows(1))
    assert ids(rows) == naive(make(kind), made._held, seed=0, epoch=1)
    assert {len(row.ids) for row in rows} == {LENGTH}
    assert rows[0].ids.dtype == "int32"
    assert all(row.where in {document.where for document in everything} for row in rows)
    # Blocks: each is found again at its cursor, alone and with what follows.
    for at in range(len(blocks)):
        cursor = json.loads(json.dumps(blocks[at].cursor))
        assert next(make(kind).blocks(cursor)).documents == blocks[at].documents
    assert [b.documents for b in make(kind).blocks(blocks[2].cursor)] == [b.documents for b in blocks[2:]]
    # Rows: at both sides of every border between blocks, and anywhere; restored twice over.
    borders = [at for at in range(1, len(rows)) if rows[at].after["number"] != rows[at - 1].after["number"]]
    assert len(borders) == len(blocks) - 1
    anywhere = random.Random(kind).sample(range(len(rows)), 6)
    for at in {*borders[:3], *(border - 1 for border in borders[:3]), *anywhere, len(rows) - 1}:
        cursor = json.loads(json.dumps(rows[at].after))
        fresh = corpus(make(kind))
        rest = list(fresh.rows(1, cursor))
        assert ids(rest) == ids(rows[at + 1 :])
        assert [at_row(row) for row in rest] == [at_row(row) for row in rows[at + 1 :]]
        if len(rest) > 50:
            again = json.loads(json.dumps(rest[40].after))
            assert ids(corpus(make(kind)).rows(1, again)) == ids(rest[41:])


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_come_from_documents_that_no_epoch_trains(make: Any, kind: str) -> None:
    made, fresh = corpus(make(kind)), corpus(make(kind))
    assert made.heldout == fresh.heldout
    assert [len(row) for row in made.heldout] == [LENGTH] * 4
    drawn = list(next(make(kind).blocks()).documents)
    random.Random("split/0").shuffle(drawn)
    held, line = [], []
    for document in drawn:
        if len(line) < 4 * LENGTH:
            held.append(document.text)
            line += [*encode([document.text])[0], END]
    assert [token for row in made.heldout for token in row] == line[: 4 * LENGTH]
    assert 0 < len(held) < len(drawn)
    for epoch in range(2):
        assert ids(made.rows(epoch)) == naive(make(kind), set(held), seed=0, epoch=epoch)


def test_equal_texts_elsewhere_are_not_trained_either(tmp_path: Path) -> None:
    some = texts(100)
    write_jsonl(tmp_path / "a.jsonl", [*some, *texts(100, 7), *some])
    made = corpus(open_source(path=str(tmp_path / "a.jsonl"), block_bytes=4000))
    assert made.heldout
    list(made.rows(0))
    assert made.read["documents"] == 300 - 2 * len(made._held)


def test_a_row_names_the_document_in_which_it_begins(tmp_path: Path) -> None:
    some = [f"{n:02d}" + "x" * (LENGTH - 3) for n in range(20)]  # with its end each is a row
    write_jsonl(tmp_path / "a.jsonl", some)
    rows = list(corpus(open_source(path=str(tmp_path / "a.jsonl")), heldout=2).rows(0))
    assert len(rows) == 18
    for row in rows:
        assert row.where == f"a.jsonl:{int(''.join(chr(token - 2) for token in row.ids[:2])) + 1}"


def test_seeds_and_epochs_differ_and_hold_the_same_tokens(make: Any) -> None:
    made = corpus(make("jsonl"), heldout=0)
    assert made.heldout == []
    one, two, same = ids(made.rows(0)), ids(made.rows(1)), ids(made.rows(0))
    other = corpus(make("jsonl"), seed=1, heldout=0)
    assert one == same
    assert one != two
    assert one != ids(other.rows(0))
    assert corpus(make("jsonl")).heldout != corpus(make("jsonl"), seed=1).heldout
    dropped = made.read["dropped"]
    assert made.read["tokens"] == 3 * sum(len(text) + 1 for text in texts(400))
    assert made.read["documents"] == 1200
    assert made.read["characters"] == 3 * sum(map(len, texts(400)))
    assert dropped == made.read["tokens"] - LENGTH * (len(one) + len(two) + len(same))


def test_rows_are_long_enough_for_real_text(shared: Path) -> None:
    source = open_source(path=str(shared / "data" / "tinyshakespeare.txt"), block_bytes=200_000)
    blocks = list(source.blocks())
    whole = "".join(d.text for block in blocks for d in block.documents)
    original = (shared / "data" / "tinyshakespeare.txt").read_text()
    assert whole.replace("\n", "") == original.replace("\n", "")
    lengths = [len(d.text) for block in blocks for d in block.documents]
    assert min(lengths[:-1]) > 0.9 * stream.PIECE
    assert max(lengths) < 2 * stream.PIECE
    lines = original.split("\n")
    for document in blocks[2].documents:
        assert lines[int(document.where.split(":")[1]) - 1] == document.text.split("\n")[0]


def test_text_pieces_end_at_blank_lines_and_never_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    found = pieces(unbroken)
    assert "".join(text + "\n" for _, text in found) == unbroken
    assert max(len(text) for _, text in found) <= 76
    for text in ("é😀" * 200, "word " * 100, "x" * 300):  # one line
        found = pieces(text)
        assert "".join(piece for _, piece in found) == text
        assert len(found) > 3


class Slow(Source):
    """Documents that take their time; raises `error` behind the last, where there is one."""

    def __init__(self, error: BaseException | None = None, pause: float = 0.0) -> None:
        super().__init__("slow", "0", text_key="text", skip_bad=False, block_bytes=600)
        self.error, self.pause, self.given, self.closed = error, pause, 0, 0

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, Any]]:
        try:
            for number, text in enumerate(texts(200)):
                time.sleep(self.pause)
                self.given = number
                yield Document(f"slow:{number}", text), lambda number=number: {"n": number}
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_blocks_are_made_ahead_and_no_thread_stays() -> None:
    source = Slow()
    made = corpus(source, heldout=0)
    rows = made.rows(0)
    assert threads() == []
    next(rows)
    several = sum(len(block.documents) for block in itertools.islice(Slow().blocks(), 3))
    deadline = time.monotonic() + 5
    while source.given < several - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert source.given == several - 1, "the block in use and two more"
    assert len(threads()) == 1
    rows.close()
    assert threads() == []
    assert source.closed == 2  # the blocks of the held-out rows, and these
    abandoned = made.rows(0)
    next(abandoned)
    del abandoned
    gc.collect()
    assert threads() == []
    list(made.rows(0))
    assert threads() == []


@pytest.mark.alone
def test_closing_does_not_wait_for_a_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 50)
    source = Slow()
    source.block_bytes = 3000
    first = len(next(source.blocks()).documents)
    encoded: list[str] = []

    def tired(some: list[str]) -> list[list[int]]:
        if len(encoded) > first:
            time.sleep(0.2)
        encoded.extend(some)
        return encode(some)

    made = Corpus(source, tired, length=LENGTH, end=END, seed=0, heldout_rows=0)
    encoded.clear()
    rows = made.rows(0)
    next(rows)  # the first block is quick, the others take some seconds each
    deadline = time.monotonic() + 5
    while len(encoded) <= first and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = time.monotonic()
    rows.close()
    assert time.monotonic() - begun < 1
    assert threads() == []
    assert len(encoded) < first + 10


def test_the_order_does_not_depend_on_timing() -> None:
    assert ids(corpus(Slow()).rows(0)) == ids(corpus(Slow(pause=0.002)).rows(0))
    late = []
    for row in corpus(Slow()).rows(0):
        late.append(row.ids.tolist())
        if len(late) % 50 == 0:
            time.sleep(0.02)
    assert late == ids(corpus(Slow()).rows(0))


def test_a_fault_in_the_background_is_raised_where_it_would_have_come() -> None:
    mistake = UserError("broken", where="slow:200")
    made = corpus(Slow(mistake))
    count = len(list(corpus(Slow()).rows(0)))
    rows = made.rows(0)
    seen: list[Any] = []
    with pytest.raises(UserError) as caught:
        seen.extend(row for row in rows)
    assert caught.value is mistake
    assert count - 40 <= len(seen) <= count  # the last block, which never became whole, is missing
    assert threads() == []


def test_changed_data_is_seen_when_a_place_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, texts(200))
    source = open_source(path=str(path), block_bytes=4000)
    rows = list(corpus(source).rows(0))
    cursor = rows[len(rows) // 2].after
    for wrong in ({"seed": 1}, {"length": 16}):
        with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
            next(corpus(open_source(path=str(path), block_bytes=4000), **wrong).rows(0, cursor))
    with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
        next(corpus(source).rows(1, cursor))
    digest = source.digest
    assert open_source(path=str(path)).digest == digest
    write_jsonl(path, texts(60))
    shorter = open_source(path=str(path), block_bytes=4000)
    assert shorter.digest != digest
    with pytest.raises(UserError, match="has changed since this checkpoint was saved"):
        next(corpus(shorter).rows(0, rows[-1].after))


def test_digests_follow_names_and_contents(make: Any, tmp_path: Path) -> None:
    assert len({make(kind).digest for kind in KINDS}) == len(KINDS)
    assert [make(kind).digest for kind in KINDS] == [make(kind).digest for kind in KINDS]
    assert make("package", files=["*"]).digest != make("package").digest


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


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_what_holds_no_text_is_shown_with_its_line_or_skipped_and_counted(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in words)
    source, documents = read(path, skip_bad=True)
    assert [document.text for document in documents] == ["fine"]
    list(source.blocks())  # a second pass counts nothing again
    assert source.bad == 1
    assert source.skipped[0].startswith(words[0])


def test_neighbouring_bad_lines_are_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text"\n{"text": "\xff"}\n{}\n{"text"\n{"text": 1}\n\xff\n{"text": "  "}\n')
    source, documents = read(path, skip_bad=True)
    assert [document.where for document in documents] == ["a.jsonl:1"]
    assert source.bad == 6
    assert len(source.skipped) == 5


def test_strings_crlf_and_characters_that_only_python_takes_for_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ["a\u2028b\x85c", {"text": "x\r\ny"}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert [(d.where, d.text) for d in read(path)[1]] == [("a.jsonl:1", "a\u2028b\x85c"), ("a.jsonl:2", "x\ny")]


def test_parquet_columns_nulls_and_damage(tmp_path: Path) -> None:
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


def test_a_wrong_key_ends_even_when_bad_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    monkeypatch.setattr(stream, "HOPELESS", 50)
    with pytest.raises(UserError, match="first 50 rows have no text") as caught:
        read(tmp_path / "a.jsonl", text_key="txt", skip_bad=True)
    assert "data.text_key=text" in str(caught.value)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", texts(3))
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "none").mkdir()
    for given, words in [
        ({"path": str(tmp_path / "rwos.jsonl")}, "did you mean"),
        ({"path": str(tmp_path / "a.csv")}, "cannot be streamed"),
        ({"path": str(tmp_path / "none")}, "holds no .txt"),
        ({"path": str(tmp_path), "files": ["*.txt"]}, r"it has: rows\.jsonl"),
        ({"name": "package:no-such-package"}, "not installed"),
        ({"name": "nobody/no-such-dataset"}, r"data\.name"),
        ({}, "the recipe has no data"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(**given)
    source = open_source(path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read"):
        list(source.blocks())


def test_too_little_text(tmp_path: Path) -> None:
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
    """A hub with one dataset, `a/b`: hub.main is its newest commit, hub.asked what was opened; a folder stands for its files."""
    import datasets

    write_jsonl(tmp_path / "a.jsonl", texts(40))
    real = datasets.load_dataset_builder

    class Hub:
        main, asked = "1" * 40, []  # type: ignore[var-annotated]

        def load(self, name: str, data_files: Any = None, revision: str | None = None) -> Any:
            self.asked.append(revision)
            if revision is not None and revision not in (self.main, "1" * 40, "v1"):
                raise FileNotFoundError(f"Revision '{revision}' doesn't exist for dataset '{name}' on the Hub.")
            builder = real(str(tmp_path), data_files=data_files)
            builder.hash = "1" * 40 if revision == "v1" else revision or self.main
            return builder

    made = Hub()
    monkeypatch.setattr(datasets, "load_dataset_builder", made.load)
    return made


def test_a_commit_on_the_hub_does_not_change_a_run_that_knows_its_own(hub: Any) -> None:
    begun = open_source(name="a/b")
    assert begun.revision == "1" * 40
    assert hub.asked == [None, "1" * 40]  # what is read is what will be opened later
    hub.main = "2" * 40  # somebody mends the README
    newer = open_source(name="a/b")
    assert newer.revision == "2" * 40
    assert newer.digest != begun.digest
    again = open_source(name="a/b", revision=begun.revision)
    assert (again.revision, again.digest) == (begun.revision, begun.digest)
    assert [d.text for b in again.blocks() for d in b.documents] == [d.text for b in begun.blocks() for d in b.documents]


def test_a_tag_is_resolved_to_its_commit(hub: Any) -> None:
    assert open_source(name="a/b", revision="v1").revision == "1" * 40
    assert hub.asked == ["v1", "1" * 40]
    with pytest.raises(UserError, match=r"cannot load the dataset[\s\S]*revision v9[\s\S]*doesn't exist"):
        open_source(name="a/b", revision="v9")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_on_the_hub_has_no_revision(make: Any, kind: str) -> None:
    assert make(kind).revision is None
    with pytest.raises(UserError, match="only a dataset on the hub has revisions"):
        make(kind, revision="main")
