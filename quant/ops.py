"""What a quantized linear computes, as torch operators: one set for every scheme, opaque to `torch.compile`.

    rows         x → what enters the product and is kept for the backward pass, where that is not x itself: int8 codes, scales
    norm_rows    the same of RMSNorm(x), in one pass where the backend can, and 1 / root mean square
    linear       rows · Wᵀ + bias → y
    grad_input   grad · W → the gradient of x
    linear_onto, grad_onto   the same of a frozen layer, added to a matrix that is there: what an adapter gave
    grad_weight  gradᵀ · rows → the gradient of a master weight, straight-through
    dequantize   W in floats

W is given as it is stored: the packed parts of a frozen layer, or [master weight] of one that is trained. A master is
quantized inside, once an optimizer step (quant/weight_cache.py), so that no graph ever holds the codes as a constant.

Operators see plain tensors, so that compiling makes no graph break, and each has a fake implementation, so that `meta`
and fake tensors pass through. Inputs and gradients may have any leading dimensions; the scheme's arithmetic, which goes
to the backend that quant/backends selects, sees matrices.
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

# A large NF4 weight is dequantized and multiplied in slices on the CPU. glibc gives blocks of 32 MB and more back to the
# system at once, so that each would pay for its page faults anew; slices are reused, and stay in the caches. Measured at
# 4096 × 4096 bf16, forward and input gradient, one core, against a float layer: 1.01 with 1,024 tokens (1.03 with slices of
# 8 MB, 1.06 through one resident buffer), 1.33 with 32 tokens. Below 32 MB slices were no clear gain.
SLICE_FROM = 32 * 2**20
SLICE_BYTES = 4 * 2**20


class Arithmetic(Protocol):
    """A scheme's side of the operators; `weight` is packed parts, in the order in which a packed linear stores them."""

    integer: bool
    """Whether the product is taken of int8 rows: then it has `rows` and `norm_rows` too. Otherwise x itself is the one row."""

    def pack(self, master: Tensor) -> list[Tensor]: ...
    def linear(
        self,
        rows: Sequence[Tensor],
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
    def grad_weight(self, grad: Tensor, rows: Sequence[Tensor]) -> Tensor: ...
    def dequantize(self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class NF4Arithmetic:
    """Weights alone are quantized: dequantize, then multiply in floats."""

    double: bool
    integer = False

    def pack(self, master: Tensor) -> list[Tensor]:
        return nf4.quantize(master, double=self.double).parts()

    def linear(
        self,
        rows: Sequence[Tensor],
        bias: Tensor | None,
        weight: Sequence[Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        frozen: bool,
    ) -> Tensor:
        x, y = rows[0].to(dtype), None
        backend = backends.select(x.device)
        if 0 < x.shape[0] <= getattr(backend, "FEW", 0) and shape[1] % nf4.BLOCK == 0:
            y = cast(Any, backend).linear(x, nf4.of_parts(weight, shape))
            return y if bias is None else y.add_(bias)
        for place, floats in self._slices(weight, shape, dtype, dim=0):
            if place == slice(None):
                return F.linear(x, floats, bias)
            y = x.new_empty(x.shape[0], shape[0]) if y is None else y
            if bias is None:
                torch.mm(x, floats.t(), out=y[:, place])
            else:
                torch.addmm(bias[place], x, floats.t(), out=y[:, place])
        assert y is not None
        return y

    def grad_input(self, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> Tensor:
        grad_x = None
        for place, floats in self._slices(weight, shape, grad.dtype, dim=1):
            if place == slice(None):
                return grad @ floats
            grad_x = grad.new_empty(grad.shape[0], shape[1]) if grad_x is None else grad_x
            torch.mm(grad, floats, out=grad_x[:, place])
        assert grad_x is not None
        return grad_x

    def linear_onto(self, y: Tensor, x: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        for place, floats in self._slices(weight, shape, y.dtype, dim=0):
            torch.addmm(y[:, place], x, floats.t(), out=y[:, place])

    def grad_onto(self, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        for place, floats in self._slices(weight, shape, grad_x.dtype, dim=1):
            torch.addmm(grad_x[:, place], grad, floats, out=grad_x[:, place])

    def grad_weight(self, grad: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return grad.t() @ rows[0].to(grad.dtype)

    def dequantize(self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        packed = nf4.of_parts(weight, shape)
        backend = backends.select(packed.codes.device)
        if (fused := getattr(backend, "dequantize_packed", None)) is not None:
            return cast(Tensor, fused(packed, dtype))
        return backend.dequantize(packed.codes, backend.scales(packed), shape.numel(), packed.block, dtype).view(shape)

    def _slices(
        self, weight: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype, dim: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """The dequantized weight (out, in) in slices along `dim`, each with its place; one slice but for large CPU weights.

        Cut along the dimension that a product keeps (rows forward, columns backward), every sum stays whole: nothing is
        rounded that was not rounded before.
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
    """Weights and activations are integers, and so is their product; floats come in with the scales."""

    integer = True

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return backends.select(x.device, scheme="ternary").quantize_rows(x)

    def norm_rows(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        backend = backends.select(x.device, scheme="ternary")
        if (fused := getattr(backend, "norm_quantize_rows", None)) is not None:
            return cast(tuple[Tensor, Tensor, Tensor], fused(x, weight, eps))
        normed, inverse = ternary.rms_norm(x, weight, eps)
        return *backend.quantize_rows(normed), inverse

    def pack(self, master: Tensor) -> list[Tensor]:
        codes, scale = backends.select(master.device, scheme="ternary").quantize_weight(master)
        return ternary.TernaryTensor(codes, scale, master.shape).parts()

    def linear(
        self,
        rows: Sequence[Tensor],
        bias: Tensor | None,
        weight: Sequence[Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        frozen: bool,
    ) -> Tensor:
        backend = backends.select(rows[0].device, scheme="ternary")
        packed = ternary.of_parts(weight, shape)
        y = backend.linear(rows[0], rows[1], packed.codes, packed.scale, dtype, frozen=frozen)
        return y if bias is None else y.add_(bias)

    def grad_input(self, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> Tensor:
        return grad @ self.dequantize(weight, shape, grad.dtype)

    def linear_onto(self, y: Tensor, x: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        y += self.linear(self.rows(x), None, weight, shape, y.dtype, frozen=True)

    def grad_onto(self, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor], shape: torch.Size) -> None:
        grad_x.addmm_(grad, self.dequantize(weight, shape, grad.dtype))

    def grad_weight(self, grad: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return grad.t() @ ternary.dequantize_rows(rows[0], rows[1], dtype=grad.dtype)

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
_LIBRARY.define("rows(str scheme, Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define("norm_rows(str scheme, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "linear(str scheme, Tensor[] rows, Tensor? bias, Tensor[] weight, bool frozen, int out, int inner, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.define("grad_input(str scheme, Tensor grad, Tensor[] weight, bool frozen, int out, int inner) -> Tensor")
_LIBRARY.define("linear_onto(str scheme, Tensor(a!) y, Tensor x, Tensor[] weight) -> ()")
_LIBRARY.define("grad_onto(str scheme, Tensor(a!) grad_x, Tensor grad, Tensor[] weight) -> ()")
_LIBRARY.define("grad_weight(str scheme, Tensor grad, Tensor[] rows) -> Tensor")
_LIBRARY.define("dequantize(str scheme, Tensor[] weight, bool frozen, int out, int inner, ScalarType dtype) -> Tensor")


def _integer(scheme: str) -> TernaryArithmetic:
    return cast(TernaryArithmetic, ARITHMETIC[scheme])


def _rows(scheme: str, x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _integer(scheme).rows(_matrix(x))
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def _norm_rows(scheme: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, inverse = _integer(scheme).norm_rows(_matrix(x), weight, eps)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1), inverse.view(*x.shape[:-1], 1)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _with_lead(matrix: Tensor, lead: torch.Size) -> Tensor:
    """(n, features) → (…, features). Not a view, as far as autograd and FSDP are concerned: nobody else has the matrix."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(matrix, (*lead, matrix.shape[-1])))


def _weight(scheme: str, weight: Sequence[Tensor], frozen: bool) -> Sequence[Tensor]:
    return weight if frozen else cached(weight[0], scheme, lambda w: tuple(ARITHMETIC[scheme].pack(w)), frozen=False)


def _linear(
    scheme: str,
    rows: Sequence[Tensor],
    bias: Tensor | None,
    weight: Sequence[Tensor],
    frozen: bool,
    out: int,
    inner: int,
    dtype: torch.dtype,
) -> Tensor:
    packed, flat = _weight(scheme, weight, frozen), [_matrix(row) for row in rows]
    y = ARITHMETIC[scheme].linear(flat, bias, packed, torch.Size((out, inner)), dtype, frozen=frozen)
    return _with_lead(y, rows[0].shape[:-1])


def _grad_input(scheme: str, grad: Tensor, weight: Sequence[Tensor], frozen: bool, out: int, inner: int) -> Tensor:
    packed = _weight(scheme, weight, frozen)
    return _with_lead(ARITHMETIC[scheme].grad_input(_matrix(grad), packed, torch.Size((out, inner))), grad.shape[:-1])


def _linear_onto(scheme: str, y: Tensor, x: Tensor, weight: Sequence[Tensor]) -> None:
    ARITHMETIC[scheme].linear_onto(y, x, weight, torch.Size((y.shape[1], x.shape[1])))


def _grad_onto(scheme: str, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor]) -> None:
    ARITHMETIC[scheme].grad_onto(grad_x, grad, weight, torch.Size((grad.shape[1], grad_x.shape[1])))


def _fake_onto(scheme: str, y: Tensor, x: Tensor, weight: Sequence[Tensor]) -> None:
    return None


def _grad_weight(scheme: str, grad: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return ARITHMETIC[scheme].grad_weight(_matrix(grad), [_matrix(row) for row in rows])


def _dequantize(scheme: str, weight: Sequence[Tensor], frozen: bool, out: int, inner: int, dtype: torch.dtype) -> Tensor:
    return ARITHMETIC[scheme].dequantize(_weight(scheme, weight, frozen), torch.Size((out, inner)), dtype)


def _fake_rows(scheme: str, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _fake_norm_rows(scheme: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = _fake_rows(scheme, x)
    return codes, scales, torch.empty_like(scales)


def _fake_linear(
    scheme: str,
    rows: Sequence[Tensor],
    bias: Tensor | None,
    weight: Sequence[Tensor],
    frozen: bool,
    out: int,
    inner: int,
    dtype: torch.dtype,
) -> Tensor:
    return rows[0].new_empty(*rows[0].shape[:-1], out, dtype=dtype)


def _fake_grad_input(scheme: str, grad: Tensor, weight: Sequence[Tensor], frozen: bool, out: int, inner: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], inner)


def _fake_grad_weight(scheme: str, grad: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(grad.shape[-1], rows[0].shape[-1])


def _fake_dequantize(scheme: str, weight: Sequence[Tensor], frozen: bool, out: int, inner: int, dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty(out, inner, dtype=dtype)


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast reaches into operators, and would round the integers of a product: inside it is off."""

    @functools.wraps(function)
    def plainly(*args: Any) -> Any:
        kind = (args[1] if isinstance(args[1], Tensor) else args[1][0]).device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(*args)
        with torch.autocast(kind, enabled=False):
            return function(*args)

    return plainly


for _name, _function, _fake in (
    ("rows", _rows, _fake_rows),
    ("norm_rows", _norm_rows, _fake_norm_rows),
    ("linear", _linear, _fake_linear),
    ("grad_input", _grad_input, _fake_grad_input),
    ("linear_onto", _linear_onto, _fake_onto),
    ("grad_onto", _grad_onto, _fake_onto),
    ("grad_weight", _grad_weight, _fake_grad_weight),
    ("dequantize", _dequantize, _fake_dequantize),
):
    _LIBRARY.impl(_name, _as_written(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant12g::{_name}", _fake, lib=_LIBRARY)

operators: Any = torch.ops.quant12g
