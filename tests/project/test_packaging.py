"""What a wheel would hold: every data file, every package, every import a declared dependency."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from setuptools import find_packages

from places import ROOT
from plugin_files import pip_install

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {
    path.name: path
    for where in (ROOT, ROOT / "plugins")
    for path in where.glob("tinyfusion_*")
    if (path / "__init__.py").exists()
}
"""The top-level packages."""


def found() -> dict[str, Path]:
    """The packages that setuptools finds, and their folders."""
    find = SETUPTOOLS["packages"]["find"]
    return {
        name: ROOT / where / Path(*name.split("."))
        for where in find["where"]
        for name in find_packages(ROOT / where, include=find["include"])
    }


def test_every_folder_of_code_is_packaged() -> None:
    folders = {path.parent for top in FOLDERS.values() for path in top.rglob("*.py")}
    template = FOLDERS["tinyfusion_core"] / "testing" / "template"
    assert set(found().values()) == folders - {template}


def test_every_data_file_is_packaged() -> None:
    patterns = SETUPTOOLS["package-data"]
    packaged = {
        path
        for name, folder in found().items()
        for pattern in patterns["*"] + patterns.get(name, [])
        for path in folder.glob(pattern)
    }
    for folder in FOLDERS.values():
        present = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert present <= packaged
        assert folder / "py.typed" in packaged


def test_every_plugin_folder_is_a_package_with_an_entry_point() -> None:
    assert set(PROJECT["project"]["entry-points"]["tinyfusion"].values()) == set(FOLDERS) - {"tinyfusion_core"}


def package_of(requirement: str) -> str:
    return re.split(r"[\[<>=]", requirement)[0].replace("-", "_")


def extra(name: str) -> set[str]:
    """The packages of an extra, and of those that it is made of; empty if there is none of this name."""
    found: set[str] = set()
    for line in PROJECT["project"]["optional-dependencies"].get(name, []):
        if others := re.fullmatch(r"tinyfusion\[(.*)\]", line):
            found |= {package for other in others[1].split(",") for package in extra(other)}
        else:
            found.add(package_of(line))
    return found


CORE = {package_of(line) for line in PROJECT["project"]["dependencies"]} | {"yaml", "PIL"}
OPTIONAL = (
    "diffusers", "timm", "transformers", "peft", "datasets", "gguf", "lm_eval", "pyarrow", "jiwer", "soundfile",
    "torchao",
)  # fmt: skip


def test_every_import_is_a_declared_dependency() -> None:
    assert not CORE & set(OPTIONAL)
    assert {"pyyaml", "pillow"} <= CORE
    own = set(FOLDERS)
    for name, folder in FOLDERS.items():
        declared = CORE | extra(name.removeprefix("tinyfusion_"))
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module or ""]
                # The kit is for tests, and the template has some: where they need pytest, it is at hand.
                there = own | {"pytest", "my_backbone"} if "testing" in path.parts else own
                for module in {m.partition(".")[0] for m in modules} - there - set(sys.stdlib_module_names):
                    assert module in declared, f"{name}: {path.name} imports {module}"


def test_a_message_on_a_missing_package_names_the_extra_that_brings_it() -> None:
    found = set()
    for path in (path for folder in FOLDERS.values() for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need":
                module, install = node.args[:2]
                assert isinstance(install, ast.Constant), path.name
                named = re.fullmatch(r"tinyfusion\[(.*)\]", install.value)
                assert named, f"{path.name}: {install.value} is no extra"
                if isinstance(module, ast.Constant):
                    found.add(module.value.partition(".")[0])
                    assert module.value.partition(".")[0] in extra(named[1]), f"{path.name}: {module.value}"
    assert set(OPTIONAL) - {"pyarrow"} <= found  # pyarrow is needed by two names, in one line


def test_what_is_pinned_goes_with_the_oldest_python() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=") + ".0"  # a system's may be nearly so: 3.11.2
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    installed = {one.name: one.metadata["Requires-Python"] or "" for one in distributions() if one.name in pinned}
    assert len(installed) > 0.9 * len(pinned)
    assert {name: spec for name, spec in installed.items() if not SpecifierSet(spec).contains(oldest)} == {}


def test_all_has_every_extra_of_ours_but_the_heaviest_and_engines() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"]) - {"dev", "all", "lm-eval", "quantise", "ray", "slurm"}
    assert {package for name in extras for package in extra(name)} == extra("all")
    assert extra("all") <= extra("dev")


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_without_the_checkout(tmp_path: Path) -> None:
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    away = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("tinyfusion_core", "plugins", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=away)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip_install(source, site)
    shutil.rmtree(source)
    empty.mkdir()
    keep = '{"class_path": "Keep", "init_args": {"blocks": [0, 1, 3, 6]}}'
    flags = ["--search", keep, "--recover.steps", "2", "--evaluate", '["HeldOutLoss"]']
    done = subprocess.run(
        [sys.executable, "-m", "tinyfusion_core", "demo", *flags],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("report: runs/quickstart/report.html\n")
    assert "learned (TinyFusion" in (site / "tinyfusion_core" / "cli" / "quickstart.yaml").read_text()
    assert (empty / "runs" / "quickstart" / "report.html").exists()
