"""A command of the command line: the core's own and those that plugins add are of one kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from typing import ClassVar


class Command(ABC):
    """`tinyfusion NAME ...`. Import heavy libraries when it is called: `tinyfusion --help` imports its module."""

    #: What is typed after `tinyfusion`.
    name: ClassVar[str]
    #: One line for `tinyfusion --help`.
    help: ClassVar[str]
    #: Whether keys of a recipe may follow, `--search.steps 600`; they are in `options.overrides`, a list of words.
    takes_overrides: ClassVar[bool] = False

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare its arguments and options."""

    @abstractmethod
    def __call__(self, options: Namespace) -> int:
        """Do it. Returns the exit code.

        Raises:
            UserError: a mistake of the user's, which is printed.
        """
