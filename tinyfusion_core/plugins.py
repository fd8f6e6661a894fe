"""Find plugins and what they bring."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import UserError, nearest

GROUP = "tinyfusion"

HOOKS = {
    "backbone": "tinyfusion_register_backbones",
    "loss": "tinyfusion_register_losses",
    "data": "tinyfusion_register_data",
    "metric": "tinyfusion_register_metrics",
}


@dataclass(frozen=True)
class Plugin:
    """What is known of one installed plugin.

    Attributes:
        name: of the entry point.
        module: that the entry point names.
        distribution: name and version of the package that brings it.
        brings: kind and name of every class it registers.
        error: why it could not be loaded.
    """

    name: str
    module: str
    distribution: str
    brings: tuple[tuple[str, str], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Registry:
    """All plugins, and their classes by kind and name."""

    plugins: tuple[Plugin, ...]
    classes: dict[str, dict[str, type[Any]]]

    def find(self, kind: str, name: str) -> type[Any]:
        """Raises UserError, with the nearest name, when there is no such class."""
        try:
            return self.classes[kind][name]
        except KeyError:
            raise UserError(f"{kind}: no plugin brings '{name}'{nearest(name, self.classes.get(kind, {}))}") from None


@cache
def registry() -> Registry:
    """Load every installed plugin once. One that fails to import costs a warning that names it."""
    manager = pluggy.PluginManager("tinyfusion")
    manager.add_hookspecs(hookspecs)
    classes: dict[str, dict[str, type[Any]]] = {kind: {} for kind in HOOKS}
    owners: dict[tuple[str, str], str] = {}
    plugins = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        plugin = _load(manager, point, classes, owners)
        if plugin.error:
            warnings.warn(f"plugin '{plugin.name}' ({plugin.distribution}) left out: {plugin.error}", stacklevel=2)
        plugins.append(plugin)
    return Registry(tuple(plugins), classes)


def _load(
    manager: pluggy.PluginManager,
    point: EntryPoint,
    classes: dict[str, dict[str, type[Any]]],
    owners: dict[tuple[str, str], str],
) -> Plugin:
    distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
    module = None
    try:
        module = point.load()
        manager.register(module, name=point.name)
        manager.check_pending()
        found = [
            (kind, cls)
            for kind, hook in HOOKS.items()
            for implementation in getattr(manager.hook, hook).get_hookimpls()
            if implementation.plugin is module
            for cls in implementation.function()
        ]
    except Exception as e:  # whatever a stranger's import raises must not take the command line down
        if module is not None and manager.is_registered(module):
            manager.unregister(module)  # else its unknown hooks would be held against the plugins after it
        return Plugin(point.name, point.value, distribution, error=f"{type(e).__name__}: {e}")
    for kind, cls in found:
        other = owners.setdefault((kind, cls.__name__), point.name)
        if other != point.name:
            raise UserError(
                f"plugins '{other}' and '{point.name}' both bring a {kind} named '{cls.__name__}'; uninstall one"
            )
        classes[kind][cls.__name__] = cls
    return Plugin(point.name, point.value, distribution, tuple((kind, cls.__name__) for kind, cls in found))
