"""Ctrl-C, SIGTERM and SIGHUP during training."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def caught_signals() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) only sets a flag: the step is finished and
    saved. A second one ends the process at once."""  # fmt: skip
    caught = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = True
        with suppress(OSError):  # the terminal may be gone
            print("\nfinishing this step, then saving (a second Ctrl-C stops at once)", file=sys.stderr)
        signal.signal(number, before[signal.Signals(number)])

    try:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # nohup
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread, which alone may set handlers
        yield lambda: False
        return
    try:
        yield lambda: caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
