"""The sections of a recipe and their keys: a field's type, default, unit and effect, once. `finetune schema` prints it as JSON.

Only `finetune/` sees a `Recipe`; layers, metrics and plots take plain arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from finetune.recipe.elsewhere import SAME_VALUES, canonical_value

Positive = Annotated[int, Field(gt=0)]
AMOUNT = r"\d+(\.\d+)?\s*[KMGT]i?B?"  # of memory: 12GB, 11.5 GiB

# BitNet b1.58 trains with about twice the learning rate of its float twin ("The Era of 1-bit LLMs: Training Tips, Code and FAQ",
# table 1: 1.5e-3 at 700M). Measured here: so at 5.6 M parameters, not at 21.5 M in a short run (finetune/bench/MEASURED.md).
TERNARY_LR = 2.0
FLOAT_LR = {"sft": 2e-4, "pretrain": 6e-4}  # peaks: of adapters, and of GPT-2 124M from scratch


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    name: str | None = Field(
        None,
        min_length=1,
        description="Where the weights come from: hub id, local folder, a .gguf file, or package:NAME (an installed package that "
        "carries one .gguf).",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Begin with random weights, in place of model.name: model_type (bitnet, llama, gpt2, …) and the keys of that "
        "configuration class of transformers, such as hidden_size. The vocabulary follows the tokenizer.",
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit of the model; null takes the default branch.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Number format of unquantized weights and, under adapters, of activations. auto: bf16 on GPUs and on CPUs "
        "with bf16 instructions, else fp32; fp32 where all weights are trained.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention implementation of transformers. auto: the fastest that the architecture has here; "
        "flash_attention_2 needs a GPU and the flash-attn package.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that a hub model brings along. Off unless you read that code."
    )
    offload_layers: Literal["none", "memory", "disk"] = Field(
        "none",
        description="Where a frozen base larger than the device lies: memory (the CPU's, for a GPU) or disk. Its layers come one "
        "ahead of the one that computes, in each pass; the same results. Needs train.checkpointing.",
    )

    @model_validator(mode="after")
    def _has_source(self) -> Model:
        if (self.name is None) == (self.config is None):
            raise ValueError("give model.name (weights that exist) or model.config (random ones), one of them")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("model.config needs a model_type, such as bitnet, llama or gpt2")
        return self


class Tokenizer(Section):
    name: str | None = Field(
        None, description="Whose tokenizer a model from scratch gets: hub id, folder or package:NAME. null: one is trained."
    )
    train: Positive = Field(
        4096,
        description="Vocabulary of the byte-level BPE tokenizer that is trained on the beginning of the data, if none is named.",
    )


class Quant(Section):
    scheme: Literal["none", "nf4", "ternary"] = Field(
        "none",
        description="Number format of the linear layers. Under adapters the base is packed in it and frozen: nf4 is QLoRA's 4 "
        "bits. With adapter.kind: none, ternary trains BitNet b1.58: float master weights, quantized in every forward pass.",
    )
    double: bool = Field(True, description="Quantize the NF4 block scales too: 4.127 instead of 4.5 bits a weight.")
    keep: list[str] = Field(
        [],
        description="Further module paths (shell patterns such as *.o_proj) to leave unquantized; heads, embeddings, norms "
        "and routers always are.",
    )
    rms_norm: bool = Field(
        False,
        description="An RMSNorm inside each ternary linear, the block's own norms before it fixed at one: the layout of BitNet "
        "b1.58's training tips. Off, the model normalizes: use model_type bitnet, the layout of 2B4T, for its sub-norms.",
    )
    sub_norms: bool = Field(
        False,
        description="Turn a pretrained Llama-like model into the layout of BitNet b1.58 2B4T: sub-norms before o_proj and "
        "down_proj (BitDistill, arXiv 2510.13998, section 3.1).",
    )
    warmup: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the steps in which λ of w + λ(q(w) − w) rises from 0 to 1; for ternary from a pretrained model.",
    )
    warmup_shape: Literal["linear", "cosine", "exponential"] = Field(
        "linear", description="How λ rises: evenly, slowly at both ends, or fast at first (1 − e^(−5t), scaled to end at 1)."
    )


class Adapter(Section):
    kind: Literal["lora", "none"] = Field(
        "lora", description="lora trains low-rank adapters on a frozen base; none trains all weights."
    )
    rank: Positive = Field(16, description="Rank r of the adapters: trainable parameters and capacity grow with it.")
    alpha: Positive = Field(32, description="LoRA scale: the update is multiplied by alpha/rank (rslora: alpha/√rank).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability with which an adapter's inputs are dropped while training.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Modules that get adapters: all-linear (all but the head), or names such as [q_proj, v_proj].",
    )
    rslora: bool = Field(False, description="Rank-stabilized scale alpha/√rank (arXiv 2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed adapters (arXiv 2402.09353): often better at low rank, slower.")

    @property
    def base_frozen(self) -> bool:
        """The base's weights are frozen, and adapters on them are trained."""
        return self.kind != "none"


class Distill(Section):
    teacher: str | None = Field(
        None, description="A float model to learn from besides the data, with the same tokenizer: as model.name. null: none."
    )
    logits: float = Field(1.0, ge=0, description="Weight of the KL divergence from the teacher's logits, beside the data's loss.")
    temperature: float = Field(5.0, gt=0, description="Temperature of both sides in that divergence.")
    relations: float = Field(
        1e3, ge=0, description="Weight of the attention relations' divergence (MiniLM's, of Q, K and V of one layer); 0: none."
    )
    layer: int | None = Field(
        None, description="The layer whose relations are compared; negative counts from the end. null: seven eighths up."
    )


class Data(Section):
    name: str | None = Field(
        None, description="Where rows come from: hub dataset id, or package:NAME (an installed package's files)."
    )
    path: str | None = Field(
        None,
        description="Where rows come from: a local .json, .jsonl or .txt file; for pretrain .txt, .jsonl, .parquet or a folder "
        "of them. Wins over data.name.",
    )
    files: list[str] = Field(
        [], description="Only these files (shell patterns, such as */english/trivia.yml) of a package or hub dataset."
    )
    split: str = Field("train", description="Split of a hub dataset to read.")
    revision: str | None = Field(
        None, description="pretrain: hub branch, tag or commit of the dataset; null: the newest, which the run then keeps to."
    )
    format: Literal["auto", "alpaca", "messages", "dialogue", "text"] = Field(
        "auto",
        description="What a row looks like: alpaca (instruction, input, output), messages (role and content, or ShareGPT's from "
        "and value), dialogue (a list of alternating turns), text. auto looks at the rows and says what it found.",
    )
    text_key: str = Field("text", description="pretrain: the key (or column) of a row that holds its text.")
    template: Literal["auto", "chatml", "alpaca"] = Field(
        "auto", description="Chat template. auto: the tokenizer's own, or alpaca where a base model has none."
    )
    system: str | None = Field(None, description="System message for conversations that have none of their own.")
    loss_on: Literal["answers", "all"] = Field(
        "answers", description="Tokens that are trained: the assistant's answers with their end token, or every token."
    )
    max_rows: Positive | None = Field(None, description="Use only the first so many rows.")
    max_length: Positive = Field(1024, description="Longest sample and longest packed row, in tokens. Memory grows with it.")
    truncation: Literal["cut", "drop"] = Field("cut", description="A sample over max_length is cut at its end, or dropped.")
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="What to do with rows that fit no format: stop and show them, or skip and count them."
    )
    dedupe: bool = Field(True, description="Remove rows that are equal to an earlier one.")
    heldout: int | float = Field(
        64,
        ge=0,
        description="Rows kept out of training to measure it: a count, or a share when below 1. 0 measures nothing. For pretrain "
        "a count of packed rows of max_length tokens.",
    )
    heldout_path: str | None = Field(None, description="A local file of held-out rows instead of splitting them off.")
    packing: bool = Field(
        True,
        description="Fill rows of max_length tokens with several samples; none sees another. Off: one sample each. Neither pads.",
    )

    @model_validator(mode="after")
    def _has_source(self) -> Data:
        if not self.name and not self.path:
            raise ValueError("give data.path (a local file) or data.name (a hub dataset or package:NAME)")
        return self


class Train(Section):
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows; pretrain counts tokens or steps instead.")
    max_steps: Positive | None = Field(None, description="Stop after so many optimizer steps, whatever train.epochs says.")
    max_tokens: int | float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="pretrain: stop after so many tokens, such as 2.5e9; the text begins again where it ends.",
    )
    micro_batch: Positive = Field(
        1, description="Rows (packed or single) that go through the model at once. Memory grows with it."
    )
    accumulation: Positive = Field(1, description="Micro-batches whose gradients are summed before an optimizer step.")
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate. Not given: 2e-4, for pretrain 6e-4, and twice that where ternary weights are trained.",
    )
    twin_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the float twin; null: half of train.lr, which is a ternary one."
    )
    schedule: Literal["cosine", "linear", "constant", "two_stage"] = Field(
        "cosine",
        description="How the learning rate falls after the warm-up. two_stage, of BitNet b1.58: linearly to 8/15 of the peak at "
        "half of the steps, then from 1/3 of it to min_lr, without weight decay.",
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises from 0.")
    min_lr: float = Field(0.1, ge=0, le=1, description="Where the schedule ends, as a share of the peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay of matrices (norms and biases never decay).")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8bit keeps Adam's states in 2 instead of 8 bytes a parameter; paged lets them spill into CPU memory.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's ε, added to the root of the second moment.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this global norm; 0 never clips.")
    stochastic_rounding: bool = Field(
        False,
        description="All weights trained in bf16, without an fp32 copy: 2 instead of 4 bytes a weight. Updates are rounded "
        "stochastically, or small ones would vanish (arXiv 2010.06192).",
    )
    optimizer_in_backward: bool = Field(
        False,
        description="Each weight takes its step as soon as its gradient is known, and frees it: gradients of one layer at a "
        "time. Needs accumulation 1 and max_grad_norm 0; a bad step goes back to the last checkpoint.",
    )
    loss_chunk: int = Field(
        256,
        ge=0,
        description="Tokens whose logits exist at once, by linear and cross-entropy fused in chunks; 0: all of them.",
    )
    health_steps: Positive = Field(
        5,
        description="Optimizer steps between two looks at ternary weights (codes that flip, zeros, scales); a long run looks "
        "about a thousand times.",
    )
    checkpointing: bool | Literal["offload"] = Field(
        False,
        description="Recompute activations in the backward pass: far less memory, about a third slower. offload: what is still "
        "kept of each layer, its input, waits in the CPU's memory.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Arithmetic of the matrix products. auto: bf16 over fp32 weights (mixed precision) where all weights are "
        "trained and the device, a CPU too, computes in bf16; model.dtype under adapters. bf16: mixed precision over any fp32 "
        "weights; fp32 makes the unquantized weights fp32 too.",
    )
    save_steps: Positive | None = Field(
        None, description="Optimizer steps between checkpoints; null saves at the end only. Not given: 500 for pretrain."
    )
    keep_checkpoints: Positive = Field(2, description="How many checkpoints to keep; older ones are removed.")
    save_best: bool = Field(
        False,
        description="Write a checkpoint whenever the held-out loss is the lowest so far, and keep it beside the last ones. Needs "
        "train.eval_steps.",
    )
    load_best_at_end: bool = Field(
        False, description="End with the weights of the lowest held-out loss. Switches train.save_best on."
    )
    on_bad_step: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="Where loss or gradient is NaN or infinite, or the loss a spike: leave the step's samples out and go "
        "on with the next, go back to the last checkpoint and leave them out, or stop. The samples are written down.",
    )
    max_bad_steps: int = Field(3, ge=0, description="How many bad steps a run may have before it stops.")
    spike: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="A loss so many spreads (as standard deviations) above the median of the last 64 makes a bad step; such "
        "as 8. null: only NaN and infinity do.",
    )
    eval_steps: Positive | None = Field(
        None, description="Optimizer steps between held-out evaluations; null: before and after only."
    )


class Fast(Section):
    """The parts of the fast step. Each gives what the plain step gives; the chunked loss is train.loss_chunk."""

    attention: bool = Field(True, description="Samples in one row attend to themselves alone, without a mask or padding.")
    lora: bool = Field(
        True, description="Adapters and the frozen linears below them as one function; q, k and v, gate and up at once."
    )
    blocks: bool = Field(True, description="Norms, rotary positions and gated activations as one pass each; needs compilation.")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Let torch.compile make machine code of elementwise parts and the loss: some ten seconds the first time. "
        "auto: where a run is long enough for it, and a compiler is there.",
    )


class Eval(Section):
    samples: int = Field(3, ge=0, description="Held-out questions that the model answers before and after training.")
    prompts: list[str] = Field([], description="Questions of your own that the model answers before and after training.")
    max_new_tokens: Positive = Field(64, description="Longest sample answer, in tokens.")
    batch_tokens: Positive = Field(2048, description="Tokens that go through the model at once in evaluation.")
    merge_rows: int = Field(
        64, ge=0, description="Held-out rows on which the merged model is compared with the trained one; 0 does not."
    )
    merge_limit: float = Field(0.02, gt=0, description="Largest difference of loss, in nats, that the merge gate lets pass.")
    tasks: list[str] = Field([], description="lm-evaluation-harness tasks to score before and after training.")
    include_path: str | None = Field(None, description="Folder with task files of your own for the harness.")
    limit: Positive | None = Field(None, description="Documents of each task to score; null takes all.")


class Export(Section):
    formats: list[Literal["bitnet", "bitnet-online", "gguf-tq2_0", "gguf-tq1_0", "gguf-f16"]] = Field(
        [], description="Write the trained model for other programs too, each compared with it by the equivalence gate."
    )
    gate_tokens: Positive = Field(
        1024, description="Tokens of held-out rows on which an export is compared with the trained model."
    )


class Run(Section):
    dir: str | None = Field(None, description="The run's folder. null: runs/NAME of the recipe, numbered when taken.")
    seed: int = Field(17, ge=0, description="Seed of the split, the order, the adapters' start and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train. auto: the GPU where there is one.")
    threads: Positive | None = Field(
        None, description="CPU threads; null lets torch decide. Bit-equal resume needs the same number."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="With several processes. ddp: each has the whole model; fsdp: the layers' weights, packed ones too, their "
        "gradients and optimizer states are shared out among them.",
    )
    merge: bool = Field(True, description="Merge the adapter into a model folder that plain transformers loads.")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Send metrics there too; metrics.jsonl is always written."
    )


class Plan(Section):
    gpu: str | None = Field(
        None, description="The device that finetune plan reckons with, such as rtx-4070; null: the one that is present."
    )
    memory: str | None = Field(
        None, description="How much of the device's memory may be used, such as 12GB (of 1024³ bytes each); null: all of it."
    )
    price_per_kwh: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Price of electricity in any currency: the plan tells what the run costs."
    )

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(AMOUNT, value.strip(), re.IGNORECASE):
            raise ValueError(f"{value!r} is no amount of memory; give one such as 12GB or 11.5GiB")
        return value


# Each tells (key, message) of what does not fit together in a recipe. rules.py puts its own in, as it knows Recipe and not the
# other way round.
CHECKS: list[Callable[[Recipe], Iterable[tuple[str, str]]]] = []


class Recipe(Section):
    kind: Literal["sft", "pretrain"] = Field(
        "sft", description="What is trained: sft, supervised fine-tuning on conversations; pretrain, on streamed text."
    )
    about: str = Field("", description="One sentence for `finetune recipes` and the report.")
    model: Model = Field(description="The model to start from.")
    tokenizer: Tokenizer = Field(Tokenizer(), description="The tokenizer of a model from scratch.")
    quant: Quant = Field(Quant(), description="How linear layers are stored, or trained.")
    adapter: Adapter = Field(
        Adapter(), description="What is trained on top of it. pretrain trains all weights unless this says lora."
    )
    distill: Distill = Field(Distill(), description="A teacher, for ternary from a pretrained model.")
    data: Data = Field(description="What is learnt.")
    train: Train = Field(Train(), description="How it is learnt.")
    fast: Fast = Field(Fast(), description="How a step is computed: the same results in less time and memory.")
    twin: bool = Field(
        False, description="Then train the float twin of a ternary model too, on equal tokens in equal order, and report the gap."
    )
    eval: Eval = Field(Eval(), description="How it is measured.")
    export: Export = Field(Export(), description="For which other programs it is written.")
    run: Run = Field(Run(), description="Where it happens and what it leaves.")
    plan: Plan = Field(Plan(), description="What it is planned for, before anything is loaded.")
    fit: Literal["none", "auto"] = Field(
        "none",
        description="auto: where the plan does not fit into the memory, the recipe is changed until it does, at the least cost "
        "in time, and what was changed is said.",
    )

    @model_validator(mode="before")
    @classmethod
    def _values_as_called_here(cls, value: Any) -> Any:
        """Other programs' spellings of values, where they mean the same."""
        if isinstance(value, dict):
            for section, name in (key.split(".") for key in SAME_VALUES):
                if isinstance(keys := value.get(section), dict) and name in keys:
                    value = {**value, section: {**keys, name: canonical_value(f"{section}.{name}", keys[name])}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_kind(cls, value: Any) -> Any:
        """Defaults that depend on other keys, put in before anything reads them, so that the resolved recipe shows them."""
        sections = ("adapter", "train", "quant")
        if not isinstance(value, dict) or not all(isinstance(value.get(name, {}), dict) for name in sections):
            return value  # whoever reads the keys says what is wrong
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
        """The base's weights are frozen, and adapters on them are trained; else all weights are trained."""
        return self.adapter.base_frozen

    @property
    def writes_adapter(self) -> bool:
        """The run leaves adapter files."""
        return self.base_frozen

    @property
    def mergeable(self) -> bool:
        """What is trained can be merged into the base's weights."""
        return self.adapter.kind == "lora"

    @property
    def trains_quantized(self) -> bool:
        """Float master weights of quantized linears are trained (straight-through), and not only frozen codes under adapters."""
        return self.quant.scheme != "none" and not self.base_frozen

    @property
    def streams_text(self) -> bool:
        """The data is a stream of text without an end, all of whose tokens are trained; else conversations, row by row."""
        return self.kind == "pretrain"

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        broken = dict.fromkeys(broken for check in CHECKS for broken in check(self))  # each once
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
    """Every key of the schema, dotted, with its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.update(known_keys(field.annotation, f"{prefix}{name}."))
    return keys
