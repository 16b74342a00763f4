"""Fused experts as quantized linears: the result of the original's eager forward, and gradients, for each kind of experts."""

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


def _original(kind: str) -> nn.Module:
    """The experts module of a model, random, computing in its own eager forward."""
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
    """Tokens, their experts (never the last one), and their weights."""
    torch.manual_seed(seed)
    weights, index = torch.rand(TOKENS, E - 1).topk(K)
    return torch.randn(TOKENS, HIDDEN), index, weights


def _fake_rows(x: Tensor) -> Tensor:
    return x + (ternary.dequantize_activations(*ternary.quantize_activations(x)) - x).detach()


def _run(experts: nn.Module, seed: int = 1) -> tuple[Tensor, ...]:
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


def _scheme_weights(original: nn.Module, linear: Any) -> nn.Module:
    """The original on weights that are fake-quantized one expert at a time."""
    twin = copy.deepcopy(original)
    fake = nf4.fake_quantize if linear.scheme is nf4 else ternary.fake_quantize
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (fused := twin._parameters.get(name)) is not None:
            for matrix in fused.data:
                matrix.copy_(fake(matrix.t().contiguous()).t() if original.is_transposed else fake(matrix))
    return twin


class _FakeActivations(torch.overrides.TorchFunctionMode):
    """Quantizes the activations of every product with a weight, straight-through."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.linear, Tensor.matmul, Tensor.__matmul__):
            with torch._C.DisableTorchFunction():
                args = (_fake_rows(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_eager_forward_on_dequantized_weights(kind: str, linear: Any) -> None:
    original = _original(kind)
    twin = _scheme_weights(original, linear)
    ours = QuantizedExperts.from_experts(original, linear)
    if linear.scheme is ternary:
        with _FakeActivations():
            theirs = _run(twin)
    else:
        theirs = _run(twin)
    for got, expected in zip(_run(ours), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)

    masters = {name: p for name, p in ours.named_parameters() if p.requires_grad and "proj" in name}
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
            expected = twin.get_parameter(name).grad[index]  # type: ignore[index]
            if index == E - 1:  # no token chose it
                assert master.grad is None
            else:
                assert master.grad is not None
                torch.testing.assert_close(master.grad, expected.t() if transposed else expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_copies_states_casts_and_checkpoints(kind: str, linear: Any) -> None:
    original = _original(kind)
    ours = QuantizedExperts.from_experts(original, linear)
    expected = _run(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(torch.equal(a, b) for a, b in zip(_run(twin), expected, strict=True))
    other = _original(kind)
    for parameter in other.parameters():
        parameter.data.mul_(0.3)
    loaded = QuantizedExperts.from_experts(other, linear)
    _run(loaded)  # so that codes of the first weights are kept, which loading must drop
    loaded.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(_run(loaded), expected, strict=True))

    x, index, weights = _routing()
    x.requires_grad_()
    torch.manual_seed(2)
    y = checkpoint(ours, x, index, weights, use_reentrant=False)
    y.backward(torch.randn(y.shape))
    assert x.grad is not None
    assert torch.equal(x.grad, expected[1])

    half = ours.to(torch.bfloat16)
    y = half(x.detach().bfloat16(), index, weights)  # the routing weights in fp32, as routers give them
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected[0]).norm() < 0.05 * expected[0].norm()


def test_compiling_a_model_leaves_experts_as_they_are() -> None:
    ours = QuantizedExperts.from_experts(_original("mixtral"), NF4Linear)
    around = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU())

    def model(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = around(ours(around(x), index, weights))
        return y

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (1, 2, 3):
        torch.testing.assert_close(compiled(*_routing(seed)), model(*_routing(seed)))
    assert torch._dynamo.utils.counters["frames"]["total"] == 2  # before and after: none for how the tokens were split


def test_no_token_and_one_expert() -> None:
    ours = QuantizedExperts.from_experts(_original("mixtral"), NF4Linear)
    empty = ours(torch.zeros(0, HIDDEN), torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K))
    assert empty.shape == (0, HIDDEN)
    assert not ours.used
    x, index, weights = _routing()
    ours(x, torch.full_like(index, 3), weights)
    assert ours.used
    assert [m.used for m in ours.down_proj] == [False, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_fused_floats(kind: str) -> None:
    original = _original(kind)
    back = QuantizedExperts.from_experts(original, BitLinear).to_experts()
    assert type(back) is type(original)
    assert back.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in back.state_dict().items())
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in original.named_parameters()
    }
    packed = QuantizedExperts.from_experts(original, NF4Linear)
    theirs = _run(_scheme_weights(original, NF4Linear))
    for got, expected in zip(_run(packed.to_experts()), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_fake_and_meta_tensors_share_tokens_evenly() -> None:
    """As a plan traces it: no data to route by."""
    original = _original("mixtral")
    ours = QuantizedExperts.from_experts(original, BitLinear)
    mode = FakeTensorMode()
    for layer in ours.modules():
        if isinstance(layer, BitLinear):
            layer.weight = nn.Parameter(mode.from_tensor(layer.weight.detach()))
    with mode:
        x = torch.empty(TOKENS, HIDDEN, requires_grad=True)
        y = ours(x, torch.empty(TOKENS, K, dtype=torch.long), torch.empty(TOKENS, K))
        y.sum().backward()
    assert y.shape == (TOKENS, HIDDEN)
    assert all(p.grad is not None for p in ours.parameters())
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


def _body(model: nn.Module) -> int:
    """All parameters but embeddings and head."""
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


@pytest.mark.parametrize(("scheme", "trainable"), [("nf4", False), ("ternary", True)])
@pytest.mark.parametrize("kind", ROUTED)
def test_models(kind: str, scheme: str, trainable: bool) -> None:
    model = _model(kind)
    body, total = _body(model), sum(p.numel() for p in model.parameters())
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
def test_a_second_swap_is_refused(trainable: bool) -> None:
    model = nn.ModuleDict({"experts": _original("mixtral"), "linear": nn.Linear(8, 8)})
    assert len(swap(model, trainable=trainable, keep=("linear",)).swapped) == 2 * E
    with pytest.raises(ValueError, match=r"^experts\.\w+\.0 is already nf4"):
        swap(model, scheme="ternary")


def test_keep_keeps_experts() -> None:
    model = _model("Mixtral")
    report = swap(model, keep=(*DEFAULT_KEEP, "*.layers.0.mlp.experts"))
    assert report.left["model.layers.0.mlp.experts"] == "kept by pattern"
    assert len(report.swapped) == 8 + 8


def test_experts_that_are_not_understood_are_left_with_a_reason() -> None:
    model = _model("Llama4")
    report = swap(model)
    fused = {path: reason for path, reason in report.left.items() if path.endswith("experts")}
    assert len(fused) == 2
    assert all("Llama4TextExperts holds fused weights" in reason for reason in fused.values())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 8, 8))

    report = swap(nn.ModuleDict({"own": Own(), "linear": nn.Linear(8, 8)}))
    assert report.left == {"own": "Own holds fused weights and does not follow transformers' use_experts_implementation"}

    for change, reason in (
        (lambda m: setattr(m, "forward", lambda *a: None), "has a replaced forward"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "expert parallel"),
        (lambda m: m.register_parameter("third", nn.Parameter(torch.zeros(2, 8, 8))), "other fused weights"),
        (lambda m: setattr(m, "has_bias", True), "`has_bias`"),
    ):
        model = nn.ModuleDict({"experts": _original("mixtral"), "linear": nn.Linear(8, 8)})
        change(model["experts"])
        assert reason in swap(model).left["experts"]
    odd = _original("mixtral")
    odd.gate_up_proj = nn.Parameter(torch.randn(E, 26, HIDDEN))
    odd.down_proj = nn.Parameter(torch.randn(E, HIDDEN, 13))
    model = nn.ModuleDict({"experts": odd, "linear": nn.Linear(8, 8)})
    assert "out_features to be a multiple of 4" in swap(model, scheme="ternary").left["experts"]


def test_bad_weights_name_the_expert() -> None:
    experts = _original("mixtral")
    experts.down_proj.data[2, 0, 0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(ValueError, match=r"experts: down_proj\.2: 1 of 768 weights are not finite"):
        swap(nn.ModuleDict({"experts": experts}))


def test_what_looks_fused() -> None:
    assert looks_fused(_original("mixtral"))
    assert not looks_fused(QuantizedExperts.from_experts(_original("mixtral"), NF4Linear))
    assert not looks_fused(nn.Conv1d(8, 8, 3))
    assert not looks_fused(nn.Linear(8, 8))


def test_an_experts_module_that_no_token_enters_is_not_proven() -> None:
    model = nn.ModuleDict({"experts": _original("mixtral"), "linear": nn.Linear(8, 8)})
    report = swap(model)
    with pytest.raises(RuntimeError, match=r"1 of 2 swapped modules .*: experts\."), prove_used(model, report):
        model["linear"](torch.zeros(1, 8))
    with prove_used(model, report):
        model["linear"](torch.zeros(1, 8))
        x, index, weights = _routing()
        model["experts"](x, torch.full_like(index, 3), weights)  # four of five experts see nothing


def test_packing_ends_training() -> None:
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
def test_adapters_by_expert(kind: str) -> None:
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
