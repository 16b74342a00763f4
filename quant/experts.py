"""Fused experts of mixture-of-experts models: 3-D parameters become one quantized linear per expert and projection.

transformers 5 keeps all experts of a layer in two parameters, (experts, out, in), without an nn.Linear. The classes that
hold them share one contract, the decorator `use_experts_implementation`: which parameters there are, whether transposed,
biased or gated, and `_apply_gate` between the two products. So one module can replace all of them:

    experts.gate_up_proj  (E, 2·inter, hidden)    →    experts.gate_up_proj.0 … E-1    quantized linears
    experts.down_proj     (E, hidden, inter)      →    experts.down_proj.0 … E-1

They are linears rather than a function in `ALL_EXPERTS_FUNCTIONS`, which could compute the same: so codes and scales are in
the module tree, adapters attach to one expert, and each expert's matrix has its own scale.
Gate and up stay one matrix, as the model has them, and so share one ternary scale. Routers are other modules, left in floats.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which would load the compiler now
from torch._subclasses import FakeTensor

from quant.linear import FakeQuantLinear, PackedLinear

CONTRACT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "_apply_gate")
"""What `use_experts_implementation` puts on a class and its instances (transformers 5.23)."""


class _Floats:
    """In place of a quantized linear's class: the expert's linear as it is."""

    scheme: Any = SimpleNamespace(unfit=lambda shape: None)

    @staticmethod
    def from_linear(linear: nn.Linear, *, device: torch.device | str | None = None) -> nn.Linear:
        return linear.to(device) if device is not None else linear


class QuantizedExperts(nn.Module):
    """Replaces a fused experts module: forward(hidden_states (n, hidden), top_k_index (n, k), top_k_weights (n, k)).

    Everything else of the original stays: activation, limits, norm, `config`, and its own `_apply_gate`. An expert without
    tokens is not computed, and gets no gradient (None): the optimizer skips it in that step, decay included.
    """

    original_class: type[nn.Module]
    num_experts: int
    up: str
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool
    act_fn: nn.Module
    down_proj: nn.ModuleList
    post_expert_norm: nn.Module

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        linear: type[PackedLinear] | type[FakeQuantLinear],
        *,
        device: torch.device | str | None = None,
        **options: bool,
    ) -> Self:
        """Quantized experts of class `linear`; `experts` does not change. device, options: as in `linear.from_linear`.

        Master weights are copies: each expert's is a Parameter of its own, which requires a gradient if the fused one did.
        Raises ValueError for experts that violate the contract, and for weights that the scheme refuses, naming the expert.
        """
        if (reason := reason_to_leave(experts, linear.scheme)) is not None:
            raise ValueError(reason)
        names = projections(experts)
        self = cls()
        _copy_attributes(experts, self, {name for name in experts._parameters if name.removesuffix("_bias") in names})
        self.original_class, self.up = type(experts), names[0]
        for name in names:
            layers = nn.ModuleList()
            for index in range(len(cast(Tensor, getattr(experts, name)))):
                try:
                    layers.append(linear.from_linear(_linear(experts, name, index), device=device, **options))
                except ValueError as error:
                    raise ValueError(f"{name}.{index}: {error}") from error
            self.add_module(name, layers)
        self.num_experts = len(layers)
        return self.train(experts.training)

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The fused float module of the original class, with master weights or dequantized codes.

        For code that needs the fused parameters, such as transformers' save_pretrained.
        dtype: of the dequantized weights (default: the layers'). Layers may be float linears (merged adapters).
        Raises ValueError for an expert that has an adapter.
        """
        experts = self.original_class.__new__(self.original_class)
        nn.Module.__init__(experts)
        names = (self.up, "down_proj")
        _copy_attributes(self, experts, {"kind", "up", *names})
        for name in names:
            layers: Any = getattr(self, name)
            if wrapped := [i for i, m in enumerate(layers) if not isinstance(m, nn.Linear | PackedLinear)]:
                raise ValueError(f"{name}.{wrapped[0]} has an adapter: merge or unload it first")
            floats = [m.to_linear(dtype) if isinstance(m, PackedLinear) else m for m in layers]
            weight = torch.stack([m.weight.detach().t() if self.is_transposed else m.weight.detach() for m in floats])
            experts.register_parameter(name, nn.Parameter(weight, layers[0].weight.requires_grad))
            if self.has_bias:
                bias = torch.stack([m.bias.detach() for m in floats])
                experts.register_parameter(f"{name}_bias", nn.Parameter(bias, layers[0].bias.requires_grad))
        return experts.train(self.training)

    @property
    def used(self) -> bool:
        """Whether any expert was used in a forward pass, with both of its projections; true of experts in floats."""
        layers = [
            [m for m in getattr(self, name).modules() if isinstance(m, PackedLinear | FakeQuantLinear)]
            for name in (self.up, "down_proj")
        ]
        return all(not quantized or any(m.used for m in quantized) for quantized in layers)

    @_disable_dynamo
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(n, hidden) → (n, hidden): the weighted sum of the experts that each token chose, rounded after the sum.

        The same as transformers' default implementations (`grouped_mm`, `batched_mm`), and deterministic with its gradients:
        tokens are permuted, never added at an index. Not compiled: the numbers of tokens per expert change with every call.
        """
        n, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        tokens = hidden_states[:, None].expand(-1, k, -1)[order // k, order % k]
        outputs = [self._expert(i, part) for i, part in enumerate(tokens.split(self._counts(chosen))) if len(part)]
        if not outputs:
            return torch.zeros_like(hidden_states)
        out = torch.cat(outputs)[order.argsort()].view(n, k, -1)
        return (out * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        y = getattr(self, self.up)[index](x)
        y = cast(Any, self.original_class)._apply_gate(self, y) if self.has_gate else self.act_fn(y)
        y = self.down_proj[index](y)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _counts(self, chosen: Tensor) -> list[int]:
        """Number of tokens of each expert. With fake and meta tensors an even split, which a plan assumes."""
        if chosen.is_meta or isinstance(chosen, FakeTensor):
            each, rest = divmod(len(chosen), self.num_experts)
            return [each + (i < rest) for i in range(self.num_experts)]
        return cast(list[int], torch.bincount(chosen, minlength=self.num_experts).tolist())

    def extra_repr(self) -> str:
        return f"{self.original_class.__name__}, experts={self.num_experts}"


def split(experts: nn.Module) -> QuantizedExperts:
    """The experts with a plain linear for each expert and projection, to which adapters attach. Raises as `from_experts`."""
    return QuantizedExperts.from_experts(experts, cast(Any, _Floats))


def expert_linears(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """{path of a split linear inside the module: (out, in)}; empty if it cannot be split."""
    if reason_to_leave(experts, _Floats.scheme) is not None:
        return {}
    shapes: dict[str, tuple[int, int]] = {}
    for name in projections(experts):
        count, *shape = cast(Tensor, getattr(experts, name)).shape
        out, inputs = shape[::-1] if experts.is_transposed else shape
        shapes |= {f"{name}.{index}": (out, inputs) for index in range(count)}
    return shapes


def looks_fused(module: nn.Module) -> bool:
    """Whether `module` holds fused weights of several experts: 3-D parameters, or 2-D ones in a class named Expert.

    Convolutions, which have 3-D weights too, and parameters with an axis of one (tokens, positions) do not count.
    """
    if isinstance(module, QuantizedExperts | nn.modules.conv._ConvNd):
        return False
    deep = 2 if "Expert" in type(module).__name__ else 3
    return any(p.dim() >= deep and 1 not in p.shape for p in module._parameters.values() if p is not None)


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the two fused parameters."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def reason_to_leave(experts: nn.Module, scheme: ModuleType) -> str | None:
    """Why a module that `looks_fused` must not be swapped; None if it can be."""
    original_class = type(experts)
    if not all(hasattr(experts, name) for name in CONTRACT) or not hasattr(original_class.forward, "__wrapped__"):
        return f"{original_class.__name__} holds fused weights and does not follow transformers' use_experts_implementation"
    if "forward" in vars(experts):
        return f"{original_class.__name__} has a replaced forward (hooks)"
    if experts._is_expert_parallel:
        return f"{original_class.__name__} is spread over devices (expert parallel)"
    names = projections(experts)
    large = {name for name, p in experts._parameters.items() if p is not None and p.dim() == 3}
    biases = [experts._parameters.get(f"{name}_bias") for name in names]
    if large != set(names) or len({len(experts._parameters[name]) for name in names}) != 1:  # type: ignore[arg-type]
        return f"{original_class.__name__} has other fused weights than {' and '.join(names)}, one per projection and expert"
    if any((bias is None) == bool(experts.has_bias) for bias in biases):
        return f"{original_class.__name__} has a wrong `has_bias`"
    for name in names:
        shape = experts._parameters[name].shape[1:]  # type: ignore[union-attr]
        if (reason := scheme.unfit(shape[::-1] if experts.is_transposed else shape)) is not None:
            return f"{name}: {reason}"
    return None


def _linear(experts: nn.Module, name: str, index: int) -> nn.Linear:
    """One projection of one expert as an nn.Linear with its own Parameters."""
    fused = cast(nn.Parameter, getattr(experts, name))
    weight = fused.detach()[index]
    weight = (weight.t() if experts.is_transposed else weight).clone(memory_format=torch.contiguous_format)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=fused.requires_grad)
    if experts.has_bias:
        bias = cast(nn.Parameter, getattr(experts, f"{name}_bias"))
        linear.bias = nn.Parameter(bias.detach()[index].clone(), requires_grad=bias.requires_grad)
    return linear.train(experts.training)


def _copy_attributes(source: nn.Module, target: nn.Module, without: set[str]) -> None:
    """Copy attributes, modules, buffers and parameters of `source` to `target`, except those in `without`."""
    for name, value in vars(source).items():
        if name not in without:
            vars(target).setdefault(name, value)
    for kept, mine in (
        (source._modules, target._modules),
        (source._buffers, target._buffers),
        (source._parameters, target._parameters),
    ):
        mine.update({name: value for name, value in kept.items() if name not in without})  # type: ignore[misc]
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
