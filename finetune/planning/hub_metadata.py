"""Models and data of the shipped recipes, so that these are planned without the hub.

Configurations are those of the models' own config.json. Of data sets: rows, and tokens as trained, counted with SmolLM2's
tokenizer and the recipe's template; another tokenizer counts up to a quarter more or fewer.
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
    rows: int
    tokens: int
    longest: int


DATA = {
    "tatsu-lab/alpaca": Rows(52_002, 4_560_000, 680),  # mean and longest of 5,000 of them
    "databricks/databricks-dolly-15k": Rows(15_011, 2_640_000, 1024),  # of 3,000; cut at 1,024
}
