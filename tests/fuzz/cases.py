"""The kinds of cases, each by its number: the same number is the same case."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz import checkpoints, data, folders, recipes
from fuzz.runner import Case, Outcome, run

Make = Callable[[random.Random, Path, Path], Case]
KINDS: dict[str, tuple[Callable[[Path], None], Make]] = {
    "folders": (folders.prepare, partial(folders.make, quick=True)),
    "resumes": (folders.prepare, partial(folders.make, quick=False)),
    "checkpoints": (checkpoints.prepare, checkpoints.make),
    "data": (data.prepare, data.make),
    "recipes": (recipes.prepare, recipes.make),
}
"""What is prepared once, and what makes a case of it."""


def prepared(kind: str, place: Path) -> Path:
    """Make what the cases of a kind begin with; returns its folder."""
    base = place / f"base of {kind}"
    base.mkdir()
    KINDS[kind][0](base)
    return base


def judged(kind: str, number: int, base: Path, place: Path) -> tuple[Case, Outcome]:
    """Make a case and run it."""
    folder = place / f"{kind}-{number}"
    folder.mkdir()
    try:
        case = KINDS[kind][1](random.Random(f"{kind} {number}"), base, folder)
        return case, run(case)
    finally:
        shutil.rmtree(folder)
