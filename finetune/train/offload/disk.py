"""Tensors on the disk in the place of memory: in mapped files without a name, which are gone with the process however it ends.

Such a tensor is read from its file when it is touched, and its pages can be let go again at any time: to the system they are
cache and not memory of the process (RssFile, not RssAnon, in /proc/self/status). The files are mapped privately: who writes
into a tensor gets a copy of that page, and the file stays as it is.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import torch
from torch import Tensor

from finetune.errors import UserError

FILE = 1 << 30  # bytes; sparse, so that the last one takes what is in it
# The system reads ahead no more than its window for one request, whatever is asked for (mm/readahead.c, force_page_cache_ra).
# Measured: one request for 128 MiB brought 1 of them; requests of this size brought all, without waiting for them.
AHEAD = 128 << 10


class _File:
    def __init__(self, folder: Path, size: int) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # lives as long as its tensors
        os.ftruncate(self.file.fileno(), size)
        self.map = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.size, self.used = size, 0


class Span(NamedTuple):
    """Bytes `start` … `stop` of a file, whole pages."""

    file: _File
    start: int
    stop: int


class Scratch:
    """Room for tensors on the disk that holds `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[_File] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a setting of transformers, and it copies its settings

    def put(self, tensor: Tensor) -> Tensor:
        """The same numbers, on the disk; `tensor` itself, where it lies here already.

        Raises:
            UserError: the disk is full, or cannot be written to.
        """
        if self.holds(tensor) or not tensor.numel():
            return tensor
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size = raw.numel()
        try:
            file = self._room(size)
            rest, at = raw.numpy(), file.used
            while len(rest):
                written = os.pwrite(file.file.fileno(), rest.data, at)
                rest, at = rest[written:], at + written
        except OSError as error:
            raise UserError(
                "the weights cannot be put on the disk",
                where=str(self.folder),
                got=str(error),
                hint="free some space, or put the run elsewhere: run.dir=/path/on/a/larger/disk",
            ) from None
        start, file.used = file.used, file.used + _pages(size)
        return file.bytes[start : start + size].view(tensor.dtype).view(tensor.shape)

    def _room(self, size: int) -> _File:
        if not self._files or self._files[-1].used + size > self._files[-1].size:
            self._files.append(_File(self.folder, max(FILE, _pages(size))))
        return self._files[-1]

    def _file_of(self, tensor: Tensor) -> _File | None:
        address = tensor.untyped_storage().data_ptr()
        return next((file for file in self._files if file.bytes.data_ptr() == address), None)

    def holds(self, tensor: Tensor) -> bool:
        return self._file_of(tensor) is not None

    def spans(self, tensors: Iterable[Tensor]) -> list[Span]:
        """Where these tensors lie; those that lie side by side in one piece."""
        found: list[Span] = []
        for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
            file = self._file_of(tensor)
            if file is None:
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} was not put here")
            start = tensor.data_ptr() - file.bytes.data_ptr()
            stop = start + _pages(tensor.numel() * tensor.element_size())
            if found and found[-1].file is file and found[-1].stop == start:
                start = found.pop().start
            found.append(Span(file, start, stop))
        return found

    def sync(self) -> None:
        """Write what is not on the disk yet: the system can then let pages go without a word."""
        for file in self._files:
            os.fsync(file.file.fileno())


def read_ahead(spans: Sequence[Span]) -> None:
    """Have the system begin to read; returns before it is done."""
    for file, start, stop in spans:
        for at in range(start, stop, AHEAD):
            os.posix_fadvise(file.file.fileno(), at, min(AHEAD, stop - at), os.POSIX_FADV_WILLNEED)


def let_go(spans: Sequence[Span]) -> None:
    """Take these pages out of the process; they are read again when they are touched."""
    for file, start, stop in spans:
        file.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def is_memory(folder: Path) -> str | None:
    """The kind of file system that `folder` lies on, where that is memory itself."""
    holders = [part for part in psutil.disk_partitions(all=True) if folder.absolute().is_relative_to(part.mountpoint)]
    kind = max(holders, key=lambda part: len(part.mountpoint)).fstype if holders else ""
    return kind if kind in ("tmpfs", "ramfs") else None
