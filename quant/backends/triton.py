"""The ternary backend for NVIDIA GPUs in Triton, which is imported when a kernel is first used."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant import ternary

NAME = "triton"
DEVICES = ("cuda",)  # on a CPU only if forced, with triton's interpreter
CAPABILITY = (8, 0)  # int8 on tensor cores, as triton compiles it


def unavailable(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"cannot import triton ({error})"
    if triton.knobs.runtime.interpret:
        return None if device.type in ("cpu", "cuda") else f"triton's interpreter runs on the cpu, not on {device.type}"
    if device.type != "cuda":
        return f"triton's kernels run on cuda, not on {device.type}"
    if torch.version.hip or not torch.cuda.is_available():
        return "triton's kernels need an NVIDIA GPU, and torch finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"triton's int8 kernels need compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    return _broken()


@functools.cache
def _broken() -> str | None:
    """Why triton cannot launch kernels here: its launcher is compiled on first use, with a C compiler and Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:
        return f"triton does not start ({error})"
    return None


def describe(device: torch.device) -> str:
    import triton

    how = "interpreted" if triton.knobs.runtime.interpret else "compiled"
    return f"triton {triton.__version__} {how} ({device.type})"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, k) → uint8 (out/4, k), fp32 (): torch's own kernels, once per optimizer step."""
    codes, scale = ternary.ternarize(weight)
    return ternary.pack(codes), scale


def norm_quantize_activations(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and quantization in one pass: int8 (n, k), fp32 (n, 1), and 1 / root mean square, fp32 (n, 1)."""
    from quant.backends import triton_kernels

    return triton_kernels.norm_quantize_activations(x.contiguous(), weight, eps)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) → int8 (n, k), fp32 (n, 1)."""
    from quant.backends import triton_kernels

    return triton_kernels.quantize_activations(x.contiguous())


def linear(codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
    """codes int8 (n, k), scales fp32 (n, 1), packed uint8 (out/4, k), scale fp32 () → (n, out) in `dtype`; no copy is kept."""
    from quant.backends import triton_kernels

    return triton_kernels.product(codes.contiguous(), scales.contiguous(), packed.contiguous(), scale, dtype)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, k) in `dtype`."""
    from quant.backends import triton_kernels

    return triton_kernels.weights(packed.contiguous(), scale, dtype)
