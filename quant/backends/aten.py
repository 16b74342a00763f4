"""Ternary on the CPU with nothing but torch: no compiler, no extra package. Formulas and layout: quant/ternary.py.

The product runs over slices of the packed rows. A slice is unpacked to int8, eight bytes an operation, into a buffer that
stays in the cache, multiplied exactly by `torch._int_mm` (oneDNN, VNNI), and its columns are written straight into their
place. Weights so cross the memory bus at two bits, which is why no int8 copy is kept: from 8 rows on one would not be faster.

The one product that rounds: `frozen` weights, fewer than `FEW` rows and bf16 asked for, the case of generation, run in
torch's int4 kernel on a resident copy of 4 bits a weight, two to three times as fast. It sums in fp32, which is exact
here, but stores bf16: q · tᵀ comes out within 2⁻⁸ of its value (`INT4_BOUND`), ahead of the division and the rounding that
every path ends with. Asked for fp32 or fp16, the product is exact at any number of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from quant import ternary
from quant.weight_cache import cached, keepable

NAME = "aten"
DEVICES = ("cpu",)

FEW = 8  # from this many rows on unpacking beats int4, whose time grows with the rows (measured: 4096 × 11008, Zen 5)
INT4_GROUP = (256, 128, 64, 32)  # columns to a scale, which the int4 kernel wants and we set to 1; the larger the faster
INT4_BOUND = 2.0**-8  # relative error of q · tᵀ there: one rounding to bf16
INT4_COLUMNS = 1 << 17  # sums of less than 2²⁴ are exact in fp32

UNPACKED = 1 << 21  # bytes of int8 weights in a slice: with the activations they stay in the cache
ROWS = 1024  # activations multiplied at a time, which bounds the accumulators
ELEMENTS = 1 << 17  # activations quantized at a time

_kept = threading.local()
_LOW = 0x0303030303030303  # the low two bits of eight bytes


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"aten's ternary kernels are for the cpu, not {device.type}"


def describe(device: torch.device) -> str:
    return f"torch {torch.__version__} aten, {torch.backends.cpu.get_cpu_capability()} ({device.type})"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, k) → uint8 (out/4, k), fp32 (): the oracle's steps, on slices that stay in the cache."""
    quarter, k = weight.shape[0] // 4, weight.shape[1]
    weight = weight.detach()
    scale = weight_scale(weight)
    packed, stripes = weight.new_empty(quarter, k, dtype=torch.uint8), weight.reshape(4, quarter, k)
    step = min(quarter, max(1, ELEMENTS // (4 * k)))
    buffer = weight.new_empty(4 * step * k, dtype=torch.float32)
    for start in range(0, quarter, step):
        part = stripes[:, start : start + step].float()
        codes = torch.mul(part, scale, out=buffer[: part.numel()].view(part.shape)).round_().clamp_(-1, 1)
        # The byte in fp32, which holds it exactly: Σ (t + 1) · 4ʲ.
        byte = codes[0].add_(codes[1], alpha=4).add_(codes[2], alpha=16).add_(codes[3], alpha=64).add_(0b01010101)
        packed[start : start + step] = byte
    return packed, scale


def weight_scale(weight: Tensor) -> Tensor:
    """The scale of weights (out, k), fp32 (). The mean is torch's, over magnitudes laid out as the oracle's: the same bits."""
    weight = weight.detach()
    magnitudes = _scratch(weight.numel()).view(weight.shape)
    if weight.dtype is torch.float32:
        torch.abs(weight, out=magnitudes)
    else:
        magnitudes.copy_(weight).abs_()
    return 1.0 / magnitudes.mean().clamp(min=ternary.FLOOR)


def _scratch(numel: int) -> Tensor:
    """fp32 (numel,), of this thread, overwritten by the next call.

    Kept, at the size of the largest weight, because the C library maps and clears blocks of 32 MiB and more afresh each
    time: at 5632 × 2048 that took 26 of the 30 ms of a mean.
    """
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or kept.numel() < numel:
        with torch.inference_mode(False):  # else it could not be written to outside of it
            kept = _kept.scratch = torch.empty(numel, dtype=torch.float32, device="cpu")
    return kept[:numel]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) → int8 (n, k), fp32 (n, 1)."""
    n, k = x.shape
    if 0 < n * k <= ELEMENTS:
        return ternary.quantize_rows(x)
    codes, scales = x.new_empty(n, k, dtype=torch.int8), x.new_empty(n, 1, dtype=torch.float32)
    step = max(1, ELEMENTS // k)
    buffer = x.new_empty(min(step, n), k, dtype=torch.float32)
    for start in range(0, n, step):
        rows, scale = x[start : start + step].float(), scales[start : start + step]
        work = buffer[: len(rows)]
        torch.amax(torch.abs(rows, out=work), dim=1, keepdim=True, out=scale)
        scale.clamp_(min=ternary.FLOOR).reciprocal_().mul_(127)  # as torch computes 127 / tensor
        # Nothing to clip: |x| · scale is at most 127 and three roundings.
        codes[start : start + step] = torch.mul(rows, scale, out=work).round_()
    return codes, scales


def linear(codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
    """codes int8 (n, k), scales fp32 (n, 1), packed uint8 (out/4, k), scale fp32 () → (n, out) in `dtype`."""
    n, k = codes.shape
    if frozen and 0 < n < FEW and dtype is torch.bfloat16 and keepable(packed) and (group := int4_group(packed)) is not None:
        weights, ones = cached(packed, "int4pack", _int4pack, frozen=True)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(codes.bfloat16(), weights, group, ones)
        return product.div(scales * scale).to(dtype)  # in fp32: bf16 by fp32
    quarter = packed.shape[0]
    out = codes.new_empty(n, 4 * quarter, dtype=dtype)
    columns, divisor, codes = out.view(n, 4, quarter), (scales * scale).view(n, 1, 1), codes.contiguous()
    for start, stop, unpacked in _unpacked(packed) if n else ():
        weights = unpacked.view(4 * (stop - start), -1)[:, :k].t()
        for first in range(0, n, ROWS):
            rows = slice(first, first + ROWS)
            product = torch._int_mm(codes[rows], weights).view(-1, 4, stop - start)
            columns[rows, :, start:stop] = product.float().div_(divisor[rows])
    return out


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, k) in `dtype`: −1, 0 or 1 times 1 / scale, which is what dividing gives, rounded once."""
    quarter, k = packed.shape
    out = packed.new_empty(4, quarter, k, dtype=dtype)
    step = scale.reciprocal().to(dtype)
    for start, stop, weights in _unpacked(packed):
        out[:, start:stop].copy_(weights[:, :, :k]).mul_(step)
    return out.view(4 * quarter, k)


def int4_group(packed: Tensor) -> int | None:
    """Columns to a group in the int4 kernel, or None when it does not take the shape."""
    out, k = 4 * packed.shape[0], packed.shape[1]
    if out % 16 or k >= INT4_COLUMNS:
        return None
    return next((group for group in INT4_GROUP if k % group == 0), None)


def _int4pack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The weights for the int4 kernel, uint8 (out, k/2), and its scales of 1 and offsets of 0, bf16 (k/group, out, 2)."""
    group = int4_group(packed)
    assert group is not None
    weights = ternary.unpack(packed)
    # In slices of its blocks of rows: it takes int32.
    parts = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(w.int().add_(8), 1) for w in weights.split(1024)]
    ones = packed.new_ones(weights.shape[1] // group, weights.shape[0], 2, dtype=torch.bfloat16)
    ones[..., 1] = 0
    return torch.cat(parts), ones


def _unpacked(packed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, int8 (4, stop − start, ≥ k)) for run after run of packed rows; the tensor is overwritten by the next one.

    A row takes an odd number of cache lines, the last bytes being arbitrary: rows that are a power of two apart fall into
    the same few sets of the cache, which made the product of few rows twice as slow.
    """
    quarter, k = packed.shape
    width = 64 * ((k + 63) // 64 | 1)
    step = min(quarter, max(1, UNPACKED // (4 * width)))
    staged, buffer = packed.new_empty(step * width), packed.new_empty(4 * step * width)
    shifts = torch.arange(0, 8, 2, device=packed.device).view(4, 1)
    for start in range(0, quarter, step):
        size = min(step, quarter - start)
        rows, weights = staged[: size * width], buffer[: 4 * size * width].view(4, -1)
        rows.view(size, width)[:, :k] = packed[start : start + size]
        torch.bitwise_right_shift(rows.view(torch.int64), shifts, out=weights.view(torch.int64)).bitwise_and_(_LOW)
        yield start, start + size, weights.view(torch.int8).sub_(1).view(4, size, width)
