"""swap on a module tree: what it replaces, what it leaves and why, and the check that replaced modules are used."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant import BitLinear, NF4Linear, PackedBitLinear, linear_targets, nf4, pack, prove_used, swap, ternary
from quant.swap import DEFAULT_KEEP, LINEARS, as_linear


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


def _restore_float_linears(model: nn.Module) -> None:
    """Replaces packed linears by float linears with the dequantized weights."""
    for name, module in _packed(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.to_linear())


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_swapped_llama_equals_float_linears_with_dequantized_weights(tied: bool) -> None:
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
    _restore_float_linears(model)
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


def test_prove_used_detects_a_bypassed_module() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.read.bias

    model = Bypass()
    report = swap(model)
    with pytest.raises(RuntimeError, match=r"1 of 2 swapped modules were not used in the forward pass: read\."):  # noqa: SIM117
        with prove_used(model, report):
            model(torch.randn(2, 64))
    with prove_used(model, report):  # a fused path marks the module itself
        model(torch.randn(2, 64))
        assert isinstance(model.read, NF4Linear)
        model.read.mark_used()
    model.read = nn.Linear(64, 64)
    with pytest.raises(RuntimeError, match="no longer in the model: read"), prove_used(model, report):
        pass


def test_prove_used_does_not_hide_an_error_of_the_forward_pass() -> None:
    model = _llama()
    report = swap(model)
    with pytest.raises(KeyError, match="inside"), prove_used(model, report):
        raise KeyError("inside")


def test_keep_patterns_leave_modules_and_must_match_one() -> None:
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


def test_shared_linears_stay_shared_and_tied_or_special_ones_are_left() -> None:
    shared, tied = nn.Linear(64, 64), nn.Linear(64, 100)
    model = nn.ModuleDict({"a": shared, "b": shared, "tok": nn.Embedding(100, 64), "out": tied})
    model["attention"] = nn.MultiheadAttention(64, 4)
    tied.weight = model["tok"].weight  # type: ignore[assignment]
    report = swap(model)
    assert report.swapped == ("a", "b")
    assert model["a"] is model["b"]
    assert report.left["out"] == "weight shared with another module"
    assert report.left["attention.out_proj"] == "NonDynamicallyQuantizableLinear is not exactly nn.Linear"


def test_transformer_encoder_layers_that_read_weights_are_left() -> None:
    """Their fast path in eval mode reads linear1.weight and linear2.weight directly: it would read codes as floats."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"encoder": encoder, "out": nn.Linear(64, 64)}).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = model["encoder"](x)
        report = swap(model)
        assert torch.equal(model["encoder"](x), before)
    assert report.swapped == ("out",)
    assert len(report.left) == 6
    assert set(report.left.values()) == {"nn.TransformerEncoderLayer reads this weight without calling the module"}


def _with_hook(name: str) -> nn.Module:
    def hook(*_: Any) -> None:
        return None

    linear = nn.Linear(16, 16)
    getattr(linear, f"register_{name}")(hook)
    return linear


def _with_forward() -> nn.Module:
    linear = nn.Linear(16, 16)
    linear.forward = lambda x: 2 * x  # type: ignore[method-assign,assignment]  # as accelerate does
    return linear


MODIFIED_MODULES = {
    "forward hook": lambda: _with_hook("forward_hook"),
    "forward pre-hook": lambda: _with_hook("forward_pre_hook"),
    "backward hook": lambda: _with_hook("full_backward_hook"),
    "backward pre-hook": lambda: _with_hook("full_backward_pre_hook"),
    "forward": _with_forward,
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
    "parametrization": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
    "convolution": lambda: nn.utils.spectral_norm(nn.Conv2d(16, 16, 3)),
}


@pytest.mark.parametrize("kind", MODIFIED_MODULES)
def test_modules_with_hooks_or_a_changed_forward_are_left(kind: str) -> None:
    from quant.swap import reasons_to_leave

    model = nn.ModuleDict({"modified": MODIFIED_MODULES[kind](), "plain": nn.Linear(16, 16)})
    before = model["modified"]
    report = swap(model, scheme="ternary", trainable=True)
    assert report.swapped == ("plain",)
    assert model["modified"] is before
    reasons = {"forward": "a replaced forward", "parametrization": "not exactly nn.Linear"}
    expected = reasons.get(kind, "has hooks" if "hook" in kind else r"has hooks|computes its weight")
    assert re.search(expected, report.left["modified"])
    if "hook" in kind or kind == "forward":
        # An adapter may still wrap the module, together with its hooks.
        assert reasons_to_leave(nn.ModuleDict({"modified": before}), ()) == {}


def test_conv1d_with_a_hook_is_left() -> None:
    model = _gpt2()
    model.get_submodule("transformer.h.0.mlp.c_fc").register_forward_hook(lambda *_: None)
    assert swap(model).left["transformer.h.0.mlp.c_fc"] == "this Conv1D has hooks"


def _t5(**changes: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**shape, **changes)).eval()


@pytest.mark.parametrize("gated", [False, True])
def test_modules_that_a_model_keeps_in_fp32_are_left(gated: bool) -> None:
    model = _t5(feed_forward_proj="gated-gelu" if gated else "relu")
    report = swap(model)
    kept = [name for name, reason in report.left.items() if reason == "the model keeps it in fp32"]
    assert len(kept) == 4
    assert all(name.endswith(".wo") for name in kept)
    with prove_used(model, report), torch.no_grad():
        logits = model(input_ids=IDS, decoder_input_ids=IDS).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("names", [["up"], {"up"}, ["body.up.weight"], ["body.u*"], None], ids=str)
@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_keep_in_fp32_names_apply_only_inside_their_model(attribute: str, names: Any) -> None:
    inner = nn.ModuleDict({"body": nn.ModuleDict({"up": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8), "o": nn.Linear(8, 8)})})
    setattr(inner, attribute, names)
    outer = nn.ModuleDict({"body": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    report = swap(nn.ModuleDict({"inner": inner, "inner2": outer, "up": nn.Linear(8, 8)}))
    both = {"inner.body.up", "inner.body.up_proj"}
    assert set(report.left) == (both if names == ["body.u*"] else set() if names is None else {"inner.body.up"})
    assert {"up", "inner2.body.up"} <= set(report.swapped)  # outside of the model that names them


def test_nothing_to_swap_second_swap_and_unknown_scheme_raise() -> None:
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


def test_swapping_a_model_with_adapters_raises() -> None:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(_llama(), LoraConfig(target_modules=["q_proj"]))
    before = [type(m) for m in adapted.modules()]
    with pytest.raises(ValueError, match=r"has adapters: swap it first, then attach them \(.*layers\.0\.self_attn\.q_proj\)"):
        swap(adapted)
    with pytest.raises(ValueError, match="has adapters"):
        swap(adapted.base_model.model, scheme="ternary", trainable=True)
    assert [type(m) for m in adapted.modules()] == before


@pytest.mark.parametrize(("scheme", "option"), [("ternary", "double"), ("nf4", "norm_eps"), ("nf4", "dubble")])
@pytest.mark.parametrize("trainable", [False, True])
def test_unknown_options_raise(scheme: str, option: str, trainable: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=f"{scheme} has no option '{option}'"):
        swap(model, scheme=scheme, trainable=trainable, **{option: True})
    assert type(model[0]) is nn.Linear


def test_norm_eps_is_set_on_linears_and_raises_for_convolutions() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    swap(model, scheme="ternary", trainable=True, norm_eps=1e-5)
    assert model[0].rms_norm.eps == 1e-5  # type: ignore[union-attr]
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(16, 16, 3))
    with pytest.raises(ValueError, match="1: convolutions have no option 'norm_eps'"):
        swap(model, scheme="ternary", trainable=True, norm_eps=1e-5)
    assert type(model[0]) is nn.Linear


def test_keep_given_as_a_string_raises() -> None:
    model = _llama()
    for call in (swap, linear_targets):
        with pytest.raises(ValueError, match=r"keep must be a list of patterns: use \['lm_head'\]"):
            call(model, keep="lm_head")


def test_swapping_a_single_layer_raises_and_names_the_right_call() -> None:
    with pytest.raises(ValueError, match=r"the model itself is a Linear.*use PackedBitLinear\.from_linear"):
        swap(nn.Linear(8, 8), scheme="ternary")
    with pytest.raises(ValueError, match=r"the model itself is a Conv2d.*use BitConv2d\.from_conv"):
        swap(nn.Conv2d(8, 8, 3), scheme="ternary", trainable=True)
    with pytest.raises(ValueError, match=r"^NF4Linear is already nf4"):
        swap(NF4Linear(8, 8))


def test_prove_used_works_through_compile_and_ddp_wrappers() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    report = swap(model)
    ddp: Any = nn.Module()  # wraps like DistributedDataParallel, without processes
    ddp.module = model
    ddp.forward = lambda x: ddp.module(x)
    x = torch.randn(2, 64)
    for wrapped in (torch.compile(model, backend="eager"), ddp, torch.compile(ddp, backend="eager")):
        with prove_used(wrapped, report):  # type: ignore[arg-type]
            wrapped(x)
        with pytest.raises(RuntimeError, match="no swapped module was used"), prove_used(wrapped, report):  # type: ignore[arg-type]
            pass
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[assignment]
    with prove_used(model, report):
        model(x)


def test_prove_used_with_a_submodule_named_module() -> None:
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(64, 64)}), "fc": nn.Linear(64, 64)})
    report = swap(model)
    assert report.swapped == ("module.fc", "fc")
    with pytest.raises(RuntimeError, match="1 of 2 swapped modules"), prove_used(model, report):
        model["fc"](torch.randn(2, 64))


def test_non_finite_weight_error_names_the_module() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight.data[0, 0] = float("nan")
    match = r"1: 1 of 64 weights are not finite.*\(the model is partly swapped now: load it again\)$"
    with pytest.raises(ValueError, match=match):
        swap(nn.Sequential(first, second))
    with pytest.raises(ValueError, match="0: 1 of 64 weights are not finite") as error:
        swap(nn.Sequential(second, first))
    assert "partly" not in str(error.value)  # nothing was changed


def test_swap_on_meta_gives_the_same_report_and_state_dict() -> None:
    with torch.device("meta"):
        model = _llama(tie_word_embeddings=False)
    report = swap(model)
    assert all(p.is_meta for p in model.parameters())
    real = _llama(tie_word_embeddings=False)
    assert swap(real) == report
    assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }


# ------------------------------------------------------------------------------------------------------------- GPT-2's Conv1D


def _fake_quantize_activations(x: Tensor) -> Tensor:
    return x + (ternary.dequantize_activations(*ternary.quantize_activations(x)) - x).detach()


@pytest.mark.parametrize(("scheme", "trainable"), LINEARS, ids=str)
def test_gpt2_equals_conv1d_with_fake_quantized_weights(scheme: str, trainable: bool) -> None:
    """Logits and gradients of a swapped GPT-2 against Conv1D on fake-quantized weights and, in ternary, activations."""
    from transformers.pytorch_utils import Conv1D

    model = _gpt2()
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, Conv1D):
            fake = {"nf4": nf4.fake_quantize, "ternary": ternary.fake_quantize}[scheme]
            module.weight.data = fake(module.weight.data.t().contiguous()).t()
            if scheme == "ternary":
                module.register_forward_pre_hook(lambda _, args: (_fake_quantize_activations(args[0]),))
    report = swap(model, scheme=scheme, trainable=trainable)
    assert len(report.swapped) == 8
    outputs = []
    for each in (model, reference):
        with torch.enable_grad():
            each.train()
            for dropout in (m for m in each.modules() if isinstance(m, nn.Dropout)):
                dropout.p = 0.0
            logits = each(input_ids=IDS).logits
            logits.square().mean().backward()
        outputs.append(logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    if trainable:
        for path in report.swapped:
            layer, conv1d = model.get_submodule(path), reference.get_submodule(path)
            assert isinstance(layer.weight, nn.Parameter)
            for grad, expected in ((layer.weight.grad, conv1d.weight.grad.t()), (layer.bias.grad, conv1d.bias.grad)):  # type: ignore[union-attr,operator]
                assert (grad - expected).norm() < 0.03 * expected.norm()  # type: ignore[operator]


def test_as_linear_transposes_conv1d_and_tied_conv1d_are_left() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(12, 8)
    linear = as_linear(conv)
    assert (linear.in_features, linear.out_features) == (8, 12)
    assert torch.equal(linear.weight, conv.weight.t())
    assert linear.weight.is_contiguous()
    assert linear.weight.requires_grad
    assert linear.bias is conv.bias
    layer = BitLinear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is conv.bias
    conv.weight.requires_grad_(False)
    assert not as_linear(conv).weight.requires_grad

    first, second = Conv1D(8, 8), Conv1D(8, 8)
    second.weight = first.weight
    report = swap(nn.ModuleDict({"one": first, "two": second, "three": Conv1D(8, 8)}), trainable=True)
    assert report.swapped == ("three",)
    assert report.left["one"] == "weight shared with another module"


# ------------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(("scheme", "options"), [("ternary", {}), ("nf4", {}), ("nf4", {"double": False})], ids=str)
def test_pack_after_training_keeps_the_logits(scheme: str, options: dict[str, bool]) -> None:
    model = _llama()
    swapped = swap(model, scheme=scheme, trainable=True, **options)
    assert swapped.bytes_after == swapped.bytes_before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = _logits(model)
    progress_calls: list[tuple[int, int]] = []
    report = pack(model, progress=lambda done, total: progress_calls.append((done, total)))
    assert torch.equal(_logits(model), trained)
    assert (report.scheme, report.trainable, report.swapped, report.left) == (scheme, False, swapped.swapped, {})
    assert report.share == swapped.share
    assert report.bytes_before == swapped.bytes_after > report.bytes_after
    assert progress_calls == [(i, 14) for i in range(1, 15)]
    kinds = {type(m) for m in model.modules() if hasattr(m, "quantized")}
    assert kinds == {LINEARS[scheme, False]}
    if scheme == "nf4":
        assert {m.double_quantized for m in model.modules() if isinstance(m, NF4Linear)} == {options.get("double", True)}
    with prove_used(model, report):
        _logits(model)
    with pytest.raises(ValueError, match="nothing to pack in LlamaForCausalLM"):
        pack(model)
    with pytest.raises(ValueError, match="already"):
        swap(model, scheme=scheme)


def test_pack_keeps_shared_modules_shared_and_raises_on_nan_weights() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    swap(model, scheme="ternary", trainable=True)
    assert isinstance(model["c"], BitLinear)
    model["c"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^c: .*1 of 64 weights are not finite.*partly packed now: load it again"):
        pack(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], PackedBitLinear)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack(nn.Sequential(nn.Linear(8, 8)))


def test_pack_raises_until_adapters_are_merged() -> None:
    from peft import LoraConfig, get_peft_model

    model = _llama()
    swap(model, scheme="nf4", trainable=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj\.base_layer has an adapter"):
        pack(adapted)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert len(pack(adapted.merge_and_unload()).swapped) == 14


# ------------------------------------------------------------------------------------------------------------------- families

LLAMA: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
RECURRENT: dict[str, Any] = {"vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[float, dict[str, Any]]] = {  # the least share of the body to be swapped; the config
    "Llama": (0.98, LLAMA),
    "Mistral": (0.98, LLAMA),
    "Qwen3": (0.98, LLAMA | {"head_dim": 32}),
    "Gemma3": (0.98, LLAMA | {"head_dim": 32}),
    "Phi3": (0.98, LLAMA),
    "GPTNeoX": (0.98, {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "GPT2": (0.98, {"vocab_size": 100, "n_positions": 32, "n_embd": 128, "n_layer": 2, "n_head": 4}),
    "BitNet": (0.98, LLAMA),
    "NanoChat": (0.98, LLAMA),
    "xLSTM": (0.98, RECURRENT | {"num_heads": 4, "num_blocks": 2, "chunk_size": 16}),
    "Rwkv": (0.98, RECURRENT | {"rescale_every": 0}),
    "Mamba": (0.55, RECURRENT | {"state_size": 8}),
    "Mamba2": (0.55, RECURRENT | {"state_size": 8, "head_dim": 32, "num_heads": 8, "n_groups": 2, "chunk_size": 8}),
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


@pytest.mark.parametrize(("scheme", "trainable"), [("nf4", False), ("ternary", True)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_are_swapped_and_trained(family: str, scheme: str, trainable: bool) -> None:
    import transformers

    least_share, config = FAMILIES[family]
    names = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    torch.manual_seed(0)
    model = getattr(transformers, names[1])(getattr(transformers, names[0])(**config)).train()
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for p in model.get_output_embeddings().parameters()}
    float_model = copy.deepcopy(model)
    total, body = (sum(p.numel() for p in model.parameters() if id(p) not in without) for without in (set(), outside))
    report = swap(model, scheme=scheme, trainable=trainable)
    assert report.share * total / body >= least_share
    with prove_used(model, report):
        logits = model(input_ids=IDS, use_cache=False).logits
    assert bool(logits.isfinite().all())
    if trainable:
        logits.float().square().mean().backward()
        float_model(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
        for path in report.swapped:  # xLSTM's first feed-forward layers get no gradient, swapped or not
            weight, float_weight = model.get_submodule(path).weight, float_model.get_submodule(path).weight
            assert weight.grad is not None
            assert bool(weight.grad.any()) == bool(float_weight.grad.any())
