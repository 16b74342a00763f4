"""Output of a run: phases, progress with remaining time, checks.

On a terminal a live progress bar; otherwise (a log, a pipe) a line every few seconds with the same figures.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from finetune.processes import is_main_process
from finetune.units import amount, clock

LINE_EVERY_S = 5.0
Shown = Callable[[int, int, str], None]  # progress(done, total, note)


@contextlib.contextmanager
def relayed_bars(progress: Shown | None) -> Iterator[type | None]:
    """Redirect transformers' progress bars (download, loading, conversion) to `progress`; yields the tqdm class to pass on."""
    if progress is None:
        yield None
        return
    import transformers.modeling_gguf_pytorch_utils as gguf
    from tqdm.auto import tqdm
    from transformers.utils.logging import set_tqdm_hook

    class Relay(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.total:
                shown(int(self.n), int(self.total), str(self.desc or "").strip(" :."))

    shown: Shown = progress
    before = set_tqdm_hook(lambda factory, arguments, options: Relay(*arguments, **options))
    plain, gguf.tqdm = gguf.tqdm, Relay
    try:
        yield Relay
    finally:
        set_tqdm_hook(before)
        gguf.tqdm = plain


class Screen:
    """Prints to `console` and records the duration of each phase."""

    def __init__(self, console: Console | None = None) -> None:
        # Only the main process prints.
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not is_main_process())
        self.phases: list[dict[str, Any]] = []
        self.now = ""  # the current phase, or the last one

    def say(self, text: str | Text) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(Text("note: ", "yellow") + Text(text))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Shown]:
        """A named phase of the run; yields an optional callback `progress(done, total, note)`."""
        started, self.now = time.monotonic(), name
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("[bold]{task.description:<16}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[count]:>11}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=None, note="", count="")

                def update(done: int, total: int, note: str = "") -> None:
                    bar.update(task, completed=done, total=total, note=note, count=f"{amount(done)}/{amount(total)}")

                yield update
        else:
            self.say(f"{name} …")
            printed, first = started, (started, 0, 0)  # first: (time, done, total) at the current bar's first update

            def line(done: int, total: int, note: str = "") -> None:
                nonlocal printed, first
                now = time.monotonic()
                if total != first[2] or done < first[1]:
                    first = (now, done, total)
                if now - printed >= LINE_EVERY_S and done < total:
                    printed = now
                    left = clock((now - first[0]) / (done - first[1]) * (total - done)) if done > first[1] else "?"
                    self.say(f"  {name} {amount(done)}/{amount(total)}  {note}  {clock(now - started)} elapsed, {left} left")

            yield line
        seconds = time.monotonic() - started
        self.phases.append({"name": name, "seconds": round(seconds, 3)})
        if self.console.is_terminal:
            self.console.print(Text("✓ ", "green") + Text(f"{name:<16} {clock(seconds)}"))
        elif seconds >= LINE_EVERY_S:
            self.say(f"  {name}: done in {clock(seconds)}")

    def preflight(self, checks: Iterable[Any], examples: list[list[dict[str, Any]]]) -> None:
        """Print the checks (name, status, detail) and the examples with their supervised text coloured."""
        marks = {"pass": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}
        for check in checks:
            mark, style = marks[check.status]
            self.console.print(Text(f"  {mark} ", style) + Text(check.name, style="bold") + Text(f": {check.detail}"))
        for number, example in enumerate(examples, 1):
            text = Text(f"  example {number}: ", style="dim")
            for piece in example:
                shown = piece["text"].replace("\n", "⏎")
                # The brackets mark supervised text where there are no colours.
                text.append(f"⟦{shown}⟧" if piece["supervised"] else shown, style="green" if piece["supervised"] else "dim")
            self.console.print(text)
        if examples:
            self.console.print(Text("  green, in ⟦⟧: supervised tokens", style="dim"))
