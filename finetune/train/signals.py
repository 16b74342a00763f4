"""Ctrl-C and its like while training goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def caught_signals() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) only sets a flag: the step is finished and saved. A
    second one ends at once."""  # fmt: skip
    caught = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = True
        with suppress(OSError):  # of a terminal that is gone
            print("\nfinishing this step, then saving (again: ends at once)", file=sys.stderr)
        signal.signal(number, before[signal.Signals(number)])

    try:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # nohup
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: signals belong to somebody else
        yield lambda: False
        return
    try:
        yield lambda: caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
