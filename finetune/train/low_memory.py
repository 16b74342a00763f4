"""An optimizer that updates one parameter at a time: with stochastic rounding, inside the backward pass, or both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

ROUNDED = 1 << 22  # elements that are rounded at a time: a large embedding needs no second copy of itself for its noise


def round_stochastically(values: torch.Tensor) -> torch.Tensor:
    """float32 → bfloat16, rounded up or down at random so that the mean is exact; uses torch's generator of the device.

    bfloat16 is the upper half of float32's bits: 16 random bits are added below and the lower half is cut off. Values that
    bfloat16 can represent do not change, infinities and NaN included.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(values.isfinite(), noise.view(torch.float32), values).to(torch.bfloat16)


def has_shadow(dtype: torch.dtype, stochastic_rounding: bool) -> bool:
    """Whether a weight of this dtype is updated through a float32 copy and rounded back."""
    return stochastic_rounding and dtype == torch.bfloat16


class LowMemory(torch.optim.Optimizer):
    """An optimizer that steps one parameter at a time: through a float32 copy that is rounded back, inside the backward pass,
    or both.

    `inner` does the arithmetic and keeps the states. A bfloat16 parameter that is rounded has a shadow there: an empty
    parameter, which holds the float32 copy and its gradient during its update and is the key of the states (so that
    they are float32, also when loaded). `param_groups` hold the real parameters and are authoritative: what is set there (lr)
    applies from the next update. `state_dict` numbers the parameters as any optimizer does.

    Inside the backward pass each parameter is updated in a hook once its gradient is complete; `step()` then only closes the
    step. Until the next backward pass begins, `grad_norm()` and `finite()` describe the gradients of this one
    (the loss must be scaled before the backward pass). A step cannot be taken back: after a bad one, load a checkpoint.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        stochastic_rounding: bool,
        in_backward: bool,
    ) -> None:
        """`groups`: [{"params": […], hyperparameters}]; `make(groups)` gives the inner optimizer of such groups."""
        self._shadow: dict[torch.Tensor, torch.nn.Parameter] = {}
        self._group: dict[torch.Tensor, int] = {}
        for index, group in enumerate(groups):
            for p in group["params"]:
                empty = torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=p.device))
                self._shadow[p] = empty if has_shadow(p.dtype, stochastic_rounding) else p
                self._group[p] = index
        self.inner = make([{**group, "params": [self._shadow[p] for p in group["params"]]} for group in groups])
        super().__init__(groups, self.inner.defaults)
        self.state = self.inner.state
        self.in_backward = in_backward
        self._hooks: list[RemovableHandle] = []
        self._norms: dict[torch.Tensor, torch.Tensor] = {}  # parameter → norm of its gradient, fp32 on its device
        self._closed = False
        if in_backward:
            self._hooks = [p.register_post_accumulate_grad_hook(self._in_backward) for p in self._shadow]

    def remove_hooks(self) -> None:
        """Remove the hooks: a backward pass then gives gradients and updates nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def _in_backward(self, parameter: torch.Tensor) -> None:
        if self._closed:
            self._norms, self._closed = {}, False
        if parameter in self._norms:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a second gradient before step() was called: the step inside "
                "the backward pass takes one backward pass a step, without accumulation (and without reentrant checkpoints)"
            )
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
        self._update(parameter)
        parameter.grad = None

    @torch.no_grad()
    def _update(self, p: torch.Tensor) -> None:
        """One parameter's update from its gradient."""
        shadow = self._shadow[p]
        if shadow is not p:
            assert p.grad is not None
            gradient = p.grad.to(torch.float32, memory_format=torch.contiguous_format)
            if self.in_backward:
                p.grad = None  # before the copy of the weight is made
            shadow.data = p.detach().to(torch.float32, memory_format=torch.contiguous_format)
            shadow.grad = gradient
            del gradient
        self.inner.param_groups = [{**self.param_groups[self._group[p]], "params": [shadow]}]
        self.inner.step()
        if shadow is not p:
            shadow.grad = None
            target, source = (p.unsqueeze(0), shadow.detach().unsqueeze(0)) if p.ndim == 0 else (p, shadow.detach())
            rows = max(1, ROUNDED * target.shape[0] // max(1, target.numel()))
            for part, exact in zip(target.split(rows), source.split(rows), strict=True):
                part.copy_(round_stochastically(exact))
            shadow.data = torch.empty(0, dtype=torch.float32, device=p.device)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; with `in_backward` they are updated already, and the step is closed.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("LowMemory.step takes no closure")
        if self.in_backward:
            self._closed = True
            return
        for p in self._shadow:
            if p.grad is not None:
                self._update(p)

    def grad_norm(self) -> float:
        """L2 norm of all gradients of this step together (only with `in_backward`).

        0.0 before the first step. Synchronizes with the device once.
        """
        if not self._norms:
            return 0.0
        device = next(iter(self._norms.values())).device
        return float(torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in self._norms.values()])))

    def finite(self) -> bool:
        """Whether all gradients of this step were finite (and their squares within float32); only with `in_backward`."""
        return math.isfinite(self.grad_norm())

    def _to_inner(self) -> None:
        self.inner.param_groups = [{**group, "params": [self._shadow[p] for p in group["params"]]} for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        self._to_inner()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._to_inner()
        self.inner.load_state_dict(state_dict)
        self.state = self.inner.state
        for mine, loaded in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({key: value for key, value in loaded.items() if key != "params"})
        self._norms, self._closed = {}, False


def temporary_bytes(dtype: torch.dtype, elements: int, stochastic_rounding: bool, in_backward: bool) -> int:
    """Bytes that exist only while one parameter is updated, its gradient included if it is freed then."""
    if has_shadow(dtype, stochastic_rounding):
        # The fp32 gradient and weight; then that weight and, by slices, noise 4, mask 1, choice 4, result 2 bytes an element.
        return max(8 * elements, 4 * elements + 11 * min(elements, ROUNDED))
    return dtype.itemsize * elements if in_backward else 0
