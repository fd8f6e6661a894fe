"""Names what is wrong in a recipe: values that are not what their annotations say, and those that a class refuses."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import UserError
from ..parsing.settings import item_of, spelled, stands_for
from .schema import SECTIONS, without_none

REFUSALS = (UserError, ArgumentError, ValueError, TypeError)
"""What parser and classes raise about a recipe."""


def refusals(parser: ArgumentParser, section: dict[str, Any]) -> Iterator[str]:
    """Yield what the parser or a class says against a section, without what it spoke against before.

    Args:
        parser: of all sections.
        section: one of `checked`, by its name; what is refused is removed from it.
    """
    wrong = True
    while wrong:
        wrong = False
        try:
            parser.instantiate(parser.parse_object(copy.deepcopy(section)))
        except REFUSALS as e:
            key, message = root_message(e)
            if key:
                name, *path = key.split(".")
                yield from list(_misfits(name, section.get(name), SECTIONS.get(name), path)) or [message]
                wrong = _remove(section, [name, *path])
                continue
            refused = list(_entries_refused(parser, section))
            yield from [text for _, text in refused] or [message]
            for path, _ in refused:
                wrong |= _remove(section, path)


def _entries_refused(parser: ArgumentParser, section: Mapping[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Yield entries with names of their own that their class refuses, which does not know them, and what it says."""
    for path, kind, how in _entries(section):
        try:
            parser.instantiate(parser.parse_object({kind: copy.deepcopy(how)}))
        except REFUSALS as e:
            message = root_message(e)[1]
            key = ".".join([*path, kind] if path[0] == "rounds" else path)
            inside = message.removeprefix(f"{kind}.")
            yield path, f"{key}{'.' if inside != message else ': '}{inside}"


def _entries(section: Mapping[str, Any]) -> Iterator[tuple[list[str], str, Any]]:
    """Yield the searches and recoveries that have names in a section: the entry's path, the kind, the settings."""
    for name, entry in (section.get("rounds") or {}).items():
        for kind, how in entry.items():
            yield ["rounds", name], kind, how
    for view in ("compare", "audit"):
        for part, kind in (("candidates", "search"), ("recoveries", "recover")):
            for name, how in ((section.get(view) or {}).get(part) or {}).items():
                yield [view, part, name], kind, how


def _remove(config: Any, path: Sequence[str]) -> bool:
    """Remove a key, given as the parser names it, and a mapping that it leaves empty. Returns whether it was there."""
    name, *inner = path
    if isinstance(config, dict) and "class_path" in config:
        config = config.get("init_args")
    if not isinstance(config, dict) or name not in config:
        return False
    removed = _remove(config[name], inner) if inner else True
    if not inner or config[name] == {}:
        del config[name]
    return removed


def root_message(error: BaseException) -> tuple[str, str]:
    """Return the key, if it is known, and the root cause: what a class said that raised one, or the parser's line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return "", str(cause)
        cause = cause.__cause__ or cause.__context__
    # The parser nests its messages; the innermost one names the value, the outer ones the way to it.
    *_, message = re.split(r'Parser key "[^"]+":', str(error))
    key = ".".join(re.findall(r'Parser key "([^"]+)":', str(error)))
    line = next(line.strip() for line in [*message.splitlines(), "not valid"] if line.strip())
    return key, f"{key}: {line}" if key else line


def _misfits(key: str, value: Any, kind: Any, path: Sequence[str]) -> Iterator[str]:
    """Yield what is said of values that are not what their annotations say.

    Args:
        key: where the value stands in the recipe.
        value: a section of `checked`, or a part of one.
        kind: its annotation.
        path: where the wrong values are in it; indices of lists and names of mappings are left out.
    """
    inner = without_none(kind)
    if not path:
        if not stands_for(value, kind):
            yield f"{key} is {value!r:.200}; expected {spelled(kind, yaml=True)}"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _misfits(f"{key}[{i}]", item, item_of(inner), path)
    elif isinstance(value, dict):
        if typing.get_origin(inner) is dict:
            for name, item in value.items():
                yield from _misfits(f"{key}.{name}", item, item_of(inner), path)
            return
        cls = resolve_name(value["class_path"]) if "class_path" in value else inner
        arguments, hint = value.get("init_args", value), typing.get_type_hints(cls.__init__).get(path[0], Any)
        if path[0] in arguments:
            yield from _misfits(f"{key}.{path[0]}", arguments[path[0]], hint, path[1:])
