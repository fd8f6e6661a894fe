"""A command that a plugin adds to the command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from typing import ClassVar


class Command(ABC):
    """`tinyfusion NAME ...`. Heavy libraries are imported when it is called."""

    #: What is typed after `tinyfusion`.
    name: ClassVar[str]
    #: One line for `tinyfusion --help`.
    help: ClassVar[str]

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare its arguments and options."""

    @abstractmethod
    def __call__(self, options: Namespace) -> int:
        """Do it. Returns the exit code.

        Raises:
            UserError: a mistake of the user's, which is printed.
        """
