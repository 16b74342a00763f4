"""Linears of every scheme, trainable and packed: products, straight-through gradients, saved tensors, copies, compiling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from quant import (
    BitLinear,
    FakeNF4Linear,
    FakeQuantLinear,
    NF4Linear,
    PackedBitLinear,
    PackedLinear,
    nf4,
    ternary,
    weights_changed,
)
from quant import backends as quant_backends

Layer = type[PackedLinear] | type[FakeQuantLinear]
FAKE_QUANT: list[type[FakeQuantLinear]] = [BitLinear, FakeNF4Linear]
PACKED: list[type[PackedLinear]] = [NF4Linear, PackedBitLinear]
LAYERS: list[Layer] = [*FAKE_QUANT, *PACKED]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _linear(in_features: int = 96, out_features: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype)


def _quantized_input(layer: nn.Module, x: Tensor) -> Tensor:
    """The input as the scheme computes with it: unchanged, or dequantized from int8 codes, straight-through."""
    if getattr(layer, "scheme", None) is not ternary:
        return x
    return x + (ternary.dequantize_activations(*ternary.quantize_activations(x), dtype=x.dtype) - x).detach()


def _reference_output(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = q(x) · q(W)ᵀ + bias in torch; gradients pass straight through both roundings."""
    quantized = nf4.fake_quantize(weight) if layer.scheme is nf4 else ternary.fake_quantize(weight)
    return F.linear(_quantized_input(layer, x), weight + (quantized - weight).detach(), bias)


def _forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [(96, 40), (33, 8), (576, 192)], ids=str)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_output_and_gradients_equal_the_straight_through_formula(
    kind: type[FakeQuantLinear], lead: tuple[int, ...], features: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    linear = _linear(*features, bias=bias, dtype=dtype)
    weight, offset = linear.weight.detach().clone().requires_grad_(), None
    if linear.bias is not None:
        offset = linear.bias.detach().clone().requires_grad_()
    layer = kind.from_linear(linear)
    x, grad = torch.randn(*lead, features[0]).to(dtype), torch.randn(*lead, features[1]).to(dtype)
    actual = _forward_backward(layer, x, grad)
    reference_x = x.clone().requires_grad_()
    expected = _reference_output(layer, reference_x, weight, offset)
    expected.backward(grad)
    assert reference_x.grad is not None
    # The integer product is exact, the reference rounds its inputs; the gradients use exactly the same factors.
    tolerance: dict[str, float] = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(actual[0], expected.detach(), **tolerance)
    torch.testing.assert_close(actual[1], reference_x.grad, rtol=0, atol=0)
    assert weight.grad is not None
    torch.testing.assert_close(actual[2], weight.grad, rtol=0, atol=0)
    if offset is not None and offset.grad is not None:
        torch.testing.assert_close(actual[3], offset.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck_of_straight_through_gradients(kind: Layer) -> None:
    """With its rounding errors held constant, the layer is a bilinear map, which finite differences can check."""
    layer = kind.from_linear(_linear(12, 8))
    dtype = torch.get_default_dtype()
    weight = layer.weight.detach() if isinstance(layer, FakeQuantLinear) else layer.dequantize(dtype)
    x = torch.randn(3, 12)
    error_x, error_w = (_quantized_input(layer, x) - x).double(), (layer.dequantize(dtype) - weight).double()
    assert layer.bias is not None
    bias = layer.bias.detach()

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x64: Tensor, w64: Tensor, b64: Tensor) -> Tensor:
            ctx.save_for_backward(x64, w64)
            return F.linear(x64 + error_x, w64 + error_w, b64)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                results = _forward_backward(layer, x, grad.float())
            return (
                results[1].double(),
                results[2].double() if ctx.needs_input_grad[1] else None,
                results[3].double() if len(results) > 3 else None,
            )

    trained = isinstance(layer, FakeQuantLinear)
    inputs = (x.double().requires_grad_(), weight.double().requires_grad_(trained), bias.double().requires_grad_(trained))
    assert gradcheck(Surrogate.apply, inputs, eps=1e-4, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_rms_norm_equals_rms_norm_then_layer(dtype: torch.dtype) -> None:
    """`norm_eps`: RMSNorm and quantization in one pass equal transformers' RMSNorm and then the layer, gradients included."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = BitLinear.from_linear(_linear(dtype=dtype), norm_eps=1e-6)
    plain = BitLinear.from_linear(_linear(dtype=dtype))
    norm = LlamaRMSNorm(96, eps=1e-6).to(dtype)
    assert layer.rms_norm is not None
    with torch.no_grad():
        norm.weight.copy_(torch.rand(96) + 0.5)
        layer.rms_norm.weight.copy_(norm.weight)
    x, grad = torch.randn(2, 5, 96).to(dtype), torch.randn(2, 5, 40).to(dtype)
    assert torch.equal(layer(x), plain(norm(x)))
    results, reference_results = _forward_backward(layer, x, grad), _forward_backward(nn.Sequential(norm, plain), x, grad)
    order = [0, 1, 4, 2, 3]  # _forward_backward: output, input, then parameters in the order of the module tree
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    for actual, expected in zip([results[i] for i in order], reference_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    packed = PackedBitLinear.from_linear(layer)
    assert torch.equal(packed(x), layer(x))
    assert not any(p.requires_grad for p in packed.parameters())
    assert set(packed.state_dict()) == {"weight", "weight_scale", "bias", "rms_norm.weight"}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(_forward_backward(compiled, x, grad), results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", LAYERS)
def test_switching_between_train_and_eval_changes_nothing(kind: Layer) -> None:
    layer = kind.from_linear(_linear())
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x, grad = torch.randn(4, 96).bfloat16(), torch.randn(4, 40).bfloat16()
    first = _forward_backward(layer, x, grad)
    for training in (False, True, True, False, False, True):
        layer.train(training)
        with torch.no_grad():
            assert torch.equal(layer(x), first[0])
        with torch.inference_mode():
            assert torch.equal(layer(x.clone()), first[0])
        for actual, expected in zip(_forward_backward(layer, x, grad), first, strict=True):
            assert torch.equal(actual, expected)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
def test_quantizing_a_quantized_layer_raises(kind: Layer) -> None:
    layer = kind.from_linear(_linear())
    for other_kind in LAYERS:
        if isinstance(layer, FakeQuantLinear) and issubclass(other_kind, PackedLinear) and other_kind.scheme is layer.scheme:
            packed = other_kind.from_linear(layer)  # packing after training does not quantize again
            assert torch.equal(packed.dequantize(), layer.dequantize())
            continue
        with pytest.raises(ValueError, match="quantizing it again would lose accuracy"):
            other_kind.from_linear(layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [BitLinear, PackedBitLinear])
def test_float_weights_with_ternary_values_raise(kind: Layer) -> None:
    plain = PackedBitLinear.from_linear(_linear()).to_linear(torch.bfloat16)
    with pytest.raises(ValueError, match="already ternary"):
        kind.from_linear(plain)
    plain.weight = nn.Parameter(plain.weight.detach().clone())  # as loaded from a checkpoint: nothing marks them as ternary
    with pytest.raises(ValueError, match="ternary already"):
        kind.from_linear(plain)


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_shapes_and_dtypes_raise(kind: Layer) -> None:
    if kind.scheme is ternary:
        with pytest.raises(ValueError, match="out_features to be a multiple of 4"):
            kind.from_linear(_linear(8, 6))
    layer = kind.from_linear(_linear())
    with pytest.raises(ValueError, match="inputs of 96 features"):
        layer(torch.randn(2, 95))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(2, 96).double())


@pytest.mark.parametrize("kind", LAYERS)
def test_deepcopy_state_dict_casts_and_meta(kind: Layer, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layer = kind.from_linear(_linear())
    x, grad = torch.randn(4, 96), torch.randn(4, 40)
    first = _forward_backward(layer, x, grad)
    copied = copy.deepcopy(layer)
    assert torch.equal(_forward_backward(copied, x, grad)[0], first[0])
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = kind.from_linear(nn.Linear(96, 40))
    _forward_backward(loaded, x, grad)  # caches codes, which loading must drop
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for actual, expected in zip(_forward_backward(loaded, x, grad), first, strict=True):
        assert torch.equal(actual, expected)
    if isinstance(layer, PackedLinear):
        parts = [p.clone() for p in layer.parts]
        layer.to(torch.bfloat16).half().float()
        assert all(torch.equal(a, b) for a, b in zip(layer.parts, parts, strict=True))  # scales are not rounded
        assert layer.dtype == torch.float32
    meta = layer.to("meta")
    assert meta(torch.randn(4, 96, device="meta")).shape == (4, 40)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_output_and_gradient_dtypes(kind: Layer, dtype: torch.dtype) -> None:
    layer = kind.from_linear(_linear())
    x = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    out.backward(torch.randn(3, 40).to(dtype))
    assert out.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x.detach()).float(), rtol=2e-2, atol=2e-2)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


def _saved_bytes(run: Any, exclude: nn.Module) -> int:
    """Bytes of the storages that a forward pass saves for backward, without parameters."""
    parameter_storages = {p.untyped_storage().data_ptr() for p in exclude.parameters()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        run()
    return sum(saved.values())


def test_bitlinear_saves_int8_activations_and_caches_two_bit_weights() -> None:
    layer = BitLinear.from_linear(nn.Linear(256, 512, bias=False, dtype=torch.bfloat16))
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    assert _saved_bytes(lambda: layer(x), layer) == 64 * 256 + 4 * 64
    assert layer.cached_bytes() == 256 * 512 // 4 + 4
    assert _saved_bytes(lambda: PackedBitLinear.from_linear(layer)(x), layer) == 256 * 512 // 4 + 4  # the packed weight itself


def test_input_shared_by_three_layers_is_quantized_and_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import quant.backends
    from quant.backends import aten

    calls = []
    original = aten.quantize_activations
    monkeypatch.setattr(aten, "quantize_activations", lambda x: (calls.append(x.shape), original(x))[1])
    model = nn.ModuleList(BitLinear.from_linear(nn.Linear(128, 64)) for _ in range(3))
    x = torch.randn(2, 16, 128, requires_grad=True)
    with quant.backends.use("aten"):
        assert _saved_bytes(lambda: [layer(x) for layer in model], model) == 32 * 128 + 4 * 32
        assert len(calls) == 1
        with torch.no_grad():
            x.mul_(2)  # another input in the same place
        out = model[0](x)
        assert len(calls) == 2
        assert torch.equal(out, copy.deepcopy(model[0])(x.detach().clone()))


@pytest.mark.filterwarnings("error:.*autograd kernel:UserWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_without_a_graph_break(kind: Layer) -> None:
    torch._dynamo.reset()
    layer = kind.from_linear(_linear())
    model = nn.Sequential(nn.Linear(96, 96), layer, nn.ReLU())
    x, grad = torch.randn(2, 4, 96), torch.randn(2, 4, 40)
    eager_results = _forward_backward(model, x, grad)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(_forward_backward(compiled, x, grad), eager_results, strict=True):
        assert torch.equal(actual, expected)
    compiled_alone = torch.compile(layer, fullgraph=True, backend="aot_eager")  # on its own, with an input that needs no gradient
    torch.testing.assert_close(compiled_alone(x.detach()).detach(), layer(x).detach())
    if isinstance(layer, FakeQuantLinear):  # the graph uses weights of later steps without recompiling
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            _forward_backward(model, x, grad)
            optimizer.step()
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert torch.equal(compiled(x.detach().requires_grad_()), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_with_inductor(kind: Layer) -> None:
    torch._dynamo.reset()
    layer = kind.from_linear(_linear())
    x, grad = torch.randn(2, 4, 96), torch.randn(2, 4, 40)
    eager_results = _forward_backward(layer, x, grad)
    for actual, expected in zip(_forward_backward(torch.compile(layer, fullgraph=True), x, grad), eager_results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_backward_with_fake_tensors(kind: Layer) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = kind.from_linear(_linear())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(layer)
        for name, parameter in list(fake.named_parameters()):
            setattr(fake, name, nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad))
        x = torch.randn(2, 5, 96, requires_grad=True)
        out = fake(x)
        out.sum().backward()
        assert out.shape == (2, 5, 40)
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert layer.cached_bytes() == 0


# ------------------------------------------------------------------------------------------ cached codes of a master weight


def _optimizers() -> list[Any]:
    adamw = torch.optim.AdamW
    return [
        pytest.param(lambda p: adamw(p, lr=0.1), id="adamw"),
        pytest.param(lambda p: adamw(p, lr=0.1, fused=True), id="fused"),
        pytest.param(lambda p: adamw(p, lr=0.1, foreach=True), id="foreach"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=10.0), id="sgd"),
        pytest.param("AdamW8bit", id="8-bit"),
        pytest.param("PagedAdamW8bit", id="paged 8-bit"),
    ]


@pytest.mark.filterwarnings("ignore:.*aged:UserWarning")
@pytest.mark.parametrize("kind", FAKE_QUANT)
@pytest.mark.parametrize("make", _optimizers())
def test_forward_after_an_optimizer_step_uses_the_new_weight(kind: type[FakeQuantLinear], make: Any) -> None:
    layer = kind.from_linear(_linear(256, 64))
    if isinstance(make, str):
        bnb = pytest.importorskip("bitsandbytes")
        optimizer = getattr(bnb.optim, make)(layer.parameters(), lr=0.1)
    else:
        optimizer = make(layer.parameters())
    x, grad = torch.randn(8, 256), torch.randn(8, 64)
    for _ in range(3):
        before = _forward_backward(layer, x, grad)[0]
        optimizer.step()
        after = layer(x).detach()
        assert not torch.equal(after, before)
        fresh = kind.from_linear(nn.Linear(256, 64))
        with torch.no_grad():
            fresh.weight.copy_(layer.weight)
            fresh.bias.copy_(layer.bias)
        assert torch.equal(after, fresh(x).detach())


@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_optimizer_step_in_a_backward_hook_updates_the_codes(kind: type[FakeQuantLinear]) -> None:
    layer = kind.from_linear(_linear())
    optimizers = {p: torch.optim.AdamW([p], lr=0.1, fused=True) for p in layer.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    x = torch.randn(8, 96)
    for _ in range(3):
        layer(x).pow(2).sum().backward()
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_codes_are_computed_once_per_optimizer_step(kind: type[FakeQuantLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.ops import ARITHMETIC

    layer = kind.from_linear(_linear())
    arithmetic, calls = type(ARITHMETIC[layer.arithmetic]), []
    original = arithmetic.pack
    monkeypatch.setattr(arithmetic, "pack", lambda self, w: (calls.append(1), original(self, w))[1])
    x, grad = torch.randn(8, 96), torch.randn(8, 40)
    for _ in range(4):  # micro-steps
        _forward_backward(layer, x, grad)
    assert len(calls) == 1
    weights_changed()
    _forward_backward(layer, x, grad)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", FAKE_QUANT)
def test_edited_and_replaced_weights_are_quantized_again(kind: type[FakeQuantLinear]) -> None:
    layer = kind.from_linear(_linear())
    x = torch.randn(8, 96)
    first = layer(x).detach()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    second = layer(x).detach()
    assert not torch.equal(second, first)
    layer.weight.data = torch.randn_like(layer.weight)
    third = layer(x).detach()
    assert not torch.equal(third, second)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert not torch.equal(layer(x), third)


def test_cached_codes_are_freed_with_their_weight() -> None:
    from quant.weight_cache import _kept

    before = len(_kept)
    layer = BitLinear.from_linear(_linear())
    layer(torch.randn(2, 96))
    assert len(_kept) == before + 1
    layer.bfloat16()
    assert layer.cached_bytes() == 0
    layer(torch.randn(2, 96).bfloat16())
    assert layer.cached_bytes() > 0
    del layer
    assert len(_kept) == before


def test_optimizer_hook_is_added_with_the_first_cached_codes_and_is_removable() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    from quant.weight_cache import unhook_optimizers

    unhook_optimizers()
    before = dict(hooks)
    layer, x = BitLinear.from_linear(_linear()), torch.randn(2, 96)
    assert dict(hooks) == before  # nothing is cached yet
    first = layer(x).detach()
    assert len(hooks) == len(before) + 1
    unhook_optimizers()
    assert dict(hooks) == before
    assert layer.cached_bytes() == 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(x).sum().backward()  # adds it again
    optimizer.step()
    assert len(hooks) == len(before) + 1
    assert not torch.equal(layer(x), first)


def test_undetectable_edits_need_weights_changed_or_a_mode_switch() -> None:
    layer, x = BitLinear.from_linear(_linear()), torch.randn(2, 96)
    layer(x)
    layer.weight.data.copy_(torch.randn(40, 96))  # does not change the version counter
    weights_changed()
    fresh = BitLinear.from_linear(nn.Linear(96, 40))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    layer.weight.data.copy_(torch.randn(40, 96))
    layer.eval()  # as when averaged weights are copied in for evaluation
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    packed = PackedBitLinear.from_linear(_linear(96, 48)).bfloat16()
    few = torch.randn(2, 96).bfloat16()
    with quant_backends.use("aten"):  # caches a copy in its own layout
        packed(few)
        assert packed.cached_bytes() > 0
        packed.weight.data.copy_(PackedBitLinear.from_linear(nn.Linear(96, 48)).weight)
        weights_changed()
        assert torch.equal(packed(few), copy.deepcopy(packed)(few))


def test_weight_and_its_transpose_in_one_storage_are_cached_separately() -> None:
    """A square weight and its transpose share memory and shape, but not values."""
    weight = torch.randn(64, 64)
    layers = [BitLinear.from_linear(nn.Linear(64, 64, bias=False)) for _ in range(2)]
    layers[0].weight, layers[1].weight = nn.Parameter(weight), nn.Parameter(weight.t())
    x = torch.randn(3, 64)
    for layer, w in zip([*layers, *layers], [weight, weight.t()] * 2, strict=True):
        torch.testing.assert_close(layer(x), F.linear(_quantized_input(layer, x), ternary.fake_quantize(w)))
    out = torch.func.functional_call(layers[0], {"weight": layers[0].weight.t()}, (x,))
    torch.testing.assert_close(out, layers[1](x))


@pytest.mark.parametrize("kind", LAYERS)
def test_double_backward_raises(kind: Layer) -> None:
    layer, x = kind.from_linear(_linear()), torch.randn(2, 96, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.pow(2).sum().backward()


def test_input_buffer_overwritten_without_a_version_change() -> None:
    """Like a pipeline's receive buffer: same tensor, same version counter, other values."""
    layers = [BitLinear.from_linear(nn.Linear(64, 64)) for _ in range(2)]
    buffer = torch.randn(4, 64)
    for _ in range(3):
        buffer.data.copy_(torch.randn(4, 64))
        for layer in layers:
            assert torch.equal(layer(buffer), layer(buffer.clone()))
    with torch.inference_mode():
        layers[0](buffer)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.inference_mode():
        layers[0](x)
    layers[0](x).sum().backward()  # uses no cached tensor from inference mode


class Chain(nn.Module):
    """Layers in sequence, whose inputs a compiler may place in the same buffer."""

    def __init__(self, kind: Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind.from_linear(nn.Linear(64, 64, bias=False)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (64,)))
        return x


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*autograd kernel:UserWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_in_sequence_compiled_with_inductor(kind: Layer) -> None:
    torch._dynamo.reset()
    model, x, grad = Chain(kind), torch.randn(5, 64), torch.randn(5, 64)
    eager_results = _forward_backward(model, x, grad)
    compiled = torch.compile(model, fullgraph=True)
    for actual, expected in zip(_forward_backward(compiled, x, grad), eager_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.clone()), eager_results[0], rtol=1e-3, atol=1e-3)
    if isinstance(model.layers[0], FakeQuantLinear):  # weights that the graph computes
        for layer in model.layers:
            nn.utils.parametrizations.weight_norm(layer)
        eager_results = _forward_backward(model, x, grad)
        torch._dynamo.reset()
        for actual, expected in zip(_forward_backward(torch.compile(model, fullgraph=True), x, grad), eager_results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_result_does_not_depend_on_the_default_dtype(kind: Layer, dtype: torch.dtype) -> None:
    linear, x = _linear(), torch.randn(3, 96)
    expected = kind.from_linear(copy.deepcopy(linear))(x)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(kind.from_linear(linear)(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_forward_from_several_threads_while_the_cache_is_cleared() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layers = [BitLinear.from_linear(nn.Linear(64, 64)) for _ in range(8)]
    x = torch.randn(4, 64)
    expected = [layer(x).detach() for layer in layers]

    def work(seed: int) -> bool:
        same = True
        for i in range(60):
            if i % 7 == seed % 7:
                weights_changed()
            same &= torch.equal(layers[i % 8](x), expected[i % 8])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("kind", PACKED)
def test_uninitialized_layer_gives_nan_and_from_linear_rejects_a_class(kind: type[PackedLinear]) -> None:
    assert kind(64, 64)(torch.randn(2, 64)).isnan().all()
    with pytest.raises(TypeError, match=r"takes an nn\.Linear"):
        kind.from_linear(nn.Linear)  # type: ignore[arg-type]
