"""Classes that a recipe names by their path, of torch or of another package, with what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, TypeVar

from ..errors import UserError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class NamedClass:
    """How one key names a class.

    Attributes:
        key: the key, to begin messages with.
        package: the module of classes that are named without a path.
        example: one of them, or several, the last of which stands in the example of a path.
    """

    key: str
    package: str
    example: str

    def read(self, named: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the path of the class, and its arguments.

        Raises:
            UserError: it is neither a name nor `class_path` and `init_args`.
        """
        if isinstance(named, str):
            return named if "." in named else f"{self.package}.{named}", {}
        path, arguments = named.get("class_path"), named.get("init_args") or {}
        if not isinstance(path, str) or "." not in path or named.keys() - {"class_path", "init_args"}:
            one = self.example.split()[-1]
            raise UserError(f"{self.key}: give a name, {one}, or class_path, {self.package}.{one}, with init_args")
        if not isinstance(arguments, Mapping):
            raise UserError(f"{self.key}: init_args is {arguments!r:.60}; expected a mapping of arguments of {path}")
        return path, dict(arguments)

    def find(self, path: str, base: type[T]) -> type[T]:
        """Return the class at a path.

        Raises:
            UserError: its package is not installed, there is none, or it is none of this base.
        """
        package, see = path.partition(".")[0], f"see {self.example} of {self.package}"
        try:
            if find_spec(package) is None:
                raise UserError(f"{self.key}: {path} needs {package}, which is not installed; pip install {package}")
            found = resolve_name(path)
        except (ImportError, AttributeError, ValueError) as e:
            raise UserError(f"{self.key}: no {path} ({first_line(e)}); {see}") from None
        if not isinstance(found, type) or not issubclass(found, base):
            raise UserError(f"{self.key}: {path} is no {base.__name__}; {see}")
        return found
