"""Marks of single cases of a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def slow_but(values: Iterable[T], *quick: T) -> list[object]:
    """Cases of which only some run in `make test`; `make test-all` runs all of them."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
