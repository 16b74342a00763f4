"""What the loop does when memory runs out, numbers go wrong or a checkpoint cannot be written; which checkpoints it keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.model_state import out_of_memory
from finetune.errors import GateError, UserError
from finetune.train import checkpoint
from finetune.train.recovery import NoMemory, spike
from tests.finetune.train.test_loop import equal, go, llama, samples, without_clock

FOUR = {"micro_batch": 4, "accumulation": 2, "total": 6}


def run_out() -> None:
    """Ask for what no machine has."""
    torch.empty(1 << 50)


class Faulty:
    """A kind whose `loss` is changed: `change(step's number of the loss asked for, batch, loss)`."""

    def __init__(self, kind: Any, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        self.kind, self.change = kind, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)

    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        total, count = self.kind.loss(model, batch)
        return self.change(batch, total), count


def events(metrics: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in metrics if name in line]


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


# ----------------------------------------------------------------------------------------------------------- out of memory


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        run_out()
        return grad


def too_many(most: int, *, backward: bool = False) -> Callable[[Any], Faulty]:
    """Memory for `most` samples at once."""

    def change(batch: Any, loss: torch.Tensor) -> torch.Tensor:
        if len(batch.samples) > most:
            if backward:
                return InBackward.apply(loss)
            run_out()
        return loss

    return lambda kind: Faulty(kind, change)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("most", "parts"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_out_of_memory_gives_the_same_steps_in_smaller_parts(
    tmp_path: Path,
    accelerator: Any,
    backward: bool,
    most: int,
    parts: int,
    optimizer: str,
) -> None:
    options = FOUR | {"optimizer": optimizer}
    whole, metrics, _ = go(tmp_path / "whole", accelerator, **options)
    again, mended, figures = go(tmp_path / "again", accelerator, faults=too_many(most, backward=backward), **options)
    assert figures["split"] == parts
    told = [line["out_of_memory"]["parts"] for line in events(mended, "out_of_memory")]
    assert told == ([2] if parts == 2 else [2, 4])
    assert "allocate" in events(mended, "out_of_memory")[0]["out_of_memory"]["found"]
    assert losses(mended) == pytest.approx(losses(metrics), rel=2e-5)
    for key in ("samples", "supervised", "tokens"):
        assert [line[key] for line in mended if "loss" in line] == [line[key] for line in metrics]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4 if optimizer == "adamw" else 5e-3)


def test_dropout_goes_on_from_the_same_number_and_a_resumed_run_keeps_the_parts(tmp_path: Path, accelerator: Any) -> None:
    def from_step_three() -> Callable[[Any], Faulty]:
        asked = iter(range(1000))

        def change(batch: Any, loss: torch.Tensor) -> torch.Tensor:
            if next(asked) >= 4 and len(batch.samples) > 2:
                run_out()
            return loss

        return lambda kind: Faulty(kind, change)

    options = FOUR | {"save_steps": 4, "keep_checkpoints": 9}
    plain = go(tmp_path / "plain", accelerator, model=llama(dropout=0.2), **options)[1]
    whole, metrics, _ = go(tmp_path / "whole", accelerator, model=llama(dropout=0.2), faults=from_step_three(), **options)
    assert losses(metrics)[:2] == losses(plain)[:2]
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["split"] == 2

    def die(step: int, total: int, note: str) -> None:
        if step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path / "cut", accelerator, model=llama(dropout=0.2), faults=from_step_three(), show=die, **options)
    torch.manual_seed(999)
    again, resumed, _ = go(tmp_path / "cut", accelerator, model=llama(dropout=0.2), resume=True, **options)
    assert equal(whole, again)
    assert without_clock(metrics) == without_clock(resumed)


def test_where_one_sample_does_not_fit_the_run_stops_and_nothing_is_lost(tmp_path: Path, accelerator: Any) -> None:
    asked = iter(range(1000))

    def change(batch: Any, loss: torch.Tensor) -> torch.Tensor:
        if next(asked) >= 4:
            run_out()
        return loss

    with pytest.raises(NoMemory, match="step 3, with one sample at a time"):
        go(tmp_path / "run", accelerator, faults=lambda kind: Faulty(kind, change), save_steps=2, **FOUR)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]


def test_a_step_in_the_backward_pass_cannot_be_repeated(tmp_path: Path, accelerator: Any) -> None:
    options: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0, "save_steps": 2, "micro_batch": 4}
    with pytest.raises(NoMemory, match="optimizer_in_backward"):
        go(tmp_path / "run", accelerator, faults=too_many(2), **options)


def test_what_says_that_memory_has_run_out() -> None:
    with pytest.raises(RuntimeError) as found:
        run_out()
    assert out_of_memory(found.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tests.finetune.train.test_loop import Sample, go, llama
torch.set_num_threads(1)
accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
ids = [tuple((7 * n + i) % 97 for i in range(400)) for n in range(12)]
rows = [Sample(f"rows:{n}", row, row) for n, row in enumerate(ids)]
go(folder / "warm", accelerator, model=llama(), data=rows, total=1)
models = {"limited": llama(), "free": llama()}
inside = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for name, model in models.items():
    most = inside + (int(sys.argv[2]) << 20) if name == "limited" else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    _, metrics, figures = go(folder / name, accelerator, model=model, data=rows, micro_batch=12, total=2)
    print(figures.get("split", 1), *(f"{line['loss']:.5f}" for line in metrics if "loss" in line))
"""


def test_a_process_that_may_not_have_more_memory_trains_the_same(tmp_path: Path, repository: Path) -> None:
    """Real: the system refuses (RLIMIT_AS), in whichever operation it happens to be; then the same without a limit."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), "80"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    limited, free = (line.split() for line in done.stdout.splitlines())
    assert free[0] == "1"
    assert int(limited[0]) > 1
    assert [float(loss) for loss in limited[1:]] == pytest.approx([float(loss) for loss in free[1:]], abs=2e-4)


def test_evaluation_and_generation_do_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval import perplexity
    from eval.generation import _complete_answer, _options

    model = llama().eval()
    rows = [(list(sample.input_ids), list(sample.labels)) for sample in samples(9)]
    free = perplexity.evaluate_loss(model, rows)
    whole, sizes = perplexity._losses, []

    def limited(model: Any, some: Any, *rest: Any) -> Any:
        sizes.append(len(some))
        if len(some) > 2:
            run_out()
        return whole(model, some, *rest)

    monkeypatch.setattr(perplexity, "_losses", limited)
    less = perplexity.evaluate_loss(model, rows)
    assert sizes[0] == 9
    assert max(sizes[sizes.index(2) :]) <= 2
    assert less.row_loss_sums == pytest.approx(free.row_loss_sums, rel=1e-5)

    class Tokenizer:
        eos_token_id, pad_token_id = 99, 0

    prompt = torch.arange(300)[None] % 90
    options = _options(model, Tokenizer(), 6, 0.0, 1.0)
    expected = _complete_answer(model, prompt, options)
    longest = []
    forward = type(model).forward

    def short(self: Any, *args: Any, **kwargs: Any) -> Any:
        longest.append(kwargs["input_ids"].shape[1])
        if longest[-1] > 128:
            run_out()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", short)
    assert torch.equal(_complete_answer(model, prompt, options), expected)
    assert longest[0] == 300
    assert max(longest[1:]) == 128


# --------------------------------------------------------------------------------------------------------------- bad steps


def at_losses(numbers: set[int], factor: float) -> Callable[[Any], Faulty]:
    """The n-th losses that are asked for come out `factor` times as large."""
    asked = iter(range(1000))

    def change(batch: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * factor if next(asked) in numbers else loss

    return lambda kind: Faulty(kind, change)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_its_samples_are_written_down(tmp_path: Path, accelerator: Any, factor: float) -> None:
    plain = go(tmp_path / "plain", accelerator, total=6)[1]
    _, metrics, figures = go(tmp_path / "run", accelerator, total=6, faults=at_losses({2, 4}, factor))
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert losses(metrics)[:2] == losses(plain)[:2]
    assert all(map(math.isfinite, losses(metrics)))
    skipped = events(metrics, "skipped")
    assert [line["step"] for line in skipped] == [3, 4]
    assert all(len(line["skipped"]["samples"]) == 1 and line["skipped"]["samples"][0].startswith("rows:") for line in skipped)
    assert figures["bad_steps"] == 2


def test_bad_steps_are_counted_over_a_resume_and_one_too_many_stops(tmp_path: Path, accelerator: Any) -> None:
    with pytest.raises(GateError, match=r"loss of step 4 is not finite[\s\S]*rows:") as stop:
        go(tmp_path / "run", accelerator, total=6, faults=at_losses({1, 4}, math.nan), max_bad_steps=1)
    assert "max_bad_steps" in str(stop.value)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-000003"  # type: ignore[union-attr]
    with pytest.raises(GateError, match="loss of step 5"):
        go(tmp_path / "run", accelerator, total=6, resume=True, faults=at_losses({1}, math.nan), max_bad_steps=1)
    with pytest.raises(GateError, match="loss of step 1"):
        go(tmp_path / "stop", accelerator, total=6, faults=at_losses({0}, math.nan), on_bad_step="stop")


def test_going_back_by_rule_leaves_the_samples_out(tmp_path: Path, accelerator: Any) -> None:
    """Without the step inside the backward pass: the same weights as if those samples had never been there."""
    told: list[int] = []
    options: dict[str, Any] = {"total": 6, "save_steps": 2, "on_bad_step": "rollback"}
    faults = {"faults": at_losses({4}, math.nan), "went_back": told.append}
    _, metrics, figures = go(tmp_path / "run", accelerator, **faults, **options)
    assert told == [4]
    assert figures["bad_steps"] == 1
    (back,) = events(metrics, "rolled_back")
    assert (back["step"], back["rolled_back"]["from"]) == (4, 5)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_spike_is_a_bad_step(tmp_path: Path, accelerator: Any) -> None:
    assert spike(100.0, [1.0] * 15) == 0.0
    assert spike(1.2, [1.0, 1.1, 0.9, 1.05] * 5) < 8 < spike(3.0, [1.0, 1.1, 0.9, 1.05] * 5)
    assert spike(1.04, [1.0] * 20) < 8 < spike(1.2, [1.0] * 20)  # equal losses have no spread
    options: dict[str, Any] = {"total": 24, "spike": 8.0, "save_steps": 18, "keep_checkpoints": 9}
    whole, metrics, _ = go(tmp_path / "run", accelerator, faults=at_losses({20}, 40.0), **options)
    (line,) = events(metrics, "skipped")
    assert line["step"] == 21
    assert line["skipped"]["found"].startswith("loss 1")
    for newer in (19, 20, 21, 22, 23, 24):
        path = tmp_path / "run" / "checkpoints" / f"step-{newer:06d}"
        if path.exists():
            checkpoint.remove_folder(path)
    torch.manual_seed(999)
    again, resumed, _ = go(tmp_path / "run", accelerator, resume=True, faults=at_losses({2}, 40.0), **options)
    assert equal(whole, again)  # the losses before it are in the checkpoint
    assert without_clock(metrics) == without_clock(resumed)


# -------------------------------------------------------------------------------------------------------------- checkpoints


def test_the_best_checkpoint_is_written_and_stays(tmp_path: Path, accelerator: Any) -> None:
    measured = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 9: 1.2}
    options: dict[str, Any] = {"total": 9, "eval_steps": 2, "keep_checkpoints": 1, "save_best": True}
    evaluate = lambda step: {"eval_loss": measured[step]}  # noqa: E731
    _, metrics, figures = go(tmp_path / "run", accelerator, evaluate=evaluate, **options)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000004", "step-000009"]
    assert figures["best"] == {"step": 4, "loss": 1.0}
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2, 4, 6, 8, 9]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000009" / "state.json").read_text())
    assert state["best"] == {"step": 4, "loss": 1.0}


@pytest.mark.alone
def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    even: dict[str, Any] = {"schedule": "constant", "warmup": 0.0}
    plain = go(tmp_path / "plain", accelerator, total=6, **even)[0]
    begun: list[float] = []
    write, steps = checkpoint.write, []

    def slow(*args: Any, **kwargs: Any) -> Path:
        begun.append(time.monotonic())
        time.sleep(0.5)
        assert threading.current_thread() is not threading.main_thread()
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", slow)
    show = lambda step, total, note: steps.append((step, time.monotonic()))  # noqa: E731
    model, _, figures = go(tmp_path / "run", accelerator, total=6, save_steps=2, keep_checkpoints=9, show=show, **even)
    assert dict(steps)[4] < begun[0] + 0.5  # two more steps while that of step 2 was written
    assert equal(plain, model)
    for path, step in zip(checkpoint.checkpoints(tmp_path / "run" / "checkpoints"), (2, 4, 6), strict=True):
        assert checkpoint.damage(path) is None
        again = go(tmp_path / f"{step}", accelerator, total=step, **even)[0]
        loaded = llama()
        checkpoint.load_weights(path, loaded)
        assert equal(again, loaded)  # not those of the steps that were taken meanwhile
    assert figures["saving_seconds"] < 1.2


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_one_before_stands(
    tmp_path: Path,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, saved = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        if path.name == "optimizer.safetensors" and "step-000004" in str(path):
            saved.append(path)
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"disk is full[\s\S]*step-000004[\s\S]*No space left"):
        go(tmp_path / "run", accelerator, total=9, save_steps=2)
    folder = tmp_path / "run" / "checkpoints"
    assert saved
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    whole = go(tmp_path / "whole", accelerator, total=9, save_steps=2)[0]
    torch.manual_seed(999)
    assert equal(go(tmp_path / "run", accelerator, total=9, save_steps=2, resume=True)[0], whole)


def test_a_second_kind_of_name_is_no_checkpoint_and_steps_are_counted_as_numbers(tmp_path: Path) -> None:
    for name in ("step-000900", "step-1000000", "step-999999", "step-last", ".step-000901.finetune-new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000900", "step-999999", "step-1000000"]
    checkpoint.sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))
