"""The command line. It contains no logic: every command calls the library once."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..protocols.command import Command
from .compare import Audit, Budgets, Compare, Costs
from .completion import Completion
from .plugins import CheckPlugin, Keys, NewPlugin, Plugins
from .results import Export, Show, Slice, Watch
from .run import CacheTeacher, Demo, GenerateDataCommand, Run, Validate

COMMANDS: tuple[type[Command], ...] = (
    Demo,
    Run,
    Validate,
    CacheTeacher,
    GenerateDataCommand,
    Compare,
    Audit,
    Costs,
    Keys,
    Plugins,
    CheckPlugin,
    NewPlugin,
    Watch,
    Show,
    Budgets,
    Slice,
    Export,
    Completion,
)
"""The core's own commands, in the order of `tinyfusion --help`."""

USER_ERROR, INTERRUPTED = 2, 130
_NO_ROOM = re.compile("out of memory|can't allocate memory|size calculation overflowed|multiplication overflow")
"""What torch says, in errors of no type of their own, of a tensor that fits into no memory."""
EVERYWHERE = {
    "--debug": "show the traceback of an error",
    "--quiet": "show no progress: only results, warnings and errors",
}
"""Flags of every command, which may stand before it or after it."""
OVERRIDES = """\
Any key of the recipe can be set, as YAML:
  tinyfusion {typed} --search.steps 600

Often set; `tinyfusion keys` lists all, with their defaults:
  --search.keep 4              how many blocks stay
  --search.steps 600           updates of the search
  --recover.steps 4000         updates of the recovery
  --recover.lr 1e-4            learning rate of the recovery
  --trainer.batch_size 64      samples per update
  --trainer.micro_batch_size 8 samples per pass of a device
  --trainer.precision bf16     or fp32, fp16, auto
  --trainer.seed 1             seed of all that is random
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake of the user's, 130 (or 143) interrupted."""
    from ..errors import FailedElsewhere, Interrupted, UserError, about_a_recipe

    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is shown as "?"
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        command, options = parse(arguments)  # which is all for `--help`
        from ..runtime.signals import interruptible

        quiet = vars(options).pop("quiet")  # commands may hand all of their options on
        with about_a_recipe(), interruptible(), _progress(shown=not quiet):
            return _obeyed(command, options)
    except FailedElsewhere:  # that process says why
        return USER_ERROR
    except UserError as e:
        if "--debug" in arguments:
            raise
        print(f"error: {e}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as e:
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            again = shlex.join(["tinyfusion", *_to_go_on(arguments)])
            print(f"{str(e) or 'interrupted'}. Go on with:\n  {again}", file=sys.stderr)
        return 128 + e.signum if isinstance(e, Interrupted) else INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # of a file that could not be used; others are bugs
        if e.filename is None or "--debug" in arguments:
            raise
        print(f"error: {e.filename}: cannot be used ({e.strerror})", file=sys.stderr)
        return USER_ERROR


def _obeyed(command: Command, options: argparse.Namespace) -> int:
    """Run a command. Code that it calls, of a plugin for one, may call `sys.exit`, which would look like success.

    Raises:
        UserError: code has called `sys.exit`; names its file. Or there is not enough memory; says how much was wanted.
    """
    from ..errors import UserError

    try:
        return command(options)
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # rich's answer to `tinyfusion validate ... | head`
            raise
        *_, (frame, line) = traceback.walk_tb(e.__traceback__)
        place = f"{frame.f_code.co_filename}, line {line}"
        raise UserError(f"{place}: sys.exit was called before '{command.name}' was done; raise an error instead") from e
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not _NO_ROOM.search(str(e)):
            raise
        reason = next(iter(str(e).splitlines()), "out of memory")
        raise UserError(
            f"not enough memory ({reason:.200}). Lower trainer.batch_size or set trainer.micro_batch_size, lower the "
            "batch_size of what was at work, or check the sizes of the network"
        ) from e


@contextmanager
def _progress(shown: bool) -> Iterator[None]:
    from ..runtime.progress import console

    console.quiet = not shown
    if not shown or not console.is_terminal:  # bars of the libraries, which a log would have in one endless line
        for switch in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(switch, "1")
    try:
        yield
    finally:
        console.quiet = False


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command that was typed, and its options; `options.command` is its name.

    Raises:
        UserError: the names of two commands collide.
        SystemExit: the arguments are wrong, or `--help` was given.
    """
    typed = next((word for word in arguments if not word.startswith("-")), None)
    commands = {cls.name: cls() for cls in _known(typed)}
    parser = parser_of(commands.values())
    if typed is not None and typed not in commands:
        from ..errors import nearest

        parser.error(f"no command '{typed}'{nearest(typed, commands)}")
    options, rest = parser.parse_known_args(arguments)
    command = commands[options.command]
    if command.takes_overrides:
        options.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return command, options


def _known(name: str | None) -> Sequence[type[Command]]:
    """Enough commands to find one by name, or all for the help. Most need no plugins, which take seconds to load."""
    if name in {command.name for command in COMMANDS}:
        return COMMANDS
    if name is None:
        from ..registry.listing import listed_commands

        known = [*COMMANDS, *listed_commands()]
        if len({command.name for command in known}) == len(known):
            return known
    from ..registry.registry import registry

    return list(registry().classes["command"].values())  # or the error that says whose names collide


def parser_of(commands: Iterable[Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line that has these commands."""
    parser = argparse.ArgumentParser(
        prog="tinyfusion", description="Learned depth pruning: which blocks can a transformer lose?", allow_abbrev=False
    )
    versions = "print the version, and torch's and Python's"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=versions)
    for flag, meaning in EVERYWHERE.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands:
        added = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        for flag in EVERYWHERE:  # the default must not overwrite what came before the command
            added.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.add_arguments(added)
        if command.takes_overrides:
            takes_recipe = any(action.dest == "recipe" for action in added._actions)
            typed = f"{command.name} recipes/quickstart.yaml" if takes_recipe else command.name
            added.epilog = OVERRIDES.format(typed=typed)
    return parser


class _Help(argparse.HelpFormatter):
    """Wraps texts, but leaves one of several lines as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Version(argparse.Action):
    """Prints versions and ends. It imports what tells them only then, since that takes as long as all of the help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform
        from importlib.metadata import version

        from ..registry.registry import own_version

        print(f"tinyfusion {own_version()}, torch {version('torch')}, Python {platform.python_version()}")
        parser.exit()


def _to_go_on(arguments: Sequence[str]) -> list[str]:
    """The arguments without --restart-from, which would delete what has just been saved."""
    out, skip = [], False
    for word in arguments:
        if not skip and not word.startswith("--restart-from"):
            out.append(word)
        skip = word == "--restart-from"
    return out
