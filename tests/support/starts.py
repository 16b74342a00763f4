"""Starts of the command line, and of programs of tests, in processes of their own.

    with Start(["run", "tiny.yaml"], place, log) as start:           # place: its working directory; log: all that it prints
        start.wait(60, until=lambda: checkpoint.exists())
        assert start.send(signal.SIGKILL) == -signal.SIGKILL
    run_together(program, [file], place, count=2)                   # the ranks of a program that trains in several processes

Libraries take seconds to import, so most starts are forks of a server that has imported them. The server itself is a fork of the
test process, made after the test files are imported and before the first test begins a thread. With `forked=False` a start is a
plain `python -m finetune.cli`, which has another order of sets as well.
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

# What a run imports; the test files have imported most of it. Not datasets: its pyarrow begins a thread, which a fork would lose.
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
    """The context of a server that forks at once; tests/conftest.py starts it before the first test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    own = os.dup(2)
    with open(os.devnull, "w") as nowhere, mock.patch.object(forkserver.util, "spawnv_passfds", _fork_this_process):
        os.dup2(nowhere.fileno(), 2)  # the server's and its resource tracker's: starts have logs
        try:
            forkserver.ensure_running()
        finally:
            os.dup2(own, 2)
            os.close(own)
    return context


def _fork_this_process(executable: Any, arguments: list[Any], descriptors: list[int]) -> int:
    """In place of multiprocessing's new process for its server: a fork of this one, as like a new one as can be; its id."""
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
        logging.root.handlers.clear()  # pytest's, and its filters
        warnings.resetwarnings()
        for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        gc.freeze()
        exec(arguments[-1], {"__name__": "__main__"})
    finally:
        os._exit(1)


def _forked(program: str | None, words: list[str], place: str, log: str, environment: dict[str, str]) -> None:
    """What a fork of the server does: becomes what `python -m finetune.cli` would be, and leaves as that would."""
    os.setsid()
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "a fork of a server with threads"
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    os.chdir(place)
    os.environ.update(environment)
    _enter(program, words)


def _enter(program: str | None, words: list[str]) -> None:
    """Run the command line, or a program, in a process that has just been forked."""
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = [program or "finetune", *words]
    gc.freeze()  # what was imported is no garbage to look for
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
    """A process of `finetune run --processes N`: forked from the launcher, which has imported everything. All else is Popen's."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *options: Any) -> None:
        cwd, env, shell, stdin, stdout, stderr, group = (options[index] for index in (2, 3, 6, 7, 10, 12, -1))
        assert (args[:3], cwd, shell, group) == ([sys.executable, "-m", "finetune.cli"], None, False, 0), args
        assert len(os.listdir("/proc/self/task")) == 1, "a fork of a launcher with threads"
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
            _enter(None, args[3:])
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
    """One start of the command line in `place`: leads a process group of its own, and writes what it says to `log`.

    program: a Python file to start in place of the command line.
    """

    def __init__(
        self, words: list[str], place: Path, log: Path, *, forked: bool = True, environment: Mapping[str, str] = {},
        program: Path | None = None,
    ) -> None:  # fmt: skip
        self.words, self.log = words, log
        log.write_bytes(b"")
        given = ONE_THREAD | dict(environment)
        self.process: Any
        if forked:
            file = None if program is None else str(program)
            self.process = server().Process(target=_forked, args=(file, words, str(place), str(log), given))
            self.process.start()
        else:
            with open(log, "w") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-u", *([program] if program else ["-m", "finetune.cli"]), *words], cwd=place,
                    env=os.environ | given, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
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
        """Wait for the end, which must be a good one; returns what it printed."""
        self.wait(seconds, every=0.02)
        assert self.code == 0, self.said("ended badly")
        return self.log.read_text()

    def send(self, number: int, patience: float = 60.0) -> int:
        """Send a signal to the process (not to its group) and wait until nothing of the group is left; the exit code."""
        if self.code is None:
            os.kill(self.pid, number)
        self.wait(patience)
        assert self.code is not None, self.said(f"lives {patience} s after signal {number}")
        deadline = time.monotonic() + 20  # a compiler that was at work ends by itself
        while left := _group(self.pid):
            assert time.monotonic() < deadline, self.said(f"its children live on: {left}")
            time.sleep(0.01)
        return self.code

    def phase(self) -> str:
        """What the screen named last."""
        names = [line[:-2] for line in self.log.read_text().splitlines() if line.endswith(" …") and line[0] != " "]
        return names[-1] if names else "start"

    def said(self, what: str) -> str:
        """`what` went wrong, with all that is needed to look into it."""
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        return f"{what}\nfinetune {' '.join(self.words)}; exit code {self.code}; {self.log}:\n{tail}"

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.send(signal.SIGKILL)


def run_together(
    program: Path, words: list[str], place: Path, *, count: int = 2, environment: Mapping[str, str] = {}, seconds: float = 400.0
) -> list[str]:
    """Run a program in `count` processes that form one process group of torch.distributed; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)} | environment
    started: list[Start] = []
    try:
        for rank in range(count):
            given = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Start(words, place, place / f"rank-{rank}.log", environment=given, program=program))
        deadline = time.monotonic() + seconds
        while any(each.code is None for each in started) and not any(each.code for each in started):
            assert time.monotonic() < deadline, "\n".join(each.said("too slow") for each in started)
            time.sleep(0.02)
        time.sleep(0.5 * any(each.code for each in started))  # the others may have something to say too
        assert [each.code for each in started] == [0] * count, "\n".join(each.said("of several") for each in started)
        return [each.log.read_text() for each in started]
    finally:
        for each in started:
            each.__exit__()


def _group(leader: int) -> list[str]:
    """Names of the living processes in a group."""
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
