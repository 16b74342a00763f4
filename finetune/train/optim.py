"""Optimizers: one row each in `OPTIMIZERS`, by which the recipe names it, `build` creates it and the plan counts its bytes.

Three ways to save memory in full training of a large model on a small card, alone or together (`build`):

8-bit states          Adam's two moments in 8 bits by blocks (Dettmers et al., arXiv 2110.02861; bitsandbytes): 2.03 bytes a
                      parameter in place of 8.
stochastic rounding   weights in bfloat16 alone, without a float32 master. An update below half a unit in the last place (2⁻⁹ of
                      the weight) is lost when a sum is rounded to nearest; rounded up or down at random it is right on average
                      (Gupta et al., arXiv 1502.02551; for Adam in bfloat16 Zamirai et al., arXiv 2010.06192).
step in the backward  a parameter is updated as soon as its gradient is complete, and the gradient is freed, so that never all of
                      them exist (LOMO, Lv et al., arXiv 2306.09782). Nothing can be done to all gradients together then:
                      no accumulation, no clipping by the global norm.

What each costs in bytes: `bytes_per_parameter`, and `memory_of` for a real model.

Every group keeps its own peak learning rate and weight decay (`peak_lr`, `peak_weight_decay`); the schedule is a factor of them
(schedule.py). To add an optimizer: a row, and its name in the recipe's choices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune.errors import UserError
from finetune.processes import world_size
from finetune.train import parallel
from finetune.train.low_memory import LowMemory, has_shadow, temporary_bytes

SMALL = 4096  # elements below which bitsandbytes keeps states in fp32
BLOCK = 256  # elements that share one scale in an 8-bit state

Groups = list[dict[str, Any]]  # of parameters: {"params": […], "lr": peak rate, "weight_decay": …}


# --------------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer: how to build it, which parameters it takes, what its states cost, what it refuses.

    make: (groups, betas, eps) → optimizer. state_bytes: (bytes per element of what is updated, elements) → bytes of
    one parameter's states. groups: (named parameters, peak rate, weight decay) → parameter groups.
    tables: bytes that all states share. not_sharded: why it cannot update sharded weights. library: a package that it needs.
    on_cpu: (the row that replaces it on a CPU, why).
    """

    name: str
    make: Callable[[Groups, tuple[float, float], float], torch.optim.Optimizer]
    state_bytes: Callable[[int, int], int]
    groups: Callable[[dict[str, torch.nn.Parameter], float, float], Groups]
    tables: int = 0
    not_sharded: str | None = None
    library: str | None = None
    on_cpu: tuple[str, str] | None = None


def matrices_decay(parameters: dict[str, torch.nn.Parameter], lr: float, weight_decay: float) -> Groups:
    """All parameters: matrices decay, vectors (norms, biases) do not."""
    return [
        {"params": [p for p in parameters.values() if (p.ndim >= 2) == matrix], "lr": lr, "weight_decay": decay}
        for matrix, decay in ((True, weight_decay), (False, 0.0))
    ]


def _adamw(groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def _adamw_8bit(groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=eps)


def _paged_adamw_8bit(groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, betas=betas, eps=eps)


def _adamw_bytes(itemsize: int, elements: int) -> int:
    return 2 * itemsize * elements + 4  # moments in the dtype of what is updated, and a step count


def _adamw_8bit_bytes(itemsize: int, elements: int) -> int:
    if elements < SMALL:
        return 2 * 4 * elements
    return 2 * elements + 2 * 4 * -(-elements // BLOCK)


_8BIT: dict[str, Any] = {
    "state_bytes": _adamw_8bit_bytes,
    "groups": matrices_decay,
    "tables": 2 * 256 * 4,  # two of 256 values
    "not_sharded": "8-bit optimizers cannot update sharded weights",
    "library": "bitsandbytes",
}
OPTIMIZERS = {
    row.name: row
    for row in (
        OptimizerRow("adamw", _adamw, _adamw_bytes, matrices_decay),
        OptimizerRow("adamw_8bit", _adamw_8bit, **_8BIT),
        OptimizerRow("paged_adamw_8bit", _paged_adamw_8bit, **_8BIT, on_cpu=("adamw_8bit", "a CPU has no pages to move")),
    )
}


def get_optimizer(name: str) -> OptimizerRow:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


# --------------------------------------------------------------------------------------------------------------- refusals


class Refusal(NamedTuple):
    """Why an optimizer cannot be used. key: of the recipe; got: the value; why: a sentence; hint: what to change."""

    key: str
    got: str
    why: str
    hint: str

    def error(self) -> UserError:
        return UserError(self.why, where=self.key, got=self.got, hint=self.hint)


def refusals(
    name: str,
    *,
    stochastic_rounding: bool = False,
    in_backward: bool = False,
    world_size: int = 1,
    sharded: bool = False,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[Refusal]:
    """All reasons why an optimizer cannot be used. sharded: as under run.parallel=fsdp; dtypes: of the trained weights, once
    they are known."""  # fmt: skip
    row, reasons = get_optimizer(name), []
    for wanted, key, reason in (
        (in_backward, "train.optimizer_in_backward", "gradients are summed over processes before the step"),
        (stochastic_rounding, "train.stochastic_rounding", "each process would round with different random numbers"),
    ):
        if wanted and world_size > 1:
            why = f"works with one process only: {reason}"
            reasons.append(Refusal(key, f"{world_size} processes", why, f"use one process, or set {key}=false"))
    if sharded and row.not_sharded is not None:
        hint = "set train.optimizer=adamw, whose states are sharded too; or run.parallel=ddp"
        reasons.append(Refusal("train.optimizer", f"{name} with run.parallel=fsdp", row.not_sharded, hint))
    half = next((key for key, dtype in (dtypes or {}).items() if dtype == torch.float16), None)
    if stochastic_rounding and half is not None:
        why = "stochastic rounding works with bfloat16 weights only"
        reasons.append(Refusal(f"train.stochastic_rounding: {half}", "float16", why, "load the model in bfloat16"))
    if row.library is not None and not _can_import(row.library):
        hint = f"pip install {row.library}, or train.optimizer=adamw"
        reasons.append(Refusal("train.optimizer", name, f"{name} needs {row.library}", hint))
    return reasons


def _can_import(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------ build


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
    """The optimizer over named parameters, and a note if it differs from what was asked for.

    lr: the peak rate. Each group keeps its own and its weight decay, as `peak_lr` and `peak_weight_decay`. With
    `stochastic_rounding` the bfloat16 parameters are rounded at random, others are updated as they are; with it or `in_backward`
    the optimizer is a `LowMemory`.

    Raises:
        UserError: the first of `refusals`.
    """
    row, notes = get_optimizer(name), []
    sharded = any(parallel.is_shard(p) for p in parameters.values())
    dtypes = {key: p.dtype for key, p in parameters.items()}
    low = {"stochastic_rounding": stochastic_rounding, "in_backward": in_backward}
    for refusal in refusals(name, **low, world_size=world_size(), sharded=sharded, dtypes=dtypes):
        raise refusal.error()
    if stochastic_rounding and torch.bfloat16 not in dtypes.values():
        notes.append("stochastic rounding has no effect: no trained weight is bfloat16")
        stochastic_rounding = False
    if device == "cpu" and row.on_cpu is not None:
        other, why = row.on_cpu
        notes.append(f"{name}: {why}; using {other}")
        row = get_optimizer(other)
    groups = [
        {**group, "params": params, "peak_lr": group["lr"], "peak_weight_decay": group["weight_decay"]}
        for group in row.groups(parameters, lr, weight_decay)
        for shard in (False, True)  # one fused step cannot mix sharded and whole parameters
        if (params := [p for p in group["params"] if parallel.is_shard(p) == shard])
    ]

    def make(groups: Groups) -> torch.optim.Optimizer:
        return row.make(groups, betas, eps)

    if stochastic_rounding or in_backward:
        optimizer: torch.optim.Optimizer = LowMemory(
            groups, make, stochastic_rounding=stochastic_rounding, in_backward=in_backward
        )
    else:
        optimizer = make(groups)
    return optimizer, "; ".join(notes) or None


# ------------------------------------------------------------------------------------------------------------------ bytes


def _state_bytes(row: OptimizerRow, dtype: torch.dtype, elements: int, stochastic_rounding: bool) -> int:
    """Bytes of one parameter's optimizer states."""
    return row.state_bytes(4 if has_shadow(dtype, stochastic_rounding) else dtype.itemsize, elements)


def bytes_per_parameter(
    name: str, *, dtype: torch.dtype, stochastic_rounding: bool = False, in_backward: bool = False
) -> dict[str, float]:
    """Bytes that full training keeps for each parameter of a large matrix, without activations.

    Keys: `weights`, `gradients` (0 inside the backward pass), `states` (8-bit ones with their scales; paged ones may lie in the
    host's memory), and `temporary`: for each parameter of the LARGEST tensor alone, while that is updated. The arithmetic of
    8-bit states on a CPU needs more for a moment (bitsandbytes unpacks them to float32 there).
    """
    row = get_optimizer(name)
    many = 1 << 40  # large enough that rounding up per tensor does not count
    return {
        "weights": float(dtype.itemsize),
        "gradients": 0.0 if in_backward else float(dtype.itemsize),
        "states": round(_state_bytes(row, dtype, many, stochastic_rounding) / many, 6),
        "temporary": round(temporary_bytes(dtype, many, stochastic_rounding, in_backward) / many, 3),
    }


def memory_of(
    parameters: Iterable[torch.Tensor], *, name: str, stochastic_rounding: bool = False, in_backward: bool = False
) -> dict[str, int]:
    """Bytes that training these parameters keeps, by the keys of `bytes_per_parameter`; tensors on `meta` do as well.

    `temporary` is that of the largest parameter, once. An allocator rounds each tensor up (CUDA: to 512 bytes).
    """
    row = get_optimizer(name)
    sizes = [(p.dtype, p.numel()) for p in parameters]
    weights = sum(dtype.itemsize * n for dtype, n in sizes)
    tables = row.tables if any(n >= SMALL for _, n in sizes) else 0
    return {
        "weights": weights,
        "gradients": 0 if in_backward else weights,
        "states": sum(_state_bytes(row, dtype, n, stochastic_rounding) for dtype, n in sizes) + tables,
        "temporary": max((temporary_bytes(dtype, n, stochastic_rounding, in_backward) for dtype, n in sizes), default=0),
    }
