"""The site is built without a warning and fetches nothing; its reference has every public name once, explained."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import griffe
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_core import _MOVED
from tinyfusion_core.registry.registry import registry

REFERENCE = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
NAMES = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
"""What the reference explains, by full name."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a broken link, a lost page or an unknown name ends it."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.mark.slow
def test_every_page_is_built_and_fetches_nothing(site: Path) -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "RESULTS.md"]
    for page in pages:
        name = page.relative_to(ROOT).with_suffix(".html")
        html = (site / (name.with_name("index.html") if name.stem == "README" else name)).read_text()
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]* (?:src|href)="?(?:https?:)?//', html), page


def test_every_public_name_is_in_the_reference_once() -> None:
    moved = {".".join(now) for now in _MOVED.values()}
    assert {f"tinyfusion_core.{name}" for name in tiny.__all__} | moved <= set(NAMES)
    explained = [resolve_name(name) for name in NAMES]
    assert len(explained) == len({id(thing) for thing in explained})
    for kind, classes in registry().classes.items():
        assert kind == "command" or {*classes.values()} <= {*explained}, kind


@pytest.mark.slow
def test_nothing_in_the_reference_lacks_a_docstring() -> None:
    source = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "plugins"])
    packages = {top: source.load(top) for top in {name.partition(".")[0] for name in NAMES}}
    source.resolve_aliases()
    explained = {name: packages[top][rest] for name in NAMES for top, _, rest in [name.partition(".")]}
    assert [name for name, thing in explained.items() if not thing.has_docstring] == []
