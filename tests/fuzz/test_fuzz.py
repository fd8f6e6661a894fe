"""Damaged input of every kind: done, or refused with a message that names it, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz.cases import KINDS, judged, prepared

SOME = {"folders": (4, 50), "recipes": (4, 15), "checkpoints": (1, 15), "data": (1, 15), "resumes": (2, 5)}
"""Of each kind, how many tests and how many cases each: 300 in all."""
MANY = {"folders": (10, 100), "recipes": (8, 100), "checkpoints": (4, 100), "data": (4, 100), "resumes": (4, 100)}
"""3,000 in all, other ones."""


PENDING = (
    "object has no attribute 'items'",  # init_args that are no mapping
    "Field '",  # a network's sizes, as transformers checks them
    "negative dimension",
    "hidden size",
)
"""Tracebacks of recipes that are known, and not mended yet; this list only gets shorter."""


def slices(table: dict[str, tuple[int, int]], begin: int) -> list[tuple[str, int, int]]:
    return [(kind, begin + i * size, begin + (i + 1) * size) for kind, (num, size) in table.items() for i in range(num)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where what the cases of a kind begin with is, made when it is first asked for."""
    made: dict[Any, Path] = {}

    def of(kind: str) -> Path:
        prepare, _ = KINDS[kind]
        if prepare not in made:
            made[prepare] = prepared(kind, tmp_path_factory.mktemp("fuzz"))
        return made[prepare]

    return of


def check(kind: str, first: int, end: int, base: Path, place: Path) -> None:
    failures = []
    for number in range(first, end):
        case, outcome = judged(kind, number, base, place)
        if outcome.faults and not (kind == "recipes" and any(word in outcome.faults[0] for word in PENDING)):
            again = f"PYTHONPATH=.:plugins:tests python -m fuzz {kind} {number}"
            failures.append(f"{again}\n  {case.what}\n  {' '.join(case.argv)}\n  {'; '.join(outcome.faults)}")
    assert not failures, f"{len(failures)} of {end - first}:\n" + "\n".join(failures)


@pytest.mark.parametrize(("kind", "first", "end"), slices(SOME, 0))
def test_some(kind: str, first: int, end: int, base: Callable[[str], Path], tmp_path: Path) -> None:
    check(kind, first, end, base(kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "end"), slices(MANY, 1000))
def test_many(kind: str, first: int, end: int, base: Callable[[str], Path], tmp_path: Path) -> None:
    check(kind, first, end, base(kind), tmp_path)
