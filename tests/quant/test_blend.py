"""λ warm-up: a layer computes with w + λ(q(w) − w), gradients included; λ = 0 is the float layer, λ = 1 the quantized one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import BitLinear, FakeNF4Linear, FakeQuantLinear, PackedBitLinear, nf4, pack, set_blend, swap, ternary
from quant.conv import BitConv2d
from quant.experts import QuantizedExperts

FAKE_QUANT: list[type[FakeQuantLinear]] = [BitLinear, FakeNF4Linear]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpolate(plain: Tensor, quantized: Tensor, blend: float) -> Tensor:
    """plain + λ(quantized − plain) in fp32, rounded once; the gradient passes straight through."""
    target = (plain.float() + blend * (quantized.float() - plain.float())).to(plain.dtype)
    return plain + (target - plain).detach()


def _reference_output(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, blend: float) -> Tensor:
    quantized = nf4.fake_quantize(weight.float()) if layer.scheme is nf4 else ternary.fake_quantize(weight.float())
    if layer.scheme is ternary:
        x = _interpolate(x, ternary.dequantize_activations(*ternary.quantize_activations(x)), blend)
    return F.linear(x, _interpolate(weight, quantized, blend), bias)


def _make_layer(kind: Any, dtype: torch.dtype, *, bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind.from_linear(nn.Linear(96, 40, bias=bias).to(dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blend", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_output_and_gradients_equal_the_blend_formula(
    kind: type[FakeQuantLinear], bias: bool, blend: float, dtype: torch.dtype
) -> None:
    layer = _make_layer(kind, dtype, bias=bias)
    set_blend(layer, blend)
    x, grad = torch.randn(2, 5, 96).to(dtype), torch.randn(2, 5, 40).to(dtype)
    inputs = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    reference = _reference_output(layer, inputs[0], inputs[1], inputs[2] if bias else None, blend)
    reference.backward(grad)
    x.requires_grad_()
    output = layer(x)
    output.backward(grad)
    tolerance: dict[str, float] = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for actual, expected in zip(
        [output, x.grad, *(p.grad for p in layer.parameters())], [reference, *(t.grad for t in inputs)], strict=True
    ):
        torch.testing.assert_close(actual, expected, **tolerance)
    with torch.no_grad():
        assert torch.equal(layer(x), output)
    quantized = nf4.fake_quantize(inputs[1].float()) if kind is FakeNF4Linear else ternary.fake_quantize(inputs[1].float())
    torch.testing.assert_close(layer.dequantize(), _interpolate(inputs[1].detach(), quantized, blend), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_blend_zero_is_the_float_layer_and_blend_one_the_quantized_layer(kind: type[FakeQuantLinear], dtype: torch.dtype) -> None:
    layer, x = _make_layer(kind, dtype), torch.randn(7, 96).to(dtype)
    quantized_output = layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    set_blend(layer, 0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    set_blend(layer, 0.999999)
    torch.testing.assert_close(layer(x), quantized_output, rtol=2e-2, atol=2e-2)
    set_blend(layer, 1)
    assert torch.equal(layer(x), quantized_output)
    assert layer.state_dict().keys() == state.keys()
    assert copy.deepcopy(layer).blend == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_fused_rms_norm_runs_before_blending(blend: float, dtype: torch.dtype) -> None:
    layer = _make_layer(BitLinear, dtype, norm_eps=1e-6)
    gain = (torch.rand(96) + 0.5).to(dtype)
    with torch.no_grad():
        layer.rms_norm.weight.copy_(gain)
    set_blend(layer, blend)
    x, grad = torch.randn(3, 96).to(dtype), torch.randn(3, 40).to(dtype)
    reference_x, reference_gain = x.clone().requires_grad_(), gain.clone().requires_grad_()
    reference = _reference_output(
        layer, ternary.rms_norm(reference_x, reference_gain, 1e-6)[0], layer.weight.detach(), layer.bias.detach(), blend
    )
    reference.backward(grad)
    x.requires_grad_()
    output = layer(x)
    output.backward(grad)
    if blend == 0:
        assert torch.equal(output, F.linear(ternary.rms_norm(x, gain, 1e-6)[0], layer.weight, layer.bias))
    tolerance: dict[str, float] = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for actual, expected in ((output, reference), (x.grad, reference_x.grad), (layer.rms_norm.weight.grad, reference_gain.grad)):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_autocast_blends_in_fp32_and_rounds_once(kind: type[FakeQuantLinear]) -> None:
    """fp32 weight and input, products in bf16: blended in fp32, then rounded once, like the float layer."""
    layer, x = _make_layer(kind, torch.float32), torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        set_blend(layer, 0)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        set_blend(layer, 0.5)
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.backward(torch.randn(3, 40).bfloat16())
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x.detach()), rtol=3e-2, atol=3e-2)


def test_backward_saves_the_input_but_no_weight() -> None:
    layer = BitLinear.from_linear(nn.Linear(256, 512, bias=False))
    set_blend(layer, 0.5)
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(64, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        out = layer(x), BitLinear.forward(layer, x)
    assert [t.shape for t in saved if t is not layer.weight] == [x.shape, x.shape]
    assert all(t.dtype == x.dtype for t in saved)
    del out
    projections = nn.ModuleList(BitLinear.from_linear(nn.Linear(256, 512)) for _ in range(3))
    set_blend(projections, 0.5)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        outs = [projection(x) for projection in projections]
    assert len({t.data_ptr() for t in saved if t.shape == x.shape}) == 1  # q, k and v share the input
    assert len(outs) == 3


def test_forward_uses_weights_updated_by_the_optimizer() -> None:
    layer, x = _make_layer(BitLinear, torch.float32), torch.randn(4, 96)
    set_blend(layer, 0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer(x), _reference_output(layer, x, layer.weight, layer.bias, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_convolution_equals_the_blend_formula(blend: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1, stride=2).to(dtype)
    layer = BitConv2d.from_conv(copy.deepcopy(conv))
    set_blend(layer, blend)
    x = torch.randn(3, 6, 9, 11).to(dtype)
    reference_x = x.clone().requires_grad_()
    quantized_x = ternary.dequantize_activations(*ternary.quantize_activations(x.flatten(1))).view(x.shape)
    weight = _interpolate(conv.weight, ternary.fake_quantize(conv.weight.float()), blend)
    reference = F.conv2d(_interpolate(reference_x, quantized_x, blend), weight, conv.bias, 2, 1)
    grad = torch.randn(reference.shape).to(dtype)
    reference.backward(grad)
    x.requires_grad_()
    output = layer(x)
    output.backward(grad)
    if blend == 0:
        assert torch.equal(output, reference)
        assert torch.equal(layer.dequantize(), conv.weight)
    assert conv.bias is not None
    assert layer.bias is not None
    tolerance: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    pairs = (
        (output, reference),
        (x.grad, reference_x.grad),
        (layer.weight.grad, conv.weight.grad),
        (layer.bias.grad, conv.bias.grad),
    )
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, **tolerance)


def test_set_blend_on_a_mixture_of_experts_model() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, attn_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    ids = torch.arange(12)[None]
    float_logits = model(ids).logits
    swap(model, scheme="ternary", trainable=True)
    ternary_logits = model(ids).logits
    set_blend(model, 0)
    assert any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert {m.blend for m in model.modules() if isinstance(m, FakeQuantLinear)} == {0.0}
    torch.testing.assert_close(model(ids).logits, float_logits)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*blend is 0: .*set_blend\(model, 1\)"):
        pack(model)
    set_blend(model, 1)
    assert torch.equal(model(ids).logits, ternary_logits)
    pack(model)
    assert any(isinstance(m, PackedBitLinear) for m in model.modules())


def test_invalid_blend_values_inputs_and_early_packing_raise() -> None:
    layer = _make_layer(BitLinear, torch.float32)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0"):
            set_blend(layer, value)
    with pytest.raises(ValueError, match="no fake-quantized layer"):
        set_blend(nn.Linear(8, 8), 0.5)
    set_blend(layer, 0.5)
    with pytest.raises(ValueError, match="inputs of 96 features"):
        layer(torch.randn(2, 95))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(2, 96).double())
    with pytest.raises(ValueError, match=r"blend is 0\.5"):
        PackedBitLinear.from_linear(layer)


@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_torch_compile_and_meta_device(kind: type[FakeQuantLinear]) -> None:
    layer = _make_layer(kind, torch.float32)
    set_blend(layer, 0.5)
    x = torch.randn(2, 96, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert layer.to("meta")(torch.randn(2, 96, device="meta")).shape == (2, 40)
