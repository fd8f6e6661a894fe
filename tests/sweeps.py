"""Examines every family of a library, for the pages that say what was found."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

import torch


class Found(Protocol):
    """What was found of a family."""

    def row(self, name: str) -> str:
        """Its row of the page."""
        ...


F = TypeVar("F", bound=Found)


def swept(names: Iterable[str], examine: Callable[[str, Path], F]) -> tuple[dict[str, F], list[str]]:
    """Examine families one after another, and print their rows. Returns what was found, and what went wrong."""
    found: dict[str, F] = {}
    faults = []
    for name in names:
        with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                found[name] = examine(name, Path(work))
                print(found[name].row(name), flush=True)
            except Exception as e:
                faults.append(f"{name}: {type(e).__name__}: {e}")
                print(faults[-1], flush=True)
    return found, faults
