"""Insertion of sub-norms into a pretrained Llama: preserved outputs, initial gains, and models that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.models.sub_norms import insert_sub_norms
from finetune.models.weights import cast

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3, "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
}  # fmt: skip


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 90, (1, length), generator=generator) for length in (16, 9)]


class Identity(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4, "hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_without_the_inserted_norms_gives_the_original_logits(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model, batches = cast(_llama(**changes), dtype).eval(), _batches()
    expected = [model(ids).logits for ids in batches]
    weights = dict(model.named_parameters())
    converted = insert_sub_norms(model, batches)
    assert type(converted).__name__ == "BitNetForCausalLM"
    assert not any(module._forward_pre_hooks for module in model.modules())
    parameters = dict(converted.named_parameters())
    assert all(parameters[name] is weight for name, weight in weights.items())  # the same tensors, not copies
    assert len(parameters) == len(weights) + 4
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == converted.config.tie_word_embeddings
    assert {p.dtype for p in parameters.values()} == {dtype}
    assert not any(t.is_meta for t in (*converted.parameters(), *converted.buffers()))
    with_norms: Any = converted(batches[0]).logits
    assert not torch.equal(with_norms, expected[0])
    for layer in converted.model.layers:
        layer.self_attn.attn_sub_norm, layer.mlp.ffn_sub_norm = Identity(), Identity()  # type: ignore[assignment]
    for ids, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(converted(ids).logits, logits, rtol=0, atol=0)


def test_initial_gains_are_the_median_rms_of_the_inputs() -> None:
    model, batches = _llama(), _batches()
    model.train()
    rms: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: rms.append(a[0].pow(2).mean(-1).sqrt()))
    with torch.no_grad():
        for ids in batches:
            model(ids)
    hook.remove()
    converted = insert_sub_norms(model, batches)
    gain = converted.model.layers[1].mlp.ffn_sub_norm.weight
    torch.testing.assert_close(gain.detach(), torch.cat([s.flatten() for s in rms]).median().expand(48))
    assert gain.requires_grad
    assert converted.training


def test_converted_model_can_be_saved_loaded_and_trained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quant import swap

    model, (ids, _) = _llama(), _batches()
    model.generation_config.eos_token_id = [2, 5]
    converted = insert_sub_norms(model, [ids]).eval()
    expected = converted(ids).logits
    assert converted.generation_config.eos_token_id == [2, 5]
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted)
    assert (loaded.config.rms_norm_eps, loaded.config.hidden_act, loaded.config.pad_token_id) == (1e-6, "silu", 3)
    assert loaded.config.rope_parameters["rope_theta"] == 777.0
    assert torch.equal(loaded(ids).logits, expected)
    report = swap(converted, scheme="ternary", trainable=True)
    assert len(report.swapped) == 14
    converted(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_mistral_is_converted_unless_it_has_a_sliding_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    (ids, _) = _batches()
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    assert type(insert_sub_norms(model, [ids])).__name__ == "BitNetForCausalLM"
    with pytest.raises(UserError, match="sliding-window attention of 8 tokens"):
        insert_sub_norms(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), [ids])


def test_unsupported_models_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaModel, Qwen2Config, Qwen2ForCausalLM

    from quant import swap

    (ids, _) = _batches()
    with pytest.raises(UserError, match=r"q_proj\.bias|k_proj\.bias"):
        insert_sub_norms(_llama(attention_bias=True), [ids])
    with pytest.raises(UserError, match=r"down_proj\.bias"):
        insert_sub_norms(_llama(mlp_bias=True), [ids])
    with pytest.raises(UserError, match="head_dim 16"):
        insert_sub_norms(_llama(head_dim=16), [ids])
    with pytest.raises(UserError, match="Qwen2ForCausalLM"):
        insert_sub_norms(Qwen2ForCausalLM(Qwen2Config(**SIZES)), [ids])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1))
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        insert_sub_norms(gpt2, [ids])
    with pytest.raises(UserError, match="a LlamaModel"):
        insert_sub_norms(LlamaModel(_llama().config), [ids])
    quantized = _llama()
    swap(quantized, scheme="ternary")
    with pytest.raises(UserError, match="quantized weights"):
        insert_sub_norms(quantized, [ids])
    with pytest.raises(UserError, match="no text"):
        insert_sub_norms(_llama(), [])
