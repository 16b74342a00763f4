"""The ternary CPU backend on Hugging Face's packed bytes: kernels in LLVM IR, compiled by numba's llvmlite.

Product. A vector of bytes of packed row r holds, for as many columns, the codes 0, 1, 2 of four rows of the weight. It is read
once; `byte & (3 << 2j)` is row j's code times 4ʲ, and vpdpbusd sums its products with the activations, four unsigned bytes by
four signed ones per lane, into 32 bits. At the end of a row the sum is shifted right by 2j, which is exact, and Σq is
subtracted, because a code is t + 1. So nothing is unpacked, no copy is kept, all integers are exact, and the order of the fp32
operations that follow is fixed. There are as many accumulators as a vector has lanes, so that one transpose reduces them all.

Only llvmlite is imported, not numba: LLVM compiles the few kernels in a fraction of a second in each process, without a cache
on disk, and the threads are our own, independent of the threading layer that numba would choose.

Matrices smaller than one block go to torch (aten.py).
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from quant import ternary
from quant.backends import aten

NAME = "numba"
DEVICES = ("cpu",)

COLUMNS = 64  # what the kernels for rows and weights take at a time, and the widest vector of the product
SUMMED = 1 << 17  # codes times 64 times 128: as many columns fit into 32 bits
AHEAD = 1 << 13  # bytes of weights fetched ahead: two pages, past which the processor does not fetch by itself
ALONE = 1 << 20  # bytes below which one thread is used: waking another takes as long
CACHED = 1 << 18  # bytes of activations multiplied in one pass over the weights

_Kernel = Callable[..., None]


class _Kernels(NamedTuple):
    engine: object  # owns the machine code
    lanes: int  # 32-bit numbers in a vector of the product
    dot: dict[tuple[torch.dtype, int], _Kernel]  # by output dtype, and tokens processed at a time
    pack: dict[torch.dtype, _Kernel]
    quantize: dict[torch.dtype, _Kernel]
    dequantize: dict[int, _Kernel]  # by bytes of an element


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"numba's ternary kernels run on the cpu, not on {device.type}"
    lanes = _lanes()
    return lanes if isinstance(lanes, str) else None


def describe(device: torch.device) -> str:
    import llvmlite

    return f"llvmlite {llvmlite.__version__} vpdpbusd, {32 * _kernels().lanes} bits ({device.type})"


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, k) → uint8 (out/4, k), fp32 ()."""
    out, k = weight.shape
    if k < COLUMNS:
        return aten.quantize_weight(weight)
    weight = weight.detach().contiguous()
    scale = aten.weight_scale(weight)
    packed = weight.new_empty((out // 4, k), dtype=torch.uint8)
    arguments = weight.data_ptr(), scale.data_ptr(), packed.data_ptr(), k, out // 4
    _run(_kernels().pack[weight.dtype], arguments, out // 4, 1, weight.numel())
    return packed, scale


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) → int8 (n, k), fp32 (n, 1)."""
    n, k = x.shape
    if k < COLUMNS or n == 0:
        return aten.quantize_activations(x)
    x = x.contiguous()
    codes, scales = x.new_empty(n, k, dtype=torch.int8), x.new_empty(n, 1, dtype=torch.float32)
    _run(_kernels().quantize[x.dtype], (x.data_ptr(), codes.data_ptr(), scales.data_ptr(), k), n, 1, n * k)
    return codes, scales


def direct(packed: Tensor) -> bool:
    """Whether these kernels can multiply with these weights; otherwise torch does."""
    quarter, k = packed.shape
    return COLUMNS <= k < SUMMED and quarter >= ternary.ROWS_A_BYTE


def linear(codes: Tensor, scales: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype, *, frozen: bool) -> Tensor:
    """codes int8 (n, k), scales fp32 (n, 1), packed uint8 (out/4, k), scale fp32 () → (n, out) in `dtype`. Exact."""
    n, k = codes.shape
    if not direct(packed):
        return aten.linear(codes, scales, packed, scale, dtype, frozen=False)
    kernels, quarter, tokens = _kernels(), packed.shape[0], 1 if n == 1 else 2
    vector = 4 * kernels.lanes
    wide = -(k // -vector) * vector
    codes, scales, packed = codes.contiguous(), scales.contiguous(), packed.contiguous()
    if wide != k:  # the last vector of a row of weights is aligned to the row's end, so its overlap is multiplied by zeros
        padded, whole = codes.new_zeros(n, wide), wide - vector
        padded[:, :whole], padded[:, whole - k :] = codes[:, :whole], codes[:, whole:]
        codes = padded
    out = codes.new_empty((n, 4 * quarter), dtype=dtype)
    q, w, a, s, y = (t.data_ptr() for t in (codes, packed, scales, scale, out))
    row, block = 4 * quarter * out.itemsize, kernels.lanes // (4 * tokens)
    pieces = -(n // -max(4, CACHED // wide))  # of at least two tokens
    for i in range(pieces):
        start, stop = n * i // pieces, n * (i + 1) // pieces
        arguments = q + start * wide, w, a + 4 * start, s, y + start * row, k, wide, quarter, stop - start
        _run(kernels.dot[dtype, tokens], arguments, quarter, block, (stop - start) * quarter * k)
    return out


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, k) in `dtype`, rounded once from fp32."""
    quarter, k = packed.shape
    if k < COLUMNS:
        return aten.dequantize(packed, scale, dtype)
    packed = packed.contiguous()
    values = (torch.arange(-1, 2, device=packed.device) / scale).to(dtype)
    out = packed.new_empty(4 * quarter, k, dtype=dtype)
    arguments = packed.data_ptr(), values.data_ptr(), out.data_ptr(), k, quarter
    _run(_kernels().dequantize[out.itemsize], arguments, quarter, 1, out.nbytes)
    return out


def _run(kernel: _Kernel, arguments: tuple[int, ...], rows: int, block: int, work: int) -> None:
    """Run a kernel over `rows`, in blocks, on as many threads as torch has; ctypes releases the interpreter's lock."""
    threads = min(torch.get_num_threads(), rows // block) if work >= ALONE else 1
    if threads <= 1:
        kernel(*arguments, 0, rows)
        return
    (first, last), *others = pairwise(rows * i // threads for i in range(threads + 1))
    running = [_pool(os.getpid(), threads - 1).submit(kernel, *arguments, *part) for part in others]
    kernel(*arguments, first, last)
    for future in running:
        future.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "ternary")  # per process: threads do not survive a fork


@functools.cache
def _lanes() -> int | str:
    """32-bit lanes of the widest vpdpbusd of this CPU, or why there is none."""
    try:
        from llvmlite import binding
    except ImportError as error:
        return f"numba is not installed ({error}): pip install finetune12g[numba]"
    flags = binding.get_host_cpu_features()
    if flags.get("avx512vnni") and flags.get("avx512bw"):
        return 16
    return 8 if flags.get("avxvnni") else "this CPU has no vpdpbusd instruction (neither avx512_vnni nor avx_vnni)"


@functools.cache
def _kernels() -> _Kernels:
    lanes = _lanes()
    assert isinstance(lanes, int)
    return compile_kernels(lanes)


def compile_kernels(lanes: int) -> _Kernels:
    """Compile the kernels for this CPU, with vectors of `lanes` lanes in the product."""
    from llvmlite import binding

    kinds = {torch.float32: "float", torch.bfloat16: "bfloat", torch.float16: "half"}
    code = [_DECLARATIONS.format(lanes=lanes, bits=32 * lanes)]
    code += [_dot(lanes, tokens, kind) for tokens in (1, 2) for kind in kinds.values()]
    code += [function(kind) for function in (_pack, _quantize) for kind in kinds.values()]
    code += [_dequantize(size) for size in (2, 4)]
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly("\n".join(code))
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()

    def function(name: str, pointers: int, sizes: int) -> _Kernel:
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes)
        return prototype(engine.get_function_address(name))

    return _Kernels(
        engine,
        lanes,
        {(dtype, tokens): function(f"dot{tokens}_{kind}", 5, 6) for dtype, kind in kinds.items() for tokens in (1, 2)},
        {dtype: function(f"pack_{kind}", 3, 4) for dtype, kind in kinds.items()},
        {dtype: function(f"quantize_{kind}", 3, 3) for dtype, kind in kinds.items()},
        {size: function(f"dequantize{size}", 3, 4) for size in (2, 4)},
    )


# LLVM IR. Loops over several rows or columns at once end with the last complete group, and so do some of
# the work twice, writing the same values to the same location.

_NEWLINE = "\n"
_DECLARATIONS = """
@zeros = private constant [64 x i8] zeroinitializer
declare <{lanes} x i32> @llvm.x86.avx512.vpdpbusd.{bits}(<{lanes} x i32>, <{lanes} x i32>, <{lanes} x i32>)
declare i32 @llvm.vector.reduce.add.v{lanes}i32(<{lanes} x i32>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.maximum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.roundeven.v16f32(<16 x float>)
declare float @llvm.vector.reduce.fmaximum.v16f32(<16 x float>)
declare float @llvm.maximum.f32(float, float)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.minnum.v16f32(<16 x float>, <16 x float>)
"""


def _vector(kind: str, values: Sequence[float]) -> str:
    return f"<{', '.join(f'{kind} {value}' for value in values)}>"


def _dot(lanes: int, tokens: int, kind: str) -> str:
    """void dotT_K(q, packed, a, s, y, k, wide, quarter, n, first, last): y (n, out) in type K for packed rows first … last.

    q: int8 (n, wide). At a time: T rows of q, and as many rows of weights as fill the accumulators. One row of q reads the
    weights strictly in order, two vectors per iteration, because it is bound by memory. Two rows share their loads.
    """
    rows = lanes // (4 * tokens)
    v, f, width = f"<{lanes} x i32>", f"<{lanes} x float>", 4 * lanes
    dot = f"call {v} @llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    ones = _vector("i32", [0x01010101] * lanes)
    lines = [
        f"""
define void @dot{tokens}_{kind}(ptr %q, ptr %w, ptr %a, ptr %s, ptr %y,
    i64 %k, i64 %wide, i64 %quarter, i64 %n, i64 %first, i64 %last) {{
entry:
  %sums = alloca i32, i64 %n
  %scale = load float, ptr %s
  %end = sub i64 %k, {width}
  %end_row = sub i64 %last, {rows}
  %end_token = sub i64 %n, {tokens}
  br label %sum
sum:
  %u = phi i64 [0, %entry], [%u.next, %summed]
  %u.offset = mul i64 %u, %wide
  %u.q = getelementptr i8, ptr %q, i64 %u.offset
  br label %add
add:
  %c = phi i64 [0, %sum], [%c.next, %add]
  %add.sum = phi {v} [zeroinitializer, %sum], [%add.next, %add]
  %c.q = getelementptr i8, ptr %u.q, i64 %c
  %c.codes = load {v}, ptr %c.q, align 1
  %add.next = {dot}({v} %add.sum, {v} {ones}, {v} %c.codes)
  %c.next = add i64 %c, {width}
  %c.more = icmp ult i64 %c.next, %wide
  br i1 %c.more, label %add, label %summed
summed:
  %u.sum = call i32 @llvm.vector.reduce.add.v{lanes}i32({v} %add.next)
  %u.at = getelementptr i32, ptr %sums, i64 %u
  store i32 %u.sum, ptr %u.at
  %u.next = add i64 %u, 1
  %u.more = icmp ult i64 %u.next, %n
  br i1 %u.more, label %sum, label %rows
rows:
  %r = phi i64 [%first, %summed], [%r.next, %next]
  %r.whole = icmp slt i64 %r, %end_row
  %row = select i1 %r.whole, i64 %r, i64 %end_row
  %row.offset = mul i64 %row, %k
  %w0 = getelementptr i8, ptr %w, i64 %row.offset
{_lines("  %w{i} = getelementptr i8, ptr %w{before}, i64 %k", range(1, rows))}
  br label %tokens
tokens:
  %t = phi i64 [0, %rows], [%t.next, %done]
  %t.whole = icmp slt i64 %t, %end_token
  %token = select i1 %t.whole, i64 %t, i64 %end_token
  %token.offset = mul i64 %token, %wide
  %q0 = getelementptr i8, ptr %q, i64 %token.offset
{_lines("  %q{i} = getelementptr i8, ptr %q{before}, i64 %wide", range(1, tokens))}"""
    ]
    groups = [[row] for row in range(rows)] if tokens == 1 else [list(range(rows))]
    block, totals = "tokens", {}
    for group in groups:
        lines += [f"  br label %row{group[0]}"]
        code, row_totals = _rows(lanes, range(tokens), group, 2 if tokens == 1 else 1, block)
        lines += code
        totals.update(row_totals)
        block = f"row{group[0]}.done"
    lines += ["  br label %done", "done:"]
    # Reduce: halves of two vectors are added and concatenated, until lane l holds the sum of vector l.
    order = [(t, j, r) for t in range(tokens) for j in range(4) for r in range(rows)]
    vectors, half = [totals[place] for place in order], lanes // 2
    while half:
        low = [g + i for g in range(0, 2 * lanes, 2 * half) for i in range(half)]
        folded = []
        for i in range(0, len(vectors), 2):
            pair, name = f"{v} {vectors[i]}, {v} {vectors[i + 1]}", f"%fold{half}.{i}"
            lines += [
                f"""  {name}.low = shufflevector {pair}, {v} {_vector("i32", low)}
  {name}.high = shufflevector {pair}, {v} {_vector("i32", [i + half for i in low])}
  {name} = add {v} {name}.low, {name}.high"""
            ]
            folded += [name]
        vectors, half = folded, half // 2
    own = _vector("i32", [t for t, _, _ in order])
    element, size = {"float": ("float", 4), "bfloat": ("i16", 2), "half": ("half", 2)}[kind]
    rounding, result = _rounded("%quotient", kind, lanes)
    lines += [
        f"""  %sums.at = getelementptr i32, ptr %sums, i64 %token
  %sums.few = load <{tokens} x i32>, ptr %sums.at, align 4
  %sums.all = shufflevector <{tokens} x i32> %sums.few, <{tokens} x i32> poison, {v} {own}
  %a.at = getelementptr float, ptr %a, i64 %token
  %a.few = load <{tokens} x float>, ptr %a.at, align 4
  %a.all = shufflevector <{tokens} x float> %a.few, <{tokens} x float> poison, {v} {own}
  %scale.one = insertelement {f} poison, float %scale, i32 0
  %scale.all = shufflevector {f} %scale.one, {f} poison, {v} zeroinitializer
  %divisor = fmul {f} %a.all, %scale.all
  %codesum = ashr {v} {vectors[0]}, {_vector("i32", [2 * j for _, j, _ in order])}
  %integer = sub {v} %codesum, %sums.all
  %product = sitofp {v} %integer to {f}
  %quotient = fdiv {f} %product, %divisor
{rounding}"""
    ]
    for start in range(0, lanes, rows):
        (t, j, _), part, y = order[start], _vector("i32", list(range(start, start + rows))), f"%y{start}"
        lines += [
            f"""  {y}.token = add i64 %token, {t}
  {y}.fours = mul i64 {y}.token, 4
  {y}.stripe = add i64 {y}.fours, {j}
  {y}.offset = mul i64 {y}.stripe, %quarter
  {y}.column = add i64 {y}.offset, %row
  {y}.at = getelementptr {element}, ptr %y, i64 {y}.column
  {y} = shufflevector <{lanes} x {element}> {result}, <{lanes} x {element}> poison, <{rows} x i32> {part}
  store <{rows} x {element}> {y}, ptr {y}.at, align {size}"""
        ]
    lines += [
        f"""  %t.next = add i64 %t, {tokens}
  %t.more = icmp ult i64 %t.next, %n
  br i1 %t.more, label %tokens, label %next
next:
  %r.next = add i64 %r, {rows}
  %r.more = icmp ult i64 %r.next, %last
  br i1 %r.more, label %rows, label %exit
exit:
  ret void
}}"""
    ]
    return _NEWLINE.join(lines)


def _rows(
    lanes: int, tokens: range, rows: list[int], vectors: int, before: str
) -> tuple[list[str], dict[tuple[int, int, int], str]]:
    """The loop over the columns for some packed rows, `vectors` per iteration; and the sums of (token, stripe, row)."""
    v, width, me = f"<{lanes} x i32>", 4 * lanes, rows[0]
    places = [(t, j, r, i) for t in tokens for j in range(4) for r in rows for i in range(vectors)]
    lines = [f"row{me}:", f"  %i{me} = phi i64 [0, %{before}], [%i{me}.next, %row{me}]"]
    lines += [
        f"  %sum{t}{j}{r}{i} = phi {v} [zeroinitializer, %{before}], [%next{t}{j}{r}{i}, %row{me}]" for t, j, r, i in places
    ]
    for i in range(vectors):
        at = f"%at{me}{i}"
        lines += [
            f"""  {at}.i = add i64 %i{me}, {i * width}
  {at}.whole = icmp slt i64 {at}.i, %end
  {at} = select i1 {at}.whole, i64 {at}.i, i64 %end
  {at}.ahead = add i64 {at}, {AHEAD}
  {at}.in = icmp ult i64 {at}.i, %wide"""
        ]
        for t in tokens:
            q = f"%q{t}{me}{i}"
            lines += [f"  {q}.in = getelementptr i8, ptr %q{t}, i64 {at}.i"]
            lines += [f"  {q}.at = select i1 {at}.in, ptr {q}.in, ptr @zeros\n  {q} = load {v}, ptr {q}.at, align 1"]
        for r in rows:
            w = f"%w{r}.{i}"
            lines += [
                f"""  {w}.at = getelementptr i8, ptr %w{r}, i64 {at}
  {w} = load {v}, ptr {w}.at, align 1
  {w}.ahead = getelementptr i8, ptr %w{r}, i64 {at}.ahead
  call void @llvm.prefetch.p0(ptr {w}.ahead, i32 0, i32 3, i32 1)"""
            ]
            for j in range(4):
                lines += [f"  {w}.{j} = and {v} {w}, {_vector('i32', [0x03030303 << 2 * j] * lanes)}"]
                for t in tokens:
                    sums = f"{v} %sum{t}{j}{r}{i}, {v} {w}.{j}, {v} %q{t}{me}{i}"
                    lines += [f"  %next{t}{j}{r}{i} = call {v} @llvm.x86.avx512.vpdpbusd.{32 * lanes}({sums})"]
    lines += [f"  %i{me}.next = add i64 %i{me}, {vectors * width}\n  %i{me}.more = icmp ult i64 %i{me}.next, %wide"]
    lines += [f"  br i1 %i{me}.more, label %row{me}, label %row{me}.done", f"row{me}.done:"]
    totals = {(t, j, r): f"%next{t}{j}{r}0" for t, j, r, _ in places}
    for t, j, r, i in places:
        if i:
            lines += [f"  %total{t}{j}{r}{i} = add {v} {totals[t, j, r]}, %next{t}{j}{r}{i}"]
            totals[t, j, r] = f"%total{t}{j}{r}{i}"
    return lines, totals


def _rounded(value: str, kind: str, lanes: int) -> tuple[str, str]:
    """Code that rounds `value` (fp32) to type K, half to even, and the name of the result.

    bf16 in integers: the processors' own conversion flushes denormals, and LLVM's calls a library where there is none.
    """
    v, f = f"<{lanes} x i32>", f"<{lanes} x float>"
    if kind == "float":
        return "", value
    if kind == "half":
        return f"  %result = fptrunc {f} {value} to <{lanes} x half>", "%result"
    return (
        f"""  %bits = bitcast {f} {value} to {v}
  %above = lshr {v} %bits, {_vector("i32", [16] * lanes)}
  %odd = and {v} %above, {_vector("i32", [1] * lanes)}
  %half = add {v} %odd, {_vector("i32", [0x7FFF] * lanes)}
  %up = add {v} %bits, %half
  %high = lshr {v} %up, {_vector("i32", [16] * lanes)}
  %number = trunc {v} %high to <{lanes} x i16>
  %nan = fcmp uno {f} {value}, zeroinitializer
  %result = select <{lanes} x i1> %nan, <{lanes} x i16> {_vector("i16", [0x7FC0] * lanes)}, <{lanes} x i16> %number""",
        "%result",
    )


def _lines(line: str, numbers: range) -> str:
    return "\n".join(line.format(i=i, before=i - 1) for i in numbers)


def _load(kind: str, name: str, base: str, place: int) -> str:
    """`name` = 16 fp32 from numbers in type K, beginning with number 16 · place after `base`."""
    v = "<16 x float>"
    at = f"  {name}.at = getelementptr i8, ptr {base}, i64 {16 * place * (4 if kind == 'float' else 2)}\n"
    if kind == "float":
        return f"{at}  {name} = load {v}, ptr {name}.at, align 4"
    if kind == "half":
        return f"{at}  {name}.half = load <16 x half>, ptr {name}.at, align 2\n  {name} = fpext <16 x half> {name}.half to {v}"
    return f"""{at}  {name}.short = load <16 x i16>, ptr {name}.at, align 2
  {name}.long = zext <16 x i16> {name}.short to <16 x i32>
  {name}.bits = shl <16 x i32> {name}.long, {_vector("i32", [16] * 16)}
  {name} = bitcast <16 x i32> {name}.bits to {v}"""


def _pack(kind: str) -> str:
    """void pack_K(weight, s, packed, k, quarter, first, last): packed rows first … last of a weight (out, k) in type K."""
    size, v = 4 if kind == "float" else 2, "<16 x float>"
    one = _vector("float", [1.0] * 16)
    lines = []
    for i in range(COLUMNS // 16):
        for j in range(4):
            x = f"%x{i}.{j}"
            lines += [
                f"""{_load(kind, x, f"%row{j}", i)}
  {x}.scaled = fmul {v} {x}, %scales
  {x}.round = call {v} @llvm.roundeven.v16f32({v} {x}.scaled)
  {x}.low = call {v} @llvm.maxnum.v16f32({v} {x}.round, {v} {_vector("float", [-1.0] * 16)})
  {x}.clip = call {v} @llvm.minnum.v16f32({v} {x}.low, {v} {one})
  {x}.code = fadd {v} {x}.clip, {one}
  {x}.int = fptosi {v} {x}.code to <16 x i32>
  {x}.place = shl <16 x i32> {x}.int, {_vector("i32", [2 * j] * 16)}"""
            ]
            if j:
                lines += [f"  {x}.all = or <16 x i32> {x}.place, %x{i}.{j - 1}.{'all' if j > 1 else 'place'}"]
        lines += [
            f"""  %byte{i} = trunc <16 x i32> %x{i}.3.all to <16 x i8>
  %to{i} = getelementptr i8, ptr %to, i64 {16 * i}
  store <16 x i8> %byte{i}, ptr %to{i}, align 1"""
        ]
    return f"""
define void @pack_{kind}(ptr %weight, ptr %s, ptr %packed, i64 %k, i64 %quarter, i64 %first, i64 %last) {{
entry:
  %end = sub i64 %k, {COLUMNS}
  %elements = mul i64 %quarter, %k
  %stripe = mul i64 %elements, {size}
  %scale = load float, ptr %s
  %scale.one = insertelement {v} poison, float %scale, i32 0
  %scales = shufflevector {v} %scale.one, {v} poison, <16 x i32> zeroinitializer
  br label %rows
rows:
  %r = phi i64 [%first, %entry], [%r.next, %next]
  %offset = mul i64 %r, %k
  br label %columns
columns:
  %i = phi i64 [0, %rows], [%i.next, %columns]
  %i.whole = icmp slt i64 %i, %end
  %column = select i1 %i.whole, i64 %i, i64 %end
  %at = add i64 %offset, %column
  %to = getelementptr i8, ptr %packed, i64 %at
  %byte = mul i64 %at, {size}
  %row0 = getelementptr i8, ptr %weight, i64 %byte
{_lines("  %row{i} = getelementptr i8, ptr %row{before}, i64 %stripe", range(1, 4))}
{_NEWLINE.join(lines)}
  %i.next = add i64 %i, {COLUMNS}
  %i.more = icmp ult i64 %i.next, %k
  br i1 %i.more, label %columns, label %next
next:
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %last
  br i1 %r.more, label %rows, label %exit
exit:
  ret void
}}"""


def _quantize(kind: str) -> str:
    """void quantize_K(x, q, a, k, first, last): rows first … last of x (n, k) in type K."""
    size = 4 if kind == "float" else 2
    floor = "0x" + struct.pack(">d", torch.tensor(ternary.FLOOR).item()).hex()  # LLVM IR writes a float as a double
    v, four = "<16 x float>", range(COLUMNS // 16)
    old = [f"  %old{i} = phi {v} [zeroinitializer, %rows], [%new{i}, %largest]" for i in four]
    largest = [
        f"""{_load(kind, f"%m{i}", "%i.x", i)}
  %abs{i} = call {v} @llvm.fabs.v16f32({v} %m{i})
  %new{i} = call {v} @llvm.maximum.v16f32({v} %old{i}, {v} %abs{i})"""
        for i in four
    ]
    codes = [
        f"""{_load(kind, f"%v{i}", "%j.x", i)}
  %scaled{i} = fmul {v} %v{i}, %scales
  %round{i} = call {v} @llvm.roundeven.v16f32({v} %scaled{i})
  %int{i} = fptosi {v} %round{i} to <16 x i32>
  %byte{i} = trunc <16 x i32> %int{i} to <16 x i8>
  %to{i} = getelementptr i8, ptr %q.at, i64 {16 * i}
  store <16 x i8> %byte{i}, ptr %to{i}, align 1"""
        for i in four
    ]
    return f"""
define void @quantize_{kind}(ptr %x, ptr %q, ptr %a, i64 %k, i64 %first, i64 %last) {{
entry:
  %end = sub i64 %k, {COLUMNS}
  br label %rows
rows:
  %r = phi i64 [%first, %entry], [%r.next, %next]
  %offset = mul i64 %r, %k
  br label %largest
largest:
  %i = phi i64 [0, %rows], [%i.next, %largest]
{_NEWLINE.join(old)}
  %i.whole = icmp slt i64 %i, %end
  %i.column = select i1 %i.whole, i64 %i, i64 %end
  %i.element = add i64 %offset, %i.column
  %i.byte = mul i64 %i.element, {size}
  %i.x = getelementptr i8, ptr %x, i64 %i.byte
{_NEWLINE.join(largest)}
  %i.next = add i64 %i, {COLUMNS}
  %i.more = icmp ult i64 %i.next, %k
  br i1 %i.more, label %largest, label %found
found:
  %max01 = call {v} @llvm.maximum.v16f32({v} %new0, {v} %new1)
  %max23 = call {v} @llvm.maximum.v16f32({v} %new2, {v} %new3)
  %max = call {v} @llvm.maximum.v16f32({v} %max01, {v} %max23)
  %max.one = call float @llvm.vector.reduce.fmaximum.v16f32({v} %max)
  %max.floor = call float @llvm.maximum.f32(float %max.one, float {floor})
  %inverse = fdiv float 1.0, %max.floor
  %scale = fmul float %inverse, 127.0
  %a.at = getelementptr float, ptr %a, i64 %r
  store float %scale, ptr %a.at
  %scale.one = insertelement {v} poison, float %scale, i32 0
  %scales = shufflevector {v} %scale.one, {v} poison, <16 x i32> zeroinitializer
  br label %codes
codes:
  %j = phi i64 [0, %found], [%j.next, %codes]
  %j.whole = icmp slt i64 %j, %end
  %j.column = select i1 %j.whole, i64 %j, i64 %end
  %j.element = add i64 %offset, %j.column
  %j.byte = mul i64 %j.element, {size}
  %j.x = getelementptr i8, ptr %x, i64 %j.byte
  %q.at = getelementptr i8, ptr %q, i64 %j.element
{_NEWLINE.join(codes)}
  %j.next = add i64 %j, {COLUMNS}
  %j.more = icmp ult i64 %j.next, %k
  br i1 %j.more, label %codes, label %next
next:
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %last
  br i1 %r.more, label %rows, label %exit
exit:
  ret void
}}"""


def _dequantize(size: int) -> str:
    """void dequantizeS(w, values, out, k, quarter, first, last): packed rows first … last as values[code], of S bytes each."""
    number, lanes = f"i{8 * size}", 64 // size
    v = f"<{lanes} x {number}>"
    lines = []
    for i in range(COLUMNS // lanes):
        lines += [
            f"""  %from{i} = getelementptr i8, ptr %w.at, i64 {lanes * i}
  %bytes{i} = load <{lanes} x i8>, ptr %from{i}, align 1
  %long{i} = zext <{lanes} x i8> %bytes{i} to {v}"""
        ]
        for j in range(4):
            name = f"{i}.{j}"
            lines += [
                f"""  %shift{name} = lshr {v} %long{i}, {_vector(number, [2 * j] * lanes)}
  %code{name} = and {v} %shift{name}, {_vector(number, [3] * lanes)}
  %is0{name} = icmp eq {v} %code{name}, zeroinitializer
  %is2{name} = icmp eq {v} %code{name}, {_vector(number, [2] * lanes)}
  %low{name} = select <{lanes} x i1> %is0{name}, {v} %all0, {v} %all1
  %value{name} = select <{lanes} x i1> %is2{name}, {v} %all2, {v} %low{name}
  %to{name} = getelementptr i8, ptr %out{j}, i64 {64 * i}
  store {v} %value{name}, ptr %to{name}, align {size}"""
            ]
    table = [
        f"""  %table{i} = getelementptr {number}, ptr %values, i64 {i}
  %one{i} = load {number}, ptr %table{i}
  %lane{i} = insertelement {v} poison, {number} %one{i}, i32 0
  %all{i} = shufflevector {v} %lane{i}, {v} poison, <{lanes} x i32> zeroinitializer"""
        for i in range(3)
    ]
    return f"""
define void @dequantize{size}(ptr %w, ptr %values, ptr %out, i64 %k, i64 %quarter, i64 %first, i64 %last) {{
entry:
  %end = sub i64 %k, {COLUMNS}
  %elements = mul i64 %quarter, %k
  %stripe = mul i64 %elements, {size}
{_NEWLINE.join(table)}
  br label %rows
rows:
  %r = phi i64 [%first, %entry], [%r.next, %next]
  %offset = mul i64 %r, %k
  br label %columns
columns:
  %i = phi i64 [0, %rows], [%i.next, %columns]
  %i.whole = icmp slt i64 %i, %end
  %column = select i1 %i.whole, i64 %i, i64 %end
  %at = add i64 %offset, %column
  %w.at = getelementptr i8, ptr %w, i64 %at
  %byte = mul i64 %at, {size}
  %out0 = getelementptr i8, ptr %out, i64 %byte
{_lines("  %out{i} = getelementptr i8, ptr %out{before}, i64 %stripe", range(1, 4))}
{_NEWLINE.join(lines)}
  %i.next = add i64 %i, {COLUMNS}
  %i.more = icmp ult i64 %i.next, %k
  br i1 %i.more, label %columns, label %next
next:
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %last
  br i1 %r.more, label %rows, label %exit
exit:
  ret void
}}"""
