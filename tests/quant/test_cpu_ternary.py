"""The ternary backends for CPUs against reference formulas in int64."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from quant import weight_cache
from quant.backends import aten, numba_cpu

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (in, out): below and above one vector, odd tails, out / 4 below and above one block of rows, several slices
SHAPES = ((1, 4), (7, 12), (33, 40), (63, 16), (64, 4), (64, 16), (65, 20), (96, 40), (127, 12), (130, 44), (256, 64), (1000, 36))
ROW_COUNTS = (0, 1, 2, 3, 9)

needs_vpdpbusd = pytest.mark.skipif(numba_cpu.unavailable(CPU) is not None, reason=str(numba_cpu.unavailable(CPU)))


@pytest.fixture(params=["aten", pytest.param(16, marks=needs_vpdpbusd), pytest.param(8, marks=needs_vpdpbusd)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """aten, and the numba kernels with 512-bit and with 256-bit vectors."""
    if request.param == "aten":
        yield aten
        return
    if request.param > numba_cpu._kernels().lanes:
        pytest.skip("no vectors of 512 bits")
    monkeypatch.setattr(numba_cpu, "_kernels", functools.partial(_compiled_kernels, request.param))
    yield numba_cpu


@functools.cache
def _compiled_kernels(lanes: int) -> object:
    return numba_cpu.compile_kernels(lanes)


def _weights(k: int, out: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes in {−1, 0, 1} as int64 (out, k), and the same codes packed."""
    codes = torch.randint(-1, 2, (out, k), generator=torch.Generator().manual_seed(seed))
    stored = (codes + 1).view(4, out // 4, k)
    return codes, (stored[0] | stored[1] << 2 | stored[2] << 4 | stored[3] << 6).to(torch.uint8)


def _activations(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    q[:1] = 127  # the largest sums
    q[1:2] = -128
    return q, torch.rand(n, 1, generator=generator) * 50 + 0.1


def _reference_linear(q: Tensor, a: Tensor, codes: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    product = q.long() @ codes.t()
    return (product.float() / (a * s)).to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "out"), SHAPES)
def test_linear_equals_the_integer_reference_bit_for_bit(backend: ModuleType, k: int, out: int, dtype: torch.dtype) -> None:
    codes, packed = _weights(k, out)
    s = torch.tensor(37.3)
    for n in ROW_COUNTS:
        q, a = _activations(n, k)
        assert _same_bits(backend.linear(q, a, packed, s, dtype, frozen=False), _reference_linear(q, a, codes, s, dtype)), n


def test_results_do_not_depend_on_slice_sizes(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "UNPACKED", 4 * 7 * 192)  # seven packed rows, and a remainder
    monkeypatch.setattr(aten, "TOKENS", 5)
    monkeypatch.setattr(aten, "ELEMENTS", 300)
    monkeypatch.setattr(numba_cpu, "CACHED", 1000)
    codes, packed = _weights(150, 92)
    s = torch.tensor(3.0)
    for n in (4, 11, 23):
        q, a = _activations(n, 150)
        assert _same_bits(
            backend.linear(q, a, packed, s, torch.float32, frozen=False), _reference_linear(q, a, codes, s, torch.float32)
        )
        x = torch.randn(n, 150)
        assert _same_bits(backend.quantize_activations(x)[0], _reference_quantize_activations(x)[0])
    assert _same_bits(backend.dequantize(packed, s, torch.bfloat16), (codes / s).bfloat16())
    weight = torch.randn(92, 150)
    assert torch.equal(backend.quantize_weight(weight)[0], _reference_quantize_weight(weight)[0])


def test_two_torch_threads_give_the_same_bits(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cpu, "ALONE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for k, out in ((64, 16), (100, 20), (300, 100)):
            codes, packed = _weights(k, out)
            s = torch.tensor(11.0)
            for n in (1, 2, 9):
                q, a = _activations(n, k)
                expected = _reference_linear(q, a, codes, s, torch.bfloat16)
                assert _same_bits(backend.linear(q, a, packed, s, torch.bfloat16, frozen=False), expected)
                x = torch.randn(n, k)
                assert all(
                    _same_bits(*pair)
                    for pair in zip(backend.quantize_activations(x), _reference_quantize_activations(x), strict=True)
                )
            assert _same_bits(backend.dequantize(packed, s, torch.float32), codes / s)
    finally:
        torch.set_num_threads(before)


@needs_vpdpbusd
def test_kernels_are_safe_to_call_from_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cpu, "ALONE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    codes, packed = _weights(256, 64)
    s, (q, a) = torch.tensor(2.0), _activations(2, 256)
    expected = _reference_linear(q, a, codes, s, torch.float32)
    equal: list[bool] = []

    def work() -> None:
        equal.extend(torch.equal(numba_cpu.linear(q, a, packed, s, torch.float32, frozen=True), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 100


@needs_vpdpbusd
def test_kernels_work_in_a_forked_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, torch
from quant.backends import numba_cpu
numba_cpu.ALONE = 1
torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
torch.get_num_threads = lambda: 2
x = torch.randn(8, 256)
want = numba_cpu.quantize_activations(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(numba_cpu.quantize_activations(x)[0], want) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0


def test_int4_product_is_rounded_once_to_bf16() -> None:
    for k, out in ((32, 16), (96, 48), (256, 64), (2048, 128)):
        codes, packed = _weights(k, out)
        assert aten.int4_group(packed) is not None
        for n in (1, 2, aten.FEW - 1):
            q, a = _activations(n, k)
            unit_scales = torch.ones(n, 1), torch.tensor(1.0)  # the output is then the product itself
            output = aten.linear(q, unit_scales[0], packed, unit_scales[1], torch.bfloat16, frozen=True)
            exact = q.long() @ codes.t()
            assert _same_bits(output, exact.to(torch.bfloat16)), "the sum is not in fp32 and rounded once"
            assert ((output.double() - exact).abs() <= aten.INT4_BOUND * exact.abs()).all()
            s = torch.tensor(37.3)
            output, expected = (
                f(q, a, packed, s, torch.bfloat16) for f in (functools.partial(aten.linear, frozen=True), _exact_linear)
            )
            error = (output.double() - expected.double()).abs()
            assert (error <= 2 * aten.INT4_BOUND * expected.double().abs() * (1 + 2**-7)).all()


def _exact_linear(q: Tensor, a: Tensor, packed: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return aten.linear(q, a, packed, s, dtype, frozen=False)


def test_frozen_weights_use_int4_only_for_few_rows_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, packed = _weights(256, 64)
    packed = nn.Parameter(packed, requires_grad=False)
    s = torch.tensor(5.0)
    cached_kinds: list[str] = []
    original = aten.cached

    def counting(weight: Tensor, kind: str, make: object, *, frozen: bool) -> object:
        cached_kinds.append(kind)
        return original(weight, kind, make, frozen=frozen)  # type: ignore[arg-type]

    monkeypatch.setattr(aten, "cached", counting)
    cases = [(n, dtype) for n in (0, 1, aten.FEW) for dtype in DTYPES]
    for n, dtype in cases:
        q, a = _activations(n, 256)
        cached_kinds.clear()
        output = aten.linear(q, a, packed, s, dtype, frozen=True)
        few = n == 1 and dtype is torch.bfloat16
        assert cached_kinds == (["int4pack"] if few else [])
        if not few:
            assert _same_bits(output, _reference_linear(q, a, codes, s, dtype))


@pytest.mark.parametrize(
    ("k", "out", "group"), [(33, 16, None), (48, 16, None), (96, 16, 32), (576, 16, 64), (512, 16, 256), (64, 12, None)]
)
def test_shapes_unsupported_by_int4_use_the_exact_path(k: int, out: int, group: int | None) -> None:
    codes, packed = _weights(k, out)
    assert aten.int4_group(packed) == group
    packed = nn.Parameter(packed, requires_grad=False)
    q, a = _activations(1, k)
    s = torch.tensor(5.0)
    output = aten.linear(q, a, packed, s, torch.bfloat16, frozen=True)
    assert (weight_cache.kept_bytes([packed]) > 0) == (group is not None)
    if group is None:
        assert _same_bits(output, _reference_linear(q, a, codes, s, torch.bfloat16))


def test_int4_copy_is_rebuilt_when_codes_change_and_its_size_is_reported() -> None:
    codes, packed = _weights(256, 64)
    packed = nn.Parameter(packed, requires_grad=False)
    other_codes, other_packed = _weights(256, 64, seed=2)
    q, unit_scale = _activations(1, 256)[0], torch.ones(1, 1)
    for current in (codes, codes, other_codes):
        if current is other_codes:
            packed.copy_(other_packed)
        output = aten.linear(q, unit_scale, packed, torch.tensor(1.0), torch.bfloat16, frozen=True)
        assert _same_bits(output, (q.long() @ current.t()).bfloat16())
    # 4 bits per weight, a scale and an offset per group and row
    assert weight_cache.kept_bytes([packed]) == 64 * 256 // 2 + 64 * 2 * 2
    weight_cache.forget([packed])
    aten.linear(q, unit_scale, packed, torch.tensor(1.0), torch.bfloat16, frozen=False)
    assert weight_cache.kept_bytes([packed]) == 0


def test_int4_copy_of_frozen_codes_survives_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, (q, a) = nn.Parameter(_weights(256, 64)[1], requires_grad=False), _activations(1, 256)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    converted: list[Tensor] = []
    original = aten._int4pack

    def counting(packed: Tensor) -> tuple[Tensor, Tensor]:
        converted.append(packed)
        return original(packed)

    monkeypatch.setattr(aten, "_int4pack", counting)
    for _ in range(2):
        aten.linear(q, a, packed, torch.tensor(1.0), torch.bfloat16, frozen=True)
        optimizer.step()
    assert len(converted) == 1
    # Not a Parameter: a copy could not be cached, so none is made.
    aten.linear(q, a, packed.detach(), torch.tensor(1.0), torch.bfloat16, frozen=True)
    assert len(converted) == 1


@needs_vpdpbusd
def test_numba_kernels_cache_nothing_and_are_exact_for_frozen_weights() -> None:
    codes, packed = _weights(256, 64)
    q, a = _activations(1, 256)
    output = numba_cpu.linear(q, a, packed, torch.tensor(3.0), torch.bfloat16, frozen=True)
    assert _same_bits(output, _reference_linear(q, a, codes, torch.tensor(3.0), torch.bfloat16))
    assert weight_cache.kept_bytes([packed]) == 0
    assert numba_cpu.direct(packed)
    assert not numba_cpu.direct(packed[:3])
    assert not numba_cpu.direct(packed[:, :63])


def test_longest_rows_do_not_overflow(backend: ModuleType) -> None:
    k = numba_cpu.SUMMED - 1
    codes = torch.ones(16, k, dtype=torch.int64)
    packed = torch.full((4, k), 0b10101010, dtype=torch.uint8)
    q = torch.full((1, k), -128, dtype=torch.int8)
    unit_scale = torch.ones(1, 1)
    output = backend.linear(q, unit_scale, packed, torch.tensor(1.0), torch.float32, frozen=True)
    assert _same_bits(output, _reference_linear(q, unit_scale, codes, torch.tensor(1.0), torch.float32))


def test_unaligned_and_strided_inputs(backend: ModuleType) -> None:
    """Codes at an odd address, and rows with gaps between them."""
    codes, packed = _weights(100, 40)
    s, (q, a) = torch.tensor(7.0), _activations(5, 100)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), packed.flatten()])[3:].view(packed.shape)
    strided = torch.cat([packed, packed], 1)[:, :100]
    strided_q = torch.cat([q, q], 1)[:, :100]
    for view in (shifted, strided):
        expected = _reference_linear(q, a, codes, s, torch.float32)
        assert _same_bits(backend.linear(strided_q, a, view, s, torch.float32, frozen=False), expected)
        assert _same_bits(backend.dequantize(view, s, torch.float32), codes / s)


def _reference_quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    a = 127 / x.abs().amax(1, keepdim=True).clamp(min=1e-5)
    return (x * a).round().clamp(-128, 127).to(torch.int8), a


def _reference_quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    s = 1.0 / weight.abs().mean().clamp(min=1e-5)
    stored = ((weight * s).round().clamp(-1, 1) + 1).to(torch.uint8).view(4, -1, weight.shape[1])
    return stored[0] | stored[1] << 2 | stored[2] << 4 | stored[3] << 6, s


def _example_tensors(n: int, k: int) -> dict[str, Tensor]:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    outlier = x.clone()
    outlier[:, k // 2] = 3e4
    ties = torch.arange(n * k).remainder(255).sub(127).div(2).view(n, k)
    ties[:, 0] = 63.5  # scale 2: odd halves
    signs = x.sign().mul(0.5)
    return {"normal": x, "zeros": torch.zeros(n, k), "outlier": outlier, "ties": ties, "signs": signs, "tiny": x * 1e-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 63, 64, 65, 130, 1000])
def test_quantize_activations_equals_the_reference(backend: ModuleType, k: int, dtype: torch.dtype) -> None:
    for name, x in _example_tensors(5, k).items():
        x = x.to(dtype)
        actual = backend.quantize_activations(x)
        assert all(_same_bits(*pair) for pair in zip(actual, _reference_quantize_activations(x), strict=True)), name
        assert _same_bits(backend.quantize_activations(x.t().contiguous().t())[0], actual[0]), name
    assert [t.shape for t in backend.quantize_activations(x[:0])] == [(0, k), (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "out"), SHAPES)
def test_quantize_and_dequantize_weight_equal_the_reference(backend: ModuleType, k: int, out: int, dtype: torch.dtype) -> None:
    for name, weight in _example_tensors(out, k).items():
        weight = weight.to(dtype)
        packed, s = backend.quantize_weight(weight)
        assert all(_same_bits(*pair) for pair in zip((packed, s), _reference_quantize_weight(weight), strict=True)), name
    codes, packed = _weights(k, out)
    s = torch.tensor(37.3)
    dequantized = backend.dequantize(packed, s, dtype)
    assert _same_bits(dequantized, (codes / s).to(dtype))


def test_non_finite_row_does_not_affect_other_rows(backend: ModuleType) -> None:
    packed, s = _weights(100, 40)[1], torch.tensor(7.0)
    x = torch.randn(4, 100)
    finite_output = backend.linear(*backend.quantize_activations(x), packed, s, torch.bfloat16, frozen=False)
    x[1, 50], x[2, 99] = float("nan"), float("inf")
    q, a = backend.quantize_activations(x)
    assert a[1].isnan()
    assert a[2] == 0
    output = backend.linear(q, a, packed, s, torch.bfloat16, frozen=False)
    assert output[1].isnan().all()
    assert not output[2].isfinite().any()
    assert torch.equal(output[[0, 3]], finite_output[[0, 3]])


def test_weight_scale_inside_and_outside_inference_mode() -> None:
    weight = torch.randn(2000, 64)  # larger than before: allocates new scratch memory in inference mode
    with torch.inference_mode():
        inside = aten.weight_scale(weight)
    assert torch.equal(aten.weight_scale(weight), inside)
    assert torch.equal(inside, 1.0 / weight.abs().mean())


def test_unavailable_backends_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuda" in (aten.unavailable(torch.device("cuda")) or "")
    assert "cuda" in (numba_cpu.unavailable(torch.device("cuda")) or "")
    assert aten.unavailable(CPU) is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llvmlite", None)
        patch.setitem(sys.modules, "llvmlite.binding", None)
        assert "pip install finetune12g[numba]" in str(numba_cpu._lanes.__wrapped__())
    binding = pytest.importorskip("llvmlite.binding")
    for flags, lanes in (
        ({"avx512vnni": True, "avx512bw": True}, 16),
        ({"avxvnni": True, "avx512vnni": False}, 8),
        ({"avx2": True}, None),
    ):
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda flags=flags: flags)
        result = numba_cpu._lanes.__wrapped__()
        assert result == lanes if lanes else "avx512_vnni" in str(result)
    assert "torch" in aten.describe(CPU)


def test_importing_the_backend_does_not_import_numba() -> None:
    code = "import sys, quant, quant.backends.numba_cpu; raise SystemExit('llvmlite' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
