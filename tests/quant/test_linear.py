"""The packed NF4 linear: equal to a float linear with its dequantized weight; casts, modes and copies do not change it."""

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


def _float_and_packed(
    in_features: int = 96, out_features: int = 40, *, bias: bool = True, double: bool = True
) -> tuple[nn.Linear, NF4Linear]:
    """A float linear with the dequantized weight, and the packed linear."""
    torch.manual_seed(0)
    packed = NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), double=double)
    return packed.to_linear(), packed


def _forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
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
def test_equals_the_float_linear_of_the_dequantized_weight(
    lead: tuple[int, ...], features: tuple[int, int], bias: bool, double: bool, dtype: torch.dtype
) -> None:
    floats, packed = _float_and_packed(*features, bias=bias, double=double)
    floats = floats.to(dtype)
    assert torch.equal(packed.dequantize(dtype), floats.weight)
    x, grad = torch.randn(*lead, features[0]).to(dtype), torch.randn(*lead, features[1]).to(dtype)
    for actual, expected in zip(_forward_backward(packed, x, grad), _forward_backward(floats, x, grad), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sliced_dequantization_gives_the_same_result(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    floats, packed = _float_and_packed(320, 200)
    floats = floats.to(dtype)
    x, grad = torch.randn(9, 320).to(dtype), torch.randn(9, 200).to(dtype)
    monkeypatch.setattr(ops, "SLICE_FROM", 0)
    monkeypatch.setattr(ops, "SLICE_BYTES", 3 * 2**14)
    for dim in (0, 1):
        parts = [part for _, part in ops.NF4Arithmetic(double=True)._slices(packed.parts, packed.shape, dtype, dim)]
        assert len(parts) > 1
        assert torch.equal(torch.cat(parts, dim), floats.weight)
    for actual, expected in zip(_forward_backward(packed, x, grad), _forward_backward(floats, x, grad), strict=True):
        torch.testing.assert_close(actual, expected)


def test_backward_saves_no_dequantized_weight() -> None:
    _, packed = _float_and_packed(128, 256)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed(torch.randn(3, 128, requires_grad=True))
    parameter_storages = {p.untyped_storage().data_ptr() for p in packed.parameters()}
    assert saved
    assert all(tensor.untyped_storage().data_ptr() in parameter_storages for tensor in saved)


def test_only_the_input_and_a_trainable_bias_get_gradients() -> None:
    _, packed = _float_and_packed()
    packed(torch.randn(3, 96, requires_grad=True)).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in packed.parameters())
    assert packed.bias is not None
    packed.bias.requires_grad_()  # PEFT's bias="all"
    packed(torch.randn(3, 96)).sum().backward()
    assert packed.bias.grad is not None
    assert torch.equal(packed.bias.grad, torch.full((40,), 3.0))


def test_switching_between_train_and_eval_changes_nothing() -> None:
    _, packed = _float_and_packed()
    before = {k: v.clone() for k, v in packed.state_dict().items()}
    x, grad = torch.randn(4, 96).bfloat16(), torch.randn(4, 40).bfloat16()
    first = _forward_backward(packed, x, grad)
    for training in (False, True, True, False, False, True):
        packed.train(training)
        with torch.no_grad():
            assert torch.equal(packed(x), first[0])
        for actual, expected in zip(_forward_backward(packed, x, grad), first, strict=True):
            assert torch.equal(actual, expected)
        after = packed.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("double", [True, False])
def test_dtype_casts_do_not_change_codes_or_scales(double: bool) -> None:
    _, packed = _float_and_packed(double=double)
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


def test_deepcopy_shares_no_memory() -> None:
    _, packed = _float_and_packed()
    copied = copy.deepcopy(packed)
    assert torch.equal(copied.dequantize(), packed.dequantize())
    copied.weight.data.zero_()
    assert not torch.equal(copied.dequantize(), packed.dequantize())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_safetensors_round_trip_into_a_meta_layer(tmp_path: Path, double: bool, assign: bool) -> None:
    _, packed = _float_and_packed(33, 7, double=double)
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


def test_dequantize_with_unaligned_scale_bytes() -> None:
    _, packed = _float_and_packed()
    expected = packed.dequantize()
    assert packed.nested_absmax is not None
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.nested_absmax.data])[1:]
    packed.nested_absmax = nn.Parameter(shifted, requires_grad=False)
    assert torch.equal(packed.dequantize(), expected)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = NF4Linear.from_linear(nn.Linear(96, 40, device="meta", dtype=torch.bfloat16))
    assert packed.weight.shape == _float_and_packed()[1].weight.shape
    with backends.use("reference"):
        assert packed(torch.empty(3, 96, device="meta", dtype=torch.bfloat16)).shape == (3, 40)
    with FakeTensorMode():
        fake = NF4Linear(96, 40)
        x = torch.randn(3, 96, requires_grad=True)
        fake(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (3, 96)
    _, real = _float_and_packed()  # no fake tensor is left in a cache
    assert real(torch.randn(3, 96)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_matches_the_float_linear(dtype: torch.dtype) -> None:
    floats, packed = _float_and_packed()
    x, grad = torch.randn(3, 96), torch.randn(3, 40)

    def run(layer: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = layer(leaf)
        out.backward(grad.to(out.dtype))  # outside autocast, as in training
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    actual, expected = run(packed), run(floats)
    assert actual[0].dtype == expected[0].dtype == dtype
    assert actual[1].dtype == expected[1].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_requantizing_and_float64_raise() -> None:
    floats, packed = _float_and_packed()
    with pytest.raises(ValueError, match="already nf4: quantizing it again would lose accuracy"):
        NF4Linear.from_linear(packed)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"float64"):
        packed(torch.randn(2, 96).double())
    with pytest.raises(ValueError, match=r"float64"):
        NF4Linear.from_linear(nn.Linear(96, 40).double())
    with pytest.raises(ValueError, match="quantizing it again would lose accuracy"):
        NF4Linear.from_linear(floats)  # the result of packed.to_linear()


def test_repr() -> None:
    assert repr(_float_and_packed()[1]) == "NF4Linear(in_features=96, out_features=40, bias=True, double=True)"


def test_fused_product_is_used_only_for_few_rows_and_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant import nf4
    from quant.backends import reference_nf4

    fused_shapes: list[torch.Size] = []

    def linear(x: Tensor, packed: nf4.NF4Tensor) -> Tensor:
        fused_shapes.append(x.shape)
        return x @ nf4.dequantize(packed).t()

    monkeypatch.setattr(reference_nf4, "FEW", 4, raising=False)
    monkeypatch.setattr(reference_nf4, "linear", linear, raising=False)
    with backends.use("reference"):
        for features, rows in ((128, 3), (96, 3), (128, 5), (128, 0)):
            floats, packed = _float_and_packed(features, 40)
            x = torch.randn(rows, features)
            torch.testing.assert_close(packed(x), floats(x))
    assert fused_shapes == [torch.Size((3, 128))]
