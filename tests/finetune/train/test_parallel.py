"""Two processes against one: the same training, under ddp and under fsdp; and processes that are started, stopped and killed."""

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
FEW, ALL = ([" ".join(map(str, case)) for case in cases(every)] for every in (False, True))
REST = [pytest.param(case, marks=pytest.mark.slow) for case in ALL if case not in FEW]
# What `accelerate launch --use_fsdp --mixed_precision bf16` sets besides, which must not meddle.
MEDDLING = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.fixture(scope="module")
def dealt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the program of two processes found: of every case where a slow one is asked for."""
    slow = any(item.get_closest_marker("slow") and item.module is request.module for item in request.session.items)
    folder = tmp_path_factory.mktemp("dealt")
    file, environment = folder / "results.json", MEDDLING | ({"EVERY_CASE": "1"} if slow else {})
    run_together(Path(__file__).with_name("dealt.py"), [str(file)], folder, environment=environment)
    return json.loads(file.read_text())


@pytest.mark.alone
@pytest.mark.parametrize("case", [*FEW, *REST])
def test_two_processes_train_as_one(dealt: Any, case: str) -> None:
    """Added up in the order in which two processes add them, floats give the same bits. In a row they do not: fp32 is rounded at
    2⁻²⁴ ≈ 6e-8, and Adam divides gradients by their own size, so that small ones, mostly rounding, move weights as large ones do.
    The norm of what is shared out is put together of other parts: a few roundings."""
    found, row = dealt[case], "row" in case
    assert found["losses"] <= (1e-6 if row else 0.0)
    assert found["evaluated"] <= (1e-6 if row else 0.0)
    assert found["weights"] <= (1e-5 if row else 0.0)
    assert found["states"] <= (2e-4 if row else 0.0)
    assert found["norms"] <= (1e-4 if row else 1e-6 if "fsdp" in case else 0.0)
    assert found["said"]
    assert found["agree"]
    assert found["moved"] > 0.01
    experts = "experts" in case or "masters" in case
    assert (found["uneven"] > 0) == experts, "experts that tokens of one process alone reached, in these cases and no other"
    assert (found["untouched"] > 0) == ("experts" in case), "and such as no token reached, which are left alone"


@pytest.mark.alone
@pytest.mark.parametrize("case", [case for case in [*FEW, *REST] if "fsdp" in str(case)])
def test_layers_are_shared_out_and_come_back(dealt: Any, case: str) -> None:
    found = dealt[case]
    assert found["share of codes"] == found["share of floats"] == 0.5
    assert found["kept"] == 0
    assert found["round"]
    assert found["restored"]
    assert found["restored evaluated"] <= (1e-6 if "row" in case else 0.0)


@pytest.mark.alone
def test_what_processes_say_to_each_other(dealt: Any) -> None:
    said = dealt["words"]
    assert said["total"] == [3.0, 1.0]
    assert said["any"] == [True, False]
    assert said["share"] == {"from": 0, "what": [1, None, "x"]}
    assert said["uneven"] == [[1.0] * 3, [2.0] * 5, None]
    assert said["buckets"]
    assert "adamw" in said["8bit"]
    assert "ddp" in said["8bit"]


def test_alone_all_of_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MEDDLING.items():
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


def test_more_processes_than_gpus_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="fewer GPUs"):
        parallel.init_distributed("cuda")


def test_streaming_and_sharing_out_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: x/y}\ndata: {path: rows.jsonl}\n")
    assert read_recipe(file).run.parallel == "ddp"
    assert read_recipe(file, ["run.parallel=fsdp"]).run.parallel == "fsdp"
    with pytest.raises(UserError, match=r"run\.parallel"):
        read_recipe(file, ["run.parallel=fsdp", "model.offload_layers=memory", "train.checkpointing=true"])


# ------------------------------------------------------------------------------------------------------------- processes


def driver(child: str, *, count: int = 2, before: str = "") -> subprocess.Popen[str]:
    """A process that starts `count` of `child` together and exits as they do."""
    hang_up = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # these tests may run under nohup, which has it ignored
    program = f"import signal, sys\nfrom finetune import processes\n{hang_up}\n{before}\n" + (
        f"sys.exit(processes.start([sys.executable, '-c', {child!r}], {count}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], *, within: float = 30) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def until(condition: Callable[[], bool], *, within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.alone
def test_they_know_each_other_and_one_speaks() -> None:
    child = "import json, os, sys; print(json.dumps(dict(os.environ))); print('aside', file=sys.stderr)"
    code, out, err = ended(driver(child, count=3))
    assert code == 0
    assert err == "aside\n"
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    cores = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert found.items() >= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": cores,
    }.items()  # fmt: skip
    assert int(found["MASTER_PORT"]) > 0


def test_a_process_without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.world_size(), processes.local_rank(), processes.is_main_process()) == (0, 1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a cluster that has not said which one this is
    assert processes.world_size() == 1
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (processes.rank(), processes.world_size(), processes.local_rank(), processes.is_main_process()) == (3, 8, 1, False)


@pytest.mark.alone
def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    child = f"""
import os, sys, time
rank = os.environ["RANK"]
open({str(tmp_path)!r} + "/" + rank, "w").write(str(os.getpid()))
if rank == "1":
    print("the gate is shut", file=sys.stderr)
    sys.exit(3)
time.sleep(600)
"""
    code, out, err = ended(driver(child, count=3))
    assert code == 3
    assert out == ""
    assert err == "process 1 of 3 failed:\nthe gate is shut\n"
    assert not any(alive(int((tmp_path / str(rank)).read_text())) for rank in range(3))


@pytest.mark.alone
def test_one_that_is_killed_is_told() -> None:
    child = "import os, signal, time\nos.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(600)"
    code, _, err = ended(driver(child))
    assert code == 137
    assert "process 1 of 2 was killed by SIGKILL, possibly out of memory" in err


@pytest.mark.alone
def test_a_verdict_outweighs_a_lost_connection() -> None:
    """The first process has raised a UserError and takes its time to go; the second one has noticed, and is gone before."""
    child = "import os, sys, time\nfirst = os.environ['RANK'] == '0'\ntime.sleep(0.3 * first)\nsys.exit(2 if first else 1)"
    code, _, err = ended(driver(child))
    assert code == 2
    assert err == ""


@pytest.mark.alone
def test_one_that_will_not_end_is_killed() -> None:
    child = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5)\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)"
    )
    code, _, err = ended(driver(child, before="processes.SETTLE_S = processes.GRACE_S = 0.3"))
    assert code == 7
    assert "process 1 of 2 failed" in err


WORKING = """
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


def begun(folder: Path, count: int = 2) -> bool:
    return all((folder / str(n)).exists() and (folder / str(n)).read_text().endswith("\n") for n in range(count))


@pytest.mark.alone
@pytest.mark.parametrize(("sent", "got"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_a_signal_is_handed_on_once(tmp_path: Path, sent: str, got: str) -> None:
    process = driver(WORKING.format(folder=str(tmp_path), saving=0.5))
    until(lambda: begun(tmp_path))
    os.killpg(process.pid, signal.Signals[sent])  # as a terminal does, to the group in front
    code, _, err = ended(process)
    assert code == 130
    assert err == ""
    assert [(tmp_path / str(n)).read_text().splitlines()[1] for n in range(2)] == [f"['{got}']"] * 2


@pytest.mark.alone
def test_a_second_signal_kills(tmp_path: Path) -> None:
    process = driver(WORKING.format(folder=str(tmp_path), saving=600))
    until(lambda: begun(tmp_path))
    children = [int((tmp_path / str(n)).read_text()) for n in range(2)]
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    assert all(map(alive, children))
    process.send_signal(signal.SIGINT)
    code, _, _ = ended(process)
    assert code == 130
    assert not any(map(alive, children))


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_they_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = driver(WORKING.format(folder=str(tmp_path), saving=600))
    until(lambda: begun(tmp_path))
    children = [int((tmp_path / str(n)).read_text()) for n in range(2)]
    process.kill()
    ended(process)
    until(lambda: not any(map(alive, children)))


def test_run_starts_itself_with_the_same_arguments(
    finetune: Terminal, tmp_path: Path, rows_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_model}}}\ndata: {{path: {rows_file}}}\n")
    program = tmp_path / "python"  # stands where the interpreter does, and tells what it is asked
    program.write_text(f'#!/bin/sh\necho "$RANK of $WORLD_SIZE: $*" >> {tmp_path}/$RANK\nexit 3\n')
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        code, _, _ = finetune("run", str(recipe), "train.max_steps=1", "--processes", "2", "--force", "--resume")
    assert code == 3
    words = f"-m finetune.cli run {recipe} train.max_steps=1 --resume --force"
    assert [(tmp_path / str(n)).read_text() for n in range(2)] == [f"{n} of 2: {words}\n" for n in range(2)]


def test_a_launcher_within_a_launcher_is_a_mistake(
    finetune: Terminal, tmp_path: Path, rows_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_model}}}\ndata: {{path: {rows_file}}}\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = finetune("run", str(recipe), "--processes", "2")
    assert code == 2
    assert "--processes" in err
