"""Tensors on disk instead of in memory: in unnamed memory-mapped files, which vanish with the process however it ends.

Such a tensor is read from its file on access, and its pages can be released at any time: to the kernel they are
page cache and not memory of the process (RssFile, not RssAnon, in /proc/self/status). The files are mapped privately: a write
to a tensor copies the page and leaves the file unchanged.
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

FILE = 1 << 30  # bytes; sparse, so that the last one takes only what was written
# The kernel reads ahead at most its window per request, however much is requested (mm/readahead.c, force_page_cache_ra).
# Measured: one request for 128 MiB read 1 MiB; requests of this size read all of it, without blocking.
AHEAD = 128 << 10


class _File:
    def __init__(self, folder: Path, size: int) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as its tensors exist
        os.ftruncate(self.file.fileno(), size)
        self.map = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.size, self.used = size, 0


class Span(NamedTuple):
    """Bytes `start` … `stop` of a file, rounded to pages."""

    file: _File
    start: int
    stop: int


class Scratch:
    """Storage for tensors on the disk that holds `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[_File] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # transformers deep-copies its settings, and this is one

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to disk and return the mapped one; `tensor` itself if it is stored here already.

        Raises:
            UserError: the disk is full or not writable.
        """
        if self.holds(tensor) or not tensor.numel():
            return tensor
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size = raw.numel()
        try:
            file = self._file_with_space(size)
            remaining, offset = raw.numpy(), file.used
            while len(remaining):
                written = os.pwrite(file.file.fileno(), remaining.data, offset)
                remaining, offset = remaining[written:], offset + written
        except OSError as error:
            raise UserError(
                "cannot write the weights to disk",
                where=str(self.folder),
                got=str(error),
                hint="free some space, or set run.dir=/path/on/a/larger/disk",
            ) from None
        start, file.used = file.used, file.used + _pages(size)
        return file.bytes[start : start + size].view(tensor.dtype).view(tensor.shape)

    def _file_with_space(self, size: int) -> _File:
        if not self._files or self._files[-1].used + size > self._files[-1].size:
            self._files.append(_File(self.folder, max(FILE, _pages(size))))
        return self._files[-1]

    def _file_of(self, tensor: Tensor) -> _File | None:
        address = tensor.untyped_storage().data_ptr()
        return next((file for file in self._files if file.bytes.data_ptr() == address), None)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is stored here."""
        return self._file_of(tensor) is not None

    def spans(self, tensors: Iterable[Tensor]) -> list[Span]:
        """The byte ranges of these tensors, with adjacent ones merged."""
        spans: list[Span] = []
        for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
            file = self._file_of(tensor)
            if file is None:
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not stored on this disk")
            start = tensor.data_ptr() - file.bytes.data_ptr()
            stop = start + _pages(tensor.numel() * tensor.element_size())
            if spans and spans[-1].file is file and spans[-1].stop == start:
                start = spans.pop().start
            spans.append(Span(file, start, stop))
        return spans

    def sync(self) -> None:
        """Flush to disk, so that the kernel can drop pages without writing them."""
        for file in self._files:
            os.fsync(file.file.fileno())


def read_ahead(spans: Sequence[Span]) -> None:
    """Ask the kernel to read these ranges; does not block."""
    for file, start, stop in spans:
        for at in range(start, stop, AHEAD):
            os.posix_fadvise(file.file.fileno(), at, min(AHEAD, stop - at), os.POSIX_FADV_WILLNEED)


def let_go(spans: Sequence[Span]) -> None:
    """Drop these pages from the process; they are read again on access."""
    for file, start, stop in spans:
        file.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def is_memory(folder: Path) -> str | None:
    """The type of `folder`'s file system if it lives in memory (tmpfs, ramfs), else None."""
    partitions = [part for part in psutil.disk_partitions(all=True) if folder.absolute().is_relative_to(part.mountpoint)]
    filesystem = max(partitions, key=lambda part: len(part.mountpoint)).fstype if partitions else ""
    return filesystem if filesystem in ("tmpfs", "ramfs") else None
