"""PEFT over packed layers: LoRA, rsLoRA and DoRA attach, train, save, load, merge and unmerge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant import PackedLinear, assert_wrapped, linear_targets, load_peft, pack, prove_used, register_peft, swap, ternary

IDS = torch.arange(12).view(2, 6)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
}


class Int8Input(nn.Linear):
    """A float linear that quantizes its input as a ternary layer does, with straight-through gradients."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = ternary.quantize_activations(x)
        return super().forward(x + (ternary.dequantize_activations(codes, scales, dtype=x.dtype) - x).detach())


def _base(dtype: torch.dtype = torch.float32, scheme: str = "nf4", *, packed: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, attention_bias=True, **shape))
    model = nn.Module.to(model, dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a missing bias
            parameter.data.normal_(std=0.5)
    if packed:
        swap(model, scheme=scheme)
    return model


def _adapted(model: nn.Module, *, noise: float = 0.05, **changes: Any) -> Any:
    """`model` with PEFT adapters whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    if "target_modules" not in changes:
        changes["target_modules"] = linear_targets(model)
    config = LoraConfig(r=4, lora_alpha=8, **changes)
    register_peft(config)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += noise * torch.randn_like(parameter)
    return adapted


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits = model.eval()(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def test_register_peft_makes_peft_wrap_packed_layers() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="NF4Linear"):
        get_peft_model(_base(), config)
    register_peft(config)
    adapted = get_peft_model(_base(), config)
    assert type(adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")).__name__ == "PackedLora"


@pytest.mark.parametrize("scheme", ["nf4", "ternary"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_changes_only_the_adapters(variant: str, dropout: float, scheme: str) -> None:
    adapted = _adapted(_base(scheme=scheme), lora_dropout=dropout, **VARIANTS[variant]).train()
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    before = _snapshot(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable


@pytest.mark.parametrize("scheme", ["nf4", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [*VARIANTS, "dora with dropout"])
def test_loss_and_gradients_equal_peft_on_dequantized_weights(variant: str, dtype: torch.dtype, scheme: str) -> None:
    """The reference is PEFT's own layers over float linears with the dequantized weights."""
    if scheme == "ternary" and variant == "dora with dropout":
        pytest.skip("PEFT multiplies the input after dropout with the weight itself, without quantization")
    packed, floats = _base(dtype, scheme), _base(dtype, scheme)
    for name, module in list(floats.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, leaf = name.rpartition(".")
            linear = module.to_linear()
            if scheme == "ternary":
                linear.__class__ = Int8Input
            setattr(floats.get_submodule(parent), leaf, linear)
    changes = {"use_dora": True, "lora_dropout": 0.3} if variant == "dora with dropout" else VARIANTS[variant]
    changes = {"target_modules": linear_targets(packed)} | changes
    ours, theirs = _adapted(packed, **changes), _adapted(floats, **changes)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(2)  # the same dropout
        losses.append(model.train()(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    torch.testing.assert_close(*losses, **tolerance)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    actual = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **tolerance)


@pytest.mark.parametrize("scheme", ["nf4", "ternary"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapters_load_with_bit_equal_logits(variant: str, scheme: str, tmp_path: Path) -> None:
    adapted = _adapted(_base(scheme=scheme), **VARIANTS[variant])
    logits = _logits(adapted)
    adapted.save_pretrained(tmp_path)
    base = _base(scheme=scheme)
    assert not torch.equal(_logits(base), logits)
    loaded = load_peft(base, tmp_path)
    assert torch.equal(_logits(loaded), logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load_peft(_base(scheme=scheme), tmp_path, is_trainable=True).parameters())


@pytest.mark.parametrize("scheme", ["nf4", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_keeps_the_logits_and_unmerge_is_bit_exact(variant: str, dtype: torch.dtype, scheme: str) -> None:
    adapted = _adapted(_base(dtype, scheme), **VARIANTS[variant])
    before, logits = _snapshot(adapted), _logits(adapted)
    # One rounding of each weight to the dtype: a few units in the last place of the logits' scale. A ternary base quantizes
    # its input, and a merged one does not.
    bound = 3e-2 if scheme == "ternary" else 1e-5
    tolerance = max(bound, 3e-2 if dtype == torch.bfloat16 else 0) * logits.abs().max().item()
    adapted.merge_adapter()
    assert adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight.dtype == dtype
    torch.testing.assert_close(_logits(adapted), logits, rtol=0, atol=tolerance)
    adapted.unmerge_adapter()
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(adapted), logits)
    merged = adapted.merge_and_unload()
    layers = [m for n, m in merged.named_modules() if n.endswith("_proj")]
    assert len(layers) == 14
    assert all(type(layer) is nn.Linear and layer.weight.dtype == dtype for layer in layers)
    torch.testing.assert_close(_logits(merged), logits, rtol=0, atol=tolerance)


def test_merged_weight_is_rounded_once() -> None:
    adapted = _adapted(_base(torch.bfloat16))
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    expected = (layer.packed.dequantize(torch.float32) + b @ a * 2).bfloat16()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, expected)
    assert all(k.partition(".")[0] != "_unmerged" for k in layer.state_dict())


def test_dora_norm_is_fp32_under_autocast() -> None:
    layer = _adapted(_base(), use_dora=True).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    scale = layer.dora_scale("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.dora_scale("default"), scale)


def test_two_lora_adapters_merge_but_dora_with_another_is_refused() -> None:
    from peft import LoraConfig

    adapted = _adapted(_base())
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    register_peft(config)
    adapted.add_adapter("second", config)
    adapted.base_model.set_adapter(["default", "second"])
    logits = _logits(adapted)
    adapted.merge_adapter(["default"])
    adapted.merge_adapter(["second"])
    torch.testing.assert_close(_logits(adapted), logits, rtol=0, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(_logits(adapted), logits)

    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    register_peft(dora)
    adapted.add_adapter("third", dora)
    with pytest.raises(ValueError, match="DoRA adapter together with another"):
        adapted.merge_adapter(["default", "third"])


def test_merging_non_finite_adapters_is_refused() -> None:
    adapted = _adapted(_base())
    adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_initializations_from_the_base_weight_are_refused(init: str) -> None:
    with pytest.raises(ValueError, match="needs a float base weight"):
        _adapted(_base(), init_lora_weights=init)


def test_adapters_on_trainable_ternary_layers_are_refused() -> None:
    model = _base(packed=False)
    targets = linear_targets(model)
    swap(model, scheme="ternary", trainable=True)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ has a master weight.*quant\.pack\(model\) first"):
        _adapted(model, target_modules=targets)
    pack(model)
    assert_wrapped(_adapted(model), targets)


def test_adapters_on_layers_with_an_input_norm_are_refused() -> None:
    model = _base(packed=False)
    swap(model, scheme="ternary", norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"normalizes its input \(rms_norm\)"):
        _adapted(model)


def test_casts_while_merged_reach_the_packed_layer() -> None:
    adapted, expected = _adapted(_base()), _adapted(_base()).to(torch.bfloat16)
    adapted.merge_adapter()
    adapted.to(torch.bfloat16)
    adapted.unmerge_adapter()
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer
    assert isinstance(layer, PackedLinear)
    assert layer.dtype == layer.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    for name, value in expected.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], value)


def test_merged_weights_can_be_quantized_again() -> None:
    """Dequantized weights are marked and refused; W + ΔW is another matrix and is accepted."""
    merged = _adapted(_base()).merge_and_unload()
    assert len(swap(merged).swapped) == 14


def test_moe_experts_are_lora_targets() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=100, num_key_value_heads=2, num_local_experts=4, **shape))
    report = swap(model)
    assert sum(".experts." in path for path in report.swapped) == 8
    targets = linear_targets(model)
    assert set(targets) == set(report.swapped)
    adapted = _adapted(model)
    assert_wrapped(adapted, targets)
    with prove_used(adapted, report):
        _logits(adapted)


def test_assert_wrapped_names_missing_and_unexpected_adapters() -> None:
    model = _base()
    targets = linear_targets(model)
    assert len(targets) == 14
    assert "lm_head" not in targets
    assert targets == linear_targets(_base(packed=False))
    adapted = _adapted(model)
    assert_wrapped(adapted, targets)
    with pytest.raises(RuntimeError, match=r"14 modules, expected 15; without adapter: lm_head; unexpected: none"):
        assert_wrapped(adapted, [*targets, "lm_head"])
    with pytest.raises(RuntimeError, match=r"unexpected: model\.layers\.0\.mlp\.down_proj"):
        assert_wrapped(adapted, set(targets) - {"model.layers.0.mlp.down_proj"})


def test_prove_used_works_through_peft() -> None:
    model = _base(packed=False)
    report = swap(model)
    adapted = _adapted(model)
    with prove_used(adapted, report):
        _logits(adapted)
    layer = adapted.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], 128)  # an adapter that skips its base layer
    with pytest.raises(RuntimeError, match=r"1 of 14 .*: model\.layers\.1\.mlp\.up_proj\."), prove_used(adapted, report):
        _logits(adapted)
