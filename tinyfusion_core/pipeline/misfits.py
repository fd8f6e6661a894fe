"""Names the values of a recipe that are not what their annotations say."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any

from ..parsing.settings import spelled, stands_for
from .schema import item_of, without_none


def misfits(key: str, value: Any, kind: Any, path: Sequence[str]) -> Iterator[str]:
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
            yield from misfits(f"{key}[{i}]", item, item_of(inner), path)
    elif isinstance(value, dict):
        if typing.get_origin(inner) is dict:
            for name, item in value.items():
                yield from misfits(f"{key}.{name}", item, item_of(inner), path)
            return
        cls = resolve_name(value["class_path"]) if "class_path" in value else inner
        arguments, hint = value.get("init_args", value), typing.get_type_hints(cls.__init__).get(path[0], Any)
        if path[0] in arguments:
            yield from misfits(f"{key}.{path[0]}", arguments[path[0]], hint, path[1:])
