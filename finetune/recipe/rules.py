"""Rules between keys, as rows: what must not hold together, the key to be told of it, and what to say.

Each group is about one choice. A new kind of training or number format puts its own rows into a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune.recipe.schema import CHECKS, Data, Distill, Quant, Recipe, Tokenizer, Train

ONLY_CONVERSATIONS = ("format", "template", "system", "loss_on", "max_rows", "truncation", "dedupe", "packing")  # of data


@dataclass(frozen=True)
class Rule:
    """A mistake of a recipe whose keys are good by themselves. key: the dotted key on whose line the message is told."""

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
        "quant.scheme: nf4 freezes the base and adapter.kind: none trains nothing else; "
        "use adapter.kind: lora, or quant.scheme: none for full fine-tuning",
    ),
    Rule(
        lambda recipe: recipe.model.dtype == "fp16" and (not recipe.base_frozen or recipe.train.precision == "bf16"),
        "model.dtype",
        "model.dtype: fp16 goes with adapters and train.precision: auto or fp32 only; use bf16 or fp32",
    ),
    Rule(
        lambda recipe: recipe.train.stochastic_rounding and (recipe.model.dtype != "bf16" or recipe.train.precision == "fp32"),
        "train.stochastic_rounding",
        "train.stochastic_rounding is for weights in bf16: model.dtype: bf16, train.precision: auto",
    ),
    Rule(
        lambda recipe: recipe.train.stochastic_rounding and recipe.base_frozen,
        "train.stochastic_rounding",
        "train.stochastic_rounding is for training all weights (adapter.kind: none); adapters are small",
    ),
)

FROM_SCRATCH = (
    Rule(
        lambda recipe: recipe.model.config is not None and (not recipe.streams_text or recipe.base_frozen),
        "model.config",
        "model.config begins with random weights: that takes kind: pretrain and adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.tokenizer != Tokenizer() and recipe.model.config is None,
        "tokenizer",
        "tokenizer is for a model from scratch (model.config); a model that exists brings its own",
    ),
    Rule(
        lambda recipe: recipe.model.config is not None and (recipe.model.revision is not None or recipe.model.trust_remote_code),
        "model.config",
        "model.revision and trust_remote_code are of a model that exists, and model.config begins a new one",
    ),
)

TEXT = (
    Rule(
        lambda recipe: recipe.streams_text and recipe.train.max_steps is None and recipe.train.max_tokens is None,
        "kind",
        "kind: pretrain streams its text and cannot count epochs: give train.max_tokens or train.max_steps",
    ),
    Rule(
        lambda recipe: recipe.streams_text and recipe.train.epochs != 1.0,
        "train.epochs",
        "train.epochs is for sft; pretrain takes train.max_tokens or train.max_steps",
    ),
    Rule(
        lambda recipe: recipe.streams_text and 0 < recipe.data.heldout < 1,
        "data.heldout",
        "data.heldout: a stream has no end to take a share of; give a count of rows of data.max_length tokens",
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
        "data.revision is of a hub dataset that is streamed (kind: pretrain, data.name)",
    ),
    Rule(
        lambda recipe: not recipe.streams_text and recipe.data.text_key != "text",
        "data.text_key",
        "data.text_key is for pretrain; sft looks at its rows",
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
        "quant.sub_norms turns a pretrained model (model.name) into another layout, which has no rms_norm inside its linears; "
        "from scratch use model_type: bitnet",
    ),
    Rule(
        lambda recipe: recipe.quant.rms_norm and recipe.model.config is None,
        "quant.rms_norm",
        "quant.rms_norm is a layout for a model from scratch (model.config): a model that exists has norms of its own, with "
        "gains that it learnt",
    ),
    Rule(
        lambda recipe: recipe.quant.warmup > 0 and recipe.model.config is not None,
        "quant.warmup",
        "quant.warmup leads a pretrained model to ternary; random weights have nothing to keep",
    ),
    Rule(
        lambda recipe: recipe.quant.warmup_shape != "linear" and recipe.quant.warmup == 0,
        "quant.warmup_shape",
        "quant.warmup_shape: there is no warm-up that it could shape; give quant.warmup",
    ),
    Rule(
        lambda recipe: recipe.train.health_steps != Train().health_steps and not recipe.trains_quantized,
        "train.health_steps",
        "train.health_steps looks at ternary weights that are trained, and there are none",
    ),
)

TWIN = (
    Rule(
        lambda recipe: recipe.twin and not recipe.trains_quantized,
        "twin",
        "twin: true trains the float counterpart of ternary weights: quant.scheme: ternary with adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.twin and (recipe.quant.warmup > 0 or recipe.quant.sub_norms or recipe.distill.teacher is not None),
        "twin",
        "twin: true compares two trainings from the same start; from a pretrained model the float model itself is the "
        "baseline, and is measured",
    ),
    Rule(
        lambda recipe: recipe.train.twin_lr is not None and not recipe.twin,
        "train.twin_lr",
        "train.twin_lr is of the twin: twin: true",
    ),
)

DISTILLATION = (
    Rule(
        lambda recipe: recipe.distill != Distill() and recipe.distill.teacher is None,
        "distill",
        "distill: without a teacher its other keys do nothing; give distill.teacher",
    ),
    Rule(
        lambda recipe: recipe.distill.teacher is not None and (not recipe.streams_text or recipe.base_frozen),
        "distill.teacher",
        "distill.teacher goes with kind: pretrain and adapter.kind: none",
    ),
    Rule(
        lambda recipe: recipe.distill.teacher is not None and recipe.train.loss_chunk != Train().loss_chunk,
        "train.loss_chunk",
        "train.loss_chunk: a teacher's logits are compared whole",
    ),
)

EXPORTS = (
    Rule(
        lambda recipe: recipe.quant.rms_norm and any(name.startswith("gguf") for name in recipe.export.formats),
        "export.formats",
        "export.formats: GGUF knows no norm inside a linear (quant.rms_norm); model_type: bitnet has sub-norms, which it knows",
    ),
    Rule(
        lambda recipe: recipe.base_frozen and "bitnet-online" in recipe.export.formats,
        "export.formats",
        "export.formats: bitnet-online holds master weights, and under adapters there are none",
    ),
    Rule(
        lambda recipe: recipe.quant.scheme != "ternary" and any(name != "gguf-f16" for name in recipe.export.formats),
        "export.formats",
        "export.formats: bitnet and TQ formats hold ternary models (quant.scheme: ternary); gguf-f16 takes floats",
    ),
    Rule(
        lambda recipe: bool(recipe.export.formats) and recipe.writes_adapter and not recipe.run.merge,
        "export.formats",
        "export.formats needs the merged model: run.merge: true",
    ),
)

LAYERS_ELSEWHERE = (
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and recipe.run.parallel == "fsdp",
        "model.offload_layers",
        "model.offload_layers and run.parallel: fsdp are two ways to hold a model that one device cannot: choose one",
    ),
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and not recipe.base_frozen,
        "model.offload_layers",
        "model.offload_layers brings weights that are never written back: that is a frozen base, adapter.kind: lora",
    ),
    Rule(
        lambda recipe: recipe.model.offload_layers != "none" and recipe.base_frozen and not recipe.train.checkpointing,
        "model.offload_layers",
        "model.offload_layers: a layer's weights are gone when its backward pass comes, and come again where activations are "
        "recomputed: train.checkpointing: true",
    ),
)

STEP_IN_BACKWARD = (
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.accumulation != 1,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward: a gradient is gone before the next micro-batch could be added to it: train.accumulation=1, "
        "and a larger train.micro_batch with train.checkpointing",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.save_steps is None,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward goes back to the last checkpoint after a bad step: give train.save_steps",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.on_bad_step == "skip",
        "train.on_bad_step",
        "train.optimizer_in_backward: weights have taken a bad step when it is known to be one: train.on_bad_step: rollback",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.train.max_grad_norm != 0,
        "train.max_grad_norm",
        "train.optimizer_in_backward: the global norm is known when all steps are taken, so nothing can be clipped to it: "
        "train.max_grad_norm=0",
    ),
    Rule(
        lambda recipe: recipe.train.optimizer_in_backward and recipe.base_frozen,
        "train.optimizer_in_backward",
        "train.optimizer_in_backward is for training all weights (adapter.kind: none); adapters are small",
    ),
)

CHECKPOINTS = (
    Rule(
        lambda recipe: (
            recipe.train.on_bad_step == "rollback" and recipe.train.save_steps is None and not recipe.train.optimizer_in_backward
        ),
        "train.on_bad_step",
        "train.on_bad_step: rollback goes to the last checkpoint: give train.save_steps",
    ),
    Rule(
        lambda recipe: (
            recipe.train.save_best and not (recipe.train.eval_steps and (recipe.data.heldout_path or recipe.data.heldout))
        ),
        "train.save_best",
        "train.save_best: the best is known by held-out rows: give train.eval_steps, and data.heldout or heldout_path",
    ),
    Rule(
        lambda recipe: recipe.train.load_best_at_end and not recipe.train.save_best,
        "train.load_best_at_end",
        "train.load_best_at_end takes the weights that train.save_best keeps: train.save_best: true",
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
    "layers elsewhere": LAYERS_ELSEWHERE,
    "step in backward": STEP_IN_BACKWARD,
    "checkpoints": CHECKPOINTS,
}


def broken_rules(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, message) of every rule that `recipe` breaks."""
    for rows in RULES.values():
        yield from ((rule.key, rule.message) for rule in rows if rule.when(recipe))


CHECKS.append(broken_rules)
