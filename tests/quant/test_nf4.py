"""The NF4 reference and both backends against bitsandbytes' functional API, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import backends, nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (33,), (1,), (2,), (3, 5), (17, 191), (64, 96), (7, 32), (100, 100), (300, 1000))


def _single_outlier(weight: Tensor) -> Tensor:
    weight = torch.zeros_like(weight)
    weight.view(-1)[weight.numel() // 2] = -60000
    return weight


KINDS = {
    "normal": lambda w: w,
    "small": lambda w: w * 1e-3,
    "zeros": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, 0.3),
    "outlier": _single_outlier,
    "denormal": lambda w: (w.float() * torch.finfo(w.dtype).smallest_normal / 8).to(w.dtype),
}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _flush_subnormals(tensor: Tensor) -> Tensor:
    """bf16 without subnormals: the AVX512-BF16 instruction that bitsandbytes rounds with turns them into zero."""
    if tensor.dtype != torch.bfloat16:
        return tensor
    return torch.where(tensor.abs() < torch.finfo(torch.bfloat16).smallest_normal, torch.zeros_like(tensor), tensor)


def _assert_equals_bitsandbytes(weight: Tensor, *, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    packed = nf4.quantize(weight, double=double)
    assert _same_bits(packed.codes, codes)
    assert _same_bits(packed.absmax, state.absmax)
    if double:
        assert packed.nested_absmax is not None
        assert packed.offset is not None
        assert _same_bits(packed.nested_absmax, state.state2.absmax)
        assert _same_bits(packed.offset.view(1), state.offset.view(1))
    # As one row, since bitsandbytes' AVX512 kernel is wrong for some widths (see quant/backends/bnb.py).
    state.shape = torch.Size((1, weight.numel() + weight.numel() % 2))
    for dtype in DTYPES:
        state.dtype = dtype
        expected = functional.dequantize_4bit(codes, state).reshape(-1)[: weight.numel()].view(weight.shape)
        assert _same_bits(_flush_subnormals(nf4.dequantize(packed, dtype=dtype)), _flush_subnormals(expected))
        for name in ("reference", "bitsandbytes"):
            backend = backends.select("cpu", name)
            scales = backend.scales(packed)
            flat = backend.dequantize(packed.codes, scales, weight.numel(), packed.block, dtype)
            assert _same_bits(_flush_subnormals(flat.view(weight.shape)), _flush_subnormals(expected)), name


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_bitsandbytes(dtype: torch.dtype, kind: str, double: bool) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        _assert_equals_bitsandbytes(KINDS[kind](torch.randn(shape).to(dtype)), double=double)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numel=st.integers(1, 40_000),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
    spread=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_bitsandbytes_anywhere(
    numel: int, exponent: int, dtype: torch.dtype, double: bool, spread: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(numel, generator=generator)
    if spread:  # blocks of very different size
        weight *= torch.randn(numel, generator=generator).mul(4).exp()
    weight = (weight * 2.0**exponent).clamp(-6e4, 6e4).to(dtype)
    _assert_equals_bitsandbytes(weight, double=double)


def test_equals_bitsandbytes_at_boundaries_between_levels() -> None:
    """At boundaries, dividing by the scale and multiplying by its inverse round to different codes."""
    torch.manual_seed(0)
    levels = torch.tensor(nf4.LEVELS)
    scales = torch.rand(20_000, 1) + 0.5
    weight = torch.zeros(20_000, 64)
    weight[:, :15] = scales * ((levels[:-1] + levels[1:]) / 2)
    weight[:, 63:] = scales
    _assert_equals_bitsandbytes(weight, double=False)
    divided = torch.bucketize(weight / scales, (levels[:-1] + levels[1:]) / 2)
    multiplied = torch.bucketize(weight * scales.reciprocal(), (levels[:-1] + levels[1:]) / 2)
    assert not torch.equal(divided, multiplied)


def test_known_codes() -> None:
    """Worked out by hand: the block's absmax is 2, so 2 → level 15, 0 → 7, −2 → 0, 0.2/2 = 0.1 → the level 0.0796, 8."""
    packed = nf4.quantize(torch.tensor([2.0, 0.0, -2.0, 0.2]), double=False)
    assert packed.codes.flatten().tolist() == [0xF7, 0x08]
    assert packed.absmax.tolist() == [2.0]
    assert nf4.dequantize(packed).tolist() == pytest.approx([2.0, 0.0, -2.0, 2 * 0.07958029955625534], abs=0)


def test_bits_per_weight() -> None:
    packed = nf4.quantize(torch.randn(1024, 1024))
    assert packed.nested_absmax is not None
    assert packed.offset is not None
    parts = (packed.codes, packed.absmax, packed.nested_absmax, packed.offset)
    bits = 8 * sum(t.numel() * t.element_size() for t in parts) / 2**20
    assert bits == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_raise(bad: float) -> None:
    weight = torch.randn(64, 64)
    weight[3, 7] = bad
    with pytest.raises(ValueError, match="1 of 4096 weights are not finite"):
        nf4.quantize(weight)


def test_unsupported_dtypes_empty_weights_and_overflow_raise() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        nf4.quantize(torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty"):
        nf4.quantize(torch.zeros(0, 64))
    with pytest.raises(ValueError, match="overflows"):
        nf4.quantize(torch.full((64, 64), 3e38))


def test_backend_selection_order_and_reported_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert backends.describe("cpu") == f"bitsandbytes {bitsandbytes.__version__} functional (cpu)"
    assert backends.describe("meta") == f"torch {torch.__version__} reference (meta)"  # no other backend supports meta
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.select("cpu").NAME == "reference"
    with backends.use("bitsandbytes"):
        assert backends.select("cpu").NAME == "bitsandbytes"
        assert backends.select("cpu", "reference").NAME == "reference"
    assert backends.describe("cpu") == f"torch {torch.__version__} reference (cpu): forced"


def test_forced_backends_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.backends import bnb

    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(bnb, "_functional", lambda: "cannot import bitsandbytes (no module)")
    assert backends.describe("cpu").endswith("reference (cpu): cannot import bitsandbytes (no module)")
    with pytest.raises(backends.BackendError, match="not available: cannot import bitsandbytes"):
        backends.select("cpu", "bitsandbytes")
    monkeypatch.setenv(backends.VARIABLE, "tritton")
    with pytest.raises(ValueError, match="tritton"):
        backends.select("cpu")
