"""From a pretrained Llama to the layout of BitNet b1.58 2B4T: the same weights, and two norms more in each block.

BitNet normalizes what enters o_proj and down_proj, `attn_sub_norm` and `ffn_sub_norm`: there activations have outliers that
int8 codes cannot hold (SubLN; BitDistill, arXiv 2510.13998, section 3.1, inserts them before it fine-tunes to 1.58 bit).
A norm changes the function that was learnt; its gain can undo the change for the usual token, though not for each:

    x → g · x / rms(x)          g: the median of rms(x) over tokens of real text

The median, since a few tokens (the first of a text) have activations 10 to 25 times as large as all others. SmolLM2-135M,
loss on 3,072 tokens of WikiText-2, gains measured on 2,048 others, 2026-11-21: 3.63 nats without norms; with them 16.55 at
g = 1, 5.34 at the mean, 4.65 at the geometric mean, 4.62 at the median. A gain by channel is no better: 5.62 by least squares,
4.72 by mean logarithms, 4.62 when the linear's outputs are fitted; measured behind the norms already inserted it is 12.9.
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

FAMILIES = ("llama", "mistral")  # of transformers; SmolLM2 and TinyLlama are Llamas
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
SUB_NORMS = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}  # linear: the norm before it, beside it
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters",
)  # fmt: skip
"""What a BitNetConfig takes over from the config of a Llama."""


def insert_sub_norms(model: Any, batches: Iterable[Tensor]) -> BitNetForCausalLM:
    """A pretrained Llama-like `model` as transformers' BitNetForCausalLM, with its own weights, head, rope and activation.

    The weights are taken over: both models share them afterwards, so `model` is not to be used any more (a teacher has to be
    loaded apart). batches: input ids (1, T) of text on the model's device, some thousand tokens, by which gains are measured.

    Raises:
        UserError: the model is no Llama, or has what a BitNetForCausalLM cannot express; there is nothing to measure with.
    """
    from transformers import BitNetForCausalLM

    config = converted_config(model)
    with torch.device("meta"):
        converted = BitNetForCausalLM(config)
    weights = dict(model.named_parameters(remove_duplicate=False))
    norms = {name for name, _ in converted.named_parameters() if name.split(".")[-2] in SUB_NORMS.values()}
    expected = {name for name, _ in converted.named_parameters(remove_duplicate=False)} - norms
    if other := sorted(weights.keys() ^ expected):
        raise _unfit(f"{len(other)} parameters that only one of the two layouts has, such as {other[0]}")
    for path, gain in _gains(model, batches).items():
        block, _, linear = path.rpartition(".")
        like = weights[f"{path}.weight"]
        features = torch.full((like.shape[1],), gain, dtype=like.dtype, device=like.device)
        weights[f"{block}.{SUB_NORMS[linear]}.weight"] = nn.Parameter(features, requires_grad=like.requires_grad)
    for name, parameter in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, parameter)
    inner: Any = converted.model
    inner.rotary_emb = type(inner.rotary_emb)(config).to(weights["model.norm.weight"].device)  # was on meta: not in the weights
    converted.generation_config = model.generation_config
    return converted.train(model.training)


def converted_config(model: Any) -> Any:
    """The BitNetConfig of the converted `model`, which may lie on `meta`.

    Raises:
        UserError: as `insert_sub_norms`.
    """
    from transformers import BitNetConfig

    config = model.config
    if config.model_type not in FAMILIES or type(model).__name__ not in ARCHITECTURES:
        raise _unfit(f"a {type(model).__name__} ({config.model_type})")
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise _unfit(f"heads of {config.head_dim}, and {config.hidden_size} / {config.num_attention_heads} is another size")
    if (window := getattr(config, "sliding_window", None)) is not None and window < config.max_position_embeddings:
        raise _unfit(f"attention within a sliding window of {window} tokens")
    if getattr(model, "hf_quantizer", None) is not None:
        raise _unfit("quantized weights")
    converted = BitNetConfig(**{name: getattr(config, name) for name in CARRIED})
    converted.dtype, converted._attn_implementation = config.dtype, config._attn_implementation
    return converted


def _unfit(found: str) -> UserError:
    return UserError(
        "sub-norms can only be inserted into a plain Llama: the result has to be a BitNetForCausalLM of transformers",
        where="model.name",
        got=found,
        hint="take a Llama, SmolLM2 or a Mistral without biases; or train without sub-norms",
    )


def _gains(model: Any, batches: Iterable[Tensor]) -> dict[str, float]:
    """{path of a linear: median over tokens of the root mean square of what enters it}."""
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
    gains = {path: float(torch.cat(found).median()) for path, found in sizes.items()}
    if not gains or not all(0 < gain < math.inf for gain in gains.values()):
        raise UserError(
            "the gain of the sub-norms cannot be measured",
            got="no text" if not gains else "activations that are zero or not finite",
        )
    return gains
