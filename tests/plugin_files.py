"""Plugins as files and as installed packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT
from tinyfusion_core.cli import main
from tinyfusion_core.registry.hooks import KINDS
from tinyfusion_core.testing.scaffold import TEMPLATE

EXAMPLE = (TEMPLATE / "my_backbone.py").read_text()
DOCS = ROOT / "docs" / "writing-a-plugin.md"
PLUGIN = """
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_core.protocols.data import DataSource

class {name}(DataSource):
    def train(self): ...
    def held_out(self): ...

@hookimpl
def tinyfusion_register_data():
    return [{name}]
"""


CONCRETE = {
    "backbone": "from toys import Planted as Base",
    "loss": "from toys import Match as Base",
    "data": "from tinyfusion_images import Digits as Base",
    "metric": "from tinyfusion_core import Latency as Base",
    "selector": "from tinyfusion_core import Uniform as Base",
    "sampler": "from tinyfusion_core import ExactK as Base",
    "weight_update": "from tinyfusion_core import Frozen as Base",
    "distillation": "from tinyfusion_core import OutputKD as Base",
    "start": "from tinyfusion_core import Refit as Base",
    "feature_space": "from tinyfusion_images.features import ShippedFeatures as Base",
    "command": "from tinyfusion_core.cli.plugins import Keys as Base",
}


def bringing(kind: str, body: str = "pass") -> str:
    """A plugin with one class of a kind, called `Mine`."""
    return (
        f"import tinyfusion_core as tiny\n{CONCRETE[kind]}\nclass Mine(Base):\n    {body}\n"
        f"@tiny.hookimpl\ndef {KINDS[kind].hook}():\n    return [Mine]\n"
    )


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    assert main(["plugins", "--json"]) == 0
    return {p["name"]: p for p in json.loads(capsys.readouterr().out)}


def install(folder: Path, name: str, code: str) -> None:
    """An installed distribution with one entry point, as pip would leave it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tinyfusion]\n{name} = {name}\n")


def pip_install(folder: Path, site: Path) -> None:
    """As in a place without a network."""
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", str(site)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *how, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def own_tests(folder: Path, site: Path) -> str:
    """What pytest says of a package's own tests, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
