"""Ternary convolutions, for U-Nets: a float master weight, quantized in the forward pass, straight-through.

The same arithmetic as in linears (quant/ternary.py), over the dimensions that a convolution sums:

    weights       one scale s per tensor               t = clip(round(W · s), −1, 1)
    activations   one scale a per image                q = clip(round(x · a), −128, 127),   a = 127 / max|x| over (C, H, W)
    product       y = (q ∗ t) / (a · s)                q ∗ t is exact in integers

BitNet quantizes activations by token because one product sums a token's features. A convolution sums over channels
and over a window of positions, and neighbouring windows overlap: the image is the smallest unit whose scale can be factored
out of every sum, so the product stays integer. (By position it could not; by window the input
would be quantized once for every weight of the kernel.) Absmax over more than a token is BitNet's own training rule:
arXiv 2310.11453, section 2.1. Padding with zeros and quantizing commute, since q(0) = 0.

The convolution itself runs in fp32 on the codes: every |sum| up to 2^24, 131,072 products, is exact there, also in TF32,
whose factors hold 11 bits. The backward pass saves the int8 codes, one byte per activation, and no float copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from quant import ternary
from quant.linear import MasterWeight, between
from quant.weight_cache import cached

FEW_CHANNELS = 4
"""Convolutions with at most this many channels on a side touch pixels or latents; they are tiny and stay in floats."""


# Operators, opaque to torch.compile like those of quant/ops.py.

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_LIBRARY = torch.library.Library("quant12g", "FRAGMENT")
_LIBRARY.define("conv_codes(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define(f"conv(Tensor codes, Tensor scale, Tensor? bias, Tensor master, {_GEOMETRY}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"conv_grad_input(Tensor grad, Tensor master, SymInt[] shape, {_GEOMETRY}) -> Tensor")
_LIBRARY.define(f"conv_grad_weight(Tensor grad, Tensor codes, Tensor scale, int[] shape, {_GEOMETRY}) -> Tensor")

Ints = Sequence[int]


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C, H, W) → int8 codes of that shape, fp32 scales (n, 1, 1, 1)."""
    x = x.detach().float()
    scale = 127 / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=ternary.FLOOR)
    return (x * scale).round_().clamp_(-128, 127).to(torch.int8), scale


def _weight(master: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight and its scale; computed once per optimizer step."""
    return cached(master, "ternary-conv", ternary.ternarize, frozen=False)


def _conv(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    master: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    t, s = _weight(master)
    with torch.autocast(codes.device.type, enabled=False):  # autocast would round the integers
        y = F.conv2d(codes.float(), t.float(), None, stride, padding, dilation, groups)
    y = y.div_(scale * s)
    return (y if bias is None else y.add_(bias.view(-1, 1, 1))).to(dtype)


def _grad_input(grad: Tensor, master: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    t, s = _weight(master)
    return conv2d_input(list(shape), (t / s).to(grad.dtype), grad, list(stride), list(padding), list(dilation), groups)


def _grad_weight(
    grad: Tensor, codes: Tensor, scale: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    x = (codes / scale).to(grad.dtype)
    return conv2d_weight(x, list(shape), grad, list(stride), list(padding), list(dilation), groups)


def _fake_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1, 1, 1, dtype=torch.float32)


def _fake_conv(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    master: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    return F.conv2d(codes.float(), master.float(), None, stride, padding, dilation, groups).to(dtype)


def _fake_grad_input(grad: Tensor, master: Tensor, shape: Ints, *geometry: Any) -> Tensor:
    return grad.new_empty(shape)


def _fake_grad_weight(grad: Tensor, codes: Tensor, scale: Tensor, shape: Ints, *geometry: Any) -> Tensor:
    return grad.new_empty(shape)


for _name, _function, _fake in (
    ("conv_codes", _codes, _fake_codes),
    ("conv", _conv, _fake_conv),
    ("conv_grad_input", _grad_input, _fake_grad_input),
    ("conv_grad_weight", _grad_weight, _fake_grad_weight),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant12g::{_name}", _fake, lib=_LIBRARY)

operators: Any = torch.ops.quant12g


class _Conv(torch.autograd.Function):
    """x (n, C, H, W) ∗ W + bias → y (n, out, H', W') in `dtype`; straight-through as in quant/linear.py."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, master: Tensor, geometry: tuple[Ints, Ints, Ints, int], dtype: torch.dtype
    ) -> Tensor:
        codes, scale = operators.conv_codes(x)
        ctx.geometry, ctx.shape, ctx.x_dtype = geometry, x.shape, x.dtype
        ctx.save_for_backward(master, *((codes, scale) if master.requires_grad else ()))
        return operators.conv(codes, scale, bias, master, *geometry, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        master, *kept = ctx.saved_tensors
        grad_x = grad_bias = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = operators.conv_grad_input(grad, master, ctx.shape, *ctx.geometry).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum((0, 2, 3))
        if ctx.needs_input_grad[2]:
            grad_weight = operators.conv_grad_weight(grad, *kept, master.shape, *ctx.geometry).to(master.dtype)
        return grad_x, grad_bias, grad_weight, None, None


class _Blended(torch.autograd.Function):
    """The same with x and W blended with their codes, as in quant/linear.py; the backward pass saves x_λ in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        master: Tensor,
        geometry: tuple[Ints, Ints, Ints, int],
        dtype: torch.dtype,
        blend: float,
    ) -> Tensor:
        blended = x.detach().to(dtype)
        if blend > 0:
            codes, scale = operators.conv_codes(x)
            blended = between(x, codes / scale, blend, dtype)
        ctx.geometry, ctx.shape, ctx.x_dtype, ctx.blend = geometry, x.shape, x.dtype, blend
        ctx.save_for_backward(master, *((blended,) if master.requires_grad else ()))
        return F.conv2d(blended, _blended_weight(master, blend, dtype), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        master, *blended = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        geometry: Any = (list(stride), list(padding), list(dilation), groups)
        grad_x = grad_bias = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = _blended_weight(master, ctx.blend, grad.dtype)
            grad_x = conv2d_input(ctx.shape, weight, grad, *geometry).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum((0, 2, 3))
        if blended:
            grad_weight = conv2d_weight(blended[0], master.shape, grad, *geometry).to(master.dtype)
        return grad_x, grad_bias, grad_weight, None, None, None


def _blended_weight(master: Tensor, blend: float, dtype: torch.dtype) -> Tensor:
    if blend == 0:
        return master.detach().to(dtype)
    codes, scale = _weight(master)
    return between(master, codes / scale, blend, dtype)


class BitConv2d(MasterWeight, nn.Conv2d):
    """A Conv2d with ternary weights, int8 activations by image and a float master weight; see the module's docstring."""

    scheme: ClassVar[ModuleType] = ternary
    quantized: ClassVar[str] = "ternary"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used = False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, device: torch.device | str | None = None) -> Self:
        """A layer that trains the weight of `conv`: it takes over the same Parameters, unless they move to `device`.

        Raises ValueError for a layer that is quantized already, for an unsupported dtype, and for ternary weights.
        """
        if (mark := getattr(conv, "quantized", None)) is not None:
            raise ValueError(f"this layer is already {mark}: quantizing it again would lose accuracy")
        weight = conv.weight
        if weight.dtype not in ternary.SOURCES:
            raise ValueError(f"{type(conv).__name__} holds {weight.dtype}, not fp32, bf16 or fp16: is it already quantized?")
        if not weight.is_meta and ternary.looks_ternary(weight):
            raise ValueError("these weights are ternary already: quantizing them again would keep the codes and shrink the scale")
        sizes: Any = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        layer = cls(*sizes, conv.groups, conv.bias is not None, conv.padding_mode, device="meta", dtype=weight.dtype)
        layer.weight, layer.bias = weight, conv.bias
        layer.train(conv.training)
        return layer if device is None else layer.to(device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the forward pass uses it, (out, in / groups, kh, kw), in `dtype` (default: the master's)."""
        with torch.no_grad():
            if self.blend != 1:
                return _blended_weight(self.weight, self.blend, dtype or self.weight.dtype)
            codes, scale = _weight(self.weight)
            return (codes / scale).to(dtype or self.weight.dtype)

    def codes(self) -> tuple[Tensor, Tensor]:
        """The codes of the current weight, int8 in {−1, 0, 1} in its shape, and their scale, fp32 (), the s that divides.

        They are the ones that the forward pass caches until the next optimizer step: do not write to them.
        """
        return _weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) or (C, H, W) in fp32, bf16 or fp16 → the same dtype; under autocast in autocast's."""
        self.mark_used()
        dtype, device_type = x.dtype, x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if dtype not in ternary.SOURCES or x.dtype not in ternary.SOURCES:
            raise TypeError(f"a quantized convolution computes in fp32, bf16 or fp16, got an input of {x.dtype}")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"this convolution takes (n, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        single, padding = x.dim() == 3, self.padding
        x = x[None] if single else x
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self.stride, padding, self.dilation, self.groups)
        if self.blend != 1:
            y = cast(Tensor, _Blended.apply(x, bias, self.weight, geometry, dtype, self.blend))
        else:
            y = cast(Tensor, _Conv.apply(x, bias, self.weight, geometry, dtype))
        return y[0] if single else y


def reason_to_leave(module: nn.Module, scheme: str, trainable: bool) -> str | None:
    """Why this convolution (nn.modules.conv._ConvNd) must not be swapped; None if it can be."""
    if (scheme, trainable) != (BitConv2d.quantized, True):
        return "convolutions can only be quantized to ternary, and for training"
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not exactly nn.Conv2d"
    if min(module.in_channels, module.out_channels) <= FEW_CHANNELS:
        return f"first or last convolution ({FEW_CHANNELS} channels or fewer on a side)"
    if module.groups == module.in_channels:
        return "depthwise convolution"
    return None
