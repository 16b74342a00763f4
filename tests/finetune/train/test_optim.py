"""Low-memory optimizers: stochastic rounding, the optimizer step in backward, 8-bit states, and their bytes."""

from __future__ import annotations

import itertools
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import UserError
from finetune.train import checkpoint, low_memory, optim
from finetune.train.checkpoint import Progress
from finetune.train.low_memory import LowMemory, round_stochastically
from finetune.train.optim import OPTIMIZERS, OptimizerRow, build, bytes_per_parameter, memory_of, refusals
from finetune.train.schedule import Schedule

BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "device": "cpu"}
COMBINATIONS = list(itertools.product(("adamw", "adamw_8bit"), (FP32, BF16), (False, True), (False, True)))


class Net(nn.Module):
    """A large matrix (8-bit states), a small one, a vector, a scalar, and one that gets no gradient."""

    def __init__(self, dtype: torch.dtype = FP32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.large = nn.Linear(80, 101, bias=False)
        self.small = nn.Linear(101, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(5000))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(torch.relu(self.large(x)) * self.scale)


def make_optimizer(model: nn.Module, name: str = "adamw", **more: Any) -> Any:
    return build(dict(model.named_parameters()), name=name, **(OPTIONS | more))[0]


def loss_of(model: nn.Module, step: int, rows: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(rows, 80, generator=g), torch.randint(0, 7, (rows,), generator=g)
    return F.cross_entropy(model(x.to(dtype)).float(), y)


def train_steps(model: nn.Module, optimizer: Any, numbers: Any) -> None:
    for step in numbers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- rounding


def test_stochastic_rounding_is_right_on_average() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(60), torch.randn(20) * 1e-6, torch.randn(20) * 1e20])
    draws = 4000
    rounded = round_stochastically(values.repeat(draws, 1))
    assert rounded.dtype == BF16
    down = (values.view(torch.int32) & -65536).view(FP32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(FP32)
    assert ((rounded == down) | (rounded == up)).all()  # always one of the two neighbours
    expected = (values.double() - down.double()) / (up.double() - down.double())
    actual = (rounded == up).double().mean(0)
    stderr = (expected * (1 - expected) / draws).sqrt()
    assert ((actual - expected).abs() < 5 * stderr + 1e-9).all()
    assert not torch.equal(rounded[0], rounded[1])


def test_values_of_bfloat16_are_not_changed_by_rounding() -> None:
    all_bf16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    rounded = round_stochastically(all_bf16.float())
    not_nan = ~all_bf16.isnan()
    assert torch.equal(rounded[not_nan].view(torch.int16), all_bf16[not_nan].view(torch.int16))  # infinities and -0 too
    assert rounded[~not_nan].isnan().all()
    # NaNs whose upper 16 bits alone are an infinity, or that overflow to a number when the noise is added
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(FP32)
    assert round_stochastically(nans.repeat(1000)).isnan().all()


def test_rounding_noise_comes_from_torchs_generator() -> None:
    values = torch.randn(100)
    torch.manual_seed(3)
    first = round_stochastically(values)
    torch.manual_seed(3)
    assert torch.equal(first, round_stochastically(values))


def test_stochastic_rounding_keeps_small_updates() -> None:
    """lr 1e-4 on weights of 1: rounding to nearest never changes them (neighbours are 0.004 away), stochastic rounding does."""
    means = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(20_000, dtype=BF16))
        optimizer, _ = build({"p": p}, name="adamw", **(OPTIONS | {"lr": 1e-4}), stochastic_rounding=stochastic)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means[stochastic] = p.float().mean().item()
    assert means[False] == 1.0
    assert means[True] == pytest.approx(1 - 50 * 1e-4, abs=3e-4)


def test_large_and_uncontiguous_parameters_are_rounded_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory, "ROUNDED", 50)
    for p in (nn.Parameter(torch.randn(33, 20).to(BF16)), nn.Parameter(torch.randn(20, 33).to(BF16).t())):
        for name in ("adamw", "adamw_8bit"):
            optimizer, _ = build({"p": p}, name=name, **OPTIONS, stochastic_rounding=True)
            before = p.detach().clone()
            p.grad = torch.randn(20, 33).to(BF16).t().contiguous()
            expected = before.float() * (1 - 1e-3) - 1e-2 * p.grad.float().sign()  # Adam's first step
            optimizer.step()
            assert (p.float() - expected).abs().max() < 0.02
            assert (p != before).float().mean() > 0.9


# --- all modes compute the same step


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_step_in_backward_equals_the_plain_step(name: str, dtype: torch.dtype) -> None:
    plain, in_backward = Net(dtype), Net(dtype)
    train_steps(plain, make_optimizer(plain, name), range(1, 6))
    optimizer = make_optimizer(in_backward, name, in_backward=True)
    train_steps(in_backward, optimizer, range(1, 6))
    assert equal(plain, in_backward)
    assert not equal(plain, Net(dtype))
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_mean_of_rounded_steps_is_the_float32_step(name: str) -> None:
    """One step: the mean over many roundings equals the float32 step from the same weights and gradients."""
    exact = Net(BF16).float()
    loss_of(exact, 1)
    gradients = [torch.randn_like(p) for p in exact.parameters()]
    reference = make_optimizer(exact, name)
    for p, g in zip(exact.parameters(), gradients, strict=True):
        p.grad = g.to(BF16).float()
    reference.step()
    sums = [torch.zeros_like(p) for p in exact.parameters()]
    for seed in range(60):
        model = Net(BF16)
        optimizer = make_optimizer(model, name, stochastic_rounding=True)
        torch.manual_seed(seed)
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.to(BF16)
        optimizer.step()
        for total, p in zip(sums, model.parameters(), strict=True):
            total += p.detach().float() / 60
    for total, p in zip(sums, exact.parameters(), strict=True):
        error = (total - p.detach()) / p.detach().abs().clamp(min=1e-3)
        assert error.abs().max() < 0.004  # neighbours are up to 2⁻⁸ apart; the mean of 60 is far closer
        assert error.mean().abs() < 3e-4 or p.numel() < 1000


def test_rounding_in_backward_uses_the_same_noise() -> None:
    """Bit-equal, since with one parameter the order of the updates is the same."""
    weights = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(70, 70).to(BF16))
        optimizer, _ = build({"p": p}, name="adamw_8bit", **OPTIONS, stochastic_rounding=True, in_backward=in_backward)
        for _ in range(3):
            (p.float() ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append(p.detach().clone())
    assert torch.equal(*weights)


def test_param_groups_hold_the_models_parameters_and_set_the_step() -> None:
    model = Net(BF16)
    optimizer = make_optimizer(model, "adamw", stochastic_rounding=True, in_backward=True)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    before = Net(BF16)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss_of(model, 1).backward()
    assert equal(model, before)  # learning rate 0: no step
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)


# --- inside the backward pass


@pytest.mark.parametrize("rounded", [False, True])
def test_step_in_backward_frees_gradients_and_keeps_their_norm(rounded: bool) -> None:
    dtype = BF16 if rounded else FP32
    model, plain = Net(dtype), Net(dtype)
    optimizer = make_optimizer(model, stochastic_rounding=rounded, in_backward=True)
    assert optimizer.grad_norm() == 0.0
    for step in (1, 2):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        loss_of(plain, step).backward()
        expected = torch.nn.utils.get_total_norm([p.grad.float() for p in plain.parameters() if p.grad is not None])
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.grad_norm() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.step()
        assert optimizer.grad_norm() == pytest.approx(expected.item(), rel=1e-5)  # until the next backward pass
        assert optimizer.finite()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_bad_gradient_is_reported_until_a_state_is_loaded(name: str, bad: float) -> None:
    model, reference = Net(), Net()
    optimizer, reference_optimizer = (
        make_optimizer(model, name, in_backward=True),
        make_optimizer(reference, name, in_backward=True),
    )
    initial_state = reference_optimizer.state_dict()  # empty, as in a checkpoint before the first step
    (loss_of(model, 1) * bad).backward()
    assert not optimizer.finite()
    model.load_state_dict(reference.state_dict())
    optimizer.load_state_dict(initial_state)
    for m, o in ((model, optimizer), (reference, reference_optimizer)):
        loss_of(m, 2).backward()
        assert o.finite()
    assert equal(model, reference)


def test_second_backward_pass_before_the_step_is_refused() -> None:
    model = Net()
    make_optimizer(model, in_backward=True)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="second gradient before step"):
        loss_of(model, 2).backward()


def test_removed_hooks_leave_plain_gradients() -> None:
    model = Net()
    before = Net()
    make_optimizer(model, in_backward=True).remove_hooks()
    loss_of(model, 1).backward()
    assert equal(model, before)
    assert model.large.weight.grad is not None


def test_shared_weight_is_stepped_once_with_its_full_gradient() -> None:
    weights = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(50, 16)
        optimizer = make_optimizer(table, in_backward=in_backward)
        for _ in range(3):
            (table(torch.arange(9)) @ table.weight.t()).logsumexp(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append(table.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_in_backward_works_with_activation_checkpointing(checkpointing: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make_optimizer(model, in_backward=in_backward)
        for step in range(3):
            ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("dtype", "rounded", "in_backward"), list(itertools.product((FP32, BF16), (False, True), (False, True))))
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_cached_ternary_codes_are_those_of_the_updated_weights(
    name: str, dtype: torch.dtype, rounded: bool, in_backward: bool
) -> None:
    from quant import BitLinear

    torch.manual_seed(0)
    layer = BitLinear.from_linear(nn.Linear(64, 128, bias=False).to(dtype))
    optimizer = make_optimizer(layer, name, lr=0.1, stochastic_rounding=rounded, in_backward=in_backward)
    x = torch.randn(4, 64).to(dtype)
    for _ in range(3):
        before = layer(x)
        before.float().pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recomputed = BitLinear.from_linear(nn.Linear(64, 128, bias=False).to(dtype))
        with torch.no_grad():
            recomputed.weight.copy_(layer.weight)
        assert torch.equal(layer(x), recomputed(x))
        assert not torch.equal(layer(x), before)


# --- saved and restored


@pytest.mark.parametrize(("name", "dtype", "rounded", "in_backward"), COMBINATIONS)
def test_resume_from_a_checkpoint_is_bit_equal(
    tmp_path: Path, name: str, dtype: torch.dtype, rounded: bool, in_backward: bool
) -> None:
    options = {"stochastic_rounding": rounded, "in_backward": in_backward}
    model = Net(dtype)
    optimizer = make_optimizer(model, name, **options)
    train_steps(model, optimizer, range(1, 4))
    path = checkpoint.write(
        tmp_path, checkpoint.snapshot(model, optimizer, Progress(step=3), metrics_bytes=0, copy=False), keep=2
    )
    train_steps(model, optimizer, range(4, 7))
    loaded = Net(dtype, seed=1)
    loaded_optimizer = make_optimizer(loaded, name, **options)
    torch.manual_seed(99)
    assert checkpoint.load(path, loaded, loaded_optimizer)[0].step == 3
    train_steps(loaded, loaded_optimizer, range(4, 7))
    assert equal(model, loaded)
    expected_state, loaded_state = optimizer.state_dict()["state"], loaded_optimizer.state_dict()["state"]
    assert expected_state.keys() == loaded_state.keys()
    for key in expected_state:
        a, b = _flat(expected_state[key]), _flat(loaded_state[key])
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        if rounded and dtype == BF16:
            assert all(t.dtype in (FP32, torch.uint8) for t in b.values() if isinstance(t, torch.Tensor))


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v for key, value in state.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_low_memory_optimizer_works_with_accelerate(name: str) -> None:
    from accelerate import Accelerator

    plain, wrapped = Net(BF16), Net(BF16)
    reference = make_optimizer(plain, name, stochastic_rounding=True, in_backward=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(wrapped, make_optimizer(wrapped, name, stochastic_rounding=True, in_backward=True))
    assert isinstance(optimizer.optimizer, LowMemory)
    torch.manual_seed(5)
    train_steps(plain, reference, range(1, 4))
    torch.manual_seed(5)
    for step in range(1, 4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        accelerator.backward(loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert equal(plain, wrapped)
    assert optimizer.optimizer.grad_norm() == reference.grad_norm() > 0


# --- bytes


def _state_bytes(optimizer: Any) -> int:
    tensors = [t for s in optimizer.state_dict()["state"].values() for t in _flat(s).values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())  # 8-bit tables are shared


@pytest.mark.parametrize(("name", "dtype", "rounded", "in_backward"), COMBINATIONS)
def test_estimated_bytes_are_those_in_use(name: str, dtype: torch.dtype, rounded: bool, in_backward: bool) -> None:
    options = {"stochastic_rounding": rounded, "in_backward": in_backward}
    model = Net(dtype)
    optimizer = make_optimizer(model, name, **options)
    (loss_of(model, 1) + model.unused.float().sum()).backward()
    memory = memory_of(model.parameters(), name=name, **options)
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert memory["states"] == _state_bytes(optimizer)
    assert memory == memory_of([p.to("meta") for p in model.parameters()], name=name, **options)
    # large matrices have these bytes per parameter
    large = [torch.empty(4096, 4096, dtype=dtype, device="meta")]
    per_parameter = bytes_per_parameter(name, dtype=dtype, **options)
    for key, value in memory_of(large, name=name, **options).items():
        if key != "temporary":
            assert value / 4096**2 == pytest.approx(per_parameter[key], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("in_backward", [False, True])
def test_estimated_temporary_bytes_are_the_measured_peak(monkeypatch: pytest.MonkeyPatch, in_backward: bool) -> None:
    """The peak of an update through a float32 copy, measured at the inner optimizer's step."""
    monkeypatch.setattr(low_memory, "ROUNDED", 1 << 12)
    model = nn.Linear(256, 256, bias=False).to(BF16)
    optimizer = make_optimizer(model, stochastic_rounding=True, in_backward=in_backward)
    expected = memory_of(model.parameters(), name="adamw", stochastic_rounding=True, in_backward=in_backward)["temporary"]
    n = 256 * 256
    measured = []
    inner_step = optimizer.inner.step

    def step() -> None:
        shadow = optimizer.inner.param_groups[0]["params"][0]
        measured.append(
            shadow.nbytes
            + shadow.grad.nbytes
            + (model.weight.grad.nbytes if in_backward and model.weight.grad is not None else 0)
        )
        inner_step()

    monkeypatch.setattr(optimizer.inner, "step", step)
    model(torch.randn(3, 256).to(BF16)).float().sum().backward()
    optimizer.step()
    assert measured == [8 * n] == [expected]
    assert all(shadow.numel() == 0 and shadow.grad is None for shadow in optimizer._shadow.values())
    assert memory_of(model.parameters(), name="adamw", in_backward=in_backward)["temporary"] == (2 * n if in_backward else 0)


def test_bytes_per_parameter_of_fp32_adam_and_all_low_memory_options() -> None:
    """fp32 Adam takes 16 bytes a parameter, all low-memory options together 4.03."""
    fp32_adam = bytes_per_parameter("adamw", dtype=FP32)
    all_options = bytes_per_parameter("adamw_8bit", dtype=BF16, stochastic_rounding=True, in_backward=True)
    assert fp32_adam["weights"] + fp32_adam["gradients"] + fp32_adam["states"] == 16
    assert all_options["weights"] + all_options["gradients"] + all_options["states"] == pytest.approx(4.03125)
    with pytest.raises(ValueError, match="sgd"):
        bytes_per_parameter("sgd", dtype=FP32)


# --- notes and errors


def test_options_without_effect_give_a_note() -> None:
    model = Net()
    named = dict(model.named_parameters())
    optimizer, note = build(named, name="paged_adamw_8bit", **OPTIONS, stochastic_rounding=True)
    assert note is not None
    assert "no pages to move" in note
    assert "no trained weight is bfloat16" in note
    assert not isinstance(optimizer, LowMemory)
    assert build(named, name="adamw", **OPTIONS)[1] is None


def test_float16_rounding_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="bfloat16"):
        make_optimizer(Net(torch.float16), stochastic_rounding=True)
    monkeypatch.setattr(optim, "world_size", lambda: 2)
    make_optimizer(Net())
    for option in ("stochastic_rounding", "in_backward"):
        with pytest.raises(UserError, match="one process"):
            make_optimizer(Net(BF16), **{option: True})


def test_refusals_name_the_key_the_reason_and_a_way_out() -> None:
    """All refusals come at once, from plain values, so they can be checked before a model is loaded."""
    refused = refusals("adamw_8bit", stochastic_rounding=True, in_backward=True, world_size=2, sharded=True)
    assert [refusal.key for refusal in refused] == ["train.optimizer_in_backward", "train.stochastic_rounding", "train.optimizer"]
    assert [refusal.got for refusal in refused] == ["2 processes", "2 processes", "adamw_8bit with run.parallel=fsdp"]
    assert all(refusal.why and refusal.hint for refusal in refused)
    assert refusals("adamw", world_size=2, sharded=True) == refusals("adamw_8bit", world_size=2) == []
    assert refusals("adamw", stochastic_rounding=True, dtypes={"a": BF16, "b": torch.float16})[0].key.endswith(": b")


def test_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusals("adamw") == []
    with pytest.raises(UserError, match="needs bitsandbytes"):
        make_optimizer(Net(), "adamw_8bit")


# --- the table of optimizers, and parameter groups with their own rates


def test_recipe_offers_every_optimizer() -> None:
    from finetune.recipe import Train

    assert typing.get_args(Train.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)


def test_new_optimizer_needs_only_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row with its own parameter groups is built, stepped, saved and counted like the others."""

    def groups(parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> Any:
        large = [p for name, p in parameters.items() if name == "large.weight"]
        rest = [p for name, p in parameters.items() if name != "large.weight"]
        return [{"params": large, "lr": 16 * lr, "weight_decay": 0.0}, {"params": rest, "lr": lr, "weight_decay": weight_decay}]

    row = OptimizerRow("sgd", lambda of, betas, eps: torch.optim.SGD(of, momentum=betas[0]), lambda size, n: size * n, groups)
    monkeypatch.setitem(OPTIMIZERS, "sgd", row)
    model = Net()
    optimizer = make_optimizer(model, "sgd")
    peaks = [(1.6e-1, 0.0), (1e-2, 0.1)]
    assert [(group["peak_lr"], group["peak_weight_decay"]) for group in optimizer.param_groups] == peaks
    assert bytes_per_parameter("sgd", dtype=FP32)["states"] == 4
    schedule = Schedule(4, 1e-2, "linear")
    for step in (1, 2):
        schedule.set_rates(optimizer.param_groups, step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.rate(2, 1.6e-1), schedule.rate(2, 1e-2)]
    snapshot = checkpoint.snapshot(model, optimizer, Progress(step=2), metrics_bytes=0, copy=False)
    loaded_optimizer = make_optimizer(loaded := Net(seed=1), "sgd")
    checkpoint.load(checkpoint.write(tmp_path, snapshot, keep=1), loaded, loaded_optimizer)
    assert equal(model, loaded)
    assert [(group["peak_lr"], group["peak_weight_decay"]) for group in loaded_optimizer.param_groups] == peaks


@pytest.mark.parametrize(("name", "dtype", "rounded", "in_backward"), COMBINATIONS)
def test_peak_rates_come_from_the_recipe_not_the_checkpoint(
    tmp_path: Path, name: str, dtype: torch.dtype, rounded: bool, in_backward: bool
) -> None:
    """Checkpoints, old and new, hold no parameter groups."""
    options = {"stochastic_rounding": rounded, "in_backward": in_backward}
    optimizer = make_optimizer(model := Net(dtype), name, **options)
    train_steps(model, optimizer, range(1, 3))
    snapshot = checkpoint.snapshot(model, optimizer, Progress(step=2), metrics_bytes=0, copy=False)
    path = checkpoint.write(tmp_path, snapshot, keep=1)
    assert "peak" not in (path / "state.json").read_text()
    loaded_optimizer = make_optimizer(loaded := Net(dtype, seed=1), name, **options, lr=3e-3)
    checkpoint.load(path, loaded, loaded_optimizer)
    assert [(group["peak_lr"], group["peak_weight_decay"]) for group in loaded_optimizer.param_groups] == [
        (3e-3, 0.1),
        (3e-3, 0.0),
    ]


# --- convergence


def _train(text: torch.Tensor, dtype: torch.dtype, name: str, *, seed: int, lr: float, steps: int, **options: bool) -> float:
    """Mean loss (nats a byte) of the last 20 steps of a Llama of 0.5 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).train()
    optimizer = make_optimizer(model, name, lr=lr, **options)
    g = torch.Generator().manual_seed(seed + 1000)
    losses = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 10, 1.1 - step / steps)
        rows = torch.stack([text[at : at + 129] for at in torch.randint(0, len(text) - 129, (8,), generator=g)])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(losses[-20:]) / 20


@pytest.mark.slow
def test_low_memory_training_converges_like_float32_adam(shared: Path) -> None:
    """At a low learning rate, where updates are below bf16's last place: only stochastic rounding keeps them."""
    text = torch.frombuffer(bytearray((shared / "data/tinyshakespeare.txt").read_bytes()), dtype=torch.uint8).long()
    common: dict[str, Any] = {"seed": 0, "lr": 2e-4, "steps": 200}
    reference = _train(text, FP32, "adamw", **common)
    nearest = _train(text, BF16, "adamw", **common)
    rounded = _train(text, BF16, "adamw_8bit", **common, stochastic_rounding=True)
    in_backward = _train(text, BF16, "adamw_8bit", **common, stochastic_rounding=True, in_backward=True)
    assert abs(rounded - reference) < 0.02
    assert abs(in_backward - reference) < 0.02
    assert nearest - reference > 2 * abs(rounded - reference)
