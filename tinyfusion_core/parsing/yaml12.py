"""YAML as recipes are written in it: the core schema of YAML 1.2, whose plain scalars mean what they look like.

PyYAML reads YAML 1.1, where `2:4` is 124, `017` is 15, `1e-4` is a text and `no` is false.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

DEEPEST, MOST = 100, 1_000_000
"""How many lists and mappings a value may be in, and how many values there may be."""
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_KINDS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
)
"""Section 10.3.2 of YAML 1.2.2: tags, what they match, and first characters; an integer is no float."""


def load_yaml(text: str) -> Any:
    """Read a YAML 1.2 document: JSON's types alone. Merge keys (`<<`) of YAML 1.1 are read too.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    try:
        value = yaml.load(text, Loader=Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    if _size(value, DEEPEST, {}) > MOST:
        raise yaml.YAMLError("its aliases make it too large")
    return value


def _size(value: Any, depth: int, known: dict[int, int]) -> int:
    """The number of values in a value; aliases make a small document large, or one that never ends."""
    if not isinstance(value, (dict, list)):
        return 1
    if depth == 0:
        raise yaml.YAMLError("it is nested too deeply")
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, depth - 1, known) for part in inner)
    return known[id(value)]


def dump_yaml(value: Any) -> str:
    """Write a value of JSON's types as YAML that readers of 1.1 and of 1.2 read alike; keys keep their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    # A table of its own, not the parent's with more: what 1.1 alone takes for a number or a date stays a text.
    yaml_implicit_resolvers: dict[Any, Any] = {"<": [(f"{_TAG}merge", re.compile(r"<<\Z"))]}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping whose keys are all different; those that are merged in may be among them."""
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge"]
        if twice := [key for key in own if own.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice[0]}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """Make an integer or float of a scalar that is one by its looks or by its tag."""
        text = node.value
        try:
            if _INT.fullmatch(text) and node.tag == f"{_TAG}int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            if _FLOAT.fullmatch(text):
                return float(re.sub(r"\.(?=[in])", "", text.lower()))  # Python writes inf and nan without the point
        except ValueError:
            pass  # more digits than Python converts
        raise yaml.constructor.ConstructorError(None, None, f"'{text[:40]}' is not a number", node.start_mark)

    def text(self, node: yaml.ScalarNode) -> str:
        """Make a text of a scalar: one that files and terminals can hold."""
        text = str(self.construct_scalar(node))
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise yaml.constructor.ConstructorError(
                None, None, "a text holds a zero byte or half of a character", node.start_mark
            )
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version takes for something else."""


for _name, _pattern, _first in _KINDS:
    for _class in (Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
Loader.add_constructor(f"{_TAG}str", Loader.text)
for _name in ("int", "float"):
    Loader.add_constructor(f"{_TAG}{_name}", Loader.number)
