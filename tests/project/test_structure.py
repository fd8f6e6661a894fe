"""The code stays readable: small modules, small folders, functions that branch little."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from radon.visitors import ComplexityVisitor, Function

from places import ROOT, TESTS

CODE = [path for top in ("tinyfusion_core", "plugins") for path in sorted((ROOT / top).rglob("*.py"))]


def too_long(paths: list[Path], most: int) -> dict[str, int]:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    return {path: length for path, length in lengths.items() if length > most}


def test_no_module_is_longer_than_300_lines() -> None:
    assert too_long(CODE, 300) == {}


def test_no_file_of_tests_is_longer_than_400_lines() -> None:
    assert too_long(sorted(TESTS.rglob("*.py")), 400) == {}


def test_no_folder_has_more_than_10_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in CODE if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > 10} == {}


@pytest.mark.parametrize("top", ["tinyfusion_core", "plugins"])
def test_no_function_branches_more_than_15_ways(top: str) -> None:
    found = {}
    for path in (path for path in CODE if (ROOT / top) in path.parents):
        functions = list(ComplexityVisitor.from_code(path.read_text()).blocks)
        for block in functions:
            functions += getattr(block, "methods", []) + getattr(block, "closures", [])
            if isinstance(block, Function) and block.complexity > 15:
                found[f"{path.relative_to(ROOT)}: {block.name}"] = block.complexity
    assert found == {}
