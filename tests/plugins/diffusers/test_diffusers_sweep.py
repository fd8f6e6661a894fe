"""Every transformer of diffusers is right or refused, and the page of families says so."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from diffusers_sweep import CLASSES, PAGE, examine
from marks import slow_but

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of diffusers
QUICK = ("ChromaTransformer2DModel",)
ROWS = {row.split("`")[1]: row for row in PAGE.read_text().splitlines() if row.startswith("| `")}


@pytest.mark.parametrize("name", slow_but(CLASSES, *QUICK))
def test_a_class_is_what_the_page_says(name: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path).row(name)
    if f"diffusers {diffusers.__version__}," in PAGE.read_text():  # of another version it may differ
        assert row == ROWS[name], "run python tests/diffusers_sweep.py"


def test_the_page_lists_all_of_them() -> None:
    if f"diffusers {diffusers.__version__}," in PAGE.read_text():
        assert set(ROWS) == set(CLASSES)
    counts = [int(n) for n in re.findall(r"^## .*: (\d+)$", PAGE.read_text(), re.MULTILINE)]
    assert sum(counts) == len(ROWS)
    assert counts[0] >= 40
