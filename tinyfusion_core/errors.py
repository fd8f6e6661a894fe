"""Errors that are not bugs: mistakes of the user, divergence, interruption, failure of another process."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

MOST_NAMES = 100
"""How many known names are listed in a message."""


class UserError(Exception):
    """A mistake the user can correct. The message names the key or file, what was expected and how to fix it."""


class Diverged(UserError):
    """A training run whose loss or gradient was not finite for too many steps."""


class FailedElsewhere(UserError):
    """Another process has failed; that process reports the reason."""


class MissingFileError(UserError):
    """A file or package the run needs is missing. The rest of the recipe can still be checked."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved its state.

    Attributes:
        signum: number of the signal that asked for it (2 for Ctrl-C, 15 for pre-emption by a scheduler).
        agreed: whether all processes stop at this same step.
    """

    def __init__(self, message: str, signum: int, agreed: bool = False) -> None:
        super().__init__(message)
        self.signum, self.agreed = signum, agreed


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError with `key is value; expected ...` unless a condition holds.

    Args:
        holds: the condition.
        key: the setting, as recipes spell it.
        value: what it is set to.
        expected: what it should be, in words.

    Raises:
        UserError: the condition does not hold.
    """
    if not holds:
        raise UserError(f"{key} is {value!r}; expected {expected}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error that holds anything, of at most 200 characters; else its type's name."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)


def need(module: str, install: str, key: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        install: what brings it: an extra, `tinyfusion[dit]`, or a package.
        key: what needs it, to begin the message with.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{key} needs {module.partition('.')[0]} ({e}): pip install '{install}'") from None


def reason_behind(error: BaseException) -> str:
    """Return the first line of an error, or of the operating system error behind it."""
    behind = error.__cause__ or error.__context__
    if isinstance(behind, OSError) and not isinstance(error, OSError):
        return reason_behind(behind)
    return first_line(error)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a message about an unknown name: `; did you mean 'x'? (known: ...)`.

    Case does not matter. More names than `MOST_NAMES` are not listed.
    """
    known = sorted(known)
    hint = "" if (close := closest(word, known)) is None else f"; did you mean '{close}'?"
    return f"{hint} (known: {', '.join(known)})" if 0 < len(known) <= MOST_NAMES else hint


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a word, whatever their case; None if none is like it."""
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return spelled[close[0]] if close else None
