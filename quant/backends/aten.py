"""The ternary CPU backend in torch alone: no compiler, no extra package. Formulas and layout: quant/ternary.py.

The product runs over slices of the packed rows. A slice is unpacked to int8, eight bytes per operation, into a buffer that
stays in the cache, multiplied exactly by `torch._int_mm` (oneDNN, VNNI), and its columns are written directly to the
output. So weights cross the memory bus at two bits, and an int8 copy would not be faster from 8 tokens on.

Only one product rounds: `frozen` weights, fewer than `FEW` tokens and bf16 output, the case of generation, use
torch's int4 kernel on a cached copy of 4 bits per weight, two to three times as fast. It sums in fp32, which is exact
here, but stores bf16: q · tᵀ is within 2⁻⁸ of its value (`INT4_BOUND`) before the division and the rounding that
every path ends with. For fp32 or fp16 output the product is exact for any number of tokens.
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

FEW = 8  # from this many tokens on unpacking beats int4, whose time grows with tokens (measured: 4096 × 11008, Zen 5)
INT4_GROUP = (256, 128, 64, 32)  # columns per scale of the int4 kernel, which is set to 1; larger is faster
INT4_BOUND = 2.0**-8  # relative error of q · tᵀ there: one rounding to bf16
INT4_COLUMNS = 1 << 17  # sums of less than 2²⁴ are exact in fp32

UNPACKED = 1 << 21  # bytes of int8 weights in a slice: with the activations they stay in the cache
TOKENS = 1024  # multiplied at a time, which bounds the accumulators
ELEMENTS = 1 << 17  # activations quantized at a time

_kept = threading.local()
_LOW = 0x0303030303030303  # the low two bits of eight bytes


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"aten's ternary kernels run on the cpu, not on {device.type}"


def describe(device: torch.device) -> str:
    return f"torch {torch.__version__} aten, {torch.backends.cpu.get_cpu_capability()} ({device.type})"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, k) → uint8 (out/4, k), fp32 (): the steps of the reference, on slices that stay in the cache."""
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
    """The scale of weights (out, k), fp32 (). The mean is torch's, over magnitudes laid out as in the reference, so bit-equal."""
    weight = weight.detach()
    magnitudes = _scratch(weight.numel()).view(weight.shape)
    if weight.dtype is torch.float32:
        torch.abs(weight, out=magnitudes)
    else:
        magnitudes.copy_(weight).abs_()
    return 1.0 / magnitudes.mean().clamp(min=ternary.FLOOR)


def _scratch(numel: int) -> Tensor:
    """A buffer fp32 (numel,) of this thread, overwritten by the next call.

    It is kept, at the size of the largest weight, because the C library maps and clears blocks of 32 MiB and more again each
    time: at 5632 × 2048 that took 26 of the 30 ms of a mean.
    """
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or kept.numel() < numel:
        with torch.inference_mode(False):  # else it could not be written to outside inference mode
            kept = _kept.scratch = torch.empty(numel, dtype=torch.float32, device="cpu")
    return kept[:numel]


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) → int8 (n, k), fp32 (n, 1)."""
    n, k = x.shape
    if 0 < n * k <= ELEMENTS:
        return ternary.quantize_activations(x)
    codes, scales = x.new_empty(n, k, dtype=torch.int8), x.new_empty(n, 1, dtype=torch.float32)
    step = max(1, ELEMENTS // k)
    buffer = x.new_empty(min(step, n), k, dtype=torch.float32)
    for start in range(0, n, step):
        tokens, scale = x[start : start + step].float(), scales[start : start + step]
        work = buffer[: len(tokens)]
        torch.amax(torch.abs(tokens, out=work), dim=1, keepdim=True, out=scale)
        scale.clamp_(min=ternary.FLOOR).reciprocal_().mul_(127)  # as torch computes 127 / tensor
        # No clipping needed: |x| · scale is at most 127 plus three roundings.
        codes[start : start + step] = torch.mul(tokens, scale, out=work).round_()
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
        for first in range(0, n, TOKENS):
            tokens = slice(first, first + TOKENS)
            product = torch._int_mm(codes[tokens], weights).view(-1, 4, stop - start)
            columns[tokens, :, start:stop] = product.float().div_(divisor[tokens])
    return out


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, k) in `dtype`: −1, 0 or 1 times 1 / scale, equal to dividing, rounded once."""
    quarter, k = packed.shape
    out = packed.new_empty(4, quarter, k, dtype=dtype)
    step = scale.reciprocal().to(dtype)
    for start, stop, weights in _unpacked(packed):
        out[:, start:stop].copy_(weights[:, :, :k]).mul_(step)
    return out.view(4 * quarter, k)


def int4_group(packed: Tensor) -> int | None:
    """Columns per group of the int4 kernel, or None if it does not support the shape."""
    out, k = 4 * packed.shape[0], packed.shape[1]
    if out % 16 or k >= INT4_COLUMNS:
        return None
    return next((group for group in INT4_GROUP if k % group == 0), None)


def _int4pack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The weights for the int4 kernel, uint8 (out, k/2), and its scales of 1 and offsets of 0, bf16 (k/group, out, 2)."""
    group = int4_group(packed)
    assert group is not None
    weights = ternary.unpack(packed)
    # In slices of its blocks of rows, because it needs int32.
    parts = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(w.int().add_(8), 1) for w in weights.split(1024)]
    ones = packed.new_ones(weights.shape[1] // group, weights.shape[0], 2, dtype=torch.bfloat16)
    ones[..., 1] = 0
    return torch.cat(parts), ones


def _unpacked(packed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, int8 (4, stop − start, ≥ k)) for slices of packed rows; the next one overwrites the tensor.

    A row takes an odd number of cache lines, with arbitrary padding: rows at a distance of a power of two would map to
    the same few sets of the cache, which made the product of few tokens twice as slow.
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
