"""What pages show besides Python: recipes that are read, and commands that are understood."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_core.cli import parse
from tinyfusion_core.cli.results import LORA
from tinyfusion_core.pipeline.exporting.export import FORMATS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
OF_A_PLUGIN = "backbone: MyBackbone"
"""A recipe that begins so is that of the plugin template, which has tests of its own."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


RECIPES = [
    pytest.param(settings, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, settings in enumerate(s for b in blocks(page, "yaml") if OF_A_PLUGIN not in b for s in yaml.safe_load_all(b))
]
COMMANDS = sorted(
    {
        found.split("  #")[0].split(" && ")[0].rstrip(" &")
        for page in PAGES
        for block in blocks(page, "bash")
        for found in re.findall(r"^(?:.* -m tinyfusion_core|tinyfusion) (.*)$", block.replace("\\\n", ""), re.MULTILINE)
    }
)


@pytest.mark.parametrize("settings", RECIPES)
def test_recipes_are_read(settings: dict) -> None:
    tiny.load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"--{k}={json.dumps(v)}" for k, v in settings.items()])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    parse(shlex.split(command))


def test_every_format_of_exports_is_explained() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "other-tools.md").read_text().split("\n## ")[1], re.MULTILINE)
    assert set(re.findall(r"`([\w.-]+)`", " ".join(rows[1:]))) == {*FORMATS, LORA}


def test_there_are_some() -> None:
    assert len(RECIPES) > 20
    assert len(COMMANDS) > 30
