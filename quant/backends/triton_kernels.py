"""Triton kernels for ternary and NF4, and the functions that launch them.

Ternary (BitNet b1.58, arXiv 2402.17764). Weights cross the memory bus at two bits and are unpacked in registers, right
before the tensor cores multiply int8 by int8 into int32, so that the product is exact. The packed layout determines the tile:
byte [r, c] holds the weights of rows r, r + out/4, r + 2·out/4 and r + 3·out/4, so one tile of bytes is four tiles of int8,
with four accumulators, each of which is written to its own stripe of the output's columns. A single row, the case of
generation, has its own kernel without tensor cores: four codes per step with dp4a, bound by the bytes of the weights.

NF4 (QLoRA, arXiv 2305.14314). Dequantizing looks up one of sixteen levels and multiplies by the scale of the block, undoing a
double quantization in the same pass; a few rows are multiplied in the same pass, without writing a float weight.

Every division is IEEE's (`div_rn`; plain `/` is approximate on CUDA), no multiplication is contracted with an addition where
torch rounds in between (`enable_fp_fusion=False`), and scales are read on the device, without synchronization.

The launchers take contiguous tensors of one device and raise TypeError or ValueError otherwise. int8 on tensor cores needs
compute capability 8.0. Under TRITON_INTERPRET=1 everything runs on CPU tensors, slowly; PTX is replaced by equivalent code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import nf4, ternary

FLOOR = tl.constexpr(ternary.FLOOR)
NESTED = tl.constexpr(nf4.NESTED_BLOCK)
PTX = tl.constexpr(not triton.knobs.runtime.interpret)

LONGEST = 1 << 14  # columns of a row that a program holds in registers
FEW = 16  # rows up to which NF4 multiplies without dequantizing


# ------------------------------------------------------------------------------------------------- activations to int8


@triton.jit
def _row(x: tl.tensor, weight: tl.tensor, columns: tl.tensor, k: tl.tensor, inverse: tl.tensor, NORM: tl.constexpr) -> tl.tensor:
    """Columns of a row in fp32, optionally normalized; zero beyond the end."""
    value = tl.load(x + columns, mask=columns < k, other=0.0)
    if NORM:
        factor = tl.load(weight + columns, mask=columns < k, other=0.0)
        value = (value.to(tl.float32) * inverse).to(value.dtype)
        if value.dtype == factor.dtype:
            value = (factor.to(tl.float32) * value.to(tl.float32)).to(value.dtype)
        else:  # torch's promotion of two of fp32, bf16, fp16
            value = factor.to(tl.float32) * value.to(tl.float32)
    return value.to(tl.float32)


@triton.jit
def rows_kernel(
    x: tl.tensor, weight: tl.tensor, codes: tl.tensor, scales: tl.tensor, inverses: tl.tensor, k: tl.tensor, eps: tl.tensor,
    NORM: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per row. ONCE: the row fits into a block, and is read once."""
    row = tl.program_id(0).to(tl.int64)
    x += row * k
    codes += row * k
    columns = tl.arange(0, BLOCK)
    inverse = 1.0
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, k, BLOCK):
            value = tl.load(x + start + columns, mask=start + columns < k, other=0.0).to(tl.float32)
            squares += value * value
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), k * 1.0) + eps))
        tl.store(inverses + row, inverse)
    # As integers the bits of absolute values sort like the values, with NaN the largest, so that it is not lost.
    if ONCE:
        value = _row(x, weight, columns, k, inverse, NORM)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, k, BLOCK):
            value = _row(x, weight, start + columns, k, inverse, NORM)
            bits = tl.maximum(bits, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
    largest = tl.maximum(largest, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(1.0, largest) * 127.0  # as torch computes 127 / tensor
    tl.store(scales + row, scale)
    if ONCE:
        tl.store(codes + columns, _code(value * scale), mask=columns < k)
    else:
        for start in range(0, k, BLOCK):
            value = _row(x, weight, start + columns, k, inverse, NORM)
            tl.store(codes + start + columns, _code(value * scale), mask=start + columns < k)


@triton.jit
def _code(value: tl.tensor) -> tl.tensor:
    """fp32 → int8, half to even: 1.5 · 2²³ leaves fp32 no bit for fractions. NaN gives 0.

    No clipping needed: |x| · scale is at most 127 plus three roundings.
    """
    whole = (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(value == value, whole, 0).to(tl.int8)


# ---------------------------------------------------------------------------------------------------- the ternary product


# Four bytes at once. As instructions, because in Triton's own operators every byte is taken out of its word and put back.
UNPACK = tl.constexpr("""{
    .reg .b32 high;
    shr.u32 high, $4, 4;
    and.b32 $0, $4, 0x03030303;
    and.b32 $1, $4, 0x0C0C0C0C;
    and.b32 $2, high, 0x03030303;
    and.b32 $3, high, 0x0C0C0C0C;
}""")


@triton.jit
def _codes(packed: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Bytes (any shape) → int8 for each stripe: its codes 0, 1, 2, those of stripes 1 and 3 times four."""
    if PTX:
        return tl.inline_asm_elementwise(
            UNPACK, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    high = packed >> 4
    return (packed & 3).to(tl.int8), (packed & 12).to(tl.int8), (high & 3).to(tl.int8), (high & 12).to(tl.int8)


@triton.jit
def product_kernel(
    q: tl.tensor, scales: tl.tensor, packed: tl.tensor, scale: tl.tensor, out: tl.tensor,
    n: tl.tensor, quarter: tl.tensor, k: tl.tensor,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows times BR packed rows: (BM, 4·BR) of the output. EVEN: k is a multiple of BK.

    Programs process GROUP tiles of rows before the next weights, so that concurrent programs share both in the L2 cache.
    """
    program = tl.program_id(0)
    tiles, ranges = tl.cdiv(n, BM), tl.cdiv(quarter, BR)
    first = program // (GROUP * ranges) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    tile, part = first + program % (GROUP * ranges) % height, program % (GROUP * ranges) // height
    rows, stripe = tile * BM + tl.arange(0, BM), part * BR + tl.arange(0, BR)
    columns = tl.arange(0, BK)
    # Beyond the end the last row is read again, but not written.
    q += tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + columns[None, :]
    packed += tl.minimum(stripe, quarter - 1).to(tl.int64)[:, None] * k + columns[None, :]
    ones = tl.full((BK, 8), 1, tl.int8)
    sums = tl.zeros((BM, 8), tl.int32)
    sum0 = tl.zeros((BM, BR), tl.int32)
    sum1 = tl.zeros((BM, BR), tl.int32)
    sum2 = tl.zeros((BM, BR), tl.int32)
    sum3 = tl.zeros((BM, BR), tl.int32)
    for start in range(0, k, BK):
        if EVEN:
            a = tl.load(q)
            b = tl.load(packed)
        else:
            a = tl.load(q, mask=columns[None, :] < k - start, other=0)
            b = tl.load(packed, mask=columns[None, :] < k - start, other=0)
        w0, w1, w2, w3 = _codes(b)
        sums = tl.dot(a, ones, sums, out_dtype=tl.int32)
        sum0 = tl.dot(a, w0.T, sum0, out_dtype=tl.int32)
        sum1 = tl.dot(a, w1.T, sum1, out_dtype=tl.int32)
        sum2 = tl.dot(a, w2.T, sum2, out_dtype=tl.int32)
        sum3 = tl.dot(a, w3.T, sum3, out_dtype=tl.int32)
        q += BK
        packed += BK
    total = tl.sum(sums, 1)[:, None] // 8
    inside = (rows[:, None] < n) & (stripe[None, :] < quarter)
    divisor = (tl.load(scales + rows, mask=rows < n, other=1.0) * tl.load(scale))[:, None]
    out += rows.to(tl.int64)[:, None] * (4 * quarter) + stripe[None, :]
    tl.store(out, _quotient(sum0 - total, divisor, out), mask=inside)
    tl.store(out + quarter, _quotient((sum1 >> 2) - total, divisor, out), mask=inside)
    tl.store(out + 2 * quarter, _quotient(sum2 - total, divisor, out), mask=inside)
    tl.store(out + 3 * quarter, _quotient((sum3 >> 2) - total, divisor, out), mask=inside)


@triton.jit
def _quotient(product: tl.tensor, divisor: tl.tensor, out: tl.tensor) -> tl.tensor:
    return tl.div_rn(product.to(tl.float32), divisor).to(out.dtype.element_ty)


@triton.jit
def _dot(codes: tl.tensor, q: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + the product of four unsigned and four signed bytes, int32 tiles."""
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, q, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(0, 32, 8):
        total += ((codes >> byte) & 0xFF) * ((q << (24 - byte)) >> 24)
    return total


@triton.jit
def vector_kernel(
    q: tl.tensor, scales: tl.tensor, packed: tl.tensor, scale: tl.tensor, out: tl.tensor, quarter: tl.tensor, words: tl.tensor,
    BR: tl.constexpr, BW: tl.constexpr,
) -> None:  # fmt: skip
    """One row of activations times BR packed rows. q, packed: as int32 words of four columns; words = k / 4."""
    stripe = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.broadcast_to(tl.arange(0, BW)[None, :], (BR, BW))  # q in the layout of the weights: no exchange between threads
    packed += tl.minimum(stripe, quarter - 1).to(tl.int64)[:, None] * words
    sums = tl.zeros((BR, BW), tl.int32)
    sum0 = tl.zeros((BR, BW), tl.int32)
    sum1 = tl.zeros((BR, BW), tl.int32)
    sum2 = tl.zeros((BR, BW), tl.int32)
    sum3 = tl.zeros((BR, BW), tl.int32)
    for start in range(0, words, BW):
        inside = columns < words - start
        a = tl.load(q + start + columns, mask=inside, other=0)  # zeros beyond the end, for any weights there
        b = tl.load(packed + start + columns, mask=inside, other=0)
        sums = _dot(tl.full((BR, BW), 0x01010101, tl.int32), a, sums)
        sum0 = _dot(b & 0x03030303, a, sum0)
        sum1 = _dot((b >> 2) & 0x03030303, a, sum1)
        sum2 = _dot((b >> 4) & 0x03030303, a, sum2)
        sum3 = _dot((b >> 6) & 0x03030303, a, sum3)
    total, divisor = tl.sum(sums, 1), tl.load(scales) * tl.load(scale)
    out += stripe
    inside = stripe < quarter
    tl.store(out, _quotient(tl.sum(sum0, 1) - total, divisor, out), mask=inside)
    tl.store(out + quarter, _quotient(tl.sum(sum1, 1) - total, divisor, out), mask=inside)
    tl.store(out + 2 * quarter, _quotient(tl.sum(sum2, 1) - total, divisor, out), mask=inside)
    tl.store(out + 3 * quarter, _quotient(tl.sum(sum3, 1) - total, divisor, out), mask=inside)


@triton.jit
def weights_kernel(packed: tl.tensor, scale: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """`size` packed bytes → four stripes of floats: −1, 0 or 1, divided by the scale in fp32 and rounded once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    packed_ = tl.load(packed + place, mask=inside, other=0)
    step = tl.div_rn(1.0, tl.load(scale))
    plus, minus = step.to(out.dtype.element_ty), (-step).to(out.dtype.element_ty)
    out += place
    for stripe in tl.static_range(4):
        code = (packed_ >> (2 * stripe)) & 3
        tl.store(out, tl.where(code == 2, plus, tl.where(code == 0, minus, tl.zeros_like(plus))), mask=inside)
        out += size


# ------------------------------------------------------------------------------------------------------------------- NF4


@triton.jit
def _scale(
    scales: tl.tensor, nested: tl.tensor, table: tl.tensor, offset: tl.tensor, block: tl.tensor, inside: tl.tensor,
    DOUBLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """fp32 scales of blocks; DOUBLE: they are codes of the dynamic map, whose 256 levels are in `table`."""
    value = tl.load(scales + block, mask=inside, other=0)
    if DOUBLE:
        level = tl.load(table + value.to(tl.int32))
        value = level * tl.load(nested + block // NESTED, mask=inside, other=0.0) + tl.load(offset)
    return value


@triton.jit
def _pair(codes: tl.tensor, levels: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The two weights of each byte."""
    high, low = tl.load(levels + (codes >> 4)), tl.load(levels + (codes & 15))
    return (high * scale).to(dtype), (low * scale).to(dtype)


@triton.jit
def scales_kernel(
    codes: tl.tensor, nested: tl.tensor, table: tl.tensor, offset: tl.tensor, out: tl.tensor, blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Undo the double quantization."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + block, _scale(codes, nested, table, offset, block, block < blocks, DOUBLE=True), mask=block < blocks)


@triton.jit
def nf4_kernel(
    codes: tl.tensor, levels: tl.tensor, scales: tl.tensor, nested: tl.tensor, table: tl.tensor, offset: tl.tensor,
    out: tl.tensor, numel: tl.tensor, size: tl.tensor, SIZE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """`numel` weights in blocks of SIZE, two a byte, rounded once from fp32. One program: BLOCK of the `size` bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    # One scale per block, then the blocks are joined again.
    block = tl.program_id(0).to(tl.int64) * (2 * BLOCK // SIZE) + tl.arange(0, 2 * BLOCK // SIZE)
    scale = _scale(scales, nested, table, offset, block, block * SIZE < numel, DOUBLE)
    scale = tl.broadcast_to(scale[:, None], (2 * BLOCK // SIZE, SIZE // 2)).reshape(BLOCK)
    high, low = _pair(tl.load(codes + byte, mask=byte < size, other=0), levels, scale, out.dtype.element_ty)
    place = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, tl.interleave(high, low), mask=place < numel)


@triton.jit
def nf4_rows_kernel(
    x: tl.tensor, codes: tl.tensor, levels: tl.tensor, scales: tl.tensor, nested: tl.tensor, table: tl.tensor,
    offset: tl.tensor, out: tl.tensor, n: tl.tensor, outputs: tl.tensor, width: tl.tensor,
    SIZE: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """n ≤ BM rows times BR rows of the weight, `width` bytes each, which are whole blocks of SIZE. BK columns a step.

    The weights are those that dequantizing gives, in the dtype of x; they are multiplied and summed in fp32.
    """
    rows, columns, bytes_ = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BK // 2)
    output, blocks = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BK // SIZE)
    # Beyond the end the last row is read again, but not written.
    x += tl.minimum(rows, n - 1)[:, None] * (2 * width) + columns[None, :]
    first = tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * width
    sums = tl.zeros((BM, BR), tl.float32)
    for start in range(0, width, BK // 2):
        a = tl.load(x + 2 * start, mask=columns[None, :] < 2 * (width - start), other=0.0)
        pair = tl.load(codes + first + start + bytes_[None, :], mask=bytes_[None, :] < width - start, other=0)
        block = (first + start) // (SIZE // 2) + blocks[None, :]
        inside = blocks[None, :] * (SIZE // 2) < width - start
        scale = _scale(scales, nested, table, offset, block, inside, DOUBLE)
        scale = tl.broadcast_to(scale[:, :, None], (BR, BK // SIZE, SIZE // 2)).reshape(BR, BK // 2)
        high, low = _pair(pair, levels, scale, x.dtype.element_ty)
        sums = tl.dot(a, tl.interleave(high, low).T, sums, input_precision="ieee")
    out += rows[:, None] * outputs + output[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), mask=(rows[:, None] < n) & (output[None, :] < outputs))


# ------------------------------------------------------------------------------------------------------------- launchers

Options = dict[str, Any]


def rows_options(k: int) -> Options:
    block = triton.next_power_of_2(k) if k <= LONGEST else 4096
    return {"ONCE": k <= block, "BLOCK": block, "num_warps": max(1, block // 512), "enable_fp_fusion": False}


def product_options(n: int, k: int) -> Options:
    """Chosen by calculation for an RTX 4070 (46 multiprocessors, 100 KB of shared memory each), not measured."""
    if n <= 16 and k % 16 == 0:  # bound by the bytes of the weights: many small programs
        options = {"BM": 16, "BR": 16, "BK": 256, "num_warps": 2, "num_stages": 4}
    elif n <= 256 or k % 16:  # unaligned rows are loaded by bytes, which takes registers
        options = {"BM": 64, "BR": 16, "BK": 64, "num_warps": 4, "num_stages": 4}
    else:
        options = {"BM": 128, "BR": 32, "BK": 64, "num_warps": 8, "num_stages": 4}
    return options | {"EVEN": k % options["BK"] == 0, "GROUP": 8}


VECTOR: Options = {"BR": 4, "BW": 128, "num_warps": 4}  # one packed row per warp, 16 bytes per thread
WEIGHTS: Options = {"BLOCK": 2048, "num_warps": 4}
SCALES: Options = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}
NF4: Options = {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False}
NF4_ROWS: Options = {"BM": FEW, "BR": 16, "BK": 256, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) fp32, bf16 or fp16 → codes int8 (n, k), scales fp32 (n, 1): the bits of `quant.ternary.quantize_activations`."""
    codes, scales, _ = _quantize_activations(x, None, 0.0)
    return codes, scales


def norm_quantize_activations(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and `quantize_activations` in one pass over x (n, k), as LlamaRMSNorm and then the linear would: codes, scales, r.

    r = 1 / sqrt(mean(x²) + eps), fp32 (n, 1), is what the backward pass of the norm needs besides x. x · r is formed in fp32
    and rounded to the dtype of x; its product with `weight` (k,) is rounded to the dtype that torch promotes the two to. Given
    r, codes and scales have the bits of torch; r itself differs by the order of summation, a few units in its last place.
    """
    codes, scales, inverses = _quantize_activations(x, weight, eps)
    assert inverses is not None
    return codes, scales, inverses


def _quantize_activations(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    _check("x", x, ternary.SOURCES, (None, None))
    n, k = x.shape
    if k == 0:
        raise ValueError("x has no columns")
    codes, scales = x.new_empty(n, k, dtype=torch.int8), x.new_empty(n, 1, dtype=torch.float32)
    inverses = None
    if weight is not None:
        _check("weight", weight, ternary.SOURCES, (k,), x)
        inverses = torch.empty_like(scales)
    if n:
        with torch.cuda.device_of(x):
            # Without a norm its two arguments are not read.
            rows_kernel[(n,)](
                x, x if weight is None else weight, codes, scales, scales if inverses is None else inverses, k, eps,
                NORM=weight is not None, **rows_options(k),
            )  # fmt: skip
    return codes, scales, inverses


def product(codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 (n, k) · tᵀ, exact, / (scales fp32 (n, 1) · scale fp32 ()), in fp32 → (n, out) in `dtype`, rounded once.

    packed: uint8 (out/4, k), k < 2²¹.
    """
    _check("codes", codes, (torch.int8,), (None, None))
    n, k = codes.shape
    _check("scales", scales, (torch.float32,), (n, 1), codes)
    _check("packed", packed, (torch.uint8,), (None, k), codes)
    _check("scale", scale, (torch.float32,), (), codes)
    _check_dtype(dtype)
    if k >= 1 << 21:
        raise ValueError(f"sums of {k} products may not fit into 32 bits: at most {(1 << 21) - 1} columns")
    quarter = packed.shape[0]
    out = codes.new_empty(n, 4 * quarter, dtype=dtype)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(codes):
        if n == 1 and _in_words(codes) and _in_words(packed):
            grid = (triton.cdiv(quarter, VECTOR["BR"]),)
            words, weights = codes.view(torch.int32), packed.view(torch.int32)
            vector_kernel[grid](words, scales, weights, scale, out, quarter, k // 4, **VECTOR)
        else:
            options = product_options(n, k)
            grid = (triton.cdiv(n, options["BM"]) * triton.cdiv(quarter, options["BR"]),)
            product_kernel[grid](codes, scales, packed, scale, out, n, quarter, k, **options)
    return out


def _in_words(tensor: Tensor) -> bool:
    return tensor.shape[1] % 4 == 0 and tensor.data_ptr() % 4 == 0 and tensor.storage_offset() % 4 == 0


def weights(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """packed uint8 (out/4, k), scale fp32 () → t / scale in fp32, (out, k) in `dtype`, rounded once."""
    _check("packed", packed, (torch.uint8,), (None, None))
    _check("scale", scale, (torch.float32,), (), packed)
    _check_dtype(dtype)
    quarter, k = packed.shape
    out = packed.new_empty(4 * quarter, k, dtype=dtype)
    if packed.numel():
        with torch.cuda.device_of(packed):
            weights_kernel[(triton.cdiv(packed.numel(), WEIGHTS["BLOCK"]),)](packed, scale, out, packed.numel(), **WEIGHTS)
    return out


def nf4_scales(packed: nf4.NF4Tensor) -> Tensor:
    """The scales of the blocks, fp32 (blocks,): the bits of `quant.nf4.dequantize_scales`, in one launch."""
    if packed.nested_absmax is None:
        return packed.absmax
    scales, nested, table, offset = _nf4_scales(packed, packed.codes)
    blocks = scales.numel()
    out = nested.new_empty(blocks)
    with torch.cuda.device_of(scales):
        scales_kernel[(triton.cdiv(blocks, SCALES["BLOCK"]),)](scales, nested, table, offset, out, blocks, **SCALES)
    return out


def nf4_weights(codes: Tensor, scales: Tensor, numel: int, block: int, dtype: torch.dtype) -> Tensor:
    """codes uint8 (bytes of `numel` weights), scales fp32 (blocks,) → (numel,): the bits of `quant.nf4.dequantize_codes`."""
    _check("codes", codes, (torch.uint8,), None)
    _check("scales", scales, (torch.float32,), (-(-numel // block),), codes)
    return _nf4_weights(codes, (scales, scales, scales, scales), numel, block, dtype, double=False)


def nf4_dequantize(packed: nf4.NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized weights in the shape of `packed`, with double quantization undone in the same launch."""
    parts = _nf4_scales(packed, packed.codes)
    flat = _nf4_weights(packed.codes, parts, packed.shape.numel(), packed.block, dtype, double=packed.double)
    return flat.view(packed.shape)


def nf4_linear(x: Tensor, packed: nf4.NF4Tensor) -> Tensor:
    """x (n ≤ 16, k) fp32, bf16 or fp16 · Wᵀ → (n, out) in the dtype of x. No float weight is written.

    The weights are those of `nf4_dequantize(packed, x.dtype)`, bit for bit, their products with x exact (in fp32: rounded), and
    only the order of the sum differs: |y − exact| ≤ k · 2⁻²³ · Σ|x · w| before the last rounding. k must be
    a multiple of the block size.
    """
    _check("x", x, nf4.SOURCES, (None, None))
    n, k = x.shape
    if n > FEW:
        raise ValueError(f"at most {FEW} rows, got {n}: dequantize, then multiply")
    if len(packed.shape) != 2 or packed.shape[1] != k or k % packed.block:
        raise ValueError(f"the weight must be (out, {k}) with rows of whole blocks of {packed.block}, not {tuple(packed.shape)}")
    _check_block(packed.block, NF4_ROWS["BK"])
    _check("codes", packed.codes, (torch.uint8,), None, x)
    parts = _nf4_scales(packed, x)
    outputs, out = packed.shape[0], x.new_empty(n, packed.shape[0])
    if n:
        with torch.cuda.device_of(x):
            nf4_rows_kernel[(triton.cdiv(outputs, NF4_ROWS["BR"]),)](
                x, packed.codes, nf4.table(nf4.LEVELS, x.device), *parts, out, n, outputs, k // 2,
                SIZE=packed.block, DOUBLE=packed.double, **NF4_ROWS,
            )  # fmt: skip
    return out


def _nf4_scales(packed: nf4.NF4Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the kernels for the scales of the blocks; without double quantization the last three are not read."""
    blocks = nf4.sizes(packed.shape.numel(), block=packed.block)[1]
    if packed.nested_absmax is None or packed.offset is None:
        _check("absmax", packed.absmax, (torch.float32,), (blocks,), like)
        return packed.absmax, packed.absmax, packed.absmax, packed.absmax
    _check("absmax", packed.absmax, (torch.uint8,), (blocks,), like)
    _check("nested_absmax", packed.nested_absmax, (torch.float32,), (-(-blocks // nf4.NESTED_BLOCK),), like)
    _check("offset", packed.offset, (torch.float32,), (), like)
    return packed.absmax, packed.nested_absmax, nf4.table(nf4.DYNAMIC_LEVELS, like.device), packed.offset


def _nf4_weights(
    codes: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], numel: int, block: int, dtype: torch.dtype, *, double: bool
) -> Tensor:
    _check_block(block, 2 * NF4["BLOCK"])
    _check_dtype(dtype)
    size = -(-numel // 2)
    if codes.numel() != size:
        raise ValueError(f"{numel} weights are {size} bytes of codes, not {codes.numel()}")
    out = codes.new_empty(numel, dtype=dtype)
    if numel:
        with torch.cuda.device_of(codes):
            nf4_kernel[(triton.cdiv(size, NF4["BLOCK"]),)](
                codes, nf4.table(nf4.LEVELS, codes.device), *scales, out, numel, size, SIZE=block, DOUBLE=double, **NF4
            )
    return out


def _check_block(block: int, largest: int) -> None:
    if block not in (2**power for power in range(1, 13)) or block > largest:
        raise ValueError(f"the block size must be a power of two from 2 to {largest}, not {block}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ternary.SOURCES:
        raise TypeError(f"the kernels write fp32, bf16 or fp16, not {dtype}")


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...] | None, like: Tensor | None = None
) -> None:
    """Check a tensor for a kernel, which reads raw pointers. `shape`: None for any size, or for any shape."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, not {tensor.dtype}")
    if shape is not None and (
        len(shape) != tensor.dim() or any(want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), not {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")
