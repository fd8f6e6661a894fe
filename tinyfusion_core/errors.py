"""What can go wrong through no fault of the code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: the message names the key or file, what was expected and the way on."""


class Diverged(UserError):
    """A training whose loss or gradient was not finite for too long."""


class FailedElsewhere(UserError):
    """Another process has failed, and says why."""


class MissingFileError(UserError):
    """Something the run will need is not there (yet); everything else about it may be right."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved its state.

    Attributes:
        signum: the signal that asked for it (2 for Ctrl-C, 15 for a pre-emption).
        agreed: whether all processes stop at this very point.
    """

    def __init__(self, message: str, signum: int, agreed: bool = False) -> None:
        super().__init__(message)
        self.signum, self.agreed = signum, agreed


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError `key is value; expected ...` unless it holds."""
    if not holds:
        raise UserError(f"{key} is {value!r}; expected {expected}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? (known: ...)`, to end a message about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if known else hint
