"""Examines every family of a library, for the pages that say what was found."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import transformers


class Found(Protocol):
    """What was found of a family.

    Attributes:
        refused: why it cannot be pruned; said before anything is spent.
        unbuilt: why the library makes no small model of it.
    """

    refused: str
    unbuilt: str

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


def page(head: str, columns: str, found: Mapping[str, Found]) -> str:
    """The page of families of transformers, with these further columns of those that work."""
    parts = {
        "Work": (columns, [f.row(n) for n, f in found.items() if not f.refused and not f.unbuilt]),
        "Are refused before anything is spent": ("why", [f.row(n) for n, f in found.items() if f.refused]),
        "Have no small model": ("what transformers says", [f.row(n) for n, f in found.items() if f.unbuilt]),
    }
    text = head.format(version=transformers.__version__)
    for title, (names, rows) in parts.items():
        ruler = "|---" * (names.count("|") + 3)
        text += f"\n## {title}: {len(rows)}\n\n| family | class | {names} |\n{ruler}|\n" + "\n".join(rows) + "\n"
    return text


def write_page(path: Path, head: str, columns: str, names: Iterable[str], examine: Callable[[str, Path], F]) -> None:
    """Write the page of what is found of families, and exit, naming what is neither right nor refused."""
    found, faults = swept(names, examine)
    path.write_text(page(head, columns, found))
    sys.exit("\n".join(faults) or None)
