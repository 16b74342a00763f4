"""LoRA over a frozen linear, or over several that take the same input (q, k and v; gate and up), as one autograd Function.

    y_i = x · W_iᵀ + b_i + s_i · (x · A_iᵀ) · B_iᵀ        LoRA, arXiv 2106.09685, equation 3; rsLoRA only changes s_i

PEFT's graph of small layers saves and computes x for each of them; here it is saved and used once for all: x, and x · Aᵀ for
all A stacked. Of W only the codes are saved: the backward pass dequantizes again. Products are in the dtype of x, or in
autocast's; gradients of A and B are rounded to it before they are added to those of adapters in fp32, as under autocast.

The adapters' output is written first, by a Function that saves all tensors; a second one, which saves none, adds the
product with W to it. So activation checkpointing, which stops recomputing a layer once it has its saved tensors,
skips a layer's last product. And as the sum is taken inside the matrix product, in fp32, base and adapter are rounded
together, once. (Rounded one after the other in bf16 they are sometimes off by a unit in the last place, which SmolLM2's
largest activation, 24,066 in its twelfth layer, turns into 0.1 nats.)

With dropout, the group shares one mask on x, from a seed that is drawn from torch's default
generator and saved, so that the backward pass recreates the mask. (PEFT draws one for each layer.)

An input that is cheap to recompute is not saved: with x.recompute_fn = (function, tensors), where function(*tensors) is x, the
backward pass saves those tensors, which are saved elsewhere anyway (gate and up for their product, the residual for its norm).

`LoraGroup` replaces the `forward` of PEFT layers, and restores it; `why_not` says which layers it leaves to PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.linear import PackedLinear
from quant.ops import operators


class Member(NamedTuple):
    """One linear of a group, without its tensors. scheme: of packed codes (`quant.ops.ARITHMETIC`); None: a float weight."""

    scheme: str | None
    out: int
    rank: int
    scaling: float
    parts: int  # tensors of its frozen weight
    bias: bool


@dataclass(frozen=True)
class _Plan:
    members: tuple[Member, ...]
    dtype: torch.dtype
    dropout: float
    seed: int
    recompute_fn: Callable[..., Tensor] | None  # computes x from the last `sources` tensors
    sources: int


def _add_product(member: Member, y: Tensor, x: Tensor, weight: Sequence[Tensor]) -> None:
    """y (T, out) += x (T, in) · Wᵀ"""
    if member.scheme is None:
        torch.addmm(y, x, weight[0].to(y.dtype).t(), out=y)
    else:
        operators.linear_onto(member.scheme, y, x, list(weight))


def _grad_onto(member: Member, grad_x: Tensor, grad: Tensor, weight: Sequence[Tensor]) -> None:
    """grad_x (T, in) += grad (T, out) · W"""
    if member.scheme is None:
        torch.addmm(grad_x, grad, weight[0].to(grad.dtype), out=grad_x)
    else:
        operators.grad_onto(member.scheme, grad_x, grad, list(weight))


def _mask(like: Tensor, dropout: float, seed: int) -> Tensor:
    """A dropout mask, 1 / (1 − p) or 0, in the shape and dtype of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _split(
    tensors: Sequence[Tensor], members: tuple[Member, ...]
) -> list[tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]]:
    """(A, B, bias, weight) of each member."""
    layers, index = [], 0
    for member in members:
        a, b = tensors[index : index + 2]
        bias = tensors[index + 2] if member.bias else None
        index += 3 if member.bias else 2
        layers.append((a, b, bias, tensors[index : index + member.parts]))
        index += member.parts
    return layers


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        dtype, members = plan.dtype, plan.members
        with torch.autocast(x.device.type, enabled=False):
            layers = _split(tensors, members)
            flat_x = x.reshape(-1, x.shape[-1]).to(dtype)
            down = torch.cat([a for a, *_ in layers]).to(dtype)  # (Σr, in)
            dropped = flat_x * _mask(flat_x, plan.dropout, plan.seed) if plan.dropout else flat_x
            inner = dropped @ down.t()  # (T, Σr)
            outputs = []
            for member, (_, b, bias, _), part in zip(members, layers, _parts(inner, members), strict=True):
                up, y = (b * member.scaling).to(dtype).t(), x.new_empty(*x.shape[:-1], member.out, dtype=dtype)
                flat = y.view(-1, member.out)
                if bias is None:
                    torch.mm(part, up, out=flat)
                else:
                    torch.addmm(bias.to(dtype), part, up, out=flat)
                outputs.append(y)
        ctx.plan = plan
        ctx.save_for_backward(inner, *([] if plan.recompute_fn else [x]), *tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        inner, *tensors = ctx.saved_tensors
        x = plan.recompute_fn(*tensors[len(tensors) - plan.sources :]) if plan.recompute_fn else tensors.pop(0)
        members, dtype = plan.members, plan.dtype
        layers = _split(tensors, members)
        flat_x = x.reshape(-1, x.shape[-1]).to(dtype)
        down = torch.cat([a for a, *_ in layers]).to(dtype)
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_inner = torch.zeros_like(inner) if None in grads else torch.empty_like(inner)
        gradients: list[Tensor | None] = []
        for member, (_, b, _, _), grad, part, inside in zip(
            members, layers, flat, _parts(grad_inner, members), _parts(inner, members), strict=True
        ):
            grad_b = None
            if grad is not None:
                torch.mm(grad, (b * member.scaling).to(dtype), out=part)
                grad_b = (grad.t() @ inside).to(b.dtype).mul_(member.scaling)
            gradients += [None, grad_b, *[None] * (member.bias + member.parts)]
        mask = _mask(flat_x, plan.dropout, plan.seed) if plan.dropout else None
        grad_down = grad_inner.t() @ (flat_x if mask is None else flat_x * mask)  # (Σr, in)
        index = 0
        for member, (a, *_), part in zip(members, layers, _parts(grad_down, members, dim=0), strict=True):
            gradients[index] = part.to(a.dtype)
            index += 2 + member.bias + member.parts
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_inner @ down
            if mask is not None:
                grad_x *= mask
            for member, (*_, weight), grad in zip(members, layers, flat, strict=True):
                if grad is not None:
                    _grad_onto(member, grad_x, grad, weight)
            grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, *gradients, *[None] * plan.sources


class _Base(torch.autograd.Function):
    """Adds x · Wᵀ to the adapters' outputs, in place. `_Group` computes the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors[:count]
        with torch.autocast(x.device.type, enabled=False):
            flat_x = x.reshape(-1, x.shape[-1]).to(plan.dtype)
            for member, (*_, weight), y in zip(plan.members, _split(tensors[count:], plan.members), outputs, strict=True):
                _add_product(member, y.view(-1, member.out), flat_x, weight)
        ctx.mark_dirty(*outputs)
        ctx.set_materialize_grads(False)
        ctx.others = len(tensors) - count
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *grads, *[None] * ctx.others


def _parts(inner: Tensor, members: tuple[Member, ...], dim: int = 1) -> tuple[Tensor, ...]:
    return inner.split([member.rank for member in members], dim)


def lora_linears(x: Tensor, members: Sequence[Member], tensors: Sequence[Tensor], *, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """x (…, in) → one (…, out) for each member, in the dtype of x or autocast's.

    tensors: for each member A (r, in), B (out, r), the bias if it has one, and its frozen weight: packed parts as a layer
    stores them, or one float (out, in). dropout: rate on the adapters' input.
    """
    device_type = x.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    seed = int(torch.randint(1 << 62, ())) if dropout else 0
    recompute_fn, sources = getattr(x, "recompute_fn", (None, ()))
    dtype = torch.get_autocast_dtype(device_type) if on else x.dtype
    plan = _Plan(tuple(members), dtype, dropout, seed, recompute_fn, len(sources))
    outputs = _Group.apply(x, plan, *tensors, *(source.detach() for source in sources))
    frozen = [tensor.detach() for tensor in tensors]
    return cast(tuple[Tensor, ...], _Base.apply(x.detach(), plan, len(outputs), *outputs, *frozen))


# --------------------------------------------------------------------------------------------------------- on PEFT's layers


def why_not(layer: Any) -> str | None:
    """Why `LoraGroup` cannot compute this PEFT layer; None if it can."""
    base = layer.get_base_layer()
    packed = isinstance(base, PackedLinear)
    if not packed and not (type(base) is nn.Linear and not base.weight.requires_grad):
        return f"its base is a {type(base).__name__}" + (" that is trained" if type(base) is nn.Linear else "")
    if packed and base.rms_norm is not None:
        return "its base normalizes its input"
    if len(layer.active_adapters) != 1 or (name := layer.active_adapters[0]) not in layer.lora_A:
        return "it does not have exactly one active adapter"
    if name in layer.lora_variant:
        return "DoRA"
    if layer.lora_bias[name]:
        return "its adapter has a bias"
    if base.bias is not None and base.bias.requires_grad:
        return "its bias is trained"
    return None


class LoraGroup:
    """PEFT layers that get the same input one after another, computed together when the first is called.

    The others then return their cached result; a layer that is called with another tensor makes the group compute again.
    While `install`ed, `forward` of each is an attribute of the layer; merged or disabled adapters use PEFT's code.
    Do not modify the outputs in place: they share a graph node.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def install(self) -> None:
        for number, layer in enumerate(self.layers):
            layer.forward = self._forward_of(number, layer.forward)

    def remove(self) -> None:
        for layer in self.layers:
            del layer.forward
        self._input, self._waiting = None, {}

    def _forward_of(self, number: int, own: Any) -> Any:
        layer = self.layers[number]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer.merged or layer.disable_adapters or args or kwargs:
                return cast(Tensor, own(x, *args, **kwargs))
            if self._input is not x or number not in self._waiting:
                self._waiting = dict(enumerate(self._compute(x)))
                self._input = x
            output = self._waiting.pop(number)
            if not self._waiting:
                self._input = None
            return output

        return forward

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        members, tensors = [], []
        for layer in self.layers:
            name, base = layer.active_adapters[0], layer.get_base_layer()
            if packed := isinstance(base, PackedLinear):
                base.mark_used()
            weight = base.parts if packed else [base.weight]
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            members.append(
                Member(
                    base.arithmetic if packed else None,
                    base.out_features,
                    a.shape[0],
                    layer.scaling[name],
                    len(weight),
                    base.bias is not None,
                )
            )
            tensors += [a, b, *([] if base.bias is None else [base.bias]), *weight]
        first = self.layers[0]
        dropout = first.lora_dropout[first.active_adapters[0]]
        p = dropout.p if first.training and isinstance(dropout, nn.Dropout) else 0.0
        return lora_linears(x, members, tensors, dropout=p)
