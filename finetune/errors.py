"""Errors that say what happened, where, what was found, and what to type next.

`Mistake` is the user's (exit code 2), `GateStop` a gate that refused (exit code 3), `Interruption` a signal (130, as shells have
it). Everything else that escapes is a fault of ours (exit code 1) and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Stop(Exception):
    """Ends the command with `exit_code` and one clear message, without a traceback.

    what: one sentence; where: file:line, key or module path; found: the value that was met; do: what to type or change next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, found: str | None = None, do: str | None = None) -> None:
        self.what, self.where, self.found, self.do = what, where, found, do
        super().__init__(str(self))

    def __str__(self) -> str:
        rows = [("where", self.where), ("found", self.found), ("do", self.do)]
        return "\n".join([self.what, *(f"  {name + ':':7}{text}" for name, text in rows if text)])


class Mistake(Stop):
    """Something that the user can mend: a recipe, a file, a folder, a missing package."""

    exit_code = 2


class Mistakes(Mistake):
    """Several mistakes, shown at once."""

    def __init__(self, mistakes: list[Mistake], title: str) -> None:
        self.mistakes = mistakes
        super().__init__(title)

    def __str__(self) -> str:
        return "\n\n".join([self.what, *map(str, self.mistakes)])


class GateStop(Stop):
    """A check of the run's own promises that did not hold; the message carries the numbers."""

    exit_code = 3


class Interruption(Stop):
    """Ctrl-C or SIGTERM, after everything worth keeping was saved."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
