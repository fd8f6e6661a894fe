"""Settings: values given in Python are checked like those of a recipe."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import ARGUMENTS, UserError, require

MOST = "most"
"""Metadata key of a field of whole numbers: how large they may be, or None for no limit; see `LARGEST`."""
PYTHON = "python"
"""Metadata key of a field that is an argument in Python and no key of recipes."""
LARGEST = 10_000_000
"""How large a whole number may be: more of anything would not end, or fit into no memory."""
_MOST = {
    "steps": 10**9,
    "batch_size": 100_000,
    "num_workers": 1024,
    "rank": 10_000,
    "masks": 100_000,
    "random": 100_000,
    "seeds": 1000,
    "seed": None,
    "_random_seed": None,
}
"""The same by the name of a field, which means the same thing in every class."""
_NOTHING = object()
_WORDS = {
    None: "",
    type(None): "",
    Any: "anything",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
_PLURALS = {_WORDS[kind]: f"{_WORDS[kind][2:]}s" for kind in (int, float, str, Path)}


class Settings:
    """Base of the dataclasses whose fields are the options of a recipe.

    Before a subclass's own `__post_init__`, every value is checked against its annotation. Numbers are finite, whole
    numbers at most `LARGEST`, or what the field's metadata say as `MOST`. A list is taken where a tuple is expected,
    and a path where a text is.

    Raises:
        UserError: a value is not what its annotation says, or too large; names the class and field.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ARGUMENTS.update(inspect.get_annotations(cls))
        # A dataclass of a plugin that inherits the fields would look for their types in its own module.
        with contextlib.suppress(Exception):  # of a class that is defined in a function, or names itself, say
            cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
        if (own := cls.__dict__.get("__post_init__")) is not None:

            @functools.wraps(own)
            def checked_first(self: Any) -> None:
                check_fields(self)
                own(self)

            setattr(cls, "__post_init__", checked_first)  # noqa: B010  # so that no plugin has to remember it

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass against their annotations; other objects check themselves.

    Raises:
        UserError: a value does not fit.
    """
    if not is_dataclass(settings):
        return
    hints = _hints(settings.__class__)
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints.get(field.name, Any)
        key = f"{field.name} (of {type(settings).__name__})"
        taken = next((v for v in _spellings(value) if fits(v, hint)), _NOTHING)
        require(taken is not _NOTHING, key, value, spelled(hint))
        require(all(-1e30 <= n <= 1e30 for n in numbers(taken)), key, value, "finite numbers, up to 1e30")
        if (most := field.metadata.get(MOST, _MOST.get(field.name, LARGEST))) is not None and int in _parts(hint):
            require(max(map(abs, numbers(taken)), default=0) <= most, key, value, f"at most {most:,}")
        if taken is not value:
            object.__setattr__(settings, field.name, taken)  # most of them are frozen


_PLAIN = (bool, int, float, str, type(None))


def check_arguments(**given: tuple[Any, Any]) -> None:
    """Check what a function was given, by name: (value, annotation).

    Raises:
        UserError: a value does not fit.
    """
    for name, (value, hint) in given.items():
        if not fits(value, hint):
            text = repr(value)
            text = f"a {type(value).__name__}" if len(text) > 60 or "\n" in text else text
            raise UserError(f"{name} is {text}; expected {spelled(hint)}")


def stands_for(value: Any, hint: Any) -> bool:
    """Return whether a value, or one that it may stand for, is what an annotation says: a list may be a tuple."""
    return any(fits(spelling, hint) for spelling in _spellings(value))


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is what an annotation says. Truth values are no numbers, and a text is no list."""
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(part) or part for part in (typing.get_args(hint) if union else (hint,))]
    if type(value) in kinds and type(value) in _PLAIN:
        return True
    if isinstance(value, str) and Sequence in kinds and str not in kinds:
        return False  # which to Python is a sequence of texts
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    takes_truth = any(part is bool or part is Any for part in _parts(hint))
    return takes_truth or not any(isinstance(leaf, bool) for leaf in leaves(value))


def numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a value, also those in its lists and mappings."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, int | float))


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested lists, tuples and mappings; any other value itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def item_of(kind: Any) -> Any:
    """Return the type of the items of a list or mapping; any other type itself."""
    return typing.get_args(kind)[-1] if typing.get_origin(kind) in (list, dict, Sequence) else kind


def spelled(hint: Any, yaml: bool = False) -> str:
    """Return an annotation in words: `a whole number or None`. Classes have their names.

    Args:
        hint: the annotation.
        yaml: whether it is for YAML, where None is null, and what a function returns stands for the function.
    """
    if hint in _WORDS:
        return _WORDS[hint] or ("null" if yaml else "None")
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return str(getattr(hint, "__name__", hint))
    if origin in (typing.Literal, typing.Union, types.UnionType):
        say = repr if origin is typing.Literal else functools.partial(spelled, yaml=yaml)
        return " or ".join(dict.fromkeys(map(say, parts)))
    if origin is Callable:
        return f"{'' if yaml else 'a function that returns '}{spelled(parts[-1], yaml)}"
    if issubclass(origin, Mapping):
        return f"a mapping of names to {_many(parts[-1], yaml)}"
    fixed = origin is tuple and parts[-1] is not ...
    if fixed and len(set(parts)) > 1:
        return " and ".join(map(functools.partial(spelled, yaml=yaml), parts))
    return f"a {'pair' if fixed and len(parts) == 2 else 'list'} of {_many(parts[0], yaml)}"


def _many(hint: Any, yaml: bool) -> str:
    """The plural of `spelled`, where it has one."""
    words = re.sub(r"\ba (pair|list|mapping) of", r"\1s of", spelled(hint, yaml))
    return " or ".join(_PLURALS.get(word, word) for word in words.split(" or "))


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # imported for type checkers alone
        return {}


def _spellings(value: Any) -> Iterator[Any]:
    """A value, and what it may stand for."""
    yield value
    if isinstance(value, os.PathLike):
        yield os.fspath(value)
    yield _with_lists(value, innermost=tuple, outer=list)
    yield _with_lists(value, innermost=tuple, outer=tuple)
    yield _with_lists(value, innermost=list, outer=list)


def _with_lists(value: Any, innermost: type[Any], outer: type[Any]) -> Any:
    """A value whose lists and tuples are of these types, those without another one in them of the first."""
    if isinstance(value, Mapping):
        return {key: _with_lists(item, innermost, outer) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    nested = any(isinstance(item, list | tuple) for item in value)
    return (outer if nested else innermost)(_with_lists(item, innermost, outer) for item in value)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)
