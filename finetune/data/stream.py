"""Text for pretraining: streamed from files, a package or the hub, tokenized ahead, packed into rows of fixed length.

A source gives blocks, a few MiB of whole documents each, and every block knows the cursor where it begins; no more than a few
blocks are ever in memory. A `Corpus` makes rows of a block: its documents are shuffled, each is followed by the end token, the
whole is cut into rows and these are shuffled too. What comes is a function of (data, seed, epoch) alone, and a cursor is small
enough for a checkpoint: the block, its number, the next row. To go on from there one block is tokenized again, and a hash of
its rows proves that they are the same ones. Blocks come in the order of the source: a corpus that is sorted by topic should be
shuffled on disk.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import os
import queue
import random
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from finetune.data.rows import PACKAGE, check_patterns, no_such_file, package_files
from finetune.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

Cursor = dict[str, Any]  # JSON-able: where a block begins, or where the next row comes from
Encode = Callable[[list[str]], list[list[int]]]
After = Callable[[], Cursor]  # the cursor behind the document that was given last
T = TypeVar("T")

STREAMED = (".txt", ".jsonl", ".parquet")
BLOCK_BYTES = 4 << 20
PIECE = 4096  # characters after which a .txt is cut at the next blank line: held-out pieces come from all over it
LONG_PIECE = 4 * PIECE  # … and after which any line does
LONG_LINE = 1 << 16  # bytes of a line of a .txt that are taken at once
LONGEST_ROW = 64 << 20  # bytes: a longer line is no row of a .jsonl
HOPELESS = 1000  # so many bad rows and no good one: that is not what bad_rows=skip is for
SHOWN = 5
TOGETHER = 1 << 18  # characters that are tokenized at once
PATIENCE = 10.0  # seconds
AHEAD = 2  # blocks that are prepared while one is consumed


@dataclass(frozen=True)
class Document:
    """One text, with \\n for line ends, and the cursor it came from for the reader's eye: `file.jsonl:12`."""

    where: str
    text: str


@dataclass(frozen=True)
class Block:
    """Neighbouring documents; `cursor` is where the first of them is found again."""

    cursor: Cursor
    documents: list[Document]


# ---------------------------------------------------------------------------------------------------------------- sources


class Source(ABC):
    """Where documents come from. `digest` says which data it is: equal for equal data, checked when a run is resumed.

    `bad` counts what was skipped because it holds no text, in this process; `skipped` shows the first few of them. `revision`:
    the commit of a dataset on the hub, by which the same data is opened again; None of any other source.
    """

    revision: str | None = None

    def __init__(self, name: str, digest: str, *, text_key: str, skip_bad: bool, block_bytes: int) -> None:
        self.name, self.digest = name, digest
        self.text_key, self.skip_bad, self.block_bytes = text_key, skip_bad, block_bytes
        self.skipped: list[str] = []
        self.bad = 0
        self._furthest = (-1, -1)  # of the bad rows: those before it were counted in an earlier pass
        self._found_text = False

    @abstractmethod
    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        """Documents from a cursor on, each with what tells the cursor behind it while the iterator stands there."""

    def blocks(self, cursor: Cursor | None = None) -> Iterator[Block]:
        """Blocks from a cursor on, each at least `block_bytes` of text but for the last. The cursor of any block gives it again.

        Raises:
            UserError: the data cannot be read, or a row holds no text.
        """
        cursor, documents, size = cursor or {}, [], 0
        after: After | None = None
        for document, after in self._documents(cursor):
            self._found_text = True
            documents.append(document)
            size += len(document.text) if document.text.isascii() else len(document.text.encode())
            if size >= self.block_bytes:
                yield Block(cursor, documents)
                cursor, documents, size = after(), [], 0
        if documents:
            yield Block(cursor, documents)

    def _document(self, value: Any, where: str, position: tuple[int, int]) -> Document | None:
        """The document in a row; None where it is empty or skipped."""
        text = value.get(self.text_key) if isinstance(value, dict) else value
        if not isinstance(text, str):
            self._skip(self._no_text(value, where), position)
            return None
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                got = f"{text[error.start]!r}, half of a surrogate pair, at character {error.start}"
                self._skip(UserError("this text is not Unicode", where=where, got=got, hint=MEND), position)
                return None
        text = text.replace("\r\n", "\n")
        return Document(where, text) if text.strip() else None

    def _no_text(self, value: Any, where: str) -> UserError:
        if not isinstance(value, dict):
            got = f"{type(value).__name__}: {str(value)[:60]!r}"
            hint = f'a row is a string, or an object with "{self.text_key}"; {MEND}'
            return UserError("this row is no text", where=where, got=got, hint=hint)
        if self.text_key in value:
            got = f"{type(value[self.text_key]).__name__}: {str(value[self.text_key])[:60]!r}"
            return UserError(f'"{self.text_key}" of this row is no text', where=where, got=got, hint=MEND)
        texts = [key for key, item in value.items() if isinstance(item, str)]
        return self._no_key(where, list(value), max(texts, key=lambda key: len(value[key]), default=None))

    def _no_key(self, where: str, keys: list[str], guess: str | None) -> UserError:
        guess = nearest(self.text_key, keys) or guess
        hint = f"data.text_key={guess}, if that is the text" if guess else MEND
        return UserError(f'there is no "{self.text_key}" here', where=where, got="keys: " + ", ".join(keys[:20]), hint=hint)

    def _skip(self, mistake: UserError, position: tuple[int, int]) -> None:
        """Counts what is bad at `position` (file, line or row), once; raises where the user did not ask to skip."""
        if not self.skip_bad:
            raise mistake
        if position <= self._furthest:
            return
        self._furthest, self.bad = position, self.bad + 1
        if len(self.skipped) < SHOWN:
            self.skipped.append(f"{mistake.where}: {mistake.message}")
        if self.bad == HOPELESS and not self._found_text:
            raise UserError(f"the first {HOPELESS} rows hold no text", where=mistake.where, got=mistake.got, hint=mistake.hint)


MEND = "mend it, or data.bad_rows=skip"
BACK = "mend it, or put it back as it was; a run that has begun then goes on: finetune resume RUN"


class Files(Source):
    """Local files, read one behind the other. A cursor is the file's number with byte offset and line, or row group and row."""

    def __init__(self, name: str, files: dict[str, Path], *, text_key: str, skip_bad: bool, block_bytes: int) -> None:
        self.files = list(files.items())
        self._stamps: dict[int, tuple[int, int]] = {}
        super().__init__(name, _digest(files), text_key=text_key, skip_bad=skip_bad, block_bytes=block_bytes)

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        readers = {".txt": self._text, ".jsonl": self._jsonl, ".parquet": self._parquet}
        for number in range(cursor.get("file", 0), len(self.files)):
            reader = readers[self.files[number][1].suffix.lower()]
            try:
                with self.files[number][1].open("rb") as file:  # its name may go meanwhile
                    try:
                        self._same(number, file)
                        for found in reader(number, cursor if number == cursor.get("file") else {}):
                            self._same(number, file)  # else what was read may have been written, or cut off, just now
                            yield found
                    except UserError:
                        self._same(number, file)  # then this is the reason
                        raise
                    self._same(number, file)
            except OSError as error:
                raise UserError("the data file cannot be read", where=self.files[number][0], got=str(error), hint=BACK) from None

    def _same(self, number: int, file: BinaryIO) -> None:
        """Raise UserError when an open file is not what it was when the run looked at it first. One that was only touched is."""
        _, path = self.files[number]
        before, now = self._stamps.setdefault(number, _stamp(file)), _stamp(file)
        if now != before and _digest(dict(self.files)) != self.digest:
            got = f"{now[0]} bytes, it had {before[0]}" if now[0] != before[0] else "other text"
            raise UserError("the data file has changed while it was read", where=str(path), got=got, hint=BACK)

    def _text(self, number: int, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        """A .txt is one long text; its documents end at the first blank line after `PIECE` characters.

        Where there is none for long, at a line's end, so that no file has to lie in memory whole.
        """
        name, path = self.files[number]
        offset, line = cursor.get("offset", 0), cursor.get("line", 1)
        piece: list[str] = []
        size, begin = 0, line

        def whole() -> Document:
            return Document(f"{name}:{begin}", "".join(piece).replace("\r\n", "\n").rstrip("\r\n"))

        def after() -> Cursor:
            return {"file": number, "offset": offset, "line": line}

        with path.open("rb") as file:
            file.seek(offset)
            while raw := file.readline(LONG_LINE):
                if len(raw) == LONG_LINE and not raw.endswith(b"\n"):
                    raw = raw[: _cut(raw)]
                    file.seek(offset + len(raw))
                text = self._decode(raw, number, offset, line)
                offset += len(raw)
                line += raw.endswith(b"\n")
                blank = not raw.strip()
                if not piece and not text.strip():
                    begin = line
                    continue
                piece.append(text)
                size += len(text)
                if size >= LONG_PIECE or (blank and size >= PIECE):
                    yield whole(), after
                    piece, size, begin = [], 0, line
        if piece:
            yield whole(), after

    def _jsonl(self, number: int, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        name, path = self.files[number]
        offset, line = cursor.get("offset", 0), cursor.get("line", 1)

        def after() -> Cursor:
            return {"file": number, "offset": offset, "line": line}

        with path.open("rb") as file:
            file.seek(offset)
            while raw := file.readline(LONGEST_ROW):
                where, position = f"{name}:{line}", (number, line)
                if len(raw) == LONGEST_ROW:
                    raise UserError(
                        f"this line is longer than {LONGEST_ROW >> 20} MiB",
                        where=where,
                        hint="a .jsonl has one JSON object a line; a long text is a .txt",
                    )
                text = self._decode(raw, number, offset, line)
                offset += len(raw)
                line += 1
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except json.JSONDecodeError as error:
                    got = f"{error.msg} at column {error.colno}: {text[:80]!r}"
                    self._skip(UserError("this line is not JSON", where=where, got=got, hint=MEND), position)
                    continue
                except RecursionError:
                    got = "brackets in brackets without end"
                    self._skip(UserError("this line is not a row", where=where, got=got, hint=MEND), position)
                    continue
                document = self._document(value, where, position)
                if document is not None:
                    yield document, after

    def _parquet(self, number: int, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        import pyarrow
        import pyarrow.parquet

        name, path = self.files[number]
        first, skip = cursor.get("group", 0), cursor.get("row", 0)
        group, row = first, 0

        def after() -> Cursor:
            return {"file": number, "group": group, "row": row}

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                if self.text_key not in schema.names:
                    texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
                    raise self._no_key(name, schema.names, texts[0] if texts else None)
                begin = sum(file.metadata.row_group(group).num_rows for group in range(first))
                for group in range(first, file.num_row_groups):
                    row = 0
                    for batch in file.iter_batches(512, row_groups=[group], columns=[self.text_key]):
                        column = batch.column(0)
                        passed = min(max(skip - row, 0), len(column))
                        row += passed
                        for value in column.slice(passed).to_pylist():
                            where = f"{name}[{begin + row}]"
                            row += 1
                            document = self._document({self.text_key: value}, where, (number, begin + row))
                            if document is not None:
                                yield document, after
                    begin, skip = begin + row, 0
        except pyarrow.ArrowException as error:
            raise UserError("the parquet file cannot be read", where=name, got=str(error).splitlines()[0], hint=BACK) from None

    def _decode(self, raw: bytes, number: int, offset: int, line: int) -> str:
        """The text of one line; an empty one where it is not UTF-8 and is skipped."""
        try:
            return raw.decode("utf-8-sig" if not offset else "utf-8")
        except UnicodeDecodeError as error:
            mistake = UserError(
                "the data file is not UTF-8",
                where=f"{self.files[number][0]}:{line}",
                got=f"byte {raw[error.start]:#04x} at column {error.start + 1}",
                hint="save it as UTF-8 (iconv -f latin1 -t utf-8), or data.bad_rows=skip leaves out such lines",
            )
            self._skip(mistake, (number, line))
            return ""


class Hub(Source):
    """A streamed dataset, opened anew for each pass: an iteration changes the state of its dataset.

    A cursor is the dataset's own state, which is exact to the example as long as nothing is mapped or shuffled in it, and the
    example's number.
    """

    def __init__(
        self,
        name: str,
        dataset: Callable[[], Any],
        digest: str,
        revision: str | None,
        *,
        text_key: str,
        skip_bad: bool,
        block_bytes: int,
    ) -> None:
        self.dataset, self.revision = dataset, revision
        super().__init__(name, digest, text_key=text_key, skip_bad=skip_bad, block_bytes=block_bytes)

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        dataset = self.dataset()
        if cursor:
            dataset.load_state_dict(cursor["state"])
        index = cursor.get("index", 0)

        def after() -> Cursor:
            return {"state": dataset.state_dict(), "index": index}

        examples = iter(dataset)
        while True:
            try:
                value = next(examples)
            except StopIteration:
                return
            except Exception as error:  # the hub's client raises many kinds; each means: the rest of the data cannot be had
                raise UserError(
                    "the dataset cannot be read any further",
                    where=f"{self.name}[{index}]",
                    got=_in_a_line(error),
                    hint="look at the network, then: finetune resume RUN; it goes on from there",
                ) from None
            where = f"{self.name}[{index}]"
            index += 1
            document = self._document(value, where, (0, index))
            if document is not None:
                yield document, after


def _cut(raw: bytes) -> int:
    """Where to cut a line that is too long: behind its last space, or at least not within a character of UTF-8."""
    at = raw.rfind(b" ") + 1
    if at:
        return at
    at = len(raw) - 1
    while at > len(raw) - 4 and raw[at] & 0xC0 == 0x80:  # a continuation: the character began before
        at -= 1
    return at


def _digest(files: dict[str, Path]) -> str:
    """sha256 over name, size, first and last MiB of each file: a corpus of a terabyte is not read twice for this."""
    digest = hashlib.sha256()
    for name, path in files.items():
        try:
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
        except OSError as error:
            raise UserError("the data file cannot be read", where=name, got=str(error), hint=BACK) from None
    return digest.hexdigest()


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """What changes when somebody writes into a file: bytes, and when they were written."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _not_loaded(name: str, error: Exception) -> UserError:
    return UserError(
        "the dataset cannot be loaded",
        where="data.name",
        got=f"{name}: {_in_a_line(error)}",
        hint="check the name, split and revision on huggingface.co/datasets, the network, and `hf auth login`; "
        "or give a local file: data.path=FILE.jsonl",
    )


def _open_hub(name: str, split: str, files: list[str], revision: str | None) -> tuple[Callable[[], Any], str, str | None]:
    """(what opens the streamed dataset, digest, commit). The digest holds the version as `datasets` knows it: the commit.

    A folder may stand in for a dataset on the hub; it has no commit.
    """
    import datasets

    asked = f"{name} (split {split}{f', revision {revision}' if revision else ''})"
    try:
        builder = datasets.load_dataset_builder(name, data_files=files or None, revision=revision)
        commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
        if commit is not None and revision != commit:
            # `datasets` takes another way where a revision is named (features from the files, not from the hub's conversion):
            # it is named always, so that a cursor saved now fits the stream that is opened at this commit later.
            builder = datasets.load_dataset_builder(name, data_files=files or None, revision=commit)
        builder.as_streaming_dataset(split=split)  # a wrong split is said here
    except Exception as error:  # as above
        raise _not_loaded(asked, error) from None
    if revision is not None and commit is None:
        raise _no_revisions(name, revision)
    version = json.dumps([name, split, files, builder.hash])
    digest = hashlib.sha256(version.encode()).hexdigest()
    return functools.partial(builder.as_streaming_dataset, split=split), digest, commit


def _no_revisions(name: str, revision: str) -> UserError:
    return UserError(
        "only a dataset on the hub has revisions", where="data.revision", got=f"{revision} of {name}", hint="leave it out"
    )


def open_source(
    *,
    path: str | None = None,
    name: str | None = None,
    files: list[str] | None = None,
    split: str = "train",
    revision: str | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Source:
    """The source that a recipe names.

    path: a .txt, .jsonl or .parquet file, or a folder of them (taken in the order of their names; wins over name). name:
    `package:NAME`, the text files of an installed distribution, or a hub id with its split, and a revision (branch, tag or
    commit; without one the newest commit), which `Source.revision` gives as a commit. files: shell patterns over the
    paths in a folder, a package or a hub dataset. text_key: the key or column of the text. skip_bad: rows without text and lines
    that cannot be decoded are counted and left out, not refused.

    Raises:
        UserError: it is not there, holds no such file, is of another kind, or has no revisions.
    """
    check_patterns(files or [])
    settings: dict[str, Any] = {"text_key": text_key, "skip_bad": skip_bad, "block_bytes": block_bytes}
    if revision is not None and (path is not None or (name or "").startswith(PACKAGE)):
        raise _no_revisions(path or name or "", revision)
    if path is not None:
        root = Path(path)
        if root.is_dir():
            inside = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
            inside = {name: file for name, file in inside.items() if not name.startswith(".") and "/." not in name}
            return Files(path, _choose(inside, files or [], path), **settings)
        if not root.exists():
            raise no_such_file(root, "data.path")
        if root.suffix.lower() not in STREAMED:
            hint = "one of " + " ".join(STREAMED) + ", or a folder of them"
            raise UserError("this kind of data file is not streamed", where=root.name, got=root.suffix or "no suffix", hint=hint)
        return Files(path, {root.name: root}, **settings)
    if name is None:
        raise UserError("no data is named", where="data", hint="data.path=FILE.txt or data.name=HUB_ID")
    if name.startswith(PACKAGE):
        return Files(name, _choose(package_files(name, "data.name"), files or [], name), **settings)
    dataset, digest, commit = _open_hub(name, split, files or [], revision)
    return Hub(name, dataset, digest, commit, **settings)


def _choose(files: dict[str, Path], patterns: list[str], name: str) -> dict[str, Path]:
    known = sorted(file for file in files if file.lower().endswith(STREAMED) and ".dist-info/" not in file)
    chosen = [file for file in known if not patterns or any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(
            "no text file here matches",
            where="data.files" if patterns else "data",
            got=", ".join(patterns) or name,
            hint="it has: " + ", ".join(known[:20]) if known else f"{name} holds no {', '.join(STREAMED)} file",
        )
    return {file: files[file] for file in chosen}


# ------------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One row of training: `ids` (length,) int32. where: the document in which it begins. after: from where the next comes."""

    ids: np.ndarray
    where: str
    after: Cursor


@dataclass(frozen=True)
class _Rows:
    """A block made ready: rows (n, length) int32 in their final order."""

    cursor: Cursor
    number: int
    rows: np.ndarray
    wheres: list[str]
    check: str  # of the rows' bytes


class Corpus:
    """Rows of a source, and those held out.

    encode turns texts into token ids, without any special token; end is the id that is put behind every document. What is left
    of a block after its last full row is dropped: less than `length` tokens in some million. `read` counts documents,
    characters and tokens made ready in this process, and how many tokens were dropped so.

    Raises:
        UserError: the data is empty, or its first block has not twice the tokens that are to be held out.
    """

    def __init__(self, source: Source, encode: Encode, *, length: int, end: int, seed: int, heldout_rows: int) -> None:
        self.source, self.encode, self.length, self.end, self.seed = source, encode, length, end, seed
        self.read = {"documents": 0, "characters": 0, "tokens": 0, "dropped": 0}
        # Equal texts elsewhere in the corpus are not trained either. Few: a few rows' worth.
        self._held: set[str] = set()
        self.heldout = self._hold_out(heldout_rows)

    def _hold_out(self, count: int) -> list[list[int]]:
        """Rows from whole documents, drawn at random from the first block: the same ones for the same data and seed."""
        blocks = self.source.blocks()
        first = next(blocks, None)
        if first is None:
            skipped = f"; {self.source.bad} skipped, such as {self.source.skipped[0]}" if self.source.bad else ""
            raise UserError("the data holds no text", where=self.source.name, got=f"0 documents{skipped}")
        del blocks
        needed = count * self.length
        tokens: list[int] = []
        lengths: list[int] = []  # of the documents in the order of the draw
        spare = 0
        drawn = list(first.documents)
        random.Random(f"split/{self.seed}").shuffle(drawn)
        for document, ids in self._encoded(drawn):
            lengths.append(len(ids))
            if document.text in self._held:
                continue
            if len(tokens) < needed:
                self._held.add(document.text)
                tokens += ids
            else:
                spare += len(ids)
            if len(tokens) >= needed and spare >= needed:
                return [tokens[at : at + self.length] for at in range(0, needed, self.length)]
        total = sum(lengths)
        possible = max(min(taken, total - taken) for taken in itertools.accumulate(lengths)) // self.length
        raise UserError(
            "there is too little text to hold out so much",
            where="data.heldout",
            got=f"{count} rows of {self.length} are {needed:,} tokens, and at least as many must be left to train; the first "
            f"block of {self.source.name} has {total:,} tokens in {len(lengths)} documents, which are held out whole",
            hint=(f"at most data.heldout={possible}, or " if possible else "") + "a smaller data.max_length, or more text",
        )

    def _encoded(
        self, documents: Iterable[Document], stop: threading.Event | None = None
    ) -> Iterator[tuple[Document, list[int]]]:
        """Each document with its tokens and the end; a few at once, for what a tokenizer keeps of each token is large."""
        waiting: list[Document] = []
        size = 0
        for document in documents:
            waiting.append(document)
            size += len(document.text)
            if size >= TOGETHER:
                if stop is not None and stop.is_set():
                    raise _NobodyWaits
                yield from zip(waiting, self._tokens(waiting), strict=True)
                waiting, size = [], 0
        if waiting:
            yield from zip(waiting, self._tokens(waiting), strict=True)

    def _tokens(self, documents: list[Document]) -> list[list[int]]:
        return [[*ids, self.end] for ids in self.encode([document.text for document in documents])]

    def _prepare(self, block: Block, epoch: int, number: int, stop: threading.Event) -> _Rows:
        import numpy as np

        documents = [document for document in block.documents if document.text not in self._held]
        shuffled = random.Random(f"{self.seed}/{epoch}/{number}")
        shuffled.shuffle(documents)
        parts = [np.array(ids, np.int32) for _, ids in self._encoded(documents, stop)]
        stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        begins = np.cumsum([0, *map(len, parts)])
        order = list(range(len(stream) // self.length))
        shuffled.shuffle(order)
        cut = stream[: len(order) * self.length].reshape(len(order), self.length)
        rows = cut[np.array(order, np.int64)]
        inside = np.searchsorted(begins, np.array(order, np.int64) * self.length, side="right") - 1
        self.read["documents"] += len(documents)
        self.read["characters"] += sum(len(document.text) for document in documents)
        self.read["tokens"] += len(stream)
        self.read["dropped"] += len(stream) - cut.size
        check = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        return _Rows(block.cursor, number, rows, [documents[at].where for at in inside], check)

    def _blocks(self, epoch: int, cursor: Cursor | None, stop: threading.Event) -> Generator[_Rows, None, None]:
        number = cursor["number"] if cursor else 0
        for block in self.source.blocks(cursor["block"] if cursor else None):
            yield self._prepare(block, epoch, number, stop)
            number += 1

    def rows(self, epoch: int, cursor: Cursor | None = None) -> Generator[Row, None, None]:
        """The rows of an epoch from a cursor (a `Row.after` of the same epoch) on: exactly those that came after it then.

        The next blocks are made ready in the background. Close the generator, or let it go, and that ends.

        Raises:
            UserError: the data cannot be read, has changed at that cursor, or does not fill one row.
        """
        stop = threading.Event()
        blocks = ahead(self._blocks(epoch, cursor, stop), stop)
        start = cursor["row"] if cursor else 0
        check = cursor["check"] if cursor else None
        came = cursor is not None
        try:
            for block in blocks:
                if check is not None and check != block.check:
                    raise self._changed(cursor)
                check = None
                for row in range(start, len(block.rows)):
                    came = True
                    after = {"block": block.cursor, "number": block.number, "row": row + 1, "check": block.check}
                    yield Row(block.rows[row], block.wheres[row], after)
                start = 0
            if check is not None:
                raise self._changed(cursor)
            if not came:
                got = f"{self.read['tokens']:,} tokens without those held out; a row is {self.length}"
                raise UserError("the data does not fill one row", where=self.source.name, got=got, hint="give more text")
        finally:
            blocks.close()

    def _changed(self, cursor: Cursor | None) -> UserError:
        return UserError(
            "the data is not what it was when this position was saved",
            where=self.source.name,
            got=f"other rows at {json.dumps(cursor)[:300]}",
            hint="bring back the data, tokenizer, seed and data.max_length of that run, or begin a new one",
        )


class _NobodyWaits(Exception):
    """Ends the work on a block that will not be asked for."""


def ahead(items: Generator[T, None, None], stop: threading.Event, depth: int = AHEAD) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them made in the background before they are asked for.

    What `items` raises is raised here, where its item would have come. Closing this sets `stop`, which `items` may look at, and
    ends the thread (one that hangs in the network is not waited for).
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)

    def work() -> None:
        try:
            while room.acquire() and not stop.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # carried over to the one who asks, StopIteration too
            ready.put((None, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            room.release()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # None stands only beside an error
    finally:
        stop.set()
        room.release()
        thread.join(PATIENCE)
