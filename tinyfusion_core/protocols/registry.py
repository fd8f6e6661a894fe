"""Find plugins and what they bring."""

from __future__ import annotations

import inspect
import os
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from ..errors import MissingFileError, UserError, nearest
from . import hookspecs

GROUP = "tinyfusion"
ONLY, BLOCKED = "TINYFUSION_PLUGINS", "TINYFUSION_BLOCK"
"""Environment variables, names of plugins separated by commas: the only ones to load, and those not to load."""

HOOKS = {
    "backbone": "tinyfusion_register_backbones",
    "loss": "tinyfusion_register_losses",
    "data": "tinyfusion_register_data",
    "metric": "tinyfusion_register_metrics",
    "command": "tinyfusion_register_commands",
}


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


@dataclass(frozen=True)
class Registry:
    """All plugins, and their classes by kind and name."""

    plugins: tuple[Plugin, ...]
    classes: dict[str, dict[str, type[Any]]]

    def find(self, kind: str, name: str, made_by: Mapping[str, str] | None = None) -> type[Any]:
        """The class of this name.

        Args:
            kind: a key of `HOOKS`.
            name: of the class.
            made_by: what `record_of` said of it, for the message.

        Raises:
            UserError: no plugin brings it; with the nearest name, and what brought it when it was used.
        """
        try:
            return self.classes[kind][name]
        except KeyError:
            pass
        hint = nearest(name, self.classes.get(kind, {}))
        if made_by and "file" in made_by:
            raise UserError(
                f"{kind}: no plugin brings '{name}', which came from the file {made_by['file']} (sha256 "
                f"{made_by['sha256'][:12]}). Load that first, which runs its code: "
                f"tiny.load_plugin('path/to/{made_by['file']}')"
            )
        if made_by:
            hint = f"; it came from {made_by['distribution']} {made_by['version']}: is that installed?"
        raise UserError(f"{kind}: no plugin brings '{name}'{hint}")


Classes = dict[str, dict[str, type[Any]]]
"""Classes by kind and name."""

_files: dict[str, tuple[PluginFile, Plugin, Classes]] = {}
"""What `load_plugin` has loaded, by name; a file of the same name takes the place of the one before."""


def registry() -> Registry:
    """Everything that plugins bring. Loads the installed ones once; one that fails costs a warning that names it.

    Raises:
        UserError: two plugins have the same name, or bring classes of the same kind and name.
    """
    return _with_files(_files)


def load_plugin(path: Path | str) -> PluginFile:
    """Load a plugin that is one Python file: its code runs, and its hooks are asked.

    Loading a file of the same name again takes its place; the same content is not run a second time.

    Raises:
        UserError: there is no such file, its code fails, or its hooks or names are not as they should be.
    """
    path = Path(path)
    try:
        file = PluginFile(path, path.read_bytes())
    except OSError as e:
        raise MissingFileError(f"plugins: {path}: {e.strerror}; paths are relative to the recipe") from None
    if file.name in _files and _files[file.name][0].sha256 == file.sha256:
        return file
    before = sys.modules.get(file.module)
    module = module_from_spec(ModuleSpec(file.module, None, origin=str(path.resolve())))
    module.__file__ = str(path.resolve())
    sys.modules[file.module] = module  # dataclasses, pickle and recipes look their classes up there
    try:
        exec(compile(file.content, str(path), "exec"), vars(module))
        classes = _brought(module)
        plugin = Plugin(file.name, str(path), "file", file.sha256[:12], _names(classes))
        loaded = {**_files, file.name: (file, plugin, classes)}
        _with_files(loaded)  # raises when names collide
    except Exception as e:  # whatever the file raises is its author's to read
        del sys.modules[file.module]
        if before is not None:
            sys.modules[file.module] = before
        raise UserError(f"plugin {path}: {_reason(e)}") from e
    _files.update(loaded)
    return file


def record_of(cls: type[Any]) -> dict[str, str]:
    """What brings a class, for the record: `file` and `sha256`, or `distribution` and `version`; empty if no plugin."""
    for file, _, classes in _files.values():
        if any(cls in named.values() for named in classes.values()):
            return {"file": file.name, "sha256": file.sha256}
    try:
        installed = _installed()
    except UserError:  # names that collide are no reason to lose a network that is about to be saved
        return {}
    for plugin in installed.plugins:
        if any(installed.classes[kind].get(name) is cls for kind, name in plugin.brings):
            return {"distribution": plugin.distribution, "version": plugin.version}
    return {}


def _with_files(files: Mapping[str, tuple[PluginFile, Plugin, Classes]]) -> Registry:
    found = _installed()
    for _, plugin, classes in files.values():
        found = _joined(found, plugin, classes)
    return found


@cache
def _installed() -> Registry:
    points = sorted(entry_points(group=GROUP), key=lambda p: p.name)
    for variable in (ONLY, BLOCKED):
        for name in sorted(_named(variable) - {p.name for p in points}):
            hint = nearest(name, [p.name for p in points])
            warnings.warn(f"{variable}: no plugin '{name}' is installed{hint}", stacklevel=2)
    found = Registry((), {kind: {} for kind in HOOKS})
    for point in points:
        plugin, classes = _load(point)
        found = _joined(found, plugin, classes)
    return found


def _load(point: EntryPoint) -> tuple[Plugin, Classes]:
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
    off = BLOCKED if point.name in _named(BLOCKED) else ""
    if ONLY in os.environ and point.name not in _named(ONLY):
        off = ONLY
    if off:
        return Plugin(point.name, point.value, distribution, version, error=f"switched off by {off}"), {}
    try:
        classes = _brought(point.load())
    except Exception as e:  # whatever a stranger's import raises must not take the command line down
        reason = _reason(e)
        warnings.warn(f"plugin '{point.name}' ({distribution} {version}) left out: {reason}", stacklevel=2)
        return Plugin(point.name, point.value, distribution, version, error=reason), {}
    return Plugin(point.name, point.value, distribution, version, _names(classes)), classes


def _brought(module: Any) -> Classes:
    """Ask the hooks of a plugin. Raises UserError when one is not what it should be."""
    built_for = getattr(module, "tinyfusion_api", hookspecs.API_VERSION)
    if built_for != hookspecs.API_VERSION:
        newer = isinstance(built_for, int) and built_for > hookspecs.API_VERSION
        way = "upgrade tinyfusion" if newer else "get a newer release of the plugin"
        raise UserError(
            f"tinyfusion_api: built for version {built_for} of the plugin interface, this tinyfusion has version "
            f"{hookspecs.API_VERSION}; {way}"
        )
    for name, value in vars(module).items() if isinstance(module, ModuleType) else ():
        if inspect.isfunction(value) and name.startswith("tinyfusion_register"):
            if name not in HOOKS.values():
                raise UserError(f"{name}: there is no such hook{nearest(name, HOOKS.values())}")
            if not hasattr(value, "tinyfusion_impl"):
                raise UserError(f"{name} is not marked as a hook; put @hookimpl (of tinyfusion_core) above it")
    manager = pluggy.PluginManager("tinyfusion")  # one for each plugin: the mistakes of others are not its own
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    found: Classes = {}
    for kind, hook in HOOKS.items():
        for result in getattr(manager.hook, hook)():
            found.setdefault(kind, {}).update(_checked(hook, result))
    if not found:
        raise UserError(f"has none of the hooks {', '.join(HOOKS.values())}")
    return found


def _checked(hook: str, result: Any) -> dict[str, type[Any]]:
    """The classes that a hook returned, by name."""
    (wanted,) = typing.get_args(typing.get_args(typing.get_type_hints(getattr(hookspecs, hook))["return"])[0])
    if not isinstance(result, (list, tuple)):
        name = result.__name__ if inspect.isclass(result) else type(result).__name__
        raise UserError(f"{hook} returns {name}, not a list; return a list of classes: [{name}]")
    classes: dict[str, type[Any]] = {}
    for cls in result:
        if not inspect.isclass(cls):
            name = type(cls).__name__
            raise UserError(f"{hook} returns an instance of {name}; return the class itself: [{name}]")
        if wanted is not Any and not issubclass(cls, wanted):
            raise UserError(f"{hook} returns {cls.__name__}, which is no {wanted.__name__}; derive it from that class")
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise UserError(f"{hook} returns {cls.__name__}, which lacks {missing}; write these methods")
        if classes.setdefault(cls.__name__, cls) is not cls:
            raise UserError(f"{hook} returns two classes named {cls.__name__}; rename one")
    return classes


def _joined(found: Registry, plugin: Plugin, classes: Mapping[str, Mapping[str, type[Any]]]) -> Registry:
    """A registry with one more plugin. Raises UserError, naming both owners, when names collide."""
    for other in found.plugins:
        if other.name == plugin.name:
            both = f"{other.distribution} {other.version} and {plugin.distribution} {plugin.version}"
            raise UserError(f"two plugins are named '{plugin.name}', of {both}; uninstall one, or rename one")
        for kind, name in plugin.brings:
            if (kind, name) in other.brings:
                raise UserError(
                    f"plugins '{other.name}' and '{plugin.name}' both bring a {kind} named '{name}' ({HOOKS[kind]}); "
                    f"switch one of them off ({BLOCKED}={other.name}), uninstall it, or rename the class"
                )
    merged = {kind: {**known, **classes.get(kind, {})} for kind, known in found.classes.items()}
    return Registry((*found.plugins, plugin), merged)


def _names(classes: Mapping[str, Iterable[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((kind, name) for kind, named in classes.items() for name in named)


def _named(variable: str) -> set[str]:
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
