"""Real handwritten digits, shipped with the package, and the features to judge generated ones by."""

from __future__ import annotations

from tinyfusion_core.data import DataSource
from tinyfusion_core.hookspecs import hookimpl
from tinyfusion_digits.data import Digits

__all__ = ["Digits"]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    return [Digits]
