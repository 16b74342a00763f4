"""The packed linear: equal to a float linear of its dequantized weight, and unmoved by casts, modes and copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant.ops as ops
from quant import NF4Linear, backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "bitsandbytes"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    with backends.use(request.param):
        yield request.param


def _pair(
    in_features: int = 96, out_features: int = 40, *, bias: bool = True, double: bool = True
) -> tuple[nn.Linear, NF4Linear]:
    """A float linear that holds the dequantized weight, and the packed one."""
    torch.manual_seed(0)
    packed = NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), double=double)
    return packed.to_linear(), packed


def _run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [(96, 40), (64, 64), (33, 7), (576, 192)], ids=str)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,), (2, 0, 3)], ids=str)
def test_equals_float_linear(
    lead: tuple[int, ...], features: tuple[int, int], bias: bool, double: bool, dtype: torch.dtype
) -> None:
    floats, packed = _pair(*features, bias=bias, double=double)
    floats = floats.to(dtype)
    assert torch.equal(packed.dequantize(dtype), floats.weight)
    x, grad = torch.randn(*lead, features[0]).to(dtype), torch.randn(*lead, features[1]).to(dtype)
    for ours, theirs in zip(_run(packed, x, grad), _run(floats, x, grad), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    floats, packed = _pair(320, 200)
    floats = floats.to(dtype)
    x, grad = torch.randn(9, 320).to(dtype), torch.randn(9, 200).to(dtype)
    monkeypatch.setattr(ops, "SLICE_FROM", 0)
    monkeypatch.setattr(ops, "SLICE_BYTES", 3 * 2**14)
    for dim in (0, 1):
        parts = [part for _, part in ops.NF4Arithmetic(double=True)._slices(packed.parts, packed.shape, dtype, dim)]
        assert len(parts) > 1
        assert torch.equal(torch.cat(parts, dim), floats.weight)
    for ours, theirs in zip(_run(packed, x, grad), _run(floats, x, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_keeps_no_float_weight_for_the_backward_pass() -> None:
    _, packed = _pair(128, 256)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed(torch.randn(3, 128, requires_grad=True))
    own = {p.untyped_storage().data_ptr() for p in packed.parameters()}
    assert saved
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in saved)


def test_gradients_go_to_the_input_alone() -> None:
    _, packed = _pair()
    packed(torch.randn(3, 96, requires_grad=True)).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in packed.parameters())
    assert packed.bias is not None
    packed.bias.requires_grad_()  # PEFT's bias="all"
    packed(torch.randn(3, 96)).sum().backward()
    assert packed.bias.grad is not None
    assert torch.equal(packed.bias.grad, torch.full((40,), 3.0))


def test_train_and_eval_in_any_order_change_nothing() -> None:
    _, packed = _pair()
    before = {k: v.clone() for k, v in packed.state_dict().items()}
    x, grad = torch.randn(4, 96).bfloat16(), torch.randn(4, 40).bfloat16()
    first = _run(packed, x, grad)
    for training in (False, True, True, False, False, True):
        packed.train(training)
        with torch.no_grad():
            assert torch.equal(packed(x), first[0])
        for now, then in zip(_run(packed, x, grad), first, strict=True):
            assert torch.equal(now, then)
        after = packed.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("double", [True, False])
def test_casts_leave_codes_and_scales_alone(double: bool) -> None:
    _, packed = _pair(double=double)
    weight = packed.dequantize(torch.float32)
    model = nn.Sequential(copy.deepcopy(packed), nn.Linear(40, 3))
    for cast in (lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        cast(model)
        layer = model[0]
        assert isinstance(layer, NF4Linear)
        assert torch.equal(layer.dequantize(torch.float32), weight)
        assert layer.bias is not None
        assert layer.dtype == layer.bias.dtype == model[1].weight.dtype
    assert model(torch.randn(2, 40 * 2 + 16).bfloat16()).dtype == torch.bfloat16


def test_deepcopy_is_apart() -> None:
    _, packed = _pair()
    twin = copy.deepcopy(packed)
    assert torch.equal(twin.dequantize(), packed.dequantize())
    twin.weight.data.zero_()
    assert not torch.equal(twin.dequantize(), packed.dequantize())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_safetensors_round_trip_through_meta(tmp_path: Path, double: bool, assign: bool) -> None:
    _, packed = _pair(33, 7, double=double)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), **packed.state_dict()}, tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    del state["odd"]
    empty = NF4Linear(33, 7, double=double, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state, assign=assign)
    assert torch.equal(empty.dequantize(), packed.dequantize())
    x = torch.randn(2, 33)
    assert torch.equal(empty(x), packed(x))


def test_unaligned_scale_bytes() -> None:
    _, packed = _pair()
    expected = packed.dequantize()
    assert packed.nested_absmax is not None
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.nested_absmax.data])[1:]
    packed.nested_absmax = nn.Parameter(shifted, requires_grad=False)
    assert torch.equal(packed.dequantize(), expected)


def test_meta_and_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = NF4Linear.from_linear(nn.Linear(96, 40, device="meta", dtype=torch.bfloat16))
    assert packed.weight.shape == _pair()[1].weight.shape
    with backends.use("reference"):
        assert packed(torch.empty(3, 96, device="meta", dtype=torch.bfloat16)).shape == (3, 40)
    with FakeTensorMode():
        fake = NF4Linear(96, 40)
        x = torch.randn(3, 96, requires_grad=True)
        fake(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (3, 96)
    _, real = _pair()  # nothing fake stays behind
    assert real(torch.randn(3, 96)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_float_linear_does(dtype: torch.dtype) -> None:
    floats, packed = _pair()
    x, grad = torch.randn(3, 96), torch.randn(3, 40)

    def run(layer: nn.Module) -> tuple[Tensor, Tensor]:
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = layer(own)
        out.backward(grad.to(out.dtype))  # outside, as training does
        assert own.grad is not None
        return out.detach(), own.grad

    ours, theirs = run(packed), run(floats)
    assert ours[0].dtype == theirs[0].dtype == dtype
    assert ours[1].dtype == theirs[1].dtype == torch.float32
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_refusals() -> None:
    floats, packed = _pair()
    with pytest.raises(ValueError, match="already nf4: quantizing it again would lose accuracy"):
        NF4Linear.from_linear(packed)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"float64"):
        packed(torch.randn(2, 96).double())
    with pytest.raises(ValueError, match=r"float64"):
        NF4Linear.from_linear(nn.Linear(96, 40).double())
    with pytest.raises(ValueError, match="quantizing it again would lose accuracy"):
        NF4Linear.from_linear(floats)  # what packed.to_linear() gave


def test_repr() -> None:
    assert repr(_pair()[1]) == "NF4Linear(in_features=96, out_features=40, bias=True, double=True)"


def test_only_few_rows_of_whole_blocks_go_to_a_fused_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant import nf4
    from quant.backends import reference_nf4

    taken: list[torch.Size] = []

    def linear(x: Tensor, packed: nf4.NF4Tensor) -> Tensor:
        taken.append(x.shape)
        return x @ nf4.dequantize(packed).t()

    monkeypatch.setattr(reference_nf4, "FEW", 4, raising=False)
    monkeypatch.setattr(reference_nf4, "linear", linear, raising=False)
    with backends.use("reference"):
        for features, rows in ((128, 3), (96, 3), (128, 5), (128, 0)):
            floats, packed = _pair(features, 40)
            x = torch.randn(rows, features)
            torch.testing.assert_close(packed(x), floats(x))
    assert taken == [torch.Size((3, 128))]
