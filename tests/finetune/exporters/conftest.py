"""A trained tokenizer, and two tiny ternary models after a few training steps, so that every export fault changes figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant import swap

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.05, "eos_token_id": 0,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def built(kind: str, vocabulary: int, *, norm_eps: float | None = None, **changes: Any) -> Any:
    """A random model of two layers whose linears are BitLinear."""
    from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = SIZES | {"vocab_size": vocabulary} | changes
    torch.manual_seed(0)
    model: Any
    if kind == "bitnet":
        model = BitNetForCausalLM(BitNetConfig(**({"hidden_act": "silu"} | sizes)))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    swap(model, scheme="ternary", trainable=True, **({} if norm_eps is None else {"norm_eps": norm_eps}))
    return model.eval()


def trained(model: Any, ids: list[int], steps: int = 30) -> Any:
    """A few dozen steps of AdamW on `ids`, so that norms, scales and codes differ from their initial values."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    tokens, generator = torch.tensor(ids), torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 48, (6,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + 48] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def text(repository: Path) -> str:
    return "".join((repository / name).read_text(encoding="utf-8") for name in ("README.md", "LICENSE"))


@pytest.fixture(scope="session")
def words(text: str) -> Any:
    """A tokenizer as pretraining runs train it."""
    from finetune.data.tokenizer import train_tokenizer

    return train_tokenizer(text.split("\n\n"), 400)


@pytest.fixture(scope="session")
def rows(text: str, words: Any) -> list[tuple[list[int], list[int]]]:
    ids = words(text).input_ids
    return [(ids[start : start + 48], ids[start : start + 48]) for start in range(0, 1200, 400)]


@pytest.fixture(scope="session")
def models(text: str, words: Any) -> dict[str, Any]:
    """Shared by all tests of the session: do not change them."""
    ids = words(text).input_ids
    return {kind: trained(built(kind, len(words)), ids) for kind in ("bitnet", "llama")}
