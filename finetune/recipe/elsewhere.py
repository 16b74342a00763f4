"""Names of recipe keys and values in other programs."""

from __future__ import annotations

from typing import Any

# Their key → ours, for the hint.
ELSEWHERE_CALLED = {
    "lora": "adapter",
    "peft": "adapter",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "target_modules": "adapter.targets",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "load_in_4bit": "quant.scheme",
    "dataset": "data.name",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "train.checkpointing",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optim": "train.optimizer",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "block_size": "data.max_length",
    "vocab_size": "tokenizer.train",
    "text_column": "data.text_key",
    "lambda": "quant.warmup",
}

# Our key → their value → ours, where both mean the same. These are accepted.
SAME_VALUES = {
    "model.dtype": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    "train.precision": {"bfloat16": "bf16", "float32": "fp32"},
    "train.optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"},
}

# Our key → their value → the nearest value here. It may not mean the same, so it is only a hint.
NEAR_VALUES = {
    "adapter.kind": {
        "qlora": "lora, with quant.scheme: nf4",
        "dora": "lora, with adapter.dora: true",
        "full": "none",
    },
    "quant.scheme": {"4bit": "nf4", "fp4": "nf4", "bitnet": "ternary", "1.58bit": "ternary"},
    "data.format": {"sharegpt": "messages", "chatml": "messages", "openai": "messages", "completion": "text"},
    "train.schedule": {
        "cosine_with_min_lr": "cosine, which ends at train.min_lr",
        "constant_with_warmup": "constant, with train.warmup before it",
        "polynomial": "linear, which ends at train.min_lr",
    },
    "train.optimizer": {
        "adam": "adamw, with train.weight_decay: 0",
        "adamw_torch_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw_8bit",
    },
}


def canonical_value(key: str, value: Any) -> Any:
    """`value` of the dotted key `key` in our spelling; returned unchanged unless another program's spelling is known."""
    return SAME_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
