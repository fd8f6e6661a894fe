"""Damage: to values of JSON and YAML, to bytes, and to files."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz.runner import CANARY

Place = tuple[Any, ...]
CODE = f"__import__('os').system('touch {CANARY}')"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "0", "1e3", "nan", "ü", "\x00", "a\x00b", "n" * 300, "../elsewhere", "/", "~", ".", "con:1",
    CODE, "${HOME}", "!!python/object", "[/b]", "\ud800", "\x1b[31m",
    [], {}, [[]], [None], [1, 2], ["x"], {"x": 1}, {"": None},
)  # fmt: skip


NESTED = re.compile(r'"?@(lists|mappings)@(\d+)@"?')


def nested(depth: int, of: str) -> str:
    """A mark that `written` replaces by a value in so many lists or mappings; Python's encoders do not go that deep."""
    return f"@{of}@{depth}@"


def written(text: str) -> bytes:
    """The bytes of a text of JSON or flow YAML, with what is nested in it."""

    def spell(found: re.Match[str]) -> str:
        before, after = {"lists": ("[", "]"), "mappings": ('{"x": ', "}")}[found[1]]
        return before * int(found[2]) + "1" + after * int(found[2])

    return NESTED.sub(spell, text).encode(errors="surrogatepass")


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where the parts of a value are."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*place, key))


def altered(rng: random.Random, value: Any) -> tuple[Any, Place, str]:
    """A value with one part of it replaced, removed or added; where; and what was done."""
    value = copy.deepcopy(value)
    known = list(places(value))
    place = rng.choice(known[:1] if rng.random() < 0.05 else known[1:] or known)
    if not place:
        new = another(rng, value)
        return new, place, f"all of it is {new!r:.60}"
    inside, last = value, place[-1]
    for key in place[:-1]:
        inside = inside[key]
    how = rng.random()
    if how < 0.2:
        del inside[last]
        return value, place, f"without {spelled(place)}"
    if how < 0.3 and isinstance(inside, dict):
        inside[rng.choice((f"{last}s", "", "x", str(last).upper(), "a.b"))] = inside[last]
        return value, place, f"with a copy of {spelled(place)}"
    if how < 0.35 and isinstance(inside, list):
        inside.insert(last, inside[last])
        return value, place, f"with {spelled(place)} twice"
    inside[last] = another(rng, inside[last])
    return value, place, f"{spelled(place)} is {inside[last]!r:.60}"


def another(rng: random.Random, value: Any) -> Any:
    """Something else than a value, and of another kind more often than not."""
    if rng.random() < 0.3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice((-value, value + 1, value * 10**9, float(value), str(value), [value]))
    if rng.random() < 0.1:
        return nested(rng.choice((3, 200, 3000)), rng.choice(("lists", "mappings")))
    return copy.deepcopy(rng.choice(VALUES))


def spelled(place: Place) -> str:
    return ".".join(map(str, place)) or "the whole"


def damaged(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Bytes with some of them lost, changed or added; and what was done."""
    at = rng.randrange(len(content) + 1)
    ways: tuple[tuple[str, bytes], ...] = (
        ("empty", b""),
        (f"cut at {at}", content[:at]),
        (f"without the first {at}", content[at:]),
        (f"0xff at {at}", content[:at] + b"\xff" + content[at:]),
        (f"0x00 at {at}", content[:at] + b"\x00" + content[at:]),
        (f"a flipped bit at {at}", content[:at] + bytes(b ^ 64 for b in content[at : at + 1]) + content[at + 1 :]),
        (f"zeros from {at}", content[:at] + bytes(len(content) - at)),
        ("twice", content * 2),
        ("UTF-16", content[:20000].decode(errors="replace").encode("utf-16")),
        ("a byte order mark", b"\xef\xbb\xbf" + content),
        ("noise", rng.randbytes(200)),
        ("deep lists", b"[" * 100_000),
        ("deep mappings", b'{"a":' * 100_000),
        ("spaces", b" " * 64),
        ("a number", b"7" * 5000),
    )
    what, made = rng.choice(ways)
    return made, what


def replaced(rng: random.Random, path: Path) -> str:
    """Put something else in the place of a file; returns what."""
    way = rng.choice(("nothing", "a folder", "a FIFO", "a link to itself", "a link to nothing", "a link to a folder"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a FIFO":
        os.mkfifo(path)
    elif way.startswith("a link"):
        to = {"a link to itself": path.name, "a link to nothing": "/nowhere/at/all", "a link to a folder": "."}
        path.symlink_to(to[way])
    return way


def harm_file(rng: random.Random, path: Path) -> str:
    """Damage a file, as JSON where it is; returns what was done to it."""
    if rng.random() < 0.15:
        return f"{path.name}: {replaced(rng, path)}"
    content = path.read_bytes()
    writer = WRITERS.get(path.suffix)
    if writer is not None and rng.random() < 0.75:
        made, what = writer(rng, content)
    else:
        made, what = damaged(rng, content)
    path.write_bytes(made)
    return f"{path.name}: {what}"


def _json(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    made, _, what = altered(rng, json.loads(content))
    return written(json.dumps(made)), what


def _json_lines(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    lines = content.splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    made, what = rng.choice((_json, damaged))(rng, lines[at])
    return b"\n".join([*lines[:at], made, *lines[at + 1 :]]) + b"\n", f"line {at + 1}: {what}"


WRITERS: dict[str, Callable[[random.Random, bytes], tuple[bytes, str]]] = {".json": _json, ".jsonl": _json_lines}
