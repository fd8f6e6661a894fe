"""The examples of the reference: every class has one, and all of them run, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from marks import slow_but
from pages import examples, text
from places import ROOT
from tinyfusion_core.registry import registry as plugins

PAGES = [page.stem for page in sorted((ROOT / "docs" / "reference").glob("*.md")) if page.stem != "README"]


def promised(code: str) -> list[str]:
    """What the lines of an example print, as it says."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)


def fewer_steps(code: str) -> str:
    """An example that takes seconds: what it prints does not depend on how well anything is trained or judged."""
    code = re.sub(r"steps=(\d{3,})\b", lambda found: f"steps={int(found[1]) // 30}", code)
    return re.sub(r"\bsamples=64\b", "samples=16", code)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_has_an_example(page: str) -> None:
    elsewhere = "\n".join(examples("docs/writing-a-plugin.md"))
    for group in text(f"docs/reference/{page}.md").split("\n## ")[1:]:
        shown = "\n".join([*re.findall(r"```python\n(.*?)```", group, re.DOTALL), elsewhere])
        for name in re.findall(r"^::: \S+\.(\w+)$", group, re.MULTILINE):
            assert re.search(rf"\b{name}\b", shown), name


@pytest.mark.parametrize("page", slow_but(PAGES, "network"))
@pytest.mark.filterwarnings("ignore:a search of")
def test_examples_run_and_print_what_they_say(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_files", {})  # what is loaded here is not seen by other tests
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    criterion = next(code for code in examples("docs/writing-a-plugin.md") if "class EveryOther" in code)
    (tmp_path / "every_other.py").write_text(criterion)
    (start,) = examples("docs/quickstart.md")
    names = {"torch": torch, "__name__": "example"}
    exec(start, names)
    for code in examples(f"docs/reference/{page}.md"):
        capsys.readouterr()
        exec(fewer_steps(code), names)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in promised(code) if line not in printed] == []
