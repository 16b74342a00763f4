"""Converting a pretrained Llama to the layout of BitNet b1.58 2B4T: the same weights, with two more norms in each block.

BitNet normalizes the inputs of o_proj and down_proj (`attn_sub_norm`, `ffn_sub_norm`), because their outliers do not fit int8
codes (SubLN; BitDistill, arXiv 2510.13998, section 3.1, inserts them before fine-tuning to 1.58 bit). A norm changes the trained
function; a gain compensates for that on typical tokens, though not on all:

    x → g · x / rms(x)          g: the median of rms(x) over tokens of real text

The median, because a few tokens (the first of a text) have activations 10 to 25 times as large as all others. SmolLM2-135M,
loss on 3,072 tokens of WikiText-2, gains measured on 2,048 others, 2026-11-21: 3.63 nats without norms; with norms 16.55 for
g = 1, 5.34 for the mean, 4.65 for the geometric mean, 4.62 for the median. Gains by channel are not better: 5.62 for least
squares, 4.72 for mean logarithms, 4.62 for a fit of the linear's outputs; measured behind the norms already inserted, 12.9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eval.model_state import evaluating
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import BitNetForCausalLM

FAMILIES = ("llama", "mistral")  # model_type in transformers; SmolLM2 and TinyLlama are Llamas
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
SUB_NORMS = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}  # {linear: the norm of its input}
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters",
)  # fmt: skip
"""Keys that a BitNetConfig takes from a Llama's config."""


def insert_sub_norms(model: Any, batches: Iterable[Tensor]) -> BitNetForCausalLM:
    """Convert a pretrained Llama-like `model` to transformers' BitNetForCausalLM, with the same weights, rope and activation.

    Both models share the weights, so do not use `model` afterwards (load a teacher separately). batches: input ids (1, T) of text
    on the model's device, a few thousand tokens, for measuring the gains.

    Raises:
        UserError: the model is not a Llama, or has a feature that BitNetForCausalLM lacks; or there are no batches.
    """
    from transformers import BitNetForCausalLM

    config = converted_config(model)
    with torch.device("meta"):
        converted = BitNetForCausalLM(config)
    weights = dict(model.named_parameters(remove_duplicate=False))
    norms = {name for name, _ in converted.named_parameters() if name.split(".")[-2] in SUB_NORMS.values()}
    expected = {name for name, _ in converted.named_parameters(remove_duplicate=False)} - norms
    if other := sorted(weights.keys() ^ expected):
        raise _unfit(f"{len(other)} parameters exist in only one of the two layouts, such as {other[0]}")
    for path, gain in _gains(model, batches).items():
        block, _, linear = path.rpartition(".")
        weight = weights[f"{path}.weight"]
        gains = torch.full((weight.shape[1],), gain, dtype=weight.dtype, device=weight.device)
        weights[f"{block}.{SUB_NORMS[linear]}.weight"] = nn.Parameter(gains, requires_grad=weight.requires_grad)
    for name, parameter in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, parameter)
    inner: Any = converted.model
    inner.rotary_emb = type(inner.rotary_emb)(config).to(
        weights["model.norm.weight"].device
    )  # was on meta, because it is not among the weights
    converted.generation_config = model.generation_config
    return converted.train(model.training)


def converted_config(model: Any) -> Any:
    """The BitNetConfig of the converted `model`, which may be on `meta`.

    Raises:
        UserError: as `insert_sub_norms`.
    """
    from transformers import BitNetConfig

    config = model.config
    if config.model_type not in FAMILIES or type(model).__name__ not in ARCHITECTURES:
        raise _unfit(f"a {type(model).__name__} ({config.model_type})")
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise _unfit(f"head_dim {config.head_dim} is not {config.hidden_size} / {config.num_attention_heads}")
    if (window := getattr(config, "sliding_window", None)) is not None and window < config.max_position_embeddings:
        raise _unfit(f"sliding-window attention of {window} tokens")
    if getattr(model, "hf_quantizer", None) is not None:
        raise _unfit("quantized weights")
    converted = BitNetConfig(**{name: getattr(config, name) for name in CARRIED})
    converted.dtype, converted._attn_implementation = config.dtype, config._attn_implementation
    return converted


def _unfit(got: str) -> UserError:
    return UserError(
        "sub-norms can only be inserted into a plain Llama, because the result must be a BitNetForCausalLM of transformers",
        where="model.name",
        got=got,
        hint="use a Llama, SmolLM2, or a Mistral without biases; or train without sub-norms",
    )


def _gains(model: Any, batches: Iterable[Tensor]) -> dict[str, float]:
    """{path of a linear: median over tokens of the root mean square of its input}."""
    sizes: dict[str, list[Tensor]] = {}

    def listener(path: str) -> Any:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sizes.setdefault(path, []).append(inputs[0].detach().float().pow(2).mean(-1).sqrt().flatten())

        return listen

    linears = {path: module for path, module in model.named_modules() if path.rpartition(".")[2] in SUB_NORMS}
    hooks = [module.register_forward_pre_hook(listener(path)) for path, module in linears.items()]
    try:
        with torch.no_grad(), evaluating(model):
            for ids in batches:
                model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    gains = {path: float(torch.cat(values).median()) for path, values in sizes.items()}
    if not gains or not all(0 < gain < math.inf for gain in gains.values()):
        raise UserError(
            "cannot measure the gains of the sub-norms",
            got="no text" if not gains else "activations that are zero or not finite",
        )
    return gains
