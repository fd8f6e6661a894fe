"""Finds the commands of installed plugins within milliseconds, for `tinyfusion --help`."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from .answers import brought, reason_of
from .hooks import GROUP, KINDS, switched_off_by

if TYPE_CHECKING:
    from ..protocols.command import Command


def listed_commands() -> list[type[Command]]:
    """Return the commands of installed plugins; imports only modules whose source contains the name of the hook.

    A plugin that fails costs a warning that names it.
    """
    found: list[type[Command]] = []
    for name, value in sorted(_entry_points().items()):
        if not switched_off_by(name) and _has_commands(value.partition(":")[0]):
            try:
                found += brought(resolve_name(value), ["command"]).get("command", {}).values()
            except (Exception, SystemExit) as e:  # whatever a stranger's import raises must not take the help down
                warnings.warn(f"plugin '{name}' left out: {reason_of(e)}", stacklevel=2)
    return found


def _entry_points() -> dict[str, str]:
    """Names and values of the installed plugins' entry points.

    `importlib.metadata` knows them too, but importing it takes half of the time budget of the help.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        for file in Path(folder).glob("*.*-info/entry_points.txt"):
            section = ""
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.startswith("["):
                    section = line.strip("[] ")
                elif section == GROUP and "=" in line:
                    name, _, value = line.partition("=")
                    found.setdefault(name.strip(), value.strip())
    return found


def _has_commands(module: str) -> bool:
    """Whether the source of a module, which is not run, contains the name of the hook."""
    try:
        source = find_spec(module).loader.get_source(module)  # type: ignore[union-attr]
    except (ImportError, AttributeError, SyntaxError):  # loading it says what is wrong with it
        return False
    return KINDS["command"].hook in (source or "")
