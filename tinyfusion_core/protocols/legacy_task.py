"""Tasks as they were given until 0.1: with `pixels`, which showed an example. It works for one release, and warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

from .data import DataSource, Samples

Task = TypeVar("Task", bound=type[Any])


def takes_pixels(cls: Task) -> Task:
    """Let a class of tasks be made with `pixels`, and be asked for it; now its data source is."""
    init = cls.__init__

    @wraps(init)
    def made(self: Any, *, pixels: Callable[[Tensor], Tensor | None] | None = None, **fields: Any) -> None:
        if pixels is not None:
            _warn("Task(pixels=...) is now Task(data=...), the data source that has the method")
            fields["data"] = _Shown(fields["train"], fields["held_out"], pixels)
        init(self, **fields)

    def shown(self: Any) -> Callable[[Tensor], Tensor | None]:
        _warn("Task.pixels is now a method of Task.data, if its examples can be shown")
        return getattr(self.data, "pixels", lambda x: None)

    cls.__init__ = made
    cls.pixels = property(shown)
    return cls


@dataclass(frozen=True, eq=False)
class _Shown(DataSource):
    examples: Samples
    others: Samples
    pixels: Callable[[Tensor], Tensor | None]

    def train(self) -> Samples:
        return self.examples

    def held_out(self) -> Samples:
        return self.others


def _warn(what: str) -> None:
    warnings.warn(what, DeprecationWarning, stacklevel=3)
