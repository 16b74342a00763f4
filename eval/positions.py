"""How many tokens a model reads, and at which lengths it changes: positions, and windows of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Encoders, as decoders: without position ids they number tokens from the padding token's id + 1, and skip padding.
NUMBERS_TOKENS = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod", "esm",
)  # fmt: skip
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(config: Any) -> int | None:
    """The number of tokens that a model reads by its configuration; None if there is no limit (recurrent models, ALiBi)."""
    text = _text_config(config)
    values = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    positions = next((value for value in values if type(value) is int and value > 0), None)
    if positions is not None and numbers_tokens(text):
        positions -= (text.pad_token_id or 0) + 1
    return positions


def numbers_tokens(config: Any) -> bool:
    """Whether a model numbers its tokens by a rule of its own, so that position ids from 0 would be wrong."""
    return getattr(config, "model_type", None) in NUMBERS_TOKENS


@contextmanager
def short_windows(model: nn.Module, length: int) -> Iterator[set[str]]:
    """Within it, windows of attention are at most `length` tokens, so that a short trial reaches beyond them.

    Changes the configurations that the modules read, and the modules' own copies. Yields the names of the keys that it changed.
    """
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        if (config := getattr(module, "config", None)) is not None:
            owners[id(config)] = config
    changed: list[tuple[Any, str, int]] = []
    try:
        for owner in owners.values():
            for name in WINDOWS:
                value = getattr(owner, name, None)
                if type(value) is int and value > length:
                    changed.append((owner, name, value))
                    setattr(owner, name, length)
        yield {name for owner, name, _ in changed if not isinstance(owner, nn.Module)}
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
