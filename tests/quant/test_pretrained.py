"""Packed models in transformers: loading packs as `swap` does; saved checkpoints are in the formats of other programs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    core_model_loading,
)

from quant import (
    BitLinear,
    NF4Linear,
    PackedBitLinear,
    PackedLinear,
    assert_wrapped,
    pack,
    prove_used,
    register_peft,
    swap,
    ternary,
    to_float,
)
from quant.pretrained import PackedNF4Config, PackedTernaryConfig, PackingError, attach_quantizer, load, packed_config
from quant.swap import DEFAULT_KEEP

IDS = torch.arange(24).view(2, 12)
BF16 = torch.bfloat16
LAYER = "model.layers.0.mlp.up_proj"


def save_with_random_weights(model: Any, folder: Path, dtype: torch.dtype = BF16) -> Path:
    """Give `model` random weights in `dtype`, save it and return the folder."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def llama(folder: Path, dtype: torch.dtype = BF16, **changes: Any) -> Path:
    config = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "eos_token_id": 2,
    }  # fmt: skip
    return save_with_random_weights(LlamaForCausalLM(LlamaConfig(**(config | changes))), folder, dtype)


def gpt2(folder: Path) -> Path:
    return save_with_random_weights(
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)), folder
    )


def mamba(folder: Path) -> Path:
    config = MambaConfig(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2, time_step_rank=4, expand=1)
    return save_with_random_weights(MambaForCausalLM(config), folder)


MOE_CONFIG = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral(folder: Path) -> Path:
    return save_with_random_weights(MixtralForCausalLM(MixtralConfig(**MOE_CONFIG)), folder)


def gpt_oss(folder: Path) -> Path:
    """The experts are transposed and have biases."""
    return save_with_random_weights(GptOssForCausalLM(GptOssConfig(**MOE_CONFIG, head_dim=16)), folder)


SCHEMES = {
    "nf4-double": (PackedNF4Config(), {"scheme": "nf4", "double": True}),
    "nf4": (PackedNF4Config(double=False), {"scheme": "nf4", "double": False}),
    "ternary": (PackedTernaryConfig(), {"scheme": "ternary"}),
}
each_scheme = pytest.mark.parametrize("scheme", list(SCHEMES))


def packed_model(folder: Path, scheme: str = "nf4-double", *, dtype: torch.dtype = BF16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=SCHEMES[scheme][0], dtype=dtype, **options)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------------------------- packing


@each_scheme
@pytest.mark.parametrize("make", [llama, gpt2, mamba, mixtral, gpt_oss])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_from_pretrained_packs_the_same_layers_as_swap(
    tmp_path: Path, make: Callable[[Path], Path], scheme: str, dtype: torch.dtype
) -> None:
    folder = make(tmp_path)
    ours = packed_model(folder, scheme, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    report = swap(theirs, **SCHEMES[scheme][1])
    assert_same(ours, theirs)
    assert ours.hf_quantizer.report == report
    assert len(report.swapped) >= 2
    with prove_used(ours, ours.hf_quantizer.report):
        assert torch.equal(logits(ours), logits(theirs))


def test_keep_patterns_leave_float_layers_and_must_match(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    config = PackedNF4Config(keep=(*DEFAULT_KEEP, "down_proj"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=BF16)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.hf_quantizer.report.left["model.layers.1.mlp.down_proj"] == "kept by pattern"
    assert config.stored is None  # the caller's config is not modified
    config = PackedNF4Config(keep=("dwn_proj",))
    with pytest.raises(ValueError, match="'dwn_proj' matches no module"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_packing_holds_one_float_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    max_alive = 0
    original = core_model_loading._materialize_copy

    def counting_copy(*arguments: Any) -> Tensor:
        nonlocal max_alive
        tensor = original(*arguments)
        if tensor.dim() == 2 and tensor.shape[0] != 64:  # the embedding stays in float
            alive.append(weakref.ref(tensor))
        max_alive = max(max_alive, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counting_copy)
    packed_model(llama(tmp_path, num_hidden_layers=6, intermediate_size=128))
    assert len(alive) >= 12
    assert max_alive == 1


def test_nan_weights_are_refused_with_layer_and_count(tmp_path: Path) -> None:
    def set_nan(tensors: dict[str, Tensor]) -> None:
        tensors[LAYER + ".weight"][3, 5] = torch.nan

    with pytest.raises(ValueError, match=rf"{LAYER}: 1 of 6400 weights are not finite"):
        packed_model(edit(llama(tmp_path), set_nan))


def test_weight_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[LAYER + ".weight"] = tensors[LAYER + ".weight"][:60].clone()

    with pytest.raises(ValueError, match=rf"{LAYER}: it has shape \(60, 64\) in the checkpoint, \(100, 64\) in the model"):
        packed_model(edit(llama(tmp_path), cut))


def test_missing_weight_is_refused(tmp_path: Path) -> None:
    folder = edit(llama(tmp_path), drop(LAYER + ".weight"))
    with pytest.raises(ValueError, match=rf"{LAYER}: the checkpoint has no weight for it"):
        packed_model(folder)


def test_missing_experts_are_refused(tmp_path: Path) -> None:
    experts = "model.layers.1.mlp.experts"
    folder = mixtral(tmp_path)
    names = [name for name in load_file(folder / "model.safetensors") if ".layers.1." in name and name.endswith("w2.weight")]
    assert len(names) == 4
    with pytest.raises(ValueError, match=rf"{experts}: the checkpoint has no down_proj for it"):
        packed_model(edit(folder, drop(*names)))


def test_saving_quantized_experts_is_refused(tmp_path: Path) -> None:
    model = packed_model(mixtral(tmp_path / "float"))
    with pytest.raises(ValueError, match="quantized experts"):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed/config.json").exists()


def test_t5_with_wo_kept_in_fp32_packs_the_same_layers_as_swap(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    folder = save_with_random_weights(T5ForConditionalGeneration(config), tmp_path)
    ours: Any = T5ForConditionalGeneration.from_pretrained(folder, quantization_config=PackedNF4Config(), dtype=BF16)
    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=BF16)
    report = swap(theirs)
    assert_same(ours, theirs)
    assert ours.hf_quantizer.report == report
    with prove_used(ours, report), torch.no_grad():
        assert bool(ours(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all())


@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
def test_saving_and_loading_ignore_the_default_dtype(tmp_path: Path, default: torch.dtype) -> None:
    packed = packed_model(llama(tmp_path / "float"))
    packed.save_pretrained(tmp_path / "plain")
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        packed.save_pretrained(tmp_path / "other")
        reloaded = load(tmp_path / "plain")
    finally:
        torch.set_default_dtype(before)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert_same(reloaded, packed)


def test_device_map_works_and_disk_offload_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    expected = packed_model(folder)
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        assert_same(packed_model(folder, device_map=device_map).cpu(), expected)
    with pytest.raises(ValueError, match="disk"):
        packed_model(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_casts_and_deepcopy_leave_packed_parts_unchanged(tmp_path: Path) -> None:
    model = packed_model(llama(tmp_path), dtype=torch.float32)
    before = {f"{path}.{n}": p.clone() for path, m in model.named_modules() if isinstance(m, PackedLinear) for n, p in
              zip(m.names, m.parts, strict=True)}  # fmt: skip
    assert_same(copy.deepcopy(model), model)
    cast = copy.deepcopy(model).to(BF16)
    assert cast.dtype == cast.model.layers[0].mlp.up_proj.dtype == BF16
    for name, part in before.items():
        assert torch.equal(cast.state_dict()[name], part)


@each_scheme
def test_lora_adapters_train_on_packed_models(tmp_path: Path, scheme: str) -> None:
    from peft import LoraConfig, get_peft_model

    if scheme == "ternary":
        pytest.importorskip("quant.plugins")
    model = packed_model(llama(tmp_path), scheme)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])
    register_peft(config)
    wrapped: Any = get_peft_model(model, config)
    assert_wrapped(wrapped, [p for p in model.hf_quantizer.report.swapped if p.endswith(("q_proj", "up_proj"))])
    wrapped(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
    with pytest.raises(ValueError, match="has an adapter"):
        model.hf_quantizer.refresh(model)


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def save_with_bitsandbytes(folder: Path, out: Path, *, quant_type: str = "nf4", double: bool = True, **options: Any) -> Path:
    """Quantize the float checkpoint in `folder` with transformers and bitsandbytes, and save it to `out`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=BF16,
        **options,
    )
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=BF16).save_pretrained(out)
    return out


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_nf4_checkpoint_equals_that_of_bitsandbytes(tmp_path: Path, make: Callable[[Path], Path], double: bool) -> None:
    folder = make(tmp_path / "float")
    packed = packed_model(folder, "nf4-double" if double else "nf4")
    packed.save_pretrained(tmp_path / "ours")
    save_with_bitsandbytes(folder, tmp_path / "theirs", double=double, llm_int8_skip_modules=["lm_head"])
    ours, theirs = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    a, b = ((tmp_path / side / "config.json").read_text() for side in ("ours", "theirs"))
    assert json.loads(a) == json.loads(b)
    assert_same(load(tmp_path / "theirs"), packed)


def test_loads_bitsandbytes_checkpoints_with_and_without_a_packed_head(tmp_path: Path) -> None:
    """By default bitsandbytes skips the head and tied weights; with an empty list of skipped modules it packs the head too."""
    folder = llama(tmp_path / "float", tie_word_embeddings=False)
    default = load(save_with_bitsandbytes(folder, tmp_path / "plain"), dtype=BF16)
    assert_same(default, packed_model(folder))
    packed_head: Any = load(save_with_bitsandbytes(folder, tmp_path / "all", llm_int8_skip_modules=[]), dtype=BF16)
    assert isinstance(packed_head.lm_head, NF4Linear)
    assert "lm_head" in packed_head.hf_quantizer.report.swapped
    packed_head.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), packed_head)


def test_loads_codes_stored_as_bf16(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage=bfloat16, as in FSDP recipes: the same bytes in another dtype."""
    folder = llama(tmp_path / "float", intermediate_size=128)
    stored = save_with_bitsandbytes(folder, tmp_path / "bnb", bnb_4bit_quant_storage=BF16)
    assert load_file(stored / "model.safetensors")[LAYER + ".weight"].dtype == BF16
    assert_same(load(stored, dtype=BF16), packed_model(folder))


@pytest.mark.parametrize("quant_type", ["fp4", "int8"])
def test_bitsandbytes_fp4_and_int8_are_refused(tmp_path: Path, quant_type: str) -> None:
    folder = llama(tmp_path / "float")
    if quant_type == "fp4":
        stored = save_with_bitsandbytes(folder, tmp_path / "bnb", quant_type="fp4")
        with pytest.raises(ValueError, match="bitsandbytes fp4; only nf4"):
            load(stored)
        edit_config(stored, bnb_4bit_quant_type="nf4")  # also when config.json calls it nf4
        with pytest.raises(ValueError, match=r"down_proj: it is stored in fp4"):
            load(stored)
    else:
        packed_model(folder).save_pretrained(tmp_path / "nf4")
        with pytest.raises(ValueError, match="bitsandbytes int8; only nf4"):
            load(edit_config(tmp_path / "nf4", load_in_4bit=False, load_in_8bit=True))


@pytest.mark.parametrize(("key", "value"), [("blocksize", 128), ("shape", [64, 100]), ("nested_blocksize", 128)])
def test_unsupported_quant_states_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    packed_model(llama(tmp_path / "float")).save_pretrained(tmp_path / "nf4")

    def change(tensors: dict[str, Tensor]) -> None:
        name = LAYER + ".weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | {key: value}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    with pytest.raises(ValueError, match=rf"{LAYER}: its {key} is "):
        load(edit(tmp_path / "nf4", change))


def test_other_nf4_levels_are_refused(tmp_path: Path) -> None:
    packed_model(llama(tmp_path / "float")).save_pretrained(tmp_path / "nf4")

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[LAYER + ".weight.quant_map"].mul_(0.99)

    with pytest.raises(ValueError, match="quant_map has other levels"):
        load(edit(tmp_path / "nf4", shrink))


def test_float_and_otherwise_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    with pytest.raises(ValueError, match="not quantized"):
        load(folder)
    packed = packed_model(folder)
    packed.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match="is quantized with BitsAndBytesConfig"):  # packing twice; the message is transformers'
        packed_model(tmp_path / "nf4")
    config = copy.deepcopy(packed.config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized as 'gptq'"):
        packed_config(config)
    config.quantization_config = {"bits": 4}
    with pytest.raises(PackingError, match="no quant_method"):
        packed_config(config)
    config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(PackingError, match="bitsandbytes int8"):
        packed_config(config)


def test_loads_bitsandbytes_config_without_quant_method(tmp_path: Path) -> None:
    packed = packed_model(llama(tmp_path / "float"))
    packed.save_pretrained(tmp_path / "nf4")
    file = tmp_path / "nf4/config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["quant_method"]
    file.write_text(json.dumps(config))
    assert_same(load(tmp_path / "nf4"), packed)


# -------------------------------------------------------------------------------------------------------------- bitnet


def test_scale_divides_in_bitlinear_and_multiplies_in_autobitlinear(tmp_path: Path) -> None:
    """One stores 1 / mean|W| for the same layer, the other mean|W|; a wrong scale would load without an error."""
    packed = packed_model(llama(tmp_path / "float"), "ternary")
    packed.save_pretrained(tmp_path / "ternary")
    layer = packed.get_submodule(LAYER)
    stored = load_file(tmp_path / "ternary/model.safetensors")
    absmean = 1 / layer.packed.scale
    assert torch.equal(stored[LAYER + ".weight_scale"], layer.packed.scale.view(1))
    assert 0.1 < absmean < 0.2  # weights of standard deviation 0.2

    def invert(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = 1 / tensors[name]

    edit_config(edit(tmp_path / "ternary", invert), linear_class="autobitlinear")
    reloaded: Any = load(tmp_path / "ternary")
    torch.testing.assert_close(reloaded.get_submodule(LAYER).packed.scale, layer.packed.scale, rtol=2e-7, atol=0)
    torch.testing.assert_close(logits(reloaded), logits(packed), rtol=0, atol=2e-2)

    def unpack(tensors: dict[str, Tensor]) -> None:  # as transformers saves what it loaded as autobitlinear
        for name in [name for name in tensors if tensors[name].dtype == torch.uint8]:
            tensors[name] = ternary.unpack(tensors[name]).to(BF16)

    assert_same(load(edit(tmp_path / "ternary", unpack)), reloaded)


def test_loads_checkpoint_in_the_layout_of_bitnet_b1_58_2b_4t(tmp_path: Path) -> None:
    """BitNetForCausalLM with sub-norms: packed, offline `autobitlinear`, scales in bf16."""
    config = BitNetConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)  # fmt: skip
    folder = save_with_random_weights(BitNetForCausalLM(config), tmp_path)
    expected = packed_model(folder, "ternary")

    def replace_with_packed(tensors: dict[str, Tensor]) -> None:
        for path in expected.hf_quantizer.report.swapped:
            packed = expected.get_submodule(path).packed
            tensors[f"{path}.weight"] = packed.codes.data
            tensors[f"{path}.weight_scale"] = (1 / packed.scale).to(BF16).view(1)

    edit(folder, replace_with_packed)
    file = folder / "config.json"
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    model: Any = load(folder, dtype=BF16)
    assert len(model.hf_quantizer.report.swapped) == 14
    for path in model.hf_quantizer.report.swapped:
        ours, reference = model.get_submodule(path).packed, expected.get_submodule(path).packed
        assert torch.equal(ours.codes, reference.codes)
        torch.testing.assert_close(1 / ours.scale, (1 / reference.scale).to(BF16).float(), rtol=1.2e-7, atol=0)
    assert logits(model).isfinite().all()


def test_online_checkpoint_is_trainable(tmp_path: Path) -> None:
    folder = llama(tmp_path / "float", torch.float32)
    expected: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    swap(expected, scheme="ternary", trainable=True)
    attach_quantizer(expected).save_pretrained(tmp_path / "online")
    config = json.loads((tmp_path / "online/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["linear_class"], config["quantization_mode"]) == ("bitnet", "autobitlinear", "online")
    model: Any = load(tmp_path / "online")
    assert_same(model, expected)
    assert type(model.get_submodule(LAYER)) is BitLinear
    assert model.hf_quantizer.report.trainable
    assert torch.equal(logits(model), logits(expected))
    model(IDS, labels=IDS).loss.backward()
    assert model.get_submodule(LAYER).weight.grad.abs().sum() > 0


def test_bitnet_refuses_conv1d_and_missing_rms_norms(tmp_path: Path) -> None:
    packed = packed_model(gpt2(tmp_path / "gpt2"), "ternary")
    with pytest.raises(ValueError, match="Conv1D"):
        packed.save_pretrained(tmp_path / "out")
    folder = llama(tmp_path / "float")
    packed_model(folder, "ternary").save_pretrained(tmp_path / "ternary")
    with pytest.raises(ValueError, match=r"q_proj: the checkpoint has no rms_norm\.weight for it"):
        load(edit_config(tmp_path / "ternary", use_rms_norm=True))


def llama_with_rms_norms(folder: Path, *, trainable: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A ternary Llama with an RMS norm of random weights inside each ternary layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    swap(model, scheme="ternary", trainable=True, norm_eps=1e-3)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "rms_norm" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    if not trainable:
        pack(model)
    return attach_quantizer(model)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("trainable", [True, False])
def test_rms_norms_inside_layers_round_trip(tmp_path: Path, trainable: bool, dtype: torch.dtype) -> None:
    model = llama_with_rms_norms(llama(tmp_path / "float", dtype), trainable=trainable, dtype=dtype)
    model.save_pretrained(tmp_path / "once")
    stored = json.loads((tmp_path / "once/config.json").read_text())["quantization_config"]
    assert (stored["use_rms_norm"], stored["rms_norm_eps"]) == (True, 1e-3)
    loaded: Any = load(tmp_path / "once")
    assert_same(loaded, model)
    assert loaded.get_submodule(LAYER).rms_norm.eps == 1e-3
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
    if trainable:
        loaded(IDS, labels=IDS).loss.backward()
        assert loaded.get_submodule(LAYER).rms_norm.weight.grad.abs().sum() > 0
    name = f"{LAYER}.rms_norm.weight"
    with pytest.raises(ValueError, match=rf"{LAYER}: the checkpoint has no rms_norm\.weight for it"):
        load(edit(tmp_path / "once", drop(name)))
    for norm in (None, nn.RMSNorm(64, eps=1e-5)):
        model.get_submodule(LAYER).rms_norm = norm
        with pytest.raises(ValueError, match="one setting for all"):
            model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("norm", [False, True])
def test_online_checkpoint_packed_after_loading_is_saved_as_offline(tmp_path: Path, norm: bool) -> None:
    folder = llama(tmp_path / "float", torch.float32)
    if norm:
        online = llama_with_rms_norms(folder, trainable=True)
    else:
        online = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        swap(online, scheme="ternary", trainable=True)
        attach_quantizer(online)
    online.save_pretrained(tmp_path / "online")
    model: Any = load(tmp_path / "online")
    pack(model)
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert (stored["linear_class"], stored["quantization_mode"], stored["use_rms_norm"]) == ("bitlinear", "offline", norm)
    reloaded = load(tmp_path / "packed")
    assert {type(m) for m in reloaded.modules() if hasattr(m, "quantized")} == {PackedBitLinear}
    assert torch.equal(logits(reloaded), logits(online))


# ---------------------------------------------------------------------------------------------------- saving and loading


@each_scheme
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_save_and_load_round_trip_is_byte_identical(tmp_path: Path, scheme: str, tied: bool, dtype: torch.dtype) -> None:
    packed = packed_model(llama(tmp_path / "float", tie_word_embeddings=tied), scheme, dtype=dtype)
    packed.save_pretrained(tmp_path / "once", max_shard_size="20KB")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "once")
    assert_same(loaded, packed)
    assert loaded.hf_quantizer.report.swapped == packed.hf_quantizer.report.swapped
    assert torch.equal(logits(loaded), logits(packed))
    loaded.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    names = [path.name for path in (tmp_path / "once").iterdir()]
    assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@each_scheme
def test_cast_while_loading_leaves_packed_parts_unchanged(tmp_path: Path, scheme: str) -> None:
    packed = packed_model(llama(tmp_path / "float"), scheme, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    model: Any = load(tmp_path / "packed", dtype=BF16)
    assert model.model.norm.weight.dtype == model.get_submodule(LAYER).dtype == BF16
    for name, part in packed.state_dict().items():
        assert torch.equal(model.state_dict()[name], part if part.dtype == torch.uint8 else part.to(BF16))


@each_scheme
def test_swapped_model_saves_the_same_bytes_as_a_loaded_one(tmp_path: Path, scheme: str) -> None:
    folder = llama(tmp_path / "float")
    packed_model(folder, scheme).save_pretrained(tmp_path / "loaded")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    swap(model, **SCHEMES[scheme][1])
    attach_quantizer(model).save_pretrained(tmp_path / "swapped")
    for path in (tmp_path / "loaded").iterdir():
        assert path.read_bytes() == (tmp_path / "swapped" / path.name).read_bytes()


def test_attach_quantizer_refuses_missing_or_mixed_packed_layers(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama(tmp_path), dtype=BF16)
    with pytest.raises(ValueError, match="no quantized layers"):
        attach_quantizer(model)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = NF4Linear.from_linear(mlp.up_proj)
    mlp.down_proj = PackedBitLinear.from_linear(mlp.down_proj)
    with pytest.raises(ValueError, match="one format of quantized layers"):
        attach_quantizer(model)
    mlp.down_proj = NF4Linear.from_linear(mlp.gate_proj, double=False)
    with pytest.raises(ValueError, match="one setting for all"):
        attach_quantizer(model)


def test_saving_dequantized_layers_is_refused_until_to_float(tmp_path: Path) -> None:
    """Its config would call float weights packed; `to_float` removes the quantizer and makes it a float model."""
    model = packed_model(llama(tmp_path / "float"))
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(path, module.to_linear())
    with pytest.raises(ValueError, match=r"quant\.to_float"):
        model.save_pretrained(tmp_path / "out")
    mlp = model.model.layers[0].mlp
    floats, mlp.up_proj = mlp.up_proj, PackedBitLinear(64, 100)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj has another format .* call attach_quantizer"):
        model.save_pretrained(tmp_path / "out")
    mlp.up_proj = floats
    to_float(model)
    model.save_pretrained(tmp_path / "out")
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16).requires_grad_(False), model.requires_grad_(False)
    )


COMPANIONS = [
    ("nf4-double", "weight.absmax"),
    ("nf4-double", "weight.nested_absmax"),
    ("nf4-double", "weight.quant_state.bitsandbytes__nf4"),
    ("nf4-double", "weight.quant_map"),
    ("nf4-double", "weight"),
    ("nf4", "weight.absmax"),
    ("ternary", "weight_scale"),
    ("ternary", "weight"),
]


@pytest.mark.parametrize(("scheme", "companion"), COMPANIONS)
def test_missing_companion_tensor_is_refused(tmp_path: Path, scheme: str, companion: str) -> None:
    packed_model(llama(tmp_path / "float"), scheme).save_pretrained(tmp_path / "packed")
    edit(tmp_path / "packed", drop(f"{LAYER}.{companion}"))
    with pytest.raises(ValueError, match=rf"{LAYER}: the checkpoint has no {companion} for it"):
        load(tmp_path / "packed")


@pytest.mark.parametrize(("scheme", "companion"), [case for case in COMPANIONS if case[1] in ("weight", "weight.absmax")])
def test_truncated_companion_tensor_is_refused(tmp_path: Path, scheme: str, companion: str) -> None:
    packed_model(llama(tmp_path / "float"), scheme).save_pretrained(tmp_path / "packed")

    def cut(tensors: dict[str, Tensor]) -> None:
        name = f"{LAYER}.{companion}"
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ValueError, match=rf"{LAYER}: its {companion.rpartition('.')[2]} has shape .* truncated"):
        load(edit(tmp_path / "packed", cut))


def test_missing_float_tensor_and_missing_layer_are_refused(tmp_path: Path) -> None:
    packed_model(llama(tmp_path / "float")).save_pretrained(tmp_path / "packed")
    edit(tmp_path / "packed", drop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 tensors are missing in the checkpoint and would stay random: model\.norm\.weight"):
        load(tmp_path / "packed")

    names = [name for name in load_file(tmp_path / "packed/model.safetensors") if name.startswith(LAYER)]
    with pytest.raises(ValueError, match=rf"{LAYER}: the checkpoint has no weight, absmax, nested_absmax, offset for it"):
        load(edit(tmp_path / "packed", drop(*names)))


def test_packed_layer_that_the_config_skips_is_refused(tmp_path: Path) -> None:
    packed_model(llama(tmp_path / "float")).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=rf"{LAYER}: it is packed in the checkpoint"):
        load(edit_config(tmp_path / "packed", llm_int8_skip_modules=["lm_head", "up_proj"]))


PLAIN_TRANSFORMERS_SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, out = torch.arange(24).view(2, 12), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()  # bitsandbytes rounds to bf16 in eval
    kinds = {type(module).__name__ for module in model.modules()}
    with torch.no_grad():
        out[folder + ":" + "+".join(sorted(kinds & {"Linear4bit", "BitLinear", "AutoBitLinear"}))] = model(ids).logits
    if "Linear4bit" in kinds:
        import bitsandbytes.functional as F
        weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
        out[folder + ":weight"] = F.dequantize_4bit(weight.data, weight.quant_state)
assert "quant" not in sys.modules
save_file(out, sys.argv[1])
"""


def test_plain_transformers_loads_saved_checkpoints(tmp_path: Path) -> None:
    """A process without `quant` gets the same layers, weights and logits."""
    models: dict[str, Any] = {}
    for scheme in SCHEMES:
        folder = llama(tmp_path / "float", torch.float32, intermediate_size=128)  # multiple of 32 for bitsandbytes
        models[scheme] = packed_model(folder, scheme, dtype=torch.float32)
        models[scheme].save_pretrained(tmp_path / scheme)
    online: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    swap(online, scheme="ternary", trainable=True)
    models["online"] = attach_quantizer(online)
    models["online"].save_pretrained(tmp_path / "online")
    for name, trainable in (("ternary-norm", False), ("online-norm", True)):
        models[name] = llama_with_rms_norms(folder, trainable=trainable)
        models[name].save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", PLAIN_TRANSFORMERS_SCRIPT, "out.safetensors", *models]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # its BitLinear needs a C++ compiler otherwise
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = load_file(tmp_path / "out.safetensors")
    layer_types = {"nf4-double": "Linear4bit", "nf4": "Linear4bit", "ternary": "BitLinear", "online": "AutoBitLinear"}
    layer_types |= {"ternary-norm": "BitLinear", "online-norm": "AutoBitLinear"}
    for name, model in models.items():
        torch.testing.assert_close(theirs[f"{name}:{layer_types[name]}"], logits(model), rtol=1e-4, atol=1e-4)
        if f"{name}:weight" in theirs:
            assert torch.equal(theirs[f"{name}:weight"], model.get_submodule(LAYER).dequantize())


# -------------------------------------------------------------------------------------------------------------- memory

MEASURE_SCRIPT = """
import json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from quant.pretrained import PackedNF4Config, load

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024

peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.02)

before, start = anonymous(), time.monotonic()
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[1] == "pack":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=PackedNF4Config(), dtype=torch.bfloat16)
else:
    model = load(sys.argv[3])
stop.set()
thread.join()
figures = {"before": before, "peak": peak, "after": anonymous(), "seconds": time.monotonic() - start}
figures |= {"packed": model.get_memory_footprint(), "report": str(model.hf_quantizer.report)}
if sys.argv[1] == "pack":
    model.save_pretrained(sys.argv[3], max_shard_size="1GB")
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_packing_a_7b_needs_little_more_memory_than_the_packed_model(tmp_path: Path) -> None:
    """13 GB of bf16 in shards of 1.6 GB: peak anonymous memory is under 6 GB while packing, and under 5 GB while loading the
    packed model (3.9 GB packed, 0.3 GB for the libraries; less where codes stay in the mapped file)."""
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("needs 20 GB of disk")
    folders = [str(tmp_path / name) for name in ("float", "packed")]
    try:
        write_7b(tmp_path / "float")
        for step, limit in (("pack", 6e9), ("load", 5e9)):
            command = [sys.executable, "-c", MEASURE_SCRIPT, step, *folders]
            run = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            assert run.returncode == 0, run.stderr[-2000:]
            figures = json.loads(run.stdout.splitlines()[-1])
            print(step, figures)
            assert 3.4e9 < figures["packed"] < 4e9
            assert figures["peak"] < limit
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def write_7b(folder: Path) -> None:
    """A Llama of 6.7 B parameters: all layers have the random weights of the first; four layers per file."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], BF16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    first, index = "model.layers.0.", {}
    layer = {n.removeprefix(first): torch.randn(s, dtype=BF16).mul_(0.02) for n, s in shapes.items() if n.startswith(first)}
    rest = [name for name in shapes if not name.startswith("model.layers.")]
    parts: list[dict[str, Tensor]] = [{name: torch.randn(shapes[name], dtype=BF16).mul_(0.02) for name in rest}]
    for start in range(0, 32, 4):
        parts.append(
            {f"model.layers.{i}.{name}": tensor.clone() for i in range(start, start + 4) for name, tensor in layer.items()}
        )
        file = f"model-{len(parts):05d}.safetensors"
        save_file(parts[-1], folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(parts[-1], file)
        parts[-1] = {}
    save_file(parts[0], folder / "model-00001.safetensors", metadata={"format": "pt"})
    index |= dict.fromkeys(parts[0], "model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("scheme", ["nf4", "ternary"])
def test_save_pretrained_of_a_swapped_model_writes_the_standard_format(tmp_path: Path, scheme: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "float"), dtype=BF16)
    swap(model, scheme=scheme)
    model.save_pretrained(tmp_path / "out")
    assert_same(load(tmp_path / "out"), model)
    trained: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=BF16)
    swap(trained, scheme=scheme, trainable=True)
    if scheme == "nf4":  # no format has master weights; saved as floats they would be another model
        with pytest.raises(PackingError, match=r"quant\.pack\(model\) first"):
            trained.save_pretrained(tmp_path / "trained")
        assert not list((tmp_path / "trained").glob("*.safetensors"))
    else:
        trained.save_pretrained(tmp_path / "trained")
        assert isinstance(load(tmp_path / "trained").model.layers[0].mlp.up_proj, BitLinear)
    pack(trained)
    trained.save_pretrained(tmp_path / "packed")
    assert_same(load(tmp_path / "packed"), trained)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_merged_model_is_saved_as_float_after_to_float(tmp_path: Path, architecture: str) -> None:
    """Plain transformers loads the merged weights, with fused experts and transposed Conv1D."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64}
    if architecture == "gpt2":
        float_model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **sizes))
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        float_model = MixtralForCausalLM(
            MixtralConfig(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
        )
    float_model.save_pretrained(tmp_path / "float")
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.float32, quantization_config=PackedNF4Config()
    )
    target = "c_attn" if architecture == "gpt2" else "q_proj"
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    register_peft(config)
    merged: Any = get_peft_model(model, config).merge_and_unload()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = merged.eval()(input_ids=ids).logits
    with pytest.raises(ValueError, match=r"quant\.to_float"):
        merged.save_pretrained(tmp_path / "out")
    to_float(merged)
    merged.save_pretrained(tmp_path / "out")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_missing_folder_and_truncated_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder not found"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="folder not found"):
        load("./nothing")
    model = packed_model(llama(tmp_path / "float"))
    model.save_pretrained(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PackingError, match="damaged or truncated"):
        load(tmp_path / "out")
