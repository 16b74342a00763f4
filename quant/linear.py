"""The packed linear: frozen codes and scales, no float weight; adapters go on top.

Nothing here is a special tensor class. Codes and scales are frozen uint8 `nn.Parameter`s, the fp32 scales as their raw
bytes, so that `.to(dtype)`, `.half()` or a model-wide cast cannot change them, and sharding, deepcopy and `meta` treat
them like any parameter. The weight exists in floats only while a multiplication runs: the backward pass dequantizes it
again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import backends, nf4

# glibc gives blocks of 32 MB and more back to the system at once, so that each dequantized weight pays for its page
# faults anew; slices below are reused by the allocator, and stay in the cache. Measured at 4096 × 4096 bf16, forward and
# backward, one core: 25 → 12 ms with 32 tokens, 167 → 151 ms with 1024.
SLICE_FROM = 32 * 2**20
SLICE_BYTES = 8 * 2**20


def _slices(packed: nf4.NF4Tensor, dtype: torch.dtype, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """The dequantized weight (out, in) in slices along `dim`, each with its place; one slice but for large CPU weights.

    Slicing along the dimension that a product keeps (rows forward, columns backward) leaves every sum whole: the
    results are the same bits.
    """
    out_features, in_features = packed.shape
    backend = backends.select(packed.codes.device)
    scales = backend.scales(packed)
    count = 1
    bytes_ = packed.shape.numel() * dtype.itemsize
    if packed.codes.device.type == "cpu" and bytes_ >= SLICE_FROM and in_features % packed.block == 0:
        count = -(-bytes_ // SLICE_BYTES)
    if count == 1:
        weight = backend.dequantize(packed.codes, scales, packed.shape.numel(), packed.block, dtype)
        yield slice(None), weight.view(out_features, in_features)
        return
    codes, scales = packed.codes.view(out_features, -1), scales.view(out_features, -1)
    unit = 1 if dim == 0 else packed.block
    step = -(-packed.shape[dim] // unit // count) * unit
    for start in range(0, packed.shape[dim], step):
        place = slice(start, min(start + step, packed.shape[dim]))
        shape = (place.stop - start, in_features) if dim == 0 else (out_features, place.stop - start)
        of_codes, of_scales = (place, place) if dim == 0 else (_over(place, 2), _over(place, packed.block))
        part = (codes[of_codes], scales[of_scales]) if dim == 0 else (codes[:, of_codes], scales[:, of_scales])
        flat = [t.reshape(-1) for t in part]
        yield place, backend.dequantize(flat[0], flat[1], shape[0] * shape[1], packed.block, dtype).view(shape)


def _over(place: slice, divisor: int) -> slice:
    return slice(place.start // divisor, place.stop // divisor)
