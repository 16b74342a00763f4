"""The packed linear: frozen codes and scales, no float weight; adapters go on top.

Nothing here is a special tensor class. Codes and scales are frozen uint8 `nn.Parameter`s, the fp32 scales as their raw
bytes, so that `.to(dtype)`, `.half()` or a model-wide cast cannot change them, and sharding, deepcopy and `meta` treat
them like any parameter. The weight exists in floats only while a multiplication runs: the backward pass dequantizes it
again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import backends, nf4

# A large weight is dequantized and multiplied in slices on the CPU. glibc gives blocks of 32 MB and more back to the
# system at once, so that each would pay for its page faults anew; slices are reused. Measured at 4096 × 4096 bf16,
# forward and backward, one core: 45 → 19 ms with 32 tokens, 195 → 179 ms with 1024 (a float layer: 11 and 162). Below
# 32 MB there was no clear gain (2048 × 5632: 17.5 → 14.6 ms in one run, 10.1 → 11.3 ms in another).
SLICE_FROM = 32 * 2**20
SLICE_BYTES = 8 * 2**20


def _slices(packed: nf4.NF4Tensor, dtype: torch.dtype, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """The dequantized weight (out, in) in slices along `dim`, each with its place; one slice but for large CPU weights.

    Cut along the dimension that a product keeps (rows forward, columns backward), every sum stays whole: nothing is
    rounded that was not rounded before.
    """
    out_features, in_features = packed.shape
    backend = backends.select(packed.codes.device)
    scales = backend.scales(packed)
    size = packed.shape.numel() * dtype.itemsize
    sliced = packed.codes.device.type == "cpu" and size >= SLICE_FROM and in_features % packed.block == 0
    count = -(-size // SLICE_BYTES) if sliced else 1
    if count == 1:
        weight = backend.dequantize(packed.codes, scales, packed.shape.numel(), packed.block, dtype)
        yield slice(None), weight.view(out_features, in_features)
        return
    codes, scales = packed.codes.view(out_features, -1), scales.view(out_features, -1)
    unit = 1 if dim == 0 else packed.block  # columns are cut where blocks end
    step = -(-packed.shape[dim] // unit // count) * unit
    for start in range(0, packed.shape[dim], step):
        stop = min(start + step, packed.shape[dim])
        if dim == 0:
            shape, part, part_scales = (stop - start, in_features), codes[start:stop], scales[start:stop]
        else:
            shape, part = (out_features, stop - start), codes[:, start // 2 : stop // 2]
            part_scales = scales[:, start // packed.block : stop // packed.block]
        numel = shape[0] * shape[1]
        flat = backend.dequantize(part.reshape(-1), part_scales.reshape(-1), numel, packed.block, dtype)
        yield slice(start, stop), flat.view(shape)


def dequantize(packed: nf4.NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `packed` stands for, (out, in) in `dtype`, by the selected backend."""
    backend = backends.select(packed.codes.device)
    scales = backend.scales(packed)
    return backend.dequantize(packed.codes, scales, packed.shape.numel(), packed.block, dtype).view(packed.shape)


class _PackedLinear(torch.autograd.Function):
    """x (n, in) · Wᵀ + bias → (n, out); saves references to the packed tensors and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: torch.Size,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(codes, absmax, nested_absmax, offset)
        ctx.shape, ctx.block, ctx.dtype = shape, block, x.dtype
        packed = nf4.NF4Tensor(codes, absmax, nested_absmax, offset, shape, block)
        out = None
        for rows, weight in _slices(packed, x.dtype, dim=0):
            part = F.linear(x, weight, None if bias is None else bias[rows])
            if rows == slice(None):
                return part
            if out is None:
                out = x.new_empty(x.shape[0], shape[0])
            out[:, rows] = part
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            codes, absmax, nested_absmax, offset = ctx.saved_tensors
            packed = nf4.NF4Tensor(codes, absmax, nested_absmax, offset, ctx.shape, ctx.block)
            for columns, weight in _slices(packed, ctx.dtype, dim=1):
                part = grad @ weight
                if columns == slice(None):
                    grad_x = part
                    break
                if grad_x is None:
                    grad_x = grad.new_empty(grad.shape[0], ctx.shape[1])
                grad_x[:, columns] = part
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0)
        return grad_x, grad_bias, None, None, None, None, None, None


def _bytes(scales: Tensor) -> nn.Parameter:
    """fp32 of any shape → its bytes, uint8 (4 · numel,), frozen."""
    return _frozen(scales.reshape(-1).contiguous().view(torch.uint8))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _floats(raw: Tensor) -> Tensor:
    """The inverse of `_bytes`: fp32 (numel / 4,), a view where the bytes are aligned."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is kept in NF4; computes in the dtype of its input.

    `weight`: the codes, uint8 (ceil(out·in/2), 1). `absmax`: uint8 (blocks,), nested codes, or the bytes of fp32 scales
    without double quantization; `nested_absmax` and `offset`: bytes of fp32, or None. `dtype`: the float dtype that
    stands for this layer in its model (the source's; follows `.to(dtype)`), used for the bias and when the layer is
    turned back into floats. Uninitialised until `from_linear` or `load_state_dict`.
    """

    quantized: ClassVar[str] = "nf4"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        double: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.used = False
        code_bytes, blocks, nested_blocks = nf4.sizes(in_features * out_features)

        def empty(*shape: int) -> nn.Parameter:
            return _frozen(torch.empty(shape, dtype=torch.uint8, device=device))

        self.weight = empty(code_bytes, 1)
        self.absmax = empty(blocks if double else 4 * blocks)
        self.nested_absmax = empty(4 * nested_blocks) if double else None
        self.offset = empty(4) if double else None
        self.bias = _frozen(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, double: bool = True, device: torch.device | str | None = None) -> NF4Linear:
        """Pack `linear` (quantized where it is), then move the result to `device`; `linear` is left as it was.

        Raises ValueError for a layer that is already packed, and for weights that NF4 refuses.
        """
        if (mark := getattr(linear, "quantized", None)) is not None:
            raise ValueError(f"this layer is already {mark}: refuse to quantize twice, requantizing loses accuracy")
        weight, bias = linear.weight, linear.bias
        if weight.dtype not in nf4.SOURCES:
            raise ValueError(f"{type(linear).__name__} holds {weight.dtype}, not fp32, bf16 or fp16: is it already quantized?")
        packed = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            double=double,
            device="meta",
            dtype=weight.dtype,
        )
        packed.train(linear.training)
        if weight.is_meta:
            return packed
        source = nf4.quantize(weight, double=double)
        packed.weight = _frozen(source.codes)
        packed.absmax = _frozen(source.absmax) if source.double else _bytes(source.absmax)
        if source.nested_absmax is not None and source.offset is not None:
            packed.nested_absmax, packed.offset = _bytes(source.nested_absmax), _bytes(source.offset)
        if bias is not None:
            packed.bias = _frozen(bias.detach().clone())
        return packed if device is None else packed.to(device)

    @property
    def double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def packed(self) -> nf4.NF4Tensor:
        """The weight as the scheme knows it; views of this layer's parameters."""
        shape = torch.Size((self.out_features, self.in_features))
        if self.nested_absmax is None or self.offset is None:
            return nf4.NF4Tensor(self.weight, _floats(self.absmax), None, None, shape)
        nested, offset = _floats(self.nested_absmax), _floats(self.offset).view(())
        return nf4.NF4Tensor(self.weight, self.absmax, nested, offset, shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floats, (out, in), in `dtype` (default: the layer's), without a gradient."""
        with torch.no_grad():
            return dequantize(self.packed, dtype or self.dtype)

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
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # `meta` has no autocast to ask
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in nf4.SOURCES:
            raise TypeError(f"NF4Linear computes in fp32, bf16 or fp16, got an input of {x.dtype}")
        packed = self.packed
        out = _PackedLinear.apply(
            x.reshape(-1, self.in_features),
            None if self.bias is None else self.bias.to(x.dtype),
            packed.codes,
            packed.absmax,
            packed.nested_absmax,
            packed.offset,
            packed.shape,
            packed.block,
        )
        return out.view(*x.shape[:-1], self.out_features)

    def mark_used(self) -> None:
        """Note that the weight took part in a forward pass; a fused path that bypasses `forward` calls this itself."""
        self.used = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # so that the layer knows its model's dtype after a cast
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme=nf4, double={self.double_quantized}"
        )
