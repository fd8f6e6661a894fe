"""Damaged input of every kind: done, or refused with a message that names it, and nothing else happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from places import ROOT

SOME = {"folders": (2, 100), "recipes": (2, 30), "checkpoints": (1, 15), "data": (1, 15), "resumes": (1, 10)}
"""Of each kind, how many tests and how many cases each: 300 in all."""
MANY = {"folders": (10, 100), "recipes": (8, 100), "checkpoints": (4, 100), "data": (4, 100), "resumes": (4, 100)}
"""3,000 in all, other ones."""


def slices(table: dict[str, tuple[int, int]], begin: int) -> list[tuple[str, int, int]]:
    return [(kind, begin + i * size, size) for kind, (num, size) in table.items() for i in range(num)]


def check(kind: str, first: int, number: int) -> None:
    """In a process of its own: where autograd has threads, no case could be forked."""
    path = os.pathsep.join(str(ROOT / name) for name in ("tests", "", "plugins"))
    command = [sys.executable, "-m", "fuzz", kind, str(first), str(number)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"PYTHONPATH=.:plugins:tests python -m fuzz {kind} NUMBER:\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "number"), slices(SOME, 0))
def test_some(kind: str, first: int, number: int) -> None:
    check(kind, first, number)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "number"), slices(MANY, 1000))
def test_many(kind: str, first: int, number: int) -> None:
    check(kind, first, number)
