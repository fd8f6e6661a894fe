"""The interface of a command of the command line, the core's own or a plugin's."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import ClassVar

from ..parsing.settings import LARGEST

FOR_PROGRAMS = "print JSON, for programs"
"""Help of `--json`."""


def a_path(text: str) -> Path:
    """Return the path that was typed; as `type=` of an argument. The empty one, which means this folder, is refused."""
    if not text.strip():
        raise ArgumentTypeError("the path is empty; a variable that is not set? This folder is '.'")
    if "\0" in text or any(len(os.fsencode(part)) > 255 for part in Path(text).parts) or len(os.fsencode(text)) > 4095:
        raise ArgumentTypeError(f"'{text[:40]}...' is too long for the name of a file, or holds a zero byte")
    return Path(text)


def a_count(text: str) -> int:
    """Return the number of things that was typed; as `type=` of an argument."""
    if not (text.isascii() and text.isdecimal()) or int(text[:20]) > LARGEST:
        raise ArgumentTypeError(f"'{text[:40]}' is no whole number from 0 to {LARGEST:,}")
    return int(text)


class Command(ABC):
    """A command, `tinyfusion NAME ...`.

    `tinyfusion --help` imports the module of every command: import heavy libraries inside `__call__`.
    """

    #: What is typed after `tinyfusion`.
    name: ClassVar[str]
    #: One line for `tinyfusion --help`.
    help: ClassVar[str]
    #: Whether keys of a recipe may follow, `--search.steps 600`; they are in `options.overrides`, a list of words.
    takes_overrides: ClassVar[bool] = False

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments and options of the command."""

    @abstractmethod
    def __call__(self, options: Namespace) -> int:
        """Run the command and return its exit code.

        Raises:
            UserError: a mistake of the user's, which is printed.
        """
