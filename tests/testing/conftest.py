"""Which checks of the conformance kit are slow tests here."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An import in a new process takes seconds; that plugins are light is a quick test of the command line too."""
    for item in items:
        if item.name.startswith("test_built_in_plugins[") and item.name.endswith("-light_import]"):
            item.add_marker(pytest.mark.slow)
