"""Numbers in recipes are those of YAML 1.2: what looks like one is that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_core.parsing.yaml12 import dump_yaml, load_yaml
from tinyfusion_core.pipeline.recipe import flatten

RECIPES = sorted(path for top in ("recipes", "tests", "benchmarks") for path in (ROOT / top).rglob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", 17), ("08", 8), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5),
        ("1.", 1.0), ("1.0e-04", 1e-4), ("-.inf", float("-inf")), ("true", True), ("False", False), ("null", None),
        ("~", None), ("", None), ("2:4", "2:4"), ("1:30:00", "1:30:00"), ("1:30.5", "1:30.5"), ("0b11", "0b11"),
        ("1_000", "1_000"), ("yes", "yes"), ("off", "off"), ("2024-01-01", "2024-01-01"),
        ("{a: &x {b: 017}, c: {<<: *x}}", {"a": {"b": 17}, "c": {"b": 17}}),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["!!int 2:4", "!!float 1:30", "9" * 5000, "[" * 5000])
def test_what_is_no_yaml_of_ours(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_of_before_read_as_before(path: Path) -> None:
    assert load_yaml(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("text", ["2:4", "1e-4", "08", "0o17", "yes", "2024-01-01", "1_000", "~", "=", ".5", "17", ""])
def test_what_is_written_reads_the_same_in_either_version(text: str) -> None:
    value = {text: [text, 1e-4, 1e22, 17, True, None]}
    assert load_yaml(dump_yaml(value)) == yaml.safe_load(dump_yaml(value)) == value


def test_numbers_reach_the_settings(recipe: Path) -> None:
    text = recipe.read_text().replace("pattern:\n  - 2\n  - 4", "pattern: 2:4").replace("steps: 12", "steps: 012")
    recipe.write_text(text.replace("lr_gates: 0.01", "lr_gates: 1e-2"))
    read = tiny.load_recipe(recipe, ["--trainer.batch_size=016", "--search.tau", "[4, 1e-1]"])
    search = read.settings["search"]["init_args"]
    assert search["pattern"] == "2:4"
    assert (search["steps"], search["lr_gates"], search["tau"]) == (12, 0.01, [4.0, 0.1])
    assert read.trainer.batch_size == 16
    read.save(recipe.parent / "resolved")
    assert flatten(tiny.load_recipe(recipe.parent / "resolved" / "recipe.yaml").settings) == flatten(read.settings)
    for pattern in ("[3:4, 2:4]", "[[3, 4], 2:4]", "{blocks: 2:4}", "{blocks: [3:4, [2, 4]]}"):
        tiny.load_recipe(recipe, [f"--search.pattern={pattern}"])


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_recipe_in_another_encoding(recipe: Path, encoding: str) -> None:
    recipe.write_text("# Schlüssel\n" + recipe.read_text(), encoding=encoding)
    with pytest.raises(tiny.UserError, match=r"small.yaml: not text in UTF-8"):
        tiny.load_recipe(recipe)
    recipe.write_text(recipe.read_text(encoding=encoding), encoding="utf-8-sig")
    tiny.load_recipe(recipe)
