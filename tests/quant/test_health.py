"""Health of ternary weights: counts checked against unpacked codes, the cost of watching, and alarms for failing runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quant import BitLinear, ternary
from quant.conv import BitConv2d
from quant.health import Health, Layer, Watch, alarms
from quant.ops import ARITHMETIC
from quant.swap import swap


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(7 * 4, 36), nn.ReLU(), nn.Linear(36, 8))
    swap(model, scheme="ternary", trainable=True)
    assert isinstance(model[0], BitConv2d)  # 315 weights: the last byte is padded
    return model


def _codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: ternary.ternarize(module.weight)[0].clone()
        for name, module in model.named_modules()
        if isinstance(module, BitLinear | BitConv2d)
    }


def test_flip_and_zero_counts_match_unpacked_codes() -> None:
    model = _model()
    watch, optimizer = Watch(model), torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        model(torch.randn(4, 5, 4, 4)).square().sum().backward()
        watch.remember()
        before = _codes(model)
        optimizer.step()
        after = _codes(model)
        health = watch.compare()
        assert set(health.layers) == {"0", "2", "4"}
        flips = zeros = total = 0
        for name, layer in health.layers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            assert layer.weights == weight.numel()
            assert layer.flips * layer.weights == pytest.approx(int((after[name] != before[name]).sum()))
            assert layer.zeros * layer.weights == pytest.approx(int((after[name] == 0).sum()))
            assert layer.scale == pytest.approx(float(weight.detach().abs().mean()))
            flips += int((after[name] != before[name]).sum())
            zeros += int((after[name] == 0).sum())
            total += weight.numel()
        assert flips > 0
        assert health.flips == pytest.approx(flips / total)
        assert health.zeros == pytest.approx(zeros / total)


def test_watching_adds_no_extra_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    arithmetic = type(ARITHMETIC["ternary"])
    original = arithmetic.pack
    monkeypatch.setattr(arithmetic, "pack", lambda self, w: (calls.append(w), original(self, w))[1])
    model = nn.Sequential(BitLinear(16, 8), BitLinear(8, 8))
    watch, optimizer = Watch(model), torch.optim.SGD(model.parameters(), lr=0.5)
    for step in (1, 2, 3):
        model(torch.randn(4, 16)).square().sum().backward()
        assert len(calls) == 2 * step
        watch.remember()
        optimizer.step()
        watch.compare()
        assert len(calls) == 2 * (step + 1)  # those of the next forward pass


def test_watch_covers_experts_and_raises_on_misuse() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="no ternary master weights"):
        Watch(model)
    report = swap(model, scheme="ternary", trainable=True)
    watch = Watch(torch.compile(model))  # type: ignore[arg-type]
    assert set(watch.layers) == set(report.swapped)
    assert "model.layers.0.mlp.experts.down_proj.3" in watch.layers
    with pytest.raises(ValueError, match="remember"):
        watch.compare()
    watch.remember()
    assert watch.compare().flips == 0
    with pytest.raises(ValueError, match="remember"):
        watch.compare()


def _health(*flips: float, weights: int = 10**6) -> Health:
    return Health(sum(flips) / len(flips), 0.3, {f"layer.{i}": Layer(f, 0.3, 0.02, weights) for i, f in enumerate(flips)})


def test_alarms_detect_thrashing_slow_and_frozen_layers() -> None:
    good = [_health(1e-2, 8e-3)] * 5
    assert alarms(good, [1e-3] * 5, peak=1e-3, steps=250) == []
    assert alarms([*good[:4], _health(0.5, 0.5)], [1e-3] * 5, peak=1e-3, steps=250) != []
    assert alarms([_health(0.5, 0.5)] * 4, [1e-3] * 4, peak=1e-3, steps=250) == []  # too few to tell
    (alarm,) = alarms([_health(0.05, 0.04)] * 5, [1e-2] * 5, peak=1e-2, steps=250)
    assert "thrashing: 4.5%" in alarm
    assert "too high" in alarm
    (past_alarm,) = alarms([_health(0.05, 0.04)] * 5 + good * 4, [1e-2] * 25, peak=1e-2, steps=250)
    assert "4.5% of the ternary codes flipped per step in 5 consecutive samples" in past_alarm
    (alarm,) = alarms([_health(2.4e-4, 2.4e-4)] * 5, [1e-5] * 5, peak=1e-5, steps=250)
    assert "only 6.0% of the ternary codes" in alarm
    assert "too low" in alarm
    assert alarms([_health(2.4e-4, 2.4e-4)] * 5, [1e-5] * 5, peak=1e-5, steps=10_000) == []  # enough for a long run
    assert alarms([_health(1e-6, 0.0)] * 5, [1e-9] * 5, peak=1e-3, steps=250) == []  # the end of a decay
    slow_at_half_rate = [_health(1.2e-4, 1.2e-4)] * 5
    assert "6.0%" in alarms(slow_at_half_rate, [0.5e-5] * 5, peak=1e-5, steps=250)[0]
    (alarm,) = alarms([_health(1e-2, 0.0)] * 5, [1e-3] * 5, peak=1e-3, steps=250)
    assert alarm == "1 of 2 ternary layers stopped moving (frozen): layer.1"
    assert alarms([_health(1e-2, 0.0, weights=400)] * 5, [1e-3] * 5, peak=1e-3, steps=250) == []  # too few weights to tell
    (alarm,) = alarms([_health(1e-2, *[0.0] * 9)] * 5, [1e-3] * 5, peak=1e-3, steps=250)
    assert alarm.endswith("layer.4, layer.5 and 4 more")
    with pytest.raises(ValueError, match="as many learning rates"):
        alarms(good, [1e-3], peak=1e-3, steps=250)


@pytest.mark.parametrize(("lr", "expected_phrase"), [(1e-6, "too low"), (3e-3, None), (0.1, "too high")])
def test_alarms_of_a_training_run_depend_on_its_learning_rate(lr: float, expected_phrase: str | None) -> None:
    """Ternary layers learning a linear map are frozen, healthy or thrashing, depending only on the learning rate."""
    torch.manual_seed(0)
    target = torch.randn(64, 64) / 8
    model = nn.Sequential(BitLinear(64, 128), nn.ReLU(), BitLinear(128, 64))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.05)  # type: ignore[arg-type]
    watch, optimizer, history = Watch(model), torch.optim.AdamW(model.parameters(), lr=lr), []
    for _ in range(20):
        x = torch.randn(32, 64)
        (model(x) - x @ target).square().mean().backward()
        watch.remember()
        optimizer.step()
        optimizer.zero_grad()
        history.append(watch.compare())
    raised = [alarm for i in range(5, 21) for alarm in alarms(history[:i], [lr] * i, peak=lr, steps=200)]
    assert bool(raised) == (expected_phrase is not None)
    assert all(expected_phrase in alarm for alarm in raised if expected_phrase)
