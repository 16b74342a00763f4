"""Text for pretraining: streamed from files, a package or the hub, tokenized ahead, packed into sequences of fixed length.

A source yields blocks, a few MiB of whole documents each, with the cursor at which each begins; only a few blocks are in memory
at a time. A `Corpus` makes sequences of a block: its documents are shuffled and concatenated, each followed by the end token,
then cut into sequences, which are shuffled too. The result is a function of (data, seed, epoch) alone, and a cursor is small
enough for a checkpoint: the block, its number, the next sequence. To resume, one block is tokenized again, and a hash of
its sequences proves that they are the same. Blocks come in the order of the source: a corpus that is sorted by topic should
be shuffled on disk.
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

Cursor = dict[str, Any]  # JSON: the position of a block, or of the next sequence
Encode = Callable[[list[str]], list[list[int]]]
After = Callable[[], Cursor]  # the cursor after the last document
T = TypeVar("T")

STREAMED = (".txt", ".jsonl", ".parquet")
BLOCK_BYTES = 4 << 20
PIECE = 4096  # characters after which a .txt is cut at the next blank line, so that held-out pieces come from all parts of it
LONG_PIECE = 4 * PIECE  # … or at the end of any line
LONG_LINE = 1 << 16  # bytes of a line of a .txt that are read at once
LONGEST_ROW = 64 << 20  # bytes: a longer line of a .jsonl is refused
HOPELESS = 1000  # bad rows without a good one, after which bad_rows=skip gives up
SHOWN = 5
BATCH_CHARACTERS = 1 << 18  # characters that are tokenized at once
PATIENCE = 10.0  # seconds
AHEAD = 2  # blocks that are prepared while one is consumed


@dataclass(frozen=True)
class Document:
    """One text, with \\n for line ends, and its location for messages: `file.jsonl:12`."""

    where: str
    text: str


@dataclass(frozen=True)
class Block:
    """Consecutive documents; `cursor` is the position of the first."""

    cursor: Cursor
    documents: list[Document]


# ---------------------------------------------------------------------------------------------------------------- sources


class Source(ABC):
    """A stream of documents. `digest` identifies the data: equal for equal data, checked when a run is resumed.

    `bad` counts rows without text that this process skipped; `skipped` shows the first few of them. `revision`:
    the commit of a dataset on the hub, by which the same data is opened again; None for any other source.
    """

    revision: str | None = None

    def __init__(self, name: str, digest: str, *, text_key: str, skip_bad: bool, block_bytes: int) -> None:
        self.name, self.digest = name, digest
        self.text_key, self.skip_bad, self.block_bytes = text_key, skip_bad, block_bytes
        self.skipped: list[str] = []
        self.bad = 0
        self._furthest = (-1, -1)  # position of the last bad row: earlier ones were counted already
        self._found_text = False

    @abstractmethod
    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        """Documents from a cursor on, each with a function that returns the cursor after it."""

    def blocks(self, cursor: Cursor | None = None) -> Iterator[Block]:
        """Blocks from a cursor on, each with at least `block_bytes` of text, except the last.

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
        """The document in a row; None if it is empty or skipped."""
        text = value.get(self.text_key) if isinstance(value, dict) else value
        if not isinstance(text, str):
            self._skip(self._no_text(value, where), position)
            return None
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                got = f"{text[error.start]!r}, half of a surrogate pair, at character {error.start}"
                self._skip(UserError("this text is not Unicode", where=where, got=got, hint=FIX), position)
                return None
        text = text.replace("\r\n", "\n")
        return Document(where, text) if text.strip() else None

    def _no_text(self, value: Any, where: str) -> UserError:
        if not isinstance(value, dict):
            got = f"{type(value).__name__}: {str(value)[:60]!r}"
            hint = f'a row is a string, or an object with "{self.text_key}"; {FIX}'
            return UserError("this row is not text", where=where, got=got, hint=hint)
        if self.text_key in value:
            got = f"{type(value[self.text_key]).__name__}: {str(value[self.text_key])[:60]!r}"
            return UserError(f'"{self.text_key}" of this row is not text', where=where, got=got, hint=FIX)
        texts = [key for key, item in value.items() if isinstance(item, str)]
        return self._no_key(where, list(value), max(texts, key=lambda key: len(value[key]), default=None))

    def _no_key(self, where: str, keys: list[str], guess: str | None) -> UserError:
        guess = nearest(self.text_key, keys) or guess
        hint = f"set data.text_key={guess} if that is the text" if guess else FIX
        return UserError(f'no key "{self.text_key}" in this row', where=where, got="keys: " + ", ".join(keys[:20]), hint=hint)

    def _skip(self, error: UserError, position: tuple[int, int]) -> None:
        """Count the bad row at `position` (file, line or row) once; raises unless bad rows are to be skipped."""
        if not self.skip_bad:
            raise error
        if position <= self._furthest:
            return
        self._furthest, self.bad = position, self.bad + 1
        if len(self.skipped) < SHOWN:
            self.skipped.append(f"{error.where}: {error.message}")
        if self.bad == HOPELESS and not self._found_text:
            raise UserError(f"the first {HOPELESS} rows have no text", where=error.where, got=error.got, hint=error.hint)


FIX = "fix it, or set data.bad_rows=skip"
RESTORE = "fix or restore the file; then continue a started run with: finetune resume RUN"


class Files(Source):
    """Local files, read one after the other. A cursor is the file's number with byte offset and line, or row group and row."""

    def __init__(self, name: str, files: dict[str, Path], *, text_key: str, skip_bad: bool, block_bytes: int) -> None:
        self.files = list(files.items())
        self._stamps: dict[int, tuple[int, int]] = {}
        super().__init__(name, _digest(files), text_key=text_key, skip_bad=skip_bad, block_bytes=block_bytes)

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        readers = {".txt": self._text, ".jsonl": self._jsonl, ".parquet": self._parquet}
        for number in range(cursor.get("file", 0), len(self.files)):
            reader = readers[self.files[number][1].suffix.lower()]
            try:
                with self.files[number][1].open("rb") as file:  # keeps it readable if it is renamed or removed
                    try:
                        self._check_unchanged(number, file)
                        for item in reader(number, cursor if number == cursor.get("file") else {}):
                            self._check_unchanged(number, file)  # the file may have been written or truncated just now
                            yield item
                    except UserError:
                        self._check_unchanged(number, file)  # a changed file is the better explanation
                        raise
                    self._check_unchanged(number, file)
            except OSError as error:
                raise UserError("cannot read the data file", where=self.files[number][0], got=str(error), hint=RESTORE) from None

    def _check_unchanged(self, number: int, file: BinaryIO) -> None:
        """Raise UserError if an open file has changed since the run first opened it; a new timestamp alone is no change."""
        _, path = self.files[number]
        before, now = self._stamps.setdefault(number, _stamp(file)), _stamp(file)
        if now != before and _digest(dict(self.files)) != self.digest:
            got = f"{now[0]} bytes, it had {before[0]}" if now[0] != before[0] else "different content"
            raise UserError("the data file changed while it was being read", where=str(path), got=got, hint=RESTORE)

    def _text(self, number: int, cursor: Cursor) -> Iterator[tuple[Document, After]]:
        """A .txt is one long text, cut into documents at the first blank line after `PIECE` characters.

        Without blank lines it is cut at the end of a line, so that no file has to fit into memory.
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
                        hint="write one JSON object per line; use a .txt for one long text",
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
                    self._skip(UserError("this line is not JSON", where=where, got=got, hint=FIX), position)
                    continue
                except RecursionError:
                    got = "brackets nested too deeply"
                    self._skip(UserError("this line is not a row", where=where, got=got, hint=FIX), position)
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
            raise UserError("cannot read the parquet file", where=name, got=str(error).splitlines()[0], hint=RESTORE) from None

    def _decode(self, raw: bytes, number: int, offset: int, line: int) -> str:
        """The text of one line; empty if it is not UTF-8 and is skipped."""
        try:
            return raw.decode("utf-8-sig" if not offset else "utf-8")
        except UnicodeDecodeError as invalid:
            bad_line = UserError(
                "the data file is not UTF-8",
                where=f"{self.files[number][0]}:{line}",
                got=f"byte {raw[invalid.start]:#04x} at column {invalid.start + 1}",
                hint="save it as UTF-8 (iconv -f latin1 -t utf-8), or skip such lines with data.bad_rows=skip",
            )
            self._skip(bad_line, (number, line))
            return ""


class Hub(Source):
    """A streamed dataset of the hub, reopened for each pass, because iterating changes the state of its dataset.

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
            except Exception as error:  # the hub's client raises many types; each means that the rest is unreachable
                raise UserError(
                    "reading the dataset failed",
                    where=f"{self.name}[{index}]",
                    got=_one_line(error),
                    hint="check the network, then continue from there: finetune resume RUN",
                ) from None
            where = f"{self.name}[{index}]"
            index += 1
            document = self._document(value, where, (0, index))
            if document is not None:
                yield document, after


def _cut(raw: bytes) -> int:
    """Where to cut a line that is too long: after its last space, else at a boundary of UTF-8 characters."""
    at = raw.rfind(b" ") + 1
    if at:
        return at
    at = len(raw) - 1
    while at > len(raw) - 4 and raw[at] & 0xC0 == 0x80:  # a continuation byte: the character began before
        at -= 1
    return at


def _digest(files: dict[str, Path]) -> str:
    """SHA-256 over name, size, first and last MiB of each file, so that a terabyte need not be read for it."""
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
            raise UserError("cannot read the data file", where=name, got=str(error), hint=RESTORE) from None
    return digest.hexdigest()


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """(bytes, modification time) of a file, which change when it is written."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _not_loaded(name: str, error: Exception) -> UserError:
    return UserError(
        "cannot load the dataset",
        where="data.name",
        got=f"{name}: {_one_line(error)}",
        hint="check the name, split and revision on huggingface.co/datasets, the network, and `hf auth login`; "
        "or use a local file: data.path=FILE.jsonl",
    )


def _open_hub(name: str, split: str, files: list[str], revision: str | None) -> tuple[Callable[[], Any], str, str | None]:
    """(a function that opens the streamed dataset, digest, commit). The digest includes the version in `datasets`: the commit.

    A local folder may replace a dataset on the hub; it has no commit.
    """
    import datasets

    description = f"{name} (split {split}{f', revision {revision}' if revision else ''})"
    try:
        builder = datasets.load_dataset_builder(name, data_files=files or None, revision=revision)
        commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
        if commit is not None and revision != commit:
            # With a revision `datasets` takes features from the files, not from the hub's conversion: it is always set, so
            # that a cursor saved now matches the stream that is opened at this commit later.
            builder = datasets.load_dataset_builder(name, data_files=files or None, revision=commit)
        builder.as_streaming_dataset(split=split)  # raises for a wrong split
    except Exception as error:  # as above
        raise _not_loaded(description, error) from None
    if revision is not None and commit is None:
        raise _no_revisions(name, revision)
    version = json.dumps([name, split, files, builder.hash])
    digest = hashlib.sha256(version.encode()).hexdigest()
    return functools.partial(builder.as_streaming_dataset, split=split), digest, commit


def _no_revisions(name: str, revision: str) -> UserError:
    return UserError(
        "only a dataset on the hub has revisions", where="data.revision", got=f"{revision} of {name}", hint="remove the key"
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
    commit; default: the newest), which `Source.revision` resolves to a commit. files: shell patterns over the
    paths in a folder, a package or a hub dataset. text_key: the key or column of the text. skip_bad: rows without text and lines
    that cannot be decoded are counted and skipped instead of refused.

    Raises:
        UserError: it does not exist, holds no such file, is of an unsupported type, or has no revisions.
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
            raise UserError("this type of file cannot be streamed", where=root.name, got=root.suffix or "no suffix", hint=hint)
        return Files(path, {root.name: root}, **settings)
    if name is None:
        raise UserError("the recipe has no data", where="data", hint="set data.path=FILE.txt or data.name=HUB_ID")
    if name.startswith(PACKAGE):
        return Files(name, _choose(package_files(name, "data.name"), files or [], name), **settings)
    dataset, digest, commit = _open_hub(name, split, files or [], revision)
    return Hub(name, dataset, digest, commit, **settings)


def _choose(files: dict[str, Path], patterns: list[str], name: str) -> dict[str, Path]:
    known = sorted(file for file in files if file.lower().endswith(STREAMED) and ".dist-info/" not in file)
    chosen = [file for file in known if not patterns or any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(
            "no text file matches",
            where="data.files" if patterns else "data",
            got=", ".join(patterns) or name,
            hint="it has: " + ", ".join(known[:20]) if known else f"{name} holds no {', '.join(STREAMED)} file",
        )
    return {file: files[file] for file in chosen}


# -------------------------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class PackedSequence:
    """One training sequence: `ids` (length,) int32. where: the document in which it begins. after: the cursor of the next."""

    ids: np.ndarray
    where: str
    after: Cursor


@dataclass(frozen=True)
class _PreparedBlock:
    """A tokenized block: ids (n, length) int32, one row per sequence in final order, and the location of each."""

    cursor: Cursor
    number: int
    ids: np.ndarray
    wheres: list[str]
    check: str  # hash of the ids


class Corpus:
    """Packed sequences of a source, and those held out.

    encode turns texts into token ids, without special tokens; end is the id appended to every document. What is left
    of a block after its last full sequence is dropped: less than `length` tokens in some million. `read` counts documents,
    characters and tokens prepared in this process, and the tokens dropped.

    Raises:
        UserError: the data is empty, or its first block has less than twice the tokens to be held out.
    """

    def __init__(self, source: Source, encode: Encode, *, length: int, end: int, seed: int, heldout_rows: int) -> None:
        self.source, self.encode, self.length, self.end, self.seed = source, encode, length, end, seed
        self.read = {"documents": 0, "characters": 0, "tokens": 0, "dropped": 0}
        # Texts of held-out documents; equal ones elsewhere in the corpus are not trained either.
        self._held: set[str] = set()
        self.heldout = self._hold_out(heldout_rows)

    def _hold_out(self, count: int) -> list[list[int]]:
        """Sequences of whole documents, drawn at random from the first block, a function of data and seed."""
        blocks = self.source.blocks()
        first = next(blocks, None)
        if first is None:
            skipped = f"; {self.source.bad} skipped, such as {self.source.skipped[0]}" if self.source.bad else ""
            raise UserError("the data has no text", where=self.source.name, got=f"0 documents{skipped}")
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
            "too little text for this much held-out data",
            where="data.heldout",
            got=f"{count} sequences of {self.length} are {needed:,} tokens, and as many must remain for training; the first "
            f"block of {self.source.name} has {total:,} tokens in {len(lengths)} documents, which are held out whole",
            hint=(f"set data.heldout={possible}, " if possible else "use ") + "a smaller data.max_length, or more text",
        )

    def _encoded(
        self, documents: Iterable[Document], stop: threading.Event | None = None
    ) -> Iterator[tuple[Document, list[int]]]:
        """Each document with its tokens and the end token; a few at a time, because a tokenizer's output takes much memory."""
        pending: list[Document] = []
        size = 0
        for document in documents:
            pending.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                if stop is not None and stop.is_set():
                    raise _Stopped
                yield from zip(pending, self._tokens(pending), strict=True)
                pending, size = [], 0
        if pending:
            yield from zip(pending, self._tokens(pending), strict=True)

    def _tokens(self, documents: list[Document]) -> list[list[int]]:
        return [[*ids, self.end] for ids in self.encode([document.text for document in documents])]

    def _prepare(self, block: Block, epoch: int, number: int, stop: threading.Event) -> _PreparedBlock:
        import numpy as np

        documents = [document for document in block.documents if document.text not in self._held]
        shuffled = random.Random(f"{self.seed}/{epoch}/{number}")
        shuffled.shuffle(documents)
        parts = [np.array(tokens, np.int32) for _, tokens in self._encoded(documents, stop)]
        stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        starts = np.cumsum([0, *map(len, parts)])
        order = list(range(len(stream) // self.length))
        shuffled.shuffle(order)
        cut = stream[: len(order) * self.length].reshape(len(order), self.length)
        ids = cut[np.array(order, np.int64)]
        inside = np.searchsorted(starts, np.array(order, np.int64) * self.length, side="right") - 1
        self.read["documents"] += len(documents)
        self.read["characters"] += sum(len(document.text) for document in documents)
        self.read["tokens"] += len(stream)
        self.read["dropped"] += len(stream) - cut.size
        check = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        return _PreparedBlock(block.cursor, number, ids, [documents[at].where for at in inside], check)

    def _blocks(self, epoch: int, cursor: Cursor | None, stop: threading.Event) -> Generator[_PreparedBlock, None, None]:
        number = cursor["number"] if cursor else 0
        for block in self.source.blocks(cursor["block"] if cursor else None):
            yield self._prepare(block, epoch, number, stop)
            number += 1

    def rows(self, epoch: int, cursor: Cursor | None = None) -> Generator[PackedSequence, None, None]:
        """The sequences of an epoch from a cursor (a `PackedSequence.after` of the same epoch) on, in the same order.

        The next blocks are prepared in the background, until the generator is closed or collected.

        Raises:
            UserError: the data cannot be read, has changed at that cursor, or does not fill one sequence.
        """
        stop = threading.Event()
        blocks = ahead(self._blocks(epoch, cursor, stop), stop)
        start = cursor["row"] if cursor else 0
        check = cursor["check"] if cursor else None
        any_sequence = cursor is not None
        try:
            for block in blocks:
                if check is not None and check != block.check:
                    raise self._changed(cursor)
                check = None
                for row in range(start, len(block.ids)):
                    any_sequence = True
                    after = {"block": block.cursor, "number": block.number, "row": row + 1, "check": block.check}
                    yield PackedSequence(block.ids[row], block.wheres[row], after)
                start = 0
            if check is not None:
                raise self._changed(cursor)
            if not any_sequence:
                got = f"{self.read['tokens']:,} tokens besides those held out; a sequence has {self.length}"
                raise UserError("the data does not fill one sequence", where=self.source.name, got=got, hint="use more text")
        finally:
            blocks.close()

    def _changed(self, cursor: Cursor | None) -> UserError:
        return UserError(
            "the data has changed since this checkpoint was saved",
            where=self.source.name,
            got=f"different sequences at {json.dumps(cursor)[:300]}",
            hint="restore the data, tokenizer, seed and data.max_length of that run, or start a new one",
        )


class _Stopped(Exception):
    """Ends the work on a block that is not needed any more."""


def ahead(items: Generator[T, None, None], stop: threading.Event, depth: int = AHEAD) -> Generator[T, None, None]:
    """Iterate over `items`, computing up to `depth` of them ahead in a background thread.

    Errors of `items` are raised here, in place of their item. Closing this sets `stop`, which `items` may check, and
    ends the thread (one that hangs in the network is not waited for).
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)

    def work() -> None:
        try:
            while room.acquire() and not stop.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # raised in the consumer's thread, StopIteration too
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
            yield item  # type: ignore[misc]  # None comes only with an error
    finally:
        stop.set()
        room.release()
        thread.join(PATIENCE)
