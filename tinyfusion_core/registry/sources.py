"""Finds plugins, in installed packages and single files, and loads their classes."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ..errors import nearest
from .answers import Classes, brought, reason_of
from .hooks import BLOCKED, GROUP, ONLY, named_in, switched_off_by

CORE = "core"
"""Name of the plugin that is tinyfusion_core itself; environment variables do not disable it."""


@dataclass(frozen=True)
class Plugin:
    """Metadata of one plugin.

    Attributes:
        name: name of the entry point, or of the file.
        module: the module that the entry point names, or the path of the file.
        distribution: package that contains it; `file` for a single file.
        version: version of the package; for a file the beginning of its sha256.
        brings: kind and name of every class it registers.
        error: why it was skipped; None if it was loaded.
    """

    name: str
    module: str
    distribution: str
    version: str
    brings: tuple[tuple[str, str], ...] = ()
    error: str | None = None

    @property
    def can_be_blocked(self) -> bool:
        """Whether the environment variable `TINYFUSION_BLOCK` applies to it."""
        return self.name != CORE and self.distribution != "file"


@dataclass(frozen=True)
class PluginFile:
    """A plugin that is one Python file, as it was when it was loaded.

    Attributes:
        path: the file.
        content: its bytes.
    """

    path: Path
    content: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the plugin: that of the file."""
        return self.path.name

    @property
    def module(self) -> str:
        """Name of its module, which no installed module has."""
        return f"plugin_file_{re.sub(r'[^0-9A-Za-z]', '_', self.path.stem)}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, as hex; recorded with networks that it saves."""
        return sha256(self.content).hexdigest()


def installed() -> list[EntryPoint]:
    """Return the entry points of plugins, by name.

    Warns if an environment variable names a plugin that is not installed.
    """
    points = sorted(entry_points(group=GROUP), key=lambda p: p.name)
    for variable in (ONLY, BLOCKED):
        for name in sorted(named_in(variable) - {p.name for p in points} - {CORE}):
            hint = nearest(name, [p.name for p in points])
            warnings.warn(f"{variable}: no plugin '{name}' is installed{hint}", stacklevel=2)
    return points


def load(point: EntryPoint) -> tuple[Plugin, Classes]:
    """Import an installed plugin and call its hooks. A plugin that fails costs a warning that names it."""
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
    if off := switched_off_by(point.name):
        return Plugin(point.name, point.value, distribution, version, error=f"switched off by {off}"), {}
    try:
        classes = brought(point.load())
    except (Exception, SystemExit) as e:  # whatever a stranger's import raises must not take the command line down
        reason = reason_of(e)
        warnings.warn(f"plugin '{point.name}' ({distribution} {version}) left out: {reason}", stacklevel=2)
        return Plugin(point.name, point.value, distribution, version, error=reason), {}
    return Plugin(point.name, point.value, distribution, version, names(classes)), classes


def names(classes: Classes) -> tuple[tuple[str, str], ...]:
    """Return kind and name of every class."""
    return tuple((kind, name) for kind, named in classes.items() for name in named)
