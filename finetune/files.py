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
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import Mistake

MARK = "run.json"
TOKENIZER = "tokenizer"  # the folder in a run of one that it trained on its text


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "new")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "new"), _beside(path, "old")
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


def human_bytes(count: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


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
    """One run's folder: who owns it, its state and its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise Mistake(
                "another process is running in this folder",
                where=str(self.path),
                do="wait for it, or give run.dir=OTHER",
            ) from None

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
        write_json(self.path / MARK, record)

    def append(self, metrics: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")

    def metrics_bytes(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int, keep: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Forget the metrics written after a checkpoint, which a resumed run writes again; returns lines with a key of `keep`."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes()[size:].decode("utf-8", "replace").splitlines() if keep else []
        os.truncate(self.metrics, min(size, self.metrics_bytes()))
        return [json.loads(line) for line in lines if any(f'"{key}"' in line for key in keep)]


def read_run(path: Path) -> dict[str, Any]:
    """run.json of the run folder `path`; Mistake when `path` is no run folder."""
    try:
        return json.loads((path / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mistake("this is no run folder", where=str(path), found=f"no {MARK} in it", do="finetune show runs/NAME") from None
    except (json.JSONDecodeError, NotADirectoryError) as error:
        raise Mistake("the run's record cannot be read", where=str(path / MARK), found=str(error)) from None
