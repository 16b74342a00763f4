"""ddp and fsdp in two processes train like one process; and how the launcher starts, stops and kills its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import processes
from finetune.errors import UserError
from finetune.recipe import read_recipe
from finetune.train import parallel
from tests.conftest import Terminal
from tests.finetune.train.dealt import cases
from tests.support.starts import run_together

REPOSITORY = Path(__file__).parents[3]
FAST_CASES, ALL_CASES = ([" ".join(map(str, case)) for case in cases(every)] for every in (False, True))
SLOW_CASES = [pytest.param(case, marks=pytest.mark.slow) for case in ALL_CASES if case not in FAST_CASES]
# Variables that `accelerate launch --use_fsdp --mixed_precision bf16` sets. They must have no effect.
ACCELERATE_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The figures that dealt.py computed in two processes: of all cases if a slow test was selected, else of the fast ones."""
    slow = any(item.get_closest_marker("slow") and item.module is request.module for item in request.session.items)
    folder = tmp_path_factory.mktemp("dealt")
    file, environment = folder / "results.json", ACCELERATE_ENVIRONMENT | ({"EVERY_CASE": "1"} if slow else {})
    run_together(Path(__file__).with_name("dealt.py"), [str(file)], folder, environment=environment)
    return json.loads(file.read_text())


@pytest.mark.alone
@pytest.mark.parametrize("case", [*FAST_CASES, *SLOW_CASES])
def test_two_processes_train_like_one(results: Any, case: str) -> None:
    """Against sums in the order of two processes the results are bit-equal. Against sums in sequence ("row") they are not: fp32
    rounds at 2⁻²⁴ ≈ 6e-8, and Adam normalizes gradients, so that small ones, mostly rounding, move weights as large ones do.
    The gradient norm under fsdp is summed over shards and differs by a few roundings."""
    figures, in_sequence = results[case], "row" in case
    assert figures["losses"] <= (1e-6 if in_sequence else 0.0)
    assert figures["evaluated"] <= (1e-6 if in_sequence else 0.0)
    assert figures["weights"] <= (1e-5 if in_sequence else 0.0)
    assert figures["states"] <= (2e-4 if in_sequence else 0.0)
    assert figures["norms"] <= (1e-4 if in_sequence else 1e-6 if "fsdp" in case else 0.0)
    assert figures["said"]
    assert figures["agree"]
    assert figures["moved"] > 0.01
    experts = "experts" in case or "masters" in case
    assert (figures["uneven"] > 0) == experts, "gradients from the other process alone must occur in the expert cases only"
    assert (figures["untouched"] > 0) == ("experts" in case), "experts without any token must occur in this case only"


@pytest.mark.alone
@pytest.mark.parametrize("case", [case for case in [*FAST_CASES, *SLOW_CASES] if "fsdp" in str(case)])
def test_fsdp_shards_half_of_the_layers_and_restores_them(results: Any, case: str) -> None:
    figures = results[case]
    assert figures["share of codes"] == figures["share of floats"] == 0.5
    assert figures["kept"] == 0
    assert figures["round"]
    assert figures["restored"]
    assert figures["restored evaluated"] <= (1e-6 if "row" in case else 0.0)


@pytest.mark.alone
def test_collectives_between_two_processes(results: Any) -> None:
    outputs = results["words"]
    assert outputs["total"] == [3.0, 1.0]
    assert outputs["any"] == [True, False]
    assert outputs["share"] == {"from": 0, "what": [1, None, "x"]}
    assert outputs["uneven"] == [[1.0] * 3, [2.0] * 5, None]
    assert outputs["buckets"]
    assert "adamw" in outputs["8bit"]
    assert "ddp" in outputs["8bit"]


def test_collectives_in_one_process_do_nothing_or_return_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ACCELERATE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert parallel.init_distributed("cpu") == torch.device("cpu")
    assert not any(f"ACCELERATE_{name}" in os.environ for name in parallel.ACCELERATE)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    parameters = [p, torch.nn.Parameter(torch.ones(2))]
    parallel.sum_gradients(parameters)
    assert parallel.grad_norm(parameters) == 5.0
    parallel.scale_gradients(parameters, 0.5)
    assert p.grad.tolist() == [1.5, 0.0, 2.0]
    assert parameters[1].grad is None
    assert parallel.all_reduce_sum([0.1, 2]) == [0.1, 2]
    assert parallel.any_rank(True)
    assert not parallel.any_rank(False)
    assert parallel.broadcast_object({"a": 1}) == {"a": 1}
    parallel.put(p, torch.arange(3.0))
    assert parallel.full_tensor(p).tolist() == [0.0, 1.0, 2.0]
    assert parallel.like(p, torch.zeros(3)).tolist() == [0.0] * 3
    model = torch.nn.Linear(2, 2)
    parallel.shard(model, torch.device("cpu"))
    parallel.idle(model)
    parallel.restore(model)
    assert not parallel.is_sharded(model)
    assert dict(parallel.named_modules(model)) == {"": model}
    parallel.wait()
    parallel.shutdown()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="fewer GPUs"):
        parallel.init_distributed("cuda")


def test_fsdp_with_offloaded_layers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: x/y}\ndata: {path: rows.jsonl}\n")
    assert read_recipe(file).run.parallel == "ddp"
    assert read_recipe(file, ["run.parallel=fsdp"]).run.parallel == "fsdp"
    with pytest.raises(UserError, match=r"run\.parallel"):
        read_recipe(file, ["run.parallel=fsdp", "model.offload_layers=memory", "train.checkpointing=true"])


# ------------------------------------------------------------------------------------------------------------- processes


def launch(program: str, *, count: int = 2, setup: str = "") -> subprocess.Popen[str]:
    """Start a launcher of `count` processes that run `program`. It exits with their exit code."""
    hang_up = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # nohup ignores it, and the tests may run under nohup
    launcher = f"import signal, sys\nfrom finetune import processes\n{hang_up}\n{setup}\n" + (
        f"sys.exit(processes.start([sys.executable, '-c', {program!r}], {count}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", launcher],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_exit(process: subprocess.Popen[str], *, within: float = 30) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], *, within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.alone
def test_processes_get_torchrun_variables_and_only_rank_0_prints() -> None:
    child = "import json, os, sys; print(json.dumps(dict(os.environ))); print('aside', file=sys.stderr)"
    code, out, err = wait_for_exit(launch(child, count=3))
    assert code == 0
    assert err == "aside\n"
    assert len(out.splitlines()) == 1
    environment = json.loads(out)
    cores = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert environment.items() >= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": cores,
    }.items()  # fmt: skip
    assert int(environment["MASTER_PORT"]) > 0


def test_rank_and_world_size_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.world_size(), processes.local_rank(), processes.is_main_process()) == (0, 1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "8")  # without RANK, as a cluster may set it
    assert processes.world_size() == 1
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (processes.rank(), processes.world_size(), processes.local_rank(), processes.is_main_process()) == (3, 8, 1, False)


@pytest.mark.alone
def test_failing_process_ends_the_others(tmp_path: Path) -> None:
    child = f"""
import os, sys, time
rank = os.environ["RANK"]
open({str(tmp_path)!r} + "/" + rank, "w").write(str(os.getpid()))
if rank == "1":
    print("the gate is shut", file=sys.stderr)
    sys.exit(3)
time.sleep(600)
"""
    code, out, err = wait_for_exit(launch(child, count=3))
    assert code == 3
    assert out == ""
    assert err == "process 1 of 3 failed:\nthe gate is shut\n"
    assert not any(is_alive(int((tmp_path / str(rank)).read_text())) for rank in range(3))


@pytest.mark.alone
def test_killed_process_is_reported_with_its_signal() -> None:
    child = "import os, signal, time\nos.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(600)"
    code, _, err = wait_for_exit(launch(child))
    assert code == 137
    assert "process 1 of 2 was killed by SIGKILL, possibly out of memory" in err


@pytest.mark.alone
def test_exit_code_of_a_user_error_wins_over_a_lost_connection() -> None:
    """Process 0 raised a UserError and exits slowly. Process 1 noticed the lost connection and exits first with code 1."""
    child = "import os, sys, time\nfirst = os.environ['RANK'] == '0'\ntime.sleep(0.3 * first)\nsys.exit(2 if first else 1)"
    code, _, err = wait_for_exit(launch(child))
    assert code == 2
    assert err == ""


@pytest.mark.alone
def test_process_that_ignores_sigterm_is_killed() -> None:
    child = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5)\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)"
    )
    code, _, err = wait_for_exit(launch(child, setup="processes.SETTLE_S = processes.GRACE_S = 0.3"))
    assert code == 7
    assert "process 1 of 2 failed" in err


SIGNAL_RECORDER = """
import os, signal, sys, time
file = open({folder!r} + "/" + os.environ["RANK"], "w")
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, frame: got.append(n))
print(os.getpid(), file=file, flush=True)
while not got:
    time.sleep(0.02)
time.sleep({saving})
print([signal.Signals(n).name for n in got], file=file, flush=True)
sys.exit(130)
"""


def all_started(folder: Path, count: int = 2) -> bool:
    return all((folder / str(n)).exists() and (folder / str(n)).read_text().endswith("\n") for n in range(count))


@pytest.mark.alone
@pytest.mark.parametrize(("sent", "got"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_signal_is_passed_on_exactly_once(tmp_path: Path, sent: str, got: str) -> None:
    process = launch(SIGNAL_RECORDER.format(folder=str(tmp_path), saving=0.5))
    wait_until(lambda: all_started(tmp_path))
    os.killpg(process.pid, signal.Signals[sent])  # as a terminal does to its foreground process group
    code, _, err = wait_for_exit(process)
    assert code == 130
    assert err == ""
    assert [(tmp_path / str(n)).read_text().splitlines()[1] for n in range(2)] == [f"['{got}']"] * 2


@pytest.mark.alone
def test_second_signal_kills_all_processes(tmp_path: Path) -> None:
    process = launch(SIGNAL_RECORDER.format(folder=str(tmp_path), saving=600))
    wait_until(lambda: all_started(tmp_path))
    children = [int((tmp_path / str(n)).read_text()) for n in range(2)]
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    assert all(map(is_alive, children))
    process.send_signal(signal.SIGINT)
    code, _, _ = wait_for_exit(process)
    assert code == 130
    assert not any(map(is_alive, children))


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_processes_exit_when_their_launcher_is_killed(tmp_path: Path) -> None:
    process = launch(SIGNAL_RECORDER.format(folder=str(tmp_path), saving=600))
    wait_until(lambda: all_started(tmp_path))
    children = [int((tmp_path / str(n)).read_text()) for n in range(2)]
    process.kill()
    wait_for_exit(process)
    wait_until(lambda: not any(map(is_alive, children)))


def test_run_starts_its_processes_with_its_own_arguments(
    finetune: Terminal, tmp_path: Path, rows_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_model}}}\ndata: {{path: {rows_file}}}\n")
    program = tmp_path / "python"  # stands in for the interpreter and records its arguments
    program.write_text(f'#!/bin/sh\necho "$RANK of $WORLD_SIZE: $*" >> {tmp_path}/$RANK\nexit 3\n')
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        code, _, _ = finetune("run", str(recipe), "train.max_steps=1", "--processes", "2", "--force", "--resume")
    assert code == 3
    arguments = f"-m finetune.cli run {recipe} train.max_steps=1 --resume --force"
    assert [(tmp_path / str(n)).read_text() for n in range(2)] == [f"{n} of 2: {arguments}\n" for n in range(2)]


def test_processes_option_under_another_launcher_is_refused(
    finetune: Terminal, tmp_path: Path, rows_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_model}}}\ndata: {{path: {rows_file}}}\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = finetune("run", str(recipe), "--processes", "2")
    assert code == 2
    assert "--processes" in err
