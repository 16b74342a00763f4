"""Loading a .gguf model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from finetune.exporters import export
from finetune.models.config import load_config, load_tokenizer
from finetune.models.load import load_model
from finetune.models.source import find_model
from finetune.models.weights import load_weights
from tests.conftest import story


@pytest.fixture(scope="module")
def gguf_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    loaded = load_model(str(tiny_model), dtype="fp32")
    ids = loaded.tokenizer(story(200)).input_ids
    export(loaded.model, loaded.tokenizer, path, format="gguf-f16", rows=[(ids, ids)])
    return path


def test_gguf_file_is_parsed_once_for_config_tokenizer_and_weights(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    parse_count = 0
    original_init = gguf.GGUFReader.__init__

    def counting_init(self: gguf.GGUFReader, *arguments: Any, **options: Any) -> None:
        nonlocal parse_count
        parse_count += 1
        original_init(self, *arguments, **options)

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf.GGUFReader, "__init__", counting_init)
    source = find_model(str(gguf_file))
    config, tokenizer = load_config(source), load_tokenizer(source)
    os.utime(gguf_file, ns=(1, 1))  # looks like another file under the same name
    load_config(source)
    assert parse_count == 2
    model = load_weights(source, config, dtype=torch.float32, attention="auto")
    assert parse_count == 2
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == originals

    expected = load_model(str(tiny_model), dtype="fp32")
    assert tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, expected.model(ids).logits, atol=2e-3, rtol=0)
    load_config(source)
    assert parse_count == 3, "the parsed file is still cached after the weights were loaded"
