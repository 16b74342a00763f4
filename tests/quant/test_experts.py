"""Fused experts as quantized linears: outputs and gradients equal the original eager forward, for each kind of experts."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from quant import BitLinear, FakeNF4Linear, NF4Linear, PackedBitLinear, linear_targets, nf4, pack, prove_used, swap, ternary
from quant.experts import QuantizedExperts, looks_fused
from quant.swap import DEFAULT_KEEP

E, K, HIDDEN, INTER, TOKENS = 5, 2, 32, 24, 14
KINDS = ["mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v4", "nemotron_h", "muse_spark"]
LINEARS = [NF4Linear, FakeNF4Linear, BitLinear, PackedBitLinear]
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": K, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def _original_experts(kind: str) -> nn.Module:
    """A model's experts module with random weights and the eager forward."""
    import importlib

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    names = {"gpt_oss": "GptOss", "qwen3_moe": "Qwen3Moe", "nemotron_h": "NemotronH", "deepseek_v4": "DeepseekV4"}
    name = names.get(kind, "".join(part.capitalize() for part in kind.split("_")))
    config = SimpleNamespace(
        hidden_size=HIDDEN, moe_hidden_size=HIDDEN, intermediate_size=INTER, moe_intermediate_size=INTER, moe_latent_size=None,
        num_local_experts=E, num_experts=E, n_routed_experts=E, hidden_act="silu", mlp_hidden_act="relu2", swiglu_limit=1.0,
        swiglu_alpha=1.7, post_norm_eps=1e-5, _experts_implementation="eager",
    )  # fmt: skip
    experts = getattr(module, {"olmoe": "Olmoe"}.get(kind, name) + "Experts")(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert isinstance(experts, nn.Module)
    return experts


def _routing(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts chosen for them (never the last one), and the routing weights."""
    torch.manual_seed(seed)
    weights, index = torch.rand(TOKENS, E - 1).topk(K)
    return torch.randn(TOKENS, HIDDEN), index, weights


def _fake_quantize_activations(x: Tensor) -> Tensor:
    return x + (ternary.dequantize_activations(*ternary.quantize_activations(x)) - x).detach()


def _forward_backward(experts: nn.Module, seed: int = 1) -> tuple[Tensor, ...]:
    """Output, and the gradients of the input and of the routing weights."""
    x, index, weights = _routing(seed)
    x.requires_grad_()
    weights.requires_grad_()
    y = experts(x, index, weights)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape))
    assert x.grad is not None
    assert weights.grad is not None
    return y.detach(), x.grad, weights.grad


def _with_fake_quantized_weights(original: nn.Module, linear: Any) -> nn.Module:
    """A copy whose weights are fake-quantized one expert at a time."""
    quantized = copy.deepcopy(original)
    fake = nf4.fake_quantize if linear.scheme is nf4 else ternary.fake_quantize
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (fused := quantized._parameters.get(name)) is not None:
            for matrix in fused.data:
                matrix.copy_(fake(matrix.t().contiguous()).t() if original.is_transposed else fake(matrix))
    return quantized


class _FakeQuantizeActivations(torch.overrides.TorchFunctionMode):
    """Fake-quantizes the activations of every product with a weight, straight-through."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.linear, Tensor.matmul, Tensor.__matmul__):
            with torch._C.DisableTorchFunction():
                args = (_fake_quantize_activations(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_eager_forward_with_dequantized_weights(kind: str, linear: Any) -> None:
    original = _original_experts(kind)
    reference = _with_fake_quantized_weights(original, linear)
    experts = QuantizedExperts.from_experts(original, linear)
    if linear.scheme is ternary:
        with _FakeQuantizeActivations():
            reference_results = _forward_backward(reference)
    else:
        reference_results = _forward_backward(reference)
    for actual, expected in zip(_forward_backward(experts), reference_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)

    masters = {name: p for name, p in experts.named_parameters() if p.requires_grad and "proj" in name}
    if linear in (NF4Linear, PackedBitLinear):
        assert not masters
        return
    assert len(masters) == 2 * E * (2 if original.has_bias else 1)
    for name, fused in original.named_parameters():
        for index in range(E if "proj" in name else 0):
            leaf = "bias" if name.endswith("_bias") else "weight"
            master = masters[f"{name.removesuffix('_bias')}.{index}.{leaf}"]
            transposed = original.is_transposed and leaf == "weight"
            assert torch.equal(master, fused[index].t() if transposed else fused[index])
            assert master.is_contiguous()
            assert master.untyped_storage().nbytes() == 4 * master.numel()
            expected = reference.get_parameter(name).grad[index]  # type: ignore[index]
            if index == E - 1:  # no token chose it
                assert master.grad is None
            else:
                assert master.grad is not None
                torch.testing.assert_close(master.grad, expected.t() if transposed else expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_deepcopy_pickle_state_dict_casts_and_gradient_checkpointing(kind: str, linear: Any) -> None:
    original = _original_experts(kind)
    experts = QuantizedExperts.from_experts(original, linear)
    expected = _forward_backward(experts)
    for copied in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert all(torch.equal(a, b) for a, b in zip(_forward_backward(copied), expected, strict=True))
    other_experts = _original_experts(kind)
    for parameter in other_experts.parameters():
        parameter.data.mul_(0.3)
    loaded = QuantizedExperts.from_experts(other_experts, linear)
    _forward_backward(loaded)  # caches codes of the first weights, which loading must drop
    loaded.load_state_dict(experts.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(_forward_backward(loaded), expected, strict=True))

    x, index, weights = _routing()
    x.requires_grad_()
    torch.manual_seed(2)
    y = checkpoint(experts, x, index, weights, use_reentrant=False)
    y.backward(torch.randn(y.shape))
    assert x.grad is not None
    assert torch.equal(x.grad, expected[1])

    half = experts.to(torch.bfloat16)
    y = half(x.detach().bfloat16(), index, weights)  # routers return fp32 weights
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected[0]).norm() < 0.05 * expected[0].norm()


def test_torch_compile_runs_experts_eagerly_without_recompiling() -> None:
    experts = QuantizedExperts.from_experts(_original_experts("mixtral"), NF4Linear)
    dense = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU())

    def model(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = dense(experts(dense(x), index, weights))
        return y

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (1, 2, 3):
        torch.testing.assert_close(compiled(*_routing(seed)), model(*_routing(seed)))
    # One graph before and one after the experts; the split of the tokens compiles nothing.
    assert torch._dynamo.utils.counters["frames"]["total"] == 2


def test_no_tokens_and_all_tokens_to_one_expert() -> None:
    experts = QuantizedExperts.from_experts(_original_experts("mixtral"), NF4Linear)
    empty = experts(torch.zeros(0, HIDDEN), torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K))
    assert empty.shape == (0, HIDDEN)
    assert not experts.used
    x, index, weights = _routing()
    experts(x, torch.full_like(index, 3), weights)
    assert experts.used
    assert [m.used for m in experts.down_proj] == [False, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_to_experts_restores_the_fused_float_module(kind: str) -> None:
    original = _original_experts(kind)
    restored = QuantizedExperts.from_experts(original, BitLinear).to_experts()
    assert type(restored) is type(original)
    assert restored.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in restored.state_dict().items())
    assert {n: p.requires_grad for n, p in restored.named_parameters()} == {
        n: p.requires_grad for n, p in original.named_parameters()
    }
    packed = QuantizedExperts.from_experts(original, NF4Linear)
    reference_results = _forward_backward(_with_fake_quantized_weights(original, NF4Linear))
    for actual, expected in zip(_forward_backward(packed.to_experts()), reference_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fake_and_meta_tensors_split_tokens_evenly() -> None:
    """Memory planning traces the model without data to route by."""
    original = _original_experts("mixtral")
    experts = QuantizedExperts.from_experts(original, BitLinear)
    mode = FakeTensorMode()
    for layer in experts.modules():
        if isinstance(layer, BitLinear):
            layer.weight = nn.Parameter(mode.from_tensor(layer.weight.detach()))
    with mode:
        x = torch.empty(TOKENS, HIDDEN, requires_grad=True)
        y = experts(x, torch.empty(TOKENS, K, dtype=torch.long), torch.empty(TOKENS, K))
        y.sum().backward()
    assert y.shape == (TOKENS, HIDDEN)
    assert all(p.grad is not None for p in experts.parameters())
    meta = QuantizedExperts.from_experts(original.to("meta"), NF4Linear)
    assert all(p.is_meta for p in meta.parameters())
    x = torch.empty(TOKENS, HIDDEN, device="meta")
    assert meta(x, torch.empty(TOKENS, K, dtype=torch.long, device="meta"), x[:, :K]).shape == x.shape


# ------------------------------------------------------------------------------------------------------------ in whole models


def _model(kind: str) -> Any:
    import transformers

    shapes: dict[str, Any] = {
        "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
        "Olmoe": {"intermediate_size": 48, "num_experts": 4},
        "Qwen3Moe": {"intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4, "head_dim": 8},
        "GptOss": {"intermediate_size": 48, "num_local_experts": 4, "head_dim": 8},
        "Llama4": {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8},
    }
    torch.manual_seed(0)
    text = "Text" if kind == "Llama4" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**SIZES, **shapes[kind])
    config._experts_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


IDS = torch.arange(40).view(2, 20)
ROUTED = ["Mixtral", "Olmoe", "Qwen3Moe", "GptOss"]


def _body_parameters(model: nn.Module) -> int:
    """The number of parameters outside of embeddings and output head."""
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


@pytest.mark.parametrize(("scheme", "trainable"), [("nf4", False), ("ternary", True)])
@pytest.mark.parametrize("kind", ROUTED)
def test_model_with_swapped_experts_trains_or_matches_dequantized_model(kind: str, scheme: str, trainable: bool) -> None:
    model = _model(kind)
    body, total = _body_parameters(model), sum(p.numel() for p in model.parameters())
    report = swap(model, scheme=scheme, trainable=trainable)
    assert report.share * total / body > 0.98
    assert report.left == {"lm_head": "output head"}
    assert len(report.swapped) == 2 * (4 + 2 * 4)
    assert {"model.layers.0.mlp.experts.gate_up_proj.0", "model.layers.1.mlp.experts.down_proj.3"} <= set(report.swapped)
    with prove_used(model, report):
        loss = model(input_ids=IDS, labels=IDS).loss
    if trainable:
        loss.backward()
        router = next(p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))
        assert router.grad is not None
        assert bool(router.grad.any())
        trained = [m for m in model.modules() if isinstance(m, BitLinear)]
        assert sum(m.weight.grad is not None for m in trained) > 0.9 * len(trained)
    else:
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedExperts):
                model.set_submodule(path, module.to_experts())
            elif isinstance(module, NF4Linear) and ".experts." not in path:
                model.set_submodule(path, module.to_linear())
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable", [True, False])
def test_swapping_quantized_experts_again_raises(trainable: bool) -> None:
    model = nn.ModuleDict({"experts": _original_experts("mixtral"), "linear": nn.Linear(8, 8)})
    assert len(swap(model, trainable=trainable, keep=("linear",)).swapped) == 2 * E
    with pytest.raises(ValueError, match=r"^experts\.\w+\.0 is already nf4"):
        swap(model, scheme="ternary")


def test_keep_pattern_leaves_experts_unswapped() -> None:
    model = _model("Mixtral")
    report = swap(model, keep=(*DEFAULT_KEEP, "*.layers.0.mlp.experts"))
    assert report.left["model.layers.0.mlp.experts"] == "kept by pattern"
    assert len(report.swapped) == 8 + 8


def test_unsupported_experts_are_left_with_a_reason() -> None:
    model = _model("Llama4")
    report = swap(model)
    left_experts = {path: reason for path, reason in report.left.items() if path.endswith("experts")}
    assert len(left_experts) == 2
    assert all("Llama4TextExperts holds fused weights" in reason for reason in left_experts.values())

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 8, 8))

    report = swap(nn.ModuleDict({"custom": Custom(), "linear": nn.Linear(8, 8)}))
    assert report.left == {"custom": "Custom holds fused weights and does not follow transformers' use_experts_implementation"}

    for change, reason in (
        (lambda m: setattr(m, "forward", lambda *a: None), "has a replaced forward"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "expert parallel"),
        (lambda m: m.register_parameter("third", nn.Parameter(torch.zeros(2, 8, 8))), "other fused weights"),
        (lambda m: setattr(m, "has_bias", True), "`has_bias`"),
    ):
        model = nn.ModuleDict({"experts": _original_experts("mixtral"), "linear": nn.Linear(8, 8)})
        change(model["experts"])
        assert reason in swap(model).left["experts"]
    odd_width = _original_experts("mixtral")
    odd_width.gate_up_proj = nn.Parameter(torch.randn(E, 26, HIDDEN))
    odd_width.down_proj = nn.Parameter(torch.randn(E, HIDDEN, 13))
    model = nn.ModuleDict({"experts": odd_width, "linear": nn.Linear(8, 8)})
    assert "out_features to be a multiple of 4" in swap(model, scheme="ternary").left["experts"]


def test_non_finite_weight_error_names_the_expert() -> None:
    experts = _original_experts("mixtral")
    experts.down_proj.data[2, 0, 0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(ValueError, match=r"experts: down_proj\.2: 1 of 768 weights are not finite"):
        swap(nn.ModuleDict({"experts": experts}))


def test_looks_fused_detects_only_fused_float_experts() -> None:
    assert looks_fused(_original_experts("mixtral"))
    assert not looks_fused(QuantizedExperts.from_experts(_original_experts("mixtral"), NF4Linear))
    assert not looks_fused(nn.Conv1d(8, 8, 3))
    assert not looks_fused(nn.Linear(8, 8))


def test_prove_used_fails_for_experts_that_receive_no_tokens() -> None:
    model = nn.ModuleDict({"experts": _original_experts("mixtral"), "linear": nn.Linear(8, 8)})
    report = swap(model)
    with pytest.raises(RuntimeError, match=r"1 of 2 swapped modules .*: experts\."), prove_used(model, report):
        model["linear"](torch.zeros(1, 8))
    with prove_used(model, report):
        model["linear"](torch.zeros(1, 8))
        x, index, weights = _routing()
        model["experts"](x, torch.full_like(index, 3), weights)  # four of five experts get no token


def test_pack_freezes_experts_and_keeps_the_logits() -> None:
    for scheme in ("ternary", "nf4"):
        model = _model("GptOss")
        swap(model, scheme=scheme, trainable=True)
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
        report = pack(model)
        assert Counter(type(m).__name__ for m in model.modules() if hasattr(m, "quantized")).total() == 24
        assert len(report.swapped) == 24
        assert not any(p.requires_grad for n, p in model.named_parameters() if "experts" in n)
        with torch.no_grad(), prove_used(model, report):
            assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_lora_adapters_on_individual_experts(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    from quant import assert_wrapped, register_peft

    model = _model(kind)
    report = swap(model)
    targets = linear_targets(model)
    assert "model.layers.0.mlp.experts.down_proj.3" in targets
    config = LoraConfig(r=2, target_modules=targets)
    register_peft(config)
    adapted = get_peft_model(model, config)
    assert_wrapped(adapted, targets)
    with prove_used(adapted, report):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    up = [p for name, p in adapted.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(up) == 16
    assert sum(p.grad is not None and bool(p.grad.any()) for p in up) > 12
    before = adapted(input_ids=IDS).logits
    for p in up:
        nn.init.normal_(p, std=0.1)
    changed = adapted(input_ids=IDS).logits
    assert (changed - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"gate_up_proj\.0 has an adapter"):
        model.model.layers[0].mlp.experts.to_experts()
    adapted.merge_adapter()
    assert (adapted(input_ids=IDS).logits - changed).abs().max() < 1e-3
    model = adapted.merge_and_unload()
    model.model.layers[0].mlp.experts = model.model.layers[0].mlp.experts.to_experts()
    assert (model(input_ids=IDS).logits - changed).abs().max() < 1e-3
