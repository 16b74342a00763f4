"""The two linears: packed (frozen codes, no float weight) and fake-quantized (a float master weight, straight-through).

                          trained: fake-quantized           frozen: packed
    scheme nf4            FakeNF4Linear                     NF4Linear, the base of QLoRA
    scheme ternary        BitLinear, BitNet b1.58           PackedBitLinear

A linear knows nothing of a format's bits: the scheme (quant/nf4.py, quant/ternary.py) quantizes and lays out, the operators
(quant/ops.py) multiply. Both share one autograd function, since they differ in two things only: where the codes come from,
and whether there is a master weight to give a gradient to.

Nothing here is a special tensor class. Packed parts are frozen uint8 `nn.Parameter`s, scales as their raw bytes, so that
`.to(dtype)`, `.half()` or a model-wide cast cannot change them, and sharding, deepcopy and `meta` treat them like any
parameter. A weight exists in floats only while a multiplication runs; the backward pass dequantizes it again, and of the
input it keeps what the scheme multiplied with: nothing for a frozen layer, int8 codes where the product was taken of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quant import nf4, ternary
from quant.derived import forget, kept_bytes, weights_changed
from quant.ops import ARITHMETIC, operators


class _Linear(torch.autograd.Function):
    """x (…, in) · Wᵀ + bias → y (…, out) in `dtype`; the gradients are those of the straight-through definition.

        y = q(x) · q(W)ᵀ + bias      ∂x = ∂y · q(W)      ∂W = ∂yᵀ · q(x)      (q: quantized and dequantized, slope 1)

    With a norm, x is normalized first: RMSNorm's gradient follows, and x itself is kept for it.

    Straight-through: Bengio et al., arXiv 1308.3432; BitNet, arXiv 2310.11453, section 2.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        eps: float,
        scheme: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *weight: Tensor,
    ) -> Tensor:
        y, rows, before_norm = _product(x, bias, norm, eps, scheme, shape, dtype, weight)
        ctx.scheme, ctx.shape, ctx.frozen, ctx.x_dtype = scheme, shape, _is_packed(weight), x.dtype
        ctx.parts, ctx.kept = len(weight), 0 if ctx.frozen or not weight[0].requires_grad else len(rows)
        ctx.save_for_backward(*weight, *rows[: ctx.kept], *before_norm)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, end = ctx.saved_tensors, ctx.parts + ctx.kept
        weight, rows, before_norm = saved[: ctx.parts], saved[ctx.parts : end], saved[end:]
        grad_x = grad_bias = grad_norm = grad_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_x = operators.grad_input(ctx.scheme, grad, weight, ctx.frozen, *ctx.shape)
            if before_norm:
                grad_x, grad_norm = _norm_gradients(grad_x, *before_norm)
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, ctx.shape[0]).sum(0)
        if rows:
            grad_weight = operators.grad_weight(ctx.scheme, grad, rows).to(weight[0].dtype)
        return grad_x, grad_bias, grad_norm, None, None, None, None, grad_weight, *[None] * (len(weight) - 1)


def _is_packed(weight: Sequence[Tensor]) -> bool:
    return weight[0].dtype == torch.uint8


def _product(
    x: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    scheme: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor], tuple[Tensor, ...]]:
    """y, what of the input the gradient of the weight needs, and what of it the gradient of the norm needs."""
    rows: Sequence[Tensor] = (x,)
    before_norm: tuple[Tensor, ...] = ()
    if norm is not None:
        *rows, inverse = operators.norm_rows(scheme, x, norm, eps)
        before_norm = x, inverse, norm
    elif ARITHMETIC[scheme].integer:
        rows = operators.rows(scheme, x)
    return operators.linear(scheme, rows, bias, weight, _is_packed(weight), *shape, dtype), rows, before_norm


def _norm_gradients(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of RMSNorm's output → of its input, and of its weight; in fp32."""
    normed, scaled = x.float() * inverse, grad.float() * weight.float()
    grad_x = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x, (grad.float() * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _multiply(
    x: Tensor,
    bias: Tensor | None,
    scheme: str,
    shape: tuple[int, int],
    weight: list[Tensor],
    norm: nn.RMSNorm | None = None,
) -> Tensor:
    """x (…, in) → (…, out), in the dtype of x, or in autocast's where that is on; normalized before, where there is a norm."""
    dtype, kind = x.dtype, x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # `meta` has no autocast to ask
        dtype = torch.get_autocast_dtype(kind)
    if dtype not in nf4.SOURCES or x.dtype not in nf4.SOURCES:
        raise TypeError(f"a quantized linear computes in fp32, bf16 or fp16, got an input of {x.dtype}")
    if x.shape[-1:] != shape[1:]:
        raise ValueError(f"this linear takes inputs of {shape[1]} features, got shape {tuple(x.shape)}")
    bias = None if bias is None else bias.to(dtype)
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps or 0.0)
    if not torch.is_grad_enabled():  # autograd's bookkeeping costs as much as a small product
        return _product(x, bias, gain, eps, scheme, shape, dtype, weight)[0]
    y: Tensor = _Linear.apply(x, bias, gain, eps, scheme, shape, dtype, *weight)
    return y


def _refuse(linear: nn.Module, scheme: ModuleType) -> None:
    """Raise ValueError for what must not be quantized by `scheme`: what is quantized already, and what does not fit."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if (mark := getattr(linear, "quantized", None)) is not None:
        raise ValueError(f"this layer is already {mark}: refuse to quantize twice, requantizing loses accuracy")
    if weight.dtype not in scheme.SOURCES:
        raise ValueError(f"{type(linear).__name__} holds {weight.dtype}, not fp32, bf16 or fp16: is it already quantized?")
    if (reason := scheme.unfit(weight.shape)) is not None:
        raise ValueError(reason)
    if scheme is ternary and not weight.is_meta and ternary.looks_ternary(weight):
        raise ValueError("these weights are ternary already: a second quantization would keep the codes and shrink the scale")


def _norm(features: int, eps: float | None, device: torch.device, dtype: torch.dtype) -> nn.RMSNorm | None:
    return None if eps is None else nn.RMSNorm(features, eps=eps, device=device, dtype=dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in a scheme's codes; computes in the dtype of its input.

    Its parameters are the scheme's parts, all uint8 (`layout` of quant/nf4.py and quant/ternary.py), and the bias, a frozen
    float. `dtype`: the float dtype that stands for this layer in its model (the source's; follows `.to(dtype)`), used for
    the bias and when the layer is turned back into floats. Uninitialised until `from_linear` or `load_state_dict`.
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
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=torch.uint8, device=device)))
        self.bias = _frozen(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, device: torch.device | str | None = None, **options: bool) -> Self:
        """Pack `linear` (quantized where it is), then move the result to `device`; `linear` is left as it was.

        A fake-quantized linear of the same scheme gives its master weight's codes.

        Raises ValueError for a layer that is packed already, and for weights that the scheme refuses.
        """
        if not (isinstance(linear, FakeQuantLinear) and linear.scheme is cls.scheme):
            _refuse(linear, cls.scheme)
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
        """The packed weight as the scheme knows it (NF4Tensor, TernaryTensor); views of this layer's parameters."""
        return self.scheme.of_parts(self.parts, self.shape)

    @property
    def arithmetic(self) -> str:
        """The row of `quant.ops.ARITHMETIC` that multiplies for this layer."""
        return self.quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floats, (out, in), in `dtype` (default: the layer's), without a gradient."""
        with torch.no_grad():
            return operators.dequantize(self.arithmetic, self.parts, True, *self.shape, dtype or self.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A float `nn.Linear` with the weight that this layer stands for, and its bias."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = _frozen(weight)
        if self.bias is not None:
            linear.bias = _frozen(self.bias.detach().to(weight.dtype, copy=True))
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) in fp32, bf16 or fp16 → (…, out) in the same dtype; under autocast in autocast's, as F.linear."""
        self.mark_used()
        return _multiply(x, self.bias, self.arithmetic, (self.out_features, self.in_features), self.parts, self.rms_norm)

    def mark_used(self) -> None:
        """Note that the weight took part in a forward pass; a fused path that bypasses `forward` calls this itself."""
        self.used = True

    def cached_bytes(self) -> int:
        """Bytes that a backend keeps for this layer beside its parameters: a copy in a layout of its own."""
        return kept_bytes(self.parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # so that the layer knows its model's dtype after a cast
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(PackedLinear):
    """A frozen linear in NF4. `double` (default): the block scales are quantized too, 4.127 bits a weight instead of 4.5."""

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
    """A frozen linear in ternary, 2 bits a weight; activations are quantized to int8 by token. out_features in fours.

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
            packed.rms_norm = copy.deepcopy(norm).requires_grad_(False).to(packed.weight.device)
        else:
            packed.rms_norm = _norm(packed.in_features, norm_eps, packed.weight.device, packed.dtype)
        return packed


class FakeQuantLinear(nn.Linear):
    """A linear with a float master weight that is quantized in the forward pass; gradients go straight through.

    The codes are computed once an optimizer step and found again by every pass until the next (quant/derived.py).
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
        """A layer that trains the weight of `linear`, which it takes over (the same Parameters, unless they move to `device`).

        Raises ValueError for a layer that is quantized already, and for a shape or dtype that the scheme refuses.
        """
        _refuse(linear, cls.scheme)
        features = (linear.in_features, linear.out_features)
        layer = cls(*features, linear.bias is not None, device="meta", dtype=linear.weight.dtype, **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        return layer if device is None else layer.to(device)

    @property
    def arithmetic(self) -> str:
        """The row of `quant.ops.ARITHMETIC` that multiplies for this layer."""
        return self.quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the forward pass uses it, (out, in), in `dtype` (default: the master's), without a gradient."""
        shape = (self.out_features, self.in_features)
        with torch.no_grad():
            return operators.dequantize(self.arithmetic, [self.weight], False, *shape, dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) in fp32, bf16 or fp16 → (…, out) in the same dtype; under autocast in autocast's, as F.linear."""
        self.mark_used()
        return _multiply(x, self.bias, self.arithmetic, (self.out_features, self.in_features), [self.weight], self.rms_norm)

    def mark_used(self) -> None:
        """Note that the weight took part in a forward pass; a fused path that bypasses `forward` calls this itself."""
        self.used = True

    def cached_bytes(self) -> int:
        """Bytes of the codes that are kept until the next optimizer step."""
        return kept_bytes([self.weight])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        forget([self.weight])
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        weights_changed()


class BitLinear(FakeQuantLinear):
    """The linear of BitNet b1.58: ternary weights, int8 activations by token, a float master weight. out_features in fours.

    The Era of 1-bit LLMs, arXiv 2402.17764, section 2. The backward pass keeps the int8 activations and their scales, and
    no float copy of anything. With `norm_eps` the layer has an RMSNorm of its own, `rms_norm`, which is then one pass with
    the quantization (`use_rms_norm` of transformers' bitnet layers); without, normalizing is the model's business.
    """

    scheme: ClassVar[ModuleType] = ternary
    quantized: ClassVar[str] = "ternary"

    def __init__(self, *args: Any, norm_eps: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rms_norm = _norm(self.in_features, norm_eps, self.weight.device, self.weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, norm_eps: float | None = None, **kwargs: Any) -> Self:
        layer = super().from_linear(linear, **kwargs)
        layer.rms_norm = _norm(layer.in_features, norm_eps, layer.weight.device, layer.weight.dtype)
        return layer


class FakeNF4Linear(FakeQuantLinear):
    """NF4-aware training: the forward pass uses what NF4 will make of the master weight."""

    scheme: ClassVar[ModuleType] = nf4
    quantized: ClassVar[str] = "nf4"

    def __init__(self, *args: Any, double: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.double_quantized = double

    @property
    def arithmetic(self) -> str:
        return "nf4-double" if self.double_quantized else "nf4"
