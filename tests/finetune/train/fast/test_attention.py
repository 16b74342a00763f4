"""Attention of packed rows is that of each sample alone: against a whole fp64 mask, torch's SDPA, and in real architectures."""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import find_packed_sequence_indices

from finetune.train.fast import attention
from finetune.train.fast import segments as segments_module
from finetune.train.fast.attention import packed_attention, segments_of
from finetune.train.fast.segments import ALIGN, Segments


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def laid(lengths: list[int], batch: int = 1) -> Segments:
    return segments_of(positions(lengths), (batch, sum(lengths)), "cpu")


def visible(segments: Segments, window: int | None) -> Tensor:
    """(B, 1, T, T): which keys each query sees, written down as it is defined."""
    rows, length = segments.shape
    sample = torch.repeat_interleave(torch.arange(len(segments.bounds) - 1), torch.tensor(segments.bounds).diff())
    sample, at = sample.view(rows, length), torch.arange(length)
    seen = (sample[:, :, None] == sample[:, None]) & (at <= at[:, None])
    if window is not None:
        seen &= at > at[:, None] - window
    return seen[:, None]


def exact(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """The whole matrix, in fp64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible(segments, window), -math.inf).softmax(-1) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None = None) -> Tensor:
    mask = visible(segments, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def problem(
    segments: Segments, heads: int, kv_heads: int, width: int, dtype: torch.dtype, value_width: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that lie as a linear layer makes them, and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)

    def random_numbers(heads: int, width: int) -> Tensor:
        return torch.randn(segments.shape[0], segments.shape[1], heads, width, generator=generator).to(dtype)

    wide = value_width or width
    q, k, v = random_numbers(heads, width), random_numbers(kv_heads, width), random_numbers(kv_heads, wide)
    # Keys of real models have a large part in common, which cancels in the softmax and must cancel in the gradients.
    k += (3 * torch.randn(kv_heads, width, generator=generator)).to(dtype)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
    return q, k, v, random_numbers(heads, wide)


def results(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """[output, dq, dk, dv]"""
    out = function(q, k, v, *args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def off(found: Tensor, expected: Tensor) -> float:
    """Relative difference, of the norms."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize(
    ("ids", "shape", "bounds"),
    [
        (None, (2, 4), (0, 4, 8)),
        ([[0, 1, 2, 0, 1]], (1, 5), (0, 3, 5)),
        ([[0, 0, 0]], (1, 3), (0, 1, 2, 3)),
        ([[5, 6, 7, 3, 4]], (1, 5), (0, 3, 5)),  # not from 0: begun elsewhere
        ([[0, 1, 3, 4]], (1, 4), (0, 2, 4)),  # does not go on
        ([[0, 1, 2], [3, 4, 5]], (2, 3), (0, 3, 6)),  # goes on, but in another row
        ([[0, 1, 0]], (2, 3), (0, 2, 3, 5, 6)),  # the same for all rows
        ([[0]], (1, 1), (0, 1)),
    ],
)
def test_samples_begin_where_positions_do_not_go_on(ids: Any, shape: tuple[int, int], bounds: tuple[int, ...]) -> None:
    segments = segments_of(None if ids is None else torch.tensor(ids), shape, "cpu")
    assert segments.bounds == bounds
    assert segments.shape == shape
    assert segments.longest == max(b - a for a, b in itertools.pairwise(bounds))
    assert segments.offsets.tolist() == list(bounds)
    assert segments.offsets.dtype == torch.int32


def test_samples_are_those_that_transformers_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(0, 3, (3, 24), generator=generator)
        theirs = find_packed_sequence_indices(ids)
        assert theirs is not None
        begins = [0] + [i for i in range(1, ids.numel()) if i % 24 == 0 or theirs.flatten()[i] != theirs.flatten()[i - 1]]
        assert segments_of(ids, (3, 24), "cpu").bounds == (*begins, ids.numel())


@pytest.mark.parametrize(("ids", "shape"), [([[0, 1]], (1, 3)), ([[0, 1], [0, 1]], (3, 2)), ([0, 1], (1, 2)), (None, (2, 0))])
def test_positions_of_other_rows_are_refused(ids: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"position ids|no tokens"):
        segments_of(None if ids is None else torch.tensor(ids), shape, "cpu")


def layouts(count: int) -> list[list[int]]:
    choose = random.Random(0)
    return [[choose.choice((1, 2, 7, 31, 32, 33, 90, 128, 200, 513)) for _ in range(choose.randint(1, 12))] for _ in range(count)]


@pytest.mark.parametrize("window", [None, 1, 5, 64, 200])
@pytest.mark.parametrize("heads", [1, 9, 12, 32])
def test_tiles_hold_every_query_once_with_all_that_it_sees(heads: int, window: int | None) -> None:
    for lengths in layouts(6):
        segments = laid(lengths)
        seen = visible(segments, window)[0, 0]
        queries: list[int] = []
        for group in segments.plan(heads, window):
            assert {group.begin, group.end} <= set(segments.bounds)
            for tile in group.tiles:
                assert (tile.end - tile.start) % ALIGN == 0 == (tile.end - tile.begin) % ALIGN
                assert group.begin <= tile.begin <= tile.start < tile.start + tile.real <= group.end
                real = range(tile.start, tile.start + tile.real)
                queries += real
                shown = torch.zeros(tile.end - tile.start, tile.end - tile.begin)
                shown[:, shown.shape[1] - tile.bias.shape[2] :] = tile.bias[:, 0]
                inside = min(tile.end, segments.bounds[-1])
                torch.testing.assert_close(
                    shown[: tile.real, : inside - tile.begin] == 0, seen[real.start : real.stop, tile.begin : inside]
                )
                assert not seen[real.start : real.stop, : tile.begin].any()
                assert (shown == 0).any(1).all()  # a row that sees nothing would be 0/0
        assert queries == list(range(segments.bounds[-1]))


def test_little_is_computed_that_is_not_wanted() -> None:
    def computed(lengths: list[int], window: int | None = None) -> float:
        return sum(
            (tile.end - tile.start) * (tile.end - tile.begin) for group in laid(lengths).plan(9, window) for tile in group.tiles
        )

    assert computed([1024]) < 0.6 * 1024**2  # half of it is wanted
    assert computed([100] * 10) < 1.3 * 10 * 100**2
    assert computed([1] * 500) < 500 * 160
    assert computed([4096], window=128) < 4096 * 128 * 2.2
    shapes = {
        (tile.end - tile.start, tile.end - tile.begin)
        for lengths in layouts(50)
        for group in laid(lengths).plan(9, None)
        for tile in group.tiles
    }
    assert len(shapes) < 60  # each costs the making of five kernels, once


def test_biases_are_shared() -> None:
    """A long sample has one for all its tiles, and one for the last of them; none is as wide as the sample."""
    (group,) = laid([2048]).plan(9, None)
    assert len({tile.bias.data_ptr() for tile in group.tiles}) <= 2
    assert max(tile.bias.shape[2] for tile in group.tiles) <= 160
    (group,) = laid([2048]).plan(9, 256)
    assert len({tile.bias.data_ptr() for tile in group.tiles}) <= 5


# ------------------------------------------------------------------------------------------------------------------- the numbers

MIXED = [100, 20, 256, 1, 37, 1, 1, 180, 33]
CASES: dict[str, dict[str, Any]] = {
    "short samples, GQA 3": {"lengths": MIXED, "shape": (9, 3, 64)},
    "one long sample": {"lengths": [700], "shape": (9, 3, 64)},
    "one token": {"lengths": [1], "shape": (4, 2, 32)},
    "single tokens": {"lengths": [1] * 70, "shape": (4, 4, 32)},
    "whole tiles, no padding": {"lengths": [64, 32, 96, 128], "shape": (4, 4, 80)},
    "rows without positions": {"lengths": [150], "batch": 3, "shape": (8, 8, 32)},
    "rows with positions": {"lengths": [40, 90], "batch": 2, "shape": (6, 2, 64)},
    "GQA 8, one kv head, wide": {"lengths": [90, 1, 150], "shape": (8, 1, 256)},
    "many heads, on few": {"lengths": [90, 45], "shape": (40, 8, 32)},
    "values wider than keys": {"lengths": [90, 45], "shape": (4, 2, 32), "value_width": 80},
    "values narrower than keys": {"lengths": [90, 45], "shape": (4, 2, 96), "value_width": 64},
    "window": {"lengths": MIXED, "shape": (9, 3, 64), "window": 50},
    "window, long": {"lengths": [600, 90], "shape": (4, 2, 64), "window": 100},
    "window of one": {"lengths": [70, 30], "shape": (4, 2, 32), "window": 1},
    "window wider than samples": {"lengths": [70, 30], "shape": (4, 2, 32), "window": 70},
    "softcap": {"lengths": MIXED, "shape": (4, 2, 64), "softcap": 5.0},
    "softcap and window": {"lengths": [300, 20], "shape": (4, 2, 64), "softcap": 20.0, "window": 33},
}


def case_of(name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Segments, dict[str, Any]]:
    case = CASES[name]
    segments = laid(case["lengths"], case.get("batch", 1))
    options = {key: case[key] for key in ("window", "softcap") if key in case}
    return problem(segments, *case["shape"], dtype, case.get("value_width")), segments, {"scale": 0.11, **options}


@pytest.mark.parametrize("name", CASES)
def test_in_fp32_it_is_the_attention_of_a_whole_mask(name: str) -> None:
    tensors, segments, options = case_of(name, torch.float32)
    expected = results(exact, *tensors, segments, **options)
    found = results(packed_attention, *tensors, segments, **options)
    q, _, v, _ = tensors
    assert found[0].shape == (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    assert found[0].is_contiguous()
    for mine, other, like in zip(found, expected, (found[0], *tensors[:3]), strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == like.shape
        assert off(mine, other) < 3e-6
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_in_bf16_it_is_as_exact_as_sdpa(name: str) -> None:
    """Against fp64 of the same bf16 numbers: within 0.65 %; 1.25 times SDPA's error in the output, 0.9 times in the gradients."""
    tensors, segments, options = case_of(name, torch.bfloat16)
    expected = results(exact, *tensors, segments, **options)
    found = results(packed_attention, *tensors, segments, **options)
    assert all(x.dtype == torch.bfloat16 for x in found)
    errors = [off(mine, other) for mine, other in zip(found, expected, strict=True)]
    assert max(errors) < 0.0065
    if "softcap" in options or tensors[0].shape[3] != tensors[2].shape[3]:
        return  # SDPA has none on the CPU
    theirs = [off(x, other) for x, other in zip(results(sdpa, *tensors, segments, **options), expected, strict=True)]
    assert errors[0] <= 1.25 * theirs[0]
    assert all(mine <= 0.9 * other for mine, other in zip(errors[1:], theirs[1:], strict=True)), (errors, theirs)


def test_gradients_of_keys_and_values_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tiles of a long sample: many of them make no difference. (Summed in bf16, errors of 0.25 % became 0.6 %.)"""
    segments = laid([1024])
    q, k, v, grad = problem(segments, 4, 1, 32, torch.bfloat16)
    expected = results(exact, q, k, v, grad.abs(), segments, scale=0.02)
    monkeypatch.setattr(segments_module, "TILE", 2000)
    segments = laid([1024])
    assert len(segments.plan(4, None)[0].tiles) == 32
    found = results(packed_attention, q, k, v, grad.abs(), segments, scale=0.02)
    assert max(off(mine, other) for mine, other in zip(found[2:], expected[2:], strict=True)) < 0.0035


@pytest.mark.parametrize(
    ("most", "shares"), [(10**9, [10]), (4000 * 7, [5, 5]), (4000 * 6, [5, 5]), (4000 * 4, [4, 4, 2]), (1, [1] * 10)]
)
def test_heads_in_shares(most: int, shares: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit for what is needed at a time, all heads are there, each with its own keys."""
    segments = laid([100, 25])
    tensors = problem(segments, 20, 10, 16, torch.float32)
    expected = results(exact, *tensors, segments, scale=0.2)
    monkeypatch.setattr(attention, "MAX_ELEMENTS", most)
    found_shares = list(attention.head_shares(*tensors[:2]))
    assert [kv.stop - kv.start for _, kv in found_shares] == shares
    assert all((q.start, q.stop) == (2 * kv.start, 2 * kv.stop) for q, kv in found_shares)
    for mine, other in zip(results(packed_attention, *tensors, segments, scale=0.2), expected, strict=True):
        assert off(mine, other) < 3e-6


def test_in_fp16() -> None:
    segments = laid([50, 20])
    tensors = problem(segments, 4, 2, 32, torch.float16)
    expected = results(exact, *tensors, segments, scale=0.11)
    for mine, other in zip(results(packed_attention, *tensors, segments, scale=0.11), expected, strict=True):
        assert mine.dtype == torch.float16
        assert off(mine, other) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[20, 7, 40, 3], [200, 150, 90], [33, 300]])
def test_no_sample_sees_another(lengths: list[int], dtype: torch.dtype) -> None:
    """Another sample in its place, very large or not a number at all: the others' outputs and gradients are the same bits."""
    segments = laid(lengths)
    before = problem(segments, 6, 2, 32, dtype)
    clean = results(packed_attention, *before, segments, scale=0.2)
    for changed in range(len(lengths)):
        here = slice(segments.bounds[changed], segments.bounds[changed + 1])
        other = problem(segments, 6, 2, 32, dtype, seed=1)
        for factor in (1.0, 1e4):
            after = [x.detach().clone() for x in before]
            for x, y in zip(after[:3], other[:3], strict=True):
                x[:, :, here] = factor * y[:, :, here]
            after[3][:, here] = factor * other[3][:, here]
            leaves = [x.requires_grad_() for x in after[:3]]
            found = results(packed_attention, *leaves, after[3], segments, scale=0.2)
            rest = torch.ones(segments.bounds[-1], dtype=torch.bool)
            rest[here] = False
            assert torch.equal(found[0][:, rest], clean[0][:, rest])
            assert not torch.equal(found[0][:, here], clean[0][:, here])
            for mine, same in zip(found[1:], clean[1:], strict=True):
                assert torch.equal(mine[:, :, rest], same[:, :, rest])
                assert not torch.equal(mine[:, :, here], same[:, :, here])


def test_how_the_inputs_lie_makes_no_difference() -> None:
    segments = laid([50, 200], batch=2)
    q, k, v, grad = problem(segments, 6, 2, 64, torch.bfloat16)
    before = [x.detach().clone() for x in (q, k, v, grad)]
    expected = results(packed_attention, q, k, v, grad, segments, scale=0.1)
    contiguous = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    joined = torch.cat([q.detach(), k.detach(), v.detach()], 1).transpose(1, 2).contiguous().transpose(1, 2)
    split = [x.requires_grad_() for x in joined.split([6, 2, 2], 1)]
    strange = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for leaves in (contiguous, split):
        for mine, other in zip(results(packed_attention, *leaves, strange, segments, scale=0.1), expected, strict=True):
            assert torch.equal(mine, other)
    for x, was in zip((q, k, v, grad), before, strict=True):
        assert torch.equal(x, was)
    # A gradient that is one number for all, as sum() gives: no strides at all.
    sums = results(packed_attention, q, k, v, torch.ones(()).expand_as(grad), segments, scale=0.1)
    for mine, other in zip(sums, results(packed_attention, q, k, v, torch.ones_like(grad), segments, scale=0.1), strict=True):
        assert torch.equal(mine, other)


def test_gradients_of_some_inputs() -> None:
    segments = laid([50, 40])
    q, k, v, grad = problem(segments, 4, 2, 32, torch.float32)
    _, _, dk, _ = results(packed_attention, q, k, v, grad, segments, scale=0.1)
    out = packed_attention(q.detach(), k, v.detach(), segments, scale=0.1)
    assert torch.equal(torch.autograd.grad(out, k, grad)[0], dk)
    with torch.no_grad():
        assert torch.equal(packed_attention(q, k, v, segments, scale=0.1), out)


def test_under_autocast_it_computes_in_its_dtype() -> None:
    segments = laid([50, 40])
    q, k, v, grad = problem(segments, 4, 2, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(packed_attention, q, k, v.bfloat16(), grad, segments, scale=0.1)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = results(packed_attention, *low, grad, segments, scale=0.1)
    assert found[0].dtype == torch.bfloat16
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.float(), other.float())
    with pytest.raises(ValueError, match="one dtype"):
        packed_attention(q, k, v.bfloat16(), segments, scale=0.1)
    # What began without it ends without it.
    long = laid([300])
    tensors = problem(long, 4, 2, 32, torch.float32)
    expected = results(packed_attention, *tensors, long, scale=0.1)
    out = packed_attention(*tensors[:3], long, scale=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(out, tensors[:3], tensors[3])
    for mine, other in zip(gradients, expected[1:], strict=True):
        assert torch.equal(mine, other)


@pytest.fixture
def setting() -> Any:
    """torch's precision of fp32 products on the CPU, set to what it is not by itself."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield setting
    setting.fp32_precision = before


def test_fp32_products_elsewhere_stay_what_they_are(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = laid([50, 40])
    inside: list[str] = []
    product = torch.baddbmm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        inside.append(setting.fp32_precision)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", watched)
    for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float32, "ieee"), (torch.float16, "ieee")):
        inside.clear()
        results(packed_attention, *problem(segments, 4, 2, 32, dtype), segments, scale=0.1)
        assert set(inside) == {expected}
        assert setting.fp32_precision == "ieee"

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "baddbmm", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        packed_attention(*problem(segments, 4, 2, 32, torch.bfloat16)[:3], segments, scale=0.1)
    assert setting.fp32_precision == "ieee"


class Peak(TorchDispatchMode):
    """The most bytes that live at once in storages which operations inside have made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage in self.known or storage.data_ptr() in mine:
                continue
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(("lengths", "limit"), [([128] * 32, None), ([4096], None), ([128] * 32, 2**16), ([4096], 2**16)])
def test_little_is_needed_and_less_is_kept(lengths: list[int], limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of (T, T) exists; what is needed follows the rows, or the limit; q, k and v are all that is kept."""
    if limit is not None:
        monkeypatch.setattr(attention, "MAX_ELEMENTS", limit)
    segments = laid(lengths)
    q, k, v, grad = problem(segments, 8, 8, 16, torch.bfloat16)
    with Peak() as peak:
        out = packed_attention(q, k, v, segments, scale=0.1)
        assert peak.now < 1.01 * 2 * q.numel() + 2**21  # the output, and the plan
        kept = {x.untyped_storage().data_ptr() for x in out.grad_fn.next_functions[0][0].saved_tensors}  # type: ignore[union-attr,attr-defined]
        assert kept == {x.untyped_storage().data_ptr() for x in (q, k, v)}
        out.backward(grad)
    inputs = 2 * q.numel() * 4  # output and gradients
    together = min(q.numel(), limit or q.numel())
    heads = 8 * together // q.numel()
    tile = math.sqrt(2 * segments_module.TILE / heads) * 1.2 * max(lengths) * heads
    assert peak.most < inputs + 45 * together + 12 * tile + 2**21
    assert peak.most < 4096**2 * 8  # one byte a score of whole rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": lambda k: k[:, :, 1:]}, "must be"),
        ({"v": lambda v: v[:, :1]}, "must be"),
        ({"k": lambda k: k[..., 1:]}, "must be"),
        ({"k": lambda k: k.repeat(1, 3, 1, 1), "v": lambda v: v.repeat(1, 3, 1, 1)}, "multiple"),
        ({"q": lambda q: q[0]}, "must be"),
        ({"segments": lambda _: laid([10, 5])}, r"segments are of sequences \(1, 15\)"),
        ({"window": lambda _: 0}, "window"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Callable[[Any], Any]], message: str) -> None:
    segments = laid([10, 6])
    q, k, v, _ = problem(segments, 4, 2, 32, torch.float32)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "segments": segments, "scale": 0.1, "window": None}
    arguments |= {name: function(arguments[name]) for name, function in change.items()}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


# ----------------------------------------------------------------------------------------------------------------------- on CUDA


def _attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: tuple[int, int], scale: float | None) -> Tensor:
    """What torch says that varlen_attn does, (N, H, D)."""
    bounds = tuple(offsets.tolist())
    segments = Segments(bounds, (1, bounds[-1]), q.device)
    assert window[1] == 0
    options = {"scale": q.shape[2] ** -0.5 if scale is None else scale, "window": None if window[0] < 0 else window[0] + 1}
    return exact(*(x.transpose(0, 1)[None] for x in (q, k, v)), segments, **options)[0].to(q.dtype)  # type: ignore[arg-type]


def varlen_2_13(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale: float | None = None,
                window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:  # fmt: skip
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return _attend(q, k, v, cu_seq_q, window_size, scale)


def varlen_2_10(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False) -> Tensor:
    assert is_causal
    assert q.shape[1] == k.shape[1]
    return _attend(q, k, v, cu_seq_q, (-1, 0), None)


@pytest.mark.parametrize(
    ("function", "options", "used"),
    [
        (varlen_2_13, {}, True),
        (varlen_2_13, {"window": 9}, True),
        (varlen_2_13, {"softcap": 30.0}, False),
        (varlen_2_10, {"scale": 32**-0.5}, True),
        (varlen_2_10, {"scale": 0.3}, False),
        (varlen_2_10, {"scale": 32**-0.5, "window": 9}, False),
    ],
)
def test_varlen_flash_attention_is_asked_for_the_same(
    function: Any, options: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    segments = laid([30, 21], batch=2)
    q, k, v, _ = problem(segments, 6, 2, 32, torch.bfloat16)
    options = {"scale": 0.2, "window": None, "softcap": None} | options
    out = attention._varlen(q, k, v, attention.Options(segments, **options))
    assert (out is not None) == used
    if out is not None:
        assert off(out.detach(), exact(q, k, v, segments, **options).detach()) < 0.003
    assert attention._varlen(q.float(), k.float(), v.float(), attention.Options(segments, **options)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention._varlen(q, k, v, attention.Options(segments, **options)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 20.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_gpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    segments = segments_of(positions(MIXED), (1, sum(MIXED)), "cuda")
    tensors = [x.detach().cuda() for x in problem(segments, 9, 3, 64, dtype)]
    leaves = [x.requires_grad_() for x in tensors[:3]]
    found = results(packed_attention, *leaves, tensors[3], segments, scale=0.11, **options)
    expected = results(exact, *problem(segments, 9, 3, 64, dtype), segments, scale=0.11, **options)
    for mine, other in zip(found, expected, strict=True):
        assert off(mine.cpu(), other) < (0.01 if dtype == torch.bfloat16 else 1e-5)


# ---------------------------------------------------------------------------------------------------------------- in transformers

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": 9}),
    "Qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "SmolLM3": ("SmolLM3", {}),
    "Gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "Gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 7}),
    "Gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi": ("Phi", {}),
    "Phi3": ("Phi3", {"sliding_window": 9}),
}
LENGTHS = [20, 1, 33, 7, 40]


def model_of(name: str, implementation: str) -> Any:
    kind, changes = MODELS[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config_class(**(SMALL | changes), attn_implementation=implementation))
    for parameter in model.parameters():  # a fresh model's scores are so small that a soft cap or a scale is not felt
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model.train()


@pytest.fixture
def interface() -> Any:
    attention.register()
    yield
    attention.set_segments(None)
    attention.unregister()


@pytest.mark.parametrize(("name", "theirs"), [*((name, "eager") for name in MODELS), ("Llama", "sdpa"), ("Mistral", "sdpa")])
def test_models_with_it_are_the_same_models(name: str, theirs: str, interface: None) -> None:
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    attention.set_segments(laid(LENGTHS))
    weights = torch.randn(1, sum(LENGTHS), 97, generator=torch.Generator().manual_seed(2))
    found = []
    for implementation in (theirs, attention.NAME):
        model = model_of(name, implementation)
        logits = model(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits
        (logits * weights).sum().backward()
        found.append((logits.detach(), {path: parameter.grad for path, parameter in model.named_parameters()}))
    (expected, expected_gradients), (logits, gradients) = found
    assert off(logits, expected) < 1e-5
    for path, gradient in gradients.items():
        assert off(gradient, expected_gradients[path]) < 2e-5, path


def test_a_model_that_sees_more_than_its_samples_would_be_noticed(interface: None) -> None:
    """The test above can fail: the same ids as one sample give other logits, and so does a window that is one too wide."""
    ids = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(1))
    model = model_of("Mistral", attention.NAME)
    logits = []
    for lengths, window in (([20, 40], 9), ([60], 9), ([20, 40], 10)):
        attention.set_segments(laid(lengths))
        model.config.sliding_window = window
        logits.append(model(input_ids=ids, position_ids=positions([20, 40]), use_cache=False).logits.detach())
    assert off(logits[1], logits[0]) > 1e-3
    assert off(logits[2], logits[0]) > 1e-3


def test_checkpointed_layers_find_their_samples_again(interface: None) -> None:
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointed in (False, True):
        model = model_of("Llama", attention.NAME)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attention.set_segments(laid(LENGTHS))
        model(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)
    segments = laid([30, 20])
    q, k, v, grad = problem(segments, 4, 2, 32, torch.float32)
    expected = results(packed_attention, q, k, v, grad, segments, scale=0.1)
    again = results(lambda *x: checkpoint(packed_attention, *x, segments, scale=0.1, use_reentrant=False), q, k, v, grad)
    for mine, other in zip(again, expected, strict=True):
        assert torch.equal(mine, other)


class Causal(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "uses dropout"),
        ({"attention_mask": torch.zeros(1, 1, 16, 16)}, "mask"),
        ({"key": torch.zeros(1, 2, 20, 32), "value": torch.zeros(1, 2, 20, 32)}, "does not support a cache"),
        ({"is_causal": False}, "not causal"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"output_attentions": True}, "output_attentions"),
        ({"query": torch.zeros(1, 4, 15, 32), "key": torch.zeros(1, 2, 15, 32), "value": torch.zeros(1, 2, 15, 32)}, "segments"),
    ],
)
def test_the_interface_refuses_what_it_does_not_compute(options: dict[str, Any], message: str, interface: None) -> None:
    attention.set_segments(laid([10, 6]))
    q, k, v, _ = problem(laid([10, 6]), 4, 2, 32, torch.float32)
    arguments: dict[str, Any] = {"query": q, "key": k, "value": v, "attention_mask": None}
    out, weights = attention.packed(Causal(), **arguments, position_ids=positions([10, 6]), use_cache=False)
    assert torch.equal(out, packed_attention(q, k, v, laid([10, 6]), scale=32**-0.5))
    assert weights is None
    with pytest.raises(ValueError, match=message):
        attention.packed(Causal(), **(arguments | options))
    attention.set_segments(None)
    with pytest.raises(ValueError, match="set_segments"):
        attention.packed(Causal(), **arguments)
