"""Fixtures of the tests of DiT."""

from __future__ import annotations

import pytest

import golden_data


@pytest.fixture
def reference_sinusoid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
