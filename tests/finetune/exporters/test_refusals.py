"""Export checks: an unsupported model is an error before anything is written, with the layer, its shape and a hint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BitNetConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from finetune.errors import UserError
from finetune.exporters import FORMATS, check, export
from quant import pack, swap, to_float
from tests.finetune.exporters.conftest import SIZES, built

TQ = ["gguf-tq2_0", "gguf-tq1_0"]
GGUF = [*TQ, "gguf-f16"]


def expect_error(model: Any, format: str, message: str) -> UserError:  # noqa: A002
    """The error of `check`. A config stands for a model that will be trained in ternary."""
    with pytest.raises(UserError, match=message) as caught:
        check(model, format, ternary=True if isinstance(model, PreTrainedConfig) else None)
    return caught.value


def config(**changes: Any) -> BitNetConfig:
    return BitNetConfig(**({"hidden_act": "silu", "vocab_size": 64} | SIZES | changes))


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@pytest.mark.parametrize("format", FORMATS)
def test_supported_models_and_configs_pass_the_check(kind: str, format: str) -> None:  # noqa: A002
    """A trained model, a packed one, one on the meta device, and a config alone."""
    model = built(kind, 64)
    check(model, format)
    assert not hasattr(model.config, "quantization_config")
    check(model.config, format, ternary=True)
    pack(model)
    if format == "bitnet-online":
        assert expect_error(model, format, "has no master weights").hint == "--to bitnet keeps its codes"
        return
    check(model, format)
    check(model.to("meta"), format)


@pytest.mark.parametrize("format", TQ)
def test_tq_formats_require_row_lengths_in_multiples_of_256(format: str) -> None:  # noqa: A002
    for model in (built("bitnet", 64, intermediate_size=320), config(intermediate_size=320), built("llama", 64, hidden_size=320)):
        error = expect_error(model, format, "multiple of 256: 320 is not")
        assert str(error.where).startswith("model.layers.0.")
        assert "320)" in str(error.got)
        assert "512" in str(error.hint)
    check(built("bitnet", 64, intermediate_size=320), "bitnet")
    check(built("bitnet", 64, intermediate_size=320), "gguf-f16")


@pytest.mark.parametrize("format", ["bitnet", *TQ])
def test_packed_formats_require_out_features_in_multiples_of_4(format: str) -> None:  # noqa: A002
    error = expect_error(config(hidden_size=256, intermediate_size=510), format, "out_features to be a multiple of 4")
    assert (error.where, "512" in str(error.hint)) == ("model.layers.0.mlp.gate_proj", True)

    with pytest.raises(UserError, match="multiple of 4"):
        check(config(intermediate_size=510), format, ternary=True, keep=["up_proj"])
    check(config(intermediate_size=510), "bitnet", ternary=True, keep=["gate_proj", "up_proj"])
    check(config(intermediate_size=510), "gguf-f16", ternary=True)


def test_check_of_a_config_with_quantization_settings_of_a_recipe() -> None:
    for ternary in (False, None):
        for format in ("bitnet", "bitnet-online", *TQ):  # noqa: A001
            with pytest.raises(UserError, match="no ternary layer"):
                check(config(), format, ternary=ternary)
        check(config(), "gguf-f16", ternary=ternary)
    with pytest.raises(UserError, match="320 is not") as caught:
        check(config(intermediate_size=320), "gguf-tq2_0", ternary=True, keep=["*.layers.0.mlp.down_proj"])
    assert caught.value.where == "model.layers.1.mlp.down_proj"
    check(config(intermediate_size=320), "gguf-tq2_0", ternary=True, keep=["down_proj"])
    with pytest.raises(UserError, match="cannot be trained in ternary") as caught:
        check(config(), "bitnet", ternary=True, keep=["nowhere"])
    assert (caught.value.where, "nowhere" in str(caught.value.got)) == ("quant", True)
    llama = LlamaConfig(**SIZES | {"vocab_size": 64})
    check(llama, "bitnet", ternary=True, rms_norm=True)
    with pytest.raises(UserError, match="no norm inside a linear"):
        check(llama, "gguf-tq2_0", ternary=True, rms_norm=True)


@pytest.mark.parametrize("format", ["bitnet", "bitnet-online"])
def test_bitnet_formats_reject_conv1d_and_experts(format: str) -> None:  # noqa: A002
    """The config alone is enough, so the error comes before training."""
    gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    assert "Conv1D" in str(expect_error(gpt2, format, "bitnet cannot express this model").got)
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_local_experts": 2}
    error = expect_error(MixtralConfig(**sizes), format, "bitnet cannot express this model")
    assert "experts" in str(error.got)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_config_of_a_stored_ternary_model_passes_where_its_layers_allow(tmp_path: Path, norm_eps: float | None) -> None:
    """The config records whether the weights are packed, and which norm its layers have."""
    from transformers import AutoConfig

    model = built("llama", 64, norm_eps=norm_eps)
    model.save_pretrained(tmp_path / "online")
    pack(model)
    model.save_pretrained(tmp_path / "packed")
    for name in ("online", "packed"):
        stored = AutoConfig.from_pretrained(tmp_path / name)
        for ternary in (True, None):
            check(stored, "bitnet", ternary=ternary)
            if norm_eps is None:
                check(stored, "gguf-tq2_0", ternary=ternary)
            else:
                expect_error(stored, "gguf-tq2_0", "no norm inside a linear")
        if name == "packed":
            expect_error(stored, "bitnet-online", "has no master weights")
        else:
            check(stored, "bitnet-online", ternary=True)


@pytest.mark.parametrize("format", GGUF)
def test_gguf_formats_reject_features_that_llama_cpp_graphs_lack(format: str) -> None:  # noqa: A002
    expect_error(config(hidden_act="relu2"), format, "always computes silu")
    expect_error(config(tie_word_embeddings=False), format, "uses the embedding as its head")
    expect_error(built("bitnet", 64, hidden_act="relu2"), format, "computes silu")
    expect_error(built("llama", 64, hidden_act="gelu"), format, "computes silu")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    expect_error(LlamaConfig(**SIZES | {"vocab_size": 64, "rope_parameters": rope}), format, "plain rotary positions")
    expect_error(built("llama", 64, norm_eps=1e-5), format, "no norm inside a linear")
    expect_error(built("llama", 64, attention_bias=True), format, "has no biases")
    check(config(hidden_act="relu2"), "bitnet", ternary=True)
    check(built("llama", 64, norm_eps=1e-5), "bitnet")


def test_unknown_architecture_and_unknown_format_are_errors() -> None:
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"vocab_size": 64}))
    assert expect_error(qwen, "gguf-f16", "cannot be exported as GGUF").where == "Qwen2ForCausalLM"
    assert expect_error(qwen, "gguf-tq2", "unknown export format 'gguf-tq2'").hint == "--to gguf-tq2_0"


@pytest.mark.parametrize("format", ["bitnet", *TQ])
def test_models_without_ternary_layers_and_dequantized_layers_are_errors(format: str) -> None:  # noqa: A002
    model = built("bitnet", 64)
    pack(model)
    to_float(model)
    expect_error(model, format, "no ternary layer")
    check(model, "gguf-f16")
    dequantized = built("bitnet", 64)
    layer = dequantized.model.layers[1].mlp.up_proj
    layer.weight.data = layer.dequantize()
    error = expect_error(dequantized, format, "ternary already")
    assert error.where == "model.layers.1.mlp.up_proj"


def test_nf4_layers_and_models_in_warm_up_are_errors(tmp_path: Path) -> None:
    from quant.linear import set_blend

    model = built("llama", 64)
    set_blend(model, 0.5)
    assert "0.5" in str(expect_error(model, "gguf-tq2_0", "in its warm-up to ternary").got)
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 64}))
    swap(plain, scheme="nf4")
    expect_error(plain, "bitnet", "nf4 layers cannot be exported")


def test_packed_model_loaded_by_plain_transformers_is_an_error(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = built("bitnet", 64)
    pack(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quant.pretrained.load" in str(expect_error(plain, "bitnet", "quantized already").hint)


def test_gguf_rejects_unsupported_tokenizers(tmp_path: Path, words: Any) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    model, rows = built("bitnet", len(words)), [([1, 2, 3], [1, 2, 3])]

    def expect_export_error(tokenizer: Any, message: str, model: Any = model) -> None:
        with pytest.raises(UserError, match=message):
            export(model, tokenizer, tmp_path / "out.gguf", format="gguf-tq2_0", rows=rows)
        assert not list(tmp_path.iterdir())

    expect_export_error(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), "byte-level BPE"
    )
    for change in (
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ):
        changed = copy.deepcopy(words)
        for name, value in change.items():
            setattr(changed.backend_tokenizer, name, value)
        expect_export_error(changed, "byte-level BPE")
    without_eos = copy.deepcopy(words)
    without_eos.eos_token = None
    expect_export_error(without_eos, "no end token")
    expect_export_error(words, "does not match the model", built("bitnet", len(words) - 4))
    # The same check before training, with the config alone; a bitnet folder takes any tokenizer.
    matching_config = config(vocab_size=len(words))
    check(matching_config, "gguf-tq2_0", ternary=True, tokenizer=words)
    check(matching_config, "bitnet", ternary=True, tokenizer=without_eos)
    with pytest.raises(UserError, match="no end token"):
        check(matching_config, "gguf-tq2_0", ternary=True, tokenizer=without_eos)


def test_missing_rows_wrong_suffix_and_full_disk_are_errors(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = built("bitnet", len(words)), [([1, 2, 3], [1, 2, 3])]
    with pytest.raises(UserError, match="no rows"):
        export(model, words, tmp_path / "out.gguf", format="gguf-tq2_0", rows=[([1], [1])])
    with pytest.raises(UserError, match=r"with \.gguf"):
        export(model, words, tmp_path / "out", format="gguf-tq2_0", rows=rows)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": 1, "free": 1})())
    with pytest.raises(UserError, match="not enough disk space"):
        export(model, words, tmp_path / "out", format="bitnet", rows=rows)
    assert not list(tmp_path.iterdir())


def test_scales_and_weights_outside_f16_are_errors(tmp_path: Path, words: Any) -> None:
    rows = [([1, 2, 3], [1, 2, 3])]
    model = built("llama", len(words))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e8)
    with pytest.raises(UserError, match="out of the range of F16"):
        export(model, words, tmp_path / "out.gguf", format="gguf-tq2_0", rows=rows)
    model = built("llama", len(words))
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e6
    with pytest.raises(UserError, match="not finite in F16"):
        export(model, words, tmp_path / "out.gguf", format="gguf-tq2_0", rows=rows)
    assert not list(tmp_path.iterdir())
