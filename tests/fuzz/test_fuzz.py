"""Damaged input of every kind: done, or refused with a message that names it, and nothing else happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from places import ROOT

SOME = [("folders", 0, 4), ("recipes", 0, 2)]
"""Of some kinds the first case and how many, in one process: to start one costs more than its cases."""
MANY = {"folders": 10, "recipes": 8, "checkpoints": 4, "data": 4, "resumes": 4}
"""Of each kind, how many tests of a hundred cases: 3,000 in all, other ones."""


def check(*slices: tuple[str, int, int]) -> None:
    """In a process of its own: where autograd has threads, no case could be forked."""
    path = os.pathsep.join(str(ROOT / name) for name in ("tests", "", "plugins"))
    command = [sys.executable, "-m", "fuzz", *(str(word) for part in slices for word in part)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"PYTHONPATH=.:plugins:tests python -m fuzz KIND NUMBER:\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_some() -> None:
    check(*SOME)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first"), [(kind, 1000 + 100 * i) for kind, num in MANY.items() for i in range(num)])
def test_many(kind: str, first: int) -> None:
    check((kind, first, 100))
