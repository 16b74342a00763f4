"""What a target cannot express is said before anything is written: the layer, its shape, what to do."""

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


def refused(model: Any, format: str, message: str) -> UserError:  # noqa: A002
    """A config is of a model whose training will be ternary."""
    with pytest.raises(UserError, match=message) as mistake:
        check(model, format, ternary=True if isinstance(model, PreTrainedConfig) else None)
    return mistake.value


def config(**changes: Any) -> BitNetConfig:
    return BitNetConfig(**({"hidden_act": "silu", "vocab_size": 64} | SIZES | changes))


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_fit(kind: str, format: str) -> None:  # noqa: A002
    """Trained, packed, without weights, and as a config alone."""
    model = built(kind, 64)
    check(model, format)
    assert not hasattr(model.config, "quantization_config")
    check(model.config, format, ternary=True)
    pack(model)
    if format == "bitnet-online":
        assert refused(model, format, "has no master weights").hint == "--to bitnet keeps its codes"
        return
    check(model, format)
    check(model.to("meta"), format)


@pytest.mark.parametrize("format", TQ)
def test_rows_that_make_no_blocks(format: str) -> None:  # noqa: A002
    for model in (built("bitnet", 64, intermediate_size=320), config(intermediate_size=320), built("llama", 64, hidden_size=320)):
        mistake = refused(model, format, "multiple of 256: 320 is not")
        assert str(mistake.where).startswith("model.layers.0.")
        assert "320)" in str(mistake.got)
        assert "512" in str(mistake.hint)
    check(built("bitnet", 64, intermediate_size=320), "bitnet")
    check(built("bitnet", 64, intermediate_size=320), "gguf-f16")


@pytest.mark.parametrize("format", ["bitnet", *TQ])
def test_rows_that_make_no_fours(format: str) -> None:  # noqa: A002
    mistake = refused(config(hidden_size=256, intermediate_size=510), format, "out_features to be a multiple of 4")
    assert (mistake.where, "512" in str(mistake.hint)) == ("model.layers.0.mlp.gate_proj", True)

    with pytest.raises(UserError, match="multiple of 4"):
        check(config(intermediate_size=510), format, ternary=True, keep=["up_proj"])
    check(config(intermediate_size=510), "bitnet", ternary=True, keep=["gate_proj", "up_proj"])
    check(config(intermediate_size=510), "gguf-f16", ternary=True)


def test_what_a_recipe_says_of_a_config() -> None:
    for ternary in (False, None):
        for format in ("bitnet", "bitnet-online", *TQ):  # noqa: A001
            with pytest.raises(UserError, match="no ternary layer"):
                check(config(), format, ternary=ternary)
        check(config(), "gguf-f16", ternary=ternary)
    with pytest.raises(UserError, match="320 is not") as mistake:
        check(config(intermediate_size=320), "gguf-tq2_0", ternary=True, keep=["*.layers.0.mlp.down_proj"])
    assert mistake.value.where == "model.layers.1.mlp.down_proj"
    check(config(intermediate_size=320), "gguf-tq2_0", ternary=True, keep=["down_proj"])
    with pytest.raises(UserError, match="cannot be trained in ternary") as mistake:
        check(config(), "bitnet", ternary=True, keep=["nowhere"])
    assert (mistake.value.where, "nowhere" in str(mistake.value.got)) == ("quant", True)
    llama = LlamaConfig(**SIZES | {"vocab_size": 64})
    check(llama, "bitnet", ternary=True, rms_norm=True)
    with pytest.raises(UserError, match="no norm inside a linear"):
        check(llama, "gguf-tq2_0", ternary=True, rms_norm=True)


@pytest.mark.parametrize("format", ["bitnet", "bitnet-online"])
def test_what_hugging_face_bitnet_has_no_layer_for(format: str) -> None:  # noqa: A002
    """Told by the config alone, before anything is trained."""
    gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    assert "Conv1D" in str(refused(gpt2, format, "bitnet cannot express this model").got)
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_local_experts": 2}
    mixture = refused(MixtralConfig(**sizes), format, "bitnet cannot express this model")
    assert "experts" in str(mixture.got)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_a_config_that_is_ternary_already(tmp_path: Path, norm_eps: float | None) -> None:
    """It knows whether it is packed, and how its layers normalize."""
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
                refused(stored, "gguf-tq2_0", "no norm inside a linear")
        if name == "packed":
            refused(stored, "bitnet-online", "has no master weights")
        else:
            check(stored, "bitnet-online", ternary=True)


@pytest.mark.parametrize("format", GGUF)
def test_what_the_graphs_lack(format: str) -> None:  # noqa: A002
    refused(config(hidden_act="relu2"), format, "always computes silu")
    refused(config(tie_word_embeddings=False), format, "uses the embedding as its head")
    refused(built("bitnet", 64, hidden_act="relu2"), format, "computes silu")
    refused(built("llama", 64, hidden_act="gelu"), format, "computes silu")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    refused(LlamaConfig(**SIZES | {"vocab_size": 64, "rope_parameters": rope}), format, "plain rotary positions")
    refused(built("llama", 64, norm_eps=1e-5), format, "no norm inside a linear")
    refused(built("llama", 64, attention_bias=True), format, "has no biases")
    check(config(hidden_act="relu2"), "bitnet", ternary=True)
    check(built("llama", 64, norm_eps=1e-5), "bitnet")


def test_an_unknown_architecture_and_an_unknown_format() -> None:
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"vocab_size": 64}))
    assert refused(qwen, "gguf-f16", "cannot be exported as GGUF").where == "Qwen2ForCausalLM"
    assert refused(qwen, "gguf-tq2", "unknown export format 'gguf-tq2'").hint == "--to gguf-tq2_0"


@pytest.mark.parametrize("format", ["bitnet", *TQ])
def test_nothing_ternary_or_ternary_already(format: str) -> None:  # noqa: A002
    model = built("bitnet", 64)
    pack(model)
    to_float(model)
    refused(model, format, "no ternary layer")
    check(model, "gguf-f16")
    swapped = built("bitnet", 64)
    layer = swapped.model.layers[1].mlp.up_proj
    layer.weight.data = layer.dequantize()
    mistake = refused(swapped, format, "ternary already")
    assert mistake.where == "model.layers.1.mlp.up_proj"


def test_another_scheme_and_half_way(tmp_path: Path) -> None:
    from quant.linear import set_blend

    model = built("llama", 64)
    set_blend(model, 0.5)
    assert "0.5" in str(refused(model, "gguf-tq2_0", "in its warm-up to ternary").got)
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 64}))
    swap(plain, scheme="nf4")
    refused(plain, "bitnet", "nf4 layers cannot be exported")


def test_loaded_by_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = built("bitnet", 64)
    pack(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quant.pretrained.load" in str(refused(plain, "bitnet", "quantized already").hint)


def test_tokenizers_that_a_gguf_cannot_carry(tmp_path: Path, words: Any) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    model, rows = built("bitnet", len(words)), [([1, 2, 3], [1, 2, 3])]

    def refuse(tokenizer: Any, message: str, model: Any = model) -> None:
        with pytest.raises(UserError, match=message):
            export(model, tokenizer, tmp_path / "out.gguf", format="gguf-tq2_0", rows=rows)
        assert not list(tmp_path.iterdir())

    refuse(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), "byte-level BPE")
    for change in (
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ):
        other = copy.deepcopy(words)
        for name, value in change.items():
            setattr(other.backend_tokenizer, name, value)
        refuse(other, "byte-level BPE")
    endless = copy.deepcopy(words)
    endless.eos_token = None
    refuse(endless, "no end token")
    refuse(words, "does not match the model", built("bitnet", len(words) - 4))
    # Before training, with the config alone; a folder keeps any tokenizer.
    fits = config(vocab_size=len(words))
    check(fits, "gguf-tq2_0", ternary=True, tokenizer=words)
    check(fits, "bitnet", ternary=True, tokenizer=endless)
    with pytest.raises(UserError, match="no end token"):
        check(fits, "gguf-tq2_0", ternary=True, tokenizer=endless)


def test_no_rows_a_wrong_name_and_no_space(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = built("bitnet", len(words)), [([1, 2, 3], [1, 2, 3])]
    with pytest.raises(UserError, match="no rows"):
        export(model, words, tmp_path / "out.gguf", format="gguf-tq2_0", rows=[([1], [1])])
    with pytest.raises(UserError, match=r"with \.gguf"):
        export(model, words, tmp_path / "out", format="gguf-tq2_0", rows=rows)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": 1, "free": 1})())
    with pytest.raises(UserError, match="not enough disk space"):
        export(model, words, tmp_path / "out", format="bitnet", rows=rows)
    assert not list(tmp_path.iterdir())


def test_a_scale_or_a_weight_outside_f16(tmp_path: Path, words: Any) -> None:
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
