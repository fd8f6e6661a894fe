"""What a wheel would hold: every data file, every package, every import a declared dependency."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages

from places import ROOT

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


def test_every_import_is_a_declared_dependency() -> None:
    declared = {re.split(r"[\[<>=]", d)[0].replace("-", "_") for d in PROJECT["project"]["dependencies"]}
    declared |= {"yaml", "PIL"} if {"pyyaml", "pillow"} <= declared else set()
    own = set(FOLDERS)
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module or ""]
                # The kit is for tests, and the template has some: where they need pytest, it is at hand.
                there = own | {"pytest", "my_backbone"} if "testing" in path.parts else own
                for module in {m.partition(".")[0] for m in modules} - there - set(sys.stdlib_module_names):
                    assert module in declared, f"{name}: {path.name} imports {module}"
