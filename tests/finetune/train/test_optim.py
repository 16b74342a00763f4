"""Optimizers for little memory: rounding by chance, the step inside the backward pass, 8-bit states, and their bytes."""

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


def make(model: nn.Module, name: str = "adamw", **more: Any) -> Any:
    return build(dict(model.named_parameters()), name=name, **(OPTIONS | more))[0]


def loss_of(model: nn.Module, step: int, rows: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(rows, 80, generator=g), torch.randint(0, 7, (rows,), generator=g)
    return F.cross_entropy(model(x.to(dtype)).float(), y)


def steps(model: nn.Module, optimizer: Any, numbers: Any) -> None:
    for step in numbers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- rounding


def test_rounding_by_chance_is_right_on_the_mean() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(60), torch.randn(20) * 1e-6, torch.randn(20) * 1e20])
    draws = 4000
    rounded = round_stochastically(values.repeat(draws, 1))
    assert rounded.dtype == BF16
    down = (values.view(torch.int32) & -65536).view(FP32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(FP32)
    assert ((rounded == down) | (rounded == up)).all()  # always one of the two neighbours
    share = (values.double() - down.double()) / (up.double() - down.double())
    seen = (rounded == up).double().mean(0)
    spread = (share * (1 - share) / draws).sqrt()
    assert ((seen - share).abs() < 5 * spread + 1e-9).all()
    assert not torch.equal(rounded[0], rounded[1])


def test_what_bfloat16_can_express_stays() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    rounded = round_stochastically(every.float())
    numbers = ~every.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), every[numbers].view(torch.int16))  # infinities and -0 too
    assert rounded[~numbers].isnan().all()
    # NaN whose upper half alone would be an infinity, or whose sum with the noise would wrap round to a number
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(FP32)
    assert round_stochastically(odd.repeat(1000)).isnan().all()


def test_the_noise_is_of_torchs_generator() -> None:
    values = torch.randn(100)
    torch.manual_seed(3)
    first = round_stochastically(values)
    torch.manual_seed(3)
    assert torch.equal(first, round_stochastically(values))


def test_small_updates_are_not_lost() -> None:
    """lr 1e-4 on weights of 1: rounding to nearest takes no step (neighbours are 0.004 away), chance takes it on the mean."""
    ends = {}
    for chance in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(20_000, dtype=BF16))
        optimizer, _ = build({"p": p}, name="adamw", **(OPTIONS | {"lr": 1e-4}), stochastic_rounding=chance)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[chance] = p.float().mean().item()
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(1 - 50 * 1e-4, abs=3e-4)


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


# --- the same arithmetic in every mode


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_step_in_the_backward_is_the_step(name: str, dtype: torch.dtype) -> None:
    plain, inside = Net(dtype), Net(dtype)
    steps(plain, make(plain, name), range(1, 6))
    optimizer = make(inside, name, in_backward=True)
    steps(inside, optimizer, range(1, 6))
    assert same(plain, inside)
    assert not same(plain, Net(dtype))
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_rounded_weights_follow_float32(name: str) -> None:
    """One step: the mean over many roundings is the float32 step from the same weights and gradients."""
    exact = Net(BF16).float()
    loss_of(exact, 1)
    gradients = [torch.randn_like(p) for p in exact.parameters()]
    reference = make(exact, name)
    for p, g in zip(exact.parameters(), gradients, strict=True):
        p.grad = g.to(BF16).float()
    reference.step()
    sums = [torch.zeros_like(p) for p in exact.parameters()]
    for seed in range(60):
        model = Net(BF16)
        optimizer = make(model, name, stochastic_rounding=True)
        torch.manual_seed(seed)
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.to(BF16)
        optimizer.step()
        for total, p in zip(sums, model.parameters(), strict=True):
            total += p.detach().float() / 60
    for total, p in zip(sums, exact.parameters(), strict=True):
        error = (total - p.detach()) / p.detach().abs().clamp(min=1e-3)
        assert error.abs().max() < 0.004  # of 2⁻⁸ at most between neighbours; the mean of 60 is far nearer
        assert error.mean().abs() < 3e-4 or p.numel() < 1000


def test_rounding_inside_the_backward_uses_the_same_noise() -> None:
    """With one parameter the order is the same, so the bits are."""
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(70, 70).to(BF16))
        optimizer, _ = build({"p": p}, name="adamw_8bit", **OPTIONS, stochastic_rounding=True, in_backward=inside)
        for _ in range(3):
            (p.float() ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_groups_are_of_the_real_parameters_and_rule() -> None:
    model = Net(BF16)
    optimizer = make(model, "adamw", stochastic_rounding=True, in_backward=True)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    before = Net(BF16)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss_of(model, 1).backward()
    assert same(model, before)  # a rate of nothing: no step
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)


# --- inside the backward pass


@pytest.mark.parametrize("rounded", [False, True])
def test_gradients_are_freed_and_their_norm_is_known(rounded: bool) -> None:
    dtype = BF16 if rounded else FP32
    model, plain = Net(dtype), Net(dtype)
    optimizer = make(model, stochastic_rounding=rounded, in_backward=True)
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
def test_a_bad_gradient_is_told_and_loaded_states_know_nothing_of_it(name: str, bad: float) -> None:
    model, untouched = Net(), Net()
    optimizer, begun = make(model, name, in_backward=True), make(untouched, name, in_backward=True)
    at_first = begun.state_dict()  # without states, as in a checkpoint before the first step
    (loss_of(model, 1) * bad).backward()
    assert not optimizer.finite()
    model.load_state_dict(untouched.state_dict())
    optimizer.load_state_dict(at_first)
    for m, o in ((model, optimizer), (untouched, begun)):
        loss_of(m, 2).backward()
        assert o.finite()
    assert same(model, untouched)


def test_a_second_backward_pass_before_the_step_is_refused() -> None:
    model = Net()
    make(model, in_backward=True)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="second gradient before step"):
        loss_of(model, 2).backward()


def test_without_its_hooks_the_parameters_are_as_they_were() -> None:
    model = Net()
    before = Net()
    make(model, in_backward=True).remove_hooks()
    loss_of(model, 1).backward()
    assert same(model, before)
    assert model.large.weight.grad is not None


def test_a_shared_weight_is_stepped_once_with_its_whole_gradient() -> None:
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(50, 16)
        optimizer = make(table, in_backward=inside)
        for _ in range(3):
            (table(torch.arange(9)) @ table.weight.t()).logsumexp(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends.append(table.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_activation_checkpoints(checkpointing: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make(model, in_backward=inside)
        for step in range(3):
            ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("dtype", "rounded", "inside"), list(itertools.product((FP32, BF16), (False, True), (False, True))))
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_kept_ternary_codes_are_of_the_weights_after_the_step(name: str, dtype: torch.dtype, rounded: bool, inside: bool) -> None:
    from quant import BitLinear

    torch.manual_seed(0)
    layer = BitLinear.from_linear(nn.Linear(64, 128, bias=False).to(dtype))
    optimizer = make(layer, name, lr=0.1, stochastic_rounding=rounded, in_backward=inside)
    x = torch.randn(4, 64).to(dtype)
    for _ in range(3):
        before = layer(x)
        before.float().pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        fresh = BitLinear.from_linear(nn.Linear(64, 128, bias=False).to(dtype))
        with torch.no_grad():
            fresh.weight.copy_(layer.weight)
        assert torch.equal(layer(x), fresh(x))
        assert not torch.equal(layer(x), before)


# --- saved and restored


@pytest.mark.parametrize(("name", "dtype", "rounded", "inside"), COMBINATIONS)
def test_a_checkpoint_brings_back_every_bit(tmp_path: Path, name: str, dtype: torch.dtype, rounded: bool, inside: bool) -> None:
    options = {"stochastic_rounding": rounded, "in_backward": inside}
    model = Net(dtype)
    optimizer = make(model, name, **options)
    steps(model, optimizer, range(1, 4))
    path = checkpoint.write(
        tmp_path, checkpoint.snapshot(model, optimizer, Progress(step=3), metrics_bytes=0, copy=False), keep=2
    )
    steps(model, optimizer, range(4, 7))
    again = Net(dtype, seed=1)
    other = make(again, name, **options)
    torch.manual_seed(99)
    assert checkpoint.load(path, again, other)[0].step == 3
    steps(again, other, range(4, 7))
    assert same(model, again)
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key in mine:
        a, b = _flat(mine[key]), _flat(theirs[key])
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        if rounded and dtype == BF16:
            assert all(t.dtype in (FP32, torch.uint8) for t in b.values() if isinstance(t, torch.Tensor))


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v for key, value in state.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_accelerate_takes_it(name: str) -> None:
    from accelerate import Accelerator

    plain, wrapped = Net(BF16), Net(BF16)
    reference = make(plain, name, stochastic_rounding=True, in_backward=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(wrapped, make(wrapped, name, stochastic_rounding=True, in_backward=True))
    assert isinstance(optimizer.optimizer, LowMemory)
    torch.manual_seed(5)
    steps(plain, reference, range(1, 4))
    torch.manual_seed(5)
    for step in range(1, 4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        accelerator.backward(loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert same(plain, wrapped)
    assert optimizer.optimizer.grad_norm() == reference.grad_norm() > 0


# --- bytes


def _states(optimizer: Any) -> int:
    tensors = [t for s in optimizer.state_dict()["state"].values() for t in _flat(s).values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())  # 8-bit tables are shared


@pytest.mark.parametrize(("name", "dtype", "rounded", "inside"), COMBINATIONS)
def test_the_bytes_told_are_those_taken(name: str, dtype: torch.dtype, rounded: bool, inside: bool) -> None:
    options = {"stochastic_rounding": rounded, "in_backward": inside}
    model = Net(dtype)
    optimizer = make(model, name, **options)
    (loss_of(model, 1) + model.unused.float().sum()).backward()
    told = memory_of(model.parameters(), name=name, **options)
    assert told["weights"] == sum(p.nbytes for p in model.parameters())
    assert told["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert told["states"] == _states(optimizer)
    assert told == memory_of([p.to("meta") for p in model.parameters()], name=name, **options)
    # a large matrix: the same by parameter
    large = [torch.empty(4096, 4096, dtype=dtype, device="meta")]
    by_one = bytes_per_parameter(name, dtype=dtype, **options)
    for key, value in memory_of(large, name=name, **options).items():
        if key != "temporary":
            assert value / 4096**2 == pytest.approx(by_one[key], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_temporary_bytes(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """The peak of an update through a float32 copy, followed at the two places where it can be."""
    monkeypatch.setattr(low_memory, "ROUNDED", 1 << 12)
    model = nn.Linear(256, 256, bias=False).to(BF16)
    optimizer = make(model, stochastic_rounding=True, in_backward=inside)
    told = memory_of(model.parameters(), name="adamw", stochastic_rounding=True, in_backward=inside)["temporary"]
    n = 256 * 256
    seen = []
    inner = optimizer.inner.step

    def step() -> None:
        shadow = optimizer.inner.param_groups[0]["params"][0]
        seen.append(
            shadow.nbytes + shadow.grad.nbytes + (model.weight.grad.nbytes if inside and model.weight.grad is not None else 0)
        )
        inner()

    monkeypatch.setattr(optimizer.inner, "step", step)
    model(torch.randn(3, 256).to(BF16)).float().sum().backward()
    optimizer.step()
    assert seen == [8 * n] == [told]
    assert all(shadow.numel() == 0 and shadow.grad is None for shadow in optimizer._shadow.values())
    assert memory_of(model.parameters(), name="adamw", in_backward=inside)["temporary"] == (2 * n if inside else 0)


def test_bytes_of_nanochats_1_9_billion() -> None:
    """What the low-memory options are for: fp32 Adam takes 16 bytes a parameter, all options together 4.03."""
    plain = bytes_per_parameter("adamw", dtype=FP32)
    little = bytes_per_parameter("adamw_8bit", dtype=BF16, stochastic_rounding=True, in_backward=True)
    assert plain["weights"] + plain["gradients"] + plain["states"] == 16
    assert little["weights"] + little["gradients"] + little["states"] == pytest.approx(4.03125)
    with pytest.raises(ValueError, match="sgd"):
        bytes_per_parameter("sgd", dtype=FP32)


# --- notes and mistakes


def test_notes() -> None:
    model = Net()
    named = dict(model.named_parameters())
    optimizer, note = build(named, name="paged_adamw_8bit", **OPTIONS, stochastic_rounding=True)
    assert note is not None
    assert "no pages to move" in note
    assert "no trained weight is bfloat16" in note
    assert not isinstance(optimizer, LowMemory)
    assert build(named, name="adamw", **OPTIONS)[1] is None


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="bfloat16"):
        make(Net(torch.float16), stochastic_rounding=True)
    monkeypatch.setattr(optim, "world_size", lambda: 2)
    make(Net())
    for option in ("stochastic_rounding", "in_backward"):
        with pytest.raises(UserError, match="one process"):
            make(Net(BF16), **{option: True})


def test_refusals_name_the_key_the_reason_and_a_way_out() -> None:
    """All at once, from plain values: the same before anything is loaded and over the parameters of a model."""
    found = refusals("adamw_8bit", stochastic_rounding=True, in_backward=True, world_size=2, sharded=True)
    assert [refusal.key for refusal in found] == ["train.optimizer_in_backward", "train.stochastic_rounding", "train.optimizer"]
    assert [refusal.got for refusal in found] == ["2 processes", "2 processes", "adamw_8bit with run.parallel=fsdp"]
    assert all(refusal.why and refusal.hint for refusal in found)
    assert refusals("adamw", world_size=2, sharded=True) == refusals("adamw_8bit", world_size=2) == []
    assert refusals("adamw", stochastic_rounding=True, dtypes={"a": BF16, "b": torch.float16})[0].key.endswith(": b")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusals("adamw") == []
    with pytest.raises(UserError, match="needs bitsandbytes"):
        make(Net(), "adamw_8bit")


# --- rows, and the groups' own rates


def test_the_recipe_offers_every_row() -> None:
    from finetune.recipe import Train

    assert typing.get_args(Train.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)


def test_a_row_is_all_that_a_new_optimizer_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Groups of its own, each with its own peak rate and decay; built, stepped, refused, saved and counted like the others."""

    def groups(parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> Any:
        large = [p for name, p in parameters.items() if name == "large.weight"]
        rest = [p for name, p in parameters.items() if name != "large.weight"]
        return [{"params": large, "lr": 16 * lr, "weight_decay": 0.0}, {"params": rest, "lr": lr, "weight_decay": weight_decay}]

    row = OptimizerRow("sgd", lambda of, betas, eps: torch.optim.SGD(of, momentum=betas[0]), lambda size, n: size * n, groups)
    monkeypatch.setitem(OPTIMIZERS, "sgd", row)
    model = Net()
    optimizer = make(model, "sgd")
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
    taken = checkpoint.snapshot(model, optimizer, Progress(step=2), metrics_bytes=0, copy=False)
    other = make(again := Net(seed=1), "sgd")
    checkpoint.load(checkpoint.write(tmp_path, taken, keep=1), again, other)
    assert same(model, again)
    assert [(group["peak_lr"], group["peak_weight_decay"]) for group in other.param_groups] == peaks


@pytest.mark.parametrize(("name", "dtype", "rounded", "inside"), COMBINATIONS)
def test_peaks_are_of_the_recipe_and_not_of_the_checkpoint(
    tmp_path: Path, name: str, dtype: torch.dtype, rounded: bool, inside: bool
) -> None:
    """Checkpoints hold no groups, neither older ones nor those of today."""
    options = {"stochastic_rounding": rounded, "in_backward": inside}
    optimizer = make(model := Net(dtype), name, **options)
    steps(model, optimizer, range(1, 3))
    taken = checkpoint.snapshot(model, optimizer, Progress(step=2), metrics_bytes=0, copy=False)
    path = checkpoint.write(tmp_path, taken, keep=1)
    assert "peak" not in (path / "state.json").read_text()
    other = make(again := Net(dtype, seed=1), name, **options, lr=3e-3)
    checkpoint.load(path, again, other)
    assert [(group["peak_lr"], group["peak_weight_decay"]) for group in other.param_groups] == [(3e-3, 0.1), (3e-3, 0.0)]


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
    optimizer = make(model, name, lr=lr, **options)
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
def test_convergence_against_float32_adam(shared: Path) -> None:
    """At a low learning rate, where updates fall below bf16's last place: chance keeps them, rounding to nearest loses them."""
    text = torch.frombuffer(bytearray((shared / "data/tinyshakespeare.txt").read_bytes()), dtype=torch.uint8).long()
    common: dict[str, Any] = {"seed": 0, "lr": 2e-4, "steps": 200}
    reference = _train(text, FP32, "adamw", **common)
    nearest = _train(text, BF16, "adamw", **common)
    rounded = _train(text, BF16, "adamw_8bit", **common, stochastic_rounding=True)
    inside = _train(text, BF16, "adamw_8bit", **common, stochastic_rounding=True, in_backward=True)
    assert abs(rounded - reference) < 0.02
    assert abs(inside - reference) < 0.02
    assert nearest - reference > 2 * abs(rounded - reference)
