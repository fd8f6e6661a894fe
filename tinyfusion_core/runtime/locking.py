"""Allow one command at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import UserError
from .files import remove_partial

_locks: list[TextIO] = []
"""Lock files held by this process."""


def _let_go() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


# A process that reads data may outlive a killed one by seconds; it must not hold the lock.
os.register_at_fork(after_in_child=_let_go)


@contextmanager
def owned(folder: Path, option: str) -> Iterator[None]:
    """Create a folder and lock it against other commands; the lock ends with this process.

    Temporary files left by killed processes are removed.

    Args:
        folder: the folder; it gets a file `.lock`, which stays.
        option: the command-line option that names the folder, for messages.

    Raises:
        UserError: the folder is not writable, or another command is using it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as e:
        raise UserError(f"{folder}: the folder cannot be written ({e.strerror}); choose another {option}") from e
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder}: another tinyfusion is at work in this folder ({file.read().strip() or 'unknown'}); "
                f"wait for its end, or choose another {option}"
            ) from None
        with suppress(OSError):  # it only explains a refusal, a full disk must not matter
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        _locks.append(file)
        try:
            remove_partial(folder)
            yield
        finally:
            _locks.remove(file)
