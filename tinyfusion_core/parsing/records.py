"""Reads files of text and JSON, and checks them against types: what is in a file may be anything."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ..errors import MissingFileError, UserError, closest

T = TypeVar("T")
DEEPEST = 100
"""How many lists and mappings a value of a file may be in; our own files have a handful."""
_PLAIN = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    NoneType: "null",
    list: "a list",
    dict: "a mapping",
}


def check_regular(path: Path) -> None:
    """Check that a path is a file that can be read to its end: a FIFO would wait for somebody to write.

    Raises:
        MissingFileError: there is nothing.
        UserError: it is something else than a file.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"{path}: no such file{beside(path)}") from None
    except (OSError, ValueError) as e:  # a ValueError if its name holds a zero byte
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
        raise UserError(f"{path}: is {what}; expected a file")


def beside(path: Path) -> str:
    """Return a hint for a message about a path that is not there: what lies beside it and has a name like it."""
    try:
        near = None if path.exists() else closest(path.name, [other.name for other in path.parent.iterdir()])
    except (OSError, ValueError):  # a ValueError if its name holds a zero byte
        return ""
    return "" if near is None else f"; did you mean '{path.with_name(near)}'?"


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no file, not readable, or not UTF-8; names the byte.
    """
    check_regular(path)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not text in UTF-8 ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not readable, or not JSON that can be used.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a moderate depth, whose texts can be written.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    layer = [value]
    for _ in range(DEEPEST):
        layer = [part for inner in layer for part in _parts(inner)]
        if not layer:
            break
    else:
        raise ValueError("nested too deeply")
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]  # the one or the other
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a character") from None
    return value


def _parts(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_as(path: Path, kind: type[T], fix: str) -> T:
    """Read a JSON file and check what is in it; see `shaped`."""
    return shaped(read_json(path), kind, path, fix)


def shaped(value: Any, kind: type[T], path: Path | str, fix: str) -> T:
    """Check a value of JSON against a type, and return it in that type.

    Args:
        value: what was read.
        kind: a dataclass or `TypedDict` of plain types, lists, tuples, mappings, and of others like it. Keys that it
            does not name are ignored in a dataclass and kept in a `TypedDict`.
        path: the file, for messages.
        fix: the way on, for messages.

    Raises:
        UserError: a part is missing or of another type; names it, and what was expected.
    """
    try:
        made: T = _shaped(value, kind, "")
    except (_Mismatch, UserError) as e:  # a dataclass may refuse what has the right type
        raise UserError(f"{path}: {e}; {fix}") from None
    return made


def check_inside(names: Iterable[str], path: Path) -> None:
    """Check that the files that a file names are in its folder.

    Raises:
        UserError: one is elsewhere.
    """
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.name:
            raise UserError(f"{path}: names {name!r:.60}; expected a file in its folder. Do not use it")


class ShardIndex(TypedDict):
    """What is in the index of weights that lie in several files: the file of each."""

    weight_map: dict[str, str]


def check_folder(folder: Path) -> None:
    """Check a folder before another library reads it: its files are files, and its indexes name files in it.

    Raises:
        UserError: it is not so; names the file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin") and not path.is_dir():
            check_regular(path)
        if path.name.endswith(".index.json"):
            found = read_as(path, ShardIndex, "copy the whole folder again")
            check_inside(found["weight_map"].values(), path)


class _Mismatch(Exception):
    """A value is not what its type says."""

    def __init__(self, key: str, value: Any, expected: str) -> None:
        super().__init__(f"{f'{key!r} is' if key else 'it is'} {value!r:.60}; expected {expected}")


def _shaped(value: Any, kind: Any, key: str) -> Any:
    origin = get_origin(kind) or kind
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, get_args(kind), key)
    if origin is Literal:
        if not any(type(value) is type(word) and value == word for word in get_args(kind)):
            raise _Mismatch(key, value, _words(kind))
        return value
    if kind in (bool, int, float, str, NoneType):
        return _plain(value, kind, key)
    if origin in (list, tuple, Sequence):
        return _listed(value, kind, key)
    if not isinstance(value, dict):
        raise _Mismatch(key, value, _words(kind))
    if origin in (dict, Mapping):
        return {name: _shaped(part, get_args(kind)[1], f"{key}.{name}".lstrip(".")) for name, part in value.items()}
    return _mapping(value, kind, key)


def _plain(value: Any, kind: Any, key: str) -> Any:
    if kind is float:
        right = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    else:
        right = type(value) is kind and not (kind is int and abs(value) >= 10**300)
    if not right:
        raise _Mismatch(key, value, _words(kind))
    return value


def _one_of(value: Any, kinds: Sequence[Any], key: str) -> Any:
    inside: _Mismatch | None = None
    for kind in kinds:
        try:
            return _shaped(value, kind, key)
        except _Mismatch as e:
            # Of a list or mapping that is wrong inside, the message tells where.
            if isinstance(value, (list, dict)) and _words(kind) == _PLAIN[type(value)]:
                inside = e
    raise inside or _Mismatch(key, value, " or ".join(dict.fromkeys(map(_words, kinds))))


def _listed(value: Any, kind: Any, key: str) -> Any:
    origin, of = get_origin(kind) or kind, get_args(kind)
    if not isinstance(value, list):
        raise _Mismatch(key, value, _words(kind))
    if origin is tuple and of[-1] is not Ellipsis:
        if len(value) != len(of):
            raise _Mismatch(key, value, f"a list of {len(of)}")
        return tuple(_shaped(part, one, f"{key}[{i}]") for i, (part, one) in enumerate(zip(value, of, strict=True)))
    parts = [_shaped(part, of[0], f"{key}[{i}]") for i, part in enumerate(value)]
    return tuple(parts) if origin is tuple else parts


def _mapping(value: Mapping[str, Any], kind: Any, key: str) -> Any:
    """A mapping in the type of a dataclass or of a `TypedDict`."""
    made: dict[str, Any] = dict(value) if is_typeddict(kind) else {}
    if dataclasses.is_dataclass(kind):
        missing = dataclasses.MISSING
        needed = {f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing}
        hints = {f.name: get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}
    else:
        hints = get_type_hints(kind, include_extras=True)
        needed = {name for name, hint in hints.items() if get_origin(hint) is not NotRequired}
    for name, hint in hints.items():
        inner = f"{key}.{name}".lstrip(".")
        if name in value:
            made[name] = _shaped(value[name], get_args(hint)[0] if get_origin(hint) is NotRequired else hint, inner)
        elif name in needed:
            raise _Mismatch(inner, _Missing(), _words(hint))
    return made if is_typeddict(kind) else kind(**made)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


def _words(kind: Any) -> str:
    """A type in words."""
    origin = get_origin(kind) or kind
    if origin is NotRequired:
        return _words(get_args(kind)[0])
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    return _PLAIN.get(list if origin in (list, tuple, Sequence) else origin, _PLAIN[dict])
