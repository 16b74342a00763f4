"""`finetune bench quant`: quantized linears against float linears, bitsandbytes, llama.cpp, onebitllms and torchao.

Every case gives both sides the same weights, as far as their formats allow, so that their results must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finetune.bench import baselines
from finetune.bench.measure import Amounts, Case, Pairing, Side, Skip
from finetune.units import MIB
from quant import BitLinear, NF4Linear, PackedBitLinear, backends, ternary, weights_changed

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Shapes are in × out features. `pairs` for passes of many tokens, `short_pairs` for products with a vector."""

    nf4: tuple[int, int] = (4096, 4096)
    ternary: tuple[int, int] = (2048, 5632)
    vector: tuple[int, int] = (4096, 11008)
    tokens: int = 1024
    few_tokens: int = 32
    pairs: int = 31
    short_pairs: int = 101


SIZES = Sizes()


def backends_here(device: str) -> dict[str, str]:
    """The backend of each scheme on `device`, and why if it is not the preferred one."""
    return {scheme: backends.describe(device, scheme=scheme) for scheme in backends.TABLE}


def cases(device: str, sizes: Sizes) -> list[Case]:
    return (_cuda_cases if device == "cuda" else _cpu_cases)(sizes)


# ------------------------------------------------------------------------------------------------------------------- sides


def forward(layer: Callable[[Tensor], Tensor]) -> Side:
    """x → layer(x)."""
    return lambda x: lambda: layer(x)


def step(layer: Callable[[Tensor], Tensor], *weights: Tensor, new_weights: bool = False) -> Side:
    """x, ∂y → y, ∂x and the gradients of `weights`. new_weights: as in the first pass after an optimizer step."""

    def prepare(x: Tensor, grad: Tensor) -> Callable[[], object]:
        if new_weights:
            weights_changed()
        x = x.detach().requires_grad_()

        def passes() -> tuple[Tensor, ...]:
            y = layer(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *weights), grad))

        return passes

    return prepare


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(BF16)


def _weight(device: str, shape: tuple[int, int]) -> Tensor:
    """A weight bf16 (out, in), with the range of a model's."""
    return (torch.randn(shape[1], shape[0], device=device) * 0.02).to(BF16)


def _fresh_step(device: str, shape: tuple[int, int], tokens: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (_normal(device, tokens, shape[0]), _normal(device, tokens, shape[1]))


def _fresh_vector(device: str, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (_normal(device, 1, sizes.vector[0]),)


def _backend(device: str, scheme: str, name: str | None = None) -> str:
    """The backend; raises Skip if a named one is not available."""
    try:
        return backends.describe(device, name, scheme=scheme)
    except (RuntimeError, ValueError) as error:
        raise Skip(str(error)) from error


@contextmanager
def _inference(backend: str | None) -> Iterator[None]:
    with torch.no_grad(), backends.use(backend) if backend else nullcontext():
        yield


# ------------------------------------------------------------------------------------------------------------------- cases


def _nf4_step(device: str, sizes: Sizes, tokens: int, other: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Pairing:
    """Forward and input gradient of a frozen layer; `other` builds the baseline from the same floats."""
    weight = _weight(device, sizes.nf4)
    layer = NF4Linear.from_linear(baselines.float_linear(weight))
    fresh, by = _fresh_step(device, sizes.nf4, tokens), _backend(device, "nf4")
    return Pairing(fresh, step(layer), step(other(weight)), sizes.pairs, by)


def _bitlinear(device: str, sizes: Sizes) -> BitLinear:
    return BitLinear.from_linear(baselines.float_linear(_weight(device, sizes.ternary), trained=True))


def _bitlinear_step(device: str, sizes: Sizes, other: Callable[[BitLinear], nn.Module], *, new_weights: bool = False) -> Pairing:
    """Forward and all gradients; the baseline is built from the trained layer."""
    layer = _bitlinear(device, sizes)
    opponent = other(layer)
    ours = step(layer, *layer.parameters(), new_weights=new_weights)
    theirs = step(opponent, *opponent.parameters())
    return Pairing(_fresh_step(device, sizes.ternary, sizes.tokens), ours, theirs, sizes.pairs, _backend(device, "ternary"))


def _float_twin(layer: BitLinear) -> nn.Module:
    return baselines.float_linear(layer.dequantize(), trained=True)


def kept_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for backward of `x`, each storage once, without the layer's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.detach().requires_grad_())
    del y
    return sum(kept.values())


def _kept(device: str, sizes: Sizes) -> Amounts:
    layer, x = _bitlinear(device, sizes), _normal(device, sizes.tokens, sizes.ternary[0])
    theirs = kept_for_backward(_float_twin(layer), x)
    return Amounts(kept_for_backward(layer, x) / MIB, theirs / MIB, _backend(device, "ternary"))


def _cached(device: str, sizes: Sizes) -> Amounts:
    layer = _bitlinear(device, sizes)
    layer(_normal(device, 1, sizes.ternary[0]))
    bits = layer.cached_bytes() * 8 / layer.weight.numel()
    return Amounts(bits, BF16.itemsize * 8, _backend(device, "ternary"))


def _packed(device: str, sizes: Sizes) -> PackedBitLinear:
    return PackedBitLinear.from_linear(baselines.float_linear(_weight(device, sizes.vector)))


def _vector(device: str, sizes: Sizes, backend: str | None) -> Pairing:
    """Layer against layer, one token in bf16, as in generation."""
    by = _backend(device, "ternary", backend)
    layers = [_packed(device, sizes) for _ in range(2)]
    opponents = [baselines.float_linear(layer.dequantize(BF16)) for layer in layers]
    (ours, ours_before), (theirs, theirs_before) = ([forward(layer) for layer in pair] for pair in (layers, opponents))

    def within() -> AbstractContextManager[object]:
        return _inference(backend)

    fresh = _fresh_vector(device, sizes)
    return Pairing(fresh, ours, theirs, sizes.short_pairs, by, within, (ours_before, theirs_before))


def _vector_kernel(sizes: Sizes, name: str) -> Pairing:
    """Kernel against kernel, each in its program's floats (bf16, fp32), quantizing the activations included on both sides."""
    by = _backend("cpu", "ternary", name)
    kernel = backends.select("cpu", name, scheme="ternary")
    weights = [ternary.quantize(_weight("cpu", sizes.vector)) for _ in range(2)]
    stored = [nn.Parameter(weight.codes, requires_grad=False) for weight in weights]  # as in a layer: else no layout is cached
    theirs, theirs_before = (baselines.GGMLMatrix(ternary.dequantize(weight)).prepare for weight in weights)

    def side(codes: Tensor, scale: Tensor) -> Side:
        return lambda x: lambda: kernel.linear(*kernel.quantize_activations(x), codes, scale, x.dtype, frozen=True)

    ours, ours_before = (side(codes, weight.scale) for codes, weight in zip(stored, weights, strict=True))
    fresh = _fresh_vector("cpu", sizes)
    return Pairing(fresh, ours, theirs, sizes.short_pairs, by, torch.no_grad, (ours_before, theirs_before))


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _cpu_cases(sizes: Sizes) -> list[Case]:
    s, codes, bf16 = sizes, sizes.ternary[0] * sizes.ternary[1], "bf16 nn.Linear"
    nf4, bit, vector = (_shape(shape) for shape in (s.nf4, s.ternary, s.vector))
    bit_step = f"BitLinear {bit}, {s.tokens} tokens, forward and all gradients"
    layer = f"ternary layer {vector}, one token, bf16 in and out, as in generation"
    kernels = f"ternary {vector} times a vector, quantizing it included on both sides; ours bf16 in and out, theirs fp32"
    return [
        Case(
            f"NF4 step, {s.tokens} tokens", bf16, "ms", 1.08,
            lambda: _nf4_step("cpu", s, s.tokens, baselines.float_linear), 18, _nf4_note(nf4),
        ),
        Case(
            f"NF4 step, {s.few_tokens} tokens", "bitsandbytes functions", "ms", 0.5,
            lambda: _nf4_step("cpu", s, s.few_tokens, baselines.bitsandbytes_functional), 4, _nf4_note(nf4),
        ),
        Case(
            "BitLinear step", bf16, "ms", 1.15, lambda: _bitlinear_step("cpu", s, _float_twin), 14,
            f"{bit_step}; the weight's codes are cached, as in every pass except the first after an optimizer step",
        ),
        Case(
            "BitLinear 1st step", bf16, "ms", None, lambda: _bitlinear_step("cpu", s, _float_twin, new_weights=True), 14,
            f"{bit_step}; the first pass after an optimizer step, which quantizes the weight",
        ),
        Case(
            "kept for backward", bf16, "MiB", 0.625, lambda: _kept("cpu", s), 0.2,
            f"BitLinear {bit}, {s.tokens} tokens: activations, without parameters",
        ),
        Case(
            "kept codes", "bf16 weight", "bits a weight", (2 + 32 / codes) / 16, lambda: _cached("cpu", s), 0.1,
            f"BitLinear {bit}: bits per weight; the target is 2, and one fp32 scale",
        ),
        Case(
            "one token, torch alone", bf16, "products/s", 4.5, lambda: _vector("cpu", s, "aten"), 5,
            f"{layer}; backend aten, the fastest without numba",
        ),
        Case("one token, numba", bf16, "products/s", 10.0, lambda: _vector("cpu", s, "numba"), 4, layer),
        Case(
            "kernel, torch alone", "llama.cpp TQ2_0", "products/s", None, lambda: _vector_kernel(s, "aten"), 4, kernels,
        ),
        Case("kernel, numba", "llama.cpp TQ2_0", "products/s", 1.2, lambda: _vector_kernel(s, "numba"), 4, kernels),
    ]  # fmt: skip


def _nf4_note(shape: str) -> str:
    return f"NF4Linear {shape}, frozen: forward and input gradient"


def _cuda_cases(sizes: Sizes) -> list[Case]:
    s, device = sizes, "cuda"
    nf4, bit, vector = (_shape(shape) for shape in (s.nf4, s.ternary, s.vector))
    bit_step = f"BitLinear {bit}, {s.tokens} tokens, forward and all gradients"
    first, both = "CUDA BitLinear 1st step", f"{bit_step}; quantizing the weight included on both sides"
    return [
        Case(
            "CUDA BitLinear step", "bf16 nn.Linear", "ms", 1.0,
            lambda: _bitlinear_step(device, s, _float_twin), note=f"{bit_step}; the weight's codes are cached",
        ),
        Case(
            first, "onebitllms", "ms", None,
            lambda: _bitlinear_step(device, s, lambda bit: baselines.onebitllms_linear(bit.weight.detach()), new_weights=True),
            note=both,
        ),
        Case(
            first, "torchao BitNet", "ms", None,
            lambda: _bitlinear_step(device, s, lambda bit: baselines.torchao_linear(bit.weight.detach()), new_weights=True),
            note=both,
        ),
        Case(
            "CUDA one token", "bf16 nn.Linear", "products/s", 4.0,
            lambda: _vector(device, s, None), note=f"ternary layer {vector}, one token, bf16 in and out, as in generation",
        ),
        Case(
            "CUDA NF4 step", "bitsandbytes Linear4bit", "ms", None,
            lambda: _nf4_step(device, s, s.tokens, baselines.bitsandbytes_linear), note=f"{_nf4_note(nf4)}, {s.tokens} tokens",
        ),
    ]  # fmt: skip
