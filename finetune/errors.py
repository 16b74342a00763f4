"""Errors with a message, where it happened, the value that was met, and a hint.

Exit codes: `UserError` 2, `GateError` 3 (a gate refused), `Interruption` 130 (a signal, as in shells). Any other exception is
a bug in finetune: exit code 1, with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Stop(Exception):
    """Ends the command with `exit_code` and one clear message, without a traceback.

    message: one sentence; where: file:line, key or module path; got: the actual value; hint: what to type or change next.
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
    """A gate stopped the run or the export; the message carries the numbers."""

    exit_code = 3


class Interruption(Stop):
    """Ctrl-C or SIGTERM, raised after training was saved."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
