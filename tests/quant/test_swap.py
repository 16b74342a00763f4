"""The walk over a module tree: what is swapped, what is left and why, and the proof that it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant import NF4Linear, prove_used, swap
from quant.swap import DEFAULT_KEEP


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **shape, **changes)).eval()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=64, state_size=8, num_hidden_layers=2)).eval()


IDS = torch.arange(12).view(2, 6)


def _packed(model: nn.Module) -> dict[str, NF4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def _float_twin(model: nn.Module) -> None:
    """Put back float linears that hold the dequantized weights."""
    for name, module in _packed(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.to_linear())


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    model = _llama(tie_word_embeddings=tied)
    original, total = _logits(model), sum(p.numel() for p in model.parameters())
    report = swap(model)
    assert set(report.swapped) == set(_packed(model))
    assert len(report.swapped) == 14
    assert report.left == {"lm_head": "output head"}
    assert report.share == pytest.approx(2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128) / total)
    assert report.bytes_after < report.bytes_before
    assert "14 layers to nf4" in str(report)
    assert "1 × output head" in str(report)
    with prove_used(model, report):
        swapped = _logits(model)
    assert not torch.equal(swapped, original)
    _float_twin(model)
    assert torch.equal(_logits(model), swapped)


def test_gpt2_conv1d_is_transposed() -> None:
    model = _gpt2()
    weight = model.get_submodule("transformer.h.0.attn.c_attn").weight
    assert isinstance(weight, Tensor)
    original = _logits(model)
    report = swap(model)
    assert len(report.swapped) == 8
    layer = _packed(model)["transformer.h.0.attn.c_attn"]
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert (layer.dequantize() - weight.t()).abs().max() < 0.16 * weight.abs().max()
    with prove_used(model, report):
        swapped = _logits(model)
    assert 0 < (swapped - original).abs().max() < 0.5 * original.abs().max()


def test_mamba_layers_that_are_never_called_are_left() -> None:
    model = _mamba()
    report = swap(model)
    mixer = "backbone.layers.0.mixer."
    assert {name.rpartition(".")[2] for name in report.swapped} == {"in_proj"}
    assert all("without calling" in report.left[mixer + leaf] for leaf in ("dt_proj", "x_proj", "out_proj"))
    with prove_used(model, report):
        _logits(model)


@pytest.mark.parametrize(("rescale_every", "swapped"), [(6, 10), (0, 14)])
def test_rwkv_layers_that_are_rescaled_in_place_are_left(rescale_every: int, swapped: int) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, rescale_every=rescale_every)
    model = RwkvForCausalLM(config).eval()
    report = swap(model)
    assert len(report.swapped) == swapped
    with prove_used(model, report):
        _logits(model)


def test_proof_catches_a_bypassed_module() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.read.bias

    model = Bypass()
    report = swap(model)
    with pytest.raises(RuntimeError, match=r"1 of 2 swapped modules took no part in the forward pass: read\."):  # noqa: SIM117
        with prove_used(model, report):
            model(torch.randn(2, 64))
    with prove_used(model, report):  # a fused path says so itself
        model(torch.randn(2, 64))
        assert isinstance(model.read, NF4Linear)
        model.read.mark_used()
    model.read = nn.Linear(64, 64)
    with pytest.raises(RuntimeError, match="no longer in the model: read"), prove_used(model, report):
        pass


def test_proof_does_not_hide_the_error_inside() -> None:
    model = _llama()
    report = swap(model)
    with pytest.raises(KeyError, match="inside"), prove_used(model, report):
        raise KeyError("inside")


def test_keep_patterns() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.router = nn.Linear(8, 4), nn.Linear(8, 4)
            self.gate_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    model = nn.ModuleDict({"mlp": Experts()})
    report = swap(model, keep=(*DEFAULT_KEEP, "mlp.down_*"))
    assert report.swapped == ("mlp.gate_proj",)
    assert set(report.left.values()) == {"kept by pattern"}
    with pytest.raises(ValueError, match=r"'mlp\.donw_proj' matches no module"):
        swap(nn.ModuleDict({"mlp": Experts()}), keep=("mlp.donw_proj",))


def test_shared_and_special_linears() -> None:
    shared, tied = nn.Linear(64, 64), nn.Linear(64, 100)
    model = nn.ModuleDict({"a": shared, "b": shared, "tok": nn.Embedding(100, 64), "out": tied})
    model["attention"] = nn.MultiheadAttention(64, 4)
    tied.weight = model["tok"].weight  # type: ignore[assignment]
    report = swap(model)
    assert report.swapped == ("a", "b")
    assert model["a"] is model["b"]
    assert report.left["out"] == "weight shared with another module"
    assert report.left["attention.out_proj"] == "NonDynamicallyQuantizableLinear is not exactly nn.Linear"


def test_nothing_to_swap_and_swapping_twice() -> None:
    with pytest.raises(ValueError, match=r"nothing to swap in ModuleDict \(lm_head: kept by pattern\)"):
        swap(nn.ModuleDict({"lm_head": nn.Linear(8, 8)}))
    with pytest.raises(ValueError, match="no linear-like module at all"):
        swap(nn.Sequential(nn.ReLU()))
    model = _llama()
    swap(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is already nf4"):
        swap(model)
    with pytest.raises(ValueError, match="unknown scheme 'fp3'; known: nf4"):
        swap(model, scheme="fp3")


def test_bad_weights_are_named() -> None:
    second = nn.Linear(8, 8)
    second.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1: 1 of 64 weights are not finite"):
        swap(nn.Sequential(nn.Linear(8, 8), second))


def test_meta() -> None:
    with torch.device("meta"):
        model = _llama(tie_word_embeddings=False)
    report = swap(model)
    assert all(p.is_meta for p in model.parameters())
    real = _llama(tie_word_embeddings=False)
    assert swap(real) == report
    assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
