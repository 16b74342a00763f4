"""Rules between keys of a recipe: the forbidden combination, the key to report it at, and the message.

Each group is about one choice. A new task or number format adds a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune.recipe.schema import CHECKS, Data, Distill, Quant, Recipe, Tokenizer, Train

ONLY_CONVERSATIONS = (  # of data
    "format", "template", "system", "loss_on", "reasoning", "max_rows", "truncation", "dedupe", "packing",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A forbidden combination of keys that are each valid. key: the dotted key whose line the error points at."""

    when: Callable[[Recipe], bool]
    key: str
    message: str


def _not_for_text(key: str) -> Rule:
    default = Data.model_fields[key].default
    return Rule(
        lambda recipe: recipe.streams_text and getattr(recipe.data, key) != default,
        f"data.{key}",
        f"data.{key} is for sft; pretrain trains every token of its text, packed",
    )


def _only_trained(key: str) -> Rule:
    default = Quant.model_fields[key].default
    return Rule(
        lambda recipe: not recipe.trains_quantized and getattr(recipe.quant, key) != default,
        f"quant.{key}",
        f"quant.{key} is for training ternary weights: quant.scheme: ternary with adapter.kind: none",
    )


WEIGHTS = (
    Rule(
        lambda recipe: recipe.quant.scheme == "nf4" and not recipe.base_frozen,
        "quant.scheme",
        "quant.scheme: nf4 freezes the base, and with adapter.kind: none nothing is left to train; "
        "use adapter.kind: lora, or quant.scheme: none for full fine-tuning",
    ),
    Rule(
        lambda recipe: recipe.model.dtype == "fp16" and (not recipe.base_frozen or recipe.train.precision == "bf16"),
        "model.dtype",
        "model.dtype: fp16 works only with adapters and train.precision: auto or fp32; use bf16 or fp32",
    ),
    Rule(
        lambda recipe: recipe.train.stochastic_rounding and (recipe.model.dtype != "bf16" or recipe.train.precision == "fp32"),
        "train.stochastic_rounding",
        "train.stochastic_rounding needs bf16 weights: model.dtype: bf16 and train.precision: auto",
    ),
    Rule(
        lambda recipe: recipe.train.stochastic_rounding and recipe.base_frozen,
        "train.stochastic_rounding",
        "train.stochastic_rounding needs adapter.kind: none (all weights are trained); adapters are too small to benefit",
    ),
)

FROM_SCRATCH = (
    Rule(
        lambda recipe: recipe.model.config is not None and (not recipe.streams_text or recipe.base_frozen),
        "model.config",
        "model.config starts from random weights, which needs kind: pretrain and adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.tokenizer != Tokenizer() and recipe.model.config is None,
        "tokenizer",
        "tokenizer is for a model from scratch (model.config); an existing model has its own tokenizer",
    ),
    Rule(
        lambda recipe: recipe.model.config is not None and (recipe.model.revision is not None or recipe.model.trust_remote_code),
        "model.config",
        "model.revision and model.trust_remote_code are for an existing model (model.name), not for model.config",
    ),
)

TEXT = (
    Rule(
        lambda recipe: recipe.streams_text and recipe.train.max_steps is None and recipe.train.max_tokens is None,
        "kind",
        "kind: pretrain streams its text, so there are no epochs: give train.max_tokens or train.max_steps",
    ),
    Rule(
        lambda recipe: recipe.streams_text and recipe.train.epochs != 1.0,
        "train.epochs",
        "train.epochs is for sft; pretrain takes train.max_tokens or train.max_steps",
    ),
    Rule(
        lambda recipe: recipe.streams_text and 0 < recipe.data.heldout < 1,
        "data.heldout",
        "data.heldout: a share of a stream is undefined; give a count of sequences of data.max_length tokens",
    ),
    *map(_not_for_text, ONLY_CONVERSATIONS),
)

CONVERSATIONS = (
    Rule(
        lambda recipe: (
            recipe.data.revision is not None
            and (not recipe.streams_text or recipe.data.path is not None or str(recipe.data.name).startswith("package:"))
        ),
        "data.revision",
        "data.revision is for a hub dataset that is streamed (kind: pretrain and data.name)",
    ),
    Rule(
        lambda recipe: not recipe.streams_text and recipe.data.text_key != "text",
        "data.text_key",
        "data.text_key is for pretrain; sft detects the keys of its rows",
    ),
    Rule(
        lambda recipe: not recipe.streams_text and recipe.data.bos != "auto",
        "data.bos",
        "data.bos is for pretrain; in sft the chat template writes the BOS token",
    ),
    Rule(
        lambda recipe: not recipe.streams_text and recipe.train.max_tokens is not None,
        "train.max_tokens",
        "train.max_tokens is for pretrain; sft takes train.epochs or train.max_steps",
    ),
)

QUANTIZED = (
    *map(_only_trained, ("rms_norm", "sub_norms", "warmup")),
    Rule(
        lambda recipe: recipe.quant.sub_norms and (recipe.model.config is not None or recipe.quant.rms_norm),
        "quant.sub_norms",
        "quant.sub_norms converts a pretrained model (model.name) and excludes quant.rms_norm; "
        "from scratch use model_type: bitnet",
    ),
    Rule(
        lambda recipe: recipe.quant.rms_norm and recipe.model.config is None,
        "quant.rms_norm",
        "quant.rms_norm is for a model from scratch (model.config): an existing model has norms with trained gains",
    ),
    Rule(
        lambda recipe: recipe.quant.warmup > 0 and recipe.model.config is not None,
        "quant.warmup",
        "quant.warmup is for a pretrained model (model.name); random weights can start ternary",
    ),
    Rule(
        lambda recipe: recipe.quant.warmup_shape != "linear" and recipe.quant.warmup == 0,
        "quant.warmup_shape",
        "quant.warmup_shape has no effect without quant.warmup: give quant.warmup",
    ),
    Rule(
        lambda recipe: recipe.train.health_steps != Train().health_steps and not recipe.trains_quantized,
        "train.health_steps",
        "train.health_steps is for training ternary weights: quant.scheme: ternary with adapter.kind: none",
    ),
)

TWIN = (
    Rule(
        lambda recipe: recipe.twin and not recipe.trains_quantized,
        "twin",
        "twin: true is for training ternary weights: quant.scheme: ternary with adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.twin and (recipe.quant.warmup > 0 or recipe.quant.sub_norms or recipe.distill.teacher is not None),
        "twin",
        "twin: true is for ternary training from the same start as its float twin; from a pretrained model the baseline is "
        "the float model, which is evaluated anyway",
    ),
    Rule(
        lambda recipe: recipe.train.twin_lr is not None and not recipe.twin,
        "train.twin_lr",
        "train.twin_lr needs twin: true",
    ),
)

DISTILLATION = (
    Rule(
        lambda recipe: recipe.distill != Distill() and recipe.distill.teacher is None,
        "distill",
        "distill: its keys have no effect without a teacher: give distill.teacher",
    ),
    Rule(
        lambda recipe: recipe.distill.teacher is not None and (not recipe.streams_text or recipe.base_frozen),
        "distill.teacher",
        "distill.teacher needs kind: pretrain and adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.distill.teacher is not None and recipe.train.loss_chunk != Train().loss_chunk,
        "train.loss_chunk",
        "train.loss_chunk has no effect with distill.teacher: its logits are not computed in chunks",
    ),
)

EXPORTS = (
    Rule(
        lambda recipe: recipe.quant.rms_norm and any(name.startswith("gguf") for name in recipe.export.formats),
        "export.formats",
        "export.formats: GGUF does not support norms inside linears (quant.rms_norm); use model_type: bitnet, whose sub-norms it "
        "supports",
    ),
    Rule(
        lambda recipe: recipe.base_frozen and "bitnet-online" in recipe.export.formats,
        "export.formats",
        "export.formats: bitnet-online stores master weights, which exist only with adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.quant.scheme != "ternary" and any(name != "gguf-f16" for name in recipe.export.formats),
        "export.formats",
        "export.formats: bitnet and TQ formats are for ternary models (quant.scheme: ternary); use gguf-f16 for float models",
    ),
    Rule(
        lambda recipe: bool(recipe.export.formats) and recipe.writes_adapter and not recipe.run.merge,
        "export.formats",
        "export.formats needs the merged model: run.merge: true",
    ),
)

OFFLOADED_LAYERS = (
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and recipe.run.parallel == "fsdp",
        "model.offload_layers",
        "model.offload_layers and run.parallel: fsdp exclude each other: both split a model that one device cannot hold",
    ),
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and not recipe.base_frozen,
        "model.offload_layers",
        "model.offload_layers needs a frozen base: adapter.kind: lora (offloaded weights are never written back)",
    ),
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and recipe.base_frozen and not recipe.train.checkpointing,
        "model.offload_layers",
        "model.offload_layers needs train.checkpointing: true: a layer's weights are loaded again when its activations are "
        "recomputed",
    ),
)

OPTIMIZER_IN_BACKWARD = (
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.accumulation != 1,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward frees each gradient at once, so it needs train.accumulation: 1; for a larger batch raise "
        "train.micro_batch, with train.checkpointing",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.save_steps is None,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward rolls back to the last checkpoint after a bad step: give train.save_steps",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.on_bad_step == "skip",
        "train.on_bad_step",
        "train.optimizer_in_backward cannot skip a bad step, because the weights are already updated: use train.on_bad_step: "
        "rollback",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.max_grad_norm != 0,
        "train.max_grad_norm",
        "train.optimizer_in_backward cannot clip gradients, because their global norm is known only after the updates: use "
        "train.max_grad_norm: 0",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.base_frozen,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward needs adapter.kind: none (all weights are trained); adapters are too small to benefit",
    ),
)

CHECKPOINTS = (
    Rule(
        lambda recipe: (
            recipe.train.on_bad_step == "rollback" and recipe.train.save_steps is None and not recipe.train.optimizer_in_backward
        ),
        "train.on_bad_step",
        "train.on_bad_step: rollback returns to the last checkpoint: give train.save_steps",
    ),
    Rule(
        lambda recipe: (
            recipe.train.save_best and not (recipe.train.eval_steps and (recipe.data.heldout_path or recipe.data.heldout))
        ),
        "train.save_best",
        "train.save_best compares held-out losses: give train.eval_steps, and data.heldout or data.heldout_path",
    ),
    Rule(
        lambda recipe: recipe.train.load_best_at_end and not recipe.train.save_best,
        "train.load_best_at_end",
        "train.load_best_at_end needs train.save_best: true",
    ),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "weights": WEIGHTS,
    "from scratch": FROM_SCRATCH,
    "text": TEXT,
    "conversations": CONVERSATIONS,
    "quantized": QUANTIZED,
    "twin": TWIN,
    "distillation": DISTILLATION,
    "exports": EXPORTS,
    "offloaded layers": OFFLOADED_LAYERS,
    "optimizer in backward": OPTIMIZER_IN_BACKWARD,
    "checkpoints": CHECKPOINTS,
}


def broken_rules(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, message) of every rule that `recipe` breaks."""
    for group in RULES.values():
        yield from ((rule.key, rule.message) for rule in group if rule.when(recipe))


CHECKS.append(broken_rules)
