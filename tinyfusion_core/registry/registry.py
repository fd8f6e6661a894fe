"""The registry of all classes that a recipe or the command line can name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from ..errors import MissingFileError, UserError, nearest
from ..parsing.records import beside
from .answers import Classes, brought, reason_of
from .hooks import BLOCKED, KINDS
from .sources import CORE, Plugin, PluginFile, installed, load, names

BUILTINS = "tinyfusion_core.builtins"
"""The core's own plugin. Its name is fixed, so that finding it needs no metadata of an installed package."""


@dataclass(frozen=True)
class Registry:
    """All plugins, and their classes by kind and name."""

    plugins: tuple[Plugin, ...]
    classes: Classes

    def find(self, kind: str, name: str, made_by: Mapping[str, str] | None = None) -> type[Any]:
        """Return the class of this name.

        Args:
            kind: a key of `KINDS`.
            name: name of the class.
            made_by: what `record_of` said of it when it was used, for the message.

        Raises:
            UserError: no plugin registers it; names the nearest match, and the plugin it came from.
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

    def joined(self, plugin: Plugin, classes: Classes) -> Registry:
        """Return a registry with one more plugin.

        Raises:
            UserError: names collide; names both plugins.
        """
        for other in self.plugins:
            if other.name == plugin.name:
                both = f"{other.distribution} {other.version} and {plugin.distribution} {plugin.version}"
                raise UserError(f"two plugins are named '{plugin.name}', of {both}; uninstall one, or rename one")
            for kind, name in plugin.brings:
                if (kind, name) in other.brings:
                    off = [p.name for p in (other, plugin) if p.can_be_blocked]
                    way = f"switch one of them off ({BLOCKED}={off[0]}), uninstall it, or " if off else ""
                    raise UserError(
                        f"plugins '{other.name}' and '{plugin.name}' both bring a {kind.replace('_', ' ')} named "
                        f"'{name}' ({KINDS[kind].hook}); {way}rename the {'command' if kind == 'command' else 'class'}"
                    )
        merged = {kind: {**known, **classes.get(kind, {})} for kind, known in self.classes.items()}
        return Registry((*self.plugins, plugin), merged)


_files: dict[str, tuple[PluginFile, Plugin, Classes]] = {}
"""What `load_plugin` has loaded, by file name; a file of the same name replaces the earlier one."""


def registry() -> Registry:
    """Return all classes of the core and of plugins.

    Installed plugins are loaded once; one that fails costs a warning.

    Raises:
        UserError: two plugins have the same name, or register classes of the same kind and name.
    """
    return _with_files(_files)


def load_plugin(path: Path | str) -> PluginFile:
    """Load a plugin that is one Python file: run its code and call its hooks.

    A file of the same name replaces the earlier one; the same content is not run again.

    Raises:
        UserError: the file is missing or no .py file, its code fails or exits, or its hooks or names are invalid.
    """
    path = Path(path)
    if path.suffix != ".py":  # so that no file of a run folder, where it is copied to, has its name
        raise UserError(f"plugins: {path}: expected a Python file, with a name that ends in .py")
    if path.exists() and not path.is_file():
        raise UserError(f"plugins: {path}: is no file that can be read to its end")
    try:
        file = PluginFile(path, path.read_bytes())
    except OSError as e:
        raise MissingFileError(
            f"plugins: {path}: {e.strerror}; paths are relative to the recipe{beside(path)}"
        ) from None
    if file.name in _files and _files[file.name][0].sha256 == file.sha256:
        return file
    before = sys.modules.get(file.module)
    module = module_from_spec(ModuleSpec(file.module, None, origin=str(path.resolve())))
    module.__file__ = str(path.resolve())
    sys.modules[file.module] = module  # dataclasses, pickle and recipes look their classes up there
    try:
        exec(compile(file.content, str(path), "exec"), vars(module))
        classes = brought(module)
        plugin = Plugin(file.name, str(path), "file", file.sha256[:12], names(classes))
        loaded = {**_files, file.name: (file, plugin, classes)}
        _with_files(loaded)  # raises when names collide
    except (Exception, SystemExit) as e:  # whatever the file raises is its author's to read
        del sys.modules[file.module]
        if before is not None:
            sys.modules[file.module] = before
        raise UserError(f"plugin {path}: {reason_of(e)}") from e
    _files.update(loaded)
    return file


def record_of(cls: type[Any]) -> dict[str, str]:
    """Return what registered a class: `file` and `sha256`, or `distribution` and `version`; empty if no plugin did."""
    for file, _, classes in _files.values():
        if any(cls in named.values() for named in classes.values()):
            return {"file": file.name, "sha256": file.sha256}
    try:
        found = _installed()
    except UserError:  # names that collide are no reason to lose a network that is about to be saved
        return {}
    for plugin in found.plugins:
        if any(found.classes[kind].get(name) is cls for kind, name in plugin.brings):
            return {"distribution": plugin.distribution, "version": plugin.version}
    return {}


def _with_files(files: Mapping[str, tuple[PluginFile, Plugin, Classes]]) -> Registry:
    found = _installed()
    for _, plugin, classes in files.values():
        found = found.joined(plugin, classes)
    return found


@cache
def _installed() -> Registry:
    found = _core()
    for point in installed():
        found = found.joined(*load(point))
    return found


def _core() -> Registry:
    """The core's own classes."""
    classes = brought(import_module(BUILTINS))
    plugin = Plugin(CORE, BUILTINS, "tinyfusion", own_version(), names(classes))
    return Registry((), {kind: {} for kind in KINDS}).joined(plugin, classes)


def own_version() -> str:
    """Return the version of tinyfusion."""
    try:
        return version("tinyfusion")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
