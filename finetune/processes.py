"""Which process of several this one is, and starting several: `finetune run … --processes N`.

torchrun and `accelerate launch` tell a process by its environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT);
`spawn` sets the same, so that a run does not ask who started it. Nothing heavy is imported here; what processes say to each
other is finetune/train/parallel.py.
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

INTERRUPTED = 130  # as shells have it, and as `finetune.errors.Interruption`
VERDICTS = (2, 3)  # exit codes that say what is wrong: the user's mistake, a gate
SETTLE_S = 1.0  # after a failure, before the others are ended: one that failed for a better reason may be about to say so
ORDERLY_S = 600.0  # after one ended for a signal: another may still be writing a checkpoint
GRACE_S = 10.0  # between SIGTERM and SIGKILL
SHOWN = 20_000  # characters of what a failed process wrote to stderr
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def spawn(arguments: list[str], count: int) -> int:
    """`finetune` with these arguments in `count` processes of this machine; returns the exit code.

    The first process has this one's output. Of another, what it wrote to stderr is shown if it is the one that failed first; then
    the rest is ended, and its exit code is returned (128 + N for signal N). Ctrl-C, SIGTERM and SIGHUP are handed on once: the
    processes finish their step, save and exit with 130; a second one kills them. They do not outlive this process (on Linux, even
    where it is killed). OMP_NUM_THREADS is their share of the cores, unless it is set; `run.threads` of the recipe is of each.
    """
    return start([sys.executable, "-m", "finetune.cli", *arguments], count)


def start(command: list[str], count: int) -> int:
    """`spawn` for any command."""
    with contextlib.ExitStack() as stack:
        together = _Together(command, [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)])
        stack.callback(together.kill)
        with _handling(together.interrupt):
            return together.wait()


class _Together:
    """Processes that are one run. errors: for each, where its stderr goes (not the first one's, which is seen)."""

    def __init__(self, command: list[str], errors: list[IO[bytes]]) -> None:
        self.errors, self.interruptions = errors, 0
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers, in the order in which they end
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
                        process_group=0,  # Ctrl-C reaches this process alone, which hands it on once
                        preexec_fn=_ending_with_parent(),
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
        """The first time: hand it on (SIGHUP as SIGTERM, after which a run saves). Then: kill."""
        self.interruptions += 1
        if self.interruptions > 1:
            self.kill()
        else:
            self.signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send it to every process that runs, not to those that they started: a process knows how to end its own."""
        for child in self.children:
            child.send_signal(number)

    def kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Until all have ended. Returns 0, or the exit code that says why not."""
        failures: list[tuple[int, int]] = []  # (exit code, number) of those that were not ended for another's sake
        deadline, ending = None, False
        for _ in self.children:
            number = self._next(deadline)
            while number is None:  # the deadline: they are asked to end, then made to
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
                code = INTERRUPTED  # before it could say so itself, or killed by the second signal
            failures.append((128 - code if code < 0 else code, number))
            orderly = all(code == INTERRUPTED for code, _ in failures)
            if orderly and deadline is None:
                deadline = time.monotonic() + ORDERLY_S
            elif not orderly and sum(code != INTERRUPTED for code, _ in failures) == 1:
                deadline = time.monotonic() + SETTLE_S
        if not failures:
            return 0
        # One that lost its connection to another which failed may be reaped before that; a signal's end is nobody's fault.
        code, number = min(failures, key=lambda one: (0 if one[0] in VERDICTS else 2 if one[0] == INTERRUPTED else 1, one[1]))
        if code != INTERRUPTED:
            self._tell(code, number)
        return code

    def _next(self, deadline: float | None) -> int | None:
        """The process that ends next, None where none has by the deadline."""
        try:
            return self.ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None

    def _tell(self, code: int, number: int) -> None:
        if code > 128:
            with contextlib.suppress(ValueError):
                name = signal.Signals(code - 128).name
                why = ": out of memory, perhaps" if name == "SIGKILL" else ""
                print(f"process {number} of {len(self.children)} was ended by {name}{why}", file=sys.stderr)
        if number == 0:
            return  # it has said it itself
        file = self.errors[number]
        file.seek(0)
        text = file.read().decode(errors="replace")
        print(f"process {number} of {len(self.children)} failed:\n{text[-SHOWN:].rstrip()}", file=sys.stderr)


@contextlib.contextmanager
def _handling(do: Callable[[int], None]) -> Iterator[None]:
    """Within it the signals by which a run is stopped come to `do`."""

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


def _ending_with_parent() -> Callable[[], None] | None:
    """What a child does before anything else, so that the system kills it when this process is gone. On Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    parent = os.getpid()
    if prctl is None:
        return None

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone in the meantime
            os._exit(1)

    return ask
