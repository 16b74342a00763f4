"""Rank and world size of this process, and starting several processes: `finetune run … --processes N`.

`spawn` sets the environment variables of torchrun and `accelerate launch` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT), so a run need not know which launcher started it. Nothing heavy is imported here; collective communication is in
finetune/train/parallel.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO

INTERRUPTED = 130  # as in shells and `finetune.errors.Interruption`
EXPLAINED = (2, 3)  # exit codes that come with an explanation: user error, gate
SETTLE_S = 1.0  # wait after a failure before the others are ended: another may fail with the actual cause
ORDERLY_S = 600.0  # wait after one process ended by a signal: another may still be writing a checkpoint
GRACE_S = 10.0  # between SIGTERM and SIGKILL
SHOWN = 20_000  # last characters of a failed process's stderr to show
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank() -> int:
    """Rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Rank of this process on its machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def spawn(arguments: list[str], count: int) -> int:
    """Run `finetune` with these arguments in `count` processes on this machine; returns the exit code.

    The first process inherits stdout and stderr. When a process fails, the others are ended, its stderr is shown and its exit
    code returned (128 + N for signal N). Ctrl-C, SIGTERM and SIGHUP are forwarded once: the processes finish their step, save and
    exit with 130; a second signal kills them. They do not outlive this process (on Linux, even if it is killed). OMP_NUM_THREADS
    defaults to an equal share of the cores; `run.threads` applies to each process.
    """
    return start([sys.executable, "-m", "finetune.cli", *arguments], count)


def start(command: list[str], count: int) -> int:
    """`spawn` for an arbitrary command."""
    with contextlib.ExitStack() as stack:
        group = _ProcessGroup(command, [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)])
        stack.callback(group.kill)
        with _handling_signals(group.interrupt):
            return group.wait()


class _ProcessGroup:
    """The processes of one run. errors: for each, the file for its stderr (unused for the first, whose stderr is inherited)."""

    def __init__(self, command: list[str], errors: list[IO[bytes]]) -> None:
        self.errors, self.interruptions = errors, 0
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # ranks, in the order in which processes end
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = {"OMP_NUM_THREADS": str(max(1, cores // len(errors)))} | os.environ
        shared |= {"WORLD_SIZE": str(len(errors)), "LOCAL_WORLD_SIZE": str(len(errors))}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.children: list[subprocess.Popen[bytes]] = []
        try:
            for number, file in enumerate(errors):
                self.children.append(
                    subprocess.Popen(
                        command,
                        env=shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL if number else None,
                        stderr=file if number else None,
                        process_group=0,  # Ctrl-C reaches only this process, which forwards it once
                        preexec_fn=_die_with_parent(),
                    )
                )
        except BaseException:
            self.kill()
            raise
        for number, child in enumerate(self.children):
            threading.Thread(target=self._await, args=(number, child), daemon=True).start()

    def _await(self, number: int, child: subprocess.Popen[bytes]) -> None:
        child.wait()
        self.ended.put(number)

    def interrupt(self, number: int) -> None:
        """Forward the first signal (SIGHUP as SIGTERM, on which a run saves); kill at the second."""
        self.interruptions += 1
        if self.interruptions > 1:
            self.kill()
        else:
            self.signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send a signal to every running process, but not to its children: it ends those itself."""
        for child in self.children:
            child.send_signal(number)

    def kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until all processes have ended; returns 0, or the exit code of the failure that explains most."""
        failures: list[tuple[int, int]] = []  # (exit code, rank) of processes that were not ended by us
        deadline, ending = None, False
        for _ in self.children:
            number = self._next(deadline)
            while number is None:  # deadline passed: SIGTERM, then SIGKILL
                if ending:
                    self.kill()
                else:
                    self.signal(signal.SIGTERM)
                ending, deadline = True, time.monotonic() + GRACE_S
                number = self._next(deadline)
            code = self.children[number].returncode
            if code == 0 or ending:
                continue
            if (self.interruptions and code in (-signal.SIGINT, -signal.SIGTERM)) or self.interruptions > 1:
                code = INTERRUPTED  # ended before it could handle the signal, or killed by the second one
            failures.append((128 - code if code < 0 else code, number))
            orderly = all(code == INTERRUPTED for code, _ in failures)
            if orderly and deadline is None:
                deadline = time.monotonic() + ORDERLY_S
            elif not orderly and sum(code != INTERRUPTED for code, _ in failures) == 1:
                deadline = time.monotonic() + SETTLE_S
        if not failures:
            return 0
        # A process that lost its connection to a failed one may be reaped first; an interrupted process is not a cause at all.
        code, number = min(failures, key=lambda one: (0 if one[0] in EXPLAINED else 2 if one[0] == INTERRUPTED else 1, one[1]))
        if code != INTERRUPTED:
            self._report(code, number)
        return code

    def _next(self, deadline: float | None) -> int | None:
        """The rank of the next process that ends, or None if none has ended by the deadline."""
        try:
            return self.ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None

    def _report(self, code: int, number: int) -> None:
        """Print why process `number` failed."""
        if code > 128:
            with contextlib.suppress(ValueError):
                name = signal.Signals(code - 128).name
                why = ", possibly out of memory" if name == "SIGKILL" else ""
                print(f"process {number} of {len(self.children)} was killed by {name}{why}", file=sys.stderr)
        if number == 0:
            return  # its stderr was inherited
        file = self.errors[number]
        file.seek(0)
        text = file.read().decode(errors="replace")
        print(f"process {number} of {len(self.children)} failed:\n{text[-SHOWN:].rstrip()}", file=sys.stderr)


@contextlib.contextmanager
def _handling_signals(do: Callable[[int], None]) -> Iterator[None]:
    """Call `do` for SIGINT, SIGTERM and SIGHUP within the block."""

    def handler(number: int, frame: FrameType | None) -> None:
        do(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _die_with_parent() -> Callable[[], None] | None:
    """A preexec function that makes the kernel kill the child when this process dies; None where that is not supported."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    parent = os.getpid()
    if prctl is None:
        return None

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return ask
