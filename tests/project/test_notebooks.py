"""The pages that are notebooks print what they show, run as they stand there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from pages import text
from places import ROOT
from tinyfusion_core.cli import main
from tinyfusion_core.registry import registry as plugins

NOTEBOOKS = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
NUMBER = r"-?\d+\.\d+"
APART = 0.25
"""How far a number with a point may be from the one that is shown, as a part of it: processors round differently."""


def differences(printed: str, shown: str) -> str:
    """What an output has otherwise than it is shown; `...` stands for anything, and blanks are as good as tabs."""
    words = [
        ".*?".join(re.sub(r"\d+\\\.\d+", lambda _: rf"({NUMBER})", re.escape(part)) for part in word.split("..."))
        for word in shown.split()
    ]
    found = re.fullmatch(r"\s+".join(words) + r"\s*", printed, re.DOTALL)
    if found is None:
        return f"printed:\n{printed}\nshown:\n{shown}"
    pairs = zip(found.groups(), re.findall(r"\d+\.\d+", shown), strict=True)
    return ", ".join(f"{a}, not {b}" for a, b in pairs if abs(float(a) - float(b)) > APART * float(b))


def follow(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plugins, "_files", {})  # what is loaded here is not seen by other tests
    names = {"__name__": "notebook"}
    for cell in NOTEBOOKS["cells"](text(page)):
        capsys.readouterr()
        if cell.file:
            Path(cell.file).write_text(cell.source)
        elif cell.kind == "python":
            exec(cell.source, names)
        elif cell.kind == "bash":
            for line in cell.source.splitlines():
                program, *words = shlex.split(line)
                if program == "cd":
                    monkeypatch.chdir(*words)
                else:
                    assert program == "tinyfusion"
                    main(words)
        printed = capsys.readouterr()
        assert differences(printed.out, cell.output) == "", printed.err


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore:a search of")
@pytest.mark.parametrize("page", ["vit", "first-plugin"])
def test_it_prints_what_it_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    follow(f"docs/{page}.md", tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (ROOT / "weights" / "smollm2-135m").is_dir(), reason="needs `make smollm2`")
def test_smollm2_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("weights", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    follow("docs/smollm2.md", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a  0.62\n", "a\t0.6\n", True),
        ("a 0.9\n", "a 0.6\n", False),
        ("4 blocks\n", "5 blocks\n", False),
        ("first\nsecond\nthird\n", "first\n...\nthird\n", True),
        ("first\nthird and more\n", "first\n...\nthird\n", False),
        ("anything\n", "", False),
    ],
)
def test_what_counts_as_the_same(printed: str, shown: str, same: bool) -> None:
    assert (differences(printed, shown) == "") == same


def test_jupyter_gets_cells_with_their_outputs() -> None:
    page = 'Before.\n\n```python title="a.py"\nx = 1\n```\n\n'
    page += "```bash\ncd there\ntinyfusion plugins\n```\n\n```text\nout\n```\n"
    first, file, _, commands, _ = NOTEBOOKS["notebook"](page)["cells"]
    assert (first["cell_type"], first["source"]) == ("markdown", "Before.")
    assert file["source"] == "%%writefile a.py\nx = 1"
    assert commands["source"] == "%cd there\n!tinyfusion plugins"
    assert [output["text"] for output in commands["outputs"]] == ["out\n"]


def test_all_of_them_are_run() -> None:
    shown = {page.stem for page in (ROOT / "docs").glob("*.md") if page.read_text().startswith("# Notebook: ")}
    assert shown == {*NOTEBOOKS["PAGES"]} == {"vit", "smollm2", "first-plugin"}
