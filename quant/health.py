"""The health of ternary weights in training: how many codes flip in a step, how many are 0, how large the scale is.

A ternary layer learns when codes flip: each step moves its master weight a little, and the layer's function
changes when a weight crosses a boundary. If the learning rate is too low, none cross (the layer stays at random weights, and
the rest of the model adapts to them); if it is too high, codes flip back and forth. The loss shows both late.

    flips    share of codes that changed in the step
    zeros    share of codes that are 0: about 0.31 for a Gaussian (|w| below half its mean), 0.25 for a uniform distribution
    scale    mean |W|, the 1/s of quant/ternary.py

They are counted on the packed codes, a quarter of a byte per weight, which the forward pass needs anyway (quant/weight_cache.py):
`remember` keeps those of this step, and `compare` computes those that the next forward pass uses. Nothing is quantized twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import ternary
from quant.conv import BitConv2d
from quant.linear import BitLinear
from quant.swap import plain_path

WINDOW = 5  # samples over which an alarm is computed
TURNOVER = 0.1
"""Frozen: fewer flips than this share of the codes in a whole run, at the rate of the last samples; see `alarms`."""
THRASHING = 0.03
"""Share of codes that flip per step, above which they flip back and forth; see `alarms`."""
ZEROS = 0b01010101
"""A byte of four codes that are 0: a code is stored as itself + 1."""


@dataclass(frozen=True)
class Layer:
    """One layer: shares of its `weights` codes that flipped and that are 0, and the mean magnitude of its master weight."""

    flips: float
    zeros: float
    scale: float
    weights: int


@dataclass(frozen=True)
class Health:
    """Shares over all ternary master weights of a model, and each layer by its path."""

    flips: float
    zeros: float
    layers: dict[str, Layer]


class Watch:
    """Watches the ternary master weights of a model: `remember()` before an optimizer step, `compare()` after it.

    Cheapest after the forward pass: then both use cached codes. In between it holds 2 bits per weight.
    """

    def __init__(self, model: nn.Module, named_modules: Callable[[], Iterable[tuple[str, nn.Module]]] | None = None) -> None:
        """named_modules: iterates over the model's modules and gathers the weights of each in its turn, if they are sharded.

        Raises ValueError for a model that has no ternary master weights.
        """
        self._modules = named_modules or model.named_modules
        layers = {plain_path(path): module for path, module in model.named_modules() if isinstance(module, BitLinear | BitConv2d)}
        if not layers:
            raise ValueError(f"{type(model).__name__} has no ternary master weights")
        self.layers: dict[str, BitLinear | BitConv2d] = layers
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the current codes."""
        self._before = {path: codes for path, codes, _ in self._codes()}

    def _codes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path, codes, scale) of every layer."""
        for path, module in self._modules():
            if isinstance(module, BitLinear | BitConv2d):
                yield plain_path(path), *module.codes()

    @torch.no_grad()
    def compare(self) -> Health:
        """Statistics of the changes since `remember()`, whose codes are dropped; synchronizes with the device once.

        Raises ValueError without a `remember()` before.
        """
        if not self._before:
            raise ValueError("call remember() before the optimizer step, then compare()")
        counts, scales = [], []
        for path, codes, scale in self._codes():
            before = self._before.pop(path)
            now, then = _packed(codes), _packed(before)
            counts.append(torch.stack([_differing(now ^ then), now.numel() * 4 - _differing(now ^ ZEROS)]))
            scales.append(1 / scale)
        device = counts[0].device
        table = torch.stack([count.to(device) for count in counts]).tolist()
        means = torch.stack([scale.to(device) for scale in scales]).tolist()
        layers, flipped, zero, total = {}, 0, 0, 0
        for (path, layer), (flips, zeros), mean in zip(self.layers.items(), table, means, strict=True):
            n = layer.weight.numel()
            zeros -= -n % 4  # the padding of the last byte
            layers[path] = Layer(flips / n, zeros / n, mean, n)
            flipped, zero, total = flipped + flips, zero + zeros, total + n
        return Health(flipped / total, zero / total, layers)


def _packed(codes: Tensor) -> Tensor:
    """Packed codes as they are; int8 codes of a convolution four to a byte, padded with code 0."""
    if codes.dtype == torch.uint8:
        return codes
    flat = codes.reshape(-1, 1)
    return ternary.pack(F.pad(flat, (0, 0, 0, -flat.numel() % 4)))


def _differing(bits: Tensor) -> Tensor:
    """Number of bit pairs of a uint8 tensor that are not 00; int64 ()."""
    bits = (bits | bits >> 1) & ZEROS  # one bit per pair
    bits = (bits & 0b00110011) + (bits >> 2 & 0b00110011)
    return ((bits & 0b00001111) + (bits >> 4)).sum(dtype=torch.int64)


def alarms(history: Sequence[Health], rates: Sequence[float], *, peak: float, steps: int) -> list[str]:
    """Messages about unhealthy training, from the statistics of its steps; empty if all is well.

    history: samples, one step each, the latest last; many more than `WINDOW`, but not necessarily all: alarms of older ones
    were raised at their time. rates: the learning rate of each of those steps. peak: the highest of the run's schedule;
    steps: optimizer steps of the whole run.

    Frozen (the model, or single layers): flips are proportional to the learning rate, so those of the last `WINDOW` samples
    are scaled to the peak and multiplied by `steps`. If that is less than `TURNOVER` of the codes, the run ends with nearly the
    codes that it started with. Samples at less than a tenth of the peak, in a warm-up or at the end of a decay, do not count,
    nor do layers with too few weights (at zero flips in n, up to 3 / n are likely).
    Thrashing: more than `THRASHING` of the codes flip per step, in the mean of any `WINDOW` consecutive samples.

    Source of the thresholds: a Llama of 3 layers, hidden 128, on tinyshakespeare by characters, 250 steps of AdamW with
    20 of warm-up and a cosine, 2026-11-21; flips per step, and the loss on held-out text in nats:

        learning rate              1e-5    1e-4    1e-3    3e-3    1e-2    3e-2    1e-1
        flips after the warm-up  2.4e-4  2.0e-3  1.0e-2  2.2e-2  2.3e-2  2.3e-2  9.1e-3
        flips at half the rate   1.2e-4  8.0e-4  3.1e-3  5.9e-3  8.7e-3  1.1e-2  9.9e-3
        highest of a step        2.8e-4  2.3e-3  1.1e-2  2.7e-2  5.1e-2  9.0e-2  2.2e-1
        turnover at the peak       0.06     0.5     2.6     5.5
        held-out loss              3.77    2.98    2.34    2.22    2.29    2.40    2.58

    1e-5 is frozen by any measure. From 1e-2 on codes thrash early; then the weights grow away from their boundaries (mean |W|
    3.6, 7 and 13 times as large at the end; 1.7 times at 3e-3) and the flips look like those of a good run while the loss is
    worse. So check after every sample, and sample early: one every 5 steps detected it, every 10 did not.
    """
    if len(history) != len(rates):
        raise ValueError(f"{len(history)} samples need as many learning rates, got {len(rates)}")
    messages: list[str] = []
    means = [sum(health.flips for health in history[i : i + WINDOW]) / WINDOW for i in range(len(history) - WINDOW + 1)]
    if means and max(means) > THRASHING:
        messages.append(
            f"thrashing: {max(means):.1%} of the ternary codes flipped per step in {WINDOW} consecutive samples "
            f"(up to {THRASHING:.0%} is healthy): the learning rate is too high"
        )
    judged = [(health, peak / rate) for health, rate in zip(history, rates, strict=True) if rate >= peak / 10][-WINDOW:]
    if len(judged) < WINDOW:
        return messages
    total = sum(layer.weights for layer in judged[-1][0].layers.values())
    turnover = _turnover([health.flips * factor for health, factor in judged], total, steps)
    if turnover < TURNOVER:
        messages.append(
            f"frozen: at the rate of the last {WINDOW} samples only {turnover:.1%} of the ternary codes would flip in all "
            f"{steps} steps ({TURNOVER:.0%} or more is healthy): the learning rate is too low"
        )
        return messages
    frozen = []
    for path, layer in judged[-1][0].layers.items():
        flips = [health.layers[path].flips * factor for health, factor in judged if path in health.layers]
        if len(flips) == WINDOW and _turnover(flips, layer.weights, steps) < TURNOVER:
            frozen.append(path)
    if frozen:
        names = ", ".join(frozen[:5]) + (f" and {len(frozen) - 5} more" if len(frozen) > 5 else "")
        messages.append(f"{len(frozen)} of {len(judged[-1][0].layers)} ternary layers stopped moving (frozen): {names}")
    return messages


def _turnover(flips: Sequence[float], weights: int, steps: int) -> float:
    """Share of codes that would flip in `steps`, extrapolated from samples, with three flips added for small counts."""
    return (sum(flips) * weights + 3) / (weights * len(flips)) * steps
