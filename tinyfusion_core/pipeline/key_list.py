"""Describes the keys of recipes, from the signatures and docstrings of the classes."""

from __future__ import annotations

import json
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import docstring_parser

from ..errors import UserError, nearest
from ..parsing.settings import item_of, spelled
from ..selection.base import Selector
from .schema import BASES, POLYMORPHIC, SAID_BY, SECTIONS, arguments_of, is_plain, known, plain, without_none

PLUGINS = (
    f"plugins: Python files beside the recipe that bring classes ({', '.join(BASES).replace('_', ' ')}); their code "
    "is run"
)


@dataclass(frozen=True)
class _Key:
    name: str
    about: str
    meaning: str


@dataclass(frozen=True)
class _Class:
    name: str
    meaning: str
    keys: tuple[_Key, ...]


def describe_keys(word: str = "") -> str:
    """Return the keys of a recipe with their types, defaults and meanings. What was said before is not said again.

    Args:
        word: a section, a class, or a part of a key, as `batch_size` or `search.st`; empty for all.

    Raises:
        UserError: there is nothing of that name.
    """
    lines, told = [] if word else [PLUGINS], dict[Any, str]()
    names = set[str]()
    for section, title, classes in _sections():
        wanted = list(_wanted(word.lower(), section, classes))
        names.update([section, *(cls.name for cls in classes), *(key.name for cls in classes for key in cls.keys)])
        if wanted and (before := told.setdefault(tuple(wanted), section)) != section:
            lines.append(f"{title} as {before}")
        elif wanted:
            lines += [title, *(line for cls in wanted for line in _described(cls, told))]
    if lines:
        return "\n".join(lines) + "\n"
    if "." in word:  # as messages write them: recover.kd.alpha_kd
        return describe_keys(word.rpartition(".")[2])
    raise UserError(f"keys: nothing is named '{word}'{nearest(word, names)}")


def _sections() -> Iterator[tuple[str, str, list[_Class]]]:
    """Yield what recipes consist of: a name, a title, and the classes that stand there."""
    bases = {section: without_none(item_of(kind)) for section, kind in SECTIONS.items()}
    for section, base in bases.items():
        said = ", ".join(f"{key} means {cls}" for key, cls in SAID_BY.items())
        classes = known(base) if base in POLYMORPHIC else {base.__name__: base}
        yield section, f"{section}:" + f" without class_path {said}" * (base is Selector), _read(classes)
    for base in (*plain(), *BASES.values()):
        if base not in bases.values():
            classes = {base.__name__: base} if is_plain(base) else known(base)
            yield base.__name__, f"values of the type {base.__name__}:", _read(classes)


def _wanted(word: str, section: str, classes: Collection[_Class]) -> Iterator[_Class]:
    for cls in classes:
        if word in ("", section.lower(), cls.name.lower()):
            yield cls
        elif keys := tuple(key for key in cls.keys if word in f"{section}.{key.name}".lower()):
            yield _Class(cls.name, cls.meaning, keys)


def _described(cls: _Class, told: dict[Any, str]) -> Iterator[str]:
    yield f"  {cls.name}: {cls.meaning}"
    for key in cls.keys:
        before = told.setdefault(key, cls.name)
        yield f"    {key.name}{key.about}: {key.meaning if before == cls.name else f'as in {before}'}"


def _read(classes: dict[str, type[Any]]) -> list[_Class]:
    return [_read_class(name, cls) for name, cls in classes.items()]


def _read_class(name: str, cls: type[Any]) -> _Class:
    # Inherited options are explained where they are declared.
    texts = [docstring_parser.parse(part.__doc__ or "") for part in cls.__mro__[-2::-1]]
    meaning = {p.arg_name: " ".join((p.description or "").split()) for text in texts for p in text.params}
    made = (
        {f.name: f.default_factory() for f in fields(cls) if callable(f.default_factory)} if is_dataclass(cls) else {}
    )
    hints, keys = typing.get_type_hints(cls.__init__), []
    for key, parameter in arguments_of(cls).items():
        if key != "lists":
            default = "" if parameter.default is parameter.empty else f" = {_yaml(made.get(key, parameter.default))}"
            about = f" ({spelled(hints.get(key, Any), yaml=True)}){default}"
            keys.append(_Key(key, about, meaning.get(key, "")))
    return _Class(name, texts[-1].short_description or "", tuple(keys))


def _yaml(value: Any) -> str:
    """A default as recipes spell it; an object, which they spell in many words, as in Python."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)
