"""Take a folder for a command: only one that is new, empty or its own, one command at a time, while it is there."""

from __future__ import annotations

import fcntl
import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..errors import UserError
from ..parsing.records import check_regular

LOCK, PARTIAL = ".lock", ".partial"

_locks: dict[Path, TextIO] = {}
"""Folders that this process has locked, and their lock files."""


def _let_go() -> None:
    for file in _locks.values():
        file.close()
    _locks.clear()


# A process that reads data may outlive a killed one by seconds; it must not hold the lock.
os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class FolderKind:
    """The folders that a command makes, and how they are told from folders of the user's.

    Attributes:
        holds: what is in such a folder, for messages: `a run`.
        option: the command-line option that names it, for messages.
        is_ours: whether a folder has the mark of the command, a file that it writes before all others.
        writes: whether the command writes a file; given the folder, and the file's path relative to it.
    """

    holds: str
    option: str
    is_ours: Callable[[Path], bool]
    writes: Callable[[Path, Path], bool]


def check_free(folder: Path, kind: FolderKind) -> None:
    """Check that a command may write to a folder; changes nothing.

    Raises:
        UserError: the folder holds files, and does not have the mark of the command; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a new or an empty folder as {kind.option}")
    if not folder.is_dir() or kind.is_ours(folder):
        return
    if (other := next(_not_ours(folder), None)) is not None:
        raise UserError(
            f"{folder}: is neither empty nor {kind.holds} of tinyfusion's (it holds {other.relative_to(folder)}); "
            f"choose a new or an empty folder as {kind.option}"
        )


def _not_ours(folder: Path) -> Iterator[Path]:
    """Files in a folder and below that a command of ours cannot have left there before it wrote its mark."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); choose another folder") from error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        yield from (path for name in folders if (path := Path(place, name)).is_symlink())
        yield from (path for name in sorted(files) if not _is_left_behind(path := Path(place, name)))


def _is_left_behind(file: Path) -> bool:
    if file.name == LOCK and file.is_file():
        return file.read_bytes()[:8] in (b"", b"process ")
    return file.name.startswith(".") and file.name.endswith(PARTIAL)


def remove_partial(path: Path) -> None:
    """Remove the temporary files of one file that killed processes have left."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        file.unlink(missing_ok=True)


def remove_partials(folder: Path, writes: Callable[[Path], bool]) -> None:
    """Remove temporary files, and folders that a network was saved aside in, that killed processes have left.

    Args:
        folder: where to look, at any depth.
        writes: says of a path in the folder, relative to it, whether we write such a file; others' are left alone.
    """
    for file in list(folder.rglob(f".*{PARTIAL}")):
        name = file.name[1 : -len(PARTIAL)].rpartition(".")[0]
        if not name or not writes((file.parent / name).relative_to(folder)):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


def check_replaceable(file: Path, option: str, is_ours: Callable[[Path], bool]) -> None:
    """Check that a command may write a file: one that is new, or that it has written itself.

    Args:
        file: the file.
        option: the command-line option that names it, for messages.
        is_ours: whether an existing file was written by the command.

    Raises:
        UserError: it may not.
    """
    if file.is_symlink() or file.exists():
        check_regular(file)
        if not is_ours(file):
            raise UserError(
                f"{option}: {file} exists and was not made by this command; delete it or choose another name"
            )


def check_held() -> None:
    """Check that the folders which this process has locked are still there: else what it writes would lie elsewhere.

    Raises:
        UserError: one is not.
    """
    for folder, lock in _locks.items():
        try:
            there = os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat())
        except OSError:
            there = False
        if not there:
            raise UserError(
                f"{folder}: was deleted, moved or replaced while this command was at work in it. Put it back and run "
                "the same command to go on, or begin again without it"
            )


@contextmanager
def owned(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Create a folder and lock it against other commands; the lock ends with this process.

    Temporary files of ours that killed processes have left there are removed.

    Args:
        folder: the folder; it gets a file `.lock`, which stays.
        kind: what it is for.

    Raises:
        UserError: the folder holds something else or is not writable, or another command is using it.
    """
    check_free(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK).exists():
            check_regular(folder / LOCK)
        (folder / LOCK).touch()
    except OSError as e:
        raise UserError(f"{folder}: the folder cannot be written ({e.strerror}); choose another {kind.option}") from e
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder}: another tinyfusion is at work in this folder ({file.read().strip() or 'unknown'}); "
                f"wait for its end, or choose another {kind.option}"
            ) from None
        with suppress(OSError):  # it only explains a refusal, a full disk must not matter
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        _locks[folder.absolute()] = file
        try:
            remove_partials(folder, lambda path: kind.writes(folder, path))
            yield
        finally:
            del _locks[folder.absolute()]
