"""A plugin that is a package of its own: installed with pip, checked, and run through a recipe."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from places import TESTS
from plugin_files import own_tests, pip_install
from small_run import run
from tinyfusion_core.registry import registry as plugins

pytestmark = pytest.mark.numerics

PACKAGE = TESTS / "third_party" / "tinyfusion_timm"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's source, and `site` with the package as pip installs it, offline."""
    folder = tmp_path_factory.mktemp("timm")
    shutil.copytree(PACKAGE, folder / "source")  # pip builds in the place where the source is
    pip_install(folder / "source", folder / "site")
    return folder


@pytest.mark.slow
def test_it_passes_its_own_tests(installed: Path) -> None:
    own_tests(installed / "source", installed / "site")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:train.ema")  # of four steps
def test_its_recipe_trains_prunes_and_recovers(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(installed / "site"))
    plugins._installed.cache_clear()
    options = "{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 16, depth: 12, num_heads: 2}"
    short = [f"--backbone.options={options}", "--data=Digits", "--trainer.batch_size=16", "--evaluate=[Accuracy]"]
    short += ["--train.steps=4", "--search.steps=4", "--recover.steps=4"]
    try:
        code = run(PACKAGE / "fashion_d8.yaml", tmp_path / "run", *short)
    finally:
        monkeypatch.undo()
        plugins._installed.cache_clear()
    assert code == 0
    assert "accuracy" in capsys.readouterr().out
    made = tmp_path / "run"
    assert len(json.loads((made / "decision.json").read_text())["kept"]) == 8
    record = json.loads((made / "student" / "config.json").read_text())
    assert record["plugin"] == {"distribution": "tinyfusion-timm", "version": "0.1.0"}
    assert record["network"]["depth"] == 8
    names = {m["name"]: m["values"] for m in json.loads((made / "metrics.json").read_text())["measurements"]}
    assert set(names["accuracy"]) == {"teacher", "pruned", "recovered"}
    assert yaml.safe_load((made / "recipe.yaml").read_text())["backbone"]["class_path"] == "tinyfusion_timm.TimmViT"


def test_it_is_no_part_of_the_wheel() -> None:
    root = PACKAGE.parent.parent.parent
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert "tinyfusion_timm" not in packages
