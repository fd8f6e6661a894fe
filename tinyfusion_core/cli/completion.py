"""`tinyfusion completion`: what makes a shell complete the command line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..protocols.command import Command, a_path


class Completion(Command):
    """Print the completion script of a shell."""

    name = "completion"
    help = "print a script with which a shell completes commands, flags and paths"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The shell."""
        parser.add_argument("shell", choices=("bash", "zsh"))

    def __call__(self, options: Namespace) -> int:
        """Print the script, for the commands of all installed plugins."""
        import shtab

        from ..registry.registry import registry
        from . import parser_of

        parser = parser_of(cls() for cls in registry().classes["command"].values())
        commands: Any = parser._subparsers
        for command in commands._group_actions[0].choices.values():
            for argument in command._actions:
                if argument.type is a_path:
                    argument.complete = shtab.FILE
        print(shtab.complete(parser, options.shell))
        return 0
