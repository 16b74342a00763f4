"""Files that are complete or absent, and the folder of a run.

Everything is written beside its place, synced, and renamed: a kill at any moment leaves the old file or the new one. The run
folder is a contract (scripts rely on it):

    recipe.yaml     the resolved recipe          adapter/   what PEFT loads
    run.json        state, provenance, results   merged/    what plain transformers loads
    metrics.jsonl   one line a step              export/    what other programs load
    tokenizer/      one that the run trained     twin/      the run of the float twin
    eval/  samples/  checkpoints/step-000100/  report.html
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

from finetune.errors import Mistake, Stop
from finetune.processes import is_first
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


def refusal(error: BaseException, path: Path | None = None) -> Mistake | None:
    """The user's mistake where `error` means that a disk is full, closed or broken; None of any other error.

    path: what was to be written, else the file that the error names. Of a run's files it says which checkpoint stands, and what
    to type when the disk is mended.
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
    what, do = REFUSALS[number]
    named = getattr(error, "filename", None)
    if named is not None and ".finetune-" not in str(named):  # a name of `_beside` tells nobody anything
        path = Path(os.fsdecode(named))
    found = os.strerror(number)
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None) if path is not None else None
    if there is not None and do == ROOM:
        found += f"; {human_bytes(shutil.disk_usage(there).free)} free"
    run = _run_of(path) if path is not None else None
    if run is not None:
        whole = [file.parent.name for file in run.glob("checkpoints/step-*/manifest.json")]
        last = max(whole, key=lambda name: (len(name), name), default=None)  # the longer number is the higher one
        found += f"; the last whole checkpoint is {last}" if last else "; no checkpoint was written yet"
        outer = run.parent if run.name == "twin" and (run.parent / MARK).is_file() else run
        do += f", then: finetune resume {outer}"
    return Mistake(what, where=None if path is None else str(path), found=found, do=do)


def _run_of(path: Path) -> Path | None:
    """The run that can go on whose folder holds `path`. One that has trained nothing vanishes when it fails."""
    for folder in (path, *path.parents):
        if (folder / MARK).is_file() and ((folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists()):
            with contextlib.suppress(Mistake):
                return folder if read_run(folder)["state"] != "done" else None
    return None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Within it, what a disk refuses is the user's mistake."""
    try:
        yield
    except Exception as error:
        if (mistake := refusal(error, path)) is not None:
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
    with _writing(path):
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
    with _writing(path):
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
        Mistake: the disk that holds `folder` has less than `needed_bytes` free.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK) or not shutil.disk_usage(there).total:
        raise Mistake(
            f"{what} cannot be written there", where=str(folder), found=f"{there} is not writable", do="give another run.dir"
        )
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise Mistake(
            f"not enough disk space: {what} will write about {human_bytes(needed_bytes)}",
            where=str(folder),
            found=f"{human_bytes(free)} free",
            do="free some space, or put the run elsewhere: run.dir=/path/on/a/larger/disk",
        )


class RunFolder:
    """One run's folder: who owns it, its state and its metrics. Of several processes the first one writes, others only read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = is_first()
        self.metrics = path / "metrics.jsonl"
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        return (self.path / MARK).exists()

    def acquire(self) -> None:
        """Take the folder for this process; the lock dies with its owner.

        Raises:
            Mistake: another process is running in the folder.
        """
        import fcntl

        if not self.writes:
            return
        file = self.path / ".lock"
        while self._lock is None:
            with _writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(handle, 20).decode(errors="replace")
                os.close(handle)
                raise Mistake(
                    "another process is running in this folder",
                    where=str(self.path),
                    found=f"process {owner}" if owner else None,
                    do="wait for it, or give run.dir=OTHER",
                ) from None
            # The owner before removes the file when it ends: what was locked here need not be what the next one will open.
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                with _writing(self.path):
                    os.truncate(handle, 0)
                    os.pwrite(handle, str(os.getpid()).encode(), 0)
                self._lock = handle
            else:
                os.close(handle)

    def release(self) -> None:
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def read(self) -> dict[str, Any]:
        """run.json.

        Raises:
            Mistake: there is none, or it is damaged.
        """
        return read_run(self.path)

    def write(self, record: dict[str, Any]) -> None:
        self.write_json(MARK, record)

    def write_json(self, name: str, value: Any) -> None:
        if self.writes:
            write_json(self.path / name, value)

    def append(self, metrics: dict[str, Any]) -> None:
        if not self.writes:
            return
        with _writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")

    def metrics_bytes(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int, keep: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Forget the metrics written after a checkpoint, which a resumed run writes again; returns lines with a key of `keep`."""
        if not self.writes or not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes()[size:].decode("utf-8", "replace").splitlines() if keep else []
        os.truncate(self.metrics, min(size, self.metrics_bytes()))
        return [json.loads(line) for line in lines if any(f'"{key}"' in line for key in keep)]


def read_run(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """run.json of the run folder `path`. whole: it must say what every command asks for; a report is made of less.

    Raises:
        Mistake: `path` is no run folder, or its record is damaged.
    """
    try:
        record = json.loads((path / MARK).read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__}, no object")
        for key, kind in (("name", str), ("state", str), ("provenance", dict)):
            if whole and not isinstance(record.get(key), kind):
                raise ValueError(f"{key}: {str(record.get(key))[:80]!r}")
        if whole and not plain(record["name"]):
            raise ValueError(f"name: {record['name'][:80]!r}, which is no plain name")
    except FileNotFoundError:
        raise Mistake("this is no run folder", where=str(path), found=f"no {MARK} in it", do="finetune show runs/NAME") from None
    except (OSError, ValueError, RecursionError) as error:  # what is no JSON, and what is no UTF-8, is a ValueError
        do = "bring it back from a copy of the folder"
        raise Mistake("the run's record cannot be read", where=str(path / MARK), found=str(error), do=do) from None
    return record


def plain(name: str) -> bool:
    """Whether `name` is that of a file or folder right where it is looked for, and does not lead elsewhere."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
