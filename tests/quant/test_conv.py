"""The ternary convolution: outputs and gradients equal a float reference; which convolutions `swap` replaces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from quant import pack, prove_used, swap, ternary, weight_cache
from quant.conv import BitConv2d

SHAPES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (3, 5), "dilation": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 2, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate", "stride": (1, 2)},
]


def _conv(**shape: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 10, **shape)


def _ste(x: Tensor, quantized: Tensor) -> Tensor:
    return x + (quantized - x).detach()


def _reference_output(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Fake quantization in fp64, straight-through, with one activation scale per image."""
    quantized = ternary.dequantize_activations(*ternary.quantize_activations(x.flatten(1))).view(x.shape)
    x, weight = (
        _ste(x.double(), quantized.double()),
        _ste(conv.weight.double(), ternary.fake_quantize(conv.weight.float()).double()),
    )
    bias = None if conv.bias is None else conv.bias.double()
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
        return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _output_and_gradients(module: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    grads = torch.autograd.grad(y, [x, *module.parameters()], torch.randn(y.shape).to(y.dtype))
    return [y, *grads]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_the_reference(shape: dict[str, Any]) -> None:
    conv = _conv(**shape)
    layer = BitConv2d.from_conv(conv)
    assert layer.weight is conv.weight
    x = (torch.randn(3, 6, 9, 11) * torch.tensor([0.01, 1, 30])[:, None, None, None]).requires_grad_()  # different scales
    for actual, expected in zip(
        _output_and_gradients(layer, layer(x), x), _output_and_gradients(conv, _reference_output(conv, x), x), strict=True
    ):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x[1]), layer(x[1:2])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_result_is_rounded_once(dtype: torch.dtype) -> None:
    conv = _conv(kernel_size=3, padding=1).to(dtype)
    layer = BitConv2d.from_conv(conv)
    x = torch.randn(2, 6, 8, 8).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    expected = _reference_output(conv, x).to(dtype)
    assert (y != expected).float().mean() < 0.01  # ties between the fp32 and the fp64 result
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_autocast_rounds_only_the_result() -> None:
    conv = _conv(kernel_size=3, bias=False)
    layer, x = BitConv2d.from_conv(conv), torch.randn(2, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y != _reference_output(conv, x).bfloat16()).float().mean() < 0.01
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_product_is_computed_in_exact_integers() -> None:
    layer = BitConv2d.from_conv(_conv(kernel_size=3, bias=False))
    x = torch.randn(1, 6, 8, 8)
    a, (t, s) = 127 / x.abs().max(), ternary.ternarize(layer.weight)
    integers = F.conv2d((x * a).round().double(), t.double())
    assert torch.equal(layer(x), integers.float() / (a * s))


def test_backward_saves_int8_activation_codes() -> None:
    layer = BitConv2d.from_conv(_conv(kernel_size=3))
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        layer(torch.randn(2, 6, 8, 8, requires_grad=True))
    assert sorted(str(t.dtype) for t in saved) == ["torch.float32", "torch.float32", "torch.int8"]
    assert sum(t.numel() for t in saved if t.is_floating_point() and t is not layer.weight) == 2  # one scale per image


def test_weight_is_ternarized_once_per_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ternary.ternarize
    monkeypatch.setattr(ternary, "ternarize", lambda w: calls.append(1) or original(w))
    layer = BitConv2d.from_conv(_conv(kernel_size=3))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 6, 8, 8)
    for step in (1, 2, 3):
        for _ in range(2):
            layer(x.requires_grad_()).square().sum().backward()
        assert len(calls) == step
        before = layer(x).detach()
        optimizer.step()
        assert not torch.equal(layer(x), before)
    assert layer.cached_bytes() >= layer.weight.numel()
    assert weight_cache.kept_bytes([layer.weight]) == layer.cached_bytes()
    layer.load_state_dict(_conv(kernel_size=3).state_dict())
    assert torch.equal(layer(x), BitConv2d.from_conv(_conv(kernel_size=3))(x))


def test_deepcopy_channels_last_casts_meta_and_fake_tensors() -> None:
    layer = BitConv2d.from_conv(_conv(kernel_size=3, padding=1))
    x = torch.randn(2, 6, 8, 8)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    channels_last = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    y = channels_last(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)  # the mean weight is summed in another order
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == expected.shape
    mode = FakeTensorMode()
    layer.weight, layer.bias = (nn.Parameter(mode.from_tensor(p.detach())) for p in (layer.weight, layer.bias))  # type: ignore[arg-type]
    with mode:
        y = layer(torch.empty(2, 6, 8, 8, requires_grad=True))
        y.sum().backward()
    assert y.shape == expected.shape


def test_compiles_without_graph_break_and_uses_updated_weights() -> None:
    layer = BitConv2d.from_conv(_conv(kernel_size=3, padding=1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert torch.equal(compiled(x), layer(x))


def test_requantizing_and_wrong_inputs_raise() -> None:
    layer = BitConv2d.from_conv(_conv(kernel_size=3))
    with pytest.raises(ValueError, match="already ternary"):
        BitConv2d.from_conv(layer)
    ternary_conv = _conv(kernel_size=3)
    ternary_conv.weight.data = ternary.fake_quantize(ternary_conv.weight)
    with pytest.raises(ValueError, match="ternary already"):
        BitConv2d.from_conv(ternary_conv)
    with pytest.raises(ValueError, match="not fp32, bf16 or fp16"):
        BitConv2d.from_conv(_conv(kernel_size=3).double())
    with pytest.raises(ValueError, match=r"takes \(n, 6, H, W\), got shape \(2, 5, 8, 8\)"):
        layer(torch.zeros(2, 5, 8, 8))
    with pytest.raises(TypeError, match=r"got an input of torch\.float64"):
        layer(torch.zeros(2, 6, 8, 8, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------- in a U-Net


class Block(nn.Module):
    """A residual block of a U-Net: two convolutions, a time projection, group norms."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inner), nn.Conv2d(inner, out, 3, padding=1)
        self.time = nn.Linear(32, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, out, 1) if inner != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[..., None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)
        return out


class UNet(nn.Module):
    """Downsampling, attention, upsampling with a skip connection; proportions of diffusers' UNet2D, 3 channels in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_time = nn.Linear(1, 32)
        self.conv_in, self.down = nn.Conv2d(3, 16, 3, padding=1), Block(16, 32)
        self.sample, self.middle = nn.Conv2d(32, 32, 3, stride=2, padding=1), Block(32, 32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.conv_out = Block(64, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = F.silu(self.embed_time(time[:, None]))
        skip = self.down(self.conv_in(x), time)
        y = self.depthwise(self.middle(self.sample(skip), time))
        q, k, v = self.qkv(y.flatten(2).transpose(1, 2)).chunk(3, -1)
        y = y + self.out(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).view_as(y)
        out: Tensor = self.conv_out(self.up(torch.cat([F.interpolate(y, scale_factor=2.0), skip], 1), time))
        return out


def _unet() -> UNet:
    torch.manual_seed(0)
    return UNet()


def test_unet_swap_leaves_first_last_and_depthwise_convolutions_and_trains() -> None:
    model = _unet()
    report = swap(model, scheme="ternary", trainable=True)
    assert sum(isinstance(m, BitConv2d) for m in model.modules()) == 9
    assert report.left == {
        "embed_time": "kept by pattern",
        "conv_in": "first or last convolution (4 channels or fewer on a side)",
        "depthwise": "depthwise convolution",
        "conv_out": "first or last convolution (4 channels or fewer on a side)",
    }
    assert report.share > 0.95
    x, time = torch.randn(2, 3, 8, 8), torch.rand(2)
    with prove_used(model, report):
        loss = (model(x, time) - x).square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        trained = (model(x, time) - x).square().mean()
        trained.backward()
        optimizer.step()
    assert trained < 0.7 * loss
    with pytest.raises(ValueError, match=r"^conv is already ternary"):
        swap(nn.ModuleDict({"linear": nn.Linear(8, 8), "conv": model.up.conv1}), scheme="nf4")


def test_prove_used_works_through_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = _unet()
    report = swap(model, scheme="ternary", trainable=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["conv1", "conv2", "qkv"]))  # type: ignore[arg-type]
    with prove_used(adapted, report):
        adapted(torch.randn(2, 3, 8, 8), torch.rand(2)).sum().backward()
    assert sum(p.grad is not None for name, p in adapted.named_parameters() if "lora" in name) == 2 * 7
    with pytest.raises(RuntimeError, match="no swapped module was used"), prove_used(adapted, report):
        pass


def test_prove_used_names_a_bypassed_convolution() -> None:
    model = _unet()
    report = swap(model, scheme="ternary", trainable=True)
    model.up.shortcut.forward = lambda x: F.conv2d(x, model.up.shortcut.weight)  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match=r"1 of \d+ swapped modules .*: up\.shortcut\."), prove_used(model, report):
        model(torch.randn(2, 3, 8, 8), torch.rand(2))


@pytest.mark.parametrize(("scheme", "trainable"), [("ternary", False), ("nf4", False), ("nf4", True)])
def test_only_ternary_training_swaps_convolutions(scheme: str, trainable: bool) -> None:
    model = _unet()
    report = swap(model, scheme=scheme, trainable=trainable)
    assert {report.left[path] for path in ("conv_in", "sample", "up.conv1")} == {
        "convolutions can only be quantized to ternary, and for training"
    }
    assert report.share < 0.2


def test_pack_leaves_convolutions_unchanged() -> None:
    model = _unet()
    swap(model, scheme="ternary", trainable=True)
    x, time = torch.randn(2, 3, 8, 8), torch.rand(2)
    expected = model(x, time)
    report = pack(model)
    assert len(report.left) == 9
    assert set(report.left.values()) == {"convolutions have no packed form"}
    with prove_used(model, report):
        assert torch.equal(model(x, time), expected)
