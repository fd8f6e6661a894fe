"""Every causal family of transformers is right or refused, and the page of families says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_families import FAMILIES, PAGE, examine
from marks import slow_but

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
QUICK = ("gpt2",)
ROWS = {row.split()[1]: row for row in re.findall(r"^\| (?!family )\S+ \| \w+ \|.*$", PAGE.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("family", slow_but(FAMILIES, *QUICK))
def test_a_family_is_what_the_page_says(family: str, tmp_path: Path) -> None:
    row = examine(family, tmp_path).row(family)
    if f"transformers {transformers.__version__}," in PAGE.read_text():  # of another version it may differ
        assert row == ROWS[family], "run python tests/llm_families.py"


def test_the_page_lists_all_of_them() -> None:
    if f"transformers {transformers.__version__}," in PAGE.read_text():
        assert set(ROWS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts = [int(n) for n in re.findall(r"^## .*: (\d+)$", PAGE.read_text(), re.MULTILINE)]
    assert sum(counts) == len(ROWS)
    assert counts[0] >= 120
