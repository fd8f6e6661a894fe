"""docs/search.md: every example is a search that can be planned."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from places import ROOT
from tinyfusion_core.pipeline.recipe import load_recipe
from tinyfusion_core.selection.costs import NetworkCosts

EXAMPLES = [
    example["search"]
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.S)
    for example in yaml.safe_load_all(block)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=json.dumps)
def test_every_example_can_be_planned(example: object) -> None:
    recipe = load_recipe(ROOT / "recipes" / "dit_xl_d14.yaml", [f"--search={json.dumps(example)}"])
    assert recipe.search is not None
    size = NetworkCosts(blocks=(24_000_000,) * 28, outside=5_000_000)
    selector = recipe.search.bound({budget.name: size for budget in recipe.search.cost_budgets()})
    assert 0 < len(selector.preview([f"blocks.{i}" for i in range(28)]).kept) < 28
