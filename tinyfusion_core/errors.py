"""Errors that are not bugs: mistakes of the user, divergence, interruption, failure of another process."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


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


def need(module: str, package: str, key: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        package: what to install.
        key: what needs it, to begin the message with.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{key} needs the package '{package}' ({e}): pip install '{package}'") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a message about an unknown name: `; did you mean 'x'? (known: ...)`."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if known else hint
