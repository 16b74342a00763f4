"""Reading a .gguf model: the file is parsed once, and not by each of transformers' readers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from finetune.models.source import Source

if TYPE_CHECKING:
    from gguf import GGUFReader


@functools.lru_cache(maxsize=1)
def _reader(path: str, size: int, modified: int) -> GGUFReader:
    """The parsed file; `size` and `modified` (nanoseconds) tell whether it is still the same."""
    from gguf import gguf_reader

    return gguf_reader.GGUFReader(path)


def _parsed(path: str | Path) -> GGUFReader:
    file = Path(path).stat()
    return _reader(str(path), file.st_size, file.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _metadata(reader: GGUFReader, load: Any, path: str) -> dict[str, Any]:
    """What transformers' `load` makes of the file without its tensors."""
    return dict(load(path))


@contextmanager
def parsed_once(source: Source) -> Iterator[None]:
    """Within it, transformers' readers of the model's .gguf file share one parsed file, its metadata and a table of tensor names.

    transformers parses the file anew for the tokenizer, and twice each for the configuration and the weights (a second for every
    12,000 tokens of the vocabulary, and half of that for the metadata), and builds the table of tensor names anew for every
    tensor. Does nothing for other models.
    """
    if source.gguf is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as readers

    load = readers.load_gguf_checkpoint

    def load_once(path: str, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
        return load(path, return_tensors, **options) if return_tensors else copy.deepcopy(_metadata(_parsed(path), load, path))

    names = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.multiple(gguf, GGUFReader=_parsed, get_tensor_name_map=names),
        mock.patch.object(readers, "load_gguf_checkpoint", load_once),
    ):
        yield


def forget_parsed() -> None:
    """Free the parsed file: a few hundred bytes for each token of the vocabulary, and its mapping."""
    _reader.cache_clear()
    _metadata.cache_clear()
