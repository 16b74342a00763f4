"""Export as GGUF for llama.cpp: ternary linears as TQ2_0 (2.06 bits per weight) or TQ1_0 (1.69), or everything as F16.

    gguf-tq2_0, gguf-tq1_0    ternary linears as codes in blocks of 256 along a row, each block with the scale mean|W| in F16
    gguf-f16                  dequantized weights, or those of a float model, in F16
    all of them               embedding, head and linears that are not ternary in F16; norms in F32

A block's scale is the largest magnitude in it. So it gets t · mean|W| and never the latent weights, whose outliers would
make most codes 0.

**llama.cpp's arithmetic differs from that of training**, and is simulated here with its roundings: it quantizes the input of a
TQ product to int8 in blocks of 256 along the row instead of per token, and rounds the input of an F16 product to F16.

llama.cpp's graphs are fixed. `llama` and `bitnet` both compute SiLU: in the supported build (llama_cpp.WHEEL), loading
`bitnet` reads the norm's ε and nothing else, so ReLU² of 2B4T would silently run as SiLU. `bitnet` has the two
sub-norms and uses the embedding as its head; neither graph has a norm inside a linear. Models that need more are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.exporters.gate import Bounds
from finetune.exporters.layers import check_layers, require_ternary, ternary_layers, widened
from finetune.exporters.vocabulary import Vocabulary
from quant import PackedBitLinear, ternary

BLOCK = 256
TYPES = {"gguf-tq2_0": "TQ2_0", "gguf-tq1_0": "TQ1_0", "gguf-f16": "F16"}
BOUNDS = Bounds(factor=2.0, floor=1e-3, ceiling=0.5, kl=1.0)
"""Two results with independent rounding differ by √2 of their distance from the unrounded one: more than 2 is not rounding.
Measured over 16 models (2, 6, 16 layers; untrained and trained; fp32, bf16; both graphs): correct exports reach 0.81 of the
noise, the bugs that the tests inject begin at 6.8, in a single layer at 2.1 (untrained) and 8 (trained)."""


@dataclass(frozen=True)
class Architecture:
    """A graph of llama.cpp. name: `general.architecture`. interleaved: rotary pairs are adjacent, not half a head apart.
    own_head: the head may be untied. sub_norms: norms before the output of attention and of the feed-forward part.
    square: the queries must be as wide as the model."""

    name: str
    interleaved: bool
    own_head: bool
    sub_norms: bool
    square: bool
    activations: tuple[str, ...] = ("silu",)


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True, own_head=True, sub_norms=False, square=False),
    "BitNetForCausalLM": Architecture("bitnet", interleaved=False, own_head=False, sub_norms=True, square=True),
}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}


# ---------------------------------------------------------------------------------------------------------------- refusals


def check(model: Any, format: str) -> None:  # noqa: A002
    """Raise for a model that llama.cpp cannot express. A model on `meta` is checked by its shapes and its config.

    Raises:
        UserError: naming the layer or the key of the config.
    """
    model_class, config = type(model).__name__, model.config
    if (architecture := ARCHITECTURES.get(model_class)) is None:
        raise UserError(
            "this architecture cannot be exported as GGUF",
            where=model_class,
            got=f"supported: {', '.join(ARCHITECTURES)}",
            hint="merge adapters first (finetune merge); for another architecture use llama.cpp's own converter",
        )

    def refuse(key: str, what: str, hint: str | None = None) -> UserError:
        message = f"llama.cpp's `{architecture.name}` {what}"
        return UserError(message, where=f"{model_class}: {key}", got=repr(getattr(config, key, None)), hint=hint)

    if config.hidden_act not in architecture.activations:
        raise refuse(
            "hidden_act",
            f"always computes {' or '.join(architecture.activations)}",
            f"train with hidden_act: {architecture.activations[0]}, or export --to bitnet, which supports it",
        )
    if not architecture.own_head and not config.tie_word_embeddings:
        raise refuse("tie_word_embeddings", "uses the embedding as its head", "train with tie_word_embeddings: true")
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("rope_parameters", "is exported with plain rotary positions only")
    if architecture.square and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise refuse("head_dim", "requires hidden_size / num_attention_heads")
    check_layers(model, multiple=BLOCK if format != "gguf-f16" else 1)
    if format != "gguf-f16":
        require_ternary(model, format)
    for name, layer in ternary_layers(model).items():
        if layer.rms_norm is not None:
            raise UserError(
                f"llama.cpp's `{architecture.name}` has no norm inside a linear (the training-tips layout)",
                where=name,
                got="use_rms_norm",
                hint="export --to bitnet, which supports it; or train the layout with sub-norms",
            )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            raise UserError(f"llama.cpp's `{architecture.name}` has no biases", where=name, got=str(tuple(parameter.shape)))
        module = name.rpartition(".")[0]
        if _gguf_name(module) is None or (module.endswith("sub_norm") and not architecture.sub_norms):
            raise UserError(f"llama.cpp's `{architecture.name}` does not have this tensor", where=name)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gguf_name(module: str) -> str | None:
    """'model.layers.3.mlp.up_proj' → 'blk.3.ffn_up'."""
    if module in NAMES:
        return NAMES[module]
    match module.split(".", 3):
        case ["model", "layers", number, rest] if rest in NAMES:
            return f"blk.{number}.{NAMES[rest]}"
    return None


# ----------------------------------------------------------------------------------------------------------------- writing


def write(packed: Any, vocab: Vocabulary, path: Path, format: str, *, name: str) -> None:  # noqa: A002
    """Write `packed` (layers.packed_copy, checked) to `path`.

    Raises:
        UserError: a weight is out of the range of F16, or not finite.
    """
    import gguf

    config, architecture = packed.config, ARCHITECTURES[type(packed).__name__]
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{TYPES[format]}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
        writer.add_rope_dimension_count(_head_dim(config))
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(len(vocab.tokens))
        _add_vocabulary(writer, vocab)
        for tensor, data, type_name in tensors(packed, format):
            writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_vocabulary(writer: Any, vocab: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.rule)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_eos_token_id(vocab.eos)
    writer.add_bos_token_id(vocab.eos if vocab.bos is None else vocab.bos)  # without one llama.cpp uses token 11
    if vocab.pad is not None:
        writer.add_pad_token_id(vocab.pad)
    writer.add_add_bos_token(vocab.adds_bos)
    writer.add_add_eos_token(False)
    if vocab.template is not None:
        writer.add_chat_template(vocab.template)


def tensors(packed: Any, format: str) -> Iterator[tuple[str, np.ndarray, str]]:  # noqa: A002
    """(name, data as stored in the file, its type) of every tensor of the GGUF."""
    import gguf

    architecture = ARCHITECTURES[type(packed).__name__]
    tied = packed.config.tie_word_embeddings
    for path, module in packed.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or (tied and path == "lm_head"):
            continue
        name = f"{_gguf_name(path)}.weight"
        if isinstance(module, PackedBitLinear):
            values, type_name = weights(module), TYPES[format]
        else:
            values, type_name = weight.detach().float(), "F32" if weight.dim() == 1 else "F16"
        if architecture.interleaved and path.endswith(("q_proj", "k_proj")):
            values = interleave(values, _head_dim(packed.config))
        if not bool((values.half() if type_name == "F16" else values).isfinite().all()):
            raise UserError("a weight is not finite in F16", where=path, got=f"the largest is {float(values.abs().max()):.3g}")
        quantization = gguf.GGMLQuantizationType[type_name]
        yield name, gguf.quants.quantize(values.contiguous().numpy(), quantization), type_name


def weights(layer: PackedBitLinear) -> Tensor:
    """The weights of a ternary layer as a TQ format stores them: t · mean|W| with the scale rounded to F16; (out, in) fp32."""
    packed = layer.packed
    scale = (1 / packed.scale).half().float()
    if not bool((scale > 0) & scale.isfinite()):
        raise UserError("the scale of a ternary layer is out of the range of F16", got=f"mean|W| = {float(1 / packed.scale):.3g}")
    return ternary.unpack(packed.codes).float() * scale


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from halves, as transformers' Llama rotates them, to pairs, as llama.cpp's: j, j + d/2 → 2j, 2j + 1."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# -------------------------------------------------------------------------------------------------------------- simulation


def simulation(packed: Any, format: str) -> Any:  # noqa: A002
    """`packed` (consumed) with the arithmetic of llama.cpp on the file that `write` makes of it; in fp32, on the CPU."""
    widened(packed)
    for path, module in list(packed.named_modules()):
        if isinstance(module, PackedBitLinear):
            replacement: nn.Module = _TQ(module) if format != "gguf-f16" else _F16(weights(module))
        elif isinstance(module, nn.Linear):
            replacement = _F16(module.weight)  # for a tied head: the embedding's own Parameter
        else:
            if isinstance(module, nn.Embedding):
                module.weight.data = _rounded(module.weight.data)
            continue
        parent, _, name = path.rpartition(".")
        setattr(packed.get_submodule(parent), name, replacement)
    return packed


class _F16(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.weight.data = _rounded(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_rounded(x), self.weight)


class _TQ(nn.Module):
    def __init__(self, layer: PackedBitLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_in_blocks(x), weights(self.layer))


def _rounded(x: Tensor) -> Tensor:
    return x.half().float()


def round_in_blocks(x: Tensor) -> Tensor:
    """x (…, n) fp32 rounded as in llama.cpp's Q8_K: int8 in blocks of 256, scaled so that the largest magnitude becomes −127."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(peak == 0, 0.0, -127 / peak)
    codes = (blocks * scale).round_().clamp_(max=127)
    return torch.where(scale == 0, 0.0, codes * (1 / scale)).flatten(-2)
