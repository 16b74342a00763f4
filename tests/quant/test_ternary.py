"""The ternary oracle: equal to transformers' WeightQuant, ActQuant and pack_weights bit for bit; every backend equal to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quant import backends, ternary

SHAPES = [(4, 1), (8, 7), (12, 33), (64, 96), (40, 576)]
EXTREMES = ["normal", "zeros", "denormal", "outlier", "large", "ties", "one row of zeros"]


def _weight(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * 0.02
    if kind == "zeros":
        weight.zero_()
    elif kind == "denormal":
        weight *= 1e-39
    elif kind == "outlier":
        weight[0, 0] = 1e4
    elif kind == "large":
        weight *= 1e5
    elif kind == "ties":  # quotients that lie halfway
        weight = torch.randint(-3, 4, shape).float() / 2
    elif kind == "one row of zeros":
        weight[1] = 0
    return weight.to(dtype)


def test_equals_transformers() -> None:
    """Not compiled, as transformers would where it can: eager is what the formulas say."""
    from transformers.integrations.bitnet import ActQuant, WeightQuant, pack_weights

    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        for dtype, shape, scale in itertools.product(
            ternary.SOURCES, [(4, 1), (8, 7), (12, 33), (64, 96), (128, 1000)], (0.02, 1e-6, 30.0)
        ):
            weight = (torch.randn(shape) * scale).to(dtype)
            packed, theirs = ternary.quantize(weight), WeightQuant.apply(weight)
            assert torch.equal(ternary.fake_quantize(weight), theirs), (dtype, shape, scale)
            assert torch.equal(ternary.dequantize(packed, dtype=dtype), theirs), (dtype, shape, scale)
            assert torch.equal(packed.codes, pack_weights(ternary.unpack(packed.codes).clone()))
            codes, scales = ternary.quantize_activations(weight)
            ours = ternary.dequantize_activations(codes, scales, dtype=dtype)
            assert torch.equal(ours, ActQuant.apply(weight)), (dtype, shape, scale)


@pytest.mark.parametrize("dtype", ternary.SOURCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_formulas(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Written out once more, in fp64 where that cannot differ."""
    weight = _weight(shape, kind, dtype)
    packed = ternary.quantize(weight)
    mean = weight.double().abs().mean().clamp(min=1e-5)
    assert packed.scale.item() == pytest.approx(1 / mean.item(), rel=1e-6)
    codes = ternary.unpack(packed.codes)
    assert torch.equal(codes, (weight.float() * packed.scale).round().clamp(-1, 1).to(torch.int8))
    assert packed.codes.shape == (shape[0] // 4, shape[1])
    for row in range(shape[0]):  # the layout as it is drawn
        lane, byte = divmod(row, shape[0] // 4)
        assert torch.equal((packed.codes[byte] >> 2 * lane & 3).to(torch.int8) - 1, codes[row])
    assert torch.equal(ternary.dequantize(packed, dtype=dtype), (codes.float() / packed.scale).to(dtype))
    again = ternary.of_parts(packed.parts(), packed.shape)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scale, packed.scale)
    assert [tuple(part.shape) for part in packed.parts()] == list(ternary.layout(packed.shape).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    weight = torch.randn(8, 8)
    weight[3, 3] = bad
    with pytest.raises(ValueError, match="1 of 64 weights are not finite"):
        ternary.quantize(weight)


def test_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"float64"):
        ternary.quantize(torch.randn(8, 8).double())
    for shape in ((6, 8), (8,), (0, 8), (8, 0), (4, 4, 4)):
        with pytest.raises(ValueError, match=r"out_features to be a multiple of 4|needs a matrix"):
            ternary.quantize(torch.zeros(shape))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    exponent=st.integers(-44, 30),
    outlier=st.sampled_from([None, 1.0, 1e6]),
    dtype=st.sampled_from(ternary.SOURCES),
    seed=st.integers(0, 2**31),
)
def test_any_weight_and_any_input(
    rows: int, columns: int, exponent: int, outlier: float | None, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(4 * rows, columns, generator=generator) * 10.0**exponent).to(dtype)
    if outlier is not None:
        x[0, 0] = outlier
    if not bool(x.isfinite().all()):
        with pytest.raises(ValueError, match="not finite"):
            ternary.quantize(x)
        return
    packed = ternary.quantize(x)
    codes = ternary.unpack(packed.codes)
    assert codes.abs().max() <= 1
    assert torch.equal(ternary.pack(codes), packed.codes)
    # No weight is further from its code than half a step, unless it was clipped.
    scaled = x.float() * packed.scale
    assert ((scaled.clamp(-1, 1) - codes).abs() <= 0.5 + 1e-6).all()
    q, a = ternary.quantize_activations(x)
    assert q.abs().max() <= 127
    assert ((x.float() * a - q).abs() <= 0.5 + 1e-4).all()
    largest = x.float().abs().amax(1)
    assert (q.abs().amax(1)[largest >= 1e-5] == 127).all()


def test_a_second_time_is_seen() -> None:
    weight = torch.randn(16, 16)
    for dtype in ternary.SOURCES:
        assert ternary.looks_ternary(ternary.fake_quantize(weight.to(dtype)))
    assert not ternary.looks_ternary(weight)
    assert not ternary.looks_ternary(torch.zeros(4, 4))
    assert not ternary.looks_ternary(torch.ones(4, 4))  # two levels: quantizing keeps them as they are


# ---------------------------------------------------------------------------------------------- every backend, one table

CASES = [(n, *shape, dtype) for n in (0, 1, 3, 9, 40) for shape in SHAPES for dtype in ternary.SOURCES]


def _backends() -> list[str]:
    return [name for name in backends.TABLE["ternary"] if name not in ("reference", "triton")]  # triton's table is its own file's


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> backends.TernaryBackend:
    name = request.param
    try:
        return backends.select("cpu", name, scheme="ternary")
    except backends.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", EXTREMES)
def test_backend_quantizes_and_multiplies_as_the_reference(backend: backends.TernaryBackend, kind: str) -> None:
    reference = backends.select("cpu", "reference", scheme="ternary")
    for n, out, inner, dtype in CASES:
        weight, x = ternary.quantize(_weight((out, inner), kind, dtype)), _weight((max(n, 2), inner), kind, dtype)[:n]
        codes, scales = backend.quantize_activations(x)
        expected = reference.quantize_activations(x)
        assert torch.equal(codes, expected[0]), (n, out, inner, dtype)
        assert torch.equal(scales, expected[1]), (n, out, inner, dtype)
        exact = (codes.double() @ ternary.unpack(weight.codes).double().t()).float() / (scales * weight.scale)
        assert torch.equal(reference.linear(codes, scales, weight.codes, weight.scale, dtype, frozen=False), exact.to(dtype))
        for frozen in (False, True):
            packed = nn.Parameter(weight.codes, requires_grad=False) if frozen else weight.codes
            y = backend.linear(codes, scales, packed, weight.scale, dtype, frozen=frozen)
            assert y.shape == (n, out)
            assert y.dtype == dtype
            bound = getattr(backend, "INT4_BOUND", 0.0) if frozen and dtype == torch.bfloat16 else 0.0
            if bound == 0.0:
                assert torch.equal(y, exact.to(dtype)), (n, out, inner, dtype, frozen)
            else:  # one rounding more, then the rounding of the output
                assert ((y.float() - exact).abs() <= exact.abs() * (bound + 2.0**-8)).all()
        deq = backend.dequantize(weight.codes, weight.scale, dtype)
        assert torch.equal(deq, reference.dequantize(weight.codes, weight.scale, dtype))
        packed, scale = backend.quantize_weight(_weight((out, inner), kind, dtype))
        assert torch.equal(packed, weight.codes)
        assert torch.equal(scale, weight.scale)


def test_backends_are_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    from quant.backends import numba_cpu

    monkeypatch.setattr(numba_cpu, "unavailable", lambda device: "the reason why not")
    assert backends.select("cpu", scheme="ternary").NAME == "aten"
    assert backends.describe("cpu", scheme="ternary").endswith(": the reason why not")
    with pytest.raises(backends.BackendError, match="'numba' is not available: the reason why not"):
        backends.select("cpu", "numba", scheme="ternary")
    monkeypatch.setenv(backends.VARIABLE, "aten")
    assert backends.describe("cpu", scheme="ternary").endswith(": forced")
    assert backends.select("cpu", scheme="nf4").NAME != "aten"  # which has none of that name, and chooses for itself
    for name in ("aten", "numba"):
        with pytest.raises(backends.BackendError, match="is not available"):
            backends.select("meta", name, scheme="ternary")


def test_what_is_not_finite_stays_so(backend: backends.TernaryBackend) -> None:
    """A row with a NaN or an infinity must not come out as a number; the other rows are untouched."""
    weight = ternary.quantize(torch.randn(8, 32))
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(3, 32)
        good = x.clone()
        x[1, 5] = bad
        y = backend.linear(*backend.quantize_activations(x), weight.codes, weight.scale, torch.float32, frozen=False)
        clean = backend.linear(*backend.quantize_activations(good), weight.codes, weight.scale, torch.float32, frozen=False)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
