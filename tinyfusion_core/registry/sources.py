"""Where plugins are: installed packages and single files; and what the hooks of one of them bring."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ..errors import nearest
from .answers import Classes, brought, spoken
from .hooks import BLOCKED, GROUP, ONLY, named_in, switched_off_by

CORE = "core"
"""The plugin that is tinyfusion_core itself; the switches do not concern it."""


@dataclass(frozen=True)
class Plugin:
    """What is known of one plugin.

    Attributes:
        name: of the entry point, or of the file.
        module: that the entry point names, or the path of the file.
        distribution: name of the package that brings it; `file` for a file of its own.
        version: of the package; of a file the beginning of its sha256.
        brings: kind and name of every class it registers.
        error: why it is left out.
    """

    name: str
    module: str
    distribution: str
    version: str
    brings: tuple[tuple[str, str], ...] = ()
    error: str | None = None

    @property
    def can_be_blocked(self) -> bool:
        """Whether the switch `TINYFUSION_BLOCK` reaches it."""
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
        """The name of the file is the name of the plugin."""
        return self.path.name

    @property
    def module(self) -> str:
        """What its module is called: a name that no installed module has."""
        return f"plugin_file_{re.sub(r'[^0-9A-Za-z]', '_', self.path.stem)}"

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()


def installed() -> list[EntryPoint]:
    """The entry points of plugins, by name. Warns of switches that name none."""
    points = sorted(entry_points(group=GROUP), key=lambda p: p.name)
    for variable in (ONLY, BLOCKED):
        for name in sorted(named_in(variable) - {p.name for p in points} - {CORE}):
            hint = nearest(name, [p.name for p in points])
            warnings.warn(f"{variable}: no plugin '{name}' is installed{hint}", stacklevel=2)
    return points


def load(point: EntryPoint) -> tuple[Plugin, Classes]:
    """Import an installed plugin and ask its hooks. One that fails costs a warning that names it."""
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
    if off := switched_off_by(point.name):
        return Plugin(point.name, point.value, distribution, version, error=f"switched off by {off}"), {}
    try:
        classes = brought(point.load())
    except Exception as e:  # whatever a stranger's import raises must not take the command line down
        reason = spoken(e)
        warnings.warn(f"plugin '{point.name}' ({distribution} {version}) left out: {reason}", stacklevel=2)
        return Plugin(point.name, point.value, distribution, version, error=reason), {}
    return Plugin(point.name, point.value, distribution, version, names(classes)), classes


def names(classes: Classes) -> tuple[tuple[str, str], ...]:
    """Kind and name of every class."""
    return tuple((kind, name) for kind, named in classes.items() for name in named)
