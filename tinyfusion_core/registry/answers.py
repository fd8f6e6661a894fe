"""Calls the hooks of a plugin and checks what they return."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any

from ..errors import UserError, nearest
from .hooks import API_VERSION, HOOKS, KINDS

Classes = dict[str, dict[str, type[Any]]]
"""Classes by kind and name."""


def brought(plugin: Any, kinds: Collection[str] = tuple(KINDS)) -> Classes:
    """Call the hooks of a plugin and return its classes.

    Args:
        plugin: its module, or whatever its entry point names.
        kinds: the kinds of classes to ask for.

    Raises:
        UserError: it was built for another version of the interface, or a hook or what it returns is invalid.
    """
    _check_version(getattr(plugin, "tinyfusion_api", API_VERSION))
    members = vars(plugin) if isinstance(plugin, ModuleType) else dir(plugin)  # a lazy module's `dir` leaves hooks out
    hooks = {name: getattr(plugin, name) for name in members if name.startswith("tinyfusion_register")}
    for name, value in hooks.items():
        if name not in HOOKS:
            raise UserError(f"{name}: there is no such hook{nearest(name, HOOKS)}")
        if not hasattr(value, "tinyfusion_impl"):
            raise UserError(f"{name} is not marked as a hook; put @hookimpl (of tinyfusion_core) above it")
    if not hooks:
        raise UserError(_without_hooks(plugin))
    return {kind: _checked(kind, hooks[hook]()) for hook, kind in HOOKS.items() if hook in hooks and kind in kinds}


def _check_version(built_for: Any) -> None:
    if built_for != API_VERSION:
        newer = isinstance(built_for, int) and built_for > API_VERSION
        way = "upgrade tinyfusion" if newer else "get a newer release of the plugin"
        raise UserError(
            f"tinyfusion_api: built for version {built_for} of the plugin interface, this tinyfusion has version "
            f"{API_VERSION}; {way}"
        )


def _without_hooks(plugin: Any) -> str:
    """The error for a module without hooks: names the hook that its classes need, if it has any."""
    for cls in vars(plugin).values() if isinstance(plugin, ModuleType) else ():
        if isinstance(cls, type) and cls.__module__ == plugin.__name__:
            for kind in KINDS.values():
                if issubclass(cls, kind.base_class()):
                    return (
                        f"has the class {cls.__name__} but no hook that returns it; add a function {kind.hook}() "
                        f"with @tiny.hookimpl above it that returns [{cls.__name__}]"
                    )
    return f"has none of the hooks {', '.join(HOOKS)}"


def _checked(kind: str, result: Any) -> dict[str, type[Any]]:
    """The classes that a hook returned, by name."""
    hook, wanted, texts = KINDS[kind].hook, KINDS[kind].base_class(), KINDS[kind].texts
    if not isinstance(result, (list, tuple)):
        name = result.__name__ if isinstance(result, type) else type(result).__name__
        raise UserError(f"{hook} returns {name}, not a list; return a list of classes: [{name}]")
    classes: dict[str, type[Any]] = {}
    for cls in result:
        if not isinstance(cls, type):
            name = type(cls).__name__
            raise UserError(f"{hook} returns an instance of {name}; return the class itself: [{name}]")
        if not issubclass(cls, wanted):
            raise UserError(f"{hook} returns {cls.__name__}, which is no {wanted.__name__}; derive it from that class")
        if missing := ", ".join(sorted(getattr(cls, "__abstractmethods__", ()))):
            raise UserError(f"{hook} returns {cls.__name__}, which lacks {missing}; write these methods")
        for text in texts:
            if not isinstance(getattr(cls, text, None), str):
                raise UserError(f"{hook} returns {cls.__name__}, which lacks {text}; give it that attribute, a text")
        name = getattr(cls, texts[0])
        if classes.setdefault(name, cls) is not cls:
            raise UserError(f"{hook} returns two classes named {name}; rename one")
    return classes


def reason_of(error: BaseException) -> str:
    """Return an error as the reason why a plugin is skipped."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({'' if error.code is None else repr(error.code)})"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
