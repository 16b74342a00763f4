"""Start the command line, or a test's own program, in separate processes.

    with Start(["run", "tiny.yaml"], folder, log) as start:         # folder: the working directory; log: stdout and stderr
        start.wait(60, until=lambda: checkpoint.exists())
        assert start.send(signal.SIGKILL) == -signal.SIGKILL
    run_together(program, [file], folder, count=2)                  # the ranks of a program that trains in several processes

Libraries take seconds to import, so most starts are forks of a server that has imported them. The server is a fork of the test
process, made after the test files are imported and before the first test starts a thread. With `forked=False` a start is a new
interpreter (`python -m finetune.cli`), which also orders sets differently.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import torch

# What a run imports. The test files import most of it. Not datasets: its pyarrow starts a thread, which a fork would lose.
PRELOAD = [
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "torch._inductor.compile_fx", "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral",
    "transformers.generation.continuous_batching",
    "matplotlib.figure", "matplotlib.backends.backend_svg",
    "finetune.cli", "finetune.pipeline", "finetune.sources", "finetune.stages.train", "finetune.stages.merge",
    "finetune.stages.planning", "finetune.stages.build", "finetune.report.plots", "finetune.train.loop",
    "pytest",  # a fork imports its parent's main module
]  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@functools.cache
def server() -> Any:
    """The multiprocessing context of the fork server. tests/conftest.py calls this before the first test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    stderr_copy = os.dup(2)
    with open(os.devnull, "w") as devnull, mock.patch.object(forkserver.util, "spawnv_passfds", _fork_this_process):
        os.dup2(devnull.fileno(), 2)  # hides output of the server and its resource tracker; starts have logs
        try:
            forkserver.ensure_running()
        finally:
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
    return context


def _fork_this_process(executable: Any, arguments: list[Any], descriptors: list[int]) -> int:
    """Replaces multiprocessing's spawn of its server by a fork of this process with fresh state; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        os.environ.update(ONE_THREAD)
        torch.set_num_threads(1)
        logging.root.handlers.clear()  # those of pytest
        warnings.resetwarnings()
        for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        gc.freeze()
        exec(arguments[-1], {"__name__": "__main__"})
    finally:
        os._exit(1)


def _run_in_fork(program: str | None, arguments: list[str], folder: str, log: str, environment: dict[str, str]) -> None:
    """Runs in a fork of the server: behave and exit like `python -m finetune.cli` in a new interpreter."""
    os.setsid()
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "the server that was forked has threads"
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    os.chdir(folder)
    os.environ.update(environment)
    _run_program(program, arguments)


def _run_program(program: str | None, arguments: list[str]) -> None:
    """Run the command line, or a program, in a process that has just been forked."""
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = [program or "finetune", *arguments]
    gc.freeze()  # keeps imported modules out of garbage collection
    from finetune import cli, processes

    processes.subprocess = SimpleNamespace(Popen=_ForkedChild, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    try:
        if program is not None:
            runpy.run_path(program, run_name="__main__")
        else:
            cli.main()
    finally:
        atexit._run_exitfuncs()


class _ForkedChild(subprocess.Popen[bytes]):
    """Popen for `finetune run --processes N` that forks the launcher, which has imported everything, instead of spawning."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *options: Any) -> None:
        cwd, env, shell, stdin, stdout, stderr, group = (options[index] for index in (2, 3, 6, 7, 10, 12, -1))
        assert (args[:3], cwd, shell, group) == ([sys.executable, "-m", "finetune.cli"], None, False, 0), args
        assert len(os.listdir("/proc/self/task")) == 1, "the launcher that was forked has threads"
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            os.setpgid(0, 0)
            if preexec_fn is not None:
                preexec_fn()
            for stream, file in enumerate((stdin, stdout, stderr)):
                if file != -1:
                    os.dup2(file, stream)
            os.environ.clear()
            os.environ.update(env)
            _run_program(None, args[3:])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class Start:
    """One start of the command line in `folder`, as the leader of its own process group. stdout and stderr go to `log`.

    program: a Python file to start instead of the command line.
    """

    def __init__(
        self, arguments: list[str], folder: Path, log: Path, *, forked: bool = True, environment: Mapping[str, str] = {},
        program: Path | None = None,
    ) -> None:  # fmt: skip
        self.arguments, self.log = arguments, log
        log.write_bytes(b"")
        variables = ONE_THREAD | dict(environment)
        self.process: Any
        if forked:
            file = None if program is None else str(program)
            self.process = server().Process(target=_run_in_fork, args=(file, arguments, str(folder), str(log), variables))
            self.process.start()
        else:
            with open(log, "w") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-u", *([program] if program else ["-m", "finetune.cli"]), *arguments], cwd=folder,
                    env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
        self.pid: int = self.process.pid

    @property
    def code(self) -> int | None:
        """The exit code, -9 for SIGKILL; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False, every: float = 0.002) -> bool:
        """Whether `until` came true within `seconds`, while the process ran."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            if until():
                return True
            time.sleep(every)
        return False

    def succeed(self, seconds: float = 300.0) -> str:
        """Wait for a successful end; return the output."""
        self.wait(seconds, every=0.02)
        assert self.code == 0, self.said("did not exit with code 0")
        return self.log.read_text()

    def send(self, number: int, patience: float = 60.0) -> int:
        """Send a signal to the process, not its group, and wait until no process of the group is left. Returns the exit code."""
        if self.code is None:
            os.kill(self.pid, number)
        self.wait(patience)
        assert self.code is not None, self.said(f"still alive {patience} s after signal {number}")
        deadline = time.monotonic() + 20  # a running compiler ends by itself
        while names := _living_processes(self.pid):
            assert time.monotonic() < deadline, self.said(f"child processes are still alive: {names}")
            time.sleep(0.01)
        return self.code

    def phase(self) -> str:
        """The phase that the output named last."""
        names = [line[:-2] for line in self.log.read_text().splitlines() if line.endswith(" …") and line[0] != " "]
        return names[-1] if names else "start"

    def said(self, what: str) -> str:
        """A failure message: `what` went wrong, the command, its exit code and the end of its log."""
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        return f"{what}\nfinetune {' '.join(self.arguments)}; exit code {self.code}; {self.log}:\n{tail}"

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.send(signal.SIGKILL)


def run_together(
    program: Path,
    arguments: list[str],
    folder: Path,
    *,
    count: int = 2,
    environment: Mapping[str, str] = {},
    seconds: float = 400.0,
) -> list[str]:
    """Run a program in `count` processes of one torch.distributed process group. Returns the output of each."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = str(free_socket.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)} | environment
    starts: list[Start] = []
    try:
        for rank in range(count):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            starts.append(Start(arguments, folder, folder / f"rank-{rank}.log", environment=variables, program=program))
        deadline = time.monotonic() + seconds
        while any(start.code is None for start in starts) and not any(start.code for start in starts):
            assert time.monotonic() < deadline, "\n".join(start.said("timed out") for start in starts)
            time.sleep(0.02)
        time.sleep(0.5 * any(start.code for start in starts))  # lets the other processes write their errors
        assert [start.code for start in starts] == [0] * count, "\n".join(
            start.said("one of the processes failed") for start in starts
        )
        return [start.log.read_text() for start in starts]
    finally:
        for start in starts:
            start.__exit__()


def _living_processes(leader: int) -> list[str]:
    """The names of the living processes in a process group."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return []
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.name())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive
