"""Atomic writes of files and folders, checksums, disk space and disk errors.

Everything is written under a temporary name, synced, and renamed: a kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import Stop, UserError
from finetune.units import human_bytes

MARK = "run.json"
TOKENIZER = "tokenizer"  # a run's folder for the tokenizer that it trained

ROOM = "free some space there"
# errno → (message, hint)
REFUSALS = {
    errno.ENOSPC: ("the disk is full", ROOM),
    errno.EDQUOT: ("the disk quota is used up", ROOM),
    errno.EFBIG: ("this file exceeds the limit of the file system or the shell (ulimit -f)", "use another disk"),
    errno.EROFS: ("this disk is read-only", "make it writable"),
    errno.EACCES: ("no permission for this file", "change its permissions"),
    errno.EPERM: ("no permission for this file", "change its permissions"),
    errno.EIO: ("disk I/O error", "check the disk (dmesg)"),
}


class DiskError(UserError):
    """A disk is full, not writable or failing."""


def disk_error(error: BaseException, path: Path | None = None) -> DiskError | None:
    """The DiskError for `error` if it means that a disk is full, not writable or failing; None otherwise.

    path: what was being written, unless the error names a file.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, Stop):
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # Rust libraries, such as safetensors and tokenizers
            number = int(match[1])
        elif isinstance(error, OSError) and re.match(r"\d+ requested and \d+ written|Not enough free space", str(error)):
            # numpy's tofile, which writes GGUF files
            number = errno.ENOSPC
    if number not in REFUSALS:
        return None
    message, hint = REFUSALS[number]
    file_name = getattr(error, "filename", None)
    if file_name is not None and ".finetune-" not in str(file_name):  # a temporary name of `_beside` means nothing to the user
        path = Path(os.fsdecode(file_name))
    got = os.strerror(number)
    existing = (
        next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None) if path is not None else None
    )
    if existing is not None and hint == ROOM:
        got += f"; {human_bytes(shutil.disk_usage(existing).free)} free"
    return DiskError(message, where=None if path is None else str(path), got=got, hint=hint)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise disk errors within the block as DiskError."""
    try:
        yield
    except Exception as error:
        if (refused := disk_error(error, path)) is not None:
            raise refused from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (they are not until the folder itself is synced)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _beside(path: Path, what: str) -> Path:
    """A temporary name beside `path`; the next writer replaces what a kill left there."""
    return path.parent / f".{path.name}.finetune-{what}"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there is renamed to `path` if the block succeeds, else removed."""
    temporary = _beside(path, "new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder with a temporary name; it is renamed to `path` if the block succeeds, else removed.

    Every file in it is synced before the rename. An existing `path` is replaced.
    """
    temporary, old = _beside(path, "new"), _beside(path, "old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # killed between the two renames below
            os.replace(old, path)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for root, _, names in os.walk(temporary):
                for name in names:
                    os.chmod(os.path.join(root, name), 0o644)  # safetensors makes files that only the owner may read
                    with open(os.path.join(root, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(root))
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: a kill leaves all of it or nothing under its name."""
    gone = _beside(path, "old")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` can be written to `folder`, before a run that would fail after hours. what: names it in errors.

    Raises:
        UserError: `folder` is not writable, or its disk has less than `needed_bytes` free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not shutil.disk_usage(existing).total:
        raise UserError(
            f"cannot write {what} there", where=str(folder), got=f"{existing} is not writable", hint="choose another folder"
        )
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"not enough disk space: {what} will write about {human_bytes(needed_bytes)}",
            where=str(folder),
            got=f"{human_bytes(free)} free",
            hint="free some space, or put the run elsewhere: run.dir=/path/on/a/larger/disk",
        )


def plain(name: str) -> bool:
    """Whether `name` is a plain file name, without separators, "." or ".."."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
