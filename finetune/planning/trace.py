"""Tracing a training step on fake tensors: which memory is live when, and what is computed.

The model is built on `meta`, and every tensor is replaced by a FakeTensor of torch (shape, dtype, storage size and autograd
graph, without memory). The recipe's own step runs on these: swap, adapters, patches, loss, backward pass. A dispatch mode below
autograd sees each operation: a storage is live from the operation that returns it first until nothing refers to it. That gives
the peak and its parts.

Three things are not torch operations here. Compiled kernels and packed attention are fused (`TraceContext`): their outputs and
saved tensors are counted one by one, their inner tensors as workspace. The quantized operators have fake implementations, and a
formula for their workspace (`quant_operation`).

A model with equal layers is traced with two and with four layers, and each moment's memory is extrapolated linearly. (torch's
fake CUDA tensors need a CUDA build, so these are fake CPU tensors; what a GPU does differently, flash attention, is modelled.)
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.train.fast import attention
from finetune.train.fast.segments import Segments

R = TypeVar("R")
Terms = dict[str, float]

# Work: {key: count}. ("gemm", dtype, m, n, k, layout), ("attention" or "attention backward", dtype, length, heads, width): calls.
# ("bytes", operation, dtype): bytes in total, and ("calls", operation, dtype): calls. ("dequantize", scheme),
# ("quantize", scheme): elements. ("operations",): operations. Names as in finetune/planning/devices.py, which has their times.
Work = Counter[tuple[Any, ...]]

# Operations that move no data.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "empty", "empty_like", "new_empty", "lift_fresh",
    "empty_strided", "new_empty_strided", "chunk", "diagonal", "squeeze_", "unsqueeze_", "detach_",
}  # fmt: skip


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "baddbmm_", "addmm_"}


@dataclass
class Moment:
    """The memory peak between two marks. total, terms: bytes allocated since the trace began."""

    total: float = 0.0
    terms: Terms = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Records live memory and work below autograd. phase: the term of new tensors; at: the current moment.

    vocabulary: activations with this many columns are logits; supervised: number of results of `nonzero`.
    """

    def __init__(self, *, vocabulary: int, supervised: int, cuda: bool) -> None:
        super().__init__()
        self.vocabulary, self.supervised, self.cuda = vocabulary, supervised, cuda
        self.phase, self.at = "weights", ("load", -1)
        self.live: dict[int, tuple[int, str]] = {}
        self.terms: Counter[str] = Counter()
        self.moments: dict[tuple[str, int], Moment] = {}
        self.work: Work = Counter()
        self.within: list[list[int]] = []  # [live bytes, their peak] of the fused kernels that are being traced
        self.known: dict[Any, int] = {}  # workspace of fused kernels that were traced
        self.codes: set[int] = set()  # ids of master weights whose codes exist

    # -- memory

    def _rounded(self, size: int) -> int:
        return -(-size // 512) * 512 if self.cuda else size  # CUDA's allocator rounds up to 512 bytes

    def allocated(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = self._rounded(storage.nbytes())
        if self.within:
            inner = self.within[-1]
            inner[0] += size
            inner[1] = max(inner)
            self.live[key] = size, ""
            weakref.finalize(storage, self._freed_within, key, inner)
            return
        name = self.phase
        if name in ("activations", "workspace") and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            name = "logits"
        self.live[key] = size, name
        self.terms[name] += size
        weakref.finalize(storage, self._freed, key)
        self.look()

    def ignore(self, *models: nn.Module) -> None:
        """Do not count parameters and buffers of models: they are static memory."""
        for tensor in (t for model in models for t in (*model.parameters(), *model.buffers())):
            self.live[tensor.untyped_storage()._cdata] = 0, ""

    def _freed(self, key: int) -> None:
        size, name = self.live.pop(key)
        self.terms[name] -= size

    def _freed_within(self, key: int, inner: list[int]) -> None:
        inner[0] -= self.live.pop(key)[0]

    def rename(self, tensor: Tensor, name: str) -> None:
        """Move a live tensor to another term."""
        key = tensor.untyped_storage()._cdata
        if key in self.live:
            size, old = self.live[key]
            self.live[key] = size, name
            self.terms[old] -= size
            self.terms[name] += size

    def look(self, extra: int = 0) -> None:
        """Update the moment's peak. extra: bytes of workspace that are live now."""
        if self.within:
            self.within[-1][1] = max(self.within[-1][1], self.within[-1][0] + extra)
            return
        total = sum(self.terms.values()) + extra
        moment = self.moments.setdefault(self.at, Moment())
        if total > moment.total:
            moment.total, moment.terms = total, dict(self.terms)
            if extra:
                moment.terms["workspace"] = moment.terms.get("workspace", 0) + extra

    def fused(self, key: Any, run: Callable[[], object]) -> None:
        """Count the workspace of a fused kernel. `run` does its computation; only the first of equal `key`s is traced."""
        if key not in self.known:
            inner = [0, 0]
            self.within.append(inner)
            try:
                run()
            finally:
                self.within.pop()
            self.known[key] = inner[1]
        self.look(self.known[key])

    @contextmanager
    def moment(self, phase: str, at: tuple[str, int]) -> Iterator[None]:
        before, self.phase, self.at = (self.phase, self.at), phase, at
        self.look()
        try:
            yield
        finally:
            self.phase, self.at = before

    def moved(self, name: str, dtype: torch.dtype, size: int) -> None:
        self.work[("bytes", name, _name(dtype))] += size
        self.work[("calls", name, _name(dtype))] += 1

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a query, not an operation
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "nonzero":  # the size of its result depends on data: supervised tokens, or tokens of an expert
            mask = args[0]
            out = mask.new_empty((min(self.supervised, mask.numel()), mask.ndim), dtype=torch.int64)
        elif name == "_local_scalar_dense":  # a tensor's value: any will do
            return 0.0 if args[0].is_floating_point() else 0
        elif name == "_grouped_mm":
            out = _grouped_mm(args, kwargs)
        else:
            out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            self.allocated(tensor)
        if name in PRODUCTS and not self.cuda:
            self.look(_copied(args))
        if func.namespace == "quant12g":
            self._quantized(name, args)
        elif not self.within and name not in VIEWS:
            self._count(name, args, kwargs, results)
        return out

    def _quantized(self, name: str, args: Any) -> None:
        scheme = args[0]
        bytes_, work = quant_operation(name, args, cuda=self.cuda)
        if (
            name == "linear" and args[4] is False and id(args[3][0]) not in self.codes
        ):  # codes of a master weight, kept until the step
            master = args[3][0]
            self.codes.add(id(master))
            self.terms["weights"] += self._rounded(master.numel() // 4)
            work[("quantize", scheme)] += master.numel()
        self.look(bytes_)
        if not self.within:
            self.work.update(work)
            self.work[("operations",)] += 1

    def _count(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        self.work[("operations",)] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        matrices = [t for t in tensors if t.ndim >= 2]
        if name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "_grouped_mm", "baddbmm_") and len(matrices) >= 2:
            a, b = matrices[-2:] if len(matrices) == 2 or name.startswith(("addmm", "baddbmm")) else matrices[:2]
            batch = a.shape[0] if a.ndim == 3 else 1
            if name == "_grouped_mm":  # each row goes to one expert
                a, b = args[:2]
                batch = 1
            self.work[("gemm", _name(a.dtype), a.shape[-2], b.shape[-1], a.shape[-1], _layout(a, b))] += batch
        elif "scaled_dot_product" in name:
            q = args[1] if "backward" in name else args[0]
            operation = "attention backward" if "backward" in name else "attention"
            self.work[(operation, _name(q.dtype), q.shape[2], q.shape[1], q.shape[3])] += q.shape[0]
        else:
            size = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*tensors, *results]}.values())
            widest = max((t for t in results or tensors), key=lambda t: t.numel(), default=None)
            if widest is not None:
                self.moved(name, widest.dtype, size)


def _copied(args: Any) -> int:
    """Bytes that a matrix product on the CPU copies: in low precision oneDNN copies factors that are neither contiguous nor
    transposed contiguous (mkldnn_matmul, aten/src/ATen/native/mkldnn/Matmul.cpp)."""
    a, b = [leaf for leaf in args if isinstance(leaf, Tensor) and leaf.ndim >= 2][-2:]
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    low = a.dtype in (torch.bfloat16, torch.float16) or (a.dtype == torch.float32 and setting.fp32_precision == "bf16")
    if not low or a.shape[-2] * a.shape[-1] * b.shape[-1] <= 16**3:
        return 0
    return sum(t.numel() * t.element_size() for t in (a, b) if not (t.is_contiguous() or t.transpose(-2, -1).is_contiguous()))


def _grouped_mm(args: Any, kwargs: Any) -> Tensor:
    """The result of a grouped product, per expert; torch's fake implementation supports bf16 only, its CPU kernel floats too."""
    a, b = args[:2]
    groups = (args[2] if len(args) > 2 else kwargs["offs"]).shape[0]
    shape = (groups, a.shape[-2], b.shape[-1]) if a.ndim == b.ndim == 2 else (a.shape[-2], b.shape[-1])
    return a.new_empty(shape)


class GroupedProducts(TorchDispatchMode):
    """Supports grouped products on fake tensors where nothing is recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grouped = func is torch.ops.aten._grouped_mm.default
        return _grouped_mm(args, kwargs or {}) if grouped else func(*args, **(kwargs or {}))


def _layout(a: Tensor, b: Tensor) -> str:
    """Layout of the factors: nt a linear's forward pass, nn its input's gradient, tn its weight's gradient."""
    if a.shape[-2] > 1 and a.stride(-2) == 1:
        return "tn"
    return "nt" if b.shape[-1] > 1 and b.stride(-2) == 1 else "nn"


def _name(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def quant_operation(name: str, args: Any, *, cuda: bool) -> tuple[int, Work]:
    """(bytes of workspace, work) of an operator of quant/ops.py."""
    from quant.ops import SLICE_BYTES, SLICE_FROM

    scheme, work = args[0], Counter[tuple[Any, ...]]()
    if name in ("activations", "norm_activations"):
        work[("quantize", f"{scheme} rows")] += args[1].numel()
        return 0, work
    if name in ("linear_onto", "grad_onto"):
        y, x = args[1], args[2]
        out, inner = (y.shape[1], x.shape[1]) if name == "linear_onto" else (x.shape[1], y.shape[1])
        m, dtype = x.shape[0], y.dtype
    elif name == "linear":
        out, inner, dtype, m = args[5], args[6], args[7], args[1][0].numel() // args[6]
    elif name == "grad_input":
        out, inner, dtype, m = args[4], args[5], args[1].dtype, args[1].numel() // args[4]
    elif name == "grad_weight":
        out, inner, dtype = args[1].shape[-1], args[2][0].shape[-1], args[1].dtype
        m = args[1].numel() // out
    else:
        out, inner, dtype, m = args[3], args[4], args[5], 0
    weight = out * inner * dtype.itemsize
    integer = scheme == "ternary"
    product = "ternary" if integer and name in ("linear", "linear_onto") else _name(dtype)
    if name in ("linear", "linear_onto"):
        work[("gemm", product, m, out, inner, "nt")] += 1
    elif name in ("grad_input", "grad_onto"):
        work[("gemm", product, m, inner, out, "nn")] += 1
    elif name == "grad_weight":
        work[("gemm", product, out, inner, m, "tn")] += 1
    if name == "grad_weight":
        return m * inner * (dtype.itemsize + 4) if integer else 0, work
    if integer and name in ("linear", "linear_onto"):
        within = 4 * min(m, 256) * min(out, 1024) * 2
        if name == "linear_onto":
            within += m * inner * 5 // 4 + m * out * dtype.itemsize
            work[("quantize", f"{scheme} rows")] += m * inner
        return within, work
    work[("dequantize", scheme)] += out * inner
    if cuda or weight < SLICE_FROM or scheme == "ternary":
        return weight + (0 if cuda or scheme == "ternary" else out * inner // 64 * 4), work
    return SLICE_BYTES + out * inner // 64 * 4 + SLICE_BYTES // 2, work


# ----------------------------------------------------------------------------------------------------------- fused kernels


class TraceContext:
    """Used by patched code while it is traced. segments: samples of the batch; other shapes have one sample per row."""

    def __init__(self, recorder: Recorder, bounds: tuple[int, ...], shape: tuple[int, int]) -> None:
        self.recorder, self.shape = recorder, shape
        self._segments = Segments(bounds, shape, torch.device("cpu"))

    def segments(self, shape: tuple[int, int]) -> Segments:
        if shape == self.shape:
            return self._segments
        return Segments(tuple(range(0, shape[0] * shape[1] + 1, shape[1])), shape, torch.device("cpu"))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        return _Attention.apply(q, k, v, options, self.recorder)

    def fused(self, function: Callable[..., R]) -> Callable[..., R]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return _Fused.apply(self.recorder, function, kwargs, *args)
            return _apart(self.recorder, function, args, kwargs)

        return call


def _apart(recorder: Recorder, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The outputs of `function` as one kernel; its intermediate tensors take no memory."""
    inner = [0, 0]
    recorder.within.append(inner)
    try:
        with torch.no_grad():
            out = function(*args, **kwargs)
    finally:
        recorder.within.pop()
    fresh = [torch.empty_like(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    size = sum(t.numel() * t.element_size() for t in [*tensors, *fresh])
    recorder.moved("fused", fresh[0].dtype, size)
    recorder.work[("operations",)] += 1
    return fresh[0] if isinstance(out, Tensor) else tuple(fresh)


def _needed(recorder: Recorder, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
    """The inputs that a compiled kernel saves for its backward pass: those that the plain function saves, or all if it saves
    intermediate tensors, which are recomputed."""
    kept: set[int] = set()

    def keep(tensor: Tensor) -> None:  # saves nothing: a result saved by its own node would be a reference cycle
        kept.add(tensor.untyped_storage()._cdata)

    recorder.within.append([0, 0])
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
            own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
            function(*own, **kwargs)
    finally:
        recorder.within.pop()
    inputs = {a.untyped_storage()._cdata: a for a in args if isinstance(a, Tensor)}
    return [inputs[key] for key in kept] if kept <= inputs.keys() else list(inputs.values())


class _Fused(torch.autograd.Function):
    """A compiled kernel: outputs and gradients are computed from the inputs alone."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, function: Callable[..., Any], kwargs: Any, *args: Any) -> Any:
        ctx.recorder, ctx.shapes = recorder, [a.shape if isinstance(a, Tensor) else () for a in args]
        ctx.dtypes = [a.dtype if isinstance(a, Tensor) else torch.float32 for a in args]
        ctx.save_for_backward(*_needed(recorder, function, args, kwargs))
        return _apart(recorder, function, args, kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients = [
            torch.empty(shape, dtype=dtype) if ctx.needs_input_grad[i + 3] else None
            for i, (shape, dtype) in enumerate(zip(ctx.shapes, ctx.dtypes, strict=True))
        ]
        tensors = [t for t in [*ctx.saved_tensors, *grads, *gradients] if t is not None]
        size = sum(t.numel() * t.element_size() for t in tensors)
        ctx.recorder.moved("fused", tensors[0].dtype, size)
        ctx.recorder.work[("operations",)] += 1
        return None, None, None, *gradients


def _lengths(options: Any) -> list[int]:
    """Lengths of the samples; with a window, lengths with the same number of attention scores."""
    lengths = [end - begin for begin, end in pairwise(options.segments.bounds)]
    window = options.window or math.inf
    return [n if n <= window else round(math.sqrt(window * (2 * n - window))) for n in lengths]


class _Attention(torch.autograd.Function):
    """Packed attention: tiles on the CPU, flash attention for samples of different lengths on CUDA."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Any, recorder: Recorder) -> Tensor:
        ctx.options, ctx.recorder = options, recorder
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        if recorder.cuda:
            ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=torch.float32))
        else:
            ctx.save_for_backward(q, k, v)
            for heads, _ in attention.head_shares(q, k):
                options.segments.plan(
                    heads.stop - heads.start, options.window
                )  # the biases of its tiles live as long as the batch

            def run() -> None:
                for heads, kv in attention.head_shares(q, k):
                    attention.forward_heads(q[:, heads], k[:, kv], v[:, kv], out.transpose(1, 2)[:, heads], options)

            recorder.fused(("attention", q.shape, k.shape, options.window, q.dtype, id(options.segments)), run)
        for length in _lengths(options):
            recorder.work[("attention", _name(q.dtype), length, q.shape[1], q.shape[3])] += 1
        recorder.work[("operations",)] += 1
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        recorder, options = ctx.recorder, ctx.options
        dq, dk, dv = (attention.room_like(x) for x in (q, k, v))
        if recorder.cuda:
            # mha_varlen_bwd of FlashAttention 2: dq in fp32, one number per row, and gradients of k and v per query head.
            tokens, heads, width = q.shape[0] * q.shape[2], q.shape[1], -(-q.shape[3] // 32) * 32
            samples = len(options.segments.bounds) - 1
            size = 4 * (tokens + 128 * samples) * heads * (width + 1)
            if heads != k.shape[1]:
                size += 2 * tokens * heads * (q.shape[3] + v.shape[3])
            recorder.look(size)
        else:
            grad = grad.transpose(1, 2)

            def run() -> None:
                for heads, kv in attention.head_shares(q, k):
                    parts = q[:, heads], k[:, kv], v[:, kv], grad[:, heads]
                    attention.backward_heads(*parts, dq[:, heads], dk[:, kv], dv[:, kv], options)

            recorder.fused(("backward", q.shape, k.shape, options.window, q.dtype, id(options.segments)), run)
        for length in _lengths(options):
            recorder.work[("attention backward", _name(q.dtype), length, q.shape[1], q.shape[3])] += 1
        recorder.work[("operations",)] += 1
        return dq, dk, dv, None, None


# -------------------------------------------------------------------------------------------------------------- fake models


def fake_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer of `model` (on `meta`) by a fake one on the CPU; shared ones stay shared."""
    fakes: dict[Tensor, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in fakes:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        fakes[tensor] = fake
                    tensors[name] = fakes[tensor]  # type: ignore[assignment]


@dataclass
class Trace:
    """The trace of a model with `layers` layers. moments: {(name, layer position): peak}; work: of one micro-batch."""

    layers: int
    moments: dict[tuple[str, str], Moment]
    work: Work


def watch_layers(layers: list[nn.Module], recorder: Recorder) -> list[Any]:
    """Register hooks that mark the start of each layer's forward pass (recomputation too) and backward pass."""
    handles: list[Any] = []

    def begin(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            recorder.at = ("forward" if recorder.phase == "activations" else "backward", number)
            recorder.look()

        return hook

    def end(number: int) -> Callable[..., None]:
        def gradient(grad: Tensor) -> None:
            recorder.at = ("backward", number)
            recorder.look()

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.requires_grad and recorder.phase == "activations":
                first.register_hook(gradient)
            if number == len(layers) - 1 and recorder.phase == "activations":
                recorder.at = ("loss", -1)

        return hook

    for number, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(begin(number)), layer.register_forward_hook(end(number))]
    return handles


def layer_position(at: tuple[str, int], layers: int) -> tuple[str, str]:
    """(name of the moment, position among the layers: first, last, between, or "")."""
    name, number = at
    if number < 0:
        return name, ""
    return name, "first" if number == 0 else "last" if number == layers - 1 else "between"


def extrapolate(small: Trace, large: Trace, layers: int) -> Trace:
    """The trace of a model with `layers` layers, linear in two traces of models that differ only in their number of layers."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * (layers - small.layers) / (large.layers - small.layers)

    moments = {}
    for key in small.moments.keys() & large.moments.keys():
        a, b = small.moments[key], large.moments[key]
        terms = {name: line(a.terms.get(name, 0), b.terms.get(name, 0)) for name in a.terms | b.terms}
        moments[key] = Moment(line(a.total, b.total), terms)
    work: Work = Counter()
    for key in small.work.keys() | large.work.keys():
        work[key] = line(small.work[key], large.work[key])  # type: ignore[assignment]
    return Trace(layers, moments, work)
