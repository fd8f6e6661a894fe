"""A plugin that is a package of its own: installed with pip, checked, and run through a recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from test_plugins import pip_install, tinyfusion

PACKAGE = Path(__file__).parent / "third_party" / "tinyfusion_timm"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it, offline."""
    folder = tmp_path_factory.mktemp("timm")
    shutil.copytree(PACKAGE, folder / "source")  # pip builds in the place where the source is
    pip_install(folder / "source", folder / "site")
    return folder / "site"


def test_it_passes_its_own_tests(site: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *(p for p in sys.path if p)])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "tests"],
        cwd=site.parent / "source", env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_its_recipe_trains_prunes_and_recovers(site: Path) -> None:
    options = "{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 16, depth: 12, num_heads: 2}"
    short = [f"--backbone.options={options}", "--data=Digits", "--trainer.batch_size=16", "--evaluate=[Accuracy]"]
    short += ["--train.steps=4", "--search.steps=4", "--recover.steps=4"]
    done = tinyfusion("run", str(PACKAGE / "fashion_d8.yaml"), "--run-dir", "run", *short, path=site)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    run = site / "run"
    assert len(json.loads((run / "decision.json").read_text())["kept"]) == 8
    record = json.loads((run / "student" / "config.json").read_text())
    assert record["plugin"] == {"distribution": "tinyfusion-timm", "version": "0.1.0"}
    assert record["network"]["depth"] == 8
    names = {m["name"]: m["values"] for m in json.loads((run / "metrics.json").read_text())["measurements"]}
    assert set(names["accuracy"]) == {"teacher", "pruned", "recovered"}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["backbone"]["class_path"] == "tinyfusion_timm.TimmViT"


def test_it_is_no_part_of_the_wheel() -> None:
    import tomllib

    root = PACKAGE.parent.parent.parent
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert "tinyfusion_timm" not in packages
