"""Configs and data sizes of the shipped recipes' hub models and datasets, for planning without the hub.

Configs are from the models' config.json. Datasets: rows, and tokens as trained, counted with SmolLM2's tokenizer and the recipe's
template; another tokenizer gives up to a quarter more or fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CONFIGS: dict[str, dict[str, Any]] = {
    "NousResearch/Llama-2-7b-hf": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "unsloth/Llama-3.2-3B-Instruct": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


class Rows(NamedTuple):
    """Size of a dataset. tokens: in total; longest: tokens of the longest row."""

    rows: int
    tokens: int
    longest: int


DATA = {
    "tatsu-lab/alpaca": Rows(52_002, 4_560_000, 680),  # mean and longest from 5,000 rows
    "databricks/databricks-dolly-15k": Rows(15_011, 2_640_000, 1024),  # from 3,000 rows, cut at 1,024 tokens
}
