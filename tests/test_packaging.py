"""What a wheel would hold: every data file, every declared package, every import a declared dependency."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_data_file_is_packaged() -> None:
    patterns = SETUPTOOLS["package-data"]
    for name, folder in SETUPTOOLS["package-dir"].items():
        packaged = {
            path for pattern in patterns["*"] + patterns.get(name, []) for path in (ROOT / folder).glob(pattern)
        }
        present = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert present <= packaged
        assert ROOT / folder / "py.typed" in packaged


def test_every_plugin_folder_is_a_package_with_an_entry_point() -> None:
    folders = {p.name for p in (ROOT / "plugins").iterdir() if (p / "__init__.py").exists()}
    assert set(SETUPTOOLS["packages"]) == folders | {"tinyfusion_core"} == set(SETUPTOOLS["package-dir"])
    assert set(PROJECT["project"]["entry-points"]["tinyfusion"].values()) == folders


def test_every_import_is_a_declared_dependency() -> None:
    declared = {re.split(r"[\[<>=]", d)[0].replace("-", "_") for d in PROJECT["project"]["dependencies"]}
    declared |= {"yaml", "PIL"} if {"pyyaml", "pillow"} <= declared else set()
    own = set(SETUPTOOLS["packages"])
    for name, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module or ""]
                # The kit is for tests: where it needs pytest, that is at hand.
                there = own | {"pytest"} if path.name == "testing.py" else own
                for module in {m.partition(".")[0] for m in modules} - there - set(sys.stdlib_module_names):
                    assert module in declared, f"{name}: {path.name} imports {module}"
