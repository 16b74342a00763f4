"""Optimizers.

What full training of a large model on a small card needs, each by itself or together (`build`):

8-bit states          Adam's two moments in 8 bits by blocks (Dettmers et al., arXiv 2110.02861; bitsandbytes): 2.03 bytes a
                      parameter in place of 8.
stochastic rounding   weights in bfloat16 alone, without a float32 master. An update below half a unit in the last place (2⁻⁹ of
                      the weight) is lost when a sum is rounded to nearest; rounded up or down by chance it is right on the mean
                      (Gupta et al., arXiv 1502.02551; for Adam in bfloat16 Zamirai et al., arXiv 2010.06192).
step in the backward  a parameter is updated as soon as its gradient is there, and the gradient is freed, so that never all of
                      them exist (LOMO, Lv et al., arXiv 2306.09782). Nothing may be done to all gradients together then:
                      no accumulation, no clipping by the global norm.

What each costs in bytes: `bytes_per_parameter`, and `memory_of` for a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from finetune.errors import Mistake
from finetune.train import parallel

ROUNDED = 1 << 22  # elements that are rounded at a time: a large embedding needs no second copy of itself for its noise
SMALL = 4096  # elements below which bitsandbytes keeps states in fp32
BLOCK = 256  # elements that share one scale in an 8-bit state
NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def round_stochastically(values: torch.Tensor) -> torch.Tensor:
    """float32 → bfloat16, up or down by chance so that the mean is the value; the noise is of torch's generator of that device.

    bfloat16 is the upper half of float32's bits: 16 random bits are added below and the lower half is cut off. What bfloat16 can
    express stays as it is, infinities and NaN included.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(values.isfinite(), noise.view(torch.float32), values).to(torch.bfloat16)


def _has_shadow(parameter: torch.Tensor, stochastic_rounding: bool) -> bool:
    """Whether it is updated through a float32 copy and rounded back."""
    return stochastic_rounding and parameter.dtype == torch.bfloat16


class LowMemory(torch.optim.Optimizer):
    """An optimizer that steps one parameter at a time: through a float32 copy that is rounded back, inside the backward pass,
    or both.

    `inner` does the arithmetic and keeps the states. A bfloat16 parameter that is rounded has a shadow there: an empty
    parameter, which holds the float32 copy and its gradient while its update runs and by which the states are known (so that
    they are of float32, also when they are loaded). `param_groups` are of the real parameters and rule: what is set there (lr)
    holds from the next update. `state_dict` counts the same parameters in the same order as any optimizer's.

    Inside the backward pass each parameter's update runs in a hook after its gradient is complete; `step()` then only closes the
    step. Until the next backward pass begins, `grad_norm()` and `finite()` tell what went through, of the gradients as they were
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
                self._shadow[p] = empty if _has_shadow(p, stochastic_rounding) else p
                self._group[p] = index
        self.inner = make([{**group, "params": [self._shadow[p] for p in group["params"]]} for group in groups])
        super().__init__(groups, self.inner.defaults)
        self.state = self.inner.state
        self.in_backward = in_backward
        self._norms: dict[torch.Tensor, torch.Tensor] = {}  # parameter → norm of its gradient, fp32 on its device
        self._closed = False
        if in_backward:
            self._hooks = [p.register_post_accumulate_grad_hook(self._in_backward) for p in self._shadow]

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
            to, of = (p.unsqueeze(0), shadow.detach().unsqueeze(0)) if p.ndim == 0 else (p, shadow.detach())
            rows = max(1, ROUNDED * to.shape[0] // max(1, to.numel()))
            for part, exact in zip(to.split(rows), of.split(rows), strict=True):
                part.copy_(round_stochastically(exact))
            shadow.data = torch.empty(0, dtype=torch.float32, device=p.device)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; inside the backward pass that is done, and the step is closed.

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
        """Root of the summed squares of all gradients of this step (of the backward pass: with `in_backward` alone).

        0.0 before the first. Waits for the device once.
        """
        if not self._norms:
            return 0.0
        device = next(iter(self._norms.values())).device
        return float(torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in self._norms.values()])))

    def finite(self) -> bool:
        """Whether no gradient of this step held an infinity or NaN (or squares beyond float32); with `in_backward` alone."""
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


def build(
    parameters: dict[str, torch.nn.Parameter],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: str,
    stochastic_rounding: bool = False,
    in_backward: bool = False,
) -> tuple[torch.optim.Optimizer, str | None]:
    """The optimizer over named parameters, and a note where it is not quite what was asked for.

    Matrices decay, vectors (norms, biases) do not. With `stochastic_rounding` the bfloat16 parameters are rounded by chance,
    others are updated as they are; with it or `in_backward` the optimizer is a `LowMemory`.

    Raises:
        Mistake: bitsandbytes is missing; either option with several processes; 8-bit states of weights that are shared out;
            nothing to round but float16.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters.values() if (p.ndim >= 2) == matrix and parallel.is_shard(p) == shard],
            "weight_decay": d,
        }
        for matrix, d in ((True, weight_decay), (False, 0.0))
        for shard in (False, True)  # one fused step takes no mixture
    ]
    groups = [group for group in groups if group["params"]]
    notes: list[str] = []
    options = {"stochastic_rounding": stochastic_rounding, "in_backward": in_backward}
    if any(options.values()) and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise Mistake(
            "stochastic rounding and the step inside the backward pass are for one process",
            where=", ".join(f"train.{key}" for key, value in options.items() if value),
            found=f"{torch.distributed.get_world_size()} processes, whose weights would part: each rounds by its own chance, "
            "and steps before gradients are averaged",
            do="one process, or without these options",
        )
    if stochastic_rounding:
        half = next((key for key, p in parameters.items() if p.dtype == torch.float16), None)
        if half is not None:
            raise Mistake(
                "stochastic rounding is for weights in bfloat16",
                where=f"train.stochastic_rounding: {half}",
                found="float16",
                do="load the model in bfloat16",
            )
        if not any(p.dtype == torch.bfloat16 for p in parameters.values()):
            notes.append("stochastic rounding: no trained weight is in bfloat16, there is nothing to round")
            stochastic_rounding = False
    if name != "adamw" and any(parallel.is_shard(p) for p in parameters.values()):
        raise Mistake(
            "8-bit optimizers keep states of whole weights, and these are shared out",
            where="train.optimizer",
            found=f"{name}, with run.parallel: fsdp",
            do="train.optimizer=adamw, whose states are shared out too; or run.parallel=ddp",
        )
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    if name == "adamw":

        def make(of: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(of, lr=lr, betas=betas, eps=eps, fused=True)
    else:
        try:
            import bitsandbytes
        except ImportError:
            raise Mistake(
                "8-bit optimizers need bitsandbytes",
                where="train.optimizer",
                found=name,
                do="pip install bitsandbytes, or train.optimizer=adamw",
            ) from None
        if name == "paged_adamw_8bit" and device == "cpu":
            notes.append("paged_adamw_8bit: there is nothing to page on a CPU, adamw_8bit it is")
            name = "adamw_8bit"
        kind = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit

        def make(of: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return kind(of, lr=lr, betas=betas, eps=eps)

    if stochastic_rounding or in_backward:
        optimizer: torch.optim.Optimizer = LowMemory(
            groups, make, stochastic_rounding=stochastic_rounding, in_backward=in_backward
        )
    else:
        optimizer = make(groups)
    return optimizer, "; ".join(notes) or None


def _state_bytes(name: str, dtype: torch.dtype, elements: int, stochastic_rounding: bool) -> int:
    """Bytes of one parameter's optimizer states."""
    if name not in NAMES:
        raise ValueError(f"optimizer {name!r} is not one of {', '.join(NAMES)}")
    if name == "adamw":  # moments in the dtype of what is updated, and a step count of four bytes
        moment = 4 if stochastic_rounding and dtype == torch.bfloat16 else dtype.itemsize
        return 2 * moment * elements + 4
    if elements < SMALL:
        return 2 * 4 * elements
    return 2 * elements + 2 * 4 * -(-elements // BLOCK)


def _temporary_bytes(dtype: torch.dtype, elements: int, stochastic_rounding: bool, in_backward: bool) -> int:
    """Bytes that exist only while one parameter is updated, its gradient included if it is freed then."""
    if stochastic_rounding and dtype == torch.bfloat16:
        # The fp32 gradient and weight; then that weight and, by slices, noise 4, mask 1, choice 4, result 2 bytes an element.
        return max(8 * elements, 4 * elements + 11 * min(elements, ROUNDED))
    return dtype.itemsize * elements if in_backward else 0


def bytes_per_parameter(
    name: str, *, dtype: torch.dtype, stochastic_rounding: bool = False, in_backward: bool = False
) -> dict[str, float]:
    """Bytes that full training keeps for each parameter of a large matrix, without activations.

    Keys: `weights`, `gradients` (0 inside the backward pass), `states` (8-bit ones with their scales; paged ones may lie in the
    host's memory), and `temporary`: for each parameter of the LARGEST tensor alone, while that is updated. The arithmetic of
    8-bit states on a CPU takes more for a moment (bitsandbytes unpacks them to float32 there).
    """
    many = 1 << 40  # so that what is rounded up by tensor does not count
    return {
        "weights": float(dtype.itemsize),
        "gradients": 0.0 if in_backward else float(dtype.itemsize),
        "states": round(_state_bytes(name, dtype, many, stochastic_rounding) / many, 6),
        "temporary": round(_temporary_bytes(dtype, many, stochastic_rounding, in_backward) / many, 3),
    }


def memory_of(
    parameters: Iterable[torch.Tensor], *, name: str, stochastic_rounding: bool = False, in_backward: bool = False
) -> dict[str, int]:
    """Bytes that training these parameters keeps, by the keys of `bytes_per_parameter`; tensors on `meta` do as well.

    `temporary` is that of the largest parameter, once. An allocator rounds each tensor up (CUDA: to 512 bytes).
    """
    sizes = [(p.dtype, p.numel()) for p in parameters]
    weights = sum(dtype.itemsize * n for dtype, n in sizes)
    # Two tables of 256 values, which all 8-bit states share.
    tables = 2 * 256 * 4 if name != "adamw" and any(n >= SMALL for _, n in sizes) else 0
    return {
        "weights": weights,
        "gradients": 0 if in_backward else weights,
        "states": sum(_state_bytes(name, dtype, n, stochastic_rounding) for dtype, n in sizes) + tables,
        "temporary": max((_temporary_bytes(dtype, n, stochastic_rounding, in_backward) for dtype, n in sizes), default=0),
    }
