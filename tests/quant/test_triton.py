"""Triton kernels are bit-equal to the reference kernels, and compile without spills or approximate math.

The tests of the kernels' results need a GPU (`pytest -m gpu`) or triton's interpreter, which is chosen when triton is imported.
So one test runs all of them again, in a separate process with TRITON_INTERPRET=1, on small CPU tensors.
Compiling needs no GPU: triton ships ptxas and cuobjdump.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from quant import nf4, ternary  # noqa: E402
from quant.backends import reference_ternary, triton_kernels, triton_nf4  # noqa: E402
from quant.backends import triton as backend  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _on_device(test: Any) -> Any:
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


without_interpreter = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


@pytest.fixture(autouse=True)
def _fix_interpreter_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton 3.7's interpreter truncates fp32 to bf16 where a GPU rounds, and multiplies the raw bits of bf16 matrices."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def fixed_convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.view("float32").copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data.view("uint16").copy()).view(torch.bfloat16).float().numpy()
        return convert(data, source, target, rounding)

    def fixed_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(fixed_convert(m.data, tl.bfloat16, tl.float32, None), tl.float32)
            if m.dtype.scalar == tl.bfloat16
            else m
            for m in (a, b)
        )
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", fixed_convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", fixed_dot)


def _same_bits(actual: Tensor, expected: Tensor) -> bool:
    actual = actual.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------- activations to int8


def _ties(x: Tensor) -> Tensor:
    """Half integers with a maximum of 127, so that the scale is 1."""
    x = (torch.arange(x.numel()) % 64 - 32 + 0.5).view(x.shape)
    x[:, -1] = 127
    return x


def _outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, x.shape[1] // 2] = -60000
    return x


DISTRIBUTIONS = {
    "normal": lambda x: x,
    "zeros": lambda x: x * 0,
    "constant": lambda x: torch.full_like(x, -0.3),
    "outlier": _outlier,
    "tiny": lambda x: x * 1e-6,  # below the lower limit of the maximum
    "denormal": lambda x: x * 1e-39,
    "large": lambda x: x * 1e4,
    "ties": _ties,
}


@_on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_quantized_activations_are_bit_equal_to_the_reference(distribution: str, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 7), (2, 64), (5, 100), (2, 577), (1, 2050)):
        x = DISTRIBUTIONS[distribution](torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        codes, scales = triton_kernels.quantize_activations(x.to(DEVICE))
        expected_codes, expected_scales = ternary.quantize_activations(x)
        assert _same_bits(scales, expected_scales)
        assert _same_bits(codes, expected_codes)
        if distribution == "ties" and shape[1] > 64:
            assert (expected_scales == 1).all()
            assert (x.float() % 1 == 0.5).sum() > 60


@_on_device
def test_activations_too_long_for_registers_are_bit_equal_to_the_reference() -> None:
    x = torch.randn(2, triton_kernels.LONGEST + 6)
    x[1, -1] = 50
    expected = ternary.quantize_activations(x)
    assert all(_same_bits(*pair) for pair in zip(triton_kernels.quantize_activations(x.to(DEVICE)), expected, strict=True))
    _check_norm(x, torch.rand(x.shape[1]))


@_on_device
def test_non_finite_activations_have_a_nan_or_zero_scale() -> None:
    x = torch.randn(4, 300)
    x[0, 3], x[1, 299], x[2, 0] = torch.nan, torch.inf, -torch.inf
    codes, scales = (part.cpu() for part in triton_kernels.quantize_activations(x.to(DEVICE)))
    assert scales[0].isnan()
    assert (scales[1:3] == 0).all()
    assert _same_bits(codes[3:], ternary.quantize_activations(x[3:])[0])


def _check_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> None:
    parts = triton_kernels.norm_quantize_activations(x.to(DEVICE), weight.to(DEVICE), eps)
    codes, scales, inverse = (part.cpu() for part in parts)
    exact = (x.double().square().mean(1, keepdim=True) + eps).rsqrt()
    assert inverse.dtype == torch.float32
    assert ((inverse - exact).abs() <= 4 * 2**-24 * exact).all()
    normed = weight * (x.float() * inverse).to(x.dtype)  # as in LlamaRMSNorm, with its dtypes and roundings
    expected = ternary.quantize_activations(normed)
    assert _same_bits(scales, expected[1])
    assert _same_bits(codes, expected[0])


@_on_device
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_rms_norm_and_quantization_are_bit_equal_to_the_reference(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((1, 1), (3, 100), (2, 577)):
        weight = (1 + torch.randn(shape[1]) / 4).to(weight_dtype)
        _check_norm((3 * torch.randn(shape)).to(dtype), weight)
    _check_norm(torch.zeros(2, 64, dtype=dtype), torch.ones(64, dtype=weight_dtype))


# -------------------------------------------------------------------------------------------------- the ternary matmul

# (n, k, out_features / 4): every choice of `product_options`, the vector kernel, full and partial blocks in each dimension.
PRODUCTS = [
    (0, 64, 3), (1, 1, 1), (1, 3, 5), (1, 4, 1), (1, 64, 3), (1, 100, 7), (1, 1028, 9), (1, 2048, 4),
    (2, 64, 1), (5, 256, 17), (16, 272, 33), (16, 512, 16), (3, 7, 5), (17, 33, 18), (300, 20, 3),
    (17, 128, 16), (65, 144, 17), (257, 64, 32), (300, 80, 33), (1200, 32, 33),
]  # fmt: skip


Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def _to_device(operands: Operands) -> Operands:
    codes, scales, packed, scale = operands
    return codes.to(DEVICE), scales.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE)


def _operands(n: int, k: int, quarter: int) -> Operands:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    weights = torch.randint(-1, 2, (4 * quarter, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, 1, generator=generator) * 100 + 0.1
    return codes, scales, ternary.pack(weights), torch.tensor(17.3)


@_on_device
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_ternary_matmul_is_bit_equal_to_the_reference(case: tuple[int, int, int]) -> None:
    operands = _operands(*case)
    for dtype in DTYPES if case[0] < 20 else DTYPES[1:2]:
        actual = triton_kernels.product(*_to_device(operands), dtype)
        assert _same_bits(actual, reference_ternary.linear(*operands, dtype, frozen=True))


def test_unpack_ptx_computes_the_same_as_its_interpreter_substitute() -> None:
    """UNPACK is the only PTX of several instructions that the interpreter replaces by operators."""
    word = 0b10010010_00100100_01001001_10100001
    values = {"$4": word}
    for operation, target, first, second in re.findall(r"(\w+)\.\w+ (\S+), (\S+), (\S+);", triton_kernels.UNPACK.value):
        left, right = values[first], int(second, 0)
        values[target] = left >> right if operation == "shr" else left & right
    for stripe, factor in enumerate((1, 4, 1, 4)):
        bytes_ = word.to_bytes(4, "little")
        assert list(values[f"${stripe}"].to_bytes(4, "little")) == [(byte >> 2 * stripe & 3) * factor for byte in bytes_]


@_on_device
@pytest.mark.parametrize("n", [1, 2])
def test_sums_above_2_to_the_24_are_rounded_once_at_the_end(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and weights near the extremes give sums above 2²⁴, nearly all of one sign."""
    k, quarter = 160_000, 2
    if INTERPRETED:  # slow per step: wider steps, but enough that a lane's sum exceeds 16 bits
        options = triton_kernels.product_options(n, k) | {"BK": 1024, "EVEN": False}
        monkeypatch.setattr(triton_kernels, "product_options", lambda n, k: options)
        monkeypatch.setitem(triton_kernels.VECTOR, "BW", 1024)
    codes = torch.randint(-128, -120, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    codes[:, 1] = -128 + codes[:, 2:].sum(1) % 2  # odd sums of codes, which fp32 cannot represent either
    weights = torch.full((4 * quarter, k), -1, dtype=torch.int8)
    weights[1::2] = 1
    for row, weight_row in enumerate(weights):
        weight_row[row::9] = 0
    operands = codes, torch.ones(n, 1), ternary.pack(weights), torch.tensor(1.0)
    actual = triton_kernels.product(*_to_device(operands), torch.float32)
    assert _same_bits(actual, reference_ternary.linear(*operands, torch.float32, frozen=True))
    assert actual.abs().min() > 2**24


@without_interpreter
@_on_device
@pytest.mark.parametrize("n", [1, 16, 200, 2048])
def test_ternary_matmul_at_the_sizes_of_a_7b_model_is_bit_equal(n: int) -> None:
    for k, quarter in ((4096, 2752), (11008, 1024)):
        operands = _to_device(_operands(n, k, quarter))
        actual = triton_kernels.product(*operands, torch.bfloat16)
        assert torch.equal(actual, reference_ternary.linear(*operands, torch.bfloat16, frozen=True))


@_on_device
@pytest.mark.parametrize("n", [1, 2, 20])
def test_ternary_matmul_accepts_weights_at_unaligned_addresses(n: int) -> None:
    codes, scales, packed, scale = _operands(n, 64, 5)
    buffer = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    unaligned = buffer[1:].view(packed.shape)
    unaligned.copy_(packed)
    actual = triton_kernels.product(codes.to(DEVICE), scales.to(DEVICE), unaligned, scale.to(DEVICE), torch.bfloat16)
    assert _same_bits(actual, reference_ternary.linear(codes, scales, packed, scale, torch.bfloat16, frozen=True))


@_on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_ternary_weights_are_bit_equal_to_the_reference(dtype: torch.dtype) -> None:
    for k, quarter in ((1, 1), (7, 3), (100, 41), (64, 40)):
        _, _, packed, scale = _operands(1, k, quarter)
        expected = reference_ternary.dequantize(packed, scale, dtype)
        assert _same_bits(triton_kernels.weights(packed.to(DEVICE), scale.to(DEVICE), dtype), expected)


@_on_device
def test_backend_accepts_non_contiguous_activations() -> None:
    device = torch.device(DEVICE)
    assert backend.unavailable(device) is None
    assert "triton" in backend.describe(device)
    x = torch.randn(40, 6)
    codes, scales = backend.quantize_activations(x.to(device).t())
    expected = ternary.quantize_activations(x.t())
    assert _same_bits(codes, expected[0])
    _, _, packed, scale = _operands(1, 40, 3)
    for frozen in (True, False):
        actual = backend.linear(codes.t().contiguous().t(), scales, packed.to(device), scale.to(device), x.dtype, frozen=frozen)
        assert _same_bits(actual, reference_ternary.linear(*expected, packed, scale, x.dtype, frozen=frozen))
    assert _same_bits(
        backend.dequantize(packed.to(device), scale.to(device), x.dtype), reference_ternary.dequantize(packed, scale, x.dtype)
    )


# ----------------------------------------------------------------------------------------------------------------- NF4


def _nf4_to_device(packed: nf4.NF4Tensor) -> nf4.NF4Tensor:
    return nf4.of_parts([part.to(DEVICE) for part in packed.parts()], packed.shape)


@_on_device
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_nf4_weights_are_bit_equal_to_the_reference(dtype: torch.dtype, double: bool) -> None:
    torch.manual_seed(0)
    for shape in ((1,), (33,), (3, 5), (64, 96), (300, 70)):
        packed = nf4.quantize(torch.randn(shape) * 0.02, double=double)
        moved = _nf4_to_device(packed)
        scales = triton_nf4.scales(moved)
        assert _same_bits(scales, nf4.dequantize_scales(packed))
        expected = nf4.dequantize(packed, dtype=dtype)
        assert _same_bits(triton_nf4.dequantize(moved.codes, scales, packed.shape.numel(), 64, dtype).view(shape), expected)
        assert _same_bits(triton_nf4.dequantize_packed(moved, dtype), expected)


@_on_device
@pytest.mark.parametrize("block", [2, 32, 128, 4096])
def test_nf4_dequantizes_other_block_sizes(block: int) -> None:
    packed = nf4.quantize(torch.randn(5, 1000), block=block)
    moved = dataclasses.replace(_nf4_to_device(packed), block=block)
    assert _same_bits(triton_nf4.dequantize_packed(moved, torch.float32), nf4.dequantize(packed))


@_on_device
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_linear_of_few_activations_is_within_its_error_bound(dtype: torch.dtype, double: bool) -> None:
    torch.manual_seed(0)
    for n, k, outputs in ((0, 64, 3), (1, 64, 1), (1, 320, 20), (5, 256, 16), (16, 448, 33)):
        packed = nf4.quantize(torch.randn(outputs, k) * 0.02, double=double)
        x = torch.randn(n, k).to(dtype)
        y = triton_nf4.linear(x.to(DEVICE), _nf4_to_device(packed)).cpu()
        assert y.dtype == dtype
        assert y.shape == (n, outputs)
        weights = nf4.dequantize(packed, dtype=dtype).double()
        exact, magnitude = x.double() @ weights.t(), x.double().abs() @ weights.abs().t()
        bound = k * 2.0**-23 * magnitude
        rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).smallest_normal
        assert ((y.double() - exact).abs() <= bound + rounding).all()


# ------------------------------------------------------------------------------------------------- errors and messages


def test_launchers_refuse_unsupported_dtypes_shapes_and_strides() -> None:
    codes, scales, packed, scale = _operands(3, 64, 2)
    x = torch.randn(3, 64)
    with pytest.raises(TypeError, match=r"x must be torch.float32 or .* not torch.float64"):
        triton_kernels.quantize_activations(x.double())
    with pytest.raises(ValueError, match=r"x must have the shape \(any, any\), not \(64,\)"):
        triton_kernels.quantize_activations(x[0])
    with pytest.raises(ValueError, match="x must be contiguous"):
        triton_kernels.quantize_activations(x.t())
    with pytest.raises(ValueError, match="has no columns"):
        triton_kernels.quantize_activations(x[:, :0].contiguous())
    with pytest.raises(ValueError, match=r"weight must have the shape \(64\), not \(63,\)"):
        triton_kernels.norm_quantize_activations(x, torch.ones(63))
    with pytest.raises(ValueError, match="scale is on meta, the rest on cpu"):
        triton_kernels.product(codes, scales, packed, scale.to("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"scales must have the shape \(3, 1\)"):
        triton_kernels.product(codes, scales[:2], packed, scale, torch.float32)
    with pytest.raises(ValueError, match=r"packed must have the shape \(any, 64\)"):
        triton_kernels.product(codes, scales, packed[:, 1:], scale, torch.float32)
    with pytest.raises(TypeError, match=r"not torch\.int32"):
        triton_kernels.product(codes, scales, packed, scale, torch.int32)
    wide = torch.empty(1, 1 << 21, dtype=torch.int8)
    with pytest.raises(ValueError, match="may not fit into 32 bits"):
        triton_kernels.product(wide, torch.ones(1, 1), wide.view(torch.uint8), scale, torch.float32)
    weight = nf4.quantize(torch.randn(4, 96))
    with pytest.raises(ValueError, match="at most 16 rows, got 17"):
        triton_kernels.nf4_linear(torch.randn(17, 96), weight)
    with pytest.raises(ValueError, match="rows of whole blocks of 64"):
        triton_kernels.nf4_linear(torch.randn(2, 96), weight)
    with pytest.raises(ValueError, match="a power of two from 2 to 4096, not 3"):
        triton_kernels.nf4_weights(torch.zeros(3, dtype=torch.uint8), torch.ones(2), 6, 3, torch.float32)
    with pytest.raises(ValueError, match="6 weights are 3 bytes of codes, not 4"):
        triton_kernels.nf4_weights(torch.zeros(4, dtype=torch.uint8), torch.ones(1), 6, 64, torch.float32)


@without_interpreter
def test_unavailable_says_why_the_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.unavailable(torch.device("cpu")) == "triton's kernels run on cuda, not on cpu"
    assert triton_nf4.unavailable(torch.device("cpu")) == "triton's kernels run on cuda, not on cpu"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in str(backend.unavailable(gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.unavailable(gpu) == "triton's int8 kernels need compute capability 8.0; this GPU has 7.5"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "cannot import triton" in str(backend.unavailable(gpu))


@without_interpreter
def test_backend_module_named_triton_neither_shadows_nor_imports_triton() -> None:
    assert Path(str(triton.__file__)).parent.name == "triton"
    assert "quant" not in Path(str(triton.__file__)).parts[-3:]
    code = "import sys, quant, quant.backends.triton, quant.backends.triton_nf4; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@without_interpreter
def test_kernel_tests_pass_under_the_interpreter() -> None:
    """Runs every test above that needs a device, on the CPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 60, result.stdout[-2000:]


# ------------------------------------------------------------------------------------------------------------ compiled

POINTER_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
MAX_SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB per block, CUDA programming guide, compute capabilities


def _launches(dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], bool]]:
    """Every launch: (kernel, argument types, options, whether sizes and addresses are multiples of 16)."""
    fp32, x = "*fp32", POINTER_TYPES[dtype]
    product = {"q": "*i8", "scales": fp32, "packed": "*u8", "scale": fp32, "out": x, "n": "i32", "quarter": "i32", "k": "i32"}
    for n, k in ((16, 4096), (16, 4000), (256, 4096), (256, 4000), (1024, 4096), (1024, 4000), (1024, 4001)):
        yield triton_kernels.product_kernel, product, triton_kernels.product_options(n, k), k % 16 == 0
    rows = {"x": x, "weight": x, "codes": "*i8", "scales": fp32, "inverses": fp32, "k": "i32", "eps": "fp32"}
    for k in (576, 1536, 4096, 11008, 20000):
        for norm in (False, True):
            yield triton_kernels.rows_kernel, rows, triton_kernels.rows_options(k) | {"NORM": norm}, True
    vector = {"q": "*i32", "scales": fp32, "packed": "*i32", "scale": fp32, "out": x, "quarter": "i32", "words": "i32"}
    yield triton_kernels.vector_kernel, vector, triton_kernels.VECTOR, True
    weights = {"packed": "*u8", "scale": fp32, "out": x, "size": "i32"}
    yield triton_kernels.weights_kernel, weights, triton_kernels.WEIGHTS, True
    scales = {"codes": "*u8", "nested": fp32, "table": fp32, "offset": fp32, "out": fp32, "blocks": "i32"}
    yield triton_kernels.scales_kernel, scales, triton_kernels.SCALES, True
    for double in (False, True):
        options = {"SIZE": nf4.BLOCK, "DOUBLE": double}
        parts = {"codes": "*u8", "levels": fp32, "scales": "*u8" if double else fp32, "nested": fp32, "table": fp32}
        parts |= {"offset": fp32, "out": x}
        yield triton_kernels.nf4_kernel, parts | {"numel": "i32", "size": "i32"}, triton_kernels.NF4 | options, True
        activations = {"x": x} | parts | {"n": "i32", "outputs": "i32", "width": "i32"}
        yield triton_kernels.nf4_rows_kernel, activations, triton_kernels.NF4_ROWS | options, True


def _compile(kernel: Any, types: dict[str, str], options: dict[str, Any], aligned: bool, capability: int, folder: Path) -> str:
    """Compile for any GPU, present or not; check registers, spills and shared memory, and return the PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name.isupper()}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned_names = [name for name in types if name not in ("n", "scale", "offset", "eps")] if aligned else []
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned_names}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={k: v for k, v in options.items() if k not in constants}
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match is not None, usage
    registers, stack, local = map(int, match.groups())
    shared = compiled.metadata.shared
    label = f"sm_{capability} {kernel.__name__} {types.get('x', types.get('out'))} {options}: {registers} registers, {shared} B"
    print(label)
    assert (stack, local) == (0, 0), f"{label} spills"
    assert shared <= MAX_SHARED[capability] * 1024, label
    assert registers * 32 * options["num_warps"] <= 65536, label
    return str(compiled.asm["ptx"])


def _check_code(kernel: Any, options: dict[str, Any], ptx: str, capability: int) -> None:
    """No math is approximate, flushed to zero or contracted, and the intended instructions are used."""
    assert ".ftz" not in ptx
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert "rsqrt" not in ptx
    if kernel in (triton_kernels.rows_kernel, triton_kernels.scales_kernel, triton_kernels.nf4_kernel):
        assert not re.search(r"\b(mul|add|sub)\.f32", ptx)  # without .rn ptxas may contract them
        assert "fma.rn.f32" not in ptx  # of bf16: LLVM multiplies two bf16 so, adding −0.0, which rounds once as well
    if kernel is triton_kernels.rows_kernel:
        assert "max.NaN.f32" in ptx
    if kernel is triton_kernels.product_kernel:
        wgmma = "wgmma.mma_async.sync.aligned.m64n" in ptx and "s32.s8.s8" in ptx
        assert wgmma or "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8" in ptx.replace(".satfinite", "")
    if kernel is triton_kernels.vector_kernel:
        assert "dp4a.u32.s32" in ptx


@without_interpreter
def test_kernels_compiled_for_an_rtx_4070_do_not_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for kernel, types, options, aligned in _launches(torch.bfloat16):
        _check_code(kernel, options, _compile(kernel, types, options, aligned, 89, tmp_path), 89)


@without_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_kernels_compiled_for_all_supported_gpus_do_not_spill(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for kernel, types, options, aligned in _launches(dtype):
        _check_code(kernel, options, _compile(kernel, types, options, aligned, capability, tmp_path), capability)
