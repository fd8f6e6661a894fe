"""Errors that are not bugs: mistakes of the user, divergence, interruption, failure of another process."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MOST_NAMES = 100
"""How many known names are listed in a message."""
ARGUMENTS: set[str] = set()
"""The names of all options of all settings, which add them here."""
_of_a_recipe = ContextVar("of a recipe", default=False)
_KEY = re.compile(r"(?<![\w./'\"-])(trainer|recover|train|search|compare|audit|backbone|loss|data)\.(\w+)")
_CLASSES = {
    "trainer": "Trainer.",
    "recover": "Recover.",
    "train": "Recover.",
    "compare": "Compare.",
    "audit": "Audit.",
}
"""The classes of sections that have one; in the others the argument alone is named."""
_IN_PYTHON = (
    (re.compile(r"\(of recover(?: or train)?\)"), "(of Recover)"),
    (re.compile(r"(?<!\w)evaluate: (?=[A-Z]\w+[. ])"), ""),
    (re.compile(r"(, or|;) null\b"), r"\1 None"),
)


@contextmanager
def about_a_recipe() -> Iterator[None]:
    """Messages name keys of recipes while the context is open; otherwise they name arguments. Also a decorator."""
    before = _of_a_recipe.set(True)
    try:
        yield
    finally:
        _of_a_recipe.reset(before)


def worded(message: str) -> str:
    """Return a message, written about the keys of a recipe, for whoever reads it: in Python keys are arguments."""
    if _of_a_recipe.get():
        return message
    for pattern, words in _IN_PYTHON:
        message = pattern.sub(words, message)
    return _KEY.sub(lambda key: f"{_CLASSES.get(key[1], '')}{key[2]}" if key[2] in ARGUMENTS else key[0], message)


class UserError(Exception):
    """A mistake the user can correct. The message names the key or file, what was expected and how to fix it.

    Args:
        message: the message; keys are spelled as in recipes, and become arguments where there is no recipe.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(worded(message))


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
