"""Torch operators of quantized linears: one set for every scheme, opaque to `torch.compile`.

    activations       x → quantized activations (int8 codes, scales), the factor of the product that backward needs too
    norm_activations  the same for RMSNorm(x), in one pass if the backend can, and 1 / root mean square
    linear            activations · Wᵀ + bias → y
    grad_input        grad · W → the gradient of x
    linear_onto, grad_onto   the same for a frozen layer, accumulated onto the output of an adapter
    grad_weight       gradᵀ · activations → the gradient of a master weight, straight-through
    dequantize        W in floats

W is passed as it is stored: the packed parts of a frozen layer, or [master weight] of a trained one. A master weight is
quantized inside, once per optimizer step (quant/weight_cache.py), so that no graph captures the codes as a constant.

Operators see plain tensors, so that there are no graph breaks, and each has a fake implementation for `meta` and fake
tensors. Inputs and gradients may have any leading dimensions; the scheme's arithmetic, which calls the backend that
quant/backends selects, sees matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quant import backends, nf4, ternary
from quant.weight_cache import cached

# A large NF4 weight is dequantized and multiplied in slices on the CPU. glibc returns blocks of 32 MB and more to the
# system at once, so that each would cause page faults again; slices are reused, and stay in the caches. Measured at
# 4096 × 4096 bf16, forward and input gradient, one core, against a float layer: 1.01 with 1,024 tokens (1.03 with slices of
# 8 MB, 1.06 through one resident buffer), 1.33 with 32 tokens. Below 32 MB slices were no clear gain.
SLICE_FROM = 32 * 2**20
SLICE_BYTES = 4 * 2**20


class Arithmetic(Protocol):
    """A scheme's implementation of the operators; `weight` is the packed parts, in the order of a packed linear."""

    integer: bool
    """Whether activations are int8: then it has `activations` and `norm_activations` too. Otherwise x is used as it is."""

    def pack(self, master: Tensor) -> list[Tensor]: ...
    def linear(
        self,
        activations: Sequence[Tensor],
        bias: Tensor | None,
        weight: Sequence[Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        frozen: bool,
    ) -> Tensor: ...
    def grad_input(self, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> Tensor: ...
    def linear_onto(self, y: Tensor, x: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None: ...
    def grad_onto(self, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None: ...
    def grad_weight(self, grad: Tensor, activations: Sequence[Tensor]) -> Tensor: ...
    def dequantize(self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class NF4Arithmetic:
    """Only weights are quantized: dequantize, then multiply in floats."""

    double: bool
    integer = False

    def pack(self, master: Tensor) -> list[Tensor]:
        return nf4.quantize(master, double=self.double).parts()

    def linear(
        self,
        activations: Sequence[Tensor],
        bias: Tensor | None,
        weight: Sequence[Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        frozen: bool,
    ) -> Tensor:
        x, y = activations[0].to(dtype), None
        backend = backends.select(x.device)
        if 0 < x.shape[0] <= getattr(backend, "FEW", 0) and shape[1] % nf4.BLOCK == 0:
            y = cast(Any, backend).linear(x, nf4.of_parts(weight, shape))
            return y if bias is None else y.add_(bias)
        for columns, floats in self._slices(weight, shape, dtype, dim=0):
            if columns == slice(None):
                return F.linear(x, floats, bias)
            y = x.new_empty(x.shape[0], shape[0]) if y is None else y
            if bias is None:
                torch.mm(x, floats.t(), out=y[:, columns])
            else:
                torch.addmm(bias[columns], x, floats.t(), out=y[:, columns])
        assert y is not None
        return y

    def grad_input(self, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> Tensor:
        grad_x = None
        for columns, floats in self._slices(weight, shape, grad.dtype, dim=1):
            if columns == slice(None):
                return grad @ floats
            grad_x = grad.new_empty(grad.shape[0], shape[1]) if grad_x is None else grad_x
            torch.mm(grad, floats, out=grad_x[:, columns])
        assert grad_x is not None
        return grad_x

    def linear_onto(self, y: Tensor, x: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        for columns, floats in self._slices(weight, shape, y.dtype, dim=0):
            torch.addmm(y[:, columns], x, floats.t(), out=y[:, columns])

    def grad_onto(self, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        for columns, floats in self._slices(weight, shape, grad_x.dtype, dim=1):
            torch.addmm(grad_x[:, columns], grad, floats, out=grad_x[:, columns])

    def grad_weight(self, grad: Tensor, activations: Sequence[Tensor]) -> Tensor:
        return grad.t() @ activations[0].to(grad.dtype)

    def dequantize(self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        packed = nf4.of_parts(weight, shape)
        backend = backends.select(packed.codes.device)
        if (fused := getattr(backend, "dequantize_packed", None)) is not None:
            return cast(Tensor, fused(packed, dtype))
        return backend.dequantize(packed.codes, backend.scales(packed), shape.numel(), packed.block, dtype).view(shape)

    def _slices(
        self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype, dim: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """The dequantized weight (out, in) in slices along `dim`, each with its range; a single one except for large CPU weights.

        Slices run along the dimension that a product keeps (rows forward, columns backward), so every sum stays complete
        and slicing adds no rounding.
        """
        packed, size = nf4.of_parts(weight, shape), shape.numel() * dtype.itemsize
        if not (packed.codes.device.type == "cpu" and size >= SLICE_FROM and shape[1] % packed.block == 0):
            yield slice(None), self.dequantize(weight, shape, dtype)
            return
        backend = backends.select(packed.codes.device)
        codes, scales = packed.codes.view(shape[0], -1), backend.scales(packed).view(shape[0], -1)
        unit = 1 if dim == 0 else packed.block  # columns are cut where blocks end
        step = -(-shape[dim] // unit // -(-size // SLICE_BYTES)) * unit
        for start in range(0, shape[dim], step):
            stop = min(start + step, shape[dim])
            if dim == 0:
                cut, part, part_scales = (stop - start, shape[1]), codes[start:stop], scales[start:stop]
            else:
                cut, part = (shape[0], stop - start), codes[:, start // 2 : stop // 2]
                part_scales = scales[:, start // packed.block : stop // packed.block]
            flat = backend.dequantize(part.reshape(-1), part_scales.reshape(-1), cut[0] * cut[1], packed.block, dtype)
            yield slice(start, stop), flat.view(cut)


@dataclass(frozen=True)
class TernaryArithmetic:
    """Weights, activations and their product are integers; scales are applied in floats."""

    integer = True

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return backends.select(x.device, scheme="ternary").quantize_activations(x)

    def norm_activations(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        backend = backends.select(x.device, scheme="ternary")
        if (fused := getattr(backend, "norm_quantize_activations", None)) is not None:
            return cast(tuple[Tensor, Tensor, Tensor], fused(x, weight, eps))
        normed, inverse = ternary.rms_norm(x, weight, eps)
        return *backend.quantize_activations(normed), inverse

    def pack(self, master: Tensor) -> list[Tensor]:
        codes, scale = backends.select(master.device, scheme="ternary").quantize_weight(master)
        return ternary.TernaryTensor(codes, scale, master.shape).parts()

    def linear(
        self,
        activations: Sequence[Tensor],
        bias: Tensor | None,
        weight: Sequence[Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        frozen: bool,
    ) -> Tensor:
        backend = backends.select(activations[0].device, scheme="ternary")
        packed = ternary.of_parts(weight, shape)
        y = backend.linear(activations[0], activations[1], packed.codes, packed.scale, dtype, frozen=frozen)
        return y if bias is None else y.add_(bias)

    def grad_input(self, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> Tensor:
        return grad @ self.dequantize(weight, shape, grad.dtype)

    def linear_onto(self, y: Tensor, x: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        y += self.linear(self.activations(x), None, weight, shape, y.dtype, frozen=True)

    def grad_onto(self, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        grad_x.addmm_(grad, self.dequantize(weight, shape, grad.dtype))

    def grad_weight(self, grad: Tensor, activations: Sequence[Tensor]) -> Tensor:
        return grad.t() @ ternary.dequantize_activations(activations[0], activations[1], dtype=grad.dtype)

    def dequantize(self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        packed = ternary.of_parts(weight, shape)
        return backends.select(weight[0].device, scheme="ternary").dequantize(packed.codes, packed.scale, dtype)


ARITHMETIC: dict[str, Arithmetic] = {
    "nf4": NF4Arithmetic(double=False),
    "nf4-double": NF4Arithmetic(double=True),
    "ternary": TernaryArithmetic(),
}


# ---------------------------------------------------------------------------------------------------------- the operators

_LIBRARY = torch.library.Library("quant12g", "DEF")
_LIBRARY.define("activations(str scheme, Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define("norm_activations(str scheme, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "linear(str scheme, Tensor[] activations, Tensor? bias, Tensor[] weight, bool frozen, int out, int inner, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.define("grad_input(str scheme, Tensor grad, Tensor[] weight, bool frozen, int out, int inner) -> Tensor")
_LIBRARY.define("linear_onto(str scheme, Tensor(a!) y, Tensor x, Tensor[] weight) -> ()")
_LIBRARY.define("grad_onto(str scheme, Tensor(a!) grad_x, Tensor grad, Tensor[] weight) -> ()")
_LIBRARY.define("grad_weight(str scheme, Tensor grad, Tensor[] activations) -> Tensor")
_LIBRARY.define("dequantize(str scheme, Tensor[] weight, bool frozen, int out, int inner, ScalarType dtype) -> Tensor")


def _integer(scheme: str) -> TernaryArithmetic:
    return cast(TernaryArithmetic, ARITHMETIC[scheme])


def _activations(scheme: str, x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _integer(scheme).activations(_matrix(x))
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def _norm_activations(scheme: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, inverse = _integer(scheme).norm_activations(_matrix(x), weight, eps)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1), inverse.view(*x.shape[:-1], 1)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _with_lead(matrix: Tensor, lead: torch.Size) -> Tensor:
    """(n, features) → (…, features); not a view to autograd and FSDP, because nothing else refers to the matrix."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(matrix, (*lead, matrix.shape[-1])))


def _weight(scheme: str, weight: Sequence[Tensor], frozen: bool) -> Sequence[Tensor]:
    return weight if frozen else cached(weight[0], scheme, lambda w: tuple(ARITHMETIC[scheme].pack(w)), frozen=False)


def _linear(
    scheme: str,
    activations: Sequence[Tensor],
    bias: Tensor | None,
    weight: Sequence[Tensor],
    frozen: bool,
    out: int,
    inner: int,
    dtype: torch.dtype,
) -> Tensor:
    packed, flat = _weight(scheme, weight, frozen), [_matrix(one) for one in activations]
    y = ARITHMETIC[scheme].linear(flat, bias, packed, torch.Size((out, inner)), dtype, frozen=frozen)
    return _with_lead(y, activations[0].shape[:-1])


def _grad_input(scheme: str, grad: Tensor, weight: Sequence[Tensor], frozen: bool, out: int, inner: int) -> Tensor:
    packed = _weight(scheme, weight, frozen)
    return _with_lead(ARITHMETIC[scheme].grad_input(_matrix(grad), packed, torch.Size((out, inner))), grad.shape[:-1])


def _linear_onto(scheme: str, y: Tensor, x: Tensor, weight: Sequence[Tensor]) -> None:
    ARITHMETIC[scheme].linear_onto(y, x, weight, torch.Size((y.shape[1], x.shape[1])))


def _grad_onto(scheme: str, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor]) -> None:
    ARITHMETIC[scheme].grad_onto(grad_x, grad, weight, torch.Size((grad.shape[1], grad_x.shape[1])))


def _fake_onto(scheme: str, y: Tensor, x: Tensor, weight: Sequence[Tensor]) -> None:
    return None


def _grad_weight(scheme: str, grad: Tensor, activations: Sequence[Tensor]) -> Tensor:
    return ARITHMETIC[scheme].grad_weight(_matrix(grad), [_matrix(one) for one in activations])


def _dequantize(scheme: str, weight: Sequence[Tensor], frozen: bool, out: int, inner: int, dtype: torch.dtype) -> Tensor:
    return ARITHMETIC[scheme].dequantize(_weight(scheme, weight, frozen), torch.Size((out, inner)), dtype)


def _fake_activations(scheme: str, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _fake_norm_activations(scheme: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = _fake_activations(scheme, x)
    return codes, scales, torch.empty_like(scales)


def _fake_linear(
    scheme: str,
    activations: Sequence[Tensor],
    bias: Tensor | None,
    weight: Sequence[Tensor],
    frozen: bool,
    out: int,
    inner: int,
    dtype: torch.dtype,
) -> Tensor:
    return activations[0].new_empty(*activations[0].shape[:-1], out, dtype=dtype)


def _fake_grad_input(scheme: str, grad: Tensor, weight: Sequence[Tensor], frozen: bool, out: int, inner: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], inner)


def _fake_grad_weight(scheme: str, grad: Tensor, activations: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(grad.shape[-1], activations[0].shape[-1])


def _fake_dequantize(scheme: str, weight: Sequence[Tensor], frozen: bool, out: int, inner: int, dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty(out, inner, dtype=dtype)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off inside an operator, where it would round the integers of a product."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        device_type = (args[1] if isinstance(args[1], Tensor) else args[1][0]).device.type
        if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
            return function(*args)
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call


for _name, _function, _fake in (
    ("activations", _activations, _fake_activations),
    ("norm_activations", _norm_activations, _fake_norm_activations),
    ("linear", _linear, _fake_linear),
    ("grad_input", _grad_input, _fake_grad_input),
    ("linear_onto", _linear_onto, _fake_onto),
    ("grad_onto", _grad_onto, _fake_onto),
    ("grad_weight", _grad_weight, _fake_grad_weight),
    ("dequantize", _dequantize, _fake_dequantize),
):
    _LIBRARY.impl(_name, _without_autocast(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant12g::{_name}", _fake, lib=_LIBRARY)

operators: Any = torch.ops.quant12g
