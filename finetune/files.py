"""Files that are complete or absent.

Everything is written beside its place, synced, and renamed: a kill at any moment leaves the old file or the new one.
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
TOKENIZER = "tokenizer"  # the folder in a run of one that it trained on its text

ROOM = "free some space there"
# What a disk can refuse, as the user's mistake: (what, what to do).
REFUSALS = {
    errno.ENOSPC: ("the disk is full", ROOM),
    errno.EDQUOT: ("the disk quota is used up", ROOM),
    errno.EFBIG: ("this file is larger than its disk or the shell (ulimit -f) allows", "use another disk"),
    errno.EROFS: ("this disk is read-only", "make it writable"),
    errno.EACCES: ("there is no permission for this file", "give it"),
    errno.EPERM: ("there is no permission for this file", "give it"),
    errno.EIO: ("the disk fails", "look at it (dmesg)"),
}


class DiskError(UserError):
    """A disk is full, closed or broken."""


def disk_error(error: BaseException, path: Path | None = None) -> DiskError | None:
    """The user's mistake where `error` means that a disk is full, closed or broken; None of any other error.

    path: what was to be written, else the file that the error names.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, Stop):
        if said := re.search(r"\(os error (\d+)\)", str(error)):  # libraries in Rust, such as safetensors and tokenizers
            number = int(said[1])
        elif isinstance(error, OSError) and re.match(r"\d+ requested and \d+ written|Not enough free space", str(error)):
            # numpy's tofile, which writes a GGUF
            number = errno.ENOSPC
    if number not in REFUSALS:
        return None
    what, hint = REFUSALS[number]
    named = getattr(error, "filename", None)
    if named is not None and ".finetune-" not in str(named):  # a name of `_beside` tells nobody anything
        path = Path(os.fsdecode(named))
    got = os.strerror(number)
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None) if path is not None else None
    if there is not None and hint == ROOM:
        got += f"; {human_bytes(shutil.disk_usage(there).free)} free"
    return DiskError(what, where=None if path is None else str(path), got=got, hint=hint)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what a disk refuses is the user's mistake."""
    try:
        yield
    except Exception as error:
        if (mistake := disk_error(error, path)) is not None:
            raise mistake from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until its folder is synced)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _beside(path: Path, what: str) -> Path:
    """A name of our own beside `path`; what a kill left under it is taken over by the next writer."""
    return path.parent / f".{path.name}.finetune-{what}"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the file written there becomes `path` if the block ends well and vanishes if it does not."""
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
    """Replace `path` by `text`: a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings: JSON knows neither."""
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
    """Yield a fresh folder beside `path` that becomes `path` if the block ends well and vanishes if it does not.

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
                    os.chmod(os.path.join(root, name), 0o644)  # safetensors makes its files for their owner alone
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
    """Remove a folder so that a kill on the way leaves all of it or nothing under its name."""
    gone = _beside(path, "old")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse now what would fail after hours.

    Raises:
        UserError: the disk that holds `folder` has less than `needed_bytes` free.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK) or not shutil.disk_usage(there).total:
        raise UserError(
            f"{what} cannot be written there", where=str(folder), got=f"{there} is not writable", hint="give another run.dir"
        )
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise UserError(
            f"not enough disk space: {what} will write about {human_bytes(needed_bytes)}",
            where=str(folder),
            got=f"{human_bytes(free)} free",
            hint="free some space, or put the run elsewhere: run.dir=/path/on/a/larger/disk",
        )


def plain(name: str) -> bool:
    """Whether `name` is that of a file or folder right where it is looked for, and does not lead elsewhere."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
