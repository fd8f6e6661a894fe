"""The author's journey: the example of the page, a plugin made from the template, its own checks."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinyfusion_core as tiny
from plugin_files import DOCS, EXAMPLE, listed, own_tests, pip_install
from tinyfusion_core.cli import main
from tinyfusion_core.testing.scaffold import TEMPLATE, new_plugin


def test_the_page_shows_the_example_as_it_is() -> None:
    page = DOCS.read_text()
    assert f"```python\n{EXAMPLE}```" in page
    assert f"```yaml\n{(TEMPLATE / 'digits.yaml').read_text()}```" in page
    assert len(EXAMPLE.splitlines()) <= 60


@pytest.mark.slow
def test_a_new_plugin_installs_and_passes_its_own_tests(
    tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-plugin", "my-backbone", "--into", str(tmp_path)]) == 0
    folder = tmp_path / "my-backbone"
    assert (folder / "my_backbone.py").read_text() == EXAMPLE
    pip_install(folder, site)
    assert "19 passed" in own_tests(folder, site)
    capsys.readouterr()
    plugin = listed(capsys)["my-backbone"]
    assert plugin["brings"] == [["backbone", "MyBackbone"], ["loss", "MyBackboneLoss"]]
    assert (plugin["distribution"], plugin["version"]) == ("my-backbone", "0.1.0")
    assert main(["new-plugin", "my-backbone2", "--into", str(tmp_path)]) == 0
    assert main(["new-plugin", "my-backbone2", "--into", str(tmp_path)]) == 2
    assert "my-backbone2 exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("My Backbone", "use small letters"), ("torch", "installed already"), ("class", "use small")]
)
def test_names_that_a_new_plugin_cannot_have(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=message):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_words_of_a_new_plugin(tmp_path: Path) -> None:
    folder = new_plugin("tiny-unet2", tmp_path)
    text = "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert "my" not in {
        word.lower()[:2] for word in text.split() if "backbone" in word.lower() and "my" in word.lower()
    }
    assert "class TinyUnet2(tiny.CheckpointBackbone)" in (folder / "tiny_unet2.py").read_text()
    assert 'tiny-unet2 = "tiny_unet2"' in (folder / "pyproject.toml").read_text()
    assert (folder / ".github" / "workflows" / "test.yml").exists()
    assert (folder / "tests" / "test_tiny_unet2.py").exists()


@pytest.mark.slow
def test_check_plugin_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(EXAMPLE)
    assert main(["check-plugin", str(tmp_path / "mine.py")]) == 0
    assert "MyBackbone + MyBackboneLoss" in capsys.readouterr().out
