"""Rows of a dataset, read from a file, a package or the hub. A source gives raw values, each with its location
(`file.jsonl:12`); a format (formats.py) turns them into rows."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.data.formats import EXPECTED, BadRow, Raw, Row, detect, refuse_preferences, shape, to_row
from finetune.errors import UserError, nearest

PACKAGE = "package:"
DEEPEST = 100  # nesting of lists in a .yml: a row has two or three levels
READABLE = (".jsonl", ".json", ".txt", ".yml", ".yaml")


@dataclass(frozen=True)
class Rows:
    """All rows of a source. sha256: of its bytes, or the hub's fingerprint. reason: why the format was chosen."""

    rows: list[Row]
    source: str
    sha256: str
    format: str
    reason: str
    skipped: list[str] = field(default_factory=list)  # locations of rows that do not match the format


# ---------------------------------------------------------------------------------------------------------------- sources


def _bad_rows_error(message: str, problems: list[tuple[str, str]], total: int, hint: str) -> UserError:
    shown = "\n         ".join(f"{where}: {why}" for where, why in problems[:5])
    more = f"\n         … and {len(problems) - 5} more" if len(problems) > 5 else ""
    return UserError(f"{len(problems)} of {total} {message}", got=shown + more, hint=hint)


def _read_jsonl(text: str, name: str) -> list[Raw]:
    raws: list[Raw] = []
    broken: list[tuple[str, str]] = []
    lines = text.removesuffix("\n").split("\n")  # splitlines also breaks at characters that JSON allows in strings
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raws.append((f"{name}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            broken.append((f"{name}:{number}", f"{error.msg} at column {error.colno}: {line[:80]!r}"))
        except RecursionError:
            broken.append((f"{name}:{number}", f"brackets nested too deeply: {line[:80]!r}"))
    if broken:
        raise _bad_rows_error("lines are not JSON", broken, len(lines), "fix or remove them: one JSON object per line")
    return raws


def _read_json(text: str, name: str) -> list[Raw]:
    """Rows of a list, or of an object with one list; each with the line on which it begins."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines in a file named .json
            return _read_jsonl(text, name)
        raise UserError(
            "the file is not JSON",
            where=f"{name}:{error.lineno}",
            got=f"{error.msg} at column {error.colno}",
            hint="fix that line",
        ) from None
    except RecursionError:
        got = "brackets nested too deeply"
        raise UserError("no rows in this file", where=name, got=got, hint="write a list of rows, or one row per line") from None
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if len(lists) != 1:
            raise UserError(
                "this file holds one object, and it is not clear which key has the rows",
                where=name,
                got="keys: " + ", ".join(value),
                hint="write a list of rows, or one row per line (.jsonl)",
            )
        (key, value), *_ = lists.items()
        return [(f"{name}:{key}[{index}]", item) for index, item in enumerate(value)]
    if not isinstance(value, list):
        raise UserError(
            "no rows in this file",
            where=name,
            got=type(value).__name__,
            hint="write a list of rows, or one row per line (.jsonl)",
        )
    decoder = json.JSONDecoder()
    raws, position, line = [], text.index("[") + 1, 1
    counted = 0
    for _ in value:
        while text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        item, position = decoder.raw_decode(text, position)
        raws.append((f"{name}:{line}", item))
    return raws


def _read_text(text: str, name: str) -> list[Raw]:
    """Documents are paragraphs: blocks of lines between blank lines."""
    raws: list[Raw] = []
    block: list[str] = []
    begin = 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            if not block:
                begin = number
            block.append(line.rstrip("\r"))
        elif block:
            raws.append((f"{name}:{begin}", "\n".join(block)))
            block = []
    return raws


def _check_nesting(text: str, name: str, loader: Any) -> None:
    """Raise UserError for YAML that would exhaust memory (aliases) or crash the process (libyaml does not limit depth)."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            got = f"the alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"lists nested more than {DEEPEST} deep"
            line = event.start_mark.line + 1 if event.start_mark else 1
            hint = "write each row in full; an alias can expand to more than fits into memory"
            raise UserError("cannot read rows from this YAML", where=f"{name}:{line}", got=got, hint=hint)


def _read_yaml(text: str, name: str) -> list[Raw]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_nesting(text, name, loader)
        value = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: an invalid date
        got = str(error).splitlines()[0]
        raise UserError("the file is not YAML", where=name, got=got, hint="fix it, or use .jsonl") from None
    rows = value.get("conversations") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError("no rows in this file", where=name, hint="write a list of rows, or `conversations:` with one")
    return [(f"{name}[{index}]", item) for index, item in enumerate(rows)]


READERS: dict[str, Callable[[str, str], list[Raw]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
    ".yml": _read_yaml,
    ".yaml": _read_yaml,
}


def no_such_file(path: Path, where: str) -> UserError:
    """The error of a missing data file, with the nearest name as a hint."""
    near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
    hint = f"did you mean {path.parent / near}?" if near else "put the file there, or use another: data.path=FILE"
    return UserError("data file not found", where=where, got=str(path), hint=hint)


def _read_file(path: Path, name: str) -> tuple[list[Raw], bytes]:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise no_such_file(path, "data.path") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError("the data file is not UTF-8", where=f"{name}:{line}", got=f"byte {content[error.start]:#04x}") from None
    except OSError as error:
        raise UserError("cannot read the data file", where="data.path", got=str(error)) from None
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError("unsupported type of data file", where=name, got=path.suffix, hint="one of " + " ".join(READABLE))
    return reader(text, name), content


def package_files(name: str, where: str) -> dict[str, Path]:
    """Files of the installed distribution `package:NAME`, by their path in it; it is not imported.

    Raises:
        UserError: it is not installed.
    """
    distribution = name.removeprefix(PACKAGE)
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "this package is not installed", where=where, got=name, hint=f"pip install --no-deps {distribution}"
        ) from None
    return {str(file): Path(str(file.locate())) for file in files or [] if not file.is_absolute() and ".." not in file.parts}


def check_patterns(patterns: list[str], where: str = "data.files") -> None:
    """Raise UserError for a pattern that leaves its folder or dataset: it could read any file of this machine."""
    for pattern in patterns:
        if pattern.startswith(("/", "~")) or ".." in pattern.replace("\\", "/").split("/"):
            hint = "use patterns of files in the dataset; for a local file set data.path=FILE"
            raise UserError("this pattern matches files outside the dataset", where=where, got=pattern, hint=hint)


def _read_package(name: str, patterns: list[str]) -> tuple[list[Raw], str]:
    files = {file: path for file, path in package_files(name, "data.name").items() if file.endswith(READABLE)}
    chosen = {f: p for f, p in files.items() if not patterns or any(fnmatch.fnmatch(f, pattern) for pattern in patterns)}
    if not chosen:
        raise UserError(
            "no data file of this package matches",
            where="data.files",
            got=", ".join(patterns) or name,
            hint="it has: " + ", ".join(list(files)[:20]) if files else "it has no data files",
        )
    raws: list[Raw] = []
    digest = hashlib.sha256()
    for file in sorted(chosen):
        file_rows, content = _read_file(chosen[file], file)
        raws += file_rows
        digest.update(content)
    return raws, digest.hexdigest()


def _read_hub(name: str, split: str, files: list[str], max_rows: int | None) -> tuple[list[Raw], str]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, data_files=files or None)
    except Exception as error:  # the hub's client raises many types; each means that there is no data
        raise UserError(
            "cannot load the dataset",
            where="data.name",
            got=f"{name} (split {split}): {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="check the name and split on huggingface.co/datasets, the network, and `hf auth login`; "
            "or use a local file: data.path=FILE.jsonl",
        ) from None
    if max_rows is not None:
        dataset = dataset.select(range(min(max_rows, len(dataset))))
    return [(f"{name}[{index}]", value) for index, value in enumerate(dataset)], str(dataset._fingerprint)


def load_rows(
    *,
    name: str | None,
    path: str | None,
    files: list[str] | None = None,
    split: str = "train",
    format_: str = "auto",
    max_rows: int | None = None,
    skip_bad: bool = False,
) -> Rows:
    """All rows of a source, in its order.

    Raises:
        UserError: the source cannot be read, or rows do not match the format (with the first five, and their number).
    """
    check_patterns(files or [])
    if path is not None:
        raws, content = _read_file(Path(path), Path(path).name)
        source, digest = path, hashlib.sha256(content).hexdigest()
    elif name is not None and name.startswith(PACKAGE):
        (raws, digest), source = _read_package(name, files or []), name
    elif name is not None:
        (raws, digest), source = _read_hub(name, split, files or [], max_rows), f"{name} ({split})"
    else:
        raise UserError("the recipe has no data", where="data", hint="set data.path=FILE.jsonl or data.name=HUB_ID")
    if not raws:
        raise UserError("the data is empty", where=source, got="0 rows")
    raws = raws[:max_rows]
    refuse_preferences(raws)
    reason = "set by the recipe"
    if format_ == "auto":
        detected = detect(raws)
        if detected is None:
            raise _bad_rows_error(
                "rows match no known format",
                [(where, shape(value)) for where, value in raws],
                len(raws),
                "a row is " + ", or ".join(f"{expected} ({name})" for name, expected in EXPECTED.items()),
            )
        format_, reason = detected
    rows, bad = [], []
    for raw in raws:
        try:
            row = to_row(raw, format_)
        except BadRow as error:
            bad.append((raw[0], str(error)))
        else:
            if row is None:
                bad.append((raw[0], shape(raw[1])))
            else:
                rows.append(row)
    if bad and not skip_bad:
        raise _bad_rows_error(
            f"rows do not have the format {format_}",
            bad,
            len(raws),
            f"a row must be {EXPECTED[format_]}; fix them, set another data.format, or data.bad_rows=skip",
        )
    return Rows(rows, source, digest, format_, reason, [where for where, _ in bad])
