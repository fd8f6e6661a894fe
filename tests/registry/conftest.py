"""Every test of plugins has its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyfusion_core.registry import registry as plugins


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the plugins of another."""
    monkeypatch.setattr(plugins, "_files", {})
    plugins._installed.cache_clear()
    yield
    monkeypatch.undo()
    plugins._installed.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages count as installed."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins._installed.cache_clear()
    return tmp_path / "site"
