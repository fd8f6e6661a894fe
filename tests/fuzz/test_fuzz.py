"""Damaged input of every kind: done, or refused with a message that names it, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.cases import judged, prepared

SOME = {"folders": (3, 50), "recipes": (3, 20), "checkpoints": (2, 20), "data": (2, 20), "resumes": (1, 10)}
"""Of each kind, how many tests and how many cases each: 300 in all."""
MANY = {"folders": (10, 100), "recipes": (8, 100), "checkpoints": (4, 100), "data": (4, 100), "resumes": (4, 100)}
"""3,000 in all, other ones."""


def slices(table: dict[str, tuple[int, int]], begin: int) -> list[tuple[str, int, int]]:
    return [(kind, begin + i * size, begin + (i + 1) * size) for kind, (num, size) in table.items() for i in range(num)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where what the cases of a kind begin with is, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = prepared(kind, tmp_path_factory.mktemp("fuzz"))
        return made[kind]

    return of


def check(kind: str, first: int, end: int, base: Path, place: Path) -> None:
    failures = []
    for number in range(first, end):
        case, outcome = judged(kind, number, base, place)
        if outcome.faults:
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
