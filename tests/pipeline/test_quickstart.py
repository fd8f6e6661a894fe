"""The main job, whole, on the real data that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from places import ROOT
from tinyfusion_core.cli import main

RECIPES = ROOT / "recipes"


@pytest.mark.slow
def test_the_quickstart_recovers_what_it_prunes(tmp_path: Path) -> None:
    assert main(["run", str(RECIPES / "quickstart.yaml"), "--run-dir", str(tmp_path)]) == 0
    rows = {m["name"]: m["values"] for m in json.loads((tmp_path / "metrics.json").read_text())["measurements"]}
    loss, distance = rows["held-out loss"], rows["Fréchet distance"]
    assert rows["blocks"]["recovered"] == 4
    assert loss["recovered"] < 1.1 * loss["teacher"] < loss["pruned"]
    assert distance["recovered"] < 2 * distance["teacher"] < distance["pruned"]
    assert rows["conditional accuracy"]["recovered"] > 0.9
