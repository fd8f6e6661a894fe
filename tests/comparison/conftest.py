"""What tests of comparisons count, and what they do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

import tinyfusion_core as tiny


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage after every training, which takes longer than the trainings of these tests."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often anything was decided or recovered."""
    count: Counter[str] = Counter()

    def counted(cls: type, what: str) -> None:
        original: Callable = cls.__call__

        def call(*args, **kwargs):
            count[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, "__call__", call)

    counted(tiny.Recover, "recovered")
    counted(tiny.Search, "decided")
    counted(tiny.Criterion, "decided")  # every criterion is called through the base class
    return count
