"""The recipe's schema: type, default, unit and effect of every key. `finetune schema` prints it as JSON.

Only `finetune/` uses `Recipe`; `quant` and `eval` take plain arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from finetune.recipe.elsewhere import SAME_VALUES, canonical_value

Positive = Annotated[int, Field(gt=0)]
AMOUNT = r"\d+(\.\d+)?\s*[KMGT]i?B?"  # an amount of memory: 12GB, 11.5 GiB

# BitNet b1.58 trains with about twice the learning rate of its float twin ("The Era of 1-bit LLMs: Training Tips, Code and FAQ",
# table 1: 1.5e-3 at 700M). Our own measurement agrees at 5.6 M parameters, but not at 21.5 M in a short run
# (finetune/bench/MEASURED.md).
TERNARY_LR = 2.0
FLOAT_LR = {"sft": 2e-4, "pretrain": 6e-4}  # peak rates: for adapters, and for GPT-2 124M from scratch


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    name: str | None = Field(
        None,
        min_length=1,
        description="Source of the weights: hub id, local folder, .gguf file, or package:NAME (an installed package with one "
        ".gguf file).",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Start from random weights instead of model.name: model_type (bitnet, llama, gpt2, …) and keys of that "
        "transformers config class, such as hidden_size. vocab_size is set from the tokenizer.",
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit of the model; null: the default branch.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Number format of unquantized weights and, with adapters, of activations. auto: bf16 on GPUs and on CPUs "
        "with bf16 instructions, else fp32; fp32 if all weights are trained.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention implementation of transformers. auto: the fastest one available for the architecture; "
        "flash_attention_2 needs a GPU and the flash-attn package.",
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python code of a hub model. Read that code before you turn this on."
    )
    offload_layers: Literal["none", "memory", "disk"] = Field(
        "none",
        description="Keep the layers of a frozen base in CPU memory or on disk, for a base larger than the device. Each pass "
        "loads the next layer while the current one computes; results are unchanged. Needs train.checkpointing.",
    )

    @model_validator(mode="after")
    def _has_source(self) -> Model:
        if (self.name is None) == (self.config is None):
            raise ValueError("give exactly one of model.name (existing weights) and model.config (random weights)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("model.config needs a model_type, such as bitnet, llama or gpt2")
        return self


class Tokenizer(Section):
    name: str | None = Field(
        None, description="Tokenizer for a model from scratch: hub id, folder or package:NAME. null: train one."
    )
    train: Positive = Field(
        4096,
        description="Without tokenizer.name: vocabulary size of the byte-level BPE tokenizer trained on the start of the data.",
    )


class Quant(Section):
    scheme: Literal["none", "nf4", "ternary"] = Field(
        "none",
        description="Number format of the linear layers. With adapters the base is packed in it and frozen: nf4 is QLoRA's 4 "
        "bits. With adapter.kind: none, ternary trains BitNet b1.58: float master weights, quantized in every forward pass.",
    )
    double: bool = Field(True, description="Quantize the NF4 block scales too: 4.127 instead of 4.5 bits per weight.")
    keep: list[str] = Field(
        [],
        description="More modules to leave unquantized: paths as shell patterns, such as *.o_proj. Heads, embeddings, norms and "
        "routers always stay unquantized.",
    )
    rms_norm: bool = Field(
        False,
        description="Put an RMSNorm inside each ternary linear and fix the block's own norms at one: the layout of BitNet "
        "b1.58's training tips. false: the model's own norms; model_type bitnet (the layout of 2B4T) has sub-norms.",
    )
    sub_norms: bool = Field(
        False,
        description="Convert a pretrained Llama-like model to the layout of BitNet b1.58 2B4T: sub-norms before o_proj and "
        "down_proj (BitDistill, arXiv 2510.13998, section 3.1).",
    )
    warmup: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of all steps in which λ in w + λ(q(w) − w) rises from 0 to 1; for ternary from a pretrained model.",
    )
    warmup_shape: Literal["linear", "cosine", "exponential"] = Field(
        "linear",
        description="How λ rises: linear, cosine (slow at both ends) or exponential (fast at first: 1 − e^(−5t), scaled).",
    )


class Adapter(Section):
    kind: Literal["lora", "none"] = Field(
        "lora", description="lora: train low-rank adapters on a frozen base; none: train all weights."
    )
    rank: Positive = Field(16, description="Rank r of the adapters. Trainable parameters grow with it.")
    alpha: Positive = Field(32, description="LoRA scale: the update is multiplied by alpha/rank (rslora: alpha/√rank).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of the adapters' inputs in training.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Modules with adapters: all-linear (all but head and experts), or a list such as [q_proj, v_proj, experts].",
    )
    rslora: bool = Field(False, description="Rank-stabilized scale alpha/√rank (arXiv 2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed adapters (arXiv 2402.09353): often better at low rank, slower.")

    @property
    def base_frozen(self) -> bool:
        """Whether the base's weights are frozen and adapters are trained."""
        return self.kind != "none"


class Distill(Section):
    teacher: str | None = Field(
        None, description="Float model to distill from, with the same tokenizer; given as model.name is. null: no distillation."
    )
    logits: float = Field(
        1.0, ge=0, description="Weight of the KL divergence from the teacher's logits, beside the loss on data."
    )
    temperature: float = Field(5.0, gt=0, description="Temperature of both sides' logits in the KL divergence.")
    relations: float = Field(
        1e3, ge=0, description="Weight of the divergence of attention relations (MiniLM: Q, K and V of one layer); 0: off."
    )
    layer: int | None = Field(
        None, description="Layer whose relations are compared; negative counts from the end. null: the layer at 7/8 of the depth."
    )


class Data(Section):
    name: str | None = Field(
        None, description="Source of the rows: hub dataset id, or package:NAME (files of an installed package)."
    )
    path: str | None = Field(
        None,
        description="Local source of rows: a .json, .jsonl or .txt file; for pretrain .txt, .jsonl, .parquet or a folder of "
        "them. Takes precedence over data.name.",
    )
    files: list[str] = Field(
        [], description="Read only these files of a package or hub dataset (shell patterns, such as */english/trivia.yml)."
    )
    split: str = Field("train", description="Split of a hub dataset to read.")
    revision: str | None = Field(
        None, description="pretrain: hub branch, tag or commit of the dataset; null: the newest commit; a resumed run keeps it."
    )
    format: Literal["auto", "alpaca", "messages", "dialogue", "text"] = Field(
        "auto",
        description="Format of a row: alpaca (instruction, input, output), messages (role and content, or ShareGPT's from and "
        "value), dialogue (a list of alternating turns), text. auto: detect it from the rows and report it.",
    )
    text_key: str = Field("text", description="pretrain: key or column of a row that contains the text.")
    bos: Literal["auto", "none"] = Field(
        "auto", description="pretrain: auto: begin every document with the BOS token if the tokenizer begins texts with it; none."
    )
    template: Literal["auto", "chatml", "alpaca"] = Field(
        "auto", description="Chat template. auto: the tokenizer's own, or alpaca if it has none."
    )
    system: str | None = Field(None, description="System message for conversations without one.")
    loss_on: Literal["answers", "all"] = Field(
        "answers", description="Tokens in the loss: answers (the assistant's, with their end token), or all."
    )
    reasoning: Literal["keep", "drop"] = Field("keep", description="Thoughts of answers, by a key or in tags such as <think>.")
    max_rows: Positive | None = Field(None, description="Use only this many rows, from the start.")
    max_length: Positive = Field(1024, description="Longest sample and longest packed sequence, in tokens. Memory grows with it.")
    truncation: Literal["cut", "drop"] = Field(
        "cut", description="What to do with samples over max_length: cut their ends, or drop them."
    )
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="What to do with rows that match no format: stop and show them, or skip and count them."
    )
    dedupe: bool = Field(True, description="Remove duplicate rows.")
    heldout: int | float = Field(
        64,
        ge=0,
        description="Rows held out of training for evaluation: a count, or a share if below 1; 0: no evaluation. For pretrain a "
        "count of packed sequences of max_length tokens.",
    )
    heldout_path: str | None = Field(None, description="Local file with the held-out rows, instead of a split.")
    packing: bool = Field(
        True,
        description="Pack several samples into sequences of max_length tokens, without attention between them. false: one "
        "sample per sequence. Neither pads.",
    )

    @model_validator(mode="after")
    def _has_source(self) -> Data:
        if not self.name and not self.path:
            raise ValueError("give data.path (a local file) or data.name (a hub dataset, or package:NAME)")
        return self


class Train(Section):
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows; pretrain counts tokens or steps instead.")
    max_steps: Positive | None = Field(None, description="Stop after this many optimizer steps; overrides train.epochs.")
    max_tokens: int | float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="pretrain: stop after this many tokens, such as 2.5e9; the text repeats if it is shorter.",
    )
    micro_batch: Positive = Field(1, description="Sequences per forward and backward pass. Memory grows with it.")
    accumulation: Positive = Field(1, description="Gradient accumulation: micro-batches per optimizer step.")
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate. Default: 2e-4, for pretrain 6e-4; twice that if ternary weights are trained.",
    )
    twin_lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the float twin; null: half of train.lr.",
    )
    schedule: Literal["cosine", "linear", "constant", "two_stage"] = Field(
        "cosine",
        description="Learning-rate schedule after the warm-up. two_stage (BitNet b1.58): linear to 8/15 of the peak at half of "
        "the steps, then from 1/3 of it to min_lr, without weight decay.",
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Learning-rate warm-up, as a share of all steps.")
    min_lr: float = Field(0.1, ge=0, le=1, description="Final learning rate, as a share of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, of matrices only (not norms or biases).")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8bit: Adam states of 2 instead of 8 bytes per parameter; paged: the states may be paged out to CPU memory.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates of the first and the second moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's ε, added to the square root of the second moment.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this global norm; 0: no clipping.")
    stochastic_rounding: bool = Field(
        False,
        description="Train all weights in bf16 without an fp32 copy: 2 instead of 4 bytes per weight. Stochastic rounding keeps "
        "small updates from being lost (arXiv 2010.06192).",
    )
    optimizer_in_backward: bool = Field(
        False,
        description="Update each weight in the backward pass once its gradient is complete, then free the gradient: one layer's "
        "gradients at a time. Needs accumulation 1 and max_grad_norm 0; a bad step rolls back.",
    )
    loss_chunk: int = Field(
        256,
        ge=0,
        description="Chunk size, in tokens, of the fused linear and cross-entropy: logits exist for one chunk at a time; 0: no "
        "chunks.",
    )
    health_steps: Positive = Field(
        5,
        description="Optimizer steps between two measurements of ternary weights (flipped codes, zeros, scales); a long run "
        "makes about a thousand.",
    )
    checkpointing: bool | Literal["offload"] = Field(
        False,
        description="Gradient checkpointing: recompute activations in the backward pass; far less memory, about a third slower. "
        "offload: also keep the input of each layer in CPU memory.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Number format of matrix products. auto: bf16 with fp32 weights (mixed precision) if all weights are "
        "trained and the device, GPU or CPU, supports bf16; model.dtype with adapters. bf16: mixed precision with fp32 weights. "
        "fp32: unquantized weights are fp32 too.",
    )
    save_steps: Positive | None = Field(
        None, description="Optimizer steps between checkpoints; null: at the end only. Default for pretrain: 500."
    )
    keep_checkpoints: Positive = Field(2, description="Number of checkpoints to keep; older ones are removed.")
    save_best: bool = Field(
        False,
        description="Save a checkpoint whenever the held-out loss is the lowest so far, and keep it besides the latest. Needs "
        "train.eval_steps.",
    )
    load_best_at_end: bool = Field(
        False, description="Load the weights with the lowest held-out loss at the end. Turns train.save_best on."
    )
    on_bad_step: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="What to do if loss or gradient is NaN or infinite, or the loss spikes. skip: drop the step, continue with "
        "the next samples; rollback: return to the last checkpoint and leave the samples out; stop. The samples are recorded.",
    )
    max_bad_steps: int = Field(3, ge=0, description="Bad steps that a run tolerates; one more stops it.")
    spike: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="A loss this many standard deviations above the median of the last 64 losses is a bad step; such as 8. "
        "null: only NaN and infinity are.",
    )
    eval_steps: Positive | None = Field(
        None, description="Optimizer steps between held-out evaluations; null: before and after training only."
    )


class Fast(Section):
    """Optimizations of the training step that leave its results unchanged. The chunked loss is train.loss_chunk."""

    attention: bool = Field(True, description="Variable-length attention for packed sequences, without a mask or padding.")
    lora: bool = Field(
        True,
        description="Compute adapters and their frozen linears in one function; q, k and v, and gate and up, together.",
    )
    blocks: bool = Field(True, description="Fused norms, rotary embeddings and gated activations; needs torch.compile.")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile elementwise operations and the loss with torch.compile: about ten seconds the first time. auto: if "
        "the run is long enough for that to pay off and a compiler is installed.",
    )


class Eval(Section):
    samples: int = Field(3, ge=0, description="Number of held-out questions that the model answers before and after training.")
    prompts: list[str] = Field([], description="Your own questions that the model answers before and after training.")
    max_new_tokens: Positive = Field(64, description="Longest answer to these questions, in tokens.")
    batch_tokens: Positive = Field(2048, description="Tokens per batch in evaluation.")
    merge_rows: int = Field(
        64, ge=0, description="Held-out rows on which the merged model is compared with the trained one; 0: no comparison."
    )
    merge_limit: float = Field(0.02, gt=0, description="Largest difference in loss, in nats, that the merge gate allows.")
    tasks: list[str] = Field([], description="lm-evaluation-harness tasks to score before and after training.")
    include_path: str | None = Field(None, description="Folder with your own task files for the harness.")
    limit: Positive | None = Field(None, description="Documents to score per task; null: all.")


class Export(Section):
    formats: list[Literal["bitnet", "bitnet-online", "gguf-tq2_0", "gguf-tq1_0", "gguf-f16"]] = Field(
        [], description="Export the trained model for other programs; the equivalence gate compares each export with it."
    )
    gate_tokens: Positive = Field(
        1024, description="Tokens of held-out rows on which an export is compared with the trained model."
    )


class Run(Section):
    dir: str | None = Field(None, description="Run folder. null: runs/NAME after the recipe, numbered if it exists.")
    seed: int = Field(17, ge=0, description="Seed of the held-out split, the sample order, initialization and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device to train on. auto: the GPU if there is one.")
    threads: Positive | None = Field(
        None, description="CPU threads; null: torch's default. A bit-identical resume needs the same number."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="For several processes. ddp: each holds the whole model; fsdp: weights (packed ones too), gradients and "
        "optimizer states are sharded.",
    )
    merge: bool = Field(True, description="Merge the adapter into a model folder that transformers loads without this package.")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Experiment trackers to log metrics to; metrics.jsonl is always written."
    )


class Plan(Section):
    gpu: str | None = Field(None, description="Device to plan for, such as rtx-4070; null: the one in this machine.")
    memory: str | None = Field(
        None, description="Memory limit on the device, such as 12GB (1 GB = 1024³ bytes); null: all of its memory."
    )
    price_per_kwh: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Price of electricity per kWh in any currency: the plan shows the run's cost.",
    )

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(AMOUNT, value.strip(), re.IGNORECASE):
            raise ValueError(f"{value!r} is not an amount of memory; write it as 12GB or 11.5GiB")
        return value


# Each yields (key, message) for keys that do not fit together. rules.py registers its check here, because it imports this
# module.
CHECKS: list[Callable[[Recipe], Iterable[tuple[str, str]]]] = []


class Recipe(Section):
    kind: Literal["sft", "pretrain"] = Field(
        "sft", description="Training task. sft: supervised fine-tuning on conversations; pretrain: on streamed text."
    )
    about: str = Field("", description="One sentence for `finetune recipes` and the report.")
    model: Model = Field(description="The model to start from.")
    tokenizer: Tokenizer = Field(Tokenizer(), description="The tokenizer of a model from scratch.")
    quant: Quant = Field(Quant(), description="Quantization of linear layers.")
    adapter: Adapter = Field(
        Adapter(), description="Adapters on the frozen model. pretrain trains all weights unless adapter.kind is lora."
    )
    distill: Distill = Field(Distill(), description="Distillation from a teacher, to make a pretrained model ternary.")
    data: Data = Field(description="Training and held-out data.")
    train: Train = Field(Train(), description="Training loop and optimizer.")
    fast: Fast = Field(Fast(), description="Optimizations of the training step: same results in less time and memory.")
    twin: bool = Field(
        False, description="After a ternary model, train its float twin on the same tokens in the same order, and report the gap."
    )
    eval: Eval = Field(Eval(), description="Evaluation before and after training.")
    export: Export = Field(Export(), description="Exports for other programs.")
    run: Run = Field(Run(), description="Run folder, seed, device and outputs.")
    plan: Plan = Field(Plan(), description="Device and limits for the plan, which is made before anything is loaded.")
    fit: Literal["none", "auto"] = Field(
        "none",
        description="auto: if the plan does not fit into memory, change the recipe until it does, at the lowest cost in time, "
        "and report it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _values_as_called_here(cls, value: Any) -> Any:
        """Replace other programs' spellings of values that mean the same."""
        if isinstance(value, dict):
            for section, name in (key.split(".") for key in SAME_VALUES):
                if isinstance(keys := value.get(section), dict) and name in keys:
                    value = {**value, section: {**keys, name: canonical_value(f"{section}.{name}", keys[name])}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_kind(cls, value: Any) -> Any:
        """Set defaults that depend on other keys, before validation, so that the resolved recipe shows them."""
        sections = ("adapter", "train", "quant")
        if not isinstance(value, dict) or not all(isinstance(value.get(name, {}), dict) for name in sections):
            return value  # validation reports it
        adapter, train = dict(value.get("adapter", {})), dict(value.get("train", {}))
        if value.get("kind") == "pretrain":
            adapter.setdefault("kind", "none")
            train.setdefault("save_steps", 500)
        if train.get("optimizer_in_backward"):
            train.setdefault("on_bad_step", "rollback")
        if train.get("load_best_at_end"):
            train.setdefault("save_best", True)
        trained = value.get("quant", {}).get("scheme") == "ternary" and adapter.get("kind") == "none"
        if (base := FLOAT_LR.get(value.get("kind", "sft"))) is not None:
            train.setdefault("lr", base * (TERNARY_LR if trained else 1))
        return {**value, "adapter": adapter, "train": train}

    @property
    def base_frozen(self) -> bool:
        """Whether the base's weights are frozen and adapters are trained; otherwise all weights are trained."""
        return self.adapter.base_frozen

    @property
    def writes_adapter(self) -> bool:
        """Whether the run writes adapter files."""
        return self.base_frozen

    @property
    def mergeable(self) -> bool:
        """Whether the trained adapter can be merged into the base's weights."""
        return self.adapter.kind == "lora"

    @property
    def trains_quantized(self) -> bool:
        """Whether float master weights of quantized linears are trained (straight-through); otherwise their codes are frozen."""
        return self.quant.scheme != "none" and not self.base_frozen

    @property
    def streams_text(self) -> bool:
        """Whether the data is an endless stream of text with all tokens trained; otherwise it is conversations, row by row."""
        return self.kind == "pretrain"

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        broken = dict.fromkeys(broken for check in CHECKS for broken in check(self))  # without duplicates
        if broken:
            raise ValidationError.from_exception_data(
                "Recipe",
                [
                    InitErrorDetails(
                        type=PydanticCustomError("rule", "{message}", {"message": message}), loc=tuple(key.split(".")), input=None
                    )
                    for key, message in broken
                ],
            )
        return self


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """{dotted key: pydantic field} of the whole schema."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.update(known_keys(field.annotation, f"{prefix}{name}."))
    return keys
