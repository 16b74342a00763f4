"""LoRA as one function, against the formula in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.linear import NF4Linear
from quant.lora import LoraGroup, Member, _mask, lora_linears, why_not
from quant.plugins import register_peft

IN, OUTS, RANK = 64, (48, 16, 80), 4


def layers(dtype: torch.dtype = torch.float32) -> list[tuple[NF4Linear, Tensor, Tensor, float]]:
    """Three packed linears, one with a bias, with A, B and a scaling each."""
    torch.manual_seed(0)
    made = []
    for number, out in enumerate(OUTS):
        packed = NF4Linear.from_linear(nn.Linear(IN, out, bias=number == 1).to(dtype))
        a, b = torch.randn(RANK + number, IN, requires_grad=True), torch.randn(out, RANK + number, requires_grad=True)
        made.append((packed, a, b, 0.5 + number))
    return made


def computed(x: Tensor, made: list[Any], dropout: float = 0.0) -> tuple[Tensor, ...]:
    members, tensors = [], []
    for packed, a, b, scaling in made:
        bias = [] if packed.bias is None else [packed.bias]
        members.append(Member(packed.arithmetic, packed.out_features, len(a), scaling, len(packed.parts), bool(bias)))
        tensors += [a, b, *bias, *packed.parts]
    return lora_linears(x, members, tensors, dropout=dropout)


def formula(x: Tensor, made: list[Any], mask: Tensor | None = None) -> list[Tensor]:
    thinned = x if mask is None else x * mask
    return [packed(x) + scaling * (thinned @ a.t()) @ b.t() for packed, a, b, scaling in made]


def results(outputs: Any, x: Tensor, made: list[Any]) -> list[Tensor]:
    """Outputs and gradients of a sum with other weights for each."""
    loss = sum((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape) * (n + 1)).sum() for n, y in enumerate(outputs))
    wanted = [x, *(t for _, a, b, _ in made for t in (a, b))]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, wanted)]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((o.float() - t.float()).norm() / t.float().norm()) for o, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("lead", [(7,), (2, 5), (1, 1, 3)])
@pytest.mark.parametrize("count", [1, 3])
def test_outputs_and_gradients(lead: tuple[int, ...], count: int) -> None:
    made = layers()[:count]
    x = torch.randn(*lead, IN, requires_grad=True)
    assert apart(results(computed(x, made), x, made), results(formula(x, made), x, made)) < 1e-5


def test_an_output_that_nobody_uses() -> None:
    made = layers()
    x = torch.randn(5, IN, requires_grad=True)
    computed(x, made)[1].square().sum().backward()
    ours, x.grad = x.grad, None
    of_a = made[1][1].grad
    assert float(made[0][1].grad.abs().max()) == 0 == float(made[2][1].grad.abs().max())
    made[1][1].grad = None
    formula(x, made)[1].square().sum().backward()
    assert torch.allclose(ours, x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(of_a, made[1][1].grad, rtol=1e-4, atol=1e-4)


def test_dropout_is_the_same_mask_forward_and_backward() -> None:
    made = layers()
    x = torch.randn(50, IN, requires_grad=True)
    torch.manual_seed(3)
    ours = results(computed(x, made, 0.3), x, made)
    torch.manual_seed(3)
    mask = _mask(x.detach(), 0.3, int(torch.randint(1 << 62, ())))
    assert {round(float(value), 4) for value in mask.unique()} == {0.0, round(1 / 0.7, 4)}
    assert 0.25 < float((mask == 0).float().mean()) < 0.35
    assert apart(ours, results(formula(x, made, mask), x, made)) < 1e-5
    torch.manual_seed(4)
    assert not torch.equal(computed(x, made, 0.3)[0], ours[0])


def test_base_and_adapter_are_rounded_together() -> None:
    """In bf16 large outputs are off by half a unit in the last place, as one rounding has it; two roundings reach a whole one."""
    made: Any = [(p, a.detach().bfloat16(), b.detach().bfloat16() / 128, 0.5) for p, a, b, _ in layers(torch.bfloat16)[::2]]
    x = torch.randn(400, IN).bfloat16()
    exact = [
        x.double() @ packed.dequantize(torch.bfloat16).double().t()
        + 0.5 * (x.double() @ a.double().t()).bfloat16().double() @ b.double().t()
        for packed, a, b, _ in made
    ]

    def worst(outputs: Any) -> float:
        found = []
        for y, e in zip(outputs, exact, strict=True):
            large = e.abs() > e.abs().flatten().quantile(0.9)
            unit = 2.0 ** (e.abs().log2().floor() - 7)
            found.append(float(((y.double() - e).abs() / unit)[large].quantile(0.99)))
        return max(found)

    apart_twice = [packed(x) + (x @ a.t()) @ (0.5 * b).t() for packed, a, b, _ in made]
    assert worst(computed(x, made)) < 0.6 < 0.8 < worst(apart_twice)


def test_under_autocast_products_are_in_its_dtype() -> None:
    made = layers()
    x = torch.randn(9, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = computed(x, made)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    ours = results(outputs, x, made)
    assert ours[3].dtype == ours[4].dtype == torch.float32
    assert apart(ours, results(formula(x, made), x, made)) < 2e-2


def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    made = layers()
    source = torch.randn(6, IN, requires_grad=True)
    kept: list[int] = []
    calls: list[int] = []

    def double(tensor: Tensor) -> Tensor:
        calls.append(1)
        return 2 * tensor

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    plain = results(formula(2 * source, made), source, made)
    x = 2 * source
    x.recompute_fn = double, (source,)  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = computed(x, made)
    assert x.data_ptr() not in kept
    assert source.data_ptr() in kept
    assert not calls
    assert apart(results(outputs, source, made), plain) < 1e-5
    assert calls == [1]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = NF4Linear.from_linear(nn.Linear(IN, 8)), NF4Linear.from_linear(nn.Linear(IN, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + 2 * self.other(x)


def wrapped(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["one", "other"], init_lora_weights=False, **options)
    register_peft(config)
    return get_peft_model(Two(), config)


def test_a_group_stands_in_for_the_layers_and_goes_again() -> None:
    model = wrapped()
    inner = model.base_model.model
    x = torch.randn(4, IN)
    with torch.no_grad():
        own = model(x)
        base = model.base_model.model
        group = LoraGroup([inner.one, inner.other])
        group.install()
        assert torch.allclose(model(x), own, atol=1e-5)
        assert torch.allclose(model(x), own, atol=1e-5)  # the same input again: nothing of the first call is left
        one, other = inner.one(x), inner.other(x.clone())  # another tensor: computed anew
        assert torch.allclose(one + 2 * other, own, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(model(x), base.one.get_base_layer()(x) + 2 * base.other.get_base_layer()(x), atol=1e-5)
        inner.one.merge()
        assert torch.allclose(model(x), own, atol=1e-5)
        inner.one.unmerge()
        group.remove()
        assert torch.equal(model(x), own)
    assert "forward" not in vars(inner.one)
    assert inner.one.get_base_layer().used


@pytest.mark.parametrize(("options", "why"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias")])
def test_what_is_left_to_peft(options: dict[str, Any], why: str) -> None:
    assert why in str(why_not(wrapped(**options).base_model.model.one))


def test_a_trained_base_is_left_to_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert why_not(layer) is None
    layer.get_base_layer().weight.requires_grad = True
    assert "trained" in str(why_not(layer))


@pytest.mark.parametrize("needed", [False, True])
def test_checkpointing_does_without_a_layers_last_product(monkeypatch: pytest.MonkeyPatch, needed: bool) -> None:
    """Unless something behind it in the layer, such as a norm, needs its result again."""
    from torch.utils.checkpoint import checkpoint

    from quant import lora

    products: list[int] = []
    onto = lora._add_product
    monkeypatch.setattr(lora, "_add_product", lambda member, *rest: (products.append(member.out), onto(member, *rest)))
    first, last = layers()[:1], layers()[2:]
    widen = torch.randn(OUTS[0], IN)
    x = torch.randn(6, IN, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = computed(computed(x, first)[0].relu() @ widen, last)[0]
        return y.square() if needed else y + 1

    (plain,) = torch.autograd.grad(block(x).sum(), x)
    products.clear()
    (ours,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(ours, plain)
    assert products == [48, 80, 48, *([80] if needed else [])]
