"""LoRA as one autograd function, against the formula in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.linear import NF4Linear
from quant.lora import LoraGroup, Member, _mask, lora_linears, why_not
from quant.plugins import register_peft

IN, OUTS, RANK = 64, (48, 16, 80), 4


def lora_layers(dtype: torch.dtype = torch.float32) -> list[tuple[NF4Linear, Tensor, Tensor, float]]:
    """Three packed linears, one with a bias, each with A, B and a scaling."""
    torch.manual_seed(0)
    adapted = []
    for number, out in enumerate(OUTS):
        packed = NF4Linear.from_linear(nn.Linear(IN, out, bias=number == 1).to(dtype))
        a, b = torch.randn(RANK + number, IN, requires_grad=True), torch.randn(out, RANK + number, requires_grad=True)
        adapted.append((packed, a, b, 0.5 + number))
    return adapted


def fused_outputs(x: Tensor, adapted: list[Any], dropout: float = 0.0) -> tuple[Tensor, ...]:
    members, tensors = [], []
    for packed, a, b, scaling in adapted:
        bias = [] if packed.bias is None else [packed.bias]
        members.append(Member(packed.arithmetic, packed.out_features, len(a), scaling, len(packed.parts), bool(bias)))
        tensors += [a, b, *bias, *packed.parts]
    return lora_linears(x, members, tensors, dropout=dropout)


def reference_outputs(x: Tensor, adapted: list[Any], mask: Tensor | None = None) -> list[Tensor]:
    dropped_x = x if mask is None else x * mask
    return [packed(x) + scaling * (dropped_x @ a.t()) @ b.t() for packed, a, b, scaling in adapted]


def outputs_and_gradients(outputs: Any, x: Tensor, adapted: list[Any]) -> list[Tensor]:
    """The outputs, and the gradients of a sum that weights each output differently."""
    loss = sum((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape) * (n + 1)).sum() for n, y in enumerate(outputs))
    inputs = [x, *(t for _, a, b, _ in adapted for t in (a, b))]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, inputs)]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert len(actual) == len(expected)
    return max(float((a.float() - e.float()).norm() / e.float().norm()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("lead", [(7,), (2, 5), (1, 1, 3)])
@pytest.mark.parametrize("count", [1, 3])
def test_outputs_and_gradients_equal_the_formula(lead: tuple[int, ...], count: int) -> None:
    adapted = lora_layers()[:count]
    x = torch.randn(*lead, IN, requires_grad=True)
    actual = outputs_and_gradients(fused_outputs(x, adapted), x, adapted)
    expected = outputs_and_gradients(reference_outputs(x, adapted), x, adapted)
    assert relative_error(actual, expected) < 1e-5


def test_unused_outputs_get_zero_gradients() -> None:
    adapted = lora_layers()
    x = torch.randn(5, IN, requires_grad=True)
    fused_outputs(x, adapted)[1].square().sum().backward()
    x_grad, x.grad = x.grad, None
    a_grad = adapted[1][1].grad
    assert float(adapted[0][1].grad.abs().max()) == 0 == float(adapted[2][1].grad.abs().max())
    adapted[1][1].grad = None
    reference_outputs(x, adapted)[1].square().sum().backward()
    assert torch.allclose(x_grad, x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(a_grad, adapted[1][1].grad, rtol=1e-4, atol=1e-4)


def test_dropout_uses_the_same_mask_in_forward_and_backward() -> None:
    adapted = lora_layers()
    x = torch.randn(50, IN, requires_grad=True)
    torch.manual_seed(3)
    actual = outputs_and_gradients(fused_outputs(x, adapted, 0.3), x, adapted)
    torch.manual_seed(3)
    mask = _mask(x.detach(), 0.3, int(torch.randint(1 << 62, ())))
    assert {round(float(value), 4) for value in mask.unique()} == {0.0, round(1 / 0.7, 4)}
    assert 0.25 < float((mask == 0).float().mean()) < 0.35
    assert relative_error(actual, outputs_and_gradients(reference_outputs(x, adapted, mask), x, adapted)) < 1e-5
    torch.manual_seed(4)
    assert not torch.equal(fused_outputs(x, adapted, 0.3)[0], actual[0])


def test_sum_of_base_and_adapter_is_rounded_once() -> None:
    """In bf16, one rounding is off by at most half a unit in the last place; two roundings reach a whole unit."""
    adapted: Any = [
        (p, a.detach().bfloat16(), b.detach().bfloat16() / 128, 0.5) for p, a, b, _ in lora_layers(torch.bfloat16)[::2]
    ]
    x = torch.randn(400, IN).bfloat16()
    exact = [
        x.double() @ packed.dequantize(torch.bfloat16).double().t()
        + 0.5 * (x.double() @ a.double().t()).bfloat16().double() @ b.double().t()
        for packed, a, b, _ in adapted
    ]

    def worst_error(outputs: Any) -> float:
        errors = []
        for y, e in zip(outputs, exact, strict=True):
            large = e.abs() > e.abs().flatten().quantile(0.9)
            unit = 2.0 ** (e.abs().log2().floor() - 7)
            errors.append(float(((y.double() - e).abs() / unit)[large].quantile(0.99)))
        return max(errors)

    rounded_twice = [packed(x) + (x @ a.t()) @ (0.5 * b).t() for packed, a, b, _ in adapted]
    assert worst_error(fused_outputs(x, adapted)) < 0.6 < 0.8 < worst_error(rounded_twice)


def test_autocast_outputs_have_the_autocast_dtype() -> None:
    adapted = lora_layers()
    x = torch.randn(9, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = fused_outputs(x, adapted)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    actual = outputs_and_gradients(outputs, x, adapted)
    assert actual[3].dtype == actual[4].dtype == torch.float32
    assert relative_error(actual, outputs_and_gradients(reference_outputs(x, adapted), x, adapted)) < 2e-2


def test_recomputable_input_is_not_saved_for_backward() -> None:
    adapted = lora_layers()
    source = torch.randn(6, IN, requires_grad=True)
    saved: list[int] = []
    calls: list[int] = []

    def double(tensor: Tensor) -> Tensor:
        calls.append(1)
        return 2 * tensor

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    expected = outputs_and_gradients(reference_outputs(2 * source, adapted), source, adapted)
    x = 2 * source
    x.recompute_fn = double, (source,)  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        outputs = fused_outputs(x, adapted)
    assert x.data_ptr() not in saved
    assert source.data_ptr() in saved
    assert not calls
    assert relative_error(outputs_and_gradients(outputs, source, adapted), expected) < 1e-5
    assert calls == [1]


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = NF4Linear.from_linear(nn.Linear(IN, 8)), NF4Linear.from_linear(nn.Linear(IN, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 2 * self.second(x)


def peft_model(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False, **options)
    register_peft(config)
    return get_peft_model(TwoLinears(), config)


def test_lora_group_can_be_installed_and_removed_without_changing_outputs() -> None:
    model = peft_model()
    inner = model.base_model.model
    x = torch.randn(4, IN)
    with torch.no_grad():
        expected = model(x)
        base = model.base_model.model
        group = LoraGroup([inner.first, inner.second])
        group.install()
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.allclose(model(x), expected, atol=1e-5)  # the same input again: the first call left no cached result
        first, second = inner.first(x), inner.second(x.clone())  # another tensor: computed again
        assert torch.allclose(first + 2 * second, expected, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(model(x), base.first.get_base_layer()(x) + 2 * base.second.get_base_layer()(x), atol=1e-5)
        inner.first.merge()
        assert torch.allclose(model(x), expected, atol=1e-5)
        inner.first.unmerge()
        group.remove()
        assert torch.equal(model(x), expected)
    assert "forward" not in vars(inner.first)
    assert inner.first.get_base_layer().used


@pytest.mark.parametrize(("options", "reason"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias")])
def test_unsupported_lora_options_are_left_to_peft(options: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not(peft_model(**options).base_model.model.first))


def test_trainable_base_weight_is_left_to_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert why_not(layer) is None
    layer.get_base_layer().weight.requires_grad = True
    assert "trained" in str(why_not(layer))


@pytest.mark.parametrize("needed", [False, True])
def test_checkpointing_skips_the_last_product_unless_it_is_needed(monkeypatch: pytest.MonkeyPatch, needed: bool) -> None:
    """It is recomputed only if a later operation in the layer, such as a norm, needs its result."""
    from torch.utils.checkpoint import checkpoint

    from quant import lora

    products: list[int] = []
    original = lora._add_product
    monkeypatch.setattr(lora, "_add_product", lambda member, *rest: (products.append(member.out), original(member, *rest)))
    first, last = lora_layers()[:1], lora_layers()[2:]
    up_projection = torch.randn(OUTS[0], IN)
    x = torch.randn(6, IN, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = fused_outputs(fused_outputs(x, first)[0].relu() @ up_projection, last)[0]
        return y.square() if needed else y + 1

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    products.clear()
    (actual,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(actual, expected)
    assert products == [48, 80, 48, *([80] if needed else [])]
