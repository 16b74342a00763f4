"""Errors that say what happened, where, what was found, and what to type next.

`UserError` is the user's (exit code 2), `GateError` a gate that refused (3), `Interruption` a signal (130, as shells have it).
Everything else that escapes is a bug in finetune (1) and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Stop(Exception):
    """Ends the command with `exit_code` and one clear message, without a traceback.

    message: one sentence; where: file:line, key or module path; got: the value that was met; hint: what to type or change next.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, got: str | None = None, hint: str | None = None) -> None:
        self.message, self.where, self.got, self.hint = message, where, got, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [("where", self.where), ("got", self.got), ("hint", self.hint)]
        return "\n".join([self.message, *(f"  {name + ':':7}{text}" for name, text in lines if text)])


class UserError(Stop):
    """Something that the user can fix: a recipe, a file, a folder, a missing package."""

    exit_code = 2


class UserErrors(UserError):
    """Several errors, shown at once."""

    def __init__(self, errors: list[UserError], title: str) -> None:
        self.errors = errors
        super().__init__(title)

    def __str__(self) -> str:
        return "\n\n".join([self.message, *map(str, self.errors)])


class GateError(Stop):
    """A check of the run's own promises that did not hold; the message carries the numbers."""

    exit_code = 3


class Interruption(Stop):
    """Ctrl-C or SIGTERM, after everything worth keeping was saved."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
