"""Causal attention of packed sequences: each sample attends to itself only, without a mask over the whole sequence.

    segments_of         the bounds of a batch's samples; computed once per batch, all layers share them and the tiles planned
    packed_attention    attention of q, k and v within these bounds
    register            the same as transformers' attention `NAME`; it uses the segments of the last `set_segments`

On CUDA this is torch's varlen flash attention. Everything else, the CPU above all, computes in tiles: some 100 queries against
their own sample's keys, softmax(Q·Kᵀ)·V as three steps on full rows of the tile. Short samples share a tile, long ones are
cut into several; nothing is computed for keys after a tile's last query or before its sample. The backward pass recomputes the
tile's probabilities from q and k, the only tensors saved besides v, and computes

    dP = dO·Vᵀ      dS = P ∘ (dP − rowsum(P ∘ dP))      dV = Pᵀ·dO      dK = dSᵀ·Q      dQ = dS·K

as FlashAttention does (arXiv 2205.14135, algorithm 4), but with the row sums taken of P and dP themselves instead of
dO ∘ O: a tile holds full rows, so dS sums to zero over the keys to fp32's last place, whatever was rounded in O.
Scores and dP are fp32 numbers, everything after them has the inputs' dtype. Measured in bf16 on SmolLM2's own q, k, v and
gradients (256 tokens, 30 layers, mean relative error against fp64, %; the products' own rounding is 0.2):

                                     out     dq     dk     dv
    torch's SDPA, its CPU kernels    0.18   0.45   0.49   0.47
    this                             0.21   0.26   0.26   0.27
    this with scores in bf16         0.43   0.49   0.53   0.43

It is plain torch, not compiled: the softmax and its gradient are torch's own vectorized kernels. Inductor's for the same
tiles took 20 % longer for short samples and 9 % less for a long one (EPYC 9005, one core), for a graph that must hold for all
shapes.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.train import trace_context
from finetune.train.fast.segments import ALIGN, Segments, Tile

NAME = "finetune_packed"

# Heads are computed together as long as q has no more elements than this: temporaries of the backward pass take some 45
# bytes for each. Eight heads at a time took a third longer with 32 heads on 8 kv heads: more calls for the same arithmetic.
MAX_ELEMENTS = 2 << 20


def segments_of(position_ids: Tensor | None, shape: tuple[int, int], device: torch.device | str) -> Segments:
    """The bounds of the samples in a batch of packed sequences.

    position_ids: (B, T), or (1, T) for all sequences; a sample begins with each sequence and wherever a position is not the last
    plus 1, which is transformers' rule too (masking_utils.find_packed_sequence_indices). None: each sequence is one sample.
    shape: (B, T).
    """
    batch, length = shape
    if not batch * length:
        raise ValueError(f"the sequences have no tokens: {tuple(shape)}")
    if (tracing := trace_context.current()) is not None:
        return tracing.segments((batch, length))
    device = torch.device(device)
    if position_ids is None:
        return Segments(tuple(range(0, batch * length + 1, length)), (batch, length), device)
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position ids must be {tuple(shape)}, not {tuple(position_ids.shape)}")
    begins = torch.ones(batch, length, dtype=torch.bool)
    begins[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cpu()
    return Segments((*begins.flatten().nonzero()[:, 0].tolist(), batch * length), (batch, length), device)


# ------------------------------------------------------------------------------------------------------------------- in tiles

_LOCK = threading.Lock()


@contextmanager
def _bf16_is_enough() -> Iterator[None]:
    """Let fp32 products on the CPU round their factors to bf16; process-wide, so only while one is computed.

    The factors are bf16 numbers already, so nothing is rounded. It selects oneDNN instead of MKL: matrix units where
    there are some, else its own fp32 kernels, 5 times as fast as MKL's on AMD (measured: 210 against
    38 GFLOP/s a core). torch has no product of bf16 factors with fp32 results on the CPU.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _LOCK:
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            yield
        finally:
            setting.fp32_precision = before


def _scores(a: Tensor, b: Tensor, scale: float, out: Tensor, low: torch.dtype) -> Tensor:
    """scale · a·b in fp32, into `out`; a (n, r, D) and b (n, D, c) are fp32 copies of numbers in `low`."""
    if low == torch.bfloat16 and out.device.type == "cpu":
        with _bf16_is_enough():
            return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _floats(x: Tensor) -> Tensor:
    """A contiguous fp32 copy, as oneDNN wants its right factors (transposed ones take up to twice as long)."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def _fold(x: Tensor, out: Tensor) -> Tensor:
    """x (B, J·G, T, D) → out (J, at least B·T·G, at least D): the rows of a kv head's G query heads side by side, then zeros."""
    batch, heads, length, width = x.shape
    groups, used = heads // out.shape[0], batch * length * (heads // out.shape[0])
    folded = out[:, :used].view(out.shape[0], batch, length, groups, out.shape[2])
    folded[..., :width].copy_(x.unflatten(1, (-1, groups)).permute(1, 0, 3, 2, 4))
    folded[..., width:].zero_()
    out[:, used:].zero_()
    return out


def _unfold(x: Tensor, shape: tuple[int, int], out: Tensor) -> None:
    """x (J, at least B·T·G, at least D) → out (B, J·G, T, D); the inverse of `_fold`."""
    groups, width = out.shape[1] // x.shape[0], out.shape[3]
    rows = x[:, : shape[0] * shape[1] * groups].view(x.shape[0], *shape, groups, x.shape[2])
    out.unflatten(1, (-1, groups)).copy_(rows[..., :width].permute(1, 0, 3, 2, 4))


def _probabilities(s: Tensor, tile: Tile, softcap: float | None) -> Tensor | None:
    """Turn scores s (J, r·G, c) into probabilities in place. With `softcap`, s comes divided by it, and tanh' is returned."""
    slope = None
    if softcap is not None:
        s.tanh_()
        slope = torch.square(s).neg_().add_(1)
        s.mul_(softcap)
    rows, _, columns = tile.bias.shape
    s.view(s.shape[0], rows, -1, s.shape[2])[..., s.shape[2] - columns :].add_(tile.bias)
    torch.softmax(s, -1, out=s)
    return slope


class Options(NamedTuple):
    segments: Segments
    scale: float
    window: int | None
    softcap: float | None


def forward_heads(q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: Options) -> None:
    """Some heads: q (B, J·G, T, D), k (B, J, T, D), v (B, J, T, Dv) → out (B, J·G, T, Dv)."""
    segments, scale, window, softcap = options
    heads, kv_heads = q.shape[1], k.shape[1]
    groups, tokens = heads // kv_heads, segments.bounds[-1] + ALIGN
    queries = _fold(q, q.new_empty(kv_heads, tokens * groups, q.shape[3], dtype=torch.float32))
    keys = _floats(_fold(k, k.new_empty(kv_heads, tokens, k.shape[3])).mT)
    values = _fold(v, v.new_empty(kv_heads, tokens, v.shape[3]))
    folded = v.new_empty(kv_heads, tokens * groups, v.shape[3])
    plan = segments.plan(heads, window)
    room = q.new_empty(max(_size(tile) for group in plan for tile in group.tiles) * heads, dtype=torch.float32)
    for group in plan:
        for tile in group.tiles:
            rows, columns = slice(tile.start * groups, tile.end * groups), slice(tile.begin, tile.end)
            s = room[: _size(tile) * heads].view(kv_heads, -1, tile.end - tile.begin)
            _scores(queries[:, rows], keys[..., columns], scale if softcap is None else scale / softcap, s, v.dtype)
            _probabilities(s, tile, softcap)
            torch.bmm(s.to(v.dtype), values[:, columns], out=folded[:, rows])
    _unfold(folded, segments.shape, out)


def backward_heads(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, options: Options) -> None:
    """The gradients for some heads into dq, dk and dv, which are as q, k and v; grad: (B, J·G, T, Dv)."""
    segments, scale, window, softcap = options
    heads, kv_heads, low = q.shape[1], k.shape[1], q.dtype
    groups, tokens, width = heads // kv_heads, segments.bounds[-1] + ALIGN, max(q.shape[3], v.shape[3])
    # [Q; dO]·[K; V]ᵀ are [S; dP], and [P; dS]ᵀ·[dO; Q] are [dV; dK]: two products for four.
    left = q.new_empty(2, kv_heads, tokens * groups, width, dtype=torch.float32)
    down, right = q.new_empty(left.shape), q.new_empty(2, kv_heads, tokens, width)
    for part, x in ((down[0], grad), (down[1], q), (right[0], k), (right[1], v)):
        _fold(x, part)
    left[0].copy_(down[1])
    left[1].copy_(down[0])
    keys = right[0, ..., : k.shape[3]]
    left, down, right = left.flatten(0, 1), down.flatten(0, 1), _floats(right.flatten(0, 1).mT)
    folded_q = q.new_empty(kv_heads, tokens * groups, q.shape[3])
    folded_vk = q.new_empty(2, kv_heads, tokens, width)
    both = folded_vk.flatten(0, 1)
    plan = segments.plan(heads, window)
    size = max(_size(tile) for group in plan for tile in group.tiles) * 2 * heads
    room = q.new_empty(size, dtype=torch.float32)
    low_room = q.new_empty(0 if low == torch.float32 else size)
    for group in plan:
        several = len(group.tiles) > 1
        total = q.new_zeros(2 * kv_heads, group.tiles[-1].end - group.begin, width, dtype=torch.float32) if several else None
        for tile in group.tiles:
            rows, columns = slice(tile.start * groups, tile.end * groups), slice(tile.begin, tile.end)
            size = _size(tile) * 2 * heads
            s_dp = room[:size].view(2 * kv_heads, -1, tile.end - tile.begin)
            _scores(left[:, rows], right[..., columns], scale if softcap is None else scale / softcap, s_dp, low)
            p, ds = s_dp[:kv_heads], s_dp[kv_heads:]
            slope = _probabilities(p, tile, softcap)
            torch._softmax_backward_data(ds, p, -1, torch.float32, grad_input=ds)
            if slope is not None and softcap is not None:
                ds.mul_(slope).mul_(softcap)
            p_ds = s_dp if low == torch.float32 else low_room[:size].view(s_dp.shape).copy_(s_dp)
            if tile.real < tile.end - tile.start:
                p_ds[:, tile.real * groups :].zero_()  # queries of the next sample contribute nothing to these keys
            torch.bmm(p_ds[kv_heads:], keys[:, columns], out=folded_q[:, rows])
            if total is None:
                torch.bmm(p_ds.mT, down[:, rows], out=both[:, columns])
            else:
                total[:, tile.begin - group.begin : tile.end - group.begin].add_(torch.bmm(p_ds.mT, down[:, rows]))
        if total is not None:
            both[:, group.begin : group.end].copy_(total[:, : group.end - group.begin])
    for x, target in ((folded_q, dq), (folded_vk[0], dv), (folded_vk[1], dk)):
        _unfold(x, segments.shape, target)


def _size(tile: Tile) -> int:
    """Number of scores of one head."""
    return (tile.end - tile.start) * (tile.end - tile.begin)


def head_shares(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (query heads, kv heads) that are computed together."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    most = max(1, kv_heads * MAX_ELEMENTS // q.numel())
    step = math.ceil(kv_heads / math.ceil(kv_heads / most))
    for start in range(0, kv_heads, step):
        stop = min(start + step, kv_heads)
        yield slice(start * groups, stop * groups), slice(start, stop)


def room_like(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) with the memory layout (B, T, H, D), as linear layers use."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


class PackedAttention(torch.autograd.Function):
    """q (B, H, T, D), k (B, J, T, D), v (B, J, T, Dv) of one dtype → (B, H, T, Dv) with the layout (B, T, H, Dv)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        with torch.autocast(q.device.type, enabled=False):
            for heads, kv_heads in head_shares(q, k):
                forward_heads(q[:, heads], k[:, kv_heads], v[:, kv_heads], out[:, heads], options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = room_like(q), room_like(k), room_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for heads, kv_heads in head_shares(q, k):
                parts = q[:, heads], k[:, kv_heads], v[:, kv_heads], grad[:, heads]
                backward_heads(*parts, dq[:, heads], dk[:, kv_heads], dv[:, kv_heads], ctx.options)
        return dq, dk, dv, None


# -------------------------------------------------------------------------------------------------------------------- on CUDA


def _varlen(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor | None:
    """torch's flash attention for samples of different lengths, (B, T, H, D); None if unsupported, then tiles are used.

    Its signature varies: torch 2.11 has `is_causal` or `window_size`, later ones the latter, and `scale` and `enable_gqa`.
    """
    segments, scale, window, softcap = options
    width = q.shape[3]
    if softcap is not None or q.dtype not in (torch.bfloat16, torch.float16) or v.shape[3] != width or width > 256 or width % 8:
        return None
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    known = inspect.signature(attend).parameters
    extra: dict[str, Any] = {}
    if "window_size" in known:  # (keys before its own that a query sees, keys after it)
        extra["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        extra["is_causal"] = True
    else:
        return None
    if "scale" in known:
        extra["scale"] = scale
    elif not math.isclose(scale, width**-0.5):
        return None
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            extra["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    offsets, longest = segments.offsets, segments.longest
    out: Tensor = attend(*flat, offsets, offsets, longest, longest, **extra)
    return out.unflatten(0, segments.shape)


# ----------------------------------------------------------------------------------------------------------------- interfaces


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention softmax(scale · q·kᵀ)·v within each sample: (B, T, H, Dv), contiguous.

    q: (B, H, T, D), k: (B, Hkv, T, D), v: (B, Hkv, T, Dv); H a multiple of Hkv, query head h has kv head h // (H / Hkv).
    window: how many keys a query sees at most, its own included (as transformers' sliding_window). softcap: scores become
    softcap · tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2). Under autocast it computes in that dtype.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            "q must be (B, H, T, D), k (B, Hkv, T, D) and v (B, Hkv, T, Dv), "
            f"not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if segments.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"the segments are of sequences {segments.shape}, q is of ({q.shape[0]}, {q.shape[2]})")
    if window is not None and window < 1:
        raise ValueError(f"the attention window must be at least 1, not {window}")
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if window is not None and window >= segments.longest:
        window = None
    options = Options(segments, scale, window, softcap)
    if (tracing := trace_context.current()) is not None:
        return tracing.attention(q, k, v, options)
    out = _varlen(q, k, v, options) if device_type == "cuda" else None
    return PackedAttention.apply(q, k, v, options).transpose(1, 2) if out is None else out


_segments: Segments | None = None


def set_segments(segments: Segments | None) -> None:
    """Set the segments of attention `NAME`: call it before each forward pass; they must stay until the backward pass is done.

    One per process, not per thread: on CUDA, autograd recomputes checkpointed layers in its own threads.
    """
    global _segments
    _segments = segments


# Arguments that models pass to their attention and that change nothing here.
HARMLESS = {
    "position_ids", "cache_position", "use_cache", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "return_dict", "output_hidden_states",
}  # fmt: skip


def packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (B, H, T, D), k and v (B, Hkv, T, D) → ((B, T, H, D), no weights).

    Raises:
        ValueError: something unsupported: dropout, masks, a cache, attention that is not causal, returned weights.
    """
    name = type(module).__name__
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} is not causal")
    if dropout:
        raise ValueError(f"{name} uses dropout on attention weights ({dropout}), which packed attention does not support")
    if attention_mask is not None:
        raise ValueError(f"{name} passes an attention mask, which packed attention does not support")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{name} has {query.shape[2]} queries, {key.shape[2]} keys: packed attention does not support a cache")
    unknown = [key for key, value in kwargs.items() if key not in HARMLESS and value is not None and value is not False]
    if unknown:
        raise ValueError(f"{name} passes arguments that packed attention does not support: {', '.join(unknown)}")
    if _segments is None:
        raise ValueError("call set_segments before the model")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, _segments, scale=scale, window=sliding_window, softcap=softcap), None


def register() -> None:
    """Register `NAME` as an attention implementation of transformers, without masks: no mask function has its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed)


def unregister(name: str = NAME) -> None:
    """Remove an implementation from transformers' registers of attention and masks, which have no public way to do it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
