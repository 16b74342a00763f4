"""The training loop on a tiny Llama: accumulation, packing, evaluation, and bit-equal resume after any stop."""

from __future__ import annotations

import json
import math
import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.data.packing import Batches
from finetune.data.samples import IGNORE, Sample
from finetune.errors import GateError, UserError
from finetune.recipe import Train
from finetune.run_dir import RunDir
from finetune.train import checkpoint, optim
from finetune.train.checkpoint import Progress
from finetune.train.loop import Interrupted, Training
from finetune.train.sft import SupervisedFineTuning
from finetune.train.task import steps_in

VOCABULARY = 100
WALL_CLOCK = ("tokens_per_second", "step_seconds", "memory_bytes", "time")


def llama(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).to(dtype)


def samples(count: int = 12, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(count):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length // 3
        rows.append(Sample(f"rows:{n}", tuple(ids), (*([IGNORE] * (prompt + 1)), *ids[prompt + 1 :])))
    return rows


def sft(data: list[Sample], micro_batch: int = 1, packing: bool = False, max_length: int = 32) -> SupervisedFineTuning:
    batches = Batches(data, micro_batch=micro_batch, max_length=max_length, packing=packing, seed=1)
    return SupervisedFineTuning(batches, torch.device("cpu"))


def build(model: Any, settings: Train) -> torch.optim.Optimizer:
    options = {key: getattr(settings, key) for key in ("lr", "betas", "eps", "weight_decay")}
    in_backward = {"in_backward": settings.optimizer_in_backward}
    return optim.build(checkpoint.trained(model), name=settings.optimizer, device="cpu", **options, **in_backward)[0]


def go(
    folder: Path, accelerator: Any, *, model: Any = None, data: list[Sample] | None = None, total: int = 6, resume: bool = False,
    packing: bool = False, **settings: Any,
) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    evaluate, show, faults = settings.pop("evaluate", None), settings.pop("show", None), settings.pop("faults", None)
    went_back, before_step = settings.pop("went_back", None), settings.pop("before_step", None)
    options = Train(lr=1e-2, **settings)
    model = model or llama()
    task: Any = sft(data or samples(), options.micro_batch, packing)
    task = faults(task) if faults else task
    optimizer = build(model, options)
    run, progress = RunDir(folder), Progress()
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    if resume:
        path, _ = checkpoint.newest(folder / "checkpoints")
        assert path is not None
        progress, size = checkpoint.load(path, model, optimizer)
        run.cut_metrics(size)
    figures = Training(
        model, task, options, accelerator=accelerator, optimizer=optimizer, total_steps=total, folder=run, progress=progress,
        evaluate=evaluate, show=show, went_back=went_back, before_step=before_step,
    ).run()  # fmt: skip
    return model, [json.loads(line) for line in run.metrics.read_text().splitlines()], figures


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_clock(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in metrics]


# --------------------------------------------------------------------------------------------------------------- learning


def test_loss_falls(tmp_path: Path, accelerator: Any) -> None:
    _, metrics, figures = go(tmp_path / "run", accelerator, total=40)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert figures["steps"] == 40
    assert figures["tokens"] == metrics[-1]["tokens"] > figures["supervised_tokens"] > 0
    assert figures["peak_bytes"] > 1 << 20


@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path: Path, accelerator: Any, packing: bool) -> None:
    """12 samples with different numbers of supervised tokens in one optimizer step, as 12 × 1, 4 × 3 and 1 × 12, or packed."""
    data = samples()
    reference = llama()
    losses, count = [], 0
    for sample in data:  # by definition: each sample alone, then the mean over all supervised tokens
        logits = reference(torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        count += int((labels != IGNORE).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    for micro_batch, accumulation in ((12, 1), (4, 3), (1, 12)):
        model = llama()
        task = sft(data, micro_batch, packing)
        keys = list(task.sampler(0, 0, None))
        model.zero_grad()
        gradients: dict[str, torch.Tensor] = {}

        class RecordGradients(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})  # noqa: B023

        group = {"params": [*model.parameters()], "peak_lr": 0.0, "peak_weight_decay": 0.0}
        folder = tmp_path / f"{micro_batch}"
        folder.mkdir()
        Training(
            model, task, Train(micro_batch=micro_batch, accumulation=len(keys) if packing else accumulation, max_grad_norm=0),
            accelerator=accelerator, optimizer=RecordGradients([group], lr=0.0), total_steps=1, folder=RunDir(folder),
            progress=Progress(),
        ).run()  # fmt: skip
        line = json.loads((folder / "metrics.jsonl").read_text())
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["supervised"] == count
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_during_training_does_not_change_the_model(tmp_path: Path, accelerator: Any) -> None:
    from eval.perplexity import evaluate_loss

    rows = [(list(sample.input_ids), list(sample.labels)) for sample in samples(5, seed=9)]
    steps = []

    def evaluate_with(model: Any) -> Any:
        def evaluate(step: int) -> dict[str, float]:
            steps.append(step)
            return {"eval_loss": evaluate_loss(model, rows).loss}

        return evaluate

    without_evaluation, metrics, _ = go(tmp_path / "a", accelerator, model=llama(dropout=0.2))
    with_evaluation = llama(dropout=0.2)
    _, metrics_with_evaluation, _ = go(
        tmp_path / "b", accelerator, model=with_evaluation, evaluate=evaluate_with(with_evaluation), eval_steps=2
    )
    assert steps == [2, 4]
    assert equal(without_evaluation, with_evaluation)
    assert without_clock(metrics) == [line for line in without_clock(metrics_with_evaluation) if "loss" in line]
    assert [line["step"] for line in metrics_with_evaluation if "eval_loss" in line] == [2, 4]


def test_clipping_is_by_global_norm(tmp_path: Path, accelerator: Any) -> None:
    unclipped, metrics, _ = go(tmp_path / "a", accelerator, total=1, max_grad_norm=0)
    norm = metrics[0]["grad_norm"]
    unaffected, _, _ = go(tmp_path / "b", accelerator, total=1, max_grad_norm=2 * norm)
    assert equal(unclipped, unaffected)
    clipped_model, clipped, _ = go(tmp_path / "c", accelerator, total=3, max_grad_norm=norm / 100, optimizer="adamw", eps=1.0)
    assert clipped[0]["grad_norm"] == norm
    assert not equal(unclipped, clipped_model)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, accelerator: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(GateError, match=r"loss of step 1 is not finite[\s\S]*rows:"):
        go(tmp_path / "run", accelerator, model=model)
    assert all(torch.equal(p, before[name]) or name == "model.norm.weight" for name, p in model.named_parameters())


# -------------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 4},
        {"save_steps": 3, "accumulation": 5},  # the saved step lies in the middle of an epoch, and groups span epochs
        {"save_steps": 3, "optimizer": "adamw_8bit"},
        {"save_steps": 5, "micro_batch": 2, "packing": True},
    ],
)
def test_resumed_runs_end_bit_equal(tmp_path: Path, accelerator: Any, settings: dict[str, Any]) -> None:
    options = {"model": None, "total": 9, "keep_checkpoints": 9} | settings
    uninterrupted, metrics, _ = go(tmp_path / "uninterrupted", accelerator, **options | {"model": llama(dropout=0.1)})

    def fail_at_step_7(step: int, total: int, note: str) -> None:
        if step == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path / "cut", accelerator, **options | {"model": llama(dropout=0.1), "show": fail_at_step_7})
    torch.manual_seed(999)
    resumed_model, resumed_metrics, _ = go(
        tmp_path / "cut", accelerator, **options | {"model": llama(dropout=0.1), "resume": True}
    )
    assert equal(uninterrupted, resumed_model)
    assert without_clock(metrics) == without_clock(resumed_metrics)
    for name in ("weights", "optimizer", "rng"):
        expected, actual = (
            (tmp_path / run / "checkpoints" / "step-000009" / f"{name}.safetensors").read_bytes()
            for run in ("uninterrupted", "cut")
        )
        assert expected == actual, name


class FaultyTask:
    """A task that fails at some micro-batches: `fault` is raised there, or multiplies the loss."""

    def __init__(self, task: SupervisedFineTuning, fault: Exception | float, at: tuple[int, ...]) -> None:
        self.task, self.fault, self.at, self.last_drawn = task, fault, at, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def sampler(self, epoch: int, position: int, place: Any) -> Iterator[Any]:
        for at, key in enumerate(self.task.sampler(epoch, position, place), position):
            if at in self.at and isinstance(self.fault, Exception):
                raise self.fault
            self.last_drawn = at
            yield key

    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        total, count = self.task.loss(model, batch)
        return total * self.fault if self.last_drawn in self.at and not isinstance(self.fault, Exception) else total, count


@pytest.mark.parametrize("fault", [UserError("line 9 is no row"), OSError("the hub is gone")])
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}, {"optimizer": "adamw_8bit", "optimizer_in_backward": True}])
def test_data_error_saves_finished_steps_and_resume_is_bit_equal(
    tmp_path: Path, accelerator: Any, fault: Exception, settings: dict[str, Any]
) -> None:
    if "optimizer_in_backward" in settings:
        settings = settings | {"max_grad_norm": 0}
    accumulation = settings.get("accumulation", 1)
    at = 5 * accumulation - 1  # the last micro-batch of step 5: with accumulation 2 the first one has been drawn
    uninterrupted, metrics, _ = go(tmp_path / "uninterrupted", accelerator, model=llama(dropout=0.2), **settings)
    with pytest.raises(type(fault), match=str(fault)):
        go(
            tmp_path / "cut",
            accelerator,
            model=llama(dropout=0.2),
            faults=lambda task: FaultyTask(task, fault, (at,)),
            **settings,
        )
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")]
    assert names[-1] == "step-000004"
    torch.manual_seed(999)
    resumed_model, resumed_metrics, _ = go(tmp_path / "cut", accelerator, model=llama(dropout=0.2), resume=True, **settings)
    assert equal(uninterrupted, resumed_model)
    assert without_clock(metrics) == without_clock(resumed_metrics)


def test_error_before_any_step_or_just_after_a_checkpoint_saves_nothing(tmp_path: Path, accelerator: Any) -> None:
    for position, expected in ((0, []), (3, ["step-000003"])):
        run = tmp_path / str(position)
        with pytest.raises(OSError, match="gone"):
            go(run, accelerator, save_steps=3, faults=lambda task: FaultyTask(task, OSError("gone"), (position,)))  # noqa: B023
        assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")] == expected


def test_rollback_skips_each_bad_micro_batch_once_and_logs_it(tmp_path: Path, accelerator: Any) -> None:
    rollbacks: list[int] = []
    started_steps: list[int] = []
    options: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0, "save_steps": 2, "total": 6}
    _, metrics, figures = go(
        tmp_path / "run", accelerator, faults=lambda task: FaultyTask(task, math.nan, (2, 5)), went_back=rollbacks.append,
        before_step=started_steps.append, **options,
    )  # fmt: skip
    assert rollbacks == [2, 4]  # position 2 is step 3; without it position 5 is step 5
    assert started_steps == [1, 2, 3, 3, 4, 5, 5, 6]
    assert figures["bad_steps"] == 2
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["bad"] == [[0, 2], [0, 5]]
    rollback_lines = [line["rolled_back"] for line in metrics if "rolled_back" in line]
    assert [line["from"] for line in rollback_lines] == [3, 5]
    assert all(line["found"] == "loss nan, gradient norm nan" for line in rollback_lines)  # not the norm of an earlier step
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_all_bad_micro_batches_after_one_checkpoint_are_skipped(tmp_path: Path, accelerator: Any) -> None:
    """Both rollbacks go to step 0; the second must still skip the first bad micro-batch, and count it once."""
    options: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0, "save_steps": 6, "total": 6}
    rollbacks: list[int] = []
    faults = {"faults": lambda task: FaultyTask(task, math.nan, (1, 3)), "went_back": rollbacks.append}
    _, _, figures = go(tmp_path / "run", accelerator, **faults, **options)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert rollbacks == [0, 0]
    assert state["bad"] == [[0, 1], [0, 3]]
    assert figures["bad_steps"] == 2


def test_ctrl_c_finishes_the_step_and_resume_is_bit_equal(tmp_path: Path, accelerator: Any) -> None:
    uninterrupted, _, _ = go(tmp_path / "uninterrupted", accelerator)
    handler = signal.getsignal(signal.SIGINT)  # background jobs start with SIGINT ignored

    def interrupt(step: int, total: int, note: str) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        go(tmp_path / "cut", accelerator, show=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed_model, _, _ = go(tmp_path / "cut", accelerator, resume=True)
    assert equal(uninterrupted, resumed_model)


def test_keep_checkpoints_is_obeyed_and_damage_is_found(tmp_path: Path, accelerator: Any) -> None:
    go(tmp_path / "run", accelerator, total=6, save_steps=1, keep_checkpoints=3)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-000004", "step-000005", "step-000006"]
    assert checkpoint.newest(folder) == (folder / "step-000006", [])
    weights = folder / "step-000006" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folder / "step-000005" / "optimizer.safetensors").write_bytes(b"short")
    path, notes = checkpoint.newest(folder)
    assert path == folder / "step-000004"
    assert "SHA-256" in notes[0]
    assert "bytes instead of" in notes[1]
    (folder / "step-000004" / "manifest.json").write_text("[]")
    assert checkpoint.newest(folder)[0] is None


def test_damaged_checkpoint_does_not_displace_a_good_one(tmp_path: Path, accelerator: Any) -> None:
    folder = tmp_path / "run" / "checkpoints"
    go(tmp_path / "run", accelerator, total=4, save_steps=1, keep_checkpoints=2)
    (folder / "step-000004" / "weights.safetensors").write_bytes(b"")
    path, _ = checkpoint.newest(folder)
    assert path == folder / "step-000003"
    model, settings = llama(), Train(lr=1e-2)
    optimizer = build(model, settings)
    progress, _ = checkpoint.load(path, model, optimizer)
    checkpoint.write(folder, checkpoint.snapshot(model, optimizer, progress, metrics_bytes=0, copy=False), keep=1)
    assert [kept.name for kept in checkpoint.checkpoints(folder)] == ["step-000003"]
    assert checkpoint.newest(folder)[0] is not None


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, accelerator: Any) -> None:
    go(tmp_path / "run", accelerator, total=1)
    with pytest.raises(UserError, match="a different model"):
        checkpoint.load_weights(tmp_path / "run" / "checkpoints" / "step-000001", torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="a different model"):
        checkpoint.load_weights(tmp_path / "run" / "checkpoints" / "step-000001", llama(dtype=torch.bfloat16))


# --------------------------------------------------------------------------------------------------------------- counting


def test_steps_are_counted_over_epochs() -> None:
    task = sft(samples(10))
    assert steps_in(task, epochs=1, accumulation=1, max_steps=None) == 10
    assert steps_in(task, epochs=1, accumulation=4, max_steps=None) == 3
    assert steps_in(task, epochs=2.5, accumulation=5, max_steps=None) == 5
    assert steps_in(task, epochs=0.01, accumulation=8, max_steps=None) == 1
    assert steps_in(task, epochs=3, accumulation=1, max_steps=7) == 7


def test_vectors_have_no_weight_decay() -> None:
    model = llama()
    optimizer = build(model, Train(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in model.parameters() if p.ndim == 1} == {0.0}
    assert {decays[id(p)] for p in model.parameters() if p.ndim == 2} == {0.1}


def test_gradients_of_a_step_are_freed_before_the_next_step(tmp_path: Path, accelerator: Any) -> None:
    """Also the gradient of the embeddings' output, which requires grad with checkpointing (enable_input_require_grads)."""
    model = llama()
    references: list[Any] = []
    alive: list[int] = []
    model.enable_input_require_grads()
    model.get_input_embeddings().requires_grad_(False)  # its output is a leaf, which keeps its gradient
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: references.append(weakref.ref(p.grad)))

    def count_alive(step: int) -> None:
        alive.append(sum(reference() is not None for reference in references))
        references.clear()

    go(tmp_path / "run", accelerator, model=model, total=3, before_step=count_alive)
    assert alive == [0, 0, 0]
    assert len(references) > 10


def test_weights_that_are_partly_float_are_never_the_best() -> None:
    """While λ rises, a low loss is the float model's, which the run will not be."""
    training: Any = SimpleNamespace(
        settings=SimpleNamespace(save_best=True, eval_steps=1),
        total_steps=9,
        evaluate=lambda step: {"eval_loss": float(step), **({"eval_blend": 0.5} if step < 3 else {})},
        evaluating=0.0,
        progress=SimpleNamespace(best=None),
        _log=lambda step, line: None,
    )
    assert [Training._evaluate(training, step) for step in (1, 2, 3, 4)] == [False, False, True, False]
    assert training.progress.best == {"step": 3, "loss": 3.0}
