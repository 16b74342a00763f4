"""Reading a .gguf model: the file is parsed once, and not by each of transformers' readers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from finetune.models.source import Source

if TYPE_CHECKING:
    from gguf import GGUFReader


@functools.lru_cache(maxsize=1)
def _reader(path: str, size: int, modified: int) -> GGUFReader:
    """The parsed file; `size` and `modified` (nanoseconds) tell whether it is still the same."""
    from gguf import gguf_reader

    return gguf_reader.GGUFReader(path)


@contextmanager
def parsed_once(source: Source) -> Iterator[None]:
    """Within it, transformers' readers of the model's .gguf file share one parsed file and one table of tensor names.

    transformers parses the file anew for the configuration, the tokenizer and twice for the weights (a second for every 12,000
    tokens of the vocabulary), and builds the table of tensor names anew for every tensor. Does nothing for other models.
    """
    if source.gguf is None:
        yield
        return
    import gguf

    def shared(path: str) -> GGUFReader:
        file = Path(path).stat()
        return _reader(str(path), file.st_size, file.st_mtime_ns)

    names = functools.cache(gguf.get_tensor_name_map)
    with mock.patch.multiple(gguf, GGUFReader=shared, get_tensor_name_map=names):
        yield


def forget_parsed() -> None:
    """Free the parsed file: a few hundred bytes for each token of the vocabulary, and its mapping."""
    _reader.cache_clear()
