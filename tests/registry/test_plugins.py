"""Plugins that are installed and plugins that are one file: what they bring, under which names, and when not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

import tinyfusion_core as tiny
from places import ROOT
from plugin_files import DOCS, EXAMPLE, PLUGIN, bringing, install, listed
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.keys import described
from tinyfusion_core.parsing.settings import Settings
from tinyfusion_core.registry import registry as plugins
from tinyfusion_core.registry.hooks import KINDS
from tinyfusion_core.testing import name_of
from tinyfusion_core.testing.checks import CHECKS
from tinyfusion_core.testing.scaffold import TEMPLATE
from tinyfusion_dit import DiT

# Listing, and switches


def test_switches(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "flowers", PLUGIN.format(name="Flowers"))
    monkeypatch.setenv("TINYFUSION_BLOCK", "flowers,mar,ditt")
    with pytest.warns(UserWarning, match="TINYFUSION_BLOCK") as warned:
        found = listed(capsys)
    known = ", ".join(sorted({*found} - {"core"}))
    assert [str(w.message) for w in warned] == [
        f"TINYFUSION_BLOCK: no plugin 'ditt' is installed; did you mean 'dit'? (known: {known})"
    ]
    assert found["flowers"]["error"] == found["mar"]["error"] == "switched off by TINYFUSION_BLOCK"
    assert not found["flowers"]["brings"]
    assert found["dit"]["brings"]
    assert set(found["flowers"]) == {"name", "module", "distribution", "version", "brings", "error", "missing"}
    assert (found["flowers"]["distribution"], found["flowers"]["version"]) == ("flowers", "1.0")
    monkeypatch.delenv("TINYFUSION_BLOCK")
    monkeypatch.setenv("TINYFUSION_PLUGINS", "flowers, dit")
    plugins._installed.cache_clear()
    assert {name for name, p in listed(capsys).items() if not p["error"]} == {"core", "flowers", "dit"}
    assert main(["plugins"]) == 0
    assert "\nmar: switched off by TINYFUSION_PLUGINS\n" in capsys.readouterr().out


def test_a_name_of_two_is_refused_until_one_is_switched_off(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "otherdigits", PLUGIN.format(name="Digits"))
    assert main(["plugins"]) == 2
    message = "plugins 'images' and 'otherdigits' both bring a data named 'Digits' (tinyfusion_register_data); switch"
    assert message in capsys.readouterr().err
    assert plugins.record_of(DiT) == {}  # a network can be saved all the same
    monkeypatch.setenv("TINYFUSION_BLOCK", "otherdigits")
    assert listed(capsys)["images"]["brings"]
    assert plugins.record_of(DiT)["distribution"] == "tinyfusion"


def test_two_packages_with_a_plugin_of_one_name(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "dit", PLUGIN.format(name="Flowers"))
    assert main(["plugins"]) == 2
    err = capsys.readouterr().err
    assert "two plugins are named 'dit', of " in err
    assert "tinyfusion 0.1.0" in err and "dit 1.0" in err


def test_the_core_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TINYFUSION_PLUGINS", "images")
    monkeypatch.setenv("TINYFUSION_BLOCK", "core")
    plugins._installed.cache_clear()
    found = listed(capsys)
    assert {name for name, p in found.items() if not p["error"]} == {"core", "images"}
    assert ["selector", "Search"] in found["core"]["brings"]


# Hooks


def test_every_hook_is_documented_and_has_a_user() -> None:
    users = [*ROOT.glob("plugins/*/__init__.py"), ROOT / "tinyfusion_core" / "builtins.py"]
    code, page = "".join(p.read_text() for p in users), DOCS.read_text()
    for kind in KINDS.values():
        module, _, base = kind.base.partition(":")
        public = f"tiny.{base}" if hasattr(tiny, base) else f"{module}.{base}"
        assert f"| `{kind.hook}` | `{public}` | {kind.where} |" in page
        assert f"def {kind.hook}(" in code
        assert getattr(tiny, base, kind.base_class()) is kind.base_class()
    assert "19 checks" in page
    for check in CHECKS:
        assert f"| `{name_of(check)}` | {' '.join((check.__doc__ or '').split())} |" in page


def test_a_plugin_adds_options_to_any_class_that_has_some() -> None:
    derived = []
    for cls in {cls for classes in plugins.registry().classes.values() for cls in classes.values()}:
        if dataclasses.is_dataclass(cls) and issubclass(cls, Settings):
            module = {"Base": cls, "dataclass": dataclasses.dataclass, "__name__": "elsewhere"}
            exec("@dataclass(frozen=True, kw_only=True)\nclass Mine(Base):\n    more: int = 0\n", module)
            derived.append(module["Mine"])
    assert len(derived) > 40
    assert {get_type_hints(cls.__init__)["more"] for cls in derived} == {int}


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_brings_its_classes_under_their_names(kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(bringing(kind, "name = 'Mine'" if kind == "command" else "pass"))
    file = tiny.load_plugin(tmp_path / "mine.py")
    found = plugins.registry()
    mine = found.find(kind, "Mine")
    assert mine.__module__ == "plugin_file_mine"
    assert (kind, "Mine") in next(p for p in found.plugins if p.name == "mine.py").brings
    assert plugins.record_of(mine) == {"file": "mine.py", "sha256": file.sha256}
    with pytest.raises(tiny.UserError, match="no plugin brings 'Mime'; did you mean 'Mine'"):
        found.find(kind, "Mime")


# A plugin that is one file


@pytest.mark.slow
def test_a_recipe_runs_with_a_file_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, away = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (home / "my_backbone.py").write_text(EXAMPLE)
    recipe = {"plugins": ["my_backbone.py"], **yaml.safe_load((TEMPLATE / "digits.yaml").read_text())}
    (home / "mine.yaml").write_text(yaml.safe_dump(recipe))
    short = ["--train.steps=3", "--search.steps=3", "--recover.steps=3", "--evaluate=[HeldOutLoss]"]
    assert run(home / "mine.yaml", away, *short) == 0
    assert run(home / "mine.yaml", away, *short) == 0  # goes on from where it is: it is done
    identity = json.loads((away / "run.json").read_text())["settings"]
    assert identity["plugins.my_backbone.py (its content)"] == plugins.load_plugin(home / "my_backbone.py").sha256

    # An edited file is another run.
    capsys.readouterr()
    (home / "my_backbone.py").write_text(EXAMPLE.replace("size=64", "size=48"))
    assert run(home / "mine.yaml", away, *short) == 2
    assert "plugins.my_backbone.py (its content): " in capsys.readouterr().err

    # The run folder has what it needs to be read, wherever the file has gone.
    shutil.rmtree(home)
    plugins._files.clear()
    assert main(["show", str(away)]) == 0
    again = tiny.load_recipe(away / "recipe.yaml")
    assert type(again.backbone).__name__ == "MyBackbone"
    assert main(["sample", str(away)]) == 2
    assert "MyBackboneLoss cannot generate samples" in capsys.readouterr().err

    # A student alone does not run the code of others; it says whose it needs.
    assert len(tiny.load_pretrained(away / "student").blocks) == 4
    plugins._files.clear()
    with pytest.raises(tiny.UserError, match=r"'MyBackbone', which came from the file my_backbone\.py"):
        tiny.load_pretrained(away / "student")
    tiny.load_plugin(away / "my_backbone.py")
    assert len(tiny.load_pretrained(away / "student").blocks) == 4


def test_plugins_of_a_recipe_that_are_wrong(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for value, message in (
        ("mine.py", "plugins: expected a list of Python files beside the recipe: [my_backbone.py]"),
        ("[mine.py]", "mine.py: No such file or directory; paths are relative to the recipe"),
        ("[mine.py, a/mine.py]", "plugins: two files have the same name; rename one"),
    ):
        assert main(["validate", str(recipe), f"--plugins={value}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.yaml", "stages.json", "student", "report.html"])
def test_a_plugin_file_has_no_name_of_a_run_folders(
    name: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(EXAMPLE)
    assert run(recipe, tmp_path / "run", f"--plugins=[{name}]") == 2
    assert f"{name}: expected a Python file, with a name that ends in .py" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", ["", "0", "3", "'bye'"])
def test_a_plugin_that_exits_is_an_error_that_names_it(
    code: str, tmp_path: Path, recipe: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(f"import sys\nsys.exit({code})\n")
    assert main(["validate", str(recipe), "--plugins=[mine.py]"]) == 2
    assert f"mine.py: it calls sys.exit({code})" in capsys.readouterr().err
    install(site, "leaving", f"import sys\nsys.exit({code})\n")
    with pytest.warns(UserWarning, match=r"plugin 'leaving' .* left out: it calls sys\.exit"):
        assert listed(capsys)["leaving"]["error"] == f"it calls sys.exit({code})"
    # Not when it is loaded, but later.
    plugins._installed.cache_clear()
    (site / "leaving.py").unlink()
    shutil.rmtree(site / "leaving-1.0.dist-info")
    (tmp_path / "mine.py").write_text(bringing("data", f"def __init__(self): import sys; sys.exit({code})"))
    assert main(["validate", str(recipe), "--plugins=[mine.py]", "--data=Mine"]) == 2
    err = capsys.readouterr().err
    assert "mine.py, line 4: sys.exit was called before 'validate' was done" in err


def test_a_file_is_run_once_and_takes_the_place_of_its_elder(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE)
    tiny.load_plugin(path)
    first = plugins.registry().classes["backbone"]["MyBackbone"]
    tiny.load_plugin(path)
    assert plugins.registry().classes["backbone"]["MyBackbone"] is first
    assert plugins.record_of(first) == {"file": "mine.py", "sha256": hashlib.sha256(EXAMPLE.encode()).hexdigest()}
    path.write_text(EXAMPLE.replace("depth=8", "depth=6"))
    tiny.load_plugin(path)
    second = plugins.registry().classes["backbone"]["MyBackbone"]
    assert second is not first
    assert second().config() == {"size": 64, "depth": 6}
    assert plugins.record_of(first) == {}
    assert described(second) == ["plugin_file_mine:MyBackbone", plugins.record_of(second)["sha256"]]  # for compare
    (listed,) = (p for p in plugins.registry().plugins if p.name == "mine.py")
    assert (listed.distribution, listed.module) == ("file", str(path))
    path.write_text("raise RuntimeError('half-written')")
    with pytest.raises(tiny.UserError, match="half-written"):
        tiny.load_plugin(path)
    assert plugins.registry().classes["backbone"]["MyBackbone"] is second  # the one that worked stays
