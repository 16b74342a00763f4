"""NF4, the 4-bit format of QLoRA: sixteen levels, blocks of 64, scales that can be quantized again.

A block of 64 consecutive weights (row-major) is divided by its largest absolute value, and each quotient becomes the
index of the nearest of sixteen levels, the quantiles of a normal distribution. With `double`, the scales themselves are
stored in 8 bits: their mean is removed, and blocks of 256 of them are quantized with an 8-bit dynamic map. 4.127 bits per weight.

    byte k of the codes:   bits 7-4 = weight 2k,   bits 3-0 = weight 2k+1

This module is the reference: plain torch, fp32 arithmetic, equal to bitsandbytes' functional API on the CPU bit for bit
(except bf16 subnormals, below 1.2e-38, which its AVX512-BF16 kernel flushes to zero).
Sources: QLoRA, arXiv 2305.14314, section 3 and appendix E; the dynamic map: arXiv 2110.02861, section 2.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.byte_views import as_bytes, as_floats

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 64
NESTED_BLOCK = 256
SLICE = 4096  # blocks quantized at a time: 1 MB of fp32
CELLS = 64  # of the grid for looking up a weight's level
TINY = 1e-38  # bitsandbytes' floor under a scale before it is inverted

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _dynamic_levels() -> tuple[float, ...]:
    """The 256 signed levels of the 8-bit dynamic map: 2^i steps in each decade 10^(i-6), i = 0 … 6, then 0 and 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        levels += middles + [-m for m in middles]
    return tuple(sorted(levels))


DYNAMIC_LEVELS = _dynamic_levels()


@functools.lru_cache(maxsize=64)
def _on_card(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


def table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """`levels` as fp32 on `device`. Cached on a GPU, where creating it would synchronize in every linear."""
    return _on_card(levels, device) if device.type == "cuda" else torch.tensor(levels, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A matrix in NF4: plain tensors without arithmetic.

    codes: uint8 (ceil(numel/2), 1), two per byte, first weight in the high bits (bitsandbytes' layout).
    absmax: fp32 (blocks,), blocks = ceil(numel/block); with double quantization uint8 (blocks,), the nested codes.
    nested_absmax: fp32 (ceil(blocks/256),) and offset: fp32 (), the mean; both None without double quantization.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    block: int = BLOCK

    @property
    def double(self) -> bool:
        return self.nested_absmax is not None

    def parts(self) -> list[Tensor]:
        """The tensors as a layer stores them, all uint8: codes, absmax and, with double quantization, nested_absmax, offset."""
        if self.nested_absmax is None or self.offset is None:
            return [self.codes, as_bytes(self.absmax)]
        return [self.codes, self.absmax, as_bytes(self.nested_absmax), as_bytes(self.offset)]


def of_parts(parts: Sequence[Tensor], shape: torch.Size) -> NF4Tensor:
    """The inverse of `NF4Tensor.parts`; views if the bytes are aligned."""
    if len(parts) == 2:
        return NF4Tensor(parts[0], as_floats(parts[1]), None, None, shape)
    return NF4Tensor(parts[0], parts[1], as_floats(parts[2]), as_floats(parts[3]).view(()), shape)


def sizes(numel: int, *, block: int = BLOCK) -> tuple[int, int, int]:
    """(bytes of codes, blocks, nested blocks) of a matrix of `numel` weights."""
    blocks = -(-numel // block)
    return -(-numel // 2), blocks, -(-blocks // NESTED_BLOCK)


def layout(shape: torch.Size, *, double: bool = True) -> dict[str, tuple[int, ...]]:
    """The uint8 tensors in which a layer stores a matrix of this shape: {name: shape}, in the order of `parts`."""
    codes, blocks, nested_blocks = sizes(shape.numel())
    if not double:
        return {"weight": (codes, 1), "absmax": (4 * blocks,)}
    return {"weight": (codes, 1), "absmax": (blocks,), "nested_absmax": (4 * nested_blocks,), "offset": (4,)}


def unfit(shape: torch.Size) -> str | None:
    """Why the format cannot store a matrix of this shape; None if it can."""
    return f"NF4 cannot store an empty weight of shape {tuple(shape)}" if 0 in shape else None


def quantize(weight: Tensor, *, block: int = BLOCK, double: bool = True) -> NF4Tensor:
    """`weight` (any shape; fp32, bf16 or fp16; finite; not empty) in NF4, on its own device.

    Raises ValueError for another dtype, an empty tensor, weights that are not finite, or a mean scale that overflows.
    """
    if weight.dtype not in SOURCES:
        raise ValueError(f"NF4 quantizes fp32, bf16 or fp16 weights, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"NF4 cannot store an empty weight of shape {tuple(weight.shape)}")
    numel, flat = weight.numel(), weight.detach().reshape(-1)
    code_bytes, block_count, _ = sizes(numel, block=block)
    codes = flat.new_empty(code_bytes, dtype=torch.uint8)
    absmax = flat.new_empty(block_count, dtype=torch.float32)
    for start in range(0, numel, SLICE * block):  # keeps intermediate results small
        part, scales = _quantize_blocks(flat[start : start + SLICE * block], block)
        codes[start // 2 : start // 2 + part.numel()] = part
        absmax[start // block : start // block + scales.numel()] = scales
    if not bool(absmax.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{bad} of {numel} weights are not finite (NaN or infinite) and cannot be quantized to NF4")
    codes = codes.unsqueeze(1)
    if not double:
        return NF4Tensor(codes, absmax, None, None, weight.shape, block)
    offset = absmax.mean()
    if not bool(offset.isfinite()):
        raise ValueError("the mean of the block scales overflows fp32: the weights are too large for double quantization")
    nested_codes, nested_absmax = _quantize_scales(absmax - offset)
    return NF4Tensor(codes, nested_codes, nested_absmax, offset, weight.shape, block)


def _quantize_blocks(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Weights (n,) that start with a block → uint8 codes (ceil(n/2),), fp32 absmax (ceil(n/block),)."""
    numel, block_count = flat.numel(), -(-flat.numel() // block)
    blocks = pad(flat.float(), (0, block_count * block - numel)).view(block_count, block)
    absmax = blocks.abs().amax(dim=1)
    # bitsandbytes multiplies by the inverse; dividing would give other codes. Its last, incomplete block
    # is divided, though, and that block's scale is stored with the floor.
    scaled = blocks * absmax.clamp(min=TINY).reciprocal()[:, None]
    if numel % block:
        absmax[-1:].clamp_(min=TINY)
        scaled[-1] = blocks[-1] / absmax[-1]
    # The index of the nearest level is the number of midpoints below. A cell of the grid has at most one midpoint.
    below, midpoint = (table(values, flat.device) for values in _GRID)
    cell = scaled.clamp_(-1, 1).add(1).mul_(CELLS / 2).clamp_(max=CELLS - 1).nan_to_num_(0).int()
    nibbles = below[cell].to(torch.uint8) + (scaled > midpoint[cell])
    nibbles = nibbles.view(-1)[: numel + numel % 2]
    return (nibbles[::2] << 4) | nibbles[1::2], absmax


def _grid() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each of CELLS equal cells of −1 … 1: midpoints between levels below it, and the midpoint inside or infinity."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    midpoints = ((levels[:-1] + levels[1:]) / 2).tolist()
    cells = [int((m + 1) * CELLS / 2) for m in midpoints]
    inside = dict(zip(cells, midpoints, strict=True))
    return tuple(float(sum(c < i for c in cells)) for i in range(CELLS)), tuple(inside.get(i, math.inf) for i in range(CELLS))


_GRID = _grid()


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (blocks,) → uint8 codes (blocks,) of the dynamic map and fp32 absmax (ceil(blocks/256),)."""
    blocks = scales.numel()
    nested_blocks = -(-blocks // NESTED_BLOCK)
    levels = table(DYNAMIC_LEVELS, scales.device)
    padded = pad(scales, (0, nested_blocks * NESTED_BLOCK - blocks)).view(nested_blocks, NESTED_BLOCK)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * absmax.reciprocal()[:, None]
    # bitsandbytes looks the level up in a table of 65536 entries, so the value is first rounded to a point of that grid.
    point = ((scaled + 1) * 32767.5 + 0.5).floor().nan_to_num(0).clamp(0, 65535)
    codes = torch.bucketize(point / 32767.5 - 1, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    codes = torch.where(absmax[:, None] > 0, codes, 0)
    return codes.view(-1)[:blocks].to(torch.uint8), absmax


def dequantize_scales(packed: NF4Tensor) -> Tensor:
    """The scales of the blocks, fp32 (blocks,), with the double quantization undone."""
    if packed.nested_absmax is None or packed.offset is None:
        return packed.absmax
    levels = table(DYNAMIC_LEVELS, packed.absmax.device)
    blocks = packed.absmax.numel()
    nested = packed.nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks]
    return levels[packed.absmax.int()] * nested + packed.offset


def dequantize_codes(codes: Tensor, scales: Tensor, numel: int, *, block: int = BLOCK, dtype: torch.dtype) -> Tensor:
    """codes (bytes of `numel` weights) × scales fp32 (blocks,) → (numel,) in `dtype`, rounded once from fp32."""
    levels = table(LEVELS, codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # row b: the two weights of byte b
    values = pairs[codes.reshape(-1).int()].view(-1)
    values = pad(values, (0, scales.numel() * block - values.numel())).view(-1, block) * scales[:, None]
    return values.view(-1)[:numel].to(dtype)


def dequantize(packed: NF4Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized weights, in the shape and on the device of `packed`."""
    scales = dequantize_scales(packed)
    flat = dequantize_codes(packed.codes, scales, packed.shape.numel(), block=packed.block, dtype=dtype)
    return flat.view(packed.shape)


def fake_quantize(weight: Tensor, *, block: int = BLOCK, double: bool = True) -> Tensor:
    """`weight` quantized to NF4 and dequantized, in its own dtype, as a straight-through layer uses it."""
    return dequantize(quantize(weight, block=block, double=double), dtype=weight.dtype)
