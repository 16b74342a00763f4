"""Quantized linears: packed (frozen codes, no float weight) and fake-quantized (a float master weight, straight-through).

                          trained: fake-quantized           frozen: packed
    scheme nf4            FakeNF4Linear                     NF4Linear, the base of QLoRA
    scheme ternary        BitLinear, BitNet b1.58           PackedBitLinear

Linears are independent of a format's bits: the scheme (quant/nf4.py, quant/ternary.py) quantizes and defines the layout, the
operators (quant/ops.py) multiply. Both share one autograd function, since they differ in two things only: where the codes come
from, and whether a master weight gets a gradient.

There is no special tensor class. Packed parts are frozen uint8 `nn.Parameter`s, scales as their raw bytes, so that
`.to(dtype)`, `.half()` or a model-wide cast cannot change them, and sharding, deepcopy and `meta` treat them like any
parameter. A weight exists in floats only while a multiplication runs; the backward pass dequantizes it again, and saves
nothing of a frozen layer's input, int8 codes of a ternary one's (and, like any RMSNorm, the input of its own norm).

A master weight can approach its codes gradually: `blend`, the λ of w + λ(q(w) − w), is 1 except in a warm-up (`set_blend`).
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import nf4, ternary
from quant.ops import ARITHMETIC, operators
from quant.weight_cache import cached, forget, kept_bytes, weights_changed


class _Linear(torch.autograd.Function):
    """x (…, in) · Wᵀ + bias → y (…, out) in `dtype`; the gradients are those of the straight-through definition.

        y = q(x) · q(W)ᵀ + bias      ∂x = ∂y · q(W)      ∂W = ∂yᵀ · q(x)      (q: quantized and dequantized, slope 1)

    activations: the quantized x, or (x,). With a norm, x was normalized before: RMSNorm's gradient is applied too, for which
    x and `inverse`, 1 / root mean square, are saved. weight: a master weight, or packed parts.

    Straight-through: Bengio et al., arXiv 1308.3432; BitNet, arXiv 2310.11453, section 2.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activations: tuple[Tensor, ...],
        norm: Tensor | None,
        inverse: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        master: Tensor | None,
        parts: tuple[Tensor, ...],
    ) -> Tensor:
        weight = parts if master is None else (master,)
        kept = activations if master is not None and master.requires_grad else ()
        ctx.scheme, ctx.shape, ctx.frozen, ctx.x_dtype = scheme, shape, master is None, x.dtype
        ctx.ends = len(weight), len(weight) + len(kept)
        ctx.save_for_backward(*weight, *kept, *(() if norm is None else (x, inverse, norm)))
        return operators.linear(scheme, activations, bias, weight, ctx.frozen, *shape, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, (first, second) = ctx.saved_tensors, ctx.ends
        weight, activations, before_norm = saved[:first], saved[first:second], saved[second:]
        grad_x = grad_bias = grad_norm = grad_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_x = operators.grad_input(ctx.scheme, grad, weight, ctx.frozen, *ctx.shape)
            if before_norm:
                grad_x, grad_norm = _norm_gradients(grad_x, *before_norm)
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, ctx.shape[0]).sum(0)
        if activations:
            grad_weight = operators.grad_weight(ctx.scheme, grad, activations).to(weight[0].dtype)
        return grad_x, None, grad_norm, None, grad_bias, None, None, None, grad_weight, None


def _norm_gradients(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of RMSNorm's output → gradients of its input and of its weight; computed in fp32."""
    normed, scaled = x.float() * inverse, grad.float() * weight.float()
    grad_x = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x, (grad.float() * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


class _SharedActivations:
    """Caches the quantized activations of the last input, which q, k and v, or gate and up, use one after another.

    An input is identified by its Python object and `_version`, which a kernel or a collective that writes into it does not
    change. So each layer is served once: a second call of the same layer quantizes again. Compiled graphs do not use it,
    since they reuse one buffer for several tensors; they merge equal operations by themselves.
    """

    def __init__(self) -> None:
        self.input: weakref.ref[Tensor] | None = None
        self.stamp: object = None
        self.activations: tuple[Tensor, ...] = ()
        self.served: set[int] = set()

    def __call__(
        self, layer: nn.Module, key: Hashable, x: Tensor, make: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`make(x)`, or its result for another layer that used the same `key` and the same input."""
        if torch.compiler.is_compiling() or x.is_inference() or torch.is_inference_mode_enabled() or type(x) is not Tensor:
            return make(x.detach())
        stamp = (key, x._version, x.dtype, x.shape, x.data_ptr() if not x.is_meta else 0)
        same = self.input is not None and self.input() is x and self.stamp == stamp and id(layer) not in self.served
        if not same:
            self.activations = make(x.detach())
            self.input, self.stamp, self.served = weakref.ref(x, self._drop), stamp, set()
        self.served.add(id(layer))
        return self.activations

    def _drop(self, dead: object) -> None:
        if self.input is dead:
            self.input, self.activations = None, ()


class _Threads(threading.local):
    def __init__(self) -> None:
        self.shared_activations = _SharedActivations()


_threads = _Threads()


def _checked(layer: Any, x: Tensor) -> tuple[tuple[int, int], torch.dtype]:
    """(shape of the weight, dtype of the result, which is that of x or autocast's); raises for a wrong input."""
    shape: tuple[int, int] = (layer.out_features, layer.in_features)
    dtype, device_type = x.dtype, x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):  # `meta` has no autocast
        dtype = torch.get_autocast_dtype(device_type)
    if dtype not in nf4.SOURCES or x.dtype not in nf4.SOURCES:
        raise TypeError(f"a quantized linear computes in fp32, bf16 or fp16, got an input of {x.dtype}")
    if x.shape[-1:] != shape[1:]:
        raise ValueError(f"this linear takes inputs of {shape[1]} features, got shape {tuple(x.shape)}")
    return shape, dtype


def _multiply(layer: Any, x: Tensor, *, master: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
    """x (…, in) → (…, out), in the dtype of x or autocast's; x is normalized first if the layer has a norm."""
    shape, dtype = _checked(layer, x)
    scheme, bias, norm = layer.arithmetic, layer.bias, layer.rms_norm
    bias = None if bias is None else bias.to(dtype)
    gain = inverse = None
    activations: tuple[Tensor, ...] = (x,)
    if norm is not None:
        gain = norm.weight
        *normed, inverse = operators.norm_activations(scheme, x.detach(), gain.detach(), norm.eps)
        activations = tuple(normed)
    elif ARITHMETIC[scheme].integer:
        activations = _threads.shared_activations(layer, scheme, x, lambda plain: tuple(operators.activations(scheme, plain)))
    if not torch.is_grad_enabled():  # autograd's overhead costs as much as a small product
        return cast(Tensor, operators.linear(scheme, activations, bias, parts or (master,), master is None, *shape, dtype))
    return cast(Tensor, _Linear.apply(x, activations, gain, inverse, bias, scheme, shape, dtype, master, parts))


# --------------------------------------------------------------------------------------------------------- λ, the warm-up


def between(plain: Tensor, quantized: Tensor, blend: float, dtype: torch.dtype) -> Tensor:
    """plain + λ(quantized − plain), computed in fp32 and rounded to `dtype` once; `quantized` is fp32 and overwritten."""
    plain = plain.detach().float()
    return quantized.sub_(plain).mul_(blend).add_(plain).to(dtype)


def _blended_weight(scheme: str, master: Tensor, blend: float, dtype: torch.dtype) -> Tensor:
    """The weight between the master (λ = 0) and its codes (λ = 1), (out, in)."""
    if blend == 0:
        return master.detach().to(dtype)
    return between(master, operators.dequantize(scheme, [master], False, *master.shape, torch.float32), blend, dtype)


def _blended_activations(scheme: str, x: Tensor, blend: float, dtype: torch.dtype) -> tuple[Tensor]:
    """The activations between x (λ = 0) and its codes (λ = 1), if the scheme quantizes them."""
    if blend == 0 or not ARITHMETIC[scheme].integer:
        return (x.to(dtype),)
    codes, scales = operators.activations(scheme, x)
    return (between(x, ternary.dequantize_activations(codes, scales), blend, dtype),)


class _Blended(torch.autograd.Function):
    """x (…, in) · Wᵀ + bias → y (…, out) in `dtype`, with x and W blended with their codes; straight-through.

        x_λ = x + λ(q(x) − x)     W_λ = W + λ(q(W) − W)     y = x_λ · W_λᵀ + bias     ∂x = ∂y · W_λ     ∂W = ∂yᵀ · x_λ

    activations: x_λ in `dtype`, saved for the backward pass as in any float layer; W_λ is recomputed there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activations: tuple[Tensor],
        bias: Tensor | None,
        scheme: str,
        blend: float,
        dtype: torch.dtype,
        master: Tensor,
    ) -> Tensor:
        ctx.scheme, ctx.blend, ctx.x_dtype = scheme, blend, x.dtype
        ctx.save_for_backward(master, *(activations if master.requires_grad else ()))
        return nn.functional.linear(activations[0], _blended_weight(scheme, master, blend, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        master, *activations = ctx.saved_tensors
        flat, grad_x, grad_bias, grad_weight = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _blended_weight(ctx.scheme, master, ctx.blend, grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        if activations:
            grad_weight = (flat.t() @ activations[0].reshape(-1, master.shape[1])).to(master.dtype)
        return grad_x, None, grad_bias, None, None, None, grad_weight


def _multiply_blended(layer: FakeQuantLinear, x: Tensor) -> Tensor:
    """As `_multiply`, with weight and activations blended with their codes by `layer.blend`."""
    _, dtype = _checked(layer, x)
    scheme, blend = layer.arithmetic, layer.blend
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if layer.rms_norm is not None:
        x, _ = ternary.rms_norm(x, layer.rms_norm.weight, cast(float, layer.rms_norm.eps))
    key = (scheme, blend, dtype)
    activations = _threads.shared_activations(layer, key, x, lambda plain: _blended_activations(scheme, plain, blend, dtype))
    return cast(Tensor, _Blended.apply(x, activations, bias, scheme, blend, dtype, layer.weight))


def set_blend(model: nn.Module, value: float) -> None:
    """Set the λ of every fake-quantized layer of `model`: 0 computes with floats, 1 (the default) with codes.

    In between, y = (x + λ(q(x) − x)) · (W + λ(q(W) − W))ᵀ: a pretrained model approaches its codes over many steps instead of
    at once (λ warm-up; Fine-tuning LLMs to 1.58bit, Hugging Face 2024). λ is not part of the state_dict: set it again
    when a warm-up is resumed. A compiled model is recompiled for each value.

    Raises ValueError for a value outside of [0, 1], and for a model without fake-quantized layers.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"blend must be between 0 (floats) and 1 (codes), got {value}")
    layers = [module for module in model.modules() if isinstance(module, MasterWeight)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer")
    for layer in layers:
        layer.blend = float(value)


def _refuse(linear: nn.Module, scheme: ModuleType) -> None:
    """Raise for a layer that `scheme` must not quantize: it is quantized already, or its shape or dtype is unsupported."""
    if not isinstance(linear, nn.Module) or not isinstance(weight := getattr(linear, "weight", None), Tensor):
        raise TypeError(f"from_linear takes an nn.Linear, not {linear!r}")
    if (mark := getattr(linear, "quantized", None) or getattr(weight, "quantized", None)) is not None:
        raise ValueError(f"this layer is already {mark}: quantizing it again would lose accuracy")
    if weight.dtype not in scheme.SOURCES:
        why = "cast it to fp32 first" if weight.is_floating_point() else "is it already quantized?"
        raise ValueError(f"{type(linear).__name__} holds {weight.dtype}, not fp32, bf16 or fp16: {why}")
    if (reason := scheme.unfit(weight.shape)) is not None:
        raise ValueError(reason)
    if scheme is ternary and not weight.is_meta and ternary.looks_ternary(weight):
        raise ValueError(
            "these weights are ternary already (−c, 0, c): quantizing them again would keep the codes and shrink the scale"
        )


def _norm(features: int, eps: float | None, device: torch.device, dtype: torch.dtype) -> nn.RMSNorm | None:
    return None if eps is None else nn.RMSNorm(features, eps=eps, device=device, dtype=dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in a scheme's codes; computes in the dtype of its input.

    Its parameters are the scheme's parts, all uint8 (`layout` of quant/nf4.py and quant/ternary.py), and the bias, a frozen
    float. `dtype`: the float dtype of this layer (the source's; follows `.to(dtype)`), used for
    the bias and when the layer is dequantized. Gives NaN until `from_linear` or `load_state_dict`.
    """

    scheme: ClassVar[ModuleType]
    quantized: ClassVar[str]
    rms_norm: nn.RMSNorm | None
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.used, self.rms_norm = False, None
        layout = self.scheme.layout(self.shape, **options)
        self.names = tuple(layout)
        for name, shape in layout.items():
            # Scales of these bytes are NaN, so that a layer without weights cannot be mistaken for one with weights.
            self.register_parameter(name, _frozen(torch.full(shape, 255, dtype=torch.uint8, device=device)))
        self.bias = _frozen(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, device: torch.device | str | None = None, **options: bool) -> Self:
        """Pack `linear` (on its device), then move the result to `device`; `linear` does not change.

        For a fake-quantized linear of the same scheme the codes are those of its master weight.

        Raises ValueError for a layer that is packed already, for one in a warm-up (`blend` below 1), and for
        weights that the scheme refuses.
        """
        if not (isinstance(linear, FakeQuantLinear) and linear.scheme is cls.scheme):
            _refuse(linear, cls.scheme)
        elif linear.blend != 1:
            raise ValueError(
                f"blend is {linear.blend:g}: this layer is in a warm-up, and packing would change what it computes; end the "
                "warm-up first: set_blend(model, 1)"
            )
        weight, bias = linear.weight, linear.bias
        features = (linear.in_features, linear.out_features)
        packed = cls(*features, bias is not None, device="meta", dtype=weight.dtype, **options)
        packed.train(linear.training)
        if weight.is_meta:
            return packed
        for name, part in zip(packed.names, cls.scheme.quantize(weight, **options).parts(), strict=True):
            setattr(packed, name, _frozen(part))
        if bias is not None:
            packed.bias = _frozen(bias.detach().clone())
        return packed if device is None else packed.to(device)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def parts(self) -> list[Tensor]:
        """The packed weight as it is stored, in the order of the scheme's layout."""
        return [getattr(self, name) for name in self.names]

    @property
    def packed(self) -> Any:
        """The packed weight as the scheme's tensor (NF4Tensor, TernaryTensor); views of this layer's parameters."""
        return self.scheme.of_parts(self.parts, self.shape)

    @property
    def arithmetic(self) -> str:
        """The key of `quant.ops.ARITHMETIC` for this layer."""
        return self.quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floats, (out, in), in `dtype` (default: the layer's), without a gradient."""
        with torch.no_grad():
            return operators.dequantize(self.arithmetic, self.parts, True, *self.shape, dtype or self.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A float `nn.Linear` with the dequantized weight and the bias, marked so that it cannot be quantized again.

        Raises ValueError for a layer with an RMSNorm, which an nn.Linear does not have.
        """
        if self.rms_norm is not None:
            raise ValueError("this layer normalizes its input (rms_norm), which an nn.Linear cannot do")
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = _frozen(weight)
        linear.weight.quantized = self.quantized  # type: ignore[attr-defined]
        if self.bias is not None:
            linear.bias = _frozen(self.bias.detach().to(weight.dtype, copy=True))
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) in fp32, bf16 or fp16 → (…, out) in the same dtype; under autocast in autocast's, as F.linear."""
        self.mark_used()
        return _multiply(self, x, master=None, parts=tuple(self.parts))

    def mark_used(self) -> None:
        """Record that the weight was used in a forward pass; a fused path that bypasses `forward` must call it."""
        self.used = True

    def cached_bytes(self) -> int:
        """Bytes that a backend caches for this layer: a copy of the weight in another layout."""
        return kept_bytes(self.parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(torch.empty(0, dtype=torch.uint8)).dtype != torch.uint8:
            raise TypeError(
                "packed codes are bytes and cannot be cast: use .to(dtype), which does not change them, instead of .type(dtype)"
            )
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follows a cast of the model
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(PackedLinear):
    """A frozen linear in NF4. `double` (default): the block scales are quantized too, 4.127 bits per weight instead of 4.5."""

    scheme: ClassVar[ModuleType] = nf4
    quantized: ClassVar[str] = "nf4"
    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter
    offset: nn.Parameter

    @property
    def double_quantized(self) -> bool:
        return len(self.names) == 4

    @property
    def arithmetic(self) -> str:
        return "nf4-double" if self.double_quantized else "nf4"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, double={self.double_quantized}"


class PackedBitLinear(PackedLinear):
    """A frozen linear in ternary, 2 bits per weight; activations are quantized to int8 by token. out_features: a multiple of 4.

    `rms_norm`: None, or the RMSNorm before it, as in BitLinear.
    """

    scheme: ClassVar[ModuleType] = ternary
    quantized: ClassVar[str] = "ternary"
    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, *args: Any, norm_eps: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rms_norm = _norm(self.in_features, norm_eps, self.weight.device, self.dtype)
        if self.rms_norm is not None:
            self.rms_norm.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, norm_eps: float | None = None, **kwargs: Any) -> Self:
        """As PackedLinear.from_linear; the norm is that of a BitLinear that has one, else a new one with `norm_eps`."""
        packed = super().from_linear(linear, **kwargs)
        if (norm := getattr(linear, "rms_norm", None)) is not None:
            packed.rms_norm = copy.deepcopy(norm).to(packed.weight.device)
        else:
            packed.rms_norm = _norm(packed.in_features, norm_eps, packed.weight.device, packed.dtype)
        return packed.requires_grad_(False)


class MasterWeight(nn.Module):
    """Base of layers that train a float `weight` and cache its codes until it changes (quant/weight_cache.py)."""

    weight: Tensor  # a Parameter
    used: bool
    blend: float = 1.0
    """λ of the warm-up, from floats, 0, to codes, 1, for weight and activations. See `set_blend`."""

    def mark_used(self) -> None:
        """Record that the weight was used in a forward pass; a fused path that bypasses `forward` must call it."""
        self.used = True

    def cached_bytes(self) -> int:
        """Bytes of the codes that are cached until the next optimizer step."""
        return kept_bytes([self.weight])

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:  # averaged weights are swapped in through `.data` around an evaluation
            weights_changed()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        forget([self.weight])
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        weights_changed()


class FakeQuantLinear(MasterWeight, nn.Linear):
    """A linear with a float master weight that is quantized in the forward pass; gradients go straight through.

    The codes are computed once per optimizer step and cached until the next (quant/weight_cache.py).
    """

    scheme: ClassVar[ModuleType]
    quantized: ClassVar[str]
    rms_norm: nn.RMSNorm | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.used, self.rms_norm = False, None
        if (reason := self.scheme.unfit(self.weight.shape)) is not None:
            raise ValueError(reason)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, device: torch.device | str | None = None, **options: bool) -> Self:
        """A layer that trains the weight of `linear`: it takes over the same Parameters, unless they move to `device`.

        Raises ValueError for a layer that is quantized already, and for a shape or dtype that the scheme does not support.
        """
        _refuse(linear, cls.scheme)
        features = (linear.in_features, linear.out_features)
        layer = cls(*features, linear.bias is not None, device="meta", dtype=linear.weight.dtype, **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        return layer if device is None else layer.to(device)

    @property
    def arithmetic(self) -> str:
        """The key of `quant.ops.ARITHMETIC` for this layer."""
        return self.quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the forward pass uses it, (out, in), in `dtype` (default: the master's), without a gradient."""
        shape = (self.out_features, self.in_features)
        with torch.no_grad():
            if self.blend != 1:
                return _blended_weight(self.arithmetic, self.weight, self.blend, dtype or self.weight.dtype)
            return operators.dequantize(self.arithmetic, [self.weight], False, *shape, dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) in fp32, bf16 or fp16 → (…, out) in the same dtype; under autocast in autocast's, as F.linear."""
        self.mark_used()
        if self.blend != 1:
            return _multiply_blended(self, x)
        return _multiply(self, x, master=self.weight, parts=())


class BitLinear(FakeQuantLinear):
    """The linear of BitNet b1.58: ternary weights, int8 activations by token, a float master weight. out_features: 4 · n.

    The Era of 1-bit LLMs, arXiv 2402.17764, section 2. The backward pass saves int8 activations and scales, no floats. With
    `norm_eps` the layer has its own RMSNorm, fused with the quantization (`use_rms_norm` of transformers' bitnet layers).
    """

    scheme: ClassVar[ModuleType] = ternary
    quantized: ClassVar[str] = "ternary"

    def __init__(self, *args: Any, norm_eps: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rms_norm = _norm(self.in_features, norm_eps, self.weight.device, self.weight.dtype)

    def codes(self) -> tuple[Tensor, Tensor]:
        """The packed codes of the current weight, uint8 (out/4, in), and their scale, fp32 (), the s that divides.

        They are the ones that the forward pass caches until the next optimizer step: do not write to them.
        """
        parts = cached(self.weight, self.arithmetic, lambda w: tuple(ARITHMETIC[self.arithmetic].pack(w)), frozen=False)
        packed = ternary.of_parts(parts, self.weight.shape)
        return packed.codes, packed.scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, norm_eps: float | None = None, **kwargs: Any) -> Self:
        layer = super().from_linear(linear, **kwargs)
        layer.rms_norm = _norm(layer.in_features, norm_eps, layer.weight.device, layer.weight.dtype)
        return layer


class FakeNF4Linear(FakeQuantLinear):
    """NF4-aware training: the forward pass uses the master weight quantized to NF4."""

    scheme: ClassVar[ModuleType] = nf4
    quantized: ClassVar[str] = "nf4"

    def __init__(self, *args: Any, double: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.double_quantized = double

    @property
    def arithmetic(self) -> str:
        return "nf4-double" if self.double_quantized else "nf4"
