"""The schema of recipes, made from the signatures of the classes."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from jsonargparse import ArgumentParser, _loaders_dumpers, set_parsing_settings

from ..comparison.legacy_keys import PATHS
from ..comparison.study import Audit, Compare
from ..errors import UserError, nearest
from ..evaluation.metrics import Metric
from ..parsing.settings import PYTHON, Settings, item_of, spelled
from ..parsing.yaml12 import Loader
from ..protocols.backbone import Backbone
from ..protocols.data import DataSource
from ..protocols.loss import LossAdapter
from ..registry.hooks import KINDS
from ..registry.registry import registry
from ..runtime.files import named_now
from ..samplers.constraints import Rules
from ..selection.base import FOLLOWS, Selector
from ..selection.search import Search
from ..training.recover import Recover
from ..training.teacher_cache.settings import TeacherCache
from ..training.trainer import Trainer
from ..training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class Round(Settings):
    """One round of progressive pruning; its student is the next round's teacher.

    Args:
        search: decides which blocks are kept.
        recover: trains the pruned network.
    """

    search: Selector
    recover: Recover | None = None


SECTIONS: dict[str, Any] = {
    "backbone": Backbone,
    "loss": LossAdapter,
    "data": DataSource,
    "trainer": Trainer,
    "train": Recover,
    "search": Selector,
    "recover": Recover,
    "rounds": dict[str, Round],
    "evaluate": list[Metric],
    "compare": Compare,
    "audit": Audit,
}
KEYS = ("plugins", *SECTIONS)
BASES = {name: kind.base_class() for name, kind in KINDS.items() if name != "command"}
"""The kinds of the registry whose classes a recipe can name, and their base classes."""
POLYMORPHIC: tuple[type[Any], ...] = (*BASES.values(), Search)
"""Types of values that are given as the name of a class."""
PLAIN = (Trainer, Recover, Round, Rules, TeacherCache, Validation, Compare, Audit)
"""Classes of sections that do not name their class."""
WRONG = object()
"""What stands for a value that is left out, because it cannot be one."""
SAID_BY = {
    "loss": "Shallowest", "metric": "Shallowest",
    "pattern": "Search", "sampler": "Search", "keep": "Race", "budget": "Race",
}  # fmt: skip
"""The class of a selector without one, by the first of these keys that it has; `Race` if it has none."""
OPTIONAL = ("train", "search", "recover", "rounds", "compare", "audit")


def schema() -> ArgumentParser:
    """Return the parser of recipes, made from the signatures of the classes."""
    set_parsing_settings(subclasses_enabled=list(POLYMORPHIC), subclasses_disabled=[*plain()])
    parser = ArgumentParser(prog="tinyfusion run RECIPE", exit_on_error=False)
    for name, kind in SECTIONS.items():
        if kind is Trainer:
            known = arguments_of(kind)
            parser.add_class_arguments(
                kind, name, skip={p for p in inspect.signature(kind).parameters if p not in known}
            )
            continue
        optional = kind | None if name in OPTIONAL else kind
        parser.add_argument(f"--{name}", type=optional, default=[] if name == "evaluate" else None)
    return parser


def arguments_of(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class that are keys of recipes, by name."""
    python = {field.name for field in fields(cls) if PYTHON in field.metadata} if is_dataclass(cls) else set()
    return {k: p for k, p in inspect.signature(cls).parameters.items() if not k.startswith("_") and k not in python}


@contextmanager
def yaml12_numbers() -> Iterator[None]:
    """Let the parser of `schema` read texts as YAML 1.2 while the context is open.

    It reads them where it expects a number, by a YAML 1.1 that no setting changes: "2:4" would be 124.
    """
    before = _loaders_dumpers.yaml_default_loader
    _loaders_dumpers.yaml_default_loader = Loader  # type: ignore[assignment]
    try:
        yield
    finally:
        _loaders_dumpers.yaml_default_loader = before


def checked(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the sections of a recipe with full class paths, as the parser of `schema` needs them.

    Args:
        raw: the recipe.
        problems: unknown names and values that are no arguments are added to it, with their keys and the nearest known
            names; the result is without them.
    """
    found = {}
    for name, value in raw.items():
        if name not in SECTIONS:
            problems.append(f"{name}: unknown key{nearest(str(name), KEYS)}")
        elif (section := _checked(name, value, SECTIONS[name], problems)) is not WRONG:
            found[name] = section
    return found


def follow_recovery(sections: Mapping[str, Any]) -> None:
    """Set what selectors and compared recoveries take from the recovery beside them, where the recipe does not say it.

    Args:
        sections: checked sections of a recipe; changed in place.
    """
    selectors = {_path(cls): cls for cls in known(Selector).values()}
    whole = {key: value for key, value in sections.items() if key != "rounds"}
    for part in (whole, *sections.get("rounds", {}).values()):
        if recovery := part.get("recover"):
            for selects in ("search", "compare", "audit"):
                _follow(part.get(selects), recovery, selectors)
            compared = (part.get("compare") or {}).get("recoveries") or {}
            for name, changed in compared.items() if isinstance(compared, dict) else ():
                compared[name] = {**recovery, **changed} if isinstance(changed, dict) else changed


def _follow(value: Any, recovery: Mapping[str, Any], selectors: Mapping[str, type[Any]]) -> None:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _follow(item, recovery, selectors)
    cls = selectors.get(str(value.get("class_path"))) if isinstance(value, dict) else None
    if is_dataclass(cls):
        for field in fields(cls):
            if (option := field.metadata.get(FOLLOWS)) is not None:
                said = option(recovery) if callable(option) else recovery.get(option, getattr(Recover, option))
                value["init_args"].setdefault(field.name, said)


def plain() -> list[type[Any]]:
    """Return `PLAIN`, and the parts of plugins' classes that do not name their class either."""
    classes = [cls for kind in registry().classes.values() for cls in kind.values()]
    hints = [without_none(hint) for cls in classes for hint in typing.get_type_hints(cls.__init__).values()]
    return list(dict.fromkeys([*PLAIN, *(hint for hint in hints if inspect.isclass(hint) and is_plain(hint))]))


def is_plain(kind: type[Any]) -> bool:
    """Return whether a value of this type is given by its keys alone."""
    return is_dataclass(kind) and issubclass(kind, Settings) and not issubclass(kind, POLYMORPHIC)


def known(base: type[Any]) -> dict[str, type[Any]]:
    """Return the classes that a value of this type can be, by the names that recipes use."""
    kind = next(name for name, other in BASES.items() if issubclass(base, other))
    return {name: cls for name, cls in registry().classes[kind].items() if issubclass(cls, base)}


def _checked(key: str, value: Any, kind: Any, problems: list[str], default: Any = None) -> Any:
    kind = without_none(kind)
    if typing.get_origin(kind) in (list, Sequence) and isinstance(value, list):
        items = [_checked(f"{key}[{i}]", v, item_of(kind), problems) for i, v in enumerate(value)]
        return [item for item in items if item is not WRONG]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return _checked_entries(key, value, item_of(kind), problems)
    if value is None or not inspect.isclass(kind) or not (kind in POLYMORPHIC or is_plain(kind)):
        return value
    return _checked_object(key, value, kind, problems, default)


def _checked_entries(key: str, value: Mapping[Any, Any], kind: Any, problems: list[str]) -> Any:
    problems += [f"{key}: the name {k!r} is no text; put it in quotes" for k in value if not isinstance(k, str)]
    entries = {k: _checked_value(f"{key}.{k}", v, kind, problems) for k, v in value.items()}
    fit = {k: entry for k, entry in entries.items() if isinstance(k, str) and entry is not WRONG}
    return WRONG if entries and not fit else fit


def _checked_object(key: str, value: Any, kind: type[Any], problems: list[str], default: Any) -> Any:
    try:
        cls, arguments = (kind, value) if is_plain(kind) else _class_and_arguments(key, value, kind, default)
        if not isinstance(arguments, dict):
            keys = ", ".join(arguments_of(cls))
            of = f"keys among {keys}" if keys else "nothing in it"
            raise UserError(f"{key}: got {arguments!r}; expected a mapping with {of}")
    except UserError as e:
        problems.append(str(e))
        return WRONG
    path = {} if is_plain(kind) else {"class_path": _path(cls)}
    lacking = [name for name in _needed(cls) if name not in arguments]
    problems += [f"{key}.{name}: missing" for name in lacking]
    arguments = _checked_arguments(key, arguments, cls, problems)
    if lacking:
        return WRONG
    return {**path, "init_args": arguments} if path else arguments


def _class_and_arguments(key: str, value: Any, kind: type[Any], default: Any) -> tuple[type[Any], Any]:
    """The class of a value that is a class name, has one, or has only the arguments of the default class."""
    if isinstance(value, str):
        value = {"class_path": value}
    if isinstance(value, dict) and "class_path" not in value and (usual := _usual(value, kind, default)):
        value = {"class_path": usual, "init_args": value}
    if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
        raise UserError(f"{key}: give the name of a class, or class_path and init_args{nearest('', known(kind))}")
    extra = set(value) - {"class_path", "init_args"}
    if extra:
        raise UserError(f"{key}: '{min(map(str, extra))}' stands beside class_path; arguments go under init_args")
    arguments = {} if value.get("init_args") is None else value["init_args"]
    return _class(key, value["class_path"], kind), arguments


def _usual(arguments: Mapping[str, Any], kind: type[Any], default: Any) -> str | None:
    """The name of the class that arguments alone stand for; None if there is no such class."""
    if kind is Selector:
        return next((cls for key, cls in SAID_BY.items() if key in arguments), "Race")
    return "Search" if kind is Search else type(default).__name__ if isinstance(default, kind) else None


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _class(key: str, path: str, kind: type[Any]) -> type[Any]:
    name = path.rpartition(".")[2]
    cls = known(kind).get(name)
    if cls is not None:
        package = cls.__module__.partition(".")[0]
        # Its name alone, where it lies, the front door of its package or of the core, or where it once lay.
        doors = (cls.__module__, package, "tinyfusion_core")
        if path in (name, *(f"{door}.{name}" for door in doors), PATHS.get(f"{package}:{name}")):
            return cls
    raise UserError(f"{key}: unknown class '{path}'{nearest(name, known(kind))}")


def _checked_arguments(key: str, arguments: Mapping[Any, Any], cls: type[Any], problems: list[str]) -> dict[str, Any]:
    known = arguments_of(cls)
    hints = typing.get_type_hints(cls.__init__)
    out = {}
    for name, value in named_now(cls, arguments).items():
        hint = hints.get(name, Any)
        if name not in known:
            problems.append(f"{key}.{name}: {_unknown(str(name), cls, known)}")
        elif (found := _checked_value(f"{key}.{name}", value, hint, problems, known[name].default)) is not WRONG:
            out[name] = found
    return out


def _checked_value(key: str, value: Any, hint: Any, problems: list[str], default: Any = None) -> Any:
    """As `_checked`, of a value that is null only where its annotation says so."""
    if value is None and hint is not Any and type(None) not in typing.get_args(hint):
        problems.append(f"{key}: null is not allowed; expected {spelled(hint, yaml=True)}")
        return WRONG
    return _checked(key, value, hint, problems, default)


def _needed(cls: type[Any]) -> list[str]:
    """The arguments of a class that have no default; the block lists of a sampler come from the network."""
    given = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in given and p.name != "lists"]


def _unknown(name: str, cls: type[Any], keys: Collection[str]) -> str:
    """What to say of a key that a class does not have."""
    siblings = next((known(base) for base in BASES.values() if issubclass(cls, base)), {})
    owners = [other for other, sibling in siblings.items() if name in inspect.signature(sibling).parameters]
    if not owners:
        return f"unknown key{nearest(name, keys)}"
    return (
        f"a key of {', '.join(owners)}, and this is a {cls.__name__}; say which you mean as class_path, with init_args"
    )


def without_none(kind: Any) -> Any:
    """The class in `X | None`, and in a factory `Callable[[...], X]`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else Any
    if typing.get_origin(kind) is Callable and typing.get_args(kind)[-1] in POLYMORPHIC:
        return typing.get_args(kind)[-1]
    return kind
