"""Ternary, the 1.58-bit format of BitNet b1.58: weights −1, 0 or 1 times one scale per matrix, int8 activations per token.

    weights       s = 1 / max(mean|W|, 1e-5)         t = clip(round(W · s), −1, 1)            W ≈ t / s
    activations   a = 127 / max(max|x|, 1e-5)        q = clip(round(x · a), −128, 127)        x ≈ q / a
    product       y = (q · tᵀ) / (a · s)             q · tᵀ is exact in integers

All of it is computed in fp32 for any source dtype, rounding half to even: in bf16 arithmetic 0.2 % of the codes would differ.
`s` divides, as in Hugging Face's `bitlinear` layers; its `autobitlinear` layers store 1 / s and multiply.

Packed as in Hugging Face: uint8 (out/4, in), four rows at a distance of out/4 in one byte, each as t + 1:

    byte[r, c]:   bits 1-0 = row r,   3-2 = row r + out/4,   5-4 = row r + 2·out/4,   7-6 = row r + 3·out/4

This module is the reference: plain torch, equal bit for bit to `WeightQuant`, `ActQuant` and `pack_weights` of transformers.
Sources: The Era of 1-bit LLMs, arXiv 2402.17764, section 2; BitNet, arXiv 2310.11453, section 2.1, for the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.byte_views import as_bytes, as_floats

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = 1e-5  # lower bound of a mean or maximum before it is inverted
ROWS_A_BYTE = 4


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """A matrix in ternary. codes: uint8 (out/4, in), packed; scale: fp32 (), the `s` that divides."""

    codes: Tensor
    scale: Tensor
    shape: torch.Size

    def parts(self) -> list[Tensor]:
        """The tensors as a layer stores them, all uint8: codes, and the bytes of the scale."""
        return [self.codes, as_bytes(self.scale)]


def of_parts(parts: Sequence[Tensor], shape: torch.Size) -> TernaryTensor:
    """The inverse of `TernaryTensor.parts`; views if the bytes are aligned."""
    return TernaryTensor(parts[0], as_floats(parts[1]).view(()), shape)


def layout(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """The uint8 tensors in which a layer stores a matrix of this shape: {name: shape}, in the order of `parts`."""
    return {"weight": (shape[0] // ROWS_A_BYTE, shape[1]), "weight_scale": (4,)}


def unfit(shape: torch.Size) -> str | None:
    """Why the layout cannot store a matrix (out, in) of this shape; None if it can."""
    if len(shape) != 2 or shape[0] % ROWS_A_BYTE or 0 in shape:
        needed = "a matrix" if len(shape) != 2 else f"out_features to be a multiple of {ROWS_A_BYTE}, and no empty dimension"
        return f"the packed ternary layout needs {needed}: got a weight of shape {tuple(shape)}"
    return None


def quantize(weight: Tensor) -> TernaryTensor:
    """`weight` (out, in), fp32, bf16 or fp16, finite, in ternary.

    Raises ValueError for an unsupported dtype, a shape that the layout cannot store, or weights that are not finite.
    """
    if weight.dtype not in SOURCES:
        raise ValueError(f"ternary quantizes fp32, bf16 or fp16 weights, got {weight.dtype}")
    if (reason := unfit(weight.shape)) is not None:
        raise ValueError(reason)
    codes, scale = ternarize(weight)
    if not bool((scale > 0) & scale.isfinite()):
        bad = int((~weight.isfinite()).sum())
        reason = f"{bad} of {weight.numel()} weights are not finite (NaN or infinite)" if bad else "the mean overflows fp32"
        raise ValueError(f"cannot quantize these weights to ternary: {reason}")
    return TernaryTensor(pack(codes), scale, weight.shape)


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (any shape) → codes int8 in {−1, 0, 1} of that shape, scale fp32 (), which is 0 or NaN if not all are finite."""
    weight = weight.detach().float()
    scale = 1.0 / weight.abs().mean().clamp(min=FLOOR)
    return (weight * scale).round_().clamp_(-1, 1).to(torch.int8), scale


def looks_ternary(weight: Tensor) -> bool:
    """Whether `weight` holds only zeros and one magnitude, so that quantizing it again would shrink its scale."""
    magnitude = weight.detach().abs()
    largest, nonzero = magnitude.max(), int(magnitude.count_nonzero())
    return 1 < nonzero < weight.numel() and bool(((magnitude == largest) | (magnitude == 0)).all())


def pack(codes: Tensor) -> Tensor:
    """int8 (out, in) in {−1, 0, 1} → uint8 (out/4, in)."""
    bits = (codes + 1).to(torch.uint8).view(ROWS_A_BYTE, -1, codes.shape[1])
    return bits[0] | bits[1] << 2 | bits[2] << 4 | bits[3] << 6


def unpack(packed: Tensor) -> Tensor:
    """uint8 (out/4, in) → int8 (out, in) in {−1, 0, 1}."""
    return torch.cat([packed >> 2 * i & 3 for i in range(ROWS_A_BYTE)]).to(torch.int8) - 1


def dequantize(packed: TernaryTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized weights, (out, in), rounded once from fp32."""
    return (unpack(packed.codes) / packed.scale).to(dtype)


def fake_quantize(weight: Tensor) -> Tensor:
    """`weight` quantized to ternary and dequantized, in its own dtype, as a straight-through layer uses it."""
    codes, scale = ternarize(weight)
    return (codes / scale).to(weight.dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (…, in) → int8 codes (…, in), scale fp32 (…, 1) per token, which is 0 or NaN for tokens that are not finite."""
    x = x.detach().float()
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=FLOOR)
    return (x * scale).round_().clamp_(-128, 127).to(torch.int8), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square normalization (arXiv 1910.07467) of x (…, in), rounded as transformers' LlamaRMSNorm rounds.

    Returns the normalized x times weight (in,), and 1 / root mean square by token, fp32 (…, 1).
    """
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x.float() * inverse).to(x.dtype), inverse


def dequantize_activations(codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized activations, rounded once from fp32."""
    return (codes / scale).to(dtype)
